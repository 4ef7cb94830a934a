"""Sampling by transformers: exact, of its own random numbers for each sample, and by nothing but what is said."""

import copy
import json
from collections import Counter

import pytest
import torch
from support import tiny
from support.generation import INHERITED
from transformers import (
    AutoModelForCausalLM,
    GenerationConfig,
    GPT2Config,
    GPT2LMHeadModel,
)

from trl_a3po.evaluation.samplers import DrawOneToken, RefuseNonFinite, Request, Sampling, seed_of, transformers_engine


PROMPTS = [[3, 4, 5], [6, 7, 8, 9, 10, 11], [12]]


@pytest.fixture(scope="module")
def model(model_dir):
    return AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32)


def sampling(**fields):
    return Sampling(**{"temperature": 1.0, "top_p": 1.0, "top_k": 0, "end_ids": (1,), **fields})


def requests(seed=0, samples=8, prompts=PROMPTS, tokens=12):
    return [
        Request(prompt, tokens, seed_of(seed, str(prompt), 0, index)) for prompt in prompts for index in range(samples)
    ]


@pytest.mark.parametrize("fields", [{}, {"temperature": 1.5, "top_p": 0.7}, {"temperature": 2, "top_k": 5}])
def test_tokens_have_the_probabilities_of_the_model(fields, model):
    """A test of goodness of fit on the first token of many samples."""
    number = 4000
    engine = transformers_engine(model, sampling(**fields))
    drawn = engine([Request(PROMPTS[0], 1, seed_of(0, "", 0, index)) for index in range(number)])
    counts = Counter(ids[0] for ids in drawn)
    with torch.no_grad():
        logits = model(torch.tensor([PROMPTS[0]])).logits[0, -1] / fields.get("temperature", 1.0)
    ranked = logits.softmax(-1).sort(descending=True)
    before = ranked.values.cumsum(-1) - ranked.values
    kept = (before < fields.get("top_p", 1.0)) & (torch.arange(len(logits)) < fields.get("top_k", len(logits)))
    tokens, probabilities = ranked.indices[kept], ranked.values[kept] / ranked.values[kept].sum()
    assert set(counts) <= set(tokens.tolist())
    expected = number * probabilities
    common = expected >= 5
    chi2 = sum(
        (counts[token] - mean) ** 2 / mean
        for token, mean in zip(tokens[common].tolist(), expected[common].tolist(), strict=True)
    )
    degrees = int(common.sum())
    assert degrees > 3
    assert chi2 < degrees + 4 * (2 * degrees) ** 0.5


def test_the_rarest_tokens_of_a_large_vocabulary_are_drawn():
    scores = torch.zeros(1, 200_000)
    for draw, token in [(0.0, 0), (0.5, 100_000), (1 - 2**-53, 199_999)]:
        left = DrawOneToken(torch.tensor([[draw]], dtype=torch.float64), 3)(torch.zeros(1, 3), scores)
        assert left.argmax() == pytest.approx(token, abs=1)
        assert left.isfinite().sum() == 1


def test_a_token_without_probability_is_never_drawn():
    scores = torch.tensor([[-torch.inf, 0.0, -torch.inf, 0.0, -torch.inf]])
    for draw in (0.0, 0.25, 0.5, 0.75, 1 - 2**-53):
        left = DrawOneToken(torch.tensor([[draw]], dtype=torch.float64), 3)(torch.zeros(1, 3), scores)
        assert left.argmax() == (1 if draw < 0.5 else 3)


def test_each_module_keeps_its_mode(model):
    model = copy.deepcopy(model).train()
    model.model.layers[0].eval()
    modes = [module.training for module in model.modules()]
    transformers_engine(model, sampling())(requests())
    assert [module.training for module in model.modules()] == modes


def test_a_sample_depends_neither_on_its_batch_nor_on_the_order(model):
    engine = transformers_engine(model, sampling(top_p=0.95))
    every = requests()
    together = engine(every)
    assert engine(every[::-1])[::-1] == together
    assert [engine([request])[0] for request in every] == together
    assert [ids for start in range(0, len(every), 5) for ids in engine(every[start : start + 5])] == together


def test_no_two_samples_share_their_random_numbers(model):
    """Long samples of one prompt are different for all seeds, rows and indices, and the same when drawn again."""
    engine = transformers_engine(model, sampling(end_ids=()))
    keys = [(seed, row, index) for seed in (0, 1, 2) for row in range(8) for index in range(8)]
    drawn = [
        tuple(ids)
        for ids in engine([Request(PROMPTS[0], 16, seed_of(seed, "p", row, index)) for seed, row, index in keys])
    ]
    assert len(set(drawn)) == len(keys)
    again = engine([Request(PROMPTS[0], 16, seed_of(*key[:1], "p", *key[1:])) for key in keys[:5]])
    assert [tuple(ids) for ids in again] == drawn[:5]
    assert len({seed_of(*key[:1], problem, *key[1:]) for key in keys for problem in "pq"}) == 2 * len(keys)


@pytest.mark.parametrize("greedy", [True, False], ids=["greedy", "sampled"])
def test_nothing_is_inherited_from_the_generation_config(greedy, model, model_dir, tmp_path):
    how = sampling(temperature=0.0 if greedy else 1.0)
    every = requests(samples=1 if greedy else 4)
    expected = transformers_engine(model, how)(every)
    tiny.save(tmp_path)
    (tmp_path / "generation_config.json").write_text(json.dumps(INHERITED))
    inheriting = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    assert transformers_engine(inheriting, how)(every) == expected
    for name, value in INHERITED.items():
        inheriting.generation_config = GenerationConfig(**{"do_sample": True, name: value})
        assert transformers_engine(inheriting, how)(every) == expected, name


def test_the_model_is_given_back_as_it_was(model_dir):
    model = AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32)
    model.generation_config = config = GenerationConfig(repetition_penalty=1.1)
    model.train()
    state = torch.random.get_rng_state()
    transformers_engine(model, sampling())(requests(samples=1))
    assert model.training
    assert model.generation_config is config
    assert config.repetition_penalty == 1.1
    assert torch.equal(state, torch.random.get_rng_state())


def test_a_completion_ends_at_the_first_of_its_end_tokens(model):
    endless = transformers_engine(model, sampling(end_ids=()))(requests(tokens=20))
    assert all(len(ids) == 20 for ids in endless)
    ends = (5, 9, 14)
    for ids, whole in zip(
        transformers_engine(model, sampling(end_ids=ends))(requests(tokens=20)), endless, strict=True
    ):
        stop = next((position for position, token in enumerate(whole) if token in ends), 19)
        assert ids == whole[: stop + 1]


def test_suppressed_tokens_are_not_sampled(model):
    free = {token for ids in transformers_engine(model, sampling())(requests()) for token in ids}
    suppressed = tuple(free - {1})[:5]
    engine = transformers_engine(model, sampling(suppressed_ids=suppressed))
    assert free & set(suppressed)
    assert not {token for ids in engine(requests()) for token in ids} & set(suppressed)


def test_positions_that_are_looked_up_go_up_to_the_last_and_are_not_shifted():
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=50, n_positions=16, n_embd=16, n_layer=1, n_head=2, eos_token_id=1, bos_token_id=1)
    model = GPT2LMHeadModel(config)
    engine = transformers_engine(model, sampling(end_ids=()))
    lengths = [3, 9, 15]
    every = [Request([*range(2, 2 + length)], min(8, 16 - length), 7) for length in lengths]
    together = engine(every)
    assert [len(ids) for ids in together] == [8, 7, 1]
    assert together == [engine([request])[0] for request in every]


@pytest.mark.parametrize("value", [torch.nan, torch.inf], ids=["nan", "infinity"])
def test_a_model_that_computes_no_finite_logits_is_refused(value, model_dir):
    model = AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32)
    with torch.no_grad():
        model.model.norm.weight[0] = value
    for temperature in (0.0, 1.0):
        with pytest.raises(ValueError, match="logits are NaN or infinite"):
            transformers_engine(model, sampling(temperature=temperature))(requests(samples=1))


def test_logits_that_overflow_by_the_temperature_are_refused(model):
    with pytest.raises(ValueError, match="logits are NaN or infinite"):
        transformers_engine(model, sampling(temperature=1e-39))(requests(samples=1))


def test_some_tokens_may_have_no_probability_but_not_all():
    check, ids = RefuseNonFinite(), torch.zeros(1, 3)
    some = torch.tensor([[0.0, -torch.inf], [-torch.inf, -1e30]])
    assert check(ids, some) is some
    for row in ([-torch.inf, -torch.inf], [torch.inf, 0.0], [torch.nan, 0.0]):
        with pytest.raises(ValueError, match="logits are NaN or infinite"):
            check(ids, torch.tensor([[0.0, 0.0], row]))
