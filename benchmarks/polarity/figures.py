"""The figures that `analyse.py` draws, if there is matplotlib."""

import statistics
from pathlib import Path

import matplotlib


matplotlib.use("Agg")

from matplotlib import pyplot
from results import Result, Results, pass_rate


# The methods of each figure.
FIGURES = {
    "polarities": ["dapo", "psr", "nsr", "p2n1", "p1n2"],
    "ends": ["dapo", "positive_low", "positive_high", "negative_low", "negative_high"],
    "a3po": ["dapo", "a3po", "a3po_constant", "reversed", "random"],
    "peers": ["grpo", "dapo", "dapo_fork", "w_reinforce", "a3po", "clip_cov", "steer", "ar"],
    "more_peers": ["dapo", "a3po", "stare", "fipo", "entropy_advantage", "aspo", "gtpo", "position_bonus", "aepo"],
}


def draw(results: Results, directory: Path) -> list[str]:
    """
    Draws one row of panels per figure: entropy, held-out pass@1 and pass@k. Skips figures with fewer than two methods
    that were run.

    Returns:
        The names of the files.
    """
    pyplot.rcParams.update({"font.size": 8, "svg.fonttype": "none", "svg.hashsalt": "trl-a3po"})
    names = []
    for name, methods in FIGURES.items():
        run_methods = [method for method in methods if method in results]
        if len(run_methods) < 2:
            continue
        figure, (entropy, accuracy, reach) = pyplot.subplots(1, 3, figsize=(10, 2.8), layout="constrained")
        for method in run_methods:
            runs = list(results[method].values())
            band(entropy, method, [(run["curves"]["step"], run["curves"]["entropy"]) for run in runs])
            band(accuracy, method, [(run["held_out_curve"]["step"], run["held_out_curve"]["pass@1"]) for run in runs])
            band(reach, method, [pass_curve(run) for run in runs])
        entropy.set(title="entropy in training", xlabel="optimizer step", ylabel="nats")
        accuracy.set(title="held-out pass@1", xlabel="optimizer step")
        reach.set(title="held-out pass@k at the end", xlabel="k", xscale="log")
        reach.xaxis.set_major_formatter("{x:g}")
        reach.legend(frameon=False)
        path = directory / f"{name}.svg"
        figure.savefig(path, metadata={"Date": None})
        pyplot.close(figure)
        names.append(path.name)
    return names


def pass_curve(result: Result) -> tuple[list[int], list[float]]:
    ks = [2**i for i in range(result["held_out"]["samples"].bit_length())]
    return ks, [pass_rate(result, k) for k in ks]


def band(axes, label: str, curves: list[tuple[list[int], list[float]]]) -> None:
    """The mean over the seeds, within one standard deviation."""
    x = curves[0][0]
    columns = list(zip(*(y for _, y in curves), strict=True))
    means = [statistics.fmean(column) for column in columns]
    spreads = [statistics.stdev(column) if len(column) > 1 else 0.0 for column in columns]
    (line,) = axes.plot(x, means, label=label, linewidth=1.2)
    lows, highs = zip(
        *((mean - spread, mean + spread) for mean, spread in zip(means, spreads, strict=True)), strict=True
    )
    axes.fill_between(x, lows, highs, alpha=0.15, color=line.get_color(), linewidth=0)
