"""Samples and scores one evaluation of one model in a directory, resumes it, and never mixes it with another."""

import json
import platform
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import asdict, dataclass, field, replace
from datetime import date
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, cast

import torch
from datasets import Dataset
from transformers import PreTrainedModel, PreTrainedTokenizerBase, ProcessorMixin

from .. import __version__
from ..rewards import accuracy_reward
from .files import (
    RESULTS_FILE,
    RUN_FILE,
    SAMPLES_FILE,
    hash_of_file,
    hash_of_value,
    only_writer,
    read_object,
    read_samples,
    write_whole,
)
from .metrics import Estimate, Solved, check_math_verify, metrics
from .models import (
    DTYPES,
    Chat,
    ModelFiles,
    Prompt,
    can_be_merged,
    find_model,
    fingerprint,
    load_adapted_model,
    load_chat,
    load_config,
    load_model,
    ordinary_checkpoint,
    resolve_dtype,
    trained_chat_template_kwargs,
)
from .problems import Message
from .samplers import Engine, Request, Sampling, seed_of, transformers_engine, vllm_engine
from .worked_examples import recorded


ROWS_AT_ONCE = 32


@dataclass
class EvaluateArguments:
    """Which model to evaluate, on which problems, and how to sample."""

    model_name_or_path: str = field(metadata={"help": "Directory or Hub name of a model, or of an adapter (PEFT)."})
    dataset_name: str = field(
        metadata={
            "help": "A .jsonl, .json or .parquet file, or a dataset on the Hub, with columns as in GSM8K, MATH, AIME, "
            "DAPO-Math-17k, verl or TRL."
        }
    )
    output_dir: str = field(metadata={"help": "Where `samples.jsonl` and `results.json` are written."})
    checkpoints: bool = field(
        default=False,
        metadata={
            "help": "Evaluate every checkpoint in the directory that `model_name_or_path` names, each in a directory "
            "of its own below `output_dir`, and show the curve."
        },
    )
    dataset_config: str | None = field(default=None, metadata={"help": "Configuration of a dataset on the Hub."})
    dataset_split: str = field(default="test", metadata={"help": "Split of a dataset on the Hub."})
    instruction: str | None = field(default=None, metadata={"help": "Text appended to each problem."})
    worked_examples: str | None = field(
        default=None,
        metadata={
            "help": "A .jsonl, .json or .parquet file of problems with solutions. All rows are put before each "
            "problem, as user and assistant turns. No row may be a problem to evaluate on."
        },
    )
    chat_template_kwargs: dict[str, Any] | str | None = field(
        default=None,
        metadata={
            "help": "Arguments of the chat template as JSON, such as '{\"enable_thinking\": false}'. By default the "
            "arguments of the training, if `training_args.bin` is beside the model, else none."
        },
    )
    reasoning_delimiters: list[str] | None = field(
        default=None,
        metadata={
            "help": "Texts that end the reasoning, such as '</think>'. Only what follows is scored, and a completion "
            "without one is wrong, as in `reasoning_accuracy_reward`. By default the whole completion is scored."
        },
    )
    max_problems: int | None = field(default=None, metadata={"help": "Evaluate only the first N problems."})
    num_samples: int = field(default=8, metadata={"help": "Completions sampled for each problem."})
    temperature: float = field(default=0.6, metadata={"help": "Sampling temperature; 0 takes the most likely token."})
    top_p: float = field(
        default=0.95,
        metadata={"help": "Sample only from the most likely tokens with this total probability; 1 disables it."},
    )
    top_k: int = field(default=0, metadata={"help": "Sample only from the N most likely tokens; 0 disables it."})
    max_completion_length: int = field(default=4096, metadata={"help": "Maximum tokens per completion."})
    seed: int = field(default=0, metadata={"help": "Seed of the sampling."})
    batch_size: int = field(
        default=ROWS_AT_ONCE,
        metadata={"help": "Problems sampled at once. Completions do not depend on it, except by rounding."},
    )
    use_vllm: bool = field(default=False, metadata={"help": "Sample with vLLM instead of transformers."})
    dtype: str = field(
        default="auto",
        metadata={"help": "Data type of the model: float32, bfloat16, float16, or auto for that of config.json."},
    )
    max_model_len: int | None = field(
        default=None,
        metadata={
            "help": "Maximum tokens of a prompt with its completion; by default the limit in the model's config.json. "
            "Problems that do not fit count as unsolved."
        },
    )
    gpu_memory_utilization: float | None = field(
        default=None, metadata={"help": "Share of the GPU's memory that vLLM uses; by default that of vLLM."}
    )
    trust_remote_code: bool = field(
        default=False, metadata={"help": "Run code that comes with the model's repository."}
    )

    def __post_init__(self):
        refuse_empty(self, "model_name_or_path", "dataset_name", "output_dir", "dataset_split", "worked_examples")
        for name in ("num_samples", "max_completion_length", "batch_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"`{name}` must be 1 or more, got {getattr(self, name)}.")
        if self.max_problems is not None and self.max_problems < 1:
            raise ValueError(f"`max_problems` must be 1 or more, got {self.max_problems}. Omit it for all problems.")
        if self.max_model_len is not None and self.max_model_len < 2:
            raise ValueError(f"`max_model_len` must be 2 or more, got {self.max_model_len}.")
        # vLLM raises a lower temperature to 0.01, and with transformers the logits may overflow.
        if self.temperature != 0 and not 0.01 <= self.temperature < float("inf"):
            raise ValueError(
                f"`temperature` must be 0.01 or more, or 0 for the most likely token, got {self.temperature}."
            )
        if self.temperature == 0 and self.num_samples > 1:
            raise ValueError("`temperature=0` gives the same completion every time. Set `num_samples=1`.")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"`top_p` must be above 0 and not above 1, got {self.top_p}.")
        if self.top_k < 0:
            raise ValueError(f"`top_k` must be 0 or more, got {self.top_k}.")
        if self.gpu_memory_utilization is not None and not 0 < self.gpu_memory_utilization <= 1:
            raise ValueError(
                f"`gpu_memory_utilization` must be above 0 and not above 1, got {self.gpu_memory_utilization}."
            )
        if self.dtype not in ("auto", *DTYPES):
            raise ValueError(f"`dtype` must be one of auto, {', '.join(DTYPES)}, got '{self.dtype}'.")
        _template_kwargs(self.chat_template_kwargs)
        if isinstance(self.reasoning_delimiters, str):  # of a file of YAML
            self.reasoning_delimiters = [self.reasoning_delimiters]
        texts = self.reasoning_delimiters
        if texts is not None and not (texts and all(text and isinstance(text, str) for text in texts)):
            raise ValueError(
                f"`reasoning_delimiters` must be texts that are not empty, got {self.reasoning_delimiters}. Omit it "
                "to score the whole completion."
            )


def refuse_empty(arguments: Any, *names: str) -> None:
    """
    Refuses empty texts, as of an unset variable in the shell. As a path, they would be the current directory.

    Raises:
        `ValueError`: an option is empty.
    """
    for name in names:
        if getattr(arguments, name) == "":
            raise ValueError(f"`{name}` is empty. Give it a value; a variable of the shell may not be set.")


def _template_kwargs(value: dict[str, Any] | str | None) -> dict[str, Any] | None:
    if value is None:
        return None
    try:
        kwargs = json.loads(value if isinstance(value, str) else json.dumps(value))
    except (TypeError, ValueError):
        kwargs = None
    if not isinstance(kwargs, dict):
        raise ValueError(
            f"`chat_template_kwargs` must be a JSON object such as '{{\"enable_thinking\": false}}', got '{value}'."
        )
    return kwargs


# Sampling one batch


@dataclass(frozen=True)
class Task:
    """
    A row of the dataset, ready to be sampled.

    Args:
        problem (`str`): Fingerprint of its prompt.
        occurrence (`int`): How many rows with this prompt come before it.
        prompt_ids (`list[int]`): Tokens of the prompt.
        max_tokens (`int`): Maximum tokens of a completion.
        not_sampled (`str`, *optional*): Why the row cannot be sampled.
    """

    problem: str
    occurrence: int
    prompt_ids: list[int]
    max_tokens: int
    not_sampled: str | None = None


@dataclass(frozen=True)
class Completion:
    """
    A sample.

    Args:
        text (`str`): The whole text, without special tokens.
        answer (`str`): The part of it that is scored, see [`Chat.answer`].
        tokens (`int`): Its number of tokens.
        ended (`bool`): Whether it reached an end token.
    """

    text: str
    answer: str
    tokens: int
    ended: bool


def problem_fingerprint(prompt: Prompt) -> str:
    """Identifies a problem by its prompt, including the instruction: two rows with equal prompts are one problem."""
    return hash_of_value(prompt)


def first_problems(problems: Dataset, count: int) -> Dataset:
    """The rows of the first `count` problems."""
    found = [problem_fingerprint(prompt) for prompt in problems["prompt"]]
    chosen = set(list(dict.fromkeys(found))[:count])
    return problems.select([row for row, problem in enumerate(found) if problem in chosen])


def rows_in_both(problems: Dataset, others: Dataset) -> list[int]:
    """The rows of `problems`, counted from 0, whose problem `others` has too."""
    known = {problem_fingerprint(prompt) for prompt in others["prompt"]}
    return [row for row, prompt in enumerate(problems["prompt"]) if problem_fingerprint(prompt) in known]


def tasks_of(prompts: Sequence[Prompt], chat: Chat, max_completion_length: int, context: int | None) -> list[Task]:
    """
    Tokenizes each prompt. Marks prompts that the tokenizer refuses or that leave no room for a token.

    Raises:
        `ValueError`: a prompt has a token that is not in the vocabulary of the model.
    """
    seen: dict[str, int] = {}
    tasks = []
    for prompt in prompts:
        problem = problem_fingerprint(prompt)
        occurrence = seen.get(problem, 0)
        seen[problem] = occurrence + 1
        ids, reason = [], None
        try:
            ids = chat.encode(prompt)
        except Exception as error:  # any error of a template or tokenizer; the other problems are still evaluated
            reason = f"it cannot be tokenized: {type(error).__name__}: {error}"
        if ids and chat.vocabulary is not None and max(ids) >= chat.vocabulary:
            raise ValueError(
                f"The tokenizer is not that of the model: a prompt has token {max(ids)}, but the vocabulary of the "
                f"model has {chat.vocabulary} tokens. Put the tokenizer of its training beside the model."
            )
        limit = max_completion_length if context is None else min(max_completion_length, context - len(ids))
        if reason is None and not ids:
            reason = "it has no tokens"
        elif reason is None and limit < 1:
            reason = f"it has {len(ids)} tokens, but the context has {context}"
        tasks.append(Task(problem, occurrence, ids, limit, reason))
    return tasks


def sample(engine: Engine, chat: Chat, tasks: Sequence[Task], num_samples: int, seed: int) -> list[list[Completion]]:
    """Samples completions of each task. A task that cannot be sampled gets empty completions."""
    requests = [
        Request(task.prompt_ids, task.max_tokens, seed_of(seed, task.problem, task.occurrence, index))
        for task in tasks
        if task.not_sampled is None
        for index in range(num_samples)
    ]
    sampled = iter(engine(requests)) if requests else iter(())
    completions = []
    for task in tasks:
        if task.not_sampled is not None:
            completions.append([Completion("", "", 0, False)] * num_samples)
            continue
        completions.append([_completion(chat, task.prompt_ids, next(sampled)) for _ in range(num_samples)])
    return completions


def _completion(chat: Chat, prompt_ids: list[int], ids: list[int]) -> Completion:
    return Completion(chat.decode(ids), chat.answer(prompt_ids, ids), len(ids), ids[-1] in chat.end_ids)


def score(texts: Sequence[str], solution: Any) -> list[float | None]:
    """1 for each correct text, 0 for each other; None for all if the solution cannot be parsed."""
    return [_score(text, solution) for text in texts]


def _score(text: str, solution: Any) -> float | None:
    try:
        (correct,) = accuracy_reward([[{"role": "assistant", "content": text}]], [solution])
    except Exception:  # a model may write any text; a text that cannot be compared is not correct
        return 0.0
    return correct


# A whole evaluation


@dataclass(frozen=True)
class Subject:
    """The model to evaluate, and everything that affects its completions."""

    files: ModelFiles
    chat: Chat
    sampling: Sampling
    dtype: str
    context: int | None
    template_kwargs_from: str


def subject_of(arguments: EvaluateArguments) -> Subject:
    """
    Finds the model, and fills in the settings that the arguments leave open.

    Raises:
        `ValueError`: the model does not exist, has no chat template, or has an adapter that vLLM cannot use.
    """
    files = find_model(arguments.model_name_or_path)
    kwargs, source = _template_kwargs(arguments.chat_template_kwargs), "option"
    if kwargs is None:
        kwargs, source = trained_chat_template_kwargs(files), "training_args.bin"
    if kwargs is None:
        kwargs, source = {}, "unknown: no training_args.bin of GRPO beside the model"
    of_training = source == "training_args.bin"
    chat = load_chat(files, kwargs, arguments.trust_remote_code, of_training)
    chat = replace(chat, reasoning_delimiters=tuple(arguments.reasoning_delimiters or ()))
    context = chat.context if arguments.max_model_len is None else arguments.max_model_len
    if context is not None and chat.context is not None and context > chat.context:
        raise ValueError(f"`max_model_len` is {context}, but the context of '{files.name}' is only {chat.context}.")
    if arguments.use_vllm and files.is_adapter and not can_be_merged(files):
        raise ValueError(
            f"The adapter '{files.name}' cannot be merged into its base model, and vLLM needs a merged model. "
            "Evaluate it without `use_vllm`."
        )
    return Subject(
        files=files,
        chat=chat,
        sampling=Sampling(
            temperature=arguments.temperature,
            top_p=arguments.top_p,
            top_k=arguments.top_k,
            end_ids=chat.end_ids,
            suppressed_ids=chat.suppressed_ids,
        ),
        dtype=resolve_dtype(arguments.dtype, load_config(files, arguments.trust_remote_code)),
        context=context,
        template_kwargs_from=source,
    )


@contextmanager
def open_engine(arguments: EvaluateArguments, subject: Subject, longest: int | None) -> Iterator[Engine]:
    """Opens the engine that the arguments name. `longest` is the maximum tokens of a prompt with its completion."""
    files, dtype, trust = subject.files, subject.dtype, arguments.trust_remote_code
    if files.is_adapter and not can_be_merged(files):
        yield transformers_engine(load_adapted_model(files, dtype, trust), subject.sampling)
        return
    with ordinary_checkpoint(files, dtype, Path(arguments.output_dir), trust) as directory:
        if not arguments.use_vllm:
            yield transformers_engine(load_model(directory, dtype, trust), subject.sampling)
            return
        with vllm_engine(
            directory,
            subject.sampling,
            dtype=dtype,
            max_model_len=longest,
            gpu_memory_utilization=arguments.gpu_memory_utilization,
            trust_remote_code=trust,
            is_multimodal=subject.chat.is_multimodal,
        ) as engine:
            yield engine


OpenEngine = Callable[[EvaluateArguments, Subject, int | None], AbstractContextManager[Engine]]


def evaluate(
    arguments: EvaluateArguments,
    problems: Dataset,
    open_engine: OpenEngine = open_engine,
    worked_examples: Sequence[Message] = (),
) -> dict[str, Any]:
    """
    Samples and scores the problems that are not in `samples.jsonl` yet, and writes `results.json`.

    Args:
        arguments ([`EvaluateArguments`]): The model, the settings and the directory.
        problems (`datasets.Dataset`): With the worked examples in their prompts.
        open_engine (`callable`, *optional*): Makes the engine that samples.
        worked_examples (`list[dict]`, *optional*): The worked examples in the prompts, for the record.

    Raises:
        `ValueError`: `output_dir` contains samples of another model, of other problems or of other settings, a damaged
        file, or an evaluation that still runs; or no problem can be sampled, or none has a solution that math-verify
        can parse.
    """
    check_math_verify()
    subject = subject_of(arguments)
    directory = Path(arguments.output_dir)
    directory.mkdir(parents=True, exist_ok=True)
    with only_writer(directory):
        return _evaluate(arguments, subject, directory, list(problems), open_engine, worked_examples)


def _evaluate(
    arguments: EvaluateArguments,
    subject: Subject,
    directory: Path,
    rows: list[dict[str, Any]],
    open_engine: OpenEngine,
    worked_examples: Sequence[Message],
) -> dict[str, Any]:
    run, done = _what_is_there(directory)
    began = None if run is None else run["settings"].get("date")
    shown_date = fixed_date(subject.chat, began or today())
    tasks = tasks_of([row["prompt"] for row in rows], subject.chat, arguments.max_completion_length, subject.context)
    sampled = [task for task in tasks if task.not_sampled is None]
    if not sampled:
        raise ValueError(
            f"No problem can be sampled. The first: {tasks[0].not_sampled if tasks else 'there is none'}."
        )
    identity = {
        "model": {
            **fingerprint(subject.files),
            "tokens of the problems": hash_of_value([each.prompt_ids for each in tasks]),
        },
        "dataset": hash_of_value([[row["prompt"], row["solution"]] for row in rows]),
        "settings": {
            **_settings(arguments, subject),
            "worked_examples": recorded(worked_examples),
            "date": shown_date,
        },
    }
    if run is not None:
        _check_identity(directory, identity, run, done, tasks)
    if len(done) < len(rows):
        longest = max(len(task.prompt_ids) + task.max_tokens for task in sampled) if subject.context else None
        with open_engine(arguments, subject, longest) as engine:
            # Old results must not stand beside an evaluation that is not complete.
            (directory / RESULTS_FILE).unlink(missing_ok=True)
            if not done:
                run = {**identity, "versions": versions(arguments.use_vllm)}
                write_whole(directory / RUN_FILE, run)
            with (directory / SAMPLES_FILE).open("a" if done else "w", encoding="utf-8") as file:
                for new in _batches(arguments, subject.chat, engine, rows, tasks, len(done)):
                    file.writelines(json.dumps(each) + "\n" for each in new)
                    file.flush()
                    done += new
                    print(f"{len(done)}/{len(rows)} rows", flush=True)
    results = {
        **summary(done),
        **identity,
        "chat_template_kwargs_from": subject.template_kwargs_from,
        "base_revision": subject.files.base_revision,
        "arguments": asdict(arguments),
        "versions": cast(dict[str, Any], run)["versions"],
        "samples_sha256": hash_of_file(directory / SAMPLES_FILE),
    }
    write_whole(directory / RESULTS_FILE, results)
    return results


def _what_is_there(directory: Path) -> tuple[dict[str, Any] | None, list[dict[str, Any]]]:
    """
    The `run.json` of an evaluation that began in this directory, and its samples. None, if nothing was sampled: the
    settings are then still free.

    Raises:
        `ValueError`: there are files of something else, or a damaged one.
    """
    samples, results_file = directory / SAMPLES_FILE, directory / RESULTS_FILE
    # First, because what stands here may be files of something else.
    found = [each for each in (samples, results_file, directory / RUN_FILE) if each.exists()]
    run = _read_run(directory, found) if found else None
    if samples.exists() and results_file.exists():
        expected = read_object(results_file, fix="Delete it to resume the evaluation.").get("samples_sha256")
        if expected not in (None, hash_of_file(samples)):
            raise ValueError(
                f"'{samples}' is not the file that '{results_file}' was computed from. Delete both, or choose "
                "another `output_dir`."
            )
    done = read_samples(samples)
    return run if done or results_file.exists() else None, done


def _batches(
    arguments: EvaluateArguments,
    chat: Chat,
    engine: Engine,
    rows: Sequence[dict[str, Any]],
    tasks: Sequence[Task],
    start: int,
) -> Iterator[list[dict[str, Any]]]:
    """Samples and scores the rows from `start` on, in batches."""
    for first in range(start, len(rows), arguments.batch_size):
        batch = tasks[first : first + arguments.batch_size]
        drawn = sample(engine, chat, batch, arguments.num_samples, arguments.seed)
        yield [_record(*each) for each in zip(rows[first : first + len(batch)], drawn, batch, strict=True)]


_STRFTIME_NOW = re.compile(r"""\bstrftime_now\(\s*(["'])(.*?)\1\s*\)""")


def fixed_date(chat: Chat, day: str) -> str | None:
    """
    Replaces today's date in the chat template by a fixed one, so that an evaluation that is resumed on another day has
    the same prompts. The time of day is 00:00.

    Returns:
        `str`, *optional*: the date; None if the template does not show the date.
    """

    def fixed(template: str) -> str:
        # In the text, because newer releases of transformers pass no function to a template.
        return _STRFTIME_NOW.sub(lambda call: json.dumps(date.fromisoformat(day).strftime(call[2])), template)

    before: Any = chat.processor.chat_template
    after = {name: fixed(each) for name, each in before.items()} if isinstance(before, dict) else fixed(before)
    chat.processor.chat_template = after
    return None if after == before else day


def today() -> str:
    return date.today().isoformat()


def _settings(arguments: EvaluateArguments, subject: Subject) -> dict[str, Any]:
    """All settings that affect a completion, except the model and the problems."""
    return {
        "engine": "vllm" if arguments.use_vllm else "transformers",
        "num_samples": arguments.num_samples,
        "temperature": arguments.temperature,
        "top_p": arguments.top_p,
        "top_k": arguments.top_k,
        "max_completion_length": arguments.max_completion_length,
        "max_model_len": subject.context,
        "seed": arguments.seed,
        "dtype": subject.dtype,
        "chat_template_kwargs": dict(subject.chat.template_kwargs),
        **({"reasoning_delimiters": each} if (each := list(subject.chat.reasoning_delimiters)) else {}),
        "end_token_ids": list(subject.sampling.end_ids),
        "suppressed_token_ids": list(subject.sampling.suppressed_ids),
        "trust_remote_code": arguments.trust_remote_code,
    }


def versions(use_vllm: bool) -> dict[str, str]:
    found = {"trl_a3po": __version__, "device": _device()}
    for package in ("trl", "transformers", "torch", "peft", "math-verify", *(["vllm"] if use_vllm else [])):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "not installed, or under another name"
    return found


def _device() -> str:
    return torch.cuda.get_device_name() if torch.cuda.is_available() else f"CPU, {platform.machine()}"


def _record(row: dict[str, Any], completions: list[Completion], task: Task) -> dict[str, Any]:
    """A line of `samples.jsonl`."""
    texts, answers = [each.text for each in completions], [each.answer for each in completions]
    record = {
        **({"row": row["row"]} if "row" in row else {}),
        "problem": task.problem,
        "prompt": row["prompt"],
        "solution": row["solution"],
        "completions": texts,
        **({"answers": answers} if answers != texts else {}),
        "tokens": [completion.tokens for completion in completions],
        "ended": [completion.ended for completion in completions],
        "correct": score(answers, row["solution"]),
    }
    return record if task.not_sampled is None else {**record, "not_sampled": task.not_sampled}


def _read_run(directory: Path, found: Sequence[Path]) -> dict[str, Any]:
    """Reads what the files that were found in the directory are of."""
    path = directory / RUN_FILE
    if not path.exists():
        raise ValueError(
            f"'{directory}' contains {' and '.join(f'`{each.name}`' for each in found)} but no `{RUN_FILE}`, so its "
            "model and problems are unknown. Choose another `output_dir`."
        )
    fix = "Delete it and `samples.jsonl` if an evaluation wrote them; else choose another `output_dir`."
    return read_object(path, "model", "settings", "versions", fix=fix)


def _check_identity(
    directory: Path,
    identity: dict[str, Any],
    before: dict[str, Any],
    done: list[dict[str, Any]],
    tasks: Sequence[Task],
) -> None:
    changed = [f"different {part} of the model" for part in differing(before["model"], identity["model"])]
    if before.get("dataset") != identity["dataset"]:
        changed.append("different problems")
    changed += [
        f"{name}={before['settings'].get(name)!r}" for name in differing(before["settings"], identity["settings"])
    ]
    now = versions(identity["settings"]["engine"] == "vllm")
    if len(done) < len(tasks) and not changed:
        changed += [f"{name} {before['versions'].get(name)}" for name in differing(before["versions"], now)]
    if changed:
        raise ValueError(
            f"'{directory}' contains another evaluation. It was started with {', '.join(changed)}. Pass the same to "
            "resume it. To start a new evaluation, choose another `output_dir`, or delete this one."
        )
    if [each["problem"] for each in done] != [task.problem for task in tasks[: len(done)]]:
        raise ValueError(
            f"'{directory / 'samples.jsonl'}' does not contain these problems in this order. Delete it, or choose "
            "another `output_dir`."
        )


def differing(before: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """The names whose values differ."""
    return [name for name in {**before, **now} if before.get(name) != now.get(name)]


def sample_model(
    model: PreTrainedModel,
    processor: PreTrainedTokenizerBase | ProcessorMixin,
    prompts: Sequence[Prompt],
    *,
    num_samples: int,
    max_completion_length: int,
    batch_size: int = ROWS_AT_ONCE,
    seed: int = 0,
) -> tuple[list[Task], list[list[Completion]]]:
    """
    Samples completions of each prompt with transformers from a model in memory, such as that of a trainer, at
    temperature 1.

    The model and the global random state do not change. The same seed draws the same random numbers for every model.
    Prompts that do not fit into the model's context get empty completions.

    Returns:
        The prompts as tasks, and the completions of each.
    """
    chat = Chat.of(processor, model.config, model.generation_config)
    tasks = tasks_of(prompts, chat, max_completion_length, chat.context)
    sampling = Sampling(1.0, top_p=1.0, top_k=0, end_ids=chat.end_ids, suppressed_ids=chat.suppressed_ids)
    engine = transformers_engine(model, sampling)
    batches = (tasks[start : start + batch_size] for start in range(0, len(tasks), batch_size))
    return tasks, [each for batch in batches for each in sample(engine, chat, batch, num_samples, seed)]


def evaluate_model(
    model: PreTrainedModel,
    processor: PreTrainedTokenizerBase | ProcessorMixin,
    problems: Dataset,
    *,
    num_samples: int,
    max_completion_length: int,
    seed: int = 0,
) -> dict[str, Any]:
    """
    Samples from a model in memory, see [`sample_model`], and returns the [`summary`].

    Raises:
        `ValueError`: math-verify can parse none of the solutions, or is not installed.
    """
    check_math_verify()
    tasks, drawn = sample_model(
        model,
        processor,
        list(problems["prompt"]),
        num_samples=num_samples,
        max_completion_length=max_completion_length,
        seed=seed,
    )
    return summary([_record(*each) for each in zip(problems, drawn, tasks, strict=True)])


# Results


def summary(records: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """
    Computes the metrics of the records in `samples.jsonl`, and facts that help to read them.

    Raises:
        `ValueError`: math-verify can parse none of the solutions.
    """
    problems = distinct_problems(records)
    if not problems:
        raise ValueError("math-verify could not parse any of the solutions.")
    rows = [(record.get("row", index), record) for index, record in enumerate(records)]
    scored = [record for record in records if None not in record["correct"]]
    sampled = [record for record in scored if "not_sampled" not in record]
    tokens = [number for record in sampled for number in record["tokens"]]
    ended = [each for record in sampled for each in record["ended"]]
    return {
        "metrics": {name: asdict(value) for name, value in metrics(list(problems.values())).items()},
        "problems": len(problems),
        "rows": len(scored),
        "samples_per_problem": min(len(problem.correct) for problem in problems.values()),
        "mean_tokens": sum(tokens) / max(1, len(tokens)),
        "reached_the_end": sum(ended) / max(1, len(ended)),
        "rows_without_a_parseable_solution": [row for row, record in rows if None in record["correct"]],
        "rows_not_sampled": {str(row): record["not_sampled"] for row, record in rows if "not_sampled" in record},
        "problems_with_several_solutions": _with_several_solutions(scored),
    }


def distinct_problems(records: Sequence[dict[str, Any]]) -> dict[str, Solved]:
    """The samples of each distinct problem with a parseable solution, by its fingerprint."""
    problems: dict[str, Solved] = {}
    for record in records:
        if None not in record["correct"]:
            before = problems.get(record["problem"], Solved((), (), ()))
            problems[record["problem"]] = Solved(
                (*before.completions, *record["completions"]),
                (*before.correct, *record["correct"]),
                (*before.answers, *record.get("answers", record["completions"])),
            )
    return problems


def _with_several_solutions(records: Sequence[dict[str, Any]]) -> int:
    """Number of problems whose rows have different solutions. At most one of the solutions can be right."""
    solutions: dict[str, set[str]] = {}
    for record in records:
        solutions.setdefault(record["problem"], set()).add(json.dumps(record["solution"]))
    return sum(len(each) > 1 for each in solutions.values())


def estimates(results: dict[str, Any]) -> dict[str, Estimate]:
    """Reads the metrics of `results.json`."""
    return {name: Estimate(**value) for name, value in results["metrics"].items()}
