"""
Makes one run without interruption, and one whose processes each die in their second save, with `save_total_limit=1`.

Run by test_kill.py: `python kill_in_save_worker.py MODEL OUTPUT`.
"""

import json
import os
import signal
import sys
from pathlib import Path

from kill_worker import in_child, name
from support import tiny
from support.checkpoints import digests

from trl_a3po import A3POTrainer
from trl_a3po.training.checkpoints import last_complete_checkpoint


# At which change of a file a process dies, by what the change is and the end of the path. `-` is the checkpoint that
# is written, `+` the one before.
MOMENTS = {
    "before the mark": ("open", "-.incomplete"),
    "first file": ("open", "-/config.json"),
    "optimizer": ("open", "-/scheduler.pt"),
    "state": ("open", "-/trainer_state.json"),
    "before the mark goes": ("os.remove", "-.incomplete"),
    "before the old one goes": ("open", "+.incomplete"),
    "while the old one goes": ("os.remove", "optimizer.pt"),
    "after the old one": ("os.remove", "+.incomplete"),
}


class Executioner:
    """Kills the process in the second save that it sees."""

    def __init__(self, moment):
        self.moment = MOMENTS.get(moment)
        self.saves = 0
        self.step = None  # of the save in progress
        sys.addaudithook(self._on_event)

    def _on_event(self, event, arguments):
        if self.step is None or self.saves != 2 or self.moment is None or event != self.moment[0]:
            return
        end = self.moment[1].replace("-", f"checkpoint-{self.step}", 1).replace("+", f"checkpoint-{self.step - 1}", 1)
        if str(arguments[0]).endswith(end):
            os.kill(os.getpid(), signal.SIGKILL)


class DoomedTrainer(A3POTrainer):
    executioner = None

    def _save_checkpoint(self, model, trial):
        self.executioner.saves += 1
        self.executioner.step = self.state.global_step
        super()._save_checkpoint(model, trial)
        self.executioner.step = None


def train(model, output_dir, moment=None):
    args = tiny.config(
        output_dir, max_steps=len(MOMENTS) * 2 + 2, save_strategy="steps", save_steps=1, save_total_limit=1
    )
    trainer = DoomedTrainer(model, tiny.parity_reward, args, tiny.prompts())
    trainer.executioner = Executioner(moment)
    trainer.train(resume_from_checkpoint=last_complete_checkpoint(output_dir) is not None)


def main(model, output):
    output = Path(output)
    report = {"uninterrupted": in_child(train, model, output / "uninterrupted"), "attempts": {}}
    for moment in [*MOMENTS, "none"]:
        code = in_child(train, model, output / "interrupted", moment)
        report["attempts"][moment] = {"exit": code, "last": name(last_complete_checkpoint(output / "interrupted"))}
    report["digests"] = [digests(last_complete_checkpoint(output / each)) for each in ("uninterrupted", "interrupted")]
    report["left"] = sorted(path.name for path in (output / "interrupted").glob("checkpoint-*"))
    (output / "report.json").write_text(json.dumps(report))


if __name__ == "__main__":
    main(*sys.argv[1:])
