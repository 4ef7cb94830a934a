"""The benchmark on a pretrained model: every part on a tiny one, resumed after a kill, and the verdicts."""

import json
import os
import runpy
import shutil
import signal
import subprocess
import sys
import time
from collections import defaultdict
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest

from trl_a3po.training.checkpoint_files import is_complete


FOLDER = Path(__file__).parents[2] / "benchmarks" / "real"
CLAIMS = runpy.run_path(str(FOLDER / "real_claims.py"))
EXAMPLE = Path(__file__).parents[2] / "examples" / "smollm2"


@pytest.fixture
def run(model_dir, tmp_path):
    def run(*options, **started):
        line = [sys.executable, FOLDER / "real_runs.py", "--preset", "dry", "--model", model_dir, "--output", "out"]
        line = [*map(str, line), "--work", "work", *options]
        path = os.pathsep.join([str(FOLDER.parents[1]), *filter(None, [os.getenv("PYTHONPATH")])])
        return subprocess.Popen(line, cwd=tmp_path, env={**os.environ, "PYTHONPATH": path}, **started)

    return run


@pytest.mark.slow
def test_a_killed_run_continues_and_the_analysis_reads_it(run, model_dir, tmp_path, capsys):
    options = ["--methods", "stare", "--seeds", "0"]
    process = run(*options, start_new_session=True)
    checkpoint, deadline = tmp_path / "work/dry/stare-0/model/checkpoint-2", time.monotonic() + 300
    while not (checkpoint.exists() and is_complete(checkpoint)) and time.monotonic() < deadline:
        assert process.poll() is None
        time.sleep(0.01)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    assert not list((tmp_path / "out").glob("*.json"))
    assert run(*options).wait() == 0
    (path,) = (tmp_path / "out").glob("*.json")
    assert path.name == "stare-0.json"
    result = json.loads(path.read_text())
    assert result["curves"]["step"] == [1, 2, 3, 4]
    assert len(result["curves"]["entropy"]) == 4
    assert len(result["curves"]["reward"]) == len(result["curves"]["length"]) == 2  # rollouts
    assert [start["step"] for start in result["starts"]] == [0, 2]
    assert result["model"] == str(model_dir)
    start = result["start"]
    for each, problems in ((result["held_out"], 4), (result["other"], 2), (start["test"], 4), (start["other"], 2)):
        assert each["samples"] == 32
        assert len(each["right"]) == problems
    assert not list((tmp_path / "work/dry").glob("stare-0"))
    before = path.stat().st_mtime_ns
    assert run(*options).wait() == 0  # all is there
    assert path.stat().st_mtime_ns == before
    CLAIMS["main"]([str(tmp_path / "out")])
    text = (tmp_path / "out" / "claims.md").read_text()
    assert text in capsys.readouterr().out
    assert "| `start` | 1 |" in text
    assert "| `stare` | 1 |" in text


@pytest.fixture
def runs(monkeypatch):
    """The program's functions."""
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.setenv("OMP_NUM_THREADS", "1")  # else it sets it
    return runpy.run_path(str(FOLDER / "real_runs.py"))


@pytest.fixture
def gsm8k(monkeypatch):
    """The functions of the program that prepares GSM8K."""
    monkeypatch.setattr(sys, "path", [*sys.path, str(FOLDER)])
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    return runpy.run_path(str(FOLDER / "prepare_gsm8k.py"))


def test_the_entropy_of_all_completions_is_that_of_the_sampled_tokens(runs, monkeypatch):
    class Sampled:
        def __init__(self):
            self._metrics = {"train": defaultdict(list)}

        def _generate_single_turn(self, prompt_ids):
            return [[3, 4], [5]], [[-1.0, -2.0], [-6.0]]

    monkeypatch.setitem(runs["with_entropy_of_all"].__globals__, "HAS_VLLM", True)
    trainer = runs["with_entropy_of_all"](Sampled)()
    assert trainer._generate_single_turn([]) == ([[3, 4], [5]], [[-1.0, -2.0], [-6.0]])
    assert trainer._metrics["train"][runs["ENTROPY_OF_ALL"]] == [3.0]


def test_a_run_does_not_continue_with_another_model(runs, tmp_path):
    runs["note_start"](tmp_path, model="one", settings={"seed": 0})
    (tmp_path / "model" / "checkpoint-10").mkdir(parents=True)  # not complete
    runs["note_start"](tmp_path, model="one", settings={"seed": 0})
    assert [start["step"] for start in runs["read_starts"](tmp_path)] == [0, 0]
    with pytest.raises(ValueError, match=r"begun with `model` one, not two.*`--work`"):
        runs["note_start"](tmp_path, model="two", settings={"seed": 0})
    with pytest.raises(ValueError, match=r"begun with `settings` \{'seed': 0\}, not \{'seed': 1\}"):
        runs["note_start"](tmp_path, model="one", settings={"seed": 1})


def test_no_run_at_a_time_is_an_error(runs, capsys):
    with pytest.raises(SystemExit):
        runs["main"](["--jobs", "0"])
    assert "1 or more, got 0" in capsys.readouterr().err


def test_nothing_is_trained_if_the_start_cannot_be_evaluated(runs, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    started = []

    def fails(line, **kwargs):
        started.append(line)
        raise subprocess.CalledProcessError(2, line)

    monkeypatch.setattr(runs["subprocess"], "run", fails)
    with pytest.raises(subprocess.CalledProcessError):
        runs["main"](["--preset", "dry", "--model", "model", "--methods", "grpo", "--output", "out"])
    assert len(started) == 1
    assert "eval" in started[0]


def results(effects, seeds=5):
    """Results in which `effects` are added to a common level: of method and statistic."""
    methods = {each for claim in CLAIMS["CLAIMS"] for each in claim.comparisons}
    made = {}
    for method in {name for each in methods for name in (each.left, each.right)} - {"start"}:
        made[method] = {}
        for seed in range(seeds):
            right = [round(1000 * (0.5 + seed / 100 + effects.get((method, "pass"), 0.0)))] * 20
            scores = {"samples": 1000, "right": right}
            start = {"samples": 1000, "right": [round(1000 * (0.4 + seed / 100))] * 20}
            entropy = [0.3, *[0.1 + seed / 1000 + effects.get((method, "entropy"), 0.0)] * 9]
            made[method][seed] = {
                "curves": {"entropy": entropy, "length": [20.0] * 10, "reward": [0.5] * 10},
                "held_out": scores,
                "other": scores,
                "start": {"test": start, "other": start},
            }
    return CLAIMS["with_start"](made)


def verdicts(made, claims="CLAIMS"):
    compare, verdict = CLAIMS["claim_table"].__globals__["compare"], CLAIMS["claim_table"].__globals__["claim_verdict"]
    return [verdict([compare(made, each).verdict for each in claim.comparisons]) for claim in CLAIMS[claims]]


def test_known_effects_are_found():
    better = {("a3po", "pass"): 0.1, ("a3po_grpo", "pass"): 0.1, ("a3po", "entropy"): 0.05}
    _, entropy, *others, stare = verdicts(results({**better, ("a3po_grpo", "entropy"): 0.05}))
    assert [entropy, *others, stare] == ["reproduced"] * 7
    worse = {name: -effect for name, effect in better.items()}
    _, entropy, *others, stare = verdicts(results(worse))
    assert [entropy, *others, stare] == ["contradicted"] * 7


def test_the_other_kind_is_another_set_of_problems():
    made = results({})
    for seed, result in made["a3po"].items():
        result["other"] = {"samples": 1000, "right": [round(1000 * (0.3 + seed / 100))] * 20}
    assert verdicts(CLAIMS["of_the_other_kind"](made), "CLAIMS_OF_THE_OTHER_KIND") == ["contradicted"]
    assert verdicts(made, "CLAIMS_OF_THE_OTHER_KIND") == ["reproduced"]


@pytest.mark.parametrize("kinds", [["sums"], ["sums", "differences"]])
def test_no_problem_is_in_two_files_and_every_answer_is_right(kinds, tmp_path):
    write = runpy.run_path(str(EXAMPLE / "problems.py"))["write"]
    write(tmp_path, kinds, 60)
    files = {path.stem: [json.loads(line) for line in path.read_text().splitlines()] for path in tmp_path.iterdir()}
    assert {name: len(rows) for name, rows in files.items() if name != "train"} == {
        "test": 60,
        "other": 60,
        "worked_examples": 3,
    }
    assert len(files["train"]) > 3000
    rows = [row for rows in files.values() for row in rows]
    calculations = [row["question"].removeprefix("What is ").removesuffix("?") for row in rows]
    assert len({frozenset(each.split()) for each in calculations}) == len(rows)
    for row, calculation in zip(rows, calculations, strict=True):
        assert eval(calculation) > 0
        assert f"\\boxed{{{eval(calculation)}}}" in row["answer"]
    written = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    write(tmp_path, kinds, 60)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == written  # the same ones


def test_solutions_of_gsm8k_are_written_as_the_reward_reads_them(gsm8k):
    text = gsm8k["worked_out"]("She sold 48/2 = <<48/2=24>>24 clips in May.\nThat is <<48+24=72>>72 in all.\n#### 72")
    assert text == "She sold 48/2 = 24 clips in May.\nThat is 72 in all.\nThe answer is \\boxed{72}."


def test_gsm8k_without_its_model_is_an_error_that_says_what_to_run(runs, monkeypatch, tmp_path, capsys):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit):
        runs["main"](["--preset", "gsm8k"])
    assert "First run `python benchmarks/real/prepare_gsm8k.py`" in capsys.readouterr().err


@pytest.mark.slow
def test_gsm8k_is_prepared_and_trained_on(gsm8k, runs, model_dir, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    dataset = tmp_path / "dataset"
    dataset.mkdir()
    for split in ("train", "test"):
        rows = [{"question": f"{split} {n} + 1?", "answer": f"{n} + 1 = {n + 1}\n#### {n + 1}"} for n in range(8)]
        (dataset / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    monkeypatch.setitem(gsm8k["fine_tune"].__globals__, "SFTConfig", partial(gsm8k["SFTConfig"], bf16=False))
    options = ["--dataset", str(dataset), "--model", str(model_dir), "--held_out", "2", "--max_steps", "1"]
    gsm8k["main"](options)
    problems = tmp_path / "build/gsm8k/problems"
    assert len((problems / "train.jsonl").read_text().splitlines()) == 8
    assert [json.loads(line)["question"] for line in (problems / "test.jsonl").read_text().splitlines()] == [
        "test 0 + 1?",
        "test 1 + 1?",
    ]
    preset = replace(
        runs["PRESETS"]["gsm8k"], steps=2, completions=8, num_generations=4, max_completion_length=4, samples=2
    )
    work = tmp_path / "work"
    shutil.copytree(problems, work / "problems")
    runs["train"](preset, str(tmp_path / "build/gsm8k/model"), "a3po", 0, work / "a3po-0")
    runs["note_start"](work / "a3po-0", model=None)
    start = {"test": {"samples": 2, "right": [0, 0]}}
    result = tmp_path / "a3po-0.json"
    runs["write_result"](result, preset, None, start, "a3po", 0, work / "a3po-0")
    written = json.loads(result.read_text())
    assert written["curves"]["step"] == [1, 2]
    assert len(written["held_out"]["right"]) == 2
    assert "other" not in written


def test_without_problems_of_another_kind_the_analysis_is_of_the_held_out_ones():
    made = {name: by_seed for name, by_seed in results({}).items() if name != "start"}
    surrounded = {"commit": "c", "hardware": "h", "versions": {}, "train_seconds": 1.0}
    for by_seed in made.values():
        for result in by_seed.values():
            result.update(surrounded)
            result["held_out"] = result["start"]["test"] = {"samples": 32, "right": [3] * 20}
    with_other = CLAIMS["report"](made, "results")
    for by_seed in made.values():
        for result in by_seed.values():
            del result["other"], result["start"]["other"]
    without = CLAIMS["report"](made, "results")
    assert with_other.count("of a kind that is not trained on") == 2
    assert "of a kind that is not trained on" not in without
