"""
Train every method on the same task, from the same start, with the same rollouts to spend, for several seeds.

    python benchmarks/polarity/run.py --preset cpu --output polarity-results --jobs 2
    python benchmarks/polarity/analyse.py polarity-results

Each pair of method and seed writes one file when it is done. The same command resumes an interrupted run.
"""

import os


# Before torch is imported. Models this small gain nothing from threads; `--jobs` uses the cores.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")  # nothing here is on the Hub

import argparse
import json
import multiprocessing
import platform
import random
import re
import shutil
import subprocess
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
import transformers
import trl
from countdown import Problem, demonstrations, is_right, problems
from datasets import Dataset
from methods import DAPO, METHODS
from results import is_done
from stale_sampler import StaleSampler
from start_model import imitate, untrained_model, word_tokenizer
from transformers import PrinterCallback, TrainerCallback, set_seed

import trl_a3po
from trl_a3po import A3POConfig
from trl_a3po.evaluation.runs import sample_model


@dataclass(frozen=True)
class Preset:
    """The size of everything. All methods share it."""

    # The task
    numbers: int  # of a problem
    largest: int  # of these numbers
    attempts: int  # at most, of a demonstration
    max_completion_length: int
    held_out: int  # problems that are never trained on
    # What the start model imitates, see `demonstrations`
    aimed: float
    give_up: float
    miscalculated: float
    # The model, and its imitation
    hidden_size: int
    layers: int
    heads: int
    imitation_steps: int
    imitation_batch_size: int
    imitation_learning_rate: float
    # Reinforcement learning
    rollouts: int
    completions: int  # of a rollout
    num_generations: int
    updates: int  # optimizer steps on each rollout: with more than one, the clipping acts
    learning_rate: float
    # Evaluation on the held-out problems
    samples: int  # of each problem, at the end
    curve_samples: int  # of each problem, at `curve_points` moments of the training
    curve_points: int
    bf16: bool = False


CPU = Preset(
    numbers=3,
    largest=9,
    attempts=4,
    max_completion_length=32,
    held_out=128,
    aimed=0.3,
    give_up=0.5,
    miscalculated=0.02,
    hidden_size=96,
    layers=3,
    heads=4,
    imitation_steps=1200,
    imitation_batch_size=128,
    imitation_learning_rate=3e-3,
    rollouts=150,
    completions=128,
    num_generations=8,
    updates=4,
    learning_rate=1e-4,
    samples=64,
    curve_samples=8,
    curve_points=6,
)
PRESETS = {
    "cpu": CPU,
    # Whether what is explored pays later.
    "cpu-long": replace(CPU, rollouts=600, curve_points=12),
    # Never run in full by us.
    "gpu": replace(
        CPU,
        numbers=4,
        largest=12,
        max_completion_length=48,
        held_out=512,
        hidden_size=512,
        layers=8,
        heads=8,
        imitation_steps=10_000,
        imitation_batch_size=512,
        imitation_learning_rate=1e-3,
        rollouts=500,
        completions=1024,
        updates=4,
        learning_rate=2e-5,
        samples=256,
        bf16=True,
    ),
    # Every part, in seconds. Measures nothing.
    "dry": replace(
        CPU,
        held_out=4,
        hidden_size=16,
        layers=1,
        imitation_steps=3,
        imitation_batch_size=8,
        rollouts=1,
        completions=16,
        num_generations=4,
        curve_samples=2,
        curve_points=1,
    ),
}


# Start model


def start_path(output: Path, seed: int) -> Path:
    return output / f"start-{seed}.pt"


def make_start(preset: Preset, output: Path, seed: int) -> None:
    """Trains the start model of a seed by imitation, unless it is there."""
    path = start_path(output, seed)
    if path.exists():
        return
    torch.set_num_threads(1)
    set_seed(seed)
    model, tokenizer = new_model(preset)
    _, training = split(preset)
    stream = demonstrations(
        training,
        random.Random(seed),
        attempts=preset.attempts,
        aimed=preset.aimed,
        give_up=preset.give_up,
        miscalculated=preset.miscalculated,
    )
    imitate(
        model,
        tokenizer,
        stream,
        steps=preset.imitation_steps,
        batch_size=preset.imitation_batch_size,
        peak_learning_rate=preset.imitation_learning_rate,
    )
    with written_whole(path) as temporary:
        torch.save(model.state_dict(), temporary)


def new_model(preset: Preset):
    tokenizer = word_tokenizer(preset.largest)
    model = untrained_model(tokenizer, preset.hidden_size, preset.layers, preset.heads)
    return model.to("cuda" if torch.cuda.is_available() else "cpu"), tokenizer


def split(preset: Preset) -> tuple[list[Problem], list[Problem]]:
    """The held-out problems, and all others."""
    every = problems(preset.numbers, preset.largest)
    return every[: preset.held_out], every[preset.held_out :]


# One run


def row(problem: Problem) -> dict[str, Any]:
    prompt = [{"role": "user", "content": problem.prompt}]
    return {"prompt": prompt, "numbers": list(problem.numbers), "target": problem.target}


def reward(completions, numbers, target, **kwargs) -> list[float]:
    texts = (completion[0]["content"] for completion in completions)
    return [float(is_right(*each)) for each in zip(texts, numbers, target, strict=True)]


def right_answers(model, tokenizer, held_out: list[Problem], samples: int, max_completion_length: int) -> list[int]:
    """For each problem, how many of the samples, drawn at temperature 1, are right. The noise is always the same."""
    _, drawn = sample_model(
        model,
        tokenizer,
        [row(problem)["prompt"] for problem in held_out],
        num_samples=samples,
        max_completion_length=max_completion_length,
        batch_size=max(1, 1024 // samples),
    )
    return [
        sum(is_right(each.text, problem.numbers, problem.target) for each in completions)
        for problem, completions in zip(held_out, drawn, strict=True)
    ]


class HeldOutCurve(TrainerCallback):
    """pass@1 on the held-out problems, at the start and then in equal distances."""

    def __init__(self, score, points: int):
        self.points, self.score, self.values = points, score, {}

    def on_train_begin(self, args, state, control, **kwargs):
        self.values[0] = self.score()

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step % max(1, state.max_steps // self.points) == 0:
            self.values[state.global_step] = self.score()


# What is kept of TRL's metrics, and what it is called in the results.
CURVES = {
    "reward": "reward",
    "entropy": "entropy",
    "completions/mean_length": "length",
    "completions/clipped_ratio": "truncated",
    "clip_ratio/region_mean": "clipped",
    "frac_reward_zero_std": "groups_without_spread",
    # Where it is known
    "a3po/positive/selected_mismatch": "mismatch_positive",
    "a3po/negative/selected_mismatch": "mismatch_negative",
    "a3po/scale/positive_low": "scale",
}
LOGS = 25  # of a run, about


def run(preset: Preset, output: Path, method_name: str, seed: int) -> None:
    """Trains and evaluates, and writes the result."""
    torch.set_num_threads(1)
    method = METHODS[method_name]
    held_out, training = split(preset)
    model, tokenizer = new_model(preset)
    model.load_state_dict(torch.load(start_path(output, seed)))
    steps = preset.rollouts * preset.updates
    with tempfile.TemporaryDirectory() as directory, warnings.catch_warnings():
        warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")
        warnings.filterwarnings("ignore", "You are using 'rollout_func'")
        settings = {
            "learning_rate": preset.learning_rate,
            "lr_scheduler_type": "constant",
            "max_steps": steps,
            "per_device_train_batch_size": preset.completions // preset.updates,
            "steps_per_generation": preset.updates,
            "num_generations": preset.num_generations,
            "max_completion_length": preset.max_completion_length,
            "temperature": 1.0,
            "beta": 0.0,
            "seed": seed,
            **DAPO,
            **method.settings,
        }
        config = A3POConfig(
            directory,
            **settings,
            use_cpu=not torch.cuda.is_available(),
            bf16=preset.bf16,
            gradient_checkpointing=False,
            logging_steps=preset.updates * max(1, preset.rollouts // LOGS),  # TRL logs rewards once a rollout
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            dataloader_pin_memory=False,
        )
        trainer = method.trainer(
            model,
            reward,
            config,
            train_dataset=Dataset.from_list([row(problem) for problem in training]),
            processing_class=tokenizer,
            rollout_func=method.stale and StaleSampler(method.stale),
        )
        trainer.remove_callback(PrinterCallback)
        score = partial(right_answers, model, tokenizer, held_out, max_completion_length=preset.max_completion_length)
        curve = HeldOutCurve(
            lambda: sum(score(preset.curve_samples)) / (len(held_out) * preset.curve_samples), preset.curve_points
        )
        trainer.add_callback(curve)
        began = time.perf_counter()
        trainer.train()
        seconds = time.perf_counter() - began
    right = score(preset.samples)
    logs = [log for log in trainer.state.log_history if "reward" in log]
    result = {
        "method": method_name,
        "seed": seed,
        "preset": asdict(preset),
        "settings": settings,
        "curves": {
            "step": [log["step"] for log in logs],
            **{
                name: [round(log[key], 4) for log in logs if key in log]
                for key, name in CURVES.items()
                if any(key in log for log in logs)
            },
        },
        "held_out_curve": {"step": list(curve.values), "pass@1": [round(value, 4) for value in curve.values.values()]},
        "held_out": {"samples": preset.samples, "right": right},
        "train_seconds": round(seconds, 1),
        **surroundings(),
    }
    with written_whole(output / f"{method_name}-{seed}.json") as temporary:
        temporary.write_text(json.dumps(result, separators=(",", ":")) + "\n")


@contextmanager
def written_whole(path: Path) -> Iterator[Path]:
    """A path to write to, that takes the place of `path` once it is whole."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    yield temporary
    temporary.replace(path)


def surroundings() -> dict[str, Any]:
    here = Path(trl_a3po.__file__).parent  # the code that runs, which need not be the one beside this file
    describe = ["git", "describe", "--always", "--dirty"]
    commit = subprocess.run(describe, cwd=here, capture_output=True, text=True).stdout if shutil.which("git") else ""
    cpuinfo = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    models = re.findall(r"model name\s*: (.*)", cpuinfo)
    return {
        "commit": commit.strip() or "unknown",
        "hardware": torch.cuda.get_device_name() if torch.cuda.is_available() else models[0] if models else "CPU",
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "trl": trl.__version__,
            "trl_a3po": trl_a3po.__version__,
        },
    }


# All runs


def failure(work: Callable[[], None]) -> str | None:
    """So that one run that fails does not end the others."""
    try:
        work()
    except Exception:
        return traceback.format_exc()
    return None


def work_off(tasks: dict[str, Callable[[], None]], jobs: int) -> bool:
    """In order, `jobs` at a time, each in a process that is kept. Returns whether all went well."""
    well, done = True, 0
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(jobs, context) if jobs > 1 else nullcontext() as pool:
        results = (pool.map if pool else map)(failure, tasks.values())
        for name, error in zip(tasks, results, strict=True):
            done += 1
            print(f"{done}/{len(tasks)} {name}{' failed:' if error else ''}", *filter(None, [error]), flush=True)
            well = well and not error
    return well


def main(line: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", choices=PRESETS, default="cpu")
    parser.add_argument("--output", type=Path, default=Path("polarity-results"), help="directory of the results")
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS), metavar="METHOD")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2, 3, 4], metavar="SEED")
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time, each on one thread")
    arguments = parser.parse_args(line)
    preset, output, seeds = PRESETS[arguments.preset], arguments.output, arguments.seeds
    output.mkdir(parents=True, exist_ok=True)

    starts = {f"start of seed {seed}": partial(make_start, preset, output, seed) for seed in seeds}
    shared = {"preset": asdict(preset)}
    missing = [(seed, name) for seed in seeds for name in arguments.methods if not is_done(output, name, seed, shared)]
    runs = {f"{name}, seed {seed}": partial(run, preset, output, name, seed) for seed, name in missing}
    return 0 if work_off(starts, arguments.jobs) and work_off(runs, arguments.jobs) else 1


if __name__ == "__main__":
    sys.exit(main())
