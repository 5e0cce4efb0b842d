"""The attention implementation "fused_peft" of transformers models.

After :func:`register`, ``attn_implementation="fused_peft"`` runs a model's attention through
:func:`fused_peft.prefix_attention`, with the prefix that a module was given
(:func:`attach_prefix`), or without any. transformers calls two functions: one makes the mask of a
forward pass, one is the attention of each layer.

The mask is a *compact mask*: a few rows that say what ``[B, 1, S, T]`` does (``_compact_mask.py``).

What the op has no argument for takes plain torch operations, the prefix concatenated there: a
mask given in 4 dimensions, packed sequences, chunked and block masks, position biases, softcap,
attention sinks, and attention weights that are asked for. So do the masks of which it cannot be
told: of sliding layers while decoding in a static cache and, under torch.compile without a cache
and without an attention mask, of every layer, since positions could then say that sequences are
packed (an attention mask of ones says that they are not).
"""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Iterator
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fused_peft import ops
from fused_peft.integrations._compact_mask import ReadMask, compact_mask
from fused_peft.nn.plain_attention import plain_attention

NAME = "fused_peft"

_ATTRIBUTE = "fused_peft_prefix"
_REGISTRATION = "_fused_peft_registration"


class PrefixSource(Protocol):
    """Where an attention module's prefix comes from."""

    def key_value(self) -> tuple[Tensor, Tensor] | None:
        """Keys and values ``[Hkv, P, D]``, or None where no prefix is in force now."""

    def position_bias(self, queries: int, start: Tensor | int) -> Tensor | None:
        """``[1 or B, Hq, queries, P]`` to add to the prefix's scores, or None."""


def attach_prefix(module: nn.Module, source: PrefixSource | None) -> None:
    """Let an attention module look for its prefix at ``source``; None takes it away.

    The source is a plain attribute, so what it refers to is no submodule of ``module``.
    """
    module.__dict__.pop(_ATTRIBUTE, None)
    if source is not None:
        module.__dict__[_ATTRIBUTE] = source


def register() -> None:
    """Make "fused_peft" known to transformers. Idempotent.

    Raises:
        ImportError: transformers is not installed, or older than its mask functions that take the
            length and the offset of the queries (5.0).
    """
    from transformers import AttentionInterface
    from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

    if "q_offset" not in inspect.signature(sdpa_mask).parameters:
        import transformers

        raise ImportError(f"transformers is {transformers.__version__}; expected 5.0 or later")
    AttentionInterface.register(NAME, attention_forward)
    AttentionMaskInterface.register(NAME, compact_mask)


def use_fused_attention(model: nn.Module) -> None:
    """Run a transformers model's attention through :func:`fused_peft.prefix_attention`.

    Prefix tuning does this by itself; for LoRA or no adapter at all it is a step of its own, for
    training and generation alike. What the op does not cover runs as plain torch operations.

    Args:
        model: a transformers model whose attention modules go through AttentionInterface.

    Raises:
        TypeError: ``model`` is no transformers model.
        ValueError: the model's class has an attention of its own, which cannot be replaced.
    """
    from transformers import PreTrainedModel

    if not isinstance(model, PreTrainedModel):
        raise TypeError(f"model is a {type(model).__name__}; expected a transformers model")
    if not model._can_set_attn_implementation():
        raise ValueError(
            f"model is a {type(model).__name__}, whose attention does not go through transformers' "
            "AttentionInterface; expected a model whose attention can be replaced"
        )
    register()
    model.set_attn_implementation(NAME)
    model.__dict__[_REGISTRATION] = _Registration()


class _Registration:
    """Goes with a model whose config names the attention: unpickled elsewhere, it registers it."""

    def __reduce__(self) -> tuple[Any, ...]:
        return _registered, ()


def _registered() -> _Registration:
    register()
    return _Registration()


@contextlib.contextmanager
def recorded(into: dict[int, tuple[Tensor, Tensor]]) -> Iterator[str]:
    """Within the context: the name of an attention implementation that also keeps what it is given.

    Args:
        into: gets every attention module's keys and values, ``[B, Hkv, T, D]``, by the module's id.
    """
    from transformers import AttentionInterface
    from transformers.masking_utils import AttentionMaskInterface

    def record(
        module: nn.Module, query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor | None]:
        into[id(module)] = (key, value)
        return attention_forward(module, query, key, value, *args, **kwargs)

    register()
    name = f"{NAME}_recorded"
    AttentionInterface.register(name, record)
    AttentionMaskInterface.register(name, compact_mask)
    try:
        yield name
    finally:
        del AttentionInterface._global_mapping[name]
        del AttentionMaskInterface._global_mapping[name]


def attention_forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    """The attention of one layer, called by transformers' attention modules.

    Args:
        module: the attention module.
        query: ``[B, Hq, S, D]``.
        key: ``[B, Hkv, T, D]``, the cache's keys included.
        value: ``[B, Hkv, T, D]``.
        attention_mask: a compact mask, or bool or floating-point ``[B, 1 or Hq, S, T]``.
        dropout: probability that an attention weight is dropped.
        scaling: factor on the scores.
        is_causal: whether to be causal without a mask; ``module.is_causal`` if None.
        **kwargs: transformers' other arguments: position_bias, softcap, s_aux ...

    Returns:
        ``[B, S, Hq, D]`` contiguous, and the weights ``[B, Hq, S, P + T]`` if they are asked for.

    Raises:
        NotImplementedError: the cache is the paged one of continuous batching.
    """
    if kwargs.get("cache") is not None:
        raise NotImplementedError(
            f'attn_implementation="{NAME}" has no paged attention; expected a model without '
            "continuous batching, or another attn_implementation"
        )
    source: PrefixSource | None = module.__dict__.get(_ATTRIBUTE)
    prefix = None if source is None else source.key_value()
    mask = ReadMask(module, attention_mask, is_causal, key.shape[2])
    weights_wanted = kwargs.get("output_attentions") or getattr(
        getattr(module, "config", None), "output_attentions", False
    )
    if mask.full is None and not weights_wanted and not _needs_plain(key, value, kwargs):
        prefix_k, prefix_v = (None, None) if prefix is None else (p.to(query.dtype) for p in prefix)
        out = ops.prefix_attention(
            query,
            key.to(query.dtype),
            value.to(query.dtype),
            prefix_k,
            prefix_v,
            causal=mask.causal,
            scale=scaling,
            key_mask=mask.key_mask,
            query_start=mask.start if mask.causal else None,
            sliding_window=mask.window,
            dropout_p=dropout,
            seed=ops.new_seed(query.device) if dropout > 0.0 else None,
        )
        return out.transpose(1, 2).contiguous(), None
    bias = kwargs.get("position_bias")
    if prefix is not None:
        assert source is not None
        if bias is not None:
            start = key.shape[2] - query.shape[2] if mask.start is None else mask.start
            added = source.position_bias(query.shape[2], start)
            bias = F.pad(bias, (prefix[0].shape[-2], 0)) if added is None else _join(added, bias)
        key, value = (
            torch.cat((p.to(x.dtype).expand(x.shape[0], -1, -1, -1), x), dim=2)
            for p, x in zip(prefix, (key, value), strict=True)
        )
    seen = mask.expand(query, 0 if prefix is None else prefix[0].shape[-2], key.shape[2])
    out, weights = plain_attention(
        query,
        key,
        value,
        seen,
        bias,
        dropout=dropout,
        scale=scaling,
        softcap=kwargs.get("softcap"),
        sinks=kwargs.get("s_aux"),
        weights_wanted=bool(weights_wanted),
    )
    return out.transpose(1, 2).contiguous(), weights


def _needs_plain(key: Tensor, value: Tensor, kwargs: dict[str, Any]) -> bool:
    if key.shape != value.shape:
        return True
    return any(kwargs.get(name) is not None for name in ("position_bias", "softcap", "s_aux"))


def _join(added: Tensor, bias: Tensor) -> Tensor:
    batch = max(added.shape[0], bias.shape[0])
    parts = (part.expand(batch, -1, -1, -1) for part in (added.to(bias.dtype), bias))
    return torch.cat(tuple(parts), dim=-1)
