"""
Trains on the rows of one batch, given to two processes or to one, and writes what it logged and ended with.

Run by test_distributed.py: `python distributed_worker.py MODEL OUTPUT FIELDS`, alone or under torchrun.
"""

import json
import os
import sys
from pathlib import Path

import tiny
import torch
import torch.distributed

from trl_a3po import A3POTrainer


ROWS = 8


def rollout(prompts, trainer):
    """The same completions for the same prompts, however many processes they are spread over; lengths differ a lot."""
    ids, completions = [], []
    seen = {}
    for prompt in prompts:
        ids.append(trainer.processing_class(prompt)["input_ids"])
        number = int(prompt.split("+")[0])
        copy = seen[prompt] = seen.get(prompt, -1) + 1
        generator = torch.Generator().manual_seed(1000 * trainer.state.global_step + 10 * number + copy)
        length = 1 + (5 * number + 3 * copy) % 12
        completions.append(torch.randint(3, 40, (length,), generator=generator).tolist())
    return {"prompt_ids": ids, "completion_ids": completions, "logprobs": [[0.0] * len(c) for c in completions]}


def reward(prompts, completion_ids, **kwargs):
    """All right for every other prompt, so that one of two processes has nothing to learn."""
    parity = tiny.parity_reward(completion_ids)
    return [1.0 if int(prompt.split("+")[0]) % 2 else value for prompt, value in zip(prompts, parity, strict=True)]


def main(model, output, fields):
    processes = int(os.environ.get("WORLD_SIZE", "1"))
    args = tiny.config(
        output,
        per_device_train_batch_size=ROWS // processes // 2,
        gradient_accumulation_steps=2,
        num_generations=4,
        max_steps=4,
        logging_steps=2,
        learning_rate=1e-3,
        shuffle_dataset=False,
        max_completion_length=12,
        loss_type="dapo",
        optim="sgd",  # Adam turns rounding into steps of full size where a gradient is almost nothing
        **json.loads(fields),
    )
    trainer = A3POTrainer(model, reward, args, tiny.prompts(), rollout_func=rollout)
    assert trainer.accelerator.num_processes == processes
    trainer.train()
    if trainer.accelerator.is_main_process:
        log = [
            {name: value for name, value in entry.items() if name.startswith("a3po/") or name == "loss"}
            for entry in trainer.state.log_history
        ]
        Path(output, "log.json").write_text(json.dumps(log))
        torch.save(tiny.parameters(trainer), Path(output, "parameters.pt"))
    if processes > 1:
        torch.distributed.barrier()
        sys.stdout.flush()
        os._exit(0)  # gloo threads of torch 2.13 sometimes abort the interpreter's own exit, with all work done


if __name__ == "__main__":
    main(*sys.argv[1:])
