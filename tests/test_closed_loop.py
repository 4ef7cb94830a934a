"""Scales that follow what was measured: the mismatch of sampler and trainer on amplified tokens, and the entropy."""

import math

import pytest
import tiny
import torch

from trl_a3po import A3POTrainer
from trl_a3po.schedules import decay_scale, next_damping


pytestmark = pytest.mark.filterwarnings("ignore:You are using 'rollout_func':UserWarning")


class Recorder(A3POTrainer):
    """Keeps what the shaping was called with, and returned."""

    def shape_advantages(self, advantages, **batch):
        shaped = super().shape_advantages(advantages, **batch)
        self.calls = [*getattr(self, "calls", []), (self._loss_inputs, advantages, shaped, batch)]
        return shaped


def rollout(prompts, trainer):
    """Random completions, of which the sampler says that it found every token likelier than it was, by 0.3."""
    generator = torch.Generator().manual_seed(trainer.state.global_step)
    tokenizer = trainer.processing_class
    prompt_ids = [tokenizer(prompt)["input_ids"] for prompt in prompts]
    completion_ids, logprobs = [], []
    for ids in prompt_ids:
        completion = [*torch.randint(3, 40, (5,), generator=generator).tolist(), tokenizer.eos_token_id]
        with torch.no_grad():
            logits = trainer.model(torch.tensor([ids + completion])).logits[0, len(ids) - 1 : -1]
        logps = logits.log_softmax(-1)[range(6), completion] + 0.3
        completion_ids.append(completion)
        logprobs.append(logps.tolist())
    logprobs[0][2] = math.nan  # not known
    return {"prompt_ids": prompt_ids, "completion_ids": completion_ids, "logprobs": logprobs}


def make(output_dir, trainer_class=Recorder, rollout_func=rollout, **fields):
    return trainer_class(
        tiny.model(),
        tiny.signed_parity_reward,
        tiny.config(output_dir, **{"max_steps": 4, "scale_decay": "constant", **fields}),
        tiny.prompts(),
        processing_class=tiny.tokenizer(),
        rollout_func=rollout_func,
    )


def train(*args, **kwargs):
    trainer = make(*args, **kwargs)
    trainer.train()
    return trainer


def logged(trainer, name):
    return [entry[name] for entry in trainer.state.log_history if name in entry]


def mismatch(call):
    """Mean distance over the amplified tokens; 0 for those of which the sampler says nothing."""
    inputs, advantages, shaped, batch = call
    amplified = (shaped != advantages[:, None]) & batch["mask"].bool()
    distance = (batch["old_per_token_logps"] - inputs["sampling_per_token_logps"]).abs().nan_to_num(0.0)
    return float(distance[amplified].mean())


@pytest.mark.parametrize("bound", [0.2, 0.4])
def test_scales_follow_the_mismatch_of_the_amplified_tokens(bound, tmp_path):
    trainer = train(tmp_path, mismatch_bound=bound)
    damping, expected, scales = 1.0, [], []
    for call in trainer.calls:
        scales.append(decay_scale(2.0, 0, 1, "constant", damping))
        damping = next_damping(damping, [(mismatch(call), bound)])
        expected.append(damping)
    assert logged(trainer, "a3po/scale_damping") == pytest.approx(expected, rel=1e-4)
    assert logged(trainer, "a3po/scale/positive_low") == pytest.approx(scales, rel=1e-4)
    assert logged(trainer, "a3po/scale/negative_high") == pytest.approx(scales, rel=1e-4)
    assert (expected[-1] < 1) == (bound < 0.3)
    for _, advantages, shaped, batch in trainer.calls[-1:]:
        weights = (shaped / advantages[:, None])[batch["mask"].bool() & (advantages != 0)[:, None]]
        assert weights.unique().tolist() == pytest.approx([1.0, scales[-1]], rel=1e-5)


def test_the_mismatch_is_logged_by_polarity_without_a_bound(tmp_path):
    trainer = train(tmp_path, max_steps=1)
    for polarity in ("positive", "negative"):
        assert 0.2 < logged(trainer, f"a3po/{polarity}/selected_mismatch")[0] <= 0.3001
    assert not logged(trainer, "a3po/scale_damping")


def test_scales_follow_the_entropy(tmp_path):
    entropy = logged(train(tmp_path, max_steps=1), "entropy")[0]
    damped, not_damped = (train(tmp_path, entropy_bound=bound * entropy) for bound in (0.5, 2.0))
    assert logged(damped, "a3po/scale_damping")[0] == pytest.approx(0.5, rel=1e-3)
    assert logged(damped, "a3po/scale/positive_low")[:2] == [2.0, pytest.approx(1.5, rel=1e-3)]
    assert logged(not_damped, "a3po/scale_damping") == [1.0] * 4


@pytest.mark.parametrize("monotone", [False, True])
def test_scales_recover_unless_asked_not_to(monotone, tmp_path):
    class Switched(Recorder):
        def _damp_scales(self, sums):
            self.args.mismatch_bound = 0.1 if self.state.global_step <= 2 else 10.0
            super()._damp_scales(sums)

    damping = logged(train(tmp_path, Switched, mismatch_bound=0.1, monotone_decay=monotone), "a3po/scale_damping")
    assert damping == ([0.5, 0.25, 0.25, 0.25] if monotone else [0.5, 0.25, 0.5, 1.0])


def test_a_resumed_run_goes_on_with_the_damping_it_had(tmp_path):
    fields = {"mismatch_bound": 0.2, "save_strategy": "steps", "save_steps": 2}
    whole = train(tmp_path / "whole", **fields)
    resumed = make(tmp_path / "resumed", **fields)
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-2"))
    assert logged(resumed, "a3po/scale_damping") == logged(whole, "a3po/scale_damping")
    assert all(torch.equal(value, tiny.parameters(whole)[name]) for name, value in tiny.parameters(resumed).items())


def test_an_evaluation_damps_nothing(tmp_path):
    trainer = train(tmp_path, mismatch_bound=0.2, max_steps=1)
    damping = trainer._damping
    trainer.evaluate(tiny.prompts(8))
    assert trainer._damping == damping < 1


def test_refuses_a_bound_on_what_no_sampler_reports(tmp_path):
    with pytest.raises(ValueError, match=r"`mismatch_bound=0.1` needs a sampler that reports.*Set `use_vllm=True`"):
        make(tmp_path, rollout_func=None, mismatch_bound=0.1)


def test_refuses_a_rollout_function_that_keeps_the_log_probabilities_to_itself(tmp_path):
    def silent(prompts, trainer):
        return {**rollout(prompts, trainer), "logprobs": None}

    with pytest.raises(ValueError, match=r"`mismatch_bound=0.1` needs the log-probabilities of what was sampled"):
        train(tmp_path, rollout_func=silent, mismatch_bound=0.1)
