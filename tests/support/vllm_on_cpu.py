"""What vLLM needs to run inside of a trainer on a machine without a GPU. Imported before torch and vLLM."""

import contextlib
import os
import shutil
import signal
import socket
import subprocess
import sys
from pathlib import Path
from unittest.mock import patch


os.environ.update(
    VLLM_CPU_KVCACHE_SPACE="1",  # GiB
    VLLM_CPU_CI_ENV="1",  # no compilation
    VLLM_ENABLE_V1_MULTIPROCESSING="0",  # no process besides
    TORCHDYNAMO_DISABLE="1",
)
os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch
import trl.generation.vllm_generation
import vllm
from safetensors.torch import save_file
from trl.generation.vllm_client import VLLMClient
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
        # In bf16, log-probabilities differ by 1e-2. Completions share the whole blocks of their prompt; by default one
        # has 128 tokens. Those that begin in the same pass share nothing, so passes are small.
        built.append(llm(**{**kwargs, "dtype": "float32", "block_size": 32, "max_num_batched_tokens": 256}))
        return built[-1]

    try:
        with (
            patch.object(trl.generation.vllm_generation, "LLM", build),
            patch.object(vllm, "LLM", build),
            patch.object(utils, "dispatch_cpu_unquantized_gemm", _keep_weights_in_place),
            patch.dict(os.environ),  # where TRL sets what torchrun would
        ):
            os.environ.setdefault("MASTER_PORT", str(_free_port()))  # TRL's is the same in every program
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


def _free_port():
    with socket.create_server(("127.0.0.1", 0)) as probe:
        return probe.getsockname()[1]


@contextlib.contextmanager
def server(model_dir, log):
    """The address at which vLLM's own server serves a model, in processes of its own."""
    port = _free_port()
    # `vllm serve` does not start: it asks for the version of a package called vllm, and that for CPUs has its own.
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", model_dir, "--dtype", "float32"]
    command += ["--host", "127.0.0.1", "--port", str(port), "--max-model-len", "64", "--enforce-eager"]
    command += ["--logprobs-mode", "processed_logprobs", "--enable-scale-out"]
    environment = {**os.environ, "VLLM_SERVER_DEV_MODE": "1"}
    with open(log, "w") as output:
        process = subprocess.Popen(command, env=environment, stdout=output, stderr=output, start_new_session=True)
    try:
        yield f"http://127.0.0.1:{port}"  # TRL's client waits until it answers
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


@contextlib.contextmanager
def weights_by_file(model_dir, directory):
    """TRL's client hands the server its weights in a file: what it does itself, over NCCL, takes a GPU."""

    def update_named_params(client, metadata, named_params):  # on the main process
        shutil.copytree(model_dir, directory, dirs_exist_ok=True)
        weights = {name: weight.clone().contiguous() for name, weight in named_params}
        assert list(weights) == [name for name, _, _ in metadata]
        save_file(weights, Path(directory, "model.safetensors"), {"format": "pt"})
        order = {"method": "reload_weights", "kwargs": {"weights_path": str(directory)}}
        client.session.post(f"{client.base_url}/collective_rpc", json=order).raise_for_status()

    with patch.multiple(
        VLLMClient,
        init_communicator=lambda client, device: None,
        weight_update=lambda client: contextlib.nullcontext(),
        update_named_params=update_named_params,
    ):
        yield


def change_sampler(trainer, change):
    """Has `change` applied to the log-probability of every token that the engine samples."""
    generate = trainer.vllm_generation.llm.generate

    def changed(*args, **kwargs):
        requests = generate(*args, **kwargs)
        for position in (p for request in requests for output in request.outputs for p in output.logprobs):
            for token, sampled in position.items():
                sampled.logprob = change(token, sampled.logprob)
        return requests

    trainer.vllm_generation.llm.generate = changed
