"""What vLLM needs to run inside of a trainer on a machine without a GPU. Imported before torch and vLLM."""

import contextlib
import os
from unittest.mock import patch


os.environ.update(
    VLLM_CPU_KVCACHE_SPACE="1",  # GiB
    VLLM_CPU_CI_ENV="1",  # no compilation
    VLLM_ENABLE_V1_MULTIPROCESSING="0",  # no process besides
    TORCHDYNAMO_DISABLE="1",
    OMP_NUM_THREADS="1",
)

import torch
import trl.generation.vllm_generation
import vllm
from vllm.distributed.parallel_state import cleanup_dist_env_and_memory
from vllm.model_executor.layers import utils


# The smallest head that its attention takes has 32 dimensions.
MODEL = {"hidden_size": 64, "num_attention_heads": 2, "num_key_value_heads": 2}
CONFIG = {
    "use_vllm": True,
    "vllm_mode": "colocate",
    "vllm_max_model_length": 64,
    "vllm_gpu_memory_utilization": 0.05,
    "per_device_train_batch_size": 16,
}


@contextlib.contextmanager
def engines():
    """Engines that are built in here compute in fp32, take new weights, and leave nothing behind."""
    set_num_threads, llm = torch.set_num_threads, vllm.LLM
    built = []

    def build(**kwargs):
        built.append(llm(**{**kwargs, "dtype": "float32"}))  # in bf16 log-probabilities differ by 1e-2
        return built[-1]

    try:
        with (
            patch.object(trl.generation.vllm_generation, "LLM", build),
            patch.object(vllm, "LLM", build),
            patch.object(utils, "dispatch_cpu_unquantized_gemm", _keep_weights_in_place),
            patch.dict(os.environ),  # where TRL sets what torchrun would
        ):
            yield
    finally:
        for engine in built:
            # Now, not when it is collected: that would end the process groups of whichever engine runs by then.
            engine.llm_engine.engine_core.shutdown()
        torch.set_num_threads = set_num_threads  # which the engine replaces
        cleanup_dist_env_and_memory()


def _keep_weights_in_place(layer, remove_weight):
    # vLLM's own packs the weights of a linear layer as they are loaded, and has none left to be replaced.
    layer.cpu_linear = torch.nn.functional.linear
