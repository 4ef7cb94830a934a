"""The check that users' tests run finds what it is for."""

import pytest
import torch
from support import tiny
from support.training import make, moved

from trl_a3po import A3POTrainer
from trl_a3po.testing import assert_gradients_follow


class Twice(A3POTrainer):
    """At first twice the advantage of likely tokens, and against the others; also in groups without a signal."""

    def shape_advantages(self, advantages, *, old_per_token_logps, rewards, mask, progress, **batch):
        likely = old_per_token_logps > -1
        shaped = torch.where(likely, 2.0 - progress, -0.5) * (advantages[:, None] + 0.25 * (rewards == 0)[:, None])
        self._metrics["train"]["a metric of its own"].append(1.0)
        return shaped / mask  # infinite, or not a number, where masked


def as_meant(advantages, *, old_per_token_logps, rewards, progress, **batch):
    rows = []
    for advantage, reward, logps in zip(
        advantages.tolist(), rewards.tolist(), old_per_token_logps.tolist(), strict=True
    ):
        advantage += 0.25 if reward == 0 else 0.0
        rows.append([(2.0 - progress) * advantage if logp > -1 else -0.5 * advantage for logp in logps])
    return torch.tensor(rows, dtype=torch.float64)


@pytest.mark.parametrize("level", ["token", "sequence"])
@pytest.mark.parametrize("loss_type", tiny.LOSS_TYPES)
def test_accepts_what_is_meant_and_touches_nothing(loss_type, level, tmp_path):
    trainer = make(tmp_path, Twice, loss_type=loss_type, importance_sampling_level=level)
    assert_gradients_follow(trainer, as_meant)
    assert not moved(trainer)
    assert type(trainer) is Twice
    assert not trainer._metrics["train"]
    assert not trainer._polarity_sums
    assert trainer.importance_sampling_level == level


@pytest.mark.parametrize(
    "fields", [{"beta": 0.1}, {"top_entropy_quantile": 0.5}, {"delta": 1.5}, {"log_tokens": 1}], ids=str
)
def test_accepts_it_with_options_that_change_the_loss(fields, model_dir, tmp_path):
    trainer = make(tmp_path, Twice, model=model_dir, **fields)
    for seed in range(3):
        assert_gradients_follow(trainer, as_meant, seed=seed)


def test_takes_one_advantage_per_completion(tmp_path):
    settings = {"positive_low_scale": 1.0, "negative_high_scale": 1.0, "positive_weight": 2.0}
    trainer = make(tmp_path, A3POTrainer, **settings)
    assert_gradients_follow(trainer, lambda advantages, **_: advantages * torch.where(advantages > 0, 2.0, 1.0))


@pytest.mark.parametrize(
    "wrong",
    [
        lambda advantages, **given: as_meant(advantages, **given) * 1.01,
        lambda advantages, **given: -as_meant(advantages, **given),
        lambda advantages, **given: as_meant(advantages, **{**given, "old_per_token_logps": given["per_token_logps"]}),
        lambda advantages, **given: as_meant(advantages, **given) * (advantages != 0)[:, None],
        lambda advantages, **given: as_meant(advantages, **given) * (advantages.new_tensor(range(8)) != 3),
        lambda advantages, **given: as_meant(advantages, **{**given, "progress": 0.0}),
    ],
    ids=["size", "sign", "policy", "zero advantages", "one token", "progress"],
)
def test_finds_what_is_not(wrong, tmp_path):
    match = r"Token \d of completion \d \(advantage .*, reward .*\) has the gradient .*\. Expected .*, because"
    with pytest.raises(AssertionError, match=match):
        assert_gradients_follow(make(tmp_path, Twice), wrong)


class InPlace(A3POTrainer):
    def shape_advantages(self, advantages, **batch):
        return advantages.mul_(2)


def test_finds_a_change_in_place(tmp_path):
    with pytest.raises(ValueError, match="`shape_advantages` changed `advantages` in place"):
        assert_gradients_follow(make(tmp_path, InPlace), lambda advantages, **batch: advantages * 2)


class LastTokens(A3POTrainer):
    """Less advantage for each token that follows: of those that count, or of all."""

    holes = False

    def shape_advantages(self, advantages, *, mask, **batch):
        counted = torch.ones_like(mask) if self.holes else mask
        counted = counted * (mask.flip(1).cumsum(1).flip(1) > 0)
        return advantages[:, None] * 0.5 ** (counted.flip(1).cumsum(1).flip(1) - 1)


@pytest.mark.parametrize("holes", [False, True])
def test_finds_what_is_wrong_after_tokens_of_a_tool(holes, tmp_path):
    def reference(advantages, *, mask, **batch):
        shaped = advantages.new_zeros(mask.shape)
        for row, counts in enumerate(mask.bool()):
            for distance, token in enumerate(reversed(counts.nonzero().flatten().tolist())):
                shaped[row, token] = advantages[row] * 0.5**distance
        return shaped

    trainer = make(tmp_path, LastTokens)
    trainer.holes = holes
    if holes:
        with pytest.raises(AssertionError, match="Token"):
            assert_gradients_follow(trainer, reference)
    else:
        assert_gradients_follow(trainer, reference)


class ByDifficulty(A3POTrainer):
    def _compute_loss(self, model, inputs):
        return super()._compute_loss(model, {**inputs, "advantages": inputs["advantages"] * inputs["difficulty"]})


def test_takes_the_fields_that_a_loss_reads(tmp_path):
    trainer = make(tmp_path, ByDifficulty, positive_low_scale=1.0, negative_high_scale=1.0)
    seen = []

    def reference(advantages, **batch):
        seen.append(advantages.tolist())
        return advantages

    with pytest.raises(ValueError, match=r"reads 'difficulty', .* fields=\{'difficulty': torch.zeros\(6\)\}"):
        assert_gradients_follow(trainer, reference)
    difficulty = torch.tensor([0.5, 1.0, 1.0, 1.0, 1.0, 1.0], device=tiny.DEVICE)
    assert_gradients_follow(trainer, reference, fields={"difficulty": difficulty})
    assert seen[-1] == pytest.approx([0.6, -0.7, 0.0, 0.0, -0.5, 0.0])


def test_hook_and_reference_get_the_fields_that_they_name(tmp_path):
    class ByWeight(A3POTrainer):
        def _generate_and_score_completions(self, inputs):
            rollout = super()._generate_and_score_completions(inputs)
            return {**rollout, "weight": torch.ones_like(rollout["advantages"])}

        def shape_advantages(self, advantages, *, weight, **batch):
            return advantages * weight

    class FromBatch(A3POTrainer):
        def shape_advantages(self, advantages, **batch):
            return advantages * batch["weight"]

    def reference(advantages, *, weight, **batch):
        return advantages.new_tensor([a * w for a, w in zip(advantages.tolist(), weight.tolist(), strict=True)])

    fields = {"weight": torch.tensor([0.5, 2.0, 1.0, 1.0, 1.0, 1.0])}
    assert_gradients_follow(make(tmp_path, ByWeight), reference, fields=fields)
    with pytest.raises(AssertionError, match="completion 0"):
        assert_gradients_follow(make(tmp_path, ByWeight), lambda advantages, **batch: advantages, fields=fields)
    with pytest.raises(ValueError, match=r"takes `weight`.* pass it in `fields`"):
        assert_gradients_follow(make(tmp_path, ByWeight), reference)
    with pytest.raises(ValueError, match=r"reads 'weight'.* name it there"):
        assert_gradients_follow(make(tmp_path, FromBatch), reference, fields=fields)


def test_says_that_the_class_does_not_override_the_hook(tmp_path):
    class Misspelled(A3POTrainer):
        def shape_advantage(self, advantages, **batch):
            return advantages * 2

    with pytest.raises(AssertionError, match="Misspelled does not override `shape_advantages`"):
        assert_gradients_follow(make(tmp_path, Misspelled), lambda advantages, **batch: advantages * 2)


def test_says_that_the_hook_has_no_such_argument(tmp_path):
    class Misspelled(A3POTrainer):
        def shape_advantages(self, advantages, **batch):
            return advantages[:, None] * batch["entropy"]

    with pytest.raises(ValueError, match=r"reads 'entropy', which is not an argument of the hook.* entropies"):
        assert_gradients_follow(make(tmp_path, Misspelled), as_meant)


@pytest.mark.parametrize("returned", [None, torch.ones(3)], ids=["nothing", "shape"])
def test_refuses_what_is_not_a_reference(returned, tmp_path):
    with pytest.raises(ValueError, match=r"`reference` must return .* \(6, 8\) or \(B,\) = \(6,\), got"):
        assert_gradients_follow(make(tmp_path, Twice), lambda advantages, **batch: returned)


def test_refuses_what_is_not_a_trainer():
    with pytest.raises(TypeError, match="`trainer` must be an `A3POTrainer`"):
        assert_gradients_follow(Twice, as_meant)
