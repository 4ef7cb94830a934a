"""A run that is killed twenty times, and resumed each time, against one that is not."""

import json
import random
import signal
import subprocess
import sys
from collections import Counter
from dataclasses import asdict
from pathlib import Path

import pytest
from kill_worker import POINTS, Kill
from support.checkpoints import STATE_FILES, digests
from support.hub_server import Hub

from trl_a3po.training.checkpoints import last_complete_checkpoint


pytestmark = pytest.mark.slow

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


def test_twenty_kills_take_place(report):
    assert Counter(kill.point for kill in draw_kills()) == dict.fromkeys(POINTS, 4)
    assert report["uninterrupted"] == 0
    *killed, last = (attempt["exit"] for attempt in report["attempts"])
    assert killed == [-signal.SIGKILL] * 20
    assert last == 0


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


def test_a_killed_run_ends_as_an_uninterrupted_one(output):
    """To the last bit: parameters, optimizer, schedule and random numbers."""
    ends = [last_complete_checkpoint(output / name) for name in ("uninterrupted", "interrupted")]
    assert [Path(end).name for end in ends] == ["checkpoint-45"] * 2
    assert digests(ends[0]) == digests(ends[1])
    assert sorted(path.name for path in (output / "interrupted").glob("checkpoint-*")) == [
        "checkpoint-42",
        "checkpoint-45",
    ]


def test_a_killed_run_sees_the_prompts_and_completions_of_an_uninterrupted_one(journals):
    expected = {entry["step"]: entry for entry in journals["uninterrupted"] if "step" in entry}
    entries = [entry for entry in journals["interrupted"] if "step" in entry]
    assert sorted(expected) == sorted({entry["step"] for entry in entries}) == list(range(45))
    assert len(entries) > 45  # what was lost is done again
    assert all(entry == expected[entry["step"]] for entry in entries)


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
