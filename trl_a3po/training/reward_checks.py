"""
What the reward functions gave to a completion in all, and a check that it is a number to learn from.

One infinite reward, or one so large that it overflows, either turns every parameter into NaN or takes the advantage
away from its whole group, as the release of TRL has it: without an error in both cases.
"""

import math
from collections.abc import Sequence
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
