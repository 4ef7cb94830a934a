"""Subclasses that work on GRPOTrainer work here. See tests/test_subclasses.py for what the guide promises."""

import torch
from support import tiny
from support.training import SGD, largest_difference, make, train
from trl import GRPOTrainer

from trl_a3po import A3POTrainer


NEUTRAL_WITH_SAVINGS = {name: value for name, value in tiny.NEUTRAL.items() if name not in tiny.PLAIN}


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


def test_log_probabilities_of_a_subclass_train_as_on_grpo_trainer(tmp_path):
    def subclass(base):
        class Late(base):
            calls = 0

            def __init__(self, *args, **kwargs):
                super().__init__(*args, **kwargs)
                self.factor = 2.0

            def _get_per_token_logps_and_entropies(self, *args, **kwargs):
                self.calls += 1
                logps, *others = super()._get_per_token_logps_and_entropies(*args, **kwargs)
                return logps * self.factor, *others

        return Late

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


def test_none_of_a_subclass_runs_in_the_check_at_construction(tmp_path):
    ran = []

    def watched(name):
        def method(self, *args, **kwargs):
            ran.append(name)
            return getattr(super(Watched, self), name)(*args, **kwargs)

        return method

    names = [
        *("_compute_loss", "_get_per_token_logps_and_entropies", "_calculate_rewards"),
        *("_generate_and_score_completions", "compute_loss", "shape_advantages", "current_shaping_settings", "log"),
    ]
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
