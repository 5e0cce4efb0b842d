"""The masks that torch's attention takes, checked and in the forms that the package's takes."""

from __future__ import annotations

import torch
from torch import Tensor


def check_mask_dtype(name: str, mask: Tensor) -> None:
    """Raise ValueError for integers, which added to the scores would hide nothing."""
    if mask.dtype != torch.bool and not mask.is_floating_point():
        raise ValueError(f"{name} is {mask.dtype}; expected bool or floating point")


def in_4_dimensions(mask: Tensor, query: Tensor, key: Tensor) -> Tensor:
    """The mask as it broadcasts to ``[B, Hq, S, T]``.

    Raises:
        ValueError: it does not, or is of integers.
    """
    check_mask_dtype("attn_mask", mask)
    if query.dim() != 4 or key.dim() != 4:
        return mask  # which is not what is wrong
    scores = (*query.shape[:3], key.shape[2])
    if mask.dim() > 4 or any(
        m not in (1, n) for m, n in zip(reversed(mask.shape), reversed(scores), strict=False)
    ):
        raise ValueError(
            f"attn_mask has shape {tuple(mask.shape)}; expected one that broadcasts to "
            f"{tuple(scores)}"
        )
    return mask.reshape((1,) * (4 - mask.dim()) + tuple(mask.shape))


def as_key_mask(mask: Tensor | None, query: Tensor, key: Tensor) -> Tensor | None:
    """Bool ``[B, T]`` if the mask hides the same keys from every query and head."""
    if mask is None or mask.dtype != torch.bool or mask.dim() != 4 or mask.shape[1:3] != (1, 1):
        return None
    return mask[:, 0, 0].expand(query.shape[0], key.shape[2])


def shown(
    attn_mask: Tensor | None, q_shape: torch.Size, keys: int, dtype: torch.dtype
) -> Tensor | None:
    """A mask of nn.MultiheadAttention as ``scaled_dot_product_attention`` takes it."""
    if attn_mask is None:
        return None
    check_mask_dtype("attn_mask", attn_mask)
    batch, heads, queries, _ = q_shape
    if tuple(attn_mask.shape) == (queries, keys):
        attn_mask = attn_mask[None, None]
    elif tuple(attn_mask.shape) == (batch * heads, queries, keys):
        attn_mask = attn_mask.view(batch, heads, queries, keys)
    else:
        raise ValueError(
            f"attn_mask has shape {tuple(attn_mask.shape)}; expected {(queries, keys)} or "
            f"{(batch * heads, queries, keys)}"
        )
    return ~attn_mask if attn_mask.dtype == torch.bool else attn_mask.to(dtype)


def both(
    mask: Tensor | None, key_mask: Tensor | None, added: Tensor | None = None
) -> Tensor | None:
    """One mask for all of them: bool, or additive where one is."""
    if key_mask is not None:
        hidden = key_mask[:, None, None, :]
        if mask is None:
            mask = hidden
        elif mask.dtype == torch.bool:
            mask = mask & hidden
        else:
            mask = mask.masked_fill(~hidden, float("-inf"))
    if added is None:
        return mask
    if mask is None:
        return added
    if mask.dtype == torch.bool:
        return added.masked_fill(~mask, float("-inf"))
    return mask + added
