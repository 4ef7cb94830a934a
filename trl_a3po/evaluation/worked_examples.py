"""
Worked examples: problems with their solutions, as user and assistant turns before each problem of a dataset.

Base models, and small ones, need a few to write their answer where the reward looks for it.
"""

from collections.abc import Sequence
from typing import Any

from datasets import Dataset, load_dataset

from ..rewards import accuracy_reward
from .files import hash_of_value
from .problems import READ_ERRORS, Message, file_source, problem_and_answers, unreadable, with_instruction


def load_worked_examples(name: str, instruction: str | None = None, checks_answers: bool = True) -> list[Message]:
    r"""
    Reads every row of a file as a user turn with the problem and an assistant turn with its solution.

    The columns are those of [`~trl_a3po.evaluation.problems.to_prompt_and_solution`]. The assistant says the text of
    `solution`, or of `answer` if there is no such column, as it stands in the file.

    Args:
        name (`str`): A local .jsonl, .json or .parquet file.
        instruction (`str`, *optional*): Appended to each problem, as to the problems of the dataset.
        checks_answers (`bool`, *optional*, defaults to `True`):
            Whether `accuracy_reward` must score each solution as right. A completion of the same form then is too.

    Returns:
        `list[dict]`: two messages a row.

    Raises:
        `OSError`: there is no such file.
        `ValueError`: it cannot be read, has no rows, or has a row that is not a worked example; the message names it.
    """
    source = file_source(name)
    try:
        rows = load_dataset(**source, split="train")
    except READ_ERRORS as error:
        raise ValueError(unreadable(name, error)) from error
    except ValueError as error:  # `datasets` makes no split of rows that are `{}`
        raise ValueError(
            f"The worked examples '{name}' cannot be read: {error} Each row needs `question` and `answer`."
        ) from error
    text_column = "solution" if "solution" in rows.column_names else "answer"
    if text_column not in rows.column_names:
        raise ValueError(
            f"The worked examples '{name}' have the columns {rows.column_names}, and no solution to show. Accepted "
            "are `prompt`, `question` or `problem`, with `solution` or `answer`."
        )
    messages: list[Message] = []
    for number, row in enumerate(rows):
        this = f"Row {number} (counted from 0) of the worked examples '{name}'"
        try:
            prompt, answers = problem_and_answers(row)
        except ValueError as error:
            raise ValueError(f"{this}: {error}") from error
        text = row[text_column]
        if not all(isinstance(each, str) and each.strip() for each in (prompt, text)):
            raise ValueError(
                f"{this} needs a problem and a solution, each of them a text, got {prompt!r} and {text!r}."
            )
        if checks_answers and not _is_rewarded(text, answers):
            raise ValueError(
                f"{this} has a solution that `accuracy_reward` does not score as correct, so completions like it "
                f"get no reward: {text!r}. Write the final answer within \\boxed{{}}, as complete LaTeX: "
                r"\frac{1}{2}, not \frac12."
            )
        user = {"role": "user", "content": prompt}
        messages += [*with_instruction([user], instruction), {"role": "assistant", "content": text}]
    return messages


def _is_rewarded(text: str, answers: list[str]) -> bool:
    return accuracy_reward([[{"role": "assistant", "content": text}]], [answers]) == [1.0]


def overlap(problems: Dataset, examples: Sequence[Message]) -> list[tuple[int, int, str]]:
    """
    The problems that are worked examples too: their solution would stand in their own prompt.

    Args:
        problems (`datasets.Dataset`):
            Those of [`~trl_a3po.evaluation.problems.to_prompt_and_solution`]. The last message of a prompt is the
            problem.
        examples (`list[dict]`): Those of [`load_worked_examples`], with the same instruction.

    Returns:
        `list[tuple[int, int, str]]`: the row of the problem, that of the worked example, and the text of both. Spaces
        and line breaks make no difference.
    """
    if not examples:
        return []
    known = {_words(message): row for row, message in enumerate(examples[::2])}
    texts = [(row, _words(prompt[-1])) for row, prompt in zip(problems["row"], problems["prompt"], strict=True)]
    return [(row, known[text], text) for row, text in texts if text in known]


def check_no_overlap(problems: Dataset, examples: Sequence[Message], use: str) -> None:
    """
    Raises:
        `ValueError`: a problem to evaluate on is a worked example. Names the first and its rows.
    """
    if found := overlap(problems, examples):
        row, example, text = found[0]
        others = f", and {len(found) - 1} more" if len(found) > 1 else ""
        raise ValueError(
            f"Row {row} (counted from 0) of the problems {use} is row {example} of the worked examples: "
            f"{text!r}{others}. The prompt would contain its solution. Take it out of `worked_examples`."
        )


def _words(message: Message) -> str:
    return " ".join(message["content"].split())


def recorded(examples: Sequence[Message]) -> dict[str, Any] | None:
    """What tells worked examples from others: how many there are, and a hash of their turns. None without any."""
    if not examples:
        return None
    return {"count": len(examples) // 2, "sha256": hash_of_value(list(examples))}
