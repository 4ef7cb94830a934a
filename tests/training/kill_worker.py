"""
Makes one run without interruption, and one that is killed and resumed again and again, and reports how each went.

Run by test_kill.py: `python kill_worker.py MODEL OUTPUT KILLS`, with a list of `Kill`s in JSON.
"""

import json
import os
import signal
import sys
import threading
import traceback
from collections import Counter
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from support import tiny
from support.checkpoints import digests
from transformers import TrainerCallback
from transformers.trainer_utils import get_last_checkpoint

from trl_a3po import A3POTrainer
from trl_a3po.training.checkpoints import last_complete_checkpoint


POINTS = ("rollout", "backward", "optimizer step", "checkpoint", "push")


@dataclass
class Kill:
    """Which visit to a point a process does not survive, and how much of that it lives to see."""

    point: str
    visit: int
    share: float


class Reaper:
    """Counts the calls, of Python functions and into C, that the process makes at each point, and kills it at one."""

    def __init__(self, kill=None, calls_at_points=None):
        self.calls = Counter()
        self._visits = Counter()
        self._points = []  # the innermost last
        self._kill = kill
        self._last_call = int(kill.share * calls_at_points[kill.point]) if kill else None
        threading.setprofile(self._count)  # a push is made in a thread of its own

    def enter(self, point):
        self._points.append(point)
        self._visits[point] += 1
        self.calls[point] = 0
        sys.setprofile(self._count)

    def leave(self):
        sys.setprofile(None)
        if self._is_due():
            os.kill(os.getpid(), signal.SIGKILL)
        self._points.pop()
        if self._points:
            sys.setprofile(self._count)

    @contextmanager
    def at(self, point):
        self.enter(point)
        yield
        self.leave()

    def _count(self, frame, event, argument):
        if event in ("call", "c_call") and self._points:
            self.calls[self._points[-1]] += 1
            if self._is_due() and self.calls[self._kill.point] > self._last_call:
                os.kill(os.getpid(), signal.SIGKILL)

    def _is_due(self):
        kill = self._kill
        return kill and self._points[-1] == kill.point and self._visits[kill.point] == kill.visit


class MortalTrainer(A3POTrainer):
    """Tells a reaper where it is."""

    def __init__(self, reaper, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self._reaper = reaper
        self._backward = self.accelerator.backward
        self.accelerator.backward = self._backward_at_point
        for parameter in self.model.parameters():
            parameter.register_hook(lambda gradient: None)  # a call on the way back

    def _generate_and_score_completions(self, inputs):
        with self._reaper.at("rollout"):
            return super()._generate_and_score_completions(inputs)

    def _backward_at_point(self, *args, **kwargs):
        with self._reaper.at("backward"):
            self._backward(*args, **kwargs)

    def _save_checkpoint(self, model, trial):
        with self._reaper.at("checkpoint"):
            super()._save_checkpoint(model, trial)

    def _push_from_checkpoint(self, checkpoint_folder):
        with self._reaper.at("push"):
            super()._push_from_checkpoint(checkpoint_folder)
            self.push_in_progress.wait_until_done()


class Journal(TrainerCallback):
    """Notes on the disk what a run started from and saw, beyond the death of its process."""

    def __init__(self, path, reaper):
        self._path = path
        self._reaper = reaper

    def note(self, **entry):
        with self._path.open("a") as file:
            file.write(json.dumps(entry) + "\n")

    def parity_reward(self, prompts, completion_ids, trainer_state, **kwargs):
        self.note(step=trainer_state.global_step, prompts=prompts, completions=completion_ids)
        return tiny.parity_reward(completion_ids)

    def on_train_begin(self, args, state, control, **kwargs):
        self.note(start=state.global_step)

    def on_pre_optimizer_step(self, args, state, control, **kwargs):
        self._reaper.enter("optimizer step")

    def on_optimizer_step(self, args, state, control, **kwargs):
        self._reaper.leave()


def train(model, output_dir, reaper, **fields):
    """What a user's script does, each time that it is started."""
    args = tiny.config(
        output_dir,
        max_steps=45,
        save_strategy="steps",
        save_steps=3,
        scale_decay_steps=40,
        push_to_hub=True,
        hub_strategy="checkpoint",
        **fields,
    )
    journal = Journal(output_dir.with_suffix(".jsonl"), reaper)
    trainer = MortalTrainer(reaper, model, journal.parity_reward, args, tiny.prompts(), callbacks=[journal])
    trainer.train(resume_from_checkpoint=last_complete_checkpoint(output_dir) is not None)


def in_child(function, *args, **kwargs):
    """Calls a function in a child process, which has all imports made. Returns its exit code, or minus the signal."""
    pid = os.fork()
    if pid == 0:
        try:
            function(*args, **kwargs)
            sys.stdout.flush()
            os._exit(0)
        except BaseException:
            traceback.print_exc()
            os._exit(1)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def train_and_count(model, output_dir, calls_file):
    reaper = Reaper()
    train(model, output_dir, reaper)
    calls_file.write_text(json.dumps(reaper.calls))


def train_until_killed(model, output_dir, kill, calls):
    train(model, output_dir, Reaper(kill, calls), save_total_limit=2)


def name(path):
    return path and Path(path).name


def main(model, output, kills):
    output = Path(output)
    calls_file = output / "calls.json"
    report = {"uninterrupted": in_child(train_and_count, model, output / "uninterrupted", calls_file), "attempts": []}
    calls = json.loads(calls_file.read_text())
    interrupted = output / "interrupted"
    interrupted.mkdir()
    for kill in [*(Kill(**kill) for kill in json.loads(kills)), None]:
        last = last_complete_checkpoint(interrupted)
        attempt = {"highest": name(get_last_checkpoint(interrupted)), "last": name(last), "digests": digests(last)}
        attempt["exit"] = in_child(train_until_killed, model, interrupted, kill, calls)
        report["attempts"].append(attempt)
    (output / "report.json").write_text(json.dumps(report))


if __name__ == "__main__":
    main(*sys.argv[1:])
