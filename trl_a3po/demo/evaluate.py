"""pass@1 and pass@k of a model on problems with checkable answers."""

import math
from dataclasses import dataclass

import torch
from datasets import Dataset
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from trl_a3po.evaluation.evaluate import sample
from trl_a3po.rewards import accuracy_reward


PROBLEMS_PER_BATCH = 32


@dataclass(frozen=True)
class Estimate:
    """A mean over problems with its standard error."""

    mean: float
    standard_error: float

    def __str__(self) -> str:
        return f"{self.mean:.3f} ± {self.standard_error:.3f}"


def pass_rates(is_correct: torch.Tensor) -> tuple[Estimate, Estimate]:
    """pass@1 (the mean over the samples) and pass@k (any of the k samples) of a 0/1 tensor (problems, k)."""
    return estimate(is_correct.mean(dim=1)), estimate(is_correct.amax(dim=1))


def estimate(per_problem: torch.Tensor) -> Estimate:
    count = len(per_problem)
    error = per_problem.std().item() / math.sqrt(count) if count > 1 else math.nan
    return Estimate(per_problem.mean().item(), error)


def score_samples(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    problems: Dataset,
    num_samples: int,
    max_completion_length: int | None,
    seed: int = 0,
) -> torch.Tensor:
    """Accuracy (0 or 1) of completions sampled at temperature 1, shape (problems with a parseable solution, samples).

    The global random state is left as it was, and the same seed draws the same noise for every model.
    """
    scores: list[float | None] = []
    devices = [model.device] if model.device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices):
        torch.manual_seed(seed)
        for batch in problems.iter(PROBLEMS_PER_BATCH):
            texts = sample(model, tokenizer, batch["prompt"], num_samples, max_completion_length)
            solutions = [solution for solution in batch["solution"] for _ in range(num_samples)]
            scores += accuracy_reward([[{"role": "assistant", "content": text}] for text in texts], solutions)
    # accuracy_reward gives None to all samples of a problem whose solution it cannot parse.
    known_scores = [score for score in scores if score is not None]
    if not known_scores:
        raise ValueError("math-verify can parse the solution of no problem to evaluate on.")
    return torch.tensor(known_scores).view(-1, num_samples)
