"""The loss, given log-probabilities: each token's gradient is GRPO's times the weight of that token."""

import math

import pytest
import torch
from support import reference, tiny
from support.training import make
from trl import GRPOTrainer

from trl_a3po import A3POTrainer


ALL_ENDS = {
    "positive_low_ratio": 0.3,
    "positive_low_scale": 2.0,
    "positive_high_ratio": 0.2,
    "positive_high_scale": 0.5,
    "negative_low_ratio": 0.25,
    "negative_low_scale": 1.5,
    "negative_high_ratio": 0.4,
    "negative_high_scale": 3.0,
    "positive_weight": 1.25,
    "negative_weight": 0.75,
}


def evaluating(*args, **kwargs):
    """A trainer whose loss is that of an evaluation: no accumulation, the batch is the whole."""
    trainer = make(*args, **kwargs)
    trainer.model.eval()
    return trainer


def batch(aligned, seed=0, tools=False, spread=0.4):
    """A micro-batch of 6 completions of up to 12 tokens, one of them masked whole, one of zero advantage."""
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.tensor([12, 1, 7, 0, 9, 5])
    ids = torch.randint(3, 40, (6, 12), generator=generator)
    logps = -3 * torch.rand(6, 12, generator=generator)
    mask = (torch.arange(12) < lengths[:, None]).long()
    inputs = {
        "prompt_ids": ids[:, :2],
        "prompt_mask": torch.ones(6, 2, dtype=torch.long),
        "completion_ids": ids,
        "completion_mask": mask,
        "advantages": torch.tensor([1.2, 0.7, -0.9, -1.1, -0.6, 0.0]),
        "num_items_in_batch": mask.sum(),
        "ref_per_token_logps": logps + 0.3 * torch.randn(6, 12, generator=generator),
    }
    if tools:
        inputs["tool_mask"] = torch.randint(0, 2, (6, 12), generator=generator)
    if not aligned:  # some ratios well beyond the clipping range
        inputs["old_per_token_logps"] = logps + spread * torch.randn(6, 12, generator=generator)
    entropies = torch.rand(6, 12, generator=generator)
    inputs = {name: value.to(tiny.DEVICE) for name, value in inputs.items()}
    return inputs, logps.to(tiny.DEVICE), entropies.to(tiny.DEVICE)


def gradient(trainer, inputs, logps, entropies, monkeypatch):
    """Gradient of the trainer's loss with respect to the log-probabilities, that no model computes."""
    leaf = logps.clone().requires_grad_()

    def given(self, *args, **kwargs):
        values = (leaf, entropies, leaf.new_zeros(()))
        return values if hasattr(self, "aux_loss_enabled") else values[:2]  # the third came with TRL 1.7

    with monkeypatch.context() as patch:
        patch.setattr(GRPOTrainer, "_get_per_token_logps_and_entropies", given)
        loss = trainer.compute_loss(trainer.model, inputs)
    return torch.autograd.grad(loss, leaf)[0]


def expected_weights(inputs, metric, settings=ALL_ENDS):
    mask = inputs["completion_mask"] * inputs.get("tool_mask", 1)
    signs = inputs["advantages"].sign()
    rows = reference.shape_advantages(signs.tolist(), metric.tolist(), mask.tolist(), **settings)
    return signs.new_tensor(rows) * signs[:, None]


@pytest.mark.parametrize("tools", [False, True])
@pytest.mark.parametrize("aligned", [False, True])
@pytest.mark.parametrize("loss_type", tiny.LOSS_TYPES)
def test_token_level(loss_type, aligned, tools, tmp_path, monkeypatch):
    inputs, logps, entropies = batch(aligned, tools=tools)
    plain = gradient(evaluating(tmp_path, GRPOTrainer, loss_type=loss_type), inputs, logps, entropies, monkeypatch)
    ours = gradient(
        evaluating(tmp_path, A3POTrainer, loss_type=loss_type, **ALL_ENDS), inputs, logps, entropies, monkeypatch
    )
    weights = expected_weights(inputs, inputs.get("old_per_token_logps", logps))
    assert plain.count_nonzero() > 8
    torch.testing.assert_close(ours, plain * weights)


@pytest.mark.parametrize("loss_type", tiny.LOSS_TYPES)
def test_entropy_ranks_where_it_is_the_metric(loss_type, tmp_path, monkeypatch):
    inputs, logps, entropies = batch(aligned=False)
    plain = gradient(evaluating(tmp_path, GRPOTrainer, loss_type=loss_type), inputs, logps, entropies, monkeypatch)
    trainer = evaluating(tmp_path, A3POTrainer, loss_type=loss_type, token_metric="entropy", **ALL_ENDS)
    ours = gradient(trainer, inputs, logps, entropies, monkeypatch)
    torch.testing.assert_close(ours, plain * expected_weights(inputs, entropies))


@pytest.mark.parametrize(
    "fields",
    [
        {"delta": 1.5},
        {"epsilon_high": 0.28},
        {"top_entropy_quantile": 0.5},
        {"off_policy_mask_threshold": 0.2},
    ],
    ids=str,
)
@pytest.mark.parametrize("loss_type", ["grpo", "dapo"])
def test_options_that_change_the_policy_term(loss_type, fields, tmp_path, monkeypatch):
    inputs, logps, entropies = batch(aligned=False)
    fields = {"loss_type": loss_type, **fields}
    plain = gradient(evaluating(tmp_path, GRPOTrainer, **fields), inputs, logps, entropies, monkeypatch)
    ours = gradient(evaluating(tmp_path, A3POTrainer, **fields, **ALL_ENDS), inputs, logps, entropies, monkeypatch)
    torch.testing.assert_close(ours, plain * expected_weights(inputs, inputs["old_per_token_logps"]))


@pytest.mark.parametrize("use_bias_correction_kl", [False, True])
@pytest.mark.parametrize("loss_type", tiny.LOSS_TYPES)
def test_the_kl_term_is_left_alone(loss_type, use_bias_correction_kl, tmp_path, monkeypatch):
    inputs, logps, entropies = batch(aligned=False)
    fields = {"loss_type": loss_type, "use_bias_correction_kl": use_bias_correction_kl}
    gradients = {}
    for trainer_class, shaping in ((GRPOTrainer, {}), (A3POTrainer, ALL_ENDS)):
        for beta in (0.0, 0.1):
            trainer = evaluating(tmp_path, trainer_class, **fields, **shaping)
            trainer.beta = beta  # the log-probabilities of the reference are given
            gradients[trainer_class, beta] = gradient(trainer, inputs, logps, entropies, monkeypatch)
    kl, our_kl = (gradients[trainer, 0.1] - gradients[trainer, 0.0] for trainer in (GRPOTrainer, A3POTrainer))
    assert kl.count_nonzero() > 8
    torch.testing.assert_close(our_kl, kl, rtol=1e-4, atol=1e-6)


# Sequence level. The definition is GSPO-token's (arXiv 2507.18071, section 4.3): ratio s_i * pi_t / sg[pi_t], with s_i
# the sequence's ratio, each token with an advantage of its own.


def gspo_token_gradient(trainer, inputs, logps, advantages, loss_type):
    """Written from the definition, a completion and a token at a time. `advantages` is (B, T)."""
    leaf = logps.clone().requires_grad_()
    old = inputs["old_per_token_logps"]
    low, high = 1 - trainer.epsilon_low, 1 + trainer.epsilon_high
    total = []
    for i, counts in enumerate(inputs["completion_mask"].bool()):
        tokens = counts.nonzero()[:, 0].tolist()
        if not tokens:
            continue
        sequence_ratio = math.exp(sum(float(logps[i, t] - old[i, t]) for t in tokens) / len(tokens))
        losses = []
        for t in tokens:
            ratio = sequence_ratio * (leaf[i, t] - leaf[i, t].detach()).exp()
            advantage = advantages[i, t]
            if loss_type == "sapo":
                temperature = trainer.args.sapo_temperature_pos if advantage > 0 else trainer.args.sapo_temperature_neg
                losses.append(-torch.sigmoid(temperature * (ratio - 1)) * 4 / temperature * advantage)
            else:
                losses.append(-torch.min(ratio * advantage, ratio.clamp(low, high) * advantage))
        total.append((torch.stack(losses).sum(), len(tokens)))
    rows, tokens = len(inputs["advantages"]), int(inputs["completion_mask"].sum())
    if loss_type in ("grpo", "sapo"):
        loss = sum(row / length for row, length in total) / rows
    elif loss_type == "luspo":
        loss = sum(row for row, _ in total) / rows
    elif loss_type == "dr_grpo":
        loss = sum(row for row, _ in total) / (rows * trainer.max_completion_length)
    else:  # bnpo, dapo
        loss = sum(row for row, _ in total) / tokens
    return torch.autograd.grad(loss, leaf)[0]


@pytest.mark.parametrize("loss_type", [loss for loss in tiny.LOSS_TYPES if loss not in ("cispo", "vespo")])
def test_sequence_level_is_gspo_token(loss_type, tmp_path, monkeypatch):
    inputs, logps, entropies = batch(aligned=False)
    fields = {"loss_type": loss_type, "importance_sampling_level": "sequence"}
    trainer = evaluating(tmp_path, A3POTrainer, **fields, **ALL_ENDS)
    ours = gradient(trainer, inputs, logps, entropies, monkeypatch)
    advantages = inputs["advantages"][:, None] * expected_weights(inputs, inputs["old_per_token_logps"])
    torch.testing.assert_close(ours, gspo_token_gradient(trainer, inputs, logps, advantages, loss_type))
    assert trainer.importance_sampling_level == "sequence"
    # And with one advantage per completion GSPO-token is GSPO, as TRL computes it.
    plain = gradient(evaluating(tmp_path, GRPOTrainer, **fields), inputs, logps, entropies, monkeypatch)
    advantages = inputs["advantages"][:, None].expand(logps.shape)
    torch.testing.assert_close(plain, gspo_token_gradient(trainer, inputs, logps, advantages, loss_type))


@pytest.mark.parametrize("loss_type", ["cispo", "vespo"])
def test_sequence_level_where_the_ratio_has_no_gradient(loss_type, tmp_path, monkeypatch):
    inputs, logps, entropies = batch(aligned=False)
    fields = {"loss_type": loss_type, "importance_sampling_level": "sequence"}
    plain = gradient(evaluating(tmp_path, GRPOTrainer, **fields), inputs, logps, entropies, monkeypatch)
    ours = gradient(evaluating(tmp_path, A3POTrainer, **fields, **ALL_ENDS), inputs, logps, entropies, monkeypatch)
    torch.testing.assert_close(ours, plain * expected_weights(inputs, inputs["old_per_token_logps"]))


def test_sequence_level_refuses_to_change_the_kl_term(tmp_path):
    fields = {"importance_sampling_level": "sequence", "beta": 0.1, "use_bias_correction_kl": True}
    with pytest.raises(ValueError, match=r"`importance_sampling_level='sequence'` with `beta=0.1`.*Set `use_bias"):
        evaluating(tmp_path, A3POTrainer, **fields)


def test_a_hook_that_was_assigned_must_not_change_the_kl_term_either(tmp_path, monkeypatch):
    fields = {"importance_sampling_level": "sequence", "loss_type": "grpo", "use_bias_correction_kl": True}
    neutral = {"positive_low_scale": 1.0, "negative_high_scale": 1.0}
    trainer = evaluating(tmp_path, A3POTrainer, **fields, **neutral)
    trainer.beta = trainer.args.beta = 0.1  # the log-probabilities of the reference are given
    inputs, logps, entropies = batch(aligned=False)
    assert gradient(trainer, inputs, logps, entropies, monkeypatch).count_nonzero() > 0
    trainer.shape_advantages = lambda advantages, *, mask, **others: advantages[:, None] * mask
    with pytest.raises(ValueError, match=r"`importance_sampling_level='sequence'` with `beta=0.1`.*Set `use_bias"):
        gradient(trainer, inputs, logps, entropies, monkeypatch)


def test_the_mismatch_is_measured_with_the_log_probabilities_of_the_rollout(tmp_path, monkeypatch):
    trainer = evaluating(tmp_path, A3POTrainer, importance_sampling_level="sequence", **ALL_ENDS)
    inputs, logps, entropies = batch(aligned=False)
    measured = []
    monkeypatch.setattr(
        trainer._signal_budget, "add_trained", lambda inputs, *_, **named: measured.append((inputs, named))
    )
    trainer.model.train()
    trainer.current_gradient_accumulation_steps = 1  # as transformers sets it
    gradient(trainer, inputs, logps, entropies, monkeypatch)
    ((of_loss, named),) = measured
    assert torch.equal(named["old_logps"], inputs["old_per_token_logps"])
    assert not torch.equal(of_loss["old_per_token_logps"], inputs["old_per_token_logps"])


@pytest.mark.parametrize("level", ["token", "sequence"])
@pytest.mark.parametrize("loss_type", tiny.LOSS_TYPES)
def test_polarity_weights_alone_need_no_tokens(loss_type, level, tmp_path, monkeypatch):
    inputs, logps, entropies = batch(aligned=False)
    fields = {"loss_type": loss_type, "importance_sampling_level": level}
    settings = {"positive_low_scale": 1.0, "positive_weight": 2.0, "negative_weight": 0.0}
    plain = gradient(evaluating(tmp_path, GRPOTrainer, **fields), inputs, logps, entropies, monkeypatch)
    ours = gradient(evaluating(tmp_path, A3POTrainer, **fields, **settings), inputs, logps, entropies, monkeypatch)
    weights = torch.where(inputs["advantages"] > 0, 2.0, 0.0)[:, None]
    torch.testing.assert_close(ours, plain * weights)


def test_the_rollout_is_not_shaped(tmp_path, monkeypatch):
    inputs, logps, entropies = batch(aligned=False)
    before = {name: value.clone() for name, value in inputs.items()}
    trainer = evaluating(tmp_path, A3POTrainer, importance_sampling_level="sequence", **ALL_ENDS)
    first = gradient(trainer, inputs, logps, entropies, monkeypatch)
    second = gradient(trainer, inputs, logps, entropies, monkeypatch)
    assert inputs.keys() == before.keys()
    assert all(torch.equal(inputs[name], before[name]) for name in inputs)
    assert torch.equal(first, second)
