"""The package's operations in plain torch: the oracle of tests and benchmarks, and the fallback.

Every function here works in any floating dtype, float64 included, on any device, and is
differentiable by torch's own autograd, so :func:`torch.autograd.gradcheck` applies to it.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional as F

# Philox4x32-10: Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011.
_PHILOX_M0, _PHILOX_M1 = 0xD2511F53, 0xCD9E8D57
_PHILOX_W0, _PHILOX_W1 = 0x9E3779B9, 0xBB67AE85
_MASK32 = 0xFFFFFFFF


def _mulhilo(a: int, b: Tensor) -> tuple[Tensor, Tensor]:
    """High and low 32 bits of ``a * b`` for 32-bit unsigned values held in int64.

    The product is put together from 16-bit halves of ``b``: the full one overflows int64.
    """
    low = a * (b & 0xFFFF)
    high = a * (b >> 16) + (low >> 16)
    return (high >> 16) & _MASK32, ((high & 0xFFFF) << 16) | (low & 0xFFFF)


def philox4x32(counter: Tensor, seed: Tensor) -> Tensor:
    """Philox4x32-10 random words.

    Args:
        counter: int64 ``[n]``, the low 64 bits of the 128-bit counter; the high ones are 0.
        seed: int64 with one element, the 64-bit key.

    Returns:
        int64 ``[n, 4]``, each a 32-bit unsigned word.
    """
    key = seed.reshape(()).to(torch.int64)
    k0, k1 = key & _MASK32, (key >> 32) & _MASK32
    c0, c1 = counter & _MASK32, (counter >> 32) & _MASK32
    c2, c3 = torch.zeros_like(c0), torch.zeros_like(c0)
    for _ in range(10):
        hi0, lo0 = _mulhilo(_PHILOX_M0, c0)
        hi1, lo1 = _mulhilo(_PHILOX_M1, c2)
        c0, c1, c2, c3 = hi1 ^ c1 ^ k0, lo1, hi0 ^ c3 ^ k1, lo0
        k0, k1 = (k0 + _PHILOX_W0) & _MASK32, (k1 + _PHILOX_W1) & _MASK32
    return torch.stack((c0, c1, c2, c3), dim=-1)


def dropout_threshold(dropout_p: float) -> int:
    """Elements whose 32-bit word is below this are dropped: ``round(p * 2**32)``."""
    return min(_MASK32, math.floor(dropout_p * 2.0**32 + 0.5))


def dropout_keep(shape: torch.Size | tuple[int, ...], dropout_p: float, seed: Tensor) -> Tensor:
    """The mask that every kernel of the package regenerates from ``seed``.

    Element ``i`` of the row-major order of ``shape`` is dropped when word ``i % 4`` of
    ``philox4x32(i // 4, seed)`` is below :func:`dropout_threshold`.

    Returns:
        bool tensor of ``shape``, True where the element is kept.
    """
    numel = math.prod(shape)
    counter = torch.arange((numel + 3) // 4, dtype=torch.int64, device=seed.device)
    words = philox4x32(counter, seed).reshape(-1)[:numel]
    return (words >= dropout_threshold(dropout_p)).reshape(shape)


def lora_linear(
    x: Tensor,
    weight: Tensor,
    lora_a: Tensor,
    lora_b: Tensor,
    bias: Tensor | None = None,
    *,
    scaling: float,
    dropout_p: float = 0.0,
    seed: Tensor | None = None,
) -> Tensor:
    """``y = x W^T + bias + scaling * (drop(x) lora_a^T) lora_b^T`` in PEFT's order of ops.

    Hu et al., "LoRA: Low-Rank Adaptation of Large Language Models", 2021, equation 3. The base
    output is rounded to x's dtype, the adapter is computed in lora_a's dtype, and the sum is
    rounded once more, as PEFT does it.

    Args:
        x: ``[..., K]``.
        weight: ``[N, K]``.
        lora_a: ``[R, K]``.
        lora_b: ``[N, R]``.
        bias: ``[N]``.
        scaling: the factor on the low-rank update.
        dropout_p: probability that an element of x is dropped before lora_a.
        seed: int64 with one element, needed when ``dropout_p > 0``.

    Returns:
        ``[..., N]`` in x's dtype.
    """
    base = F.linear(x, weight, bias)
    return lora_update(base, x, lora_a, lora_b, scaling=scaling, dropout_p=dropout_p, seed=seed)


def lora_update(
    base: Tensor,
    x: Tensor,
    lora_a: Tensor,
    lora_b: Tensor,
    *,
    scaling: float,
    dropout_p: float = 0.0,
    seed: Tensor | None = None,
) -> Tensor:
    """``y = base + scaling * (drop(x) lora_a^T) lora_b^T``: what :func:`lora_linear` does to base.

    Args:
        base: ``[..., N]``.
        x: ``[..., K]``.
        lora_a: ``[R, K]``.
        lora_b: ``[N, R]``.
        scaling: the factor on the low-rank update.
        dropout_p: probability that an element of x is dropped before lora_a.
        seed: int64 with one element, needed when ``dropout_p > 0``.

    Returns:
        ``[..., N]`` in base's dtype.
    """
    update = x.to(lora_a.dtype)
    if dropout_p > 0.0:
        if seed is None:
            raise ValueError("seed is None; dropout_p > 0 needs an int64 tensor with one element")
        keep = dropout_keep(x.shape, dropout_p, seed)
        update = torch.where(keep, update / (1.0 - dropout_p), torch.zeros_like(update))
    update = F.linear(F.linear(update, lora_a), lora_b) * scaling
    return (base + update).to(base.dtype)


def attention_keep(
    queries: int,
    keys: int,
    *,
    causal: bool,
    batch: int = 1,
    key_lengths: Tensor | None = None,
    key_mask: Tensor | None = None,
    query_start: Tensor | None = None,
    sliding_window: int | None = None,
    device: torch.device | str | None = None,
) -> Tensor:
    """Which of the sequence's own keys each query of :func:`prefix_attention` sees.

    Query ``i`` of a row stands at key ``p = query_start + i``. It sees key ``t`` where all of these
    hold: ``t < key_lengths``, ``key_mask[t]``, ``t <= p`` if causal, and, with a sliding window,
    ``p - t < sliding_window`` (and ``t - p < sliding_window`` if not causal).

    Returns:
        bool ``[batch, queries, keys]``, True where the key is seen.
    """
    t = torch.arange(keys, device=device)
    start = keys - queries if query_start is None else query_start.reshape(-1, 1, 1)
    p = start + torch.arange(queries, device=device)[:, None]
    keep = torch.ones(batch, queries, keys, dtype=torch.bool, device=device)
    if causal:
        keep = keep & (t <= p)
    if sliding_window is not None:
        keep = keep & (p - t < sliding_window) & (t - p < sliding_window)
    if key_lengths is not None:
        keep = keep & (t < key_lengths.reshape(-1, 1, 1))
    if key_mask is not None:
        keep = keep & key_mask[:, None, :]
    return keep


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
    """``softmax([q prefix_k^T, mask(q k^T)] scale) [prefix_v; v]`` in plain torch.

    Li and Liang, "Prefix-Tuning: Optimizing Continuous Prompts for Generation", 2021, equation 7
    of He et al., "Towards a Unified View of Parameter-Efficient Transfer Learning", 2022. The
    softmax of a half-precision problem is computed in float32 and rounded, as transformers' eager
    attention does it. Shapes and meanings as in :func:`fused_peft.prefix_attention`.

    Returns:
        ``[B, Hq, S, D]`` in q's dtype; zeros where a query sees no key.
    """
    batch, q_heads, queries, head_dim = q.shape
    kv_heads, keys = k.shape[1], k.shape[2]
    keep = attention_keep(
        queries,
        keys,
        causal=causal,
        batch=batch,
        key_lengths=key_lengths,
        key_mask=key_mask,
        query_start=query_start,
        sliding_window=sliding_window,
        device=q.device,
    )
    if prefix_k is not None and prefix_v is not None:
        k = torch.cat((prefix_k.expand(batch, -1, -1, -1), k), dim=2)
        v = torch.cat((prefix_v.expand(batch, -1, -1, -1), v), dim=2)
        keep = F.pad(keep, (prefix_k.shape[-2], 0), value=True)
    grouped = q.reshape(batch, kv_heads, q_heads // kv_heads, queries, head_dim)
    scores = grouped @ k[:, :, None].transpose(-1, -2)
    scores = scores * (head_dim**-0.5 if scale is None else scale)
    scores = scores if q.dtype == torch.float64 else scores.float()
    keep = keep[:, None, None]
    # The largest finite negative number, not -inf: a row of -inf has a NaN softmax.
    scores = scores.masked_fill(~keep, torch.finfo(scores.dtype).min)
    weights = scores.softmax(dim=-1).masked_fill(~keep, 0.0)
    if dropout_p > 0.0:
        if seed is None:
            raise ValueError("seed is None; dropout_p > 0 needs an int64 tensor with one element")
        kept = dropout_keep((batch, q_heads, queries, k.shape[2]), dropout_p, seed)
        weights = torch.where(kept.reshape(weights.shape), weights / (1.0 - dropout_p), 0.0)
    out = weights.to(q.dtype) @ v[:, :, None]
    return out.reshape(batch, q_heads, queries, head_dim)


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """``x / sqrt(mean(x^2) + eps) * weight`` in the order of transformers' LlamaRMSNorm.

    Zhang and Sennrich, "Root Mean Square Layer Normalization", 2019, equation 4.

    Args:
        x: ``[..., H]``.
        weight: ``[H]``.
        eps: added to the mean square.

    Returns:
        ``[..., H]`` in x's dtype.
    """
    wide = x if x.dtype == torch.float64 else x.float()
    normed = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)
    return (weight * normed.to(x.dtype)).to(x.dtype)


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """``silu(gate) * up``: Shazeer, "GLU Variants Improve Transformer", 2020, equation 6."""
    return F.silu(gate) * up


def cross_entropy(logits: Tensor, labels: Tensor, ignore_index: int = -100) -> Tensor:
    """``-log softmax(logits)[label]`` of each row, in float32 at least; 0 at ``ignore_index``.

    Args:
        logits: ``[M, V]``.
        labels: int64 ``[M]``.
        ignore_index: the label of rows that do not count.

    Returns:
        ``[M]``, float64 for float64 logits, else float32.
    """
    wide = logits if logits.dtype == torch.float64 else logits.float()
    return F.cross_entropy(wide, labels, ignore_index=ignore_index, reduction="none")
