"""The configuration of [`A3POTrainer`]: all fields of `trl.GRPOConfig`, those of the shaping, and their checks."""

import inspect
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any, cast, get_type_hints

from trl import GRPOConfig

from .methods import A3PO, METHODS, check_shaping, needs_of_trainer, read_settings, settings_of
from .schedules import check_decay_ends, check_scale_decay
from .shaping import TOKEN_ENDS, check_settings, is_finite_number, selects_tokens, shape_advantages


TOKEN_METRICS = ("prob", "entropy")

# The fields that `shape_advantages` takes, by the same names.
_SHAPING_SETTINGS = tuple(
    name
    for name, parameter in inspect.signature(shape_advantages).parameters.items()
    if parameter.kind is inspect.Parameter.KEYWORD_ONLY
)


@dataclass
class A3POConfig(GRPOConfig):
    r"""
    Configuration class for the [`A3POTrainer`].

    [`A3POConfig`] inherits every parameter of [`~trl.GRPOConfig`], with its default. It adds the parameters of the
    advantage shaping of "Rethinking Sample Polarity in Reinforcement Learning with Verifiable Rewards" (arXiv
    2512.21625). With all scales and both weights 1, training is GRPO: to rounding, and to the last bit if
    `trim_padding`, `skip_zero_advantage` and `skip_old_logps` are off.

    The paper's A3PO decides which of the four token ends are on by default. Ratio 0.2 and scale 2 are from scripts in
    an earlier commit of the authors' code, each of which amplifies one token end. The shape and length of the decay
    are our choice, see [`~trl_a3po.schedules.decay_scale`]. For a decay of alpha per step from the scale rho, set
    `scale_decay_steps` to (rho - 1) / alpha.

    A ratio or scale that you change from its default must have an effect. It has none if the ratio of its token end is
    0, its scale is 1, or the weight of its polarity is 0. A ratio of 0 and a scale of 1 are always accepted: they turn
    a token end off. A setting at its default never causes an error.

    Parameters:
        > Parameters that control which method shapes the advantages

        shaping (`str`, *optional*, defaults to `"a3po"`):
            Method that shapes the advantages, A3PO or a function of `trl_a3po.peers`: `"a3po"`, `"w_reinforce"`,
            `"advantage_reweighting"`, `"entropy_advantage"`, `"aspo"`, `"position_bonus"`, `"fipo"`,
            `"forking_tokens"`, `"clip_cov"`, `"steer_exponential"`, `"steer_linear"`, `"gtpo_simplified"`, `"aepo"`,
            `"stare"`. The options of A3PO's shaping have no effect with another method, and must keep their defaults.
        shaping_args (`dict` or `str`, *optional*, defaults to `None`):
            Settings of a method other than A3PO, for example `{"top_ratio": 0.2}`: the parameters of its function that
            are numbers with defaults. A dictionary, or one in JSON.

        > Parameters that control the token-level advantage shaping

        positive_low_ratio (`float`, *optional*, defaults to `0.2`):
            Share of the tokens of a positive completion (advantage above zero) whose advantage is scaled: those with
            the lowest `token_metric`. Must be in [0, 1]; 0 selects none.
        positive_low_scale (`float`, *optional*, defaults to `2.0`):
            Initial scale of the advantage of those tokens. 1 keeps it as it is.
        positive_high_ratio (`float`, *optional*, defaults to `0.0`):
            As `positive_low_ratio`, for the tokens with the highest `token_metric` of positive completions.
        positive_high_scale (`float`, *optional*, defaults to `1.0`):
            Initial scale of the advantage of those tokens.
        negative_low_ratio (`float`, *optional*, defaults to `0.0`):
            As `positive_low_ratio`, for the tokens with the lowest `token_metric` of negative completions (advantage
            below zero).
        negative_low_scale (`float`, *optional*, defaults to `1.0`):
            Initial scale of the advantage of those tokens.
        negative_high_ratio (`float`, *optional*, defaults to `0.2`):
            As `positive_low_ratio`, for the tokens with the highest `token_metric` of negative completions.
        negative_high_scale (`float`, *optional*, defaults to `2.0`):
            Initial scale of the advantage of those tokens.
        token_metric (`str`, *optional*, defaults to `"prob"`):
            Metric that ranks the tokens of a completion. `"prob"`: probability under the old policy. `"entropy"`:
            entropy of the distribution that the token was sampled from, under the policy being trained. (TRL does not
            compute entropies of the old policy; the two differ only if rollouts are reused.)
        scale_decay (`str`, *optional*, defaults to `"linear"`):
            How every scale changes to 1, from above or below: `"linear"`, `"cosine"` or `"constant"` (it does not
            change).
        scale_decay_steps (`float`, *optional*, defaults to `0.5`):
            When the scales reach 1, in the format of transformers' `warmup_steps`: 1 or more is a number of optimizer
            steps, less than 1 is a fraction of all steps. Must not exceed the steps of the training. Unused with
            `scale_decay="constant"`.

        > Parameters that control the weight of the two polarities

        positive_weight (`float`, *optional*, defaults to `1.0`):
            Weight of the advantages of positive completions. With `negative_weight`, and the scales at 1, it gives the
            paper's polarity-level variants: PSR (only positive samples) is (1, 0), NSR (only negative samples) is (0,
            1), PxNy is (x, y), for example P2N1 (2, 1).
        negative_weight (`float`, *optional*, defaults to `1.0`):
            Weight of the advantages of negative completions.

        > Parameters that control what is trained on

        dynamic_sampling (`int`, *optional*, defaults to `0`):
            Maximum resampling rounds per generation batch (DAPO, arXiv 2503.14476, section 3.2). Each round replaces
            groups without a learning signal (e.g. all rewards equal) by groups of new random prompts; groups still
            without one after the last round are kept. 0 disables it.

        > Parameters that control which positions of a rollout are computed

        trim_padding (`bool`, *optional*, defaults to `True`):
            Whether passes over the model compute no padding, the prompt of a group only once, and a start that all
            prompts share only once. Rows are packed; a model that cannot be packed gets padded rows of similar length.
            The rows of an optimizer step are regrouped if neither the loss nor the method depends on the grouping. The
            update is the same to rounding. Ignored while completions or prompts have images.
        skip_zero_advantage (`bool`, *optional*, defaults to `True`):
            Whether the loss skips completions whose advantage is zero, such as those of groups that are all right or
            all wrong. The update is the same to rounding. Ignored if such completions matter to the loss: with a KL
            term (`beta`), an entropy bonus, a router loss, `top_entropy_quantile`, or a method other than A3PO that is
            not marked with `completionwise`. Ignored while completions or prompts have images. While completions are
            skipped, the metric `entropy` is the mean over the others.
        skip_old_logps (`bool`, *optional*, defaults to `True`):
            Whether the forward pass for the old log-probabilities is skipped if the loss can take them from its own
            forward pass. GRPOTrainer runs it after each generation for `vllm_importance_sampling_correction`, and when
            rollouts are reused. If it cannot be skipped, it runs only for the completions that the loss computes. The
            update is the same to rounding. The metrics `sampling/*` cover the completions that the loss computes.
            Ignored for datasets with images, and with TRL before 1.15.

        > Parameters that control the logging

        log_tokens (`int`, *optional*, defaults to `0`):
            Number of prompts whose completions every log writes token by token to `tokens.jsonl` in `output_dir`, for
            `trl-a3po report`: the two most positive and the two most negative completions of each prompt, from the
            batch of the main process. Only the first 1024 tokens of a completion are written, at about 35 bytes each.
            0 disables it, at no cost.
    """

    # Parameters that control which method shapes the advantages
    shaping: str = field(
        default=A3PO,
        metadata={
            "help": "Method that shapes the advantages, A3PO or a function of `trl_a3po.peers`: "
            f"{', '.join(map(repr, METHODS))}. The options of A3PO's shaping have no effect with another method, and "
            "must keep their defaults."
        },
    )
    # `str`, as for TRL's options that are dictionaries: the command line passes JSON.
    shaping_args: dict[str, Any] | str | None = field(
        default=None,
        metadata={
            "help": "Settings of a method other than A3PO, for example `{'top_ratio': 0.2}`: the parameters of its "
            "function that are numbers with defaults. A dictionary, or one in JSON."
        },
    )

    # Parameters that control the token-level advantage shaping
    positive_low_ratio: float = field(
        default=0.2,
        metadata={
            "help": "Share of the tokens of a positive completion (advantage above zero) whose advantage is scaled: "
            "those with the lowest `token_metric`. Must be in [0, 1]; 0 selects none."
        },
    )
    positive_low_scale: float = field(
        default=2.0,
        metadata={"help": "Initial scale of the advantage of those tokens. 1 keeps it as it is."},
    )
    positive_high_ratio: float = field(
        default=0.0,
        metadata={
            "help": "As `positive_low_ratio`, for the tokens with the highest `token_metric` of positive completions."
        },
    )
    positive_high_scale: float = field(
        default=1.0,
        metadata={"help": "Initial scale of the advantage of those tokens."},
    )
    negative_low_ratio: float = field(
        default=0.0,
        metadata={
            "help": "As `positive_low_ratio`, for the tokens with the lowest `token_metric` of negative completions "
            "(advantage below zero)."
        },
    )
    negative_low_scale: float = field(
        default=1.0,
        metadata={"help": "Initial scale of the advantage of those tokens."},
    )
    negative_high_ratio: float = field(
        default=0.2,
        metadata={
            "help": "As `positive_low_ratio`, for the tokens with the highest `token_metric` of negative completions."
        },
    )
    negative_high_scale: float = field(
        default=2.0,
        metadata={"help": "Initial scale of the advantage of those tokens."},
    )
    token_metric: str = field(
        default="prob",
        metadata={
            "help": "Metric that ranks the tokens of a completion. 'prob': probability under the old policy. "
            "'entropy': entropy of the distribution that the token was sampled from, under the policy being trained. "
            "(TRL does not compute entropies of the old policy; the two differ only if rollouts are reused.)"
        },
    )
    scale_decay: str = field(
        default="linear",
        metadata={
            "help": "How every scale changes to 1, from above or below: 'linear', 'cosine' or 'constant' (it does not "
            "change)."
        },
    )
    scale_decay_steps: float = field(
        default=0.5,
        metadata={
            "help": "When the scales reach 1, in the format of transformers' `warmup_steps`: 1 or more is a number of "
            "optimizer steps, less than 1 is a fraction of all steps. Must not exceed the steps of the training. "
            "Unused with `scale_decay='constant'`."
        },
    )

    # Parameters that control the weight of the two polarities
    positive_weight: float = field(
        default=1.0,
        metadata={
            "help": "Weight of the advantages of positive completions. With `negative_weight`, and the scales at 1, "
            "it gives the paper's polarity-level variants: PSR (only positive samples) is (1, 0), NSR (only negative "
            "samples) is (0, 1), PxNy is (x, y), for example P2N1 (2, 1)."
        },
    )
    negative_weight: float = field(
        default=1.0,
        metadata={"help": "Weight of the advantages of negative completions."},
    )

    # Parameters that control what is trained on
    dynamic_sampling: int = field(
        default=0,
        metadata={
            "help": "Maximum resampling rounds per generation batch (DAPO, arXiv 2503.14476, section 3.2). Each round "
            "replaces groups without a learning signal (e.g. all rewards equal) by groups of new random prompts; "
            "groups still without one after the last round are kept. 0 disables it."
        },
    )

    # Parameters that control which positions of a rollout are computed
    trim_padding: bool = field(
        default=True,
        metadata={
            "help": "Whether passes over the model compute no padding, the prompt of a group only once, and a start "
            "that all prompts share only once. Rows are packed; a model that cannot be packed gets padded rows of "
            "similar length. The rows of an optimizer step are regrouped if neither the loss nor the method depends "
            "on the grouping. The update is the same to rounding. Ignored while completions or prompts have images."
        },
    )
    skip_zero_advantage: bool = field(
        default=True,
        metadata={
            "help": "Whether the loss skips completions whose advantage is zero, such as those of groups that are all "
            "right or all wrong. The update is the same to rounding. Ignored if such completions matter to the loss: "
            "with a KL term (`beta`), an entropy bonus, a router loss, `top_entropy_quantile`, or a method other than "
            "A3PO that is not marked with `completionwise`. Ignored while completions or prompts have images. While "
            "completions are skipped, the metric `entropy` is the mean over the others."
        },
    )
    skip_old_logps: bool = field(
        default=True,
        metadata={
            "help": "Whether the forward pass for the old log-probabilities is skipped if the loss can take them "
            "from its own forward pass. GRPOTrainer runs it after each generation for "
            "`vllm_importance_sampling_correction`, and when rollouts are reused. If it cannot be skipped, it runs "
            "only for the completions that the loss computes. The update is the same to rounding. The metrics "
            "`sampling/*` cover the completions that the loss computes. Ignored for datasets with images, and with "
            "TRL before 1.15."
        },
    )

    # Parameters that control the logging
    log_tokens: int = field(
        default=0,
        metadata={
            "help": "Number of prompts whose completions every log writes token by token to `tokens.jsonl` in "
            "`output_dir`, for `trl-a3po report`: the two most positive and the two most negative completions of each "
            "prompt, from the batch of the main process. Only the first 1024 tokens of a completion are written, at "
            "about 35 bytes each. 0 disables it, at no cost."
        },
    )

    def __post_init__(self):
        self._check_json()
        super().__post_init__()
        check_settings(**self.shaping_settings)
        if self.token_metric not in TOKEN_METRICS:
            raise ValueError(
                f"`token_metric` must be one of {', '.join(map(repr, TOKEN_METRICS))}, got {self.token_metric!r}. "
                "Pass 'prob' to rank tokens by their probability under the old policy, as A3PO does."
            )
        check_scale_decay(self.scale_decay)
        steps = self.scale_decay_steps
        if not is_finite_number(steps) or steps <= 0 or (steps > 1 and steps != int(steps)):
            raise ValueError(
                "`scale_decay_steps` must be a whole number of steps, or a fraction of all steps between 0 and 1, got "
                f"{steps!r}. Pass for example 500 for 500 optimizer steps, or 0.5 for half of the training. To turn "
                "the shaping off, set the scales to 1."
            )
        for name in ("trim_padding", "skip_zero_advantage", "skip_old_logps"):
            if not isinstance(getattr(self, name), bool):
                raise ValueError(f"`{name}` must be True or False, got {getattr(self, name)!r}.")
        if not _is_count(self.log_tokens):
            raise ValueError(
                f"`log_tokens` must be a number of prompts, 0 or more, got {self.log_tokens!r}. Pass for example 2 to "
                "log the completions of two prompts, or 0 to log none."
            )
        self._check_options_of_trl()
        self._check_dynamic_sampling()
        self.shaping_args = read_settings(self.shaping_args) or None
        check_shaping(self.shaping, self.shaping_args or {})
        if self.shaping != A3PO:
            self._check_other_method()
        self._check_all_act()
        if self.max_steps > 0:
            self.check_decay_ends(self.max_steps)

    def _check_json(self) -> None:
        """Checks TRL's options that are dictionaries, as texts in JSON: the error of transformers names no option."""
        # The types of the fields themselves are changed by parsers of a command line.
        for name in [name for name, hint in get_type_hints(GRPOConfig).items() if "dict" in str(hint)]:
            text = getattr(self, name)
            if isinstance(text, str) and text.startswith("{"):
                try:
                    json.loads(text)
                except ValueError as error:
                    raise ValueError(
                        f"`{name}` must be a dictionary in JSON, such as '{{\"name\": 1}}', got {text!r}: {error}."
                    ) from error

    def _check_options_of_trl(self) -> None:
        """Values that TRL and the samplers refuse only in the first step, or with which nothing is trained."""
        if self.temperature is None or not self.temperature > 0:
            raise ValueError(
                f"`temperature` must be a number above 0, got {self.temperature!r}. The update divides logits by it: "
                "pass 1.0 to sample from the model as it is."
            )
        if self.top_k is not None and self.top_k < -1:
            raise ValueError(
                f"`top_k` must be a number of tokens, got {self.top_k!r}. Pass 0 to sample from all tokens."
            )
        if self.scale_rewards not in ("group", "batch", "none"):
            raise ValueError(
                "`scale_rewards` must be 'group', 'batch' or 'none' (in Python also True for 'group', False for "
                f"'none'), got {self.scale_rewards!r}."
            )
        for name, least, why in (
            ("delta", 1, "Ratios start at 1, so below it the tokens of positive completions have no gradient"),
            ("off_policy_mask_threshold", 0, "Below it, all negative completions are masked"),
        ):
            value = getattr(self, name)
            if value is not None and not value >= least:
                raise ValueError(f"`{name}` must be {least} or more, or None, got {value!r}. {why}.")
        for name, least, why in (
            ("epsilon", 0, ""),
            ("epsilon_high", 0, ""),
            ("beta", 0, ""),
            ("num_iterations", 1, " Pass 1 to use each rollout once."),
            ("per_device_train_batch_size", 1, ""),
            ("gradient_accumulation_steps", 1, " Pass 1 to accumulate none."),
            ("steps_per_generation", 1, " Pass 1 to generate for each step, or leave it out."),
            ("max_completion_length", 1, ""),
        ):
            value = getattr(self, name)
            if value is not None and not value >= least:
                raise ValueError(f"`{name}` must be {least} or more, got {value!r}.{why}")
        if self.min_p is not None and not 0 <= self.min_p <= 1:
            raise ValueError(f"`min_p` must be between 0 and 1, or None, got {self.min_p!r}.")
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise ValueError(
                f"`top_p` must be above 0 and not above 1, got {self.top_p!r}. Pass 1.0 to sample from all tokens."
            )
        if not 0 <= self.top_entropy_quantile <= 1:
            raise ValueError(
                f"`top_entropy_quantile` must be between 0 and 1, got {self.top_entropy_quantile!r}. Pass 1.0 to "
                "train on all tokens."
            )
        if self.reward_weights is not None and not all(map(math.isfinite, self.reward_weights)):
            raise ValueError(f"`reward_weights` must be finite numbers, got {self.reward_weights!r}.")
        if self.repetition_penalty is None:
            if self.use_vllm:
                raise ValueError("`repetition_penalty` must be a number with vLLM, got None. Pass 1.0 for none.")
        elif not self.repetition_penalty > 0:
            raise ValueError(
                f"`repetition_penalty` must be above 0, got {self.repetition_penalty!r}. Pass 1.0 for none."
            )
        if self.multi_objective_aggregation not in ("sum_then_normalize", "normalize_then_sum"):
            raise ValueError(
                "`multi_objective_aggregation` must be 'sum_then_normalize' or 'normalize_then_sum', got "
                f"{self.multi_objective_aggregation!r}."
            )
        if not isinstance(self.chat_template_kwargs, Mapping | None):
            raise ValueError(
                f"`chat_template_kwargs` must be a dictionary, got {self.chat_template_kwargs!r}. In a YAML file, it "
                "is a mapping."
            )

    def _check_dynamic_sampling(self) -> None:
        rounds = self.dynamic_sampling
        if not _is_count(rounds):
            raise ValueError(
                f"`dynamic_sampling` must be a number of rounds, 0 or more, got {rounds!r}. Pass for example 4 to "
                "resample up to four times for each generation batch, or 0 to disable it."
            )
        rows = self.per_device_train_batch_size * cast(int, self.steps_per_generation)
        if rounds and rows % cast(int, self.num_generations):
            raise ValueError(
                f"`dynamic_sampling={rounds}` needs all completions of a prompt on one process. A process has "
                f"`per_device_train_batch_size` x `steps_per_generation` = {rows} completions of a generation batch, "
                f"which is not a multiple of `num_generations={self.num_generations}`. Change one of the three, or "
                "set `dynamic_sampling=0`."
            )

    @property
    def trains_aligned(self) -> bool:
        """Whether each rollout serves one optimizer step: the policy that is trained is the one that sampled it."""
        generate_every = cast(int, self.steps_per_generation) * self.num_iterations
        return self.gradient_accumulation_steps % generate_every == 0

    def _check_other_method(self) -> None:
        shaping = f"`shaping={self.shaping!r}`"
        for name, (value, default) in self.changed_settings.items():
            raise ValueError(
                f"`{name}={value!r}` has no effect because {shaping} replaces A3PO. Leave `{name}` at its default "
                f"of {default!r}, or set `shaping='a3po'`."
            )
        if self.shaping in ("aspo", "fipo") and self.trains_aligned:
            raise ValueError(
                f"{shaping} has no effect because each rollout serves one optimizer step, so every importance "
                f"ratio is 1. Set `num_iterations=2` or more, or `steps_per_generation` (here "
                f"{self.steps_per_generation}) above `gradient_accumulation_steps` (here "
                f"{self.gradient_accumulation_steps})."
            )
        clipped_losses = ("grpo", "bnpo", "dr_grpo", "dapo")
        if self.shaping == "aspo" and (
            self.loss_type not in clipped_losses or self.importance_sampling_level != "token"
        ):
            raise ValueError(
                f"{shaping} needs a loss that clips the ratio of each token, got `loss_type={self.loss_type!r}` and "
                f"`importance_sampling_level={self.importance_sampling_level!r}`. Set `loss_type` to one of "
                f"{', '.join(map(repr, clipped_losses))}, and `importance_sampling_level='token'`."
            )
        if "entropy_of_last_step" in needs_of_trainer(self.shaping) and self.logging_strategy == "no":
            raise ValueError(
                f"{shaping} reads the entropy of the last step from the log, got `logging_strategy='no'`. Set "
                "`logging_strategy='steps'` and `logging_steps=1`."
            )

    def _check_all_act(self) -> None:
        if self.positive_weight == self.negative_weight == 0:
            raise ValueError(
                "`positive_weight` and `negative_weight` are both 0, so there is nothing to train on. Pass (1, 0) to "
                "train only on positive samples, or (0, 1) to train only on negative samples."
            )
        defaults = {each.name: each.default for each in fields(self)}
        for end in TOKEN_ENDS:
            polarity = end.partition("_")[0]
            ratio, scale, weight = f"{end}_ratio", f"{end}_scale", f"{polarity}_weight"
            if getattr(self, weight) == 0:
                reason, fix = (
                    f"`{weight}=0` sets the advantage of all {polarity} completions to 0",
                    "Set another weight",
                )
            elif getattr(self, ratio) == 0:
                reason, fix = f"`{ratio}=0` selects no tokens", f"Set a ratio, for example `{ratio}=0.2`"
            elif getattr(self, scale) == 1:
                reason, fix = f"`{scale}=1` changes no advantage", f"Set another scale, for example `{scale}=2`"
            else:
                continue
            for name, off in (ratio, 0), (scale, 1):
                value = getattr(self, name)
                if value not in (off, defaults[name]):
                    raise ValueError(
                        f"`{name}={value}` has no effect because {reason}. {fix}, or leave `{name}` at its default of "
                        f"{defaults[name]}."
                    )

    def check_decay_ends(self, max_steps: int) -> None:
        """
        Refuses a decay of the scales that is longer than the training.

        Raises:
            `ValueError`: naming `scale_decay_steps`, the steps of the training and the fix.
        """
        if self.scale_decay != "constant" and selects_tokens(self.shaping_settings):
            check_decay_ends(self.scale_decay_steps, max_steps)

    @property
    def shaping_settings(self) -> dict[str, float]:
        """The ratios, initial scales and weights, as arguments of [`~trl_a3po.shape_advantages`]."""
        return {name: getattr(self, name) for name in _SHAPING_SETTINGS}

    @property
    def changed_settings(self) -> dict[str, tuple[Any, Any]]:
        """Values and defaults of A3PO's settings that differ from their defaults and do not turn a token end off."""
        settings = (*_SHAPING_SETTINGS, "token_metric", "scale_decay", "scale_decay_steps")
        found = {each.name: (getattr(self, each.name), each.default) for each in fields(self) if each.name in settings}
        off = {"ratio": 0, "scale": 1}
        return {name: both for name, both in found.items() if both[0] not in (both[1], off.get(name.split("_")[-1]))}

    @property
    def peer_settings(self) -> dict[str, float | None]:
        """If `shaping` is not A3PO: its settings, as arguments of its function in [`~trl_a3po.peers`]."""
        return {**settings_of(self.shaping), **read_settings(self.shaping_args)}


def _is_count(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0
