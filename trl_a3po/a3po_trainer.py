"""[`A3POTrainer`]: what A3PO is, where it enters TRL's loss, and what it logs."""

import functools
import inspect
import json
import logging
import math
from pathlib import Path
from typing import Any

import torch
import trl
from torch import Tensor
from torch.nn.functional import pad
from transformers import TrainerCallback
from trl import GRPOTrainer

from . import peers
from .a3po_config import A3POConfig
from .methods import A3PO, METHODS, needs_of_trainer, peer
from .schedules import decay_scale, resolve_decay_steps
from .shaping import (
    TOKEN_ENDS,
    gspo_token_old_logps,
    is_completionwise,
    selects_tokens,
    shape_advantages,
    weight_polarities,
)
from .training.checkpoint_files import check_writable
from .training.checkpoints import (
    ChecksAdapter,
    ChecksGenerationConfig,
    ChecksLength,
    KeepsTheBest,
    ResumableGRPOTrainer,
)
from .training.finite import NaNGradients
from .training.hook import call_hook, check_completionwise, fields_named_by
from .training.hub_warnings import WarnOfFailedPushes
from .training.polarity_metrics import mean_entropy, polarity_metrics, polarity_sums
from .training.rollouts import RolloutGRPOTrainer
from .training.token_log import TokenLog
from .training.trl_contract import check_contract, shallow_copy
from .update.efficient_update import EfficientUpdateGRPOTrainer
from .update.loss_scope import LossScope
from .update.micro_batches import first_rows, loss_mask


logger = logging.getLogger(__name__)

_PACKAGE = f"{__name__.partition('.')[0]}."
# What computes the update, or a rollout for it.
_SEES_THE_UPDATE = {
    "_generate_and_score_completions",
    "_prepare_inputs",
    "compute_loss",
    "_compute_loss",
    "_get_per_token_logps_and_entropies",
}


class A3POTrainer(ResumableGRPOTrainer, RolloutGRPOTrainer, EfficientUpdateGRPOTrainer, GRPOTrainer):
    """
    Trainer for A3PO, Adaptive and Asymmetric token-level Advantage shaping for Policy Optimization.

    The method is that of "Rethinking Sample Polarity in Reinforcement Learning with Verifiable Rewards" (arXiv
    2512.21625): GRPO whose advantage, one per completion, is raised on the low-probability tokens of positive
    completions and on the high-probability tokens of negative ones, strongly at first, decaying to GRPO.

    What changes with respect to [`~trl.GRPOTrainer`]:

    - The advantage of each token is shaped. Generation, rewards, loss types, clipping and the KL term are TRL's.
    - The update computes the same gradients from fewer positions: rows are packed, regrouped and skipped. The metric
      `entropy` is then the mean over the completions that are computed.
    - Rewards that are infinite, and parameters that are not finite, raise an error.
    - A checkpoint that was not written to its end is refused, and one without the optimizer's state.
      `resume_from_checkpoint=True` skips the former, and what an earlier run left.

    The arguments are those of [`~trl.GRPOTrainer`], with an [`A3POConfig`] as `args`. To shape advantages in a way of
    your own, override [`~A3POTrainer.shape_advantages`].

    `importance_sampling_level="sequence"` is computed as GSPO-token (arXiv 2507.18071, section 4.3) while tokens of a
    completion have different advantages: the same ratio and clipping, and a gradient of its own for each token.

    Example:

    ```python
    >>> from datasets import load_dataset
    >>> from trl.rewards import accuracy_reward
    >>> from trl_a3po import A3POConfig, A3POTrainer

    >>> dataset = load_dataset("trl-lib/DeepMath-103K", split="train")

    >>> trainer = A3POTrainer(
    ...     model="Qwen/Qwen2.5-0.5B-Instruct",
    ...     reward_funcs=accuracy_reward,
    ...     args=A3POConfig(),
    ...     train_dataset=dataset,
    ... )
    >>> trainer.train()
    ```

    Raises:
        `TypeError`: `args` is not an [`A3POConfig`], a subclass's `shape_advantages` cannot take the arguments of the
            hook, or a base that changes the update comes after `A3POTrainer`.
        `ValueError`: an option of TRL does not work with advantages of single tokens; before the first step, a dataset
            is smaller than a batch, the model's `generation_config` cannot be saved, or the run cannot resume from the
            given checkpoint; in training, a reward is infinite, a completion has no tokens, or a hook breaks its
            promise ([`~trl_a3po.completionwise`]).
        `OSError`: checkpoints cannot be written to `output_dir`.
        `FloatingPointError`: in training, parameters are not finite.
        `RuntimeError`: the installed TRL no longer computes the loss from the advantages of single tokens.
    """

    # Whether training called the hook, and `A3POTrainer.shape_advantages`; whether it was said that it did not.
    _hook_was_called: bool = False
    _settings_were_used: bool = False
    _warned_of_settings: bool = False
    _warned_of_loss: bool = False
    # Whether the promise of `completionwise` was checked.
    _promise_was_checked: bool = False

    _tag_names = ["trl", "a3po"]  # noqa: RUF012
    _name, _paper = METHODS[A3PO]

    def __init__(self, model, reward_funcs=None, args=None, *positional, **keywords):
        if args is None:
            name = model if isinstance(model, str) else model.config.name_or_path
            args = A3POConfig(f"{name.split('/')[-1]}-A3PO")
        elif not isinstance(args, A3POConfig):
            raise TypeError(
                f"`args` must be an `A3POConfig`, got `{type(args).__name__}`. A3POConfig takes every argument of "
                "GRPOConfig: change the name and keep the rest of your script."
            )
        self._check_compatible(args)
        self._check_arguments_of_hook()
        if args.should_save and args.save_strategy != "no":
            check_writable(Path(args.output_dir))
        if args.shaping != A3PO and self._paper is A3POTrainer._paper:  # a subclass may cite its own
            self._tag_names = ["trl", args.shaping]
            self._name, self._paper = METHODS[args.shaping]
        super().__init__(model, reward_funcs, args, *positional, **keywords)
        # By mode, "train" or "eval": sums since the last log, on the device.
        self._polarity_sums: dict[str, Tensor] = {}
        self.add_callback(_CheckDecayEnds())
        self.add_callback(ChecksLength(self))
        self.add_callback(NaNGradients(self.accelerator))
        self.add_callback(ChecksGenerationConfig())
        self.add_callback(ChecksAdapter())
        self.add_callback(KeepsTheBest())
        self._token_log: TokenLog | None = None
        if args.log_tokens and self.is_world_process_zero():
            self._token_log = TokenLog(args.output_dir, args.log_tokens, self._text_tokenizer)
            self.add_callback(self._token_log)
        if args.push_to_hub:
            self.add_callback(WarnOfFailedPushes(self))
        check_contract(self)

    # Its signature is that of the installed TRL's.
    functools.update_wrapper(__init__, GRPOTrainer.__init__)

    @property
    def _overrides_shaping(self) -> bool:
        is_assigned = "shape_advantages" in vars(self)  # on the instance
        return is_assigned or type(self).shape_advantages is not A3POTrainer.shape_advantages

    @property
    def _replaces_a3po(self) -> bool:
        return self._overrides_shaping or self.args.shaping != A3PO

    @property
    def _shapes_completionwise(self) -> bool:
        """Whether the method is not A3PO, and marked."""
        if not self._replaces_a3po:
            return False
        return is_completionwise(self.shape_advantages if self._overrides_shaping else peer(self.args.shaping))

    def _check_compatible(self, args: A3POConfig) -> None:
        self._check_bases()
        if args.use_liger_kernel and hasattr(GRPOTrainer, "compute_liger_loss"):
            raise ValueError(
                f"`use_liger_kernel=True` is not supported with TRL {trl.__version__}, whose fused loss takes one "
                "advantage per completion. Set `use_liger_kernel=False`, or upgrade TRL to 1.14 or newer."
            )
        if self._overrides_shaping or args.shaping != A3PO or selects_tokens(args.shaping_settings):
            _check_gspo_token(args)

    def _check_bases(self) -> None:
        """A class between this one and GRPOTrainer would get advantages and rows that are not those of GRPO."""
        bases = type(self).__mro__
        for each in bases[bases.index(A3POTrainer) : bases.index(GRPOTrainer)]:
            changed = [] if each.__module__.startswith(_PACKAGE) else sorted(_SEES_THE_UPDATE & vars(each).keys())
            if changed:
                raise TypeError(
                    f"`{each.__name__}` comes after `A3POTrainer` in the bases of `{type(self).__name__}`, and "
                    f"overrides `{changed[0]}`: it would get an update that is already planned and shaped. Put it "
                    f"first: `class {type(self).__name__}({each.__name__}, A3POTrainer)`."
                )

    def _check_arguments_of_hook(self) -> None:
        # A rollout that is TRL's has no field that the hook could name.
        fields = {} if self._rollout_is_ours() else fields_named_by(self.shape_advantages)
        try:
            inspect.signature(self.shape_advantages).bind(None, **dict.fromkeys({*peers.HOOK_ARGUMENTS, *fields}))
        except TypeError as error:
            arguments = list(inspect.signature(A3POTrainer.shape_advantages).parameters)
            raise TypeError(
                f"`{type(self).__name__}.shape_advantages` cannot be called with the arguments of the hook: {error}. "
                f"They are {', '.join(arguments[:2])}, and by name {', '.join(arguments[2:])}. Name those that you "
                "use, and take the rest as `**batch`. Any other name must be a field that your class adds to its "
                "rollouts, in `_generate_and_score_completions`."
            ) from error

    def shape_advantages(
        self,
        advantages: Tensor,
        *,
        per_token_logps: Tensor,
        old_per_token_logps: Tensor,
        entropies: Tensor,
        mask: Tensor,
        rewards: Tensor | None,
        progress: float,
    ) -> Tensor:
        """
        The hook: turns one advantage per completion into one per token.

        Override it to shape advantages in your own way. Take the arguments that you do not use as `**batch`.
        `super().shape_advantages(advantages, **batch)` is A3PO, or the method that `shaping` of [`A3POConfig`] names.
        If you do not call it, the shaping settings of [`A3POConfig`] have no effect.

        It is called once for each batch of the loss, without gradients, before TRL's loss reads the advantages. It
        must not change its arguments in place: they are used again in later iterations. It should neither wait for
        the device (`.item()`, a Python `if` on a tensor) nor communicate with other processes.

        Args:
            advantages (`torch.Tensor` of shape `(B,)`):
                Advantage of each completion, as GRPO computes it.
            per_token_logps (`torch.Tensor` of shape `(B, T)`):
                Log-probabilities of the sampled tokens under the policy being trained. Values of masked tokens have
                no meaning.
            old_per_token_logps (`torch.Tensor` of shape `(B, T)`):
                The same under the policy that the importance ratios refer to. It is `per_token_logps` while rollout
                and update are aligned. It is never what a vLLM sampler reports.
            entropies (`torch.Tensor` of shape `(B, T)`):
                Entropy of the policy being trained at each position, in nats.
            mask (`torch.Tensor` of shape `(B, T)`):
                1 for the tokens of the loss: `completion_mask`, times `tool_mask` if tools are used. A row may be 0
                throughout.
            rewards (`torch.Tensor` of shape `(B,)`, or `None`):
                Reward of each completion, summed over the reward functions with their weights; NaN if all of them
                returned None. `None` if `_generate_and_score_completions` is overridden without `super()`.
            progress (`float`):
                Share of the optimizer steps that are done, from 0 to 1.

        An override may also name fields that its class adds to the rollout in `_generate_and_score_completions`: it
        gets their rows of this micro-batch.

        Returns:
            `torch.Tensor` of shape `(B, T)`, or of shape `(B,)` if all tokens of a completion share one advantage.
            A3PO's own result is always `(B, T)` when a subclass calls it, and 0 where `mask` is 0.

        Raises:
            `ValueError`: an override is marked with `completionwise`, but calls `super()` with a `shaping` that is
                not; or the method that `shaping` names refuses its arguments, as `w_reinforce` does without rewards.
        """
        self._settings_were_used |= self.is_in_train
        if self.args.shaping != A3PO:
            if self._shapes_completionwise and not is_completionwise(peer(self.args.shaping)):
                raise ValueError(
                    f"`{type(self).__name__}.shape_advantages` is marked with `@completionwise`, but calls `super()`, "
                    f"which is `shaping={self.args.shaping!r}` and is not marked. Remove the mark, or choose another "
                    "`shaping`."
                )
            return peer(self.args.shaping)(
                advantages,
                per_token_logps=per_token_logps,
                old_per_token_logps=old_per_token_logps,
                entropies=entropies,
                mask=mask,
                rewards=rewards,
                progress=progress,
                **self._needs_of_peer(),
                **self.args.peer_settings,
            )
        settings = self.current_shaping_settings()
        for end in TOKEN_ENDS:
            # Once a step: steps may have different numbers of micro-batches with rows.
            if settings[f"{end}_ratio"] > 0 and self.accelerator.sync_gradients:
                self._metrics[self._mode][f"a3po/scale/{end}"].append(settings[f"{end}_scale"])
        if not selects_tokens(settings) and not self._replaces_a3po:
            # (B,) keeps the loss bit-identical to GRPO's. Subclasses that call super() always get (B, T).
            return weight_polarities(advantages, settings["positive_weight"], settings["negative_weight"])
        token_metric = old_per_token_logps if self.args.token_metric == "prob" else entropies
        return shape_advantages(advantages, token_metric, mask, **settings)

    def _needs_of_peer(self) -> dict[str, Any]:
        """The arguments of the peer that `shaping` names which are neither settings nor arguments of the hook."""
        known = {
            "epsilon_low": self.epsilon_low,
            "epsilon_high": self.epsilon_high,
            "entropy_of_last_step": peers.logged_entropy(self.state.log_history),
        }
        return {name: known[name] for name in needs_of_trainer(self.args.shaping)}

    def current_shaping_settings(self) -> dict[str, float]:
        """The arguments of [`~trl_a3po.shape_advantages`] at this step of training: the scales have decayed."""
        decay_steps = resolve_decay_steps(self.args.scale_decay_steps, self.state.max_steps)
        settings = self.args.shaping_settings
        for name in [name for name in settings if name.endswith("_scale")]:
            settings[name] = decay_scale(settings[name], self.state.global_step, decay_steps, self.args.scale_decay)
        return settings

    # Where it enters TRL's loss

    def _signs_without_gradient(self):
        if self._replaces_a3po:
            # A method that is not marked may give any row a gradient, and look at the other rows of a micro-batch.
            return frozenset({0} if self._shapes_completionwise else ())
        settings = self.current_shaping_settings()
        weights = {1: settings["positive_weight"], -1: settings["negative_weight"]}
        return frozenset({0, *(sign for sign, weight in weights.items() if weight == 0)})

    @torch.no_grad()
    def _before_loss_reads(self, scope, per_token_logps, entropies):
        inputs = scope.inputs
        advantages, mask = inputs["advantages"], loss_mask(inputs)
        per_token_logps, entropies = per_token_logps.detach(), entropies.detach()
        # Absent while rollout and update are aligned: then the two policies are the same.
        old_per_token_logps = inputs.get("old_per_token_logps", per_token_logps)

        batch = {
            **self._fields_of_hook(inputs),
            "advantages": advantages,
            "per_token_logps": per_token_logps,
            "old_per_token_logps": old_per_token_logps,
            "entropies": entropies,
            "mask": mask,
            "rewards": inputs.get("rewards"),
            "progress": self.state.global_step / max(1, self.state.max_steps),  # unknown before training
        }
        shaped = self._call_hook(batch, scope) if self._replaces_a3po else self.shape_advantages(**batch)
        inputs["advantages"] = shaped
        if shaped.dim() == 2 and self.importance_sampling_level == "sequence" and _ratio_has_gradient(self.args):
            _check_gspo_token(self.args)  # a hook may have been assigned since
            inputs["old_per_token_logps"] = gspo_token_old_logps(per_token_logps, old_per_token_logps, mask)
            scope.use_token_level_ratio()
        self._count_for_logs(scope, advantages, shaped, per_token_logps, old_per_token_logps, entropies)

    def _count_for_logs(self, scope, advantages, shaped, per_token_logps, old_per_token_logps, entropies) -> None:
        inputs = scope.inputs
        mask = loss_mask(inputs)
        settings = self.current_shaping_settings()
        unselected = weight_polarities(advantages, settings["positive_weight"], settings["negative_weight"])
        # Skipped rows have neither log-probabilities nor entropies; they are marked by NaN entropies.
        skips = bool(self._skippable_signs())
        logps = torch.where(entropies.isnan(), torch.nan, old_per_token_logps) if skips else old_per_token_logps
        sampled = inputs.get("sampling_per_token_logps")
        if sampled is not None and sampled.shape != logps.shape:
            sampled = None  # of a `rollout_func`: without vLLM, TRL does not read them, and they may be placeholders
        rows = slice(scope.present)
        sums = polarity_sums(
            advantages[rows],
            unselected[rows].to(shaped.dtype),
            shaped[rows],
            logps[rows],
            entropies[rows],
            mask[rows],
            None if sampled is None else sampled[rows],
        )
        self._polarity_sums[self._mode] = self._polarity_sums.get(self._mode, 0) + sums
        if self.model.training:
            self._signal_budget.add_trained(
                inputs,
                advantages,
                unselected,
                logps=per_token_logps,
                old_logps=old_per_token_logps,
                entropies=entropies,
                rows=rows,
                signal_is_shaped=self._replaces_a3po or not self._rollout_is_ours(),
            )
            if self._token_log is not None:
                self._token_log.add(inputs, advantages, shaped, logps, entropies)

    def get_high_entropy_mask(self, *args, **kwargs):
        mask = super().get_high_entropy_mask(*args, **kwargs)
        self._signal_budget.add_entropy_mask(mask)
        return mask

    def _fields_of_hook(self, inputs: dict[str, Any]) -> dict[str, Any]:
        """The fields of the rollout that a subclass's `shape_advantages` names."""
        fields = fields_named_by(self.shape_advantages) if self._overrides_shaping else {}
        if missing := ", ".join(f"`{name}`" for name in sorted(fields) if fields[name] and name not in inputs):
            raise ValueError(
                f"`{type(self).__name__}.shape_advantages` takes {missing}, which is neither an argument of the hook "
                "nor a field of the rollout. Add it to what `_generate_and_score_completions` returns, with one row "
                "per completion; in a test with `assert_gradients_follow`, pass it in `fields`."
            )
        return {name: inputs[name] for name in fields if name in inputs}

    def _call_hook(self, batch: dict[str, Any], scope: LossScope) -> Tensor:
        """The advantages of a method that is not A3PO. It gets the rows that are computed; the others get 0."""
        missing = len(batch["advantages"]) - scope.computed
        if not scope.computed:
            return torch.zeros_like(batch["advantages"])
        if missing:
            batch = {name: first_rows(value, scope.computed) for name, value in batch.items()}
        if self._shapes_completionwise and not self._promise_was_checked and scope.computed > 1:
            # On a copy, because the method may assign attributes.
            self._promise_was_checked = check_completionwise(shallow_copy(self).shape_advantages, **batch)
        self._hook_was_called |= self.is_in_train
        shaped = call_hook(self.shape_advantages, **batch)
        return pad(shaped, [0, 0] * (shaped.dim() - 1) + [0, missing])

    def _warn_of_settings_without_effect(self) -> None:
        """After the first step with a signal: a hook that does not call `super()` leaves the settings unused."""
        if self._warned_of_settings or self._settings_were_used or not self._hook_was_called:
            return
        self._warned_of_settings = True
        changed = [f"{name}={value!r}" for name, (value, _) in self.args.changed_settings.items()]
        if self.args.shaping != A3PO:
            changed.append(f"shaping={self.args.shaping!r}")
        if changed and self.is_world_process_zero():
            logger.warning(
                "`shape_advantages` of %s did not call `super()`, so these settings have no effect: %s. Call "
                "`super().shape_advantages`, or leave them at their defaults.",
                type(self).__name__,
                ", ".join(changed),
            )

    def _warn_of_a_loss_of_its_own(self) -> None:
        """After the first step: a loss that does not call `super()` shapes nothing."""
        if self._loss_ran or self._warned_of_loss or not self._has_trained:
            return
        self._warned_of_loss = True
        if self.is_world_process_zero():
            logger.warning(
                "The loss of %s does not call `super()`, so no advantage was shaped: this is not A3PO. Call "
                "`super()._compute_loss(model, inputs)`, or use a `loss_type` of TRL.",
                type(self).__name__,
            )

    def _forget_last_run(self):
        super()._forget_last_run()
        self._forget_rollouts()
        for metrics in self._metrics.values():  # an evaluation may have been interrupted, too
            metrics.clear()
        self._polarity_sums.clear()
        self._entropy_window_stats = None  # of `use_adaptive_entropy`, since TRL 1.8

    # What it logs

    def _reduce_polarity_sums(self, mode: str) -> None:
        """Adds up the sums of all processes, and appends the means to TRL's metrics. Every process must call it."""
        if mode not in self._polarity_sums:
            return
        polarities = self._polarity_sums.pop(mode)
        counts = self._signal_budget.pop_counts() if mode == "train" else polarities.new_zeros(0)
        both = self.accelerator.reduce(torch.cat([polarities.flatten(), counts]), reduction="sum").cpu()  # waits once
        sums, counts = both[: polarities.numel()].view_as(polarities), both[polarities.numel() :]
        if mode == "train":
            signal = self._signal_budget.metrics(counts)
            self._signal_budget.warn_once(signal, self.state.global_step)
            for name, value in signal.items():
                self._metrics[mode][name].append(value)
        for name, value in polarity_metrics(sums).items():
            self._metrics[mode][f"a3po/{name}"].append(value)
        if self._skippable_signs() and mode == "train":
            # TRL's own mean is NaN for every micro-batch in which a row is skipped.
            self._metrics[mode]["entropy"] = [mean_entropy(sums)]
        for name, value in self._sampler.pop_metrics(mode).items() if self._sampler else ():
            self._metrics[mode][name].append(value)

    def _maybe_log_save_evaluate(self, tr_loss, grad_norm, *args, **kwargs):
        # All processes come here at the end of each step, after all callbacks. They do not all come to `log`: users
        # call that on one process only, where a collective operation would hang.
        self._warn_of_settings_without_effect()
        self._warn_of_a_loss_of_its_own()
        if self.control.should_log or self.control.should_training_stop:
            self._reduce_polarity_sums("train")
            if self._token_log is not None:
                self._token_log.write(self.state.global_step)
        self._gradient_norm = grad_norm
        super()._maybe_log_save_evaluate(tr_loss, grad_norm, *args, **kwargs)

    def evaluation_loop(self, *args, **kwargs):
        output = super().evaluation_loop(*args, **kwargs)
        self._reduce_polarity_sums("eval")
        return output

    def log(self, logs, *args, **kwargs):
        if self.accelerator.num_processes == 1:
            self._reduce_polarity_sums(self._mode)  # whoever asks for a log, at any time
        entropies = self._metrics[self._mode].get("entropy", [])
        if all(math.isnan(entropy) for entropy in entropies):
            # Every row of the window was skipped. TRL would log `None`, which breaks callbacks that compare numbers.
            self._metrics[self._mode].pop("entropy", None)
        if self.model.training:
            self._log_step_times()
        super().log(logs, *args, **kwargs)

    def create_model_card(self, *args, **kwargs):
        super().create_model_card(*args, **kwargs)
        if not self.is_world_process_zero():
            return
        settings: dict[str, Any] = {"shaping": self.args.shaping}
        if self.args.shaping == A3PO:
            names = ("token_metric", "scale_decay", "scale_decay_steps")
            settings |= self.args.shaping_settings | {name: getattr(self.args, name) for name in names}
        else:
            settings |= self.args.peer_settings
        hook = f"`{type(self).__name__}.shape_advantages`"
        text = f"```json\n{json.dumps(settings, indent=2)}\n```"
        if self._has_trained and not self._loss_ran:
            text = f"None: the loss of `{type(self).__name__}` does not call that of TRL."
        elif self._overrides_shaping and self._hook_was_called and not self._settings_were_used:
            text = f"{hook}, in place of the method of the package."
        elif self._overrides_shaping:
            text += f"\n\nThey apply where {hook} calls `super()`."
        path = Path(self.args.output_dir, "README.md")  # type: ignore[arg-type]  # never None once constructed
        card = path.read_text(encoding="utf-8")
        before, heading, after = card.partition("### Framework versions")
        section = f"### Advantage shaping\n\n{text}\n\n"
        path.write_text(f"{before}{section}{heading}{after}", encoding="utf-8")


class _CheckDecayEnds(TrainerCallback):
    """The number of steps is known only when training begins, if it is given in epochs."""

    def on_train_begin(self, args, state, control, **kwargs):
        args.check_decay_ends(state.max_steps)


def _check_gspo_token(args: A3POConfig) -> None:
    """Refuses to give tokens advantages of their own where this would change the gradient of the KL term."""
    is_sequence_level = args.importance_sampling_level == "sequence" and _ratio_has_gradient(args)
    if is_sequence_level and args.beta != 0 and args.use_bias_correction_kl:
        # There the KL term is multiplied by the ratio, whose gradient is what GSPO-token changes.
        raise ValueError(
            f"`importance_sampling_level='sequence'` with `beta={args.beta}` and `use_bias_correction_kl=True` is "
            "not supported while tokens have advantages of their own: it would change the gradient of the KL "
            "term. Set `use_bias_correction_kl=False`, `beta=0.0` or `importance_sampling_level='token'`."
        )


def _ratio_has_gradient(args: A3POConfig) -> bool:
    """Whether the loss's gradient runs through the importance ratio. Not with CISPO and VESPO."""
    return args.loss_type not in ("cispo", "vespo")
