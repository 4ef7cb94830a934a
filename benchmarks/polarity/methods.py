"""
The methods: the settings that each one changes, and where these values are from.

The base is DAPO as far as TRL has it: its loss and its asymmetric clipping, without dynamic sampling and overlong
penalty. All methods except GRPO's share it, so they differ only in the shaping.
"""

from dataclasses import dataclass, field
from typing import Any

import torch
from closed_loop import EntropyLoop, MismatchLoop

from trl_a3po import A3POTrainer, completionwise


# epsilon_high: DAPO (arXiv 2503.14476). No shaping, and all rows and columns: A3POTrainer is then GRPOTrainer, to the
# last bit, and every method's entropy is over the same tokens.
DAPO = {
    "trim_padding": False,
    "skip_zero_advantage": False,
    "loss_type": "dapo",
    "epsilon": 0.2,
    "epsilon_high": 0.28,
    "positive_low_scale": 1.0,
    "negative_high_scale": 1.0,
}
# The defaults of the package, spelled out. Ratio and scale: scripts of A3PO's authors for one end. Decay: ours.
A3PO = {
    "positive_low_ratio": 0.2,
    "positive_low_scale": 2.0,
    "negative_high_ratio": 0.2,
    "negative_high_scale": 2.0,
    "scale_decay": "linear",
    "scale_decay_steps": 0.5,
}
# Plain gradient descent, the norm of the gradient not clipped. Rate: ours, for the CPU preset.
SGD = {"optim": "sgd", "learning_rate": 0.02, "max_grad_norm": 0.0}


class RandomTokens(A3POTrainer):
    """A3PO that ranks the tokens of a completion at random: as many are amplified, as much, for as long."""

    @completionwise
    def shape_advantages(self, advantages, **batch):
        numbers = torch.rand_like(batch["per_token_logps"])
        return super().shape_advantages(advantages, **{**batch, "old_per_token_logps": numbers})


@dataclass(frozen=True)
class Method:
    """Settings of `A3POConfig` in addition to the base, the trainer, and how far the sampler lags behind."""

    settings: dict[str, Any] = field(default_factory=dict)
    trainer: type[A3POTrainer] = A3POTrainer
    stale: int | None = None  # rollouts that a copy of the policy serves


def one_end(end: str, scale: float = 2.0) -> Method:
    """A single token end, without decay. Ratio: the authors' example scripts. Scale: the package's default."""
    return Method({f"{end}_ratio": 0.2, f"{end}_scale": scale, "scale_decay": "constant"})


def peer(name: str, **settings: float) -> Method:
    """A function of `trl_a3po.peers`. Settings: the defaults, which are those of the code that it follows."""
    return Method({"shaping": name, "shaping_args": settings})


METHODS = {
    # Baselines
    "grpo": Method({"loss_type": "grpo", "epsilon_high": 0.2}),  # TRL's GRPO with the paper's symmetric clipping
    "dapo": Method(),
    "dapo_fork_trl": Method({"top_entropy_quantile": 0.2}),  # share: arXiv 2506.01939; divides by all tokens: TRL
    "dapo_fork": peer("forking_tokens"),  # the same, divided by the tokens that are kept: the authors' code
    # Weights of the polarities: arXiv 2512.21625. W-REINFORCE's lambda 0.1: arXiv 2506.01347
    "psr": Method({"negative_weight": 0.0}),
    "nsr": Method({"positive_weight": 0.0}),
    "w_reinforce": peer("w_reinforce"),
    "p2n1": Method({"positive_weight": 2.0}),
    "p1n2": Method({"negative_weight": 2.0}),
    "p2n2": Method({"positive_weight": 2.0, "negative_weight": 2.0}),
    "p1n0.5": Method({"negative_weight": 0.5}),
    # A3PO and parts of it
    "a3po": Method(A3PO),
    "a3po_constant": Method({**A3PO, "scale_decay": "constant"}),
    "a3po_positive": Method({**A3PO, "negative_high_scale": 1.0}),
    "a3po_negative": Method({**A3PO, "positive_low_scale": 1.0}),
    "a3po_entropy": Method({**A3PO, "token_metric": "entropy"}),
    # Other values of A3PO's settings, around the defaults
    "a3po_ratio_0.1": Method({**A3PO, "positive_low_ratio": 0.1, "negative_high_ratio": 0.1}),
    "a3po_ratio_0.4": Method({**A3PO, "positive_low_ratio": 0.4, "negative_high_ratio": 0.4}),
    "a3po_scale_1.5": Method({**A3PO, "positive_low_scale": 1.5, "negative_high_scale": 1.5}),
    "a3po_scale_3": Method({**A3PO, "positive_low_scale": 3.0, "negative_high_scale": 3.0}),
    "a3po_cosine": Method({**A3PO, "scale_decay": "cosine"}),
    "a3po_decay_0.25": Method({**A3PO, "scale_decay_steps": 0.25}),
    "a3po_decay_0.75": Method({**A3PO, "scale_decay_steps": 0.75}),
    # The four token ends
    "positive_low": one_end("positive_low"),
    "positive_high": one_end("positive_high"),
    "negative_low": one_end("negative_low"),
    "negative_high": one_end("negative_high"),
    # Controls that should not help: the two ends that A3PO does not use, and random tokens
    "reversed": Method(
        {
            "positive_high_ratio": 0.2,
            "positive_high_scale": 2.0,
            "negative_low_ratio": 0.2,
            "negative_low_scale": 2.0,
        }
    ),
    "random": Method(A3PO, RandomTokens),
    # Peers, each with the values of the code that it follows, on the base clipping
    "clip_cov": peer("clip_cov"),  # arXiv 2505.22617
    "steer": peer("steer_exponential"),  # arXiv 2510.10150
    "ar": peer("advantage_reweighting"),  # arXiv 2505.12929
    "entropy_advantage": peer("entropy_advantage"),  # arXiv 2506.14758
    "aspo": peer("aspo"),  # arXiv 2510.06062
    "position_bonus": peer("position_bonus"),  # arXiv 2508.02260, in all of the training
    "fipo": peer("fipo"),  # arXiv 2603.19835
    "gtpo": peer("gtpo_simplified"),  # arXiv 2508.04349, simplified
    "aepo": peer("aepo"),  # arXiv 2510.14545, its advantage
    # arXiv 2606.19236. The authors' target, 0.3 nats, is below the entropy of every method here, and would never open
    # the gate. The entropy is the mean over the steps between two logs.
    "stare": peer("stare", target_entropy=EntropyLoop.bound),
    # The closed loop, ours
    "a3po_loop_entropy": Method({**A3PO, "scale_decay": "constant"}, EntropyLoop),
    # With a sampler that lags behind by up to 40 optimizer steps, without a correction for that
    "stale_dapo": Method(stale=10),
    "stale_a3po": Method(A3PO, stale=10),
    "stale_a3po_constant": Method({**A3PO, "scale_decay": "constant"}, stale=10),
    "stale_a3po_loop": Method({**A3PO, "scale_decay": "constant"}, MismatchLoop, stale=10),
    "stale_a3po_loop_entropy": Method({**A3PO, "scale_decay": "constant"}, EntropyLoop, stale=10),
    # P1N1 and P2N2 once more, where nothing cancels the size of the advantages
    "sgd": Method(SGD),
    "sgd_p2n2": Method({**SGD, "positive_weight": 2.0, "negative_weight": 2.0}),
    # GRPO with A3PO, and with DAPO's clipping
    "a3po_grpo": Method({**A3PO, "loss_type": "grpo", "epsilon_high": 0.2}),
    "grpo_clip_higher": Method({"loss_type": "grpo"}),
}
