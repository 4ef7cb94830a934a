"""The demo as a program: run in a directory, with options that make it short."""

import os
import subprocess
import sys
from pathlib import Path

from trl_a3po.demo import arithmetic


START_MODEL = Path(arithmetic.__file__).parent / "start_model"
REPOSITORY = Path(__file__).parents[2]
SMALL = ["--per_device_train_batch_size", "8", "--num_generations", "4", "--eval_samples", "4", "--logging_steps", "1"]


def run_demo(tmp_path: Path, *options: str) -> str:
    environment = os.environ | {"PYTHONPATH": str(REPOSITORY), "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-m", "trl_a3po.cli", "demo", *options]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout
