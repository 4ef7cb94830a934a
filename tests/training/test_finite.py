"""NaN and infinite parameters: they end the training, and no checkpoint of them replaces a finite one."""

import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from support import processes, tiny
from support.training import make
from transformers import TrainerCallback

from trl_a3po import A3POTrainer
from trl_a3po.training.checkpoints import last_complete_checkpoint


WORKER = Path(__file__).with_name("finite_worker.py")


class Spoils(TrainerCallback):
    """Writes a value into the last trained parameter after an optimizer step."""

    def __init__(self, step, value=math.nan):
        self.step, self.value = step, value

    def on_step_end(self, args, state, control, model, **kwargs):
        if state.global_step == self.step:
            parameters = [each for each in model.parameters() if each.requires_grad]
            parameters[-1].data.view(-1)[-1] = self.value


class Unseen(A3POTrainer):
    """Samples as if the spoiled parameter, the last row of the head, were finite: no error of sampling comes first."""

    def _generate(self, *args, **kwargs):
        parameters = [each for each in self.model.parameters() if each.requires_grad]
        kept = [each.data.clone() for each in parameters]
        for each in parameters:
            each.data.nan_to_num_(0.0, 0.0, 0.0)
        try:
            return super()._generate(*args, **kwargs)
        finally:
            for each, values in zip(parameters, kept, strict=True):
                each.data.copy_(values)


def unseen_trainer(model_dir, output_dir, *callbacks, arguments=None, **fields):
    """A trainer that saves every other step and does not log."""
    fields = {"max_steps": 6, "logging_steps": 10, "save_strategy": "steps", "save_steps": 2, **fields}
    arguments = {"callbacks": list(callbacks), **(arguments or {})}
    return make(output_dir, Unseen, model=model_dir, arguments=arguments, **fields)


def assert_finite_files(directory):
    paths = list(directory.glob("checkpoint-*/*.safetensors"))
    assert paths
    for path in paths:
        assert all(each.isfinite().all() for each in load_file(path).values()), path


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_checkpoint_that_is_not_finite_is_never_written(value, model_dir, tmp_path):
    trainer = unseen_trainer(model_dir, tmp_path, Spoils(4, value), save_total_limit=1)
    with pytest.raises(FloatingPointError, match=r"checkpoint-4' was not written: parameters .*`lm_head.weight`"):
        trainer.train()
    assert last_complete_checkpoint(tmp_path) == str(tmp_path / "checkpoint-2")
    assert [path.name for path in tmp_path.glob("checkpoint-*")] == ["checkpoint-2"]
    assert_finite_files(tmp_path)


@pytest.mark.parametrize("norm", [1.0, 0.0])
def test_no_run_ends_well_with_nan(norm, model_dir, tmp_path):
    """There is no log, and no checkpoint, after the step."""
    trainer = unseen_trainer(model_dir, tmp_path, Spoils(5), save_strategy="no", max_grad_norm=norm)
    with pytest.raises(FloatingPointError, match=r"^Training ended after step 6: parameters are NaN or infinite"):
        trainer.train()


def test_an_update_of_nan_is_found_without_grad_norm(model_dir, tmp_path):
    """The update itself makes NaN here: of which parameters depends on the release of TRL."""
    trainer = unseen_trainer(model_dir, tmp_path, save_total_limit=1, max_grad_norm=0.0)
    trainer.model.lm_head.weight.register_hook(
        lambda gradient: gradient * (math.nan if trainer.state.global_step == 3 else 1)
    )
    with pytest.raises(FloatingPointError, match=r"checkpoint-4' was not written: parameters are NaN or infinite"):
        trainer.train()
    assert_finite_files(tmp_path)


class SkipsNaN(TrainerCallback):
    def on_pre_optimizer_step(self, args, state, control, model, **kwargs):
        if any(each.grad is not None and each.grad.isnan().any() for each in model.parameters()):
            model.zero_grad()


def test_a_step_of_nan_that_a_callback_skips_ends_nothing(model_dir, tmp_path):
    trainer = make(tmp_path, model=model_dir, max_steps=3, logging_steps=1, arguments={"callbacks": [SkipsNaN()]})
    trainer.model.lm_head.weight.register_hook(
        lambda gradient: gradient * (math.nan if trainer.state.global_step == 1 else 1)
    )
    trainer.train()
    norms = [log["grad_norm"] for log in trainer.state.log_history if "grad_norm" in log]
    assert [math.isnan(norm) for norm in norms] == [False, True, False]


def test_an_adapter_is_checked(model_dir, tmp_path):
    trainer = unseen_trainer(model_dir, tmp_path, Spoils(4), arguments=tiny.lora())
    with pytest.raises(FloatingPointError, match=r"checkpoint-4' was not written: .*`base_model.*lora_"):
        trainer.train()
    assert_finite_files(tmp_path)


def test_a_frozen_parameter_or_a_mask_may_be_infinite(model_dir, tmp_path):
    trainer = unseen_trainer(model_dir, tmp_path, max_steps=2)
    infinite = torch.tensor([-math.inf], device=tiny.DEVICE)
    trainer.model.register_parameter("bias", torch.nn.Parameter(infinite, requires_grad=False))
    trainer.model.register_buffer("mask", infinite.clone(), persistent=False)
    trainer.train()
    assert last_complete_checkpoint(tmp_path) == str(tmp_path / "checkpoint-2")


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["fsdp2", "zero3"])
def test_all_processes_end_alike(kind, model_dir, tmp_path):
    """NaN in the part of the last process: a process that ended alone would leave the others waiting."""
    if kind == "zero3":
        pytest.importorskip("deepspeed")
    command = [sys.executable, *processes.accelerate_launch(kind), WORKER, model_dir, tmp_path, kind]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    errors = [(tmp_path / f"{rank}").read_text() for rank in range(2)]
    assert errors[0] == errors[1], done.stdout + done.stderr
    assert "checkpoint-2' was not written: parameters are NaN or infinite, `model." in errors[0]
    assert last_complete_checkpoint(tmp_path / "run") == str(tmp_path / "run" / "checkpoint-1")
