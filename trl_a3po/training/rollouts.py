"""[`RolloutGRPOTrainer`]: the rollouts of [`~trl.GRPOTrainer`] with checks, rewards and optional resampling."""

import math
import time
from collections.abc import Iterator, Sequence, Sized
from contextlib import contextmanager
from itertools import islice
from typing import Any, cast

import torch
from torch import Tensor

from ..update.efficient_update import EfficientUpdateGRPOTrainer
from ..update.micro_batches import loss_mask
from ..update.model_traits import position_limit
from .dataset_checks import ChecksProgress, check_dataset_sizes
from .dynamic_sampling import fresh_prompts, live_groups, pair_groups, swap_groups
from .finite import check_gradient
from .input_checks import check_prompts_fit, check_rewards, check_tokens, checked_rollout_func, total_rewards
from .signal_budget import SIGNAL, SignalBudget, parses_solutions, reward_reasons, rollout_reasons
from .token_log import GROUPS


class RolloutGRPOTrainer(EfficientUpdateGRPOTrainer):
    """
    The part of [`A3POTrainer`] that samples and scores completions.

    TRL's rollout gets the field `rewards` of shape `(B,)`, the weighted sum over the reward functions, and what the
    logs need: in training, why a completion has no signal; with `log_tokens`, the number of its group. With
    `dynamic_sampling`, groups without a learning signal are replaced by groups of fresh prompts. A round samples one
    more generation batch. Every process runs the same number of rounds, even if it needs none, because engines and
    rewards are collective. A group stays on the process that sampled it.

    Raises:
        `ValueError`: with `dynamic_sampling`, a dataset that cannot be indexed, images, or a model whose
            output depends on padding or on the other rows of a batch; in training, a reward that is infinite, a
            completion without tokens, a prompt with a token that the model does not have, or a prompt that leaves no
            room for a completion.
    """

    processing_class: Any

    # The optimizer step, and the prompts that are left to draw in it.
    _fresh_prompts: tuple[int, Iterator[int]] = (-1, iter(()))

    _numbered_groups = 0
    # That of the last step, if gradients are clipped.
    _gradient_norm: Tensor | float | None = None

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self._signal_budget = SignalBudget(self)
        self.add_callback(ChecksProgress())
        # Since the last log, by the clock of the host.
        self._step_seconds = {"generation": 0.0, "rewards": 0.0}
        if self.rollout_func is not None:
            self.rollout_func = checked_rollout_func(self.rollout_func, self._check_tokens)
        self._check_tokens([[self._text_tokenizer.pad_token_id or 0]], "its padding")
        if not isinstance(self.train_dataset, Sized):
            kind = type(self.train_dataset).__name__
            self._refuse_dynamic_sampling(f"with a dataset without an index (`{kind}`). Pass a `Dataset`")
        if self._has_images:
            self._refuse_images()

    @property
    def _text_tokenizer(self) -> Any:
        return getattr(self.processing_class, "tokenizer", self.processing_class)

    def _refuse_dynamic_sampling(self, reason: str) -> None:
        if self.args.dynamic_sampling:
            raise ValueError(
                f"`dynamic_sampling={self.args.dynamic_sampling}` does not work {reason}, or set `dynamic_sampling=0`."
            )

    def _refuse_images(self) -> None:
        self._refuse_dynamic_sampling("with images. Train on text only")

    def _check_model(self):
        super()._check_model()
        if self._traits.left_padding or self._traits.right_padding or self._traits.company:
            # If a group moved beside longer prompts, its log-probabilities would change.
            self._refuse_dynamic_sampling(
                "with models or adapters whose output depends on padding or on the other rows of a batch (for example "
                "learned absolute positions, prompt tuning). Use another model"
            )

    def get_train_dataloader(self):
        check_dataset_sizes(self.args, self.train_dataset, self.eval_dataset)
        return super().get_train_dataloader()

    def _generate_single_turn(self, prompt_ids, *args, **kwargs):
        self._check_tokens(prompt_ids, "a prompt")
        positions = position_limit(self.model)
        if positions and self.max_completion_length:
            check_prompts_fit(prompt_ids, self.max_completion_length, positions, self._text_tokenizer, self._multiple)
        return super()._generate_single_turn(prompt_ids, *args, **kwargs)

    def _check_tokens(self, token_ids: Sequence[Sequence[int]], what: str) -> None:
        # An adapter of the embeddings may hide their number.
        if embeddings := getattr(cast(Any, self.model).get_input_embeddings(), "num_embeddings", None):
            check_tokens(token_ids, embeddings, what)

    def _generate(self, prompts, *args, **kwargs):
        if self.model.training:
            # Most logs come later. To sample from NaN is an error without a reason, and on a GPU the process ends.
            check_gradient(self._gradient_norm, self.state.global_step, self.model, self.accelerator)
        # A `rollout_func` may compute log-probabilities. Only TRL's own pass, which comes later, is skipped.
        skips, self._skips_next_pass = self._skips_next_pass, False
        try:
            with self._timed("generation"):
                return super()._generate(prompts, *args, **kwargs)
        finally:
            self._skips_next_pass = skips

    def _forget_rollouts(self) -> None:
        """Forgets what the rollouts of a run that was interrupted have left."""
        self._gradient_norm = None
        self._fresh_prompts = RolloutGRPOTrainer._fresh_prompts
        self._signal_budget.forget()
        if self._sampler is not None:
            self._sampler.forget()
        self._current_train_step_time = 0.0  # of TRL's `step_time`
        self._step_seconds = dict.fromkeys(self._step_seconds, 0.0)

    @contextmanager
    def _timed(self, part: str) -> Iterator[None]:
        start = time.perf_counter()
        yield
        if self.model.training:
            self._step_seconds[part] += time.perf_counter() - start

    def _log_step_times(self) -> None:
        """Divides TRL's `step_time` into its parts. The update is what generation and rewards leave."""
        steps = self._metrics["train"].get("step_time", [])
        if not steps:
            return
        parts = {part: seconds / len(steps) for part, seconds in self._step_seconds.items()}
        for part, seconds in {**parts, "update": sum(steps) / len(steps) - sum(parts.values())}.items():
            self._metrics["train"][f"step_time/{part}"].append(seconds)
        self._step_seconds = dict.fromkeys(self._step_seconds, 0.0)

    def _sample_round(self, inputs: list[dict[str, Any]]) -> dict[str, Any]:
        """TRL's rollout of a batch of prompts, with the fields that this class adds."""
        with self._observed_rewards() as observed:
            rollout = self._sample(
                super()._generate_and_score_completions, inputs, result_is_final=self._rollout_is_ours()
            )
        if observed:
            rewards, reasons = observed[-1]
            rollout = {**rollout, "rewards": rewards}
            if reasons is not None:
                rollout[SIGNAL] = rollout_reasons(reasons, rollout, self._has_gradient(rollout))
                self._signal_budget.add_sampled(rollout[SIGNAL])
        if self.args.log_tokens and self.model.training:
            rollout = {**rollout, GROUPS: self._number_groups(len(inputs))}
        return rollout

    def _rollout_is_ours(self) -> bool:
        """Whether nobody changes the method that makes a rollout."""
        return not self._is_changed("_generate_and_score_completions")

    def _generate_and_score_completions(self, inputs):
        rollout = self._sample_round(inputs)
        if not (self.args.dynamic_sampling and self.model.training):
            return rollout
        if "num_images" in rollout:  # of a tool, or of a dataset that does not name its columns
            self._refuse_images()
        live = self._live_groups(rollout)
        [dead] = self._sum_over_processes(live.count(False))
        rounds, sampled_dead = 0, dead
        while dead and rounds < self.args.dynamic_sampling:
            fresh = self._sample_round(self._draw_inputs(len(inputs)))
            fresh_live = self._live_groups(fresh)
            swaps = pair_groups(live, fresh_live)
            rollout = swap_groups(rollout, fresh, swaps, self.num_generations, self._text_tokenizer.pad_token_id)
            live = self._live_groups(rollout)
            dead, fresh_dead = self._sum_over_processes(live.count(False), fresh_live.count(False))
            rounds, sampled_dead = rounds + 1, sampled_dead + fresh_dead
        if rounds:
            # As TRL counts since 1.9. Earlier releases also count completions that `mask_truncated_completions` masks.
            rollout["num_items_in_batch"] = self.accelerator.gather(loss_mask(rollout).sum()).sum()
        discarded = sampled_dead - dead
        unused = rounds * len(live) * self.accelerator.num_processes - discarded
        counts = {"rounds": rounds, "discarded": discarded, "unused": unused, "unfilled": dead}
        for name, count in counts.items():
            self._metrics["train"][f"a3po/dynamic_sampling/{name}"].append(count)
        return rollout

    def _number_groups(self, rows: int) -> Tensor:
        """(B,) the number of the group of each row. Every round gets new numbers."""
        first = self.accelerator.process_index * rows
        numbers = torch.arange(first, first + rows, device=self.accelerator.device) // self.num_generations
        numbers += self._numbered_groups
        self._numbered_groups += math.ceil(rows * self.accelerator.num_processes / self.num_generations)
        return numbers

    @contextmanager
    def _observed_rewards(self) -> Iterator[list[tuple[Tensor, Tensor | None]]]:
        """
        Checks the rewards that TRL is about to train on. Collects their sums, and in training what they say about the
        learning signal, for the rows of this process.

        The method is wrapped on the instance, not overridden: a subclass may override `_calculate_rewards`, and TRL
        trains on the result of that override.
        """
        calculate = self._calculate_rewards
        before = vars(self).get("_calculate_rewards")  # set if a user assigned the method on the instance
        observed: list[tuple[Tensor, Tensor | None]] = []

        def calculate_and_observe(inputs, prompts, *args, **kwargs):
            with self._timed("rewards"):
                rewards_per_func = calculate(inputs, prompts, *args, **kwargs)
            check_rewards(rewards_per_func, self.reward_weights, self.reward_func_names, prompts)
            first = self.accelerator.process_index * len(prompts)
            rows = slice(first, first + len(prompts))
            rewards = total_rewards(rewards_per_func, self.reward_weights)
            observed.append(
                (rewards[rows], self._reward_reasons(rewards_per_func)[rows] if self.model.training else None)
            )
            return rewards_per_func

        vars(self)["_calculate_rewards"] = calculate_and_observe
        try:
            yield observed
        finally:
            del vars(self)["_calculate_rewards"]
            if before is not None:
                vars(self)["_calculate_rewards"] = before

    def _reward_reasons(self, rewards_per_func: Tensor) -> Tensor:
        functions: list[Any] = list(self.reward_funcs)
        if len(functions) != rewards_per_func.shape[1]:
            functions = [None] * rewards_per_func.shape[1]  # a subclass returns rewards of its own
        return reward_reasons(
            rewards_per_func,
            self.reward_weights,
            [parses_solutions(function) for function in functions],
            self.num_generations,
            by_function=self.multi_objective_aggregation == "normalize_then_sum",
        )

    def _live_groups(self, rollout: dict[str, Any]) -> list[bool]:
        return live_groups(rollout["advantages"], self._has_gradient(rollout), self.num_generations)

    def _sum_over_processes(self, *counts: int) -> list[int]:
        local = torch.tensor(counts, device=self.accelerator.device)
        return self.accelerator.gather(local).view(-1, len(counts)).sum(0).tolist()

    def _draw_inputs(self, rows: int) -> list[dict[str, Any]]:
        """The given number of rows of fresh prompts for this process, in the form that the dataloader returns."""
        loader, step = cast(Any, self.callback_handler.train_dataloader), self.state.global_step
        if self._fresh_prompts[0] != step:
            self._fresh_prompts = step, fresh_prompts(len(loader.dataset), self.args.seed, step)
        groups = rows // self.num_generations
        first = self.accelerator.process_index * groups
        drawn = list(islice(self._fresh_prompts[1], groups * self.accelerator.num_processes))[first : first + groups]
        return loader.collate_fn([loader.dataset[i] for i in drawn for _ in range(self.num_generations)])
