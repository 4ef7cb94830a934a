"""Reads published datasets of problems with checkable answers, and maps them to TRL's `prompt` and `solution`."""

import functools
import glob
import json
import logging
import math
import numbers
import os
import re
import reprlib
import unicodedata
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


def is_file_name(name: str) -> bool:
    """Whether a dataset of this name is a local file, and not a folder or a dataset on the Hub."""
    path = Path(name)
    return not path.is_dir() and (path.suffix in {*LOADERS, *OTHER_FILES} or path.is_file())


def check_file(name: str) -> None:
    """
    Raises:
        `OSError`: the file does not exist.
        `ValueError`: the file is empty, its type is not supported, its text is not UTF-8, or a line, or an item of a
            list, is not an object.
    """
    path = Path(name)
    if path.suffix in {*LOADERS, *OTHER_FILES} and not path.is_file():
        raise FileNotFoundError(f"There is no file '{name}'.")
    if path.suffix not in LOADERS:
        raise ValueError(f"'{name}' is not a {', '.join(LOADERS)} file. Convert it to one of these types.")
    if path.stat().st_size == 0:
        raise ValueError(f"'{name}' is empty.")
    if LOADERS[path.suffix] == "json":
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
        if Path(file).suffix in LOADERS:
            check_file(file)


def file_source(name: str) -> dict[str, Any]:
    """
    Arguments with which `datasets.load_dataset` reads this file, and as it is now. It takes a path for a pattern, and
    its cache tells files apart by path and time alone, so the name of the configuration has a hash of the content.

    Raises:
        `OSError`, `ValueError`: as [`check_file`].
    """
    check_file(name)
    loader = LOADERS[Path(name).suffix]
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
    a text or without an answer are skipped, and a warning says how many and which. `row` is the number of each row
    before others were skipped; streams have no such column.

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
        `ValueError`: the dataset has other columns, a problem or an answer has an unknown shape, a problem has
        pictures, or no problem is left. The message names the row.
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
            f"None of the {len(dataset)} problems has both a text and an answer (columns {columns} of {name})."
        )
    kept = set(mapped["row"])
    if skipped := [each for each in row_numbers or range(len(dataset)) if each not in kept]:
        logger.warning(
            "Skipped %d of %d problems: %s without a text or an answer.", len(skipped), len(dataset), rows(skipped)
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


def rows(indices: Sequence[int]) -> str:
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


def check_parseable(dataset: Dataset, use: str) -> None:
    """
    Warns about the problems of [`to_prompt_and_solution`] that `accuracy_reward` cannot score. `use` is what they are
    for, such as `"training"`.

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
            "math-verify cannot parse the solutions of %d of %d problems for %s. They get no reward: %s.",
            len(unparseable),
            len(dataset),
            use,
            rows(unparseable),
        )


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
    for name in CHOICES:
        if missing := [each for each in _texts(row.get(name)) if each not in str(problem)]:
            raise ValueError(
                f"it has answers to choose from (`{name}`), and its text has not all of them: "
                f"{reprlib.repr(missing[0])} is missing. Put them into the text of the problem, or remove the column."
            )
    return problem, answers


def _texts(choices: Any) -> list[str]:
    """The texts to choose from, in a list or in the lists or texts of a dictionary."""
    if isinstance(choices, dict):
        choices = list(choices.values())
    if isinstance(choices, np.ndarray):
        choices = choices.tolist()
    if isinstance(choices, list):
        return [text for each in choices for text in _texts(each)]
    return [choices.strip()] if isinstance(choices, str) else []


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
        is_derivation = first == "solution" and _is_derivation(row[first])
        accepted = [] if is_derivation else accepted_answers(row[first])
        for name in others:
            if not accepted and _has_box(row[name]):
                accepted = accepted_answers(row[name])
        return row[problem], accepted

    return read


def _verl_answers(reward_model: Any) -> list[str]:
    reward_model = _decoded(reward_model)
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


# Answers


def accepted_answers(truth: Any) -> list[str]:
    r"""
    All answers that a ground truth accepts, each in the form of [`final_answer`]; none if the ground truth is empty.

    A list accepts each of its items. A string that contains a JSON list of strings is read as that list, as in
    Skywork-OR1; `"[1, 2]"` stays an interval. verl's datasets nest a dictionary beside a copy of the question. Its
    answer is `solution` if that is a derivation with a `\boxed{}`, else `target`, `answer` or `solution`. The `target`
    of MATH has lost spaces and line breaks, so some of its answers are damaged.

    Raises:
        `ValueError`: a dictionary with none of these keys.
    """
    if isinstance(truth, np.ndarray | np.generic):
        truth = truth.tolist()
    truth = _decoded(truth)
    if isinstance(truth, bool):
        truth = [str(truth), str(truth).lower()]
    if isinstance(truth, dict):
        return _nested_answers(truth)
    if isinstance(truth, list | tuple):
        return list(dict.fromkeys(answer for each in truth for answer in accepted_answers(each)))
    answer = final_answer(truth)
    return [answer] if answer else []


def final_answer(answer: Any) -> str:
    r"""
    The part of an answer that math-verify compares, as LaTeX; empty if there is none.

    In GSM8K it follows `####`; in MATH it is the last `\boxed{...}` of the derivation. Other answers get dollar
    signs: without them, math-verify would read a bare `\frac{1}{2}` as the number 1. Within them, it reads letters as
    factors, and it stops at some characters, so `8 dollars`, `3 1/2`, `1 000`, `1e5`, `2√3`, `5²` and the like become
    LaTeX too.

    Raises:
        `ValueError`: the answer is neither a text nor a number that is exact.
    """
    if answer is None or (isinstance(answer, float) and math.isnan(answer)):
        return ""
    # Readers of files make times of texts and round large numbers, so these may not be what was written.
    if not isinstance(answer, str | numbers.Number) or (isinstance(answer, float) and abs(answer) >= 2**53):
        raise ValueError(
            f"the answer {reprlib.repr(answer)} may not be what was written. Write it as a text within dollar signs, "
            'such as "$2^{70}$".'
        )
    # 1e-05 would be read as e - 5.
    text = np.format_float_positional(answer, trim="-") if isinstance(answer, float) else str(answer)
    text = text.rsplit("####", 1)[-1].strip()
    box = _last_box(text)
    if box is not None:
        return f"\\boxed{{{box}}}" if box else ""
    if _IN_DELIMITERS.search(text) and not _are_currencies(text):
        return text
    if not text.strip("$. "):
        return ""
    # Such a dollar sign, and a single one, is a currency.
    bare = _DOLLAR.sub(r"\\$", text.removesuffix("."))
    return f"${_number_in_latex(_symbols_in_latex(bare))}$"


def _are_currencies(text: str) -> bool:
    """Whether each dollar sign stands before a number: `$5 and $6` has no LaTeX between dollar signs."""
    signs = [match.end() for match in _DOLLAR.finditer(text)]
    return len(signs) > 1 and all(re.match(r"[-+]?\d", text[end:]) for end in signs)


def _symbols_in_latex(text: str) -> str:
    """A text without the characters at which math-verify stops reading, or which it does not read as people do."""
    text = _RAISED.sub(lambda match: _power(match[0].translate(_LOWERED)), text)
    text = _NEGATIVE_POWER.sub(r"^{\1}", text.translate(_SYMBOLS))
    return _ROOT.sub(lambda match: rf"{_ROOTS[match[1]]}{{{match[2] or match[3]}}}", text)


def _power(exponent: str) -> str:
    return f"^{exponent}" if len(exponent) == 1 else f"^{{{exponent}}}"


def _number_in_latex(text: str) -> str:
    """A number as people write it, with its currency or unit; other texts as they are, but for fractions like `½`."""
    match = _PLAIN_NUMBER.fullmatch(_VULGAR.sub(lambda match: f" {_parts_of(match[0])}", text).strip())
    if match is None:
        return _VULGAR.sub(lambda match: r"\frac{{{}}}{{{}}}".format(*_parts_of(match[0]).split("/")), text)
    before, whole, over, under, spaced, mantissa, exponent, number, percent, unit = match.groups()
    if over:
        number = f"{over}/{under}"
        if percent:  # without the factor, math-verify reads 1/2% as 1/(2%), and 2 1/2% as 2
            number = rf"\frac{{{int(whole or 0) * int(under) + int(over)}}}{{{under}}}\cdot1"
        elif whole:
            number = rf"{whole}\frac{{{over}}}{{{under}}}"
    elif spaced:
        number = spaced.replace(" ", "")
    elif mantissa:
        number = rf"{mantissa}\cdot10^{{{exponent}}}" + (r"\cdot1" if percent else "")
    return before + number + (r"\%" if percent else "") + (rf"\text{{ {unit}}}" if unit else "")


def _parts_of(fraction: str) -> str:
    """Such as `1/2`, for `½`."""
    return unicodedata.normalize("NFKC", fraction).replace("⁄", "/")


_VULGAR = re.compile("[¼-¾⅐-⅞]")
_LOWERED = str.maketrans("⁰¹²³⁴⁵⁶⁷⁸⁹⁺⁻", "0123456789+-")
_RAISED = re.compile("[⁰¹²³⁴⁵⁶⁷⁸⁹⁺⁻]+")
_NEGATIVE_POWER = re.compile(r"\^\s*(-(?:\d+|[a-zA-Z]))")
_SYMBOLS = str.maketrans(
    {
        "⁄": "/",
        "∕": "/",
        "−": "-",
        "–": "-",
        "·": r"\cdot ",
        "⋅": r"\cdot ",
        "×": r"\times ",
        "∞": r"\infty ",
        "±": r"\pm ",
        "∪": r"\cup ",
        "∩": r"\cap ",
    }
)
_ROOTS = {"√": r"\sqrt", "∛": r"\sqrt[3]"}
_ROOT = re.compile(r"([√∛])\s*(?:\(([^()]*)\)|(\d+(?:\.\d+)?|[a-zA-Z]))")

_NUMBER = r"\d[\d,]*(?:\.\d+)?"
# Other words may be factors, or change the number: `2 L`, `3 xy`, `5 million`, `3 tenths`.
_UNIT = (
    r"(?:US |square |cubic )?(?:dollars?|cents?|euros?|pounds?|seconds?|minutes?|hours?|days?|weeks?|months?|years?|"
    r"degrees?|(?:centi|milli|kilo)?(?:met(?:er|re)s?|grams?)|lit(?:er|re)s?|inch(?:es)?|feet|foot|yards?|miles?|"
    r"people|units?|mm|cm|km|mg|kg|m[lL]|ft|oz|lb)(?:(?: per |/)[a-z]+|\^[23])?"
)
_PLAIN_NUMBER = re.compile(
    r"((?:[-+]?\s*(?:\\\$)?|\\\$\s*[-+])\s*)"  # a sign and a currency
    r"(?:(?:(\d+)\s+)?([1-9]\d*)/([1-9]\d*)"
    r"|(\d{1,3}(?: \d{3})+(?:\.\d+)?)"
    rf"|({_NUMBER}(?=[eE](?:\d|[-+]\d\d))|\d+\.\d+(?=[eE]))[eE]([-+]?\d+)"  # `2e-1` may be 2 times e, minus 1
    rf"|({_NUMBER}))"
    rf"(?:(\s*\\?%|\s+(?i:per ?cent))|\s+({_UNIT}))?"
)

_BOX = re.compile(r"\\(?:boxed|fbox)\s*")
_DOLLAR = re.compile(r"(?<!\\)\$")
_IN_DELIMITERS = re.compile(r"(?<!\\)\$[^$]*[^$\s][^$]*(?<!\\)\$|\\\(.*\S.*\\\)|\\\[.*\S.*\\\]", re.DOTALL)


def _is_derivation(text: Any) -> bool:
    """Whether a text is several words without a mark of the final answer."""
    if not isinstance(text, str) or _has_box(text) or "####" in text or _IN_DELIMITERS.search(text):
        return False
    return len(re.findall(r"[^\W\d_]{2,}", text)) > _WORDS


_WORDS = 5  # our choice: `The answer is 7` has three


def _has_box(text: Any) -> bool:
    return isinstance(text, str) and _BOX.search(text) is not None


def _last_box(text: str) -> str | None:
    r"""The content of the last `\boxed{...}`, on one line; empty if the box is not closed, None if there is no box."""
    boxes = list(_BOX.finditer(text))
    if not boxes:
        return None
    rest = text[boxes[-1].end() :]
    if not rest.startswith("{"):  # `\boxed 5$`
        return " ".join(rest.partition("$")[0].split())
    depth, position = 0, 0
    while position < len(rest):
        character = rest[position]
        depth += (character == "{") - (character == "}")
        if depth == 0:
            return " ".join(rest[1:position].split())
        position += 2 if character == "\\" else 1  # `\{` and `\}` are no braces
    return ""


def _decoded(truth: Any) -> Any:
    """Decodes a string that contains a dictionary or a list of strings as JSON. Returns other values unchanged."""
    if not isinstance(truth, str) or not truth.strip().startswith(("{", "[")):
        return truth
    try:
        decoded = json.loads(truth)
    except json.JSONDecodeError:
        return truth
    if isinstance(decoded, dict) or (isinstance(decoded, list) and all(isinstance(each, str) for each in decoded)):
        return decoded
    return truth


def _nested_answers(truth: dict[str, Any]) -> list[str]:
    names = [name for name in ("target", "answer", "solution") if name in truth]
    if truth and not names:
        raise ValueError(f"A ground truth has {sorted(truth)}. Accepted are `target`, `answer`, `solution`.")
    if _has_box(truth.get("solution")):
        names.insert(0, "solution")
    return next(filter(None, (accepted_answers(truth[name]) for name in names)), [])
