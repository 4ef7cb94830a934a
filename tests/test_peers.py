"""The peers against slow references from their formulas: values, gradients through TRL's loss, and tiny trainings."""

import collections
import inspect
import math

import pytest
import torch
from support import reference, tiny
from trl import GRPOConfig, GRPOTrainer

from trl_a3po import A3POTrainer, peers, weight_polarities
from trl_a3po.testing import assert_gradients_follow
from trl_a3po.training.trl_contract import loss_gradient, loss_inputs


TENSORS = ("per_token_logps", "old_per_token_logps", "entropies", "mask")
CLIP_COV = {"clip_ratio": 0.25, "lower": 0.2, "upper": 3.0, "epsilon_low": 0.2, "epsilon_high": 0.3}


def batch(seed, rows=6, tokens=11, per_token=False, dtype=torch.float32):
    """What the seam is called with: completions of all lengths, with holes, one masked whole."""
    generator = torch.Generator().manual_seed(seed)

    def rand(*shape):
        return torch.rand(*shape, generator=generator)

    mask = (torch.arange(tokens) < torch.randint(1, tokens + 1, (rows, 1), generator=generator)) & (
        rand(rows, tokens) > 0.1
    )
    mask[rows // 2] = False
    logps = -4 * rand(rows, tokens) * mask
    advantages = 3 * rand(rows, tokens if per_token else 1) - 1.5
    advantages[0] = 0.0
    return {
        "advantages": (advantages if per_token else advantages[:, 0]).to(dtype),
        "per_token_logps": logps,
        "old_per_token_logps": (logps + rand(rows, tokens) - 0.5) * mask,
        "entropies": 3 * rand(rows, tokens),
        "mask": mask.long(),
    }


def lots(shape, seed=5):
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed))


def lists(advantages, *tensors):
    if advantages.dim() == 1:
        advantages = advantages[:, None].expand(tensors[0].shape)
    return [tensor.tolist() for tensor in (advantages.float(), *tensors)]


# Each twice: the peer, and its reference, of the same arguments.
def forking(advantages, entropies, mask, **_):
    return peers.forking_tokens(advantages, entropies, mask)


def forking_reference(advantages, entropies, mask, **_):
    return reference.forking_tokens(*lists(advantages, entropies, mask))


def clip(advantages, per_token_logps, old_per_token_logps, mask, **_):
    generator = torch.Generator().manual_seed(5)
    return peers.clip_cov(advantages, per_token_logps, old_per_token_logps, mask, generator=generator, **CLIP_COV)


def clip_reference(advantages, per_token_logps, old_per_token_logps, mask, **_):
    given = lists(advantages, per_token_logps, old_per_token_logps, mask, lots(mask.shape))
    return reference.clip_cov(*given, **CLIP_COV)


def exponential(advantages, per_token_logps, old_per_token_logps, entropies, mask, **_):
    return peers.steer_exponential(advantages, per_token_logps, old_per_token_logps, entropies, mask)


def exponential_reference(advantages, per_token_logps, old_per_token_logps, entropies, mask, **_):
    return reference.steer_exponential(*lists(advantages, per_token_logps, old_per_token_logps, entropies, mask))


def linear(advantages, per_token_logps, old_per_token_logps, entropies, mask, **_):
    return peers.steer_linear(advantages, per_token_logps, old_per_token_logps, entropies, mask)


def linear_reference(advantages, per_token_logps, old_per_token_logps, entropies, mask, **_):
    return reference.steer_linear(*lists(advantages, per_token_logps, old_per_token_logps, entropies, mask))


def reweighting(advantages, old_per_token_logps, mask, **_):
    return peers.advantage_reweighting(advantages, old_per_token_logps, mask)


def reweighting_reference(advantages, old_per_token_logps, mask, **_):
    return reference.advantage_reweighting(*lists(advantages, old_per_token_logps, mask))


def reinforce(advantages, rewards, **_):
    return peers.w_reinforce(rewards)


def reinforce_reference(advantages, rewards, mask, **_):
    return [[value] * mask.shape[1] for value in reference.w_reinforce(rewards.tolist())]


TOKEN_LEVEL = {
    "forking tokens": (forking, forking_reference),
    "Clip-Cov": (clip, clip_reference),
    "STEER, exponential": (exponential, exponential_reference),
    "STEER, linear": (linear, linear_reference),
    "AR": (reweighting, reweighting_reference),
}
PEERS = {"W-REINFORCE": (reinforce, reinforce_reference), **TOKEN_LEVEL}


# Values


@pytest.mark.parametrize("per_token", [False, True])
@pytest.mark.parametrize(("peer", "slow"), TOKEN_LEVEL.values(), ids=TOKEN_LEVEL.keys())
def test_values(peer, slow, per_token):
    changed = 0
    for seed in range(20):
        given = batch(seed, per_token=per_token)
        before = {name: value.clone() for name, value in given.items()}
        ours = peer(**given)
        assert ours.dtype == torch.float32
        torch.testing.assert_close(ours, torch.tensor(slow(**given)), rtol=1e-4, atol=1e-6)
        assert all(torch.equal(given[name], value) for name, value in before.items())
        advantages = given["advantages"] if per_token else given["advantages"][:, None]
        changed += int((ours != torch.where(given["mask"] == 1, advantages, 0.0)).sum())
        assert not ours[given["mask"] == 0].any()
        if peer is not clip:
            assert not ours[0].any()
    assert changed >= 20


@pytest.mark.parametrize("peer", [peer for peer, _ in TOKEN_LEVEL.values()], ids=TOKEN_LEVEL.keys())
def test_half_precision_and_a_batch_without_tokens(peer):
    assert torch.isfinite(peer(**batch(0, dtype=torch.bfloat16))).all()
    given = batch(0)
    assert not peer(**{**given, "mask": torch.zeros_like(given["mask"])}).any()


def test_w_reinforce():
    rewards = torch.tensor([1.0, 0.0, -1.0, math.nan, 0.5, 2.0])
    assert torch.equal(peers.w_reinforce(rewards), torch.tensor([0.1, -1.0, -1.0, 0.0, -1.0, 0.1]))
    nsr = peers.w_reinforce(rewards, positive_weight=0.0, correct_above=1.5)
    assert torch.equal(nsr, torch.tensor([-1.0, -1.0, -1.0, 0.0, -1.0, 0.0]))


@pytest.mark.parametrize("top_ratio", [0.0, 0.01, 0.2, 0.35, 1.0])
def test_forking_tokens_keeps_the_mean_of_the_kept(top_ratio):
    for tokens in range(1, 60):
        ones, entropies = torch.ones(1, tokens), lots((1, tokens))
        shaped = peers.forking_tokens(ones[0, :1], entropies, ones, top_ratio=top_ratio)
        kept = max(1, math.ceil(round(tokens * top_ratio, 6)))
        assert int((shaped > 0).sum()) == kept
        assert shaped.sum() == pytest.approx(tokens)
        assert entropies[shaped > 0].min() == entropies.sort(descending=True).values[0, kept - 1]


def test_clip_cov_draws_each_candidate_alike():
    given = batch(3, rows=12, tokens=30)
    candidates = set(
        reference.clip_cov_candidates(*lists(*(given[n] for n in ("advantages", *TENSORS) if n != "entropies")))
    )
    assert 3 < len(candidates) < given["mask"].sum() / 2
    drawn, generator, rounds = collections.Counter(), torch.Generator().manual_seed(0), 3000
    for _ in range(rounds):
        arguments = {name: value for name, value in given.items() if name != "entropies"}
        shaped = peers.clip_cov(**arguments, clip_ratio=2.5 / int(given["mask"].sum()), generator=generator)
        zeroed = (shaped == 0) & (given["mask"] == 1) & (given["advantages"] != 0)[:, None]
        assert zeroed.sum() == 2
        drawn.update(map(tuple, zeroed.nonzero().tolist()))
    assert drawn.keys() <= candidates
    share = 2 / len(candidates)
    for candidate in candidates:
        assert drawn[candidate] / rounds == pytest.approx(share, abs=5 * math.sqrt(share / rounds))


def test_clip_cov_follows_the_seed():
    given = {name: value for name, value in batch(3, rows=12, tokens=30).items() if name != "entropies"}

    def shaped(seed):
        return peers.clip_cov(**given, generator=torch.Generator().manual_seed(seed))

    assert torch.equal(shaped(1), shaped(1))
    assert any(not torch.equal(shaped(1), shaped(seed)) for seed in range(2, 6))
    torch.manual_seed(7)
    first = peers.clip_cov(**given)
    torch.manual_seed(7)
    assert torch.equal(first, peers.clip_cov(**given))


def test_steer_where_the_formula_has_no_number():
    logps = torch.tensor([[0.0, -200.0, -1.0]])
    advantages, ones = torch.ones(1), torch.ones(1, 3)
    change = peers.entropy_change(advantages, logps, torch.full((1, 3), -200.0), ones * math.inf, ones)
    assert torch.isfinite(change).all()
    half = torch.tensor([[0.5]]).log()
    change = peers.entropy_change(torch.ones(1), half, 100 * half, torch.zeros(1, 1), torch.ones(1, 1))
    assert change.item() == pytest.approx(1e8 * 0.25 * math.log(2))  # no old probability is lower than 1e-8
    equal = peers.steer_linear(advantages, -ones, -ones, ones, ones)
    assert torch.equal(equal, ones)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda a, m: peers.forking_tokens(a, m, m, top_ratio=20),
            "`top_ratio` must be a number from 0 to 1, got 20.",
        ),
        (lambda a, m: peers.clip_cov(a, m, m, m, clip_ratio=-1), "`clip_ratio` must be a number from 0 to 1, got -1."),
        (
            lambda a, m: peers.advantage_reweighting(a, m, m, alpha=math.nan),
            "`alpha` must be a number from 0 to 1, got",
        ),
        (
            lambda a, m: peers.w_reinforce(a, positive_weight=-0.1),
            "`positive_weight` must be a number of 0 or more, got",
        ),
        (
            lambda a, m: peers.steer_exponential(a, m, m, m, m, min_weight=2),
            "`min_weight` must be a number from 0 to 1,",
        ),
        (
            lambda a, m: peers.steer_linear(a, m, m, m, m, min_weight=2),
            "`min_weight` must be a number from 0 to 1.2, got",
        ),
        (
            lambda a, m: peers.advantage_reweighting(a[:2], m, m),
            r"Expected `mask` of shape \(B, T\), and `advantages`",
        ),
        (lambda a, m: peers.forking_tokens(a, a, a), r"Got \(4,\) and \(4,\)"),
    ],
)
def test_what_has_no_meaning_is_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call(torch.ones(4), torch.ones(4, 3))


# In a trainer


def trainer_of(shape):
    """A subclass whose seam is a function."""
    return type(
        "Peer", (A3POTrainer,), {"shape_advantages": lambda self, advantages, **given: shape(advantages, **given)}
    )


def make(trainer_class, tmp_path, reward=tiny.parity_reward, **fields):
    config_class = GRPOConfig if trainer_class is GRPOTrainer else tiny.A3POConfig
    args = tiny.config(tmp_path, config_class, **fields)
    return trainer_class(tiny.model(), reward, args, tiny.prompts(), processing_class=tiny.tokenizer())


@pytest.mark.parametrize("loss_type", tiny.LOSS_TYPES)
@pytest.mark.parametrize(("peer", "slow"), PEERS.values(), ids=PEERS.keys())
def test_gradients(peer, slow, loss_type, tmp_path):
    trainer = make(trainer_of(peer), tmp_path, loss_type=loss_type)
    changed = []

    def meant(advantages, mask, **given):
        shaped = torch.tensor(slow(advantages, mask=mask, **given))
        changed.append(((shaped != advantages[:, None]) & (mask == 1) & (advantages != 0)[:, None]).any())
        return shaped

    assert_gradients_follow(trainer, meant)
    assert all(changed)
    assert len(changed) == 8  # at four moments of training, aligned with the rollout and later


@pytest.mark.parametrize("loss_type", ["bnpo", "dapo"])
def test_forking_tokens_is_five_times_trls_entropy_quantile(loss_type, tmp_path):
    mask, logps = torch.ones(2, 10, dtype=torch.long), -lots((2, 10))
    inputs = loss_inputs(torch.tensor([1.0, -1.0]), mask, logps)
    entropies = lots((2, 10), seed=1)
    theirs = loss_gradient(
        make(A3POTrainer, tmp_path, loss_type=loss_type, top_entropy_quantile=0.2),
        inputs,
        logps,
        entropies,
        lambda advantages, **_: advantages,
    )
    ours = loss_gradient(make(trainer_of(forking), tmp_path, loss_type=loss_type), inputs, logps, entropies)
    assert theirs.count_nonzero() == 4
    torch.testing.assert_close(ours, 5 * theirs)
    torch.testing.assert_close(ours.abs().sum(), torch.tensor(1.0))  # the mean over the tokens that are kept


def composed(advantages, rewards, per_token_logps, old_per_token_logps, entropies, mask, **_):
    advantages = weight_polarities(peers.w_reinforce(rewards), 2.0, 1.0)
    advantages = peers.forking_tokens(advantages, entropies, mask, top_ratio=0.5)
    return peers.advantage_reweighting(advantages, old_per_token_logps, mask)


def composed_reference(advantages, rewards, old_per_token_logps, entropies, mask, **_):
    rows = [[2 * a if a > 0 else a] * mask.shape[1] for a in reference.w_reinforce(rewards.tolist())]
    rows = reference.forking_tokens(rows, entropies.tolist(), mask.tolist(), top_ratio=0.5)
    return torch.tensor(reference.advantage_reweighting(rows, old_per_token_logps.tolist(), mask.tolist()))


def test_a_chain_of_completions_then_tokens(tmp_path):
    assert_gradients_follow(make(trainer_of(composed), tmp_path), composed_reference)


class Reinforced(A3POTrainer):
    """A3PO's tokens of W-REINFORCE's advantages."""

    def shape_advantages(self, advantages, *, rewards, **given):
        return super().shape_advantages(peers.w_reinforce(rewards), rewards=rewards, **given)


def test_a3po_composes_by_super(tmp_path):
    trainer = make(Reinforced, tmp_path, positive_weight=3.0)

    def slow(advantages, rewards, old_per_token_logps, mask, progress, **_):
        by_reward = reference.w_reinforce(rewards.tolist())
        scale = max(1.0, 2.0 - 2.0 * progress)  # decayed after half of the training
        settings = {**trainer.args.shaping_settings, "positive_low_scale": scale, "negative_high_scale": scale}
        return torch.tensor(
            reference.shape_advantages(by_reward, old_per_token_logps.tolist(), mask.tolist(), **settings)
        )

    assert_gradients_follow(trainer, slow)


@pytest.mark.parametrize(("peer", "slow"), PEERS.values(), ids=PEERS.keys())
def test_trains(peer, slow, tmp_path):
    trainer = make(trainer_of(peer), tmp_path, max_steps=2)
    before = tiny.parameters(trainer)
    trainer.train()
    after = tiny.parameters(trainer)
    assert all(torch.isfinite(value).all() for value in after.values())
    assert any(not before[name].equal(value) for name, value in after.items())


def test_groups_that_are_all_wrong_teach_w_reinforce_alone(tmp_path):
    def wrong(completions, **kwargs):
        return [0.0] * len(completions)

    moved = {}
    for trainer_class in (trainer_of(reinforce), A3POTrainer):
        trainer = make(trainer_class, tmp_path, reward=wrong, max_steps=1)
        before = tiny.parameters(trainer)
        trainer.train()
        moved[trainer_class] = any(not before[name].equal(value) for name, value in tiny.parameters(trainer).items())
    assert list(moved.values()) == [True, False]


def test_every_peer_is_tested():
    public = {
        name for name, value in vars(peers).items() if inspect.isfunction(value) and value.__module__ == peers.__name__
    }
    tested = {"w_reinforce", "forking_tokens", "clip_cov", "steer_exponential", "steer_linear", "entropy_change"}
    assert {name for name in public if not name.startswith("_")} == {*tested, "advantage_reweighting"}
