"""
Problems of arithmetic that a small model can almost solve, always the same ones: `python problems.py DIRECTORY`

Writes `train.jsonl`, `test.jsonl` (held out, of the same kinds), `other.jsonl` (larger numbers, which are not trained
on) and `worked_examples.jsonl`. No problem is in two of the files; sums with their terms exchanged are one problem.
"""

import argparse
import json
import random
from pathlib import Path
from typing import Any


WORKED_EXAMPLES = {
    "sums": [(34, 25), (58, 17), (46, 82)],
    "differences": [(67, 24), (91, 36), (85, 52)],
}
NUMBER_OF_EXAMPLES = 3
SIGNS = {"sums": "+", "differences": "-"}

Terms = tuple[str, int, int]  # kind, first and second term


def question(terms: Terms) -> str:
    kind, first, second = terms
    return f"What is {first} {SIGNS[kind]} {second}?"


def result(terms: Terms) -> int:
    kind, first, second = terms
    return first + second if kind == "sums" else first - second


def box(terms: Terms) -> str:
    return f"\\boxed{{{result(terms)}}}"


def row(terms: Terms) -> dict[str, Any]:
    return {"question": question(terms), "answer": box(terms)}


def worked_example(terms: Terms) -> dict[str, Any]:
    calculation = question(terms).removeprefix("What is ").removesuffix("?")
    return {"question": question(terms), "answer": f"{calculation} = {result(terms)}. The answer is {box(terms)}."}


def problems(kind: str, first_terms: range = range(10, 100), second_terms: range = range(10, 100)) -> list[Terms]:
    """All problems of a kind with a positive result, in random order, without the worked examples."""
    rng = random.Random(kind)
    every = {frozenset((a, b)): (a, b) for a in first_terms for b in second_terms if a > b}
    if kind == "sums":  # in either order
        every = {terms: tuple(rng.sample(pair, 2)) for terms, pair in every.items()}
    shown = [frozenset(pair) for pair in WORKED_EXAMPLES[kind]]
    chosen = [(kind, *pair) for terms, pair in every.items() if terms not in shown]
    return rng.sample(chosen, len(chosen))


def write(directory: Path, kinds: list[str], held_out: int, other: int | None = None) -> None:
    """
    Writes the files.

    Args:
        directory (`Path`): Where to.
        kinds (`list[str]`): `"sums"`, `"differences"`, or both: as many of each.
        held_out (`int`): Problems in `test.jsonl`.
        other (`int`, *optional*): Problems in `other.jsonl`; by default as many.
    """
    rng = random.Random(0)
    each = held_out // len(kinds)
    each_other = each if other is None else other // len(kinds)
    of_kind = [problems(kind) for kind in kinds]
    larger = [problems(kind, first_terms=range(100, 200)) for kind in kinds]
    examples = [(kind, *WORKED_EXAMPLES[kind][index]) for index in range(NUMBER_OF_EXAMPLES) for kind in kinds]
    files = {
        "train": [terms for every in of_kind for terms in every[each:]],
        "test": [terms for every in of_kind for terms in every[:each]],
        "other": [terms for every in larger for terms in every[:each_other]],
    }
    rows = {name: [row(terms) for terms in rng.sample(chosen, len(chosen))] for name, chosen in files.items()}
    rows["worked_examples"] = [worked_example(terms) for terms in examples[:NUMBER_OF_EXAMPLES]]
    directory.mkdir(parents=True, exist_ok=True)
    for name, chosen in rows.items():
        text = "".join(json.dumps(each) + "\n" for each in chosen)
        (directory / f"{name}.jsonl").write_text(text, encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("directory", metavar="DIRECTORY", type=Path, help="where the files are written")
    arguments = parser.parse_args()
    try:
        write(arguments.directory, list(SIGNS), held_out=96)
    except OSError as error:
        parser.error(f"The files cannot be written into '{arguments.directory}': {error}. Choose another directory.")


if __name__ == "__main__":
    main()
