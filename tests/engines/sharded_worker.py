"""
Trains a model that two processes share, and generate from: with and without the shaping, in one go and resumed.

Run by test_sharded.py under `accelerate launch`: `python sharded_worker.py MODEL OUTPUT`.
"""

import sys
from pathlib import Path

import torch.distributed
from support import processes, tiny
from trl import GRPOConfig, GRPOTrainer

from trl_a3po import A3POConfig, A3POTrainer


SCORED = []  # one for each call of the reward function

ANEW = {"num_generations": 2, "dynamic_sampling": 2, "log_tokens": 2}


def reward(completion_ids, **kwargs):
    SCORED.append(len(completion_ids))
    return tiny.parity_reward(completion_ids)


def train(model, output, trainer_class=A3POTrainer, config_class=A3POConfig, resume=None, **fields):
    fields = {"max_steps": 4, "per_device_train_batch_size": 4, "eval_strategy": "steps", "eval_steps": 2, **fields}
    args = tiny.config(output, config_class, **fields)
    trainer = trainer_class(model, reward, args, tiny.prompts(), tiny.prompts(8), processing_class=tiny.tokenizer())
    SCORED.clear()
    trainer.train(resume_from_checkpoint=resume)
    trainer.save_model(output / "end")
    if trainer.is_world_process_zero():
        (output / "distributed_type").write_text(trainer.accelerator.distributed_type.value)
        (output / "scored").write_text(str(len(SCORED)))
        trainer.state.save_to_json(output / "end" / "trainer_state.json")
    trainer.accelerator.wait_for_everyone()


def main(model, output):
    processes.shard()
    train(model, output / "grpo", GRPOTrainer, GRPOConfig)
    train(model, output / "neutral", **tiny.NEUTRAL)
    train(model, output / "whole", **ANEW)
    train(model, output / "resumed", save_strategy="steps", save_steps=2, **ANEW)
    train(model, output / "resumed", resume=str(output / "resumed" / "checkpoint-2"), **ANEW)
    torch.distributed.barrier()
    processes.leave()


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
