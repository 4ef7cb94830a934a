"""A run of two thousand steps holds no more of the machine at its end than after the first few."""

import gc
import json
import mmap
import os

import psutil
import pytest
import torch
from support import tiny
from support.training import train
from transformers import TrainerCallback

from trl_a3po import A3POTrainer


pytestmark = pytest.mark.slow

STEPS = 2000
WARM = 100  # steps after which everything that is made once is made
MOST_BYTES_PER_STEP = 8192  # the allocator takes memory a few megabytes at a time; logs take some 400 bytes


class Watch(TrainerCallback):
    """Notes what the process holds while it trains."""

    def __init__(self):
        self.process = psutil.Process()
        self.memory = {}
        self.holdings = {}

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step % 10 == 0:
            self.memory[state.global_step] = self.process.memory_info().rss
        if state.global_step in (WARM, state.max_steps):
            gc.collect()
            self.holdings[state.global_step] = {
                "files": self.process.num_fds(),
                "threads": self.process.num_threads(),
                "children": len(self.process.children(recursive=True)),
                "tensors": sum(issubclass(type(thing), torch.Tensor) for thing in gc.get_objects()),
            }

    def bytes_per_step(self):
        """The slope of the line that fits the memory of the last three quarters best."""
        samples = torch.tensor(list(self.memory.items()), dtype=torch.float64).T
        covariance = torch.cov(samples[:, samples.shape[1] // 4 :])
        return (covariance[0, 1] / covariance[0, 0]).item()


class Leaking(A3POTrainer):
    """Keeps 256 KiB and an open file of every step.

    The memory comes from the system: what the allocator holds of earlier tests could serve it unseen.
    """

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.tensors, self.files = [], []

    def shape_advantages(self, *args, **kwargs):
        self.tensors.append(torch.frombuffer(mmap.mmap(-1, 2**18), dtype=torch.float32).fill_(1.0))
        self.files.append(os.open(os.devnull, os.O_RDONLY))
        return super().shape_advantages(*args, **kwargs)


def watched_run(trainer_class, output_dir, max_steps):
    """A trained trainer, and what was noted of the process meanwhile."""
    model_dir = tiny.save(output_dir / "model", num_hidden_layers=1, hidden_size=16, intermediate_size=16)
    watch = Watch()
    trainer = train(
        output_dir,
        trainer_class,
        model=model_dir,
        arguments={"callbacks": [watch]},
        max_steps=max_steps,
        per_device_train_batch_size=4,
        max_completion_length=4,
        logging_steps=10,
        learning_rate=1e-4,  # at which the tiny model lasts
        scale_decay="constant",  # shapes to the end
    )
    return trainer, watch


@pytest.fixture(scope="module")
def long_run(tmp_path_factory):
    return watched_run(A3POTrainer, tmp_path_factory.mktemp("long-run"), STEPS)


def test_memory_stays_as_it_is(long_run):
    _, watch = long_run
    assert watch.bytes_per_step() < MOST_BYTES_PER_STEP


def test_files_threads_children_and_tensors_stay_as_many(long_run):
    _, watch = long_run
    assert watch.holdings[STEPS] == watch.holdings[WARM]


def test_logs_stay_as_large(long_run):
    trainer, _ = long_run
    entries = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert len(entries) == STEPS // 10
    early, late = entries[: WARM // 10], entries[-WARM // 10 :]
    assert set().union(*late) == set().union(*early)
    assert max(len(json.dumps(entry)) for entry in late) < 1.1 * max(len(json.dumps(entry)) for entry in early)
    assert not any(trainer._metrics.values())
    assert not trainer._polarity_sums
    rows = trainer.args.generation_batch_size
    assert all(len(trainer._logs[column]) <= rows for column in ("prompt", "completion", "advantages"))


def test_a_leak_would_be_seen(tmp_path):
    trainer, watch = watched_run(Leaking, tmp_path, 400)
    for file in trainer.files:
        os.close(file)
    assert watch.bytes_per_step() > MOST_BYTES_PER_STEP
    for kind in ("files", "tensors"):
        assert watch.holdings[400][kind] == watch.holdings[WARM][kind] + 300
