"""
Trains on rewards that try the processes' patience, and then until one of the processes fails, and notes what became
of each.

Run by test_ranks.py under torchrun: `python ranks_worker.py MODEL OUTPUT FAILURE`.
"""

import asyncio
import json
import os
import signal
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from math_verify.errors import TimeoutException
from math_verify.utils import timeout
from support import tiny
from trl.rewards import accuracy_reward

from trl_a3po import A3POTrainer


RANK = int(os.environ["RANK"])
FAILS = 1  # the rank that does


def uneven_reward(completion_ids, **kwargs):
    time.sleep(0.3 * RANK)
    return tiny.parity_reward(completion_ids)


def chatty_reward(completion_ids, **kwargs):
    print("All work and no play makes Jack a dull boy.\n" * 20_000)
    return tiny.parity_reward(completion_ids)


def threaded_reward(completions, solution, **kwargs):
    with ThreadPoolExecutor(4) as pool:
        pairs = zip(completions, solution, strict=True)
        return [reward for (reward,) in pool.map(lambda pair: accuracy_reward([pair[0]], [pair[1]]), pairs)]


async def asynchronous_reward(completion_ids, **kwargs):
    await asyncio.sleep(0.1)
    assert threading.current_thread() is not threading.main_thread()
    return tiny.parity_reward(completion_ids)


def endless_reward(completions, trainer_state, **kwargs):
    """What math-verify does with a completion that takes it too long: its alarm goes off, in one process, once."""
    try:
        if RANK == FAILS and trainer_state.global_step == 1:
            timeout(1)(time.sleep)(60)
        return [1.0] * len(completions)
    except TimeoutException:
        return [0.0] * len(completions)


PATIENCE = [uneven_reward, chatty_reward, threaded_reward, asynchronous_reward, endless_reward, accuracy_reward]


class FailingReward:
    """Fails in its second call, in one process."""

    __name__ = "failing_reward"

    def __init__(self):
        self.calls = 0

    def __call__(self, completion_ids, **kwargs):
        self.calls += 1
        if RANK == FAILS and self.calls == 2:
            raise ZeroDivisionError("in the reward function")
        return tiny.parity_reward(completion_ids)


class FailsToShape(A3POTrainer):
    def shape_advantages(self, *args, **kwargs):
        if RANK == FAILS and self.state.global_step == 1:
            raise ZeroDivisionError("in shape_advantages")
        return super().shape_advantages(*args, **kwargs)


class DiesSaving(A3POTrainer):
    """In the second checkpoint, once the first process has written all of its part."""

    def _save_rng_state(self, output_dir):
        if RANK == FAILS and self.state.global_step == 2:
            while not Path(output_dir, "trainer_state.json").exists():
                time.sleep(0.01)
            os.kill(os.getpid(), signal.SIGKILL)
        super()._save_rng_state(output_dir)


FAILURES = {
    "reward": (A3POTrainer, FailingReward()),
    "shaping": (FailsToShape, tiny.parity_reward),
    "saving": (DiesSaving, tiny.parity_reward),
}


def make(trainer_class, reward_funcs, model, output_dir):
    args = tiny.config(output_dir, per_device_train_batch_size=4, save_strategy="steps", save_steps=1)
    return trainer_class(model, reward_funcs, args, tiny.prompts(conversational=True))


def main(model, output, failure):
    output = Path(output)
    if failure == "reward":
        patient = make(A3POTrainer, PATIENCE, model, output / "patient")
        alarm = signal.getsignal(signal.SIGALRM)
        patient.train()
        assert signal.getsignal(signal.SIGALRM) is alarm
        torch.save({"log": patient.state.log_history, "parameters": tiny.parameters(patient)}, output / f"{RANK}.pt")
    try:
        make(*FAILURES[failure], model, output / failure).train()
    except Exception as error:
        (output / f"{failure}.{RANK}.json").write_text(json.dumps({"time": time.time(), "error": repr(error)}))
        raise


if __name__ == "__main__":
    main(*sys.argv[1:])
