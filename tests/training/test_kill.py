"""A run that is killed twenty times, and resumed each time, against one that is not; and checkpoints not whole."""

import json
import random
import signal
import subprocess
import sys
from collections import Counter
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
from kill_worker import POINTS, STATE_FILES, Kill, digests
from support import tiny
from support.hub_server import Hub
from support.training import make, train
from transformers import TrainerState
from transformers.trainer_utils import get_last_checkpoint
from trl import GRPOTrainer

from trl_a3po.training.checkpoints import last_complete_checkpoint


WORKER = Path(__file__).with_name("kill_worker.py")


def draw_kills():
    """Four at each point, in any order: in one of the first saves of a process, or the first steps, at any call."""
    generator = random.Random(0)
    points = generator.sample(POINTS * 4, k=20)
    return [
        Kill(point, generator.randint(1, 2 if point in ("checkpoint", "push") else 5), generator.random())
        for point in points
    ]


@pytest.fixture(scope="module")
def hub():
    with Hub({"hf_writes": "write"}).serve() as hub:
        yield hub


@pytest.fixture(scope="module")
def output(hub, model_dir, tmp_path_factory):
    """The directory with what the two runs left."""
    output = tmp_path_factory.mktemp("kill")
    kills = json.dumps([asdict(kill) for kill in draw_kills()])
    with (output / "log").open("w") as log:
        command = [sys.executable, WORKER, model_dir, output, kills]
        subprocess.run(
            command, env=hub.environment(output / "home"), stdout=log, stderr=subprocess.STDOUT, timeout=400
        )
    assert (output / "report.json").exists(), (output / "log").read_text()
    return output


@pytest.fixture(scope="module")
def report(output):
    return json.loads((output / "report.json").read_text())


@pytest.fixture(scope="module")
def journals(output):
    """What the two runs noted: the step that each process began at, and each rollout."""
    return {
        name: [json.loads(line) for line in (output / f"{name}.jsonl").read_text().splitlines()]
        for name in ("uninterrupted", "interrupted")
    }


def step_of(checkpoint):
    return int(checkpoint.removeprefix("checkpoint-")) if checkpoint else 0


@pytest.mark.slow
def test_twenty_kills_take_place(report):
    assert Counter(kill.point for kill in draw_kills()) == dict.fromkeys(POINTS, 4)
    assert report["uninterrupted"] == 0
    *killed, last = (attempt["exit"] for attempt in report["attempts"])
    assert killed == [-signal.SIGKILL] * 20
    assert last == 0


@pytest.mark.slow
def test_every_process_resumes_from_the_last_complete_checkpoint(report, output, journals):
    """Whole is what has the bytes that the uninterrupted run wrote at this step."""
    attempts = report["attempts"]
    starts = [entry["start"] for entry in journals["interrupted"] if "start" in entry]
    assert starts == sorted(starts) == [step_of(attempt["last"]) for attempt in attempts]
    for attempt in attempts:
        assert attempt["digests"] == digests(attempt["last"] and output / "uninterrupted" / attempt["last"])
    half_written = [attempt for attempt in attempts if attempt["highest"] != attempt["last"]]
    assert len(half_written) >= 4
    assert all(step_of(attempt["highest"]) == step_of(attempt["last"]) + 3 for attempt in half_written)


@pytest.mark.slow
def test_a_killed_run_ends_as_an_uninterrupted_one(output):
    """To the last bit: parameters, optimizer, schedule and random numbers."""
    ends = [last_complete_checkpoint(output / name) for name in ("uninterrupted", "interrupted")]
    assert [Path(end).name for end in ends] == ["checkpoint-45"] * 2
    assert digests(ends[0]) == digests(ends[1])
    assert sorted(path.name for path in (output / "interrupted").glob("checkpoint-*")) == [
        "checkpoint-42",
        "checkpoint-45",
    ]


@pytest.mark.slow
def test_a_killed_run_sees_the_prompts_and_completions_of_an_uninterrupted_one(journals):
    expected = {entry["step"]: entry for entry in journals["uninterrupted"] if "step" in entry}
    entries = [entry for entry in journals["interrupted"] if "step" in entry]
    assert sorted(expected) == sorted({entry["step"] for entry in entries}) == list(range(45))
    assert len(entries) > 45  # what was lost is done again
    assert all(entry == expected[entry["step"]] for entry in entries)


@pytest.mark.slow
def test_a_killed_run_logs_what_an_uninterrupted_one_does(output):
    histories = []
    for name in ("uninterrupted", "interrupted"):
        state = json.loads((output / name / "checkpoint-45" / "trainer_state.json").read_text())
        histories.append(
            [
                {name: entry[name] for name in entry if not name.startswith("step_time")}
                for entry in state["log_history"]
            ]
        )
    assert histories[0] == histories[1]
    scales = [entry["a3po/scale/positive_low"] for entry in histories[1]]
    assert scales == pytest.approx([max(2 - step / 40, 1) for step in range(45)])


@pytest.mark.slow
def test_what_a_killed_run_leaves_on_the_hub_is_whole(hub, output):
    """A kill in the middle of a push leaves the commit before; what is marked stays here."""
    steps = []
    for commit in hub.repositories["user/interrupted"]:
        checkpoint = {path.name: path for path in map(Path, commit.files) if path.parent == Path("last-checkpoint")}
        assert not any("incomplete" in path for path in commit.files)
        if checkpoint:
            step = json.loads(commit.files["last-checkpoint/trainer_state.json"])["global_step"]
            steps.append(step)
            for name in STATE_FILES:
                whole = (output / "uninterrupted" / f"checkpoint-{step}" / name).read_bytes()
                assert commit.files[f"last-checkpoint/{name}"] == whole
    assert steps == sorted(steps)
    assert steps[-1] == 45


@pytest.mark.slow
def test_with_one_checkpoint_kills_in_a_save_lose_no_more_than_a_step(model_dir, tmp_path):
    """Each process dies in its second save, each at another moment: in the writing, between, or in the deleting."""
    worker = Path(__file__).with_name("kill_in_save_worker.py")
    done = subprocess.run([sys.executable, worker, model_dir, tmp_path], capture_output=True, text=True, timeout=400)
    assert (tmp_path / "report.json").exists(), done.stdout + done.stderr
    report = json.loads((tmp_path / "report.json").read_text())
    assert report["uninterrupted"] == 0
    *killed, last = report["attempts"].values()
    assert [attempt["exit"] for attempt in killed] == [-signal.SIGKILL] * 8, report
    assert last["exit"] == 0
    # Of two saves of each process, both are whole once the mark is gone, and the first one is before that.
    steps = [step_of(attempt["last"]) for attempt in killed]
    assert steps == [1, 2, 3, 4, 5, 7, 9, 11]
    assert report["digests"][0] == report["digests"][1] is not None
    assert report["left"] == ["checkpoint-18"]


def saving_trainer(model_dir, output_dir, **fields):
    """A trainer that saves every other step."""
    fields = {"max_steps": 4, "save_steps": 2, "lr_scheduler_type": "constant", **fields}
    return make(output_dir, model=model_dir, save_strategy="steps", **fields)


@pytest.fixture
def half_overwritten(model_dir, tmp_path, monkeypatch):
    """A directory with two checkpoints, the second of which holds files of two runs: the disk was full."""

    def fail(*args):
        raise OSError("No space left on device")

    saving_trainer(model_dir, tmp_path).train()
    trainer = saving_trainer(model_dir, tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(TrainerState, "save_to_json", fail)
        with pytest.raises(OSError, match="No space left"):
            trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    return tmp_path


def test_a_checkpoint_that_is_not_complete_is_passed_over(half_overwritten, model_dir, caplog):
    assert get_last_checkpoint(half_overwritten) == str(half_overwritten / "checkpoint-4")
    assert last_complete_checkpoint(half_overwritten) == str(half_overwritten / "checkpoint-2")
    trainer = saving_trainer(model_dir, half_overwritten)
    trainer.train(resume_from_checkpoint=True)
    (warning,) = (record.getMessage() for record in caplog.records if record.name == "trl_a3po.training.checkpoints")
    assert warning == (
        f"Resuming from '{half_overwritten / 'checkpoint-2'}'. Skipped checkpoints that are incomplete "
        "or of an earlier run: checkpoint-4."
    )
    assert trainer.state.global_step == 4
    assert last_complete_checkpoint(half_overwritten) == str(half_overwritten / "checkpoint-4")


def test_a_checkpoint_that_is_not_complete_is_refused(half_overwritten, model_dir):
    with pytest.raises(ValueError, match=r"checkpoint-4' is incomplete.*`resume_from_checkpoint=True`"):
        saving_trainer(model_dir, half_overwritten).train(str(half_overwritten / "checkpoint-4"))


def test_no_complete_checkpoint_is_an_error(model_dir, tmp_path):
    (tmp_path / "checkpoint-2").mkdir()
    assert last_complete_checkpoint(tmp_path) is None
    with pytest.raises(ValueError, match=r"no complete checkpoint .*Incomplete ones: checkpoint-2\."):
        saving_trainer(model_dir, tmp_path).train(resume_from_checkpoint=True)


def test_checkpoints_of_grpo_are_resumed_from(model_dir, tmp_path):
    train(tmp_path, GRPOTrainer, model=model_dir, max_steps=2, save_strategy="steps", save_steps=2)
    trainer = saving_trainer(model_dir, tmp_path)
    trainer.train(resume_from_checkpoint=True)
    assert [entry["step"] for entry in trainer.state.log_history if "loss" in entry] == [1, 2, 3, 4]


def test_a_run_that_is_resumed_in_its_second_epoch_ends_as_an_uninterrupted_one(model_dir, tmp_path):
    """Every epoch has an order of its own."""
    whole, resumed = (saving_trainer(model_dir, tmp_path, max_steps=12, save_steps=10) for _ in range(2))
    whole.train()
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-10"))
    assert resumed.state.epoch == 1.5
    torch.testing.assert_close(tiny.parameters(resumed), tiny.parameters(whole), rtol=0, atol=0)


def test_a_run_that_is_resumed_after_its_last_step_stays_as_it_is(model_dir, tmp_path):
    whole, again = saving_trainer(model_dir, tmp_path), saving_trainer(model_dir, tmp_path)
    whole.train()
    before = digests(tmp_path / "checkpoint-4")
    again.train(resume_from_checkpoint=True)
    assert again.state.global_step == 4
    assert get_last_checkpoint(tmp_path) == str(tmp_path / "checkpoint-4")
    assert digests(tmp_path / "checkpoint-4") == before
    torch.testing.assert_close(tiny.parameters(again), tiny.parameters(whole), rtol=0, atol=0)
