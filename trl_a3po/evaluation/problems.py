"""Reads published datasets of problems with checkable answers, and maps them to TRL's `prompt` and `solution`."""

import functools
import glob
import json
import logging
import os
import re
import reprlib
import zipfile
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import yaml
from datasets import Dataset, IterableDataset, ReadInstruction, load_dataset, load_dataset_builder
from datasets.exceptions import DatasetGenerationError

from .answers import accepted_answers, decoded, has_box, is_derivation
from .files import hash_of_file


logger = logging.getLogger(__name__)

LOADERS = {".jsonl": "json", ".json": "json", ".parquet": "parquet"}
# Files of other types, which nobody means to be found on the Hub.
OTHER_FILES = {".csv", ".tsv", ".txt", ".xlsx", ".arrow", ".gz", ".zst", ".zip", ".py"}
# What `datasets` raises if it cannot read a file.
READ_ERRORS = (DatasetGenerationError, pa.ArrowInvalid, UnicodeDecodeError)

# The columns of problems, and those of their answers. If both exist, `solution` is a derivation and `answer` is its
# result. With `prompt`, `solution` is TRL's column.
ANSWERS_OF = {"prompt": ("solution",), "question": ("answer", "solution"), "problem": ("answer", "solution")}
PROBLEMS = tuple(ANSWERS_OF)
ANSWERS = ("answer", "solution", "reward_model")
PICTURES = ("image", "images")
CHOICES = ("options", "choices")

Message = dict[str, Any]


# Files


def _type_of(file: str | Path) -> str:
    """The end of a file's name, such as `.jsonl`, in lower case."""
    return Path(file).suffix.lower()


def is_file_name(name: str) -> bool:
    """Whether a dataset of this name is a local file, and not a folder or a dataset on the Hub."""
    path = Path(name)
    return not path.is_dir() and (_type_of(path) in {*LOADERS, *OTHER_FILES} or path.is_file())


def check_file(name: str) -> None:
    """
    Raises:
        `OSError`: the file does not exist.
        `ValueError`: the file is empty, its type is not supported, its text is not UTF-8, or a line, or an item of a
            list, is not an object.
    """
    path = Path(name)
    if _type_of(path) in {*LOADERS, *OTHER_FILES} and not path.is_file():
        raise FileNotFoundError(f"There is no file '{name}'.")
    if _type_of(path) not in LOADERS:
        raise ValueError(f"'{name}' is not a {', '.join(LOADERS)} file. Convert it to one of these types.")
    if path.stat().st_size == 0:
        raise ValueError(f"'{name}' is empty.")
    if LOADERS[_type_of(path)] == "json":
        _check_lines(name)
        return
    with suppress(pa.ArrowInvalid):  # `datasets` says what is wrong with the file, but cannot read one without rows
        if not pq.read_metadata(name).num_rows:
            raise ValueError(f"'{name}' is empty.")


def check_folder(name: str, *arguments: Any) -> None:
    """
    Args:
        name (`str`): A dataset. There is nothing to check if it is not a local folder.
        *arguments: The arguments of `datasets.load_dataset` that follow its name: `name`, `data_dir`, `data_files`.

    Raises:
        `OSError`: the folder has no data.
        `ValueError`: `datasets` would take the folder for a pattern, or a file that it reads is not what
            [`check_file`] accepts.
    """
    path = os.path.abspath(name)
    if not os.path.isdir(path):
        return
    if glob.has_magic(path):
        raise ValueError(
            f"`datasets` takes the folder '{path}' for a pattern. Rename it without *, ? and [, or name a file in it."
        )
    if os.path.isfile(os.path.join(path, "state.json")):
        raise ValueError(
            f"'{path}' was written by `save_to_disk`. Write a file that other programs read too, with "
            "`Dataset.to_parquet`, and pass it."
        )
    try:
        files = load_dataset_builder(name, *arguments).config.data_files or {}
    except (ValueError, RuntimeError, zipfile.BadZipFile, yaml.YAMLError) as error:
        raise ValueError(unreadable(name, error)) from error
    for file in sorted({file for files_of_split in files.values() for file in files_of_split}):
        if _type_of(file) in LOADERS:
            check_file(file)


def file_source(name: str) -> dict[str, Any]:
    """
    Arguments with which `datasets.load_dataset` reads this file, and as it is now. It takes a path for a pattern, and
    its cache tells files apart by path and time alone, so the name of the configuration has a hash of the content.

    Raises:
        `OSError`, `ValueError`: as [`check_file`].
    """
    check_file(name)
    loader = LOADERS[_type_of(name)]
    return {"path": loader, "name": hash_of_file(Path(name))[:32], "data_files": glob.escape(os.path.abspath(name))}


def _check_lines(name: str) -> None:
    first = before = ""  # the first line with a text, and the last one
    with open(name, "rb") as file:
        for number, line in enumerate(file, start=1):
            try:
                text = line.decode().strip("\ufeff \t\r\n")
            except UnicodeDecodeError as error:
                raise ValueError(f"Line {number} of '{name}' is not UTF-8. Save the file as UTF-8.") from error
            # At `null`, pyarrow crashes. Within a list or an object of several lines, values follow one of these.
            if text and text[0] not in "{[]},:" and not before.endswith(("{", "[", ",", ":")):
                raise ValueError(f"Line {number} of '{name}' is not an object: {_shortened(text)}")
            first, before = first or text, text or before
    if not before:
        raise ValueError(f"'{name}' is empty.")
    if first.startswith("["):
        _check_list(name)


def _check_list(name: str) -> None:
    """`datasets` drops an item that is `null`, crashes if it is the first one, and does not name other items."""
    try:
        items = json.loads(Path(name).read_text("utf-8-sig"))
    except json.JSONDecodeError:
        return  # `datasets` says what is wrong
    if not items:
        raise ValueError(f"'{name}' is empty.")
    for number, item in enumerate(items, start=1):
        if not isinstance(item, dict):
            raise ValueError(f"Item {number} of '{name}' is not an object: {_shortened(json.dumps(item))}")


def _shortened(text: str) -> str:
    return text if len(text) <= 40 else text[:40] + " ..."


def load_problems(
    name: str,
    split: str,
    config: str | None = None,
    instruction: str | None = None,
    worked_examples: Sequence[Message] = (),
) -> Dataset:
    """
    Problems from a file or from the Hub.

    Args:
        name (`str`): A local .jsonl, .json or .parquet file, a folder, or a dataset on the Hugging Face Hub.
        split (`str`): Split, or a slice of it such as `"test[:100]"`. A file has one split, of any name.
        config (`str`, *optional*): Configuration of a dataset on the Hub, for example `"main"`.
        instruction (`str`, *optional*): See [`to_prompt_and_solution`].
        worked_examples (`list[dict]`, *optional*): See [`to_prompt_and_solution`].

    Raises:
        `OSError`: there is no such file.
        `ValueError`: the dataset cannot be read, or has no problems; see [`to_prompt_and_solution`].
    """
    if is_file_name(name):
        source = file_source(name)
        source["data_files"] = {split.partition("[")[0]: source["data_files"]}
        if config is not None:
            logger.warning("`dataset_config=%r` has no effect on the file '%s'.", config, name)
    else:
        check_folder(name, config)
        source = {"path": name, "name": config}
    try:
        dataset = load_dataset(**source, split=split)
    except (DatasetGenerationError, ValueError, RuntimeError) as error:  # RuntimeError: the dataset is a script
        raise ValueError(unreadable(name, error)) from error
    row_numbers = None
    if "[" in split:
        lengths = {each: info.num_examples for each, info in dataset.info.splits.items()}
        parts = ReadInstruction.from_spec(split).to_absolute(lengths)
        row_numbers = [number for part in parts for number in range(part.from_, part.to)]
    return to_prompt_and_solution(dataset, instruction, worked_examples, name=f"'{name}'", row_numbers=row_numbers)


def unreadable(name: str, error: BaseException) -> str:
    """One line on why `datasets` could not read a dataset. The message of `datasets` does not give the reason."""
    while error.__cause__ is not None:
        error = error.__cause__
    return f"Cannot read the dataset '{name}': {' '.join(str(error).split())}"


def split_off_last(dataset: Dataset, size: int) -> tuple[Dataset, Dataset]:
    """
    Splits a dataset into all rows except the last `size`, and the last `size` rows.

    Raises:
        `ValueError`: one of the two would be empty.
    """
    if not 0 < size < len(dataset):
        raise ValueError(
            f"Cannot hold out {size} of {len(dataset)} rows: at least one row must remain on each side. Set "
            "`eval_size`."
        )
    cut = len(dataset) - size
    return dataset.select(range(cut)), dataset.select(range(cut, len(dataset)))


# Columns


def to_prompt_and_solution(
    dataset: Dataset,
    instruction: str | None = None,
    worked_examples: Sequence[Message] = (),
    *,
    name: str = "the dataset",
    row_numbers: Sequence[int] | None = None,
) -> Dataset:
    r"""
    Maps the columns of common datasets to a conversational `prompt` and a `solution`, for `accuracy_reward`.

    It reads the columns of GSM8K (`question`, `answer`), of MATH and AIME (`problem` and `answer` or `solution`), of
    verl, such as DAPO-Math-17k (`prompt`, `reward_model`), and of TRL (`prompt`, `solution`). It drops other columns.

    A `solution` is a string, in a form that math-verify reads. If some problem has several accepted answers, the
    `solution` of every problem is a list of strings: [`trl_a3po.rewards.accuracy_reward`] takes both. Problems without
    a text or without an answer are skipped, and a warning says how many and which. Beside `question` and `problem`, a
    `solution` of sentences is an answer only if it marks one. The column `row` has the number that each row had before
    others were skipped. Streams have no such column.

    Args:
        dataset (`datasets.Dataset` or `datasets.IterableDataset`):
            A dataset with any of these columns. In a stream, each `solution` is a string or a list, row by row.
        instruction (`str`, *optional*):
            Appended to each problem as a line of its own, for example `"Put your final answer within \boxed{}."`.
        worked_examples (`list[dict]`, *optional*):
            Messages that stand before each problem, after its system message if it has one.
        name (`str`, *optional*):
            What messages call the dataset.
        row_numbers (`list[int]`, *optional*):
            What messages call its rows, by default their positions.

    Raises:
        `ValueError`: the dataset has other columns, or no problem is left. Or a row is wrong, and the message names
        it: its problem or answer has an unknown shape; it has pictures; its answer is a letter, and its text lacks the
        choices; there is something to add, and it does not end with the user's message.
    """
    columns = dataset.column_names or list(next(iter(dataset), ()))  # a stream may not know them
    if _reader(columns) is None:
        raise _unknown(columns)
    features = dataset.features or {}
    for column in ANSWERS:
        _check_type(column, features.get(column), name)
    convert = functools.partial(
        _convert,
        columns=[each for each in columns if each in (*PROBLEMS, *ANSWERS, *PICTURES, *CHOICES)],
        mixed=[each for each in ANSWERS if "Json(" in repr(features.get(each))],
        instruction=instruction,
        worked_examples=list(worked_examples),
        name=name,
        row_numbers=row_numbers,
    )
    if isinstance(dataset, IterableDataset):
        convert = functools.partial(_convert_stream, convert=convert)
        return dataset.map(convert, batched=True, with_indices=True, remove_columns=columns)
    if not len(dataset):
        raise ValueError(f"There are no rows in {name}.")
    # The cache is not used: another version of this package may have filled it.
    mapped = dataset.map(convert, batched=True, with_indices=True, remove_columns=columns, load_from_cache_file=False)
    if not len(mapped):
        raise ValueError(
            f"None of the {len(dataset)} problems has both a text and a final answer (columns {columns} of {name}). "
            r"In the sentences of a `solution`, it is within \boxed{} or dollar signs, or after ####."
        )
    kept = set(mapped["row"])
    if skipped := [each for each in row_numbers or range(len(dataset)) if each not in kept]:
        logger.warning(
            "Skipped %d of %d problems: %s without a text or a final answer.",
            len(skipped),
            len(dataset),
            listed_rows(skipped),
        )
    if pc.max(pc.list_value_length(mapped.data.column("solution"))).as_py() > 1:
        return mapped
    return mapped.map(_single_answers, batched=True, load_from_cache_file=False)


def _check_type(column: str, feature: Any, name: str) -> None:
    """A type that does not keep what its author wrote."""
    if re.search(r"'float(16|32)'", repr(feature)):
        lost = "has floating-point numbers of 16 or 32 bits, which are not exactly those that were written"
    elif "ClassLabel(" in repr(feature):
        lost = "has class labels, of which only the numbers are stored"
    else:
        return
    raise ValueError(f"The column `{column}` of {name} {lost}. Write the answers as texts.")


def _convert(
    batch: dict[str, list],
    indices: Sequence[int],
    columns: list[str],
    mixed: list[str],
    instruction: str | None,
    worked_examples: list[Message],
    name: str,
    row_numbers: Sequence[int] | None,
) -> dict[str, list]:
    """Maps the rows that have a text and an answer."""
    converted: dict[str, list] = {"prompt": [], "solution": [], "row": []}
    for index, *values in zip(indices, *(batch[column] for column in columns), strict=True):
        number = index if row_numbers is None else row_numbers[index]
        row = dict(zip(columns, values, strict=True))
        try:
            problem, answers = problem_and_answers(row)
            for column in mixed:
                _check_lists(row[column])
            conversation = as_conversation(problem)
        except ValueError as error:
            raise ValueError(f"Row {number} (counted from 0) of {name}: {error}") from error
        if not (conversation and answers):
            continue
        if (instruction or worked_examples) and (role := conversation[-1]["role"]) != "user":
            raise ValueError(
                f"Row {number} (counted from 0) of {name}: the problem ends with a message of the role {role!r}, so "
                "an instruction or worked examples have no place. End it with the user's message, or leave them out."
            )
        conversation = with_instruction(conversation, instruction)
        start = int(conversation[0]["role"] == "system")
        converted["prompt"].append([*conversation[:start], *worked_examples, *conversation[start:]])
        converted["solution"].append(answers)
        converted["row"].append(number)
    return converted


def _check_lists(answers: Any) -> None:
    """
    Where a column has values of several types, `datasets` parses each text as JSON: the interval "[1, 2]" becomes a
    list of two answers.
    """
    if isinstance(answers, dict):
        for each in answers.values():
            _check_lists(each)
    elif isinstance(answers, list) and not all(isinstance(each, str) for each in answers):
        raise ValueError(
            f"the answer {reprlib.repr(answers)} may have been one text, because the column has values of several "
            'types. Write each answer as a text within dollar signs, such as "$[1, 2]$".'
        )


def _convert_stream(batch: dict[str, list], indices: Sequence[int], convert: Callable) -> dict[str, list]:
    converted = convert(batch, indices)
    kept = set(converted.pop("row"))
    for number in indices:
        if number not in kept:
            logger.warning("Skipped row %d (counted from 0): it has no text or no answer.", number)
    solutions = [answers[0] if len(answers) == 1 else answers for answers in converted["solution"]]
    return {**converted, "solution": solutions}


def listed_rows(indices: Sequence[int]) -> str:
    """The numbers of some rows, at most ten of them."""
    named = ", ".join(str(index) for index in indices[:10])
    more = f" and {len(indices) - 10} more" if len(indices) > 10 else ""
    return f"{'row' if len(indices) == 1 else 'rows'} {named}{more} (counted from 0)"


def _single_answers(batch: dict[str, list]) -> dict[str, list]:
    return {"solution": [answer for (answer,) in batch["solution"]]}


def unparseable_rows(dataset: Dataset) -> list[int]:
    """
    The `row` of each problem of [`to_prompt_and_solution`] that `accuracy_reward` cannot score, because math-verify
    cannot parse any of its accepted answers. Each distinct answer is parsed once, which takes one to ten milliseconds.
    """
    from math_verify import parse  # an extra

    parses: dict[str, bool] = {}
    found = []
    for row, solution in zip(dataset["row"], dataset["solution"], strict=True):
        for answer in [solution] if isinstance(solution, str) else solution:
            if answer not in parses:
                parses[answer] = bool(parse(answer))
            if parses[answer]:
                break
        else:
            found.append(row)
    return found


def check_parseable(dataset: Dataset, use: str, consequence: str = "get no reward") -> None:
    """
    Warns about the problems of [`to_prompt_and_solution`] that `accuracy_reward` cannot score, and about answers that
    are sentences. `use` is what they are for, such as `"training"`, and `consequence` what becomes of them.

    Raises:
        `ValueError`: it can score none.
    """
    unparseable = unparseable_rows(dataset)
    if len(unparseable) == len(dataset):
        raise ValueError(
            f"math-verify cannot parse any of the {len(dataset)} solutions for {use}, such as "
            f"{reprlib.repr(dataset['solution'][0])}. Write each as a number, or as LaTeX within dollar signs."
        )
    if unparseable:
        logger.warning(
            "math-verify cannot parse the solutions of %d of %d problems for %s. They %s: %s.",
            len(unparseable),
            len(dataset),
            use,
            consequence,
            listed_rows(unparseable),
        )
    if sentences := [row for row, each in zip(dataset["row"], dataset["solution"], strict=True) if _is_sentence(each)]:
        logger.warning(
            "The answers of %d of %d problems for %s are sentences: %s. A completion is right only if it says the "
            "same. Write the final answer alone, or after ####.",
            len(sentences),
            len(dataset),
            use,
            listed_rows(sentences),
        )


def _is_sentence(solution: str | list[str]) -> bool:
    answers = [solution] if isinstance(solution, str) else solution
    return all(is_derivation(answer.removeprefix("$").removesuffix("$")) for answer in answers)


def as_conversation(problem: Any) -> list[Message]:
    """
    The messages of a problem, each with one text; none if it has no text.

    Raises:
        `ValueError`: it is neither a text nor a list of messages of text.
    """
    if isinstance(problem, np.ndarray):
        problem = problem.tolist()
    if problem is None or isinstance(problem, str):
        return [{"role": "user", "content": problem}] if problem and problem.strip() else []
    if not isinstance(problem, list) or not all(map(_is_message, problem)):
        raise ValueError(
            "a problem must be a text, or a list of messages with texts as `role` and `content`, got "
            f"{reprlib.repr(problem)}."
        )
    # Templates of text models take a list of parts for a text. Processors make parts of a text themselves.
    return [{**message, "content": _joined(message["content"])} for message in problem]


def _joined(content: str | list[dict[str, str]]) -> str:
    return content if isinstance(content, str) else "".join(part["text"] for part in content)


def _is_message(value: Any) -> bool:
    if not isinstance(value, dict) or not isinstance(value.get("role"), str):
        return False
    content = value.get("content")
    return isinstance(content, str) or (isinstance(content, list) and all(map(_is_part_of_text, content)))


def _is_part_of_text(value: Any) -> bool:
    return isinstance(value, dict) and value.get("type") == "text" and isinstance(value.get("text"), str)


def problem_and_answers(row: dict[str, Any]) -> tuple[Any, list[str]]:
    """
    The problem of a row of any known dataset, and the answers that it accepts.

    Columns that are empty in this row do not count: a mixture of datasets has the columns of all of them.

    Raises:
        `ValueError`: an answer has an unknown shape, or the problem has pictures, or choices that its text lacks.
    """
    for name in PICTURES:
        if row.get(name):
            raise ValueError(
                f"it has pictures (`{name}`), and a model gets only the text of a problem. Leave out such rows, or "
                "remove the column if the text is enough."
            )
    derived = ("answer", "solution")  # an empty `answer` says that `solution` may be a derivation
    filled = [name for name, value in row.items() if value is not None or name in derived]
    read = _reader(filled) or _reader(list(row))
    if read is None:
        raise _unknown(list(row))
    problem, answers = read(row)
    if answers and all(_LABEL.fullmatch(answer) for answer in answers):
        for name in CHOICES:
            if choices := _texts(row.get(name)):
                _check_choices(as_conversation(problem), name, choices)
    return problem, answers


def _check_choices(conversation: list[Message], name: str, choices: list[str]) -> None:
    text = _plain(" ".join(message["content"] for message in conversation))
    missing = [each for each in choices if _plain(_MARK.sub("", each)) not in text]
    if text and missing:
        raise ValueError(
            f"its answer is a letter, and its text lacks what to choose from (`{name}`), such as "
            f"{reprlib.repr(missing[0])}. Put it into the text of the problem."
        )


_LABEL = re.compile(r"\$?\(?[A-J]\)?\$?")  # of a choice
_MARK = re.compile(r"^\s*\(?[A-J][).:]\s*")  # before the text of a choice


def _texts(choices: Any) -> list[str]:
    """The texts to choose from, in a list, or in the lists or texts of a dictionary."""
    choices = decoded(choices)
    if isinstance(choices, dict):
        choices = choices.get("text", list(choices.values()))
    if isinstance(choices, np.ndarray):
        choices = choices.tolist()
    if isinstance(choices, list):
        return [text for each in choices for text in _texts(each)]
    return [] if choices is None else [str(choices)]


def _plain(text: str) -> str:
    """Without what differs between two ways to write a choice."""
    return re.sub(r"[\s$.]", "", text).casefold()


def _unknown(columns: list[str]) -> ValueError:
    return ValueError(
        f"The dataset has the columns {columns}. Accepted are `prompt` with `solution` or `reward_model` (verl), "
        "and `question` or `problem` with `answer` or `solution`."
    )


def _reader(columns: list[str]) -> Callable[[dict[str, Any]], tuple[Any, list[str]]] | None:
    """Returns a function that reads the problem and its accepted answers from a row; `None` for other columns."""
    if {"prompt", "reward_model"} <= set(columns):
        return lambda row: (row["prompt"], _verl_answers(row["reward_model"]))
    for problem, possible in ANSWERS_OF.items():
        answers = [name for name in possible if name in columns]
        if problem in columns and answers:
            break
    else:
        return None

    def read(row: dict[str, Any]) -> tuple[Any, list[str]]:
        first, *others = answers
        # With `prompt`, `solution` is the answer that TRL's rewards take.
        is_answer = problem == "prompt" or first != "solution" or not is_derivation(row[first])
        accepted = accepted_answers(row[first]) if is_answer else []
        for name in others:
            if not accepted and has_box(row[name]):
                accepted = accepted_answers(row[name])
        return row[problem], accepted

    return read


def _verl_answers(reward_model: Any) -> list[str]:
    reward_model = decoded(reward_model)
    if not reward_model:
        return []
    if not isinstance(reward_model, dict) or "ground_truth" not in reward_model:
        found = sorted(reward_model) if isinstance(reward_model, dict) else reward_model
        raise ValueError(f"`reward_model` has {found}. Accepted is `ground_truth`.")
    return accepted_answers(reward_model["ground_truth"])


def with_instruction(prompt: list[dict[str, Any]], instruction: str | None) -> list[dict[str, Any]]:
    if not instruction:
        return prompt
    *before, last = prompt
    return [*before, {**last, "content": f"{last['content']}\n{instruction}"}]
