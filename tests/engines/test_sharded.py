"""A model that two processes share by FSDP2 or ZeRO-3, and generate from."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from packaging.version import Version
from safetensors.torch import load_file
from support import processes
from support.training import is_time


pytestmark = pytest.mark.slow

WORKER = Path(__file__).with_name("sharded_worker.py")


@pytest.fixture(scope="module", params=["fsdp2", "zero3"])
def output(request, model_dir, tmp_path_factory):
    if request.param == "zero3":
        pytest.importorskip("deepspeed")
    elif Version(torch.__version__) < Version("2.13"):
        pytest.skip("with this torch, GRPOTrainer itself fails after an evaluation: its loss does not run the head")
    output = tmp_path_factory.mktemp(request.param)
    launcher = processes.accelerate_launch(request.param)
    result = subprocess.run(
        [sys.executable, *launcher, WORKER, model_dir, output], capture_output=True, text=True, timeout=600
    )
    assert result.returncode == 0, result.stdout + result.stderr
    distributed_type = "FSDP" if request.param == "fsdp2" else "DEEPSPEED"
    assert {path.read_text() for path in output.glob("*/distributed_type")} == {distributed_type}
    return output


def assert_same_end(output, expected_output):
    weights, expected = (load_file(each / "end" / "model.safetensors") for each in (output, expected_output))
    assert weights.keys() == expected.keys()
    for name, weight in weights.items():
        assert torch.equal(weight, expected[name]), name


def log_without_times(output):
    history = json.loads((output / "end" / "trainer_state.json").read_text())["log_history"]
    return [
        {key: value for key, value in entry.items() if not is_time(key)}
        for entry in history
        if "train_runtime" not in entry
    ]


def test_neutral_settings_are_grpo_to_the_last_bit(output):
    assert_same_end(output / "neutral", output / "grpo")
    for entry, expected in zip(*map(log_without_times, (output / "neutral", output / "grpo")), strict=True):
        added = {key for key in entry if "a3po/" in key or "signal/" in key}  # of evaluations too
        assert {key: entry[key] for key in entry.keys() - added} == expected


def test_a_resumed_run_ends_as_one_in_one_go(output):
    scored, in_one_go = (int((output / each / "scored").read_text()) for each in ("resumed", "whole"))
    assert 0 < scored < in_one_go
    assert_same_end(output / "resumed", output / "whole")
    assert log_without_times(output / "resumed") == log_without_times(output / "whole")
    tokens, expected = ((output / each / "tokens.jsonl").read_text() for each in ("resumed", "whole"))
    assert tokens == expected
    assert expected
