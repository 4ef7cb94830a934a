"""The same update from fewer positions: packed, padded or with rows skipped, the parameters are GRPOTrainer's."""

import inspect
from types import SimpleNamespace

import pytest
import torch
import transformers
from packaging.version import Version
from peft import PromptEncoderConfig, PromptTuningConfig
from support import tiny
from support.training import SGD, Recorder, assert_same_update, gpt2, is_time, make, moved, train, update_difference
from torch._dynamo.utils import counters
from torch.nn.utils.rnn import pad_sequence
from transformers import (
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen2MoeConfig,
    Qwen2MoeForCausalLM,
    RecurrentGemmaConfig,
    RecurrentGemmaForCausalLM,
    Trainer,
    TrainerCallback,
)
from trl import GRPOTrainer

from trl_a3po import A3POConfig, A3POTrainer
from trl_a3po.update import efficient_update
from trl_a3po.update.layout import PackedLayout
from trl_a3po.update.model_traits import PaddingTraits, has_experts_as_modules
from trl_a3po.update.packed_forward import trl_has_fused_head
from trl_a3po.update.plan import NOTHING, plan_of
from trl_a3po.update.probe import Packing, check_packing
from trl_a3po.update.sampler_correction import SamplerCorrection, sampler_ratio


try:
    from trl.trainer.utils import add_fused_lm_head
except ImportError:  # before TRL 1.15
    add_fused_lm_head = None

needs_fused_head = pytest.mark.skipif(not trl_has_fused_head(), reason="this TRL has no fused head")
pytestmark = pytest.mark.filterwarnings("ignore:You are using 'rollout_func':UserWarning")


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


@pytest.fixture
def padded(monkeypatch):
    """Has no model packed."""
    monkeypatch.setattr(efficient_update, "check_packing", lambda model: Packing("this test pads"))


def train_rollout(model, output_dir, trainer_class=Recorder, arguments=None, **fields):
    """A trainer that is trained on the completions and rewards above."""
    defaults = {
        "max_steps": 3,
        "per_device_train_batch_size": 4,
        "gradient_accumulation_steps": 4,
        "max_completion_length": 12,
    }
    arguments = {"rollout_func": rollout, "reward_funcs": given_reward, **(arguments or {})}
    return train(output_dir, trainer_class, model=model, arguments=arguments, **{**SGD, **defaults, **fields})


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
    **{
        f"{name}, two iterations": {"num_iterations": 2, "max_steps": 4, **fields}
        for name, fields in {
            "KL": {"beta": 0.1},
            "bnpo": {"loss_type": "bnpo"},
            "sequence level": {"importance_sampling_level": "sequence", "loss_type": "grpo"},
            "positive samples alone": {"negative_weight": 0.0, "negative_high_scale": 1.0},
        }.items()
    },
}


@pytest.mark.parametrize("fields", RUNS.values(), ids=RUNS.keys())
def test_the_update_is_the_same_from_fewer_cells(fields, model_dir, tmp_path, request):
    plain = train_rollout(model_dir, tmp_path, **tiny.PLAIN, **fields)
    packed = train_rollout(model_dir, tmp_path, **fields)
    assert (packed._packing.reason is None) == trl_has_fused_head()
    request.getfixturevalue("padded")
    padded = train_rollout(model_dir, tmp_path, **fields)
    for saved in (packed, padded):
        assert update_difference(saved, plain) < 1e-4
    assert len(packed.passes) <= len(padded.passes) == len(plain.passes)
    assert packed.cells <= padded.cells < plain.cells


def test_a_recorder_changes_nothing(model_dir, tmp_path):
    """Rows are regrouped under its eyes: else tests that use it would check another update than the one of users."""
    recorded, alone = (train_rollout(model_dir, tmp_path, trainer_class) for trainer_class in (Recorder, A3POTrainer))
    assert recorded._regroups()
    assert alone._regroups()
    assert_same_update(recorded, alone)
    assert 3 <= len(recorded.batches) <= 3 * 4


@needs_fused_head
def test_few_passes_take_the_place_of_many(model_dir, tmp_path):
    plain = train_rollout(model_dir, tmp_path, **tiny.PLAIN)
    saved = train_rollout(model_dir, tmp_path)
    assert len(plain.passes) == 3 * 4
    assert 3 <= len(saved.passes) == len(saved.batches) < 2 * 3
    (rows, columns), *_ = plain.passes
    assert max(positions for _, positions in saved.passes) <= rows * columns
    of_step = [plan_of(batch) for batch in saved._buffered_inputs]
    assert of_step[0] is NOTHING
    assert of_step[-1].computed > 0  # the last one synchronises the processes
    assert sum(plan.present for plan in of_step) == 4 * rows


@pytest.mark.parametrize("loss_type", ["dapo", "grpo"])
@pytest.mark.parametrize("others", [(4, 1), (1, 16), (3, 7)])
def test_another_process_needs_more_passes_or_has_more_rows_in_one(others, loss_type, model_dir, tmp_path):
    class OneOfSeveral(Recorder):
        def _largest(self, numbers):
            return [max(pair) for pair in zip(numbers, others * (len(numbers) // 2), strict=True)]

    plain = train_rollout(model_dir, tmp_path, loss_type=loss_type, **tiny.PLAIN)
    saved = train_rollout(model_dir, tmp_path, OneOfSeveral, loss_type=loss_type)
    assert update_difference(saved, plain) < 1e-4
    plans = [plan_of(batch) for batch in saved._buffered_inputs]
    assert len({plan.rows for plan in plans if plan.rows}) == 1  # TRL gathers rows
    assert sum(plan.rows > 0 for plan in plans) >= others[0]
    assert all(plan.computed <= plan.present <= plan.rows for plan in plans)


def with_common_start(prompts, trainer):
    """The same, after a start of 16 tokens."""
    made = rollout(prompts, trainer)
    return {**made, "prompt_ids": [[*range(10, 26), *ids] for ids in made["prompt_ids"]]}


@needs_fused_head
@pytest.mark.parametrize("model", ["llama", "gpt2"])
def test_a_common_start_of_all_prompts_is_computed_once_in_a_pass(model, model_dir, tmp_path):
    """But by GPT-2, whose positions are those of columns, once for each prompt."""

    def run(method, output_dir, **fields):
        start = model_dir if model == "llama" else gpt2()
        return train_rollout(start, output_dir, arguments={"rollout_func": method}, **fields)

    plain = run(with_common_start, tmp_path, **tiny.PLAIN)
    saved, without = run(with_common_start, tmp_path), run(rollout, tmp_path)
    assert update_difference(saved, plain) < 1e-4
    added = saved.cells - without.cells
    if model == "llama":
        assert added == 16 * len(saved.passes)
    else:
        assert added > 16 * len(saved.passes)


def long_rollout(prompts, trainer):
    output = rollout(prompts, trainer)
    for name, start in (("completion_ids", [7, 8, 9] * 14), ("logprobs", [-3.0] * 42)):
        output[name] = [[*start, *row] for row in output[name]]
    return output


@needs_fused_head
def test_rows_longer_than_the_context_of_a_rotation_are_padded(tmp_path):
    """Beyond it, the rotation depends on the longest row of a pass."""
    rotation = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0}
    is_new = hasattr(Qwen2Config(), "rope_parameters")
    config = {"max_position_embeddings": 48, "rope_parameters" if is_new else "rope_scaling": rotation}
    directory = tiny.save(tmp_path / "model", **config)
    arguments = {"rollout_func": long_rollout}
    plain = train_rollout(directory, tmp_path, arguments=arguments, **tiny.PLAIN)
    saved = train_rollout(directory, tmp_path, arguments=arguments)
    assert (saved._packing.reason, saved._packing.limit) == (None, 48)
    assert max(rows for rows, _ in saved.passes) > 1  # not packed
    assert update_difference(saved, plain) < 1e-4


@pytest.mark.parametrize("option", ["trim_padding", "skip_zero_advantage"])
def test_each_of_the_two_savings_of_a_loss_alone(option, model_dir, tmp_path):
    plain = train_rollout(model_dir, tmp_path, **tiny.PLAIN)
    saved = train_rollout(model_dir, tmp_path, **{**tiny.PLAIN, option: True})
    assert update_difference(saved, plain) < 1e-4
    assert saved.cells < plain.cells


class OldPasses(Recorder):
    """Also keeps the shapes of the passes for old log-probabilities."""

    def _note_pass(self, module, args, kwargs):
        super()._note_pass(module, args, kwargs)
        if self.is_in_train and not torch.is_grad_enabled():
            self.old_passes = [*getattr(self, "old_passes", []), tuple(kwargs["input_ids"].shape)]


SAVINGS = {
    "packed": {},
    "packed, all rows": {"skip_zero_advantage": False},
    "padded": {},
    "full width": {"trim_padding": False},
}


@pytest.fixture(params=SAVINGS)
def savings(request):
    if request.param == "padded":
        request.getfixturevalue("padded")
    return SAVINGS[request.param]


@needs_fused_head
def test_old_log_probabilities_are_computed_by_the_passes_of_the_loss(savings, model_dir, tmp_path):
    """Rows that are skipped have none."""
    fields = {"num_iterations": 2, "max_steps": 2}
    plain = train_rollout(model_dir, tmp_path, OldPasses, **tiny.PLAIN, **fields)
    saved = train_rollout(model_dir, tmp_path, OldPasses, **fields, **savings)
    assert update_difference(saved, plain) < 1e-4
    assert saved.passes == 2 * saved.old_passes
    assert len(saved.old_passes) <= len(plain.old_passes) == 4
    cells_of = [sum(rows * columns for rows, columns in trainer.old_passes) for trainer in (saved, plain)]
    assert cells_of[0] < cells_of[1]


def old_logps_by_row(trainer):
    """By prompt and completion, the old log-probabilities of rows with an advantage."""
    found = {}
    for batch in trainer.batches:
        for i in batch["advantages"].nonzero().flatten().tolist():
            ids, masks = (
                [batch[f"{part}_{kind}"][i] for part in ("prompt", "completion")] for kind in ("ids", "mask")
            )
            tokens = torch.cat(ids)[torch.cat(masks) == 1]
            found[tuple(tokens.tolist())] = batch["old_per_token_logps"][i][masks[1] == 1]
    return found


@needs_fused_head
def test_old_log_probabilities_are_those_of_trl(savings, model_dir, tmp_path):
    fields = {"num_iterations": 2, "max_steps": 1}
    theirs, ours = (
        old_logps_by_row(train_rollout(model_dir, tmp_path, **options, **fields)) for options in (tiny.PLAIN, savings)
    )
    assert len(theirs) == 8
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5)


@needs_fused_head
def test_the_ratio_of_the_sampler_comes_with_the_old_log_probabilities(savings, model_dir, tmp_path):
    class Sampled(Recorder):
        """As if vLLM had sampled: `rollout` reports log-probabilities."""

        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs)
            self._sampler = SamplerCorrection(self)
            self._sampler.is_trls = True

    fields = {"num_iterations": 2, "max_steps": 2, "vllm_importance_sampling_mode": "token_truncate"}
    trainer = train_rollout(model_dir, tmp_path, Sampled, **fields, **savings)
    args = trainer.args
    assert any((batch["importance_sampling_ratio"] != 1).any() for batch in trainer.batches)
    for batch in trainer.batches:
        mask, is_computed = batch["completion_mask"].bool(), ~batch["entropies"].isnan().any(1)
        expected = sampler_ratio(
            batch["old_per_token_logps"],
            batch["sampling_per_token_logps"],
            mask,
            args.vllm_importance_sampling_mode,
            args.vllm_importance_sampling_clip_min,
            args.vllm_importance_sampling_clip_max,
        ).where(is_computed[:, None], 1.0)
        torch.testing.assert_close(batch["importance_sampling_ratio"], expected)
    first, second, *_ = trainer.state.log_history
    assert "sampling/importance_sampling_ratio/mean" in first
    assert "sampling/importance_sampling_ratio/mean" not in second  # once for each rollout, as in GRPO


def test_lora(model_dir, tmp_path):
    plain = train_rollout(model_dir, tmp_path, arguments=tiny.lora(), **tiny.PLAIN)
    saved = train_rollout(model_dir, tmp_path, arguments=tiny.lora())
    assert moved(plain) == {name for name in plain.start if "lora_" in name}
    assert update_difference(saved, plain) < 1e-4
    assert saved.cells < plain.cells


def test_rows_without_a_gradient_do_not_run(model_dir, tmp_path):
    trainer = train_rollout(model_dir, tmp_path, trim_padding=False, max_steps=1)
    # Of 16 rows in 4 micro-batches half have an advantage.
    assert sum(rows for rows, columns in trainer.passes if columns > 2) == 8
    single = {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 16}
    alone = train_rollout(model_dir, tmp_path, trim_padding=False, max_steps=1, **single)
    assert len(alone.passes) == 16
    assert alone.passes[8:] == [(1, 2)] * 8


@pytest.mark.parametrize(
    "fields",
    [{"beta": 0.1}, {"top_entropy_quantile": 0.5}, {"entropy_coef": 0.01}, {"use_adaptive_entropy": True}],
    ids=str,
)
@pytest.mark.usefixtures("padded")
def test_all_rows_run_where_the_loss_needs_them(fields, model_dir, tmp_path):
    if not all(hasattr(A3POConfig, name) for name in fields):
        pytest.skip("this TRL has no such option")
    trainer = train_rollout(model_dir, tmp_path, max_steps=1, **fields)
    assert [rows for rows, _ in trainer.passes] == [4, 4, 4, 4]


class EveryRow(Recorder):
    def shape_advantages(self, advantages, *, mask, **batch):
        lengths = sorted(mask.sum(1).tolist())
        self.micro_batches = [*getattr(self, "micro_batches", []), lengths]
        return advantages + 1


def test_a_shaping_of_ones_own_sees_every_row_in_the_company_it_has_without_savings(model_dir, tmp_path):
    plain, saved = (train_rollout(model_dir, tmp_path, EveryRow, max_steps=1, **fields) for fields in (tiny.PLAIN, {}))
    assert saved.micro_batches == plain.micro_batches
    assert saved.cells < plain.cells


def recurrent(layers=3):
    """A model whose recurrent layers take padding for tokens."""
    torch.manual_seed(0)
    size = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": layers, "num_attention_heads": 2}
    special = {"eos_token_id": 1, "bos_token_id": 1, "pad_token_id": 0}
    return RecurrentGemmaForCausalLM(
        RecurrentGemmaConfig(
            vocab_size=len(tiny.tokenizer()), head_dim=16, lru_width=32, attention_window_size=64, **size, **special
        )
    )


def recurrent_and_eager():
    """There, the columns of padding also look at what is to their right, and a recurrent layer comes after that."""
    model = recurrent(layers=4)
    model.set_attn_implementation("eager")
    return model


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
        train_rollout(model, tmp_path, arguments={**arguments}, learning_rate=0.3, **fields)
        for fields in (tiny.PLAIN, {})
    )
    assert moved(plain)
    assert update_difference(saved, plain) < 1e-4
    assert saved.cells < plain.cells
    assert saved._packing.reason is None or saved._traits.left_padding


@pytest.mark.skipif(
    Version(transformers.__version__) < Version("5"), reason="it keeps its state from one pass to the next"
)
def test_completions_keep_their_padding_where_the_padding_of_the_prompt_sees_it(tmp_path):
    plain, saved = (
        train_rollout(recurrent_and_eager, tmp_path, learning_rate=0.3, **fields) for fields in (tiny.PLAIN, {})
    )
    assert moved(plain)
    assert update_difference(saved, plain) < 1e-4
    assert saved._traits.right_padding


def dynamically_rotated():
    model = tiny.model(max_position_embeddings=8)
    rope = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0}
    setattr(model.config, "rope_parameters" if hasattr(model.config, "rope_parameters") else "rope_scaling", rope)
    return Qwen2ForCausalLM(model.config)


def test_no_pass_is_shorter_for_a_model_that_remembers_the_longest(tmp_path):
    plain, saved = (train_rollout(dynamically_rotated, tmp_path, max_steps=3, **fields) for fields in (tiny.PLAIN, {}))
    assert moved(plain)
    assert update_difference(saved, plain) < 1e-6
    assert not saved._may_skip


NARROW = {"importance_sampling_level": "sequence", "epsilon": 3e-4, "epsilon_high": 4e-4}


SEVERAL_STEPS = {"gradient_accumulation_steps": 2, "steps_per_generation": 4}


def plans_of(trainer):
    return [plan for batch in trainer._buffered_inputs if (plan := plan_of(batch))]


@needs_fused_head
@pytest.mark.parametrize("level", ["token", "sequence"])
@pytest.mark.parametrize("loads", [{}, {"model_init_kwargs": {"dtype": "bfloat16"}}], ids=["autocast", "bfloat16"])
def test_the_ratio_is_1_until_the_model_changes(loads, level, savings, model_dir, tmp_path):
    """Not to rounding, which is up to 1 % in half precision, but exactly."""
    fields = {**NARROW, **SEVERAL_STEPS, "bf16": True, **loads, "importance_sampling_level": level}
    fields |= {"num_iterations": 2, "max_steps": 4, "learning_rate": 0.0}
    trainer = train_rollout(model_dir, tmp_path, **fields, **savings)
    assert {batch["step"] for batch in trainer.batches} == {0, 1, 2, 3}
    for batch in trainer.batches:
        assert torch.equal(batch["per_token_logps"], batch["old_per_token_logps"])
    assert {entry["clip_ratio/region_mean"] for entry in trainer.state.log_history[:-1]} == {0.0}
    computed = sum(plan.computed for plan in plans_of(trainer))
    assert computed == (16 if "skip_zero_advantage" in savings else 8)


@needs_fused_head
def test_a_narrow_epsilon_in_half_precision_costs_no_gradient(savings, model_dir, tmp_path):
    """The first update is as near to that in float32 as GRPO's is."""

    def first_update(**options):
        fields = {**NARROW, **SEVERAL_STEPS, "loss_type": "grpo", "max_steps": 1}
        return train_rollout(model_dir, tmp_path, **{**tiny.NEUTRAL, **fields, **options})

    exact, theirs = first_update(), first_update(bf16=True)
    ours = first_update(bf16=True, **dict.fromkeys(tiny.PLAIN, True) | savings)
    assert plans_of(ours)
    error = update_difference(theirs, exact)
    assert 0 < error < 0.1
    assert update_difference(ours, exact) < 3 * error


class ReadsTheRollout(Recorder):
    def _generate_and_score_completions(self, inputs):
        rollout = super()._generate_and_score_completions(inputs)
        assert (rollout["old_per_token_logps"] * rollout["completion_mask"]).sum(1).max() < 0  # all rows
        return rollout


@pytest.mark.parametrize(
    ("trainer_class", "options", "fields", "keeps"),
    [
        (Recorder, {"skip_old_logps": False}, {}, True),
        (ReadsTheRollout, {}, {}, True),
        (ReadsTheRollout, {}, {"bf16": False}, False),
        (ReadsTheRollout, {}, {"epsilon": 0.2, "epsilon_high": None}, False),
        (Recorder, {"skip_old_logps": False}, {"gradient_accumulation_steps": 4}, False),  # no old log-probabilities
    ],
)
def test_where_trls_pass_runs_a_narrow_epsilon_keeps_trls_layout(
    trainer_class, options, fields, keeps, model_dir, tmp_path, caplog
):
    fields = {**NARROW, **SEVERAL_STEPS, "bf16": True, **fields}
    with caplog.at_level("INFO", "trl_a3po"):
        ours = train_rollout(model_dir, tmp_path, trainer_class, **fields, **options)
    assert bool(plans_of(ours)) == (not keeps)
    assert caplog.text.count("computes padding and rows of zero advantage, too") == keeps
    plain = train_rollout(model_dir, tmp_path, trainer_class, **fields, **tiny.PLAIN)
    if keeps:
        assert_same_update(ours, plain)  # to the last bit


@needs_fused_head
def test_another_pass_in_the_place_of_the_skipped_one_is_an_error(model_dir, tmp_path):
    trainer = train_rollout(model_dir, tmp_path, max_steps=1, **SEVERAL_STEPS)

    def reference_first(inputs):
        logps = [
            trainer._get_per_token_logps_and_entropies(trainer.model, inputs["ids"], torch.ones_like(inputs["ids"]), 2)
            for _ in range(2)
        ]
        return {"ref_per_token_logps": logps[0][0], "old_per_token_logps": logps[1][0]}

    with pytest.raises(RuntimeError, match=r"runs another pass over the model before .* `skip_old_logps=False`"):
        trainer._sample(reference_first, {"ids": torch.ones(2, 4, dtype=torch.long)}, result_is_final=True)


@pytest.mark.parametrize("own", [None, "this process finds a reason"])
def test_all_processes_ask_whether_the_others_pack(own, model_dir, tmp_path, monkeypatch):
    trainer = train_rollout(model_dir, tmp_path, max_steps=1)
    monkeypatch.setattr(efficient_update, "check_packing", lambda model: Packing(own))
    asked = []
    trainer.accelerator.gather = lambda found: asked.append(found) or torch.cat([found, ~found])
    assert (own or "another process finds") in trainer._agree_on_packing().reason
    assert len(asked) == 1


def test_a_trait_that_another_process_finds_holds_for_all(model_dir, tmp_path, padded):
    trainer = train_rollout(model_dir, tmp_path, max_steps=1)
    assert trainer._traits == PaddingTraits()
    theirs = {2: [False, False], 4: [False, True, False, True]}  # packing, and traits
    trainer.accelerator.gather = lambda own: torch.cat([own, own.new_tensor([theirs[own.shape[1]]])])
    trainer._check_model()
    assert trainer._traits == PaddingTraits(right_padding=True, company=True)
    assert not trainer._trims
    assert not trainer._may_skip


def test_experts_are_modules_before_transformers_5():
    size = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    experts = {"num_experts": 2, "moe_intermediate_size": 8, "shared_expert_intermediate_size": 8}
    mixture = Qwen2MoeForCausalLM(Qwen2MoeConfig(vocab_size=8, num_key_value_heads=2, **size, **experts))
    assert has_experts_as_modules(mixture) == (Version(transformers.__version__) < Version("5"))
    assert not has_experts_as_modules(Qwen2ForCausalLM(Qwen2Config(vocab_size=8, num_key_value_heads=2, **size)))


@pytest.mark.usefixtures("padded")
def test_columns_stay_multiples(model_dir, tmp_path):
    trainer = train_rollout(model_dir, tmp_path, pad_to_multiple_of=8)
    assert {columns % 8 for _, columns in trainer.passes} == {0}


def test_metrics_are_those_of_all_rows_but_the_entropy(model_dir, tmp_path):
    plain, saved = (train_rollout(model_dir, tmp_path, **fields).state.log_history for fields in (tiny.PLAIN, {}))
    assert len(plain) == 4
    for ours, theirs in zip(saved[:-1], plain[:-1], strict=True):
        assert theirs.keys() - ours.keys() == {"a3po/zero/entropy"}
        for name in ours:
            if name == "entropy" or is_time(name):
                continue
            assert ours[name] == pytest.approx(theirs[name], rel=1e-3, abs=1e-5), name
        tokens = [theirs[f"a3po/{p}/fraction"] * theirs[f"a3po/{p}/mean_length"] for p in ("positive", "negative")]
        entropies = [theirs[f"a3po/{p}/entropy"] for p in ("positive", "negative")]
        expected = sum(n * entropy for n, entropy in zip(tokens, entropies, strict=True)) / sum(tokens)
        assert ours["entropy"] == pytest.approx(expected, rel=1e-3)


def test_a_batch_without_any_gradient_changes_nothing(model_dir, tmp_path):
    trainer = train_rollout(model_dir, tmp_path, arguments={"reward_funcs": tiny.equal_reward})
    assert not moved(trainer)
    assert set(trainer.passes) == {(1, 1) if trl_has_fused_head() else (1, 2)}


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # the compiler warns of what it traces itself, and fails where that is an error
def test_a_compiled_model_is_not_compiled_without_end(model_dir, tmp_path, monkeypatch):
    monkeypatch.setenv("ACCELERATE_DYNAMO_BACKEND", "eager")  # which transformers sets, and leaves to other tests
    fields = {"torch_compile": True, "torch_compile_backend": "eager"}
    graphs = []
    for max_steps in (4, 12):
        torch.compiler.reset()
        counters.clear()
        trainer = train_rollout(model_dir, tmp_path, max_steps=max_steps, **fields)
        graphs.append(counters["stats"]["unique_graphs"])
    assert len(set(trainer.passes)) > 12  # as many shapes
    assert graphs[0] == graphs[1] < 12


@needs_fused_head
def test_a_model_that_the_launcher_compiles_is_not_packed(model_dir, tmp_path, monkeypatch):
    assert make(tmp_path, model=model_dir)._packing.reason is None
    monkeypatch.setenv("ACCELERATE_DYNAMO_BACKEND", "EAGER")
    assert "compiled" in make(tmp_path, model=model_dir)._packing.reason


@needs_fused_head
def test_metrics_of_the_sampler_that_are_replaced_leave_no_empty_ones(model_dir, tmp_path):
    trainer = make(tmp_path, model=model_dir)
    trainer._sampler = SimpleNamespace(is_trls=True)
    metrics = trainer._metrics[trainer._mode]
    mean, largest = (f"sampling/sampling_logp_difference/{name}" for name in ("mean", "max"))
    metrics[mean] = [0.5]

    def generate(inputs):
        for name in (mean, largest, "sampling/of_a_user"):
            metrics[name].append(1.0)
        ids = torch.ones(2, 6, dtype=torch.long)
        logps, *_ = trainer._get_per_token_logps_and_entropies(trainer.model, ids, ids, 3)
        return {"old_per_token_logps": logps}

    assert trainer._sample(generate, None, result_is_final=True) == {}
    kept = {name: values for name, values in metrics.items() if "sampling" in name}
    assert kept == {mean: [0.5], "sampling/of_a_user": [1.0]}


# What subclasses and users change


class PassesByPosition(Recorder):
    def _get_per_token_logps_and_entropies(
        self, model, ids, mask, keep, batch_size=None, compute_entropy=False, **kwargs
    ):
        return super()._get_per_token_logps_and_entropies(
            model, ids, mask, keep, batch_size, compute_entropy, **kwargs
        )


class LooksAtAllValues(Recorder):
    def _prepare_inputs(self, generation_batch):
        return {name: value.to(value.device) for name, value in super()._prepare_inputs(generation_batch).items()}

    def compute_loss(self, model, inputs, *args, **kwargs):
        self.shapes = {name: value.shape for name, value in inputs.items()}
        return super().compute_loss(model, inputs, *args, **kwargs)


class PassesByName(Recorder):
    def _maybe_log_save_evaluate(self, *args, **kwargs):
        names = [*inspect.signature(Trainer._maybe_log_save_evaluate).parameters][1:]
        super()._maybe_log_save_evaluate(**dict(zip(names, args, strict=False)), **kwargs)


class GivesOneRewardMore(Recorder):
    def _calculate_rewards(self, *args, **kwargs):
        self.reward_func_names = self.reward_func_names[:2]
        rewards = super()._calculate_rewards(*args, **kwargs)
        self.reward_weights, self.reward_func_names = torch.ones(3), [*self.reward_func_names, "half"]
        return torch.cat([rewards, rewards[:, :1] / 2], dim=1)


@pytest.mark.parametrize("trainer_class", [PassesByPosition, LooksAtAllValues, PassesByName, GivesOneRewardMore])
def test_what_a_subclass_of_grpo_trainer_may_do(trainer_class, model_dir, tmp_path):
    takes = inspect.signature(GRPOTrainer._get_per_token_logps_and_entropies).parameters
    if trainer_class is PassesByPosition and "compute_entropy" not in takes:
        with pytest.raises(TypeError, match=r"takes arguments after `batch_size` by name only\."):
            train_rollout(model_dir, tmp_path, trainer_class)
        return
    arguments = {"reward_funcs": [given_reward] * 2} if trainer_class is GivesOneRewardMore else {}
    plain, saved = (
        train_rollout(model_dir, tmp_path, trainer_class, arguments=arguments, **fields, **SEVERAL_STEPS)
        for fields in (tiny.PLAIN, {})
    )
    assert update_difference(saved, plain) < 1e-4
    assert saved.cells < plain.cells


class AnotherReference(A3POTrainer):
    """Its reference is of another family than its policy."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.ref_model = gpt2().eval()
        add_fused_lm_head(self.ref_model, outputs=("log_probs", "entropy"))


@needs_fused_head
def test_a_reference_that_was_not_checked_is_computed_as_trl_does(model_dir, tmp_path):
    fields = {"beta": 0.2, "max_steps": 2}
    plain = train_rollout(model_dir, tmp_path, AnotherReference, **tiny.PLAIN, **fields)
    assert update_difference(train_rollout(model_dir, tmp_path, AnotherReference, **fields), plain) < 1e-4


def test_an_adapter_that_looks_for_tokens_in_each_row_is_not_packed():
    model = tiny.model()
    model.peft_config = {"default": SimpleNamespace(is_prompt_learning=False, alora_invocation_tokens=[13])}
    reason = check_packing(model).reason
    assert reason is not None
    assert not trl_has_fused_head() or "looks for tokens" in reason


class LengthBonus(A3POTrainer):
    """Also gives an advantage to completions that GRPO gives none."""

    def _bonus(self, inputs):
        return {**inputs, "advantages": inputs["advantages"] + 0.01 * inputs["completion_mask"].sum(1)}


class BonusInTheLoss(LengthBonus):
    def _compute_loss(self, model, inputs):
        return super()._compute_loss(model, self._bonus(inputs))


class BonusInPlace(LengthBonus):
    def _compute_loss(self, model, inputs):
        if not hasattr(inputs["advantages"], "has_bonus"):  # once, for all iterations
            inputs["advantages"].copy_(self._bonus(inputs)["advantages"])
            inputs["advantages"].has_bonus = True
        return super()._compute_loss(model, inputs)


class BonusBefore(LengthBonus):
    def _prepare_inputs(self, generation_batch):
        inputs = self._bonus(super()._prepare_inputs(generation_batch))
        assert inputs["completion_mask"].sum(1).max() > 0  # no micro-batch is empty
        return inputs


class BonusAndShaping(BonusInTheLoss):
    def shape_advantages(self, advantages, **batch):
        return super().shape_advantages(advantages, **batch) / 2


@pytest.mark.parametrize("trainer_class", [BonusInTheLoss, BonusInPlace, BonusBefore, BonusAndShaping])
@pytest.mark.parametrize("fields", [{}, {"num_iterations": 2, "max_steps": 4}], ids=str)
def test_rows_that_get_an_advantage_late_are_computed(trainer_class, fields, model_dir, tmp_path):
    plain = train_rollout(model_dir, tmp_path, trainer_class, **tiny.PLAIN, **fields)
    assert update_difference(train_rollout(model_dir, tmp_path, trainer_class, **fields), plain) < 1e-4


def test_advantages_that_a_method_on_the_instance_changes(model_dir, tmp_path):
    def run(**fields):
        fields = {"num_iterations": 2, "max_steps": 4, "max_completion_length": 12, **SGD, **fields}
        arguments = {"rollout_func": rollout}
        trainer = make(tmp_path, model=model_dir, reward_funcs=given_reward, arguments=arguments, **fields)
        generate = trainer._generate_and_score_completions

        def with_bonus(inputs):
            inputs = generate(inputs)
            return {**inputs, "advantages": inputs["advantages"] + 0.3}

        trainer._generate_and_score_completions = with_bonus
        trainer.train()
        return trainer

    assert update_difference(run(), run(**tiny.PLAIN)) < 1e-4


class ChangesAdvantages(TrainerCallback):
    """Changes the rollout between two iterations over it."""

    def __init__(self, change):
        self.change = change

    def on_step_end(self, args, state, control, **kwargs):
        for micro_batch in self.trainer._buffered_inputs:
            micro_batch["advantages"] = self.change(micro_batch["advantages"])


def train_with_changes(model_dir, output_dir, change, method=rollout, **fields):
    callback = ChangesAdvantages(change)
    arguments = {"rollout_func": method, "callbacks": [callback]}
    fields = {"num_iterations": 2, "max_steps": 4, "max_completion_length": 12, **SGD, **fields}
    trainer = make(output_dir, model=model_dir, reward_funcs=given_reward, arguments=arguments, **fields)
    callback.trainer = trainer
    trainer.train()
    return trainer


@needs_fused_head
def test_advantages_that_a_callback_gives_are_refused_where_they_need_what_was_not_computed(model_dir, tmp_path):
    with pytest.raises(RuntimeError, match="were changed, while a rollout was in use"):
        train_with_changes(model_dir, tmp_path, lambda advantages: advantages + 0.1)


@pytest.mark.parametrize(
    ("change", "fields"),
    [
        (lambda advantages: 1.5 * advantages, {}),
        (lambda advantages: advantages + 0.1, {"skip_zero_advantage": False}),
        (lambda advantages: advantages + 0.1, {"skip_old_logps": False}),
    ],
)
def test_advantages_that_a_callback_changes_otherwise(change, fields, model_dir, tmp_path):
    plain = train_with_changes(model_dir, tmp_path, change, **tiny.PLAIN)
    assert update_difference(train_with_changes(model_dir, tmp_path, change, **fields), plain) < 1e-4


def rollout_with_skipped_rows_that_are_wide(prompts, trainer):
    made = rollout(prompts, trainer)
    is_skipped = [i // trainer.num_generations % 2 == 0 for i in range(len(prompts))]
    ids = [[*range(10, 10 + 30 * wide), *row] for wide, row in zip(is_skipped, made["prompt_ids"], strict=True)]
    return {**made, "prompt_ids": ids}


@needs_fused_head
@pytest.mark.usefixtures("padded")
def test_the_layout_stays_where_a_callback_changes_advantages(model_dir, tmp_path):
    """Rows that were skipped would make the others wider."""
    fields = {**NARROW, "bf16": True, "learning_rate": 0.0, "method": rollout_with_skipped_rows_that_are_wide}
    trainer = train_with_changes(model_dir, tmp_path, lambda advantages: 1.5 * advantages, **fields)
    assert sum(plan.computed for plan in plans_of(trainer)) < sum(plan.present for plan in plans_of(trainer))
    assert {entry["clip_ratio/region_mean"] for entry in trainer.state.log_history[:-1]} == {0.0}


class OwnPassBefore(A3POTrainer):
    """Adds a loss on rows of its own."""

    def _compute_loss(self, model, inputs):
        input_ids = torch.arange(5, 17).view(2, 6)
        own = model(input_ids=input_ids, labels=input_ids).loss
        return super()._compute_loss(model, inputs) + 0.1 * own


@needs_fused_head
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_a_pass_of_a_subclass_before_the_packed_one_is_run_again_as_it_was(attention, model_dir, tmp_path):
    fields = {"gradient_checkpointing": True, "model_init_kwargs": {"attn_implementation": attention}}
    plain = train_rollout(model_dir, tmp_path, OwnPassBefore, **tiny.PLAIN, **fields)
    ours = train_rollout(model_dir, tmp_path, OwnPassBefore, **fields)
    assert ours._packing.reason is None
    assert update_difference(ours, plain) < 1e-4


def rollout_that_asks_the_model(prompts, trainer):
    """Its log-probabilities are those of the policy."""
    output = rollout(prompts, trainer)
    tokens = [torch.tensor(ids) for ids in output["completion_ids"]]
    completions = pad_sequence(tokens, batch_first=True)
    input_ids = torch.cat([torch.full((len(tokens), 1), 5), completions], dim=1)
    with torch.no_grad():
        logps = trainer._get_per_token_logps_and_entropies(
            trainer.model, input_ids, (input_ids != 0).long(), completions.shape[1]
        )[0]
    assert (logps < 0).any()
    output["logprobs"] = [row[: len(ids)].tolist() for row, ids in zip(logps, tokens, strict=True)]
    return output


def test_log_probabilities_that_a_rollout_function_asks_for_are_computed(model_dir, tmp_path):
    arguments = {"rollout_func": rollout_that_asks_the_model}
    fields = {"arguments": arguments, "num_iterations": 2, "max_steps": 4}
    plain = train_rollout(model_dir, tmp_path, **tiny.PLAIN, **fields)
    assert update_difference(train_rollout(model_dir, tmp_path, **fields), plain) < 1e-4


class RowByRow(A3POTrainer):
    def _get_per_token_logps_and_entropies(self, model, input_ids, attention_mask, *args, **kwargs):
        for row in range(len(input_ids)):
            output = super()._get_per_token_logps_and_entropies(
                model, input_ids[row : row + 1], attention_mask[row : row + 1], *args, **kwargs
            )
        return output


class OwnLogps(A3POTrainer):
    def _get_per_token_logps_and_entropies(self, model, input_ids, attention_mask, logits_to_keep, *args, **kwargs):
        logits = model(input_ids=input_ids, attention_mask=attention_mask).logits[:, -logits_to_keep - 1 : -1]
        logps = logits.log_softmax(-1)
        taken = logps.gather(-1, input_ids[:, -logits_to_keep:, None]).squeeze(-1)
        entropies = -(logps.exp() * logps).sum(-1)
        return (taken, entropies, None)[: 3 if "compute_aux_loss" in kwargs or trl_has_fused_head() else 2]


@pytest.mark.parametrize(
    ("trainer_class", "message"),
    [(RowByRow, "Pass all rows and columns at once"), (OwnLogps, "did not call `super\\(\\)`.*not shaped")],
)
def test_overrides_that_would_train_something_else_are_refused(trainer_class, message, model_dir, tmp_path):
    with pytest.raises((ValueError, RuntimeError), match=message):
        train_rollout(model_dir, tmp_path, trainer_class)


@needs_fused_head
@pytest.mark.parametrize("error", [KeyboardInterrupt, torch.OutOfMemoryError])
def test_the_model_has_its_own_attention_after_an_error_in_a_backward_pass(error, model_dir, tmp_path):
    trainer = make(
        tmp_path,
        model=model_dir,
        reward_funcs=given_reward,
        arguments={"rollout_func": rollout},
        max_completion_length=12,
        **SGD,
    )

    def interrupt(gradient):
        raise error

    handle = trainer.model.get_input_embeddings().weight.register_hook(interrupt)
    with pytest.raises(error):
        trainer.train()
    handle.remove()
    trainer.model.eval()
    trainer.model.generate(torch.tensor([[5, 6, 7]]), max_new_tokens=2)
    trainer.train()
    assert moved(trainer)


@needs_fused_head
@pytest.mark.parametrize("checkpointing", [False, True])
def test_the_masks_of_attention_are_not_kept_with_the_rollout(checkpointing, tmp_path):
    """Of long prompts they would be the largest thing in memory. Checkpointing makes them anew, backwards."""
    fields = {"num_iterations": 2, "max_steps": 1, "gradient_checkpointing": checkpointing}
    trainer = train_rollout(tiny.model, tmp_path, **fields)
    layouts = [plan.positions for plan in plans_of(trainer) if plan.rows]
    assert all(isinstance(layout, PackedLayout) for layout in layouts)
    assert not all(block.is_causal for layout in layouts for block in layout.blocks)  # some have a mask
    assert [layout.masks for layout in layouts] == [{}] * len(layouts)
