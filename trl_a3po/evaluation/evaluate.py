"""Evaluate a model on problems with checkable answers: avg@k, pass@k and maj@k, each with its interval."""

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
import transformers
from datasets import Dataset
from math_verify import LatexExtractionConfig, parse, verify
from transformers import AutoModelForCausalLM, AutoTokenizer, BatchEncoding, PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils.peft_utils import find_adapter_config_file
from trl.rewards import accuracy_reward

from .. import __version__


RESAMPLES = 10_000

Prompt = list[dict[str, str]]
# Prompts and a seed to the completions of each prompt.
Sampler = Callable[[list[Prompt], int], list[list[str]]]


@dataclass
class EvaluateArguments:
    """Which model to evaluate, on which problems, and how to sample."""

    model_name_or_path: str = field(metadata={"help": "Directory or Hub name of a model, or of an adapter (PEFT)."})
    dataset_name: str = field(
        metadata={
            "help": "A .jsonl, .json or .parquet file, or a dataset on the Hub, in columns as of GSM8K, MATH, AIME, "
            "DAPO-Math-17k, verl or TRL."
        }
    )
    output_dir: str = field(metadata={"help": "Where `samples.jsonl` and `results.json` are written."})
    dataset_config: str | None = field(default=None, metadata={"help": "Configuration of a dataset on the Hub."})
    dataset_split: str = field(default="test", metadata={"help": "Split of a dataset on the Hub."})
    instruction: str | None = field(default=None, metadata={"help": "Appended to each of the problems."})
    max_problems: int | None = field(default=None, metadata={"help": "Evaluate on the first so many problems alone."})
    num_samples: int = field(default=8, metadata={"help": "Completions sampled for each problem."})
    temperature: float = field(default=0.6, metadata={"help": "Sampling temperature; 0 takes the likeliest tokens."})
    top_p: float = field(
        default=0.95, metadata={"help": "Sample from the likeliest tokens of this total probability."}
    )
    max_completion_length: int = field(default=4096, metadata={"help": "Tokens of a completion at most."})
    seed: int = field(default=0, metadata={"help": "Seed of the sampling."})
    batch_size: int = field(default=32, metadata={"help": "Problems sampled at once."})
    use_vllm: bool = field(default=False, metadata={"help": "Sample with vLLM instead of transformers."})
    dtype: str = field(default="auto", metadata={"help": "Data type of the model, such as `bfloat16`."})
    trust_remote_code: bool = field(default=False, metadata={"help": "Run code that the model's repository brings."})

    def __post_init__(self):
        for name in ("num_samples", "max_completion_length", "batch_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"`{name}` must be 1 or more, got {getattr(self, name)}.")
        if self.max_problems is not None and self.max_problems < 1:
            raise ValueError(f"`max_problems` must be 1 or more, got {self.max_problems}. Leave it out for all.")
        if not self.temperature >= 0:
            raise ValueError(f"`temperature` must be 0 or more, got {self.temperature}.")
        if self.temperature == 0 and self.num_samples > 1:
            raise ValueError("`temperature=0` gives the same completion every time. Pass `num_samples=1`.")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"`top_p` must be above 0 and not above 1, got {self.top_p}.")


# Metrics


def pass_at_k(correct: int, samples: int, k: int) -> float:
    """
    Chance that one of k of the samples, drawn without return, is correct: the unbiased estimator of Chen et al. (arXiv
    2107.03374, equation 1).
    """
    return 1.0 - math.comb(samples - correct, k) / math.comb(samples, k)


def majority_is_correct(completions: Sequence[str], correct: Sequence[float]) -> float:
    """
    Whether the answer that most completions give is correct.

    Answers are equal where math-verify says so. A completion without an answer has no vote, and of answers with as
    many votes the first one counts (our choice).
    """
    groups: list[list[int]] = []
    answers = [parse(text, [LatexExtractionConfig(boxed_match_priority=0)], "any_match") for text in completions]
    for index, answer in enumerate(answers):
        if not answer:
            continue
        for group in groups:
            if verify(answers[group[0]], answer):
                group.append(index)
                break
        else:
            groups.append([index])
    return correct[max(groups, key=len)[0]] if groups else 0.0


def interval(per_problem: Sequence[float]) -> tuple[float, float]:
    """95 % interval of a mean over problems, by bootstrap: percentiles of the means of resampled problems."""
    values, generator = np.asarray(per_problem), np.random.default_rng(0)
    # One resample after the other: all at once they take gigabytes for a large dataset.
    means = [values[generator.integers(len(values), size=len(values))].mean() for _ in range(RESAMPLES)]
    low, high = np.percentile(means, [2.5, 97.5])
    return float(low), float(high)


def metrics(problems: Sequence[dict[str, Any]]) -> dict[str, dict[str, float]]:
    """Of what `samples.jsonl` holds, each metric's mean over the problems, and its interval."""
    samples = len(problems[0]["correct"])
    counts = [int(sum(problem["correct"])) for problem in problems]
    per_problem = {f"avg@{samples}": [count / samples for count in counts]}
    for k in (2**i for i in range(samples.bit_length())):
        if k <= samples:
            per_problem[f"pass@{k}"] = [pass_at_k(count, samples, k) for count in counts]
    per_problem[f"maj@{samples}"] = [majority_is_correct(each["completions"], each["correct"]) for each in problems]
    means = {}
    for name, values in per_problem.items():
        low, high = interval(values)
        means[name] = {"mean": float(np.mean(values)), "low": low, "high": high}
    return means


# Sampling


def sample(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: list[Prompt],
    num_samples: int,
    max_completion_length: int | None,
    temperature: float = 1.0,
    top_p: float = 1.0,
) -> list[str]:
    """`num_samples` completions of each prompt, the completions of one prompt next to each other."""
    model.eval()
    encoded = tokenizer.apply_chat_template(
        prompts, add_generation_prompt=True, padding=True, padding_side="left", return_tensors="pt", return_dict=True
    )
    inputs = cast(BatchEncoding, encoded).to(model.device)
    drawing = {"do_sample": True, "temperature": temperature, "top_k": 0, "top_p": top_p}
    with torch.inference_mode():
        output = model.generate(  # type: ignore[operator]  # declared by GenerationMixin only
            **inputs,
            **(drawing if temperature > 0 else {"do_sample": False, "num_beams": 1}),
            num_return_sequences=num_samples,
            max_new_tokens=max_completion_length,
        )
    return tokenizer.batch_decode(output[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)


def transformers_sampler(arguments: EvaluateArguments) -> Sampler:
    name, trust = arguments.model_name_or_path, arguments.trust_remote_code
    tokenizer = AutoTokenizer.from_pretrained(name, trust_remote_code=trust)
    model = AutoModelForCausalLM.from_pretrained(name, dtype=arguments.dtype, trust_remote_code=trust)
    model = cast(Any, model).to("cuda" if torch.cuda.is_available() else "cpu")
    samples = arguments.num_samples

    def draw(prompts: list[Prompt], seed: int) -> list[list[str]]:
        torch.manual_seed(seed)
        texts = sample(
            model,
            tokenizer,
            prompts,
            samples,
            arguments.max_completion_length,
            temperature=arguments.temperature,
            top_p=arguments.top_p,
        )
        return [texts[start : start + samples] for start in range(0, len(texts), samples)]

    return draw


def vllm_sampler(arguments: EvaluateArguments) -> Sampler:
    from vllm import LLM, SamplingParams  # type: ignore[import-not-found]  # an extra
    from vllm.lora.request import LoRARequest  # type: ignore[import-not-found]

    name = arguments.model_name_or_path
    adapter_file = find_adapter_config_file(name)
    options: dict[str, Any] = {"dtype": arguments.dtype, "trust_remote_code": arguments.trust_remote_code}
    request = None
    if adapter_file:
        adapter = json.loads(Path(adapter_file).read_text())
        request = LoRARequest("adapter", 1, str(Path(adapter_file).parent))
        rank = max(8, 1 << (adapter["r"] - 1).bit_length())  # it takes powers of 2
        options |= {"enable_lora": True, "max_lora_rank": rank, "tokenizer": name}
        name = adapter["base_model_name_or_path"]
    engine = LLM(model=name, **options)

    def draw(prompts: list[Prompt], seed: int) -> list[list[str]]:
        parameters = SamplingParams(
            n=arguments.num_samples,
            temperature=arguments.temperature,
            top_p=arguments.top_p,
            max_tokens=arguments.max_completion_length,
            seed=seed,
        )
        outputs = engine.chat(prompts, parameters, lora_request=request, use_tqdm=False)
        return [[completion.text for completion in output.outputs] for output in outputs]

    return draw


# The command


def evaluate(arguments: EvaluateArguments, problems: Dataset, make_sampler: Callable[[], Sampler]) -> dict[str, Any]:
    """
    Samples and scores what of the problems is not in `samples.jsonl` yet, and writes `results.json`.

    Raises:
        `ValueError`: other settings than those that `output_dir` was begun with; or no problem whose solution
        math-verify can parse.
    """
    directory = Path(arguments.output_dir)
    directory.mkdir(parents=True, exist_ok=True)
    settings = {name: value for name, value in asdict(arguments).items() if name != "output_dir"}
    _check_same_settings(directory / "settings.json", settings)
    path = directory / "samples.jsonl"
    done = _whole_batches(path, arguments.batch_size, len(problems))
    sampler = make_sampler() if len(done) < len(problems) else None
    with path.open("a", encoding="utf-8") as file:
        while sampler and len(done) < len(problems):
            start = len(done)
            batch = problems.select(range(start, min(start + arguments.batch_size, len(problems))))
            for row, completions in zip(batch, sampler(list(batch["prompt"]), arguments.seed + start), strict=True):
                scored = [[{"role": "assistant", "content": text}] for text in completions]
                correct = accuracy_reward(scored, [row["solution"]] * len(completions))
                done.append({**row, "completions": completions, "correct": correct})
            file.writelines(json.dumps(each) + "\n" for each in done[start:])
            file.flush()
            print(f"{len(done)}/{len(problems)} problems", flush=True)
    # accuracy_reward gives None to all samples of a problem whose solution it cannot parse.
    scored_problems = [each for each in done if None not in each["correct"]]
    if not scored_problems:
        raise ValueError("math-verify can parse the solution of none of the problems.")
    results = {
        "metrics": metrics(scored_problems),
        "problems": len(scored_problems),
        "without_a_parseable_solution": len(done) - len(scored_problems),
        "settings": settings,
        "versions": {"trl_a3po": __version__, "transformers": transformers.__version__, "torch": torch.__version__},
    }
    (directory / "results.json").write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")
    return results


def _check_same_settings(path: Path, settings: dict[str, Any]) -> None:
    if not path.exists():
        path.write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")
        return
    before = json.loads(path.read_text(encoding="utf-8"))
    changed = [f"{name}={before.get(name)!r}" for name in settings if settings[name] != before.get(name)]
    if changed:
        raise ValueError(
            f"'{path.parent}' was begun with {', '.join(changed)}. Pass the same again to go on, or another "
            "`output_dir`."
        )


def _whole_batches(path: Path, batch_size: int, problems: int) -> list[dict[str, Any]]:
    """
    What an interrupted evaluation left, in whole batches, so that the rest is sampled as it would have been. What is
    left of another batch is removed from the file.
    """
    text = path.read_text(encoding="utf-8") if path.exists() else ""
    lines = text.splitlines(keepends=True)
    whole = [line for line in lines if line.endswith("\n")]
    if len(whole) < problems:
        whole = whole[: len(whole) // batch_size * batch_size]
    if whole != lines:
        temporary = path.with_suffix(".tmp")
        temporary.write_text("".join(whole), encoding="utf-8")
        temporary.replace(path)
    return [json.loads(line) for line in whole]
