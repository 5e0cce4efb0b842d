"""Attention in plain torch with what the prefix attention op has no argument for."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .attention_masks import check_mask_dtype


def plain_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    bias: Tensor | None = None,
    *,
    dropout: float = 0.0,
    scale: float | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    weights_wanted: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """Attention in plain torch with all that the op has no argument for.

    Args:
        query: ``[B, Hq, S, D]``.
        key: ``[B, Hkv, T, D]``.
        value: ``[B, Hkv, T, Dv]``.
        mask: bool, True where a key is seen, or floating point, added to the scores; broadcasts to
            ``[B, Hq, S, T]``.
        bias: added to the scores.
        dropout: probability that a weight is dropped.
        scale: factor on the scores; ``D ** -0.5`` by default.
        softcap: scores become ``softcap * tanh(scores / softcap)`` before mask and bias.
        sinks: ``[Hq]``, a score a head that takes its part of the softmax and has no value.
        weights_wanted: also return the weights.

    Returns:
        ``[B, Hq, S, Dv]`` in value's dtype, and the weights ``[B, Hq, S, T]`` or None.

    Raises:
        ValueError: the mask is of integers.
    """
    if mask is not None:
        check_mask_dtype("mask", mask)
    groups = query.shape[1] // key.shape[1]
    if bias is not None:
        if mask is not None and mask.dtype == torch.bool:
            mask = torch.where(mask, bias, torch.finfo(bias.dtype).min)
        else:
            mask = bias if mask is None else bias + mask
    if softcap is None and sinks is None and not weights_wanted:
        if mask is not None and mask.dtype != torch.bool:
            mask = mask.to(query.dtype)
        out = F.scaled_dot_product_attention(
            query, key, value, mask, dropout, scale=scale, enable_gqa=groups > 1
        )
        return out, None
    key, value = (x.repeat_interleave(groups, dim=1) for x in (key, value))
    scores = query @ key.transpose(-1, -2) * (query.shape[-1] ** -0.5 if scale is None else scale)
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    if mask is not None and mask.dtype == torch.bool:
        scores = scores.masked_fill(~mask, torch.finfo(scores.dtype).min)
    elif mask is not None:
        scores = scores + mask
    if sinks is not None:
        column = sinks.to(scores.dtype).reshape(1, -1, 1, 1).expand(*scores.shape[:-1], 1)
        scores = torch.cat((scores, column), dim=-1)
    half = scores.dtype in (torch.float16, torch.bfloat16)
    weights = scores.softmax(dim=-1, dtype=torch.float32 if half else None).to(value.dtype)
    if sinks is not None:
        weights = weights[..., :-1]
    dropped = F.dropout(weights, dropout) if dropout > 0.0 else weights
    return dropped @ value, dropped if weights_wanted else None
