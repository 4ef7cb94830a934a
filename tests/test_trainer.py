"""What the trainer is to its users: signature, errors, the hook, the contract with TRL, metrics, model card."""

import functools
import inspect
import math
import textwrap
from pathlib import Path

import pytest
import torch
import trl
from support import reference, tiny
from support.training import ShapingRecorder, make, train
from trl import GRPOConfig, GRPOTrainer

from trl_a3po import A3POConfig, A3POTrainer, completionwise
from trl_a3po.training.trl_contract import check_contract


def test_signature_is_that_of_grpo_trainer():
    assert inspect.signature(A3POTrainer) == inspect.signature(GRPOTrainer)


def test_takes_the_arguments_by_position_and_by_name(tmp_path):
    args = tiny.config(tmp_path)
    by_position = A3POTrainer(tiny.model(), tiny.parity_reward, args, tiny.prompts(), None, tiny.tokenizer())
    by_name = A3POTrainer(
        model=tiny.model(),
        reward_funcs=tiny.parity_reward,
        args=args,
        train_dataset=tiny.prompts(),
        processing_class=tiny.tokenizer(),
    )
    assert by_position.args is by_name.args is args


def test_without_args_makes_its_own(model_dir, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    on_cpu = functools.partial(A3POConfig, use_cpu=True, bf16=False, report_to="none")
    monkeypatch.setattr("trl_a3po.a3po_trainer.A3POConfig", on_cpu)
    trainer = A3POTrainer(model_dir, tiny.parity_reward, train_dataset=tiny.prompts())
    assert type(trainer.args) is A3POConfig
    assert trainer.args.output_dir == f"{Path(model_dir).name}-A3PO"


def test_refuses_the_config_of_grpo(tmp_path):
    with pytest.raises(TypeError, match=r"`args` must be an `A3POConfig`, got `GRPOConfig`.*change the name"):
        A3POTrainer(tiny.model(), tiny.parity_reward, tiny.config(tmp_path, GRPOConfig), tiny.prompts())


# The hook


class OnlyTheFirstToken(A3POTrainer):
    def shape_advantages(self, advantages, *, mask, **tensors):
        shaped = torch.zeros_like(mask, dtype=advantages.dtype)
        shaped[:, 0] = advantages
        return shaped


def test_a_subclass_shapes_its_own_way(tmp_path):
    trainer = make(tmp_path, OnlyTheFirstToken, max_steps=2)
    before = tiny.parameters(trainer)
    trainer.train()
    assert any(not torch.equal(before[name], parameter) for name, parameter in tiny.parameters(trainer).items())
    metrics = trainer.state.log_history[0]
    assert not any(name.startswith("a3po/scale/") for name in metrics)  # the scales are not in use
    assert metrics["a3po/positive/selected_fraction"] == pytest.approx(1 - 1 / metrics["a3po/positive/mean_length"])


MISTAKES = {
    "a shape that the loss would broadcast": (
        lambda advantages, **_: advantages[:, None],
        r"must return a tensor of shape \(B, T\) = \(8, 8\) or \(B,\) = \(8,\), got \(8, 1\)",
    ),
    "no return": (lambda advantages, **_: None, "must return a tensor of floating-point numbers, got NoneType"),
    "integers": (lambda advantages, **_: advantages.int(), "floating-point numbers, got torch.int32"),
    "advantages": (lambda advantages, **_: advantages.mul_(2), "changed `advantages` in place"),
    "mask": (lambda advantages, *, mask, **_: advantages[:, None] * mask.zero_(), "changed `mask` in place"),
    "rewards": (lambda advantages, *, rewards, **_: rewards.sub_(0.5), "changed `rewards` in place"),
    "log-probabilities": (
        lambda advantages, *, per_token_logps, **_: advantages[:, None] * per_token_logps.exp_(),
        "changed `per_token_logps`, `old_per_token_logps` in place",  # here they are one
    ),
}


@pytest.mark.parametrize(("shape", "message"), MISTAKES.values(), ids=MISTAKES.keys())
def test_mistakes_that_would_train_something_else_are_refused(shape, message, tmp_path):
    class Mistaken(A3POTrainer):
        def shape_advantages(self, advantages, **batch):
            return shape(advantages, **batch)

    with pytest.raises((TypeError, ValueError), match=message):
        train(tmp_path, Mistaken)


def test_a_hook_that_cannot_take_its_arguments_is_refused_at_once(tmp_path):
    class Misspelled(A3POTrainer):
        def shape_advantages(self, advantages, *, entropy, **batch):
            return advantages[:, None] * entropy

    class NoRest(A3POTrainer):
        def shape_advantages(self, advantages, *, mask):
            return advantages[:, None] * mask

    for trainer_class, reason in ((Misspelled, "'entropy'"), (NoRest, "unexpected keyword argument")):
        with pytest.raises(
            TypeError, match=rf"shape_advantages` cannot be called .*{reason}.* entropies, mask.*batch"
        ):
            make(tmp_path, trainer_class)


class OfRollout(A3POTrainer):
    """Its hook reads a field of the rollout: the rewards, under a name of its own."""

    field = "score"

    def _generate_and_score_completions(self, inputs):
        rollout = super()._generate_and_score_completions(inputs)
        return {**rollout, self.field: rollout["rewards"].clone()}

    def shape_advantages(self, advantages, *, rewards, score, **batch):
        assert score.equal(rewards)
        self.seen = getattr(self, "seen", 0) + 1
        return super().shape_advantages(advantages, rewards=rewards, **batch)


def test_the_hook_gets_the_fields_of_the_rollout_that_it_names(tmp_path):
    # Rows change places: they are shuffled, and regrouped by their prompts.
    trainer = train(tmp_path, OfRollout, gradient_accumulation_steps=2, num_iterations=2, max_steps=4)
    assert trainer.seen == 8

    class ByDefault(OfRollout):
        def shape_advantages(self, advantages, *, score=None, factor=1.0, **batch):
            return super().shape_advantages(advantages, score=score, **batch) * factor

    assert train(tmp_path, ByDefault, max_steps=2).seen == 2

    class Misspelled(OfRollout):
        field = "scores"

    with pytest.raises(ValueError, match=r"takes `score`, which is neither .*_generate_and_score_completions"):
        train(tmp_path, Misspelled)


@pytest.mark.parametrize(
    ("calls_super", "settings", "said"),
    [
        (False, {}, None),
        (False, {"positive_low_scale": 1.0}, None),
        (
            False,
            {"positive_low_scale": 5.0, "token_metric": "entropy"},
            "positive_low_scale=5.0, token_metric='entropy'",
        ),
        (False, {"shaping": "aepo"}, "shaping='aepo'"),
        (True, {"positive_low_scale": 5.0}, None),
    ],
)
def test_settings_that_a_hook_leaves_unused_are_said_once(calls_super, settings, said, tmp_path, caplog):
    class Own(A3POTrainer):
        def shape_advantages(self, advantages, **batch):
            return super().shape_advantages(advantages, **batch) if calls_super else advantages

    train(tmp_path, Own, max_steps=2, **settings)
    warned = [record.getMessage() for record in caplog.records if "did not call `super()`" in record.getMessage()]
    assert len(warned) == (said is not None)
    assert all(f"no effect: {said}." in message for message in warned)


def test_a_step_without_signal_says_nothing_about_a_marked_hook(tmp_path, caplog):
    class Own(A3POTrainer):
        @completionwise
        def shape_advantages(self, advantages, **batch):
            return super().shape_advantages(advantages, **batch)

    def equal_at_first(completion_ids, trainer_state, **kwargs):
        return [float(trainer_state.global_step > 0 and row % 2) for row in range(len(completion_ids))]

    train(tmp_path, Own, max_steps=2, positive_low_scale=5.0, reward_funcs=equal_at_first)
    assert "did not call `super()`" not in caplog.text


def test_what_a_subclass_returns_where_masked_makes_no_difference(tmp_path):
    class Infinite(A3POTrainer):
        def shape_advantages(self, advantages, *, mask, **batch):
            return advantages[:, None] / mask

    class Finite(A3POTrainer):
        def shape_advantages(self, advantages, *, mask, **batch):
            return advantages[:, None] * mask

    losses, parameters = [], []
    for trainer_class in (Infinite, Finite):
        trainer = train(tmp_path, trainer_class, max_steps=3, mask_truncated_completions=True)
        losses.append([log["loss"] for log in trainer.state.log_history[:-1]])
        parameters.append(tiny.parameters(trainer))
    assert losses[0] == losses[1]
    assert any(loss != 0 for loss in losses[0])
    assert all(torch.equal(value, parameters[1][name]) for name, value in parameters[0].items())


def test_a_subclass_can_go_on_from_a3po_after_the_scales_have_decayed(tmp_path):
    """Also where there are as many completions as tokens, and a wrong shape would be broadcast."""
    shapes = []

    class Faded(A3POTrainer):
        def shape_advantages(self, advantages, *, mask, **batch):
            shaped = super().shape_advantages(advantages, mask=mask, **batch)
            shapes.append(tuple(shaped.shape))
            return shaped * 0.9 ** mask.cumsum(1)

    trainer = train(tmp_path, Faded, max_steps=4, scale_decay_steps=2)
    assert trainer.current_shaping_settings()["positive_low_scale"] == 1
    assert shapes == [(8, 8)] * 4


# The contract with TRL: releases that would train something else under the name of A3PO


def doctored(monkeypatch, replace, by, method="_compute_loss"):
    """Puts a changed copy of one of GRPOTrainer's methods in its place."""
    function = inspect.unwrap(getattr(GRPOTrainer, method))
    source = textwrap.dedent(inspect.getsource(function))
    assert replace in source
    namespace = dict(function.__globals__)
    exec(source.replace(replace, by, 1).removeprefix("@profiling_decorator"), namespace)
    monkeypatch.setattr(GRPOTrainer, method, namespace[method])


DOCTORED = {
    "advantages averaged over the tokens": (
        "    if advantages.dim() == 1:",
        "    advantages = advantages.mean(1) if advantages.dim() == 2 else advantages\n    if advantages.dim() == 1:",
    ),
    "advantages read before the log-probabilities": (
        'prompt_ids, prompt_mask = inputs["prompt_ids"], inputs["prompt_mask"]',
        'inputs = {**inputs}; prompt_ids, prompt_mask = inputs["prompt_ids"], inputs["prompt_mask"]',  # a copy
    ),
    "one value more from the log-probabilities": ("per_token_logps, entropies", "first, per_token_logps, entropies"),
    "log-probabilities from elsewhere": ("self._get_per_token_logps_and_entropies(", "self._get_per_token_logps("),
    "a loss of its own": (
        "    # Compute the per-token log probabilities for the model",
        "    return torch.zeros((), requires_grad=True) + inputs['advantages'].sum()",
    ),
    "advantages left out": ('advantages = inputs["advantages"]', 'advantages = inputs["advantages"].sign() * 0'),
    "a fused loss by another way": (
        "self._compute_loss(model, inputs)",
        "model(inputs['completion_ids'], labels=inputs['completion_ids']).loss * inputs['advantages'].mean()",
        "compute_loss",
    ),
}


@pytest.mark.parametrize("change", DOCTORED.values(), ids=DOCTORED.keys())
def test_a_trl_that_breaks_the_contract_is_refused_at_construction(change, tmp_path, monkeypatch):
    doctored(monkeypatch, *change)
    with pytest.raises(
        RuntimeError, match=rf"^TRL {trl.__version__} does not compute A3PO's loss .*`pip install trl=="
    ):
        make(tmp_path)


def test_a_doctored_trl_that_changes_nothing_is_accepted(tmp_path, monkeypatch):
    doctored(monkeypatch, 'advantages = inputs["advantages"]', 'advantages = inputs["advantages"] * 1')
    make(tmp_path)


@pytest.mark.parametrize("loss_type", tiny.LOSS_TYPES)
@pytest.mark.parametrize("level", ["token", "sequence"])
def test_the_check_accepts_what_works_and_touches_nothing(loss_type, level, tmp_path):
    trainer = make(tmp_path, loss_type=loss_type, importance_sampling_level=level)
    before = tiny.parameters(trainer)
    check_contract(trainer)
    assert all(torch.equal(before[name], parameter) for name, parameter in tiny.parameters(trainer).items())
    assert not trainer._metrics["train"]
    assert not trainer._metrics["eval"]
    assert not trainer._polarity_sums
    assert trainer.importance_sampling_level == level
    assert type(trainer) is A3POTrainer


@pytest.mark.skipif("luspo" in tiny.LOSS_TYPES, reason="this TRL's LUSPO leaves padding alone")
@pytest.mark.parametrize("level", ["token", "sequence"])
def test_a_loss_that_trains_on_padding_is_refused(level, tmp_path):
    with pytest.raises(RuntimeError, match=rf"^TRL {trl.__version__} does not compute A3PO's loss"):
        make(tmp_path, loss_type="luspo", importance_sampling_level=level)


# Metrics


def expected_metrics(calls, settings):
    """A token at a time, over all batches of one log."""
    by_polarity = {"positive": [], "negative": [], "zero": []}
    for call in calls:
        call = {name: value.tolist() for name, value in call.items() if torch.is_tensor(value)}
        for i, advantage in enumerate(call["advantages"]):
            polarity = "positive" if advantage > 0 else "negative" if advantage < 0 else "zero"
            tokens = [t for t, counts in enumerate(call["mask"][i]) if counts]
            (weights,) = reference.shape_advantages(
                [advantage], [call["old_per_token_logps"][i]], [call["mask"][i]], **settings
            )
            by_polarity[polarity].append(
                {
                    "shaped": [weights[t] for t in tokens],
                    "selected": [abs(weights[t] - advantage) > 1e-6 for t in tokens],
                    "prob": [math.exp(call["old_per_token_logps"][i][t]) for t in tokens],
                    "entropy": [call["entropies"][i][t] for t in tokens],
                }
            )
    metrics, total = {}, {}
    for polarity, rows in by_polarity.items():
        flat = {
            name: [value for row in rows for value in row[name]] for name in ("shaped", "selected", "prob", "entropy")
        }
        total[polarity] = sum(map(abs, flat["shaped"]))
        metrics[f"{polarity}/fraction"] = len(rows) / sum(map(len, by_polarity.values()))
        if not rows:
            continue
        metrics[f"{polarity}/mean_length"] = len(flat["prob"]) / len(rows)
        metrics[f"{polarity}/entropy"] = sum(flat["entropy"]) / len(flat["entropy"])
        if polarity == "zero":
            continue
        metrics[f"{polarity}/selected_fraction"] = sum(flat["selected"]) / len(flat["selected"])
        for name, wanted in (("selected_prob", True), ("other_prob", False)):
            probs = [p for p, selected in zip(flat["prob"], flat["selected"], strict=True) if selected is wanted]
            if probs:
                metrics[f"{polarity}/{name}"] = sum(probs) / len(probs)
    if total["negative"]:
        metrics["advantage_ratio"] = total["positive"] / total["negative"]
    return metrics


@pytest.mark.parametrize(
    "fields",
    [
        {"max_steps": 2},
        {"max_steps": 4, "logging_steps": 2, "per_device_train_batch_size": 4, "gradient_accumulation_steps": 2},
        {"max_steps": 5, "logging_steps": 4},  # the last step is logged with the summary at the end
    ],
    ids=str,
)
def test_metrics_are_means_over_everything_since_the_last_log(fields, tmp_path):
    trainer = train(tmp_path, ShapingRecorder, scale_decay="constant", **fields)
    batches_a_step = trainer.args.gradient_accumulation_steps
    logged = [entry for entry in trainer.state.log_history if "a3po/zero/fraction" in entry]
    steps = [0, *(entry["step"] for entry in logged)]
    assert steps[-1] == trainer.args.max_steps
    for first, last, entry in zip(steps, steps[1:], logged, strict=False):
        calls = trainer.calls[first * batches_a_step : last * batches_a_step]
        expected = expected_metrics(calls, trainer.args.shaping_settings)
        ours = {name.removeprefix("a3po/"): value for name, value in entry.items() if name.startswith("a3po/")}
        assert {name for name in ours if not name.startswith("scale/")} == expected.keys()
        for name, value in expected.items():
            assert ours[name] == pytest.approx(value, rel=1e-4), name


def test_metrics_of_the_selected_tokens_say_what_was_selected(tmp_path):
    trainer = train(tmp_path, max_steps=1)
    metrics = trainer.state.log_history[0]
    assert metrics["a3po/positive/selected_prob"] < metrics["a3po/positive/other_prob"]
    assert metrics["a3po/negative/selected_prob"] > metrics["a3po/negative/other_prob"]


@pytest.mark.filterwarnings("ignore:You are using 'rollout_func':UserWarning")
def test_the_mismatch_is_that_of_the_selected_tokens(tmp_path):
    """Of what the sampler says nothing it counts as 0."""

    def rollout(prompts, trainer):
        generator = torch.Generator().manual_seed(0)
        prompt_ids = [trainer.processing_class(prompt)["input_ids"] for prompt in prompts]
        completion_ids = torch.randint(3, 40, (len(prompts), 6), generator=generator).tolist()
        logprobs = (-4 * torch.rand(len(prompts), 6, generator=generator)).tolist()
        for row in logprobs:
            row[2] = math.nan
        return {"prompt_ids": prompt_ids, "completion_ids": completion_ids, "logprobs": logprobs}

    trainer = train(tmp_path, ShapingRecorder, arguments={"rollout_func": rollout}, max_steps=1)
    [batch], [call] = trainer.batches, trainer.calls
    distance = (call["old_per_token_logps"] - batch["sampling_per_token_logps"]).abs().nan_to_num(0.0)
    selected = call["shaped"] != call["advantages"][:, None]
    for polarity, of in (("positive", call["advantages"] > 0), ("negative", call["advantages"] < 0)):
        mean = float(distance[selected & of[:, None]].mean())
        assert trainer.state.log_history[0][f"a3po/{polarity}/selected_mismatch"] == pytest.approx(mean, rel=1e-4)


def test_a_user_who_logs_on_one_process_alone_causes_no_communication(tmp_path, monkeypatch):
    trainer = train(tmp_path, max_steps=1)
    trainer._polarity_sums["train"] = torch.zeros(3, 8)
    monkeypatch.setattr(type(trainer.accelerator), "num_processes", 2)
    monkeypatch.setattr(trainer.accelerator, "reduce", lambda *_, **__: pytest.fail("a collective operation"))
    trainer.log({"mine": 1.0})


# The model card


def test_model_card_names_method_paper_and_settings(tmp_path):
    trainer = make(tmp_path, positive_low_scale=5.0, scale_decay_steps=3)
    trainer.create_model_card(model_name="my-model", dataset_name="someone/math")
    card = (tmp_path / "README.md").read_text(encoding="utf-8")
    assert "trained with A3PO, a method introduced in [Rethinking Sample Polarity in Reinforcement Learning" in card
    assert "https://huggingface.co/papers/2512.21625" in card
    assert "tang2026rethinking" in card
    assert "[TRL](https://github.com/huggingface/trl)" in card
    assert '"positive_low_scale": 5.0' in card
    assert '"scale_decay_steps": 3' in card
    assert "- a3po" in card.split("---")[1]
    assert card.index("### Advantage shaping") < card.index("### Framework versions")


@pytest.mark.parametrize("trainer_class", [A3POTrainer, OnlyTheFirstToken])
def test_model_card_says_whose_the_shaping_is(trainer_class, tmp_path):
    make(tmp_path, trainer_class).create_model_card()
    card = (tmp_path / "README.md").read_text(encoding="utf-8")
    assert ("They apply where `OnlyTheFirstToken.shape_advantages` calls" in card) == (
        trainer_class is OnlyTheFirstToken
    )


def test_model_card_has_no_settings_that_were_not_used(tmp_path):
    train(tmp_path, OnlyTheFirstToken).create_model_card()
    card = (tmp_path / "README.md").read_text(encoding="utf-8")
    assert "`OnlyTheFirstToken.shape_advantages`, in place of the method of the package." in card
    assert "positive_low_scale" not in card


def test_every_field_of_the_shaping_is_on_the_model_card(tmp_path):
    make(tmp_path).create_model_card()
    card = (tmp_path / "README.md").read_text(encoding="utf-8")
    others = {
        "shaping_args",
        "dynamic_sampling",
        "trim_padding",
        "skip_zero_advantage",
        "skip_old_logps",
        "log_tokens",
    }
    for name in inspect.get_annotations(A3POConfig).keys() - others:
        assert f'"{name}": ' in card
