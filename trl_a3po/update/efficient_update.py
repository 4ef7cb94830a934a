"""[`EfficientUpdateGRPOTrainer`]: TRL's update without padding, repeated prompts and rows without a gradient."""

import functools
import inspect
import logging
import math
from collections.abc import Callable, Iterator
from dataclasses import astuple
from typing import Any, cast

import torch
import trl
from accelerate.utils import DynamoBackend
from torch import Tensor
from torch.distributed.fsdp import FSDPModule
from transformers import ProcessorMixin
from trl import GRPOTrainer
from trl.models.utils import disable_gradient_checkpointing

from ..a3po_config import A3POConfig
from .attention import restore_attention
from .layout import PackedLayout, RowShape, row_shapes
from .loss_scope import LossScope, check_advantages
from .micro_batches import (
    Extent,
    Forward,
    by_length,
    extent_of,
    fill_up,
    gather_parts,
    loss_mask,
    merge_rows,
    row_lengths,
    run_extent,
    run_in_order,
    take_rows,
)
from .model_traits import (
    PaddingTraits,
    config_of,
    configured_traits,
    has_experts_as_modules,
    multiplies_in_tf32,
    never_alone,
    padding_traits,
    remembers_longest_row,
    text_config,
)
from .packed_forward import PackedForward, trl_has_fused_head
from .plan import NOTHING, Plan, give_plan, in_fewest, plan_of
from .probe import Packing, check_packing
from .sampler_correction import MISMATCH_METRICS, SamplerCorrection


logger = logging.getLogger(__name__)

# An epsilon that rounding in half precision does not reach.
_ROUNDED_RATIO = 0.1

# Means over rows, and sums over tokens with one denominator for a whole optimizer step: the loss is the same for any
# grouping of rows. The denominator of BNPO is the number of tokens in the micro-batch.
_MEANS_OVER_ROWS = ("grpo", "sapo", "dr_grpo", "luspo")
_SUMS_OVER_TOKENS = ("dapo", "cispo", "vespo")

_IMAGE_COLUMNS = {"image", "images"}  # of datasets, as TRL reads them
# The modules whose methods the trainer is made of. Not `trl.experimental`: its trainers change the loss.
_OURS = ("trl_a3po.", "trl.trainer.", "trl.extras.", "transformers.")


class EfficientUpdateGRPOTrainer(GRPOTrainer):
    """
    The part of [`A3POTrainer`] that saves work: it computes the update of [`~trl.GRPOTrainer`] from fewer positions.

    With `trim_padding`, every pass over the model skips padding and computes the prompt of a group once. Rows are
    packed one after another. If the loss is the same for any grouping, the rows of an optimizer step are regrouped so
    that those of one prompt are together, in as few micro-batches as have room for them; the others run nothing. A
    model that cannot be packed gets padded rows of similar length instead. With `skip_zero_advantage`, the passes of
    the loss skip rows that cannot have a gradient. All processes run the same number of passes, because they take part
    in the same collective operations.

    A subclass answers two questions: [`~EfficientUpdateGRPOTrainer._signs_without_gradient`] (which rows may be
    skipped?) and [`~EfficientUpdateGRPOTrainer._before_loss_reads`] (which advantages does the loss read?).
    """

    args: A3POConfig
    model: torch.nn.Module
    num_generations: int

    # Whether a step was trained, and with TRL's loss: that of a subclass may not call it.
    _has_trained: bool = False
    _loss_ran: bool = False
    # The scope of the running call of TRL's loss, or of a pass for old log-probabilities that takes its layout.
    _loss_scope: LossScope | None = None
    # Whether TRL's pass for `old_per_token_logps` comes next and is skipped; what it returned in the last rollout;
    # whether the new rollout does without it.
    _skips_next_pass: bool = False
    _placeholder: Tensor | None = None
    _replaces_old_pass: bool = False
    # Whether a rollout kept TRL's layout, see `_may_clip_rounding`.
    _layout_stays: bool = False

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self._multiple = int(self.pad_to_multiple_of or 1)
        columns = getattr(self.train_dataset, "column_names", None) or ()  # a stream may not know them
        # Multimodal models have a processor also where they train on text only.
        self._may_have_images = isinstance(self.processing_class, ProcessorMixin)
        self._has_images = self._may_have_images and not _IMAGE_COLUMNS.isdisjoint(columns)
        suited = not (
            self._has_images
            # If a process has fewer tokens than the others, more of its experts have no gradient, and DDP waits for
            # them.
            or (self.accelerator.num_processes > 1 and has_experts_as_modules(self.model))
        )
        # The scale of NEFTune's noise depends on the padded width.
        self._trims = self.args.trim_padding and suited and not self.args.neftune_noise_alpha
        # A pass without rows is short.
        remembers = remembers_longest_row(text_config(self.model))
        self._may_skip = self.args.skip_zero_advantage and suited and not remembers
        self._may_skip_old_logps = self.args.skip_old_logps and suited and trl_has_fused_head()
        corrects = self.args.use_vllm and self.args.vllm_importance_sampling_correction
        self._sampler = SamplerCorrection(self) if corrects else None
        self._clips_rounding = self._may_clip_rounding()
        # The checks of the model hold for the reference that TRL made of it too, but for no other model.
        self._checked_configs = [config_of(model) for model in (self.model, self.ref_model) if model is not None]
        self._traits: PaddingTraits = configured_traits(self.model)
        self._packing = Packing("it was not checked")
        # A sharded model cannot run before training begins. One that is still on the CPU would run other kernels.
        is_placed = next(self.model.parameters()).device.type == self.accelerator.device.type
        self._checks_model = self.is_fsdp_enabled or self.is_deepspeed_enabled or not is_placed
        if not self._checks_model:
            self._check_model()

    @property
    def _trl_runs_old_pass(self) -> bool:
        """Whether GRPOTrainer runs a pass for `old_per_token_logps` after generation."""
        return self._sampler is not None or not self.args.trains_aligned

    def _may_clip_rounding(self) -> bool:
        """
        Whether the loss may clip rounding in half precision, if its layout is not that of the old log-probabilities.

        In one layout, the importance ratios are exactly 1 until the model changes. In another layout they differ by up
        to about 1 %. So a rollout with TRL's old log-probabilities keeps TRL's layout.
        """
        is_mixed = self.accelerator.mixed_precision != "no" or multiplies_in_tf32()
        is_half = is_mixed or self.model.dtype in (torch.bfloat16, torch.float16)
        epsilons = [each for each in (self.args.epsilon, self.args.epsilon_high) if each is not None]
        return self._trl_runs_old_pass and is_half and min(epsilons) < _ROUNDED_RATIO

    def _say_that_layout_stays(self) -> None:
        if not self._layout_stays:
            logger.info(
                "The update computes padding and rows of zero advantage, too: TRL computed the old log-probabilities, "
                "and in another layout the clipping would act on rounding. Train in float32, or with an `epsilon` of "
                "%g or more.",
                _ROUNDED_RATIO,
            )
        self._layout_stays = True

    def _check_model(self) -> None:
        """Runs the model on made-up rows, and turns off savings that are not exact. All processes must call it."""
        self._checks_model = False
        if self._trims:
            self._packing = self._agree_on_packing()
        if self._packing.reason is None and not self.args.dynamic_sampling:
            return  # only attention, which depends only on the tokens of a row
        if self._trims or self._may_skip or self.args.dynamic_sampling:
            # Numbers may differ between processes, and so may the traits. Savings have to be the same.
            found = astuple(padding_traits(self.model, self.accelerator.autocast))
            traits = torch.tensor([found], device=self.accelerator.device)
            self._traits = PaddingTraits(*self.accelerator.gather(traits).any(0).tolist())
        if self._packing.reason is not None:
            self._trims &= not (self._traits.right_padding or self._traits.company)
            self._may_skip &= not self._traits.company

    def _agree_on_packing(self) -> Packing:
        # Accelerate's launcher can compile, too.
        if self.args.torch_compile or self.accelerator.state.dynamo_plugin.backend != DynamoBackend.NO:
            return Packing("a compiled model would be compiled again for every layout")
        if getattr(self, "aux_loss_enabled", False):
            return Packing("the router loss counts all positions")
        with self.accelerator.autocast():
            packing = check_packing(self.model)
        # Numbers may differ between processes, and so may the decision.
        found = torch.tensor([[packing.reason is None, packing.by_column]], device=self.accelerator.device)
        all_agree = bool((self.accelerator.gather(found) == found).all())  # all processes take part
        if packing.reason is None and not all_agree:
            packing = Packing("another process finds that it cannot be packed, or only in another way")
        if packing.reason is not None:
            logger.info("The rows of an update are padded, not packed: %s.", packing.reason)
        return packing

    def _signs_without_gradient(self) -> frozenset[int]:
        """
        The signs of advantages (-1, 0 or 1) whose completions have no gradient at this step.

        An empty set means that every row matters, and that it matters which rows share a micro-batch. Then rows are
        neither skipped nor regrouped.
        """
        return frozenset({0})

    def _before_loss_reads(self, scope: LossScope, per_token_logps: Tensor, entropies: Tensor) -> None:
        """
        Called in each loss after the forward pass, before TRL reads `scope.inputs`.

        Args:
            scope ([`LossScope`]): The method may change its `inputs`, but not the tensors in them.
            per_token_logps (`torch.Tensor` of shape `(B, T)`): Log-probabilities; 0 in rows that are skipped.
            entropies (`torch.Tensor` of shape `(B, T)`): Entropies; NaN in rows that are skipped.
        """

    @property
    def _loss_looks_at_all_rows(self) -> bool:
        """Whether the loss depends on rows of zero advantage, or on which rows share a micro-batch."""
        return (
            self.top_entropy_quantile < 1.0
            or getattr(self, "_entropy_bonus_enabled", False)  # since TRL 1.8
            or getattr(self, "aux_loss_enabled", False)
        )

    def _skippable_signs(self) -> frozenset[int]:
        """The signs of advantages whose completions are skipped at this step."""
        skips = self._may_skip and self.beta == 0.0 and not self._loss_looks_at_all_rows
        return self._signs_without_gradient() if skips else frozenset()

    def _has_gradient(self, inputs: dict[str, Any]) -> Tensor:
        """(B,) whether the loss can have a gradient in each row."""
        return _has_other_sign(inputs, self._signs_without_gradient())

    def _regroups(self) -> bool:
        """Whether the rows of an optimizer step may change their micro-batches."""
        return (
            self.loss_type in (*_MEANS_OVER_ROWS, *_SUMS_OVER_TOKENS)
            and not self._loss_looks_at_all_rows
            and bool(self._signs_without_gradient())
            and self._loss_is_trls()  # a subclass may take a mean over its micro-batch
        )

    def _loss_is_trls(self) -> bool:
        """Whether nobody changes the loss, or what it reads."""
        return not self._is_changed("_prepare_inputs", "_compute_loss", "compute_loss")

    def _is_changed(self, *methods: str) -> bool:
        """Whether anything else than this package and TRL's trainers defines one of these methods of the trainer."""
        bases = type(self).__mro__
        places = [vars(each) for each in (self, *bases[: bases.index(GRPOTrainer) + 1])]
        found = [place[method] for place in places for method in methods if method in place]
        # By the modules in which the code stands, also below decorators: GRPOTrainer itself may be patched.
        return not all(_module_of(layer).startswith(_OURS) for method in found for layer in _layers(method))

    def _prepare_inputs(self, generation_batch):
        if self._checks_model:
            self._check_model()
            for module in self.model.modules():
                if isinstance(module, FSDPModule):
                    module.reshard()  # as after a backward pass: TRL sends vLLM sharded parameters
        rollout, self._replaces_old_pass = self._buffered_inputs, False
        inputs = super()._prepare_inputs(generation_batch)
        if self._buffered_inputs is rollout or not (self._trims or self._may_skip):
            return inputs  # a reused rollout, or an evaluation with batches of the needed width
        if self._may_have_images and self._any_images(self._buffered_inputs):
            return inputs
        if self._clips_rounding and "old_per_token_logps" in inputs:
            self._say_that_layout_stays()
            return inputs
        self._buffered_inputs = self._plan_update(self._buffered_inputs)
        if self._replaces_old_pass and not self.args.trains_aligned:
            self._add_old_logps(self._buffered_inputs)
        return self._buffered_inputs[self._step % self.args.steps_per_generation]

    def _any_images(self, micro_batches: list[dict[str, Any]]) -> bool:
        """Whether the rollout of any process has images. They belong to columns, and cannot be split by rows."""
        return self._largest([int("num_images" in micro_batches[0])]) == [1]

    def training_step(self, *args, **kwargs):
        self._has_trained = True
        try:
            return super().training_step(*args, **kwargs)
        except BaseException:
            restore_attention(self.model)  # the backward pass of a packed row may be what was interrupted
            raise

    def _plan_update(self, micro_batches: list[dict[str, Any]]) -> list[dict[str, Any]]:
        check_advantages(micro_batches[0]["advantages"])
        regroups, skipped = self._regroups(), self._skippable_signs()
        if not self.args.trains_aligned:
            skipped &= {0}  # a subclass may raise a weight of 0 before the rollout is used up
        # The largest number of micro-batches that never span two optimizer steps, whichever period is longer.
        window = math.gcd(len(micro_batches), self.args.gradient_accumulation_steps) if regroups else 1
        rollout = {key: merge_rows([batch[key] for batch in micro_batches]) for key in micro_batches[0]}
        width = rollout["prompt_ids"].shape[1] + rollout["completion_ids"].shape[1]
        shapes = self._row_shapes(rollout["prompt_ids"], rollout["prompt_mask"], rollout["completion_mask"])
        lengths = self._lengths(rollout["prompt_mask"], rollout["completion_mask"]) if shapes is None else []
        live = [True] * len(rollout["prompt_ids"])
        if skipped:
            live = _has_other_sign(rollout, skipped).tolist()

        size = len(micro_batches[0]["prompt_ids"])
        rows_of_step = window * size
        parts = [slice(start, start + rows_of_step) for start in range(0, len(live), rows_of_step)]
        if shapes is None:
            shared = [by_length(lengths[part], live[part], window, self._multiple) for part in parts]
        else:
            least = window if self.is_deepspeed_enabled else 1  # its engine takes part in each backward pass
            group = self.num_generations
            shared = [in_fewest(shapes[part], live[part], size * width, group, least, window) for part in parts]
        found = self._largest([number for each in shared for number in (len(each), max(map(len, each)))])
        empty = {key: take_rows(value, []) for key, value in rollout.items()}
        give_plan(empty, NOTHING)
        planned = []
        for part, of_step, count, most in zip(parts, shared, found[::2], found[1::2], strict=True):
            of_step = [[]] * (count - len(of_step)) + of_step  # other processes need more
            # Micro-batches without rows come first: the last pass of a step synchronises the processes.
            planned += [dict(empty) for _ in range(window - count)]
            most = max(most, math.ceil(rows_of_step / count))  # `fill_up` adds rows up to the average
            # The loss is divided by the number of micro-batches, and some losses by the number of their rows.
            loss_scale = most / size if self.loss_type in _MEANS_OVER_ROWS else 1.0
            for computed, numbers in zip(of_step, fill_up(of_step, rows_of_step), strict=True):
                rows = [part.start + number for number in numbers]
                batch = {key: take_rows(value, rows) for key, value in rollout.items()}
                positions_of = self._positions_of(rows, lengths, shapes, most, batch)
                plan = Plan(
                    computed=len(computed),
                    present=len(rows),
                    rows=most,
                    positions_of=positions_of,
                    skipped_signs=skipped,
                    advantages=batch["advantages"],
                    loss_scale=loss_scale,
                )
                give_plan(batch, plan)
                planned.append(batch)
        return planned

    def _largest(self, numbers: list[int]) -> list[int]:
        """The largest of all processes, for each number."""
        if self.accelerator.num_processes == 1:
            return numbers
        every = self.accelerator.gather(torch.tensor([numbers], device=self.accelerator.device))
        return every.amax(0).tolist()

    def _positions_of(self, rows, lengths, shapes, most_rows, batch) -> Callable[[int], Extent | PackedLayout]:
        if shapes is None:
            return lambda count: extent_of([lengths[row] for row in rows[:count]], self._multiple)
        shape = most_rows, batch["prompt_ids"].shape[1], batch["completion_ids"].shape[1]
        return lambda count: self._layout([shapes[row] for row in rows[:count]], shape)

    def _row_shapes(self, prompt_ids: Tensor, prompt_mask: Tensor, completion_mask: Tensor) -> list[RowShape] | None:
        """Lengths and prompts of rows that are packed; `None` if they are padded."""
        width = prompt_mask.shape[1] + completion_mask.shape[1]
        if not self._trims or self._packing.reason is not None or width > (self._packing.limit or math.inf):
            return None
        return row_shapes(prompt_ids, prompt_mask, completion_mask, self._packing.by_column)

    def _layout(self, shapes: list[RowShape], shape: tuple[int, int, int]) -> PackedLayout:
        return PackedLayout(shapes, shape, self._packing.by_column, self.accelerator.device)

    def _lengths(self, prompt_mask: Tensor, completion_mask: Tensor) -> list[tuple[int, int]]:
        if not self._trims or self._packing.reason is None:  # the second: they are too wide to be packed (rare)
            return [(prompt_mask.shape[1], completion_mask.shape[1])] * len(prompt_mask)
        keeps_prompt = self._traits.left_padding
        return row_lengths(torch.ones_like(prompt_mask) if keeps_prompt else prompt_mask, completion_mask)

    def _compute_loss(self, model, inputs):
        self._loss_ran |= self.is_in_train and self.model.training
        if (plan := plan_of(inputs)) is not None and not plan.rows:
            return torch.zeros((), device=self.accelerator.device, requires_grad=True)
        self._loss_scope = scope = LossScope(self, inputs)
        try:
            loss = super()._compute_loss(model, scope.inputs)
            if scope.waits_for_logps:
                raise RuntimeError(
                    f"`{type(self).__name__}._get_per_token_logps_and_entropies` did not call `super()`, so the loss "
                    "read advantages that are not shaped. Call it with the arguments that you get, and change what it "
                    "returns. If you replaced the model of this trainer, make a new trainer."
                )
        finally:
            scope.end()
            self._loss_scope = None
        scale = 1.0 if scope.plan is None else scope.plan.loss_scale
        return loss if scale == 1.0 else loss * scale

    def _get_per_token_logps_and_entropies(
        self, model, input_ids, attention_mask, logits_to_keep, batch_size=None, *positional, **kwargs
    ):
        if positional:
            parameters = inspect.signature(GRPOTrainer._get_per_token_logps_and_entropies).parameters.values()
            names = [each.name for each in parameters if each.kind is each.POSITIONAL_OR_KEYWORD]
            names = names[names.index("batch_size") + 1 :] if "batch_size" in names else []  # not in TRL 1.14
            if len(positional) > len(names):
                raise TypeError(
                    f"`_get_per_token_logps_and_entropies` of TRL {trl.__version__} takes arguments after "
                    "`batch_size` by name only."
                )
            kwargs |= zip(names, positional, strict=False)
        if self._skips_next_pass:
            self._skips_next_pass = False
            self._placeholder = input_ids.new_zeros(len(input_ids), logits_to_keep, dtype=torch.float32)
            return self._placeholder, None, None
        self._gather_trained_head(model)
        compute = functools.partial(super()._get_per_token_logps_and_entropies, **kwargs)
        config = config_of(model)
        if not any(config is checked for checked in self._checked_configs):
            return compute(model, input_ids, attention_mask, logits_to_keep, batch_size=batch_size)
        scope = self._loss_scope
        if scope is None or not scope.waits_for_logps:
            has_images = any(isinstance(value, Tensor) for value in kwargs.values())
            # These may be old log-probabilities, of a rollout that keeps TRL's layout.
            keeps = self._clips_rounding and not self._replaces_old_pass and model is not self.ref_model
            saves = self._trims and not has_images and not keeps
            run = functools.partial(self._run_all, compute) if saves else compute
            return run(model, input_ids, attention_mask, logits_to_keep, batch_size=batch_size)
        scope.waits_for_logps = False
        if scope.plan is None:
            output = compute(model, input_ids, attention_mask, logits_to_keep, batch_size=batch_size)
        else:
            output = self._run_planned(compute, model, input_ids, attention_mask, logits_to_keep, scope)
        if not scope.is_loss:
            return output
        if self._sampler is not None and "importance_sampling_ratio" not in scope.inputs:
            is_computed = torch.arange(len(input_ids), device=input_ids.device) < scope.computed
            ratio = self._sampler.correct(scope.inputs, output[0], is_computed, self._mode)
            scope.inputs["importance_sampling_ratio"] = ratio
        self._before_loss_reads(scope, per_token_logps=output[0], entropies=output[1])
        return output

    def _gather_trained_head(self, model: Any) -> None:
        """
        Puts together the weight of a trained `lm_head` that FSDP2 shards by itself, as it does for PEFT's
        `modules_to_save`.

        TRL reads the weight without running the module. Of a weight that is still sharded, as it is after the first
        backward pass of a step, each process would keep its own gradient instead of the mean over processes.
        """
        if not (self.is_fsdp_enabled and torch.is_grad_enabled()):
            return
        head = self.accelerator.unwrap_model(model).get_output_embeddings()
        if isinstance(head, FSDPModule) and cast(Any, head).weight.requires_grad:
            head.unshard()

    def _run_planned(self, compute, model, input_ids, attention_mask, logits_to_keep, scope: LossScope):
        """Computes the planned rows. The results have the shape of all rows of the loss."""
        plan = cast(Plan, scope.plan)
        planned = [scope.inputs[f"{name}_ids"].shape[1] for name in ("prompt", "completion")]
        if input_ids.shape != (plan.rows, sum(planned)) or logits_to_keep != planned[1]:
            raise ValueError(
                f"`{type(self).__name__}._get_per_token_logps_and_entropies` passed `input_ids` of shape "
                f"{tuple(input_ids.shape)} and `logits_to_keep={logits_to_keep}` to `super()`; it got "
                f"{(plan.rows, sum(planned))} and {planned[1]}. Pass all rows and columns at once, or set "
                "`trim_padding=False`, `skip_zero_advantage=False` and `skip_old_logps=False`."
            )
        positions = plan.positions
        if not plan.skipped_signs <= self._skippable_signs() or scope.advantages_changed:
            # A row that was skipped in the plan may have a gradient now: a subclass may change the advantages before
            # the loss, a callback those of a rollout that is in use, or a hook was assigned in the meantime.
            if plan.lacks_old_logps:
                self._check_old_logps(scope, any_row=0 in plan.skipped_signs - self._skippable_signs())
            else:
                scope.computed, positions = plan.present, plan.positions_of(plan.present)
        if isinstance(positions, PackedLayout):
            output = compute(PackedForward(model, positions), input_ids, attention_mask, logits_to_keep)
        else:
            forward = self._forward(compute, model, self.args.per_device_train_batch_size)
            output = run_extent(forward, input_ids, attention_mask, logits_to_keep, positions)
        if not scope.is_loss:
            return output
        logps, entropies, *others = output
        computed = scope.computed
        parts = [computed, plan.present - computed, plan.rows - plan.present]
        _, skipped, added = entropies.split(parts)
        entropies = torch.cat([entropies[:computed], torch.full_like(skipped, math.nan), torch.zeros_like(added)])
        if "old_per_token_logps" in scope.inputs:
            # The ratio of a skipped row is 1.
            logps = torch.cat([logps[:computed], logps[computed:] + scope.inputs["old_per_token_logps"][computed:]])
        return logps, entropies, *others

    def _check_old_logps(self, scope: LossScope, any_row: bool) -> None:
        """
        Refuses to train on rows without old log-probabilities. Waits for the device, which is rare.

        Args:
            scope ([`LossScope`]): The loss, of rows or advantages that the plan did not know.
            any_row (`bool`): Whether rows of zero advantage may have a gradient, too.
        """
        lacking = loss_mask(scope.inputs).any(1)[scope.computed :]
        if (lacking if any_row else lacking & (scope.inputs["advantages"][scope.computed :] != 0)).any():
            raise RuntimeError(
                "`shape_advantages` was assigned, or advantages or an option of the loss (`top_entropy_quantile`, "
                "`beta`, an entropy bonus) were changed, while a rollout was in use. Its completions of zero "
                "advantage have no old log-probabilities. Change it before training, or set `skip_old_logps=False`."
            )

    def _run_all(self, compute, model, input_ids, attention_mask, logits_to_keep, batch_size):
        """Computes all rows in at most as many passes as TRL. No pass has more positions than TRL's."""
        prompt_width, rows = input_ids.shape[1] - logits_to_keep, len(input_ids)
        prompt_mask, completion_mask = attention_mask[:, :prompt_width], attention_mask[:, prompt_width:]
        batch_size = batch_size or rows
        shapes = self._row_shapes(input_ids[:, :prompt_width], prompt_mask, completion_mask)
        if shapes is None:
            forward = self._forward(compute, model, min(batch_size, rows))
            lengths = self._lengths(prompt_mask, completion_mask)
            return run_in_order(
                forward, input_ids, attention_mask, logits_to_keep, lengths, batch_size, self._multiple
            )
        budget, passes = batch_size * input_ids.shape[1], math.ceil(rows / batch_size)
        least = 1 if self.accelerator.num_processes == 1 else passes
        shared = in_fewest(shapes, [True] * rows, budget, self.num_generations, least, passes)
        parts = []
        for numbers in shared:
            chosen = numbers or [0]  # the model always runs, so that no other process waits
            layout = self._layout([shapes[row] for row in numbers], (len(chosen), prompt_width, logits_to_keep))
            ids, mask = take_rows(input_ids, chosen), take_rows(attention_mask, chosen)
            output = compute(PackedForward(model, layout), ids, mask, logits_to_keep)
            parts.append(
                [each[: len(numbers)] if isinstance(each, Tensor) and each.dim() else each for each in output]
            )
        return gather_parts(parts, [row for numbers in shared for row in numbers])

    def _forward(self, compute, model, rows_of_trl: int) -> Forward:
        """Computes padded rows; never a single row if GRPOTrainer runs several and the model's output would differ."""
        forward = functools.partial(compute, model)
        return never_alone(forward) if self._traits.alone and rows_of_trl > 1 else forward

    # The pass for `old_per_token_logps`, which TRL runs after generation

    @property
    def _mode(self) -> str:
        return "train" if self.model.training else "eval"

    def _sample(
        self, generate: Callable[[Any], dict[str, Any]], inputs: Any, *, result_is_final: bool
    ) -> dict[str, Any]:
        """
        TRL's rollout, without log-probabilities that nobody needs.

        If the loss runs before the model changes, its own log-probabilities are the old ones. TRL then needs the pass
        only for vLLM's importance ratio, which the loss can also compute. If the loss runs later, the rollout lacks
        them until the update is planned: [`~EfficientUpdateGRPOTrainer._add_old_logps`].

        Args:
            generate (callable): TRL's method.
            inputs (`list[dict]`): The argument of the method.
            result_is_final (`bool`): Whether no subclass reads the rollout, or changes its advantages, before the
                update. If a subclass does, it gets everything that TRL computes.
        """
        is_aligned = self.args.trains_aligned or self._mode == "eval"
        is_planned = self._trims or self._may_skip
        # Later it would run without the images.
        has_place = is_aligned or (is_planned and not self._may_have_images)
        if not (self._trl_runs_old_pass and has_place and self._may_replace_old_pass(result_is_final)):
            return generate(inputs)
        sampler = self._sampler
        is_known = sampler is None or bool(sampler.is_trls)
        metrics = self._metrics[self._mode]
        before = {name: len(values) for name, values in metrics.items()}
        self._skips_next_pass = self._replaces_old_pass = is_known
        try:
            rollout = dict(generate(inputs))
        finally:
            self._skips_next_pass = False
        placeholder, self._placeholder = self._placeholder, None
        changes_logps = self._is_changed("_get_per_token_logps_and_entropies")  # a subclass returns another tensor
        if is_known and not changes_logps and rollout["old_per_token_logps"] is not placeholder:
            raise RuntimeError(
                f"TRL {trl.__version__} runs another pass over the model before that for `old_per_token_logps`, and "
                "the wrong one was skipped. Set `skip_old_logps=False`, or install a TRL that was tested with this "
                "package."
            )
        if sampler is not None and not is_known and not sampler.check(rollout):
            return rollout
        # These metrics include rows without a gradient, or zeros in place of log-probabilities.
        for name in [name for name in metrics if name.startswith(MISMATCH_METRICS)]:
            del metrics[name][before.get(name, 0) :]
            if not metrics[name]:
                del metrics[name]  # TRL would log `None`
        del rollout["old_per_token_logps"]
        rollout.pop("importance_sampling_ratio", None)
        self._replaces_old_pass = True
        return rollout

    def _may_replace_old_pass(self, result_is_final: bool) -> bool:
        """Whether nobody needs all that TRL's pass computes, and the loss computes vLLM's ratio as TRL does."""
        differs = self._sampler is not None and self._sampler.is_trls is False
        return self._may_skip_old_logps and result_is_final and self._loss_is_trls() and not differs

    @torch.no_grad()
    def _add_old_logps(self, planned: list[dict[str, Any]]) -> None:
        """
        Gives planned micro-batches the old log-probabilities of their computed rows, and vLLM's ratio.

        Each pass has the layout of the loss. In half precision rounding depends on the layout, and a narrow `epsilon`
        clips it.
        """
        kwargs = cast(Any, self.args.gradient_checkpointing_kwargs)
        with disable_gradient_checkpointing(cast(Any, self.model), kwargs):
            for batch in planned:
                plan = cast(Plan, plan_of(batch))
                if not plan.rows:
                    continue
                self._loss_scope = scope = LossScope(self, batch, is_loss=False)
                inputs = scope.inputs
                input_ids, attention_mask = (
                    torch.cat([inputs[f"{part}_{kind}"] for part in ("prompt", "completion")], dim=1)
                    for kind in ("ids", "mask")
                )
                try:
                    logps, *_ = self._get_per_token_logps_and_entropies(
                        self.model, input_ids, attention_mask, inputs["completion_ids"].shape[1]
                    )
                finally:
                    self._loss_scope = None
                batch["old_per_token_logps"] = logps = logps[: plan.present]
                plan.lacks_old_logps = True
                if self._sampler is not None:
                    is_computed = torch.arange(plan.present, device=logps.device) < plan.computed
                    batch["importance_sampling_ratio"] = self._sampler.correct(batch, logps, is_computed, self._mode)


def _has_other_sign(inputs: dict[str, Any], signs: frozenset[int]) -> Tensor:
    """(B,) whether a row has a token of the loss, and an advantage of another sign. NaN has no sign."""
    advantages = inputs["advantages"]
    has_sign = torch.zeros_like(advantages, dtype=torch.bool)
    for sign in signs:
        has_sign |= advantages.sign() == sign
    return loss_mask(inputs).any(1) & ~has_sign


def _module_of(function: Any) -> str:
    """The module in which the code of a function stands, whatever name a decorator has given it."""
    return getattr(function, "__globals__", {}).get("__name__", "")


def _layers(function: Any) -> Iterator[Any]:
    """A function, and those that decorators hide below it."""
    while function is not None:
        yield function
        function = getattr(function, "__wrapped__", None)
