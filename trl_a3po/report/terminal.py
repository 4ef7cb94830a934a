"""The token view in a terminal."""

from collections.abc import Sequence

from rich.console import Console
from rich.table import Table
from rich.text import Text

from ..training.token_log_format import LoggedCompletion
from .text import visible


_RAISED = {"positive": "black on bright_cyan", "negative": "black on bright_yellow"}


def print_tokens(completions: Sequence[LoggedCompletion], console: Console) -> None:
    """
    Prints completions of one prompt. Tokens with a weight above 1 are colored and listed in a table.

    Neither rich nor the terminal interprets text written by a model.

    Args:
        completions (sequence of `LoggedCompletion`): One or more completions of the same prompt.
        console (`rich.console.Console`): The console to print to.
    """
    console.print(Text(f"step {completions[0].step}, prompt", style="bold"))
    console.print(Text(visible(completions[0].prompt)))
    for completion in completions:
        polarity = "positive" if completion.advantage > 0 else "negative"
        facts = (
            f"reward {_shown(completion.reward)}, advantage {completion.advantage:+.3g}, {completion.length} tokens"
        )
        console.print(Text.assemble("\n", (f"{polarity}: {facts}", "bold")))
        console.print(_colored(completion, _RAISED[polarity]))
        console.print(_table(completion))


def _colored(completion: LoggedCompletion, style: str) -> Text:
    text = Text()
    for token, weight in zip(completion.tokens, completion.weights, strict=True):
        text.append(visible(token), style if weight is not None and weight > 1 else "")
    if completion.length > len(completion.tokens):
        text.append(f" … {completion.length - len(completion.tokens)} more", "dim")
    return text


def _table(completion: LoggedCompletion) -> Table:
    table = Table("position", "token", "weight", "probability", "entropy, nats", box=None, header_style="dim")
    columns = (completion.tokens, completion.weights, completion.probs, completion.entropies)
    for position, (token, *values) in enumerate(zip(*columns, strict=True), start=1):
        if values[0] is not None and values[0] > 1:
            table.add_row(str(position), Text(visible(token).rstrip("\n") or "·"), *map(_shown, values))
    return table


def _shown(value: float | None) -> str:
    return "–" if value is None else f"{value:.3g}"
