"""What TRL brings besides: rollouts with tools and environments, images, experts, continuous batching."""

import math
import re

import numpy as np
import pytest
import torch
from support import tiny
from support.runs import (
    CONTINUOUS_BATCHING,
    ENVIRONMENTS,
    EXPERTS,
    ROLLOUT_FUNCTION,
    ROUTER_LOSS,
    RUNS,
    TEXT_WITH_PROCESSOR,
    TOOLS,
    images,
    images_without_column,
    make_run,
    text_with_processor,
    train_run,
)
from support.training import Recorder, ShapingRecorder, assert_trained, largest_difference, moved, update_difference
from trl import GRPOTrainer

from trl_a3po import shape_advantages


pytestmark = pytest.mark.filterwarnings(
    "ignore:You are using 'rollout_func':UserWarning", "ignore:You are using 'environment_factory':UserWarning"
)


@pytest.mark.parametrize("run", RUNS)
def test_trains(run, tmp_path):
    trainer = train_run(run, tmp_path)
    assert_trained(trainer)
    assert largest_difference(tiny.parameters(trainer), trainer.start) > 1e-3
    *steps, _ = trainer.state.log_history
    assert [entry["a3po/scale/positive_low"] > 1 for entry in steps] == [*[True] * (len(steps) - 1), False]
    for entry in steps:
        assert math.isfinite(entry["loss"])
        polarities = ("positive", "negative", "zero")
        lengths = [entry[f"a3po/{p}/fraction"] * entry.get(f"a3po/{p}/mean_length", 0) for p in polarities]
        assert sum(lengths) == pytest.approx(entry["completions/mean_length"])
        for polarity, amplified in (("positive", "positive_low"), ("negative", "negative_high")):
            assert (entry[f"a3po/{polarity}/selected_fraction"] > 0) == (entry[f"a3po/scale/{amplified}"] > 1)


@pytest.mark.parametrize("run", RUNS)
def test_neutral_settings_are_grpo_to_the_last_bit(run, tmp_path):
    ours, theirs = train_run(run, tmp_path, **tiny.NEUTRAL), train_run(run, tmp_path, GRPOTrainer)
    assert largest_difference(tiny.parameters(ours), tiny.parameters(theirs)) == 0


@pytest.mark.parametrize(
    "run", [ROLLOUT_FUNCTION, TOOLS, ENVIRONMENTS, TEXT_WITH_PROCESSOR, EXPERTS, CONTINUOUS_BATCHING]
)
def test_the_update_is_the_same_from_fewer_cells(run, tmp_path):
    plain, saved = (train_run(run, tmp_path, Recorder, **fields) for fields in (tiny.PLAIN, {}))
    assert update_difference(saved, plain) < 1e-4
    assert len(saved.passes) <= len(plain.passes)
    assert saved.cells < 0.9 * plain.cells


@pytest.mark.parametrize("run", [ROUTER_LOSS])
def test_the_loss_of_the_router_needs_every_row_but_no_padding(run, tmp_path):
    plain, saved = (train_run(run, tmp_path, Recorder, **fields) for fields in (tiny.PLAIN, {}))
    assert update_difference(saved, plain) < 1e-4
    assert {rows for rows, _ in saved.passes} == {4}
    assert sum(columns for _, columns in saved.passes) < sum(columns for _, columns in plain.passes)
    for ours, theirs in zip(saved.state.log_history[:-1], plain.state.log_history[:-1], strict=True):
        assert ours["aux_loss"] == pytest.approx(theirs["aux_loss"], rel=1e-4)
        assert ours["aux_loss"] > 0


REUSED = {"num_iterations": 2, "max_steps": 4}


@pytest.mark.parametrize("fields", [{}, REUSED], ids=["once", "twice"])
@pytest.mark.parametrize("run", [images, images_without_column])
def test_images_switch_the_savings_off(run, fields, tmp_path):
    plain, saved = (train_run(run, tmp_path, Recorder, **fields, **more) for more in (tiny.PLAIN, {}))
    assert saved.passes == plain.passes
    assert largest_difference(tiny.parameters(saved), tiny.parameters(plain)) == 0
    assert any("vision_tower" in name for name in moved(saved))


def test_a_processor_alone_does_not(tmp_path):
    plain, saved = (train_run(text_with_processor, tmp_path, Recorder, **more, **REUSED) for more in (tiny.PLAIN, {}))
    assert update_difference(saved, plain) < 1e-4
    assert saved.cells < plain.cells


def test_rows_for_evaluation_may_have_images_nevertheless(tmp_path):
    found = []
    for fields in (tiny.PLAIN, {"skip_old_logps": False}):
        trainer = make_run(text_with_processor, tmp_path, **REUSED, **fields)
        torch.manual_seed(0)
        logged = trainer.evaluate(images()[0]["train_dataset"])
        found.append({name: value for name, value in logged.items() if "time" not in name and "second" not in name})
    plain, saved = found
    assert saved == plain
    assert math.isfinite(saved["eval_loss"])


@pytest.mark.parametrize("run", [TOOLS, ENVIRONMENTS])
def test_what_a_tool_says_is_shaped_as_if_it_were_not_there(run, tmp_path):
    trainer = train_run(run, tmp_path, ShapingRecorder, scale_decay="constant")
    settings = trainer.args.shaping_settings
    said = []
    for batch, call in zip(trainer.batches, trainer.calls, strict=True):
        for row, mask in enumerate(call["mask"].bool()):
            tokens = np.array(trainer.processing_class.convert_ids_to_tokens(batch["completion_ids"][row]))
            said.append("".join(tokens[(batch["completion_mask"][row].bool() & ~mask).cpu()]))
            assert not set(tokens[mask.cpu()]) & set("{}$")
            assert not call["shaped"][row, ~mask].any()
            (alone,) = shape_advantages(
                call["advantages"][row : row + 1],
                call["old_per_token_logps"][row : row + 1, mask],
                torch.ones(1, int(mask.sum()), device=mask.device),
                **settings,
            )
            assert torch.equal(call["shaped"][row, mask], alone)
    assert all(re.fullmatch(r"(\{(found)*\}\$)*", text) for text in said)
    assert len(set(said)) > 2
