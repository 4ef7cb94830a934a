"""
[`DynamicSamplingGRPOTrainer`]: groups with nothing to learn from make room for groups of fresh prompts.

That is the dynamic sampling of DAPO (arXiv 2503.14476, section 3.2), which samples until the batch is full of groups
that are neither all right nor all wrong (its equation 11). What we chose: a group goes by its advantages, not by how
many of its completions are right; fresh prompts are drawn from the whole dataset; and after a number of rounds the
batch is taken as it is.

Shapes: B rows of G completions each of one prompt, group after group.
"""

from collections.abc import Iterator, Sequence, Sized
from itertools import islice
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import pad
from transformers import ProcessorMixin

from ..update.efficient_update import TrimmedGRPOTrainer
from ..update.micro_batches import loss_mask, merge_rows, take_rows


class DynamicSamplingGRPOTrainer(TrimmedGRPOTrainer):
    """
    The part of [`A3POTrainer`] that is about which groups are trained on.

    A round is a generation batch of fresh prompts, in the shape of the first. All processes run as many rounds, those
    too that need none: they share engines and rewards. A group stays on the process that it was sampled on.

    Raises:
        `ValueError`: with `dynamic_sampling`, a dataset that cannot be indexed, a model with images, or one that sees
            how wide the padding of its prompts is.
    """

    num_generations: int
    processing_class: Any

    # Those of an optimizer step.
    _fresh_prompts: tuple[int, Iterator[int]] = (-1, iter(()))

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        if not self.args.dynamic_sampling:
            return
        if not isinstance(self.train_dataset, Sized):
            refused = f"a dataset without an index, `{type(self.train_dataset).__name__}`. Pass a `Dataset`"
        elif isinstance(self.processing_class, ProcessorMixin):
            refused = "a processor of images. To train on text alone, pass the tokenizer as `processing_class`"
        else:
            return
        raise self._refusal(refused)

    def _refusal(self, refused: str) -> ValueError:
        return ValueError(
            f"`dynamic_sampling={self.args.dynamic_sampling}` is not supported with {refused}, or set "
            "`dynamic_sampling=0`."
        )

    def _check_traits(self):
        super()._check_traits()
        traits = self._traits
        if self.args.dynamic_sampling and (traits.left_padding or traits.right_padding or traits.company):
            # A group's log-probabilities would be others among longer prompts than it was sampled with.
            raise self._refusal("a model, or an adapter, that sees the padding of prompts. Take another")

    def _generate_round(self, inputs: list[dict[str, Any]]) -> dict[str, Any]:
        """The rollout of a batch of prompts. What a subclass adds to its rows, it adds here."""
        return super()._generate_and_score_completions(inputs)

    def _generate_and_score_completions(self, inputs):
        rollout = self._generate_round(inputs)
        if not (self.args.dynamic_sampling and self.model.training):
            return rollout
        live = self._live_groups(rollout)
        [dead] = self._sum_over_processes(live.count(False))
        rounds, sampled_dead = 0, dead
        while dead and rounds < self.args.dynamic_sampling:
            fresh = self._generate_round(self._draw_inputs(len(inputs)))
            fresh_live = self._live_groups(fresh)
            swaps = pair_groups(live, fresh_live)
            rollout = swap_groups(rollout, fresh, swaps, self.num_generations, self.processing_class.pad_token_id)
            live = self._live_groups(rollout)
            dead, fresh_dead = self._sum_over_processes(live.count(False), fresh_live.count(False))
            rounds, sampled_dead = rounds + 1, sampled_dead + fresh_dead
        if rounds:
            # As TRL counts since 1.9; before, completions that `mask_truncated_completions` leaves out counted too.
            rollout["num_items_in_batch"] = self.accelerator.gather(loss_mask(rollout).sum()).sum()
        discarded = sampled_dead - dead
        unused = rounds * len(live) * self.accelerator.num_processes - discarded
        counts = {"rounds": rounds, "discarded": discarded, "unused": unused, "unfilled": dead}
        for name, count in counts.items():
            self._metrics["train"][f"a3po/dynamic_sampling/{name}"].append(count)
        return rollout

    def _live_groups(self, rollout: dict[str, Any]) -> list[bool]:
        return live_groups(rollout["advantages"], self._has_gradient(rollout), self.num_generations)

    def _sum_over_processes(self, *counts: int) -> list[int]:
        local = torch.tensor(counts, device=self.accelerator.device)
        return self.accelerator.gather(local).view(-1, len(counts)).sum(0).tolist()

    def _draw_inputs(self, rows: int) -> list[dict[str, Any]]:
        """As many rows of fresh prompts for this process: what the dataloader would make of them."""
        loader, step = cast(Any, self.callback_handler.train_dataloader), self.state.global_step
        if self._fresh_prompts[0] != step:
            self._fresh_prompts = step, fresh_prompts(len(loader.dataset), self.args.seed, step)
        groups = rows // self.num_generations
        first = self.accelerator.process_index * groups
        drawn = list(islice(self._fresh_prompts[1], groups * self.accelerator.num_processes))[first : first + groups]
        return loader.collate_fn([loader.dataset[i] for i in drawn for _ in range(self.num_generations)])


def fresh_prompts(dataset_size: int, seed: int, step: int) -> Iterator[int]:
    """
    The prompts that dynamic sampling draws in an optimizer step, the same on all processes and in a resumed run.

    Returns:
        Iterator over indices, without end: of all prompts in one random order, then in another.
    """
    generator = np.random.default_rng([seed, step])
    while True:
        yield from map(int, generator.permutation(dataset_size))


def live_groups(advantages: Tensor, has_gradient: Tensor, num_generations: int) -> list[bool]:
    """
    Whether there is something to learn from each group. Waits for the device.

    Equal rewards have equal advantages, but not always 0: the mean of eight times 0.3 is not 0.3 in float32.

    Args:
        advantages (`torch.Tensor` of shape `(B,)`): Advantage of each completion.
        has_gradient (`torch.Tensor` of shape `(B,)`): Whether the loss can have a gradient in it.
        num_generations (`int`): Completions of a group.

    Returns:
        `list[bool]` of length B / G: whether advantages of the group differ, and a completion of it has a gradient.
    """
    groups = advantages.view(-1, num_generations)
    differ = (groups != groups[:, :1]).any(1)
    return (differ & has_gradient.view(-1, num_generations).any(1)).tolist()


def pair_groups(live: Sequence[bool], fresh_live: Sequence[bool]) -> list[tuple[int, int]]:
    """Pairs each group that is not live with a fresh one that is, in order, for as long as there are both."""
    places = [group for group, is_live in enumerate(live) if not is_live]
    return list(zip(places, [group for group, is_live in enumerate(fresh_live) if is_live], strict=False))


def swap_groups(
    rollout: dict[str, Any],
    fresh: dict[str, Any],
    swaps: Sequence[tuple[int, int]],
    num_generations: int,
    pad_token_id: int,
) -> dict[str, Any]:
    """
    Puts groups of one rollout in the places of groups of another.

    Args:
        rollout (`dict`): Tensors and lists with a row for each completion, and what all of them share.
        fresh (`dict`): The same of other prompts, as many rows, with as many columns as it takes.
        swaps (sequence of `tuple[int, int]`): Pairs of a group of `rollout` and the group of `fresh` in its place.
        num_generations (`int`): Completions of a group.
        pad_token_id (`int`): What token ids are padded with.

    Returns:
        `dict`: `rollout` with those groups, as wide as the wider of the two: prompts padded on the left, the rest on
        the right. What all rows share is that of `rollout`.

    Raises:
        `ValueError`: the two do not hold the same.
    """
    if rollout.keys() != fresh.keys():
        raise ValueError(
            f"Of two rounds of dynamic sampling only one has {', '.join(sorted(rollout.keys() ^ fresh.keys()))}. "
            "Return the same fields from every call of `rollout_func`, with an `env_mask` of 1 where no token is "
            "masked."
        )
    rows = list(range(len(rollout["completion_ids"])))
    for place, group in swaps:
        first, first_fresh = place * num_generations, len(rows) + group * num_generations
        rows[first : first + num_generations] = range(first_fresh, first_fresh + num_generations)
    # As TRL pads. VESPO reads the ratio of padding, too.
    padding = {
        "prompt_ids": pad_token_id,
        "completion_ids": pad_token_id,
        "tool_mask": 1,
        "importance_sampling_ratio": 1,
    }
    swapped: dict[str, Any] = {}
    for key, value in rollout.items():
        both = [value, fresh[key]]
        if isinstance(value, Tensor) and value.dim():
            both = _same_width(*both, on_the_left=key.startswith("prompt"), value=padding.get(key, 0))
        swapped[key] = take_rows(merge_rows(both), rows)
    return swapped


def _same_width(a: Tensor, b: Tensor, *, on_the_left: bool, value: float) -> list[Tensor]:
    """Two tensors of shape (B, columns), or (B,), the narrower one padded."""
    if a.dim() == 1:
        return [a, b]
    missing = [max(a.shape[1], b.shape[1]) - each.shape[1] for each in (a, b)]
    return [
        pad(each, (columns, 0) if on_the_left else (0, columns), value=value)
        for each, columns in zip((a, b), missing, strict=True)
    ]
