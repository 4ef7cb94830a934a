"""The same update from less computation: what is trimmed and left out, and that it makes no difference."""

import itertools

import pytest
import torch
import transformers
from hypothesis import given
from hypothesis import strategies as st
from packaging.version import Version
from peft import PromptEncoderConfig, PromptTuningConfig
from support import tiny, training
from support.training import SGD, Recorder, gpt2, moved, update_difference
from torch._dynamo.utils import counters
from transformers import (
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen2MoeConfig,
    Qwen2MoeForCausalLM,
    RecurrentGemmaConfig,
    RecurrentGemmaForCausalLM,
)

from trl_a3po import A3POConfig
from trl_a3po.update.efficient_update import has_experts_as_modules, sees_padding
from trl_a3po.update.micro_batches import (
    Extent,
    extent_of,
    plan_micro_batches,
    row_lengths,
    run_extent,
    run_in_order,
    share_out,
)


pytestmark = pytest.mark.filterwarnings("ignore:You are using 'rollout_func':UserWarning")


# The pure functions


def test_row_lengths_reach_to_the_last_token():
    prompt = torch.tensor([[0, 0, 1, 1], [1, 1, 1, 1], [0, 0, 0, 0]])
    completion = torch.tensor([[1, 0, 1, 0], [1, 1, 1, 1], [0, 0, 0, 0]])
    assert row_lengths(prompt, completion) == [(2, 3), (4, 4), (0, 0)]
    assert row_lengths(prompt[:, :0], completion) == [(0, 3), (0, 4), (0, 0)]


def test_extent_is_rounded_up():
    assert extent_of([(2, 3), (4, 1)]) == Extent(2, 4, 3)
    assert extent_of([(2, 3), (4, 1)], multiple=8) == Extent(2, 8, 8)
    assert extent_of([(2, 0)]) == Extent(1, 2, 1)
    assert extent_of([], multiple=8) == Extent(0, 8, 8)


def test_rows_are_planned_live_and_long_first_and_none_is_lost():
    ids = torch.arange(6)
    batches = [
        {"prompt_ids": ids[part, None], "text": [str(i) for i in part], "shared": torch.tensor(7.0), "none": None}
        for part in ([0, 1, 2], [3, 4, 5])
    ]
    lengths = [(1, 5), (1, 9), (1, 2), (1, 7), (1, 1), (1, 8)]
    live = [True, False, True, True, True, False]
    planned, extents = plan_micro_batches(batches, lengths, live)
    assert [batch["text"] for batch in planned] == [["3", "0", "1"], ["2", "4", "5"]]
    assert torch.cat([batch["prompt_ids"][:, 0] for batch in planned]).tolist() == [3, 0, 1, 2, 4, 5]
    assert all(batch["shared"] == 7 and batch["none"] is None for batch in planned)
    assert extents == [Extent(2, 1, 7), Extent(2, 1, 2)]


@given(
    st.lists(st.tuples(st.integers(0, 9), st.integers(0, 30)), max_size=7),
    st.integers(1, 4),
    st.integers(1, 4),
    st.sampled_from([1, 8]),
)
def test_rows_are_shared_out_so_that_the_fewest_positions_are_computed(lengths, batches, size, multiple):
    lengths = lengths[: batches * size]

    def cells(counts):
        ends = itertools.accumulate(counts)
        extents = [extent_of(lengths[end - count : end], multiple) for end, count in zip(ends, counts, strict=True)]
        return sum(extent.rows * (extent.prompt + extent.completion) for extent in extents)

    counts = share_out(lengths, batches, size, multiple)
    every_way = itertools.product(range(size + 1), repeat=batches)
    assert cells(counts) == min(cells(way) for way in every_way if sum(way) == len(lengths))


def toy_forward(calls):
    """'Log-probabilities' that are the ids, 'entropies' twice that; where masked 0, as TRL's are."""

    def forward(ids, mask, keep):
        calls.append(tuple(ids.shape))
        values = (ids * mask).float()[:, -keep:]
        return values, 2 * values, None

    return forward


@pytest.mark.parametrize("rows", [0, 1, 3])
def test_an_extent_gives_what_the_whole_gives(rows):
    ids = torch.arange(1, 25).view(3, 8)
    mask = torch.tensor([[0, 0, 1, 1, 1, 1, 0, 0], [0, 1, 1, 1, 1, 0, 0, 0], [0, 0, 0, 1, 1, 1, 0, 0]])
    whole, entropies, _ = toy_forward([])(ids, mask, 4)
    calls = []
    logps, our_entropies, other = run_extent(toy_forward(calls), ids, mask, 4, Extent(rows, 3, 2))
    assert calls == [(max(1, rows), 5)]
    assert torch.equal(logps[:rows], whole[:rows])
    assert torch.equal(our_entropies[:rows], entropies[:rows])
    assert not logps[rows:].any()
    assert our_entropies[rows:].isnan().all()
    assert other is None


def test_rows_computed_in_order_come_back_in_place():
    generator = torch.Generator().manual_seed(0)
    prompts, completions = (
        torch.randint(1, 5, (7,), generator=generator),
        torch.randint(0, 9, (7,), generator=generator),
    )
    mask = torch.cat([torch.arange(4) >= 4 - prompts[:, None], torch.arange(8) < completions[:, None]], dim=1).long()
    ids = torch.randint(1, 99, (7, 12), generator=generator)
    calls = []
    outputs = run_in_order(toy_forward(calls), ids, mask, 8, row_lengths(mask[:, :4], mask[:, 4:]), batch_size=3)
    for ours, theirs in zip(outputs, toy_forward([])(ids, mask, 8), strict=True):
        assert (ours is None) if theirs is None else torch.equal(ours, theirs)
    assert [rows for rows, _ in calls] == [3, 3, 1]
    assert sum(rows * width for rows, width in calls) < ids.numel()


# The trainer


def rollout(prompts, trainer):
    """Prompts and completions of many lengths; every other group is all right or all wrong."""
    generator = torch.Generator().manual_seed(trainer.state.global_step)
    prompt_ids, completion_ids, rewards = [], [], []
    for i, prompt in enumerate(prompts):
        group = i // trainer.num_generations
        prompt_ids.append([5] * (group % 3) + trainer.processing_class(prompt)["input_ids"])
        length = int(torch.randint(1, 13, (), generator=generator))
        completion_ids.append([*torch.randint(3, 40, (length - 1,), generator=generator).tolist(), 1])
        rewards.append(float(i % 2) if group % 2 else 1.0)
    logprobs = [[-3.0 - 0.1 * (t % 3) for t in range(len(ids))] for ids in completion_ids]
    return {"prompt_ids": prompt_ids, "completion_ids": completion_ids, "logprobs": logprobs, "given": rewards}


def given_reward(given, **kwargs):
    return given


def train(model, output_dir, trainer_class=Recorder, arguments=None, **fields):
    defaults = {
        "max_steps": 3,
        "per_device_train_batch_size": 4,
        "gradient_accumulation_steps": 4,
        "max_completion_length": 12,
    }
    arguments = {"rollout_func": rollout, "reward_funcs": given_reward, **(arguments or {})}
    return training.train(output_dir, trainer_class, model=model, arguments=arguments, **{**SGD, **defaults, **fields})


RUNS = {
    **{loss: {"loss_type": loss} for loss in tiny.LOSS_TYPES},
    "sequence level": {"importance_sampling_level": "sequence", "loss_type": "grpo"},
    "two iterations": {"num_iterations": 2, "max_steps": 4},
    "generation larger than accumulation": {"steps_per_generation": 8},
    "generation smaller than accumulation": {"steps_per_generation": 2},
    "no accumulation": {"per_device_train_batch_size": 16, "gradient_accumulation_steps": 1},
    "one row at a time": {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 16},
    "KL": {"beta": 0.1},
    "entropy quantile": {"top_entropy_quantile": 0.3},
    "truncated completions masked": {"mask_truncated_completions": True},
    "gradient checkpointing": {"gradient_checkpointing": True},
    "padding to a multiple": {"pad_to_multiple_of": 8},
    "positive samples alone": {"negative_weight": 0.0, "negative_high_scale": 1.0},
    "several epochs": {"max_steps": -1, "num_train_epochs": 2},
}


@pytest.mark.parametrize("fields", RUNS.values(), ids=RUNS.keys())
def test_the_update_is_the_same_from_fewer_cells(fields, model_dir, tmp_path):
    plain = train(model_dir, tmp_path, **tiny.PLAIN, **fields)
    saved = train(model_dir, tmp_path, **fields)
    assert update_difference(saved, plain) < 1e-4
    assert len(saved.passes) == len(plain.passes)
    assert saved.cells < plain.cells


@pytest.mark.parametrize("option", tiny.PLAIN)
def test_each_saving_alone(option, model_dir, tmp_path):
    plain = train(model_dir, tmp_path, **tiny.PLAIN)
    saved = train(model_dir, tmp_path, **{**tiny.PLAIN, option: True})
    assert update_difference(saved, plain) < 1e-4
    assert saved.cells < plain.cells


def test_lora(model_dir, tmp_path):
    plain = train(model_dir, tmp_path, arguments=tiny.lora(), **tiny.PLAIN)
    saved = train(model_dir, tmp_path, arguments=tiny.lora())
    assert moved(plain) == {name for name in plain.start if "lora_" in name}
    assert update_difference(saved, plain) < 1e-4
    assert saved.cells < plain.cells


def test_rows_without_a_gradient_do_not_run(model_dir, tmp_path):
    trainer = train(model_dir, tmp_path, trim_padding=False, max_steps=1)
    # Of 16 rows in 4 micro-batches half have an advantage.
    assert sum(rows for rows, columns in trainer.passes if columns > 2) == 8
    alone = train(model_dir, tmp_path, per_device_train_batch_size=1, gradient_accumulation_steps=16, max_steps=1)
    assert len(alone.passes) == 16
    assert alone.passes[8:] == [(1, 2)] * 8


@pytest.mark.parametrize(
    "fields",
    [{"beta": 0.1}, {"top_entropy_quantile": 0.5}, {"entropy_coef": 0.01}, {"use_adaptive_entropy": True}],
    ids=str,
)
def test_all_rows_run_where_the_loss_needs_them(fields, model_dir, tmp_path):
    if not all(hasattr(A3POConfig, name) for name in fields):
        pytest.skip("this TRL has no such option")
    trainer = train(model_dir, tmp_path, max_steps=1, **fields)
    assert [rows for rows, _ in trainer.passes] == [4, 4, 4, 4]


class EveryRow(Recorder):
    def shape_advantages(self, advantages, *, mask, **batch):
        lengths = sorted(mask.sum(1).tolist())
        self.micro_batches = [*getattr(self, "micro_batches", []), lengths]
        return advantages + 1


def test_a_shaping_of_ones_own_sees_every_row_in_the_company_it_has_without_savings(model_dir, tmp_path):
    plain, saved = (train(model_dir, tmp_path, EveryRow, max_steps=1, **fields) for fields in (tiny.PLAIN, {}))
    assert [rows for rows, _ in saved.passes] == [4, 4, 4, 4]
    assert saved.micro_batches == plain.micro_batches
    assert saved.cells < plain.cells


def recurrent():
    """A model whose recurrent layers take padding for tokens."""
    torch.manual_seed(0)
    size = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 2}
    special = {"eos_token_id": 1, "bos_token_id": 1, "pad_token_id": 0}
    return RecurrentGemmaForCausalLM(
        RecurrentGemmaConfig(
            vocab_size=len(tiny.tokenizer()), head_dim=16, lru_width=32, attention_window_size=64, **size, **special
        )
    )


VIRTUAL_TOKENS = {
    "prompt tuning": PromptTuningConfig(num_virtual_tokens=3, task_type="CAUSAL_LM"),
    "p-tuning": PromptEncoderConfig(num_virtual_tokens=3, encoder_hidden_size=16, task_type="CAUSAL_LM"),
}


@pytest.mark.parametrize("case", ["absolute positions", "recurrent", *VIRTUAL_TOKENS])
def test_the_padding_of_the_prompt_stays_where_the_model_sees_it(case, model_dir, tmp_path):
    if case == "recurrent" and Version(transformers.__version__) < Version("5"):
        pytest.skip("there it keeps its state from one pass to the next, and does not train")
    model = {"absolute positions": gpt2, "recurrent": recurrent}.get(case, model_dir)
    arguments = {"peft_config": VIRTUAL_TOKENS[case]} if case in VIRTUAL_TOKENS else {}
    plain, saved = (
        train(model, tmp_path, arguments={**arguments}, learning_rate=0.3, **fields) for fields in (tiny.PLAIN, {})
    )
    assert moved(plain)
    assert update_difference(saved, plain) < 1e-4
    assert saved.cells < plain.cells
    assert not saved._trims_prompt


@pytest.mark.parametrize(
    ("settings", "seen"),
    [
        ({}, False),
        ({"layer_types": ["full_attention", "sliding_attention"]}, False),
        ({"layer_types": ["full_attention", "linear_attention"]}, False),
        ({"layer_types": ["full_attention", "chunked_attention"]}, True),
        ({"attn_temperature_tuning": True}, True),
        ({"log_scaling_n_floor": 128_000}, True),
        ({"rope_scaling": {"rope_type": "dynamic", "factor": 2.0}}, True),
        ({"rope_scaling": {"rope_type": "default", "llama_4_scaling_beta": 0.1}}, True),
        ({"rope_scaling": {"rope_type": "default", "llama_4_scaling_beta": 0}}, False),
        ({"rope_scaling": {"full_attention": {"rope_type": "dynamic"}, "sliding_attention": {}}}, True),
    ],
    ids=str,
)
def test_padding_is_seen_by_what_goes_by_columns(settings, seen):
    model = tiny.model()
    for name, value in settings.items():
        setattr(
            model.config,
            "rope_parameters" if hasattr(model.config, "rope_parameters") and name == "rope_scaling" else name,
            value,
        )
    assert sees_padding(model) == seen


def test_experts_are_modules_before_transformers_5():
    size = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    experts = {"num_experts": 2, "moe_intermediate_size": 8, "shared_expert_intermediate_size": 8}
    mixture = Qwen2MoeForCausalLM(Qwen2MoeConfig(vocab_size=8, num_key_value_heads=2, **size, **experts))
    assert has_experts_as_modules(mixture) == (Version(transformers.__version__) < Version("5"))
    assert not has_experts_as_modules(Qwen2ForCausalLM(Qwen2Config(vocab_size=8, num_key_value_heads=2, **size)))


def test_columns_stay_multiples(model_dir, tmp_path):
    trainer = train(model_dir, tmp_path, pad_to_multiple_of=8)
    assert {columns % 8 for _, columns in trainer.passes} == {0}


def test_metrics_are_those_of_all_rows_but_the_entropy(model_dir, tmp_path):
    plain, saved = (train(model_dir, tmp_path, **fields).state.log_history for fields in (tiny.PLAIN, {}))
    for ours, theirs in zip(saved[:-1], plain[:-1], strict=True):
        assert theirs.keys() - ours.keys() == {"a3po/zero/entropy"}
        for name in ours.keys() - {"entropy", "step_time"}:
            assert ours[name] == pytest.approx(theirs[name], rel=1e-3, abs=1e-5), name
        tokens = [theirs[f"a3po/{p}/fraction"] * theirs[f"a3po/{p}/mean_length"] for p in ("positive", "negative")]
        entropies = [theirs[f"a3po/{p}/entropy"] for p in ("positive", "negative")]
        expected = sum(n * entropy for n, entropy in zip(tokens, entropies, strict=True)) / sum(tokens)
        assert ours["entropy"] == pytest.approx(expected, rel=1e-3)


def test_a_batch_without_any_gradient_changes_nothing(model_dir, tmp_path):
    trainer = train(model_dir, tmp_path, arguments={"reward_funcs": tiny.equal_reward})
    assert not moved(trainer)
    assert set(trainer.passes) == {(1, 2)}


@pytest.mark.filterwarnings("ignore")  # the compiler warns of what it traces itself, and fails where that is an error
def test_a_compiled_model_is_not_compiled_without_end(model_dir, tmp_path, monkeypatch):
    monkeypatch.setenv("ACCELERATE_DYNAMO_BACKEND", "eager")  # which transformers sets, and leaves to other tests
    fields = {"torch_compile": True, "torch_compile_backend": "eager"}
    graphs = []
    for max_steps in (4, 12):
        torch.compiler.reset()
        counters.clear()
        trainer = train(model_dir, tmp_path, max_steps=max_steps, **fields)
        graphs.append(counters["stats"]["unique_graphs"])
    assert len(set(trainer.passes)) > 12  # as many shapes
    assert graphs[0] == graphs[1] < 12
