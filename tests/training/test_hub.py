"""Pushing to a Hub and loading from it, with its real client over HTTP, and what is left where that Hub fails."""

import json
import re
import subprocess
import sys
import time
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from hub_worker import BASE, generate_from, make
from huggingface_hub import ModelCard
from support.hub_server import Fault, Hub


pytestmark = pytest.mark.slow


WORKER = Path(__file__).parent / "hub_worker.py"

ARRIVE = {
    "full": {"hub_strategy": "every_save"},
    "adapter": {"hub_strategy": "every_save", "adapter": True},
    "full-checkpoint": {"hub_strategy": "checkpoint"},
    "adapter-checkpoint": {"hub_strategy": "checkpoint", "adapter": True},
    "by-hand": {"push_to_hub": False, "hub_model_id": "user/by-hand"},
    "commit-fails-once": {},
    "upload-fails-once": {},
}
FAIL_TO_PUSH = {
    "commit-fails": {},
    "upload-fails": {},
    "commit-refused": {"hub_model_id": "user/commit-refused", "hub_token": "hf_reads"},
}
FAIL_AT_ONCE = {
    "token-unknown": {"hub_token": "hf_unknown"},
    "token-refused": {"hub_token": "hf_reads"},
}
RUNS = {**ARRIVE, **FAIL_TO_PUSH, **FAIL_AT_ONCE}
ERRORS = {
    "commit-fails": "Something is wrong on our side",
    "upload-fails": "Error while uploading",
    "commit-refused": "You don't have the required permissions",
    "token-unknown": "Invalid username or password",
    "token-refused": "You don't have the required permissions",
}
FAULTS = [
    Fault("/user/commit-fails-once/commit/", 500, times=1),
    Fault("/user/commit-fails/commit/", 500),
    Fault("/user/upload-fails-once.git/upload/", 500, times=1),
    Fault("/user/upload-fails.git/upload/", 507),  # a 500 would be tried again for half a minute
    Fault("/user/commit-hangs/commit/", None),
]


@pytest.fixture(scope="module")
def hub(model_dir):
    hub = Hub({"hf_writes": "write", "hf_reads": "read"}, FAULTS)
    hub.commit(BASE, "initial commit", {path.name: path.read_bytes() for path in Path(model_dir).iterdir()})
    # Where there is a repository already, a token that may only read is not found out before it is pushed to.
    hub.commit("user/commit-refused", "initial commit", {})
    with hub.serve():
        yield hub


@contextmanager
def worker(hub, output, runs):
    """The process that makes the runs. It does not outlive the block."""
    with (output / "log").open("w") as log:
        process = subprocess.Popen(
            [sys.executable, WORKER, output, json.dumps(runs)],
            env=hub.environment(output / "home"),
            stdout=log,
            stderr=subprocess.STDOUT,
        )
        try:
            yield process
        finally:
            process.kill()
            process.wait(timeout=60)


@pytest.fixture(scope="module")
def output(hub, tmp_path_factory):
    """The directory with what `RUNS` left."""
    output = tmp_path_factory.mktemp("hub")
    with worker(hub, output, RUNS) as process:
        process.wait(timeout=240)
    assert (output / "reports.json").exists(), (output / "log").read_text()
    return output


@pytest.fixture(scope="module")
def reports(output):
    return json.loads((output / "reports.json").read_text())


@pytest.fixture(scope="module")
def warnings(output):
    """Of pushes that failed in the background, the repository and the error that users are told of."""
    return re.findall(r"A push to (\S+) failed: (.*?)\nTraining continues", (output / "log").read_text(), re.DOTALL)


@pytest.fixture(scope="module")
def commits(hub, output):
    """Of each run, what its pushes added to the repository, first to last."""
    return {name: hub.repositories[f"user/{name}"][1:] for name in RUNS if f"user/{name}" in hub.repositories}


@pytest.fixture(scope="module")
def uninterrupted(model_dir, tmp_path_factory):
    """Parameters after 4 steps at one go: of the model, and with an adapter."""

    def train(adapter):
        trainer = make(model_dir, tmp_path_factory.mktemp("uninterrupted"), adapter, max_steps=4)
        trainer.train()
        return trainer.model.state_dict()

    return {adapter: train(adapter) for adapter in (False, True)}


def assert_resumes(checkpoint, model_dir, tmp_path, uninterrupted, adapter=False):
    assert json.loads((checkpoint / "trainer_state.json").read_text())["global_step"] == 2
    trainer = make(model_dir, tmp_path, adapter, max_steps=4)
    trainer.train(resume_from_checkpoint=str(checkpoint))
    torch.testing.assert_close(trainer.model.state_dict(), uninterrupted[adapter], rtol=0, atol=0)


def weights(name):
    return "adapter_model.safetensors" if "adapter" in name else "model.safetensors"


@pytest.mark.parametrize("name", ARRIVE)
def test_what_arrives_is_what_was_trained(name, reports, output, model_dir):
    assert reports[name]["done"] == ["make", "train", "push", "download"], reports[name]["error"]
    assert reports[name]["completions once downloaded"] == reports[name]["completions"]
    assert reports[name]["completions"] != generate_from(model_dir)
    saved, arrived = output / name, output / "downloads" / name
    assert (arrived / weights(name)).read_bytes() == (saved / weights(name)).read_bytes()


@pytest.mark.parametrize("name", ["full", "adapter"])
def test_every_save_is_pushed(name, commits, output):
    step_1, step_2, end = commits[name]
    assert step_1.message == "Training in progress, step 1"
    assert step_2.message == "Training in progress, step 2"
    assert end.message == "End of training"
    for step, commit in ((1, step_1), (2, step_2), (2, end)):
        assert commit.files[weights(name)] == (output / name / f"checkpoint-{step}" / weights(name)).read_bytes()
    assert step_1.files[weights(name)] != step_2.files[weights(name)]


@pytest.mark.parametrize("name", ARRIVE)
def test_the_card_that_arrives_says_how_the_model_was_trained(name, commits, output):
    card = ModelCard.load(output / "downloads" / name / "README.md")
    assert card.data.base_model == BASE
    assert card.data.model_name == name
    assert {"trl", "a3po"} <= set(card.data.tags)
    assert f'model="user/{name}"' in card.text
    assert "trained with A3PO, a method introduced in [Rethinking Sample Polarity" in card.text
    assert "https://huggingface.co/papers/2512.21625" in card.text
    settings = json.loads(re.search("```json\n(.+?)```", card.text, re.DOTALL)[1])
    assert settings["positive_low_scale"] == 3.0
    assert settings["scale_decay"] == "constant"
    for commit in commits[name]:
        assert commit.files["README.md"].decode() == card.content


@pytest.mark.parametrize("name", ["full-checkpoint", "adapter-checkpoint"])
def test_a_run_resumes_from_the_checkpoint_on_the_hub(name, commits, output, model_dir, tmp_path, uninterrupted):
    assert "Training in progress, step 2, checkpoint" in [commit.message for commit in commits[name]]
    checkpoint = output / "downloads" / name / "last-checkpoint"
    assert_resumes(checkpoint, model_dir, tmp_path, uninterrupted, adapter="adapter" in name)


def test_a_commit_that_fails_is_made_up_for_by_the_next(commits, warnings):
    assert [commit.message for commit in commits["commit-fails-once"]] == [
        "Training in progress, step 2",
        "End of training",
    ]
    (error,) = (error for repository, error in warnings if repository == "user/commit-fails-once")
    assert ERRORS["commit-fails"] in error


def test_an_upload_that_fails_is_tried_again(commits, output):
    assert len(commits["upload-fails-once"]) == 3
    assert re.search("500 thrown while requesting PUT .*/user/upload-fails-once", (output / "log").read_text())


@pytest.mark.parametrize("name", FAIL_TO_PUSH)
def test_a_hub_that_takes_nothing_stops_the_last_push_alone(
    name, reports, commits, warnings, output, model_dir, tmp_path, uninterrupted
):
    """The pushes of the saves, in the background, are warned of."""
    assert reports[name]["done"] == ["make", "train"]
    assert ERRORS[name] in reports[name]["error"]
    assert not commits[name]
    errors = [error for repository, error in warnings if repository == f"user/{name}"]
    assert len(errors) == 2
    assert all(ERRORS[name] in error for error in errors)
    assert generate_from(output / name) == reports[name]["completions"] != generate_from(model_dir)
    assert_resumes(output / name / "checkpoint-2", model_dir, tmp_path, uninterrupted)


@pytest.mark.parametrize("name", FAIL_AT_ONCE)
def test_a_token_that_is_refused_is_an_error_before_training(name, reports):
    assert reports[name]["done"] == []
    assert ERRORS[name] in reports[name]["error"]


def test_a_hub_that_hangs_holds_up_the_end_of_training_and_nothing_before(hub, model_dir, tmp_path, uninterrupted):
    """There `train` waits for the client, which waits without limit. Who then kills the process has lost no step."""
    checkpoint = tmp_path / "commit-hangs" / "checkpoint-2"
    with worker(hub, tmp_path, {"commit-hangs": {"wait": False}}) as process:
        assert hub.hangs.wait(timeout=100)  # from the first step's save on
        deadline = time.monotonic() + 100
        while not (checkpoint / "trainer_state.json").exists():
            assert time.monotonic() < deadline
            time.sleep(0.1)
        while "is waiting for a push to the Hub to finish" not in (tmp_path / "log").read_text():
            assert time.monotonic() < deadline
            time.sleep(0.1)
        with pytest.raises(subprocess.TimeoutExpired):
            process.wait(timeout=3)
    assert_resumes(checkpoint, model_dir, tmp_path / "resumed", uninterrupted)
