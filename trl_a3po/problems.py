"""Turn a dataset of problems with checkable answers into conversational `prompt` and `solution` columns."""

from pathlib import Path
from typing import Any

from datasets import Dataset, load_dataset


LOADERS = {".jsonl": "json", ".json": "json", ".parquet": "parquet"}


def load_problems(name: str, split: str) -> Dataset:
    """`name` is a local .jsonl, .json or .parquet file, or else a dataset on the Hugging Face Hub."""
    path = Path(name)
    if path.suffix in LOADERS:
        dataset = load_dataset(LOADERS[path.suffix], data_files={split: str(path)}, split=split)
    else:
        dataset = load_dataset(name, split=split)
    return to_prompt_and_solution(dataset)


def split_off_last(dataset: Dataset, size: int) -> tuple[Dataset, Dataset]:
    """All rows but the last `size` of them, and these."""
    if not 0 < size < len(dataset):
        raise ValueError(f"Cannot hold out {size} of {len(dataset)} rows: at least one row must remain on each side.")
    cut = len(dataset) - size
    return dataset.select(range(cut)), dataset.select(range(cut, len(dataset)))


def to_prompt_and_solution(dataset: Dataset) -> Dataset:
    columns = dataset.column_names
    question_column = next((name for name in ("question", "problem") if name in columns), None)
    # Where both exist, `solution` is a derivation and `answer` only its result.
    answer_column = next((name for name in ("answer", "solution") if name in columns), None)

    if "prompt" in columns and "solution" in columns:

        def convert(row: dict[str, Any]) -> dict[str, Any]:
            return {"prompt": as_conversation(row["prompt"]), "solution": row["solution"]}

    elif question_column and answer_column:

        def convert(row: dict[str, Any]) -> dict[str, Any]:
            return {"prompt": as_conversation(row[question_column]), "solution": final_answer(row[answer_column])}

    else:
        raise ValueError(
            f"The dataset has the columns {columns}. Accepted are `prompt` with `solution`, and `question` or "
            "`problem` with `answer` or `solution`."
        )
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
