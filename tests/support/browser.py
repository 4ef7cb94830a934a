"""A headless Chromium, driven over its DevTools protocol by a pair of pipes: nothing but Python is needed for it."""

import json
import os
import select
import shutil
import subprocess
import time


CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)

_FLAGS = (
    "--headless",
    "--remote-debugging-pipe",
    "--disable-gpu",
    "--disable-quic",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--disable-dev-shm-usage",
    "--no-first-run",
    # The root user of a container has no sandbox.
    *(["--no-sandbox"] if os.geteuid() == 0 else []),
)
# Where the protocol has Chromium read and write.
_WITH_PIPES = 'exec "$@" 3<"$COMMANDS" 4>"$ANSWERS" 2>"$LOG"'


class Page:
    """
    A page of a browser of its own. What happens in it is kept in `events`.

    Args:
        directory (`Path`): An empty directory, for the profile.
    """

    def __init__(self, directory):
        pipes = {"COMMANDS": directory / "commands", "ANSWERS": directory / "answers", "LOG": directory / "log"}
        os.mkfifo(pipes["COMMANDS"])
        os.mkfifo(pipes["ANSWERS"])
        self._process = subprocess.Popen(
            ["sh", "-c", _WITH_PIPES, "sh", CHROMIUM, *_FLAGS, f"--user-data-dir={directory / 'profile'}"],
            env={**os.environ, **{name: str(path) for name, path in pipes.items()}},
        )
        self._commands = pipes["COMMANDS"].open("wb", buffering=0)
        self._answers = pipes["ANSWERS"].open("rb", buffering=0)
        self._unread = b""
        self._number = 0
        self._session = {}
        self.events = []
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        self._session = {"sessionId": self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]}
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.call(f"{domain}.enable")

    def close(self):
        self._session = {}
        self.call("Browser.close")
        self._process.wait(30)
        self._commands.close()
        self._answers.close()

    def call(self, method, **params):
        self._number += 1
        message = {"id": self._number, "method": method, "params": params, **self._session}
        self._commands.write(json.dumps(message).encode() + b"\0")
        while True:
            answer = self._read()
            if answer.get("id") == self._number:
                assert "error" not in answer, answer
                return answer["result"]
            self.events.append(answer)

    def _read(self, timeout=60):
        while b"\0" not in self._unread:
            ready, _, _ = select.select([self._answers], [], [], timeout)
            assert ready, "Chromium does not answer"
            part = os.read(self._answers.fileno(), 2**20)
            assert part, "Chromium has ended"
            self._unread += part
        message, _, self._unread = self._unread.partition(b"\0")
        return json.loads(message)

    def open(self, path):
        self.call("Page.navigate", url=path.as_uri())
        self.wait_for("document.readyState === 'complete'")

    def run(self, script):
        """The value of an expression of JavaScript."""
        answer = self.call("Runtime.evaluate", expression=script, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in answer, answer["exceptionDetails"]
        return answer["result"].get("value")

    def wait_for(self, script, seconds=30):
        deadline = time.monotonic() + seconds
        while not self.run(script):
            assert time.monotonic() < deadline, f"{script} did not come true"
            time.sleep(0.05)

    def resize(self, width, height):
        self.call("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=False)
        self.wait_for(f"innerWidth === {width}")
        self.run("new Promise((done) => requestAnimationFrame(() => requestAnimationFrame(done)))")  # laid out anew

    def prefer(self, scheme):
        self.call("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": scheme}])

    def center(self, selector, number=0):
        """Scrolls to an element, and says where it is on the screen."""
        return self.run(
            f"(() => {{ const node = document.querySelectorAll({json.dumps(selector)})[{number}];"
            "node.scrollIntoView({block: 'center', behavior: 'instant'}); const box = node.getClientRects()[0];"
            "return [box.x + box.width / 2, box.y + box.height / 2]; })()"
        )

    def point_at(self, selector, number=0):
        x, y = self.center(selector, number)
        self.call("Input.dispatchMouseEvent", type="mouseMoved", x=x, y=y, pointerType="mouse")

    def tap(self, selector, number=0):
        x, y = self.center(selector, number)
        self.call("Input.dispatchTouchEvent", type="touchStart", touchPoints=[{"x": x, "y": y}])
        self.call("Input.dispatchTouchEvent", type="touchEnd", touchPoints=[])

    def press(self, key):
        for kind in ("keyDown", "keyUp"):
            self.call("Input.dispatchKeyEvent", type=kind, key=key, code=key, windowsVirtualKeyCode=_KEY_CODES[key])


_KEY_CODES = {"Tab": 9, "Escape": 27, "End": 35, "Home": 36, "ArrowLeft": 37, "ArrowRight": 39}
