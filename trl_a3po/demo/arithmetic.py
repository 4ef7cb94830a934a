"""The task of the demo: add three two-digit numbers step by step, without forgetting to carry.

A worked solution of `47+85+96=?` is

    47+85=132
    132+96=228
    \\boxed{228}

The start model learns from demonstrations that drop carries at random (`47+85=122`, `47+85=32`, ...). So it mixes a
right and a wrong way of adding. Reinforcement learning can then reinforce the right one.
"""

import random
from collections.abc import Callable, Iterator
from itertools import combinations_with_replacement
from typing import Any, Literal


Problem = tuple[int, int, int]

CARRY_DROP_RATE = 0.6
NUM_TEST_PROBLEMS = 4096


def problems(split: Literal["train", "test"]) -> list[Problem]:
    """Returns the problems of a split, always the same in the same order.

    The splits share no problem, in any order of the terms: each multiset of terms is drawn once.
    """
    rng = random.Random(0)
    multisets = list(combinations_with_replacement(range(10, 100), 3))
    rng.shuffle(multisets)
    chosen = multisets[:NUM_TEST_PROBLEMS] if split == "test" else multisets[NUM_TEST_PROBLEMS:]
    return [(terms[0], terms[1], terms[2]) for terms in (rng.sample(multiset, 3) for multiset in chosen)]


def row(problem: Problem) -> dict[str, Any]:
    """Returns a conversational row: the problem as prompt, and the solution for `trl.rewards.accuracy_reward`."""
    return {"prompt": [{"role": "user", "content": question(problem)}], "solution": f"${sum(problem)}$"}


def question(problem: Problem) -> str:
    return "+".join(map(str, problem)) + "=?"


def worked_solution(problem: Problem, forgets_carry: Callable[[], bool] = lambda: False) -> str:
    """Returns the solution, one addition per line. `forgets_carry` decides for every carry whether to drop it."""
    first, second, third = problem
    subtotal = add_by_columns(first, second, forgets_carry)
    total = add_by_columns(subtotal, third, forgets_carry)
    return f"{first}+{second}={subtotal}\n{subtotal}+{third}={total}\n\\boxed{{{total}}}"


def add_by_columns(a: int, b: int, forgets_carry: Callable[[], bool]) -> int:
    total, carry, place = 0, 0, 1
    while a or b or carry:
        column = a % 10 + b % 10 + carry
        total += column % 10 * place
        carry = int(column >= 10 and not forgets_carry())
        a, b, place = a // 10, b // 10, place * 10
    return total


def demonstrations(rng: random.Random, carry_drop_rate: float = CARRY_DROP_RATE) -> Iterator[tuple[str, str]]:
    """Yields endless (question, worked solution) pairs of training problems. Carries are dropped at the given rate."""
    training_problems = problems("train")
    while True:
        problem = rng.choice(training_problems)
        yield question(problem), worked_solution(problem, lambda: rng.random() < carry_drop_rate)
