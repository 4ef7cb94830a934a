"""What the shaping costs a GPU's host and the network: nothing. Shown without either."""

import collections

import pytest
import torch
from support import tiny
from trl import GRPOConfig, GRPOTrainer

from trl_a3po import A3POTrainer, shape_advantages
from trl_a3po.shaping import TOKEN_ENDS, gspo_token_old_logps, weight_polarities
from trl_a3po.training.polarity_metrics import polarity_sums


def shape_and_measure(device):
    """Everything that A3PO adds to a loss."""
    advantages = torch.empty(4, device=device)
    metric, entropies = torch.empty(4, 16, device=device), torch.empty(4, 16, device=device)
    mask = torch.empty(4, 16, device=device, dtype=torch.long)
    settings = {f"{end}_{what}": value for end in TOKEN_ENDS for what, value in (("ratio", 0.2), ("scale", 2.0))}
    shaped = shape_advantages(advantages, metric, mask, **settings)
    gspo_token_old_logps(metric, metric, mask)
    sums = polarity_sums(advantages, weight_polarities(advantages, 2.0), shaped, metric, entropies, mask)
    return shaped, sums


def test_the_host_waits_for_nothing():
    # Tensors of the device "meta" have no values: whatever would make the host wait for one fails.
    shaped, sums = shape_and_measure("meta")
    assert shaped.is_meta
    assert sums.is_meta
    assert shaped.shape == (4, 16)


@pytest.mark.parametrize(
    "wait", [lambda x: x.nonzero(), lambda x: x[x > 0], lambda x: x.sum().item(), lambda x: x.cpu()]
)
def test_the_check_notices_what_waits(wait):
    with pytest.raises((RuntimeError, NotImplementedError)):
        wait(torch.empty(4, device="meta"))


def count_collectives(trainer_class, config_class, tmp_path, monkeypatch, **fields):
    trainer = trainer_class(
        tiny.model(),
        tiny.parity_reward,
        tiny.config(tmp_path, config_class, max_steps=4, logging_steps=2, **fields),
        tiny.prompts(),
        processing_class=tiny.tokenizer(),
    )
    calls = collections.Counter()

    def counted(name):
        original = getattr(trainer.accelerator, name)

        def call(*args, **kwargs):
            calls[name] += 1
            return original(*args, **kwargs)

        return call

    for name in ("gather", "gather_for_metrics", "reduce", "pad_across_processes"):
        monkeypatch.setattr(trainer.accelerator, name, counted(name))
    trainer.train()
    return calls


def test_one_collective_operation_a_log_and_one_at_the_end_are_added(tmp_path, monkeypatch):
    theirs = count_collectives(GRPOTrainer, GRPOConfig, tmp_path, monkeypatch)
    ours = count_collectives(A3POTrainer, tiny.A3POConfig, tmp_path, monkeypatch)
    assert theirs["gather"] > 0
    # The metrics of two logs, and whether the parameters are finite at the end.
    assert ours - theirs == {"reduce": 3}
    assert not theirs - ours
