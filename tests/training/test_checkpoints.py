"""Checkpoints: at every moment there is a whole one, whatever is deleted, overwritten, read-only, linked or full."""

import copy
import errno
import functools
import json
import os
import re
import shutil
import stat
import sys
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import trl
from datasets import IterableDataset
from packaging.version import Version
from peft import LoraConfig, PromptEncoderConfig, PromptTuningConfig, get_peft_model
from safetensors.torch import load_file, save_file
from support import tiny
from support.checkpoints import digests
from support.training import SGD, StopAfter, assert_same_update, different, is_time, make, moved, train
from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM, TrainerCallback, TrainerState
from transformers.trainer_utils import get_last_checkpoint
from trl import GRPOConfig, GRPOTrainer

from trl_a3po import A3POTrainer
from trl_a3po.training import checkpoint_files, checkpoints
from trl_a3po.training.checkpoint_files import (
    delete,
    flush,
    has_optimizer,
    is_complete,
    mark_of,
    outdated,
    put_back,
)
from trl_a3po.training.checkpoints import last_complete_checkpoint, resume_argument


def saving_trainer(model_dir, output_dir, trainer_class=A3POTrainer, **fields):
    """A trainer that saves a checkpoint at each step, and by default keeps one."""
    fields = {"max_steps": 3, "save_steps": 1, "save_total_limit": 1, "lr_scheduler_type": "constant", **fields}
    fields = {"save_strategy": "steps", **fields}
    return make(output_dir, trainer_class, model=model_dir, arguments={"eval_dataset": tiny.prompts(8)}, **fields)


def test_a_generation_config_that_cannot_be_saved_is_found_before_the_first_step(model_dir, tmp_path, caplog):
    broken = tmp_path / "model"
    shutil.copytree(model_dir, broken)
    config = json.loads((broken / "generation_config.json").read_text())
    # As beside older models. It has no token for padding, so the trainer changes it.
    config |= {"temperature": 0.9, "top_p": 0.6, "do_sample": False, "pad_token_id": None}
    (broken / "generation_config.json").write_text(json.dumps(config))
    trainer = saving_trainer(str(broken), tmp_path / "run")
    with pytest.raises(ValueError, match=r"`generation_config` of the model cannot be saved.*do_sample = True"):
        trainer.train()
    assert trainer.state.global_step == 0
    # Processes that do not save would else wait for the one that ended.
    other = SimpleNamespace(save_strategy="steps", should_save=False)
    with pytest.raises(ValueError, match="cannot be saved"):
        checkpoints.ChecksGenerationConfig().on_train_begin(other, None, None, model=trainer.model)
    trainer = saving_trainer(str(broken), tmp_path / "run", save_strategy="no")
    trainer.train()  # somebody may save nothing
    assert "`generation_config` of the model cannot be saved" in caplog.text
    trainer.model.generation_config.do_sample = True
    trainer.save_model()


def names(directory):
    return sorted(path.name for path in directory.glob("checkpoint-*"))


class Witness:
    """
    Looks, before every change of a file, whether the directory holds a complete checkpoint: what a kill would leave.

    Whole is one that has all files of this step, with the weights and the optimizer in full length.
    """

    CHANGES = ("open", "os.mkdir", "os.remove", "os.rename", "os.rmdir")

    def __init__(self):
        self.output_dir = None  # while it looks
        self.moments = 0
        self.missing = []
        self._files = {}  # by step
        sys.addaudithook(self._look)  # which nothing can remove

    def saved(self, checkpoint):
        self._files[_step(checkpoint)] = self._list(checkpoint)

    def _list(self, checkpoint):
        sizes = {path.name: path.stat().st_size for path in checkpoint.iterdir()}
        return sizes.keys(), sizes["model.safetensors"], sizes.get("optimizer.pt")

    def _look(self, event, arguments):
        if self.output_dir is None or event not in self.CHANGES or str(self.output_dir) not in str(arguments[0]):
            return
        output_dir, self.output_dir = self.output_dir, None
        self.moments += 1
        last = last_complete_checkpoint(output_dir)
        if last is None or self._files.get(_step(last), self._list(Path(last))) != self._list(Path(last)):
            self.missing.append((event, arguments, last))
        self.output_dir = output_dir


def _step(checkpoint):
    return json.loads(Path(checkpoint, "trainer_state.json").read_text())["global_step"]


class WitnessedTrainer(A3POTrainer):
    """From its first checkpoint on."""

    witness = None

    def _save_checkpoint(self, model, trial):
        super()._save_checkpoint(model, trial)
        self.witness.saved(Path(self.args.output_dir, f"checkpoint-{self.state.global_step}"))
        self.witness.output_dir = Path(self.args.output_dir)


def witnessed(model_dir, output_dir, **fields):
    trainer = saving_trainer(model_dir, output_dir, WitnessedTrainer, **fields)
    trainer.witness = witness = Witness()
    for checkpoint in output_dir.glob("checkpoint-*"):
        witness.saved(checkpoint)
        witness.output_dir = output_dir
    trainer.train()
    witness.output_dir = None
    assert witness.moments > 20
    assert witness.missing == []
    return trainer


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"save_only_model": True},
        {
            "eval_strategy": "steps",
            "eval_steps": 1,
            "load_best_model_at_end": True,
            "metric_for_best_model": "eval_loss",
        },
        {"save_total_limit": 2},
        {"save_total_limit": None},
    ],
    ids=["limit 1", "only model", "best model", "limit 2", "no limit"],
)
def test_at_every_moment_there_is_a_complete_checkpoint(fields, model_dir, tmp_path):
    trainer = witnessed(model_dir, tmp_path, **fields)
    kept = names(tmp_path)
    assert not any("incomplete" in name or "previous" in name for name in kept)
    if fields.get("load_best_model_at_end"):
        assert kept == [Path(trainer.state.best_model_checkpoint).name]
    else:
        assert len(kept) == (fields.get("save_total_limit", 1) or 3)
    arguments = torch.load(tmp_path / kept[-1] / "training_args.bin", weights_only=False)
    assert arguments.save_total_limit == trainer.args.save_total_limit == fields.get("save_total_limit", 1)


def test_overwriting_the_only_checkpoint_loses_nothing(model_dir, tmp_path):
    """A run that is started anew in the same directory."""
    saving_trainer(model_dir, tmp_path, max_steps=2, save_steps=2).train()
    witnessed(model_dir, tmp_path, max_steps=2, save_steps=2)
    assert names(tmp_path) == ["checkpoint-2"]


def test_half_written_checkpoints_of_a_higher_step_do_not_outlive_whole_ones(model_dir, tmp_path):
    saving_trainer(model_dir, tmp_path, max_steps=3, save_steps=3).train()
    mark_of(tmp_path / "checkpoint-3").touch()
    mark_of(tmp_path / "checkpoint-7").touch()  # killed before there was a directory
    trainer = saving_trainer(model_dir, tmp_path, max_steps=2, save_total_limit=2)
    trainer.train()
    assert names(tmp_path) == ["checkpoint-1", "checkpoint-2"]
    assert last_complete_checkpoint(tmp_path) == str(tmp_path / "checkpoint-2")


def write(directory, step, *, marked=False, previous=False):
    checkpoint = directory / (f"checkpoint-{step}.previous" if previous else f"checkpoint-{step}")
    checkpoint.mkdir(parents=True)
    (checkpoint / "trainer_state.json").write_text(json.dumps({"global_step": step, "log_history": []}))
    if marked:
        mark_of(checkpoint).touch()
    return checkpoint


@pytest.mark.parametrize(
    ("steps", "newest", "limit", "best", "deleted"),
    [
        ([2, 4, 6], 6, 1, None, [2, 4]),
        ([2, 4, 6], 6, 2, None, [2]),
        ([2, 4, 6], 6, 3, None, []),
        ([2, 4, 6], 6, 1, 2, [4]),
        ([2, 4, 6], 6, 2, 2, [4]),
        ([2, 4, 6], 6, 2, 6, [2]),
        ([2, 3, 8, 10], 3, 2, None, [8, 10]),  # higher steps are from an earlier run
        ([2, 8, 10], 2, 2, None, [8]),
        ([2, 10], 10, 1, 7, [2]),  # the best is gone
    ],
)
def test_what_is_outdated(steps, newest, limit, best, deleted, tmp_path):
    for step in steps:
        write(tmp_path, step)
    best = best and tmp_path / f"checkpoint-{best}"
    found = outdated(tmp_path / f"checkpoint-{newest}", limit, best)
    assert sorted(path.name for path in found) == sorted(f"checkpoint-{step}" for step in deleted)


def test_checkpoints_that_are_not_whole_do_not_count(tmp_path):
    for step, marked in ((2, False), (4, False), (6, True), (8, True)):
        write(tmp_path, step, marked=marked)
    assert {path.name for path in outdated(tmp_path / "checkpoint-4", 2)} == {"checkpoint-6", "checkpoint-8"}


# Killed while it overwrites


def test_a_checkpoint_that_waits_is_the_last_whole_one_and_is_put_back(tmp_path):
    waiting = write(tmp_path, 4, previous=True)
    write(tmp_path, 4, marked=True)
    assert last_complete_checkpoint(tmp_path) == str(waiting)
    put_back(tmp_path)
    assert names(tmp_path) == ["checkpoint-4"]
    assert last_complete_checkpoint(tmp_path) == str(tmp_path / "checkpoint-4")


def test_any_complete_checkpoint_wins_over_one_that_waits(tmp_path):
    """It may be of another run, which this one was to replace."""
    earlier = write(tmp_path, 2)
    waiting = write(tmp_path, 4, previous=True)
    write(tmp_path, 4, marked=True)
    put_back(tmp_path)
    assert waiting.exists()
    assert last_complete_checkpoint(tmp_path) == str(earlier)


def test_a_new_checkpoint_wins_over_the_one_that_waits(tmp_path):
    write(tmp_path, 4, previous=True)
    new = write(tmp_path, 4)
    put_back(tmp_path)
    assert last_complete_checkpoint(tmp_path) == str(new)


@pytest.mark.parametrize("by", ["True", "last_complete_checkpoint", "name"])
def test_a_run_resumes_from_the_checkpoint_that_waited(by, model_dir, tmp_path):
    saving_trainer(model_dir, tmp_path, max_steps=2, save_steps=2).train()
    before = digests(tmp_path / "checkpoint-2")
    (tmp_path / "checkpoint-2").rename(tmp_path / "checkpoint-2.previous")
    write(tmp_path, 2, marked=True)
    trainer = saving_trainer(model_dir, tmp_path, max_steps=3, save_strategy="no")
    name = str(tmp_path / "checkpoint-2")
    trainer.train({"True": True, "last_complete_checkpoint": last_complete_checkpoint(tmp_path), "name": name}[by])
    assert [entry["step"] for entry in trainer.state.log_history if "loss" in entry] == [1, 2, 3]
    assert names(tmp_path) == ["checkpoint-2"]
    assert digests(tmp_path / "checkpoint-2") == before


# Which a run resumes from


def test_what_has_no_optimizer_is_no_place_to_resume_from(model_dir, tmp_path):
    saving_trainer(model_dir, tmp_path, max_steps=2, save_steps=2, save_only_model=True).train()
    trainer = saving_trainer(model_dir, tmp_path)
    for given in (True, str(tmp_path / "checkpoint-2")):
        with pytest.raises(ValueError, match=r"cannot resume from '.*checkpoint-2'.* with `save_only_model=True`"):
            trainer.train(given)


def test_the_directory_of_a_run_is_no_checkpoint(model_dir, tmp_path):
    trainer = saving_trainer(model_dir, tmp_path, max_steps=2, save_steps=2)
    trainer.train()
    trainer.save_model()
    trainer.save_state()
    message = f"'{tmp_path}' is the directory of a run, whose model is saved without the state of the optimizer. Pass "
    message += f"`resume_from_checkpoint=True`, or '{tmp_path / 'checkpoint-2'}'."
    with pytest.raises(ValueError, match=re.escape(message)):
        saving_trainer(model_dir, tmp_path).train(str(tmp_path))


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        (["optimizer.pt", "scheduler.pt"], True),
        (["optimizer.bin", "scheduler.pt"], True),  # FSDP
        (["optimizer_0/__0_0.distcp", "scheduler.pt"], True),  # FSDP, sharded
        (["rank0-of-2-optimizer.pt", "scheduler.pt"], True),  # XLA
        (["optimizer.pt_0", "scheduler.pt"], True),  # SageMaker
        (["global_step4/mp_rank_00_model_states.pt"], True),  # DeepSpeed
        (["optimizer.pt"], False),  # transformers loads neither
        (["scheduler.pt"], False),
        (["pytorch_model_fsdp_0/__0_0.distcp", "model.safetensors"], False),
    ],
)
def test_which_files_are_the_optimizer(files, expected, tmp_path):
    for name in files:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    assert has_optimizer(tmp_path) is expected


def test_a_run_started_anew_resumes_from_its_own_checkpoint(model_dir, tmp_path, caplog):
    """Those of higher steps are from the run before, which nothing has deleted."""
    options = {"save_total_limit": None, "logging_steps": 1}
    saving_trainer(model_dir, tmp_path, max_steps=4, save_steps=2, **options).train()
    saving_trainer(model_dir, tmp_path, max_steps=2, **options).train()
    assert names(tmp_path) == [f"checkpoint-{step}" for step in (1, 2, 4)]
    assert last_complete_checkpoint(tmp_path) == str(tmp_path / "checkpoint-2")
    trainer = saving_trainer(model_dir, tmp_path, max_steps=3, **options)
    trainer.train(True)
    assert "Skipped checkpoints that are incomplete or of an earlier run: checkpoint-4." in caplog.text
    own = json.loads((tmp_path / "checkpoint-2" / "trainer_state.json").read_text())["log_history"]
    assert trainer.state.log_history[:2] == own
    assert trainer.state.global_step == 3
    with pytest.raises(ValueError, match=r"checkpoint-4' is of step 4, beyond the 3 steps of the training\. Pass the"):
        trainer.train(str(tmp_path / "checkpoint-4"))


@pytest.mark.parametrize("logs", [{"logging_steps": 10}, {"logging_strategy": "no"}])
def test_a_run_started_anew_resumes_from_its_own_checkpoint_before_its_first_log(logs, model_dir, tmp_path):
    options = {"save_total_limit": None, "save_steps": 2, **logs}
    saving_trainer(model_dir, tmp_path, max_steps=6, **options).train()
    # Resumed from a lower checkpoint, and started anew.
    saving_trainer(model_dir, tmp_path, max_steps=4, **options).train(str(tmp_path / "checkpoint-2"))
    assert last_complete_checkpoint(tmp_path) == str(tmp_path / "checkpoint-4")
    saving_trainer(model_dir, tmp_path, max_steps=2, **options).train()
    assert last_complete_checkpoint(tmp_path) == str(tmp_path / "checkpoint-2")
    saving_trainer(model_dir, tmp_path, max_steps=4, **options).train(True)
    assert last_complete_checkpoint(tmp_path) == str(tmp_path / "checkpoint-4")
    runs = [checkpoint_files.runs_of(tmp_path / f"checkpoint-{step}") for step in (2, 4, 6)]
    assert [len(each) for each in runs] == [1, 2, 1]
    assert runs[1][0] == runs[0][0] != runs[2][0]


@pytest.mark.parametrize("damage", [None, "", "{}", "[1"])
def test_runs_that_cannot_be_read_are_not_known(damage, tmp_path):
    if damage is not None:
        (tmp_path / "runs.json").write_text(damage)
    assert checkpoint_files.runs_of(tmp_path) == []


@pytest.mark.parametrize("file", ["optimizer.pt", "scheduler.pt", "rng_state.pth", "model.safetensors"])
def test_the_checkpoint_with_a_damaged_file_is_named(file, model_dir, tmp_path):
    saving_trainer(model_dir, tmp_path, max_steps=1).train()
    (tmp_path / "checkpoint-1" / file).write_bytes(b"")
    with pytest.raises(ValueError, match=r"Cannot load the checkpoint '.*checkpoint-1': .*pass another checkpoint"):
        saving_trainer(model_dir, tmp_path, max_steps=2).train(True)


def test_random_numbers_that_start_anew_are_said(model_dir, tmp_path, caplog):
    saving_trainer(model_dir, tmp_path, max_steps=1).train()
    (tmp_path / "checkpoint-1" / "rng_state.pth").unlink()
    saving_trainer(model_dir, tmp_path, max_steps=2).train(True)
    assert "has no states of the random number generators for 1 processes" in caplog.text


@pytest.mark.parametrize(("save_strategy", "warns"), [("steps", True), ("epoch", False)])
def test_an_evaluation_that_a_checkpoint_came_before_is_said(save_strategy, warns, model_dir, tmp_path, caplog):
    fields = {"save_strategy": save_strategy, "eval_strategy": "epoch", "save_steps": 4, "max_steps": 5}
    fields |= {"save_total_limit": None, "per_device_train_batch_size": 16}  # 4 steps an epoch
    saving_trainer(model_dir, tmp_path, **fields).train()
    saving_trainer(model_dir, tmp_path, **fields).train(str(tmp_path / "checkpoint-4"))
    assert ("The evaluation at the end of epoch 1 would have come after this checkpoint" in caplog.text) is warns


LORA = {"r": 4, "target_modules": ["q_proj", "v_proj"], "task_type": "CAUSAL_LM"}


@pytest.mark.parametrize(
    ("trained", "resumed", "message"),
    [
        (LORA, None, "is a checkpoint of an adapter, and the run trains a whole model"),
        (None, LORA, "is a checkpoint of a whole model, and the run trains an adapter"),
        (LORA, {**LORA, "target_modules": ["q_proj", "k_proj"]}, r"`target_modules=\['k_proj', 'q_proj'\]`"),
        (LORA, {**LORA, "lora_alpha": 32}, "with `lora_alpha=8`, and that of the run has `lora_alpha=32`"),
        (LORA, {**LORA, "target_modules": ["v_proj", "q_proj"]}, None),
    ],
)
def test_a_checkpoint_of_another_adapter_is_refused(trained, resumed, message, tmp_path):
    def run(adapter, steps):
        arguments = {"peft_config": adapter and LoraConfig(**adapter)}
        return make(tmp_path, arguments=arguments, max_steps=steps, save_strategy="steps", save_steps=1)

    run(trained, 1).train()
    with nullcontext() if message is None else pytest.raises(ValueError, match=message):
        run(resumed, 2).train(True)


@pytest.mark.parametrize(
    ("trained", "resumed", "lost"), [("adamw_torch", "sgd", "momentum"), ("sgd", "adamw_torch", "betas")]
)
def test_a_checkpoint_of_another_optimizer_is_refused(trained, resumed, lost, tmp_path):
    def run(optim, steps):
        return make(tmp_path, optim=optim, max_steps=steps, save_strategy="steps", save_steps=1)

    run(trained, 1).train()
    with pytest.raises(ValueError, match=f"checkpoint-1' has .* another optimizer, without .*{lost}.*`optim`"):
        run(resumed, 2).train(True)


def test_a_label_of_a_parameter_group_is_no_setting(tmp_path):
    def run(steps, **label):
        model = tiny.model()
        optimizer = torch.optim.AdamW([{"params": list(model.parameters()), "lr": 1e-3, **label}])
        arguments = {"optimizers": (optimizer, None)}
        fields = {"max_steps": steps, "save_strategy": "steps", "save_steps": 1}
        return make(tmp_path, model=model, arguments=arguments, **fields)

    run(1).train()
    trainer = run(2, note="all")
    trainer.train(True)
    assert trainer.state.global_step == 2


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"learning_rate": 0.5}, "`learning_rate=0.5` has no effect: the run resumes with 0.01"),
        ({"weight_decay": 0.5}, "`weight_decay=0.5` has no effect: the run resumes with 0.0"),
        ({"optim": "adamw_torch_fused"}, None),
    ],
)
def test_settings_that_the_checkpoint_replaces_are_said(fields, message, tmp_path, caplog):
    def run(steps, **fields):
        return make(tmp_path, max_steps=steps, save_strategy="steps", save_steps=1, **fields)

    run(1).train()
    caplog.clear()
    run(2, **fields).train(True)
    said = [each for each in caplog.messages if "has no effect" in each]
    assert len(said) == (message is not None)
    assert message is None or message in said[0]


@pytest.mark.parametrize(
    ("config", "unfrozen", "lost"),
    [
        (LoraConfig(**LORA), "norm", "base_model.model.model.layers.0.input_layernorm.weight"),
        (LoraConfig(**LORA, modules_to_save=["norm"]), None, None),
        (LoraConfig(**LORA, bias="all"), None, None),
        (
            PromptEncoderConfig(task_type="CAUSAL_LM", num_virtual_tokens=4),
            None,
            "prompt_encoder.default.mlp_head.0.weight",
        ),
        (PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4), None, None),
    ],
)
def test_parameters_that_no_checkpoint_will_have_are_said(config, unfrozen, lost, caplog):
    model = get_peft_model(tiny.model(), copy.deepcopy(config))
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(parameter.requires_grad or (unfrozen is not None and unfrozen in name))
    checkpoints.ChecksAdapter().on_train_begin(None, SimpleNamespace(is_world_process_zero=True), None, model=model)
    assert (f"that PEFT does not save with the adapter, such as {lost}." in caplog.text) is (lost is not None)


def test_what_does_not_go_on_as_it_was_is_said(model_dir, tmp_path, caplog):
    options = {"logging_steps": 1, "beta": 0.1, "sync_ref_model": True}
    saving_trainer(model_dir, tmp_path, max_steps=2, **options).train()
    assert not [record for record in caplog.records if record.name.startswith("trl_a3po")]
    saving_trainer(model_dir, tmp_path, max_steps=3, **options).train(True)
    assert "No checkpoint has the reference model of `sync_ref_model`" in caplog.text
    assert "The training had 2 steps and has 3 now." in caplog.text


def test_a_length_in_epochs_is_compared_too(model_dir, tmp_path, caplog):
    options = {"max_steps": -1, "gradient_accumulation_steps": 2}

    def run(epochs):
        return saving_trainer(model_dir, tmp_path, num_train_epochs=epochs, **options)

    first = run(2)
    first.train()
    steps = first.state.max_steps
    with pytest.raises(ValueError, match=rf"is of step {steps}, beyond the {steps // 2} steps of the training"):
        run(1).train(True)
    assert "The training had" not in caplog.text
    run(3).train(True)
    assert f"The training had {steps} steps and has {3 * steps // 2} now." in caplog.text


class InterruptsOnce(TrainerCallback):
    """Within a step, as Ctrl-C may."""

    def on_substep_end(self, args, state, control, **kwargs):
        if state.global_step == 2 and not vars(self).setdefault("has_done", False):
            self.has_done = True
            raise KeyboardInterrupt


class NotesTheStart(TrainerCallback):
    """What is counted for the first step before it begins."""

    def __init__(self, trainer):
        self.trainer = trainer

    def on_train_begin(self, args, state, control, **kwargs):
        self.seconds = self.trainer._current_train_step_time
        self.largest = self.trainer._signal_budget._largest.clone()


@pytest.mark.parametrize("dynamic_sampling", [0, 3])
def test_a_run_that_was_interrupted_within_a_step_resumes_with_the_same_trainer(dynamic_sampling, model_dir, tmp_path):
    fields = {"gradient_accumulation_steps": 4, "max_steps": 4, "logging_steps": 1, "num_generations": 2, **SGD}
    fields["dynamic_sampling"] = dynamic_sampling
    whole = saving_trainer(model_dir, tmp_path / "whole", **fields)
    whole.train()
    trainer = saving_trainer(model_dir, tmp_path / "interrupted", **fields)
    trainer.add_callback(InterruptsOnce())
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    assert trainer._current_train_step_time > 0
    trainer._signal_budget._largest.fill_(9.0)  # as an interrupted step leaves it with vLLM
    trainer._sampler = SimpleNamespace(forget=lambda: setattr(trainer, "_sampler", None))
    notes = NotesTheStart(trainer)
    trainer.add_callback(notes)
    trainer.train(True)
    assert trainer._sampler is None
    assert notes.seconds == 0
    assert not notes.largest.isfinite().any()
    assert_same_update(trainer, whole)
    logs, expected = (
        [{name: value for name, value in log.items() if not is_time(name)} for log in each.state.log_history[:-1]]
        for each in (trainer, whole)
    )
    assert logs == expected


class InterruptsEvaluation(InterruptsOnce):
    def on_prediction_step(self, args, state, control, **kwargs):
        self.on_substep_end(args, state, control)


def test_an_evaluation_that_was_interrupted_does_not_count_in_the_next(model_dir, tmp_path):
    fields = {"max_steps": 3, "eval_strategy": "steps", "eval_steps": 2, "per_device_eval_batch_size": 4}
    trainer = saving_trainer(model_dir, tmp_path / "interrupted", **fields)
    trainer.add_callback(InterruptsEvaluation())
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    assert trainer._metrics["eval"]
    assert "eval" in trainer._polarity_sums
    trainer._entropy_window_stats = torch.ones(2)  # as an interrupted step leaves it with `use_adaptive_entropy`
    trainer.train(True)
    assert not trainer._metrics["eval"]
    whole = saving_trainer(model_dir, tmp_path / "whole", **fields)
    whole.train()
    logs, expected = ([log for log in each.state.log_history if "eval_reward" in log] for each in (trainer, whole))
    assert [log["eval_reward"] for log in logs] == [log["eval_reward"] for log in expected]
    assert trainer._entropy_window_stats is None


@pytest.mark.skipif(Version(trl.__version__) < Version("1.9"), reason="this TRL refuses streams")
@pytest.mark.parametrize(("prompts", "steps", "warns"), [(2, 1, False), (2, 3, True), (8, 4, False)])
def test_a_stream_that_began_again_is_said(prompts, steps, warns, model_dir, tmp_path, caplog):
    def run(*callbacks):
        stream = IterableDataset.from_generator(lambda: iter(tiny.prompts(prompts)))
        arguments = {"train_dataset": stream, "callbacks": list(callbacks)}
        fields = {"save_strategy": "steps", "save_steps": 1, "max_steps": 4}
        return make(tmp_path, model=model_dir, arguments=arguments, **fields)

    run(StopAfter(steps)).train()
    run().train(True)
    assert ("The stream of the training data had ended and begun again" in caplog.text) is warns
    assert "no advantage was shaped" not in caplog.text


def test_times_that_a_copy_has_mixed_up_do_not_matter(tmp_path):
    log = [{"step": 2, "grad_norm": float("nan")}, {"step": 4, "loss": 0.5}]
    for step in (4, 2):  # the order in which they were copied
        checkpoint = write(tmp_path, step)
        state = {"global_step": step, "log_history": log[: step // 2]}
        (checkpoint / "trainer_state.json").write_text(json.dumps(state))
    os.utime(tmp_path / "checkpoint-4" / "trainer_state.json", (0, 0))
    assert last_complete_checkpoint(tmp_path) == str(tmp_path / "checkpoint-4")


@pytest.mark.parametrize(
    ("option", "argument"),
    [("True", True), ("true", True), (True, True), ("FALSE", None), (False, None), ("", None), (None, None)],
)
def test_the_option_of_a_command_line(option, argument):
    assert resume_argument(option) is argument


def test_a_path_of_a_command_line_exists(tmp_path):
    waiting = write(tmp_path, 4, previous=True)
    for path in (tmp_path / "checkpoint-4", waiting):  # `train` gives it its name back
        assert resume_argument(str(path)) == str(path)
    with pytest.raises(ValueError, match="There is no checkpoint 'nowhere' for `resume_from_checkpoint`"):
        resume_argument("nowhere")


# What file systems do


def test_a_mark_is_found_through_links_and_from_within(tmp_path, monkeypatch):
    marked = write(tmp_path / "run", 4, marked=True)
    (tmp_path / "last").symlink_to(marked)
    assert not is_complete(tmp_path / "last")
    monkeypatch.chdir(marked)
    assert not is_complete(Path("."))


def test_a_torn_state_without_a_mark_is_not_complete(tmp_path):
    """As GRPOTrainer leaves it, killed in its last write."""
    write(tmp_path, 2)
    (write(tmp_path, 4) / "trainer_state.json").write_text('{"global_step": 4, "log_hist')
    assert last_complete_checkpoint(tmp_path) == str(tmp_path / "checkpoint-2")


class LeavesOddFiles(A3POTrainer):
    """In its checkpoints: a file that nobody may write, links, a pipe and a subdirectory."""

    def save_model(self, output_dir=None, *args, **kwargs):
        super().save_model(output_dir, *args, **kwargs)
        directory = Path(output_dir)
        (directory / "sub").mkdir()
        for path in (directory / "modeling.py", directory / "sub" / "more.py"):
            path.write_text("pass")
            path.chmod(0o444)
        (directory / "link.py").symlink_to("modeling.py")
        (directory / "broken").symlink_to("nowhere")
        (directory / "loop").symlink_to(".")
        os.mkfifo(directory / "pipe")


def test_odd_files_do_not_end_the_training(model_dir, tmp_path):
    saving_trainer(model_dir, tmp_path, LeavesOddFiles, max_steps=2, save_total_limit=1).train()
    assert names(tmp_path) == ["checkpoint-2"]


@pytest.mark.skipif(os.name != "posix" or os.getuid() != 0, reason="only root can become another user")
def test_a_file_is_flushed_without_the_right_to_write_it(tmp_path):
    """Root may write everything: another user must try."""
    path = tmp_path / "modeling.py"
    path.write_text("pass")
    path.chmod(0o444)
    for directory in (tmp_path, *tmp_path.parents[:-2]):
        directory.chmod(directory.stat().st_mode | stat.S_IROTH | stat.S_IXOTH)
    pid = os.fork()
    if pid == 0:
        try:
            os.setgroups([])
            os.setgid(65534)
            os.setuid(65534)
            assert not os.access(path, os.W_OK)
            checkpoint_files._warn_unflushed = lambda reason: os._exit(2)
            flush(path)
            os._exit(0)
        except BaseException:
            os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0


@pytest.mark.parametrize("number", [errno.EINVAL, errno.ENOTSUP, errno.ENOSYS, errno.EBADF, errno.EACCES])
def test_a_file_system_without_flushing_is_told_once(number, tmp_path, monkeypatch, caplog):
    def fsync(file):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "fsync", fsync)
    checkpoint_files._warn_unflushed.cache_clear()
    flush(tmp_path)
    flush(tmp_path)
    (warning,) = (record.getMessage() for record in caplog.records)
    assert f"({os.strerror(number)})" in warning


@pytest.mark.parametrize("number", [errno.EIO, errno.ENOSPC, errno.EDQUOT])
def test_lost_bytes_are_an_error(number, tmp_path, monkeypatch):
    def fsync(file):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "fsync", fsync)
    with pytest.raises(OSError, match=os.strerror(number)):
        flush(tmp_path)


def test_files_and_names_are_flushed_before_the_mark_goes(model_dir, tmp_path, monkeypatch):
    """Also the names: a directory is flushed after what it holds, and again after the mark is gone."""
    flushed = []

    def note(path):
        flushed.append((path, mark_of(tmp_path / "checkpoint-1").exists()))

    monkeypatch.setattr(checkpoints, "flush", note)
    saving_trainer(model_dir, tmp_path, max_steps=1).train()
    checkpoint = tmp_path / "checkpoint-1"
    while_marked = [path for path, marked in flushed if marked]
    assert while_marked[:2] == [mark_of(checkpoint), tmp_path]
    assert {*checkpoint.iterdir(), checkpoint} <= set(while_marked)
    assert while_marked.index(checkpoint) > while_marked.index(checkpoint / "optimizer.pt")
    assert while_marked[-1] == tmp_path
    assert flushed[-1] == (tmp_path, False)


def test_deleting_marks_what_is_half_deleted(tmp_path, monkeypatch):
    """A kill while files go one by one: the state may be the last."""
    checkpoint = write(tmp_path, 4)
    seen = []
    monkeypatch.setattr(shutil, "rmtree", lambda path, ignore_errors: seen.append(is_complete(path)))
    delete(checkpoint)
    assert seen == [False]
    assert not is_complete(checkpoint)  # it is still there
    monkeypatch.undo()
    delete(checkpoint)
    assert names(tmp_path) == []


def test_a_link_is_deleted_and_what_it_stands_for_is_not(tmp_path):
    elsewhere = write(tmp_path / "elsewhere", 4)
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "checkpoint-4").symlink_to(elsewhere)
    delete(tmp_path / "run" / "checkpoint-4")
    assert names(tmp_path / "run") == []
    assert is_complete(elsewhere)


def fails(error):
    def save(*args, **kwargs):
        raise error

    return save


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.ENOSPC, "No space left on device"),
        OSError(errno.EDQUOT, "Disk quota exceeded"),
        ValueError("Error while serializing: I/O error: No space left on device (os error 28)"),  # safetensors'
    ],
    ids=["ENOSPC", "EDQUOT", "safetensors"],
)
def test_a_full_disk_is_told_plainly(error, model_dir, tmp_path, monkeypatch):
    trainer = saving_trainer(model_dir, tmp_path, max_steps=2)

    def save_rng_state(output_dir):
        if trainer.state.global_step == 2:
            raise error

    monkeypatch.setattr(trainer, "_save_rng_state", save_rng_state)
    with pytest.raises(OSError, match=r"No space left on device: .*checkpoint-2' is incomplete\.") as caught:
        trainer.train()
    assert f"The last complete one is '{tmp_path / 'checkpoint-1'}'. Free some space" in str(caught.value)
    assert last_complete_checkpoint(tmp_path) == str(tmp_path / "checkpoint-1")
    assert trainer.args.save_total_limit == 1


def test_an_error_with_a_cause_keeps_it_where_no_space_is_ever_free(model_dir, tmp_path, monkeypatch):
    """As in /sys."""
    trainer = saving_trainer(model_dir, tmp_path, max_steps=1)
    monkeypatch.setattr(trainer, "_save_rng_state", fails(PermissionError(errno.EACCES, "Permission denied")))
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(0, 0, 0))
    with pytest.raises(PermissionError, match="Permission denied"):
        trainer.train()


@pytest.mark.parametrize("strategy", ["steps", "no"])
def test_a_directory_that_cannot_be_written_is_refused_if_there_will_be_checkpoints(
    strategy, model_dir, tmp_path, monkeypatch
):
    def refuse(**kwargs):
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(checkpoint_files.tempfile, "TemporaryFile", refuse)
    refusal = pytest.raises(PermissionError, match=r"Cannot write to `output_dir='.*'` \(Permission denied\)\. Name a")
    with nullcontext() if strategy == "no" else refusal:
        saving_trainer(model_dir, tmp_path, save_strategy=strategy)


def test_other_errors_stay_as_they_are(model_dir, tmp_path, monkeypatch):
    trainer = saving_trainer(model_dir, tmp_path, max_steps=1)
    monkeypatch.setattr(trainer, "_save_rng_state", fails(ZeroDivisionError("in a callback")))
    with pytest.raises(ZeroDivisionError, match="in a callback"):
        trainer.train()


def test_torch_names_no_full_disk_and_the_error_does(model_dir, tmp_path, monkeypatch):
    trainer = saving_trainer(model_dir, tmp_path, max_steps=1)
    monkeypatch.setattr(
        trainer, "_save_rng_state", fails(RuntimeError("inline_container.cc: unexpected pos 576 vs 534"))
    )
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10**9, 10**9, 0))
    with pytest.raises(OSError, match=r"There is no complete one yet\. Free some space"):
        trainer.train()


# Weights under other names


def mixture():
    """transformers 5 saves its experts under other names than the model has."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "moe_intermediate_size": 16, "head_dim": 16}
    layers = {"num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1}
    experts = {"num_experts": 4, "num_experts_per_tok": 2, "router_aux_loss_coef": 0.0, "initializer_range": 0.3}
    tokens = {"vocab_size": len(tiny.tokenizer()), "eos_token_id": 1, "pad_token_id": 0}
    return Qwen3MoeForCausalLM(Qwen3MoeConfig(**sizes, **layers, **experts, **tokens))


def in_shards():
    model = mixture()
    model.save_pretrained = functools.partial(model.save_pretrained, max_shard_size="10KB")
    return model


def in_half_precision():
    return mixture().bfloat16()


@pytest.mark.parametrize("model", [mixture, in_shards, in_half_precision])
def test_a_mixture_of_experts_is_resumed_as_it_was(model, tmp_path):
    fields = {**SGD, "max_steps": 4, "save_strategy": "steps", "save_steps": 2}
    if model is in_half_precision:
        if not hasattr(GRPOConfig, "cast_lm_head_to_fp32"):
            pytest.skip("this TRL has no weights of two precisions")
        fields |= {"cast_lm_head_to_fp32": True, "learning_rate": 1.0}
    whole = train(tmp_path, model=model, **fields)
    if model is in_shards:
        assert len([*tmp_path.glob("checkpoint-2/model-*.safetensors")]) > 1
    resumed = make(tmp_path, model=model, **fields)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert_same_update(resumed, whole)
    assert any("experts" in name for name in moved(whole))


def test_the_best_mixture_of_experts_is_loaded_whole(tmp_path):
    class Evaluates(A3POTrainer):
        def evaluate(self, *args, **kwargs):
            logged = {"eval_reward": 1.0 / self.state.global_step}
            self.log(logged)
            return logged

    every_step = {"save_strategy": "steps", "save_steps": 1, "eval_strategy": "steps", "eval_steps": 1}
    best = {"load_best_model_at_end": True, "metric_for_best_model": "eval_reward", "greater_is_better": True}
    arguments = {"eval_dataset": tiny.prompts(8)}
    fields = {**SGD, "max_steps": 2, **every_step, **best}
    trainer = train(tmp_path, Evaluates, model=mixture, arguments=arguments, **fields)
    saved = Qwen3MoeForCausalLM.from_pretrained(tmp_path / "checkpoint-1", dtype=torch.float32)
    assert trainer.state.best_model_checkpoint == str(tmp_path / "checkpoint-1")
    assert not different(tiny.parameters(trainer), dict(saved.named_parameters()))
    assert moved(trainer)


def test_a_module_that_was_added_is_resumed(tmp_path):
    def extended():
        model = mixture()
        model.added = torch.nn.Linear(2, 2)
        return model

    fields = {**SGD, "max_steps": 2, "save_strategy": "steps", "save_steps": 1}
    whole = train(tmp_path, model=extended, **fields)
    resumed = make(tmp_path, model=extended, **fields)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))
    assert_same_update(resumed, whole)


def test_weights_of_another_model_are_refused(tmp_path, model_dir):
    saving_trainer(model_dir, tmp_path, max_steps=1).train()
    path = tmp_path / "checkpoint-1" / "model.safetensors"
    weights = load_file(path)
    weights["model.strange.weight"] = weights.pop("model.norm.weight")
    save_file(weights, path, {"format": "pt"})
    with pytest.raises(ValueError, match=r"has not the weights of the model: model\.norm\.weight, model\.strange"):
        saving_trainer(model_dir, tmp_path, max_steps=2).train(resume_from_checkpoint=True)


# Two checkpoints


def every_other_step(model_dir, output_dir, **fields):
    """A trainer that saves two checkpoints and keeps both."""
    return saving_trainer(
        model_dir, output_dir, **{"max_steps": 4, "save_steps": 2, "save_total_limit": None, **fields}
    )


@pytest.fixture
def half_overwritten(model_dir, tmp_path, monkeypatch):
    """A directory with two checkpoints, the second of which holds files of two runs: the disk was full."""

    def fail(*args):
        raise OSError("No space left on device")

    every_other_step(model_dir, tmp_path).train()
    trainer = every_other_step(model_dir, tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(TrainerState, "save_to_json", fail)
        with pytest.raises(OSError, match="No space left"):
            trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    return tmp_path


def test_a_checkpoint_that_is_not_complete_is_passed_over(half_overwritten, model_dir, caplog):
    assert get_last_checkpoint(half_overwritten) == str(half_overwritten / "checkpoint-4")
    assert last_complete_checkpoint(half_overwritten) == str(half_overwritten / "checkpoint-2")
    trainer = every_other_step(model_dir, half_overwritten)
    trainer.train(resume_from_checkpoint=True)
    (warning,) = (record.getMessage() for record in caplog.records if record.name == "trl_a3po.training.checkpoints")
    assert warning == (
        f"Resuming from '{half_overwritten / 'checkpoint-2'}'. Skipped checkpoints that are incomplete "
        "or of an earlier run: checkpoint-4."
    )
    assert trainer.state.global_step == 4
    assert last_complete_checkpoint(half_overwritten) == str(half_overwritten / "checkpoint-4")


def test_a_checkpoint_that_is_not_complete_is_refused(half_overwritten, model_dir):
    with pytest.raises(ValueError, match=r"checkpoint-4' is incomplete.*`resume_from_checkpoint=True`"):
        every_other_step(model_dir, half_overwritten).train(str(half_overwritten / "checkpoint-4"))


def test_no_complete_checkpoint_is_an_error(model_dir, tmp_path):
    (tmp_path / "checkpoint-2").mkdir()
    assert last_complete_checkpoint(tmp_path) is None
    with pytest.raises(ValueError, match=r"no complete checkpoint .*Incomplete ones: checkpoint-2\."):
        every_other_step(model_dir, tmp_path).train(resume_from_checkpoint=True)


def test_checkpoints_of_grpo_are_resumed_from(model_dir, tmp_path):
    train(tmp_path, GRPOTrainer, model=model_dir, max_steps=2, save_strategy="steps", save_steps=2)
    trainer = every_other_step(model_dir, tmp_path)
    trainer.train(resume_from_checkpoint=True)
    assert [entry["step"] for entry in trainer.state.log_history if "loss" in entry] == [1, 2, 3, 4]


def test_a_run_that_is_resumed_in_its_second_epoch_ends_as_an_uninterrupted_one(model_dir, tmp_path):
    """Every epoch has an order of its own."""
    whole, resumed = (every_other_step(model_dir, tmp_path, max_steps=12, save_steps=10) for _ in range(2))
    whole.train()
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-10"))
    assert resumed.state.epoch == 1.5
    torch.testing.assert_close(tiny.parameters(resumed), tiny.parameters(whole), rtol=0, atol=0)


def test_a_run_that_is_resumed_after_its_last_step_stays_as_it_is(model_dir, tmp_path, caplog):
    whole, again = every_other_step(model_dir, tmp_path), every_other_step(model_dir, tmp_path)
    whole.train()
    before = digests(tmp_path / "checkpoint-4")
    again.train(resume_from_checkpoint=True)
    assert again.state.global_step == 4
    assert not [record for record in caplog.records if "no advantage was shaped" in record.getMessage()]
    assert get_last_checkpoint(tmp_path) == str(tmp_path / "checkpoint-4")
    assert digests(tmp_path / "checkpoint-4") == before
    torch.testing.assert_close(tiny.parameters(again), tiny.parameters(whole), rtol=0, atol=0)
