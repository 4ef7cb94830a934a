"""
Trains a model of the Hub and pushes it back, as users' scripts do, and writes how far each run came.

Run by test_hub.py: `python hub_worker.py OUTPUT RUNS`, with the arguments of each run, by its name, in JSON.
"""

import json
import sys
from pathlib import Path

import torch
from huggingface_hub import snapshot_download
from support import tiny
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback

from trl_a3po import A3POTrainer


BASE = "base/tiny"


class WaitForPush(TrainerCallback):
    """Has every save wait for its push: while one is under way, transformers leaves out the next."""

    def __init__(self, trainer):
        self.trainer = trainer

    def on_save(self, args, state, control, **kwargs):
        if args.push_to_hub:
            self.trainer.push_in_progress.wait_until_done()


def make(model, output_dir, adapter=False, **fields):
    """A trainer of 2 steps that are the first two of any run, however long."""
    torch.manual_seed(0)  # older releases of TRL draw the adapter's weights before they seed
    args = tiny.config(
        output_dir,
        **{
            "max_steps": 2,
            "save_strategy": "steps",
            "save_steps": 1,
            "lr_scheduler_type": "constant",
            "positive_low_scale": 3.0,
            "scale_decay": "constant",
            **fields,
        },
    )
    return A3POTrainer(model, tiny.parity_reward, args, tiny.prompts(), **(tiny.lora() if adapter else {}))


def generate(model, tokenizer):
    """Greedy completions of a few prompts, as token ids."""
    inputs = tokenizer(list(tiny.prompts(4)["prompt"]), return_tensors="pt", padding=True)
    return model.generate(**inputs, do_sample=False, max_new_tokens=8).tolist()


def generate_from(path):
    """The same of the model in a directory or on the Hub."""
    return generate(AutoModelForCausalLM.from_pretrained(path), AutoTokenizer.from_pretrained(path))


def run(output, name, wait=True, **arguments):
    """Trains and pushes. Says what was done before an error, and what the model generates, here and downloaded."""
    report = {"done": []}
    try:
        trainer = make(BASE, output / name, **{"push_to_hub": True, **arguments})
        if wait:
            trainer.add_callback(WaitForPush(trainer))
        report["done"].append("make")
        trainer.train()
        report["done"].append("train")
        report["completions"] = generate(trainer.model, trainer.processing_class)
        trainer.push_to_hub()
        report["done"].append("push")
        snapshot_download(trainer.hub_model_id, local_dir=output / "downloads" / name)
        report["completions once downloaded"] = generate_from(trainer.hub_model_id)
        report["done"].append("download")
    except Exception as error:
        report["error"] = f"{type(error).__name__}: {error}"
    return report


def main(output, runs):
    reports = {name: run(Path(output), name, **arguments) for name, arguments in json.loads(runs).items()}
    Path(output, "reports.json").write_text(json.dumps(reports))


if __name__ == "__main__":
    main(*sys.argv[1:])
