"""TRL's rewards that use math-verify, for problems with more than one accepted answer."""

import numbers
from collections.abc import Callable, Sequence
from itertools import accumulate
from typing import Any

import trl.rewards


Solutions = Sequence[str | Sequence[str]]


def accuracy_reward(
    completions: list[list[dict[str, str]]],
    solution: Solutions,
    log_extra: Callable[[str, list], None] | None = None,
    **kwargs: Any,
) -> list[float | None]:
    r"""
    [`~trl.rewards.accuracy_reward`] for problems with several accepted answers: the best of their rewards.

    Args:
        completions (`list[list[dict[str, str]]]`):
            One conversation per completion, in TRL's format for reward functions.
        solution (`list[str]` or `list[list[str]]`):
            The answer of each problem, or a list of accepted answers. An answer may be a number. `None` is no answer.
        log_extra (`callable`, *optional*):
            TRL's function that adds columns to the table of completions. They show the answer with the best reward.
        **kwargs:
            Not used. TRL passes the other columns of the dataset.

    Returns:
        `list[float | None]`: 1.0 or 0.0 for each completion. `None` if math-verify can parse none of the answers.

    Example:

    ```python
    >>> from trl_a3po.rewards import accuracy_reward

    >>> completions = [[{"role": "assistant", "content": r"It is \boxed{0.25}."}]]
    >>> accuracy_reward(completions, [["$0.25$", "$25$"]])
    [1.0]
    ```
    """
    return _best(trl.rewards.accuracy_reward, completions, solution, log_extra)


def reasoning_accuracy_reward(
    completions: list[list[dict[str, str]]],
    solution: Solutions,
    reasoning_delimiters: list[str] | None = None,
    log_extra: Callable[[str, list], None] | None = None,
    **kwargs: Any,
) -> list[float | None]:
    """
    [`~trl.rewards.reasoning_accuracy_reward`] for problems with several accepted answers: the best of their rewards.

    Takes and returns the same as [`accuracy_reward`]. `reasoning_delimiters` (`list[str]`, *optional*) are TRL's: the
    texts that end the reasoning, by default `["</think>"]`.
    """
    return _best(
        trl.rewards.reasoning_accuracy_reward,
        completions,
        solution,
        log_extra,
        reasoning_delimiters=reasoning_delimiters,
    )


def _texts(solution: Any) -> list[str]:
    """The accepted answers. `None` becomes an empty text, which math-verify cannot parse."""
    several = [solution] if solution is None or isinstance(solution, str | numbers.Number) else list(solution)
    return ["" if each is None else str(each) for each in several] or [""]


def _best(
    reward: Callable[..., list[float | None]],
    completions: list[list[dict[str, str]]],
    solution: Solutions,
    log_extra: Callable[[str, list], None] | None,
    **options: Any,
) -> list[float | None]:
    answers = [_texts(each) for each in solution]
    columns: dict[str, list] = {}
    scores = reward(
        [completion for completion, accepted in zip(completions, answers, strict=True) for _ in accepted],
        [answer for accepted in answers for answer in accepted],
        log_extra=columns.__setitem__,  # older releases of TRL ignore it
        **options,
    )
    values = [-1.0 if score is None else score for score in scores]
    ends = list(accumulate(len(accepted) for accepted in answers))
    best = [max(range(start, end), key=values.__getitem__) for start, end in zip([0, *ends], ends, strict=False)]
    if log_extra is not None:
        for name, column in columns.items():
            log_extra(name, [column[index] for index in best])
    return [scores[index] for index in best]
