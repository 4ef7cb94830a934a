"""The closed loop of the benchmark: scales that follow the entropy, or the mismatch on amplified tokens."""

import math
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from support import tiny
from support.training import Recorder, assert_same_update, make


# As Python does for the program.
sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks" / "polarity"))

from closed_loop import LEAST_DAMPING, EntropyLoop, MismatchLoop, next_damping


pytestmark = pytest.mark.filterwarnings("ignore:You are using 'rollout_func':UserWarning")


@pytest.mark.parametrize(
    ("damping", "value", "bound", "expected"),
    [
        (1.0, 0.15, 0.1, 1 / 1.5),
        (0.25, 0.08, 0.1, 0.25 / 0.8),
        (0.25, 0.01, 0.1, 0.5),
        (0.5, 9.0, 0.1, 0.25),
        (1.0, 0.0, 0.1, 1.0),
        (LEAST_DAMPING, 9.0, 0.1, LEAST_DAMPING),
        (0.3, math.nan, 0.1, 0.3),
        (0.3, math.inf, 0.1, 0.15),
    ],
)
def test_damping_follows_the_excess(damping, value, bound, expected):
    assert next_damping(damping, value, bound) == pytest.approx(expected)


@given(st.lists(st.tuples(st.floats(0, 1e30), st.floats(1e-6, 1e6)), max_size=20))
def test_damping_is_bounded(measurements):
    damping = 1.0
    for value, bound in measurements:
        before, damping = damping, next_damping(damping, value, bound)
        assert LEAST_DAMPING <= damping <= 1
        assert before / 2 <= damping <= 2 * before


def test_the_loop_settles_at_its_bound():
    """On a system in which what is measured grows with the scales in force."""
    damping = 1.0
    for _ in range(30):
        value = 0.2 * damping + 0.02
        damping = next_damping(damping, value, 0.1)
    assert 0.2 * damping + 0.02 == pytest.approx(0.1, rel=1e-3)


# In training


def rollout(prompts, trainer):
    """Random completions, of which the sampler says that it found every token likelier than it was, by 0.3."""
    generator = torch.Generator().manual_seed(trainer.state.global_step)
    tokenizer = trainer.processing_class
    prompt_ids = [tokenizer(prompt)["input_ids"] for prompt in prompts]
    completion_ids, logprobs = [], []
    for ids in prompt_ids:
        completion = [*torch.randint(3, 40, (5,), generator=generator).tolist(), tokenizer.eos_token_id]
        with torch.no_grad():
            tokens = torch.tensor([ids + completion], device=trainer.model.device)
            logits = trainer.model(tokens).logits[0, len(ids) - 1 : -1]
        logps = logits.log_softmax(-1)[range(6), completion] + 0.3
        completion_ids.append(completion)
        logprobs.append(logps.tolist())
    logprobs[0][2] = math.nan  # not known
    return {"prompt_ids": prompt_ids, "completion_ids": completion_ids, "logprobs": logprobs}


def closed_loop(output_dir, loop, bound, **fields):
    """A trainer of the loop that records."""
    trainer_class = type("Recorded", (Recorder, loop), {"bound": bound})
    return make(
        output_dir,
        trainer_class,
        reward_funcs=tiny.signed_parity_reward,
        arguments={"rollout_func": rollout},
        **{"max_steps": 4, "scale_decay": "constant", **fields},
    )


def trained_loop(*args, **kwargs):
    """The same, trained."""
    trainer = closed_loop(*args, **kwargs)
    trainer.train()
    return trainer


def logged(trainer, name):
    return [entry[name] for entry in trainer.state.log_history if name in entry]


def mismatch(batch):
    """Mean distance over the amplified tokens; 0 for those of which the sampler says nothing."""
    amplified = (batch["shaped"] != batch["advantages"][:, None]) & batch["completion_mask"].bool()
    old_per_token_logps = batch.get("old_per_token_logps", batch["per_token_logps"])
    distance = (old_per_token_logps - batch["sampling_per_token_logps"]).abs().nan_to_num(0.0)
    return float(distance[amplified].mean())


def entropy(batch):
    """Mean over the rows that are computed: the others have none."""
    entropies = batch["entropies"][batch["completion_mask"].bool()]
    return float(entropies[~entropies.isnan()].mean())


@pytest.mark.parametrize(
    ("loop", "measure", "bound", "acts"),
    [(MismatchLoop, mismatch, 0.2, True), (MismatchLoop, mismatch, 0.4, False), (EntropyLoop, entropy, 1.0, True)],
)
def test_scales_follow_what_is_measured(loop, measure, bound, acts, tmp_path):
    trainer = trained_loop(tmp_path, loop, bound)
    damping, scales = 1.0, []
    assert len(trainer.batches) == 4
    for batch in trainer.batches:
        scales.append(1 + damping)
        damping = next_damping(damping, measure(batch), bound)
    assert logged(trainer, "a3po/scale/positive_low") == pytest.approx(scales, rel=1e-4)
    assert logged(trainer, "a3po/scale/negative_high") == pytest.approx(scales, rel=1e-4)
    assert (scales[-1] < 2) == acts
    advantages, mask = batch["advantages"][:, None], batch["completion_mask"].bool()
    weights = (batch["shaped"] / advantages)[mask & (advantages != 0)]
    assert weights.unique().tolist() == pytest.approx([1.0, scales[-1]], rel=1e-5)


def test_a_resumed_run_continues_with_its_damping(tmp_path):
    fields = {"save_strategy": "steps", "save_steps": 2}
    whole = trained_loop(tmp_path / "whole", MismatchLoop, 0.2, **fields)
    resumed = closed_loop(tmp_path / "resumed", MismatchLoop, 0.2, **fields)
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-2"))
    assert resumed.damping == whole.damping < 1
    assert_same_update(resumed, whole)


def test_an_evaluation_damps_nothing(tmp_path):
    trainer = trained_loop(tmp_path, MismatchLoop, 0.2, max_steps=1)
    damping = trainer.damping
    trainer.evaluate(tiny.prompts(8))
    assert trainer.damping == damping < 1
