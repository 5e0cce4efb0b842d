"""Masks and operands that no attention takes: refused by name, on the fused and the plain path."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fused_peft import PrefixAttention, PrefixMultiheadAttention, use_fused_attention
from fused_peft.nn.plain_attention import plain_attention

Q = torch.randn(1, 2, 5, 4)
TRIANGLE = torch.ones(5, 5, dtype=torch.bool).tril()


def refused(run: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        run()


def test_integers_are_no_mask() -> None:
    # They would be added to the scores: a mask of 0 and 1 would hide nothing.
    layer = PrefixAttention(2, 4, 3)
    mask = TRIANGLE.long()
    message = r"is torch\.int64; expected bool or floating point"
    refused(lambda: layer(Q, Q, Q, mask), f"attn_mask {message}")
    refused(lambda: plain_attention(Q, Q, Q, mask), f"mask {message}")
    mha = PrefixMultiheadAttention.from_multihead_attention(
        nn.MultiheadAttention(8, 2, batch_first=True), 3
    )
    x = torch.randn(2, 5, 8)
    refused(lambda: mha(x, x, x, attn_mask=mask), f"attn_mask {message}")
    padding = torch.zeros(2, 5, dtype=torch.int64)
    refused(lambda: mha(x, x, x, key_padding_mask=padding), f"key_padding_mask {message}")


@pytest.mark.parametrize("dtype", [torch.bool, torch.float32])
@pytest.mark.parametrize("shape", [(1, 1, 1, 7), (5, 7), (3, 1, 5, 5), (3, 1, 1, 5), (1,) * 5])
def test_a_mask_that_does_not_broadcast(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    layer, mask = PrefixAttention(2, 4, 3), torch.ones(shape).to(dtype)
    message = r"attn_mask has shape \(.*\); expected one that broadcasts to \(1, 2, 5, 5\)"
    refused(lambda: layer(Q, Q, Q, mask), message)


@pytest.mark.parametrize("mask", [torch.zeros(()), torch.zeros(5), torch.zeros(1, 5)])
def test_a_mask_of_few_dimensions_broadcasts(mask: Tensor) -> None:
    layer = PrefixAttention(2, 4, 3)
    torch.testing.assert_close(layer(Q, Q, Q, mask), layer(Q, Q, Q))


@pytest.mark.parametrize("mask", [None, TRIANGLE])
@pytest.mark.parametrize(
    ("heads", "dim", "message"),
    [((2, 1), 4, "prefix_k has shape"), ((2, 2), 8, "prefix_k has shape"), ((3, 2), 4, "divisor")],
)
def test_operands_that_do_not_fit(
    heads: tuple[int, int], dim: int, message: str, mask: Tensor | None
) -> None:
    layer = PrefixAttention(2, 4, 3)
    query, key = torch.randn(1, heads[0], 5, dim), torch.randn(1, heads[1], 5, dim)
    refused(lambda: layer(query, key, key, mask, enable_gqa=True), message)


@pytest.mark.parametrize("need_weights", [True, False])
def test_keys_of_another_batch(need_weights: bool) -> None:
    mha = PrefixMultiheadAttention.from_multihead_attention(
        nn.MultiheadAttention(8, 2, batch_first=True), 3
    )
    x = torch.randn(2, 5, 8)
    refused(lambda: mha(x, x[:1], x, need_weights=need_weights), r"k has shape \(1, 2, 5, 4\)")
    refused(lambda: mha(x, x, x[:, :3], need_weights=need_weights), r"v has shape \(2, 2, 3, 4\)")


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_a_transformers_model_is_given_integers_in_4_dimensions(dtype: torch.dtype) -> None:
    pytest.importorskip("transformers")
    from prefix_models import model, tokens

    built: Any = model("llama")
    use_fused_attention(built)
    mask = torch.ones(3, 1, 9, 9, dtype=torch.bool).tril()
    expected = built(tokens()).logits
    torch.testing.assert_close(built(tokens(), attention_mask=mask).logits, expected)
    message = f"mask is {dtype}; expected bool or floating point"
    refused(lambda: built(tokens(), attention_mask=mask.to(dtype)), message)
