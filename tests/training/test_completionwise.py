"""Methods that shape each completion by itself: the same update from fewer positions, and the mark is true."""

import functools

import pytest
import torch
from support import tiny
from support.training import SGD, Recorder, assert_same_update, make, moved, train, update_difference

from trl_a3po import A3POTrainer, completionwise, peers
from trl_a3po.shaping import is_completionwise
from trl_a3po.testing import assert_gradients_follow
from trl_a3po.training.hook import check_completionwise


# FIPO and ASPO act only on rollouts that are used again.
REUSED = {"num_iterations": 2, "max_steps": 4, "epsilon": 0.5}
MARKED = {name for name in dir(peers) if is_completionwise(getattr(peers, name))}


def sometimes_equal_reward(completion_ids, **kwargs):
    """Every other group of four is all right."""
    return [float(i // 4 % 2 == 0 or ids[0] % 2) for i, ids in enumerate(completion_ids)]


def trained(output_dir, trainer_class=Recorder, **fields):
    defaults = {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 4, "max_completion_length": 8}
    return train(output_dir, trainer_class, reward_funcs=sometimes_equal_reward, **{**SGD, **defaults, **fields})


class Unmarked(Recorder):
    """Reads everything that a row has; what it makes of masked tokens is infinite, or not a number."""

    def shape_advantages(self, advantages, *, entropies, mask, rewards, **batch):
        shaped = super().shape_advantages(advantages, entropies=entropies, mask=mask, rewards=rewards, **batch)
        return shaped * (1 + entropies) * (1 + rewards[:, None]) / mask


class Marked(Unmarked):
    @completionwise
    def shape_advantages(self, advantages, **batch):
        return super().shape_advantages(advantages, **batch)


class OnePerCompletion(Recorder):
    """NaN in rows without tokens."""

    @completionwise
    def shape_advantages(self, advantages, *, mask, **batch):
        return advantages / mask.sum(1) * mask.sum(1)


@pytest.mark.parametrize("fields", [{}, REUSED, {"skip_old_logps": False, **REUSED}], ids=["once", "twice", "old"])
@pytest.mark.parametrize("name", sorted(MARKED))
def test_the_update_of_a_marked_peer_is_the_same_from_fewer_positions(name, fields, tmp_path):
    if name in ("aspo", "fipo") and not fields:
        pytest.skip("it changes nothing while rollout and update are aligned")
    plain = trained(tmp_path, shaping=name, **{**fields, **tiny.PLAIN})
    saved = trained(tmp_path, shaping=name, **fields)
    assert update_difference(saved, plain) < 1e-4
    assert saved._regroups()
    assert saved.cells < plain.cells
    computed = [~batch["entropies"].isnan().all(1) for batch in saved.batches]
    dead = [batch["advantages"] == 0 for batch in saved.batches]
    assert any(rows.any() for rows in dead)
    assert not any((rows & others).any() for rows, others in zip(computed, dead, strict=True))


@pytest.mark.parametrize("fields", [{}, REUSED, {"trim_padding": False}, {"skip_zero_advantage": False}], ids=str)
@pytest.mark.parametrize("trainer_class", [Marked, OnePerCompletion])
def test_so_is_that_of_a_marked_method_of_ones_own(trainer_class, fields, tmp_path):
    plain = trained(tmp_path, trainer_class, **{**fields, **tiny.PLAIN})
    saved = trained(tmp_path, trainer_class, **fields)
    assert update_difference(saved, plain) < 1e-4
    assert saved.cells < plain.cells


def test_without_the_mark_every_row_is_computed(tmp_path):
    marked, unmarked = trained(tmp_path, Marked), trained(tmp_path, Unmarked)
    assert update_difference(marked, unmarked) < 1e-4
    assert marked.cells < unmarked.cells
    assert not any(batch["entropies"].isnan().any() for batch in unmarked.batches)


def test_an_override_of_a_marked_method_is_not_marked(tmp_path):
    class Override(Marked):
        def shape_advantages(self, advantages, **batch):
            return super().shape_advantages(advantages, **batch)

    assert make(tmp_path, Marked)._shapes_completionwise
    assert not make(tmp_path, Override)._shapes_completionwise
    trainer = make(tmp_path, Marked)

    @functools.wraps(Marked.shape_advantages)
    def wraps(advantages, **batch):
        return advantages

    for hook in (wraps, lambda advantages, **batch: advantages):
        trainer.shape_advantages = hook
        assert not trainer._shapes_completionwise
        trainer.shape_advantages = completionwise(hook)
        assert trainer._shapes_completionwise


def test_only_functions_can_be_marked(tmp_path):
    for hook in (make(tmp_path, Unmarked).shape_advantages, functools.partial(peers.aspo, max_weight=2.0), None):
        with pytest.raises(TypeError, match=r"`completionwise` marks functions, got .*Write `@comp"):
            completionwise(hook)


def test_the_method_does_not_see_rows_that_are_skipped_or_added(tmp_path):
    class Sees(Marked):
        _promise_was_checked = True  # the check calls the method, too

        @completionwise
        def shape_advantages(self, advantages, *, mask, weight, names, **batch):
            self.seen = [*getattr(self, "seen", []), (advantages, mask)]
            assert names == [f"row {number:g}" for number in weight]
            return super().shape_advantages(advantages, mask=mask, **batch) * weight[:, None]

        def _generate_and_score_completions(self, inputs):
            rollout = super()._generate_and_score_completions(inputs)
            self.live = int((rollout["advantages"] != 0).sum())
            rows = range(len(rollout["rewards"]))
            weight = rollout["rewards"].new_tensor(rows)
            return {**rollout, "weight": weight, "names": [f"row {row}" for row in rows]}

    class OthersHaveMoreRows(Sees):
        def _largest(self, numbers):
            others = 4, 6  # passes, and rows in the largest
            return [max(pair) for pair in zip(numbers, others * (len(numbers) // 2), strict=True)]

    for trainer_class in (Sees, OthersHaveMoreRows):
        trainer = trained(tmp_path, trainer_class, max_steps=1)
        assert sum(len(advantages) for advantages, _ in trainer.seen) == trainer.live
        assert 0 < trainer.live <= 8  # of 16
        assert trainer.live == 8 or not tiny.USES_CPU  # a GPU draws other completions
        for advantages, mask in trainer.seen:
            assert (advantages != 0).all()
            assert mask.any(1).all()


def test_metrics_are_those_of_the_method_without_the_mark(tmp_path):
    marked, unmarked = trained(tmp_path, Marked).state.log_history, trained(tmp_path, Unmarked).state.log_history
    for ours, theirs in zip(marked[:-1], unmarked[:-1], strict=True):
        names = [name for name in theirs if name.startswith(("signal/", "a3po/positive", "a3po/negative"))]
        assert names
        assert {name: ours[name] for name in names} == pytest.approx({name: theirs[name] for name in names}, rel=1e-3)


# Promises that are not kept


def broken_promise(shape):
    """A class that is marked, and has a field in its rollouts."""

    class Broken(Recorder):
        @completionwise
        def shape_advantages(self, advantages, *, weight, **batch):
            return shape(advantages, weight=weight, **batch)

        def _generate_and_score_completions(self, inputs):
            rollout = super()._generate_and_score_completions(inputs)
            return {**rollout, "weight": 1 + torch.rand_like(rollout["rewards"])}

    return Broken


def mean_of_positive(advantages, *, entropies, mask, **batch):
    positive = (advantages > 0)[:, None] & mask.bool()
    mean = entropies[positive].mean()
    return torch.where(positive, entropies / mean, 1.0) * advantages[:, None]


def largest(advantages, *, per_token_logps, mask, **batch):
    return advantages[:, None] * per_token_logps / per_token_logps[mask.bool()].min()


ON_OTHERS = "what it returns for a completion depends on the other completions of the batch"
BROKEN = {
    "entropies": (mean_of_positive, ON_OTHERS),
    "log-probabilities": (largest, ON_OTHERS),
    "lengths": (lambda advantages, *, mask, **batch: advantages * mask.sum(1) / mask.sum(), ON_OTHERS),
    "rewards": (lambda advantages, *, rewards, **batch: advantages * rewards.nanmean(), ON_OTHERS),
    "fields": (lambda advantages, *, weight, **batch: advantages * weight / weight.sum(), ON_OTHERS),
    "something for all": (
        lambda advantages, **batch: advantages + 0.1,
        "it returns 0.1 for a completion whose advantage is 0",
    ),
    "something for the wrong": (
        lambda advantages, *, rewards, **batch: advantages.where((advantages != 0) | (rewards > 0.5), -0.5),
        "it returns -0.5 for a completion whose advantage is 0",
    ),
    "no number": (
        lambda advantages, **batch: advantages / advantages.abs(),
        "it returns nan for a completion whose advantage is 0",
    ),
}
broken = pytest.mark.parametrize(("shape", "found"), BROKEN.values(), ids=BROKEN.keys())


@broken
def test_a_broken_promise_ends_the_training_before_the_first_update(shape, found, tmp_path):
    fields = {"per_device_train_batch_size": 8, "max_completion_length": 8}
    trainer = make(tmp_path, broken_promise(shape), reward_funcs=tiny.digit_reward, **fields)
    with pytest.raises(ValueError, match=rf"Broken\.shape_advantages` is marked .*, but {found}"):
        trainer.train()
    assert not moved(trainer)


@broken
def test_and_fails_the_test_of_the_method(shape, found, tmp_path):
    trainer = make(tmp_path, broken_promise(shape))
    fields = {"weight": torch.rand(6, device=tiny.DEVICE)}
    with pytest.raises(ValueError, match=found):
        assert_gradients_follow(trainer, lambda advantages, **batch: advantages, fields=fields)


def test_a_method_that_calls_one_without_the_mark_is_refused(tmp_path):
    trainer = make(tmp_path, Marked, shaping="stare", logging_steps=1)
    with pytest.raises(ValueError, match=r"Marked.shape_advantages` is marked .*`shaping='stare'` and is not"):
        trainer.train()


def test_the_values_are_real_ones(tmp_path):
    """A method that works for the rewards and lengths of the run is not called with others."""

    class Picky(Marked):
        @completionwise
        def shape_advantages(self, advantages, *, rewards, **batch):
            assert set(rewards.tolist()) <= {0.0, 1.0}
            return super().shape_advantages(advantages, rewards=rewards, **batch)

    assert trained(tmp_path, Picky)._promise_was_checked


@pytest.mark.parametrize("size", [1, 4])
def test_the_check_changes_no_attribute(size, tmp_path):
    class Counts(Marked):
        calls = 0

        @completionwise
        def shape_advantages(self, advantages, **batch):
            self.calls += 1
            return super().shape_advantages(advantages, **batch)

    trainer = trained(
        tmp_path, Counts, per_device_train_batch_size=size, gradient_accumulation_steps=16 // size, trim_padding=False
    )
    live = [int((~batch["entropies"].isnan().all(1)).sum()) for batch in trainer.batches]
    assert trainer.calls == sum(rows > 0 for rows in live) > 0
    assert trainer._promise_was_checked == (size > 1)


def test_a_marked_function_may_be_the_reference(tmp_path):
    class Bonus(A3POTrainer):
        @completionwise
        def shape_advantages(self, advantages, **batch):
            return peers.position_bonus(advantages, **batch)

    assert_gradients_follow(make(tmp_path, Bonus), peers.position_bonus)


class AtRandom(A3POTrainer):
    @completionwise
    def shape_advantages(self, advantages, *, mask, **batch):
        return advantages[:, None] * torch.rand(mask.shape, device=mask.device)


def test_random_numbers_are_the_same_in_the_check(tmp_path):
    """And the check draws none of those of the training."""
    first, second = (trained(tmp_path, AtRandom) for _ in range(2))
    assert first._promise_was_checked
    assert_same_update(first, second)
    unchecked = type("Unchecked", (AtRandom,), {"_promise_was_checked": True})
    assert_same_update(first, trained(tmp_path, unchecked))


def test_a_random_method_draws_what_its_reference_draws(tmp_path):
    def reference(advantages, *, mask, **batch):
        return advantages[:, None] * torch.rand(mask.shape, device=mask.device)

    assert_gradients_follow(make(tmp_path, AtRandom), reference)


@pytest.mark.parametrize(("advantages", "is_enough"), [([0, 0, 0], False), ([0, 1, 0], False), ([1, 0, -1], True)])
def test_a_batch_with_too_little_to_compare_does_not_count(advantages, is_enough):
    tokens = torch.rand(3, 4, generator=torch.Generator().manual_seed(0))
    batch = dict.fromkeys(["per_token_logps", "old_per_token_logps", "entropies"], tokens)
    found = check_completionwise(
        lambda advantages, **batch: advantages,
        torch.tensor(advantages, dtype=torch.float32),
        mask=torch.ones(3, 4).long(),
        rewards=None,
        **batch,
    )
    assert found is is_enough
