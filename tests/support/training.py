"""Trainers on tiny models: made, trained, and compared by what their training moved."""

import torch
from transformers import GPT2Config, GPT2LMHeadModel, TrainerCallback
from trl import GRPOConfig

from trl_a3po import A3POConfig, A3POTrainer

from . import tiny


# The update is a step of plain descent: Adam turns rounding into steps of full size where a gradient is almost zero.
SGD = {"optim": "sgd", "learning_rate": 0.1}


def make(
    output_dir,
    trainer_class=A3POTrainer,
    *,
    model=tiny.model,
    reward_funcs=tiny.parity_reward,
    arguments=None,
    **fields,
):
    """A trainer. `arguments` are its own, `fields` those of its config. It keeps its first parameters in `start`."""
    config_class = A3POConfig if issubclass(trainer_class, A3POTrainer) else GRPOConfig
    torch.manual_seed(0)  # older releases of TRL draw the adapter's weights before they seed
    trainer = trainer_class(
        **{
            "model": model() if callable(model) and not isinstance(model, torch.nn.Module) else model,
            "reward_funcs": reward_funcs,
            "args": tiny.config(output_dir, config_class, **fields),
            "train_dataset": tiny.prompts(),
            "processing_class": tiny.tokenizer(),
            **(arguments or {}),
        }
    )
    trainer.start = tiny.parameters(trainer)
    return trainer


def train(*args, **kwargs):
    trainer = make(*args, **kwargs)
    trainer.train()
    return trainer


def different(ours, theirs):
    """Names of the parameters in which two trainers, or what they started from, differ."""
    assert ours.keys() == theirs.keys()
    return {name for name in ours if not torch.equal(ours[name], theirs[name])}


def moved(trainer):
    """Names of the parameters that training has moved."""
    return different(tiny.parameters(trainer), trainer.start)


def assert_trained(trainer):
    """All parameters finite, some moved, the loss finite at every step."""
    assert all(torch.isfinite(parameter).all() for parameter in tiny.parameters(trainer).values())
    assert moved(trainer)
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses
    assert all(torch.isfinite(torch.tensor(losses)))


def assert_same_parameters(a, b):
    assert not different(tiny.parameters(a), tiny.parameters(b))


def assert_same_update(a, b):
    """Both have moved, and to the same parameters."""
    assert moved(a)
    assert moved(b)
    assert_same_parameters(a, b)


def is_time(metric):
    """Whether a metric is a time, or depends on one. No two runs have the same."""
    return metric.startswith("step_time") or metric.endswith(("_time", "_runtime", "_per_second"))


def largest_difference(ours, theirs):
    assert ours.keys() == theirs.keys()
    return max(float((ours[name] - value).abs().max()) for name, value in theirs.items())


def update_difference(ours, theirs, least_update=1e-3):
    """The largest difference of parameters, relative to the largest update, which is not just rounding."""
    end = tiny.parameters(theirs)
    update = largest_difference(end, theirs.start)
    assert update > least_update
    return largest_difference(tiny.parameters(ours), end) / update


class StopAfter(TrainerCallback):
    """Ends a run early, as an interruption does."""

    def __init__(self, step):
        self.step = step

    def on_step_end(self, args, state, control, **kwargs):
        control.should_training_stop |= state.global_step == self.step


class Recorder(A3POTrainer):
    """
    Keeps the micro-batch of each loss in `batches`, and the shapes of the loss's passes over the model in `passes`.

    A micro-batch is the dict that TRL's loss is given, with the log-probabilities and entropies that were computed,
    the advantages as `shaped`, and the optimizer steps done before it as `step`.
    """

    def __init__(self, *args, **kwargs):
        self.batches, self.passes = [], []
        super().__init__(*args, **kwargs)
        model = self.accelerator.unwrap_model(self.model)
        model.register_forward_pre_hook(self._note_pass, with_kwargs=True)

    def _note_pass(self, module, args, kwargs):
        if torch.is_grad_enabled():  # only the passes of the loss have gradients
            self.passes.append(tuple(kwargs["input_ids"].shape))

    def _before_loss_reads(self, scope, per_token_logps, entropies):
        # Not by an override of the loss or of `shape_advantages`: either changes which rows a micro-batch has.
        batch = {**scope.inputs, "per_token_logps": per_token_logps.detach(), "entropies": entropies.detach()}
        super()._before_loss_reads(scope, per_token_logps, entropies)
        batch |= {"shaped": scope.inputs["advantages"], "step": self.state.global_step}
        rows = len(batch["completion_ids"])
        for name, value in batch.items():
            if isinstance(value, torch.Tensor) and value.dim() and len(value) == rows:
                batch[name] = value[: scope.present]  # the others have no tokens
        self.batches.append(batch)

    @property
    def cells(self):
        """The positions that the passes have computed."""
        return sum(rows * columns for rows, columns in self.passes)


class ShapingRecorder(Recorder):
    """Also keeps what the hook is told, and what it returns. With a hook of its own no row is skipped."""

    def __init__(self, *args, **kwargs):
        self.calls = []
        super().__init__(*args, **kwargs)

    def shape_advantages(self, advantages, **batch):
        shaped = super().shape_advantages(advantages, **batch)
        assert not any(getattr(value, "requires_grad", False) for value in (advantages, shaped, *batch.values()))
        self.calls.append({"advantages": advantages, "shaped": shaped, **batch})
        return shaped


def gpt2():
    """A model that looks its positions up."""
    torch.manual_seed(0)
    size = {"n_embd": 32, "n_layer": 2, "n_head": 2, "n_positions": 64, "initializer_range": 0.3}
    dropout = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
    return GPT2LMHeadModel(
        GPT2Config(vocab_size=len(tiny.tokenizer()), eos_token_id=1, bos_token_id=1, pad_token_id=0, **size, **dropout)
    )
