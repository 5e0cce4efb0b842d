"""The sum of one layer's adapters in as few products as their dropouts allow."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from .. import ops


class Adapter(NamedTuple):
    """What one adapter adds: ``scaling * ((drop(x) lora_a^T) lora_b^T + lora_bias)``."""

    lora_a: Tensor  # [R, K]
    lora_b: Tensor  # [N, R]
    scaling: float | Tensor  # PEFT makes tensors of them for hot-swapping into a compiled model
    dropout_p: float = 0.0
    lora_bias: Tensor | None = None  # [N]


class Term(NamedTuple):
    """``scaling * (drop(x) lora_a^T) lora_b^T``: several adapters where none of them drops."""

    lora_a: Tensor  # [R, K]
    lora_b: Tensor  # [N, R]
    scaling: float
    dropout_p: float


def groups(dropout_p: Sequence[float]) -> list[list[int]]:
    """Which adapters make one term: those that drop nothing the first, each other one its own."""
    whole = [i for i, p in enumerate(dropout_p) if p == 0.0]
    return ([whole] if whole else []) + [[i] for i, p in enumerate(dropout_p) if p > 0.0]


def joined(adapters: Sequence[Adapter]) -> list[Term]:
    """The same sum without the biases, a term for each of :func:`groups`."""
    found = groups([adapter.dropout_p for adapter in adapters])
    return [_side_by_side([adapters[i] for i in group]) for group in found]


def _side_by_side(adapters: Sequence[Adapter]) -> Term:
    """Several adapters as one, along the rank: ``sum s_i B_i A_i = [s_i B_i] [A_i]``."""
    lora_a, lora_b = [a.lora_a for a in adapters], [a.lora_b for a in adapters]
    common, dropout_p = adapters[0].scaling, adapters[0].dropout_p
    alike = not any(isinstance(a.scaling, Tensor) or a.scaling != common for a in adapters)
    if alike and len(adapters) == 1:
        return Term(lora_a[0], lora_b[0], float(common), dropout_p)
    if not alike or len({factor.dtype for factor in (*lora_a, *lora_b)}) > 1:
        # Scaled in float32 at least: a half lora_b times its scaling would be rounded twice.
        dtype = torch.float32
        for factor in (*lora_a, *lora_b):
            dtype = torch.promote_types(dtype, factor.dtype)
        lora_a = [a.to(dtype) for a in lora_a]
        lora_b = [b.to(dtype) * a.scaling for a, b in zip(adapters, lora_b, strict=True)]
        common = 1.0
    return Term(torch.cat(lora_a), torch.cat(lora_b, dim=1), float(common), dropout_p)


def _seed_like(x: Tensor) -> Tensor:
    return ops.new_seed(x.device)


def linear_with_adapters(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    adapters: Sequence[Adapter],
    new_seed: Callable[[Tensor], Tensor] = _seed_like,
    dropout: Callable[[Tensor, float], Tensor] = F.dropout,
) -> Tensor:
    """``x W^T + bias + sum of scaling * ((drop(x) lora_a^T) lora_b^T + lora_bias)`` in x's dtype.

    The first term of :func:`joined` is part of the base product's one pass; each one after it is a
    product of its own, as in PEFT, with a mask of its own.

    Args:
        x: ``[..., K]``.
        weight: ``[N, K]``, frozen.
        bias: ``[N]``.
        adapters: at least one.
        new_seed: the seed of the first term's dropout, from x.
        dropout: x with elements dropped at a probability above 0, for the other terms.
    """
    first, *others = joined(adapters)
    y = ops.lora_linear(
        x,
        weight,
        first.lora_a,
        first.lora_b,
        bias,
        scaling=first.scaling,
        dropout_p=first.dropout_p,
        seed=new_seed(x) if first.dropout_p else None,
    )
    dtype = y.dtype
    for term in others:
        low = F.linear(dropout(x.to(term.lora_a.dtype), term.dropout_p), term.lora_a)
        y = y + F.linear(low, term.lora_b) * term.scaling
    for adapter in adapters:
        if adapter.lora_bias is not None:
            y = y + adapter.lora_bias * adapter.scaling
    return y.to(dtype)
