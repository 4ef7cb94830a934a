"""
Trains two processes, with an engine in each, one over both or a server, and writes what each of them logged and ended
with.

Run by test_vllm.py under torchrun or `accelerate launch`: `vllm_worker.py MODEL OUTPUT FIELDS`.
"""

import json
import os
import sys
from pathlib import Path


import vllm_on_cpu  # isort: skip  # first: it sets the environment that torch and vLLM read
import sharded_on_cpu
import tiny
import torch
from torch.distributed.tensor import DTensor

from trl_a3po import A3POTrainer


def whole_parameters(trainer):
    parameters = tiny.parameters(trainer).items()
    return {name: each.full_tensor() if isinstance(each, DTensor) else each for name, each in parameters}


def main(model, output, fields):
    sharded_on_cpu.shard()
    args = tiny.config(output, **{**vllm_on_cpu.CONFIG, **json.loads(fields)})
    colocated = args.vllm_mode == "colocate"
    with vllm_on_cpu.engines() if colocated else vllm_on_cpu.weights_by_file(model, Path(output, "weights")):
        trainer = A3POTrainer(model, tiny.parity_reward, args, tiny.prompts())
        assert trainer.accelerator.num_processes == 2
        if colocated:
            parallel = trainer.vllm_generation.llm.llm_engine.vllm_config.parallel_config
            assert parallel.world_size == args.vllm_tensor_parallel_size
        trainer.train()
        results = {
            "distributed_type": trainer.accelerator.distributed_type.value,
            "log": trainer.state.log_history,
            "parameters": whole_parameters(trainer),
        }
        torch.save(results, Path(output, f"{trainer.accelerator.process_index}.pt"))
        trainer.accelerator.wait_for_everyone()
    sys.stdout.flush()
    os._exit(0)  # gloo threads of torch 2.13 sometimes abort the interpreter's own exit, with all work done


if __name__ == "__main__":
    main(*sys.argv[1:])
