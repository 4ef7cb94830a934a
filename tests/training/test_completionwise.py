"""Methods that shape each completion by itself: the same update from fewer positions, and the mark is true."""

import pytest
import torch
from support import tiny
from support.training import SGD, Recorder, assert_same_update, make, moved, train, update_difference

from trl_a3po import A3POTrainer, completionwise, peers
from trl_a3po.testing import assert_gradients_follow
from trl_a3po.training.hook import check_completionwise, is_completionwise


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
    assert len(saved.passes) < len(plain.passes)
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
    # A method that is assigned on the instance has a mark of its own.
    trainer = make(tmp_path, Marked)
    trainer.shape_advantages = lambda advantages, **batch: advantages
    assert not trainer._shapes_completionwise


def test_skipped_rows_have_no_tokens_in_the_hook(tmp_path):
    class Sees(Marked):
        @completionwise
        def shape_advantages(self, advantages, *, mask, **batch):
            if self._promise_was_checked:
                self.seen = [*getattr(self, "seen", []), (advantages, mask)]
            return super().shape_advantages(advantages, mask=mask, **batch)

    for advantages, mask in trained(tmp_path, Sees).seen:
        assert not mask[advantages == 0].any()
        assert mask.any(1).sum() > 0


def test_metrics_are_those_of_the_method_without_the_mark(tmp_path):
    marked, unmarked = trained(tmp_path, Marked).state.log_history, trained(tmp_path, Unmarked).state.log_history
    for ours, theirs in zip(marked[:-1], unmarked[:-1], strict=True):
        names = [name for name in theirs if name.startswith(("a3po/signal", "a3po/positive", "a3po/negative"))]
        assert names
        assert {name: ours[name] for name in names} == pytest.approx({name: theirs[name] for name in names}, rel=1e-3)


# Promises that are not kept


class MeanOfTheBatch(A3POTrainer):
    @completionwise
    def shape_advantages(self, advantages, *, entropies, mask, **batch):
        mean = entropies[mask.bool()].mean()
        return advantages[:, None] * (entropies / mean)


class MeanReward(A3POTrainer):
    @completionwise
    def shape_advantages(self, advantages, *, rewards, **batch):
        return advantages * rewards.nanmean()


class SomethingForAll(A3POTrainer):
    @completionwise
    def shape_advantages(self, advantages, **batch):
        return advantages + 0.1


BROKEN = {
    MeanOfTheBatch: "it gives a completion other advantages if other completions of the batch change",
    MeanReward: "it gives a completion other advantages if other completions of the batch change",
    SomethingForAll: "it gives an advantage to tokens of a completion whose own advantage is 0",
}
broken = pytest.mark.parametrize(("trainer_class", "found"), BROKEN.items())


@broken
def test_a_broken_promise_ends_the_training_before_the_first_update(trainer_class, found, tmp_path):
    trainer = make(tmp_path, trainer_class, per_device_train_batch_size=8)
    with pytest.raises(ValueError, match=rf"`{trainer_class.__name__}\.shape_advantages` is marked .*, but {found}"):
        trainer.train()
    assert not moved(trainer)


@broken
def test_and_fails_the_test_of_the_method(trainer_class, found, tmp_path):
    trainer = make(tmp_path, trainer_class)
    with pytest.raises(ValueError, match=found):
        assert_gradients_follow(trainer, lambda advantages, **batch: advantages)


def test_a_marked_function_may_be_the_reference(tmp_path):
    class Bonus(A3POTrainer):
        @completionwise
        def shape_advantages(self, advantages, **batch):
            return peers.position_bonus(advantages, **batch)

    assert_gradients_follow(make(tmp_path, Bonus), peers.position_bonus)


class AtRandom(A3POTrainer):
    @completionwise
    def shape_advantages(self, advantages, *, mask, **batch):
        return advantages[:, None] * torch.rand(mask.shape)


def test_random_numbers_are_the_same_in_the_check(tmp_path):
    """And the check draws none of those of the training."""
    first, second = (trained(tmp_path, AtRandom) for _ in range(2))
    assert first._promise_was_checked
    assert_same_update(first, second)
    unchecked = type("Unchecked", (AtRandom,), {"_promise_was_checked": True})
    assert_same_update(first, trained(tmp_path, unchecked))


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
