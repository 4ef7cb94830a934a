"""Tiny models really trained: equality with GRPOTrainer at neutral settings, and every path a run can take."""

import copy

import pytest
import torch
from support import tiny
from support.training import (
    ShapingRecorder,
    StopAfter,
    assert_same_parameters,
    assert_same_update,
    assert_trained,
    different,
    make,
    moved,
    train,
    update_difference,
)
from trl import GRPOConfig, GRPOTrainer
from trl.rewards import accuracy_reward

from trl_a3po import A3POTrainer, shape_advantages


# What a run is made of. Each is trained at neutral settings, and compared with GRPO, and as A3PO.
RUNS = {
    **{loss: {"loss_type": loss} for loss in tiny.LOSS_TYPES},
    "sequence level": {"importance_sampling_level": "sequence", "loss_type": "grpo"},
    "two iterations": {"num_iterations": 2, "max_steps": 4},
    "accumulation": {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 2},
    "generation larger than accumulation": {
        "per_device_train_batch_size": 4,
        "steps_per_generation": 4,
        "max_steps": 6,
    },
    "KL": {"beta": 0.1},
    "KL at sequence level": {
        "beta": 0.1,
        "importance_sampling_level": "sequence",
        "use_bias_correction_kl": False,
    },
    "entropy quantile": {"top_entropy_quantile": 0.3},
    "truncated completions masked": {"mask_truncated_completions": True},
    "rewards unscaled": {"scale_rewards": "none"},
    "rewards scaled by batch": {"scale_rewards": "batch"},
    "gradient checkpointing": {"gradient_checkpointing": True},
    "bf16": {"bf16": True},
    "off-policy mask": {"off_policy_mask_threshold": 0.5, "num_iterations": 2, "max_steps": 4},
}


@pytest.mark.parametrize("fields", RUNS.values(), ids=RUNS.keys())
def test_neutral_settings_are_grpo_to_the_last_bit(fields, model_dir, tmp_path):
    assert_same_update(
        train(tmp_path, model=model_dir, **fields, **tiny.NEUTRAL),
        train(tmp_path, GRPOTrainer, model=model_dir, **fields),
    )


def test_without_token_level_advantages_the_kl_term_may_have_the_ratio_of_the_sequence(model_dir, tmp_path):
    fields = {"beta": 0.1, "importance_sampling_level": "sequence", "use_bias_correction_kl": True}
    ours = train(tmp_path, model=model_dir, num_iterations=2, max_steps=4, **fields, **tiny.NEUTRAL)
    assert_same_update(ours, train(tmp_path, GRPOTrainer, model=model_dir, num_iterations=2, max_steps=4, **fields))
    assert ours.args.use_bias_correction_kl


def test_neutral_settings_are_grpo_to_the_last_bit_with_lora(model_dir, tmp_path):
    assert_same_update(
        train(tmp_path, model=model_dir, arguments=tiny.lora(), **tiny.NEUTRAL),
        train(tmp_path, GRPOTrainer, model=model_dir, arguments=tiny.lora()),
    )


def test_neutral_settings_log_what_grpo_logs(model_dir, tmp_path):
    ours = train(tmp_path, model=model_dir, **tiny.NEUTRAL).state.log_history
    theirs = train(tmp_path, GRPOTrainer, model=model_dir).state.log_history
    assert len(ours) == len(theirs)
    for our, their in zip(ours, theirs, strict=True):
        assert {key for key in our if not key.startswith(("a3po/", "signal/", "step_time/"))} == their.keys()
        for key in their.keys() - {"step_time", "train_runtime", "train_samples_per_second", "train_steps_per_second"}:
            assert our[key] == their[key]


@pytest.mark.parametrize("arguments", [dict, tiny.lora], ids=["full", "lora"])
def test_the_checks_notice_a_trainer_that_never_trained(arguments, model_dir, tmp_path):
    trainer = make(tmp_path, model=model_dir, arguments=arguments())
    for check in (assert_trained, lambda trainer: update_difference(trainer, trainer)):
        with pytest.raises(AssertionError):
            check(trainer)


def test_a3po_is_not_grpo(model_dir, tmp_path):
    """The control for the equalities above: they would fail if anything were shaped."""
    a3po, grpo = (train(tmp_path, trainer, model=model_dir, max_steps=1) for trainer in (A3POTrainer, GRPOTrainer))
    assert "lm_head.weight" in different(tiny.parameters(a3po), tiny.parameters(grpo))


# The others are trained as A3PO where the efficient update is tested.
@pytest.mark.parametrize(
    "run",
    [
        *("accumulation", "KL at sequence level", "rewards unscaled", "rewards scaled by batch"),
        *("bf16", "off-policy mask"),
    ],
)
def test_trains(run, model_dir, tmp_path):
    assert_trained(train(tmp_path, model=model_dir, **RUNS[run]))


def test_trains_with_lora(model_dir, tmp_path):
    trainer = train(tmp_path, model=model_dir, arguments=tiny.lora(), beta=0.1)
    assert_trained(trainer)
    assert moved(trainer) == {name for name in trainer.start if "lora_" in name}


def test_trains_with_an_entropy_bonus(model_dir, tmp_path):
    if not hasattr(GRPOConfig, "entropy_coef"):
        pytest.skip("this TRL has no entropy bonus")
    for fields in ({"entropy_coef": 0.01}, {"use_adaptive_entropy": True, "entropy_target": 2.0}):
        assert_same_update(
            train(tmp_path, model=model_dir, **fields, **tiny.NEUTRAL),
            train(tmp_path, GRPOTrainer, model=model_dir, **fields),
        )
        assert_trained(train(tmp_path, model=model_dir, **fields))


@pytest.mark.parametrize(
    "reward_funcs",
    [
        tiny.signed_parity_reward,
        [tiny.parity_reward, tiny.digit_reward],
        tiny.sometimes_none_reward,
        [tiny.sometimes_none_reward, tiny.digit_reward],
    ],
    ids=["rewards of one and minus one", "several", "None", "several with None"],
)
def test_trains_on_rewards(reward_funcs, model_dir, tmp_path):
    assert_trained(train(tmp_path, model=model_dir, reward_funcs=reward_funcs))


def test_groups_without_spread_move_nothing(model_dir, tmp_path):
    trainer = train(tmp_path, model=model_dir, reward_funcs=tiny.equal_reward)
    assert_same_parameters(trainer, make(tmp_path, model=model_dir))
    assert trainer.state.log_history[0]["a3po/zero/fraction"] == 1.0


def test_trains_on_conversations_scored_by_math_verify(model_dir, tmp_path):
    pytest.importorskip("math_verify")
    arguments = {"train_dataset": tiny.prompts(conversational=True)}
    trainer = train(tmp_path, model=model_dir, reward_funcs=[accuracy_reward, tiny.parity_reward], arguments=arguments)
    assert_trained(trainer)
    assert "rewards/accuracy_reward/mean" in trainer.state.log_history[0]


def completions_of(batch):
    return [ids[mask.bool()] for ids, mask in zip(batch["completion_ids"], batch["completion_mask"], strict=True)]


@pytest.mark.parametrize(
    "fields",
    [{}, {"num_iterations": 2}, {"per_device_train_batch_size": 4, "steps_per_generation": 4}],
    ids=str,
)
def test_the_hook_is_told_the_rewards_and_the_progress(fields, model_dir, tmp_path):
    functions = [tiny.sometimes_none_reward, lambda completions, **kwargs: [None] * len(completions)]
    trainer = make(
        tmp_path,
        ShapingRecorder,
        model=model_dir,
        reward_funcs=functions,
        reward_weights=[2.0, 1.0],
        max_steps=4,
        arguments={"eval_dataset": tiny.prompts(4)},
        **fields,
    )
    trainer.evaluate()
    before = len(trainer.calls)
    trainer.train()
    trained = len(trainer.calls)
    trainer.evaluate()
    progress = [call["progress"] for call in trainer.calls]
    assert min(before, len(progress) - trained) > 0
    assert progress == [*[0.0] * before, 0.0, 0.25, 0.5, 0.75, *[1.0] * (len(progress) - trained)]
    for batch, call in zip(trainer.batches, trainer.calls, strict=True):
        sums = torch.stack([ids.sum() for ids in completions_of(batch)])
        expected = torch.where(sums % 3 == 0, torch.nan, 2.0 * (sums % 2))
        torch.testing.assert_close(call["rewards"], expected, equal_nan=True)
    rewards = torch.cat([call["rewards"] for call in trainer.calls])
    assert {*rewards.nan_to_num(-1).tolist()} == {-1.0, 0.0, 2.0}


def rollout(prompts, trainer):
    """Three completions of different lengths by a fixed rule; the middle token of each is not the model's."""
    generator = torch.Generator().manual_seed(trainer.state.global_step)
    prompt_ids = [trainer.processing_class(prompt)["input_ids"] for prompt in prompts]
    completion_ids = [torch.randint(3, 40, (3 + i % 4,), generator=generator).tolist() for i in range(len(prompts))]
    return {
        "prompt_ids": prompt_ids,
        "completion_ids": completion_ids,
        "logprobs": [[0.0] * len(ids) for ids in completion_ids],
        "env_mask": [[1, 0, *[1] * (len(ids) - 2)] for ids in completion_ids],
    }


@pytest.mark.filterwarnings("ignore:You are using 'rollout_func':UserWarning")
def test_trains_on_a_rollout_function_with_tokens_that_are_not_the_models(model_dir, tmp_path):
    trainer = train(
        tmp_path, ShapingRecorder, model=model_dir, arguments={"rollout_func": rollout}, scale_decay="constant"
    )
    assert_trained(trainer)
    assert len(trainer.calls) == 3
    for call in trainer.calls:
        assert (call["mask"][:, 1] == 0).all()
        assert (call["shaped"][:, 1] == 0).all()
        assert call["mask"][:, 2:].any()


def test_aligned_rollouts_are_ranked_by_the_current_log_probabilities(model_dir, tmp_path):
    trainer = train(tmp_path, ShapingRecorder, model=model_dir)
    assert len(trainer.calls) == 3
    for call in trainer.calls:
        assert call["old_per_token_logps"] is call["per_token_logps"]


@pytest.mark.parametrize(
    "fields", [{"num_iterations": 2}, {"per_device_train_batch_size": 4, "steps_per_generation": 4}]
)
def test_reused_rollouts_are_ranked_by_the_old_log_probabilities_and_stay_as_they_are(fields, model_dir, tmp_path):
    trainer = train(tmp_path, ShapingRecorder, model=model_dir, max_steps=4, scale_decay="constant", **fields)
    later = trainer.calls[1]
    assert not torch.equal(later["old_per_token_logps"], later["per_token_logps"])
    expected = shape_advantages(
        later["advantages"], later["old_per_token_logps"], later["mask"], **trainer.args.shaping_settings
    )
    assert torch.equal(later["shaped"], expected)
    if "num_iterations" in fields:
        assert torch.equal(trainer.calls[0]["advantages"], trainer.calls[1]["advantages"])
        assert torch.equal(trainer.calls[0]["old_per_token_logps"], trainer.calls[1]["old_per_token_logps"])


def test_truncated_completions_leave_rows_with_nothing_to_shape(model_dir, tmp_path):
    trainer = train(
        tmp_path, ShapingRecorder, model=model_dir, mask_truncated_completions=True, max_completion_length=4
    )
    assert any((call["mask"].sum(1) == 0).any() for call in trainer.calls)
    assert_trained(trainer)


def test_evaluates_before_during_and_after_training(model_dir, tmp_path):
    trainer = make(
        tmp_path,
        A3POTrainer,
        model=model_dir,
        arguments={"eval_dataset": tiny.prompts(4)},
        eval_strategy="steps",
        eval_steps=2,
    )
    trainer.evaluate()
    before = trainer.state.log_history
    trainer.train()
    entries = [entry for entry in [*before, *trainer.state.log_history] if "eval_loss" in entry]
    assert len(entries) >= 2
    assert entries[0]["eval_a3po/scale/positive_low"] == 2.0
    for entry in entries:
        fractions = [entry.get(f"eval_a3po/{polarity}/fraction", 0) for polarity in ("positive", "negative", "zero")]
        assert sum(fractions) == pytest.approx(1)


@pytest.mark.parametrize("arguments", [dict, tiny.lora], ids=["full", "lora"])
def test_a_resumed_run_ends_as_an_uninterrupted_one(arguments, model_dir, tmp_path):
    fields = {"max_steps": 6, "save_strategy": "steps", "save_steps": 2, "scale_decay_steps": 5}
    whole = train(tmp_path / "whole", model=model_dir, arguments=arguments(), **fields)
    interrupted = train(
        tmp_path / "parts",
        A3POTrainer,
        model=model_dir,
        arguments={**arguments(), "callbacks": [StopAfter(4)]},
        **fields,
    )
    assert interrupted.state.global_step == 4
    resumed = make(tmp_path / "parts", model=model_dir, arguments=arguments(), **fields)
    resumed.train(resume_from_checkpoint=True)
    assert_same_update(resumed, whole)
    scales = [[e["a3po/scale/positive_low"] for e in t.state.log_history if "loss" in e] for t in (whole, resumed)]
    assert scales[0] == scales[1] == pytest.approx([2.0, 1.8, 1.6, 1.4, 1.2, 1.0])


def test_the_scales_decay_over_a_fraction_of_the_steps(model_dir, tmp_path):
    trainer = train(tmp_path, model=model_dir, max_steps=5, scale_decay_steps=0.5, positive_low_scale=4.0)
    scales = [entry["a3po/scale/positive_low"] for entry in trainer.state.log_history if "loss" in entry]
    assert scales == pytest.approx([4.0, 3.0, 2.0, 1.0, 1.0])


def test_a_scale_of_1_at_the_end_is_grpo(model_dir, tmp_path):
    """Once the scales have arrived at 1, the advantages are handed to TRL as it made them."""
    calls = []

    class Watched(A3POTrainer):  # a subclass with a `shape_advantages` of its own has one shape throughout
        def _before_loss_reads(self, scope, **outputs):
            before = scope.inputs["advantages"]
            super()._before_loss_reads(scope, **outputs)
            if self.is_in_train:
                calls.append((before, scope.inputs["advantages"]))

    train(tmp_path, Watched, model=model_dir, max_steps=3, scale_decay_steps=2)
    assert [shaped.dim() for _, shaped in calls] == [2, 2, 1]
    assert torch.equal(*calls[2])


def test_a_decay_longer_than_the_epochs_is_refused_before_anything_is_generated(model_dir, tmp_path):
    trainer = make(tmp_path, model=model_dir, max_steps=-1, num_train_epochs=1, scale_decay_steps=9)
    with pytest.raises(ValueError, match="`scale_decay_steps=9` is longer than the training of 8 optimizer steps"):
        trainer.train()
    assert trainer._metrics == {"train": {}, "eval": {}}


def test_saves_what_loads_back(model_dir, tmp_path):
    trainer = train(tmp_path, model=model_dir)
    trainer.save_model()
    again = make(tmp_path / "again", model=str(tmp_path))
    assert moved(trainer)
    assert_same_parameters(again, trainer)


def test_deep_copies_of_the_config_train_alike(model_dir, tmp_path):
    args = tiny.config(tmp_path)
    runs = [train(tmp_path, model=model_dir, arguments={"args": each}) for each in (args, copy.deepcopy(args))]
    assert_same_update(*runs)
