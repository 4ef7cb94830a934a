"""Three real processes: what one does to the others, by its rewards, by an error, and by its death."""

import json
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from support import processes
from transformers.trainer_utils import get_last_checkpoint

from trl_a3po.training.checkpoints import last_complete_checkpoint


pytest.importorskip("math_verify")

pytestmark = pytest.mark.slow

WORKER = Path(__file__).with_name("ranks_worker.py")
MOST_SECONDS = 30  # from the error of one process to the end of all; it takes about 5


class Launch:
    """A launch that fails, and what it left."""

    def __init__(self, failure, model_dir, output):
        self.failure = failure
        self.output = output
        command = [sys.executable, *processes.torchrun(3), WORKER, model_dir, output, failure]
        with (output / "log").open("w") as log:
            self.exit_code = subprocess.run(command, stdout=log, stderr=subprocess.STDOUT, timeout=300).returncode
        self.end = time.time()

    def log(self):
        return (self.output / "log").read_text()

    def errors(self):
        """Of each process that raised one: the error, and how long before the end of the launch."""
        paths = [self.output / f"{self.failure}.{rank}.json" for rank in range(3)]
        notes = {rank: json.loads(path.read_text()) for rank, path in enumerate(paths) if path.exists()}
        return {rank: (note["error"], self.end - note["time"]) for rank, note in notes.items()}


@pytest.fixture(scope="module")
def launch(model_dir, tmp_path_factory):
    """Launches by what fails in them, each made once."""
    launches = {}

    def launch(failure):
        if failure not in launches:
            launches[failure] = Launch(failure, model_dir, tmp_path_factory.mktemp("launch"))
        return launches[failure]

    return launch


@pytest.mark.parametrize(
    ("failure", "error"), [("reward", "in the reward function"), ("shaping", "in shape_advantages")]
)
def test_an_error_in_one_process_ends_all(failure, error, launch):
    failed = launch(failure)
    assert failed.exit_code == 1
    assert f"ZeroDivisionError: {error}" in failed.log()
    errors = failed.errors()
    assert max(seconds for _, seconds in errors.values()) < MOST_SECONDS
    assert errors.pop(1)[0] == f"ZeroDivisionError('{error}')"
    # The others are ended by an error, or by torchrun before they can note one.
    assert len(errors) + failed.log().count("Signal 15 (SIGTERM) received by") >= 2, failed.log()
    for noted, _ in errors.values():
        assert "Connection closed by peer" in noted or "Connection reset by peer" in noted


def test_a_checkpoint_that_misses_the_part_of_a_process_is_not_complete(launch):
    died = launch("saving")
    assert died.exit_code == 1
    checkpoint = died.output / "saving" / "checkpoint-2"
    # It dies once this is there. The others are ended by an error, or by torchrun before they can note one.
    assert died.end - (checkpoint / "trainer_state.json").stat().st_mtime < MOST_SECONDS
    assert get_last_checkpoint(checkpoint.parent) == str(checkpoint)
    assert json.loads((checkpoint / "trainer_state.json").read_text())["global_step"] == 2
    assert not (checkpoint / "rng_state_1.pth").exists()
    assert last_complete_checkpoint(checkpoint.parent) == str(checkpoint.with_name("checkpoint-1"))


def test_rewards_that_sleep_print_start_threads_and_time_out_do_no_harm(launch):
    """The processes stay together, and what is scored in a thread is what is scored outside."""
    ranks = [torch.load(launch("reward").output / f"{rank}.pt", weights_only=True) for rank in range(3)]
    for rank in ranks[1:]:
        torch.testing.assert_close(rank["parameters"], ranks[0]["parameters"], rtol=0, atol=0)
    entries = [entry for entry in ranks[0]["log"] if "loss" in entry]
    assert [entry["step"] for entry in entries] == [1, 2, 3]
    assert [entry["rewards/endless_reward/mean"] for entry in entries] == pytest.approx([1, 2 / 3, 1])
    for entry in entries:
        assert entry["rewards/threaded_reward/mean"] == entry["rewards/accuracy_reward/mean"]
        for reward in ("uneven", "chatty", "asynchronous"):
            assert 0 <= entry[f"rewards/{reward}_reward/mean"] <= 1
