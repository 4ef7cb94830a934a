"""The report as a reader meets it: in a real browser, from the disk."""

import pytest
from support import browser, logged_runs

from trl_a3po.report import write_report


pytestmark = [pytest.mark.slow, pytest.mark.skipif(browser.CHROMIUM is None, reason="no Chromium is installed")]

TROUBLE = ("Log.entryAdded", "Runtime.consoleAPICalled", "Runtime.exceptionThrown")


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    page = browser.Page(tmp_path_factory.mktemp("browser"))
    yield page
    page.close()


@pytest.fixture
def show(page, tmp_path):
    """Opens a report on runs; what went wrong in the browser fails the test at its end."""

    def open_report(*run_dirs):
        path = write_report(run_dirs, tmp_path / "report.html")
        page.resize(1280, 900)
        page.events.clear()
        page.open(path)
        return page

    yield open_report
    page.run("new Promise((done) => setTimeout(done, 50))")
    assert [event for event in page.events if event["method"] in TROUBLE] == []
    requests = [event["params"] for event in page.events if event["method"] == "Network.requestWillBeSent"]
    assert [request["request"]["url"] for request in requests] == [(tmp_path / "report.html").as_uri()]


def texts(page, selector):
    return page.run(f"[...document.querySelectorAll({selector!r})].map((node) => node.textContent)")


def choose(page, field, value):
    page.run(
        f"(() => {{ const field = document.getElementById({field!r}); field.value = {value!r};"
        "for (const name of ['input', 'change']) field.dispatchEvent(new Event(name, {bubbles: true})); })()"
    )


def steps_shown(page):
    return page.run("document.querySelector('.filters output').value")


def test_the_charts_show_all_runs(show, tmp_path):
    page = show(logged_runs.a3po(tmp_path / "mine"), logged_runs.grpo(tmp_path / "theirs"))
    assert page.run("document.title") == "Training report: mine, theirs"
    titles = texts(page, "figure h3")
    assert titles[:3] == ["Reward mean", "Held-out reward mean", "Entropy nats"]
    assert "Scale of the selected tokens ×" in titles
    assert texts(page, "figure:first-child .legend li")[:2] == ["mine1", "theirs1"]
    assert page.run("document.querySelectorAll('.chart')[0].querySelectorAll('polyline').length") == 2
    label = page.run("document.querySelector('.chart').getAttribute('aria-label')")
    assert label == "Reward, mean, by optimizer step. mine: from 0.1 to 1; theirs: from 0.1 to 1."
    page.run("document.querySelector('#runs input').click()")
    assert texts(page, "figure h3") == ["Reward mean", "Entropy nats", "Completion length tokens"]


def test_options_that_are_off_have_charts_where_they_were_on(show, tmp_path):
    metrics = {
        "a3po/positive/selected_mismatch": 0.02,
        "a3po/dynamic_sampling/discarded": 3.0,
    }
    logged_runs.write_state(tmp_path / "mine", [logged_runs.entry(step, 4, **metrics) for step in range(1, 5)])
    titles = {"Sampler's mismatch, selected tokens nats", "Dynamic sampling groups"}
    assert titles <= set(texts(show(tmp_path / "mine"), "figure h3"))
    assert not titles & set(texts(show(logged_runs.a3po(tmp_path / "other")), "figure h3"))


@pytest.mark.parametrize("width", [360, 768, 1280, 2560])
def test_the_charts_are_legible_on_every_screen(width, show, tmp_path):
    page = show(logged_runs.a3po(tmp_path / "run"))
    page.resize(width, 900)
    sizes = page.run(
        "[...document.querySelectorAll('.chart text')].map((text) => text.getBoundingClientRect().height)"
    )
    assert min(sizes) > 10
    assert max(sizes) < 24
    assert page.run(f"document.documentElement.scrollWidth <= {width}")


def test_the_other_metrics_are_there_when_they_are_asked_for(show, tmp_path):
    page = show(logged_runs.grpo(tmp_path / "run"))
    assert "loss " not in texts(page, "figure h3")
    page.run("document.querySelector('summary').click()")
    page.wait_for("document.querySelectorAll('details figure').length === 1")
    assert texts(page, "details figure h3") == ["loss "]
    assert page.run("document.getElementById('completions').hidden")


def test_a_chart_is_read_by_pointer_and_by_key(show, tmp_path):
    page = show(logged_runs.a3po(tmp_path / "run"))
    page.point_at(".chart")
    assert texts(page, ".at")[0] == "step 5"
    assert texts(page, ".legend b")[0] == "0.5"
    page.run("document.querySelector('.chart').focus()")
    page.press("ArrowRight")
    assert texts(page, ".at")[0] == "step 6"
    page.press("ArrowLeft")
    page.press("ArrowLeft")
    assert texts(page, ".legend b")[0] == "0.4"


TIP = ["weight", "2", "probability", "0.125", "entropy", "1.25 nats", "token", "1 of 3"]


def test_a_token_tells_its_numbers_by_pointer_key_and_tap(show, tmp_path):
    page = show(logged_runs.a3po(tmp_path / "run"))
    assert page.run("document.getElementById('tip').hidden")
    page.point_at(".token")
    assert texts(page, "#tip dt, #tip dd") == TIP
    assert texts(page, "#tip b") == ["“4”"]
    page.point_at("h1")
    assert page.run("document.getElementById('tip').hidden")

    page.run("document.querySelector('.token').focus()")
    assert texts(page, "#tip dt, #tip dd") == TIP
    page.press("ArrowRight")
    assert texts(page, "#tip b") == ["“ is”"]
    page.press("End")
    assert texts(page, "#tip b") == ["“↵”"]
    page.press("Home")
    assert texts(page, "#tip b") == ["“4”"]
    page.press("Escape")
    assert page.run("document.getElementById('tip').hidden")

    page.tap(".token", 1)
    page.wait_for("!document.getElementById('tip').hidden")
    assert texts(page, "#tip b") == ["“ is”"]
    box = page.run("JSON.parse(JSON.stringify(document.getElementById('tip').getBoundingClientRect()))")
    assert box["left"] >= 0
    assert box["top"] >= 0


def test_a_token_is_colored_by_its_weight(show, tmp_path):
    page = show(logged_runs.a3po(tmp_path / "run"))
    colors = page.run("[...document.querySelectorAll('.token')].map((node) => getComputedStyle(node).backgroundColor)")
    nothing = "rgba(0, 0, 0, 0)"
    assert [color == nothing for color in colors] == [False, True, True] * 2
    assert colors[0] != colors[3]  # the polarities have colors of their own
    assert page.run("document.querySelectorAll('.token.raised').length") == 2
    choose(page, "color", "entropy")
    assert texts(page, ".ramps") == ["entropy 0 to 1.25 nats"]
    recolored = page.run(
        "[...document.querySelectorAll('.token')].map((node) => getComputedStyle(node).backgroundColor)"
    )
    assert nothing not in recolored


def test_groups_with_one_question_stand_apart(show, tmp_path):
    logged_runs.write_tokens(tmp_path / "run", [logged_runs.completion(1, group=group) for group in (0, 0, 1)])
    page = show(tmp_path / "run")
    assert texts(page, ".prompt > pre") == ["2+2=", "2+2="]
    assert page.run(
        "[...document.querySelectorAll('.prompt')].map((node) => node.querySelectorAll('article').length)"
    ) == [2, 1]


def test_positive_and_negative_stand_side_by_side(show, tmp_path):
    page = show(logged_runs.a3po(tmp_path / "run"))
    assert texts(page, ".prompt > pre") == ["2+2="]
    assert texts(page, ".side > h3") == ["Positive", "Negative"]
    boxes = "[...document.querySelectorAll('.side')].map((node) => node.getBoundingClientRect().%s)"
    left, right = page.run(boxes % "left")
    assert left < right
    page.resize(390, 800)
    left, right = page.run(boxes % "left")
    assert left == right
    assert page.run("document.documentElement.scrollWidth <= 390")


def test_filters_by_step_and_by_reward(show, tmp_path):
    page = show(logged_runs.a3po(tmp_path / "run"))
    assert steps_shown(page) == "1"
    choose(page, "step", "2")
    assert steps_shown(page) == "3"
    assert len(texts(page, "article")) == 2
    choose(page, "least", "0.5")
    assert [text.startswith("reward 1 ") for text in texts(page, "article")] == [True]
    choose(page, "least", "")
    choose(page, "most", "0.5")
    assert [text.startswith("reward 0 ") for text in texts(page, "article")] == [True]
    choose(page, "most", "-1")
    assert texts(page, "#prompts") == ["No completion of this step has a reward in this range."]


def test_the_completions_of_each_run(show, tmp_path):
    first, second = logged_runs.a3po(tmp_path / "first"), logged_runs.a3po(tmp_path / "second", steps=4)
    page = show(first, logged_runs.grpo(tmp_path / "none"), second)
    assert texts(page, "#run option") == ["first", "second"]
    choose(page, "step", "9")
    assert steps_shown(page) == "10"
    choose(page, "run", "1")
    choose(page, "step", "9")
    assert steps_shown(page) == "4"


def test_a_run_whose_tokens_were_not_logged_says_how(show, tmp_path):
    run = logged_runs.a3po(tmp_path / "run")
    (run / "tokens.jsonl").unlink()
    page = show(run)
    assert texts(page, "#left-out") == [
        "No completions were logged. A3POConfig(log_tokens=2) logs those of two prompts at every log."
    ]
    assert page.run("getComputedStyle(document.querySelector('.filters')).display") == "none"


def test_what_was_left_out_is_said(show, tmp_path):
    long = [logged_runs.completion(step, ["x"] * 1024, length=5000) for step in range(1, 401)]
    logged_runs.write_tokens(tmp_path / "run", long)
    with (tmp_path / "run" / "tokens.jsonl").open("ab") as file:
        file.write(b"torn")
    page = show(tmp_path / "run")
    (note,) = texts(page, "#left-out")
    assert note == "195 of 400 logged steps are shown. 1 lines of the token log could not be read."
    assert "first 1024 of 5000 tokens" in texts(page, ".facts")[0]


def test_a_hostile_run_is_shown_and_does_nothing(show, tmp_path):
    page = show(logged_runs.hostile(tmp_path / "<img src=x onerror=globalThis.broken=5>"))
    page.run("document.querySelector('summary').click()")
    page.point_at(".token")
    assert texts(page, "#tip b") == [f"“{logged_runs.HOSTILE[0]}”"]
    assert page.run("globalThis.broken === undefined")
    assert page.run("document.querySelectorAll('img, iframe, object, link, base, a').length") == 0
    assert page.run("document.scripts.length") == 2
    assert texts(page, ".token")[0] == logged_runs.HOSTILE[0]
    assert "⟨U+202E⟩esrever⟨U+2066⟩" in texts(page, ".token")
    assert logged_runs.HOSTILE[1] + " " in texts(page, "figure h3")


def test_the_policy_of_the_page_forbids_what_gets_into_it(page, tmp_path):
    page.events.clear()
    page.open(write_report([logged_runs.a3po(tmp_path / "run")], tmp_path / "report.html"))
    page.run(
        "document.body.insertAdjacentHTML('beforeend', \"<img src='data:,' onerror='globalThis.broken = 1'>\");"
        "document.body.append(Object.assign(document.createElement('script'), {text: 'globalThis.broken = 2'}));"
        "fetch('https://example.invalid').catch(() => null)"
    )
    page.run("new Promise((done) => setTimeout(done, 100))")
    assert page.run("globalThis.broken === undefined")
    refused = [event["params"]["entry"] for event in page.events if event["method"] == "Log.entryAdded"]
    assert all("Content Security Policy" in entry["text"] for entry in refused)
    assert len(refused) >= 3


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_stands_out_from_what_is_behind_it(show, page, scheme, tmp_path):
    page.prefer(scheme)
    show(logged_runs.a3po(tmp_path / "run"), logged_runs.grpo(tmp_path / "theirs"))
    contrasts = page.run(CONTRASTS)
    assert len(contrasts) > 20
    assert [one for one in contrasts if one[1] < 4.5] == []


# The WCAG's contrast of each piece of text to what is painted behind it.
CONTRASTS = """
(() => {
  const canvas = Object.assign(document.createElement("canvas"), { width: 1, height: 1 })
    .getContext("2d", { willReadFrequently: true });
  const painted = (colors) => {
    canvas.clearRect(0, 0, 1, 1);
    for (const color of colors) { canvas.fillStyle = color; canvas.fillRect(0, 0, 1, 1); }
    return [...canvas.getImageData(0, 0, 1, 1).data].slice(0, 3);
  };
  const linear = (value) => (value <= 0.04045 ? value / 12.92 : ((value + 0.055) / 1.055) ** 2.4);
  const luminance = (rgb) => {
    const [r, g, b] = rgb.map((value) => linear(value / 255));
    return 0.2126 * r + 0.7152 * g + 0.0722 * b;
  };
  const contrasts = [];
  const kinds = "h1, h2, h3, p, th, td, text, .legend span, .legend b, .token, .ramps span, label, output";
  for (const node of document.querySelectorAll(kinds)) {
    const style = getComputedStyle(node), behind = [];
    if (!node.textContent.trim() || !node.getClientRects().length) continue;
    for (let up = node; up; up = up.parentElement) behind.unshift(getComputedStyle(up).backgroundColor);
    const text = node.tagName === "text" ? style.fill : style.color;
    const [first, second] = [painted([...behind, text]), painted(behind)].map(luminance);
    const [low, high] = [Math.min(first, second), Math.max(first, second)];
    contrasts.push([node.textContent.slice(0, 40), (high + 0.05) / (low + 0.05)]);
  }
  return contrasts;
})()
"""
