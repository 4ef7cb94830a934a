"""The configuration of [`A3POTrainer`]: every field of `trl.GRPOConfig`, and those of the shaping."""

import inspect
from dataclasses import dataclass, field, fields
from typing import cast

from trl import GRPOConfig

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

    [`A3POConfig`] inherits every parameter from [`~trl.GRPOConfig`], with its default, and adds those of the
    advantage shaping of "Rethinking Sample Polarity in Reinforcement Learning with Verifiable Rewards" (arXiv
    2512.21625). With every scale and both weights 1 it is GRPO: to rounding, and with `trim_padding` and
    `skip_zero_advantage` off to the last bit.

    Ratio 0.2 and scale 2 are values of the example scripts in the authors' released code; which of the four token
    ends are on by default is the paper's A3PO. The decay's shape and length are our choice, see
    [`~trl_a3po.schedules.decay_scale`]. In the paper's terms of an initial scale rho and a rate alpha a step, the
    linear decay has alpha = (rho - 1) / `scale_decay_steps`: to get a rate, set `scale_decay_steps` to
    (rho - 1) / alpha.

    Parameters:
        > Parameters that control the token-level advantage shaping

        positive_low_ratio (`float`, *optional*, defaults to `0.2`):
            Share of the tokens of a positive completion (advantage above zero) whose advantage is scaled, taken from
            the lowest `token_metric`. Must be in [0, 1]; 0 selects none.
        positive_low_scale (`float`, *optional*, defaults to `2.0`):
            Initial scale of the advantage of those tokens. 1 leaves them as they are.
        positive_high_ratio (`float`, *optional*, defaults to `0.0`):
            As `positive_low_ratio`, from the highest `token_metric` of positive completions.
        positive_high_scale (`float`, *optional*, defaults to `1.0`):
            Initial scale of the advantage of those tokens.
        negative_low_ratio (`float`, *optional*, defaults to `0.0`):
            As `positive_low_ratio`, from the lowest `token_metric` of negative completions (advantage below zero).
        negative_low_scale (`float`, *optional*, defaults to `1.0`):
            Initial scale of the advantage of those tokens.
        negative_high_ratio (`float`, *optional*, defaults to `0.2`):
            As `positive_low_ratio`, from the highest `token_metric` of negative completions.
        negative_high_scale (`float`, *optional*, defaults to `2.0`):
            Initial scale of the advantage of those tokens.
        token_metric (`str`, *optional*, defaults to `"prob"`):
            What tokens are ranked by within their completion. `"prob"`: the probability under the old policy.
            `"entropy"`: the entropy of the distribution that the token was drawn from, under the policy being
            trained (TRL computes no entropies of the old policy; the two differ only where rollouts are reused).
        scale_decay (`str`, *optional*, defaults to `"linear"`):
            How every scale runs to 1, from above or below: `"linear"`, `"cosine"` or `"constant"` (not at all).
        scale_decay_steps (`float`, *optional*, defaults to `0.5`):
            When the scales arrive at 1, read as transformers reads `warmup_steps`: from 1 on a number of optimizer
            steps, below 1 a fraction of all steps. Not more than there are. Unused with `scale_decay="constant"`.

        > Parameters that control the weight of the two polarities

        positive_weight (`float`, *optional*, defaults to `1.0`):
            Weight of the advantage of every token of positive completions. With `negative_weight` it gives the
            paper's polarity-level variants: PSR (positive samples alone) is (1, 0), NSR (negative samples alone) is
            (0, 1), PxNy is (x, y), for example P2N1 (2, 1). Set the scales to 1 for these variants alone. With a
            weight of 0, those of that polarity must be 1.
        negative_weight (`float`, *optional*, defaults to `1.0`):
            Weight of the advantage of every token of negative completions.

        > Parameters that control what is trained on

        dynamic_sampling (`int`, *optional*, defaults to `0`):
            Rounds of dynamic sampling (DAPO, arXiv 2503.14476, section 3.2) for a generation batch, at most. While it
            has groups that teach nothing, as those without spread in their rewards, a round samples another
            generation batch, of prompts drawn at random from the dataset, and groups of it that teach something take
            their places. What then is left of such groups stays. 0 samples no round.

        > Parameters that control what of a rollout is computed

        trim_padding (`bool`, *optional*, defaults to `True`):
            Whether each pass over the model sees only the columns that some row of its micro-batch uses, with the
            rows of an optimizer step grouped by length where the loss is the same for any grouping, and the shaping
            not your own. The update is the same to rounding. Ignored for models with images.
        skip_zero_advantage (`bool`, *optional*, defaults to `True`):
            Whether the loss leaves out completions whose advantage is zero, as in groups that are all right or all
            wrong. The update is the same to rounding. Ignored where such completions matter to the loss: with a KL
            term (`beta`), an entropy bonus, a router loss, `top_entropy_quantile`, or a `shape_advantages` of your
            own. `entropy` is then the mean over the completions that are computed.

        > Parameters that control the logging

        log_tokens (`int`, *optional*, defaults to `0`):
            Number of prompts whose completions are written token by token at every log, for
            `trl-a3po report`: the two most positive and the two most negative of each, from the batch of
            the main process, to `tokens.jsonl` in `output_dir`. Of long completions the first 1024 tokens, at about
            35 bytes each. 0 writes none, and costs nothing.
    """

    # Parameters that control the token-level advantage shaping
    positive_low_ratio: float = field(
        default=0.2,
        metadata={
            "help": "Share of the tokens of a positive completion (advantage above zero) whose advantage is scaled, "
            "taken from the lowest `token_metric`. Must be in [0, 1]; 0 selects none."
        },
    )
    positive_low_scale: float = field(
        default=2.0,
        metadata={"help": "Initial scale of the advantage of those tokens. 1 leaves them as they are."},
    )
    positive_high_ratio: float = field(
        default=0.0,
        metadata={"help": "As `positive_low_ratio`, from the highest `token_metric` of positive completions."},
    )
    positive_high_scale: float = field(
        default=1.0,
        metadata={"help": "Initial scale of the advantage of those tokens."},
    )
    negative_low_ratio: float = field(
        default=0.0,
        metadata={
            "help": "As `positive_low_ratio`, from the lowest `token_metric` of negative completions (advantage below "
            "zero)."
        },
    )
    negative_low_scale: float = field(
        default=1.0,
        metadata={"help": "Initial scale of the advantage of those tokens."},
    )
    negative_high_ratio: float = field(
        default=0.2,
        metadata={"help": "As `positive_low_ratio`, from the highest `token_metric` of negative completions."},
    )
    negative_high_scale: float = field(
        default=2.0,
        metadata={"help": "Initial scale of the advantage of those tokens."},
    )
    token_metric: str = field(
        default="prob",
        metadata={
            "help": "What tokens are ranked by within their completion. 'prob': the probability under the old policy. "
            "'entropy': the entropy of the distribution that the token was drawn from, under the policy being "
            "trained (TRL computes no entropies of the old policy; the two differ only where rollouts are reused)."
        },
    )
    scale_decay: str = field(
        default="linear",
        metadata={
            "help": "How every scale runs to 1, from above or below: 'linear', 'cosine' or 'constant' (not at all)."
        },
    )
    scale_decay_steps: float = field(
        default=0.5,
        metadata={
            "help": "When the scales arrive at 1, read as transformers reads `warmup_steps`: from 1 on a number of "
            "optimizer steps, below 1 a fraction of all steps. Not more than there are. Unused with "
            "`scale_decay='constant'`."
        },
    )

    # Parameters that control the weight of the two polarities
    positive_weight: float = field(
        default=1.0,
        metadata={
            "help": "Weight of the advantage of every token of positive completions. With `negative_weight` it gives "
            "the paper's polarity-level variants: PSR (positive samples alone) is (1, 0), NSR (negative samples "
            "alone) is (0, 1), PxNy is (x, y), for example P2N1 (2, 1). Set the scales to 1 for these variants alone. "
            "With a weight of 0, those of that polarity must be 1."
        },
    )
    negative_weight: float = field(
        default=1.0,
        metadata={"help": "Weight of the advantage of every token of negative completions."},
    )

    # Parameters that control what is trained on
    dynamic_sampling: int = field(
        default=0,
        metadata={
            "help": "Rounds of dynamic sampling (DAPO, arXiv 2503.14476, section 3.2) for a generation batch, at "
            "most. While it has groups that teach nothing, as those without spread in their rewards, a round samples "
            "another generation batch, of prompts drawn at random from the dataset, and groups of it that teach "
            "something take their places. What then is left of such groups stays. 0 samples no round."
        },
    )

    # Parameters that control what of a rollout is computed
    trim_padding: bool = field(
        default=True,
        metadata={
            "help": "Whether each pass over the model sees only the columns that some row of its micro-batch uses, "
            "with the rows of an optimizer step grouped by length where the loss is the same for any grouping, and "
            "the shaping not your own. The update is the same to rounding. Ignored for models with images."
        },
    )
    skip_zero_advantage: bool = field(
        default=True,
        metadata={
            "help": "Whether the loss leaves out completions whose advantage is zero, as in groups that are all right "
            "or all wrong. The update is the same to rounding. Ignored where such completions matter to the loss: "
            "with a KL term (`beta`), an entropy bonus, a router loss, `top_entropy_quantile`, or a "
            "`shape_advantages` of your own. `entropy` is then the mean over the completions that are computed."
        },
    )

    # Parameters that control the logging
    log_tokens: int = field(
        default=0,
        metadata={
            "help": "Number of prompts whose completions are written token by token at every log, for "
            "`trl-a3po report`: the two most positive and the two most negative of each, from the batch of the main "
            "process, to `tokens.jsonl` in `output_dir`. Of long completions the first 1024 tokens, at about 35 bytes "
            "each. 0 writes none, and costs nothing."
        },
    )

    def __post_init__(self):
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
                f"{steps!r}. Pass for example 500 for 500 optimizer steps or 0.5 for half of the training; to switch "
                "the shaping off, set the scales to 1."
            )
        for name in ("trim_padding", "skip_zero_advantage"):
            if not isinstance(getattr(self, name), bool):
                raise ValueError(f"`{name}` must be True or False, got {getattr(self, name)!r}.")
        if not _is_count(self.log_tokens):
            raise ValueError(
                f"`log_tokens` must be a number of prompts, 0 or more, got {self.log_tokens!r}. Pass for example 2 to "
                "log completions of two prompts, or 0 to log none."
            )
        self._check_dynamic_sampling()
        self._check_all_act()
        if self.max_steps > 0:
            self.check_decay_ends(self.max_steps)

    def _check_dynamic_sampling(self) -> None:
        rounds = self.dynamic_sampling
        if not _is_count(rounds):
            raise ValueError(
                f"`dynamic_sampling` must be a number of rounds, 0 or more, got {rounds!r}. Pass for example 4 to "
                "sample up to four generation batches more for each, or 0 to sample none."
            )
        rows = self.per_device_train_batch_size * cast(int, self.steps_per_generation)
        if rounds and rows % cast(int, self.num_generations):
            raise ValueError(
                f"`dynamic_sampling={rounds}` needs the completions of a prompt on one process, which has "
                f"`per_device_train_batch_size` x `steps_per_generation` = {rows} of a generation batch: no multiple "
                f"of `num_generations={self.num_generations}`. Change one of the three, or set `dynamic_sampling=0`."
            )

    def _check_all_act(self) -> None:
        if self.positive_weight == self.negative_weight == 0:
            raise ValueError(
                "`positive_weight` and `negative_weight` are both 0, which leaves nothing to train on. Pass (1, 0) "
                "for positive samples alone, (0, 1) for negative ones alone."
            )
        defaults = {each.name: each.default for each in fields(self)}
        for end in TOKEN_ENDS:
            ratio, scale = getattr(self, f"{end}_ratio"), getattr(self, f"{end}_scale")
            weight_name = f"{end.partition('_')[0]}_weight"
            if ratio == 0 and scale not in (1, defaults[f"{end}_scale"]):
                raise ValueError(
                    f"`{end}_scale={scale}` can never act, since `{end}_ratio=0` selects no token. Set a ratio, for "
                    f"example `{end}_ratio=0.2`, or `{end}_scale=1`."
                )
            if getattr(self, weight_name) == 0 and ratio > 0 and scale != 1:
                raise ValueError(
                    f"`{end}_scale={scale}` can never act, since `{weight_name}=0` leaves all completions of that "
                    f"polarity out. Set `{end}_scale=1` as well, or another weight."
                )

    def check_decay_ends(self, max_steps: int) -> None:
        """
        Refuses scales that would not have decayed when training ends.

        Raises:
            `ValueError`: naming `scale_decay_steps`, the steps of the training and the fix.
        """
        if self.scale_decay != "constant" and selects_tokens(self.shaping_settings):
            check_decay_ends(self.scale_decay_steps, max_steps)

    @property
    def shaping_settings(self) -> dict[str, float]:
        """The ratios, initial scales and weights, as arguments of [`~trl_a3po.shape_advantages`]."""
        return {name: getattr(self, name) for name in _SHAPING_SETTINGS}


def _is_count(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0
