"""[`WarnOfFailedPushes`]: transformers pushes to the Hub in the background without checking for errors."""

import logging
from concurrent.futures import Future
from weakref import WeakSet

from transformers import Trainer, TrainerCallback


logger = logging.getLogger(__name__)


class WarnOfFailedPushes(TrainerCallback):
    """
    Warns about a push that failed, and about one that the end of training waits for.

    Neither is an error: the checkpoints are on the disk, and every save pushes again.
    """

    def __init__(self, trainer: Trainer):
        self._trainer = trainer
        self._watched: WeakSet[Future] = WeakSet()

    def _jobs(self) -> list[Future]:
        push = getattr(self._trainer, "push_in_progress", None)
        return push.jobs if push is not None else []

    def on_save(self, args, state, control, **kwargs):
        for job in self._jobs():
            if job not in self._watched:
                self._watched.add(job)
                job.add_done_callback(self._warn_if_failed)

    def _warn_if_failed(self, job: Future) -> None:
        if not job.cancelled() and job.exception() is not None:
            logger.warning(
                "A push to %s failed: %s\nTraining continues, and the checkpoints in '%s' are complete. The next save "
                "pushes again; at the end of training, call `trainer.push_to_hub()`.",
                self._trainer.hub_model_id,
                job.exception(),
                self._trainer.args.output_dir,
            )

    def on_train_end(self, args, state, control, **kwargs):
        if not all(job.done() for job in self._jobs()):
            logger.warning(
                "Training is done and is waiting for a push to the Hub to finish. If the Hub does not respond, this "
                "can hang indefinitely. The checkpoints in '%s' are complete: stopping the process loses nothing.",
                args.output_dir,
            )
