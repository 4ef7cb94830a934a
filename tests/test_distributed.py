"""Two real processes on the same rollouts as one."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch


WORKER = Path(__file__).with_name("distributed_worker.py")
TORCHRUN = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]

SAVINGS = {"trim_padding": True, "skip_zero_advantage": True}
CASES = {
    "plain": {"eval_strategy": "steps", "eval_steps": 2},
    "savings": SAVINGS,
    # A micro-batch of one row has one polarity.
    "one row": {"micro_batches": 4},
    "one row, savings": {"micro_batches": 4, **SAVINGS},
    # One of the two has nothing with an advantage, or nothing unmasked.
    "equal groups": {"equal_groups": True},
    "equal groups, savings": {"equal_groups": True, **SAVINGS},
    "truncated": {"mask_truncated_completions": True},
    "truncated, savings": {"mask_truncated_completions": True, **SAVINGS},
    "reused, savings": {"num_iterations": 2, **SAVINGS},
}
# Means of the means of micro-batches in TRL, and the time that a step takes.
NOT_OF_THE_WHOLE_BATCH = {"entropy", "eval_entropy", "eval_loss", "step_time"}


def run(launcher, processes, model_dir, output):
    result = subprocess.run(
        [sys.executable, *launcher, WORKER, model_dir, output, json.dumps(CASES)],
        capture_output=True,
        text=True,
        timeout=600,
    )
    outputs = [output / f"{rank}.pt" for rank in range(processes)]
    assert all(path.exists() for path in outputs), result.stdout + result.stderr
    return [torch.load(path, weights_only=True) for path in outputs]


@pytest.fixture(scope="module")
def alone(model_dir, tmp_path_factory):
    return run([], 1, model_dir, tmp_path_factory.mktemp("alone"))[0]


@pytest.fixture(scope="module")
def ranks(model_dir, tmp_path_factory):
    return run(TORCHRUN, 2, model_dir, tmp_path_factory.mktemp("two"))


@pytest.fixture(params=CASES)
def case(request):
    return request.param


def test_two_processes_end_as_one_on_the_whole_batch(case, alone, ranks):
    for rank in ranks:
        for name, parameter in rank[case]["parameters"].items():
            torch.testing.assert_close(parameter, alone[case]["parameters"][name], rtol=1e-4, atol=1e-6)


def test_two_processes_log_what_one_does_on_the_whole_batch(case, alone, ranks):
    entries, alone_entries = ranks[0][case]["log"], alone[case]["log"]
    assert len(entries) == len(alone_entries)
    for entry, alone_entry in zip(entries, alone_entries, strict=True):
        assert entry.keys() == alone_entry.keys()
        for name in entry.keys() - NOT_OF_THE_WHOLE_BATCH:
            if not name.endswith(("_runtime", "_per_second", "_time")):
                assert entry[name] == pytest.approx(alone_entry[name], rel=1e-3, abs=1e-5), name


def test_every_process_takes_part_in_the_same_operations(case, ranks):
    """What is no hang here is none where the model is sharded: there, every pass is a collective operation as well."""
    first, second = (rank[case] for rank in ranks)
    assert first["passes"] == second["passes"]
    assert first["collectives"] == second["collectives"]
    assert "c10d::allreduce_" in first["collectives"]
