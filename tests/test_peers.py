"""The peers against slow references from their formulas: values, gradients through TRL's loss, and tiny trainings."""

import collections
import inspect
import json
import math
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from support import processes, reference, tiny
from support.training import assert_trained, make, moved, train

from trl_a3po import A3POTrainer, methods, peers, weight_polarities
from trl_a3po.shaping import is_completionwise
from trl_a3po.testing import assert_gradients_follow
from trl_a3po.training.trl_contract import loss_gradient, loss_inputs


# Every method, with settings under which all of its branches act on batches as small as these.
METHODS = {
    "w_reinforce": {},
    "advantage_reweighting": {},
    "entropy_advantage": {},
    "aspo": {"max_weight": 1.2},
    "position_bonus": {"alpha": 0.4},
    "fipo": {"half_life": 2.0, "lower": 0.8, "upper": 1.3, "delta": 1.4, "safety_threshold": 1.2},
    "forking_tokens": {},
    "clip_cov": {"clip_ratio": 0.25, "lower": 0.2, "upper": 3.0, "epsilon_low": 0.2, "epsilon_high": 0.3},
    "steer_exponential": {},
    "steer_linear": {},
    "gtpo_simplified": {"beta": 1.5},
    "aepo": {},
    "stare": {"entropy_of_last_step": 0.2, "top_ratio": 0.35, "negative_weight": 0.9},
}
# What has no default.
CLIP_AT = {"epsilon_low": 1.0, "epsilon_high": 1.0}
REQUIRED = {"stare": {"entropy_of_last_step": 0.2}, "clip_cov": CLIP_AT}
TOKEN_LEVEL = [name for name in METHODS if name != "w_reinforce"]
# The identity while rollout and update are aligned.
NEED_REUSE = ["aspo", "fipo"]

all_methods = pytest.mark.parametrize("name", METHODS)


def lots(shape, seed=5, device="cpu"):
    return torch.rand(shape, generator=torch.Generator(device).manual_seed(seed), device=device)


def shape(name, advantages, settings=None, **batch):
    settings = METHODS[name] if settings is None else settings
    if name == "clip_cov":
        settings = {"generator": torch.Generator(advantages.device).manual_seed(5), **settings}
    return getattr(peers, name)(advantages, **settings, **batch)


def expected(name, advantages, settings=None, **batch):
    """The same by the slow reference, (B, T)."""
    mask = batch["mask"]
    if advantages.dim() == 1:
        advantages = advantages[:, None].expand(mask.shape)
    tensors = {"advantages": advantages.float(), "lots": lots(mask.shape, device=mask.device), **batch}
    lists = {key: value.tolist() if isinstance(value, torch.Tensor) else value for key, value in tensors.items()}
    return advantages.new_tensor(
        getattr(reference, name)(**lists, **(METHODS[name] if settings is None else settings)), dtype=torch.float32
    )


def trainer_of(name, **settings):
    """As the guide makes one: a class of one line."""

    class Trainer(A3POTrainer):
        def shape_advantages(self, advantages, **batch):
            return shape(name, advantages, settings or None, **batch)

    return Trainer


def batch(seed, rows=6, tokens=11, per_token=False, dtype=torch.float32):
    """What the hook is called with: completions of all lengths, with holes, one masked whole."""
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
        "rewards": (rand(rows) > 0.5).float(),
        "progress": 0.3,
    }


# Values


@pytest.mark.parametrize("per_token", [False, True])
@pytest.mark.parametrize("name", TOKEN_LEVEL)
def test_values(name, per_token):
    for settings in (METHODS[name], REQUIRED.get(name, {})):
        changed = 0
        for seed in range(20):
            given = batch(seed, per_token=per_token)
            before = {key: value.clone() for key, value in given.items() if key != "progress"}
            ours = shape(name, settings=settings, **given)
            assert ours.dtype == torch.float32
            torch.testing.assert_close(ours, expected(name, settings=settings, **given), rtol=1e-4, atol=1e-6)
            assert all(torch.equal(given[key], value) for key, value in before.items())
            advantages = given["advantages"] if per_token else given["advantages"][:, None]
            changed += int((ours != torch.where(given["mask"] == 1, advantages, 0.0)).sum())
            assert not ours[given["mask"] == 0].any()
            if name != "clip_cov":
                assert not ours[0].any()
        assert changed >= 10


def test_w_reinforce():
    advantages = torch.zeros(6)
    rewards = torch.tensor([1.0, 0.0, -1.0, math.nan, 0.5, 2.0])
    expected = torch.tensor([0.1, -1.0, -1.0, 0.0, -1.0, 0.1])
    assert torch.equal(peers.w_reinforce(advantages, rewards=rewards), expected)
    nsr = peers.w_reinforce(advantages, positive_weight=0.0, correct_above=1.5, rewards=rewards)
    assert torch.equal(nsr, torch.tensor([-1.0, -1.0, -1.0, 0.0, -1.0, 0.0]))


@all_methods
def test_half_precision_and_a_batch_without_tokens(name):
    given = batch(0)
    given.update({key: value.bfloat16() for key, value in given.items() if key not in ("mask", "progress", "rewards")})
    assert torch.isfinite(shape(name, **given)).all()
    if name != "w_reinforce":
        assert shape(name, **given).dtype == torch.float32
        assert not shape(name, **{**given, "mask": torch.zeros_like(given["mask"])}).any()


@pytest.mark.parametrize("garbage", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("name", TOKEN_LEVEL)
def test_what_stands_where_masked_has_no_influence(name, garbage):
    given = batch(1)
    masked = given["mask"] == 0
    spoiled = {
        key: value.masked_fill(masked, garbage)
        if key in ("per_token_logps", "old_per_token_logps", "entropies")
        else value
        for key, value in given.items()
    }
    assert torch.equal(shape(name, **spoiled), shape(name, **given))


@pytest.mark.parametrize("name", TOKEN_LEVEL)
def test_extreme_batches_have_finite_advantages(name):
    ones = torch.ones(2, 3)
    for advantages in (torch.tensor([1.0, -1.0]), torch.zeros(2)):
        for logps in (0 * ones, -200 * ones):
            for old_logps in (0 * ones, -200 * ones):
                for entropies in (0 * ones, ones, torch.tensor([[0.0, 12.0, 0.0]] * 2)):
                    for mask in (ones, torch.tensor([[1, 0, 0], [0, 0, 0]])):
                        tensors = {"per_token_logps": logps, "old_per_token_logps": old_logps, "entropies": entropies}
                        shaped = shape(name, advantages, mask=mask, progress=0.5, **tensors)
                        assert torch.isfinite(shaped).all()


@pytest.mark.parametrize("name", TOKEN_LEVEL)
def test_the_host_waits_for_nothing(name):
    # Tensors of the device "meta" have no values: an operation that makes the host wait for one fails.
    logps = torch.empty(4, 16, device="meta")
    given = {"per_token_logps": logps, "old_per_token_logps": logps, "entropies": logps, "progress": 0.5}
    given["mask"] = torch.empty(4, 16, device="meta", dtype=torch.long)
    shaped = getattr(peers, name)(torch.empty(4, device="meta"), **METHODS[name], **given)
    assert shaped.is_meta
    assert shaped.shape == (4, 16)


def test_the_host_does_not_wait_for_w_reinforce():
    rewards = torch.empty(4, device="meta")
    assert peers.w_reinforce(rewards, rewards=rewards).is_meta


def test_which_methods_depend_on_the_micro_batch():
    """As the module says: the others give a row the same, whichever rows stand beside it."""
    depends = set()
    for name in TOKEN_LEVEL:
        for seed in range(5):
            given = batch(seed, rows=8)
            halves = [
                {key: value if key == "progress" else value[rows] for key, value in given.items()}
                for rows in (slice(0, 4), slice(4, 8))
            ]
            apart = torch.cat([shape(name, **half) for half in halves])
            if not torch.allclose(shape(name, **given), apart):
                depends.add(name)
    (paragraph,) = re.findall(r"\*\*Statistics over the micro-batch\.\*\*(.*?)\n\n", peers.__doc__, flags=re.DOTALL)
    assert depends == set(re.findall(r"\[`(\w+)`\]", paragraph))
    marked = {name for name in METHODS if is_completionwise(getattr(peers, name))}
    assert marked == set(TOKEN_LEVEL) - depends


@pytest.mark.parametrize("name", METHODS)
def test_all_but_w_reinforce_leave_an_advantage_of_zero_at_zero(name):
    given = batch(1)
    shaped = shape(name, **{**given, "advantages": torch.zeros_like(given["advantages"])})
    assert bool(shaped.any()) == (name == "w_reinforce")


# Of single methods


@pytest.mark.parametrize("top_ratio", [0.0, 0.01, 0.2, 0.35, 1.0])
def test_forking_tokens_keeps_the_mean_of_the_kept(top_ratio):
    for tokens in range(1, 60):
        ones, entropies = torch.ones(1, tokens), lots((1, tokens))
        shaped = peers.forking_tokens(ones[0, :1], top_ratio=top_ratio, entropies=entropies, mask=ones)
        kept = max(1, math.ceil(round(tokens * top_ratio, 6)))
        assert int((shaped > 0).sum()) == kept
        assert shaped.sum() == pytest.approx(tokens)
        assert entropies[shaped > 0].min() == entropies.sort(descending=True).values[0, kept - 1]


def test_clip_cov_draws_each_candidate_alike():
    given = batch(3, rows=12, tokens=30)
    lists = {key: value.tolist() for key, value in given.items() if key != "progress"}
    lists["advantages"] = [[value] * 30 for value in lists["advantages"]]
    candidates = set(reference.clip_cov_candidates(**lists))
    assert 3 < len(candidates) < given["mask"].sum() / 2
    drawn, generator, rounds = collections.Counter(), torch.Generator().manual_seed(0), 3000
    clip_ratio = 2.5 / int(given["mask"].sum())
    for _ in range(rounds):
        shaped = peers.clip_cov(**given, **CLIP_AT, clip_ratio=clip_ratio, generator=generator)
        zeroed = (shaped == 0) & (given["mask"] == 1) & (given["advantages"] != 0)[:, None]
        assert zeroed.sum() == 2
        drawn.update(map(tuple, zeroed.nonzero().tolist()))
    assert drawn.keys() <= candidates
    share = 2 / len(candidates)
    for candidate in candidates:
        assert drawn[candidate] / rounds == pytest.approx(share, abs=5 * math.sqrt(share / rounds))


def test_clip_cov_follows_the_seed():
    given = batch(3, rows=12, tokens=30)

    def shaped(seed):
        return peers.clip_cov(**given, **CLIP_AT, generator=torch.Generator().manual_seed(seed))

    assert torch.equal(shaped(1), shaped(1))
    assert any(not torch.equal(shaped(1), shaped(seed)) for seed in range(2, 6))
    torch.manual_seed(7)
    first = peers.clip_cov(**given, **CLIP_AT)
    torch.manual_seed(7)
    assert torch.equal(first, peers.clip_cov(**given, **CLIP_AT))


def test_steer_where_the_formula_has_no_number():
    def change(advantages, logps, old_logps, entropies):
        given = {"per_token_logps": logps, "old_per_token_logps": old_logps, "entropies": entropies}
        return peers.entropy_change(advantages, **given, mask=torch.ones_like(logps))

    logps, ones = torch.tensor([[0.0, -200.0, -1.0]]), torch.ones(1, 3)
    assert torch.isfinite(change(torch.ones(1), logps, -200 * ones, ones * math.inf)).all()
    half = torch.tensor([[0.5]]).log()
    found = change(torch.ones(1), half, 100 * half, torch.zeros(1, 1))
    assert found.item() == pytest.approx(1e8 * 0.25 * math.log(2))  # no old probability is lower than 1e-8
    equal = peers.steer_linear(
        torch.ones(1), per_token_logps=-ones, old_per_token_logps=-ones, entropies=ones, mask=ones
    )
    assert torch.equal(equal, ones)


def test_position_bonus_has_its_window():
    given = batch(2)
    plain = torch.where(given["mask"] == 1, given["advantages"][:, None], 0.0)
    for progress, is_on in ((0.19, False), (0.2, True), (0.3, True), (0.31, False)):
        shaped = peers.position_bonus(**{**given, "progress": progress}, begin=0.2, end=0.3)
        assert torch.equal(shaped, plain) != is_on
    assert (shaped.sign() == plain.sign()).all()


def test_the_entropy_of_one_token_is_no_deviation():
    one = torch.ones(1, 1)
    assert peers.aepo(torch.ones(1), entropies=3 * one, mask=one).item() == 1.0
    equal = torch.ones(2, 3)
    assert torch.equal(peers.aepo(torch.ones(2), entropies=equal, mask=equal), equal)
    rounded = equal + 1e-6 * torch.arange(6).view(2, 3)
    assert peers.aepo(torch.ones(2), entropies=rounded, mask=equal) == pytest.approx(equal, abs=1e-5)


def test_tokens_without_entropy_stay_as_they_are_in_gtpo():
    ones = torch.ones(2, 3)
    assert torch.equal(peers.gtpo_simplified(torch.ones(2), entropies=0 * ones, mask=ones), ones)


@pytest.mark.parametrize(
    ("entropy", "is_open"), [(0.1, True), (0.2999, True), (0.3, False), (2.0, False), (math.nan, True)]
)
def test_the_gate_of_stare(entropy, is_open):
    given = batch(2)
    plain = torch.where(given["mask"] == 1, given["advantages"][:, None], 0.0)
    shaped = peers.stare(entropy_of_last_step=entropy, **given)
    assert torch.equal(shaped, plain) != is_open


@pytest.mark.parametrize(("top_ratio", "selected"), [(0.0, 0), (0.001, 1), (0.1, 1), (0.101, 2), (0.2, 2), (1.0, 10)])
def test_stare_rounds_its_share_up(top_ratio, selected):
    logps, mask = -lots((2, 10)), torch.ones(2, 10)
    shaped = peers.stare(
        torch.tensor([1.0, -1.0]),
        top_ratio=top_ratio,
        negative_weight=0.9,
        entropy_of_last_step=0.0,
        per_token_logps=logps,
        mask=mask,
    )
    for row, weight in ((0, 1.1), (1, -0.9)):
        amplified = torch.isclose(shaped[row], torch.tensor(weight))
        assert int(amplified.sum()) == selected
        if selected:
            assert logps[row][amplified].max() == logps[row].sort().values[selected - 1]


def test_the_last_entropy_of_a_log():
    assert math.isnan(peers.logged_entropy([]))
    log = [{"entropy": 1.0}, {"entropy": 0.5, "loss": 0.1}, {"eval_entropy": 2.0}, {"entropy": None}, {"runtime": 1.0}]
    assert peers.logged_entropy(log) == 0.5


# Arguments


@pytest.mark.parametrize(
    ("name", "settings", "message"),
    [
        ("forking_tokens", {"top_ratio": 20}, "`top_ratio` must be a number from 0 to 1, got 20."),
        ("clip_cov", {"clip_ratio": -1, **CLIP_AT}, "`clip_ratio` must be a number from 0 to 1, got -1."),
        ("clip_cov", {"lower": 6, **CLIP_AT}, "`lower` must be a number of 5 or less, got 6"),
        ("clip_cov", {"upper": math.inf, **CLIP_AT}, "`upper` must be a finite number, got inf"),
        ("w_reinforce", {"correct_above": "half"}, "`correct_above` must be a finite number, got 'half'"),
        ("advantage_reweighting", {"alpha": math.nan}, "`alpha` must be a number from 0 to 1, got nan"),
        ("w_reinforce", {"positive_weight": -0.1}, "`positive_weight` must be a number of 0 or more, got -0.1"),
        ("steer_exponential", {"min_weight": 2}, "`min_weight` must be a number from 0 to 1, got 2"),
        ("steer_linear", {"min_weight": 2}, "`min_weight` must be a number from 0 to 1.2, got 2"),
        ("entropy_advantage", {"alpha": math.inf}, "`alpha` must be a number of 0 or more, got inf"),
        ("entropy_advantage", {"kappa": 0.5}, "`kappa` must be a number of 1 or more, got 0.5"),
        ("aspo", {"max_weight": 0.5}, "`max_weight` must be a number of 1 or more, got 0.5"),
        ("position_bonus", {"begin": 0.5, "end": 0.4}, "`begin` must be a number from 0 to 0.4, got 0.5"),
        ("position_bonus", {"end": 300}, "`end` must be a number from 0 to 1, got 300"),
        ("fipo", {"half_life": 0}, "`half_life` must be a number of 0.001 or more, got 0"),
        ("fipo", {"lower": 1.3}, "`lower` must be a number from 0 to 1.2, got 1.3"),
        ("fipo", {"delta": 0.5}, "`delta` must be a number of 1 or more, got 0.5"),
        ("gtpo_simplified", {"beta": -1}, "`beta` must be a number of 0 or more, got -1"),
        ("aepo", {"alpha": "0.2"}, "`alpha` must be a number of 0 or more, got '0.2'"),
        ("stare", {"top_ratio": 10, **REQUIRED["stare"]}, "`top_ratio` must be a number from 0 to 1, got 10"),
        (
            "stare",
            {"target_entropy": -1, **REQUIRED["stare"]},
            "`target_entropy` must be a number of 0 or more, got -1",
        ),
        ("w_reinforce", {"rewards": None}, "`w_reinforce` needs `rewards`, got None"),
        ("aepo", {"advantages": torch.ones(2)}, r"Expected `mask` of shape \(B, T\), and `advantages`"),
        ("aepo", {"mask": torch.ones(6)}, r"Got \(6,\) and \(6,\)"),
    ],
)
def test_settings_without_a_meaning_are_refused(name, settings, message):
    with pytest.raises(ValueError, match=message):
        getattr(peers, name)(**{**batch(0), **settings})


@all_methods
def test_a_misspelled_setting_is_refused(name):
    with pytest.raises(TypeError, match=r"Unknown argument `alhpa`: .* Check the spelling"):
        shape(name, alhpa=0.1, **batch(0))


def test_the_arguments_of_the_hook_are_known():
    _, _, *names = inspect.signature(A3POTrainer.shape_advantages).parameters
    assert set(names) == peers.HOOK_ARGUMENTS


def test_every_peer_is_tested():
    assert METHODS.keys() == methods.METHODS.keys() - {"a3po"}


@all_methods
def test_every_peer_names_its_source(name):
    text = inspect.getdoc(getattr(peers, name))
    assert re.search(r"arXiv \d{4}\.\d{5}", text)
    assert "\nSource: " in text
    for parameter in inspect.signature(getattr(peers, name)).parameters.values():
        if parameter.default is not parameter.empty:
            assert re.search(rf"\b{parameter.name}\b.* \(`", text)
            assert f"`{parameter.default}`" in text or parameter.default is None


# In a trainer


def unchanged_tokens(shaped, advantages, mask):
    return (shaped == advantages[:, None])[(mask == 1) & (advantages != 0)[:, None]].all()


@all_methods
def test_gradients(name, tmp_path):
    for loss_type in ("dapo", "grpo", "bnpo") if name in NEED_REUSE else ("dapo", "cispo"):
        changed = []

        def meant(advantages, mask, **given):
            shaped = expected(name, advantages, mask=mask, **given)
            changed.append(not unchanged_tokens(shaped, advantages, mask))  # noqa: B023
            return shaped

        assert_gradients_follow(make(tmp_path, trainer_of(name), loss_type=loss_type), meant)
        # At four moments of training, aligned with the rollout and later.
        assert changed == 4 * [name not in NEED_REUSE, True]


def test_aspo_inverts_the_weight_of_positive_tokens(tmp_path):
    """With TRL's own loss: the gradient of each token is min(1 / r, c) times the one of an aligned update."""
    mask, old_logps = torch.ones(2, 4, dtype=torch.long), torch.full((2, 4), -2.0)
    ratios = torch.tensor([[0.1, 0.5, 0.9, 1.1], [0.9, 1.1, 2.0, 6.0]])
    logps, advantages = old_logps + ratios.log(), torch.tensor([1.0, -1.0])
    trainer = make(tmp_path, trainer_of("aspo", max_weight=3.0), loss_type="bnpo")
    inputs = {**loss_inputs(advantages, mask, logps), "old_per_token_logps": old_logps}
    found = loss_gradient(trainer, inputs, logps, torch.ones(2, 4))
    weights = torch.tensor([[3.0, 2.0, 1 / 0.9, 1 / 1.1], [0.9, 1.1, 2.0, 3.0]])
    torch.testing.assert_close(found, -advantages[:, None] * weights / 8)


@pytest.mark.parametrize("loss_type", ["bnpo", "dapo"])
def test_forking_tokens_is_five_times_trls_entropy_quantile(loss_type, tmp_path):
    mask, logps = torch.ones(2, 10, dtype=torch.long), -lots((2, 10))
    inputs = loss_inputs(torch.tensor([1.0, -1.0]), mask, logps)
    entropies = lots((2, 10), seed=1)
    theirs = loss_gradient(
        make(tmp_path, A3POTrainer, loss_type=loss_type, top_entropy_quantile=0.2),
        inputs,
        logps,
        entropies,
        lambda advantages, **_: advantages,
    )
    ours = loss_gradient(make(tmp_path, trainer_of("forking_tokens"), loss_type=loss_type), inputs, logps, entropies)
    assert theirs.count_nonzero() == 4
    torch.testing.assert_close(ours, 5 * theirs)
    torch.testing.assert_close(ours.abs().sum(), torch.tensor(1.0))  # the mean over the tokens that are kept


class Chain(A3POTrainer):
    def shape_advantages(self, advantages, **batch):
        advantages = weight_polarities(peers.w_reinforce(advantages, **batch), 2.0, 1.0)
        advantages = peers.forking_tokens(advantages, top_ratio=0.5, **batch)
        return peers.advantage_reweighting(advantages, **batch)


def test_a_chain_of_completions_then_tokens(tmp_path):
    def slow(advantages, **batch):
        rows = expected("w_reinforce", advantages, **batch)
        rows = torch.where(rows > 0, 2 * rows, rows)
        rows = expected("forking_tokens", rows, {"top_ratio": 0.5}, **batch)
        return expected("advantage_reweighting", rows, **batch)

    assert_gradients_follow(make(tmp_path, Chain), slow)


class Reinforced(A3POTrainer):
    """A3PO's tokens of W-REINFORCE's advantages."""

    def shape_advantages(self, advantages, **batch):
        return super().shape_advantages(peers.w_reinforce(advantages, **batch), **batch)


def test_a3po_composes_by_super(tmp_path):
    trainer = make(tmp_path, Reinforced, positive_weight=3.0)

    def slow(advantages, old_per_token_logps, mask, progress, **batch):
        by_reward = expected("w_reinforce", advantages, mask=mask, **batch)[:, 0]
        scale = max(1.0, 2.0 - 2.0 * progress)  # decayed after half of the training
        settings = {**trainer.args.shaping_settings, "positive_low_scale": scale, "negative_high_scale": scale}
        return advantages.new_tensor(
            reference.shape_advantages(by_reward.tolist(), old_per_token_logps.tolist(), mask.tolist(), **settings)
        )

    assert_gradients_follow(trainer, slow)


@all_methods
def test_trains(name, tmp_path):
    assert_trained(train(tmp_path, trainer_of(name), max_steps=2))


def test_only_w_reinforce_learns_from_groups_that_are_all_wrong(tmp_path):
    def wrong(completions, **kwargs):
        return [0.0] * len(completions)

    assert moved(train(tmp_path, trainer_of("w_reinforce"), reward_funcs=wrong, max_steps=1))
    assert not moved(train(tmp_path, A3POTrainer, reward_funcs=wrong, max_steps=1))


# STARE's state


class Stare(A3POTrainer):
    """Keeps what the gate was told."""

    target_entropy = 0.3

    def shape_advantages(self, advantages, **batch):
        entropy = peers.logged_entropy(self.state.log_history)
        if self.is_in_train:
            self.told = [*getattr(self, "told", []), entropy]
        return peers.stare(
            advantages, entropy_of_last_step=entropy, target_entropy=self.target_entropy, positive_weight=3.0, **batch
        )


def test_the_gate_of_stare_follows_the_log_and_survives_a_resume(model_dir, tmp_path):
    fields = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2, "learning_rate": 5e-2, "model": model_dir}
    probe = make(tmp_path / "probe", Stare, **fields)
    probe.train()
    logged = [log["entropy"] for log in probe.state.log_history if "entropy" in log]
    assert len(set(logged)) == 4
    assert math.isnan(probe.told[0])
    assert probe.told[1:] == logged[:3]

    class Gated(Stare):
        # Open for the third step and not for the fourth, or the other way round.
        target_entropy = (logged[1] + logged[2]) / 2

    whole = make(tmp_path / "whole", Gated, **fields)
    whole.train()
    resumed = make(tmp_path / "resumed", Gated, **fields)
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-2"))
    assert resumed.told == whole.told[2:]
    assert len({entropy < Gated.target_entropy for entropy in resumed.told}) == 2
    after = tiny.parameters(whole)
    assert all(torch.equal(value, after[name]) for name, value in tiny.parameters(resumed).items())


@pytest.mark.slow
def test_the_gate_of_stare_is_the_same_on_all_processes(model_dir, tmp_path):
    worker = Path(__file__).with_name("stare_worker.py")
    command = [sys.executable, *processes.torchrun(), str(worker), model_dir, str(tmp_path)]
    subprocess.run(command, check=True, timeout=300, env={**os.environ, "OMP_NUM_THREADS": "1"})
    first, second = (json.loads((tmp_path / f"told-{rank}.json").read_text()) for rank in range(2))
    assert first["told"] == second["told"]
    assert first["rows"] != second["rows"]
    assert len(set(first["told"])) == 2
