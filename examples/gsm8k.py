"""
A3PO on GSM8K. The defaults suit a 0.5B model on one GPU of 24 GB:

    python examples/gsm8k.py

Every option of `A3POConfig` and of TRL's `ModelConfig` can be set on the command line or in a YAML file (`--config`).
The README.md beside this file runs the same script with LoRA, and on many GPUs and machines.

Needs the extra `math-verify` (`pip install ".[math-verify]"` in a clone).
"""

from datasets import load_dataset
from trl import ModelConfig, TrlParser, get_peft_config
from trl.rewards import accuracy_reward

from trl_a3po import A3POConfig, A3POTrainer


DEFAULTS = {
    "model_name_or_path": "Qwen/Qwen2.5-0.5B-Instruct",
    "output_dir": "gsm8k-a3po",
    "per_device_train_batch_size": 8,
    "gradient_accumulation_steps": 8,
    "num_generations": 8,
    "max_completion_length": 512,
    "max_steps": 500,
    "epsilon_high": 0.28,
}
INSTRUCTION = "Reason step by step, and put your final answer within \\boxed{}."


def parse(arguments=None):
    parser = TrlParser((A3POConfig, ModelConfig))
    parser.set_defaults(**DEFAULTS)
    return parser.parse_args_and_config(arguments)


def to_conversation(row):
    return {
        "prompt": [{"role": "user", "content": f"{row['question']}\n{INSTRUCTION}"}],
        "solution": f"${row['answer'].split('####')[-1].strip()}$",
    }


def train(args, model_args, dataset):
    trainer = A3POTrainer(
        model=model_args.model_name_or_path,
        reward_funcs=accuracy_reward,
        args=args,
        train_dataset=dataset.map(to_conversation, remove_columns=dataset.column_names),
        peft_config=get_peft_config(model_args),
    )
    trainer.train(resume_from_checkpoint=args.resume_from_checkpoint)
    trainer.save_model()
    trainer.save_state()


if __name__ == "__main__":
    train(*parse(), load_dataset("openai/gsm8k", "main", split="train"))
