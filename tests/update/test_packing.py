"""Rows packed, each prompt once: every position in its place, log-probabilities and gradients as one row at a time."""

import copy
import sys
from types import SimpleNamespace

import pytest
import torch
import transformers
from hypothesis import given
from hypothesis import strategies as st
from packaging.version import Version
from peft import LoraConfig, PromptTuningConfig, get_peft_model
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from trl_a3po.update import attention
from trl_a3po.update.attention import restore_attention
from trl_a3po.update.layout import PackedLayout, RowShape, packed_positions, row_shapes
from trl_a3po.update.packed_forward import PackedForward, trl_has_fused_head
from trl_a3po.update.probe import check_packing


if not trl_has_fused_head():
    pytest.skip("TRL has no fused head before 1.15", allow_module_level=True)

from trl.trainer.utils import add_fused_lm_head


VOCABULARY = 128

# Small sizes, under the names that configurations have for them.
SIZES = {
    **dict.fromkeys(("hidden_size", "n_embd", "word_embed_proj_dim"), 32),
    **dict.fromkeys(("intermediate_size", "ffn_dim", "n_inner"), 64),
    **dict.fromkeys(("num_hidden_layers", "n_layer"), 2),
    **dict.fromkeys(("num_attention_heads", "n_head"), 4),
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts"), 4),
    **dict.fromkeys(("max_position_embeddings", "n_positions"), 128),
    **dict.fromkeys(("q_lora_rank", "kv_lora_rank", "moe_intermediate_size", "shared_expert_intermediate_size"), 16),
    **dict.fromkeys(("qk_rope_head_dim", "qk_nope_head_dim", "v_head_dim"), 8),
    "vocab_size": VOCABULARY,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "num_experts_per_tok": 2,
    "first_k_dense_replace": 1,
    "sliding_window": 6,
    "n_group": 1,
    "topk_group": 1,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


def make_model(name: str, attention: str | None = None, **changes):
    """A tiny model of a family with TRL's head, of weights large enough that each token matters."""
    if name not in transformers.CONFIG_MAPPING:
        pytest.skip(f"this transformers has no {name}")
    kind = transformers.CONFIG_MAPPING[name]
    default = kind()
    sizes = {key: value for key, value in SIZES.items() if hasattr(default, key)}
    if getattr(default, "sliding_window", None) is None:
        sizes.pop("sliding_window", None)
    if "kv_lora_rank" in sizes:
        sizes.pop("head_dim", None)
        sizes["num_key_value_heads"] = 4
    config = kind(**sizes | changes)
    if attention is not None:
        config._attn_implementation = attention
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config)
    for parameter in model.parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=0.15)
    add_fused_lm_head(model, temperature=0.9, outputs=("log_probs", "entropy"))
    return model.eval()


def make_batch(shapes: list[tuple[int, ...]], batch: int | None = None):
    """A padded micro-batch of rows (prompt, completion, number of the prompt, length of the common start)."""
    generator = torch.Generator().manual_seed(1)
    rows = [RowShape(*shape) for shape in shapes]
    width, columns = max(row.prompt for row in rows), max(1, *(row.completion for row in rows))
    prompts = {row.prompt_number: torch.randint(3, VOCABULARY, (row.prompt,), generator=generator) for row in rows}
    start = next(iter(prompts.values()))[: rows[0].common]
    for prompt in prompts.values():
        prompt[: len(start)] = start
    batch = batch or len(rows)
    ids, mask = torch.zeros(batch, width + columns, dtype=torch.long), torch.zeros(batch, width + columns).long()
    for index, row in enumerate(rows):
        used = slice(width - row.prompt, width + row.completion)
        completion = torch.randint(3, VOCABULARY, (row.completion,), generator=generator)
        ids[index, used], mask[index, used] = torch.cat([prompts[row.prompt_number], completion]), 1
    labels = ids.masked_fill(mask == 0, -100)
    labels[:, :width] = -100
    inputs = {"input_ids": ids, "attention_mask": mask, "labels": labels, "fused_lm_head": True}
    return SimpleNamespace(rows=rows, inputs=inputs, width=width, columns=columns, shape=(batch, width, columns))


# Prompts of 7, 1 and 4 tokens; rows of one prompt apart from each other; a single token, and none.
SHAPES = [(7, 9, 0), (1, 8, 1), (7, 3, 0), (4, 1, 2), (1, 5, 1), (7, 0, 0), (4, 6, 2)]
# All prompts have the same 3 tokens first. One has only one more, its last.
COMMON = [(7, 9, 0, 3), (4, 8, 1, 3), (7, 3, 0, 3), (6, 1, 2, 3), (4, 5, 1, 3), (7, 0, 0, 3), (6, 6, 2, 3)]


def one_by_one(model, batch, by_column=False):
    """The plain reference: each row by itself, without padding. Log-probabilities and entropies, (B, C)."""
    rows, width, columns = batch.shape
    results = []
    for index in range(rows):
        row = batch.rows[index] if index < len(batch.rows) else RowShape(1, 0, -1)
        if not row.completion:
            results.append((torch.zeros(columns), torch.zeros(columns)))
            continue
        used = slice(width - row.prompt, width + row.completion)
        first = width - row.prompt if by_column else 0
        outputs = model(
            input_ids=batch.inputs["input_ids"][index : index + 1, used],
            position_ids=torch.arange(row.prompt + row.completion)[None] + first,
            labels=batch.inputs["labels"][index : index + 1, used],
            fused_lm_head=True,
        )
        missing = (0, columns - row.completion)
        values = (outputs.log_probs, outputs.entropy)
        results.append([torch.nn.functional.pad(value[0, -row.completion :], missing) for value in values])
    return tuple(torch.stack(each) for each in zip(*results, strict=True))


def packed(model, batch, by_column=False):
    outputs = PackedForward(model, PackedLayout(batch.rows, batch.shape, by_column))(**batch.inputs)
    return outputs.log_probs, outputs.entropy


def gradients(model, compute, *args):
    """Log-probabilities, entropies and gradients of all parameters, each token of another weight."""
    model.zero_grad()
    logps, entropies = compute(model, *args)
    weights = torch.linspace(-1, 1.5, logps.numel()).view(logps.shape)
    (weights * logps + weights.flip(0) * entropies).sum().backward()
    named = {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}
    return logps.detach(), entropies.detach(), named


def assert_same(model, batch, by_column=False, tolerance=1e-5):
    logps, entropies, named = gradients(model, packed, batch, by_column)
    others = gradients(model, one_by_one, batch, by_column)
    torch.testing.assert_close(logps, others[0], rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(entropies, others[1], rtol=tolerance, atol=tolerance)
    assert named.keys() == others[2].keys()
    largest = max(gradient.abs().max() for gradient in others[2].values())
    assert largest > 0.01
    for name, gradient in named.items():
        # transformers 4 keeps a parameter of Apertus in half precision.
        within = tolerance if gradient.dtype == torch.float32 else 0.01
        torch.testing.assert_close(gradient, others[2][name], rtol=within, atol=within * largest, msg=name)


class TestPackedLayout:
    def test_a_prompt_lies_there_once_without_its_last_token(self):
        rows = [RowShape(3, 2, 0), RowShape(3, 3, 0)]
        layout = PackedLayout(rows, (2, 4, 3), by_column=True)
        # Row 0 is columns 0 to 6 of the padded micro-batch, row 1 is 7 to 13; prompts begin in column 1.
        assert layout.sources.tolist() == [1, 2, 3, 4, 10, 11, 12]
        assert layout.position_ids.tolist() == [[1, 2, 3, 4, 3, 4, 5]]
        assert layout.places.tolist() == [[2, 3, 7], [4, 5, 6]]
        assert [tuple(segment) for segment in layout.segments] == [(0, 2, 0, 0, 0), (2, 4, 0, 2, 0), (4, 7, 0, 2, 0)]

    def test_a_common_start_lies_there_once(self):
        rows = [RowShape(4, 2, 0, 2), RowShape(5, 2, 1, 2), RowShape(5, 1, 1, 2), RowShape(3, 1, 2, 2)]
        layout = PackedLayout(rows, (4, 5, 2))
        # Rows have 7 columns. The prompts of 4, 5 and 3 tokens begin in columns 1, 0 and 2.
        assert layout.sources.tolist() == [1, 2, 3, 4, 5, 9, 10, 11, 12, 18, 25]
        assert layout.position_ids.tolist() == [[0, 1, 2, 3, 4, 2, 3, 4, 5, 4, 2]]
        assert layout.places.tolist() == [[3, 4], [7, 8], [9, 11], [10, 11]]
        first, *others = [(0, 3, 0, 0, 0), (3, 5, 0, 3, 0)], (5, 7, 5, 5, 2), (7, 9, 5, 7, 2), (9, 10, 5, 7, 2)
        assert [tuple(segment) for segment in layout.segments] == [*first, *others, (10, 11, 10, 10, 2)]

    @pytest.mark.parametrize(("own", "is_causal"), [(299, False), (300, True)])
    def test_a_long_prompt_after_a_common_start_needs_no_mask(self, own, is_causal):
        layout = PackedLayout([RowShape(400, 1, 0, 300), RowShape(300 + own + 1, 1, 1, 300)], (2, 700, 1))
        assert [block.segments for block in layout.blocks] == [1, 1, 1, 1]
        assert [block.is_causal for block in layout.blocks] == [True, False, is_causal, False]

    def test_by_column_there_is_no_common_start(self):
        with pytest.raises(ValueError, match="other positions"):
            PackedLayout([RowShape(3, 2, 0, 1)], (1, 3, 2), by_column=True)

    def test_positions_are_counted_from_the_first_token_where_models_do(self):
        layout = PackedLayout([RowShape(3, 2, 0)], (1, 5, 2))
        assert layout.position_ids.tolist() == [[0, 1, 2, 3]]

    def test_without_a_token_to_predict_the_model_still_runs(self):
        for rows in ([], [RowShape(3, 0, 0)]):
            layout = PackedLayout(rows, (1, 3, 1))
            assert layout.positions == packed_positions(rows) == 1
            assert layout.places.tolist() == [[1]]

    @given(
        st.lists(st.tuples(st.integers(0, 3), st.integers(0, 6)), min_size=1, max_size=8),
        st.integers(0, 2),
        st.integers(0, 3),
    )
    def test_each_distinct_position_lies_there_once(self, rows, skipped, common):
        prompt_lengths = [common + more for more in (1, 2, 5, 3)]
        shapes = [(prompt_lengths[number], completion, number, common) for number, completion in rows]
        batch = make_batch(shapes, len(shapes) + skipped)
        layout = PackedLayout(batch.rows, batch.shape)
        assert layout.positions == packed_positions(batch.rows) == len(layout.sources) == layout.position_ids.numel()
        used = {number for number, completion in rows if completion}
        distinct = sum(prompt_lengths[number] - 1 - common for number in used) + (common if used else 0)
        distinct += sum(completion for _, completion in rows)
        assert layout.positions == max(1, distinct)
        assert len(set(layout.sources.tolist())) == layout.positions
        # Whatever is computed at the place of a token goes to the column of that token, 0 to all others.
        tokens = layout.unpack(layout.pack(batch.inputs["labels"], shift=1))
        labels = batch.inputs["labels"][:, batch.width :]
        assert torch.equal(tokens, labels.masked_fill(labels == -100, 0))
        # Segments divide the row, and end where they begin to attend causally.
        assert [segment.start for segment in layout.segments] == [0, *(s.end for s in layout.segments)][:-1]
        assert layout.segments[-1].end == layout.positions

    @given(
        st.lists(st.tuples(st.integers(0, 3), st.integers(0, 6)), min_size=1, max_size=8),
        st.integers(1, 20),
        st.none() | st.integers(1, 6),
        st.integers(0, 3),
    )
    def test_a_block_attends_as_its_segments_do(self, rows, size, window, common):
        prompt_lengths = [common + more for more in (1, 2, 5, 3)]
        batch = make_batch([(prompt_lengths[number], completion, number, common) for number, completion in rows])
        layout = PackedLayout(batch.rows, batch.shape)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("trl_a3po.update.layout._BLOCK", size)
            blocks = layout.blocks
        attends = torch.zeros(layout.positions, layout.positions, dtype=torch.bool)
        for block in blocks:
            assert block.end - block.start <= size or block.segments == 1
            spans = (0, block.common), (block.prefix_start, block.prefix_end), (block.start, block.end)
            keys = [key for span in spans for key in range(*span)]
            assert len(set(keys)) == len(keys) == block.keys
            attends[block.start : block.end, keys] = layout.attends(block, window)
        expected = torch.zeros_like(attends)
        for segment in layout.segments:
            for query in range(segment.start, segment.end):
                spans = (0, segment.common), (segment.prefix_start, segment.prefix_end), (segment.start, query + 1)
                keys = [key for span in spans for key in range(*span)]
                expected[query, keys[-window:] if window else keys] = True
        assert torch.equal(attends, expected)

    def test_boundaries_for_kernels_gather_each_prefix_for_each_row(self):
        layout = PackedLayout([RowShape(3, 2, 0), RowShape(3, 3, 0), RowShape(1, 2, 1)], (3, 3, 3))
        starts = layout.starts
        assert starts.of_queries.tolist() == [0, 2, 4, 7, 9]
        assert starts.of_keys.tolist() == [0, 2, 6, 11, 13]
        assert starts.keys.tolist() == [0, 1, 0, 1, 2, 3, 0, 1, 4, 5, 6, 7, 8]
        assert (starts.most_queries, starts.most_keys) == (3, 5)
        assert starts.of_queries.dtype == starts.of_keys.dtype == torch.int32

    def test_boundaries_for_kernels_gather_the_common_start_too(self):
        layout = PackedLayout([RowShape(3, 1, 0, 1), RowShape(3, 2, 1, 1)], (2, 3, 2))
        starts = layout.starts
        assert starts.of_queries.tolist() == [0, 2, 3, 4, 6]
        assert starts.keys.tolist() == [0, 1, 0, 1, 2, 0, 3, 0, 3, 4, 5]
        assert starts.of_keys.tolist() == [0, 2, 5, 7, 11]


class TestRowShapes:
    def test_rows_with_the_same_tokens_share_a_prompt(self):
        batch = make_batch([(4, 3, 0), (2, 5, 1), (4, 0, 0), (2, 1, 2)])
        ids, mask = batch.inputs["input_ids"], batch.inputs["attention_mask"]
        ids[:, : batch.width][mask[:, : batch.width] == 0] = torch.arange(4)  # padding does not tell prompts apart
        rows = row_shapes(ids[:, : batch.width], mask[:, : batch.width], mask[:, batch.width :])
        assert [row[:2] for row in rows] == [(4, 3), (2, 5), (4, 0), (2, 1)]
        numbers = [row.prompt_number for row in rows]
        assert numbers[0] == numbers[2]
        assert len(set(numbers)) == 3
        assert {row.common for row in rows} == {0}

    def test_the_common_start_of_all_prompts(self):
        batch = make_batch(COMMON)
        ids, mask = batch.inputs["input_ids"], batch.inputs["attention_mask"]
        parts = ids[:, : batch.width], mask[:, : batch.width], mask[:, batch.width :]
        assert {row.common for row in row_shapes(*parts)} == {3}
        # Where positions are counted by column, it has several.
        assert {row.common for row in row_shapes(*parts, by_column=True)} == {0}
        # Each row computes the last token of its prompt for itself.
        one_prompt = [part[[0, 2]] for part in parts]
        assert {row.common for row in row_shapes(*one_prompt)} == {6}

    @pytest.mark.parametrize("which", ["prompt", "completion", "no prompt"])
    def test_padding_between_tokens_cannot_be_packed(self, which):
        ids = torch.ones(2, 4, dtype=torch.long)
        prompt, completion = torch.ones(2, 4), torch.ones(2, 4)
        assert row_shapes(ids, prompt, completion) is not None
        if which == "no prompt":
            prompt[1] = 0
        else:
            {"prompt": prompt, "completion": completion}[which][1, 2] = 0
        assert row_shapes(ids, prompt, completion) is None


FAMILIES = (
    *("apertus", "arcee", "cohere", "cohere2", "deepseek_v2", "deepseek_v3", "dots1", "ernie4_5", "exaone4", "gemma"),
    *("gemma2", "gemma3_text", "glm", "glm4", "gpt2", "gpt_bigcode", "gpt_neox", "gpt_oss", "gptj", "granite"),
    *("granitemoe", "hunyuan_v1_dense", "llama", "ministral", "ministral3", "mistral", "mixtral", "nemotron", "olmo2"),
    *("olmo3", "olmoe", "opt", "phi", "phi3", "phimoe", "qwen2", "qwen3", "qwen3_moe", "seed_oss", "smollm3"),
    *("stablelm", "starcoder2"),
)
# What some need, beyond SIZES, to be built tiny or to show all that they can do.
CHANGES = {
    "gemma3_text": {"layer_types": ["sliding_attention", "full_attention"]},
    "gemma2": {"attn_logit_softcapping": 1.0},
    "gptj": {"rotary_dim": 4},
    "dots1": {"n_shared_experts": 1},
}


def packing_of(model):
    packing = check_packing(model)
    if packing.reason is not None and Version(transformers.__version__) < Version("5.23"):
        pytest.skip(f"not packed with this transformers: {packing.reason}")
    assert packing.reason is None
    return packing


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")  # of transformers 4 within itself
@pytest.mark.parametrize("name", FAMILIES)
def test_a_family_is_packed_and_exact(name):
    model = make_model(name, **CHANGES.get(name, {}))
    if name == "gptj" and not hasattr(sys.modules[type(model).__module__], "ALL_ATTENTION_FUNCTIONS"):
        pytest.skip("this transformers gives GPT-J attention classes of its own")
    packing = packing_of(model)
    assert packing.by_column == (name in ("gpt2", "gpt_bigcode", "gptj", "hunyuan_v1_dense", "ministral3"))
    assert_same(model, make_batch(SHAPES), packing.by_column)
    if not packing.by_column:
        assert_same(model, make_batch(COMMON), packing.by_column)


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")
@pytest.mark.parametrize("name", ["llama", "gpt2", "mistral", "gemma2", "gpt_oss"])
def test_a_single_position(name):
    """As in a micro-batch in which no row is computed."""
    model = make_model(name, **CHANGES.get(name, {}))
    assert_same(model, make_batch([(1, 1, 0)]), packing_of(model).by_column)


@pytest.mark.parametrize("name", ["llama", "mistral", "gemma2", "gpt_oss"])  # with windows, soft caps and sinks
@pytest.mark.parametrize("size", [1, 12])
def test_rows_longer_than_a_block_are_exact(name, size, monkeypatch):
    monkeypatch.setattr("trl_a3po.update.layout._BLOCK", size)
    model = make_model(name, **CHANGES.get(name, {}))
    for shapes in (SHAPES, COMMON):
        assert_same(model, make_batch(shapes), packing_of(model).by_column)


@pytest.mark.parametrize("name", ["llama", "gemma2", "gpt_oss"])
def test_scores_that_the_models_own_kernel_does_not_keep_are_not_kept(name, monkeypatch):
    model = make_model(name, "eager", **CHANGES.get(name, {}))
    packing_of(model)
    eager = sys.modules[type(model).__module__].eager_attention_forward
    monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS._global_mapping, "flash_made_up", eager)
    masks = ALL_MASK_ATTENTION_FUNCTIONS
    monkeypatch.setitem(masks._global_mapping, "flash_made_up", masks["eager"])
    model.config._attn_implementation = "flash_made_up"
    reason = check_packing(model).reason
    if name == "llama":
        assert reason is None
    else:
        assert "soft-capped scores or its sinks" in reason


def by_segment(
    query, key, value, of_queries, of_keys, most_queries, most_keys, *, scale, window_size, enable_gqa=False
):
    """What torch's kernel for rows of different lengths computes. Queries are aligned with the last keys."""
    assert (of_queries.diff().max(), of_keys.diff().max()) == (most_queries, most_keys)
    left, right = window_size
    assert right == 0
    segments = []
    for queries, keys in zip(of_queries.unfold(0, 2, 1).tolist(), of_keys.unfold(0, 2, 1).tolist(), strict=True):
        segment = [each[slice(*span)].transpose(0, 1) for each, span in ((query, queries), (key, keys), (value, keys))]
        own, seen = segment[0].shape[1], segment[1].shape[1]
        distance = torch.arange(seen - own, seen, device=query.device)[:, None] - torch.arange(
            seen, device=query.device
        )
        mask = (distance >= 0) & (distance <= (seen if left < 0 else left))
        attended = torch.nn.functional.scaled_dot_product_attention(
            *segment, attn_mask=mask, scale=scale, enable_gqa=enable_gqa
        )
        segments.append(attended.transpose(0, 1))
    return torch.cat(segments)


@pytest.mark.parametrize("takes", [["window_size"], ["window_size", "enable_gqa"]], ids=["torch 2.11", "newer"])
@pytest.mark.parametrize("name", ["llama", "mistral"])  # the second with windows
def test_what_the_kernel_of_a_gpu_gets(name, takes, monkeypatch):
    """On a CPU, with a plain function in place of the kernel."""
    calls = []

    def kernel(*args, **kwargs):
        calls.append(kwargs["window_size"])
        assert kwargs.keys() <= {"scale", *takes}
        return by_segment(*args, **kwargs)

    monkeypatch.setattr(attention, "varlen_attn", kernel)
    monkeypatch.setattr(attention, "_VARLEN_PARAMETERS", takes)
    monkeypatch.setattr(attention, "_varlen_takes", lambda *_: True)
    model = make_model(name)
    for shapes in (SHAPES, COMMON):
        assert_same(model, make_batch(shapes))
    window = getattr(model.config, "sliding_window", None)
    assert set(calls) == {(-1 if window is None else window - 1, 0)}


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("window", [None, 5])
@pytest.mark.parametrize("shapes", [SHAPES, COMMON], ids=["apart", "common start"])
def test_the_kernel_of_a_gpu(window, shapes, monkeypatch):
    layout = PackedLayout([RowShape(*shape) for shape in shapes], (7, 7, 9), False, "cuda")
    generator = torch.Generator("cuda").manual_seed(0)
    given = [
        torch.randn(1, heads, layout.positions, 32, generator=generator, device="cuda", requires_grad=True)
        for heads in (4, 2, 2)
    ]
    weights = torch.randn(1, layout.positions, 4, 32, generator=generator, device="cuda")
    with torch.autocast("cuda", torch.bfloat16):
        assert attention._varlen_takes(given[0], given[2])
        found = attention._attend_varlen(*given, layout, None, window)
    monkeypatch.setattr(attention, "varlen_attn", by_segment)
    expected = attention._attend_varlen(*given, layout, None, window)
    torch.testing.assert_close(found.float(), expected, rtol=0.02, atol=0.02)
    gradients = [torch.autograd.grad((weights * each.float()).sum(), given) for each in (found, expected)]
    for ours, exact in zip(*gradients, strict=True):
        torch.testing.assert_close(ours, exact, rtol=0.05, atol=0.05)


@pytest.mark.parametrize(
    ("name", "changes", "reason"),
    [
        ("bloom", {}, ""),  # its attention asks for no function
        ("bert", {}, "log-probabilities differ"),  # attends to both sides
        ("doge", {}, "makes its own attention mask"),
        ("rwkv", {"attention_hidden_size": 32}, ""),
        ("mpt", {"d_model": 32, "n_heads": 4, "n_layers": 2}, ""),
        ("qwen3_next", {}, "linear_attention"),
        ("minimax", {}, "linear_attention"),
        ("lfm2", {"layer_types": ["conv", "full_attention"]}, "conv"),
    ],
)
def test_others_are_not_packed(name, changes, reason):
    model = make_model(name, **changes)
    packing = check_packing(model)
    assert packing.reason is not None
    assert reason in packing.reason
    assert model.config._attn_implementation in ("eager", "sdpa")


class TestCheck:
    def test_prompt_tuning(self):
        model = get_peft_model(make_model("llama"), PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2))
        assert check_packing(model).reason == "an adapter puts virtual tokens before each row"

    def test_a_model_that_fails_on_made_up_rows_is_not_packed(self):
        model = make_model("llama")
        model.model.layers[1].register_forward_pre_hook(lambda *_: 1 / 0)
        assert "ZeroDivisionError" in check_packing(model).reason

    def test_a_table_of_positions_is_never_looked_up_beyond_its_end(self):
        """On a GPU, that would be the end of the process, not an error that the check can catch."""
        model = make_model("gpt2", max_position_embeddings=24)
        model.transformer.wpe.register_forward_pre_hook(lambda *_: pytest.fail("it runs"))
        assert check_packing(model).reason == "its table has 24 positions, and made-up rows need 25"
        assert check_packing(make_model("gpt2", max_position_embeddings=25)).reason is None

    def test_the_numbers_decide(self):
        """A layer that mixes along the row, which no rule knows of."""
        model = make_model("llama")
        model.model.layers[1].register_forward_hook(lambda _, args, output: output + 0.1 * output.cumsum(1))
        assert "log-probabilities differ" in check_packing(model).reason

    def test_learned_positions_count_by_column_in_half_precision_too(self):
        """Their table changes so slowly that a shift is lost among the rounding."""
        model = make_model("gpt2").bfloat16()
        positions = torch.arange(128)[:, None] / torch.linspace(20, 60, 32)
        model.transformer.wpe.weight.data.copy_(0.05 * positions.sin())
        packing = check_packing(model)
        assert (packing.reason, packing.by_column) == (None, True)

    def test_in_a_wrapper(self):
        class Wrapper(torch.nn.Module):
            def __init__(self, model):
                super().__init__()
                self.model = model

            def forward(self, **kwargs):
                return self.model(**kwargs)

        assert check_packing(Wrapper(make_model("llama"))) == check_packing(make_model("llama"))

    def test_a_long_window_has_to_reach_the_attention(self, monkeypatch):
        assert check_packing(make_model("mistral", sliding_window=100_000)).reason is None
        model = make_model("mistral", sliding_window=100_000)
        for layer in model.model.layers:
            forward = layer.self_attn.forward
            layer.self_attn.config = copy.copy(model.config)
            layer.self_attn.config.sliding_window = None
            layer.self_attn.forward = forward
        assert "ask for windows of {None}, its configuration for {100000}" in check_packing(model).reason

    @pytest.mark.parametrize(("kind", "limit"), [("dynamic", 128), ("longrope", 64), ("default", None)])
    def test_rotations_that_depend_on_the_longest_row_set_a_limit(self, kind, limit):
        parameters = {"rope_type": kind, "rope_theta": 10000.0}
        if kind == "dynamic":
            parameters["factor"] = 2.0
        if kind == "longrope":
            parameters |= {"short_factor": [1.0] * 4, "long_factor": [2.0] * 4, "original_max_position_embeddings": 64}
        packing = check_packing(make_model("llama", rope_parameters=parameters))
        assert (packing.reason, packing.limit) == (None, limit)

    def test_a_model_may_have_several_ends(self):
        assert check_packing(make_model("llama", eos_token_id=[2, 3])).reason is None

    def test_leaves_the_model_as_it_was(self):
        model = make_model("llama", attention_dropout=0.3).train()
        model.model.layers[0].eval()
        modes = [module.training for module in model.modules()]
        state = torch.get_rng_state()
        assert check_packing(model).reason is None
        assert [module.training for module in model.modules()] == modes
        assert torch.equal(torch.get_rng_state(), state)
        assert all(parameter.grad is None for parameter in model.parameters())

    def test_runs_the_model_as_often_whatever_the_result(self):
        for fails in (False, True):
            model = make_model("llama")
            calls = []
            model.model.register_forward_pre_hook(lambda *_, calls=calls: calls.append(1))
            if fails:
                model.model.layers[0].register_forward_pre_hook(lambda *_: 1 / 0)
            assert (check_packing(model).reason is not None) == fails
            assert len(calls) == 4


class TestPackedForward:
    @pytest.mark.parametrize("attention", ["eager", "sdpa"])
    def test_the_attention_of_the_model_makes_no_difference(self, attention):
        assert_same(make_model("qwen2", attention), make_batch(SHAPES))

    def test_rows_that_the_layout_does_not_have_are_zero(self):
        model, batch = make_model("llama"), make_batch(SHAPES, batch=9)
        assert_same(model, batch)
        logps, _ = packed(model, batch)
        assert (logps[7:] == 0).all()
        assert (logps[:7] != 0).sum() == sum(completion for _, completion, _ in SHAPES)

    def test_without_rows_all_parameters_take_part(self):
        model, batch = make_model("llama"), make_batch(SHAPES)
        batch.rows = []
        logps, _, named = gradients(model, packed, batch)
        assert named.keys() == dict(model.named_parameters()).keys()
        assert not logps.any()
        assert not any(gradient.any() for gradient in named.values())

    @pytest.mark.parametrize("reentrant", [True, False])
    @pytest.mark.parametrize("shapes", [SHAPES, COMMON], ids=["apart", "common start"])
    def test_gradient_checkpointing(self, reentrant, shapes):
        model = make_model("mistral")
        expected = gradients(model, packed, make_batch(shapes))
        model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        model.train()
        actual = gradients(model, packed, make_batch(shapes))
        for name, gradient in expected[2].items():
            torch.testing.assert_close(actual[2][name], gradient, rtol=0, atol=1e-6)
        assert model.config._attn_implementation == "sdpa"

    def test_checkpoints_see_the_layout_of_their_own_pass(self):
        model = make_model("llama").train()
        model.gradient_checkpointing_enable({"use_reentrant": False})
        one, other = make_batch(SHAPES), make_batch(SHAPES[::-1])
        expected = [gradients(model, packed, batch)[2] for batch in (one, other)]

        model.zero_grad()
        weights = torch.linspace(-1, 1.5, 63).view(7, 9)
        (logps, entropies), (other_logps, other_entropies) = packed(model, one), packed(model, other)
        loss = (weights * (logps + other_logps)).sum() + (weights.flip(0) * (entropies + other_entropies)).sum()
        loss.backward()
        for name, parameter in model.named_parameters():
            torch.testing.assert_close(parameter.grad, expected[0][name] + expected[1][name], rtol=1e-5, atol=1e-4)

    def test_lora(self):
        model = make_model("llama")
        model = get_peft_model(model, LoraConfig(init_lora_weights=False, target_modules=["q_proj", "v_proj"]))
        assert check_packing(model).reason is None
        assert_same(model.eval(), make_batch(SHAPES))

    def test_a_nested_configuration(self):
        kind = transformers.CONFIG_MAPPING["gemma3"]
        sizes = {**{key: SIZES[key] for key in SIZES if key not in ("n_embd", "n_layer", "n_head", "n_inner")}}
        config = kind(
            text_config=sizes,
            vision_config={"hidden_size": 24, "intermediate_size": 16, "num_hidden_layers": 1, "image_size": 28},
        )
        torch.manual_seed(0)
        model = transformers.AutoModelForImageTextToText.from_config(config).eval()
        before = {name: part._attn_implementation for name, part in configurations(config).items()}
        add_fused_lm_head(model, outputs=("log_probs", "entropy"))
        assert_same(model, make_batch(SHAPES))
        assert {name: part._attn_implementation for name, part in configurations(config).items()} == before

    def test_in_half_precision_as_near_as_padding(self):
        model = make_model("llama").bfloat16()
        assert check_packing(model).reason is None
        batch = make_batch(SHAPES)
        with torch.no_grad():
            exact = one_by_one(make_model("llama"), batch)[0]
            padded = model(**batch.inputs).log_probs[:, -batch.columns :]
            errors = [(each.float() - exact).square().mean().sqrt() for each in (padded, packed(model, batch)[0])]
        assert errors[1] < 1.5 * errors[0]

    def test_under_autocast(self):
        model, batch = make_model("llama"), make_batch(SHAPES)
        exact = packed(model, batch)[0]
        with torch.autocast("cpu", torch.bfloat16):
            assert check_packing(model).reason is None
            logps = packed(model, batch)[0]
        assert 0 < (logps - exact).abs().max() < 0.1

    @pytest.mark.parametrize("name", ["llama", "gemma2"])
    def test_dropout_of_the_attention(self, name):
        model, batch = make_model(name, attention_dropout=0.1), make_batch(SHAPES)
        with torch.no_grad():
            exact = packed(model, batch)[0]
            draws = torch.stack([packed(model.train(), batch)[0] for _ in range(20)])
        assert draws.std(0)[exact != 0].min() > 0
        assert (draws.mean(0) - exact).abs().mean() < (draws - exact).abs().mean() / 2

    def test_generation_after_a_pass_is_as_before(self):
        model, batch = make_model("llama"), make_batch(SHAPES)
        options = {"do_sample": False, "max_new_tokens": 8}
        prompts = batch.inputs["input_ids"][:3, : batch.width]
        before = model.generate(prompts, attention_mask=torch.ones_like(prompts), **options)
        gradients(model, packed, batch)
        assert torch.equal(model.generate(prompts, attention_mask=torch.ones_like(prompts), **options), before)

    def test_an_error_in_a_pass_leaves_the_attention_of_the_model(self):
        model, batch = make_model("llama"), make_batch(SHAPES)
        handle = model.model.layers[1].register_forward_pre_hook(lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            packed(model, batch)
        assert model.config._attn_implementation == "sdpa"
        handle.remove()
        logps, _ = packed(model, batch)
        model.model.embed_tokens.weight.register_hook(lambda _: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            logps.sum().backward()
        restore_attention(model)
        assert model.config._attn_implementation == "sdpa"
        assert type(model.config._attn_implementation) is str

    def test_arguments_that_rows_cannot_carry_are_refused(self):
        model, batch = make_model("llama"), make_batch(SHAPES)
        with pytest.raises(TypeError, match="output_router_logits"):
            PackedForward(model, PackedLayout(batch.rows, batch.shape))(**batch.inputs, output_router_logits=True)


def configurations(config):
    return {"": config, **{name: getattr(config, name) for name in config.sub_configs}}
