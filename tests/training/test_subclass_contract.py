"""Subclasses that work on GRPOTrainer work here. See tests/test_subclasses.py for what the guide promises."""

import functools

import pytest
import torch
from support import tiny
from support.training import SGD, largest_difference, make, moved, train
from transformers import Trainer
from trl import GRPOTrainer
from trl.extras.profiling import profiling_decorator

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


@pytest.mark.parametrize("steps", [{}, {"num_iterations": 2}])
def test_log_probabilities_of_a_subclass_train_as_on_grpo_trainer(steps, tmp_path):
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

    theirs = train_by_descent(tmp_path, subclass(GRPOTrainer), **steps)
    plain = tiny.parameters(train_by_descent(tmp_path, GRPOTrainer, **steps))
    assert theirs.calls > 0
    changed = largest_difference(plain, tiny.parameters(theirs))
    assert changed > 1e-3  # the subclass does something
    for fields, tolerance in ((tiny.NEUTRAL, 0.0), (NEUTRAL_WITH_SAVINGS, 1e-4 * changed)):
        ours = train_by_descent(tmp_path, subclass(A3POTrainer), **fields, **steps)
        assert largest_difference(tiny.parameters(ours), tiny.parameters(theirs)) <= tolerance
        # With the savings, few passes take the place of many. Old log-probabilities take one call for each of them.
        assert ours.calls == theirs.calls or (tolerance and 0 < ours.calls < theirs.calls) or (tolerance and steps)


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


def patched(method):
    """A method of GRPOTrainer that somebody has wrapped, and that has kept its name."""

    @functools.wraps(method)
    def patch(self, *args, **kwargs):
        return method(self, *args, **kwargs)

    return patch


def decorated(method):
    """As TRL decorates its own."""
    return profiling_decorator(patched(method))


@pytest.mark.parametrize("change", [patched, decorated])
@pytest.mark.parametrize("name", ["_prepare_inputs", "compute_loss", "_compute_loss"])
def test_a_change_of_trls_loss_is_seen(name, change, tmp_path, monkeypatch):
    trainer = make(tmp_path)
    assert trainer._loss_is_trls()
    changed = change(getattr(GRPOTrainer, name))
    assert not make(tmp_path, type("Subclass", (A3POTrainer,), {name: changed}))._loss_is_trls()
    monkeypatch.setattr(GRPOTrainer, name, changed)
    assert not trainer._loss_is_trls()
    assert trainer._rollout_is_ours()


@pytest.mark.parametrize("change", [patched, decorated])
def test_a_change_of_trls_rollout_is_seen(change, tmp_path, monkeypatch):
    trainer, name = make(tmp_path), "_generate_and_score_completions"
    changed = change(getattr(GRPOTrainer, name))
    assert not make(tmp_path, type("Subclass", (A3POTrainer,), {name: changed}))._rollout_is_ours()
    monkeypatch.setattr(GRPOTrainer, name, changed)
    assert trainer._loss_is_trls()
    assert not trainer._rollout_is_ours()


def test_a_patch_of_what_grpo_trainer_replaces_is_none(tmp_path, monkeypatch):
    trainer = make(tmp_path)
    monkeypatch.setattr(Trainer, "compute_loss", patched(Trainer.compute_loss))
    assert trainer._loss_is_trls()


class TokenAdvantages:
    def _generate_and_score_completions(self, inputs):
        output = super()._generate_and_score_completions(inputs)
        return {**output, "advantages": output["advantages"][:, None].expand(output["completion_mask"].shape)}


@pytest.mark.parametrize("fields", [{}, tiny.PLAIN, tiny.NEUTRAL], ids=str)
def test_token_advantages_of_a_rollout_are_refused(fields, tmp_path):
    with pytest.raises(ValueError, match=r"`advantages` of shape \(8, 8\). It must have one per completion"):
        train(tmp_path, type("Trainer", (TokenAdvantages, A3POTrainer), {}), **fields)


@pytest.mark.filterwarnings("ignore:You are using 'rollout_func':UserWarning")
@pytest.mark.parametrize("logprobs", [lambda ids: [], lambda ids: [0.0] * (len(ids) + 1)], ids=["none", "too many"])
def test_placeholders_of_a_rollout_function(logprobs, tmp_path):
    """TRL reads them only with vLLM."""

    def rollout(prompts, trainer):
        prompt_ids = [trainer.processing_class(prompt)["input_ids"] for prompt in prompts]
        completion_ids = [[3 + i % 5, 4, 1] for i in range(len(prompts))]
        return {
            "prompt_ids": prompt_ids,
            "completion_ids": completion_ids,
            "logprobs": [*map(logprobs, completion_ids)],
        }

    trainer = train(tmp_path, arguments={"rollout_func": rollout})
    assert moved(trainer)
    assert not [name for log in trainer.state.log_history for name in log if "mismatch" in name]
