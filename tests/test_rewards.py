"""The rewards that take several accepted answers: TRL's own, asked once for each answer."""

import pickle
import re

import numpy as np
import pytest
import trl.rewards

from trl_a3po import rewards


def say(*texts):
    return [[{"role": "assistant", "content": text}] for text in texts]


HALF = ["$1/2$", "$\\frac{50}{7}$"]


def test_any_accepted_answer_counts():
    completions = say("\\boxed{0.5}", "\\boxed{\\frac{50}{7}}", "\\boxed{3}", "nothing")
    assert rewards.accuracy_reward(completions, [HALF] * 4) == [1.0, 1.0, 0.0, 0.0]


def test_a_single_answer_is_scored_as_by_trl():
    completions = say("\\boxed{0.5}", "\\boxed{3}", "\\boxed{3}", "3")
    solution = ["$1/2$", "$4$", "", "$3$"]
    expected = trl.rewards.accuracy_reward(completions, solution)
    assert expected == [1.0, 0.0, None, 0.0]
    assert rewards.accuracy_reward(completions, solution) == expected
    assert rewards.accuracy_reward(completions, [[each] for each in solution]) == expected


def test_answers_that_cannot_be_parsed_do_not_hide_others():
    completions = say("\\boxed{3}", "\\boxed{4}", "\\boxed{4}", "\\boxed{4}")
    assert rewards.accuracy_reward(completions, [["", "$3$"], ["$3$", ""], ["", ""], []]) == [1.0, 0.0, None, None]


def test_answers_that_are_no_texts():
    completions = say("\\boxed{3}", "\\boxed{4}", "\\boxed{3}", "\\boxed{3}")
    assert rewards.accuracy_reward(completions, [3, 3, None, [None, 3.0]]) == [1.0, 0.0, None, 1.0]
    assert rewards.accuracy_reward(say("\\boxed{3}"), [np.array(["$4$", "$3$"])]) == [1.0]


def test_reasoning_is_cut_off():
    completions = say("\\boxed{1}</think>\\boxed{0.5}", "\\boxed{0.5}</think>\\boxed{1}", "\\boxed{0.5}")
    assert rewards.reasoning_accuracy_reward(completions, [HALF] * 3) == [1.0, 0.0, 0.0]
    completions = say("\\boxed{1}END\\boxed{0.5}")
    assert rewards.reasoning_accuracy_reward(completions, [HALF], reasoning_delimiters=["END"]) == [1.0]


def test_the_table_of_completions_has_a_row_for_each_completion():
    columns = {}
    completions = say("\\boxed{\\frac{50}{7}}", "\\boxed{3}")
    rewards.accuracy_reward(completions, [HALF] * 2, log_extra=columns.__setitem__, prompts=["?"] * 2)
    of_trl = {}
    trl.rewards.accuracy_reward(completions, [HALF[0]] * 2, log_extra=of_trl.__setitem__)
    assert columns.keys() == of_trl.keys()
    if not of_trl:
        pytest.skip("this TRL has no such columns")
    assert columns["solution"] == [HALF[1], HALF[0]]
    assert [re.sub(r".*\[(.*?),.*", r"\1", text) for text in columns["gold_parsed"]] == ["50/7", "1/2"]


@pytest.mark.parametrize("name", ["accuracy_reward", "reasoning_accuracy_reward"])
def test_they_are_named_as_trl_names_them_and_can_be_pickled(name):
    reward = getattr(rewards, name)
    assert reward.__name__ == getattr(trl.rewards, name).__name__
    assert pickle.loads(pickle.dumps(reward)) is reward
