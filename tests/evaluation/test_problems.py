"""Published datasets become prompts and solutions that the reward can read."""

import pytest
from datasets import Dataset
from trl.rewards import accuracy_reward

from trl_a3po.evaluation.problems import final_answer, load_problems, split_off_last, to_prompt_and_solution


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        ("She has 48/2 = <<48/2=24>>24 clips.\n#### 1,024", "$1,024$"),
        ("#### -3", "$-3$"),
        ("\\frac{1}{2}", "$\\frac{1}{2}$"),
        ("$\\pi$", "$\\pi$"),
        ("First \\boxed{1}, then $x=\\boxed{\\frac{3}{4}}$.", "\\boxed{\\frac{3}{4}}$."),
        (204, "$204$"),
    ],
)
def test_final_answer(answer, expected):
    assert final_answer(answer) == expected


@pytest.mark.parametrize(
    ("answer", "completion"),
    [
        ("#### 1,024", "1024"),
        ("#### -3", "-3"),
        ("\\frac{1}{2}", "0.5"),
        ("so $x=\\boxed{\\frac{3}{4}}$.", "\\frac{3}{4}"),
        (204, "204"),
    ],
)
def test_final_answers_are_what_accuracy_reward_parses(answer, completion):
    assert accuracy_reward([[{"content": f"\\boxed{{{completion}}}"}]], [final_answer(answer)]) == [1.0]
    assert accuracy_reward([[{"content": "\\boxed{7}"}]], [final_answer(answer)]) == [0.0]


@pytest.mark.parametrize(
    ("row", "content", "solution"),
    [
        ({"question": "1+1?", "answer": "One and one.\n#### 2"}, "1+1?", "$2$"),
        ({"problem": "1+1?", "answer": "2"}, "1+1?", "$2$"),
        ({"problem": "1+1?", "solution": "It is $\\boxed{2}$"}, "1+1?", "\\boxed{2}$"),
        ({"problem": "1+1?", "solution": "Count to two.", "answer": "2"}, "1+1?", "$2$"),
        ({"prompt": "1+1?", "solution": "$2$", "level": 1}, "1+1?", "$2$"),
        ({"prompt": [{"role": "user", "content": "1+1?"}], "solution": "2"}, "1+1?", "$2$"),
        ({"prompt": [{"role": "user", "content": "1+1?"}], "reward_model": {"ground_truth": "2"}}, "1+1?", "$2$"),
        ({"prompt": "1+1?", "reward_model": {"ground_truth": {"question": "1+1?", "target": "2"}}}, "1+1?", "$2$"),
        (
            {"prompt": "1+1?", "reward_model": {"ground_truth": {"solution": "So $\\boxed{2}$"}}, "solution": "?"},
            "1+1?",
            "\\boxed{2}$",
        ),
    ],
)
def test_columns_are_mapped(row, content, solution):
    mapped = to_prompt_and_solution(Dataset.from_list([row]))
    assert list(mapped) == [{"prompt": [{"role": "user", "content": content}], "solution": solution}]


def test_other_columns_are_refused():
    with pytest.raises(ValueError, match=r"\['text', 'label'\].*`prompt` with `solution`.*`question`"):
        to_prompt_and_solution(Dataset.from_list([{"text": "1+1?", "label": "2"}]))
    with pytest.raises(ValueError, match=r"`reward_model.ground_truth` has \['style'\]\. Accepted are `target`"):
        to_prompt_and_solution(Dataset.from_list([{"prompt": "1+1?", "reward_model": {"ground_truth": {"style": 1}}}]))


def test_an_instruction_follows_the_problem():
    conversation = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "1+1?"}]
    dataset = Dataset.from_list([{"prompt": conversation, "solution": "2"}])
    (row,) = to_prompt_and_solution(dataset, "Box it.")
    assert row["prompt"] == [conversation[0], {"role": "user", "content": "1+1?\nBox it."}]


@pytest.mark.parametrize("extension", ["jsonl", "json", "parquet"])
def test_local_files_are_read(tmp_path, extension):
    dataset = Dataset.from_list([{"question": "1+1?", "answer": "#### 2"}] * 3)
    path = tmp_path / f"problems.{extension}"
    write = {"jsonl": dataset.to_json, "json": dataset.to_json, "parquet": dataset.to_parquet}
    write[extension](path)
    assert load_problems(str(path), "train")["solution"] == ["$2$"] * 3


def test_the_last_rows_are_held_out():
    dataset = Dataset.from_list([{"solution": str(index)} for index in range(5)])
    train, held_out = split_off_last(dataset, 2)
    assert (list(train["solution"]), list(held_out["solution"])) == (["0", "1", "2"], ["3", "4"])
    with pytest.raises(ValueError, match="5 of 5 rows"):
        split_off_last(dataset, 5)
