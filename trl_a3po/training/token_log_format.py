"""[`LoggedCompletion`]: one completion token by token, as a line of the file that training writes and reports read."""

import json
import sys
from dataclasses import asdict, dataclass, fields
from typing import Any


TOKENS_FILE = "tokens.jsonl"

# With these, a line has less than a mebibyte, whatever a model writes; usually it has 35 bytes a token.
MAX_TOKENS = 1024
MAX_TOKEN_CHARACTERS = 64
MAX_PROMPT_CHARACTERS = 2048
MAX_LINE_BYTES = 2**20


@dataclass(frozen=True)
class LoggedCompletion:
    """
    A completion that was trained on. What is not known, or not finite, is `None`.

    Args:
        step (`int`): Optimizer steps at the end of the one that the completion was part of.
        prompt (`str`): Text of the prompt; of a long one, its end.
        reward (`float` or `None`): Weighted sum over the reward functions.
        advantage (`float`): The advantage of the completion, before shaping.
        length (`int`): Number of tokens of the whole completion.
        tokens (`list[str]`): Text of each of its first tokens. Empty where a later token completes the character.
        weights (`list[float | None]`): Shaped advantage of each token, divided by `advantage`.
        probs (`list[float | None]`): Probability of each token under the old policy.
        entropies (`list[float | None]`): Entropy of the policy at each token, in nats.
        group (`int`, *optional*, defaults to `0`): Number, within the step, of the group that the completion was
            sampled in. Files of earlier releases have none.
    """

    step: int
    prompt: str
    reward: float | None
    advantage: float
    length: int
    tokens: list[str]
    weights: list[float | None]
    probs: list[float | None]
    entropies: list[float | None]
    group: int = 0

    def to_line(self) -> str:
        """In ASCII, so that no character of a completion ends the line, or is none."""
        return json.dumps(asdict(self), separators=(",", ":"), allow_nan=False) + "\n"

    @classmethod
    def from_line(cls, line: str | bytes) -> "LoggedCompletion":
        """
        Reads what [`~LoggedCompletion.to_line`] wrote.

        Raises:
            `ValueError`: the line is something else.
        """
        try:
            values = json.loads(line)
            completion = cls(**{each.name: values[each.name] for each in fields(cls) if each.name in values})
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            raise ValueError(f"not a logged completion: {type(error).__name__}") from error
        columns = (completion.weights, completion.probs, completion.entropies)
        if not (
            _is_count(completion.step)
            and _is_count(completion.length)
            and _is_count(completion.group)
            and isinstance(completion.prompt, str)
            and isinstance(completion.tokens, list)
            and all(isinstance(token, str) for token in completion.tokens)
            and completion.advantage is not None
            and _are_numbers([completion.advantage, completion.reward])
            and all(_are_numbers(column) and len(column) == len(completion.tokens) for column in columns)
        ):
            raise ValueError("not a logged completion: a value of another kind")
        return completion


def is_number(value: Any) -> bool:
    """Whether a value is finite as a float."""
    is_kind = isinstance(value, int | float) and not isinstance(value, bool)
    return is_kind and -sys.float_info.max <= value <= sys.float_info.max


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 2**53


def _are_numbers(values: Any) -> bool:
    return isinstance(values, list) and all(value is None or is_number(value) for value in values)
