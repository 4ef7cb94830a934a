"""Two real processes on the same rollouts as one."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch


WORKER = Path(__file__).parent / "distributed_worker.py"


def run(launcher, model_dir, output):
    output.mkdir()
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "TRL_EXPERIMENTAL_SILENCE": "1"}
    result = subprocess.run(
        [sys.executable, *launcher, str(WORKER), model_dir, str(output)],
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert (output / "log.json").exists(), result.stdout + result.stderr
    return json.loads((output / "log.json").read_text()), torch.load(output / "parameters.pt", weights_only=True)


def test_two_processes_log_and_train_what_one_does_on_the_whole_batch(model_dir, tmp_path):
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    alone_log, alone = run([], model_dir, tmp_path / "one")
    log, parameters = run(torchrun, model_dir, tmp_path / "two")
    assert len(log) == len(alone_log) == 3
    for entry, alone_entry in zip(log, alone_log, strict=True):
        assert entry.keys() == alone_entry.keys()
        assert "a3po/advantage_ratio" in entry or "loss" not in entry
        for name in entry:
            assert entry[name] == pytest.approx(alone_entry[name], rel=1e-3, abs=1e-5), name
    for name, parameter in parameters.items():
        torch.testing.assert_close(parameter, alone[name], rtol=1e-4, atol=1e-6)
