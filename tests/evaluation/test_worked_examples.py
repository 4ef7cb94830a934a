"""Worked examples: where they stand in the chat, which files are refused, and what an evaluation records of them."""

import json
import os

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from datasets import Dataset, IterableDataset

from trl_a3po.cli import main as cli
from trl_a3po.evaluation.problems import to_prompt_and_solution
from trl_a3po.evaluation.worked_examples import check_no_overlap, load_worked_examples, overlap, recorded


INSTRUCTION = "box it."
EXAMPLES = [
    {"question": "2 + 2?", "answer": "2 and 2 are \\boxed{4}."},
    {"question": "3 + 4?", "answer": "\\boxed{7}"},
]
TURNS = [
    {"role": "user", "content": "2 + 2?\nbox it."},
    {"role": "assistant", "content": "2 and 2 are \\boxed{4}."},
    {"role": "user", "content": "3 + 4?\nbox it."},
    {"role": "assistant", "content": "\\boxed{7}"},
]
SYSTEM = {"role": "system", "content": "you add."}


@pytest.fixture
def write(tmp_path):
    def write(rows, name="examples.jsonl"):
        path = tmp_path / name
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        return str(path)

    return write


# The chat


def test_every_row_is_two_turns(write):
    assert load_worked_examples(write(EXAMPLES), INSTRUCTION) == TURNS


@pytest.mark.parametrize("kind", [Dataset.from_list, lambda rows: IterableDataset.from_generator(lambda: iter(rows))])
def test_they_stand_before_each_problem_and_after_its_system_message(kind):
    asked = {"role": "user", "content": "1 + 1?"}
    rows = [{"prompt": [asked], "solution": "2"}, {"prompt": [SYSTEM, asked], "solution": "2"}]
    plain, with_system = to_prompt_and_solution(kind(rows), INSTRUCTION, TURNS)
    question = {"role": "user", "content": "1 + 1?\nbox it."}
    assert plain["prompt"] == [*TURNS, question]
    assert with_system["prompt"] == [SYSTEM, *TURNS, question]


def test_the_derivation_is_shown_where_there_is_one(write):
    math = {"problem": "2 + 2?", "solution": "2 and 2 are $\\boxed{4}$.", "answer": "4"}
    assert load_worked_examples(write([math]))[1]["content"] == math["solution"]


def test_a_prompt_of_one_turn_is_a_problem(write):
    row = {"prompt": "2 + 2?", "solution": "\\boxed{4}"}
    assert load_worked_examples(write([row]))[0] == {"role": "user", "content": "2 + 2?"}


# Refused


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([], "'.*examples.jsonl' is empty"),
        ([{}], "The worked examples '.*examples.jsonl' cannot be read: .* Each row needs `question`"),
        ([{"text": "a"}], r"columns \['text'\], and no solution to show"),
        ([{"answer": "\\boxed{1}"}], r"The dataset has the columns \['answer'\]"),
        ([{"prompt": "1?", "reward_model": {"ground_truth": "1"}}], "and no solution to show"),
        ([*EXAMPLES, {"question": "1?", "answer": " "}], "Row 2 .* needs a problem and a solution.* got '1.' and ' '"),
        ([*EXAMPLES, {"question": None, "answer": "\\boxed{1}"}], "Row 2 .* needs a problem and a solution"),
        ([{"question": "1?", "answer": 1}], "Row 0 .* needs a problem and a solution.* and 1"),
        (
            [{"prompt": [SYSTEM], "solution": "\\boxed{1}"}],
            "Row 0 .* needs a problem and a solution, each of them a text",
        ),
        (
            [*EXAMPLES, {"question": "72?", "answer": "so it is.\n#### 72"}],
            "Row 2 .* does not score as correct.*boxed",
        ),
        ([{"problem": "1?", "solution": "\\boxed{2}", "answer": "1"}], "Row 0 .* does not score as correct"),
        ([{"question": "1?", "answer": "\\boxed{1}", "image": "a.png"}], r"Row 0 .* it has pictures \(`image`\)"),
        ([{"question": "1?", "answer": 1e99}], "Row 0 .* the answer 1e.99 may not be what was written"),
    ],
)
def test_a_file_that_is_no_worked_examples(rows, message, write):
    with pytest.raises(ValueError, match=message):
        load_worked_examples(write(rows))


def test_files_that_cannot_be_read(write, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no file 'none.jsonl'"):
        load_worked_examples("none.jsonl")
    with pytest.raises(ValueError, match=r"is not a \.jsonl, \.json, \.parquet file"):
        load_worked_examples(write(EXAMPLES, "examples.txt"))
    (tmp_path / "broken.jsonl").write_text('{"question": 1\n')
    with pytest.raises(ValueError, match=r"Cannot read the dataset '.*broken.jsonl': .*JSON"):
        load_worked_examples(str(tmp_path / "broken.jsonl"))
    (tmp_path / "broken.parquet").write_text("no parquet")
    with pytest.raises(ValueError, match=r"Cannot read the dataset '.*broken.parquet': .*[Pp]arquet"):
        load_worked_examples(str(tmp_path / "broken.parquet"))


def test_a_file_of_columns_without_rows(tmp_path):
    path = tmp_path / "examples.parquet"
    pq.write_table(pa.table({"question": pa.array([], pa.string()), "answer": pa.array([], pa.string())}), path)
    with pytest.raises(ValueError, match=r"'.*examples\.parquet' is empty"):
        load_worked_examples(str(path))


def test_a_path_is_no_pattern_and_an_edited_file_is_read_again(write, tmp_path):
    write([{"question": "0?", "answer": "\\boxed{0}"}], "a1.jsonl")
    for text in ("1?", "2?"):
        path = write([{"question": text, "answer": "\\boxed{1}"}], "a[1].jsonl")
        os.utime(path, (0, 0))
        assert load_worked_examples(path)[0]["content"] == text


def test_another_reward_may_read_another_form(write):
    path = write([{"question": "72?", "answer": "so it is.\n#### 72"}])
    assert len(load_worked_examples(path, checks_answers=False)) == 2


# Overlap


def problems(*texts):
    rows = Dataset.from_list([{"question": text, "answer": "4"} for text in texts])
    return to_prompt_and_solution(rows, INSTRUCTION, TURNS)


def test_overlap_finds_what_is_the_same_but_for_spaces():
    assert overlap(problems("1?", "3 +  4?\n", "2 + 2 ?", "2 + 2?"), TURNS) == [
        (1, 1, "3 + 4? box it."),
        (3, 0, "2 + 2? box it."),
    ]
    assert overlap(problems("1?"), TURNS) == []
    assert overlap(problems("2 + 2?"), []) == []


def test_an_overlap_with_the_evaluation_names_its_row():
    with pytest.raises(ValueError, match=r"Row 1 .* to evaluate on is row 1 of the worked .*: '3 .*, and 1 more"):
        check_no_overlap(problems("1?", "3 + 4?", "2 + 2?"), TURNS, "to evaluate on")


def test_the_record_tells_worked_examples_apart():
    assert recorded([]) is None
    assert recorded(TURNS)["count"] == 2
    others = [TURNS[2:], [*TURNS[2:], *TURNS[:2]], [*TURNS[:3], {"role": "assistant", "content": "\\boxed{ 7}"}]]
    assert len({recorded(each)["sha256"] for each in (TURNS, *others)}) == 4


# The command


@pytest.fixture
def evaluate(write, model_dir, tmp_path):
    """Runs `trl-a3po eval` on a tiny model. The examples are rewritten for every call."""
    file = write([{"question": f"{n} + 1?", "answer": str(n + 1)} for n in range(10, 14)], "problems.jsonl")

    def evaluate(examples=None, *options):
        line = ["eval", "--model_name_or_path", model_dir, "--dataset_name", file, "--output_dir", str(tmp_path / "o")]
        line += ["--num_samples", "2", "--max_completion_length", "4", "--instruction", INSTRUCTION, *options]
        return cli.main([*line, *([] if examples is None else ["--worked_examples", write(examples)])])

    return evaluate


def test_an_evaluation_samples_after_them_and_records_them(evaluate, tmp_path, capsys):
    assert evaluate(EXAMPLES) == 0
    assert "\n2 worked examples before each problem\n" in capsys.readouterr().out
    results = json.loads((tmp_path / "o" / "results.json").read_text())
    assert results["settings"]["worked_examples"] == recorded(TURNS)
    samples = [json.loads(line) for line in (tmp_path / "o" / "samples.jsonl").read_text().splitlines()]
    assert len(samples) == 4
    assert all(sample["prompt"][:-1] == TURNS for sample in samples)
    assert samples[0]["prompt"][-1]["content"] == "10 + 1?\nbox it."
    assert evaluate(EXAMPLES) == 0  # all is there


def test_an_evaluation_without_any_says_so(evaluate, tmp_path, capsys):
    assert evaluate() == 0
    assert "worked examples" not in capsys.readouterr().out
    assert json.loads((tmp_path / "o" / "results.json").read_text())["settings"]["worked_examples"] is None


@pytest.mark.parametrize(
    "changed", [None, EXAMPLES[:1], [EXAMPLES[0], {**EXAMPLES[1], "answer": "that is \\boxed{7}"}]]
)
def test_other_worked_examples_than_before_are_refused_by_name(changed, evaluate, capsys):
    evaluate(EXAMPLES)
    with pytest.raises(SystemExit):
        evaluate(changed)
    assert "worked_examples={'count': 2, 'sha256': '" in capsys.readouterr().err


def test_evaluations_from_before_they_could_be_given_are_resumed(evaluate, tmp_path):
    evaluate()
    run = json.loads((tmp_path / "o" / "run.json").read_text())
    del run["settings"]["worked_examples"]
    (tmp_path / "o" / "run.json").write_text(json.dumps(run))
    assert evaluate() == 0


def test_a_problem_of_the_evaluation_is_no_worked_example(evaluate, capsys):
    with pytest.raises(SystemExit):
        evaluate([*EXAMPLES, {"question": "12 + 1?", "answer": "\\boxed{13}"}])
    assert "Row 2 (counted from 0) of the problems to evaluate on is row 2 of the worked" in capsys.readouterr().err
    with pytest.raises(SystemExit):  # the row of the file, though others are skipped
        evaluate([{"question": "12 + 1?", "answer": "\\boxed{13}"}], "--dataset_split", "test[1:]")
    assert "Row 2 (counted from 0) of the problems to evaluate on is row 0 of the worked" in capsys.readouterr().err
    # Among those that are not evaluated it may be.
    assert evaluate([{"question": "12 + 1?", "answer": "\\boxed{13}"}], "--max_problems", "2") == 0
