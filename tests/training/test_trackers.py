"""What the trackers of a run keep is what the trainer logged."""

import json
import multiprocessing
import sqlite3
from concurrent.futures import ProcessPoolExecutor
from contextlib import closing
from importlib.util import find_spec

import pytest
from support import tiny
from support.training import train


def history_of_run(output_dir, tracker):
    """The log of a run with evaluations, reported to a tracker."""
    evaluation = {"eval_strategy": "steps", "eval_steps": 2, "max_steps": 4}
    return train(
        output_dir, arguments={"eval_dataset": tiny.prompts(4)}, report_to=tracker, **evaluation
    ).state.log_history


def logged(history):
    """The log by name and step, with the names that transformers gives to trackers."""
    return {
        (f"eval/{name.removeprefix('eval_')}" if name.startswith("eval_") else f"train/{name}", entry["step"]): value
        for entry in history
        for name, value in entry.items()
    }


def of_interest(metrics):
    """The metrics of the shaping, and the rewards."""
    names = {name for name, _ in metrics}
    assert {"train/reward", "eval/reward", "train/a3po/scale/positive_low", "eval/a3po/advantage_ratio"} <= names
    prefixes = ("train/a3po/", "train/reward", "eval/a3po/", "eval/reward")
    return {key: value for key, value in metrics.items() if key[0].startswith(prefixes)}


def test_tensorboard_keeps_the_metrics(tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    history = history_of_run(tmp_path, "tensorboard")
    (events,) = tmp_path.rglob("events.out.tfevents.*")
    accumulator = EventAccumulator(str(events)).Reload()
    kept = {
        (name, event.step): event.value
        for name in accumulator.Tags()["scalars"]
        for event in accumulator.Scalars(name)
    }
    assert of_interest(kept) == pytest.approx(of_interest(logged(history)), rel=1e-6)  # it keeps single precision


@pytest.mark.slow
@pytest.mark.skipif(find_spec("trackio") is None, reason="trackio is not installed")
def test_trackio_keeps_the_metrics(tmp_path, monkeypatch):
    # Where it keeps them, trackio reads when it is imported, and TRL imports it: hence a process of its own.
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        history = pool.submit(history_of_run, tmp_path / "run", "trackio").result()
    (database,) = (tmp_path / "trackio").glob("*.db")
    with closing(sqlite3.connect(database)) as connection:
        rows = [json.loads(row) for (row,) in connection.execute("SELECT metrics FROM metrics")]
    # TRL's profiling reports besides, without a step.
    kept = {(name, row.get("train/global_step")): value for row in rows for name, value in row.items()}
    assert of_interest(kept) == of_interest(logged(history))
