"""
Which savings of the update are exact for a model: how its output depends on padding and on other rows of a batch.

TRL passes `input_ids` and `attention_mask` to the model, with prompts padded on the left. The output of a row should
depend only on its own tokens. Some models break this rule: they look positions up by column (GPT-2), treat padding as
tokens (RecurrentGemma), cut the columns into chunks (Zamba2), or ignore the mask in a batch of one row (LFM2, Mamba2,
Falcon-H1 and Qwen3-Next before transformers 5.13). This depends on the release of transformers, on the installed
kernels and on the mode. So [`padding_traits`] runs the model. Where a short run cannot show a dependence,
the configuration decides.
"""

import contextlib
import logging
import operator
import textwrap
import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import astuple, dataclass
from typing import Any, cast

import torch
from torch import Tensor
from transformers import PretrainedConfig

from .micro_batches import Forward


logger = logging.getLogger(__name__)

# Columns of padding in the check. An odd number changes every alignment.
_PADDING = 5
# Linear attention is computed in chunks, of 64 tokens if the configuration gives no size. The check does not run
# chunks longer than the second number.
_CHUNK, _LONGEST_CHUNK = 64, 1024
# Kinds of layers that a run of this length shows as they are, and the chunks of Llama 4. Others may look at blocks of
# columns of long rows, as those of MiniMax-M3 and DeepSeek-V4 do.
_CHUNKED = "chunked_attention"
_KNOWN_LAYERS = {
    *("full_attention", "sliding_attention", "indexed_attention", "linear_attention", "attention", _CHUNKED),
    *("hybrid", "hybrid_sliding", "conv", "mamba", "moe"),
}
# HunYuan normalizes queries and keys after their rotation, so the gradient of these norms depends on the position even
# where the output does not. So do the scales of Dory's queries while they are equal. Beam scales queries by a position
# that its configuration does not name.
_BY_POSITION = ("hunyuan", "dory", "beam")


@dataclass(frozen=True)
class PaddingTraits:
    """
    What the output of a row depends on, in addition to its own tokens.

    | Trait | What the update does then |
    | --- | --- |
    | `left_padding` | prompts keep their padding |
    | `right_padding` | completions keep their padding too |
    | `alone` | a row that shared a batch in GRPOTrainer does not run alone, see [`never_alone`] |
    | `company` | no row is skipped, and rows stay in their batch |

    Attributes:
        left_padding (`bool`): Whether it depends on the padding to its left, in a batch of any size.
        right_padding (`bool`): Whether it depends on the padding to its right.
        alone (`bool`): Whether it depends on being the only row of its batch.
        company (`bool`): Whether it depends on the other rows of its batch.
    """

    left_padding: bool = False
    right_padding: bool = False
    alone: bool = False
    company: bool = False

    def __or__(self, other: "PaddingTraits") -> "PaddingTraits":
        return PaddingTraits(*map(operator.or_, astuple(self), astuple(other)))


def padding_traits(
    model: torch.nn.Module, autocast: Callable[[], AbstractContextManager[Any]] = contextlib.nullcontext
) -> PaddingTraits:
    """
    Finds out what the output of a row depends on. A trait is present if the model's configuration says so, or if the
    model's outputs differ on made-up rows.

    The check runs about a dozen short passes without gradients, over at most three rows, in training mode without
    dropout and in evaluation mode: the code of the two can differ. Modes and random numbers are restored.
    Processes that share a model (FSDP, ZeRO-3) must all call this at the same time, once the model is prepared for
    training.

    The check does not detect effects below rounding: 3e-5 of the logits in float32, a tenth in half precision or TF32.
    Such an effect can grow if a model is trained from scratch.

    Args:
        model (`torch.nn.Module`): A causal language model of transformers or PEFT that can be called.
        autocast (callable, *optional*):
            Makes the context in which the model is trained. It is used only if the model cannot run outside it, as
            with a flash kernel that does not take float32: in half precision, the check detects less.

    Returns:
        [`PaddingTraits`]: If the model cannot run on the made-up rows, all traits but `right_padding` are assumed, and
        a warning is logged.
    """
    traits = configured_traits(model)
    failure: Exception | None = None
    for context in (contextlib.nullcontext, autocast):
        try:
            with context():
                return traits | observed_traits(model)
        except Exception as error:
            failure = error
    logger.warning(
        "Could not check whether the output of %s depends on padding, because it failed on rows of plain tokens "
        "(%s: %s). Prompts keep their padding and no rows are skipped: the update is exact but costs more.",
        type(model).__name__,
        type(failure).__name__,
        textwrap.shorten(str(failure), 300, placeholder=" ..."),
    )
    return traits | PaddingTraits(left_padding=True, alone=True, company=True)


def configured_traits(model: torch.nn.Module) -> PaddingTraits:
    """
    The traits that a short run may not show: rotations that change with the length of the batch beyond a threshold,
    attention that is scaled or cut into chunks by column (Llama 4, Ministral 3), virtual tokens before the padding,
    kinds of layers that are not known, and what a configuration does not say.
    """
    adapters = getattr(model, "peft_config", {}).values()
    config = text_config(model)
    rotates_by_length = rotation_limit(config) is not None
    looks_at_blocks = not _KNOWN_LAYERS.issuperset(_layer_types(config))
    return PaddingTraits(
        left_padding=(
            rotates_by_length
            or any(adapter.is_prompt_learning for adapter in adapters)
            or any(each.get("llama_4_scaling_beta") for each in _rotations(config))
            or bool(getattr(config, "attn_temperature_tuning", None) or getattr(config, "log_scaling_n_floor", None))
            or looks_at_blocks
            or _CHUNKED in _layer_types(config)
            or max(_chunks(config)) > _LONGEST_CHUNK
            or config.model_type.startswith(_BY_POSITION)
        ),
        right_padding=rotates_by_length or looks_at_blocks,
    )


def observed_traits(model: torch.nn.Module) -> PaddingTraits:
    """The traits that short runs of a model show. Raises the errors of the model."""
    rows = _made_up_rows(cast(PretrainedConfig, model.config))
    traits = PaddingTraits()
    for training in (True, False):
        with as_is(model, training):
            observed = _compare_runs(model, rows)
        if observed is not None:
            traits |= observed
    return traits


def never_alone(forward: Forward) -> Forward:
    """
    Makes a single row run beside a copy of itself.

    Args:
        forward (`Forward`): Computes a batch.

    Returns:
        `Forward`: The same function, with the same results. It computes a batch of one row as a batch of two.
    """

    def in_company(input_ids: Tensor, attention_mask: Tensor, logits_to_keep: int) -> tuple[Any, ...]:
        if len(input_ids) > 1:
            return forward(input_ids, attention_mask, logits_to_keep)
        outputs = forward(input_ids.repeat(2, 1), attention_mask.repeat(2, 1), logits_to_keep)
        return tuple(each[:1] if isinstance(each, Tensor) and each.dim() else each for each in outputs)

    return in_company


def config_of(model: torch.nn.Module) -> PretrainedConfig | None:
    """The configuration of a model in any wrapper; `None` if it is no model of transformers."""
    configs = (getattr(module, "config", None) for module in model.modules())
    return next((each for each in configs if isinstance(each, PretrainedConfig)), None)


def text_config(model: torch.nn.Module) -> PretrainedConfig:
    """The configuration of the language model in any wrapper."""
    return cast(PretrainedConfig, config_of(model)).get_text_config()


def has_experts_as_modules(model: torch.nn.Module) -> bool:
    """Whether each expert is a module, as before transformers 5. An expert without a token then has no gradient."""
    return any(
        name.endswith("experts") and isinstance(module, torch.nn.ModuleList) for name, module in model.named_modules()
    )


def position_limit(model: torch.nn.Module) -> int | None:
    """Number of positions in the table in which a model looks them up; `None` if it has no such table."""
    config = text_config(model)
    positions = getattr(config, "max_position_embeddings", None)
    if not positions or has_rotary_positions(config):
        return None
    # The table of OPT and of models like it has two more rows. That of GPT-J and CodeGen is computed, not learned.
    sizes = {module.num_embeddings for module in model.modules() if isinstance(module, torch.nn.Embedding)}
    tables = (getattr(module, "embed_positions", None) for module in model.modules())
    sizes |= {len(table) for table in tables if isinstance(table, Tensor)}
    return positions if sizes & {positions, positions + 2} else None


def has_rotary_positions(config: PretrainedConfig) -> bool:
    """Whether a model rotates its positions instead of looking them up in a table of limited length."""
    return any(_rotations(config)) or hasattr(config.get_text_config(), "rope_theta")


def rotation_limit(config: PretrainedConfig) -> int | None:
    """
    Number of columns above which the rotation of all positions depends on the longest row of a pass; `None` if it
    never does.
    """
    config = config.get_text_config()
    if _rotation_types(config).isdisjoint({"dynamic", "longrope"}):
        return None
    named = [holder.get("original_max_position_embeddings") for holder in (*_rotations(config), vars(config))]
    limits = [limit for limit in named if limit]
    return min(limits) if limits else config.max_position_embeddings


def remembers_longest_row(config: PretrainedConfig) -> bool:
    """Whether a model keeps the rotation of its longest pass for later ones, until a short pass comes."""
    return "dynamic" in _rotation_types(config)


def ordinary_tokens(config: PretrainedConfig) -> Tensor:
    """The first tokens of a vocabulary, without those that a configuration names: padding, ends, images."""
    special: set[Any] = set()
    for name, value in config.to_dict().items():
        if name.endswith(("token_id", "token_index")):
            special.update(value if isinstance(value, list) else [value])  # a model may have several ends
    size = min(config.get_text_config().vocab_size, 1000)
    return torch.tensor([token for token in range(size) if token not in special])


def _compare_runs(model: torch.nn.Module, rows: Tensor) -> PaddingTraits | None:
    """
    What the output for the first row depends on; `None` if the same run twice gives different outputs.

    Args:
        model (`torch.nn.Module`): In the mode to be checked.
        rows (`torch.Tensor` of shape `(3, P + N)`): P tokens in the columns of padding, then N tokens of the row.
    """
    length = rows.shape[1] - _PADDING
    masked = torch.ones_like(rows)
    masked[0, :_PADDING] = 0
    whole, flipped = rows[:1, _PADDING:], rows[:1].roll(-_PADDING, dims=1)  # without padding; padding on the right

    def run(ids: Tensor, mask: Tensor) -> Tensor:
        device = next(model.parameters()).device
        logits = model(input_ids=ids.to(device), attention_mask=mask.to(device)).logits[0]  # (columns, V)
        return logits[:length] if mask is on_the_right else logits[-length:]

    on_the_right = masked[:1].flip(1)
    plain = run(whole, torch.ones_like(whole))
    limit = _rounding(plain)
    if _distance(run(whole, torch.ones_like(whole)), plain) > limit:
        return None
    padded, with_one, with_two = (run(rows[chosen], masked[chosen]) for chosen in ([0], [0, 1], [0, 2, 1]))
    # With eager attention, the columns of padding look at all columns, also at those to their right.
    longer, shorter = padded[:-_PADDING], run(rows[:1, :-_PADDING], masked[:1, :-_PADDING])[_PADDING:]
    return PaddingTraits(
        left_padding=max(_distance(padded, plain), _distance(with_one, plain)) > limit,
        right_padding=max(_distance(run(flipped, on_the_right), plain), _distance(shorter, longer)) > limit,
        alone=_distance(padded, with_one) > limit,
        company=_distance(with_one, with_two) > limit,
    )


def _made_up_rows(config: PretrainedConfig) -> Tensor:
    """(3, P + N) ordinary tokens, also in the columns of padding: the embedding of a padding token may be 0."""
    language = config.get_text_config()
    plain = {"full_attention", "sliding_attention"}.issuperset(_layer_types(language)) and not any(_chunks(language))
    sizes = [size for size in _chunks(language) if size <= _LONGEST_CHUNK]
    columns = _PADDING + (12 if plain else max(_CHUNK, *sizes) + 8)
    columns = min(columns, getattr(language, "max_position_embeddings", None) or columns)
    ordinary = ordinary_tokens(config)
    return ordinary[torch.randint(len(ordinary), (3, columns), generator=torch.Generator().manual_seed(0))]


def _distance(a: Tensor, b: Tensor) -> float:
    """Difference of (N, V) logits, relative to their variation, at the four adjacent positions that differ most."""
    b = b.float()
    squares = ((a.float() - b).square().mean(1), (b - b.mean(1, keepdim=True)).square().mean(1))
    difference, scale = (torch.stack([span.mean() for span in each.split(4)]) for each in squares)
    return float((difference / scale.clamp(min=torch.finfo(b.dtype).tiny)).max().sqrt())


def _rounding(logits: Tensor) -> float:
    """The largest distance of logits that rounding can cause, for the precision in which they were computed."""
    precisions = [torch.bfloat16, torch.float16]
    # Mixed precision returns float32. Distances are computed in float32.
    eps = [torch.finfo(dtype).eps for dtype in precisions if torch.equal(logits, logits.to(dtype).to(logits.dtype))]
    if multiplies_in_tf32():
        eps.append(2**-10)
    return min(256 * max([torch.finfo(logits.dtype).eps, torch.finfo(torch.float32).eps, *eps]), 0.1)


def multiplies_in_tf32() -> bool:
    """Whether a GPU rounds the factors of float32 products to 10 bits."""
    matmul: Any = torch.backends.cuda.matmul
    # Since torch 2.9, which refuses to answer the older question once it was told in the newer way.
    precision = getattr(matmul, "fp32_precision", None)
    return bool(matmul.allow_tf32) if precision is None else precision == "tf32"


@contextlib.contextmanager
def same_random_numbers(device: torch.device) -> Iterator[None]:
    """Restores torch's random generators at the end: what comes next draws the same numbers."""
    devices = [] if device.type in ("cpu", "mps") else [device]
    with torch.random.fork_rng(devices, device_type=device.type):
        yield


@contextlib.contextmanager
def as_is(model: torch.nn.Module, training: bool) -> Iterator[None]:
    """
    Puts a model in a mode, without dropout and gradients. Restores the mode of each module, random numbers, and the
    rotation, which a dynamic one changes with the length of a pass.
    """
    modes = [(module, module.training) for module in model.modules()]
    rotations = [
        (module, {**vars(module)}, dict(module.named_buffers(recurse=False)))
        for module in model.modules()
        if hasattr(module, "max_seq_len_cached")
    ]
    device = next(model.parameters()).device
    model.train(training)
    for module, _ in modes:
        if "Dropout" in type(module).__name__:
            module.training = False
        if type(module).__name__ == "Linear4bit":
            module.training = True  # on a CPU, bitsandbytes repacks the weights in evaluation, and cannot train them
    try:
        with (
            torch.no_grad(),
            same_random_numbers(device),
            warnings.catch_warnings(),
        ):
            # Checkpointing warns that there are no gradients.
            warnings.simplefilter("ignore")
            yield
    finally:
        for rotation, attributes, buffers in rotations:
            vars(rotation).update(attributes)
            for name, buffer in buffers.items():
                setattr(rotation, name, buffer)
        for module, mode in modes:
            module.training = mode


def _layer_types(config: PretrainedConfig) -> list[str]:
    return getattr(config, "layer_types", None) or []


def _chunks(config: PretrainedConfig) -> list[int]:
    """Sizes that a configuration gives for chunks of columns; 0 if it gives none."""
    return [0] + [
        value
        for name, value in vars(config).items()
        if isinstance(value, int) and ("chunk" in name or name == "block_size") and "feed_forward" not in name
    ]


def _rotations(config: PretrainedConfig) -> list[dict[str, Any]]:
    """The settings of a model's rotations: one, or one for each kind of layer."""
    config = config.get_text_config()
    rope = getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None) or {}
    return [rope, *(value for value in rope.values() if isinstance(value, dict))]


def _rotation_types(config: PretrainedConfig) -> set[str | None]:
    return {each.get("rope_type", each.get("type")) for each in _rotations(config)}
