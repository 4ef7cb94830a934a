"""
Attention over a packed row ([`PackedLayout`]), for every model that asks transformers for its attention function.

transformers looks the function up by `config._attn_implementation` each time that an attention layer runs. This module
replaces that name while a packed pass runs. It does so in the backward pass too, where gradient checkpointing runs the
layers again. Between passes the model has its own attention.
"""

import functools
import inspect
import operator
import sys
from bisect import bisect
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, cast
from weakref import WeakKeyDictionary

import torch
from torch import Tensor
from torch.autograd import Variable
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface, PretrainedConfig

from .layout import Block, PackedLayout


try:
    from torch.nn.attention.varlen import varlen_attn
except ImportError:  # before torch 2.10
    varlen_attn = None  # type: ignore[assignment]


_VARLEN_PARAMETERS = set() if varlen_attn is None else set(inspect.signature(varlen_attn).parameters)


class _PackedName(str):
    """Name of the attention function. It carries the layout of the pass and the name that it replaces."""

    layout: PackedLayout
    original: str | None
    in_backward: bool = False


_NAME = "trl_a3po_packed"


@contextmanager
def packed_attention(model: torch.nn.Module, layout: PackedLayout) -> Iterator[None]:
    """
    Gives a model the attention of a packed row while the context lasts.

    Models that share a configuration object share the attention. For gradient checkpointing, outputs have to pass
    through [`packed_in_backward`].

    Args:
        model (`torch.nn.Module`): Model of transformers, in any wrapper.
        layout ([`PackedLayout`]): The layout of the packed row.
    """
    _switch_on(model, layout)
    try:
        yield
    finally:
        restore_attention(model)
        layout.masks.clear()


def restore_attention(model: torch.nn.Module) -> None:
    """Gives a model its own attention back. Needed only if an error has interrupted a backward pass."""
    for config in _configs(model):
        if isinstance(config._attn_implementation, _PackedName):
            _set_name(config, config._attn_implementation.original)


def packed_in_backward(model: torch.nn.Module, layout: PackedLayout, output: Tensor) -> Tensor:
    """The output of a packed pass, unchanged. Its backward pass runs with the attention of the packed row."""
    return _PackedInBackward.apply(output, model, layout)


class _PackedInBackward(torch.autograd.Function):
    @staticmethod
    def forward(ctx, output, model, layout):
        ctx.model, ctx.layout = model, layout
        return output.view_as(output)

    @staticmethod
    def backward(ctx, gradient):
        # This runs before the backward of any layer, because all depend on it. The callback runs after the last.
        model, layout = ctx.model, ctx.layout

        def leave() -> None:
            restore_attention(model)
            layout.masks.clear()

        _switch_on(model, layout, in_backward=True)
        Variable._execution_engine.queue_callback(leave)
        return gradient, None, None


def _switch_on(model: torch.nn.Module, layout: PackedLayout, in_backward: bool = False) -> None:
    for config in _configs(model):
        current = config._attn_implementation
        name = _PackedName(_NAME)
        name.layout, name.in_backward = layout, in_backward
        name.original = current.original if isinstance(current, _PackedName) else current
        _set_name(config, name)


def _set_name(config: PretrainedConfig, name: str | None) -> None:
    config._attn_implementation = {"": name}  # a plain name would also be set in nested configurations


# By model. To look through all modules takes milliseconds, four times a packed pass: an adapter has thousands of them.
_CONFIGS: WeakKeyDictionary[torch.nn.Module, list[PretrainedConfig]] = WeakKeyDictionary()


def _configs(model: torch.nn.Module) -> list[PretrainedConfig]:
    """The configurations that the modules of a model read."""
    if model not in _CONFIGS:
        configs = (getattr(module, "config", None) for module in model.modules())
        found = {id(config): config for config in configs if isinstance(config, PretrainedConfig)}
        _CONFIGS[model] = list(found.values())
    return _CONFIGS[model]


def _attend_packed(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """
    The attention function, with the arguments of transformers' own.

    Args:
        query (`torch.Tensor` of shape `(1, H, N, D)`): Queries of H heads.
        key (`torch.Tensor` of shape `(1, K, N, D)`): Keys of K heads; H is a multiple of K.
        value (`torch.Tensor` of shape `(1, K, N, E)`): Values.

    Returns:
        The output of shape (1, N, H, E), and no attention weights.

    Raises:
        `ValueError`: the model makes its own attention mask, does not attend causally, or runs another pass than the
        packed one.
    """
    name: Any = getattr(getattr(module, "config", None), "_attn_implementation", None)
    layout = getattr(name, "layout", None)
    if layout is None:
        raise ValueError(f"{type(module).__name__} does not read its attention function from its `config`.")
    if query.shape[0] != 1 or not query.shape[2] == key.shape[2] == layout.positions:
        if name.in_backward:
            # A subclass ran another pass before the packed one: checkpointing runs its layers again, too.
            options = {"sliding_window": sliding_window, "softcap": softcap, "s_aux": s_aux}
            asked = {each: value for each, value in options.items() if value is not None}
            own = _function_of(module, name.original)
            return own(module, query, key, value, attention_mask, scaling=scaling, dropout=dropout, **asked, **kwargs)
        raise ValueError(
            f"{type(module).__name__} attends from {tuple(query.shape[:3:2])} to {tuple(key.shape[:3:2])} positions "
            f"in a packed pass of (1, {layout.positions}). Run only one pass at a time, without a cache."
        )
    if attention_mask is not None or kwargs.get("position_bias") is not None:
        raise ValueError(f"{type(module).__name__} makes its own attention mask.")
    # GPT-2 of transformers 4 passes False for a single position, where it makes no difference.
    if kwargs.get("is_causal") is False and layout.positions > 1:
        raise ValueError(f"{type(module).__name__} does not attend causally.")
    layout.windows.add(sliding_window)
    if softcap is None and s_aux is None:
        if dropout == 0 and _varlen_takes(query, value):
            return _attend_varlen(query, key, value, layout, scaling, sliding_window), None
        attend = functools.partial(_attend_fused, scaling=scaling, dropout=dropout)
    else:
        layout.needs_scores = True
        attend = functools.partial(_attend_plainly, scaling=scaling, dropout=dropout, softcap=softcap, sinks=s_aux)
    return _attend_in_blocks(query, key, value, layout, sliding_window, attend), None


AttentionInterface.register(_NAME, _attend_packed)


def _attend_in_blocks(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    layout: PackedLayout,
    window: int | None,
    attend: Callable[[Tensor, Tensor, Tensor, Tensor | None], Tensor],
) -> Tensor:
    """(1, N, H, E) outputs, of one call of `attend` for each block, with queries, keys, values and a mask."""
    blocks = layout.blocks
    # One split: the gradient of each separate slice would be as large as the whole row.
    queries, keys, values = (
        each.split([end - start for start, end, *_ in blocks], dim=2) for each in (query, key, value)
    )

    def with_keys_before(parts: Sequence[Tensor], number: int) -> Tensor:
        """A block's part of a tensor, after the parts of the keys that lie before the block."""
        before = []
        for start, end in blocks[number].spans:
            holder = bisect(blocks, start, key=operator.attrgetter("start")) - 1
            before.append(parts[holder][:, :, start - blocks[holder].start : end - blocks[holder].start])
        return torch.cat([*before, parts[number]], dim=2) if before else parts[number]

    outputs = []
    for number, block in enumerate(blocks):
        mask = _mask(layout, block, window, query.device)
        asking = with_keys_before(queries, number) if mask is None else queries[number]
        seen = with_keys_before(keys, number), with_keys_before(values, number)
        attended = attend(asking, *seen, mask)
        outputs.append(attended[:, :, block.start - block.end :].transpose(1, 2))
    return torch.cat(outputs, dim=1)


def _function_of(module: torch.nn.Module, name: str | None) -> Callable[..., tuple[Tensor, Any]]:
    """The attention function that a layer runs by this name. The eager one is in the file of the layer's class."""
    registered = AttentionInterface()
    return registered[name] if name in registered else sys.modules[type(module).__module__].eager_attention_forward


def _mask(layout: PackedLayout, block: Block, window: int | None, device: torch.device) -> Tensor | None:
    """Mask of a block, true where a position attends to a key; `None` if it is computed as a causal row."""
    if window is not None and window >= block.keys:
        window = None
    if block.is_causal and window is None:
        return None
    name = (block, window)
    if name not in layout.masks:
        layout.masks[name] = layout.attends(block, window)
    return layout.masks[name].to(device)  # of the layer, if the model is spread over several


def _attend_fused(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scaling: float | None, dropout: float
) -> Tensor:
    options: dict[str, Any] = {}
    if query.shape[1] != key.shape[1]:
        if query.device.type == "cpu":
            options = {"enable_gqa": True}
        else:  # no fast kernel takes grouped heads together with a mask
            key, value = _repeat_heads(query, key), _repeat_heads(query, value)
    return scaled_dot_product_attention(
        query, key, value, mask, dropout_p=dropout, is_causal=mask is None, scale=scaling, **options
    )


def _attend_plainly(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    scaling: float | None,
    dropout: float,
    softcap: float | None,
    sinks: Tensor | None,
) -> Tensor:
    """Attention with soft-capped scores, or with sinks: one more score per head, whose value is 0."""
    scores = query @ _repeat_heads(query, key).mT * (query.shape[-1] ** -0.5 if scaling is None else scaling)
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    if mask is None:
        mask = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).tril()
    scores = scores.masked_fill(~mask, -torch.inf)
    if sinks is not None:
        scores = torch.cat([scores, sinks.view(1, -1, 1, 1).expand(*scores.shape[:3], 1).to(scores.dtype)], dim=-1)
    weights = torch.softmax(scores, dim=-1, dtype=torch.float32).to(query.dtype)[..., : key.shape[2]]
    return torch.dropout(weights, dropout, train=True) @ _repeat_heads(query, value)


def _repeat_heads(query: Tensor, tensor: Tensor) -> Tensor:
    return tensor.repeat_interleave(query.shape[1] // tensor.shape[1], dim=1)


def _varlen_takes(query: Tensor, value: Tensor) -> bool:
    """Whether torch's kernel for rows of different lengths supports these tensors."""
    return (
        "window_size" in _VARLEN_PARAMETERS
        and query.device.type == "cuda"
        and torch.version.hip is None
        and torch.cuda.get_device_capability(query.device) >= (8, 0)
        and _kernel_type(query) in (torch.float16, torch.bfloat16)
        and query.shape[-1] == value.shape[-1] <= 256
        and query.shape[-1] % 8 == 0
    )


def _attend_varlen(
    query: Tensor, key: Tensor, value: Tensor, layout: PackedLayout, scaling: float | None, window: int | None
) -> Tensor:
    # The kernel takes (N, H, D). If there are fewer queries than keys, it aligns them with the last keys.
    kind = _kernel_type(query)
    options: dict[str, Any] = {}
    if query.shape[1] != key.shape[1]:
        if "enable_gqa" in _VARLEN_PARAMETERS:
            options = {"enable_gqa": True}
        else:  # before torch 2.12
            key, value = _repeat_heads(query, key), _repeat_heads(query, value)
    query, key, value = (each[0].transpose(0, 1).to(kind) for each in (query, key, value))
    # To the device of the layer, if the model is spread over several.
    of_queries, of_keys, keys = (each.to(query.device) for each in layout.starts[:3])
    output = varlen_attn(
        query,
        key[keys],
        value[keys],
        of_queries,
        of_keys,
        layout.starts.most_queries,
        layout.starts.most_keys,
        scale=scaling,
        window_size=(-1 if window is None else window - 1, 0),
        **options,
    )
    return cast(Tensor, output)[None]


def _kernel_type(query: Tensor) -> torch.dtype:
    kind = query.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else query.dtype
