"""vLLM, the real engine, colocated and as a server: run by `make test-vllm`, in an environment of its own."""

import json
import math
import subprocess
import sys
from pathlib import Path

import pytest


pytest.importorskip("vllm")

import torch
from support import processes, reference, tiny, vllm_on_cpu
from support.training import SGD, ShapingRecorder, make, update_difference
from trl import GRPOTrainer

from trl_a3po import A3POTrainer
from trl_a3po.update.packed_forward import trl_has_fused_head


pytestmark = [
    pytest.mark.vllm,
    # How vLLM looks through torch for kernels.
    pytest.mark.filterwarnings("ignore:`torch.distributed.reduce_op` is deprecated:FutureWarning"),
    pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated:DeprecationWarning"),
]

WORKER = Path(__file__).with_name("vllm_worker.py")
LAUNCHERS = {
    "MULTI_CPU": processes.torchrun(),
    "FSDP": processes.accelerate_launch("fsdp2"),
}
ANEW = {"num_generations": 2, "dynamic_sampling": 2}
DIFFERENCE = "sampling/sampling_logp_difference/max"
# The largest difference of a run is about 1e-5, rarely 1e-4: the requests of a server meet in other batches each time.
# Outdated weights give more than 1e-2.
ROUNDING = 1e-3
MODES = ["token_truncate", "token_mask", "sequence_truncate", "sequence_mask"]


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory):
    return tiny.save(tmp_path_factory.mktemp("model"), **vllm_on_cpu.MODEL)


@pytest.fixture
def make_with_engine(model_dir, tmp_path):
    """Makes trainers that have an engine in their process."""

    def make_with_engine(trainer_class=A3POTrainer, **kwargs):
        return make(tmp_path, trainer_class, **{"model": model_dir, **vllm_on_cpu.CONFIG, "max_steps": 4, **kwargs})

    with vllm_on_cpu.engines():
        yield make_with_engine


@pytest.fixture(scope="module")
def server(model_dir, tmp_path_factory):
    """The settings with which a trainer samples from a server."""
    with vllm_on_cpu.server(model_dir, tmp_path_factory.mktemp("server") / "log") as address:
        yield {"vllm_mode": "server", "vllm_server_base_url": address}


@pytest.fixture
def train_with_engine(make_with_engine):
    def train_with_engine(*args, **kwargs):
        trainer = make_with_engine(*args, **kwargs)
        trainer.train()
        return trainer

    return train_with_engine


def logged(trainer, name):
    return [entry[name] for entry in trainer.state.log_history if name in entry]


def assert_trained(trainer):
    """The parameters are finite, and every step moved them."""
    assert all(parameter.isfinite().all() for parameter in tiny.parameters(trainer).values())
    norms = logged(trainer, "grad_norm")
    assert len(norms) == trainer.args.max_steps
    assert all(0 < norm < math.inf for norm in norms)


@pytest.mark.parametrize("arguments", [dict, tiny.lora], ids=["full", "lora"])
def test_every_rollout_is_sampled_with_the_weights_as_trained(arguments, train_with_engine):
    trainer = train_with_engine(arguments=arguments())
    assert_trained(trainer)
    assert len(logged(trainer, DIFFERENCE)) == 4
    assert max(logged(trainer, DIFFERENCE)) < ROUNDING


def test_weights_that_are_not_synchronised_are_noticed(make_with_engine):
    """The control of the test above."""
    trainer = make_with_engine()
    trainer.vllm_generation.sync_weights = lambda: None
    trainer.train()
    assert logged(trainer, DIFFERENCE)[0] < ROUNDING
    assert min(logged(trainer, DIFFERENCE)[1:]) > 1e-2


@pytest.mark.parametrize(
    "fields", [{}, {"loss_type": "grpo", "beta": 0.1}, {"num_iterations": 2}], ids=["dapo", "kl", "reused"]
)
def test_neutral_settings_are_grpo_to_the_last_bit(fields, train_with_engine):
    neutral = train_with_engine(**tiny.NEUTRAL, **fields)
    grpo = train_with_engine(GRPOTrainer, **fields)
    assert_trained(grpo)
    for name, parameter in tiny.parameters(neutral).items():
        assert torch.equal(parameter, tiny.parameters(grpo)[name]), name


def shaped_by_reference(call, logps, args):
    rows = reference.shape_advantages(
        call["advantages"].tolist(), logps.tolist(), call["mask"].tolist(), **args.shaping_settings
    )
    return torch.tensor(rows)


@pytest.mark.parametrize("correction", [True, False])
def test_tokens_are_selected_by_the_policy_being_trained(correction, make_with_engine):
    """Also where the sampler ranks them the other way round."""
    trainer = make_with_engine(
        ShapingRecorder,
        vllm_importance_sampling_correction=correction,
        vllm_importance_sampling_mode="token_truncate",
        max_steps=1,
    )
    vllm_on_cpu.change_sampler(trainer, lambda token, logprob: -3 - logprob)
    trainer.train()
    [batch], [call] = trainer.batches, trainer.calls
    sampled = batch["sampling_per_token_logps"]
    mask = call["mask"].bool()
    torch.testing.assert_close(sampled[mask], -3 - call["old_per_token_logps"][mask], rtol=0, atol=1e-4)
    # One step, so that the old policy is the current one.
    torch.testing.assert_close(call["old_per_token_logps"], call["per_token_logps"], rtol=0, atol=1e-5)
    assert torch.equal(call["shaped"], shaped_by_reference(call, call["per_token_logps"], trainer.args))
    assert not torch.equal(call["shaped"], shaped_by_reference(call, sampled, trainer.args))


@pytest.mark.parametrize("savings", [tiny.PLAIN, {}], ids=["plain", "savings"])
@pytest.mark.parametrize("mode", MODES)
def test_corrects_for_a_sampler_that_is_off(mode, savings, make_with_engine):
    """The correction is a factor of the loss: the sampler moves the ratio, not what is selected."""
    trainer = make_with_engine(
        ShapingRecorder,
        vllm_importance_sampling_mode=mode,
        vllm_importance_sampling_clip_max=1.2,
        **savings,
    )
    vllm_on_cpu.change_sampler(trainer, lambda token, logprob: logprob + (0.5 if token % 2 else -0.5))
    trainer.train()
    assert_trained(trainer)
    assert min(logged(trainer, DIFFERENCE)) == pytest.approx(0.5, abs=1e-4)
    for batch, call in zip(trainer.batches, trainer.calls, strict=True):
        ratio = batch["importance_sampling_ratio"]
        assert ratio.shape[1] == (1 if mode.startswith("sequence") else call["mask"].shape[1])
        assert ratio.max() <= 1.2
        assert ratio.std() > 0


@pytest.mark.parametrize("mode", MODES)
def test_the_pass_for_old_log_probabilities_is_replaced_and_nothing_changes(mode, make_with_engine):
    """Also in the first rollout, where it runs as a check of the ratio."""

    def train(**savings):
        trainer = make_with_engine(vllm_importance_sampling_mode=mode, **SGD, **savings)
        vllm_on_cpu.change_sampler(trainer, lambda token, logprob: logprob + (0.2 if token % 2 else -0.2))
        passes = []

        def note(module, args):
            if not torch.is_grad_enabled():  # only the passes of the loss have gradients
                passes.append(trainer.state.global_step)

        trainer.model.register_forward_pre_hook(note)
        trainer.train()
        return trainer, passes

    (plain, plain_passes), (ours, our_passes) = train(**tiny.PLAIN), train()
    assert set(plain_passes) == {0, 1, 2, 3}
    if trl_has_fused_head():
        assert ours._sampler.is_trls is True
        assert set(our_passes) == {0}
    assert update_difference(ours, plain) < 1e-4


@pytest.mark.parametrize(
    "fields", [*({"vllm_importance_sampling_mode": mode} for mode in MODES), {"off_policy_mask_threshold": 0.1}]
)
def test_log_probabilities_that_the_sampler_does_not_know_poison_nothing(fields, make_with_engine):
    trainer = make_with_engine(ShapingRecorder, **fields)
    vllm_on_cpu.change_sampler(trainer, lambda token, logprob: math.nan if token % 3 else logprob)
    trainer.train()
    assert any(batch["sampling_per_token_logps"].isnan().any() for batch in trainer.batches)
    assert_trained(trainer)
    assert all(call["shaped"].isfinite().all() for call in trainer.calls)
    values = [value for entry in trainer.state.log_history for value in entry.values()]
    assert all(math.isfinite(value) for value in values)


@pytest.mark.parametrize("mode", ["token_truncate", "sequence_mask"])
def test_groups_sampled_anew_bring_the_log_probabilities_that_they_were_sampled_with(mode, make_with_engine):
    trainer = make_with_engine(
        ShapingRecorder,
        dynamic_sampling=2,
        num_generations=2,
        num_iterations=2,
        vllm_importance_sampling_mode=mode,
    )
    trainer.train()
    assert_trained(trainer)
    assert max(logged(trainer, "a3po/dynamic_sampling/discarded")) > 0
    for batch, call in zip(trainer.batches, trainer.calls, strict=True):
        counts = call["mask"].bool()
        sampled, ours = batch["sampling_per_token_logps"][counts], call["old_per_token_logps"][counts]
        torch.testing.assert_close(sampled, ours, rtol=0, atol=1e-4)
        ratio = batch["importance_sampling_ratio"].expand(*counts.shape)[counts]
        torch.testing.assert_close(ratio, torch.ones_like(ratio), rtol=0, atol=1e-3)


@pytest.mark.parametrize("arguments", [dict, tiny.lora], ids=["full", "lora"])
def test_a_server_samples_with_the_weights_as_trained_and_groups_anew(
    arguments, server, make_with_engine, model_dir, tmp_path
):
    with vllm_on_cpu.weights_by_file(model_dir, tmp_path / "weights"):
        trainer = make_with_engine(**server, dynamic_sampling=2, num_generations=2, arguments=arguments())
        trainer.train()
    assert_trained(trainer)
    assert len(logged(trainer, DIFFERENCE)) == 4
    assert max(logged(trainer, DIFFERENCE)) < ROUNDING
    assert max(logged(trainer, "a3po/dynamic_sampling/discarded")) > 0


def test_weights_that_a_server_does_not_get_are_noticed(server, make_with_engine, model_dir, tmp_path):
    """The control of the test above."""
    with vllm_on_cpu.weights_by_file(model_dir, tmp_path / "weights"):
        trainer = make_with_engine(**server)
        trainer.vllm_generation.sync_weights()
        trainer.vllm_generation.sync_weights = lambda: None
        trainer.train()
    assert logged(trainer, DIFFERENCE)[0] < ROUNDING
    assert min(logged(trainer, DIFFERENCE)[1:]) > 1e-2


@pytest.fixture
def _own_memory():
    """What an engine over two processes shares outlives them if they are cut off, and is in the way of the next."""
    _free_shared_memory()
    yield
    _free_shared_memory()


def _free_shared_memory():
    for segment in Path("/dev/shm").glob("*-cpushm_*"):
        segment.unlink()


@pytest.mark.usefixtures("_own_memory")
@pytest.mark.parametrize(
    ("distributed_type", "fields"),
    [
        ("MULTI_CPU", {"vllm_tensor_parallel_size": 1}),
        ("MULTI_CPU", {"vllm_tensor_parallel_size": 2}),
        ("MULTI_CPU", {"vllm_tensor_parallel_size": 2, **tiny.PLAIN}),
        ("MULTI_CPU", {"vllm_tensor_parallel_size": 1, **ANEW}),
        ("MULTI_CPU", {"vllm_tensor_parallel_size": 2, **ANEW}),
        ("MULTI_CPU", {"vllm_mode": "server", **ANEW}),
        ("FSDP", {"vllm_tensor_parallel_size": 2, **ANEW}),
        ("FSDP", {"vllm_mode": "server", **ANEW}),
    ],
    ids=[
        *("two engines", "one engine", "one engine, plain", "two engines, anew", "one engine, anew", "server, anew"),
        *("sharded, one engine, anew", "sharded, server, anew"),
    ],
)
def test_two_processes(distributed_type, fields, model_dir, tmp_path, request):
    if "vllm_mode" in fields:
        fields = {**fields, **request.getfixturevalue("server")}
    launcher = LAUNCHERS[distributed_type]
    result = subprocess.run(
        [sys.executable, *launcher, WORKER, model_dir, tmp_path, json.dumps(fields)],
        capture_output=True,
        text=True,
        timeout=300,
    )
    outputs = [tmp_path / "0.pt", tmp_path / "1.pt"]
    assert all(output.exists() for output in outputs), result.stderr[-3000:]
    first, second = (torch.load(output, weights_only=True) for output in outputs)
    assert first["distributed_type"] == distributed_type
    for entry in first["log"][:-1]:
        assert entry[DIFFERENCE] < ROUNDING
        assert 0 < entry["grad_norm"] < math.inf
        fractions = [entry.get(f"a3po/{polarity}/fraction", 0) for polarity in ("positive", "negative", "zero")]
        assert sum(fractions) == pytest.approx(1)
    if "dynamic_sampling" in fields:
        assert max(entry["a3po/dynamic_sampling/rounds"] for entry in first["log"][:-1]) > 0
    for name, parameter in first["parameters"].items():
        assert torch.equal(parameter, second["parameters"][name]), name
