"""Two real processes on the same rollouts as one."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import transformers
from packaging.version import Version
from safetensors.torch import load_file
from support import processes
from support.training import is_time


pytestmark = pytest.mark.slow


WORKER = Path(__file__).with_name("distributed_worker.py")

PLAIN = {"trim_padding": False, "skip_zero_advantage": False}
CASES = {
    "plain": {"eval_strategy": "steps", "eval_steps": 2, **PLAIN},
    "savings": {"eval_strategy": "steps", "eval_steps": 2},
    # A micro-batch of one row has one polarity.
    "one row": {"micro_batches": 4, **PLAIN},
    "one row, savings": {"micro_batches": 4},
    # One of the two has nothing with an advantage, or nothing unmasked.
    "equal groups": {"equal_groups": True, **PLAIN},
    "equal groups, savings": {"equal_groups": True},
    "truncated": {"mask_truncated_completions": True, **PLAIN},
    "truncated, savings": {"mask_truncated_completions": True},
    "reused, savings": {"num_iterations": 2},
    "experts, savings": {"experts": True, "equal_groups": True},
    # TRL reads the weight of the head without running it.
    "trained head": {"trained_head": True, "micro_batches": 4, **PLAIN},
    # One of the two has only groups without a learning signal, or another number of them.
    "sampled anew": {"equal_groups": True, "dynamic_sampling": 2, **PLAIN},
    "sampled anew, more": {"rows": 32, "equal_groups": True, "dynamic_sampling": 2},
    "sampled anew, reused": {"rows": 16, "equal_groups": True, "dynamic_sampling": 2, "num_iterations": 2},
}
# Those with something to leave out: where each pass is a collective operation, one too few would hang.
SHARDED_CASES = {
    name: fields for name, fields in CASES.items() if "trim_padding" not in fields or "trained_head" in fields
}
if Version(transformers.__version__) < Version("5"):
    del SHARDED_CASES["experts, savings"]  # experts that are modules: FSDP2 aborts, with nothing left out as well
# Means of the means of micro-batches in TRL, and the time that a step takes.
NOT_OF_THE_WHOLE_BATCH = {"entropy", "eval_entropy", "eval_loss"}


def run(launcher, world_size, model_dir, output, cases=CASES):
    output.mkdir(exist_ok=True)
    result = subprocess.run(
        [sys.executable, *launcher, WORKER, model_dir, output, json.dumps(cases)],
        capture_output=True,
        text=True,
        timeout=600,
    )
    outputs = [output / f"{rank}.pt" for rank in range(world_size)]
    assert all(path.exists() for path in outputs), result.stdout + result.stderr
    return [torch.load(path, weights_only=True) for path in outputs]


def assert_same_log(entries, expected_entries):
    for entry, expected in zip(entries, expected_entries, strict=True):
        assert entry.keys() == expected.keys()
        for name in entry.keys() - NOT_OF_THE_WHOLE_BATCH:
            if not is_time(name):
                assert entry[name] == pytest.approx(expected[name], rel=1e-3, abs=1e-5), name


@pytest.fixture(scope="module")
def alone_dir(tmp_path_factory):
    return tmp_path_factory.mktemp("alone")


@pytest.fixture(scope="module")
def alone(model_dir, alone_dir):
    return run([], 1, model_dir, alone_dir)[0]


@pytest.fixture(scope="module")
def ranks(model_dir, tmp_path_factory):
    return run(processes.torchrun(), 2, model_dir, tmp_path_factory.mktemp("two"))


@pytest.fixture(params=CASES)
def case(request):
    return request.param


def test_two_processes_end_as_one_on_the_whole_batch(case, alone, ranks):
    for rank in ranks:
        for name, parameter in rank[case]["parameters"].items():
            torch.testing.assert_close(parameter, alone[case]["parameters"][name], rtol=1e-4, atol=1e-6)


def test_two_processes_log_what_one_does_on_the_whole_batch(case, alone, ranks):
    assert_same_log(ranks[0][case]["log"], alone[case]["log"])


def test_every_process_takes_part_in_the_same_operations(case, ranks):
    """What is no hang here is none where the model is sharded: there, every pass is a collective operation as well."""
    first, second = (rank[case] for rank in ranks)
    assert first["passes"] == second["passes"]
    assert first["collectives"] == second["collectives"]
    assert "c10d::allreduce_" in first["collectives"]


def test_rounds_are_run_for_the_process_that_needs_them(ranks):
    *entries, _ = ranks[0]["sampled anew"]["log"]
    rounds, discarded, unused = (
        [entry[f"a3po/dynamic_sampling/{name}"] for entry in entries] for name in ("rounds", "discarded", "unused")
    )
    assert 0 < min(rounds) <= max(rounds) <= 2
    assert min(discarded) > 0
    assert sum(unused) > 0  # what the other sampled meanwhile


@pytest.mark.slow
@pytest.mark.parametrize(
    ("config", "distributed_type"), [("fsdp2", "FSDP"), ("zero2", "DEEPSPEED"), ("zero3", "DEEPSPEED")]
)
def test_sharded_models_end_as_one_on_the_whole_batch(config, distributed_type, alone, alone_dir, model_dir, tmp_path):
    if distributed_type == "DEEPSPEED":
        pytest.importorskip("deepspeed")
    ranks = run(processes.accelerate_launch(config), processes.COUNT, model_dir, tmp_path, SHARDED_CASES)
    first, last = ranks[0], ranks[-1]
    for case in SHARDED_CASES:
        assert first[case]["distributed_type"] == distributed_type
        assert processes.COUNT == 1 or "c10d::_allgather_base_" in first[case]["collectives"]
        assert_same_log(first[case]["log"], alone[case]["log"])
        assert first[case]["passes"] == last[case]["passes"]
        assert first[case]["collectives"] == last[case]["collectives"]
        # As they are saved: what each process holds are shards.
        weights, expected = (
            load_file(*(output / case).glob("*model.safetensors")) for output in (tmp_path, alone_dir)
        )
        assert weights.keys() == expected.keys()
        for name, weight in weights.items():
            torch.testing.assert_close(weight, expected[name], rtol=1e-4, atol=1e-6)
