"""The mask of the attention implementation "fused_peft" of transformers models.

A *compact mask* stands in place of a ``[B, 1, S, T]`` one: int32 ``[B, 1, rows, T]``, whose
first row says which keys are no padding and whose second row repeats the key at which the row's
first query stands. ``rows`` says what else holds (:data:`CAUSAL`, :data:`WINDOWED`,
:data:`BIDIRECTIONAL`); a last dimension of 1 over more keys means that none is padding. It is a
4-D tensor since model code and ``generate()`` hand 4-D tensors on as they are: through
checkpointing, torch.compile, beam search and cached decoding. A mask that says nothing is None.
"""

from __future__ import annotations

import inspect
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fused_peft import reference
from fused_peft.nn.attention_masks import check_mask_dtype

#: Number of rows of a compact mask.
CAUSAL, WINDOWED, BIDIRECTIONAL = 2, 3, 4


def compact_mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int | Tensor = 0,
    kv_offset: int | Tensor = 0,
    mask_function: Any = None,
    attention_mask: Tensor | None = None,
    **kwargs: Any,
) -> Tensor | None:
    """The mask of a forward pass, called by transformers' ``masking_utils``.

    Args:
        batch_size: B.
        q_length: S, the number of queries.
        kv_length: T, the number of keys.
        q_offset: position of the first query; a tensor where the cache is static.
        kv_offset: position of the first key.
        mask_function: transformers' description of which key a query sees.
        attention_mask: ``[B, positions]``, False at padding, or None.
        **kwargs: transformers' other arguments: config, local_size, allow_is_causal_skip ...

    Returns:
        None, a compact mask (see the module), or for a mask function that a compact mask cannot
        describe bool ``[B, 1, S, T]``, True where the key is seen.
    """
    from transformers.masking_utils import sdpa_mask

    rows = _rows(mask_function, kwargs)
    start = q_offset - kv_offset
    static = isinstance(start, Tensor) or start != kv_length - q_length
    skip = "allow_is_bidirectional_skip" if rows == BIDIRECTIONAL else "allow_is_causal_skip"
    # A caller who may not get None puts masks together; decoding in a static cache may not either.
    if rows is None or not (kwargs.get(skip, True) or (q_length == 1 and static)):
        kwargs = {**kwargs, "allow_is_causal_skip": False, "allow_is_bidirectional_skip": False}
        offsets: Any = {"q_offset": q_offset, "kv_offset": kv_offset}
        return sdpa_mask(
            batch_size=batch_size,
            q_length=q_length,
            kv_length=kv_length,
            mask_function=mask_function,
            attention_mask=attention_mask,
            **offsets,
            **kwargs,
        )
    # A compiler would guard on it: two graphs where one does.
    if rows == WINDOWED and not torch.compiler.is_compiling() and kv_length <= kwargs["local_size"]:
        rows = CAUSAL
    keys = _key_mask(attention_mask, kv_length, kv_offset)
    # Without a mask the attention modules decide whether they are causal.
    plain = rows == BIDIRECTIONAL and getattr(kwargs.get("config"), "is_causal", True)
    if rows == CAUSAL:
        plain = not static
    if keys is None and plain:
        return None
    device = kwargs.get("device", "cpu")
    length = 1 if keys is None else kv_length
    visible = 1 if keys is None else keys.to(device, torch.int32)
    mask = torch.empty(batch_size, 1, rows, length, dtype=torch.int32, device=device)
    mask[:, 0, 0] = visible
    mask[:, 0, 1:] = start
    return mask


def _rows(mask_function: Any, kwargs: dict[str, Any]) -> int | None:
    """Which kind of compact mask says the same as ``mask_function``; None if none does."""
    from transformers.masking_utils import (
        and_masks,
        bidirectional_mask_function,
        causal_mask_function,
        sliding_window_overlay,
    )

    if mask_function is causal_mask_function:
        return CAUSAL
    if mask_function is bidirectional_mask_function:
        return BIDIRECTIONAL
    window, config = kwargs.get("local_size"), kwargs.get("config")
    if window is None or window != getattr(config, "sliding_window", None):
        return None
    if torch.compiler.is_compiling():
        # A compiler cannot look into closures. What else could be in the intersection: a function
        # of the caller's, chunks, or packed sequences, for which no mask may be skipped.
        sure = (
            mask_function.__qualname__ == "and_masks.<locals>.and_mask"
            and not kwargs.get("use_vmap", False)
            and "allow_is_bidirectional_skip" not in kwargs
            and getattr(config, "attention_chunk_size", None) is None
        )
        return WINDOWED if sure else None
    parts = inspect.getclosurevars(mask_function).nonlocals.get("mask_functions", ())
    if mask_function.__code__ is not and_masks().__code__ or len(parts) != 2:
        return None
    overlay = sliding_window_overlay(window)
    same = parts[0].__code__ is overlay.__code__ and parts[1] is causal_mask_function
    return WINDOWED if same else None


def _key_mask(
    attention_mask: Tensor | None, kv_length: int, kv_offset: int | Tensor
) -> Tensor | None:
    """Bool ``[B, T]``, or None where no key is padding."""
    if attention_mask is None:
        return None
    if isinstance(kv_offset, Tensor):
        index = torch.arange(kv_length, device=attention_mask.device) + kv_offset
        inside = index < attention_mask.shape[-1]
        keys = attention_mask[:, index.clamp(max=attention_mask.shape[-1] - 1)] & inside
    else:
        keys = attention_mask[:, kv_offset : kv_offset + kv_length]
        keys = F.pad(keys, (0, kv_length - keys.shape[-1]))
    if _may_read(keys) and bool(keys.all()):
        return None
    return keys


def _may_read(tensor: Tensor) -> bool:
    """Whether the host may ask for values: not while tracing or capturing a CUDA graph."""
    tracing = torch.compiler.is_compiling() or tensor.is_meta
    return not (tracing or (tensor.is_cuda and torch.cuda.is_current_stream_capturing()))


class ReadMask:
    """A layer's mask taken apart: ``full``, or what the op has arguments for."""

    def __init__(
        self, module: nn.Module, mask: Tensor | None, is_causal: bool | None, keys: int
    ) -> None:
        self.full: Tensor | None = None
        self.key_mask: Tensor | None = None
        self.start: Tensor | None = None
        self.window: int | None = None
        if mask is None:
            self.causal = bool(
                getattr(module, "is_causal", True) if is_causal is None else is_causal
            )
            return
        self.causal = False
        rows = mask.shape[2]
        if mask.dtype != torch.int32 or rows not in (CAUSAL, WINDOWED, BIDIRECTIONAL):
            check_mask_dtype("attention_mask", mask)
            self.full = mask
            return
        self.causal = rows != BIDIRECTIONAL
        self.start = mask[:, 0, 1, 0].long()
        if rows == WINDOWED:
            self.window = module.config.sliding_window  # type: ignore[union-attr, assignment]
        if mask.shape[3] != 1 or keys == 1:
            self.key_mask = mask[:, 0, 0] != 0

    def expand(self, query: Tensor, prefix: int, total: int) -> Tensor | None:
        """``[B, 1 or Hq, S, prefix + T]``, bool or additive, the prefix seen by every query."""
        full = self.full
        if full is None:
            if not self.causal and self.key_mask is None:
                return None
            full = reference.attention_keep(
                query.shape[2],
                total - prefix,
                causal=self.causal,
                batch=query.shape[0],
                key_mask=self.key_mask,
                query_start=self.start,
                sliding_window=self.window,
                device=query.device,
            )[:, None]
        seen = True if full.dtype == torch.bool else 0.0
        return F.pad(full, (prefix, 0), value=seen) if prefix else full
