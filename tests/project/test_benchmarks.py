"""The benchmarks run, at a size that measures nothing, and end with the line that they promise."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest


BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
SMALL = ["--rows", "16", "--length", "8", "--longest", "16", "--repeats", "2"]


def lines(script, *options):
    result = subprocess.run([sys.executable, BENCHMARKS / script, *SMALL, *options], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    return result.stdout.splitlines()


def figures(line):
    return [float(figure) for figure in re.findall(r"\d+\.\d+|\d+", line)]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("line", "name"),
    [
        (["step_overhead.py", "--lora"], "ratio"),
        (["update_throughput.py", "--headline"], "speedup"),
        (["update_throughput.py", "--whole-steps"], "speedup"),
    ],
)
def test_benchmarks_end_with_their_figure(line, name):
    assert re.fullmatch(rf"{name}: \d+\.\d+", lines(*line)[-1])


@pytest.mark.slow
def test_the_positions_that_are_counted_are_those_that_the_model_computes(model_dir, tmp_path):
    """On a real model with real problems, which has another number of distinct positions than made-up prompts."""
    problems = tmp_path / "problems.jsonl"
    problems.write_text(
        "".join(json.dumps({"question": f"{n} * 11 =", "answer": f"#### {11 * n}"}) + "\n" for n in (2, 300, 4000))
    )
    real = ["--model", model_dir, "--problems", problems]
    measured = lines("update_throughput.py", "--headline", "--micro-batch", "2", *real)[-2]
    counted = lines("update_throughput.py", "--count-only", *real)
    assert [line.split()[0] for line in counted[-5:]] == ["1", "2", "4", "8", "16"]
    theirs, ours = figures(measured)[5:7]
    # Of two rollouts, the first of which is the measured one: the quartiles of two figures lie around them.
    _, _, low_theirs, high_theirs, _, low_ours, high_ours = figures(counted[-4])
    assert low_theirs <= theirs <= high_theirs
    assert low_ours <= ours <= high_ours


def test_problems_need_the_chat_template_of_a_model(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import update_throughput

    monkeypatch.setattr(sys, "argv", ["update_throughput.py", "--problems", "x.jsonl"])
    with pytest.raises(SystemExit, match="add --model DIR"):
        update_throughput.main()


def test_the_steps_for_a_gpu_are_run_one_by_one(tmp_path, monkeypatch, capsys):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import on_gpu

    names = ("good", "bad", "endless")
    codes = ("import os; print('figure', os.environ['TEST_DEVICE'])", "1 / 0", "import time; time.sleep(60)")
    steps = [on_gpu.Step(name, 5, ["-c", code], []) for name, code in zip(names, codes, strict=True)]
    monkeypatch.setattr(on_gpu, "STEPS", steps)
    monkeypatch.setattr(sys, "argv", ["on_gpu.py", "--output", str(tmp_path), "--rehearse"])
    on_gpu.main()
    good, bad, endless = (tmp_path / "summary.txt").read_text().splitlines()
    assert re.search(r"^good: ended well after \d s: figure cpu \(", good)
    assert re.search(r"^bad: exit status 1 after \d s: ZeroDivisionError", bad)
    assert endless.startswith("endless: stopped at its limit")
    capsys.readouterr()
    monkeypatch.setattr(on_gpu, "STEPS", steps[:2])
    on_gpu.main()
    assert capsys.readouterr().out.startswith("bad:")  # the good one is not run again
