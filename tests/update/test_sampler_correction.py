"""The importance ratio between policy and sampler, against its definition."""

import math
from types import SimpleNamespace

import pytest
import torch

from trl_a3po.update.sampler_correction import (
    SamplerCorrection,
    mismatch_metrics,
    mismatch_statistics,
    sampler_ratio,
)


MODES = ["token_truncate", "token_mask", "sequence_truncate", "sequence_mask"]
BOUNDS = [(None, None), (None, 1.5), (0.7, 1.5), (0.7, None)]


def batch():
    generator = torch.Generator().manual_seed(0)
    logps = -3 * torch.rand(5, 7, generator=generator)
    sampling = logps + 0.5 * torch.randn(5, 7, generator=generator)
    sampling[1, 2] = math.nan  # the sampler reported nothing
    mask = (torch.arange(7) < torch.tensor([7, 5, 3, 0, 6])[:, None]).long()
    mask[0, 3] = 0  # the output of a tool
    return logps, sampling, mask


def ratio_by_definition(logps, sampling, mask, mode, low, high):
    """One completion, and one token, after the other."""
    level, _, treatment = mode.partition("_")
    rows = []
    for row in range(len(logps)):
        differences = [
            0.0 if math.isnan(sampling[row, t]) or not mask[row, t] else float(logps[row, t] - sampling[row, t])
            for t in range(logps.shape[1])
        ]
        ratios = [math.exp(sum(differences))] if level == "sequence" else [math.exp(each) for each in differences]
        for t, ratio in enumerate(ratios):
            if low is not None and ratio < low:
                ratios[t] = low if treatment == "truncate" else 0.0
            if high is not None and ratio > high:
                ratios[t] = high if treatment == "truncate" else 0.0
        rows.append(ratios)
    return torch.tensor(rows)


@pytest.mark.parametrize("mode", MODES)
def test_the_ratio_is_that_of_the_definition(mode):
    for low, high in BOUNDS:
        ratio = sampler_ratio(*batch(), mode, low, high)
        torch.testing.assert_close(ratio, ratio_by_definition(*batch(), mode, low, high))


@pytest.mark.parametrize("mode", MODES)
def test_the_metrics_of_parts_are_those_of_the_whole(mode):
    logps, sampling, mask = batch()
    ratio = sampler_ratio(logps, sampling, mask, mode, None, 1.5)
    parts = [
        mismatch_statistics(logps[rows], sampling[rows], ratio[rows], mask[rows])
        for rows in (slice(0, 2), slice(2, 4), slice(4, 5))
    ]
    metrics = mismatch_metrics(sum(sums for sums, _ in parts), torch.stack([most for _, most in parts]).amax(0))
    distances = [
        abs(float(logps[row, t] - sampling[row, t]))
        for row, t in mask.nonzero().tolist()
        if not math.isnan(sampling[row, t])
    ]
    counted = ratio[mask.bool()] if ratio.shape == mask.shape else ratio[mask.any(1)]
    assert metrics == pytest.approx(
        {
            "sampling/sampling_logp_difference/mean": sum(distances) / len(distances),
            "sampling/sampling_logp_difference/max": max(distances),
            "sampling/importance_sampling_ratio/min": float(counted.min()),
            "sampling/importance_sampling_ratio/mean": float(counted.mean()),
            "sampling/importance_sampling_ratio/max": float(counted.max()),
        }
    )
    assert mismatch_metrics(*mismatch_statistics(logps, sampling, ratio, torch.zeros_like(mask))) == {}


def trainer(**settings):
    args = {"mode": "token_truncate", "clip_min": None, "clip_max": 1.5, **settings}
    return SimpleNamespace(
        args=SimpleNamespace(**{f"vllm_importance_sampling_{name}": value for name, value in args.items()}),
        accelerator=SimpleNamespace(gather=lambda tensor: tensor, is_main_process=True),
    )


def rollout_of_trl():
    logps, sampling, mask = batch()
    return {
        "old_per_token_logps": logps,
        "sampling_per_token_logps": sampling,
        "completion_mask": mask,
        "importance_sampling_ratio": ratio_by_definition(logps, sampling, mask, "token_truncate", None, 1.5),
    }


def test_another_ratio_of_trl_is_noticed(caplog):
    correction = SamplerCorrection(trainer())
    assert correction.is_trls is None
    assert correction.check(rollout_of_trl())
    assert correction.is_trls
    assert not caplog.records
    correction = SamplerCorrection(trainer(mode="sequence_truncate"))
    assert not correction.check(rollout_of_trl())
    assert correction.is_trls is False
    assert "computes another importance ratio for vLLM" in caplog.text


def test_statistics_of_an_interrupted_run_are_forgotten():
    correction = SamplerCorrection(trainer())
    rollout = rollout_of_trl()
    for mode in ("train", "eval"):
        correction.correct(rollout, rollout["old_per_token_logps"], torch.ones(5, dtype=torch.bool), mode)
    correction.forget()
    assert correction.pop_metrics("train") == correction.pop_metrics("eval") == {}


def test_rows_that_are_not_computed_have_the_ratio_1_and_no_mismatch():
    correction = SamplerCorrection(trainer())
    rollout = rollout_of_trl()
    is_computed = torch.tensor([True, False, True, True, False])
    logps = rollout["old_per_token_logps"].where(is_computed[:, None], 0.0)
    rollout["sampling_per_token_logps"][4] = -200.0  # its ratio would be infinite
    ratio = correction.correct(rollout, logps, is_computed, "train")
    assert (ratio[~is_computed] == 1).all()
    torch.testing.assert_close(ratio[is_computed], rollout["importance_sampling_ratio"][is_computed])
    assert correction.pop_metrics("eval") == {}
    metrics = correction.pop_metrics("train")
    assert metrics["sampling/sampling_logp_difference/max"] < 10
    assert correction.pop_metrics("train") == {}
