"""More tokens than vLLM computes at once: `make test-vllm`."""

import pytest


pytest.importorskip("vllm")

from support import tiny, vllm_on_cpu

from trl_a3po.evaluation.samplers import Request, Sampling, seed_of, vllm_engine


pytestmark = [
    pytest.mark.vllm,
    # How vLLM looks through torch for kernels.
    pytest.mark.filterwarnings("ignore:`torch.distributed.reduce_op` is deprecated:FutureWarning"),
    pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated:DeprecationWarning"),
]


def test_prompts_that_do_not_fit_into_one_pass_are_sampled_each_with_its_seed(tmp_path):
    """vLLM's CPU build cannot split a prompt that has a seed over two passes."""
    model = tiny.save(tmp_path / "model", **vllm_on_cpu.MODEL)
    requests = [Request([3 + row % 40] * 60, 4, seed_of(0, "problem", row, 0)) for row in range(200)]
    sampling = Sampling(temperature=1.0, top_p=1.0, top_k=0, end_ids=(1,))
    with (
        vllm_on_cpu.engines(),
        vllm_engine(model, sampling, dtype="float32", max_model_len=64, gpu_memory_utilization=0.05) as complete,
    ):
        together, alone = complete(requests), complete(requests[-3:])
    assert len(together) == 200
    assert together[-3:] == alone
