"""RMS norm, gated SiLU and cross-entropy against float64 and plain torch at the same dtype."""

import math

import pytest
import torch
from backends import ISAS, forced, relative_error
from hypothesis import given, settings
from hypothesis import strategies as st

from fused_peft import ops, reference

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def draw(*shape, dtype, seed=0, scale=1.0):
    g = torch.Generator().manual_seed(seed)
    return (torch.randn(*shape, generator=g) * scale).to(dtype)


def with_gradients(fn, leaves, dout):
    leaves = [x.detach().requires_grad_() for x in leaves]
    out = fn(*leaves)
    return [out.detach(), *torch.autograd.grad(out, leaves, dout.to(out.dtype))]


def assert_no_worse_than_torch(op, plain, leaves, dout, *, rows=None, terms=1.0):
    """No error is larger than plain torch's, but by what chance makes of as many roundings.

    Two sets of n independent roundings have norms that differ by about 1 / sqrt(n) by chance: four
    of those are allowed, and of half a unit of the format. A row that has one sum has one error of
    it: rows of them, where they are what counts. terms is how much larger the terms of the last
    gradient are than it is.
    """
    ours = with_gradients(op, leaves, dout)
    torchs = with_gradients(plain, leaves, dout)
    truth = with_gradients(plain, [x.double() for x in leaves], dout.double())
    for i, (our, other, ref) in enumerate(zip(ours, torchs, truth, strict=True)):
        assert our.dtype == other.dtype
        assert our.shape == other.shape
        if ref.numel() == 0:
            continue
        by_chance = 4.0 / math.sqrt(min(ref.numel(), rows or ref.numel()))
        unit = torch.finfo(our.dtype).eps / 2 * (terms if i == len(truth) - 1 else 1.0)
        allowed = relative_error(other, ref) * (1 + by_chance) + unit * by_chance
        assert relative_error(our, ref) <= allowed, (i, relative_error(our, ref), allowed)


def check_rms_norm(m, h, dtype, weight_dtype, seed=0):
    weight = 1 + 0.3 * draw(h, dtype=weight_dtype, seed=seed + 1)
    x, dy = draw(m, h, dtype=dtype, seed=seed), draw(m, h, dtype=dtype, seed=seed + 2)

    def plain(t):
        return reference.rms_norm(
            t, weight.to(t.dtype) if t.dtype == torch.float64 else weight, 1e-5
        )

    # A row of few elements is nearly its own direction, in which the gradient's terms cancel.
    wide, g = x.double(), (dy * weight).double()
    rstd = (wide.square().mean(-1, keepdim=True) + 1e-5).rsqrt()
    along = wide * rstd**2 * (g * wide).mean(-1, keepdim=True)
    terms = (rstd * (g.abs() + along.abs())).norm() / (rstd * (g - along)).norm()
    assert_no_worse_than_torch(
        lambda t: ops.rms_norm(t, weight, 1e-5), plain, [x], dy, terms=max(1.0, terms.item())
    )


@pytest.mark.parametrize("dtypes", ["fp32 fp32", "bf16 bf16", "bf16 fp32", "fp16 fp16"])
@pytest.mark.parametrize("shape", [(1, 1), (3, 7), (5, 33), (70, 576), (2, 4100)], ids=str)
def test_rms_norm_error(isa, shape, dtypes):
    check_rms_norm(*shape, *(DTYPES[d] for d in dtypes.split()))


@pytest.mark.parametrize("fma_isa", [name for name in ISAS if name != "portable"])
def test_rms_norm_has_no_error_of_a_whole_row(fma_isa):
    # 4096 roundings of at most 6e-8 average out to 1e-9, and the short sums' to a few of those;
    # the rounding of a row's factor, up to 6e-8, would stay. It does where no multiply-add takes
    # up the factor's low part: portable x86-64 code has none.
    x, weight = draw(64, 4096, dtype=torch.float32), torch.ones(4096)
    truth = reference.rms_norm(x.double(), weight.double(), 1e-5)
    with forced(fma_isa):
        y = ops.rms_norm(x, weight, 1e-5)
    bias = ((y.double() - truth) / truth).mean(-1)
    assert bias.abs().max() < 1.5e-8


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1,), (3, 7), (2, 5, 33), (70, 576)], ids=str)
def test_swiglu_error(isa, shape, dtype):
    leaves = [draw(*shape, dtype=DTYPES[dtype], seed=s, scale=3.0) for s in (0, 1)]
    assert_no_worse_than_torch(
        ops.swiglu, reference.swiglu, leaves, draw(*shape, dtype=DTYPES[dtype], seed=2)
    )


def test_swiglu_far_from_zero(isa):
    gate = torch.tensor([-1e30, -200.0, -88.0, 0.0, 88.0, 200.0, 1e30])
    out = ops.swiglu(gate, torch.ones(7))
    torch.testing.assert_close(out, reference.swiglu(gate, torch.ones(7)), rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1, 1), (3, 7), (5, 33), (9, 5003)], ids=str)
def test_cross_entropy_error(isa, shape, dtype):
    logits = draw(*shape, dtype=DTYPES[dtype], scale=4.0)
    g = torch.Generator().manual_seed(1)
    labels = torch.randint(0, shape[1], shape[:1], generator=g)
    labels[1::3] = -100
    dloss = torch.rand(shape[0], generator=g) / shape[0]
    assert_no_worse_than_torch(
        lambda x: ops.cross_entropy(x, labels),
        lambda x: reference.cross_entropy(x, labels),
        [logits],
        dloss,
        rows=shape[0],
    )
    loss = ops.cross_entropy(logits, labels)
    assert torch.equal(loss[1::3], torch.zeros_like(loss[1::3]))


@pytest.mark.parametrize("column", [0, 15, 16, 36])
def test_cross_entropy_with_one_logit_far_above_the_others(isa, column):
    # Only the true maximum, wherever it is, keeps the sum finite.
    logits = draw(3, 37, dtype=torch.float32)
    logits[:, column] = 300.0
    labels = torch.tensor([column, 1, 5])
    assert_no_worse_than_torch(
        lambda x: ops.cross_entropy(x, labels),
        lambda x: reference.cross_entropy(x, labels),
        [logits],
        torch.ones(3),
        rows=3,
    )


@pytest.mark.parametrize("shift", [-1000.0, 1000.0])
def test_cross_entropy_of_logits_far_from_zero(isa, shift):
    # A float of lse is 3e-5 off there, and so would be every probability of the backward pass.
    logits = draw(40, 37, dtype=torch.float32, scale=2.0) + shift
    labels = torch.arange(40) % 37
    assert_no_worse_than_torch(
        lambda x: ops.cross_entropy(x, labels),
        lambda x: reference.cross_entropy(x, labels),
        [logits],
        torch.ones(40),
        rows=40,
    )


@settings(max_examples=60, deadline=None)
@given(
    m=st.integers(0, 20),
    h=st.integers(1, 300),
    dtype=st.sampled_from(sorted(DTYPES)),
    isa=st.sampled_from(ISAS),
)
def test_drawn_problems(m, h, dtype, isa):
    dtype = DTYPES[dtype]
    with forced(isa):
        check_rms_norm(m, h, dtype, dtype, seed=m)
        a, b, c = (draw(m, h, dtype=dtype, seed=s) for s in (3, 4, 5))
        assert_no_worse_than_torch(ops.swiglu, reference.swiglu, [a, b], c)
        labels = torch.arange(m) % h
        assert_no_worse_than_torch(
            lambda x: ops.cross_entropy(x, labels),
            lambda x: reference.cross_entropy(x, labels),
            [a],
            torch.ones(m),
            rows=m,
        )


def test_strided_operands(isa):
    x, weight = draw(6, 20, dtype=torch.float32), draw(20, dtype=torch.float32, seed=1)
    columns = x.t().contiguous().t()
    assert torch.equal(ops.rms_norm(columns, weight, 1e-5), ops.rms_norm(x, weight, 1e-5))
    assert torch.equal(ops.swiglu(columns, x), ops.swiglu(x, x))
    labels = torch.arange(6)
    for view in (columns, torch.cat((x, x), 1)[:, :20]):
        leaf = view.detach().requires_grad_()
        # One gradient for all rows, as from a mean: its stride is 0.
        (grad,) = torch.autograd.grad(ops.cross_entropy(leaf, labels).mean(), leaf)
        torch.testing.assert_close(grad, torch.func.grad(
            lambda t: reference.cross_entropy(t, labels).mean())(x))  # fmt: skip


def test_same_bits_for_any_number_of_threads():
    x, weight = draw(300, 577, dtype=torch.bfloat16), draw(577, dtype=torch.bfloat16, seed=1)
    labels = torch.arange(300)
    before = torch.get_num_threads()
    runs = []
    try:
        for threads in (before, 1, 3):
            torch.set_num_threads(threads)
            runs.append(
                [
                    *with_gradients(lambda t: ops.rms_norm(t, weight, 1e-5), [x], x),
                    *with_gradients(ops.swiglu, [x, x * 2], x),
                    *with_gradients(lambda t: ops.cross_entropy(t, labels), [x], torch.ones(300)),
                ]
            )
    finally:
        torch.set_num_threads(before)
    for other in runs[1:]:
        for a, b in zip(runs[0], other, strict=True):
            assert torch.equal(a, b)


def test_no_float32_copy_of_the_logits_is_saved():
    logits = draw(8, 100, dtype=torch.bfloat16).requires_grad_()
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda s: (saved.append(s), s)[1], lambda s: s):
        ops.cross_entropy(logits, torch.arange(8))
    assert all(s.numel() <= 8 or s.data_ptr() == logits.data_ptr() for s in saved)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_opcheck(dtype):
    x, w = draw(5, 12, dtype=dtype).requires_grad_(), draw(12, dtype=dtype, seed=1)
    namespace = torch.ops.fused_peft
    check = torch.library.opcheck
    check(namespace.rms_norm.default, (x, w, 1e-5))
    _, rstd = namespace.rms_norm.default(x.detach(), w, 1e-5)
    check(namespace.rms_norm_backward.default, (x.detach(), x.detach(), w, rstd))
    up = draw(5, 12, dtype=dtype, seed=2).requires_grad_()
    check(namespace.swiglu.default, (x, up))
    check(namespace.swiglu_backward.default, (x.detach(), x.detach(), up.detach()))
    labels = torch.tensor([0, 3, -100, 11, 5])
    check(namespace.cross_entropy.default, (x, labels, -100))
    loss, lse = namespace.cross_entropy.default(x.detach(), labels, -100)
    check(namespace.cross_entropy_backward.default, (loss, x.detach(), labels, lse, -100))


def test_gradcheck_of_the_references():
    x, up = (draw(3, 5, dtype=torch.float64, seed=s).requires_grad_() for s in (0, 1))
    weight = draw(5, dtype=torch.float64, seed=2).requires_grad_()
    labels = torch.tensor([0, -100, 4])
    assert torch.autograd.gradcheck(lambda a, w: ops.rms_norm(a, w, 1e-3), [x, weight])
    assert torch.autograd.gradcheck(ops.swiglu, [x, up])
    assert torch.autograd.gradcheck(lambda a: ops.cross_entropy(a, labels), [x])


def test_a_trainable_norm_weight_gets_its_gradient():
    x = draw(5, 12, dtype=torch.float32)
    weight = draw(12, dtype=torch.float32, seed=1).requires_grad_()
    (grad,) = torch.autograd.grad(ops.rms_norm(x, weight, 1e-5).sum(), weight)
    torch.testing.assert_close(grad, (x / (x.square().mean(-1, keepdim=True) + 1e-5).sqrt()).sum(0))


def test_compile_fullgraph():
    torch._dynamo.reset()
    weight, labels = draw(20, dtype=torch.float32, seed=1), torch.arange(6)

    def loss(x):
        h = ops.swiglu(ops.rms_norm(x, weight, 1e-5), x)
        return ops.cross_entropy(h, labels).mean()

    x = draw(6, 20, dtype=torch.float32).requires_grad_()
    expected = torch.autograd.grad(loss(x), x)
    compiled = torch.compile(loss, fullgraph=True)
    torch.testing.assert_close(torch.autograd.grad(compiled(x), x), expected)


def test_double_backward_is_refused():
    x = draw(4, 8, dtype=torch.float32).requires_grad_()
    for fn in (
        lambda t: ops.rms_norm(t, torch.ones(8), 1e-5),
        lambda t: ops.swiglu(t, t),
        lambda t: ops.cross_entropy(t, torch.arange(4)),
    ):
        (dx,) = torch.autograd.grad(fn(x).square().sum(), x, create_graph=True)
        with pytest.raises(RuntimeError, match="no second derivative"):
            dx.sum().backward()


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (
            lambda: ops.rms_norm(torch.ones(2, 3), torch.ones(4), 1e-5),
            ValueError,
            "weight has shape",
        ),
        (lambda: ops.rms_norm(torch.ones(2, 3), torch.ones(3), -1.0), ValueError, "eps is -1.0"),
        (lambda: ops.swiglu(torch.ones(2), torch.ones(3)), ValueError, r"up is .*\(3,\)"),
        (
            lambda: ops.swiglu(torch.ones(2), torch.ones(2).half()),
            ValueError,
            "up is torch.float16",
        ),
        (lambda: ops.cross_entropy(torch.ones(3), torch.arange(3)), ValueError, "logits has shape"),
        (
            lambda: ops.cross_entropy(torch.ones(2, 3), torch.ones(2)),
            ValueError,
            "labels is torch.f",
        ),
        (
            lambda: ops.cross_entropy(torch.ones(2, 3), torch.tensor([0, 3])),
            RuntimeError,
            "labels holds 3 at 1; expected 0 to 2",
        ),
    ],
)
def test_bad_input_is_named(call, error, message):
    with pytest.raises(error, match=message):
        call()
