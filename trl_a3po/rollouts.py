"""A check of what a `rollout_func` returns."""

import functools
from collections.abc import Callable
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
