"""Runs that cannot learn, each for a reason that is planted: the finding names it, and nothing else."""

import logging

import pytest
from support import tiny
from support.training import train
from trl import GRPOTrainer
from trl.rewards import accuracy_reward

from trl_a3po import A3POTrainer
from trl_a3po.report.findings import find


pytest.importorskip("math_verify")

STEPS = 4  # each is logged
# The tiny model rarely ends a completion. Where that is not the fault, its end is made likely.
ENDS, NEVER_ENDS = {"sequence_bias": [[[1], 4.0]]}, {"suppress_tokens": [1]}


def nothing(completions, **kwargs):
    return [0.0] * len(completions)


def of_the_prompt(prompts, **kwargs):
    return [len(prompt) % 7 / 8 + 0.1 for prompt in prompts]


def none(completions, **kwargs):
    return [None] * len(completions)


def every_other(completions, **kwargs):
    return [float(row % 2) for row in range(len(completions))]


def by_length(completion_ids, **kwargs):
    return [0.1 + len(ids) / 100 for ids in completion_ids]


def share_of_digits(completions, **kwargs):
    """A reward that does not grow with the length."""
    return [sum(map(str.isdigit, text)) / max(1, len(text)) for text in completions]


def always_the_same(completion_ids, **kwargs):
    return [0.3] * len(completion_ids)


class NoGradient(A3POTrainer):
    def shape_advantages(self, advantages, **batch):
        return super().shape_advantages(advantages, **batch) * 0.0


def frozen():
    """Only the embedding of a token that never occurs can change: its gradient is 0."""
    model = tiny.model()
    for name, parameter in model.named_parameters():
        parameter.requires_grad = name == "model.embed_tokens.weight"
    model.model.embed_tokens.weight.register_hook(lambda gradient: gradient * 0)
    return model


def unparsable():
    """Conversations, as math-verify's reward takes them, with solutions that it cannot read."""
    rows = tiny.prompts(conversational=True)
    return rows.remove_columns("solution").add_column("solution", ["the other one"] * len(rows))


# The finding, the options of the run, and whether the metrics of TRL show it.
FAULTS = {
    "all wrong": ("no signal: all wrong", {"reward_funcs": nothing}, True),
    "all right": ("no signal: all right", {"reward_funcs": tiny.equal_reward}, True),
    "by prompt": ("no signal: same reward within groups", {"reward_funcs": of_the_prompt}, True),
    "constant, not 1": ("no signal: same reward within groups", {"reward_funcs": always_the_same}, True),
    "None": ("completions that no reward function scores", {"reward_funcs": none}, True),
    "unparsable": (
        "solutions that cannot be parsed",
        {"reward_funcs": accuracy_reward, "arguments": {"train_dataset": unparsable()}},
        False,
    ),
    "schedule": ("learning rate at 0", {"learning_rate": 0.0, "reward_funcs": every_other}, True),
    "tiny rate": ("learning rate tiny", {"learning_rate": 1e-12, "reward_funcs": every_other}, True),
    "warm-up": (
        "warm-up longer than the run",
        {"lr_scheduler_type": "constant_with_warmup", "warmup_steps": 1000, "reward_funcs": every_other},
        True,
    ),
    "frozen": ("gradient of 0", {"model": frozen, "reward_funcs": every_other}, True),
    "own shaping": ("no signal: weight 0", {"trainer_class": NoGradient, "reward_funcs": every_other}, False),
    "cut": ("most completions truncated", {"reward_funcs": nothing, "generation_kwargs": NEVER_ENDS}, True),
    "masked": (
        "most completions truncated",
        {"mask_truncated_completions": True, "generation_kwargs": NEVER_ENDS},
        False,
    ),
    "low temperature": (
        "no signal: same reward within groups",
        {"temperature": 1e-4, "reward_funcs": by_length},
        True,
    ),
    "constant scales": ("scales never decay", {"scale_decay": "constant", "reward_funcs": tiny.digit_reward}, False),
}


def log_of(output_dir, fault, trainer_class=A3POTrainer):
    _, options, _ = FAULTS[fault]
    defaults = {"trainer_class": trainer_class, "max_steps": STEPS, "generation_kwargs": ENDS}
    options = {**defaults, **options}
    return train(output_dir, **options).state.log_history


@pytest.fixture(scope="module", params=FAULTS)
def faulty(request, tmp_path_factory):
    handler = _Messages()
    logging.getLogger("trl_a3po").addHandler(handler)
    try:
        return request.param, log_of(tmp_path_factory.mktemp("run"), request.param), handler.messages
    finally:
        logging.getLogger("trl_a3po").removeHandler(handler)


class _Messages(logging.Handler):
    def __init__(self):
        super().__init__()
        self.messages = []

    def emit(self, record):
        self.messages.append(record.getMessage())


def names(log_history):
    return [finding.name for finding in find(log_history)]


def test_the_finding_and_no_other(faulty):
    fault, log_history, _ = faulty
    assert names(log_history) == [FAULTS[fault][0]]


def test_the_first_log_without_a_signal_warns_once(faulty):
    _, log_history, messages = faulty
    lacks = [entry["step"] for entry in log_history[:-1] if entry["signal/completions/signal"] == 0]
    warnings = [message for message in messages if "learning signal" in message]
    assert len(warnings) == bool(lacks)
    assert all(f"at step {lacks[0]}:" in warning for warning in warnings)


def test_the_metrics_of_trl_are_enough(faulty):
    fault, log_history, _ = faulty
    finding, _, by_trl = FAULTS[fault]
    if by_trl:
        of_trl = [{n: v for n, v in e.items() if not n.startswith(("a3po/", "signal/"))} for e in log_history]
        assert names(of_trl) == [finding]


@pytest.mark.parametrize("fault", ["all wrong", "None"])
def test_a_run_of_grpo(fault, tmp_path):
    assert names(log_of(tmp_path, fault, GRPOTrainer)) == [FAULTS[fault][0]]


@pytest.mark.parametrize("trainer_class", [A3POTrainer, GRPOTrainer])
def test_a_healthy_run_has_none(trainer_class, tmp_path):
    trainer = train(tmp_path, trainer_class, reward_funcs=share_of_digits, max_steps=15, generation_kwargs=ENDS)
    rewards = [entry["reward"] for entry in trainer.state.log_history[:-1]]
    assert sum(rewards[-5:]) > sum(rewards[:5])
    assert names(trainer.state.log_history) == []
