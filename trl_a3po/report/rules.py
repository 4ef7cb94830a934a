"""
`RULES`, the one table of what is looked for in the log of a run.

Each rule has a bound and the reason for it. A check is a pure function of the log. It reads the metrics of TRL, and
those of A3PO where they were logged, so that the logs of `GRPOTrainer` work as well.
"""

import math
import re
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from statistics import StatisticsError, correlation, fmean, median
from typing import NamedTuple

from .text import counted
from .training_log import (
    ERRORS,
    FEWEST_LOGS,
    FEWEST_STEPS,
    MOST,
    NO_SIGNAL,
    SAME_REWARD,
    Log,
    Points,
    is_enough,
    last_quarter,
    mean_value,
)


class Seen(NamedTuple):
    """What a check returns when its rule applies."""

    metric: str
    since: int
    text: str


@dataclass(frozen=True)
class Rule:
    """
    One line of the table.

    Args:
        name (`str`): What is found.
        bound (`float`): The value at which the check says so, in the words of `when`.
        when (`str`): What the check compares with the bound.
        reason (`str`): Why this bound.
        means (`str`): Why it matters to the person who reads.
        change (`str`): Which options to change.
        check (callable): From a log and the bound to what is seen, or None.
        hides (`tuple[str]`): Rules further down the table that apply only because this one does.
    """

    name: str
    bound: float
    when: str
    reason: str
    means: str
    change: str
    check: Callable[[Log, float], Seen | None]
    hides: tuple[str, ...] = ()


# Checks. Each takes the log and the bound of its rule.


def _infinite_rewards(log: Log, bound: float) -> Seen | None:
    for name in [name for name in log if re.fullmatch(r"rewards/.+/mean", name)] + ["reward"]:
        steps = [step for step, value in log.all(name) if math.isinf(value)]
        if len(steps) >= bound:
            return Seen(name, steps[0], f"`{name}` is infinite in {counted(len(steps), 'log')}")
    return None


def _not_finite(log: Log, bound: float) -> Seen | None:
    for name in ("loss", "grad_norm"):
        points = log.all(name)
        steps = [step for step, value in points if not math.isfinite(value)]
        # Parameters that are not finite stay so. With fp16, single steps overflow and are skipped.
        if steps and (steps[-1] == points[-1][0] or len(steps) >= max(FEWEST_LOGS, bound * len(points))):
            return Seen(name, steps[0], f"`{name}` is not finite in {counted(len(steps), 'log')}")
    return None


def _learning_rate(log: Log, bound: float) -> Seen | None:
    points = log.known("learning_rate")
    highest = max((value for _, value in points), default=0.0)
    if not is_enough(points) or log.end("learning_rate") > bound * highest:
        return None
    if mean_value(points[-FEWEST_LOGS:]) > bound * highest:
        return None  # it rises again
    since = _since(points, lambda value: value <= bound * highest)
    return Seen("learning_rate", since, f"the learning rate is {_n(points[-1][1])}, after at most {_n(highest)}")


def _learning_rate_tiny(log: Log, bound: float) -> Seen | None:
    points = log.known("learning_rate")
    highest = max((value for _, value in points), default=0.0)
    if not is_enough(points) or not 0 < highest <= bound:
        return None
    return Seen("learning_rate", points[0][0], f"the learning rate is {_n(highest)} at most")


def _warm_up(log: Log, bound: float) -> Seen | None:
    points = log.known("learning_rate")
    if not log.has_ended or not is_enough(points):
        return None
    rises = [(after - before) / (step - previous) for (previous, before), (step, after) in pairwise(points)]
    if sum(rise > 0 for rise in rises) < bound * max(1, len(rises)):
        return None
    # A last rise that is smaller than the first, or than that from 0: the warm-up ended between two logs.
    from_zero = points[0][1] / max(1, points[0][0])
    if rises and rises[-1] < 0.99 * max(rises[0], from_zero):
        return None
    return Seen("learning_rate", points[0][0], f"the learning rate rose in every log, to {_n(points[-1][1])}")


def _unscored(log: Log, bound: float) -> Seen | None:
    name = "signal/completions/unscored"
    if name in log:
        share = log.end(name)
        if not share >= bound:
            return None
        return Seen(name, _since_above(log, name, bound), f"no reward function scored {_p(share)} of the completions")
    # Older releases of TRL log a reward of 0, and only the means of the functions are missing.
    names = [name for name in log if re.fullmatch(r"rewards/.+/mean", name)] or ["reward"]
    scored = {step for name in names for step, value in log.all(name) if not math.isnan(value)}
    points = [(step, value if step in scored else math.nan) for step, value in log.all("reward")]
    if not is_enough(points):
        return None
    last = last_quarter(points)
    missing = sum(math.isnan(value) for _, value in last) / len(last)
    if missing < bound:
        return None
    first = next(step for step, value in points if math.isnan(value))
    return Seen("reward", first, f"{_p(missing)} of the last logs have no reward: every reward function returned None")


def _unparsable(log: Log, bound: float) -> Seen | None:
    name = "signal/completions/unparsable"
    points = log.known(name)
    share = mean_value(points) if is_enough(points) else math.nan
    if not share >= bound:
        return None
    first = next(step for step, value in points if value > 0)
    return Seen(name, first, f"math-verify cannot parse the solution of {_p(share)} of the completions' problems")


def _no_signal(*reasons: str) -> Callable[[Log, float], Seen | None]:
    """The check for hardly any learning signal, mostly for one of these reasons."""

    def check(log: Log, bound: float) -> Seen | None:
        shares = log.shares()
        without = sum(shares.values())
        if not without >= bound or _main_reasons(shares) != reasons or log.has_solved():
            return None
        if "signal/completions/signal" in log:
            metric, points = "signal/completions/signal", log.known("signal/completions/signal")
            since, at_start = _since(points, lambda value: value <= 1 - bound), 1 - log.start(metric)
        else:
            metric = "frac_reward_zero_std"
            since, at_start = _since_above(log, metric, bound), log.start(metric)
        if reasons == ("all_right",) and (at_start < bound / 2 or log.start("reward") <= 0.5 * log.end("reward")):
            return None  # it was solved, within so few logs that the rise may be chance; or it began all wrong
        details = f"; the mean reward is {_n(log.end('reward'))}" if log.known("reward") else ""
        cut = log.end("completions/clipped_ratio")
        details += f"; {_p(cut)} are cut at the length limit" if cut >= 0.1 else ""
        return Seen(metric, since, f"{_p(without)} of the completions have no learning signal{details}")

    return check


def _main_reasons(shares: dict[str, float]) -> tuple[str, ...]:
    """The first of these groups that explains four fifths of the completions without a signal; else all of them."""
    groups = ("all_wrong",), ("all_right",), SAME_REWARD, ("at_mean",), ("truncated", "tools"), ("weight_zero",)
    least = 0.8 * sum(shares.values())
    return next((group for group in groups if sum(shares.get(each, 0.0) for each in group) >= least), NO_SIGNAL)


def _truncated(log: Log, bound: float) -> Seen | None:
    name = "completions/clipped_ratio"
    share = log.end(name)
    # Truncated completions that learn all the same are rewarded as they are.
    if not share >= bound or log.has_learned():
        return None
    if log.lacks_signal():
        # Is that why? Not if completions that end are all wrong as well, or if all of them are right.
        reasons = _main_reasons(log.shares())
        if not (reasons == ("truncated", "tools") or (reasons == ("all_wrong",) and share >= 0.95)):
            return None
    return Seen(name, _since_above(log, name, bound), f"{_p(share)} of the completions were cut at the length limit")


def _runs_into_limit(log: Log, bound: float) -> Seen | None:
    name, length = "completions/clipped_ratio", "completions/mean_length"
    share, grown = log.end(name), log.end(length) / (log.start(length) or math.nan)
    if not (share >= bound and log.start(name) < bound / 2 and grown >= 1.5):
        return None
    lengths = f"{_n(log.start(length))} to {_n(log.end(length))} tokens"
    return Seen(
        length,
        _since_above(log, name, bound),
        f"completions grew from {lengths}, and {_p(share)} were cut at the limit",
    )


def _lengths_to_nothing(log: Log, bound: float) -> Seen | None:
    name = "completions/mean_length"
    start, end = log.start(name), log.end(name)
    # One token is the end of the sequence: such an answer is empty, whatever its reward.
    is_empty = end <= 1.5 and max(value for _, value in log.known(name)) >= 3
    if not is_empty and (not end <= bound * start or log.has_learned()):
        return None
    since = _since(log.known(name), lambda value: value <= max(bound * start, 1.5))
    return Seen(name, since, f"completions shrank from {_n(start)} to {_n(end)} tokens")


def _constant_reward(log: Log, bound: float) -> Seen | None:
    functions = [name.removesuffix("/mean") for name in log if re.fullmatch(r"rewards/.+/mean", name)]
    if len(functions) < 2 or log.has_learned():
        return None
    for function in functions:
        means, spreads = log.known(f"{function}/mean"), log.known(f"{function}/std")
        is_constant = is_enough(spreads) and len({value for _, value in means}) == 1
        if is_constant and all(value <= bound for _, value in spreads) and means[0][1] <= 0:
            text = f"`{function.partition('/')[2]}` gave {_n(means[0][1])} to every completion"
            return Seen(f"{function}/mean", means[0][0], text)
    return None


def _entropy_collapsed(log: Log, bound: float) -> Seen | None:
    start, end = log.start("entropy"), log.end("entropy")
    if not (end <= bound * start or end <= 0.001) or log.has_solved() or _rises_still(log):
        return None
    since = _since(log.known("entropy"), lambda value: value <= max(bound * start, 0.001))
    return Seen("entropy", since, f"the entropy is {_n(end)} nats a token, and was {_n(start)} at the start")


def _entropy_explodes(log: Log, bound: float) -> Seen | None:
    start, end = log.start("entropy"), log.end("entropy")
    if not start > 0:  # as TRL logs it where every completion is masked
        return None
    if not (end >= bound * start and end - start >= 0.5) or _rises_still(log):
        return None
    since = _since(log.known("entropy"), lambda value: value >= bound * start)
    return Seen("entropy", since, f"the entropy rose from {_n(start)} to {_n(end)} nats a token")


def _rises_still(log: Log) -> bool:
    """Whether the reward rose in the second half of the run by more than chance explains."""
    points = log.known("reward")
    half = Log({"step": step, "reward": value} for step, value in points[len(points) // 2 :])
    rise, error = half.rise("reward")
    return rise > ERRORS * error > 0


def _reward_fell(log: Log, bound: float) -> Seen | None:
    points = log.known("reward")
    rise, error = log.rise("reward")
    spread = log.spread()
    # Two logs have no scatter to compare with.
    if len(points) < FEWEST_LOGS or not (spread > 0 and -rise >= bound * spread and -rise > ERRORS * error):
        return None
    start = log.start("reward")
    since = _since(points, lambda value: value < start - error)
    return Seen("reward", since, f"the reward fell from {_n(start)} to {_n(log.end('reward'))}")


def _flat(log: Log, bound: float) -> Seen | None:
    points = log.known("reward")
    if len(points) < bound or not log.end("reward_std") > 0.5 * log.spread() > 0 or log.has_learned():
        return None
    if _trend(points) > ERRORS:
        return None
    start, end = _n(log.start("reward")), _n(log.end("reward"))
    return Seen("reward", points[0][0], f"the reward was {start} at the start and is {end} at the end")


def _settled(log: Log, bound: float) -> Seen | None:
    start, end = log.start("entropy"), log.end("entropy")
    change, error = log.rise("entropy")
    if not (end <= bound * start and -change > ERRORS * error) or (flat := _flat(log, FLAT_LOGS)) is None:
        return None
    since = _since(log.known("entropy"), lambda value: value <= bound * start)
    return Seen("entropy", since, f"the entropy fell from {_n(start)} to {_n(end)} nats a token; {flat.text}")


def _trend(points: Points) -> float:
    """The slope of a straight line through the values, in its standard errors."""
    order = range(len(points))
    values = [value for _, value in points]
    if len(points) < FEWEST_LOGS or min(values) == max(values):
        return 0.0
    try:
        r = correlation(order, values)
    except StatisticsError:  # their squares are too small for a number
        return 0.0
    return r * math.sqrt((len(points) - 2) / max(1 - r * r, 1e-12))


def _scales_early(log: Log, bound: float) -> Seen | None:
    for name, points in _scales(log):
        at_one = next((step for step, value in points if value == 1), None)
        if at_one is None or points[0][1] == 1 or at_one > bound * log.last_step():
            continue
        until = Log({"step": step, "reward": value} for step, value in log.known("reward") if step <= at_one)
        if until.start("reward") < mean_value(until.known("reward")[-1:]) - 0.1 * log.spread():
            continue  # something was learned by then
        return Seen(name, at_one, f"`{name}` reached 1 at step {at_one} of {log.last_step()}, before the reward rose")
    return None


def _scales_constant(log: Log, bound: float) -> Seen | None:
    for name, points in _scales(log):
        if is_enough(points) and len(points) >= bound and points[-1][1] != 1 and points[0][1] == points[-1][1]:
            return Seen(name, points[0][0], f"`{name}` is {_n(points[0][1])} from the first log to the last")
    return None


def _scales(log: Log) -> list[tuple[str, Points]]:
    return [(name, log.known(name)) for name in log if name.startswith("a3po/scale/") and log.known(name)]


def _mismatch_grows(log: Log, bound: float) -> Seen | None:
    name = "sampling/sampling_logp_difference/mean"
    start, end = log.start(name), log.end(name)
    if not (end >= bound * start and end >= 0.05):
        return None
    since = _since(log.known(name), lambda value: value >= bound * start)
    return Seen(name, since, f"the log-probabilities of trainer and vLLM differed by {_n(start)} nats, now {_n(end)}")


def _mismatch_large(log: Log, bound: float) -> Seen | None:
    effective, treated = "signal/mismatch/effective_sample_size", "sampling/importance_sampling_ratio/mean"
    if log.end(effective) <= bound:
        since = _since(log.known(effective), lambda value: value <= bound)
        text = f"the ratios to vLLM leave an effective sample of {_p(log.end(effective))} of the tokens"
        return Seen(effective, since, text)
    if log.end(treated) <= bound:
        since = _since(log.known(treated), lambda value: value <= bound)
        return Seen(treated, since, f"the mean importance ratio to vLLM is {_n(log.end(treated))} once corrected")
    return None


def _masked_tokens(log: Log, bound: float) -> Seen | None:
    shares = {
        name: log.end(name) for name in (f"signal/tokens/{reason}" for reason in ("off_policy", "sampler_masked"))
    }
    name = max(shares, key=lambda name: -1.0 if math.isnan(shares[name]) else shares[name])
    if not shares[name] >= bound:
        return None
    what = "the off-policy mask" if name.endswith("off_policy") else "the vLLM correction"
    text = f"{what} removed {_p(shares[name])} of the tokens that had a learning signal"
    return Seen(name, _since_above(log, name, bound), text)


def _clipped(log: Log, bound: float) -> Seen | None:
    # Not `cispo_clip_ratio`: CISPO keeps the gradient of the tokens whose weight it caps.
    name = "clip_ratio/region_mean"
    if not log.end(name) >= bound:
        return None
    return Seen(name, _since_above(log, name, bound), f"the ratio of {_p(log.end(name))} of tokens is clipped")


def _gradient_zero(log: Log, bound: float) -> Seen | None:
    points = log.known("grad_norm")
    last = last_quarter(points)
    if log.lacks_signal() or log.has_solved():
        return None  # then it has to be 0
    if "signal/completions/signal" not in log and log.end("completions/clipped_ratio") >= bound:
        return None  # `mask_truncated_completions` may leave nothing to train on, which this log does not say
    if not is_enough(points) or sum(value == 0 for _, value in last) < bound * len(last):
        return None
    since = _since(points, lambda value: value == 0, width=1)
    # A log has the norm of one step. In a step of one group, it is 0 as often as a group has no signal.
    without_signal, zeros = sum(log.shares().values()), sum(value == 0 for step, value in points if step >= since)
    if without_signal**zeros > _CHANCE:
        return None
    return Seen("grad_norm", since, "the gradient's norm is 0")


def _gradient_spikes(log: Log, bound: float) -> Seen | None:
    points = [(step, value) for step, value in log.known("grad_norm") if value > 0]
    if len(points) < FEWEST_STEPS:
        return None
    middle = median(value for _, value in points)
    high = [place for place, (_, value) in enumerate(points) if value >= bound * middle]
    if len(high) > max(1, len(points) // 20):
        return None  # what is so frequent is no spike: the others are small
    # One that was large from the start, and became small, has no spikes.
    before = {place: points[max(0, place - FEWEST_STEPS) : place] for place in high if place >= FEWEST_LOGS}
    spikes = [
        points[place]
        for place, earlier in before.items()
        if points[place][1] >= bound * median(value for _, value in earlier)
    ]
    if not spikes:
        return None
    highest = max(value for _, value in spikes)
    often = counted(len(spikes), "log")
    text = f"the gradient's norm rose to {_n(highest)}, at a median of {_n(middle)}; so high in {often}"
    return Seen("grad_norm", spikes[0][0], text)


def _held_out_falls(log: Log, bound: float) -> Seen | None:
    for name in [name for name in log if re.fullmatch(r"eval_(.+_)?reward", name)]:
        points = log.known(name)
        if len(points) < FEWEST_LOGS:
            continue
        at, best = max(points, key=lambda point: point[1])
        last = mean_value(points[-max(1, len(points) // 4) :])
        until = [point for point in log.known("reward") if point[0] <= at]
        before = mean_value(until[-FEWEST_LOGS:]) if until else log.start("reward")  # best before the first step
        after, (_, error) = log.end("reward"), log.rise("reward")
        falls = best - last >= bound * (log.spread() or abs(best)) and best - last > ERRORS * _bends(points)
        if falls and after - before > ERRORS * error:
            rose = f"while the training reward rose from {_n(before)} to {_n(after)}"
            return Seen(name, at, f"`{name}` fell from {_n(best)} to {_n(last)}, {rose}")
    return None


def _bends(points: Points) -> float:
    """The scatter of one value around a curve, from second differences: a rise or fall hardly changes it."""
    values = [value for _, value in points]
    seconds = [a - 2 * b + c for a, b, c in zip(values, values[1:], values[2:], strict=False)]
    return math.sqrt(fmean(second**2 for second in seconds) / 6) if seconds else 0.0


def _never_evaluated(log: Log, bound: float) -> Seen | None:
    if log.last_step() < bound or any(name.startswith("eval_") for name in log) or "reward" not in log:
        return None
    return Seen("reward", log.known("reward")[0][0] if log.known("reward") else 0, "no evaluation was logged")


def _tools_fail(log: Log, bound: float) -> Seen | None:
    name = "tools/failure_frequency"
    if not log.end(name) >= bound:
        return None
    return Seen(name, _since_above(log, name, bound), f"{_p(log.end(name))} of the tool calls failed")


# The table. The first rules explain the others, so they come first.

FLAT_LOGS = 30
# What is less likely is not chance.
_CHANCE = 0.001
_NO_RISE = ("settled early", "reward flat")
_SYMPTOMS = (
    "gradient of 0",
    "most completions truncated",
    *_NO_RISE,
    "entropy collapsed",
    "a reward function that gives nothing",
    "scales decayed too early",
    "completions shrink to nothing",
)
_OF_NO_SIGNAL = (
    "no signal: all right",
    "no signal: all wrong",
    "no signal: same reward within groups",
    "no signal: rewards at the mean of the group",
    "no signal: masked",
    "no signal: weight 0",
    "no signal: several reasons",
)


def _without_signal(name: str, *reasons: str, means: str, change: str) -> Rule:
    return Rule(
        f"no signal: {name}",
        MOST,
        "share of completions without a learning signal at the end",
        "with fewer than one completion in ten, a step of 64 completions learns from six",
        means,
        change,
        _no_signal(*reasons),
        _SYMPTOMS,
    )


RULES: tuple[Rule, ...] = (
    Rule(
        "infinite rewards",
        1,
        "logs with an infinite mean of the rewards",
        "one infinite reward is enough: its group has no advantages",
        "A reward function returned an infinite number. The completions of that group cannot be compared.",
        "Return finite numbers from `reward_funcs`: clip them, or return None for what cannot be scored.",
        _infinite_rewards,
        (*_SYMPTOMS, "not finite", "gradient spikes", "reward fell"),
    ),
    Rule(
        "not finite",
        0.1,
        "share of the logs whose `loss` or `grad_norm` is NaN or infinite, at least three, or the last one",
        "with fp16, single steps overflow and are skipped; parameters that are not finite stay so",
        "The update overflowed. Parameters may be ruined from there on.",
        "Lower `learning_rate`; set `bf16=True` instead of `fp16`; resume from a checkpoint before that step.",
        _not_finite,
        (*_SYMPTOMS, "gradient spikes", "reward fell"),
    ),
    Rule(
        "learning rate at 0",
        1e-3,
        "the learning rate at the end, relative to its highest value",
        "linear and cosine schedules are below a thousandth only in their very last steps",
        "The model no longer changes.",
        "Raise `max_steps` or `num_train_epochs`, or set `lr_scheduler_type` and `learning_rate`.",
        _learning_rate,
        (*_SYMPTOMS, "learning rate tiny"),
    ),
    Rule(
        "learning rate tiny",
        1e-8,
        "the highest learning rate",
        "a thousand steps of Adam at this rate move a parameter by 0.00001 at most",
        "The model hardly changes.",
        "Raise `learning_rate`: 1e-6 is usual for all parameters, 1e-5 to 1e-4 for an adapter.",
        _learning_rate_tiny,
        _SYMPTOMS,
    ),
    Rule(
        "warm-up longer than the run",
        1.0,
        "share of the logs in which the learning rate rose, of a run that has ended",
        "a warm-up ends before the run does",
        "The learning rate never reached the value that was set.",
        "Lower `warmup_steps`, or raise `max_steps` or `num_train_epochs`.",
        _warm_up,
        _SYMPTOMS,
    ),
    Rule(
        "solutions that cannot be parsed",
        0.05,
        "share of completions of such problems in the whole run",
        "a few broken rows do no harm; one in twenty is worth a look",
        "math-verify cannot read the gold answer, so no completion of the problem has a reward.",
        "Correct the column `solution` of `train_dataset`, for example `$42$` with dollar signs, or remove the rows.",
        _unparsable,
        (*_SYMPTOMS, *_OF_NO_SIGNAL, "completions that no reward function scores"),
    ),
    Rule(
        "completions that no reward function scores",
        0.5,
        "share of completions without a reward at the end",
        "half of the sampled completions are wasted",
        "A reward function that returns None scores nothing. Completions without any reward are not trained on.",
        "Let one of the `reward_funcs` return a number. `accuracy_reward` returns None where it cannot parse the "
        "column `solution`.",
        _unscored,
        (*_SYMPTOMS, *_OF_NO_SIGNAL),
    ),
    Rule(
        "gradient of 0",
        0.9,
        "share of the last logs whose `grad_norm` is exactly 0, unless steps without a signal explain it",
        "single steps without a signal have a norm of 0 by chance",
        "The loss has no gradient, although there are rewards that differ.",
        "Check that parameters are trainable (`requires_grad`, the modules of `peft_config`), `positive_weight`, "
        "`negative_weight`, and a `shape_advantages` of your own. With `scale_rewards='batch'`, check that rewards "
        "differ within groups.",
        _gradient_zero,
        _SYMPTOMS,
    ),
    Rule(
        "entropy exploding",
        2.0,
        "the entropy at the end, relative to the start, and 0.5 nats above it, if the reward does not rise",
        "no run of our benchmarks ended more than 12 % above its start",
        "The model drifts to random text.",
        "Lower `learning_rate`, `negative_high_scale`, `negative_weight` or `temperature`; set `beta` to a small "
        "value such as 0.001.",
        _entropy_explodes,
        (
            "completions run into the limit",
            "most completions truncated",
            "reward fell",
            *_NO_RISE,
            "gradient spikes",
        ),
    ),
    Rule(
        "completions run into the limit",
        0.5,
        "share of truncated completions at the end, from below 0.25 at the start, while lengths grew by half",
        "most completions have lost their end",
        "The model learned to write until it is cut.",
        "Raise `max_completion_length`, set `mask_truncated_completions=True`, or add a reward for length such as "
        "`get_soft_overlong_punishment`.",
        _runs_into_limit,
        ("no signal: masked", "no signal: all wrong", *_SYMPTOMS, "reward fell"),
    ),
    Rule(
        "most completions truncated",
        0.5,
        "share of truncated completions at the end, if the reward did not rise",
        "most completions have lost their end, and with it the answer",
        "A completion that is cut before its answer is scored as wrong, or not trained on.",
        "Raise `max_completion_length`, ask for shorter answers in the prompt, and check that the model ends with its "
        "end-of-sequence token (its chat template, `eos_token`).",
        _truncated,
        ("no signal: all wrong", "no signal: masked", *_SYMPTOMS),
    ),
    Rule(
        "entropy collapsed",
        0.1,
        "the entropy at the end, relative to the start (or at 0.001 nats), if the reward neither rises nor is solved",
        "every run of our benchmarks kept more than a sixth of it",
        "The model answers the same each time. Nothing new is tried.",
        "Raise `temperature`, `epsilon_high`, `positive_low_scale` or `scale_decay_steps`; lower `learning_rate` or "
        "`positive_weight`.",
        _entropy_collapsed,
        (
            "no signal: all wrong",
            "no signal: same reward within groups",
            "gradient of 0",
            *_NO_RISE,
            "scales decayed too early",
        ),
    ),
    _without_signal(
        "all wrong",
        "all_wrong",
        means="Every completion of a group fails, so none is better than the others. The task is too hard for "
        "this model, or the answer is not found in the completion.",
        change="Read some completions (`log_completions=True`). Then train on easier problems, show the answer's form "
        "in the prompt, raise `num_generations`, or set `dynamic_sampling`.",
    ),
    _without_signal(
        "all right",
        "all_right",
        means="Every completion of a group succeeds, and did so from the start. The task is too easy for this model, "
        "or the reward accepts anything.",
        change="Train on harder problems, set `dynamic_sampling`, and check `reward_funcs` on a wrong answer.",
    ),
    _without_signal(
        "same reward within groups",
        *SAME_REWARD,
        means="All completions of a prompt get the same reward. Some prompts are too easy and the others too hard, "
        "the reward depends on the prompt only, or the completions hardly differ.",
        change="Check that `reward_funcs` read the completion. Set `dynamic_sampling`, or raise `temperature`, "
        "`top_k`, `top_p` or `num_generations`. If completions became alike in training, lower `learning_rate`.",
    ),
    _without_signal(
        "rewards at the mean of the group",
        "at_mean",
        means="The reward of these completions is the mean of their group, so their advantage is 0.",
        change="Raise `num_generations`, or check `reward_funcs`.",
    ),
    _without_signal(
        "masked",
        "truncated",
        "tools",
        means="No token of these completions is trained on: they were truncated, or tools wrote all of them.",
        change="Raise `max_completion_length`, or set `mask_truncated_completions=False`; check the `env_mask` of "
        "`rollout_func`.",
    ),
    _without_signal(
        "weight 0",
        "weight_zero",
        means="Almost all completions are of the polarity whose weight is 0.",
        change="Raise `positive_weight` or `negative_weight`.",
    ),
    _without_signal(
        "several reasons",
        *NO_SIGNAL,
        means="Hardly a completion has a learning signal, for several reasons.",
        change="Look at the charts `signal/completions/*`, and begin with the largest.",
    ),
    Rule(
        "a reward function that gives nothing",
        0.0,
        "standard deviation of a reward function that gave 0 or less throughout, if the reward did not rise",
        "one that varies gives a standard deviation above 0 in at least one log",
        "One of several reward functions gave every completion the same, and no credit. Unless it is a penalty, "
        "the model learns nothing from it.",
        "Check this function of `reward_funcs` on a completion that should score, and the names of the columns that "
        "it reads.",
        _constant_reward,
        _NO_RISE,
    ),
    Rule(
        "gradient spikes",
        100.0,
        "a `grad_norm` relative to the median, in at most one log of twenty",
        "our choice: in the demo the highest is twice the median",
        "A few steps push much harder than all others. With `max_grad_norm` they are shortened, but their direction "
        "stays.",
        "Lower `learning_rate` or `max_grad_norm`, raise `gradient_accumulation_steps`, and look at the completions "
        "of that step.",
        _gradient_spikes,
    ),
    Rule(
        "most tokens masked",
        0.5,
        "share of the tokens with a signal that one correction removes at the end",
        "more is removed than trained on",
        "A mask for stale or mismatched tokens removes most of what could be learned.",
        "Raise `off_policy_mask_threshold` or `vllm_importance_sampling_clip_max`, lower `steps_per_generation` or "
        "`num_iterations`, and load the same precision in vLLM.",
        _masked_tokens,
        (*_SYMPTOMS, "mismatch large"),
    ),
    Rule(
        "mismatch grows",
        3.0,
        "the mean distance of log-probabilities to vLLM at the end, if above 0.05 nats, relative to the start",
        "our choice: differences of arithmetic do not grow threefold; smaller ones than 0.05 nats hardly matter",
        "Trainer and vLLM drift apart.",
        "Lower `steps_per_generation` or `num_iterations`, load the same precision in vLLM, and lower "
        "`learning_rate`.",
        _mismatch_grows,
        ("mismatch large",),
    ),
    Rule(
        "mismatch large",
        0.5,
        "effective sample size of the ratios to vLLM as a share of tokens, or their mean once corrected, at the end",
        "half of the tokens then count for nothing",
        "vLLM samples from another distribution than the one that is trained.",
        "Load the same precision in vLLM, set `vllm_importance_sampling_correction=True`, and check that weights are "
        "sent after each step (`vllm_mode`, quantization).",
        _mismatch_large,
    ),
    Rule(
        "clip share high",
        0.3,
        "share of clipped tokens at the end",
        "no run of our benchmarks clipped more than 4 % in any log",
        "Many tokens moved further than the clipping allows, and have no gradient in that direction.",
        "Lower `learning_rate`, `num_iterations` or `steps_per_generation`, or raise `epsilon_high`.",
        _clipped,
    ),
    Rule(
        "completions shrink to nothing",
        0.2,
        "the mean length at the end, relative to the start, if the reward did not rise (or a length of 1.5 tokens)",
        "our choice; one token is only the end of the sequence",
        "The model learned to stop early.",
        "Lower `learning_rate`, and check whether `reward_funcs` reward short or empty completions.",
        _lengths_to_nothing,
        _NO_RISE,
    ),
    Rule(
        "reward fell",
        0.5,
        "fall of the reward, in standard deviations of the rewards at the start, beyond chance",
        "a smaller fall may be a change of problems",
        "The model gets worse at what is rewarded.",
        "Lower `learning_rate`, set `beta`, and check the sign of `reward_funcs` and `reward_weights`.",
        _reward_fell,
        _NO_RISE,
    ),
    Rule(
        "scales decayed too early",
        0.1,
        "the step at which a scale of A3PO reached 1, as a share of the run, before the reward rose",
        "the default is half of the run",
        "From there on the run was GRPO, and A3PO had nothing to shape before that.",
        "Raise `scale_decay_steps`.",
        _scales_early,
    ),
    Rule(
        "scales never decay",
        3,
        "logs with the same scale, which is not 1",
        "a scale that decays changes from log to log",
        "The scales of A3PO are meant to decay to 1. Here they stay as they were.",
        "Set `scale_decay='linear'`, unless `scale_decay='constant'` is what you want to try.",
        _scales_constant,
    ),
    Rule(
        "held-out reward falls",
        0.1,
        "fall of `eval_reward` from its best, in standard deviations of rewards, while the training reward rose",
        "two standard errors of an evaluation of 400 completions",
        "The model learns the training problems by heart, or learns to please the reward.",
        "Stop at the best checkpoint (`load_best_model_at_end=True`, `metric_for_best_model='eval_reward'`), use more "
        "problems, or lower `num_train_epochs`.",
        _held_out_falls,
    ),
    Rule(
        "never evaluated",
        1000,
        "optimizer steps without an evaluation",
        "in that many steps a run can learn its training problems by heart",
        "Nobody knows whether the model got better on problems that it was not trained on.",
        "Set `eval_strategy='steps'`, `eval_steps` and an `eval_dataset`.",
        _never_evaluated,
    ),
    Rule(
        "tool calls fail",
        0.5,
        "share of tool calls that failed at the end",
        "the model learns nothing from most calls",
        "Most calls end in an error.",
        "Describe the `tools` in the prompt, and check which arguments they take.",
        _tools_fail,
    ),
    Rule(
        "settled early",
        0.5,
        "the entropy at the end, relative to the start, if the reward is flat (next row)",
        "our choice: in 28 of 32 runs of SmolLM2 that learned, it was from 0.17 to 0.43",
        "The policy became certain, and the reward has not risen since. It may have risen in the first logs, which "
        "scatter hides.",
        "Evaluate the model before and after: it may have learned. To explore for longer, lower `learning_rate`, or "
        "raise `epsilon_high`, `positive_low_scale`, `scale_decay_steps` or `temperature`.",
        _settled,
        ("reward flat",),
    ),
    Rule(
        "reward flat",
        FLAT_LOGS,
        "logs whose reward has neither a trend nor a rise beyond three standard errors",
        "325 of 340 runs of a small model had one within 25 logs",
        "Rewards differ within groups, and the reward does not rise all the same.",
        "Raise `learning_rate`; lower `beta`; raise `max_grad_norm`; check that rewards depend on something that the "
        "model can learn, and read some completions (`log_completions=True`).",
        _flat,
    ),
)


def _since(points: Points, holds: Callable[[float], bool], width: int = FEWEST_LOGS) -> int:
    """
    The first step of the stretch, up to the last log, in which the moving mean holds; 0 if nothing is known.
    """
    if not points:
        return 0  # another metric shows it, and this one was not logged
    since = (last_quarter(points) or points)[0][0]  # its mean is the evidence, whatever the last logs are
    for last in range(len(points), 0, -1):
        window = points[max(0, last - width) : last]
        if not holds(mean_value(window)):
            break
        since = min(since, window[0][0])
    return since


def _since_above(log: Log, name: str, bound: float) -> int:
    return _since(log.known(name), lambda value: value >= bound)


def _n(value: float) -> str:
    return f"{value:.3g}"


def _p(share: float) -> str:
    return f"{100 * share:.0f} %"
