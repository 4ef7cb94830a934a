"""
Trains a model that two processes share until the part of the last one becomes NaN, and notes the error of each.

Run by test_finite.py: `python finite_worker.py MODEL OUTPUT KIND` under `accelerate launch`.
"""

import math
import os
import sys
from pathlib import Path

from support import processes, tiny
from transformers import TrainerCallback

from trl_a3po import A3POTrainer


RANK = int(os.environ["RANK"])


class Spoils(TrainerCallback):
    """Writes NaN into the last process's part of a parameter before checkpoint-2."""

    def __init__(self, kind):
        self._kind = kind

    def on_step_end(self, args, state, control, model, **kwargs):
        if state.global_step != 2 or RANK == 0:
            return
        parameter = next(each for name, each in model.named_parameters() if name.endswith("q_proj.weight"))
        # ZeRO-3 has each part twice where a parameter is so small that every process keeps all of it.
        parts = [parameter.to_local()] if self._kind == "fsdp2" else [parameter.data, parameter.ds_tensor]
        for part in parts:
            part.data.view(-1)[-1:] = math.nan


def main(model, output, kind):
    output = Path(output)
    processes.shard()
    args = tiny.config(
        output / "run",
        max_steps=2,
        per_device_train_batch_size=4,
        save_strategy="steps",
        save_steps=1,
        logging_steps=9,
    )
    trainer = A3POTrainer(
        model, tiny.parity_reward, args, tiny.prompts(), processing_class=tiny.tokenizer(), callbacks=[Spoils(kind)]
    )
    try:
        trainer.train()
    except FloatingPointError as error:
        (output / f"{RANK}").write_text(str(error))
    processes.leave()


if __name__ == "__main__":
    main(*sys.argv[1:])
