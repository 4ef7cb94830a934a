"""
Trains two processes, with an engine in each, one over both or a server, and writes what each of them logged and ended
with.

Run by test_vllm.py under torchrun or `accelerate launch`: `vllm_worker.py MODEL OUTPUT FIELDS`.
"""

import json
import sys
from pathlib import Path


from support import vllm_on_cpu  # isort: skip  # first: it sets the environment that torch and vLLM read
import torch
from support import processes, tiny

from trl_a3po import A3POTrainer


def main(model, output, fields):
    processes.shard()
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
            "parameters": tiny.parameters(trainer),
        }
        torch.save(results, Path(output, f"{trainer.accelerator.process_index}.pt"))
        trainer.accelerator.wait_for_everyone()
    processes.leave()


if __name__ == "__main__":
    main(*sys.argv[1:])
