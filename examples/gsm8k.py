"""
A3PO on GSM8K with a 0.5B model: fits one GPU of 24 GB, and runs on several without a change.

    python examples/gsm8k.py
    accelerate launch --num_processes 8 examples/gsm8k.py

Needs the extra `math-verify` (`pip install ".[math-verify]"` in a clone). To generate with vLLM, add the extra `vllm`
and pass `use_vllm=True` below.
"""

from datasets import load_dataset
from trl.rewards import accuracy_reward

from trl_a3po import A3POConfig, A3POTrainer


INSTRUCTION = "Reason step by step, and put your final answer within \\boxed{}."


def to_conversation(row):
    return {
        "prompt": [{"role": "user", "content": f"{row['question']}\n{INSTRUCTION}"}],
        "solution": f"${row['answer'].split('####')[-1].strip()}$",
    }


def main():
    dataset = load_dataset("openai/gsm8k", "main", split="train")
    trainer = A3POTrainer(
        model="Qwen/Qwen2.5-0.5B-Instruct",
        reward_funcs=accuracy_reward,
        args=A3POConfig(
            output_dir="Qwen2.5-0.5B-GSM8K-A3PO",
            per_device_train_batch_size=8,
            gradient_accumulation_steps=8,
            num_generations=8,
            max_completion_length=512,
            max_steps=500,
            epsilon_high=0.28,
        ),
        train_dataset=dataset.map(to_conversation, remove_columns=dataset.column_names),
    )
    trainer.train()
    trainer.save_model()


if __name__ == "__main__":
    main()
