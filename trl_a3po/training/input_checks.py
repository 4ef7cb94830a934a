"""Checks of what users bring into a rollout: prompts, completions of a `rollout_func`, and rewards."""

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

from accelerate.utils import gather_object
from torch import Tensor


# The square of a larger one, summed up over any batch, could overflow in float32.
LARGEST_REWARD = 1e15


def check_rewards(rewards_per_func: Tensor, weights: Tensor, names: Sequence[str], prompts: Sequence[Any]) -> None:
    """
    Refuses rewards that are infinite, or too large, once weighted.

    NaN passes: TRL has it stand for None, of a reward function that does not apply to a completion.

    Args:
        rewards_per_func (`torch.Tensor` of shape `(B, F)`): Rewards of all processes by reward function, the same on
            each process, so that all of them refuse together.
        weights (`torch.Tensor` of shape `(F,)`): What each reward function is multiplied by.
        names (sequence of `str`): The reward functions.
        prompts (sequence): Prompts of the completions of this process.

    Raises:
        `ValueError`: naming the reward function, the reward, the prompt and the fix.
    """
    weighted = rewards_per_func * weights.to(rewards_per_func.device)
    too_large = weighted.abs() > LARGEST_REWARD
    if not too_large.any():
        return
    row, column = too_large.nonzero()[0].tolist()
    raise ValueError(
        f"The reward function '{names[column]}' gave {rewards_per_func[row, column]:g}, weighted {weights[column]:g}, "
        f"to a completion of the prompt {gather_object(prompts)[row]!r:.500}. Rewards must be finite, and no larger "
        f"than {LARGEST_REWARD:g}: let the function clip them, or return None for completions that it does not apply "
        "to."
    )


def total_rewards(rewards_per_func: Tensor, reward_weights: Tensor) -> Tensor:
    """
    (B,) weighted sums over the reward functions that scored a completion; NaN if none did.

    Args:
        rewards_per_func (`torch.Tensor` of shape `(B, F)`): NaN where a function did not score a completion.
        reward_weights (`torch.Tensor` of shape `(F,)`): The weights.
    """
    totals = (rewards_per_func * reward_weights.to(rewards_per_func.device)).nansum(1)
    return totals.masked_fill(rewards_per_func.isnan().all(1), math.nan)


def refuse_empty_completions(rollout_func: Callable[..., dict[str, Any]]) -> Callable[..., dict[str, Any]]:
    """
    Wraps a `rollout_func`. TRL cannot train on a completion without tokens; the error names its prompt.

    Raises:
        `ValueError`: when called; naming the prompt and the fix.
    """

    @functools.wraps(rollout_func)
    def checked(prompts: list[Any], trainer: Any) -> dict[str, Any]:
        output = rollout_func(prompts, trainer)
        for prompt, completion_ids in zip(prompts, output.get("completion_ids", []), strict=False):
            if len(completion_ids) == 0:
                raise ValueError(
                    f"`rollout_func` returned a completion without tokens for the prompt {prompt!r:.500}. Return one "
                    "token at least, such as the end-of-sequence token."
                )
        return output

    return checked


def check_prompts_fit(
    prompt_ids: Sequence[Sequence[int]], max_completion_length: int, positions: int, tokenizer: Any
) -> None:
    """
    Refuses prompts that leave no room for a completion, in models with learned absolute positions.

    Args:
        prompt_ids (sequence of sequences of `int`): The prompts.
        max_completion_length (`int`): Tokens of a completion at most.
        positions (`int`): How many positions the model has.
        tokenizer: What decodes the prompts.

    Raises:
        `ValueError`: naming the prompt and the fix.
    """
    for ids in prompt_ids:
        if len(ids) + max_completion_length > positions:
            raise ValueError(
                f"A prompt of {len(ids)} tokens and `max_completion_length={max_completion_length}` are more than the "
                f"{positions} positions of the model. Remove the prompt, shorten it, or lower "
                f"`max_completion_length`. It begins {tokenizer.decode(ids[:100])!r:.200}."
            )
