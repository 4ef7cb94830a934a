"""Directories as runs leave them, for the tests of the report."""

import json

from trl_a3po.training.token_log_format import TOKENS_FILE, LoggedCompletion


# What a model may write, and what it would do where it is not treated as text.
HOSTILE = [
    "</script><script>globalThis.broken = 1</script>",
    "<img src=x onerror='globalThis.broken = 2'>",
    "<!--<script>",
    "]]>{{data}}{{policy}}",
    "'\"`${globalThis.broken = 3}",
    "\u202eesrever\u2066",
    "\x00\x07\x1b[31m\x1b]0;title\x07\x7f\x85",
    "\ud800",
    "\u2028\u2029\ufeff\u200b",
    "[red]markup[/red][/]",
    "javascript:globalThis.broken=4",
    "a\u0301" * 40,
    "__proto__",
]


def entry(step, last, **metrics):
    """A log of A3POTrainer."""
    return {
        "step": step,
        "epoch": step / last,
        "reward": step / last,
        "entropy": 1 - step / last / 2,
        "completions/mean_length": 100.0 + step,
        "loss": -0.01,
        "a3po/scale/positive_low": 2 - step / last,
        "a3po/scale/negative_high": 2 - step / last,
        "a3po/positive/fraction": 0.5,
        "a3po/negative/fraction": 0.5,
        "a3po/zero/fraction": 0.0,
        **metrics,
    }


def completion(step, tokens=("4", " is", "\n"), *, positive=True, **values):
    tokens = list(tokens)
    defaults = {
        "prompt": "2+2=",
        "reward": float(positive),
        "advantage": 1.5 if positive else -0.5,
        "length": len(tokens),
        "weights": [2.0] + [1.0] * (len(tokens) - 1),
        "probs": [0.125] + [0.75] * (len(tokens) - 1),
        "entropies": [1.25] + [0.5] * (len(tokens) - 1),
    }
    return LoggedCompletion(step=step, tokens=tokens, **{**defaults, **values})


def write_state(directory, log_history, global_step=10):
    directory.mkdir(parents=True, exist_ok=True)
    state = {"global_step": global_step, "log_history": log_history}
    (directory / "trainer_state.json").write_text(json.dumps(state))


def write_tokens(directory, completions):
    directory.mkdir(parents=True, exist_ok=True)
    (directory / TOKENS_FILE).write_text("".join(each.to_line() for each in completions))


def a3po(directory, steps=10):
    """A run of A3POTrainer, with a completion of either polarity at every step."""
    history = [entry(step, steps, **({"eval_reward": 0.5} if step % 5 == 0 else {})) for step in range(1, steps + 1)]
    write_state(directory, [*history, {"step": steps, "train_runtime": 1.0, "train_loss": 0.0, "late": 1.0}], steps)
    write_tokens(
        directory,
        [completion(step, positive=positive) for step in range(1, steps + 1) for positive in (True, False)],
    )
    return directory


def grpo(directory, steps=10):
    """A run of GRPOTrainer."""
    names = {"step", "epoch", "reward", "entropy", "completions/mean_length", "loss"}
    history = [entry(step, steps) for step in range(1, steps + 1)]
    write_state(directory, [{name: one[name] for name in names} for one in history], steps)
    return directory


def hostile(directory):
    """A run whose every text is hostile: names of metrics, prompts and tokens."""
    write_state(directory, [{"step": step, **dict.fromkeys(HOSTILE, step / 2), "reward": 1.0} for step in (1, 2)])
    everything = "".join(HOSTILE)
    write_tokens(
        directory, [completion(1, HOSTILE, positive=positive, prompt=everything) for positive in (True, False)]
    )
    return directory
