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
    update = x.to(lora_a.dtype)
    if dropout_p > 0.0:
        if seed is None:
            raise ValueError("seed is None; dropout_p > 0 needs an int64 tensor with one element")
        keep = dropout_keep(x.shape, dropout_p, seed)
        update = torch.where(keep, update / (1.0 - dropout_p), torch.zeros_like(update))
    update = F.linear(F.linear(update, lora_a), lora_b) * scaling
    return (base + update).to(base.dtype)
