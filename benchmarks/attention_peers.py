"""The attentions that bench_prefix_attention.py compares, on tensors [B, H, S, D].

bare        scaled_dot_product_attention without the prefix: the floor of every unfused design
concat      the prefix expanded over the batch and concatenated with k and v, then SDPA with the
            mask that makes the prefix visible: what PEFT and transformers do
flash       the same concatenation, with SDPA's causal bias aligned at the lower right in place of a
            mask tensor, which keeps its flash kernel usable
flex        the same concatenation, compiled FlexAttention with a block mask
flash-attn  the same concatenation, Dao-AILab's flash_attn_func, where it is installed
ours        fused_peft.prefix_attention
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention.bias import causal_lower_right

from fused_peft import prefix_attention

PEERS = ("bare", "concat", "flash", "flex", "flash-attn", "ours")
Attention = Callable[..., Tensor]


def available(name: str) -> bool:
    """Whether a peer can run in this environment."""
    return name != "flash-attn" or importlib.util.find_spec("flash_attn") is not None


def build(
    names: list[str], batch: int, queries: int, keys: int, prefix: int, device: str
) -> dict[str, Attention]:
    """The peers asked for, each ``(q, k, v, prefix_k, prefix_v) -> out``."""

    def whole(cache: Tensor, learned: Tensor) -> Tensor:
        return torch.cat((learned.expand(batch, -1, -1, -1), cache), dim=2)

    def concat() -> Attention:
        # One query sees all keys: no mask is needed, and SDPA is faster without.
        mask = None
        if queries > 1:
            mask = torch.ones(queries, keys, dtype=torch.bool, device=device).tril(keys - queries)
            mask = F.pad(mask, (prefix, 0), value=True)
        return lambda q, k, v, prefix_k, prefix_v: F.scaled_dot_product_attention(
            q, whole(k, prefix_k), whole(v, prefix_v), attn_mask=mask, enable_gqa=True
        )

    def flash() -> Attention:
        bias = causal_lower_right(queries, prefix + keys)
        return lambda q, k, v, prefix_k, prefix_v: F.scaled_dot_product_attention(
            q, whole(k, prefix_k), whole(v, prefix_v), attn_mask=bias, enable_gqa=True
        )

    def flex() -> Attention:
        from torch.nn.attention.flex_attention import create_block_mask, flex_attention

        offset = prefix + keys - queries
        mask = create_block_mask(
            lambda b, h, i, j: j <= i + offset, None, None, queries, prefix + keys, device=device
        )
        compiled = torch.compile(flex_attention)
        return lambda q, k, v, prefix_k, prefix_v: compiled(
            q, whole(k, prefix_k), whole(v, prefix_v), block_mask=mask, enable_gqa=True
        )

    def flash_attn() -> Attention:
        from flash_attn import flash_attn_func

        def run(q: Tensor, k: Tensor, v: Tensor, prefix_k: Tensor, prefix_v: Tensor) -> Tensor:
            k, v = whole(k, prefix_k), whole(v, prefix_v)
            # [B, S, H, D]; its causal mask is aligned at the lower right.
            out = flash_attn_func(*(t.transpose(1, 2) for t in (q, k, v)), causal=True)
            assert isinstance(out, Tensor)
            return out.transpose(1, 2)

        return run

    makers: dict[str, Callable[[], Attention]] = {
        "bare": lambda: (
            lambda q, k, v, _k, _v: F.scaled_dot_product_attention(
                q, k, v, is_causal=queries > 1, enable_gqa=True
            )
        ),
        "concat": concat,
        "flash": flash,
        "flex": flex,
        "flash-attn": flash_attn,
        "ours": lambda: lambda *operands: prefix_attention(*operands, causal=True),
    }
    return {name: makers[name]() for name in names}
