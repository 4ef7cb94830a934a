"""Checks of what goes into a rollout, and of what a `rollout_func` returns."""

import functools
from collections.abc import Callable, Sequence
from typing import Any


def refuse_empty_completions(rollout_func: Callable[..., dict[str, Any]]) -> Callable[..., dict[str, Any]]:
    """
    Wraps a `rollout_func`, so that a completion without tokens, which TRL has no place for, is told by its prompt.

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
                    "token at least, such as the end of the sequence."
                )
        return output

    return checked


def check_prompts_fit(
    prompt_ids: Sequence[Sequence[int]], max_completion_length: int, positions: int, tokenizer: Any
) -> None:
    """
    Refuses prompts that leave no room for a completion in a model that looks its positions up.

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
                f"{positions} positions of the model. Leave the prompt out, shorten it, or lower "
                f"`max_completion_length`. It begins {tokenizer.decode(ids[:100])!r:.200}."
            )
