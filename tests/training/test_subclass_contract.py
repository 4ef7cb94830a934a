"""Subclasses that work on GRPOTrainer work here: attributes set late, methods overridden, fields of their own."""

import pytest
import torch
from support import tiny
from support.training import SGD, largest_difference, make, train
from trl import GRPOTrainer

from trl_a3po import A3POTrainer


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


def train_by_descent(output_dir, trainer_class, **fields):
    """A trained trainer whose update is proportional to the gradient, and that to the rewards."""
    defaults = {
        **SGD,
        "learning_rate": 0.05,
        "max_grad_norm": 0.0,  # else twice the gradient is the same step
        "scale_rewards": "none",  # else twice the rewards are the same advantages
        "per_device_train_batch_size": 4,
        "gradient_accumulation_steps": 4,
    }
    return train(output_dir, trainer_class, **{**defaults, **fields})


@pytest.mark.parametrize("subclass", SUBCLASSES.values(), ids=SUBCLASSES.keys())
def test_a_subclass_trains_as_on_grpo_trainer(subclass, tmp_path):
    theirs = train_by_descent(tmp_path, subclass(GRPOTrainer))
    plain = tiny.parameters(train_by_descent(tmp_path, GRPOTrainer))
    assert theirs.calls > 0
    changed = largest_difference(plain, tiny.parameters(theirs))
    assert changed > 1e-3  # the subclass does something
    for fields, tolerance in ((tiny.NEUTRAL, 0.0), (NEUTRAL_WITH_SAVINGS, 1e-4 * changed)):
        ours = train_by_descent(tmp_path, subclass(A3POTrainer), **fields)
        assert largest_difference(tiny.parameters(ours), tiny.parameters(theirs)) <= tolerance
        # With the savings, few passes take the place of many.
        assert ours.calls == theirs.calls or (tolerance and 0 < ours.calls < theirs.calls)


def test_a_shaping_that_needs_a_late_attribute_trains(tmp_path):
    late = late_attribute("shape_advantages", lambda shaped, factor: shaped * factor)(A3POTrainer)
    ours, plain = (train_by_descent(tmp_path, trainer_class) for trainer_class in (late, A3POTrainer))
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
    trainer = make(tmp_path, Watched)
    assert ran == []
    trainer.train()
    assert {*ran} == {*names}


def test_a_loss_of_the_subclass_is_its_own_affair(tmp_path):
    class OwnLoss(A3POTrainer):
        def _compute_loss(self, model, inputs):
            output = model(input_ids=inputs["completion_ids"], labels=inputs["completion_ids"])
            return output.loss

    end = tiny.parameters(train_by_descent(tmp_path, OwnLoss, max_steps=1))
    assert all(torch.isfinite(value).all() for value in end.values())
    assert largest_difference(end, tiny.model().state_dict()) > 1e-3
