"""
Names of TRL, transformers and other packages that this package needs and that may change without notice.

If TRL renames a method, nobody calls our override. If it renames an attribute that is read with a default, the default
is used. In both cases the training would run but do something else. So every such name is listed here once, and
[`check_relied_on`] looks for it when a trainer is constructed. A test finds every used name that is missing here.

`python -m trl_a3po.training.relied_on` prints the table of the documentation.
"""

import pkgutil
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import import_module
from typing import Any

from packaging.version import Version
from transformers import Trainer
from trl import GRPOTrainer


# The newest releases with which all tests pass. Errors tell users to install them.
TESTED = {"trl": "1.16.0", "transformers": "5.24.0", "accelerate": "1.15.0", "torch": "2.13.0"}


@dataclass(frozen=True)
class ReliedOn:
    """
    A name of another package.

    Args:
        owner (`str`): The class or the module that has it.
        name (`str`): The name in it.
        used_by (`tuple[str, ...]`): The modules of this package that override it, call it or read it.
        purpose (`str`): The feature that needs it.
        since (`str`, *optional*): The first release that has it. By default, all supported releases have it.
        until (`str`, *optional*): The first release that no longer has it.
        later (`bool`, *optional*, defaults to `False`): Whether a trainer has it only after its construction.
    """

    owner: str
    name: str
    used_by: tuple[str, ...]
    purpose: str
    since: str = "0"
    until: str | None = None
    later: bool = False

    @property
    def package(self) -> str:
        return self.owner.partition(".")[0]

    @property
    def releases(self) -> str:
        if self.until is not None:
            return f"before {self.until}"
        return "all" if self.since == "0" else f"since {self.since}"

    @property
    def must_exist(self) -> bool:
        """Whether the installed release is one of those that have it."""
        installed = Version(import_module(self.package).__version__)
        return Version(self.since) <= installed and (self.until is None or installed < Version(self.until))

    @property
    def in_training(self) -> bool:
        """Whether a trainer needs it, not only a command."""
        return any(module.partition(".")[0] in ("a3po_trainer", "training", "update") for module in self.used_by)

    def exists(self, trainer: Trainer) -> bool:
        """Whether the installed release has it: the module, the class, or this trainer."""
        # Not the class of the trainer: there, an override is found in place of the method that it overrides.
        if self.owner == "transformers.Trainer":
            return hasattr(Trainer, self.name) or self.name in vars(trainer)
        if self.owner == "trl.GRPOTrainer":
            of_trl = (each for each in GRPOTrainer.__mro__ if each not in Trainer.__mro__)
            return any(self.name in vars(each) for each in of_trl) or self.name in vars(trainer)
        return hasattr(_resolve(self.owner), self.name)


def _resolve(owner: str) -> Any:
    try:
        return pkgutil.resolve_name(owner)
    except (ImportError, AttributeError):
        return None


RELIED_ON = (
    # The loss
    ReliedOn(
        "trl.GRPOTrainer",
        "_compute_loss",
        ("update.efficient_update",),
        "the shaping: `compute_loss` calls it, and it reads `inputs['advantages']`, (B,) or (B, T), after it has "
        "computed the log-probabilities",
    ),
    ReliedOn(
        "trl.GRPOTrainer",
        "_get_per_token_logps_and_entropies",
        (
            "update.efficient_update",
            "update.packed_forward",
            "training.trl_contract",
        ),
        "the shaping and the savings: returns log-probabilities and entropies of shape (B, T), and others after them",
    ),
    ReliedOn(
        "trl.GRPOTrainer",
        "importance_sampling_level",
        (
            "a3po_trainer",
            "training.signal_budget",
            "update.loss_scope",
        ),
        "GSPO-token: the loss reads it after it has computed the log-probabilities",
    ),
    ReliedOn(
        "trl.GRPOTrainer",
        "epsilon_low",
        ("a3po_trainer", "training.signal_budget"),
        "the shaping by Clip-Cov and the metric `signal/tokens/clipped_low`: where the loss clips",
    ),
    ReliedOn(
        "trl.GRPOTrainer",
        "epsilon_high",
        ("a3po_trainer", "training.signal_budget"),
        "the shaping by Clip-Cov and the metric `signal/tokens/clipped_high`: where the loss clips",
    ),
    ReliedOn(
        "trl.GRPOTrainer",
        "compute_liger_loss",
        ("a3po_trainer",),
        "the refusal of a fused loss that takes one advantage per completion",
        until="1.14",
    ),
    ReliedOn(
        "trl.GRPOTrainer", "beta", ("update.efficient_update",), "which rows may be skipped: none with a KL term"
    ),
    ReliedOn(
        "trl.GRPOTrainer",
        "top_entropy_quantile",
        (
            "training.signal_budget",
            "update.efficient_update",
        ),
        "which rows may be skipped and regrouped: none where tokens of other rows matter",
    ),
    ReliedOn(
        "trl.GRPOTrainer",
        "_entropy_bonus_enabled",
        ("update.efficient_update",),
        "which rows may be skipped and regrouped: none with an entropy bonus",
        since="1.8",
    ),
    ReliedOn(
        "trl.GRPOTrainer",
        "_entropy_window_stats",
        ("a3po_trainer",),
        "training again after an interruption: the sums of `use_adaptive_entropy` in the running optimizer step",
        since="1.8",
    ),
    ReliedOn(
        "trl.GRPOTrainer",
        "aux_loss_enabled",
        ("update.efficient_update",),
        "which rows may be skipped and regrouped: none with a router loss",
        since="1.7",
    ),
    ReliedOn(
        "trl.GRPOTrainer",
        "loss_type",
        (
            "training.signal_budget",
            "update.efficient_update",
        ),
        "which rows may be regrouped: those of losses with one denominator for an optimizer step",
    ),
    ReliedOn(
        "trl.GRPOTrainer", "pad_to_multiple_of", ("update.efficient_update",), "the width of trimmed micro-batches"
    ),
    ReliedOn(
        "transformers.Trainer",
        "current_gradient_accumulation_steps",
        ("training.trl_contract",),
        "the construction check: the loss reads it",
        later=True,
    ),
    ReliedOn(
        "transformers.PretrainedConfig",
        "_attn_implementation",
        ("update.attention",),
        "packed rows: attention layers look their function up by it each time they run",
    ),
    ReliedOn(
        "torch.autograd.Variable",
        "_execution_engine",
        ("update.attention",),
        "packed rows with gradient checkpointing: calls a function when a backward pass ends",
    ),
    # The rollout
    ReliedOn(
        "trl.GRPOTrainer",
        "get_train_dataloader",
        ("training.rollouts",),
        "the check that a dataset fills a generation batch: called before the steps are counted",
    ),
    ReliedOn(
        "trl.GRPOTrainer",
        "_prepare_inputs",
        ("update.efficient_update",),
        "the savings: fills `_buffered_inputs` with a new rollout, and returns one of its micro-batches",
    ),
    ReliedOn(
        "trl.GRPOTrainer",
        "_buffered_inputs",
        ("training.checkpoints", "update.efficient_update"),
        "the savings: the micro-batches of a rollout, a list of dictionaries; resuming: a new run has none",
    ),
    ReliedOn(
        "trl.GRPOTrainer",
        "_step",
        ("training.checkpoints", "update.efficient_update"),
        "the savings: counts micro-batches; resuming: a new run begins at 0",
    ),
    ReliedOn(
        "trl.GRPOTrainer",
        "ref_model",
        ("update.efficient_update",),
        "the savings: another model than this one and the policy was not checked, and is not packed",
    ),
    ReliedOn(
        "trl.GRPOTrainer",
        "training_step",
        ("update.efficient_update",),
        "packing: gives the model its own attention back after an error; the model card: that a step was trained",
    ),
    ReliedOn(
        "trl.GRPOTrainer",
        "_generate_and_score_completions",
        ("training.rollouts",),
        "dynamic sampling, and the rewards handed to `shape_advantages`: returns the rollout of a batch of prompts, "
        "in the order of the prompts, before it is shuffled",
    ),
    ReliedOn(
        "trl.GRPOTrainer",
        "_generate",
        ("training.rollouts",),
        "the time of the generation, the check for NaN before it, and a `rollout_func` that computes "
        "log-probabilities where the pass for old ones is skipped",
    ),
    ReliedOn(
        "trl.GRPOTrainer",
        "_current_train_step_time",
        ("training.rollouts",),
        "the time of a step that was interrupted, in the next run: seconds of the step so far",
    ),
    ReliedOn(
        "trl.GRPOTrainer",
        "_generate_single_turn",
        ("training.rollouts",),
        "the check that prompts fit into the positions of a model: gets the token ids of the prompts first",
    ),
    ReliedOn(
        "trl.GRPOTrainer",
        "_calculate_rewards",
        ("training.rollouts",),
        "the check of rewards, and those handed to `shape_advantages`: returns those of all processes, (B, F), in "
        "order",
    ),
    ReliedOn("trl.GRPOTrainer", "reward_weights", ("training.rollouts",), "the total reward of a completion"),
    ReliedOn("trl.GRPOTrainer", "reward_func_names", ("training.rollouts",), "the error about a reward"),
    ReliedOn("trl.GRPOTrainer", "rollout_func", ("training.rollouts",), "the check of completions without tokens"),
    ReliedOn(
        "trl.GRPOTrainer",
        "num_generations",
        (
            "training.rollouts",
            "update.efficient_update",
        ),
        "which rows of a rollout are a group",
    ),
    ReliedOn(
        "trl.GRPOTrainer", "max_completion_length", ("training.rollouts",), "the check that prompts fit into a model"
    ),
    ReliedOn(
        "trl.GRPOTrainer",
        "reward_funcs",
        (
            "training.rollouts",
            "training.signal_budget",
        ),
        "the metrics `signal/completions/*`: whose None says that a solution cannot be parsed",
    ),
    ReliedOn(
        "trl.GRPOTrainer",
        "multi_objective_aggregation",
        ("training.rollouts",),
        "the metrics `signal/completions/*`: whether one reward function with a spread is enough",
    ),
    # Logs
    ReliedOn(
        "trl.GRPOTrainer",
        "get_high_entropy_mask",
        ("a3po_trainer",),
        "the metric `signal/tokens/entropy_quantile`: the loss calls it with `top_entropy_quantile`, after it has "
        "computed the log-probabilities",
    ),
    ReliedOn(
        "trl.GRPOTrainer",
        "get_off_policy_mask",
        ("training.signal_budget",),
        "the metric `signal/tokens/off_policy`: returns 1 for the completions that the loss keeps",
    ),
    ReliedOn(
        "trl.GRPOTrainer",
        "_metrics",
        (
            "a3po_trainer",
            "training.rollouts",
            "training.trl_contract",
            "update.efficient_update",
        ),
        "the metrics `a3po/*`: lists by mode and name, whose means the next log takes",
    ),
    ReliedOn(
        "transformers.Trainer",
        "evaluation_loop",
        ("a3po_trainer",),
        "the metrics `eval_a3po/*`: runs before the log of an evaluation",
    ),
    ReliedOn(
        "transformers.Trainer",
        "_maybe_log_save_evaluate",
        ("a3po_trainer",),
        "the metrics `a3po/*` and the token log: called by all processes at the end of each step, after all callbacks",
    ),
    ReliedOn(
        "trl.GRPOTrainer",
        "log",
        ("a3po_trainer",),
        "the metrics of a log: takes the means of `_metrics`, and clears them",
    ),
    ReliedOn("transformers.Trainer", "create_model_card", ("a3po_trainer",), "the settings on the model card"),
    ReliedOn("trl.GRPOTrainer", "_tag_names", ("a3po_trainer",), "the tags of the model card"),
    ReliedOn("trl.GRPOTrainer", "_name", ("a3po_trainer",), "the method's name on the model card"),
    ReliedOn("trl.GRPOTrainer", "_paper", ("a3po_trainer",), "the method's paper on the model card"),
    ReliedOn(
        "transformers.Trainer",
        "push_in_progress",
        ("training.hub_warnings",),
        "the warnings of pushes to the Hub that fail: once there was a push, has its `jobs`, which are futures",
        later=True,
    ),
    # Checkpoints
    ReliedOn("transformers.Trainer", "train", ("training.checkpoints",), "resuming: is given the checkpoint first"),
    ReliedOn(
        "transformers.Trainer",
        "_save_checkpoint",
        ("training.checkpoints",),
        "the mark of unfinished checkpoints: writes everything that belongs to one",
    ),
    ReliedOn(
        "transformers.Trainer",
        "save_model",
        ("training.checkpoints",),
        "the user's `save_total_limit` in the arguments that are saved",
    ),
    ReliedOn(
        "transformers.Trainer",
        "_push_from_checkpoint",
        ("training.checkpoints",),
        "the user's `save_total_limit` in the arguments that are pushed to the Hub",
    ),
    *(
        ReliedOn(
            "transformers.Trainer",
            name,
            ("training.checkpoints",),
            "weights that a checkpoint has under other names than the model: the experts of a mixture",
        )
        for name in ("_load_from_checkpoint", "_load_best_model", "_issue_warnings_after_load")
    ),
    *(
        ReliedOn(
            "transformers.Trainer",
            name,
            ("training.checkpoints",),
            "the name of a checkpoint that cannot be loaded, in the error",
        )
        for name in ("_load_optimizer_and_scheduler", "_load_rng_state")
    ),
    ReliedOn("transformers.Trainer", "_get_output_dir", ("training.checkpoints",), "where checkpoints are written"),
    ReliedOn(
        "trl.GRPOTrainer",
        "_get_train_sampler",
        ("training.checkpoints",),
        "the order of prompts in a resumed run: returns a sampler that draws the order of a whole epoch each time its "
        "iteration begins, from a generator that it seeds once (`RepeatSampler`)",
    ),
    ReliedOn(
        "transformers.Trainer",
        "get_batch_samples",
        ("training.checkpoints",),
        "a run resumed after its last step: called before each step",
    ),
    ReliedOn("transformers.trainer", "TRAINER_STATE_NAME", ("training.checkpoints",), "the last file of a checkpoint"),
    ReliedOn(
        "transformers.trainer_utils", "PREFIX_CHECKPOINT_DIR", ("training.checkpoints",), "the names of checkpoints"
    ),
    # Several processes
    ReliedOn(
        "accelerate.utils", "broadcast_object_list", ("training.checkpoints",), "one decision for all: what to resume"
    ),
    ReliedOn(
        "accelerate.utils", "DynamoBackend", ("update.efficient_update",), "packed rows: whether the launcher compiles"
    ),
    ReliedOn("accelerate.utils", "gather_object", ("training.input_checks",), "the prompt in an error of rewards"),
    # Commands
    ReliedOn("trl.scripts", "grpo", ("cli.train",), "`trl-a3po train`, which runs TRL's script"),
    ReliedOn("trl.scripts.grpo", "GRPOScriptArguments", ("cli.train",), "the options of `trl-a3po train`"),
    ReliedOn(
        "trl.scripts.grpo",
        "main",
        ("cli.train",),
        "`trl-a3po train`: imports `GRPOTrainer` from `trl` when it runs, so that `A3POTrainer` can take its place",
    ),
    ReliedOn("trl.scripts.utils", "DatasetConfig", ("cli.dataset_options",), "local files in `trl-a3po train`"),
    ReliedOn(
        "trl.cli.accelerate_config",
        "resolve_accelerate_config_argument",
        ("cli.train",),
        "`--accelerate_config` of `trl-a3po train`",
    ),
    ReliedOn("accelerate.commands.launch", "launch_command", ("cli.train",), "the processes of `trl-a3po train`"),
    ReliedOn(
        "accelerate.commands.launch", "launch_command_parser", ("cli.train",), "the options of `accelerate launch`"
    ),
    ReliedOn(
        "trl.models.utils",
        "disable_gradient_checkpointing",
        ("update.efficient_update",),
        "the pass for old log-probabilities: no checkpoints without gradients, as in TRL's own pass",
    ),
    ReliedOn(
        "trl.trainer.utils",
        "create_model_from_path",
        ("evaluation.models",),
        "`trl-a3po eval`: the class of model that training would take",
    ),
    ReliedOn(
        "trl.chat_template_utils",
        "parse_response",
        ("evaluation.models",),
        "`trl-a3po eval`: what a reward reads, if the tokenizer has a response template",
    ),
    ReliedOn(
        "trl.data_utils",
        "prepare_multimodal_messages",
        ("evaluation.models",),
        "`trl-a3po eval`: problems of text for models with images",
    ),
    ReliedOn(
        "transformers.PreTrainedModel",
        "_checkpoint_conversion_mapping",
        ("evaluation.models",),
        "`trl-a3po eval`: names of weights in adapters that an older release saved",
        until="5.9.0",
    ),
    ReliedOn(
        "transformers.integrations",
        "get_reporting_integration_callbacks",
        ("cli.training_options",),
        "the check of the trackers before a command loads a model",
    ),
    ReliedOn("transformers.utils.logging", "disable_progress_bar", ("cli.demo",), "the output of `trl-a3po demo`"),
    ReliedOn("trl.rewards", "accuracy_reward", ("rewards",), "the rewards by math-verify"),
    ReliedOn("trl.rewards", "reasoning_accuracy_reward", ("rewards",), "the same, after the reasoning"),
)


def check_relied_on(trainer: Trainer) -> None:
    """
    Fails unless the installed releases have every name that a trainer relies on.

    Args:
        trainer ([`A3POTrainer`]): The trainer at the end of `GRPOTrainer`'s `__init__`.

    Raises:
        `RuntimeError`: a name is missing. The message has the release, the name, its purpose and the fix.
    """
    for each in RELIED_ON:
        if each.in_training and not each.later and each.must_exist and not each.exists(trainer):
            raise RuntimeError(
                f"{base_description(trainer, each.package)} has no `{each.owner.rpartition('.')[2]}.{each.name}`, "
                f"which A3POTrainer needs for {each.purpose}. {advice(trainer, each.package)}"
            )


def base_description(trainer: Trainer, package: str = "trl") -> str:
    """The base of the trainer, for the start of an error: a release, or the class that has replaced TRL's."""
    replaced = _replaced_base(trainer)
    if replaced is not None:
        return f"`{replaced.__name__}` of the module `{replaced.__module__}`, which has replaced TRL's `GRPOTrainer`,"
    return f"{'TRL' if package == 'trl' else package} {import_module(package).__version__}"


def advice(trainer: Trainer, package: str = "trl") -> str:
    """The fix for an error of the construction check."""
    replaced = _replaced_base(trainer)
    if replaced is not None:
        source = replaced.__module__.partition(".")[0]
        return (
            f"A3POTrainer was not tested with it. Train without the package that replaces the class, or import "
            f"`A3POTrainer` from `trl_a3po` before you import that package (`{source}`, or the one that made it)."
        )
    return f"Install a release that trl-a3po was tested with: `pip install {package}=={TESTED[package]}`."


def our_class(trainer: Trainer) -> type[Any]:
    """The trainer's class as this package defines it, without the changes of a user's subclass."""
    package = __name__.partition(".")[0]
    return next(each for each in type(trainer).__mro__ if each.__module__.partition(".")[0] == package)


def _replaced_base(trainer: Trainer) -> type | None:
    """A base of our trainer that neither TRL nor transformers defines: Unsloth replaces TRL's by its own."""
    known = ("trl_a3po", "trl", "transformers")
    bases = [each for each in our_class(trainer).__mro__ if issubclass(each, Trainer)]
    return next((each for each in bases if each.__module__.partition(".")[0] not in known), None)


def as_markdown() -> str:
    """The table, for the documentation."""
    return "\n".join(["| Name | Releases | Used by | Needed for |", "| --- | --- | --- | --- |", *_rows()])


def _rows() -> Iterator[str]:
    for each in RELIED_ON:
        modules = ", ".join(f"`{module}`" for module in each.used_by)
        yield f"| `{each.owner}.{each.name}` | {each.releases} | {modules} | {each.purpose} |"


if __name__ == "__main__":
    print(as_markdown())
