"""Published datasets become prompts and solutions that the reward can read."""

import datetime
import json
import logging
import os

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from datasets import ClassLabel, Dataset, DatasetDict, Features, IterableDataset, Value

from trl_a3po.evaluation.answers import accepted_answers, final_answer
from trl_a3po.evaluation.problems import (
    check_parseable,
    file_source,
    load_problems,
    split_off_last,
    to_prompt_and_solution,
    unparseable_rows,
)
from trl_a3po.evaluation.runs import first_problems
from trl_a3po.rewards import accuracy_reward


def score(answer, solution):
    """What a completion that ends in `\\boxed{answer}` is rewarded with."""
    return accuracy_reward([[{"role": "assistant", "content": f"So it is \\boxed{{{answer}}}."}]], [solution])[0]


# One answer


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        ("She has 48/2 = <<48/2=24>>24 clips.\n#### 1,024", "$1,024$"),
        ("#### -3", "$-3$"),
        ("\\frac{1}{2}", "$\\frac{1}{2}$"),
        ("$\\pi$", "$\\pi$"),
        ("First \\boxed{1}, then $x=\\boxed{\\frac{3}{4}}$.", "\\boxed{\\frac{3}{4}}"),
        ("\\boxed{\\{1, 2\\}}, not \\{3\\}", "\\boxed{\\{1, 2\\}}"),
        (
            "\\boxed{\\begin{pmatrix} 1 \\\\\n 2 \\\\\\end{pmatrix}} {}",
            "\\boxed{\\begin{pmatrix} 1 \\\\ 2 \\\\\\end{pmatrix}}",
        ),
        ("so $\\boxed 5$ it is", "\\boxed{5}"),
        ("so $\\fbox{5}$ it is", "\\boxed{5}"),
        (204, "$204$"),
        (204.0, "$204$"),
        (1e-05, "$0.00001$"),
        (np.int64(3), "$3$"),
        ("$18", "$\\$18$"),
        ("\\$18.50", "$\\$18.50$"),
        ("\\frac{1}{2}.", "$\\frac{1}{2}$"),
        ("\\[2\\]", "\\[2\\]"),
        ("\\(2\\)", "\\(2\\)"),
        (" 7 ", "$7$"),
        ("8 dollars", "$8\\text{ dollars}$"),
        ("1,200.50 US dollars.", "$1,200.50\\text{ US dollars}$"),
        ("12 cm^2", "$12\\text{ cm^2}$"),
        ("10 km/h", "$10\\text{ km/h}$"),
        ("5 percent", "$5\\%$"),
        ("-3 1/2", "$-3\\frac{1}{2}$"),
        ("1 000", "$1000$"),
        ("-12 345 678", "$-12345678$"),
        ("1e5", "$1\\cdot10^{5}$"),
        ("-2.5E+07", "$-2.5\\cdot10^{+07}$"),
        ("1e-05", "$1\\cdot10^{-05}$"),
        ("20 Per cent", "$20\\%$"),
        ("7 people", "$7\\text{ people}$"),
        ("30 miles per hour", "$30\\text{ miles per hour}$"),
        ("5 000 000 dollars", "$5000000\\text{ dollars}$"),
        ("- 3 1/2", "$- 3\\frac{1}{2}$"),
        ("1/2", "$1/2$"),
        ("$1 000$", "$1 000$"),
        ("1\u00a0000", "$1000$"),
        ("1\u202f000\u202f000,", "$1 000 000,$"),
    ],
)
def test_final_answer(answer, expected):
    assert final_answer(answer) == expected


@pytest.mark.parametrize(
    "answer",
    [
        *("2 L", "2 ab", "3 xyz", "3 pqr", "2 ABC", "2 pi", "2 theta", "2 sqrt x", "2e-1", "1 00", "1 2/x"),
        *("5 Million", "2 dozens", "3 tenths", "4 squared", "3 or 4", "3 and 5 eggs", "Paris"),
    ],
)
def test_products_lists_and_texts_stay_as_they_are(answer):
    assert final_answer(answer) == f"${answer}$"


@pytest.mark.parametrize(
    "answer",
    [
        *("48 m²", "48m²", "100 in²", "5cm²", "9.8 m/s²", "25 m s⁻¹", "12 kg·m²", "SO₄²⁻", "Ca²⁺", "½ hours", "10–20"),
        *("2–3 days", "Diels–Alder reaction", "−1,234", "-5", "e^-kt", "e^-2x"),
    ],
)
def test_words_units_and_ranges_stay_as_they_are(answer):
    assert final_answer(answer) == f"${answer}$"
    assert score(answer, [final_answer(answer)]) == 1.0


@pytest.mark.parametrize(
    "answer", ["She pays $5 for apples and $6 for pears, for a total of $11.", "$20 – $5 = $15", "$10-$20"]
)
def test_other_texts_with_several_dollar_signs_stay_as_they_are(answer):
    assert final_answer(answer) == answer


@pytest.mark.parametrize(
    ("answer", "right", "wrong"),
    [
        ("8 dollars", ["8", "\\$8", "8\\text{ dollars}", "8.0"], ["9", "9\\text{ dollars}", "80"]),
        ("12 cm^2", ["12", "12\\text{ cm}^2"], ["144", "2"]),
        ("24 square centimeters", ["24"], ["25"]),
        ("5 percent", ["5\\%", "0.05"], ["6\\%", "0.5"]),
        ("3 1/2", ["3.5", "\\frac{7}{2}", "3\\frac{1}{2}"], ["2", "3", "\\frac{3}{2}"]),
        ("-3 1/2", ["-3.5"], ["-2.5", "3.5"]),
        ("1 000", ["1000", "1,000"], ["0", "1"]),
        ("1e5", ["100000", "10^5"], ["5", "1"]),
        ("-2.5E+07", ["-25000000"], ["-2.5"]),
        ("1 000 dollars", ["1000"], ["0", "1"]),
        ("$1 000.50", ["1000.5"], ["0", "1"]),
        ("10 000%", ["10000\\%"], ["0", "10"]),
        ("$3 1/2", ["3.5"], ["2", "1.5"]),
        ("3 1/2 inches", ["3.5"], ["2"]),
        ("1/2 hours", ["0.5", "\\frac{1}{2}"], ["2"]),
        ("2 1/2%", ["2.5\\%", "0.025"], ["2", "2\\%", "2.5"]),
        ("1/2%", ["0.5\\%", "0.005"], ["50", "0.5"]),
        ("1e5 meters", ["100000"], ["5"]),
        ("1e3%", ["10"], ["1", "1000"]),
        # Characters at which math-verify stops.
        ("1.5e-3", ["0.0015"], ["1.5", "-3"]),
        ("10^-3", ["0.001", "10^{-3}"], ["10"]),
        ("10⁻³", ["0.001", "10^{-3}"], ["10"]),
        ("5 × 10^-3", ["0.005"], ["0.001", "5"]),
        ("5²", ["25"], ["5"]),
        ("2^-x", ["2^{-x}"], ["2"]),
        ("2√3", ["2\\sqrt{3}", "\\sqrt{12}"], ["2", "3"]),
        ("1+√(x+1)", ["1+\\sqrt{x+1}"], ["1"]),
        ("√1,000", ["\\sqrt{1000}"], ["1", "0"]),
        ("10^-6.5", ["10^{-6.5}"], ["5*10^{-7}", "10"]),
        ("∛9", ["\\sqrt[3]{9}"], ["3"]),
        ("2¾", ["2.75", "\\frac{11}{4}"], ["2", "1.5"]),
        ("½", ["0.5"], ["1"]),
        ("½x", ["\\frac{x}{2}"], ["\\frac{1}{2x}"]),
        ("1⁄2", ["0.5"], ["1"]),
        ("3·4", ["12"], ["3"]),
        ("–3", ["-3"], ["3"]),
        ("1 ± √2", ["1 \\pm \\sqrt{2}"], ["1"]),
        ("(−∞, 3]", ["(-\\infty, 3]"], ["3"]),
        ("(1,2) ∪ (3,4)", ["(1,2) \\cup (3,4)"], ["(1,2)"]),
        ("$5 and $6", ["5 and 6", "\\{5, 6\\}"], ["6", "5"]),
        ("$3.50/$2", ["1.75"], ["3.5"]),
    ],
)
def test_plain_answers_are_read_as_people_mean_them(answer, right, wrong):
    [solution] = accepted_answers(answer)
    assert [score(each, [solution]) for each in right] == [1.0] * len(right)
    assert [score(each, [solution]) for each in wrong] == [0.0] * len(wrong)


@pytest.mark.parametrize(
    "answer",
    [
        None,
        "",
        " \n",
        "$$",
        "$ $",
        float("nan"),
        "Five less.\n####",
        "#### ",
        "\\boxed{}",
        "\\boxed{ }",
        "\\boxed{1",
        ".",
    ],
)
def test_no_final_answer(answer):
    assert final_answer(answer) == ""


@pytest.mark.parametrize(
    ("answer", "right", "wrong"),
    [
        ("#### 1,024", "1024", "1"),
        ("1,024,000", "1{,}024{,}000", "1"),
        ("\\frac{1}{2}", "0.5", "1"),
        ("so $x=\\boxed{\\frac{3}{4}}$.", "\\frac{3}{4}", "3"),
        ("\\frac{1}{2}.", "\\frac{1}{2}", "1"),
        (1e-05, "0.00001", "1"),
        (0.25, "\\frac{1}{4}", "25"),
        ("\\$18", "18", "1"),
        ("$18", "\\$18", "1"),
        ("50%", "50\\%", "5"),
        ("50\\%", "50", "5"),
        ("10 cm", "10", "1"),
        ("10\\text{ cm}", "10", "1"),
        ("90^\\circ", "90", "9"),
        ("\\text{Evelyn}", "Evelyn", "\\text{Bob}"),
        ("Evelyn", "\\text{Evelyn}", "\\text{Bob}"),
        ("(B)", "\\text{B}", "C"),
        ("[1, 2]", "[1,2]", "(1,2)"),
        ("(1, 2)", "(1,2)", "[1,2]"),
        ("\\{1, 2\\}", "\\{2, 1\\}", "1"),
        (True, "True", "False"),
        (True, "\\text{true}", "\\text{false}"),
        (np.False_, "false", "true"),
        ("Yes", "\\text{Yes}", "No"),
        # As MATH is packed for verl, whose `target` has lost a backslash of every line break.
        (
            {
                "target": "\\begin{pmatrix}6\\3\\end{pmatrix}",
                "solution": "So it is \\[\\boxed{\\begin{pmatrix} 6 \\\\ 3 \\end{pmatrix}}.\\]",
            },
            "\\begin{pmatrix} 6 \\\\ 3 \\end{pmatrix}",
            "\\begin{pmatrix} 3 \\\\ 6 \\end{pmatrix}",
        ),
    ],
)
def test_answers_are_what_the_reward_parses(answer, right, wrong):
    accepted = accepted_answers(answer)
    assert score(right, accepted) == 1.0
    assert score(wrong, accepted) == 0.0


# Several answers, and answers within something


@pytest.mark.parametrize(
    ("truth", "expected"),
    [
        (["1/2", "0.25"], ["$1/2$", "$0.25$"]),
        (("1/2", 0.25, None, ""), ["$1/2$", "$0.25$"]),
        ([["1"], ["2", "1"]], ["$1$", "$2$"]),
        ([1, 2], ["$1$", "$2$"]),
        (np.array(["1/2", "0.25"], dtype=object), ["$1/2$", "$0.25$"]),
        (np.array([np.array(["1"]), np.array(["2"])], dtype=object), ["$1$", "$2$"]),
        ('["1/2", "0.25"]', ["$1/2$", "$0.25$"]),
        ('["\\\\frac{1}{2}"]', ["$\\frac{1}{2}$"]),
        ("[1, 2]", ["$[1, 2]$"]),
        ("[0.5, \\infty)", ["$[0.5, \\infty)$"]),
        ("{1, 2}", ["${1, 2}$"]),
        ("['1/2', '0.25']", ["$['1/2', '0.25']$"]),
        ('{"target": "3"}', ["$3$"]),
        ({"target": ["1", "2"]}, ["$1$", "$2$"]),
        ({"target": None, "answer": "2"}, ["$2$"]),
        ({"target": " ", "answer": [], "solution": "3"}, ["$3$"]),
        ({"target": "12{}13", "solution": "So $\\boxed{12\\text{ and }13}$"}, ["\\boxed{12\\text{ and }13}"]),
        ({"target": "3", "solution": "Count to three."}, ["$3$"]),
        ({"target": "3", "solution": "\\boxed{}"}, ["$3$"]),
        ([], []),
        ("[]", []),
        ({}, []),
        ({"target": None}, []),
        ([None, " "], []),
    ],
)
def test_accepted_answers(truth, expected):
    assert accepted_answers(truth) == expected


@pytest.mark.parametrize(
    ("row", "content", "solution"),
    [
        ({"question": "1+1?", "answer": "One and one.\n#### 2"}, "1+1?", "$2$"),
        ({"problem": "1+1?", "answer": "2"}, "1+1?", "$2$"),
        ({"problem": "1+1?", "answer": 2}, "1+1?", "$2$"),
        ({"problem": "1+1?", "solution": "It is $\\boxed{2}$"}, "1+1?", "\\boxed{2}"),
        ({"problem": "1+1?", "solution": "Count to two.", "answer": "2"}, "1+1?", "$2$"),
        ({"problem": "1+1?", "solution": "It is $\\boxed{2}$", "answer": ""}, "1+1?", "\\boxed{2}"),
        ({"problem": "1+1?", "solution": "It is $\\boxed{2}$", "answer": None}, "1+1?", "\\boxed{2}"),
        ({"prompt": "1+1?", "solution": "$2$", "level": 1}, "1+1?", "$2$"),
        ({"prompt": [{"role": "user", "content": "1+1?"}], "solution": "2"}, "1+1?", "$2$"),
        ({"prompt": [{"role": "user", "content": "1+1?"}], "reward_model": {"ground_truth": "2"}}, "1+1?", "$2$"),
        ({"prompt": "1+1?", "reward_model": {"ground_truth": {"question": "1+1?", "target": "2"}}}, "1+1?", "$2$"),
        ({"prompt": "1+1?", "reward_model": {"ground_truth": ["2"]}}, "1+1?", "$2$"),
        ({"prompt": "1+1?", "reward_model": '{"ground_truth": "2"}'}, "1+1?", "$2$"),
        ({"prompt": "1+1?", "reward_model": {"ground_truth": ["2", "10_2"]}}, "1+1?", ["$2$", "$10_2$"]),
        ({"prompt": "1+1?", "solution": ["2", "10_2"]}, "1+1?", ["$2$", "$10_2$"]),
        (
            {"prompt": "1+1?", "reward_model": {"ground_truth": {"solution": "So $\\boxed{2}$"}}, "solution": "?"},
            "1+1?",
            "\\boxed{2}",
        ),
    ],
)
def test_columns_are_mapped(row, content, solution):
    expected = {"prompt": [{"role": "user", "content": content}], "solution": solution}
    assert list(to_prompt_and_solution(Dataset.from_list([row]))) == [{**expected, "row": 0}]
    assert list(to_prompt_and_solution(IterableDataset.from_generator(lambda: iter([row])))) == [expected]


def test_one_row_with_several_answers_makes_every_solution_a_list():
    problems = to_prompt_and_solution(
        Dataset.from_list([{"prompt": "a", "solution": ["1"]}, {"prompt": "b", "solution": ["1/2", "0.25"]}])
    )
    assert list(problems["solution"]) == [["$1$"], ["$1/2$", "$0.25$"]]
    assert [score("0.25", solution) for solution in problems["solution"]] == [0.0, 1.0]


def test_lists_in_parquet_are_read(tmp_path):
    rows = [{"prompt": [{"role": "user", "content": "?"}], "reward_model": {"ground_truth": ["1/2", "0.25"]}}]
    Dataset.from_list(rows).to_parquet(tmp_path / "problems.parquet")
    (row,) = load_problems(str(tmp_path / "problems.parquet"), "train")
    assert row["solution"] == ["$1/2$", "$0.25$"]


@pytest.mark.parametrize(
    ("kind", "answers", "message"),
    [
        (Value("float32"), [123456789.0, 0.1], "has floating-point numbers of 16 or 32 bits"),
        (Value("float16"), [0.1, 0.5], "has floating-point numbers of 16 or 32 bits"),
        ([Value("float32")], [[0.1], [0.5]], "has floating-point numbers of 16 or 32 bits"),
        (ClassLabel(names=["A", "B"]), ["A", "B"], "has class labels"),
    ],
)
def test_a_type_that_does_not_keep_the_answer_is_refused(kind, answers, message, tmp_path):
    features = Features({"question": Value("string"), "answer": kind})
    Dataset.from_dict({"question": ["?", "!"], "answer": answers}, features).to_parquet(tmp_path / "rows.parquet")
    with pytest.raises(ValueError, match=rf"The column `answer` of '.*rows.parquet' {message}.*Write the answers as"):
        load_problems(str(tmp_path / "rows.parquet"), "train")


def test_a_mixture_has_the_columns_of_all_datasets():
    rows = [
        {"question": "1+1?", "answer": "#### 2"},
        {"problem": "1+2?", "solution": "So \\boxed{3}."},
        {"problem": "1+3?", "solution": "It is clear."},  # a derivation without a result
        {"prompt": [{"role": "user", "content": "1+4?"}], "solution": "5"},
        {"prompt": [{"role": "user", "content": "1+5?"}], "reward_model": {"ground_truth": "6"}},
    ]
    columns = ["question", "problem", "prompt", "answer", "solution", "reward_model"]
    mixture = Dataset.from_list([{name: row.get(name) for name in columns} for row in rows])
    mapped = to_prompt_and_solution(mixture)
    assert mapped["row"] == [0, 1, 3, 4]
    assert mapped["solution"] == ["$2$", "\\boxed{3}", "$5$", "$6$"]
    assert [prompt[0]["content"] for prompt in mapped["prompt"]] == ["1+1?", "1+2?", "1+4?", "1+5?"]


def test_the_first_problems_are_not_the_first_rows():
    problems = to_prompt_and_solution(Dataset.from_list([{"question": text, "answer": "1"} for text in "aababc"]))
    assert first_problems(problems, 2)["row"] == [0, 1, 2, 3, 4]
    assert len(first_problems(problems, 9)) == 6


def test_other_columns_are_refused():
    with pytest.raises(ValueError, match=r"\['text', 'label'\].*`prompt` with `solution`.*`question`"):
        to_prompt_and_solution(Dataset.from_list([{"text": "1+1?", "label": "2"}]))
    with pytest.raises(ValueError, match=r"ground truth has \['style'\]\. Accepted are `target`"):
        to_prompt_and_solution(Dataset.from_list([{"prompt": "1+1?", "reward_model": {"ground_truth": {"style": 1}}}]))
    with pytest.raises(ValueError, match=r"`reward_model` has \['style'\]\. Accepted is `ground_truth`"):
        to_prompt_and_solution(Dataset.from_list([{"prompt": "1+1?", "reward_model": {"style": "rule"}}]))


# Rows without an answer


def test_rows_without_an_answer_are_skipped_and_named(caplog):
    answers = ["#### 1", "####", None, "  ", "#### 5", "\\boxed{}"]
    dataset = Dataset.from_list([{"question": f"{i}?", "answer": answer} for i, answer in enumerate(answers)])
    with caplog.at_level(logging.WARNING):
        problems = to_prompt_and_solution(dataset)
    assert list(problems["solution"]) == ["$1$", "$5$"]
    assert [prompt[0]["content"] for prompt in problems["prompt"]] == ["0?", "4?"]
    assert "Skipped 4 of 6 problems: rows 1, 2, 3, 5 (counted from 0) without a text or a final answer." in caplog.text


def test_many_skipped_rows_are_counted(caplog):
    dataset = Dataset.from_list([{"question": "?", "answer": "1" if i == 0 else ""} for i in range(21)])
    to_prompt_and_solution(dataset)
    assert "Skipped 20 of 21 problems: rows 1, 2, 3, 4, 5, 6, 7, 8, 9, 10 and 10 more (counted" in caplog.text


@pytest.mark.parametrize("prompt", [None, "", " ", []])
def test_rows_without_a_text_are_skipped(prompt, caplog):
    whole = "1+1?" if not isinstance(prompt, list) else [{"role": "user", "content": "1+1?"}]
    dataset = Dataset.from_list([{"prompt": whole, "solution": "2"}, {"prompt": prompt, "solution": "2"}])
    assert len(to_prompt_and_solution(dataset)) == 1
    assert "Skipped 1 of 2 problems: row 1 (counted from 0)" in caplog.text


def test_rows_without_an_answer_in_a_stream(caplog):
    rows = [{"question": "a", "answer": ""}, {"question": "b", "answer": "2"}]
    (row,) = to_prompt_and_solution(IterableDataset.from_generator(lambda: iter(rows)))
    assert row["solution"] == "$2$"
    assert "Skipped row 0 (counted from 0)" in caplog.text


def test_no_problem_left_is_refused():
    with pytest.raises(ValueError, match="None of the 2 problems has both a text and a final answer"):
        to_prompt_and_solution(Dataset.from_list([{"question": "?", "answer": ""}] * 2))
    with pytest.raises(ValueError, match="There are no rows in the dataset"):
        to_prompt_and_solution(Dataset.from_dict({"question": [], "answer": []}))


def test_unparseable_solutions_are_found():
    solutions = ["$1$", "no answer", ["no answer", "$1$"], ["", "no answer"]]
    for index, solution in enumerate(solutions):
        problems = Dataset.from_list([{"solution": solution, "row": 7}])
        assert unparseable_rows(problems) == ([7] if index in (1, 3) else [])


@pytest.mark.parametrize("column", ["question", "answer"])
def test_the_first_thousand_rows_may_be_skipped(column):
    rows = [{"question": "?", "answer": "1"}] * 1100
    dataset = Dataset.from_list([{**row, column: None} for row in rows[:-1]] + rows[-1:])
    assert to_prompt_and_solution(dataset)["row"] == [1099]


# Refused rows


@pytest.mark.parametrize(
    "problem",
    [
        ["1+1?"],
        1,
        True,
        b"1+1?",
        {"role": "user", "content": "1+1?"},
        [{"from": "human", "value": "1+1?"}],
        [{"role": "user", "content": None}],
        [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "1+1?"}]}],
        datetime.datetime(2023, 5, 1),
    ],
)
def test_a_problem_is_a_text_or_messages_of_text(problem):
    dataset = Dataset.from_list([{"prompt": None, "solution": "2"}, {"prompt": problem, "solution": "2"}])
    with pytest.raises(ValueError, match=r"^Row 1 .* of the dataset: a problem must be a text, or a list") as error:
        to_prompt_and_solution(dataset, "Box it.")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("answer", [datetime.datetime(2023, 5, 1), b"1", 12345678901234567000.0, 2.0**53, 1e300])
def test_an_answer_that_a_reader_may_have_changed_is_refused(answer):
    dataset = Dataset.from_list([{"question": "1+1?", "answer": answer}])
    with pytest.raises(ValueError, match=r"^Row 0 .* of the dataset: the answer .* may not be what was written"):
        to_prompt_and_solution(dataset)


@pytest.mark.parametrize("column", ["image", "images"])
def test_pictures_are_refused(column):
    dataset = Dataset.from_list([{"question": "?", "answer": "1", column: each} for each in (None, ["a.png"])])
    with pytest.raises(ValueError, match=rf"^Row 1 .* of the dataset: it has pictures \(`{column}`\)"):
        to_prompt_and_solution(dataset)
    assert len(to_prompt_and_solution(dataset.select([0]))) == 1


# Instructions, files, splits


def test_an_instruction_follows_the_problem():
    conversation = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "1+1?"}]
    dataset = Dataset.from_list([{"prompt": conversation, "solution": "2"}])
    (row,) = to_prompt_and_solution(dataset, "Box it.")
    assert row["prompt"] == [conversation[0], {"role": "user", "content": "1+1?\nBox it."}]


def test_an_empty_instruction_is_none():
    (row,) = to_prompt_and_solution(Dataset.from_list([{"question": "1?", "answer": "1"}]), "")
    assert row["prompt"][0]["content"] == "1?"


def test_the_parts_of_a_problem_are_one_text():
    parts = [{"type": "text", "text": "1+"}, {"type": "text", "text": "1?"}]
    dataset = Dataset.from_list([{"prompt": [{"role": "user", "content": parts}], "solution": "2"}])
    (row,) = to_prompt_and_solution(dataset, "Box it.")
    assert row["prompt"][0]["content"] == "1+1?\nBox it."


@pytest.mark.parametrize("role", ["assistant", "system"])
def test_an_instruction_needs_a_message_of_the_user(role):
    messages = [{"role": "user", "content": "1?"}, {"role": role, "content": "So"}]
    dataset = Dataset.from_list([{"prompt": messages, "solution": "1"}])
    (row,) = to_prompt_and_solution(dataset)
    assert row["prompt"] == messages
    for added in ({"instruction": "Box it."}, {"worked_examples": messages}):
        with pytest.raises(ValueError, match=rf"^Row 0 .* ends with a message of the role '{role}'"):
            to_prompt_and_solution(dataset, **added)


CHOICES = ["Newton's law", 'the "other"\nlaw']


@pytest.mark.parametrize("answer", ["B", "(B)", "$B$"])
@pytest.mark.parametrize(
    "choices",
    [
        {"options": CHOICES},
        {"options": ["A) Newton's law.", 'B)the "other" law']},
        {"choices": {"text": CHOICES, "label": ["A", "B"]}},
        {"choices": json.dumps(CHOICES)},
    ],
)
def test_what_a_letter_chooses_from_belongs_to_the_text(choices, answer):
    def read(text, answer=answer):
        prompt = [{"role": "user", "content": text}]
        return to_prompt_and_solution(Dataset.from_list([{"prompt": prompt, "solution": answer, **choices}]))

    text = 'Which?\n(A) newton\'s law (B) the "other"  law'
    (row,) = read(text)
    assert row["prompt"][0]["content"] == text
    (name,) = choices
    with pytest.raises(ValueError, match=rf"^Row 0 .* its text lacks .* \(`{name}`\), such as .*Put it into the text"):
        read("Which?\n(A) Newton's law")
    read("Which?", 'the "other" law')  # may be found without them


def test_a_sentence_without_a_final_answer_is_no_answer(caplog):
    texts = [
        "By lemma 3, the product of two such numbers is even.",
        "The answer is 7",
        "It is long, but so: \\boxed{2}",
    ]
    dataset = Dataset.from_list([{"problem": "?", "solution": text} for text in texts])
    assert to_prompt_and_solution(dataset)["row"] == [1, 2]
    assert "Skipped 1 of 3 problems: row 0" in caplog.text
    formulas = [
        r"\begin{pmatrix} \frac{1}{2} & \frac{1}{3} \\ 0 & 1 \end{pmatrix}",
        r"\left(-\infty,-\frac{1}{2}\right)\cup\left(\frac{1}{2},\infty\right)",
        r"x \in \left[ \frac{\pi}{4}, \frac{3\pi}{4} \right]",
    ]
    dataset = Dataset.from_list([{"problem": "?", "solution": formula} for formula in formulas])
    assert to_prompt_and_solution(dataset)["solution"] == [f"${formula}$" for formula in formulas]
    (row,) = to_prompt_and_solution(Dataset.from_list([{"prompt": "?", "solution": texts[0]}]))
    assert row["solution"] == f"${texts[0].rstrip('.')}$"  # TRL's columns


@pytest.mark.parametrize("extension", ["jsonl", "json", "parquet"])
def test_local_files_are_read(tmp_path, extension):
    dataset = Dataset.from_list([{"question": "1+1?", "answer": "#### 2"}] * 3)
    path = tmp_path / f"problems.{extension}"
    write = {"jsonl": dataset.to_json, "json": dataset.to_json, "parquet": dataset.to_parquet}
    write[extension](path)
    assert load_problems(str(path), "train")["solution"] == ["$2$"] * 3
    assert len(load_problems(str(path), "test[1:]")) == 2


@pytest.mark.parametrize(("name", "twin"), [("a[1].jsonl", "a1.jsonl"), ("s*.jsonl", "st.jsonl")])
def test_a_path_is_no_pattern(name, twin, tmp_path, monkeypatch):
    for folder, file, answer in [("run[1]", name, 1), ("run[1]", twin, 2), ("run1", name, 3), ("run1", twin, 4)]:
        (tmp_path / folder).mkdir(exist_ok=True)
        (tmp_path / folder / file).write_text(json.dumps({"question": "?", "answer": answer}) + "\n")
    assert load_problems(str(tmp_path / "run[1]" / name), "test")["solution"] == ["$1$"]
    monkeypatch.chdir(tmp_path / "run[1]")
    assert load_problems(name, "test")["solution"] == ["$1$"]
    with pytest.raises(ValueError, match=r"takes the folder '.*run\[1\]' for a pattern. Rename it"):
        load_problems(str(tmp_path / "run[1]"), "test")


def test_an_edited_file_is_read_again(tmp_path):
    path = tmp_path / "problems.jsonl"
    for answer in ("1", "2"):
        path.write_text(json.dumps({"question": "?", "answer": answer}) + "\n")
        os.utime(path, (0, 0))
        assert load_problems(str(path), "test")["solution"] == [f"${answer}$"]


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        (['{"problem": ["1?", "2?"], "answer": ["1", "2"]}'], "Row 0 .*: a problem must be a text"),
        (['{"problem": "?", "answer": 12345678901234567890}'], "Row 0 .*: the answer 1.234.* may not be what was"),
        (
            ['{"problem": "?", "answer": 0.5}', '{"problem": "?", "answer": 9007199254740993}'],
            "Row 1 .*: the answer 90071.* may not be",
        ),
        (['{"problem": "?", "answer": "2023-05-01"}'], "Row 0 .*: the answer datetime.* may not be what was written"),
        (
            ['{"problem": "?", "answer": 5}', '{"problem": "?", "answer": "[1, 2]"}'],
            r"Row 1 .*: the answer \[1, 2\] may have been one text",
        ),
        (
            [
                '{"prompt": "?", "reward_model": {"ground_truth": 5}}',
                '{"prompt": "?", "reward_model": {"ground_truth": "[1, 2]"}}',
            ],
            r"Row 1 .*: the answer \[1, 2\] may have been one text",
        ),
    ],
)
def test_what_datasets_reads_as_something_else_is_refused(lines, message, tmp_path):
    (tmp_path / "problems.jsonl").write_text("\n".join(lines))
    with pytest.raises(ValueError, match=message) as error:
        load_problems(str(tmp_path / "problems.jsonl"), "test")
    assert "problems.jsonl" in str(error.value)
    assert "\n" not in str(error.value)


def test_text_that_is_not_utf8_is_refused(tmp_path):
    (tmp_path / "problems.jsonl").write_bytes(
        '{"question": "1?", "answer": "1"}\n{"question": "é?"}\n'.encode("latin-1")
    )
    with pytest.raises(ValueError, match=r"Line 2 of '.*problems.jsonl' is not UTF-8. Save the file as UTF-8."):
        load_problems(str(tmp_path / "problems.jsonl"), "test")


ROW = '{"question": "1?", "answer": "1"}'


@pytest.mark.parametrize("name", ["rows.jsonl", "rows.json"])
@pytest.mark.parametrize(
    ("lines", "message"),
    [
        (["null", ROW], "Line 1 of '.*{name}' is not an object: null"),
        (["\ufeffnull", ROW], "Line 1 of '.*{name}' is not an object: null"),
        ([ROW, "", " null "], "Line 3 of '.*{name}' is not an object: null"),
        ([ROW, "5", ROW], "Line 2 of '.*{name}' is not an object: 5"),
        ([ROW, json.dumps("a" * 100)], "Line 2 of '.*{name}' is not an object: \"a+ ?...$"),
    ],
)
def test_lines_that_are_no_objects_are_refused(name, lines, message, tmp_path):
    (tmp_path / name).write_text("\n".join(lines))
    with pytest.raises(ValueError, match=message.format(name=name)):
        file_source(str(tmp_path / name))


@pytest.mark.parametrize("indent", [None, 2])
@pytest.mark.parametrize(
    ("items", "message"),
    [
        ([json.loads(ROW), None], "Item 2 of '.*rows.json' is not an object: null"),
        ([None, json.loads(ROW)], "Item 1 of '.*rows.json' is not an object: null"),
        ([json.loads(ROW), [1]], r"Item 2 of '.*rows.json' is not an object: \[1\]"),
        ([1, json.loads(ROW)], "Item 1 of '.*rows.json' is not an object: 1"),
    ],
)
def test_items_that_are_no_objects_are_refused(items, message, indent, tmp_path):
    (tmp_path / "rows.json").write_text(json.dumps(items, indent=indent))
    with pytest.raises(ValueError, match=message):
        file_source(str(tmp_path / "rows.json"))


def test_problems_and_answers_beside_a_prompt_are_read():
    dataset = Dataset.from_list([{"prompt": "p", "question": "q", "answer": "1"}])
    problems = to_prompt_and_solution(dataset)
    assert problems["prompt"][0][0]["content"] == "q"
    assert problems["solution"] == ["$1$"]


def test_folders_that_cannot_be_read_are_refused_with_a_way_out(tmp_path):
    rows = Dataset.from_list([json.loads(ROW)])
    DatasetDict(test=rows).save_to_disk(tmp_path / "splits")
    assert len(load_problems(str(tmp_path / "splits"), "test")) == 1
    rows.save_to_disk(tmp_path / "saved")
    with pytest.raises(ValueError, match=r"saved' was written by `save_to_disk`. .* with `Dataset.to_parquet`"):
        load_problems(str(tmp_path / "saved"), "test")
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "test.jsonl").write_text(ROW)
    (tmp_path / "broken" / "README.md").write_text("---\nconfigs: [\n---\n")
    with pytest.raises(ValueError, match=r"Cannot read the dataset '.*broken': .*"):
        load_problems(str(tmp_path / "broken"), "test")


def test_a_slice_without_rows_names_the_file(tmp_path):
    (tmp_path / "rows.jsonl").write_text(ROW)
    with pytest.raises(ValueError, match=r"Cannot read the dataset '.*rows.jsonl': .*no data"):
        load_problems(str(tmp_path / "rows.jsonl"), "test[5:5]")


def test_a_list_that_is_not_json_is_refused(tmp_path):
    (tmp_path / "rows.json").write_text(f"[{ROW}, {ROW}")
    with pytest.raises(ValueError, match=r"Cannot read the dataset '.*rows.json': ."):
        load_problems(str(tmp_path / "rows.json"), "test")


@pytest.mark.parametrize("indent", [None, 0, 2])
def test_a_list_of_rows_may_have_any_line_breaks(indent, tmp_path):
    rows = [
        {"question": "?", "answer": ["1", "2"], "other": [5, None]},
        {"question": "?", "answer": ["3"], "other": []},
    ]
    (tmp_path / "rows.json").write_text(json.dumps(rows, indent=indent))
    assert load_problems(str(tmp_path / "rows.json"), "test")["solution"] == [["$1$", "$2$"], ["$3$"]]


def test_rows_are_those_of_the_file(tmp_path, caplog):
    rows = [{"question": f"{i}?", "answer": "" if i == 2 else "$x$ $y$" if i == 4 else "1"} for i in range(6)]
    path = tmp_path / "problems.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    problems = load_problems(str(path), "test[1:]")
    assert problems["row"] == [1, 3, 4, 5]
    assert "Skipped 1 of 5 problems: row 2 (counted from 0)" in caplog.text
    path.write_text("".join(json.dumps(row) + "\n" for row in [*rows, {"question": 6, "answer": "1"}]))
    with pytest.raises(ValueError, match=r"^Row 6 \(counted from 0\) of '.*problems.jsonl': "):
        load_problems(str(path), "test[50%:]")


def test_a_folder_is_read(tmp_path):
    for split, answer in [("train", "1"), ("test", "2")]:
        (tmp_path / f"{split}.jsonl").write_text(json.dumps({"question": "?", "answer": answer}) + "\n")
    for other in (".git/a.json", "__pycache__/b.json", "notes.json"):  # `datasets` reads none of them
        (tmp_path / other).parent.mkdir(exist_ok=True)
        (tmp_path / other).write_text("null\n")
    assert list(load_problems(str(tmp_path), "test")["solution"]) == ["$2$"]
    (tmp_path / "train.jsonl").write_text("null\n")
    with pytest.raises(ValueError, match=r"Line 1 of '.*train.jsonl' is not an object: null"):
        load_problems(str(tmp_path), "test")


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("none.jsonl", None, "There is no file '.*none.jsonl'"),
        ("none.csv", None, "There is no file '.*none.csv'"),
        ("none.jsonl.gz", None, "There is no file '.*none.jsonl.gz'"),
        ("empty.jsonl", "", "'.*empty.jsonl' is empty"),
        ("blank.jsonl", "\n  \n", "'.*blank.jsonl' is empty"),
        ("blank.json", "\n", "'.*blank.json' is empty"),
        ("list.json", "[]", "'.*list.json' is empty"),
        ("empty.parquet", pa.table({"question": [], "answer": []}), "'.*empty.parquet' is empty"),
        ("rows.csv", "question,answer\n1,2\n", r"'.*rows.csv' is not a \.jsonl, \.json, \.parquet file"),
        ("broken.jsonl", '{"question": 1\n', "Cannot read the dataset '.*broken.jsonl': .*JSON"),
        ("broken.parquet", "no parquet", "Cannot read the dataset '.*broken.parquet': .*[Pp]arquet"),
    ],
)
def test_files_that_cannot_be_read_are_refused_in_one_line(name, content, message, tmp_path):
    if isinstance(content, pa.Table):
        pq.write_table(content, tmp_path / name)
    elif content is not None:
        (tmp_path / name).write_text(content)
    with pytest.raises((OSError, ValueError), match=message) as error:
        load_problems(str(tmp_path / name), "train")
    assert "\n" not in str(error.value)


def test_a_configuration_of_a_file_has_no_effect(tmp_path, caplog):
    (tmp_path / "rows.jsonl").write_text('{"question": "?", "answer": "1"}\n')
    load_problems(str(tmp_path / "rows.jsonl"), "train", "main")
    assert "`dataset_config='main'` has no effect on the file" in caplog.text


def test_the_last_rows_are_held_out():
    dataset = Dataset.from_list([{"solution": str(index)} for index in range(5)])
    train, held_out = split_off_last(dataset, 2)
    assert (list(train["solution"]), list(held_out["solution"])) == (["0", "1", "2"], ["3", "4"])
    with pytest.raises(ValueError, match="5 of 5 rows"):
        split_off_last(dataset, 5)


@pytest.mark.parametrize(
    ("answer", "right", "wrong"),
    [
        ("€8", ["8", "€8", "8.0"], ["9", "€80"]),
        ("-£2.50", ["-2.5", "-£2.50"], ["2.5"]),
        ("8 USD", ["8", "8 USD"], ["9"]),
        ("USD 1,200", ["1200", "USD 1,200"], ["1"]),
        ("8 €", ["8"], ["9"]),
        ("€1 000", ["1000"], ["1"]),
        ("€1,50", ["€1,50"], ["1", "50", "150"]),
    ],
)
def test_an_amount_of_money_is_its_number_too(answer, right, wrong):
    accepted = accepted_answers(answer)
    assert [score(each, accepted) for each in (*right, *wrong)] == [1.0] * len(right) + [0.0] * len(wrong)


def test_answers_that_are_sentences_are_warned_of(caplog):
    answers = ["12", "The total comes to 12 after we add 5 and 7", "We add 5 and 7, which together are #### 12"]
    rows = [{"question": f"Problem {number}", "answer": answer} for number, answer in enumerate(answers)]
    dataset = to_prompt_and_solution(Dataset.from_list(rows))
    assert not caplog.records
    check_parseable(dataset, "training")
    assert "The answers of 1 of 3 problems for training are sentences: row 1 (counted from 0)" in caplog.text
