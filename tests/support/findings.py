"""Logs that are made up: a healthy run, and for each rule of the findings a run just in its bound and one just out."""

import math


# A run of 60 steps whose reward rises from 0.2 to 0.6.
HEALTHY = {
    "loss": lambda t: 0.01 - 0.001 * (t % 3),
    "grad_norm": lambda t: 0.5 + 0.1 * (t % 4),
    "learning_rate": lambda t: 1e-6,
    "reward": lambda t: 0.2 + 0.4 * t + 0.01 * math.sin(900 * t),
    "reward_std": lambda t: 0.4,
    "rewards/accuracy_reward/mean": lambda t: 0.2 + 0.4 * t,
    "rewards/accuracy_reward/std": lambda t: 0.4,
    "frac_reward_zero_std": lambda t: 0.2,
    "entropy": lambda t: 0.8 - 0.4 * t,
    "completions/mean_length": lambda t: 100 + 50 * t,
    "completions/clipped_ratio": lambda t: 0.1,
    "clip_ratio/region_mean": lambda t: 0.01,
}
FLAT = {"reward": lambda t: 0.2 + 0.01 * math.sin(900 * t)}
STEPS = 60


def history(steps=STEPS, **metrics):
    """Logs of a run. A metric is a number, a function of the time from 0 to 1, or None if it is not logged."""
    metrics = {**HEALTHY, **metrics}
    logs = []
    for step in range(1, steps + 1):
        values = {name: m(step / steps) if callable(m) else m for name, m in metrics.items() if m is not None}
        logs.append({"step": step, "epoch": step / steps, **values})
    return [*logs, {"step": steps, "train_runtime": 1.0, "train_loss": 0.0}]


def signal(**shares):
    known = ("all_right", "all_wrong", "all_equal", "at_mean", "unscored", "unparsable", "truncated", "tools")
    values = {**dict.fromkeys((*known, "weight_zero"), 0.0), **shares}
    return {
        **{f"signal/completions/{reason}": share for reason, share in values.items()},
        "signal/completions/signal": 1 - sum(values.values()),
        "frac_reward_zero_std": 0.0,
    }


def late(value, otherwise):
    """The value in the second half of the run."""
    return lambda t: value if t > 0.5 else otherwise


def constant(value):
    return {"reward": value, "rewards/accuracy_reward/mean": value, "rewards/accuracy_reward/std": 0.0}


# For each rule: a log that has it just in, and one that has it just out.
CASES = {
    "infinite rewards": ({"reward": lambda t: math.inf if t == 0.5 else 0.4}, {}),
    "not finite": ({"grad_norm": lambda t: math.nan if t == 1 else 0.5}, {}),
    "learning rate at 0": (
        {"learning_rate": lambda t: 1e-6 if t <= 0.5 else 1e-9},
        {"learning_rate": lambda t: 1e-6 if t <= 0.5 else 1.1e-9},
    ),
    "learning rate tiny": ({"learning_rate": 1e-8}, {"learning_rate": 1.1e-8}),
    "warm-up longer than the run": (
        {"learning_rate": lambda t: 1e-6 * t},
        {"learning_rate": lambda t: 1e-6 * min(t, 0.9)},
    ),
    "solutions that cannot be parsed": (signal(unparsable=0.05), signal(unparsable=0.049)),
    "completions that no reward function scores": (signal(unscored=0.5), signal(unscored=0.49)),
    "gradient of 0": (
        {"grad_norm": lambda t: 0.0 if t > 0.5 and t != 1 else 0.5},
        {"grad_norm": lambda t: 0.0 if t > 0.5 and t < 0.96 else 0.5},
    ),
    "entropy exploding": (
        {"entropy": late(1.61, 0.8), **FLAT},
        {"entropy": late(1.59, 0.8), **FLAT, "reward_std": None},
    ),
    "completions run into the limit": (
        {"completions/clipped_ratio": late(0.5, 0.1), "completions/mean_length": lambda t: 100 + 100 * t},
        {"completions/clipped_ratio": late(0.49, 0.1), "completions/mean_length": lambda t: 100 + 100 * t},
    ),
    "most completions truncated": (
        {"completions/clipped_ratio": 0.5, **FLAT},
        {"completions/clipped_ratio": 0.49, **FLAT, "reward_std": None},
    ),
    "entropy collapsed": (
        {"entropy": lambda t: 0.8 if t <= 0.5 else 0.08, **FLAT, "reward_std": 0.4},
        {"entropy": lambda t: 0.8 if t <= 0.5 else 0.081, "reward": 0.2, "reward_std": None},
    ),
    "no signal: all wrong": (
        {"frac_reward_zero_std": late(0.9, 0.2), **constant(0.0)},
        {"frac_reward_zero_std": late(0.89, 0.2)},
    ),
    "no signal: all right": ({"frac_reward_zero_std": 0.9, **constant(1.0)}, {"frac_reward_zero_std": 0.89}),
    "no signal: same reward within groups": (
        {"frac_reward_zero_std": 0.9, **FLAT},
        {"frac_reward_zero_std": 0.89, **FLAT, "reward_std": None},
    ),
    "no signal: rewards at the mean of the group": (signal(at_mean=0.9), signal(at_mean=0.89)),
    "no signal: masked": (signal(truncated=0.5, tools=0.4), signal(truncated=0.5, tools=0.39)),
    "no signal: weight 0": (signal(weight_zero=0.9), signal(weight_zero=0.89)),
    "no signal: several reasons": (
        signal(truncated=0.45, all_wrong=0.45),
        signal(truncated=0.45, all_wrong=0.44),
    ),
    "a reward function that gives nothing": (
        {"rewards/format/mean": 0.0, "rewards/format/std": 0.0, **FLAT},
        {"rewards/format/mean": 0.0, "rewards/format/std": 0.001, **FLAT, "reward_std": None},
    ),
    "gradient spikes": (
        {"grad_norm": lambda t: 50.0 if t == 0.5 else 0.5},
        {"grad_norm": lambda t: 49.0 if t == 0.5 else 0.5},
    ),
    "most tokens masked": ({"signal/tokens/off_policy": 0.5}, {"signal/tokens/off_policy": 0.49}),
    "mismatch grows": (
        {"sampling/sampling_logp_difference/mean": late(0.0601, 0.02)},
        {"sampling/sampling_logp_difference/mean": late(0.059, 0.02)},
    ),
    "mismatch large": (
        {"signal/mismatch/effective_sample_size": 0.5},
        {"signal/mismatch/effective_sample_size": 0.51},
    ),
    "clip share high": ({"clip_ratio/region_mean": 0.3}, {"clip_ratio/region_mean": 0.29}),
    "completions shrink to nothing": (
        {"completions/mean_length": late(20.0, 100.0), **FLAT},
        {"completions/mean_length": late(20.1, 100.0), **FLAT, "reward_std": None},
    ),
    "reward fell": (
        {"reward": lambda t: 0.5 if t <= 0.5 else 0.29},
        {"reward": lambda t: 0.5 if t <= 0.5 else 0.31, "steps": 29},
    ),
    "scales decayed too early": (
        {"a3po/scale/positive_low": lambda t: max(1.0, 2 - 10 * t)},
        {"a3po/scale/positive_low": lambda t: max(1.0, 2 - 8 * t)},
    ),
    "scales never decay": (
        {"a3po/scale/positive_low": 2.0},
        {"a3po/scale/positive_low": lambda t: 2.0 - t},
    ),
    "held-out reward falls": (
        {"eval_reward": lambda t: 0.3 if t <= 0.5 else 0.259},
        {"eval_reward": lambda t: 0.3 if t <= 0.5 else 0.261},
    ),
    "never evaluated": ({"steps": 1000}, {"steps": 999}),
    "tool calls fail": ({"tools/failure_frequency": 0.5}, {"tools/failure_frequency": 0.49}),
    "settled early": (
        {"entropy": lambda t: 0.8 if t <= 0.3 else 0.4, **FLAT},
        {"entropy": lambda t: 0.8 if t <= 0.3 else 0.4, "reward": HEALTHY["reward"]},
    ),
    "reward flat": (FLAT, {"steps": 29, **FLAT}),
}
