"""The mismatch before it is treated, and what its treatment removes, with the real engine: run by `make test-vllm`."""

import math

import pytest


pytest.importorskip("vllm")

from support import tiny, vllm_on_cpu
from test_vllm import change_sampler

from trl_a3po import A3POTrainer


pytestmark = [
    pytest.mark.vllm,
    # How vLLM looks through torch for kernels.
    pytest.mark.filterwarnings("ignore:`torch.distributed.reduce_op` is deprecated:FutureWarning"),
    pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated:DeprecationWarning"),
]


@pytest.mark.parametrize("mode", ["token_truncate", "token_mask"])
def test_a_sampler_that_is_off_by_a_known_ratio(mode, tmp_path):
    model_dir = tiny.save(tmp_path / "model", **vllm_on_cpu.MODEL)
    # Half of the tokens have a ratio of 2, and half of 1/2; above 1.5 a ratio is treated.
    fields = {"vllm_importance_sampling_mode": mode, "vllm_importance_sampling_clip_max": 1.5, "max_steps": 3}
    args = tiny.config(tmp_path, **{**vllm_on_cpu.CONFIG, **fields})
    with vllm_on_cpu.engines():
        trainer = A3POTrainer(model_dir, tiny.parity_reward, args, tiny.prompts())
        change_sampler(trainer, lambda token, logprob: logprob + math.log(2) * (1 if token % 2 else -1))
        trainer.train()
    for entry in trainer.state.log_history[:-1]:
        found = {name.removeprefix("signal/mismatch/"): value for name, value in entry.items() if "mismatch" in name}
        outside = found["outside"]
        assert 0 < outside < 1
        assert (found["min"], found["max"]) == pytest.approx((0.5, 2), rel=1e-3)
        mean, square = outside * 2 + (1 - outside) / 2, outside * 4 + (1 - outside) / 4
        assert found["mean"] == pytest.approx(mean, rel=1e-3)
        assert found["effective_sample_size"] == pytest.approx(mean**2 / square, rel=1e-3)
        # At the end the scales have decayed: no token is amplified.
        is_amplifying = entry["a3po/scale/positive_low"] > 1
        assert is_amplifying == ("amplified/effective_sample_size" in found)
        assert not is_amplifying or 0 < found["amplified/effective_sample_size"] <= 1
        tokens = {name: value for name, value in entry.items() if name.startswith("signal/tokens/")}
        assert sum(tokens.values()) == pytest.approx(1)
        treated = "masked" if mode == "token_mask" else "truncated"
        assert 0 < tokens[f"signal/tokens/sampler_{treated}"] < 1
        # What TRL logs has been treated.
        assert entry["sampling/importance_sampling_ratio/max"] <= 1.5
