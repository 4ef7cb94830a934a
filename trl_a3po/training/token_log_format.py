"""[`LoggedCompletion`]: one completion token by token, as a line of the file that training writes."""

import json
import sys
from dataclasses import asdict, dataclass, fields
from typing import Any


TOKENS_FILE = "tokens.jsonl"

# With these limits, a line is smaller than one mebibyte for any text. Usually it has 35 bytes per token.
MAX_TOKENS = 1024
MAX_TOKEN_CHARACTERS = 64
MAX_PROMPT_CHARACTERS = 2048
MAX_LINE_BYTES = 2**20


@dataclass(frozen=True)
class LoggedCompletion:
    """
    A completion that was trained on. Values that are unknown or not finite are `None`.

    Args:
        step (`int`): Number of optimizer steps done after the step that trained on the completion.
        prompt (`str`): Text of the prompt. A long prompt is cut at its start.
        reward (`float` or `None`): Weighted sum over the reward functions.
        advantage (`float`): The advantage of the completion, before shaping.
        length (`int`): Number of tokens of the whole completion.
        tokens (`list[str]`): Text of each of the first tokens. It is empty if a later token completes the character.
        weights (`list[float | None]`): Shaped advantage of each token, divided by `advantage`.
        probs (`list[float | None]`): Probability of each token under the old policy.
        entropies (`list[float | None]`): Entropy of the policy at each token, in nats.
        group (`int`, *optional*, defaults to `0`): Number of the completion's group within the step. Files of earlier
            releases do not have it.
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
        """Writes the line in ASCII, so that no character of a completion ends the line or cannot be encoded."""
        return json.dumps(asdict(self), separators=(",", ":"), allow_nan=False) + "\n"

    @classmethod
    def from_line(cls, line: str | bytes) -> "LoggedCompletion":
        """
        Reads a line of [`~LoggedCompletion.to_line`].

        Raises:
            `ValueError`: the line is not a logged completion.
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
            raise ValueError("not a logged completion: a value has the wrong type")
        return completion


def is_number(value: Any) -> bool:
    """Whether a value is finite as a float."""
    is_kind = isinstance(value, int | float) and not isinstance(value, bool)
    return is_kind and -sys.float_info.max <= value <= sys.float_info.max


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 2**53


def _are_numbers(values: Any) -> bool:
    return isinstance(values, list) and all(value is None or is_number(value) for value in values)
