"""
Two engines that sample completions, transformers and vLLM, behind one interface: token ids in, token ids out.

Each request has its own random numbers. Therefore a sample does not depend on its batch, nor on the order of the
problems. Only the end tokens are read from the checkpoint's `generation_config.json`.
"""

import hashlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import (
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    PreTrainedModel,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from ..update.model_traits import as_is, padding_traits
from .models import check_weights, loading


@dataclass(frozen=True)
class Sampling:
    """
    How to sample. Only these settings change the model's probabilities.

    Args:
        temperature (`float`): 0 takes the most likely token.
        top_p (`float`): 1 keeps all tokens.
        top_k (`int`): 0 keeps all tokens.
        end_ids (`tuple[int, ...]`): Tokens that end a completion.
        suppressed_ids (`tuple[int, ...]`): Tokens that are never sampled: the placeholders of images.
    """

    temperature: float
    top_p: float
    top_k: int
    end_ids: tuple[int, ...]
    suppressed_ids: tuple[int, ...] = ()


@dataclass(frozen=True)
class Request:
    """One sample to draw: the tokens of its prompt, its maximum number of tokens, and its seed."""

    prompt_ids: list[int]
    max_tokens: int
    seed: int


# Takes requests; returns the tokens of each completion, including the end token if one was sampled.
Engine = Callable[[Sequence[Request]], list[list[int]]]


def seed_of(seed: int, problem: str, occurrence: int, index: int) -> int:
    """
    The seed of one sample, 128 bits.

    Args:
        seed (`int`): Seed of the evaluation.
        problem (`str`): Fingerprint of the problem.
        occurrence (`int`): How many rows with this problem come before this one.
        index (`int`): Index of the sample within its row.
    """
    digest = hashlib.sha256(f"{seed} {problem} {occurrence} {index}".encode()).digest()
    return int.from_bytes(digest[:16], "big")


# transformers


def transformers_engine(model: PreTrainedModel, sampling: Sampling) -> Engine:
    """Samples with `generate`, and restores the mode and the generation config of the model afterwards."""
    traits = padding_traits(model)
    apart = traits.left_padding or traits.company

    def complete(requests: Sequence[Request]) -> list[list[int]]:
        completions: list[list[int]] = [[]] * len(requests)
        generation_config = model.generation_config
        try:
            with as_is(model, training=False):
                for indices in _groups(requests, apart):
                    group = [requests[index] for index in indices]
                    for index, ids in zip(indices, _generate(model, group, sampling), strict=True):
                        completions[index] = ids
        finally:
            model.generation_config = generation_config
        return completions

    return complete


def _groups(requests: Sequence[Request], apart: bool) -> list[list[int]]:
    """
    Indices of the requests that are sampled together. All requests of a group have the same maximum length, so that no
    prompt with its completion exceeds the model's context. With `apart`, their prompts also have the same length, so
    that there is no padding.
    """
    groups: dict[tuple[int, int], list[int]] = {}
    for index, request in enumerate(requests):
        groups.setdefault((request.max_tokens, len(request.prompt_ids) if apart else 0), []).append(index)
    return list(groups.values())


def _generate(model: PreTrainedModel, requests: Sequence[Request], sampling: Sampling) -> list[list[int]]:
    width, limit = max(len(request.prompt_ids) for request in requests), requests[0].max_tokens
    padding = 0  # masked, so any token of the vocabulary will do
    input_ids = torch.full((len(requests), width), padding)
    attention_mask = torch.zeros_like(input_ids)
    for row, request in enumerate(requests):
        start = width - len(request.prompt_ids)
        input_ids[row, start:] = torch.tensor(request.prompt_ids)
        attention_mask[row, start:] = 1
    # generate() takes unset fields from the model's own generation config, so both get these settings and no others.
    # It takes the token with the highest score after the processors, which is the sampled token.
    config = GenerationConfig(
        max_new_tokens=limit,
        do_sample=False,
        num_beams=1,
        eos_token_id=list(sampling.end_ids) or None,
        pad_token_id=padding,
        suppress_tokens=list(sampling.suppressed_ids) or None,
    )
    model.generation_config = config
    with torch.inference_mode():
        output = model.generate(  # type: ignore[operator]  # declared by GenerationMixin only
            input_ids=input_ids.to(model.device),
            attention_mask=attention_mask.to(model.device),
            generation_config=config,
            logits_processor=LogitsProcessorList(_processors(sampling, requests, width)),
        )
    return [_through_end(ids, sampling.end_ids) for ids in output[:, width:].tolist()]


def _processors(sampling: Sampling, requests: Sequence[Request], width: int) -> list[LogitsProcessor]:
    if sampling.temperature == 0:
        return [RefuseNonFinite()]
    processors: list[LogitsProcessor] = [TemperatureLogitsWarper(float(sampling.temperature)), RefuseNonFinite()]
    if sampling.top_k:
        processors.append(TopKLogitsWarper(sampling.top_k))
    if sampling.top_p < 1:
        processors.append(TopPLogitsWarper(sampling.top_p))
    draws = [np.random.default_rng(request.seed).random(request.max_tokens) for request in requests]
    return [*processors, DrawOneToken(torch.tensor(np.stack(draws)), width)]


class RefuseNonFinite(LogitsProcessor):
    """Ends the evaluation if the model computes NaN or infinity, because its tokens would have no meaning."""

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        # -inf for some tokens is right: they are suppressed. The maximum of a row with NaN is NaN.
        if not scores.amax(-1).isfinite().all():
            raise ValueError(
                "The model's logits are NaN or infinite. Check its weights, or use another data type (`dtype`)."
            )
        return scores


class DrawOneToken(LogitsProcessor):
    """
    Leaves one token in each row: the first at which the cumulative probability exceeds the row's random number.

    Args:
        draws (`torch.Tensor` of shape `(rows, tokens)`): Uniform random numbers from 0 to 1, one per token.
        prompt_width (`int`): Number of columns before the first token that is sampled.
    """

    def __init__(self, draws: torch.Tensor, prompt_width: int):
        self._draws = draws
        self._prompt_width = prompt_width

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        column = input_ids.shape[1] - self._prompt_width
        self._draws = self._draws.to(scores.device)
        # In double precision, because single precision rounds away the tail of a large vocabulary.
        cumulated = scores.softmax(-1, dtype=torch.float64).cumsum(-1)
        threshold = self._draws[:, column : column + 1] * cumulated[:, -1:]
        token = torch.searchsorted(cumulated, threshold, right=True).clamp(max=scores.shape[1] - 1)
        return torch.full_like(scores, -torch.inf).scatter(1, token, 0.0)


def _through_end(ids: list[int], end_ids: Sequence[int]) -> list[int]:
    ends = [position for position, token in enumerate(ids) if token in end_ids]
    return ids[: ends[0] + 1] if ends else ids


# vLLM


@contextmanager
def vllm_engine(
    directory: str | Path,
    sampling: Sampling,
    *,
    dtype: str,
    max_model_len: int | None,
    gpu_memory_utilization: float | None = None,
    trust_remote_code: bool = False,
    is_multimodal: bool = False,
) -> Iterator[Engine]:
    """
    Samples with vLLM, which is shut down at the end of the block.

    Args:
        directory (`str` or `Path`): An ordinary checkpoint, not an adapter.
        sampling (`Sampling`): How to sample.
        dtype (`str`): Data type of the model.
        max_model_len (`int`, *optional*): Maximum tokens of a prompt with its completion; by default the context.
        gpu_memory_utilization (`float`, *optional*): Share of the GPU's memory to use; by default that of vLLM.
        trust_remote_code (`bool`): Whether to run code from the checkpoint.
        is_multimodal (`bool`): Whether the model also takes images. None are passed.
    """
    try:
        from vllm import LLM, SamplingParams  # type: ignore[import-not-found]  # an extra
    except ImportError as error:
        raise ValueError("`use_vllm` needs vLLM. Install it: pip install 'trl[vllm]'") from error

    options: dict[str, Any] = {"trust_remote_code": trust_remote_code, "generation_config": "vllm"}
    if gpu_memory_utilization is not None:
        options["gpu_memory_utilization"] = gpu_memory_utilization
    if not torch.cuda.is_available():
        # If vLLM splits a prompt over two passes, it resets the request's generator, which fails on a CPU.
        options["enable_chunked_prefill"] = False
        # Samples share the whole blocks of their prompt. By default a block has 128 tokens there, more than many
        # prompts; 32 is the least that its kernels are made for.
        options["block_size"] = 32
    if is_multimodal:
        options["limit_mm_per_prompt"] = {"image": 0, "video": 0}
    else:
        options["skip_tokenizer_init"] = True
    check_weights(Path(directory), trust_remote_code)
    with loading(f"the model '{directory}' with vLLM"):
        llm = LLM(model=str(directory), dtype=dtype, max_model_len=max_model_len, **options)

    def complete(requests: Sequence[Request]) -> list[list[int]]:
        parameters = [
            SamplingParams(
                n=1,
                temperature=sampling.temperature,
                top_p=sampling.top_p,
                top_k=sampling.top_k,
                max_tokens=request.max_tokens,
                seed=request.seed % 2**63,
                stop_token_ids=list(sampling.end_ids),
                logit_bias=dict.fromkeys(sampling.suppressed_ids, -100.0) or None,
                detokenize=False,
            )
            for request in requests
        ]
        prompts = [{"prompt_token_ids": request.prompt_ids} for request in requests]
        outputs = llm.generate(prompts, parameters, use_tqdm=False)
        return [_through_end(list(output.outputs[0].token_ids), sampling.end_ids) for output in outputs]

    try:
        yield complete
    finally:
        llm.llm_engine.engine_core.shutdown()
