"""The prefix attention op: shape functions, autograd, the choice of kernel or fallback."""

from __future__ import annotations

import torch
from torch import Tensor

from fused_peft import reference

from ._common import autocast_dtype, check_dropout


def attention_fallback_reason(q: Tensor, k: Tensor, v: Tensor) -> str | None:
    """Why no kernel covers these operands, or None where one does."""
    return "no kernel yet"


def _check_operands(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    prefix_k: Tensor | None,
    prefix_v: Tensor | None,
    causal: bool,
    key_lengths: Tensor | None,
    key_mask: Tensor | None,
    query_start: Tensor | None,
    sliding_window: int | None,
) -> None:
    for name, operand in (("q", q), ("k", k), ("v", v)):
        if operand.dim() != 4:
            raise ValueError(
                f"{name} has shape {tuple(operand.shape)}; expected 4 dimensions, "
                "[batch, heads, length, head_dim]"
            )
    batch, q_heads, queries, head_dim = q.shape
    kv_heads, keys = k.shape[1], k.shape[2]
    if head_dim == 0 or k.shape[0] != batch or k.shape[3] != head_dim:
        raise ValueError(
            f"k has shape {tuple(k.shape)}; expected [{batch}, Hkv, T, {head_dim}] for q "
            f"{tuple(q.shape)}"
        )
    if v.shape != k.shape:
        raise ValueError(f"v has shape {tuple(v.shape)}; expected k's, {tuple(k.shape)}")
    if kv_heads == 0 or q_heads % kv_heads != 0:
        raise ValueError(
            f"k has {kv_heads} heads and q has {q_heads}; expected a divisor of q's number of heads"
        )
    if (prefix_k is None) != (prefix_v is None):
        missing = "prefix_k" if prefix_k is None else "prefix_v"
        raise ValueError(f"{missing} is None; expected both of prefix_k and prefix_v, or neither")
    if prefix_k is not None and prefix_v is not None:
        for name, prefix in (("prefix_k", prefix_k), ("prefix_v", prefix_v)):
            shape = tuple(prefix.shape)
            if (
                prefix.dim() not in (3, 4)
                or shape[-3] != kv_heads
                or shape[-1] != head_dim
                or (prefix.dim() == 4 and shape[0] != batch)
            ):
                raise ValueError(
                    f"{name} has shape {shape}; expected [{kv_heads}, P, {head_dim}] or "
                    f"[{batch}, {kv_heads}, P, {head_dim}]"
                )
        if prefix_v.shape != prefix_k.shape:
            raise ValueError(
                f"prefix_v has shape {tuple(prefix_v.shape)}; expected prefix_k's, "
                f"{tuple(prefix_k.shape)}"
            )
    for name, other in (("k", k), ("v", v), ("prefix_k", prefix_k), ("prefix_v", prefix_v)):
        if other is not None and other.dtype != q.dtype:
            raise ValueError(f"{name} is {other.dtype} and q is {q.dtype}; expected the same dtype")
    for name, other in (
        ("k", k),
        ("v", v),
        ("prefix_k", prefix_k),
        ("prefix_v", prefix_v),
        ("key_lengths", key_lengths),
        ("key_mask", key_mask),
        ("query_start", query_start),
    ):
        if other is not None and other.device != q.device:
            raise ValueError(f"{name} is on {other.device}; expected {q.device}, where q is")
    if causal and query_start is None and keys < queries:
        raise ValueError(
            f"k has {keys} positions and q has {queries}; causal attention needs at least as many "
            "keys as queries, or query_start"
        )
    for name, positions, shapes in (
        ("key_lengths", key_lengths, ((batch,),)),
        ("query_start", query_start, ((batch,), (1,), ())),
    ):
        if positions is not None and (
            positions.dtype != torch.int64 or tuple(positions.shape) not in shapes
        ):
            raise ValueError(
                f"{name} is {positions.dtype} of shape {tuple(positions.shape)}; expected int64 of "
                f"shape [{batch}]"
            )
    if key_mask is not None and (
        key_mask.dtype != torch.bool or tuple(key_mask.shape) != (batch, keys)
    ):
        raise ValueError(
            f"key_mask is {key_mask.dtype} of shape {tuple(key_mask.shape)}; expected bool of "
            f"shape [{batch}, {keys}]"
        )
    if sliding_window is not None and sliding_window < 1:
        raise ValueError(f"sliding_window is {sliding_window}; expected at least 1, or None")


def prefix_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    prefix_k: Tensor | None = None,
    prefix_v: Tensor | None = None,
    *,
    causal: bool = False,
    scale: float | None = None,
    key_lengths: Tensor | None = None,
    key_mask: Tensor | None = None,
    query_start: Tensor | None = None,
    sliding_window: int | None = None,
    dropout_p: float = 0.0,
    seed: Tensor | None = None,
) -> Tensor:
    """Attention over a learned prefix and the sequence's own keys, in one pass.

    ``out = softmax([q prefix_k^T, mask(q k^T)] scale) [prefix_v; v]``: every query sees the whole
    prefix. Li and Liang, "Prefix-Tuning: Optimizing Continuous Prompts for Generation", 2021; the
    pass is that of Dao, "FlashAttention-2", 2023. Neither the concatenation, nor the prefix
    expanded over the batch, nor keys expanded over a group of query heads, nor a ``[S, T]`` mask
    or score matrix exists in memory. Gradients exist for q, k, v, prefix_k and prefix_v. Under
    autocast these five are cast to the autocast dtype.

    Args:
        q: ``[B, Hq, S, D]``, any strides. float32, bfloat16 and float16 run the kernels.
        k: ``[B, Hkv, T, D]``; Hkv divides Hq, query head ``h`` reads head ``h // (Hq / Hkv)``.
        v: ``[B, Hkv, T, D]``.
        prefix_k: ``[Hkv, P, D]``, shared by the batch, or ``[B, Hkv, P, D]``; None for no prefix.
        prefix_v: as prefix_k.
        causal: query ``i`` sees keys ``t <= query_start + i`` only.
        scale: factor on the scores; ``D ** -0.5`` by default.
        key_lengths: int64 ``[B]``: keys from this one on are padding.
        key_mask: bool ``[B, T]``: True where a key may be seen, False for padding anywhere.
        query_start: int64 ``[B]`` or one element: the key at which the first query stands;
            ``T - S`` by default. A preallocated cache gives its fill level here.
        sliding_window: query at key ``p`` sees only keys ``t`` with ``p - t < sliding_window`` and
            ``t - p < sliding_window``. The prefix stays visible.
        dropout_p: probability that an attention weight is dropped, in [0, 1).
        seed: int64 tensor with one element (:func:`new_seed`), needed when ``dropout_p > 0``.

    Returns:
        ``[B, Hq, S, D]`` in q's dtype, laid out as a contiguous ``[B, S, Hq, D]``; zeros where a
        query sees no key.

    Raises:
        ValueError: a shape, dtype, device or number does not fit; the message names it.
        RuntimeError: on a second derivative, which the kernels do not have.
    """
    dtype = autocast_dtype(q.device.type)
    if dtype is not None:
        q, k, v = q.to(dtype), k.to(dtype), v.to(dtype)
        prefix_k = None if prefix_k is None else prefix_k.to(dtype)
        prefix_v = None if prefix_v is None else prefix_v.to(dtype)
    _check_operands(
        q, k, v, prefix_k, prefix_v, causal, key_lengths, key_mask, query_start, sliding_window
    )
    check_dropout(dropout_p, seed)
    return reference.prefix_attention(
        q,
        k,
        v,
        prefix_k,
        prefix_v,
        causal=causal,
        scale=scale,
        key_lengths=key_lengths,
        key_mask=key_mask,
        query_start=query_start,
        sliding_window=sliding_window,
        dropout_p=dropout_p,
        seed=seed,
    )
