"""Subclasses that work on GRPOTrainer work here: attributes set late, methods overridden, fields of their own."""

import pytest
import torch
from support import tiny
from trl import GRPOConfig, GRPOTrainer

from trl_a3po import A3POConfig, A3POTrainer


NEUTRAL_WITH_SAVINGS = {name: value for name, value in tiny.NEUTRAL.items() if name not in tiny.PLAIN}


def late_attribute(method, change):
    """A subclass whose method needs what its `__init__` sets only after that of the base."""

    def subclass(base):
        class Late(base):
            def __init__(self, *args, **kwargs):
                super().__init__(*args, **kwargs)
                self.factor = 2.0
                self.calls = 0

        def overridden(self, *args, **kwargs):
            self.calls += 1
            return change(getattr(super(Late, self), method)(*args, **kwargs), self.factor)

        setattr(Late, method, overridden)
        return Late

    return subclass


def own_field(base):
    """A subclass whose rollout has two fields more, one a tensor and one a list, which its loss needs."""

    class OwnField(base):
        calls = 0

        def _generate_and_score_completions(self, inputs):
            rollout = super()._generate_and_score_completions(inputs)
            sums = (rollout["completion_ids"] * rollout["completion_mask"]).sum(1)
            return {**rollout, "own_sums": sums, "own_list": [str(each) for each in sums.tolist()]}

        def _compute_loss(self, model, inputs):
            self.calls += 1
            sums = (inputs["completion_ids"] * inputs["completion_mask"]).sum(1)
            assert inputs["own_sums"].tolist() == sums.tolist()
            assert inputs["own_list"] == [str(each) for each in sums.tolist()]
            return super()._compute_loss(model, inputs) * 0.5

    return OwnField


SUBCLASSES = {
    "_compute_loss": late_attribute("_compute_loss", lambda loss, factor: loss * factor),
    "_get_per_token_logps_and_entropies": late_attribute(
        "_get_per_token_logps_and_entropies", lambda output, factor: (output[0] * factor, *output[1:])
    ),
    "_calculate_rewards": late_attribute("_calculate_rewards", lambda rewards, factor: rewards * factor),
    "_generate_and_score_completions": late_attribute(
        "_generate_and_score_completions",
        lambda rollout, factor: {**rollout, "advantages": rollout["advantages"] * factor},
    ),
    "a field of its own": own_field,
}


def train(trainer_class, output_dir, **fields):
    config_class = A3POConfig if issubclass(trainer_class, A3POTrainer) else GRPOConfig
    defaults = {
        "optim": "sgd",  # Adam turns rounding into steps of full size where a gradient is almost nothing
        "learning_rate": 0.05,
        "max_grad_norm": 0.0,  # else twice the gradient is the same step
        "scale_rewards": "none",  # else twice the rewards are the same advantages
        "per_device_train_batch_size": 4,
        "gradient_accumulation_steps": 4,
    }
    trainer = trainer_class(
        tiny.model(),
        tiny.parity_reward,
        tiny.config(output_dir, config_class, **{**defaults, **fields}),
        tiny.prompts(),
        processing_class=tiny.tokenizer(),
    )
    trainer.train()
    return trainer


def largest_difference(ours, theirs):
    assert ours.keys() == theirs.keys()
    return max(float((value - ours[name]).abs().max()) for name, value in theirs.items())


@pytest.mark.parametrize("subclass", SUBCLASSES.values(), ids=SUBCLASSES.keys())
def test_a_subclass_trains_as_on_grpo_trainer(subclass, tmp_path):
    theirs = train(subclass(GRPOTrainer), tmp_path)
    plain = tiny.parameters(train(GRPOTrainer, tmp_path))
    assert theirs.calls > 0
    changed = largest_difference(plain, tiny.parameters(theirs))
    assert changed > 1e-3  # the subclass does something
    for fields, tolerance in ((tiny.NEUTRAL, 0.0), (NEUTRAL_WITH_SAVINGS, 1e-4 * changed)):
        ours = train(subclass(A3POTrainer), tmp_path, **fields)
        assert largest_difference(tiny.parameters(ours), tiny.parameters(theirs)) <= tolerance
        assert ours.calls == theirs.calls


def test_a_shaping_that_needs_a_late_attribute_trains(tmp_path):
    late = late_attribute("shape_advantages", lambda shaped, factor: shaped * factor)(A3POTrainer)
    ours, plain = (train(trainer_class, tmp_path) for trainer_class in (late, A3POTrainer))
    assert ours.calls > 0
    assert largest_difference(tiny.parameters(ours), tiny.parameters(plain)) > 1e-3


def test_none_of_a_subclass_runs_in_the_check_at_construction(tmp_path):
    ran = []

    def watched(name):
        def method(self, *args, **kwargs):
            ran.append(name)
            return getattr(super(Watched, self), name)(*args, **kwargs)

        return method

    names = [*SUBCLASSES, "compute_loss", "shape_advantages", "current_shaping_settings", "log"]
    names.remove("a field of its own")
    Watched = type("Watched", (A3POTrainer,), {name: watched(name) for name in names})  # noqa: N806
    trainer = Watched(
        tiny.model(), tiny.parity_reward, tiny.config(tmp_path), tiny.prompts(), processing_class=tiny.tokenizer()
    )
    assert ran == []
    trainer.train()
    assert {*ran} == {*names}


def test_a_loss_of_the_subclass_is_its_own_affair(tmp_path):
    class OwnLoss(A3POTrainer):
        def _compute_loss(self, model, inputs):
            output = model(input_ids=inputs["completion_ids"], labels=inputs["completion_ids"])
            return output.loss

    end = tiny.parameters(train(OwnLoss, tmp_path, max_steps=1))
    assert all(torch.isfinite(value).all() for value in end.values())
    assert largest_difference(end, tiny.model().state_dict()) > 1e-3
