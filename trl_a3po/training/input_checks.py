"""Checks the parts of a rollout that come from users: prompts, completions of a `rollout_func`, and rewards."""

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

from accelerate.utils import gather_object
from torch import Tensor


# The sum of squares of larger rewards over a batch could overflow in float32.
LARGEST_REWARD = 1e15


def check_rewards(rewards_per_func: Tensor, weights: Tensor, names: Sequence[str], prompts: Sequence[Any]) -> None:
    """
    Refuses rewards that are infinite or too large after weighting.

    NaN is allowed: in TRL it stands for None, the value of a reward function that does not apply to a completion.

    Args:
        rewards_per_func (`torch.Tensor` of shape `(B, F)`): Rewards of all processes by reward function. They are the
            same on each process, so all processes raise the error together.
        weights (`torch.Tensor` of shape `(F,)`): Weight of each reward function.
        names (sequence of `str`): Names of the reward functions.
        prompts (sequence): Prompts of the completions of this process.

    Raises:
        `ValueError`: a reward is refused. The message names the function, the prompt and the fix.
    """
    weighted = rewards_per_func * weights.to(rewards_per_func.device)
    too_large = weighted.abs() > LARGEST_REWARD
    if not too_large.any():
        return
    row, column = too_large.nonzero()[0].tolist()
    raise ValueError(
        f"The reward function '{names[column]}' gave {rewards_per_func[row, column]:g}, weighted {weights[column]:g}, "
        f"to a completion of the prompt {gather_object(prompts)[row]!r:.500}. Rewards must be finite, and at most "
        f"{LARGEST_REWARD:g} in absolute value: clip them in the function, or return None for completions that it "
        "does not apply to."
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


def checked_rollout_func(
    rollout_func: Callable[..., dict[str, Any]], check_tokens: Callable[[Sequence[Sequence[int]], str], None]
) -> Callable[..., dict[str, Any]]:
    """
    A `rollout_func` whose completions are refused if they have no tokens, or tokens that `check_tokens` refuses.

    Raises:
        `ValueError`: when the function is called. The message names the prompt or the token, and the fix.
    """

    @functools.wraps(rollout_func)
    def checked(prompts: list[Any], trainer: Any) -> dict[str, Any]:
        output = rollout_func(prompts, trainer)
        for prompt, completion_ids in zip(prompts, output.get("completion_ids", []), strict=False):
            if len(completion_ids) == 0:
                raise ValueError(
                    f"`rollout_func` returned a completion without tokens for the prompt {prompt!r:.500}. Return at "
                    "least one token, such as the end-of-sequence token."
                )
        for name in ("prompt_ids", "completion_ids"):
            check_tokens(output.get(name, []), f"an item of the `{name}` that `rollout_func` returned")
        return output

    return checked


def check_tokens(token_ids: Sequence[Sequence[int]], embeddings: int, what: str) -> None:
    """
    Refuses tokens that the model does not have: on a GPU, they would end the process without a reason.

    Args:
        token_ids (sequence of sequences of `int`): The prompts, or others.
        embeddings (`int`): Number of tokens that the model has an embedding for.
        what (`str`): What has the tokens, as the error names it, such as "a prompt".

    Raises:
        `ValueError`: a token is refused. The message names it and the fix.
    """
    largest = max((max(ids, default=0) for ids in token_ids), default=0)
    if largest >= embeddings:
        raise ValueError(
            f"The tokenizer is not that of the model: {what} has token {largest}, but the vocabulary of the model "
            f"has {embeddings} tokens. Pass the tokenizer of the model, or call `model.resize_token_embeddings` after "
            "you add tokens."
        )


def check_prompts_fit(
    prompt_ids: Sequence[Sequence[int]], max_completion_length: int, positions: int, tokenizer: Any, multiple: int
) -> None:
    """
    Refuses prompts that leave no room for a completion in a model that looks positions up in a table.

    Args:
        prompt_ids (sequence of sequences of `int`): The prompts.
        max_completion_length (`int`): Maximum tokens of a completion.
        positions (`int`): Number of positions of the model.
        tokenizer: Decodes the prompts.
        multiple (`int`): TRL pads prompts and completions to a multiple of this number of columns.

    Raises:
        `ValueError`: a prompt is refused. The message names the prompt and the fix.
    """
    for ids in prompt_ids:
        if sum(math.ceil(each / multiple) * multiple for each in (len(ids), max_completion_length)) > positions:
            padded = f", padded to multiples of {multiple}," if multiple > 1 else ""
            raise ValueError(
                f"A prompt of {len(ids)} tokens and `max_completion_length={max_completion_length}`{padded} need more "
                f"than the {positions} positions of the model. Remove the prompt, shorten it, or lower "
                f"`max_completion_length`. It starts with {tokenizer.decode(ids[:100])!r:.200}."
            )
