"""Datasets of problems with checkable answers, as they are published, in TRL's columns: `prompt` and `solution`."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from datasets import Dataset, load_dataset


LOADERS = {".jsonl": "json", ".json": "json", ".parquet": "parquet"}


def load_problems(name: str, split: str, config: str | None = None, instruction: str | None = None) -> Dataset:
    """
    Problems from a file or from the Hub.

    Args:
        name (`str`): A local .jsonl, .json or .parquet file, or else a dataset on the Hugging Face Hub.
        split (`str`): Split of a dataset on the Hub.
        config (`str`, *optional*): Configuration of a dataset on the Hub, for example `"main"`.
        instruction (`str`, *optional*): See [`to_prompt_and_solution`].
    """
    path = Path(name)
    if path.suffix in LOADERS:
        dataset = load_dataset(LOADERS[path.suffix], data_files={split: str(path)}, split=split)
    else:
        dataset = load_dataset(name, config, split=split)
    return to_prompt_and_solution(dataset, instruction)


def split_off_last(dataset: Dataset, size: int) -> tuple[Dataset, Dataset]:
    """All rows but the last `size` of them, and these."""
    if not 0 < size < len(dataset):
        raise ValueError(f"Cannot hold out {size} of {len(dataset)} rows: at least one row must remain on each side.")
    cut = len(dataset) - size
    return dataset.select(range(cut)), dataset.select(range(cut, len(dataset)))


def to_prompt_and_solution(dataset: Dataset, instruction: str | None = None) -> Dataset:
    r"""
    Maps the columns of common datasets to a conversational `prompt` and a `solution`, for TRL's `accuracy_reward`.

    Understood are the columns of GSM8K (`question`, `answer`), of MATH and AIME (`problem` and `answer` or
    `solution`), of verl, such as DAPO-Math-17k (`prompt`, `reward_model`), and TRL's own (`prompt`, `solution`).
    Other columns are dropped.

    Args:
        dataset (`datasets.Dataset`): Any of these.
        instruction (`str`, *optional*):
            Appended to each problem as a line of its own, for example `"Put your final answer within \boxed{}."`.

    Raises:
        `ValueError`: none of them; names the columns that were found.
    """
    columns = dataset.column_names
    read = _reader(columns)

    def convert(row: dict[str, Any]) -> dict[str, Any]:
        prompt, answer = read(row)
        return {"prompt": _with_instruction(as_conversation(prompt), instruction), "solution": final_answer(answer)}

    return dataset.map(convert, remove_columns=columns)


def as_conversation(prompt: str | list[dict[str, str]]) -> list[dict[str, str]]:
    return [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt


def final_answer(answer: str | int | float) -> str:
    r"""The part of an answer that math-verify is to compare, as LaTeX.

    It follows `####` in GSM8K and is the last `\boxed{...}` of a derivation as in MATH. Without the dollar signs
    math-verify would read a bare `\frac{1}{2}` as the number 1.
    """
    text = str(answer)
    if "####" in text:
        text = text.rsplit("####", 1)[1].strip()
    if "\\boxed" in text:
        return text[text.rindex("\\boxed") :]
    return text if "$" in text else f"${text}$"


def _reader(columns: list[str]) -> Callable[[dict[str, Any]], tuple[Any, Any]]:
    """What takes the problem and the answer from a row."""
    if {"prompt", "reward_model"} <= set(columns):
        return lambda row: (row["prompt"], _ground_truth(row["reward_model"]))
    problem = next((name for name in ("prompt", "question", "problem") if name in columns), None)
    # Where both exist, `solution` is a derivation and `answer` only its result. Beside `prompt` it is TRL's column.
    answers = ("solution",) if problem == "prompt" else ("answer", "solution")
    answer = next((name for name in answers if name in columns), None)
    if problem is None or answer is None:
        raise ValueError(
            f"The dataset has the columns {columns}. Accepted are `prompt` with `solution` or `reward_model` (verl), "
            "and `question` or `problem` with `answer` or `solution`."
        )
    return lambda row: (row[problem], row[answer])


def _ground_truth(reward_model: dict[str, Any]) -> Any:
    """verl's own is the answer itself; some datasets nest it beside a copy of the question."""
    truth = reward_model["ground_truth"]
    if not isinstance(truth, dict):
        return truth
    for name in ("target", "answer", "solution"):
        if truth.get(name) is not None:
            return truth[name]
    raise ValueError(f"`reward_model.ground_truth` has {sorted(truth)}. Accepted are `target`, `answer`, `solution`.")


def _with_instruction(prompt: list[dict[str, str]], instruction: str | None) -> list[dict[str, str]]:
    if instruction is None:
        return prompt
    *before, last = prompt
    return [*before, {**last, "content": f"{last['content']}\n{instruction}"}]
