"""The prefix attention op among torch's own: opcheck, compile, autograd, refusals, fallback."""

import pytest
import torch
from backends import relative_error
from test_attention_ops import NAMES, exact, make, run
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from fused_peft import ops, reference


@pytest.mark.parametrize("p", [0.0, 0.3])
@pytest.mark.parametrize("prefix", ["shared", "batched", None])
def test_opcheck(prefix, p):
    t = make(2, 4, 2, 9, 12, 16, 3, torch.float32, batched=prefix == "batched")
    seed = torch.tensor(3) if p else None
    leaves = [t[n].requires_grad_() for n in NAMES]
    if prefix is None:
        leaves[3:] = [None, None]
    key_lengths = torch.tensor([12, 10])
    options = (key_lengths, None, None, True, 0, 0.25, p, seed)
    namespace = torch.ops.fused_peft
    torch.library.opcheck(namespace.prefix_attention.default, (*leaves, *options))
    detached = [None if x is None else x.detach() for x in leaves]
    out, lse = namespace.prefix_attention.default(*detached, *options)
    for need in ((True,) * 5, (True, False, True, False, True)):
        torch.library.opcheck(
            namespace.prefix_attention_backward.default,
            (t["dout"], *detached, out, lse, *options, *need),
        )


@pytest.mark.parametrize("p", [0.0, 0.3])
def test_gradcheck_of_the_reference(p):
    t = make(2, 4, 2, 3, 5, 8, 2, torch.float64)
    leaves = [t[n].requires_grad_() for n in NAMES]
    options = {"causal": True, "dropout_p": p, "seed": torch.tensor(4)}
    assert ops.attention_fallback_reason(leaves[0]) is not None
    assert torch.autograd.gradcheck(lambda *x: ops.prefix_attention(*x, **options), leaves)


@pytest.mark.parametrize("dynamic", [False, True])
def test_compile_fullgraph_equals_eager(dynamic):
    torch._dynamo.reset()

    def loss(q, k, v, prefix_k, prefix_v):
        return ops.prefix_attention(q, k, v, prefix_k, prefix_v, causal=True).square().sum()

    compiled = torch.compile(loss, fullgraph=True, dynamic=dynamic)
    for length in (18, 25):
        t = make(2, 4, 2, length, length, 16, 3, torch.float32)
        leaves = [t[n].requires_grad_() for n in NAMES]
        expected = torch.autograd.grad(loss(*leaves), leaves)
        torch.testing.assert_close(torch.autograd.grad(compiled(*leaves), leaves), expected)


def test_autocast_takes_a_float32_model_to_bfloat16():
    t = make(2, 4, 2, 20, 20, 32, 5, torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        out = run(ops.prefix_attention, t | {"dout": t["dout"].bfloat16()}, causal=True)
    assert out["out"].dtype == torch.bfloat16
    for name, ref in exact(t, causal=True).items():
        assert relative_error(out[name], ref) < 1e-2, name
        assert name == "out" or out[name].dtype == torch.float32


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_gradient_checkpointing(use_reentrant):
    t = make(2, 4, 2, 20, 20, 32, 5, torch.float32)
    direct = run(ops.prefix_attention, t, causal=True)

    def through_checkpoint(*leaves):
        # Plain ops before it: its backward pass runs them again, below no autograd of its own.
        return checkpoint(
            lambda *x: ops.prefix_attention(*(2 * t.sinh().asinh() / 2 for t in x), causal=True),
            *leaves,
            use_reentrant=use_reentrant,
        )

    leaves = [t[n].detach().requires_grad_() for n in NAMES]
    through_checkpoint(*leaves).backward(t["dout"])
    for name, leaf in zip(NAMES, leaves, strict=True):
        torch.testing.assert_close(leaf.grad, direct["d" + name], rtol=1e-4, atol=1e-5)


def test_double_backward_is_refused():
    t = make(1, 2, 1, 5, 5, 16, 2, torch.float32)
    leaves = [t[n].requires_grad_() for n in NAMES]
    out = ops.prefix_attention(*leaves, causal=True)
    (dq,) = torch.autograd.grad(out.square().sum(), leaves[0], create_graph=True)
    with pytest.raises(RuntimeError, match="no second derivative"):
        dq.sum().backward()


def test_func_transforms_are_right():
    t = make(1, 2, 1, 4, 4, 8, 2, torch.float32)

    def loss(module):
        return lambda pk: (
            module.prefix_attention(t["q"], t["k"], t["v"], pk, t["prefix_v"], causal=True)
            .square()
            .sum()
        )

    for transform in (torch.func.grad, torch.func.jacfwd):
        torch.testing.assert_close(
            transform(loss(ops))(t["prefix_k"]), transform(loss(reference))(t["prefix_k"])
        )


def test_training_a_prefix_lowers_a_loss():
    torch.manual_seed(0)
    t = make(4, 2, 2, 8, 8, 16, 4, torch.float32)
    prefix = [nn.Parameter(t[n].clone()) for n in ("prefix_k", "prefix_v")]
    optimizer = torch.optim.Adam(prefix, lr=0.05)
    losses = []
    for _ in range(40):
        optimizer.zero_grad()
        out = ops.prefix_attention(t["q"], t["k"], t["v"], *prefix, causal=True)
        loss = F.mse_loss(out, torch.ones_like(out))
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"q": torch.randn(2, 4, 8)}, r"q has shape \(2, 4, 8\); expected 4 dimensions"),
        (
            {"k": torch.randn(2, 2, 6, 12)},
            r"k has shape .*12\); expected \[2, Hkv, T, 8\]",
        ),
        ({"v": torch.randn(2, 2, 5, 8)}, "v has shape"),
        ({"k": torch.randn(2, 3, 6, 8), "v": torch.randn(2, 3, 6, 8)}, "k has 3 heads and q has 4"),
        (
            {"prefix_k": torch.randn(3, 3, 8)},
            r"prefix_k has shape .*; expected \[2, P, 8\]",
        ),
        ({"prefix_v": torch.randn(2, 4, 8)}, "prefix_v has shape"),
        ({"prefix_v": None}, "prefix_v is None"),
        ({"prefix_k": torch.randn(2, 3, 8).half()}, "prefix_k is torch.float16 and q is"),
        ({"k": torch.randn(2, 2, 6, 8, device="meta")}, "k is on meta; expected cpu"),
        ({"q": torch.randn(2, 4, 7, 8)}, "k has 6 positions and q has 7"),
        ({"key_lengths": torch.tensor([1, 2, 3])}, "key_lengths is torch.int64 of shape"),
        ({"key_lengths": torch.tensor([1.0, 2.0])}, "key_lengths is torch.float32"),
        ({"key_mask": torch.ones(2, 6)}, "key_mask is torch.float32"),
        ({"key_mask": torch.ones(2, 5, dtype=torch.bool)}, "key_mask is torch.bool of shape"),
        ({"query_start": torch.tensor([1, 2, 3])}, "query_start is torch.int64 of shape"),
        ({"sliding_window": 0}, "sliding_window is 0"),
        ({"dropout_p": 1.0, "seed": torch.tensor(1)}, "dropout_p is 1.0"),
        ({"dropout_p": 0.1}, "seed is None"),
    ],
)
def test_bad_input_is_named(change, message):
    t = make(2, 4, 2, 6, 6, 8, 3, torch.float32)
    good = {name: t[name] for name in NAMES} | {"causal": True}
    with pytest.raises(ValueError, match=message):
        ops.prefix_attention(**(good | change))


@pytest.mark.parametrize(
    ("dtype", "d", "scale", "reason"),
    [
        (torch.float64, 8, None, "float64"),
        (torch.float32, 264, None, "head dimension is 264"),
        (torch.float32, 8, -1.0, "scale is -1.0"),
    ],
)
def test_what_no_kernel_covers_falls_back_with_the_same_result(dtype, d, scale, reason):
    t = make(1, 2, 1, 4, 4, d, 2, dtype)
    operands = [t[n] for n in NAMES]
    assert reason in ops.attention_fallback_reason(t["q"], scale)
    expected = reference.prefix_attention(*operands, causal=True, scale=scale)
    assert torch.equal(ops.prefix_attention(*operands, causal=True, scale=scale), expected)
