"""
Prepare GSM8K for `real_runs.py --preset gsm8k`: its problems, and a model that solves some of them.

    python benchmarks/real/prepare_gsm8k.py
    python benchmarks/real/prepare_gsm8k.py --dataset DIR --model DIR

SmolLM2-135M solves about one in a hundred of the shortest problems, even after worked examples. Almost no group would
have a learning signal. So it is first fine-tuned on the solutions of the training split, by TRL's `SFTTrainer`. All
values are our choice.
"""

import argparse
import json
import re
from pathlib import Path

import torch
from datasets import Dataset, load_dataset
from real_runs import GSM8K, make_checkpoint
from trl import SFTConfig, SFTTrainer

from trl_a3po.evaluation.problems import load_problems


def worked_out(answer: str) -> str:
    """A solution of GSM8K as the model is to write it: without the marks of its calculator, the result in a box."""
    steps, _, result = re.sub(r"<<.*?>>", "", answer).rpartition("####")
    return f"{steps.strip()}\nThe answer is \\boxed{{{result.strip()}}}."


def write_problems(dataset: str, held_out: int, directory: Path) -> list[str]:
    """Writes the training split, and the first problems of the test split. Returns the solutions of the former."""
    splits = load_dataset(dataset, None if Path(dataset).is_dir() else "main")
    directory.mkdir(parents=True, exist_ok=True)
    for split, rows in (("train", splits["train"]), ("test", splits["test"].select(range(held_out)))):
        text = "".join(json.dumps({"question": row["question"], "answer": row["answer"]}) + "\n" for row in rows)
        (directory / f"{split}.jsonl").write_text(text, encoding="utf-8")
    return [worked_out(answer) for answer in splits["train"]["answer"]]


def fine_tune(model: str, prompts: list[list[dict]], solutions: list[str], directory: Path, max_steps: int) -> None:
    """Two epochs, unless `max_steps` is positive."""
    completions = [[{"role": "assistant", "content": solution}] for solution in solutions]
    config = SFTConfig(
        str(directory),
        max_steps=max_steps,
        num_train_epochs=2,
        per_device_train_batch_size=64,
        learning_rate=2e-4,
        lr_scheduler_type="cosine",
        warmup_steps=10,
        gradient_checkpointing=False,
        model_init_kwargs={"dtype": "float32"},  # of the weights
        bf16=torch.cuda.is_available(),
        use_cpu=not torch.cuda.is_available(),
        save_strategy="no",
        report_to="none",
        logging_steps=10,
    )
    dataset = Dataset.from_dict({"prompt": prompts, "completion": completions})
    trainer = SFTTrainer(model, config, train_dataset=dataset)
    trainer.train()
    trainer.save_model()


def main(line=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dataset", default="openai/gsm8k", help="GSM8K on the Hub, or a folder with its two splits")
    parser.add_argument("--model", help="directory of a model; by default SmolLM2-135M, which is downloaded once")
    parser.add_argument("--held_out", type=int, default=192, help="problems to evaluate on")
    parser.add_argument("--max_steps", type=int, default=-1, help="steps of the fine-tuning; by default two epochs")
    arguments = parser.parse_args(line)
    model = arguments.model or str(make_checkpoint(Path("build", "smollm2")))
    solutions = write_problems(arguments.dataset, arguments.held_out, GSM8K / "problems")
    problems = load_problems(str(GSM8K / "problems" / "train.jsonl"), "train")
    fine_tune(model, list(problems["prompt"]), solutions, GSM8K / "model", arguments.max_steps)


if __name__ == "__main__":
    main()
