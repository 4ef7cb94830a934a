"""The benchmarks run, at a size that measures nothing, and end with the line that they promise."""

import re
import subprocess
import sys
from pathlib import Path

import pytest


BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
SMALL = ["--rows", "16", "--length", "8", "--longest", "16", "--repeats", "2"]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("line", "name"),
    [
        (["step_overhead.py", "--lora", *SMALL], "ratio"),
        (["update_throughput.py", "--headline", *SMALL], "speedup"),
        (["update_throughput.py", "--whole-steps", *SMALL], "speedup"),
    ],
)
def test_benchmarks_end_with_their_figure(line, name):
    result = subprocess.run([sys.executable, BENCHMARKS / line[0], *line[1:]], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert re.fullmatch(rf"{name}: \d+\.\d+", result.stdout.splitlines()[-1])
