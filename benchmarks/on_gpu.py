"""
Runs the tests and benchmarks that need a GPU, in order of worth, and writes the results as it goes.

    python benchmarks/on_gpu.py --output gpu-results
    python benchmarks/on_gpu.py --output rehearsal --rehearse    # the same steps at tiny sizes, on a CPU

Each step is a command with its own time limit: a step that hangs does not take the time of the next. Its output
is in NAME.txt, and summary.txt has a line for each step. The same command again skips the steps that have ended well.
"""

import argparse
import os
import platform
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch


REPOSITORY = Path(__file__).parents[1]
NOT_SLOW = ["-m", "not slow and not vllm and not real"]
# With one process on the GPU
SHARDED = ["tests/engines/test_distributed.py", "tests/engines/test_sharded.py", "-k", "sharded"]


@dataclass(frozen=True)
class Step:
    """
    A command, without the interpreter.

    Args:
        name (`str`): Name of its file.
        limit (`int`): Seconds after which it is stopped.
        command (`list[str]`): On a GPU.
        rehearsal (`list[str]`): What is added in a rehearsal. The last value of an option counts.
    """

    name: str
    limit: int
    command: list[str]
    rehearsal: list[str]


def pytest(*arguments: str) -> list[str]:
    # What the versions of a machine warn of is not asked here.
    return ["-m", "pytest", "-q", "-rs", "-W", "default", "--numprocesses", "auto", *arguments]


def update(*arguments: str, program: Sequence[str] = ("benchmarks/update_throughput.py",)) -> list[str]:
    return [*program, "--device", "cuda", "--headline", "--repeats", "3", "--vocabulary", "151936", *arguments]


BLOCK_BY_BLOCK = """
import runpy, sys
sys.path.insert(0, "benchmarks")
from trl_a3po.update import attention
attention._VARLEN_PARAMETERS = set()
runpy.run_path("benchmarks/update_throughput.py", run_name="__main__")
"""


TINY = ["--device", "cpu", "--size", "tiny", "--repeats", "2", "--rows", "16", "--length", "8", "--longest", "16"]
SMALL = [*TINY, "--prompt", "8", "--micro-batch", "8", "--vocabulary", "512"]
GSM8K = ["--prompt", "110", "--length", "150", "--longest", "1024"]
LONG = ["--prompt", "2000", "--length", "1500", "--longest", "8192", "--rows", "24"]
# A dozen at a time share the GPU by `nvidia-cuda-mps-control -d`.
REAL = ["benchmarks/real/real_runs.py", "--preset", "gpu", "--jobs", "12", "--methods", "grpo", "dapo", "a3po"]
REAL += ["--output", "build/real-gpu-results"]
OVERHEAD = ["benchmarks/step_overhead.py", "--device", "cuda", "--vocabulary", "151936", "--repeats", "12"]

STEPS = [
    Step("tests_of_the_update", 150, pytest(*NOT_SLOW, "tests/update"), ["-k", "gpu"]),
    Step("update_1.5b", 90, update("--size", "1.5b", *GSM8K), SMALL),
    Step("update_1.5b_lora", 90, update("--size", "1.5b", "--lora", *GSM8K), SMALL),
    Step("update_1.5b_long", 120, update("--size", "1.5b", *LONG, "--micro-batch", "1", "--repeats", "2"), SMALL),
    Step("update_7b_lora", 120, update("--size", "7b", "--lora", *GSM8K), SMALL),
    Step("shaping", 60, ["benchmarks/shaping.py", "--device", "cuda"], ["--device", "cpu", "--repeats", "2"]),
    Step("step_overhead", 120, [*OVERHEAD, "--size", "1.5b", "--lora", *GSM8K, "--rows", "16"], SMALL),
    Step("update_1.5b_block_by_block", 90, update("--size", "1.5b", *GSM8K, program=("-c", BLOCK_BY_BLOCK)), SMALL),
    Step("update_1.5b_rows_of_one", 120, update("--size", "1.5b", *GSM8K, "--micro-batch", "1"), SMALL),
    Step("tests", 600, pytest(*NOT_SLOW), ["--collect-only"]),
    Step("real_model", 480, REAL, ["--help"]),
    Step("tests_of_sharding", 240, ["-m", "pytest", "-q", "-rs", "-m", "slow", *SHARDED], ["--collect-only"]),
]


def run(step: Step, output: Path, rehearse: bool) -> str:
    """Runs a step, and describes in a line how it ended."""
    environment = {**os.environ, "TEST_DEVICE": "cpu" if rehearse else "cuda", "PYTHONUNBUFFERED": "1"}
    command = [sys.executable, *step.command, *(step.rehearsal if rehearse else [])]
    start = time.monotonic()
    with (output / f"{step.name}.txt").open("w") as file:
        try:
            ended = subprocess.run(
                command, cwd=REPOSITORY, env=environment, stdout=file, stderr=subprocess.STDOUT, timeout=step.limit
            )
            status = "ended well" if ended.returncode == 0 else f"exit status {ended.returncode}"
        except subprocess.TimeoutExpired:
            status = "stopped at its limit"
    lines = (output / f"{step.name}.txt").read_text(errors="replace").splitlines()
    return f"{step.name}: {status} after {time.monotonic() - start:.0f} s: {lines[-1] if lines else ''}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True, help="directory of the results")
    parser.add_argument("--rehearse", action="store_true", help="tiny sizes, on a CPU; measures nothing")
    parser.add_argument("--steps", nargs="+", choices=[step.name for step in STEPS], metavar="STEP", help="only these")
    arguments = parser.parse_args()
    if not (arguments.rehearse or torch.cuda.is_available()):
        parser.error("torch finds no GPU. Add --rehearse to try the steps on a CPU.")
    arguments.output.mkdir(parents=True, exist_ok=True)
    device = platform.machine() if arguments.rehearse else torch.cuda.get_device_name()
    summary = arguments.output / "summary.txt"
    before = summary.read_text() if summary.exists() else ""
    for step in STEPS:
        is_chosen = arguments.steps is None or step.name in arguments.steps
        if not is_chosen or f"{step.name}: ended well" in before:
            continue
        line = f"{run(step, arguments.output, arguments.rehearse)} ({device}, torch {torch.__version__})"
        print(line, flush=True)
        with summary.open("a") as file:
            file.write(f"{line}\n")


if __name__ == "__main__":
    main()
