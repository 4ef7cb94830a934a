"""
Checks for NaN in logged gradients, before checkpoints, and at the end of training.

transformers continues with NaN parameters, shows a loss of 0, and replaces good checkpoints by checkpoints of NaN.
"""

import math
from contextlib import AbstractContextManager, nullcontext
from importlib import import_module
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from transformers import TrainerCallback


_ADVICE = (
    "Resume from the last checkpoint, and keep the policy closer to its rollouts: lower `learning_rate`, "
    "`num_iterations` or `steps_per_generation`. If you have a `shape_advantages` of your own, look for NaN in its "
    "result. If you have a `rollout_func`, look for tokens of probability 0 in its result."
)


def check_parameters(model: nn.Module, accelerator: Accelerator, outcome: str) -> None:
    """
    Ends the training, on all processes alike, if a trained parameter is not finite. Waits for the device once.

    If fp16's loss scaling skips a step, the parameters stay finite. Frozen parameters and buffers are not checked:
    training does not change parameters that are frozen, and a buffer, such as a mask of -inf, may be infinite on
    purpose. The optimizer's state is not checked: if it becomes NaN, the parameter does too.

    Args:
        model (`nn.Module`): The model in training. Its parameters may be sharded by FSDP or ZeRO-3.
        accelerator (`Accelerator`): The trainer's accelerator. Every process must call this function.
        outcome (`str`): The first words of the error.

    Raises:
        `FloatingPointError`: a parameter has NaN or infinite values. The error names it.
    """
    parameters = {name: each for name, each in model.named_parameters() if each.requires_grad}
    if not parameters:
        return
    bad = torch.stack([_is_bad(each).to(accelerator.device) for each in parameters.values()]).int()
    names = [name for name, count in zip(parameters, accelerator.reduce(bad).tolist(), strict=True) if count]
    if names:
        others = f" and {len(names) - 1} more" if len(names) > 1 else ""
        raise FloatingPointError(
            f"{outcome}: parameters are NaN or infinite, `{names[0]}`{others}. Earlier checkpoints of this run "
            f"are finite. {_ADVICE}"
        )


@torch.no_grad()
def _is_bad(parameter: nn.Parameter) -> Tensor:
    """() whether a value of a parameter is not finite, in the part that this process holds."""
    with _whole(parameter):
        values = parameter.to_local() if hasattr(parameter, "to_local") else parameter
        if values.numel() == 0:  # other processes hold all of it
            return torch.zeros((), dtype=torch.bool)
        # The largest absolute value, or NaN. Unlike `isfinite`, it needs no memory of the parameter's size.
        return ~torch.linalg.vector_norm(values, torch.inf).isfinite()


def _whole(parameter: nn.Parameter) -> AbstractContextManager[Any]:
    if not hasattr(parameter, "ds_id"):
        return nullcontext()
    # ZeRO-3 splits it over processes, and pads the last part with uninitialized memory.
    return import_module("deepspeed").zero.GatheredParameters([parameter])


def check_gradient(norm: Tensor | float | None, step: int, model: nn.Module, accelerator: Accelerator) -> None:
    """
    Ends the training if the gradient of a step was NaN, and made parameters NaN. Loss scaling, or a callback, may have
    skipped the step.

    Raises:
        `FloatingPointError`: a parameter is not finite after a gradient of NaN.
    """
    if norm is None:
        return
    whole = norm.full_tensor() if hasattr(norm, "full_tensor") else norm  # FSDP2
    if math.isnan(whole):  # on all processes alike
        check_parameters(model, accelerator, f"The gradient of step {step} is NaN")


class NaNGradients(TrainerCallback):
    """Ends the training at the first log after a gradient of NaN made parameters NaN. A checkpoint may come later."""

    def __init__(self, accelerator: Accelerator):
        self._accelerator = accelerator

    def on_log(self, args, state, control, logs=None, **kwargs):
        check_gradient((logs or {}).get("grad_norm"), state.global_step, kwargs["model"], self._accelerator)
