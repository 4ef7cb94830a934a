"""
No NaN goes unnoticed: not in a logged gradient, not in a checkpoint, not at the end of training.

transformers trains on with NaN in its parameters, shows a loss of 0, and lets checkpoints of NaN replace good ones.
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
    "Resume from the last checkpoint, and keep the policy closer to what it learns from: lower `learning_rate`, "
    "`num_iterations` or `steps_per_generation`. Look for NaN in what your `shape_advantages` returns, and for tokens "
    "of probability 0 in what your `rollout_func` returns."
)


def check_parameters(model: nn.Module, accelerator: Accelerator, outcome: str) -> None:
    """
    Ends the training, on all processes alike, if a trained parameter is not finite. Waits for the device once.

    Steps that fp16's loss scaling skips leave the parameters finite. Frozen parameters and buffers are not checked:
    training does not change them, or, as in a mask of -inf, they may be infinite for a reason. The optimizer's state
    is not checked: when it becomes NaN, so does the parameter.

    Args:
        model (`nn.Module`): The model as it is trained; processes may share its parameters by FSDP or ZeRO-3.
        accelerator (`Accelerator`): That of the trainer. Every process must call this function.
        outcome (`str`): What the error says first.

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
            f"{outcome}: parameters are NaN or infinite, `{names[0]}`{others}. All checkpoints of this run are from "
            f"before. {_ADVICE}"
        )


@torch.no_grad()
def _is_bad(parameter: nn.Parameter) -> Tensor:
    """Whether values of a parameter, or of the part that this process has, are not finite, as a tensor of shape ()."""
    with _whole(parameter):
        values = parameter.to_local() if hasattr(parameter, "to_local") else parameter
        if values.numel() == 0:  # the other processes have all of it
            return torch.zeros((), dtype=torch.bool)
        # The largest absolute value, or NaN. Unlike `isfinite`, it needs no memory of the parameter's size.
        return ~torch.linalg.vector_norm(values, torch.inf).isfinite()


def _whole(parameter: nn.Parameter) -> AbstractContextManager[Any]:
    if not hasattr(parameter, "ds_id"):
        return nullcontext()
    # ZeRO-3 splits it over processes, and pads the last part with uninitialized memory.
    return import_module("deepspeed").zero.GatheredParameters([parameter])


class NaNGradients(TrainerCallback):
    """
    Ends the training at the first log of a gradient of NaN, earlier than the next checkpoint would.

    With fp16 such steps are normal, and skipped.
    """

    def __init__(self, accelerator: Accelerator):
        self._accelerator = accelerator

    def on_log(self, args, state, control, logs=None, **kwargs):
        if logs and math.isnan(logs.get("grad_norm", 0.0)) and self._accelerator.mixed_precision != "fp16":
            raise FloatingPointError(
                f"The gradient of step {state.global_step} is NaN, and so are all parameters from then on. {_ADVICE}"
            )
