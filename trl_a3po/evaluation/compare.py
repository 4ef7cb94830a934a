"""Compares evaluations on the same problems: how much better one model is than another, and how certain that is."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .files import RESULTS_FILE, SAMPLES_FILE, hash_of_file, read_object, records_of
from .metrics import ROUNDING, Estimate, Solved, check_math_verify, estimate, per_problem, share_above_zero
from .runs import differing, distinct_problems, estimates


@dataclass(frozen=True)
class Result:
    """
    A complete evaluation, as read from its directory.

    Args:
        name (`str`): Its name in a comparison.
        results (`dict`): Its `results.json`.
        problems (`dict[str, Solved]`): The samples of each problem with a parseable solution, by its fingerprint.
        texts (`dict[str, Problem]`): The prompt and the solutions of each problem, by its fingerprint.
    """

    name: str
    results: dict[str, Any]
    problems: dict[str, Solved]
    texts: dict[str, "Problem"]

    @property
    def estimates(self) -> dict[str, Estimate]:
        return estimates(self.results)


@dataclass(frozen=True)
class Problem:
    """The last message of a prompt, and the solutions in its rows."""

    prompt: str
    solutions: frozenset[str]


@dataclass(frozen=True)
class Difference:
    """The mean of paired differences with its interval, and the share of resamples in which it is above 0."""

    estimate: Estimate
    share_above_zero: float

    @property
    def verdict(self) -> str:
        low, high = self.estimate.low, self.estimate.high
        if low is None or high is None:
            return "one problem says nothing"
        return "better" if low > ROUNDING else "worse" if high < -ROUNDING else "not told apart"


@dataclass(frozen=True)
class Pair:
    """
    One evaluation against another, on the problems that both have.

    Args:
        first (`Result`): The baseline.
        second (`Result`): The other evaluation. A difference is `second` minus `first`.
        shared (`list[str]`): The problems that both have, with the same solutions.
        samples (`int`): The least number of samples that either has of a shared problem.
        differences (`dict[str, Difference]`): By metric, for those that both have enough samples for.
        notes (`list[str]`): Remarks that a reader of the differences needs.
    """

    first: Result
    second: Result
    shared: list[str]
    samples: int
    differences: dict[str, Difference]
    notes: list[str]

    def solved_only_by(self, result: Result) -> list[str]:
        """
        Problems for which this evaluation has a correct sample and the other has none, among the first [`samples`] of
        both: with more samples, the same model solves more problems.
        """
        other = self.first if result is self.second else self.second
        return [each for each in self.shared if self._is_solved(result, each) and not self._is_solved(other, each)]

    def _is_solved(self, result: Result, problem: str) -> bool:
        return any(result.problems[problem].correct[: self.samples])

    @property
    def solved_only(self) -> str:
        """One sentence on [`solved_only_by`]."""
        only = [f"{len(self.solved_only_by(result))} only by {result.name}" for result in (self.first, self.second)]
        return f"With at least one correct among the first {self.samples} samples: {', '.join(only)}."

    def by_difference(self) -> list[str]:
        """The problems whose share of correct samples differs, the largest differences first."""

        def difference(problem: str) -> float:
            first, second = (_share(each.problems[problem]) for each in (self.first, self.second))
            return second - first

        return sorted((each for each in self.shared if difference(each)), key=lambda each: -abs(difference(each)))


def _share(problem: Solved) -> float:
    return sum(problem.correct) / len(problem.correct)


def read_result(directory: Path, name: str) -> Result:
    """
    Reads an evaluation.

    Raises:
        `ValueError`: the evaluation is not complete or damaged, or the directory has none.
    """
    if not directory.is_dir():
        raise ValueError(f"There is no directory '{directory}'. Pass the `output_dir` of `trl-a3po eval`.")
    samples, results_file = directory / SAMPLES_FILE, directory / RESULTS_FILE
    fix = "Delete it and run `trl-a3po eval` again."
    try:
        results = read_object(results_file, "metrics", "settings", "versions", fix=fix)
        samples_hash = hash_of_file(samples)
    except FileNotFoundError as error:
        raise ValueError(
            f"'{directory}' contains no complete evaluation: {Path(error.filename).name} is missing. Run or resume it "
            "with `trl-a3po eval`."
        ) from error
    if results.get("samples_sha256") != samples_hash:
        raise ValueError(
            f"'{samples}' is not the file that '{results_file}' was computed from. Run the evaluation again with "
            "another `output_dir`."
        )
    try:
        _table_of_results([Result(name, results, {}, {})])
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"'{results_file}' is damaged: its metrics are not those of an evaluation. {fix}") from error
    records = records_of(samples.read_bytes(), samples)
    solutions: dict[str, set[str]] = {}
    for record in records:
        solution = record["solution"]
        # One answer is a list where another problem of the dataset has several.
        if isinstance(solution, list) and len(solution) == 1:
            (solution,) = solution
        solutions.setdefault(record["problem"], set()).add(_text(solution))
    texts = {
        record["problem"]: Problem(_text(record["prompt"][-1]["content"]), frozenset(solutions[record["problem"]]))
        for record in records
    }
    return Result(name, results, distinct_problems(records), texts)


def _text(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)


def compare(first: Result, second: Result) -> Pair:
    """
    Computes the paired differences, `second` minus `first`.

    Raises:
        `ValueError`: they share no problem, or math-verify is not installed.
    """
    check_math_verify()
    common = [problem for problem in first.problems if problem in second.problems]
    shared = [each for each in common if first.texts[each].solutions == second.texts[each].solutions]
    if not shared:
        raise ValueError(
            f"'{first.name}' and '{second.name}' share no problem with the same solution. Two problems are the "
            "same if their whole prompts are equal, including worked examples and instruction."
        )
    sides = [[result.problems[problem] for problem in shared] for result in (first, second)]
    numbers = [min(len(problem.correct) for problem in side) for side in sides]
    values = [per_problem(side, min(numbers)) for side in sides]
    differences = {}
    for name in values[0]:
        paired = [after - before for before, after in zip(values[0][name], values[1][name], strict=True)]
        differences[name] = Difference(estimate(paired), share_above_zero(paired))
    notes = _notes(first, second, len(common), len(shared), numbers)
    return Pair(first, second, shared, min(numbers), differences, notes)


def _notes(first: Result, second: Result, common: int, shared: int, numbers: list[int]) -> list[str]:
    notes = []
    for result in (first, second):
        if others := len(result.problems) - common:
            notes.append(f"Only in {result.name}, and not compared: {others} of its problems.")
    if common > shared:
        notes.append(f"With different solutions in both, and not compared: {common - shared} of the problems.")
    if numbers[0] != numbers[1]:
        notes.append(
            f"{first.name} has {numbers[0]} samples of each problem, {second.name} has {numbers[1]}. k is at most "
            f"{min(numbers)}; avg@k is the mean over all samples."
        )
    before, after = first.results["settings"], second.results["settings"]
    changed = differing(before, after)
    notes += [f"{name} differs: {before.get(name)!r} and {after.get(name)!r}." for name in changed]
    before, after = first.results["versions"], second.results["versions"]
    # The version of an engine that only one evaluation used is not news: the engines are among the settings.
    both = [name for name in before if name in after]
    changed = [f"{name} {before[name]} and {after[name]}" for name in both if before[name] != after[name]]
    if changed:
        notes.append(f"Versions differ: {', '.join(changed)}.")
    return notes


def markdown(results: Sequence[Result], pairs: Sequence[Pair]) -> str:
    """The whole comparison as text."""
    lines = ["Mean and 95 % interval over problems", "", *_table_of_results(results)]
    for pair in pairs:
        lines += [
            "",
            f"{pair.second.name} minus {pair.first.name}, {len(pair.shared)} problems, paired",
            "",
            "| metric | difference | above 0 | |",
            "| --- | --- | --- | --- |",
        ]
        lines += [
            f"| {name} | {each.estimate.signed} | {each.share_above_zero:.1%} | {each.verdict} |"
            for name, each in pair.differences.items()
        ]
        lines += ["", pair.solved_only, *pair.notes]
    if len(pairs) > 1:
        lines += ["", f"The intervals are not corrected for making {len(pairs)} comparisons."]
    return "\n".join(lines)


def _table_of_results(results: Sequence[Result]) -> list[str]:
    names = list(dict.fromkeys(name for result in results for name in result.estimates))
    lines = [f"| | problems | {' | '.join(names)} |", f"| --- {'| --- ' * (len(names) + 1)}|"]
    for result in results:
        cells = [str(result.estimates.get(name, "")) for name in names]
        lines.append(f"| {result.name} | {result.results['problems']} | {' | '.join(cells)} |")
    return lines
