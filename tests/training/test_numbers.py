"""Whole training steps with what can go wrong in numbers: finite parameters at the end, or an error that names why."""

import functools
import multiprocessing
import os
import random
import re
import socket
from collections import Counter
from concurrent.futures import ProcessPoolExecutor

import numpy as np
import pytest
import torch
import trl
from accelerate import PartialState
from datasets import Dataset
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from packaging.version import Version
from support import tiny
from support.training import assert_same_parameters, moved, train
from tokenizers import Regex, Tokenizer, models, pre_tokenizers
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    GPT2Config,
    GPT2LMHeadModel,
    PreTrainedTokenizerFast,
)

from trl_a3po.training.input_checks import LARGEST_REWARD, check_rewards
from trl_a3po.training.polarity_metrics import polarity_metrics, polarity_sums


INF, NAN = float("inf"), float("nan")

pytestmark = pytest.mark.filterwarnings("ignore:You are using 'rollout_func':UserWarning")


train_two_steps = functools.partial(train, max_steps=2)


def rewards_in_turn(*values):
    """A reward function that gives the values one after the other."""

    def reward(completions, **kwargs):
        return [values[i % len(values)] for i in range(len(completions))]

    return reward


def assert_finite(trainer):
    assert all(parameter.isfinite().all() for parameter in tiny.parameters(trainer).values())


# Rewards


@pytest.fixture(scope="module")
def trained_on_floats(tmp_path_factory):
    trainer = train_two_steps(tmp_path_factory.mktemp("floats"), reward_funcs=rewards_in_turn(1.0, 0.0, 0.0))
    assert moved(trainer)
    return trainer


@pytest.mark.parametrize("scalar", [int, bool, np.float32, np.float64, np.int64, np.bool_, torch.tensor])
def test_rewards_may_be_any_scalar(scalar, trained_on_floats, tmp_path):
    trainer = train_two_steps(tmp_path, reward_funcs=rewards_in_turn(*map(scalar, (1, 0, 0))))
    assert_same_parameters(trainer, trained_on_floats)


@pytest.mark.parametrize("others", [(), (0.0, 1.0, 0.0)], ids=["all", "some"])
def test_a_reward_of_nan_is_none(others, tmp_path):
    """So TRL has it: a completion to which the reward function does not apply."""
    none, *runs = (
        train_two_steps(tmp_path, reward_funcs=rewards_in_turn(value, *others))
        for value in (None, NAN, np.float32(NAN), torch.tensor(NAN))
    )
    assert bool(moved(none)) == bool(others)
    for run in runs:
        assert_same_parameters(run, none)


@pytest.mark.parametrize("fields", [{}, {"scale_rewards": "batch"}, {"scale_rewards": "none"}], ids=str)
@pytest.mark.parametrize("values", [(1e-30, 0.0), (-LARGEST_REWARD,), (LARGEST_REWARD, None, 1e-30)], ids=str)
def test_rewards_of_any_size_that_is_left_train(values, fields, tmp_path):
    assert_finite(train_two_steps(tmp_path, reward_funcs=rewards_in_turn(*values), **fields))


def refused(reward_funcs, output_dir, **kwargs):
    """The error of a run, in which no parameter has moved."""
    model = tiny.model()
    with pytest.raises(ValueError, match="reward function") as error:
        train_two_steps(output_dir, model=lambda: model, reward_funcs=reward_funcs, **kwargs)
    start = dict(tiny.model().named_parameters())
    assert all(torch.equal(start[name], value.cpu()) for name, value in model.named_parameters())
    return str(error.value)


@pytest.mark.parametrize("value", [INF, -INF, 1e300, 3e38, -1e30, np.float32(INF), torch.tensor(-INF)], ids=repr)
def test_a_reward_too_large_to_learn_from_is_refused(value, tmp_path):
    # The values are given in turn to the four completions of each of two prompts.
    message = refused(rewards_in_turn(0.0, 1.0, 0.0, 1.0, 0.0, 1.0, value, 0.0), tmp_path, shuffle_dataset=False)
    with np.errstate(over="ignore"):
        shown = f"{np.float32(value):g}"
    assert message == (
        f"The reward function 'reward' gave {shown}, weighted 1, to a completion of the prompt '1+7='. Rewards must "
        "be finite, and at most 1e+15 in absolute value: clip them in the function, or return None for completions "
        "that it does not apply to."
    )


async def judge(completions, **kwargs):
    return [INF] * len(completions)


def test_of_several_reward_functions_the_one_at_fault_is_named(tmp_path):
    message = refused([tiny.parity_reward, judge, tiny.sometimes_none_reward], tmp_path)
    assert message.startswith("The reward function 'judge' gave inf")


def test_a_reward_model_is_named(tmp_path):
    size = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1, "intermediate_size": 8}
    model = BertForSequenceClassification(BertConfig(vocab_size=len(tiny.tokenizer()), num_labels=1, **size))
    torch.nn.init.constant_(model.classifier.bias, INF)
    model.config._name_or_path = "somebody/judge"
    arguments = {"reward_processing_classes": tiny.tokenizer()}
    assert "'judge' gave inf" in refused(model, tmp_path, arguments=arguments)


def test_rewards_count_as_they_are_weighted(tmp_path):
    huge = rewards_in_turn(1e25, 0.0)
    assert "gave 1e+25, weighted 1e-05" in refused(huge, tmp_path, reward_weights=[1e-5])
    assert moved(train_two_steps(tmp_path, reward_funcs=huge, reward_weights=[1e-25]))
    # One that is only looked at.
    looked_at = [tiny.parity_reward, rewards_in_turn(INF)]
    assert_same_parameters(
        train_two_steps(tmp_path, reward_funcs=looked_at, reward_weights=[1.0, 0.0]),
        train_two_steps(tmp_path, reward_funcs=tiny.parity_reward),
    )


@settings(max_examples=500, deadline=None)
@given(
    rewards=arrays("float32", st.tuples(st.integers(1, 6), st.integers(1, 3)), elements=st.floats(width=32)),
    weights=arrays("float32", 3, elements=st.floats(width=32)),
)
def test_what_is_refused(rewards, weights):
    with np.errstate(over="ignore", invalid="ignore"):
        bad = np.argwhere(np.abs(rewards * weights[: rewards.shape[1]]) > np.float32(LARGEST_REWARD)).tolist()
    names, prompts = [f"function {i}" for i in range(3)], [f"prompt {i}" for i in range(6)]
    arguments = torch.from_numpy(rewards), torch.from_numpy(weights)[: rewards.shape[1]], names, prompts
    if not bad:
        check_rewards(*arguments)
        return
    row, column = bad[0]
    with pytest.raises(ValueError, match=re.escape(f"'function {column}' gave ") + f".* the prompt 'prompt {row}'"):
        check_rewards(*arguments)


def message_on(rank, port):
    """What one of two processes says to rewards of which the infinite one belongs to the second."""
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="2")
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    PartialState(cpu=True)
    prompts = [f"prompt {2 * rank + i}" for i in range(2)]
    try:
        check_rewards(torch.tensor([[0.0], [1.0], [0.0], [INF]]), torch.ones(1), ["reward"], prompts)
    except ValueError as error:
        return str(error)


@pytest.mark.slow
def test_two_processes_refuse_together():
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    with ProcessPoolExecutor(2, multiprocessing.get_context("spawn")) as pool:
        first, second = pool.map(message_on, range(2), [port] * 2)
    assert first == second
    assert "gave inf, weighted 1, to a completion of the prompt 'prompt 3'" in first


# Probabilities


def certain():
    """A model that gives one token the probability 1, and with it the log-probability 0."""
    model = tiny.model()
    with torch.no_grad():
        model.lm_head.weight.mul_(1e6)
    return model


def partly_dead():
    """A model that gives some tokens no probability at all."""
    model = tiny.model()
    dead = torch.zeros(model.config.vocab_size)
    dead[LIVE:] = -INF
    model.lm_head.register_forward_hook(lambda module, inputs, logits: logits + dead.to(logits))
    return model


LIVE = 40  # the first tokens of the vocabulary


@pytest.mark.parametrize("token_metric", ["prob", "entropy"])
@pytest.mark.parametrize("model", [certain, partly_dead])
def test_a_model_samples_what_it_then_learns_from(model, token_metric, tmp_path):
    fields = {"token_metric": token_metric, "max_steps": 3}
    trainer = train_two_steps(tmp_path, model=model, reward_funcs=rewards_in_turn(1.0, 0.0, 0.0), **fields)
    assert_finite(trainer)
    assert bool(moved(trainer)) == (model is not certain)  # what is certain has no gradient


class TwoTokens:
    """A vocabulary of a letter and the end."""

    @staticmethod
    def tokenizer():
        backend = Tokenizer(models.WordLevel({"<eos>": 0, "a": 1}, unk_token="a"))
        backend.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
        return PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="<eos>", eos_token="<eos>")

    @staticmethod
    def model():
        return tiny.model(vocab_size=2, eos_token_id=0)


@pytest.mark.parametrize("loss_type", tiny.LOSS_TYPES)
def test_a_vocabulary_of_two(loss_type, tmp_path):
    trainer = train_two_steps(
        tmp_path,
        model=TwoTokens.model,
        reward_funcs=lambda completion_ids, **kwargs: [float(len(ids) % 2) for ids in completion_ids],
        arguments={"processing_class": TwoTokens.tokenizer()},
        loss_type=loss_type,
    )
    assert_finite(trainer)
    assert moved(trainer)


def test_a_completion_without_tokens_is_told_by_its_prompt(tmp_path):
    def rollout(prompts, trainer):
        ids = [[5, 6] if i != 3 else [] for i in range(len(prompts))]
        return {"prompt_ids": [[7]] * len(ids), "completion_ids": ids, "logprobs": [[0.0] * len(each) for each in ids]}

    with pytest.raises(ValueError, match=r"without tokens for the prompt '\d+\+\d='\. Return at least one token"):
        train_two_steps(tmp_path, arguments={"rollout_func": rollout})


def test_prompts_longer_than_the_positions_that_a_model_looks_up_are_refused(tmp_path):
    size = {"n_embd": 32, "n_layer": 1, "n_head": 2, "n_positions": 24, "vocab_size": len(tiny.tokenizer())}

    def gpt2():
        return GPT2LMHeadModel(GPT2Config(**size, eos_token_id=1, bos_token_id=1, pad_token_id=0))

    def train_on(*prompts):
        return train_two_steps(
            tmp_path, model=gpt2, arguments={"train_dataset": Dataset.from_dict({"prompt": prompts})}
        )

    assert_finite(train_on("1+" * 8, "2+2="))
    with pytest.raises(
        ValueError, match=r"A prompt of 18 tokens and `max_completion_length=8` need more than the 24 .*1"
    ):
        train_on("1+" * 9, "2+2=")

    with pytest.raises(
        ValueError, match=r"of 15 tokens and `max_completion_length=8`, padded to multiples of 16, need"
    ):
        train_two_steps(
            tmp_path,
            model=gpt2,
            arguments={"train_dataset": Dataset.from_dict({"prompt": ["1+" * 7 + "1", "2+2="]})},
            pad_to_multiple_of=16,
        )


@pytest.mark.parametrize("name", ["prompt_ids", "completion_ids"])
def test_tokens_of_a_rollout_function_that_the_model_does_not_have_are_refused(name, tmp_path):
    def rollout(prompts, trainer):
        ids = {key: [[5, 6]] * len(prompts) for key in ("prompt_ids", "completion_ids")}
        ids[name] = [[5, 1000], *ids[name][1:]]
        return {**ids, "logprobs": [[0.0] * len(each) for each in ids["completion_ids"]]}

    with pytest.raises(ValueError, match=rf"an item of the `{name}` that `rollout_func` returned has token 1000"):
        train_two_steps(tmp_path, arguments={"rollout_func": rollout})


def test_a_padding_token_that_the_model_does_not_have_is_refused(tmp_path):
    tokenizer = tiny.tokenizer()
    tokenizer.add_special_tokens({"pad_token": "[PAD]"})
    with pytest.raises(ValueError, match=r"its padding has token \d+, .*resize_token_embeddings"):
        train_two_steps(tmp_path, arguments={"processing_class": tokenizer})


def test_prompts_longer_than_the_context(tmp_path):
    context = tiny.model().config.max_position_embeddings
    dataset = Dataset.from_dict({"prompt": ["1+" * context, "2+2="]})
    trainer = train_two_steps(tmp_path, arguments={"train_dataset": dataset})
    assert_finite(trainer)
    assert moved(trainer)


# Rollouts that the test makes up


def rollout(length, counts):
    """Completions of random tokens. `length` gives that of each from its number; `counts` tells which tokens count."""

    def generate(prompts, trainer):
        rng = random.Random(trainer.state.global_step)
        prompt_ids = [trainer.processing_class(prompt)["input_ids"] for prompt in prompts]
        completion_ids = [[rng.randrange(3, LIVE) for _ in range(length(i))] for i in range(len(prompts))]
        return {
            "prompt_ids": prompt_ids,
            "completion_ids": completion_ids,
            "logprobs": [[-1.0] * len(ids) for ids in completion_ids],
            "env_mask": [[int(counts(i, t)) for t in range(len(ids))] for i, ids in enumerate(completion_ids)],
        }

    return generate


LONGEST = 8


@pytest.mark.parametrize("logging_steps", [1, 10])
@pytest.mark.parametrize("level", ["token", "sequence"])
def test_a_gradient_of_nan_ends_the_training(level, logging_steps, tmp_path):
    """The policy, who had all but excluded the tokens of the rollout, moves too far for the ratio to be a number."""
    arguments = {"rollout_func": rollout(length=lambda i: LONGEST, counts=lambda i, t: True)}
    fields = {"num_iterations": 2, "importance_sampling_level": level, "loss_type": "grpo"}
    fields["logging_steps"] = logging_steps  # if this log comes late, before the next rollout
    with pytest.raises(FloatingPointError, match=r"^The gradient of step 2 is NaN: parameters are NaN or infinite"):
        train_two_steps(tmp_path, model=certain, arguments=arguments, max_steps=4, **fields)


# Everything at once


REWARDS = {
    "binary": (1.0, 0.0, 0.0),
    "equal": (1.0,),
    "integers": (3, 1, 2),
    "sometimes None": (1.0, None, 0.0),
    "None": (None,),
    "sometimes NaN": (1.0, NAN, 0.0),
    "tiny": (1e-30, 0.0, 0.0),
    "largest": (LARGEST_REWARD, 0.0, -LARGEST_REWARD),
    "infinite": (1.0, INF, 0.0),
}
MODELS = {"plain": tiny.model, "partly dead": partly_dead}
LENGTHS = {
    "one": lambda i: 1,
    "the longest": lambda i: LONGEST,
    "mixed": lambda i: 1 + 5 * i % LONGEST,
}
COUNTS = {
    "all": lambda i, t: True,
    "every other token": lambda i, t: t % 2 == 0,
    "every other completion": lambda i, t: i % 2 == 0,
}
if Version(trl.__version__) >= Version("1.9.0"):
    # Before, TRL divided by the number of tokens that count.
    COUNTS["none"] = lambda i, t: False
PRECISIONS = {
    "fp32": (torch.float32, {}),
    "mixed bf16": (torch.float32, {"bf16": True}),
    "mixed fp16": (torch.float32, {"fp16": True}),
    "bf16": (torch.bfloat16, {}),
    "fp16": (torch.float16, {}),
}
AXES = {
    "loss_type": tiny.LOSS_TYPES,
    "reward": list(REWARDS),
    "length": list(LENGTHS),
    "counts": list(COUNTS),
    "precision": list(PRECISIONS),
    "model": list(MODELS),
    "num_generations": [2, 4, 64],
    "mask_truncated_completions": [False, True],
    "trim_padding": [False, True],
    "skip_zero_advantage": [False, True],
    "importance_sampling_level": ["token", "sequence"],
    "num_iterations": [1, 2],
}
NUM_CASES = 64


def combinations(axes, count):
    """As many as asked for, in which each value of an axis comes as often as any other."""
    rng = random.Random(0)
    columns = []
    for values in axes.values():
        column = [values[i % len(values)] for i in range(count)]
        rng.shuffle(column)
        columns.append(column)
    return [dict(zip(axes, row, strict=True)) for row in zip(*columns, strict=True)]


CASES = combinations(AXES, NUM_CASES)


def test_every_value_is_in_several_cases():
    assert len(CASES) == NUM_CASES
    for name, values in AXES.items():
        times = Counter(case[name] for case in CASES)
        assert set(times) == set(values)
        assert min(times.values()) >= NUM_CASES // len(values)


@pytest.mark.parametrize("case", CASES, ids=lambda case: ", ".join(map(str, case.values())))
def test_everything_at_once(case, tmp_path):
    fields = dict(case)
    reward = fields.pop("reward")
    generate = rollout(LENGTHS[fields.pop("length")], COUNTS[fields.pop("counts")])
    dtype, precision = PRECISIONS[fields.pop("precision")]
    model = MODELS[fields.pop("model")]().to(dtype)
    run = {
        "model": lambda: model,
        "reward_funcs": rewards_in_turn(*REWARDS[reward]),
        "arguments": {"rollout_func": generate},
        "max_completion_length": LONGEST,
        "per_device_train_batch_size": max(8, case["num_generations"]),
        **precision,
        **fields,
    }
    if reward == "infinite":
        with pytest.raises(ValueError, match="The reward function 'reward' gave inf"):
            train_two_steps(tmp_path, **run)
    else:
        train_two_steps(tmp_path, **run)
    assert all(parameter.isfinite().all() for parameter in model.parameters())


# The diagnostics


@st.composite
def measured_batches(draw):
    """Arguments of `polarity_sums`, with what a broken model, or one that is certain, gives."""
    shape = draw(st.integers(1, 5)), draw(st.integers(0, 6))
    numbers = st.sampled_from([-INF, -3.0, -0.5, 0.0, 1.5, INF, NAN])
    advantages = draw(arrays("float32", shape[0], elements=st.sampled_from([-1.5, -0.0, 0.0, 0.5, 2.0])))
    shaped = draw(arrays("float32", shape, elements=st.sampled_from([-3.0, -1.5, 0.0, 0.5, 2.0, 4.0])))
    logps, entropies = (draw(arrays("float32", shape, elements=numbers)) for _ in range(2))
    mask = draw(arrays("int64", shape, elements=st.integers(0, 1)))
    batch = tuple(map(torch.from_numpy, (advantages, advantages, shaped, logps, entropies, mask)))
    sampling_logps = draw(st.none() | arrays("float32", shape, elements=st.sampled_from([-3.0, -0.5, NAN])))
    return *batch, None if sampling_logps is None else torch.from_numpy(sampling_logps)


def sums_by_hand(advantages, unselected, shaped, logps, entropies, mask, sampling_logps):
    sums = torch.zeros(3, 8)
    for i, advantage in enumerate(advantages.tolist()):
        row = sums[0 if advantage > 0 else 1 if advantage < 0 else 2]
        row[0] += 1
        for t in mask[i].nonzero()[:, 0]:
            selected = shaped[i, t] != unselected[i]
            prob = logps[i, t].exp()
            row += torch.tensor(
                [0, 1, entropies[i, t], selected, prob if selected else 0, prob, shaped[i, t].abs(), 0]
            )
            if selected and sampling_logps is None:
                row[7] = NAN
            elif selected:
                known = logps[i, t] if sampling_logps[i, t].isnan() else sampling_logps[i, t]
                row[7] += (logps[i, t] - known).abs()
    return sums


@settings(max_examples=500, deadline=None)
@given(measured_batches())
def test_sums_are_those_of_the_definition(batch):
    sums = polarity_sums(*batch)
    torch.testing.assert_close(sums, sums_by_hand(*batch), equal_nan=True)
    metrics = polarity_metrics(sums)
    assert not any(np.isnan(value) for value in metrics.values())
    assert sum(metrics[f"{polarity}/fraction"] for polarity in ("positive", "negative", "zero")) == pytest.approx(1)


def test_rounding_selects_no_token():
    advantages = torch.tensor([1.0, -2.0])
    factors = torch.tensor([[1.0 + 2e-7, 1.0, 1.01], [1.0 - 2e-7, 0.5, 1.0]])
    ones = torch.ones_like(factors)
    sums = polarity_sums(advantages, advantages, advantages[:, None] * factors, -ones, ones, ones)
    metrics = polarity_metrics(sums)
    assert metrics["positive/selected_fraction"] == metrics["negative/selected_fraction"] == pytest.approx(1 / 3)
