"""Two real processes on the same rollouts as one."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch


WORKER = Path(__file__).parent / "distributed_worker.py"


TORCHRUN = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]


def run(launcher, model_dir, output, **fields):
    output.mkdir()
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "TRL_EXPERIMENTAL_SILENCE": "1"}
    result = subprocess.run(
        [sys.executable, *launcher, str(WORKER), model_dir, str(output), json.dumps(fields)],
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert (output / "log.json").exists(), result.stdout + result.stderr
    return json.loads((output / "log.json").read_text()), torch.load(output / "parameters.pt", weights_only=True)


@pytest.fixture(scope="module")
def alone(model_dir, tmp_path_factory):
    return run([], model_dir, tmp_path_factory.mktemp("distributed") / "alone")


@pytest.mark.parametrize("savings", [False, True])
def test_two_processes_log_and_train_what_one_does_on_the_whole_batch(savings, alone, model_dir, tmp_path):
    alone_log, alone_parameters = alone
    fields = {"trim_padding": savings, "skip_zero_advantage": savings}
    log, parameters = run(TORCHRUN, model_dir, tmp_path / "two", **fields)
    assert len(log) == len(alone_log) == 3
    for entry, alone_entry in zip(log, alone_log, strict=True):
        # Of completions that are left out no entropy is known.
        assert alone_entry.keys() - entry.keys() == ({"a3po/zero/entropy"} & alone_entry.keys() if savings else set())
        for name in entry:
            assert entry[name] == pytest.approx(alone_entry[name], rel=1e-3, abs=1e-5), name
    assert all("a3po/zero/fraction" in entry and "a3po/advantage_ratio" in entry for entry in log[:-1])
    for name, parameter in parameters.items():
        torch.testing.assert_close(parameter, alone_parameters[name], rtol=1e-4, atol=1e-6)
