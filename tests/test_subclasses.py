"""
What a subclass of A3POTrainer may rely on: each sentence of the list in docs/shaping.md.

The docstring of a test quotes the sentence that it is for.
"""

import inspect
import math
import re
import sys
from pathlib import Path

import pytest
import torch
from support import reference, tiny
from support.training import SGD, assert_same_update, make, moved, train, update_difference
from transformers import TrainerCallback
from trl import GRPOTrainer

from trl_a3po import A3POTrainer
from trl_a3po.testing import assert_gradients_follow


GUIDE = Path(__file__).parents[1] / "docs" / "shaping.md"
# An update that is proportional to the gradient.
DESCENT = {**SGD, "max_grad_norm": 0.0, "learning_rate": 1.0}


def logs(trainer):
    """What is logged in training, a dict per log, without the summary at the end."""
    return [log for log in trainer.state.log_history if "train_runtime" not in log]


def sometimes_equal_reward(prompts, completion_ids, **kwargs):
    """All right for every other prompt: groups without spread beside groups with."""
    parity = tiny.parity_reward(completion_ids)
    return [1.0 if int(prompt.split("+")[0]) % 2 else value for prompt, value in zip(prompts, parity, strict=True)]


def test_every_sentence_of_the_guide_has_a_test():
    (section,) = re.findall(r"## What a subclass may rely on\n(.*?)\n## ", GUIDE.read_text("utf-8"), flags=re.DOTALL)
    sentences = {
        " ".join(each.split()) for each in re.findall(r"^- (.*?)(?=\n- |\n\n|\Z)", section, flags=re.M | re.S)
    }
    tests = [value for name, value in vars(sys.modules[__name__]).items() if name.startswith("test_")]
    quoted = {" ".join(inspect.getdoc(test).split()) for test in tests if inspect.getdoc(test)}
    assert len(sentences) == 17
    assert sentences == quoted


# Construction


class ReadsItsOwnAttribute(A3POTrainer):
    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.factor = 2.0

    def shape_advantages(self, advantages, **batch):
        return self.factor * super().shape_advantages(advantages, **batch)

    def current_shaping_settings(self):
        return {**super().current_shaping_settings(), "positive_weight": self.factor}

    def _compute_loss(self, model, inputs):
        return self.factor * super()._compute_loss(model, inputs)

    def _calculate_rewards(self, *args):
        return self.factor * super()._calculate_rewards(*args)

    def _generate_and_score_completions(self, inputs):
        output = super()._generate_and_score_completions(inputs)
        return {**output, "advantages": self.factor * output["advantages"]}

    def _get_per_token_logps_and_entropies(self, *args, **kwargs):
        logps, *others = super()._get_per_token_logps_and_entropies(*args, **kwargs)
        return logps * (self.factor / self.factor), *others


def test_attributes_after_construction(tmp_path):
    """You may set the attributes that your methods read after `super().__init__()`."""
    assert moved(train(tmp_path, ReadsItsOwnAttribute, max_steps=2))


# The rollout


class OwnFields:
    """Adds fields to the rollout, and makes sure that the loss gets those of its rows."""

    losses = 0

    def _generate_and_score_completions(self, inputs):
        output = super()._generate_and_score_completions(inputs)
        sums = (output["completion_ids"] * output["completion_mask"]).sum(1)
        return {
            **output,
            "sums": sums,
            "pairs": torch.stack([sums, 2 * sums], dim=1),
            "names": [f"completion {int(each)}" for each in sums],
            "generated_at": torch.tensor(self.state.global_step),
        }

    def _compute_loss(self, model, inputs):
        sums = (inputs["completion_ids"] * inputs["completion_mask"]).sum(1)
        assert torch.equal(inputs["sums"], sums)
        assert torch.equal(inputs["pairs"], torch.stack([sums, 2 * sums], dim=1))
        assert inputs["names"] == [f"completion {int(each)}" for each in sums]
        assert inputs["generated_at"].dim() == 0
        assert 0 <= self.state.global_step - int(inputs["generated_at"]) <= 3
        self.losses += 1
        return super()._compute_loss(model, inputs)


def test_own_fields(tmp_path):
    """
    Your `_generate_and_score_completions` may add fields to the rollout: tensors or lists with one row per completion,
    or tensors without dimensions.
    """
    for base in (GRPOTrainer, A3POTrainer):
        trainer = train(tmp_path, type("Trainer", (OwnFields, base), {}))
        assert trainer.losses == 3
        assert moved(trainer)


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"dynamic_sampling": 2},
        {"per_device_train_batch_size": 4, "steps_per_generation": 4, "gradient_accumulation_steps": 2},
        {"num_iterations": 2},
        {"trim_padding": False},
        {"skip_zero_advantage": False},
    ],
    ids=str,
)
def test_own_fields_stay_with_their_rows(fields, tmp_path):
    """Each field reaches `_compute_loss` with the rows that it belongs to."""
    trainer_class = type("Trainer", (OwnFields, A3POTrainer), {})
    trainer = train(tmp_path, trainer_class, reward_funcs=sometimes_equal_reward, **fields)
    assert trainer.losses == 3 * fields.get("gradient_accumulation_steps", 1)
    assert moved(trainer)


class ReadsItsFields(OwnFields):
    def shape_advantages(self, advantages, *, sums, pairs, names, generated_at, **batch):
        assert torch.equal(pairs[:, 0], sums)
        assert names == [f"completion {int(each)}" for each in sums]
        assert len(sums) == len(advantages)
        assert generated_at.dim() == 0
        return super().shape_advantages(advantages, **batch)


@pytest.mark.parametrize("fields", [{}, {"gradient_accumulation_steps": 2, "num_iterations": 2}], ids=str)
def test_own_fields_reach_the_hook(fields, tmp_path):
    """It also reaches your hook, if the hook names it."""
    trainer = train(tmp_path, type("Trainer", (ReadsItsFields, A3POTrainer), {}), **fields)
    assert trainer.losses == 3 * fields.get("gradient_accumulation_steps", 1)
    assert moved(trainer)


# TRL's methods


class OwnLoss:
    """Three times the loss, and a penalty on the parameters."""

    def _compute_loss(self, model, inputs):
        penalty = sum((parameter**2).sum() for parameter in model.parameters())
        return 3 * super()._compute_loss(model, inputs) + 1e-4 * penalty


class OwnRewards:
    """Pays for long completions as well."""

    def _calculate_rewards(self, inputs, prompts, completions, completion_ids):
        rewards = super()._calculate_rewards(inputs, prompts, completions, completion_ids)
        return rewards + 0.1 * rewards.new_tensor([[len(ids)] for ids in completion_ids])


class OwnAdvantages:
    """Clips the advantages, and gives the shortest completions none."""

    def _generate_and_score_completions(self, inputs):
        output = super()._generate_and_score_completions(inputs)
        long_enough = output["completion_mask"].sum(1) > 2
        return {**output, "advantages": output["advantages"].clamp(-0.5, 0.5) * long_enough}


@pytest.mark.parametrize("mixin", [OwnLoss, OwnRewards, OwnAdvantages])
def test_methods_of_trl(mixin, tmp_path):
    """
    You may override `_compute_loss`, `_calculate_rewards` and `_generate_and_score_completions` as on `GRPOTrainer`.
    """
    theirs = train(tmp_path, type("Theirs", (mixin, GRPOTrainer), {}), **DESCENT)
    plain = train(tmp_path, type("Plain", (mixin, A3POTrainer), {}), **DESCENT, **tiny.NEUTRAL)
    assert_same_update(plain, theirs)
    neutral = {name: value for name, value in tiny.NEUTRAL.items() if name.endswith("_scale")}
    efficient = train(tmp_path, type("Efficient", (mixin, A3POTrainer), {}), **DESCENT, **neutral)
    assert update_difference(efficient, theirs) < 1e-4
    without = train(tmp_path, A3POTrainer, **DESCENT, **tiny.NEUTRAL)
    assert any(not value.equal(tiny.parameters(without)[name]) for name, value in tiny.parameters(plain).items())


class PlainLoss(A3POTrainer):
    def _compute_loss(self, model, inputs):
        logits = model(inputs["completion_ids"], attention_mask=inputs["completion_mask"]).logits
        return logits.logsumexp(-1).mean()


class ShapedLoss(PlainLoss):
    def compute_loss(self, model, inputs, *args, **kwargs):
        return A3POTrainer._compute_loss(self, model, inputs)


@pytest.mark.parametrize("trainer_class", [PlainLoss, ShapedLoss, A3POTrainer])
def test_a_loss_without_super(trainer_class, tmp_path, caplog):
    """If your loss does not call `super()`, nothing is shaped, and a warning says so."""
    # Even if no completion has a gradient, the loss runs.
    trainer = train(tmp_path, trainer_class, reward_funcs=tiny.equal_reward, max_steps=2)
    said = [each.getMessage() for each in caplog.records if "no advantage was shaped" in each.getMessage()]
    trainer.create_model_card()
    card = (tmp_path / "README.md").read_text("utf-8")
    if trainer_class is PlainLoss:
        (message,) = said
        assert message.startswith("The loss of PlainLoss does not call `super()`")
    else:
        assert not said
    assert ("None: the loss of `PlainLoss` does not call that of TRL." in card) == bool(said)


class MeanOfMicroBatch(GRPOTrainer):
    def _compute_loss(self, model, inputs):
        lengths = inputs["completion_mask"].sum(1).float()
        return super()._compute_loss(model, {**inputs, "advantages": inputs["advantages"] * lengths / lengths.mean()})


class RenamesRewards(GRPOTrainer):
    def _calculate_rewards(self, *args):
        return super()._calculate_rewards(*args)


def test_bases(tmp_path):
    """
    Among the bases, your classes come first: one behind `A3POTrainer` that changes the loss or the rollout is refused.
    """
    behind = type("Behind", (A3POTrainer, MeanOfMicroBatch), {})
    with pytest.raises(TypeError, match=r"Put it first: `class Behind\(MeanOfMicroBatch, A3POTrainer\)`"):
        make(tmp_path, behind)
    fields = {**DESCENT, "per_device_train_batch_size": 2, "gradient_accumulation_steps": 4}
    neutral = {name: value for name, value in tiny.NEUTRAL.items() if name.endswith("_scale")}
    first = train(tmp_path, type("First", (MeanOfMicroBatch, A3POTrainer), {}), **fields, **neutral)
    assert update_difference(first, train(tmp_path, MeanOfMicroBatch, **fields)) < 1e-4
    assert moved(train(tmp_path, type("Allowed", (A3POTrainer, RenamesRewards), {})))
    for name in (
        *("_generate_and_score_completions", "_prepare_inputs", "compute_loss", "_compute_loss"),
        "_get_per_token_logps_and_entropies",
    ):
        changing = type("Changing", (GRPOTrainer,), {name: lambda self, *args, **kwargs: None})
        with pytest.raises(TypeError, match=f"`Changing` comes after `A3POTrainer` .* and overrides `{name}`"):
            make(tmp_path, type("Behind", (A3POTrainer, changing), {}))


class LogsEveryStep(TrainerCallback):
    def on_step_end(self, args, state, control, **kwargs):
        control.should_log = True


class AddsAnother(TrainerCallback):
    def __init__(self, trainer):
        self._trainer = trainer

    def on_train_begin(self, args, state, control, **kwargs):
        self._trainer.add_callback(LogsEveryStep())


@pytest.mark.parametrize("when", ["before training", "in training"])
def test_callbacks(when, tmp_path):
    """You may add callbacks at any time, and a callback may ask for a log."""
    expected = logs(train(tmp_path, A3POTrainer, logging_steps=1))
    trainer = make(tmp_path, A3POTrainer, logging_strategy="no")
    trainer.add_callback(LogsEveryStep() if when == "before training" else AddsAnother(trainer))
    trainer.train()
    found = logs(trainer)
    assert len(found) == len(expected) == 3
    for one, other in zip(found, expected, strict=True):
        names = [name for name in other if name.startswith("a3po/") or name in ("entropy", "loss", "reward")]
        assert {name: one.get(name) for name in names} == pytest.approx({name: other[name] for name in names})


# What the hook is told


class Doubles(A3POTrainer):
    def _calculate_rewards(self, *args):
        return 2 * super()._calculate_rewards(*args)


class PaysForRank(Doubles):
    """Keeps the rewards that it returns, and those that the hook gets."""

    def _calculate_rewards(self, *args):
        rewards = super()._calculate_rewards(*args)
        rewards = rewards + 0.25 * torch.arange(len(rewards), device=rewards.device)[:, None]
        self.returned = [*getattr(self, "returned", []), rewards]
        return rewards

    def shape_advantages(self, advantages, *, rewards, **batch):
        if self.is_in_train:
            self.told = [*getattr(self, "told", []), rewards.clone()]
        return super().shape_advantages(advantages, rewards=rewards, **batch)


def test_rewards(tmp_path):
    """The hook gets the rewards that `_calculate_rewards` of your class returns, summed with their weights."""
    rewards = [tiny.parity_reward, tiny.sometimes_none_reward]
    fields = {"reward_weights": [1.0, 0.5], "per_device_train_batch_size": 4, "gradient_accumulation_steps": 2}
    trainer = train(tmp_path, PaysForRank, reward_funcs=rewards, **fields)
    assert len(trainer.returned) == 3
    for step, returned in enumerate(trainer.returned):
        expected = (returned * returned.new_tensor([1.0, 0.5])).nansum(1)
        told = torch.cat(trainer.told[2 * step : 2 * step + 2])
        torch.testing.assert_close(told.sort().values, expected.sort().values)
        assert logs(trainer)[step]["reward"] == pytest.approx(float(told.mean()))


class Ramp(A3POTrainer):
    """The weight of negative completions rises from 0 to 1 in two steps."""

    def current_shaping_settings(self):
        return {**super().current_shaping_settings(), "negative_weight": min(1.0, self.state.global_step / 2)}


def test_settings_of_ones_own_and_the_loss(tmp_path):
    """
    You may override `current_shaping_settings` to change weights, ratios and scales over time: the loss follows it.
    """
    trainer = make(tmp_path, Ramp, max_steps=4, scale_decay="constant", positive_low_ratio=0.3)

    def slow(advantages, *, old_per_token_logps, mask, progress, **batch):
        settings = {**trainer.args.shaping_settings, "negative_weight": min(1.0, math.ceil(4 * progress) / 2)}
        rows = [tensor.tolist() for tensor in (advantages, old_per_token_logps, mask)]
        return advantages.new_tensor(reference.shape_advantages(*rows, **settings))

    assert_gradients_follow(trainer, slow)


class HalfWeight(A3POTrainer):
    """Where the configuration has no negative completions at all."""

    def current_shaping_settings(self):
        return {**super().current_shaping_settings(), "negative_weight": 0.5}


# Without a scale: the configuration refuses one for completions without weight.
NO_NEGATIVES = {"negative_weight": 0.0, "negative_high_scale": 1.0}
OF_TWO_STEPS = {"per_device_train_batch_size": 4, "steps_per_generation": 4, "gradient_accumulation_steps": 2}


@pytest.mark.parametrize(
    ("trainer_class", "fields"),
    [(HalfWeight, NO_NEGATIVES), (Ramp, {}), (Ramp, OF_TWO_STEPS)],
    ids=["other than configured", "changing", "changing within a rollout"],
)
def test_settings_of_ones_own_and_skipping(trainer_class, fields, tmp_path):
    """The rows that are skipped follow it too."""
    fields = {**DESCENT, **fields, "max_steps": 4, "reward_funcs": sometimes_equal_reward}
    whole = train(tmp_path, trainer_class, skip_zero_advantage=False, **fields)
    assert update_difference(train(tmp_path, trainer_class, **fields), whole) < 1e-4
    configured = train(tmp_path, A3POTrainer, skip_zero_advantage=False, **fields)
    assert any(not value.equal(tiny.parameters(whole)[name]) for name, value in tiny.parameters(configured).items())


class NoScales(A3POTrainer):
    """Selects nothing, and halves the weight of negative completions."""

    def current_shaping_settings(self):
        settings = {**super().current_shaping_settings(), "negative_weight": 0.5}
        return {name: 1.0 if name.endswith("_scale") else value for name, value in settings.items()}


def test_settings_of_ones_own_and_metrics(tmp_path):
    """The metrics follow it too."""
    found = logs(train(tmp_path, NoScales, **tiny.PLAIN))
    expected = logs(train(tmp_path, A3POTrainer, **tiny.NEUTRAL, negative_weight=0.5))
    assert len(found) == 3
    for one, other in zip(found, expected, strict=True):
        assert one["a3po/scale/positive_low"] == one["a3po/scale/negative_high"] == 1.0
        assert one["a3po/negative/selected_fraction"] == 0.0
        names = [name for name in other if name.startswith("a3po/")]
        assert {name: one.get(name) for name in names} == pytest.approx({name: other[name] for name in names})


# The hook


class RaisesEverything(A3POTrainer):
    """One more than GRPO's advantage, on every token."""

    def shape_advantages(self, advantages, *, mask, **batch):
        if self.is_in_train:
            self.rows = [*getattr(self, "rows", []), *mask.any(1).tolist()]
        return advantages + 1.0


@pytest.mark.parametrize("reward", [tiny.equal_reward, sometimes_equal_reward])
def test_every_row(reward, tmp_path):
    """
    If you override `shape_advantages` without the mark `completionwise`, it sees every row, including those with an
    advantage of zero.
    """
    trainer = train(tmp_path, RaisesEverything, reward_funcs=reward)
    assert trainer.rows == [True] * 3 * 8
    assert moved(trainer)


@pytest.mark.parametrize("reward", [tiny.equal_reward, sometimes_equal_reward])
def test_assigned_on_an_instance(reward, tmp_path):
    """You may also assign it on an instance before training: `trainer.shape_advantages = function`."""
    rows = []

    def function(advantages, *, mask, **batch):
        rows.extend(mask.any(1).tolist())
        return advantages + 1.0

    trainer = make(tmp_path, A3POTrainer, reward_funcs=reward, **DESCENT)
    trainer.shape_advantages, trainer.start = function, tiny.parameters(trainer)
    trainer.train()
    assert rows == [True] * 3 * 8
    assert_same_update(trainer, train(tmp_path, RaisesEverything, reward_funcs=reward, **DESCENT))


TENSORS = ["advantages", "per_token_logps", "old_per_token_logps", "entropies", "mask", "rewards"]


@pytest.mark.parametrize("num_iterations", [1, 2])
@pytest.mark.parametrize("name", TENSORS)
def test_changes_in_place(name, num_iterations, tmp_path):
    """
    The tensors that it gets are reused by later iterations: it must not change them in place, and an error says so.
    """

    class Careless(A3POTrainer):
        def shape_advantages(self, advantages, **batch):
            {"advantages": advantages, **batch}[name].mul_(2)
            return advantages

    trainer = make(tmp_path, Careless, num_iterations=num_iterations)
    with pytest.raises(ValueError, match=rf"`shape_advantages` changed .*`{name}`.* in place"):
        trainer.train()


# The limit


class OtherLogps(A3POTrainer):
    """Changes log-probabilities after the hook has run, and keeps what it saw."""

    def _get_per_token_logps_and_entropies(self, *args, **kwargs):
        logps, *others = super()._get_per_token_logps_and_entropies(*args, **kwargs)
        self.before = logps.detach().clone()
        return 2 * logps, *others

    def shape_advantages(self, advantages, *, per_token_logps, **batch):
        if self.is_in_train:
            self.seen = per_token_logps.clone()
        return super().shape_advantages(advantages, per_token_logps=per_token_logps, **batch)


def test_other_log_probabilities(tmp_path):
    """
    The hook runs inside `_get_per_token_logps_and_entropies`, and does not see what you change there after `super()`.
    """
    trainer = train(tmp_path, OtherLogps, max_steps=1)
    assert torch.equal(trainer.seen, trainer.before)
    assert (trainer.before != 0).any()


class RanksTheOtherWay(A3POTrainer):
    def shape_advantages(self, advantages, *, old_per_token_logps, **batch):
        return super().shape_advantages(advantages, old_per_token_logps=-old_per_token_logps, **batch)


def test_other_arguments(tmp_path):
    """You may change log-probabilities in your `shape_advantages`, and pass them to `super().shape_advantages`."""
    trainer = make(tmp_path, RanksTheOtherWay, scale_decay="constant", positive_low_ratio=0.4)

    def slow(advantages, *, old_per_token_logps, mask, **batch):
        rows = [tensor.tolist() for tensor in (advantages, -old_per_token_logps, mask)]
        return advantages.new_tensor(reference.shape_advantages(*rows, **trainer.args.shaping_settings))

    assert_gradients_follow(trainer, slow)
