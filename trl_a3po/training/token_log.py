"""[`TokenLog`]: writes some completions of each logged step, token by token, for the report."""

import math
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import compress, islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import TrainerCallback

from ..update.micro_batches import loss_mask
from .token_log_format import MAX_PROMPT_CHARACTERS, MAX_TOKEN_CHARACTERS, MAX_TOKENS, TOKENS_FILE, LoggedCompletion


COMPLETIONS_PER_POLARITY = 2

# The key of a rollout for the group number of each row. The token ids of prompts do not identify a group: two pictures
# may have the same question. The position of a row does not either, because TRL shuffles rows.
GROUPS = "a3po_groups"


class TokenLog(TrainerCallback):
    """
    At every log, writes the most positive and the most negative completions of a few prompts to
    `{output_dir}/tokens.jsonl`, one [`~trl_a3po.training.token_log_format.LoggedCompletion`] per line.

    It runs on the main process and covers only the rows of that process, without communication. During a step it keeps
    references to tensors of the loss. It waits for the device only when it writes, and writes at most four completions
    per prompt. A resumed run continues from its checkpoint: later lines are removed.

    Args:
        output_dir (`str`): Directory of the file.
        prompts (`int`): Number of prompts per log.
        tokenizer: Tokenizer of the model.
    """

    def __init__(self, output_dir: str, prompts: int, tokenizer: Any):
        self._path = Path(output_dir, TOKENS_FILE)
        self._prompts = prompts
        self._tokenizer = tokenizer
        self._step: list[dict[str, Tensor]] = []

    def add(
        self, inputs: dict[str, Any], advantages: Tensor, shaped: Tensor, logps: Tensor, entropies: Tensor
    ) -> None:
        """
        Keeps a micro-batch for the next log.

        Args:
            inputs (`dict`): The inputs of the loss, with `rewards` of shape `(B,)` if they are known, and the group
                number of each row under `GROUPS`, of shape `(B,)`. Without group numbers, rows with the same prompt
                count as one group.
            advantages (`torch.Tensor` of shape `(B,)`): The advantages before shaping.
            shaped (`torch.Tensor` of shape `(B, T)` or `(B,)`): The advantages after shaping.
            logps (`torch.Tensor` of shape `(B, T)`): Old log-probabilities of the sampled tokens.
            entropies (`torch.Tensor` of shape `(B, T)`): Entropies, in nats.
        """
        names = ("prompt_ids", "prompt_mask", "completion_ids", "completion_mask")
        rewards = inputs.get("rewards")
        self._step.append(
            {
                **{name: inputs[name] for name in names},
                "rewards": torch.full_like(advantages, torch.nan) if rewards is None else rewards,
                "groups": inputs.get(GROUPS, torch.zeros_like(advantages)),
                "advantages": advantages,
                "mask": loss_mask(inputs),
                "shaped": shaped,
                "logps": logps,
                "entropies": entropies,
            }
        )

    def on_train_begin(self, args, state, control, **kwargs):
        if self._path.exists():
            _remove_after(self._path, state.global_step)

    def on_step_begin(self, args, state, control, **kwargs):
        self._step.clear()

    def write(self, step: int) -> None:
        """Writes completions of the micro-batches of this step. Waits for the device."""
        micro_batches, self._step = self._step, []
        lines = [
            self._completion(step, group, row).to_line()
            for group, rows in enumerate(_most_telling(_trained_rows(micro_batches), self._prompts))
            for row in rows
        ]
        if lines:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            with self._path.open("a", encoding="ascii", newline="\n") as file:
                file.write("".join(lines))

    def _completion(self, step: int, group: int, row: "_Row") -> LoggedCompletion:
        values = {name: tensor[row.index] for name, tensor in row.micro_batch.items()}
        is_token = values["completion_mask"].bool()
        counts = values["mask"][is_token][:MAX_TOKENS].bool()

        def numbers(of: Tensor) -> list[float | None]:
            known = torch.where(counts, of.expand_as(is_token)[is_token][:MAX_TOKENS].float(), torch.nan)
            return [_number(value) for value in known.tolist()]

        prompt = self._tokenizer.decode(list(row.prompt), skip_special_tokens=True)
        return LoggedCompletion(
            step=step,
            prompt=prompt if len(prompt) <= MAX_PROMPT_CHARACTERS else "…" + prompt[1 - MAX_PROMPT_CHARACTERS :],
            reward=_number(values["rewards"].item()),
            advantage=row.advantage,
            length=len(row.completion),
            tokens=[_shorten(text) for text in token_texts(self._tokenizer, list(row.completion[:MAX_TOKENS]))],
            weights=numbers(values["shaped"] / values["advantages"]),
            probs=numbers(values["logps"].float().exp()),
            entropies=numbers(values["entropies"]),
            group=group,
        )


def token_texts(tokenizer: Any, ids: Sequence[int]) -> list[str]:
    """
    The text that each token adds to the text of the tokens before it.

    Decoding each token by itself would be wrong: if a character is spread over several tokens, none of them has a text
    of its own, and some tokenizers drop the space before the first token.
    """

    def decode(start: int, end: int) -> str:
        return tokenizer.decode(ids[start:end], skip_special_tokens=False, clean_up_tokenization_spaces=False)

    texts = []
    context, known = 0, 0  # the tokens between these two numbers completed the last character
    for end in range(1, len(ids) + 1):
        text = decode(context, end)
        # A character has up to four bytes, each of which may be a token.
        if text.endswith("\N{REPLACEMENT CHARACTER}") and end - known < 4 and end < len(ids):
            texts.append("")
        else:
            texts.append(text[len(decode(context, known)) :])
            context, known = known, end
    return texts


@dataclass(frozen=True, eq=False)
class _Row:
    group: float
    prompt: tuple[int, ...]
    completion: tuple[int, ...]
    advantage: float
    micro_batch: dict[str, Tensor]
    index: int


def _trained_rows(micro_batches: list[dict[str, Tensor]]) -> list[_Row]:
    """The rows with a non-zero advantage and at least one unmasked token."""
    rows = []
    for batch in micro_batches:
        prompts = _tokens(batch["prompt_ids"], batch["prompt_mask"])
        completions = _tokens(batch["completion_ids"], batch["completion_mask"])
        numbers = (batch[name].tolist() for name in ("groups", "advantages"))
        columns = (*numbers, prompts, completions, batch["mask"].any(1).tolist())
        for index, (group, advantage, prompt, completion, counts) in enumerate(zip(*columns, strict=True)):
            if counts and (advantage > 0 or advantage < 0):
                rows.append(_Row(group, prompt, completion, advantage, batch, index))
    return rows


def _tokens(ids: Tensor, mask: Tensor) -> list[tuple[int, ...]]:
    return [tuple(compress(row, is_token)) for row, is_token in zip(ids.tolist(), mask.tolist(), strict=True)]


def _most_telling(rows: list[_Row], groups: int) -> Iterator[list[_Row]]:
    """Distinct completions with the largest advantages, for a few groups. Groups with both polarities come first."""
    by_group: dict[Any, dict[bool, dict[tuple[int, ...], _Row]]] = {
        (row.group, row.prompt): {True: {}, False: {}} for row in rows
    }
    for row in sorted(rows, key=lambda row: -abs(row.advantage)):
        by_group[row.group, row.prompt][row.advantage > 0].setdefault(row.completion, row)
    one_sided_last = sorted(by_group.values(), key=lambda polarities: not all(polarities.values()))
    for polarities in one_sided_last[:groups]:
        yield [row for each in polarities.values() for row in islice(each.values(), COMPLETIONS_PER_POLARITY)]


def _number(value: float) -> float | None:
    return float(f"{value:.4g}") if math.isfinite(value) else None


def _shorten(text: str) -> str:
    return text if len(text) <= MAX_TOKEN_CHARACTERS else text[: MAX_TOKEN_CHARACTERS - 1] + "…"


def _remove_after(path: Path, step: int) -> None:
    """Removes the lines of later steps from a file, and lines that a crash has damaged."""
    rest = path.with_name(f"{path.name}.partial")
    with path.open("rb") as lines, rest.open("wb") as kept:
        for line in lines:
            try:
                is_kept = LoggedCompletion.from_line(line).step <= step
            except ValueError:
                is_kept = False
            if is_kept:
                kept.write(line)
    os.replace(rest, path)
