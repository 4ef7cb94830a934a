"""
Train a pretrained language model with A3PO, from nothing, and evaluate it before and after.

    python examples/smollm2/train.py                    # SmolLM2-135M on sums, on a CPU: `make real`
    python examples/smollm2/train.py --lora             # the same with an adapter
    python examples/smollm2/train.py --preset gpu       # SmolLM2-135M on GSM8K, on one GPU
    python examples/smollm2/train.py --preset gpu --model Qwen/Qwen2.5-1.5B-Instruct

It runs `trl-a3po eval`, `train`, `eval`, `compare` and `report`, and prints each command before it runs. The options
of a preset are in the YAML files beside this program. If vLLM is installed, it generates. Everything is written to one
folder; the same command resumes an interrupted run.
"""

import argparse
import importlib.util
import json
import os
import shlex
import subprocess
import sys
from pathlib import Path

import torch
from checkpoint import UnreachableError, make_checkpoint
from problems import write

from trl_a3po.training.checkpoint_files import STATE_FILE, checkpoints_in, is_complete


HERE = Path(__file__).parent
MODEL = Path("build", "smollm2")
TRL_A3PO = ["-m", "trl_a3po.cli"]
KINDS, HELD_OUT = ["sums"], 48  # of the preset for CPUs
LORA = {"use_peft": True, "lora_r": 16, "lora_alpha": 32, "lora_target_modules": "all-linear", "learning_rate": 1e-4}
ON_CPU = {
    # For vLLM: GiB of its cache, no compilation, one process.
    "VLLM_CPU_KVCACHE_SPACE": "2",
    "VLLM_CPU_CI_ENV": "1",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    # For glibc: freed memory stays with the process. An update takes a tenth to a sixth less.
    "MALLOC_MMAP_MAX_": "0",
    "MALLOC_TRIM_THRESHOLD_": "100000000000",
}


def run(*words):
    """Runs a program of Python, and ends this one if it fails."""
    print(f"\n$ python {shlex.join(map(str, words))}", flush=True)
    on_cpu = {"OMP_NUM_THREADS": str(torch.get_num_threads()), **ON_CPU}
    environment = os.environ if torch.cuda.is_available() else {**on_cpu, **os.environ}
    code = subprocess.run([sys.executable, *map(str, words)], env=environment).returncode
    if code:
        sys.exit(code)


def options(**values):
    return [word for name, value in values.items() for word in (f"--{name}", str(value))]


def evaluate(preset, model, output, has_vllm):
    files = {"dataset_name": output.parent / "problems" / "test.jsonl"} if preset == "cpu" else {}
    examples = worked_examples(preset, output.parent)
    words = options(model_name_or_path=model, output_dir=output, worked_examples=examples, use_vllm=has_vllm, **files)
    run(*TRL_A3PO, "eval", "--config", HERE / f"{preset}-eval.yaml", *words)


def worked_examples(preset, output):
    return output / "problems" / "worked_examples.jsonl" if preset == "cpu" else HERE / "gsm8k_worked_examples.jsonl"


def train(preset, model, output, has_vllm, **values):
    """Trains, unless it has, from the last complete checkpoint."""
    directory = output / "model"
    if (directory / STATE_FILE).exists():
        return
    files = {"dataset_name": output / "problems" / "train.jsonl"} if preset == "cpu" else {}
    if any(map(is_complete, checkpoints_in(directory))):
        values["resume_from_checkpoint"] = True
    if has_vllm:
        values.update(use_vllm=True, vllm_mode="colocate", vllm_max_model_length=1024)
    examples = worked_examples(preset, output)
    words = options(model_name_or_path=model, output_dir=directory, worked_examples=examples, **files, **values)
    # On a CPU, an engine of vLLM takes no new weights by itself.
    needs_help = has_vllm and not torch.cuda.is_available()
    program = [HERE / "train_with_vllm_on_cpu.py"] if needs_help else [*TRL_A3PO, "train"]
    run(*program, "--config", HERE / f"{preset}-train.yaml", *words)


def check_options(parser, output, asked):
    """Refuses other options than those of the run in the folder. Without a part of a run, there is nothing to mix."""
    record = output / "options.json"
    parts = output / "before" / "samples.jsonl", output / "model"
    if not record.exists() or not any(path.exists() for path in parts):
        return
    try:
        before = json.loads(record.read_text(encoding="utf-8"))
    except ValueError as error:
        parser.error(
            f"'{record}' must hold the options of the run in '{output}', but is damaged: it is not JSON ({error}). "
            "Delete it if the run had the options of this command. Else pass another `--output`."
        )
    if before != asked:
        parser.error(f"'{output}' holds a run with the options {before}. Pass these, or another `--output`.")


def main(line=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", choices=["cpu", "gpu"], default="cpu")
    parser.add_argument("--model", help="directory or Hub name of a model; by default SmolLM2-135M, downloaded once")
    parser.add_argument("--output", type=Path, help="folder of everything; by default build/real-PRESET")
    parser.add_argument("--lora", action="store_true", help="train an adapter instead of all parameters")
    parser.add_argument("--seed", type=int, default=0, help="seed of the training")
    parser.add_argument("--max_steps", type=int, help="steps of the training; by default those of the preset")
    arguments = parser.parse_args(line)
    preset, output = arguments.preset, arguments.output or Path("build", f"real-{arguments.preset}")

    asked = {name: value for name, value in vars(arguments).items() if name != "output"}
    check_options(parser, output, asked)
    try:
        output.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        parser.error(f"`--output` must be a folder, and '{output}' cannot be one: {error}. Pass another.")
    try:
        model = arguments.model or str(make_checkpoint(MODEL))
    except (UnreachableError, OSError) as error:
        parser.error(f"{error}\nInstead, you can pass a model of yours with `--model`.")
    (output / "options.json").write_text(json.dumps(asked) + "\n", encoding="utf-8")
    if preset == "cpu":
        write(output / "problems", KINDS, HELD_OUT)

    has_vllm = importlib.util.find_spec("vllm") is not None
    steps = {} if arguments.max_steps is None else {"max_steps": arguments.max_steps}
    evaluate(preset, model, output / "before", has_vllm)
    train(preset, model, output, has_vllm, seed=arguments.seed, **(LORA if arguments.lora else {}), **steps)
    evaluate(preset, str(output / "model"), output / "after", has_vllm)
    run(*TRL_A3PO, "compare", output / "before", output / "after", "--output", output / "comparison.html")
    run(*TRL_A3PO, "report", output / "model", "--output", output / "report.html")


if __name__ == "__main__":
    main()
