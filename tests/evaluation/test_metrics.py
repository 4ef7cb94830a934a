"""The metrics against their definitions, and intervals against how often they hold the truth."""

import itertools
import runpy
import sys

import numpy as np
import pytest
import trl.rewards

from trl_a3po.evaluation import metrics
from trl_a3po.evaluation.metrics import Solved, estimate, majority_is_correct, pass_at_k, per_problem
from trl_a3po.evaluation.runs import score


@pytest.mark.parametrize("samples", [1, 2, 5, 8])
def test_pass_at_k_is_the_share_of_subsets_with_a_correct_one(samples):
    for correct, k in itertools.product(range(samples + 1), range(1, samples + 1)):
        subsets = list(itertools.combinations([1] * correct + [0] * (samples - correct), k))
        assert pass_at_k(correct, samples, k) == pytest.approx(sum(map(any, subsets)) / len(subsets))


def test_too_few_samples_for_a_k_are_an_error():
    with pytest.raises(ValueError, match="pass@8 needs at least 8 samples of each problem, but there are 4"):
        pass_at_k(1, 4, 8)


INTERVAL = "$(2,\\infty)$"


@pytest.mark.parametrize(
    ("answers", "solution", "expected"),
    [
        (["\\boxed{2}", "\\boxed{3}", "\\boxed{2}"], "$2$", 1),
        (["\\boxed{2}", "\\boxed{3}", "\\boxed{2}"], "$3$", 0),
        (
            ["\\boxed{3}", "\\boxed{0.5}", "The answer is $\\frac{1}{2}$.", "\\boxed{3}", "\\boxed{\\frac{2}{4}}"],
            "$0.5$",
            1,
        ),
        (["none", "\\boxed{2}", "none"], "$2$", 1),  # no vote
        (["\\boxed{2}", "\\boxed{3}"], "$2$", 1),  # as many votes
        (["\\boxed{2}", "\\boxed{3}"], "$3$", 0),
        (["none", ""], "$2$", 0),
        (["\\boxed{" * 2000, "\\boxed{2}"], "$2$", 1),
        (["\ud800\x00\\boxed{\ud800}", "\\boxed{2}", "\\boxed{2}"], "$2$", 1),
        # The reward does not read the first.
        (["I get $2$.", "It is \\boxed{2}", "\\boxed{2}", "\\boxed{3}"], "$2$", 1),
        (["I get $2$.", "I get $2$.", "\\boxed{3}"], "$3$", 1),
        # Equal in one order only, so the reward does not accept the first.
        (["\\boxed{x>2}", "\\boxed{(2,\\infty)}", "\\boxed{(2,\\infty)}"], INTERVAL, 1),
        (["\\boxed{(2,\\infty)}", "\\boxed{3}", "\\boxed{3}", "\\boxed{x>2}", "\\boxed{(2,\\infty)}"], INTERVAL, 1),
        (["\\boxed{x>2}", "\\boxed{x>2}", "\\boxed{(2,\\infty)}"], INTERVAL, 0),
    ],
)
def test_the_majority(answers, solution, expected):
    assert majority_is_correct(answers, score(answers, solution)) == expected


def test_what_has_a_vote_is_what_the_reward_reads():
    texts = [
        "I get $2$.",
        "\\boxed{2}",
        "The answer is $2$.",
        "the final answer is $\\frac{1}{2}$. I hope",
        "2",
        "$5 m$",
    ]
    texts += ["\\boxed{5 m}", "$1$ and \\boxed{x>2}", "\\boxed{\\frac{1}{", "\\boxed{}", "", "The answer is 3."]
    seen = {}
    trl.rewards.accuracy_reward(
        [[{"role": "assistant", "content": text}] for text in texts], ["$2$"] * len(texts), log_extra=seen.__setitem__
    )
    if not seen:
        pytest.skip("this release of TRL does not tell what it reads")
    assert [str(metrics._answer(text) or "[unparseable]") for text in texts] == seen["answer_parsed"]


def test_math_verify_is_needed_only_for_answers(monkeypatch):
    monkeypatch.setitem(sys.modules, "math_verify", None)  # as where it is not installed
    without = runpy.run_path(metrics.__file__)
    with pytest.raises(ValueError, match=r"Install it: pip install 'trl\[math-verify\]'"):
        without["check_math_verify"]()


def solved(answers, correct):
    return Solved([f"So {answer}." for answer in answers], correct, answers)


def test_metrics_of_problems():
    problems = [
        solved(["\\boxed{1}"] * 4, [1.0] * 4),
        solved(["\\boxed{1}", "\\boxed{2}", "\\boxed{2}", "\\boxed{2}"], [1.0, 0.0, 0.0, 0.0]),
    ]
    found = metrics.metrics(problems)
    means = {name: value.mean for name, value in found.items()}
    assert means == {"avg@4": 0.625, "pass@1": 0.625, "pass@2": 0.75, "pass@4": 1.0, "maj@4": 0.5}
    assert all(value.low <= value.mean <= value.high for value in found.values())


def test_k_goes_up_to_the_fewest_samples_of_a_problem():
    problems = [solved(["\\boxed{1}"] * 6, [0.0] * 5 + [1.0]), solved(["\\boxed{1}"] * 3, [1.0, 0.0, 0.0])]
    values = per_problem(problems)
    assert list(values) == ["avg@3", "pass@1", "pass@2", "pass@3", "maj@3"]
    assert values["avg@3"] == pytest.approx([1 / 6, 1 / 3])
    assert values["pass@3"] == pytest.approx([1 / 2, 1])  # of 20 subsets of 6, 10 have the last


def test_intervals_are_those_of_the_normal_approximation_where_it_holds():
    generator = np.random.default_rng(1)
    values = generator.normal(0.3, 1.0, 2000)
    found = estimate(values)
    error = 1.96 * values.std() / np.sqrt(len(values))
    assert (found.low, found.high) == pytest.approx((values.mean() - error, values.mean() + error), abs=0.1 * error)
    same = estimate([0.5] * 10)
    assert (same.low, same.high) == (0.5, 0.5)
    assert estimate([0.5]).low is estimate([0.5]).high is None
    assert str(estimate([0.5])) == "0.500 [no interval]"


def test_nineteen_of_twenty_intervals_hold_the_truth(monkeypatch):
    """Of avg@4 over problems whose difficulty is drawn: also the sampling of completions is in the interval."""
    monkeypatch.setattr(metrics, "RESAMPLES", 400)
    generator = np.random.default_rng(5)
    hits = 0
    for _ in range(600):
        difficulty = generator.beta(0.6, 0.9, size=60)
        found = estimate(generator.binomial(4, difficulty) / 4)
        hits += found.low <= 0.4 <= found.high
    assert 0.92 < hits / 600 < 0.975


def test_share_above_zero():
    assert metrics.share_above_zero([0.0] * 5) == 0.5
    assert metrics.share_above_zero([0.1] * 5) == 1.0
    assert metrics.share_above_zero([-0.1] * 5) == 0.0
