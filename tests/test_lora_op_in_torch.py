"""The LoRA linear op among torch's own: opcheck, compile, autograd, refusals, fallback."""

import pytest
import torch
from backends import relative_error
from test_lora_ops import DTYPES, exact, make, run
from torch import nn
from torch.utils.checkpoint import checkpoint

from fused_peft import _C, LoraLinear, ops, reference


@pytest.mark.parametrize("dtypes", ["fp32", "bf16-fp32"])
@pytest.mark.parametrize("p", [0.0, 0.3])
def test_opcheck(dtypes, p):
    t = make(20, 24, 36, 4, *DTYPES[dtypes])
    seed = torch.tensor(3) if p else None
    leaves = [t[n].requires_grad_() for n in ("x", "lora_a", "lora_b", "bias")]
    x, a, b, bias = leaves
    ops_ns = torch.ops.fused_peft
    torch.library.opcheck(ops_ns.lora_linear.default, (x, t["weight"], a, b, bias, 0.5, p, seed))
    _, s = ops_ns.lora_linear.default(x, t["weight"], a, b, bias, 0.5, p, seed)
    for need in ((True,) * 4, (True, False, True, False)):
        torch.library.opcheck(
            ops_ns.lora_linear_backward.default,
            (t["dy"], x.detach(), t["weight"], a.detach(), b.detach(), s, 0.5, p, seed, *need),
        )


def test_gradcheck_of_the_reference():
    t = {k: v.double() for k, v in make(5, 6, 7, 2, torch.float32, torch.float32).items()}
    leaves = [t[n].requires_grad_() for n in ("x", "lora_a", "lora_b", "bias")]

    def fn(x, a, b, bias):
        return ops.lora_linear(
            x, t["weight"], a, b, bias, scaling=0.6, dropout_p=0.3, seed=torch.tensor(4)
        )

    assert torch.autograd.gradcheck(fn, leaves)


@pytest.mark.parametrize("dynamic", [False, True])
def test_compile_fullgraph_equals_eager(dynamic):
    torch._dynamo.reset()
    torch.manual_seed(0)
    model = nn.Sequential(LoraLinear(20, 32, r=4), nn.ReLU(), LoraLinear(32, 8, r=3, bias=False))
    for layer in (model[0], model[2]):
        nn.init.normal_(layer.lora_B["default"])
    compiled = torch.compile(model, fullgraph=True, dynamic=dynamic)
    parameters = [p for p in model.parameters() if p.requires_grad]
    for rows in (18, 25):
        x = torch.randn(rows, 20)
        expected = torch.autograd.grad(model(x).square().sum(), parameters)
        actual = torch.autograd.grad(compiled(x).square().sum(), parameters)
        torch.testing.assert_close(compiled(x), model(x))
        torch.testing.assert_close(actual, expected)


def test_compile_with_dropout_draws_a_new_mask_each_call():
    torch._dynamo.reset()
    layer = LoraLinear(64, 64, r=4, lora_dropout=0.5)
    nn.init.normal_(layer.lora_B["default"])
    compiled = torch.compile(layer, fullgraph=True)
    x = torch.randn(20, 64)
    assert not torch.equal(compiled(x), compiled(x))


def test_autocast_takes_a_float32_model_to_bfloat16():
    t = make(40, 24, 36, 4, torch.float32, torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        out = run(ops.lora_linear, t, scaling=0.5)
    assert out["y"].dtype == torch.bfloat16
    truth = exact(t, scaling=0.5)
    for name, value in out.items():
        assert relative_error(value, truth[name]) < 1e-2, name
        if name != "y":
            assert value.dtype == torch.float32


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_gradient_checkpointing(use_reentrant):
    torch.manual_seed(0)
    layer = LoraLinear(32, 16, r=4, lora_dropout=0.4)
    nn.init.normal_(layer.lora_B["default"])
    x = torch.randn(40, 32, requires_grad=True)
    results = []
    for with_checkpoint in (False, True):
        layer.zero_grad()
        torch.manual_seed(1)  # the same dropout mask in both, drawn again in the recomputation
        y = checkpoint(layer, x, use_reentrant=use_reentrant) if with_checkpoint else layer(x)
        y.square().sum().backward()
        results.append((layer.lora_A["default"].grad.clone(), x.grad.clone()))
        x.grad = None
    for plain, checkpointed in zip(*results, strict=True):
        assert torch.equal(plain, checkpointed)


def test_a_layer_at_the_end_of_a_checkpointed_block():
    # Its backward pass is the first to unpack a saved tensor, and so runs the block again.
    torch.manual_seed(0)
    block = nn.Sequential(nn.Linear(8, 8), nn.Tanh(), LoraLinear(8, 8, r=2))
    nn.init.normal_(block[2].lora_B["default"])
    x = torch.randn(20, 8, requires_grad=True)
    parameters = [x, block[0].weight, block[2].lora_A["default"]]
    plain = torch.autograd.grad(block(x).square().sum(), parameters)
    y = checkpoint(block, x, use_reentrant=False)
    for expected, grad in zip(
        plain, torch.autograd.grad(y.square().sum(), parameters), strict=True
    ):
        assert torch.equal(grad, expected)


def test_double_backward_is_refused():
    t = make(20, 24, 36, 4, torch.float32, torch.float32)
    x = t["x"].requires_grad_()
    y = ops.lora_linear(x, t["weight"], t["lora_a"], t["lora_b"], scaling=1.0)
    (dx,) = torch.autograd.grad(y.square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="no second derivative"):
        dx.sum().backward()


def test_func_transforms_and_forward_mode_are_right():
    t = make(6, 5, 7, 2, torch.float32, torch.float32)

    def loss(module):
        return lambda a: (
            module.lora_linear(t["x"], t["weight"], a, t["lora_b"], scaling=1.0).square().sum()
        )

    for transform in (torch.func.grad, torch.func.hessian, torch.func.jacfwd):
        torch.testing.assert_close(
            transform(loss(ops))(t["lora_a"]), transform(loss(reference))(t["lora_a"])
        )
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(t["lora_a"], torch.ones_like(t["lora_a"]))
        tangent = torch.autograd.forward_ad.unpack_dual(loss(ops)(dual)).tangent
    expected = (torch.func.grad(loss(reference))(t["lora_a"])).sum()
    torch.testing.assert_close(tangent, expected)


def test_vmap():
    t = make(6, 5, 7, 2, torch.float32, torch.float32, lead=(3,))
    args = (t["weight"], t["lora_a"], t["lora_b"])
    out = torch.func.vmap(lambda x: ops.lora_linear(x, *args, scaling=1.0))(t["x"])
    torch.testing.assert_close(out, ops.lora_linear(t["x"], *args, scaling=1.0))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": torch.randn(4, 9)}, r"x has shape \(4, 9\); expected \[..., 8\]"),
        ({"x": torch.tensor(1.0)}, "x has shape"),
        ({"weight": torch.randn(6)}, "weight has shape"),
        ({"lora_a": torch.randn(2, 7)}, r"lora_a has shape \(2, 7\); expected \[R, 8\]"),
        ({"lora_a": torch.randn(0, 8)}, "lora_a has shape"),
        ({"lora_b": torch.randn(6, 3)}, r"lora_b has shape \(6, 3\); expected \[6, 2\]"),
        ({"bias": torch.randn(5)}, r"bias has shape \(5,\); expected \[6\]"),
        ({"x": torch.randn(4, 8).bfloat16()}, "x is torch.bfloat16 and weight is torch.float32"),
        ({"bias": torch.randn(6).half()}, "bias is torch.float16"),
        ({"weight": torch.randn(6, 8, requires_grad=True)}, "weight requires a gradient"),
        ({"dropout_p": 1.0, "seed": torch.tensor(1)}, "dropout_p is 1.0"),
        ({"dropout_p": -0.1, "seed": torch.tensor(1)}, "dropout_p is -0.1"),
        ({"dropout_p": 0.1}, "seed is None"),
        ({"dropout_p": 0.1, "seed": torch.tensor(1.0)}, "int64"),
        ({"lora_a": torch.randn(2, 8, device="meta")}, "lora_a is on meta; expected cpu"),
    ],
)
def test_bad_input_is_named(change, message):
    good = {
        "x": torch.randn(4, 8),
        "weight": torch.randn(6, 8),
        "lora_a": torch.randn(2, 8),
        "lora_b": torch.randn(6, 2),
        "bias": torch.randn(6),
        "scaling": 1.0,
    }
    with pytest.raises(ValueError, match=message):
        ops.lora_linear(**(good | change))


def test_unknown_instruction_set_is_refused():
    with pytest.raises(ValueError, match="isa is 'avx9000'"):
        _C.set_cpu_isa("avx9000")


@pytest.mark.parametrize(
    ("dtype", "rank", "reason"),
    [(torch.float64, 2, "float64"), (torch.float32, 513, "rank is 513")],
)
def test_what_no_kernel_covers_falls_back_with_the_same_result(dtype, rank, reason):
    t = make(5, 6, 7, rank, dtype, dtype)
    args = (t["x"], t["weight"], t["lora_a"], t["lora_b"])
    assert reason in ops.fallback_reason(*args)
    expected = reference.lora_linear(*args, t["bias"], scaling=0.5)
    assert torch.equal(ops.lora_linear(*args, t["bias"], scaling=0.5), expected)
