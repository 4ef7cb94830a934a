"""
[`ResumableGRPOTrainer`]: a run that is killed and resumed ends like an uninterrupted run.

transformers writes a checkpoint under its final name, and resumes from the highest number, even if files are missing.
After a kill it fails at a missing file, or it mixes files of two runs, or it uses the files of only some processes. So
the file `checkpoint-12.incomplete` is beside a checkpoint while it is written. Older checkpoints are deleted only when
the new one is complete and on the disk.
"""

import copy
import errno
import json
import logging
import math
import os
import shutil
import tempfile
import uuid
from collections.abc import Iterator, Sized
from contextlib import contextmanager
from itertools import takewhile
from pathlib import Path
from typing import Any, cast

from accelerate import Accelerator
from accelerate.utils import broadcast_object_list
from torch import nn
from transformers import PreTrainedModel, TrainerCallback, TrainerState, TrainingArguments
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR
from trl import GRPOConfig, GRPOTrainer

from .checkpoint_files import (
    PREVIOUS,
    RUNS_FILE,
    STATE_FILE,
    checkpoints_in,
    delete,
    flush,
    has_optimizer,
    is_complete,
    is_marked,
    is_of_later_run,
    mark_of,
    outdated,
    previous_of,
    put_back,
    read_state,
    runs_of,
)
from .finite import check_parameters


logger = logging.getLogger(__name__)


class ResumableGRPOTrainer(GRPOTrainer):
    """
    The part of [`A3POTrainer`] that writes checkpoints and resumes from them.

    Only finite parameters are saved. After the first complete checkpoint there is always at least one, for any
    `save_total_limit`. A run resumes only from a complete checkpoint with the optimizer's state, with the prompts that
    would have come next.
    """

    _resumed_from: str | None = None
    # The names of this run and of those that it continues.
    _runs: tuple[str, ...] = ()
    # The `save_total_limit` of the run, while the one in `args` is hidden from transformers.
    _hidden_limit: int | None = None
    # The checkpoint whose weights are being loaded.
    _loaded_from: str | None = None

    def train(self, resume_from_checkpoint=None, *args, **kwargs):
        output_dir = Path(self.args.output_dir)  # type: ignore[arg-type]  # never None once constructed
        resume_from_checkpoint = resume_argument(resume_from_checkpoint)  # a script may pass on its option
        if resume_from_checkpoint:
            directory = output_dir if resume_from_checkpoint is True else Path(resume_from_checkpoint).parent
            if self.args.should_save:
                put_back(directory)
            self.accelerator.wait_for_everyone()
        self._resumed_from = checkpoint_to_resume_from(resume_from_checkpoint, output_dir, self.accelerator)
        if self._resumed_from and not (self.is_fsdp_enabled or self.is_deepspeed_enabled):
            with _naming(self._resumed_from):
                check_adapter(self.model, Path(self._resumed_from))
        check_not_beyond(self.args.max_steps, self._resumed_from)
        if self._resumed_from and self.accelerator.is_main_process:
            self._warn_of_what_differs(read_state(Path(self._resumed_from, STATE_FILE)) or {})
        self._runs = (*(runs_of(Path(self._resumed_from)) if self._resumed_from else ()), uuid.uuid4().hex)
        self._forget_last_run()
        output = super().train(self._resumed_from, *args, **kwargs)
        self._check_parameters(f"Training ended after step {self.state.global_step}")
        return output

    def _forget_last_run(self) -> None:
        """If it was interrupted, TRL would count on within its step, and use the rest of its rollout."""
        self._step, self._buffered_inputs = 0, None

    def _warn_of_what_differs(self, state: dict[str, Any]) -> None:
        if cast(GRPOConfig, self.args).sync_ref_model:
            logger.warning(
                "No checkpoint has the reference model of `sync_ref_model`. The resumed run begins with the reference "
                "of a new run, so its KL term is larger until the next synchronization."
            )
        if not isinstance(self.train_dataset, Sized) and (state.get("epoch") or 0) > 1:
            logger.warning(
                "The stream of the training data had ended and begun again before this checkpoint. The resumed run "
                "starts at its beginning, so it repeats prompts."
            )
        each_process = "" if self.accelerator.num_processes == 1 else f"_{self.accelerator.process_index}"
        if not Path(cast(str, self._resumed_from), f"rng_state{each_process}.pth").exists():
            logger.warning(
                "'%s' has no states of the random number generators for %d processes. The resumed run samples other "
                "completions than an uninterrupted one.",
                self._resumed_from,
                self.accelerator.num_processes,
            )
        log = state.get("log_history", [])
        evaluated = {entry["step"] for entry in log if any(key.startswith("eval_") for key in entry)}
        ends_epoch = float(state.get("epoch") or math.nan).is_integer()
        if self.args.eval_strategy == "epoch" and ends_epoch and state["global_step"] not in evaluated:
            logger.warning(
                "The evaluation at the end of epoch %d would have come after this checkpoint. It does not run, and so "
                "the next epoch has other random numbers. With `save_strategy='epoch'`, evaluations come first.",
                state["epoch"],
            )

    def _save_checkpoint(self, model, trial):
        checkpoint = Path(self._get_output_dir(trial), f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}")
        self._check_parameters(f"'{checkpoint}' was not written")
        self._hidden_limit = self.args.save_total_limit
        # With a limit, transformers would delete older checkpoints while this one may not be on the disk.
        marked = marked_incomplete(checkpoint, self.accelerator, marks=self.args.should_save)
        try:
            with marked, _save_total_limit(self.args, None):
                super()._save_checkpoint(model, trial)
                if self.args.should_save:
                    (checkpoint / RUNS_FILE).write_text(json.dumps(self._runs), encoding="utf-8")
        finally:
            self._hidden_limit = None
        if self.args.should_save:
            delete_outdated(checkpoint, self.args.save_total_limit, self.state.best_model_checkpoint)

    def _check_parameters(self, outcome: str) -> None:
        check_parameters(cast(nn.Module, self.model), self.accelerator, outcome)

    def save_model(self, *args, **kwargs):
        # This method also saves the arguments.
        with _save_total_limit(self.args, self.args.save_total_limit or self._hidden_limit):
            super().save_model(*args, **kwargs)

    def _push_from_checkpoint(self, *args, **kwargs):
        with _save_total_limit(self.args, self.args.save_total_limit or self._hidden_limit):
            super()._push_from_checkpoint(*args, **kwargs)

    def _load_from_checkpoint(self, resume_from_checkpoint, *args, **kwargs):
        self._loaded_from = resume_from_checkpoint
        with _naming(resume_from_checkpoint):
            super()._load_from_checkpoint(resume_from_checkpoint, *args, **kwargs)

    def _load_optimizer_and_scheduler(self, checkpoint):
        groups = [] if self.optimizer is None else self.optimizer.param_groups
        of_run = [dict(group) for group in groups]
        with _naming(checkpoint):
            super()._load_optimizer_and_scheduler(checkpoint)
        if self.optimizer is not None:
            needed = set(getattr(self.optimizer, "defaults", ()))
            check_optimizer(of_run, self.optimizer.param_groups, needed, checkpoint)

    def _load_rng_state(self, checkpoint):
        with _naming(checkpoint):
            super()._load_rng_state(checkpoint)

    def _load_best_model(self):
        self._loaded_from = self.state.best_model_checkpoint
        super()._load_best_model()

    def _issue_warnings_after_load(self, load_result):
        """
        Called when the weights of a checkpoint have been loaded by their names.

        transformers saves the experts of a mixture under the names that they have on the Hub, and here it does not
        look for these: the experts would be those of the base model. `from_pretrained` does.
        """
        model = cast(PreTrainedModel, self.model)
        if not load_result.unexpected_keys or self.is_fsdp_enabled or self.is_deepspeed_enabled:
            super()._issue_warnings_after_load(load_result)
            return
        # In the widest of its data types, because a checkpoint may have several.
        dtype = max((each.dtype for each in model.parameters()), key=lambda dtype: dtype.itemsize)
        loaded: Any = type(model).from_pretrained(self._loaded_from, dtype=dtype, output_loading_info=True)
        saved, info = loaded[0].state_dict(), loaded[1]
        missing = [*info["missing_keys"], *(each for each in load_result.missing_keys if each not in saved)]
        if wrong := {*missing, *(each for each in info["unexpected_keys"] if each not in model.state_dict())}:
            raise ValueError(
                f"'{self._loaded_from}' has not the weights of the model: {', '.join(sorted(wrong)[:3])}. Pass "
                "another checkpoint, or load it as the model and start a new run."
            )
        model.load_state_dict({name: saved[name] for name in load_result.missing_keys}, strict=False)

    def _get_train_sampler(self, *args, **kwargs):
        sampler = super()._get_train_sampler(*args, **kwargs)
        if self._resumed_from:
            # A sampler draws an epoch's order when the epoch begins. A new one would repeat that of the first.
            state = TrainerState.load_from_json(os.path.join(self._resumed_from, TRAINER_STATE_NAME))
            for _ in range(int(state.epoch or 0)):
                next(iter(sampler), None)
        return sampler

    def get_batch_samples(self, *args, **kwargs):
        if self.state.global_step >= self.state.max_steps:
            # Resumed after the last step. transformers checks whether to stop only at the end of a step.
            self.control.should_training_stop = True
            return [], None
        return super().get_batch_samples(*args, **kwargs)


class ChecksLength(TrainerCallback):
    """
    Compares the length of a resumed run with that of the checkpoint. If it is given in epochs, it is known only when
    training begins.

    Raises:
        `BeyondTheEndError`: as [`check_not_beyond`].
    """

    def __init__(self, trainer: ResumableGRPOTrainer):
        self._trainer = trainer

    def on_train_begin(self, args, state, control, **kwargs):
        checkpoint = self._trainer._resumed_from
        if checkpoint is None:
            return
        check_not_beyond(state.max_steps, checkpoint)
        before = (read_state(Path(checkpoint, STATE_FILE)) or {}).get("max_steps")
        if before and before != state.max_steps and state.is_world_process_zero:
            logger.warning(
                "The training had %d steps and has %d now. What depends on the share that is done, such as the "
                "learning rate and the scales of A3PO, continues where a training of %d steps would be.",
                before,
                state.max_steps,
                state.max_steps,
            )


class ChecksGenerationConfig(TrainerCallback):
    """
    Fails before the first step if the model's `generation_config` cannot be saved, so that the weights would be lost.

    transformers refuses to save one that is invalid, once a token id in it has changed. The trainer changes them when
    training begins.
    """

    def on_train_begin(self, args, state, control, model=None, **kwargs):
        config = getattr(model, "generation_config", None)
        if config is None or hasattr(model, "peft_config"):
            return  # with an adapter, only that is saved
        try:
            with tempfile.TemporaryDirectory() as directory:
                copy.deepcopy(config).save_pretrained(directory)
        except ValueError as error:
            found = (
                f"The `generation_config` of the model cannot be saved, and so the model cannot: "
                f"{' '.join(str(error).split())} Set `model.generation_config.do_sample = True`, or remove these "
                "fields from `generation_config.json` beside the model."
            )
            if args.save_strategy != "no":  # on every process, so that none waits for another
                raise ValueError(found) from error
            if args.should_save:
                logger.warning(found)


class ChecksAdapter(TrainerCallback):
    """
    Warns before the first step of parameters that are trained beside an adapter, and that no checkpoint will have.

    PEFT saves the adapter only. Of prompts that an encoder computes, it saves the prompts.
    """

    def on_train_begin(self, args, state, control, model=None, **kwargs):
        config = next(iter(getattr(model, "peft_config", {}).values()), None)
        if config is None or not state.is_world_process_zero:
            return
        trained = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
        if config.is_prompt_learning:
            lost = [name for name in trained if {"mlp_head", "lstm_head", "transform"} & set(name.split("."))]
        else:
            lost = [name for name in trained if not model.peft_config.keys() & set(name.split("."))]
            if getattr(config, "bias", "none") != "none":
                lost = [name for name in lost if not name.endswith(".bias")]
        if lost:
            logger.warning(
                "%d parameters are trained that PEFT does not save with the adapter, such as %s. They are lost at the "
                "end, and a resumed run begins with their first values. Use `modules_to_save` of the `peft_config`, "
                "or do not train them.",
                len(lost),
                lost[0],
            )


class KeepsTheBest(TrainerCallback):
    """
    With `save_total_limit=1`, deletes all checkpoints except the best when training has ended.

    transformers does so after the last log. A kill during that deletion would leave incomplete checkpoints unmarked.
    """

    def on_log(self, args, state, control, logs=None, **kwargs):
        best = state.best_model_checkpoint
        if "train_runtime" in (logs or {}) and best and args.save_total_limit == 1 and args.should_save:
            delete_outdated(Path(best), 1, best)


def last_complete_checkpoint(output_dir: str | Path) -> str | None:
    """
    Like transformers' `get_last_checkpoint`, but skips incomplete checkpoints, and those of higher steps that an
    earlier run has left in the directory.

    If a kill interrupted the overwriting of the only one, this is its old version, `checkpoint-12.previous`.

    Args:
        output_dir (`str` or `Path`): Where the trainer saves its checkpoints.

    Returns:
        `str` or `None`: The path of the checkpoint, if there is one.
    """
    last = None
    for path in filter(is_complete, checkpoints_in(Path(output_dir))):
        if last is None or is_of_later_run(path, last):
            last = path
    return None if last is None else str(last)


def resume_argument(option: str | bool | None) -> str | bool | None:
    """
    The argument of `Trainer.train` for the option `resume_from_checkpoint` of a command line or its file.

    Args:
        option (`str` or `bool`, *optional*): A path, or true or false in any case. An empty text is false.

    Returns:
        `str`, `bool` or `None`: A path, `True` for the last checkpoint in `output_dir`, or `None`.

    Raises:
        `ValueError`: there is no such path.
    """
    if str(option).lower() in ("true", "false", "none", ""):
        return str(option).lower() == "true" or None
    path = Path(str(option))
    # A checkpoint may wait under its other name, see `put_back`.
    if not any(each.exists() for each in (path, previous_of(path), Path(str(path).removesuffix(PREVIOUS)))):
        raise ValueError(
            f"There is no checkpoint '{path}' for `resume_from_checkpoint`. Pass the path of a checkpoint, or True "
            "for the last one in `output_dir`."
        )
    return str(path)


def checkpoint_to_resume_from(
    resume_from_checkpoint: str | bool | None, output_dir: str | Path, accelerator: Accelerator
) -> str | None:
    """
    The checkpoint from which `Trainer.train` should resume, for the argument that the user gave.

    The first process decides for all: on a shared network file system, other processes may see outdated files.

    Raises:
        `ValueError`: the checkpoint is incomplete or has no state of the optimizer, or `True` was given and there is
            no complete checkpoint.
    """
    if resume_from_checkpoint is True:
        last = last_complete_checkpoint(output_dir)
        passed_over = [
            path.name for path in takewhile(lambda path: str(path) != last, checkpoints_in(Path(output_dir)))
        ]
        (last,) = broadcast_object_list([last])
        if last is None:
            raise ValueError(
                f"There is no complete checkpoint in '{output_dir}' to resume from. Incomplete ones: "
                f"{', '.join(passed_over) or 'none'}. To train from the start, do not set `resume_from_checkpoint`."
            )
        if passed_over and accelerator.is_main_process:
            logger.warning(
                "Resuming from '%s'. Skipped checkpoints that are incomplete or of an earlier run: %s.",
                last,
                ", ".join(passed_over),
            )
        check_has_optimizer(Path(last))
        return last
    if not resume_from_checkpoint:
        return None
    checkpoint = Path(resume_from_checkpoint)
    if not checkpoint.exists():
        checkpoint = Path(str(checkpoint).removesuffix(PREVIOUS))  # it was put back
    if is_marked(checkpoint):
        raise ValueError(
            f"'{checkpoint}' is incomplete. Pass `resume_from_checkpoint=True` to resume from the last complete "
            "checkpoint."
        )
    if checkpoint.is_dir():  # else transformers says what is missing
        check_has_optimizer(checkpoint)
    return str(checkpoint)


def check_has_optimizer(checkpoint: Path) -> None:
    """
    Refuses to resume without the states of the optimizer and the schedule, which transformers would start anew.

    Raises:
        `ValueError`: naming the directory and the fix.
    """
    if has_optimizer(checkpoint):
        return
    if last := last_complete_checkpoint(checkpoint):
        raise ValueError(
            f"'{checkpoint}' is the directory of a run, whose model is saved without the state of the optimizer. Pass "
            f"`resume_from_checkpoint=True`, or '{last}'."
        )
    raise ValueError(
        f"A run cannot resume from '{checkpoint}', which has no state of the optimizer and the learning-rate "
        "schedule: it was saved with `save_only_model=True`, or is no checkpoint. Pass another checkpoint. To start a "
        "new run from its weights, pass it as the model, without `resume_from_checkpoint`."
    )


def check_optimizer(
    of_run: list[dict[str, Any]], loaded: list[dict[str, Any]], needed: set[str], checkpoint: str
) -> None:
    """
    Refuses the state of another optimizer, whose step would fail. Warns of settings that the checkpoint replaces.

    Args:
        of_run (`list[dict]`): The parameter groups of the run's optimizer before the checkpoint was loaded.
        loaded (`list[dict]`): The same groups with the settings of the checkpoint.
        needed (`set[str]`): The settings that the optimizer reads. A group may have others.
        checkpoint (`str`): Is named.

    Raises:
        `ValueError`: a group has lost a setting that its optimizer needs.
    """
    for before, after in zip(of_run, loaded, strict=False):
        if lost := sorted((before.keys() & needed) - after.keys()):
            raise ValueError(
                f"'{checkpoint}' has the state of another optimizer, without {', '.join(lost)}. Pass the `optim` that "
                "the run was begun with, or start a new run from the weights of the checkpoint."
            )
        for option, setting in ("learning_rate", "initial_lr"), ("weight_decay", "weight_decay"):
            if before.get(setting) != after.get(setting):
                logger.warning(
                    "`%s=%s` has no effect: the run resumes with %s, as '%s' has it. To change it, start a new run "
                    "from the weights of the checkpoint.",
                    option,
                    before.get(setting),
                    after.get(setting),
                    checkpoint,
                )
                return


# The settings of an adapter that decide which weights it has, and what they do.
_OF_ADAPTERS = ("peft_type", "r", "lora_alpha", "target_modules", "modules_to_save", "use_dora", "use_rslora")


def check_adapter(model: Any, checkpoint: Path) -> None:
    """
    Refuses a checkpoint of another adapter than that of the run, or of a whole model in place of an adapter.

    transformers would leave weights as they are for which the checkpoint has none, or fail without a reason.

    Raises:
        `ValueError`: naming the checkpoint, the setting and both values.
    """
    if not checkpoint.is_dir():
        return
    name, config = next(iter(getattr(model, "peft_config", {}).items()), ("default", None))
    # PEFT saves an adapter that is not called "default" in a directory of its name.
    paths = (directory / "adapter_config.json" for directory in (checkpoint, checkpoint / name))
    path = next((each for each in paths if each.exists()), None)
    kinds = {True: "an adapter", False: "a whole model"}
    if (config is None) != (path is None):
        raise ValueError(
            f"'{checkpoint}' is a checkpoint of {kinds[path is not None]}, and the run trains "
            f"{kinds[config is not None]}. Pass another checkpoint, or change `peft_config` (`--use_peft`)."
        )
    if config is None or path is None:
        return
    saved = json.loads(path.read_text(encoding="utf-8"))
    for setting in _OF_ADAPTERS:
        values = [_comparable(each) for each in (saved.get(setting), getattr(config, setting, None))]
        if setting in saved and values[0] != values[1]:
            raise ValueError(
                f"'{checkpoint}' has an adapter with `{setting}={values[0]}`, and that of the run has "
                f"`{setting}={values[1]}`. Resume with the adapter that was trained, or start a new run."
            )


def _comparable(value: Any) -> Any:
    """A value as JSON stores it. Lists are sorted, because the order of a set is not kept."""
    return sorted(value) if isinstance(value, (list, set, tuple)) else getattr(value, "value", value)


class BeyondTheEndError(ValueError):
    """A checkpoint is of a later step than the last one of the run."""


def check_not_beyond(max_steps: int, checkpoint: str | None) -> None:
    """
    Refuses a checkpoint of a later step than the last one of the run, which would save its model as the result.

    Args:
        max_steps (`int`): The last step; not positive if the length of the run is given in epochs.
        checkpoint (`str`, *optional*): The checkpoint to resume from.

    Raises:
        `BeyondTheEndError`: naming the checkpoint, both steps and the fix.
    """
    if checkpoint is None or max_steps <= 0:
        return
    state = read_state(Path(checkpoint, STATE_FILE))
    if state is not None and state["global_step"] > max_steps:
        raise BeyondTheEndError(
            f"'{checkpoint}' is of step {state['global_step']}, beyond the {max_steps} steps of the training. Pass "
            "the checkpoint of an earlier step as `resume_from_checkpoint`, or raise the length (`max_steps`, "
            "`num_train_epochs`)."
        )


@contextmanager
def marked_incomplete(checkpoint: Path, accelerator: Accelerator, *, marks: bool) -> Iterator[None]:
    """
    Marks a checkpoint until all processes have written their part, and the complete checkpoint is on the disk.

    After an error or a kill, the mark stays until the checkpoint is written again. An older complete checkpoint of the
    same step stays until then.

    Args:
        checkpoint (`Path`): The directory that is written in the block. It may not exist yet.
        accelerator (`Accelerator`): The trainer's accelerator. Every process must enter the block.
        marks (`bool`): Whether this process writes the files that are not split over processes.

    Raises:
        `OSError`: the disk is full.
    """
    with _telling_of_a_full_disk(checkpoint):
        if marks:
            checkpoint.parent.mkdir(parents=True, exist_ok=True)
            _make_way(checkpoint)
            mark_of(checkpoint).touch()
            flush(mark_of(checkpoint))
            flush(checkpoint.parent)
        accelerator.wait_for_everyone()
        yield
        accelerator.wait_for_everyone()
        if accelerator.is_local_main_process:
            for directory, _, names in os.walk(checkpoint):
                for path in (Path(directory, name) for name in names):
                    if path.is_file():
                        flush(path)
                flush(Path(directory))
            flush(checkpoint.parent)
        accelerator.wait_for_everyone()
    if marks:
        mark_of(checkpoint).unlink(missing_ok=True)
        flush(checkpoint.parent)
        if previous_of(checkpoint).exists():
            delete(previous_of(checkpoint))


def delete_outdated(newest: Path, limit: int | None, best: str | None) -> None:
    """Deletes the checkpoints beyond `save_total_limit`, see [`outdated`]."""
    if limit is not None and limit > 0:  # as in transformers
        for path in outdated(newest, limit, Path(best) if best else None):
            delete(path)


def _make_way(checkpoint: Path) -> None:
    """Moves or removes an old checkpoint. Its files must not mix with new ones. A complete one must not be lost."""
    if is_complete(checkpoint):
        delete(previous_of(checkpoint))
        try:
            checkpoint.rename(previous_of(checkpoint))
        except OSError as error:  # file systems over object stores may not rename directories
            logger.warning("Overwriting '%s', which cannot be renamed (%s).", checkpoint, error.strerror)
    elif is_marked(checkpoint) and checkpoint.exists():
        shutil.rmtree(checkpoint)


@contextmanager
def _telling_of_a_full_disk(checkpoint: Path) -> Iterator[None]:
    """Raises one clear error. The libraries that write files report a full disk in different ways, or not at all."""
    try:
        yield
    except Exception as error:
        number = getattr(error, "errno", None)
        is_full = number in _FULL or "No space left" in str(error)
        if number is None:  # some file systems always report no free space, so an error with a cause keeps it
            is_full |= _free_bytes(checkpoint.parent) < 2**20
        if not is_full:
            raise
        last = last_complete_checkpoint(checkpoint.parent)
        to_resume = f"The last complete one is '{last}'." if last else "There is no complete one yet."
        raise OSError(
            number if number in _FULL else errno.ENOSPC,
            f"No space left on device: the checkpoint '{checkpoint}' is incomplete. {to_resume} Free some space "
            "before you resume. `save_total_limit` keeps fewer checkpoints (one more during a save). "
            "`save_only_model` makes them smaller, but a run cannot resume from them.",
        ) from error


@contextmanager
def _naming(checkpoint: str | None) -> Iterator[None]:
    """Says which checkpoint cannot be loaded. Errors about damaged files do not name it."""
    try:
        yield
    except Exception as error:
        if checkpoint is None or str(checkpoint) in str(error):
            raise
        raise ValueError(
            f"Cannot load the checkpoint '{checkpoint}': {type(error).__name__}: {error}. If a file is damaged, or "
            "if it is of another model or optimizer, pass another checkpoint as `resume_from_checkpoint`."
        ) from error


# The errors of a full disk and of a full quota.
_FULL = (errno.ENOSPC, errno.EDQUOT)


def _free_bytes(directory: Path) -> float:
    try:
        return shutil.disk_usage(directory).free
    except OSError:
        return math.inf


@contextmanager
def _save_total_limit(args: TrainingArguments, limit: int | None) -> Iterator[None]:
    before, args.save_total_limit = args.save_total_limit, limit
    try:
        yield
    finally:
        args.save_total_limit = before
