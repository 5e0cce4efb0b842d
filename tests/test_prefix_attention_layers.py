"""PrefixAttention and PrefixMultiheadAttention against float64 and torch."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
from prefix_models import before, rand
from torch import Tensor, nn

from fused_peft import ops
from fused_peft.nn.prefix_attention import PrefixAttention, PrefixMultiheadAttention


def exact(
    q: Tensor, k: Tensor, v: Tensor, layer: PrefixAttention, mask: Tensor | None, scale: float
) -> Tensor:
    """Float64 attention over the joined keys, head by head."""
    batch, heads, queries, _ = q.shape
    out = torch.empty(batch, heads, queries, v.shape[-1], dtype=torch.float64)
    for b in range(batch):
        for h in range(heads):
            group = h // (heads // k.shape[1])
            keys = torch.cat((layer.prefix_k[group], k[b, group])).double()
            values = torch.cat((layer.prefix_v[group], v[b, group])).double()
            scores = q[b, h].double() @ keys.t() * scale
            if mask is not None:
                own = mask.expand(batch, heads, queries, k.shape[2])[b, h]
                if own.dtype == torch.bool:
                    own = torch.zeros(own.shape).masked_fill(~own, -math.inf)
                scores[:, layer.num_virtual_tokens :] += own.double()
            out[b, h] = scores.softmax(-1) @ values
    return out


MASKS = {
    "none": (None, False),
    "causal": (None, True),
    "padding": (torch.tensor([True, True, False, True, False, True, True]), False),
    "padding of a batch": (rand(2, 1, 1, 7) > -0.5, False),
    "all keys hidden in a row": (torch.tensor([[[[False] * 7]], [[[True] * 7]]]), False),
    "bool": (rand(6, 7) > 0, False),
    "bool of heads": (rand(2, 4, 6, 7) > 0, False),
    "keys of a head": (rand(2, 4, 1, 7) > -0.5, False),
    "additive": (rand(1, 4, 6, 7), False),
    "minus infinity": (rand(6, 7).masked_fill(rand(6, 7, seed=3) > 0, -math.inf), False),
}


@pytest.mark.parametrize("name", MASKS)
@pytest.mark.parametrize("scale", [None, 0.3])
def test_prefix_attention_against_float64(name: str, scale: float | None) -> None:
    mask, causal = MASKS[name]
    torch.manual_seed(0)
    layer = PrefixAttention(2, 8, 3)
    q, k, v = rand(2, 4, 6, 8), rand(2, 2, 7, 8, seed=2), rand(2, 2, 7, 8, seed=3)
    out = layer(q, k, v, mask, 0.0, causal, scale, enable_gqa=True)
    if causal:  # torch's alignment: top left
        mask = torch.ones(6, 7, dtype=torch.bool).tril()
    expected = exact(q, k, v, layer, mask, 8**-0.5 if scale is None else scale)
    torch.testing.assert_close(out.double(), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", MASKS)
def test_which_masks_run_the_op(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[Any] = []
    original = ops.prefix_attention
    monkeypatch.setattr(
        ops, "prefix_attention", lambda *a, **k: (calls.append(k), original(*a, **k))[1]
    )
    mask, causal = MASKS[name]
    layer = PrefixAttention(4, 8, 3)
    layer(rand(2, 4, 6, 8), rand(2, 4, 7, 8), rand(2, 4, 7, 8), mask, is_causal=causal)
    assert bool(calls) == (name in ("none", "causal") or "padding" in name or "hidden" in name)


@pytest.mark.parametrize("name", ["causal", "additive"])
def test_prefix_attention_gradients(name: str) -> None:
    mask, causal = MASKS[name]
    layer = PrefixAttention(2, 8, 3)
    inputs = [rand(2, 4, 6, 8), rand(2, 2, 7, 8, seed=2), rand(2, 2, 7, 8, seed=3)]
    inputs = [x.requires_grad_() for x in inputs]
    weight = rand(2, 4, 6, 8, seed=5)
    wanted = [*inputs, layer.prefix_k, layer.prefix_v]
    out = layer(*inputs, mask, is_causal=causal, enable_gqa=True)
    got = torch.autograd.grad((out * weight).sum(), wanted)
    if causal:
        mask = torch.ones(6, 7, dtype=torch.bool).tril()
    expected = torch.autograd.grad((exact(*inputs, layer, mask, 8**-0.5) * weight).sum(), wanted)
    for mine, true in zip(got, expected, strict=True):
        torch.testing.assert_close(mine, true, rtol=1e-4, atol=1e-5)


def test_dropout_keeps_the_mean() -> None:
    layer = PrefixAttention(1, 8, 3)
    q, k = rand(1, 1, 2, 8), rand(1, 1, 5, 8)
    torch.manual_seed(0)
    v = torch.ones(1, 1, 5, 8)
    with torch.no_grad():
        layer.prefix_v.fill_(1.0)
        outs = torch.stack([layer(q, k, v, dropout_p=0.5) for _ in range(400)])
    assert outs.std() > 0.1
    assert outs.mean().item() == pytest.approx(1.0, abs=0.1)


def test_prefix_attention_refuses() -> None:
    layer = PrefixAttention(2, 8, 3, init="zero")
    assert layer.prefix_k.abs().max() == 0
    q, k = rand(1, 4, 6, 8), rand(1, 2, 6, 8)
    with pytest.raises(ValueError, match="attn_mask and is_causal are both given"):
        layer(k, k, k, torch.ones(6, 6, dtype=torch.bool), is_causal=True)
    with pytest.raises(ValueError, match="query has 4 heads; expected 2, or enable_gqa=True"):
        layer(q, k, k)
    with pytest.raises(ValueError, match=r"prefix_k has shape \(2, 3, 8\)"):
        layer(q, rand(1, 1, 6, 8), rand(1, 1, 6, 8), enable_gqa=True)
    with pytest.raises(ValueError, match="init is 'one'"):
        PrefixAttention(2, 8, 3, init="one")
    with pytest.raises(ValueError, match="num_virtual_tokens is 0"):
        PrefixAttention(2, 8, 0)


# PrefixMultiheadAttention: with the projections of real tokens as its prefix it must give what the
# original gives with those tokens before its keys.


def pair(
    batch_first: bool = True, **kwargs: Any
) -> tuple[nn.MultiheadAttention, PrefixMultiheadAttention, Tensor, Tensor]:
    torch.manual_seed(0)
    mha = nn.MultiheadAttention(16, 4, batch_first=batch_first, **kwargs).eval()
    for parameter in mha.parameters():
        nn.init.normal_(parameter, std=0.3)
    mine = PrefixMultiheadAttention.from_multihead_attention(mha, num_virtual_tokens=3)
    keys, values = rand(3, mha.kdim, seed=5), rand(3, mha.vdim, seed=6)
    with torch.no_grad():
        _, k, v = mine._project(rand(1, 1, 16), keys[None], values[None])
        mine.prefix.prefix_k.copy_(k[0])
        mine.prefix.prefix_v.copy_(v[0])
    return mha, mine, keys, values


def widened(mask: Tensor | None) -> Tensor | None:
    return None if mask is None else nn.functional.pad(mask, (3, 0))


PADDING = torch.tensor([[False] * 5, [True, True, False, False, True]])


CAUSAL = torch.ones(5, 5, dtype=torch.bool).triu(1)


@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("need_weights", [True, False])
@pytest.mark.parametrize(
    "masks",
    [
        {},
        {"key_padding_mask": PADDING},
        {"attn_mask": CAUSAL},
        {"attn_mask": CAUSAL, "is_causal": True},
        {"attn_mask": CAUSAL, "is_causal": True, "key_padding_mask": PADDING},
        {"attn_mask": CAUSAL, "key_padding_mask": PADDING},
        {"attn_mask": rand(5, 5), "key_padding_mask": rand(2, 5)},
        {"attn_mask": rand(8, 5, 5) > 0.5, "key_padding_mask": PADDING},
        {
            "attn_mask": torch.zeros(5, 5).masked_fill(CAUSAL, -math.inf),
            "is_causal": True,
            "key_padding_mask": rand(2, 5),
        },
    ],
)
def test_as_torch_with_the_tokens_before_the_keys(
    batch_first: bool, need_weights: bool, masks: dict[str, Any]
) -> None:
    mha, mine, keys, values = pair(batch_first)
    x = rand(2, 5, 16) if batch_first else rand(5, 2, 16)
    out, weights = mine(x, x, x, need_weights=need_weights, **masks)
    wide = {
        "key_padding_mask": widened(masks.get("key_padding_mask")),
        "attn_mask": widened(masks.get("attn_mask")),
    }
    joined = before(keys, x, batch_first), before(values, x, batch_first)
    expected, true_weights = mha(x, *joined, need_weights=need_weights, **wide)
    torch.testing.assert_close(out, expected, rtol=1e-4, atol=1e-5)
    if need_weights:
        torch.testing.assert_close(weights, true_weights, rtol=1e-4, atol=1e-5)
    else:
        assert weights is None


def test_weights_of_single_heads_other_sizes_unbatched_and_without_bias() -> None:
    mha, mine, keys, values = pair(kdim=6, vdim=10, bias=False)
    q, k, v = rand(5, 16), rand(7, 6), rand(7, 10)
    joined = before(keys, k, True), before(values, v, True)
    for average in (True, False):
        got = mine(q, k, v, average_attn_weights=average, attn_mask=rand(5, 7))
        true = mha(q, *joined, average_attn_weights=average, attn_mask=widened(rand(5, 7)))
        for a, b in zip(got, true, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
    padding = torch.tensor([False, True] * 3 + [False])
    out, _ = mine(q, k, v, key_padding_mask=padding, need_weights=False)
    true_out, _ = mha(q, *joined, key_padding_mask=widened(padding))
    torch.testing.assert_close(out, true_out, rtol=1e-4, atol=1e-5)


def test_without_weights_the_op_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[Any] = []
    original = ops.prefix_attention
    monkeypatch.setattr(
        ops, "prefix_attention", lambda *a, **k: (calls.append(k), original(*a, **k))[1]
    )
    _, mine, _, _ = pair()
    x = rand(2, 5, 16)
    mine(x, x, x, need_weights=False, attn_mask=CAUSAL, is_causal=True, key_padding_mask=PADDING)
    assert len(calls) == 1
    assert calls[0]["causal"]
    mine(x, x, x)
    assert len(calls) == 1


def test_weights_are_shared_and_frozen_and_only_the_prefix_learns() -> None:
    mha, mine, _, _ = pair()
    assert mine.in_proj_weight is mha.in_proj_weight
    assert mine.out_proj is mha.out_proj
    trainable = {name for name, p in mine.named_parameters() if p.requires_grad}
    assert trainable == {"prefix.prefix_k", "prefix.prefix_v"}
    assert set(mha.state_dict()) < set(mine.state_dict())
    x = rand(2, 5, 16)
    mine(x, x, x)[0].sum().backward()
    assert all((p.grad is not None) == p.requires_grad for p in mine.parameters())
    twin = copy.deepcopy(mine)
    torch.testing.assert_close(twin(x, x, x)[0], mine(x, x, x)[0])


def test_dropout_of_the_weights_in_training_only() -> None:
    _, mine, _, _ = pair(dropout=0.5)
    x = rand(2, 5, 16)
    assert not mine.training
    same = [mine(x, x, x, need_weights=False)[0] for _ in range(2)]
    assert torch.equal(*same)
    mine.train()
    for need in (True, False):
        different = [mine(x, x, x, need_weights=need)[0] for _ in range(2)]
        assert not torch.equal(*different)


@pytest.mark.parametrize("grad", [True, False])
def test_in_torch_s_encoder_layer_the_fast_path_does_not_lose_the_prefix(grad: bool) -> None:
    layer = nn.TransformerEncoderLayer(16, 4, 32, batch_first=True).eval()
    x = rand(2, 5, 16)
    mine = PrefixMultiheadAttention.from_multihead_attention(layer.self_attn, 3)
    with torch.set_grad_enabled(grad):
        bare = layer(x, src_key_padding_mask=PADDING)
        layer.self_attn = mine
        out = layer(x, src_key_padding_mask=PADDING)
        attended = mine(x, x, x, key_padding_mask=PADDING)[0]
        y = layer.norm1(x + attended)
        expected = layer.norm2(y + layer.linear2(layer.linear1(y).relu()))
    torch.testing.assert_close(out, expected)
    assert (out - bare).abs().max() > 1e-2


def test_what_cannot_be_replaced() -> None:
    with pytest.raises(TypeError, match=r"mha is a Linear; expected torch.nn.MultiheadAttention"):
        PrefixMultiheadAttention.from_multihead_attention(nn.Linear(2, 2), 3)  # type: ignore[arg-type]
    for kwargs in ({"add_bias_kv": True}, {"add_zero_attn": True}):
        mha = nn.MultiheadAttention(16, 4, **kwargs)
        with pytest.raises(ValueError, match=f"mha has {next(iter(kwargs))}=True"):
            PrefixMultiheadAttention.from_multihead_attention(mha, 3)
        assert all(p.requires_grad for p in mha.parameters())
    _, mine, _, _ = pair()
    x = rand(2, 5, 16)
    with pytest.raises(ValueError, match=r"key_padding_mask has shape \(5, 2\); expected \(2, 5\)"):
        mine(x, x, x, key_padding_mask=PADDING.t())
    with pytest.raises(ValueError, match=r"attn_mask has shape \(5, 4\)"):
        mine(x, x, x, attn_mask=CAUSAL[:, :4])
    with pytest.raises(ValueError, match="query, key and value have 3, 2 and 3 dimensions"):
        mine(x, x[0], x)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_and_autocast(dtype: torch.dtype) -> None:
    _, mine, _, _ = pair()
    x = rand(2, 5, 16)
    expected = mine(x, x, x)[0]
    with torch.autocast("cpu", dtype):
        out, _ = mine(x, x, x, need_weights=False)
    assert out.dtype == dtype
    torch.testing.assert_close(out.float(), expected, rtol=3e-2, atol=3e-2)
    half = copy.deepcopy(mine).to(dtype)
    half.prefix.float()  # a prefix in float32 over a half-precision base
    x = x.to(dtype)
    for need in (True, False):
        torch.testing.assert_close(
            half(x, x, x, need_weights=need)[0].float(), expected, rtol=3e-2, atol=3e-2
        )


def test_compiles_without_a_graph_break() -> None:
    _, mine, _, _ = pair()
    x = rand(2, 5, 16)
    compiled = torch.compile(mine, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(
        compiled(x, x, x, key_padding_mask=PADDING, need_weights=False)[0],
        mine(x, x, x, key_padding_mask=PADDING, need_weights=False)[0],
    )
