"""
Train SmolLM2-135M with GRPO, DAPO and A3PO on the same problems, several seeds each, and evaluate every run.

    python benchmarks/real/real_runs.py --output benchmarks/real/results
    python benchmarks/real/real_claims.py benchmarks/real/results

Each pair of method and seed writes one small file when it is done. The same command resumes after an interruption, a
run in the middle too: from its last checkpoint, or from the last batch of its evaluation. If vLLM is installed, it
generates; on a CPU that takes the environment of `make test-vllm`. `--jobs 2` does two runs at a time.
"""

import argparse
import importlib.util
import json
import os
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import asdict, dataclass, replace
from importlib.metadata import version
from pathlib import Path


sys.path.extend(
    str(Path(__file__).parents[2] / folder) for folder in ("benchmarks/polarity", "examples/smollm2", "tests")
)
# Before torch is imported. The small benchmark wants one thread; here, a run has its share of the cores.
os.environ.setdefault("OMP_NUM_THREADS", str(os.cpu_count()))

import torch
from checkpoint import make_checkpoint
from datasets import Dataset
from methods import DAPO, METHODS, Method, peer
from problems import write
from results import is_done
from run import CURVES, surroundings, written_whole
from train import ON_CPU

from trl_a3po import A3POConfig, A3POTrainer
from trl_a3po.evaluation.problems import load_problems
from trl_a3po.evaluation.worked_examples import check_no_overlap, load_worked_examples
from trl_a3po.rewards import accuracy_reward
from trl_a3po.training.checkpoint_files import STATE_FILE, checkpoints_in, is_complete


HAS_VLLM = importlib.util.find_spec("vllm") is not None


# Settings and shaping are those of the small benchmark. Five seeds for the methods that are compared with each other,
# three for controls.
SEEDS = {
    **dict.fromkeys(["grpo", "dapo", "a3po", "a3po_grpo"], 5),
    **dict.fromkeys(["a3po_constant", "reversed", "random", "stare"], 3),
}
# With the target of STARE's authors, not that of the small benchmark.
CHOSEN = {**{name: METHODS[name] for name in SEEDS}, "stare": peer("stare", target_entropy=0.3)}


GSM8K = Path("build", "gsm8k")  # where prepare_gsm8k.py writes
EXAMPLES = "worked_examples.jsonl"  # where there are any
ENTROPY_OF_ALL = "entropy_of_all"  # a metric of these runs
STARTS = "starts.jsonl"  # of an unfinished run: a line for each start of its training
SAMPLER = "vllm" if HAS_VLLM else "transformers"


@dataclass(frozen=True)
class Preset:
    """The size of everything. All methods share it."""

    # Of problems, see examples/smollm2/problems.py. Without any, the problems are those that prepare_gsm8k.py wrote.
    kinds: tuple[str, ...] = ("sums", "differences")
    held_out: int = 64  # problems of these kinds
    other: int = 32  # problems with larger numbers
    steps: int = 100
    completions: int = 64  # of a step
    updates: int = 2  # on one rollout: with more than one, the clipping acts
    num_generations: int = 8
    micro_batch: int = 8
    max_completion_length: int = 48
    learning_rate: float = 1e-5
    samples: int = 32  # of each held-out problem
    save_steps: int = 10  # whole rollouts


PRESETS = {
    "cpu": Preset(),
    # The same runs on a GPU, a dozen at a time. There, a checkpoint takes longer than the steps after it.
    "gpu": replace(Preset(), micro_batch=4, save_steps=1000),
    # GSM8K on a GPU, from the model that prepare_gsm8k.py wrote.
    "gsm8k": replace(
        Preset(),
        kinds=(),
        held_out=192,
        other=0,
        steps=60,
        completions=256,
        micro_batch=4,
        max_completion_length=192,
        learning_rate=2e-5,
        save_steps=1000,
    ),
    # Every part, in a minute on a tiny model. Measures nothing.
    "dry": replace(
        Preset(),
        held_out=4,
        other=2,
        steps=4,
        completions=8,
        num_generations=4,
        micro_batch=8,
        max_completion_length=4,
        save_steps=2,
    ),
}


def train(preset: Preset, model: str, method_name: str, seed: int, work: Path) -> None:
    """Trains to the end, from the last checkpoint if there is one."""
    method = CHOSEN[method_name]
    directory = work.parent / "problems"
    examples = load_worked_examples(str(directory / EXAMPLES)) if (directory / EXAMPLES).exists() else []
    problems: Dataset = load_problems(str(directory / "train.jsonl"), "train", worked_examples=examples)
    check_no_overlap(problems, examples, "to train on")
    settings = settings_of(preset, method, seed)
    config = A3POConfig(
        str(work / "model"),
        **settings,
        gradient_accumulation_steps=preset.completions // preset.micro_batch,
        use_cpu=not torch.cuda.is_available(),
        bf16=False,
        tf32=torch.cuda.is_available() or None,
        model_init_kwargs={"dtype": "float32"},
        gradient_checkpointing=False,
        logging_steps=1,
        save_steps=preset.save_steps,
        save_total_limit=1,
        report_to="none",
        dataloader_pin_memory=False,
        **({"use_vllm": True, "vllm_mode": "colocate", "vllm_max_model_length": 512} if HAS_VLLM else {}),
        **({"vllm_gpu_memory_utilization": 0.05} if HAS_VLLM and not torch.cuda.is_available() else {}),
    )
    with engines():
        trainer = with_entropy_of_all(method.trainer)(model, accuracy_reward, config, train_dataset=problems)
        trainer.train(resume_from_checkpoint=any(map(is_complete, checkpoints_in(work / "model"))))
    trainer.save_model()
    trainer.save_state()


def with_entropy_of_all(trainer: type[A3POTrainer]) -> type[A3POTrainer]:
    """The trainer, which with vLLM also logs the entropy of all completions: the mean of -log p of their tokens."""
    if not HAS_VLLM:
        return trainer

    class WithEntropyOfAll(trainer):
        # Here, not where the rollout is made: if a subclass reads that, the trainer computes more of it.
        def _generate_single_turn(self, *args, **kwargs):
            _, logprobs, *_ = output = super()._generate_single_turn(*args, **kwargs)
            every = [logprob for of_completion in logprobs for logprob in of_completion]
            self._metrics["train"][ENTROPY_OF_ALL].append(-sum(every) / len(every))
            return output

    return WithEntropyOfAll


def engines():
    """Engines of vLLM's CPU build take new weights in here."""
    if not HAS_VLLM or torch.cuda.is_available():
        return nullcontext()
    from support import vllm_on_cpu

    return vllm_on_cpu.engines()


def settings_of(preset: Preset, method: Method, seed: int) -> dict:
    return {
        "learning_rate": preset.learning_rate,
        "lr_scheduler_type": "constant",
        "max_steps": preset.steps,
        "per_device_train_batch_size": preset.micro_batch,
        "num_generations": preset.num_generations,
        "num_iterations": preset.updates,
        "max_completion_length": preset.max_completion_length,
        "temperature": 1.0,
        "beta": 0.0,
        "seed": seed,
        **DAPO,
        "trim_padding": True,
        # The entropy of a method is that of all its completions. TRL's is over the rows that are computed. Those of
        # GSM8K are so many that only the ones with an advantage are.
        "skip_zero_advantage": HAS_VLLM or not preset.kinds,
        **method.settings,
    }


def evaluate(preset: Preset, model: str, work: Path, name: str) -> dict:
    """Samples the problems of a file, unless that is done. How many samples of each are right."""
    problems, output = work.parent / "problems", work / name
    on_gpu = torch.cuda.is_available()
    line = [sys.executable, "-m", "trl_a3po.cli", "eval", "--model_name_or_path", model]
    line += ["--dataset_name", str(problems / f"{name}.jsonl"), "--output_dir", str(output)]
    if (problems / EXAMPLES).exists():
        line += ["--worked_examples", str(problems / EXAMPLES)]
    line += ["--num_samples", str(preset.samples)]
    line += ["--max_completion_length", str(preset.max_completion_length), "--temperature", "1", "--top_p", "1"]
    line += ["--batch_size", "32", "--dtype", "bfloat16"] if on_gpu else ["--batch_size", "8", "--dtype", "float32"]
    if HAS_VLLM:
        line += ["--use_vllm", *([] if on_gpu else ["--gpu_memory_utilization", "0.05"])]
    subprocess.run(line, check=True)
    records = [json.loads(each) for each in (output / "samples.jsonl").read_text().splitlines()]
    return {"samples": preset.samples, "right": [int(sum(record["correct"])) for record in records]}


def note_start(work: Path, **chosen) -> None:
    """
    Notes the step and the commit at which a training starts or continues.

    Raises:
        `ValueError`: What is `chosen`, such as the model, was something else when the training was begun.
    """
    chosen = json.loads(json.dumps(chosen))
    for start in read_starts(work):
        for name, value in chosen.items():
            if start[name] != value:
                raise ValueError(
                    f"'{work}' was begun with `{name}` {start[name]}, not {value}. Pass that one, or another `--work`."
                )
    steps = [int(each.name.rpartition("-")[2]) for each in checkpoints_in(work / "model") if is_complete(each)]
    work.mkdir(parents=True, exist_ok=True)
    with (work / STARTS).open("a") as file:
        file.write(json.dumps({**chosen, "step": max(steps, default=0), "commit": surroundings()["commit"]}) + "\n")


def read_starts(work: Path) -> list[dict]:
    path = work / STARTS
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def write_result(
    path: Path, preset: Preset, model: str | None, start: dict, method_name: str, seed: int, work: Path
) -> None:
    state = json.loads((work / "model" / STATE_FILE).read_text())
    logs = [log for log in state["log_history"] if "step_time" in log]
    # Rewards and lengths are known once a rollout, the others at every step.
    keys = {**CURVES, **({ENTROPY_OF_ALL: "entropy"} if HAS_VLLM else {})}
    curves = {name: [round(log[key], 4) for log in logs if key in log] for key, name in keys.items()}
    trained = str(work / "model")
    around = surroundings()
    if HAS_VLLM:
        around["versions"]["vllm"] = version("vllm")
    result = {
        "method": method_name,
        "seed": seed,
        "preset": asdict(preset),
        "settings": settings_of(preset, CHOSEN[method_name], seed),
        "curves": {"step": [log["step"] for log in logs], **{name: each for name, each in curves.items() if each}},
        "held_out": evaluate(preset, trained, work, "test"),
        **({"other": evaluate(preset, trained, work, "other")} if preset.other else {}),
        "start": start,
        "train_seconds": round(sum(log["step_time"] for log in logs), 1),
        "model": model,
        "sampler": SAMPLER,
        "starts": [{name: start[name] for name in ("step", "commit")} for start in read_starts(work)],
        **around,
    }
    with written_whole(path) as temporary:
        temporary.write_text(json.dumps(result, separators=(",", ":")) + "\n")


def main(line=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", choices=PRESETS, default="cpu")
    parser.add_argument("--model", help="directory of a model; by default SmolLM2-135M, which is downloaded once")
    parser.add_argument("--output", type=Path, default=Path("real-results"), help="directory of the results")
    parser.add_argument("--work", type=Path, default=Path("build", "real-runs"), help="checkpoints of unfinished runs")
    parser.add_argument("--methods", nargs="+", choices=SEEDS, default=list(SEEDS), metavar="METHOD")
    parser.add_argument(
        "--seeds", nargs="+", type=int, metavar="SEED", help="by default 0 to 4, or 0 to 2 of controls"
    )
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time, which share the cores")
    parser.add_argument("--train", nargs=2, metavar=("METHOD", "SEED"), help=argparse.SUPPRESS)  # in its own process
    arguments = parser.parse_args(line)
    if arguments.jobs < 1:
        parser.error(f"--jobs is the number of runs at a time, 1 or more, got {arguments.jobs}.")
    preset, output, work = PRESETS[arguments.preset], arguments.output, arguments.work / arguments.preset
    if not preset.kinds and not (GSM8K / "model" / "config.json").exists():
        parser.error(
            f"`--preset {arguments.preset}` needs '{GSM8K}'. First run `python benchmarks/real/prepare_gsm8k.py`."
        )
    model = arguments.model or str(make_checkpoint(Path("build", "smollm2")) if preset.kinds else GSM8K / "model")
    if arguments.train:
        method, seed = arguments.train
        train(preset, model, method, int(seed), work / f"{method}-{seed}")
        return
    if preset.kinds:
        write(work / "problems", list(preset.kinds), preset.held_out, preset.other)
    else:
        shutil.copytree(GSM8K / "problems", work / "problems", dirs_exist_ok=True)
    output.mkdir(parents=True, exist_ok=True)
    os.environ["OMP_NUM_THREADS"] = str(max(1, torch.get_num_threads() // arguments.jobs))
    if not torch.cuda.is_available():
        os.environ.update({**ON_CPU, **os.environ})
    if arguments.jobs > 1:
        os.environ["VLLM_CPU_OMP_THREADS_BIND"] = "nobind"  # else all engines take the same cores

    def evaluate_start() -> dict:
        names = ["test", *(["other"] if preset.other else [])]
        return {name: evaluate(preset, model, work / "start", name) for name in names}

    def finish(method: str, seed: int) -> None:
        if start.done():
            start.result()  # without it no run can end: raise its error before hours of training
        of_run = work / f"{method}-{seed}"
        print(f"{method}, seed {seed}", flush=True)
        if not (of_run / "model" / STATE_FILE).exists():
            note_start(of_run, model=model, settings=settings_of(preset, CHOSEN[method], seed), sampler=SAMPLER)
            again = ["--preset", arguments.preset, "--model", model, "--work", str(arguments.work)]
            subprocess.run([sys.executable, __file__, *again, "--train", method, str(seed)], check=True)
        result = output / f"{method}-{seed}.json"
        write_result(result, preset, arguments.model, start.result(), method, seed, of_run)
        shutil.rmtree(of_run)

    chosen = [0, 1, 2, 3, 4] if arguments.seeds is None else arguments.seeds
    # Seed by seed, so that pairs are complete as early as possible.
    pairs = [(method, seed) for seed in chosen for method in arguments.methods]
    shared = {"preset": asdict(preset), "model": arguments.model, "sampler": SAMPLER}
    open_pairs = [
        (method, seed)
        for method, seed in pairs
        if (arguments.seeds is not None or seed < SEEDS[method]) and not is_done(output, method, seed, shared)
    ]
    if not open_pairs:
        return
    with ThreadPoolExecutor(arguments.jobs) as pool:
        start = pool.submit(evaluate_start)
        for run in [pool.submit(finish, *pair) for pair in open_pairs]:
            run.result()


if __name__ == "__main__":
    main()
