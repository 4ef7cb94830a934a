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
    """Computes pass@1 (mean over the samples) and pass@k (any of the k samples) of a 0/1 tensor (problems, k)."""
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
    """Scores completions sampled at temperature 1 as right (1) or wrong (0).

    The global random state does not change, and the same seed draws the same noise for every model.

    Returns:
        `torch.Tensor` of shape `(problems with a parseable solution, samples)`.

    Raises:
        `ValueError`: math-verify cannot parse any of the solutions.
    """
    scores: list[float | None] = []
    devices = [model.device] if model.device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices):
        torch.manual_seed(seed)
        for batch in problems.iter(PROBLEMS_PER_BATCH):
            texts = sample(model, tokenizer, batch["prompt"], num_samples, max_completion_length)
            solutions = [solution for solution in batch["solution"] for _ in range(num_samples)]
            scores += accuracy_reward([[{"role": "assistant", "content": text}] for text in texts], solutions)
    # accuracy_reward returns None for all samples of a problem if it cannot parse the solution.
    known_scores = [score for score in scores if score is not None]
    if not known_scores:
        raise ValueError("math-verify could not parse any of the solutions of the held-out problems.")
    return torch.tensor(known_scores).view(-1, num_samples)
