"""The prefix attention op: shape functions, autograd, the choice of kernel or fallback."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fused_peft import _C, reference

from ._autograd import DifferentiableOp, Gradients, Kernel
from ._common import (
    KERNEL_DTYPES,
    autocast,
    autocast_dtype,
    check_dropout,
    differentiated_otherwise,
)
from ._devices import CUDA_DTYPES, kernel_device

MAX_HEAD_DIM: int = _C.max_head_dim


def attention_fallback_reason(
    q: Tensor, scale: float | None = None, dropout_p: float = 0.0
) -> str | None:
    """Why no kernel covers the problem, or None where one does.

    Args:
        q: ``[B, Hq, S, D]``.
        scale: the factor on the scores, None for the default.
        dropout_p: probability that an attention weight is dropped.
    """
    device, reason = kernel_device(q)
    if device is None:
        return reason.replace("x is on", "q is on")
    if q.dtype not in KERNEL_DTYPES:
        return f"q is {q.dtype}; kernels exist for float32, bfloat16 and float16"
    head_dim = q.shape[-1]
    if head_dim > MAX_HEAD_DIM:
        return f"the head dimension is {head_dim}; kernels exist up to {MAX_HEAD_DIM}"
    if scale is not None and not 0.0 < scale < float("inf"):
        return f"scale is {scale}; kernels take positive ones"
    return None if device == "cpu" else _cuda_fallback_reason(q, dropout_p)


def _cuda_fallback_reason(q: Tensor, dropout_p: float) -> str | None:
    if q.dtype not in CUDA_DTYPES:
        return f"q is {q.dtype}; CUDA kernels exist for bfloat16 and float16"
    if q.shape[-1] % 8 != 0:
        return f"the head dimension is {q.shape[-1]}; CUDA kernels take multiples of 8"
    if dropout_p > 0.0:
        return f"dropout_p is {dropout_p}; CUDA kernels have no attention dropout"
    return None


def check_operands(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    prefix_k: Tensor | None,
    prefix_v: Tensor | None,
    causal: bool = False,
    key_lengths: Tensor | None = None,
    key_mask: Tensor | None = None,
    query_start: Tensor | None = None,
    sliding_window: int | None = None,
) -> None:
    """Raise ValueError as :func:`prefix_attention` does, but for dropout."""
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
    autocast these five are cast to the autocast dtype unless they are float64.

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
        seed: int64 tensor with one element (:func:`.new_seed`), needed when ``dropout_p > 0``.

    Returns:
        ``[B, Hq, S, D]`` in q's dtype, laid out as a contiguous ``[B, S, Hq, D]``; zeros where a
        query sees no key.

    Raises:
        ValueError: a shape, dtype, device or number does not fit; the message names it.
        RuntimeError: on a second derivative, which the kernels do not have.
    """
    dtype = autocast_dtype(q.device.type)
    if dtype is not None:
        q, k, v = autocast(q, dtype), autocast(k, dtype), autocast(v, dtype)
        prefix_k = None if prefix_k is None else autocast(prefix_k, dtype)
        prefix_v = None if prefix_v is None else autocast(prefix_v, dtype)
    check_operands(
        q, k, v, prefix_k, prefix_v, causal, key_lengths, key_mask, query_start, sliding_window
    )
    check_dropout(dropout_p, seed)
    if attention_fallback_reason(q, scale, dropout_p) is None and not differentiated_otherwise():
        scale = q.shape[-1] ** -0.5 if scale is None else scale
        return _kernels(q, k, v, prefix_k, prefix_v, key_lengths, key_mask, query_start, causal,
                        sliding_window or 0, scale, dropout_p, seed)  # fmt: skip
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


# ---- shape functions and autograd ----------------------------------------------------------------


def _new_heads(like: Tensor, heads: int, length: int) -> Tensor:
    return like.new_empty((like.shape[0], length, heads, like.shape[3])).transpose(1, 2)


def _fake(q: Tensor, *_others: Any) -> tuple[Tensor, Tensor]:
    batch, heads, queries, _ = q.shape
    lse_dtype = torch.float64 if q.dtype == torch.float32 else torch.float32
    return _new_heads(q, heads, queries), q.new_empty((batch, heads, queries), dtype=lse_dtype)


def _backward_fake(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    prefix_k: Tensor | None,
    prefix_v: Tensor | None,
    *others: Any,
) -> tuple[Tensor, ...]:
    heads, keys = k.shape[1], k.shape[2]
    need_q, need_k, need_v, need_prefix_k, need_prefix_v = others[-5:]

    def prefix_like(needed: bool, prefix: Tensor | None) -> Tensor:
        return q.new_empty(prefix.shape if needed and prefix is not None else (0,))

    return (
        _new_heads(q, q.shape[1], q.shape[2]) if need_q else q.new_empty((0,)),
        _new_heads(q, heads, keys) if need_k else q.new_empty((0,)),
        _new_heads(q, heads, keys) if need_v else q.new_empty((0,)),
        prefix_like(need_prefix_k, prefix_k),
        prefix_like(need_prefix_v, prefix_v),
    )


def _save(ctx: Any, operands: tuple[Any, ...], out: Tensor, lse: Tensor) -> None:
    *tensors, causal, window, scale, dropout_p, seed = operands
    ctx.save_for_backward(*tensors, out, lse, seed)
    ctx.options = (causal, window, scale, dropout_p)


def _gradients(ctx: Any, dout: Tensor, backward: Kernel) -> Gradients:
    *tensors, out, lse, seed = ctx.saved_tensors  # may run a checkpointed forward
    needs = ctx.needs_input_grad[:5]
    return backward(dout, *tensors[:5], out, lse, *tensors[5:], *ctx.options, seed, *needs)


_kernels = DifferentiableOp(
    "prefix_attention",
    fake=_fake,
    backward_fake=_backward_fake,
    save=_save,
    gradients=_gradients,
)
