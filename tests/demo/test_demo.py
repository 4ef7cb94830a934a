import json
import random
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from support.demo_program import REPOSITORY, SMALL, START_MODEL, run_demo
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl.rewards import accuracy_reward

from trl_a3po.cli import demo
from trl_a3po.cli.main import main
from trl_a3po.demo import arithmetic
from trl_a3po.evaluation.runs import evaluate_model, sample_model


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """As in the demo: so small a model is far slower with more, where other programs run."""
    count = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(count)


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(START_MODEL)


@pytest.fixture(scope="module")
def model():
    return AutoModelForCausalLM.from_pretrained(START_MODEL)


# The arithmetic task


def test_splits_are_deterministic_and_share_no_problem():
    train, test = arithmetic.problems("train"), arithmetic.problems("test")
    assert train == arithmetic.problems("train")
    assert len(test) == arithmetic.NUM_TEST_PROBLEMS
    assert not {tuple(sorted(problem)) for problem in train} & {tuple(sorted(problem)) for problem in test}


def test_worked_solutions_are_right_and_their_rewards_too():
    problems = arithmetic.problems("test")[:200]
    rows = [arithmetic.row(problem) for problem in problems]
    right = [[{"role": "assistant", "content": arithmetic.worked_solution(problem)}] for problem in problems]
    wrong = [[{"role": "assistant", "content": f"\\boxed{{{sum(problem) + 1}}}"}] for problem in problems]
    solutions = [row["solution"] for row in rows]
    assert accuracy_reward(right, solutions) == [1.0] * 200
    assert accuracy_reward(wrong, solutions) == [0.0] * 200
    assert arithmetic.worked_solution((47, 85, 96)) == "47+85=132\n132+96=228\n\\boxed{228}"


@pytest.mark.parametrize(
    ("a", "b", "expected"), [(12, 34, 46), (47, 85, 22), (99, 1, 90), (50, 50, 0), (132, 96, 128)]
)
def test_addition_that_forgets_every_carry(a, b, expected):
    assert arithmetic.add_by_columns(a, b, lambda: True) == expected


def test_demonstrations_drop_carries_at_the_stated_rate():
    # The only carry is that of 66+17=83.
    rng = random.Random(0)
    dropped = [
        arithmetic.worked_solution((55, 11, 17), lambda: rng.random() < arithmetic.CARRY_DROP_RATE).endswith("{73}")
        for _ in range(4000)
    ]
    assert sum(dropped) / 4000 == pytest.approx(arithmetic.CARRY_DROP_RATE, abs=0.03)


def test_demonstrations_are_reproducible_and_use_training_problems_only():
    def first_questions(seed):
        stream = arithmetic.demonstrations(random.Random(seed))
        return [next(stream) for _ in range(500)]

    assert first_questions(0) == first_questions(0)
    held_out = {arithmetic.question(problem) for problem in arithmetic.problems("test")}
    assert not held_out & {question for question, _ in first_questions(0)}


def test_the_task_needs_neither_torch_nor_trl():
    code = "import sys, trl_a3po.demo.arithmetic; assert not {'torch', 'trl'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=REPOSITORY)


# The start model


@pytest.mark.parametrize(
    "text",
    [
        "12+34+56=?",
        "naïve café — 東京",
        "🙂 👩‍👩‍👧 🇩🇪",
        "".join(map(chr, range(256))),
        " 'll  ,don 't . \r\n\t",
        "\u202e\ufeff\x00",
    ],
)
def test_tokenizer_round_trips_any_text_at_one_token_a_byte(tokenizer, text):
    ids = tokenizer(text).input_ids
    assert len(ids) == len(text.encode())
    assert tokenizer.decode(ids) == text


def test_chat_template(tokenizer):
    user = {"role": "user", "content": "1+1=?"}
    assistant = {"role": "assistant", "content": "2"}
    prompt = tokenizer.apply_chat_template([user], tokenize=False, add_generation_prompt=True)
    whole = tokenizer.apply_chat_template([user, assistant], tokenize=False)
    assert prompt == "<|user|>1+1=?<|end|><|assistant|>"
    assert whole == prompt + "2<|end|>"
    assert tokenizer.padding_side == "left"


def test_start_model_is_small_and_solves_some_problems(model, tokenizer):
    assert model.num_parameters() < 1_000_000
    assert sum(file.stat().st_size for file in START_MODEL.iterdir()) < 1_500_000
    problems = Dataset.from_list([arithmetic.row(problem) for problem in arithmetic.problems("test")[:64]])
    found = evaluate_model(model, tokenizer, problems, num_samples=4, max_completion_length=40)
    assert 0.1 < found["metrics"]["pass@1"]["mean"] < 0.4


# Evaluation


def test_sampling_is_seeded_and_leaves_the_random_state_alone(model, tokenizer):
    problems = Dataset.from_list([arithmetic.row(problem) for problem in arithmetic.problems("test")[:16]])
    state = torch.random.get_rng_state()
    first, again, other = (
        evaluate_model(model, tokenizer, problems, num_samples=2, max_completion_length=40, seed=seed)
        for seed in (0, 0, 1)
    )
    assert first == again != other
    assert torch.equal(state, torch.random.get_rng_state())


def test_samples_of_a_prompt_are_together(model, tokenizer):
    prompts = [arithmetic.row(problem)["prompt"] for problem in [(11, 11, 11), (22, 33, 44)]]
    _, drawn = sample_model(model, tokenizer, prompts, num_samples=3, max_completion_length=40)
    assert [[each.text[:6] for each in row] for row in drawn] == [["11+11="] * 3, ["22+33="] * 3]


def test_problems_without_a_parseable_solution_are_left_out(model, tokenizer):
    rows = [arithmetic.row(problem) for problem in arithmetic.problems("test")[:3]]
    counted = evaluate_model(
        model, tokenizer, Dataset.from_list([rows[0], rows[2]]), num_samples=2, max_completion_length=40
    )
    rows[1]["solution"] = "no answer"
    found = evaluate_model(model, tokenizer, Dataset.from_list(rows), num_samples=2, max_completion_length=40)
    assert found["metrics"] == counted["metrics"]
    assert found["rows_without_a_parseable_solution"] == [1]
    with pytest.raises(ValueError, match="math-verify"):
        evaluate_model(model, tokenizer, Dataset.from_list(rows[1:2]), num_samples=2, max_completion_length=40)


# The command line


def write_problems(path, answers):
    rows = [{"question": f"{i}?", "answer": each} for i, each in enumerate(answers)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


@pytest.fixture
def line(tmp_path):
    """Two steps on problems of a file, of which the last four are held out."""
    problems = write_problems(tmp_path / "problems.jsonl", ["2"] * 12)
    options = ["--dataset_name", problems, "--output_dir", str(tmp_path / "out"), "--max_completion_length", "8"]
    return ["demo", *options, "--max_steps", "2", "--eval_size", "4", *SMALL]


@pytest.mark.parametrize("value", ["True", "checkpoint-1"])
def test_it_resumes(value, line, tmp_path, capsys):
    out = tmp_path / "out"
    assert main([*line, "--max_steps", "1", "--save_strategy", "steps", "--save_steps", "1"]) == 0
    before = json.loads((out / "checkpoint-1" / "trainer_state.json").read_text())
    assert main([*line, "--resume_from_checkpoint", value if value == "True" else str(out / value)]) == 0
    after = json.loads((out / "trainer_state.json").read_text())
    assert after["global_step"] == 2
    assert after["log_history"][0] == before["log_history"][0]
    assert re.search(r"^2 steps in \d+ s, resumed from .*checkpoint-1; model saved", capsys.readouterr().out, re.M)


def test_the_table_is_printed_before_anything_is_saved(line, capsys, monkeypatch):
    def full(*_):
        raise OSError("No space left on device")

    monkeypatch.setattr(demo.A3POTrainer, "save_model", full)
    with pytest.raises(OSError, match="No space left"):
        main(line)
    assert re.search(r"^pass@4 +\d", capsys.readouterr().out, re.M)


def test_the_model_is_saved_if_the_evaluation_fails(line, tmp_path, monkeypatch):
    evaluations = iter([evaluate_model, lambda *_, **__: 1 / 0])
    monkeypatch.setattr(demo, "evaluate_model", lambda *args, **kwargs: next(evaluations)(*args, **kwargs))
    with pytest.raises(ZeroDivisionError):
        main(line)
    assert (tmp_path / "out" / "model.safetensors").exists()


def test_problems_in_several_rows_are_not_trained_on_if_they_are_held_out(line, tmp_path, capsys, caplog):
    path = Path(write_problems(tmp_path / "problems.jsonl", ["2"] * 12))
    path.write_text(path.read_text().replace('"1?"', '"8?"').replace('"9?"', '"8?"'))
    assert main([*line, "--max_steps", "1", "--eval_samples", "3"]) == 0
    out = capsys.readouterr().out
    assert re.search("^7 training problems, 4 held out$", out, re.M)
    assert "Left out 1 rows for training whose problems are held out." in caplog.text
    assert re.search(r"^pass@3 +\d", out, re.M)
    path.write_text(path.read_text().replace('"question": "', '"question": "8?", "other": "'))
    with pytest.raises(SystemExit):
        main(line)
    assert "problems.jsonl' repeat the problems that are held out. Pass a smaller one." in capsys.readouterr().err


def test_a_broken_pipe_is_no_mistake_in_the_options(line, monkeypatch):
    def closed(*_):
        raise BrokenPipeError

    monkeypatch.setattr(demo, "held_out_results", closed)
    with pytest.raises(BrokenPipeError):  # see tests/cli/test_main.py
        demo.main([*line[1:], "--max_steps", "1"])


def test_problems_that_do_not_count_are_named(line, tmp_path, capsys, caplog):
    answers = ["2", "\\text{}", *["2"] * 6, "2", "\\text{}", "2", "2"]
    path = Path(write_problems(tmp_path / "problems.jsonl", answers))
    path.write_text(path.read_text().replace('"10?"', json.dumps("1" * 3000)))
    assert main([*line, "--max_steps", "1"]) == 0
    out = capsys.readouterr().out
    assert "not sampled, and counted as unsolved: 1 row\n  row 10: it has 3003 tokens, but the context has" in out
    assert "not counted, because math-verify cannot parse the solution: 1 row (9)\n" in out
    assert out.index("not counted") < out.index("step ")
    assert "mean and 95 % interval over 3 problems" in out
    assert "cannot parse the solutions of 1 of 8 problems for training. They get no reward: row 1" in caplog.text


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--resume_from_checkpoint", "nowhere/checkpoint-1"], "There is no checkpoint 'nowhere/checkpoint-1'"),
        (["--resume_from_checkpoint", "True"], "no complete checkpoint in '.*out' to resume from"),
        (["--model_name_or_path", "out/typo"], "'out/typo' is not a directory and cannot be loaded from the Hub"),
        (["--model_name_or_path", ""], "`model_name_or_path` is empty"),
        (["--dataset_name", ""], "`dataset_name` is empty"),
        (["--dataset_name", "ds/none.csv"], "There is no file 'ds/none.csv'"),
        (["--output_dir", ""], "`output_dir` is empty"),
        (["--output_dir", "/sys"], "Cannot write to `output_dir='/sys'` .*[Pp]erm"),
        (["--output_dir", "problems.jsonl"], "Cannot write to `output_dir='problems.jsonl'` "),
        (["--dataset_name", "no_answers.jsonl"], "math-verify cannot parse any of the 8 solutions for training"),
    ],
)
def test_mistakes_are_found_before_anything_is_evaluated(options, message, line, tmp_path, capsys, monkeypatch):
    write_problems(tmp_path / "no_answers.jsonl", ["\\text{}"] * 8 + ["2"] * 4)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(demo, "evaluate_model", lambda *_, **__: pytest.fail("a model was evaluated"))
    with pytest.raises(SystemExit) as end:
        main([*line, *options])
    assert end.value.code == 2
    assert re.search(f"error: .*{message}", capsys.readouterr().err)


def assert_table_and_saved_model(output: str, directory: Path, steps: int) -> None:
    table = {line.split()[0]: line.split()[1:] for line in output.splitlines() if line}
    assert table["held-out"] == ["before", "after"]
    for name in ("pass@1", "pass@4"):
        before, _, _, after, _, _ = table[name]  # each with the ends of its interval
        assert 0 <= float(before) <= 1
        assert 0 <= float(after) <= 1
    assert f"{steps} steps in" in output
    assert AutoModelForCausalLM.from_pretrained(directory).num_parameters() > 0
    assert AutoTokenizer.from_pretrained(directory)("1+1").input_ids


def test_help(capsys):
    with pytest.raises(SystemExit) as end:
        main(["demo", "--help"])
    assert end.value.code == 0
    output = capsys.readouterr().out
    assert "--dataset_name" in output
    assert "--num_generations" in output


@pytest.mark.slow
def test_two_steps_of_arithmetic(tmp_path):
    output = run_demo(tmp_path, "--max_steps", "2", "--eval_size", "8", *SMALL)
    assert "step    2/2   reward" in output
    assert_table_and_saved_model(output, tmp_path / "a3po-demo", steps=2)
    assert "<title>" in (tmp_path / "a3po-demo" / "report.html").read_text()


@pytest.mark.slow
def test_two_steps_on_a_file_in_gsm8k_format_with_options_from_yaml(tmp_path):
    rows = [
        {"question": f"Ann has {n} 🍎 and buys {n}.", "answer": f"{n}+{n}=<<{n}+{n}={2 * n}>>\n#### {2 * n}"}
        for n in range(20)
    ]
    (tmp_path / "problems.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (tmp_path / "run.yaml").write_text(
        "dataset_name: problems.jsonl\nmax_steps: 2\noutput_dir: trained\neval_size: 4\n"
    )
    output = run_demo(tmp_path, "--config", "run.yaml", *SMALL)
    assert_table_and_saved_model(output, tmp_path / "trained", steps=2)


@pytest.mark.slow
def test_it_learns_at_its_defaults(tmp_path):
    output = run_demo(tmp_path)
    rates = {line.split()[0]: line.split() for line in output.splitlines() if line.startswith("pass@")}
    before, after = (float(rates["pass@1"][column]) for column in (1, 4))
    assert 0.1 <= before <= 0.4
    assert after >= 2 * before
    before, after = (float(rates["pass@8"][column]) for column in (1, 4))
    assert after >= before
