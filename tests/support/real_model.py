"""SmolLM2-135M-Instruct from the package index, and a few problems of its size."""

import runpy
from pathlib import Path

import pytest
from filelock import FileLock


REPOSITORY = Path(__file__).parents[2]
# Not tracked, and kept between runs.
CHECKPOINT = REPOSITORY / "build" / "smollm2"

EXAMPLES = [
    {
        "question": f"Tom's shop sells {a} cakes on Monday & {b} on Tuesday. How many cakes is that in all?",
        "answer": f"{a} + {b} = {a + b}. The answer is \\boxed{{{a + b}}}.",
    }
    for a, b in [(10, 4), (23, 7)]
]
# With columns, words and marks as in GSM8K.
PROBLEMS = [
    {
        "question": f"Mia's café sells {a} muffins on Monday & {b} on Tuesday. How many muffins is that in all?",
        "answer": f"In all it sells {a} + {b} = <<{a}+{b}={a + b}>>{a + b} muffins.\n#### {a + b}",
    }
    for a, b in [(12, 5), (30, 14), (21, 8), (17, 11), (40, 9), (25, 6)]
]


def checkpoint():
    """Its directory. Skips the test if the package cannot be reached."""
    program = runpy.run_path(str(REPOSITORY / "examples" / "smollm2" / "checkpoint.py"))
    CHECKPOINT.parent.mkdir(exist_ok=True)
    try:
        with FileLock(f"{CHECKPOINT}.lock"):  # processes of one run share it
            return str(program["make_checkpoint"](CHECKPOINT))
    except program["UnreachableError"] as error:
        pytest.skip(f"no real model: {error}")
