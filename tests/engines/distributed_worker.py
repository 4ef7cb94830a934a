"""
Trains on the rows of one batch, given to two processes or to one, and writes what each logged, did and ended with.

Run by test_distributed.py: `python distributed_worker.py MODEL OUTPUT CASES`, alone or under torchrun.
"""

import json
import os
import sys
from pathlib import Path

import torch
import torch.distributed
import transformers
from packaging.version import Version
from support import adapters, processes, tiny
from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

from trl_a3po import A3POTrainer
from trl_a3po.training import rollouts


ROWS = 8
LONGEST = 12


def rollout(prompts, trainer):
    """The same completions for the same prompts, however many processes they are spread over; lengths differ a lot."""
    ids, completions = [], []
    seen = {}
    for prompt in prompts:
        ids.append(trainer.processing_class(prompt)["input_ids"])
        number = int(prompt.split("+")[0])
        copy = seen[prompt] = seen.get(prompt, -1) + 1
        generator = torch.Generator().manual_seed(1000 * trainer.state.global_step + 10 * number + copy)
        length = 1 + (5 * number + 3 * copy) % LONGEST
        tokens = torch.randint(3, 40, (length,), generator=generator).tolist()
        # Those of every other prompt have no end: to TRL, they are truncated.
        completions.append(tokens if number % 2 else [*tokens[:-1], trainer.processing_class.eos_token_id])
    return {"prompt_ids": ids, "completion_ids": completions, "logprobs": [[0.0] * len(c) for c in completions]}


def reward(prompts, completion_ids, **kwargs):
    return tiny.parity_reward(completion_ids)


def reward_with_equal_groups(prompts, completion_ids, **kwargs):
    """All right for every other prompt, so that one of two processes has nothing to learn."""
    parity = tiny.parity_reward(completion_ids)
    return [1.0 if int(prompt.split("+")[0]) % 2 else value for prompt, value in zip(prompts, parity, strict=True)]


class Trainer(A3POTrainer):
    """Makes sure that each row has the reward of its own completion, not of another process's."""

    def _before_loss_reads(self, scope, **outputs):
        inputs = scope.inputs
        if self.reward_funcs == [reward]:
            sums = (inputs["completion_ids"] * inputs["completion_mask"]).sum(1)
            known = inputs["completion_mask"].any(1)  # not masked whole
            assert torch.equal(inputs["rewards"][known], (sums % 2)[known].float())
        super()._before_loss_reads(scope, **outputs)


def pair_groups_as_two_processes(live, fresh_live, pair_groups=rollouts.pair_groups):
    half = len(live) // 2
    second = pair_groups(live[half:], fresh_live[half:])
    return pair_groups(live[:half], fresh_live[:half]) + [(place + half, group + half) for place, group in second]


def mixture_of_experts():
    torch.manual_seed(0)
    size = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
    experts = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
    special = {"eos_token_id": 1, "pad_token_id": 0, "initializer_range": 0.3, "router_aux_loss_coef": 0.0}
    return Qwen3MoeForCausalLM(
        Qwen3MoeConfig(
            vocab_size=len(tiny.tokenizer()), num_key_value_heads=1, head_dim=16, **size, **experts, **special
        )
    )


def train(
    model, output, name, *, rows=ROWS, micro_batches=2, equal_groups=False, experts=False, trained_head=False, **fields
):
    world_size = int(os.environ.get("WORLD_SIZE", "1"))
    if world_size == 1:
        rollouts.pair_groups = pair_groups_as_two_processes
    experts_are_modules = experts and Version(transformers.__version__) < Version("5")
    if experts_are_modules and world_size == 1:
        fields |= tiny.PLAIN  # as two have by themselves
    args = tiny.config(
        output,
        per_device_train_batch_size=rows // world_size // micro_batches,
        per_device_eval_batch_size=ROWS // world_size,
        gradient_accumulation_steps=micro_batches,
        num_generations=4,
        max_steps=4,
        logging_steps=2,
        learning_rate=1e-3,
        shuffle_dataset=False,
        max_completion_length=LONGEST,
        loss_type="dapo",
        optim="sgd",  # Adam turns rounding into steps of full size where a gradient is almost nothing
        **fields,
    )
    reward_func = reward_with_equal_groups if equal_groups else reward
    torch.manual_seed(0)  # older releases of TRL draw the adapter's weights before they seed
    trainer = Trainer(
        mixture_of_experts() if experts else model,
        reward_func,
        args,
        tiny.prompts(),
        eval_dataset=tiny.prompts(8),
        processing_class=tiny.tokenizer(),
        rollout_func=rollout,
        peft_config=adapters.lora(modules_to_save=["lm_head"]) if trained_head else None,
    )
    assert trainer.accelerator.num_processes == world_size
    assert not (experts_are_modules and (trainer._trims or trainer._may_skip))
    passes = []
    decoder = trainer.model.get_base_model() if trained_head else trainer.model
    decoder.model.layers[0].register_forward_hook(lambda *_: passes.append(torch.is_grad_enabled()))
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profiler:
        trainer.train()
    trainer.save_model(Path(output, name))
    # `profiler.events()` builds a tree of all operations first, which takes longer than the training.
    events = sorted(profiler.profiler.kineto_results.events(), key=lambda event: event.start_ns())
    return {
        "distributed_type": trainer.accelerator.distributed_type.value,
        "log": trainer.state.log_history,
        "parameters": tiny.parameters(trainer),
        "passes": passes,
        "collectives": [event.name() for event in events if event.name().startswith("c10d::")],
    }


def main(model, output, cases):
    processes.shard()
    results = {name: train(model, output, name, **fields) for name, fields in json.loads(cases).items()}
    torch.save(results, Path(output, f"{os.environ.get('RANK', '0')}.pt"))
    if torch.distributed.is_initialized():
        torch.distributed.barrier()
        processes.leave()


if __name__ == "__main__":
    main(*sys.argv[1:])
