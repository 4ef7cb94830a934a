"""
The task: reach a target from a few small numbers, each used once, and try again where an attempt misses.

A problem and a right completion of it, word by word:

    2 3 4 7 =25 :      3 +4 =7 *7 =49 ; 7 *3 =21 +4 =25 ...

Each attempt is a chain, worked from left to right: a number, then an operation and its result for each of the others.
`;` begins another attempt. Only the last one counts. Results stay between 0 and `MAX_RESULT`.

Which number and which operation comes next is a choice, and most choices miss; what a step results in, and which
numbers are left, is not. The demonstrations make both kinds of tokens: their attempts are picked at random, most are
given up after a miss, and some are miscalculated.
"""

import functools
import itertools
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass


MAX_RESULT = 99
RETRY = ";"


@dataclass(frozen=True)
class Problem:
    """Numbers in ascending order, and what is to be made of them."""

    numbers: tuple[int, ...]
    target: int

    @property
    def prompt(self) -> str:
        return f"{' '.join(map(str, self.numbers))} ={self.target} :"


def vocabulary(largest: int) -> list[str]:
    """Every word of the task for numbers from 1 to `largest`."""
    numbers = range(1, largest + 1)
    operations = [f"{sign}{number}" for sign in "+-*" for number in numbers]
    return [*map(str, numbers), *operations, *(f"={result}" for result in range(MAX_RESULT + 1)), ":", RETRY]


def apply(sign: str, value: int, number: int) -> int:
    return {"+": value + number, "-": value - number, "*": value * number}[sign]


@functools.cache
def chains(numbers: tuple[int, ...]) -> list[tuple[str, int]]:
    """Every attempt that uses each of the numbers once and stays in the range, with its result."""
    found = []
    for first, *rest in sorted(set(itertools.permutations(numbers))):
        partial = [(str(first), first)]
        for number in rest:
            steps = [(text, sign, apply(sign, value, number)) for text, value in partial for sign in "+-*"]
            partial = [
                (f"{text} {sign}{number} ={value}", value) for text, sign, value in steps if 0 <= value <= MAX_RESULT
            ]
        found += partial
    return found


def is_right(completion: str, numbers: Sequence[int], target: int) -> bool:
    """Whether the last attempt uses each number once, calculates right at every step, and arrives at the target."""
    first, *steps = completion.split(RETRY)[-1].split() or [""]
    used = [first]
    value = int(first) if first.isdecimal() else None
    # Ends without its result, or without a step where there are numbers left: the numbers do not match.
    for operation, result in itertools.zip_longest(steps[::2], steps[1::2], fillvalue=""):
        sign, number = operation[:1], operation[1:]
        if value is None or sign not in ("+", "-", "*") or not number.isdecimal():
            return False
        used.append(number)
        value = apply(sign, value, int(number))
        if not 0 <= value <= MAX_RESULT or result != f"={value}":
            return False
    return value == target and sorted(used) == sorted(map(str, numbers))


def problems(count: int, largest: int) -> list[Problem]:
    """Every problem of `count` numbers from 1 to `largest`, shuffled, always in the same order."""
    found = [
        Problem(numbers, target)
        for numbers in itertools.combinations_with_replacement(range(1, largest + 1), count)
        for target in sorted({result for _, result in chains(numbers)})
    ]
    random.Random(0).shuffle(found)
    return found


def demonstrations(
    training: Sequence[Problem],
    rng: random.Random,
    *,
    attempts: int,
    aimed: float,
    give_up: float,
    miscalculated: float,
) -> Iterator[tuple[Problem, str]]:
    """
    Endless problems with completions of mixed quality.

    Args:
        attempts: The most of a completion.
        aimed: Share of the attempts picked among those that hit the target. The others are picked among all.
        give_up: Chance to end after an attempt that misses.
        miscalculated: Chance that a step shows a result that is one off.
    """
    while True:
        problem = rng.choice(training)
        every = chains(problem.numbers)
        hits = [text for text, result in every if result == problem.target]
        tried = []
        while len(tried) < attempts:
            text = rng.choice(hits) if rng.random() < aimed else rng.choice(every)[0]
            tried.append(_miscalculate(text, rng, miscalculated))
            if text.endswith(f" ={problem.target}") or rng.random() < give_up:
                break
        yield problem, f" {RETRY} ".join(tried)


def _miscalculate(text: str, rng: random.Random, rate: float) -> str:
    words = text.split()
    for position, word in enumerate(words):
        if word.startswith("=") and rng.random() < rate:
            words[position] = f"={min(MAX_RESULT, max(0, int(word[1:]) + rng.choice((-1, 1))))}"
    return " ".join(words)
