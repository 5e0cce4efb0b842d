"""The low-rank update on a given base output: against float64, against plain torch, and opcheck."""

import math

import pytest
import torch
from backends import ISAS, forced, relative_error
from test_lora_ops import DTYPES, SHAPES, make

from fused_peft import ops, reference

NAMES = ("base", "x", "lora_a", "lora_b")


def problem(shape, kind="fp32", lead=(), seed=0):
    t = make(*shape, *DTYPES[kind], lead=lead, seed=seed)
    t["base"] = t["dy"].flip(0) * 3
    return t


def run(fn, t, **kwargs):
    """y and the gradients of base, x, lora_a and lora_b."""
    leaves = {name: t[name].detach().clone().requires_grad_() for name in NAMES}
    y = fn(*leaves.values(), **kwargs)
    y.backward(t["dy"])
    return {"y": y.detach()} | {"d" + name: leaf.grad for name, leaf in leaves.items()}


def assert_no_worse_than_torch(t, **kwargs):
    """The rule of test_lora_ops.py. A row of y inherits the errors of its s, so the independent
    errors number [M, R] at most.
    """
    independent = t["dy"][..., 0].numel() * t["lora_a"].shape[0]
    exact = run(reference.lora_update, {k: v.double() for k, v in t.items()}, **kwargs)
    ours = run(ops.lora_update, t, **kwargs)
    torchs = run(reference.lora_update, t, **kwargs)
    assert torch.equal(ours["dbase"], t["dy"])
    for name, value in ours.items():
        assert value.dtype == torchs[name].dtype
        by_chance = 4.0 / math.sqrt(max(1, min(value.numel(), independent)))
        unit = torch.finfo(value.dtype).eps / 2
        allowed = relative_error(torchs[name], exact[name]) * (1 + by_chance) + unit * by_chance
        assert relative_error(value, exact[name]) <= allowed, name


@pytest.mark.parametrize("dropout_p", [0.0, 0.3])
@pytest.mark.parametrize("kind", DTYPES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("isa", ISAS)
def test_error_is_not_above_plain_torchs(isa, shape, kind, dropout_p):
    with forced(isa):
        assert_no_worse_than_torch(
            problem(shape, kind), scaling=0.75, dropout_p=dropout_p, seed=torch.tensor(11)
        )


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_values_do_not_depend_on_the_number_of_threads(threads):
    t = problem((130, 200, 70, 16), "bf16-fp32")
    before = torch.get_num_threads()
    results = []
    for count in (1, threads):
        torch.set_num_threads(count)
        try:
            results.append(run(ops.lora_update, t, scaling=0.5))
        finally:
            torch.set_num_threads(before)
    assert all(torch.equal(results[0][k], results[1][k]) for k in results[0])


def test_base_of_any_strides_is_read_and_left_alone():
    t = problem((6, 20, 24, 4), lead=(3,))
    wide = torch.randn(3, 6, 31)
    for base in (wide[..., 5:25], wide[..., :20].transpose(0, 1).contiguous().transpose(0, 1),
                 torch.randn(20).expand(3, 6, 20)):  # fmt: skip
        before = base.clone()
        y = ops.lora_update(base, t["x"], t["lora_a"], t["lora_b"], scaling=2.0)
        expected = reference.lora_update(
            base.double(), *(t[n].double() for n in NAMES[1:]), scaling=2.0
        )
        torch.testing.assert_close(y, expected.float())
        assert torch.equal(base, before)


def test_no_rows():
    t = problem((0, 20, 24, 4))
    result = run(ops.lora_update, t, scaling=2.0)
    assert result["y"].shape == (0, 20)
    assert not result["dlora_a"].any()
    assert not result["dlora_b"].any()


@pytest.mark.parametrize("needed", NAMES)
def test_only_the_gradient_asked_for(needed):
    t = problem((20, 24, 16, 4))
    leaves = {n: t[n].clone().requires_grad_(n == needed) for n in NAMES}
    ops.lora_update(*leaves.values(), scaling=0.5).backward(t["dy"])
    full = run(ops.lora_update, t, scaling=0.5)
    for name, leaf in leaves.items():
        assert (leaf.grad is not None) == (name == needed)
    torch.testing.assert_close(leaves[needed].grad, full["d" + needed], rtol=0, atol=0)


def test_opcheck():
    t = problem((20, 24, 16, 4))
    for p in (0.0, 0.25):
        inputs = [t[n].clone().requires_grad_() for n in NAMES]
        torch.library.opcheck(
            torch.ops.fused_peft.lora_update.default, (*inputs, 0.5, p, torch.tensor(3))
        )


def test_compiles_to_the_same_values():
    t = problem((20, 24, 16, 4))
    compiled = torch.compile(ops.lora_update, fullgraph=True, backend="aot_eager")
    ours = run(ops.lora_update, t, scaling=0.5)
    assert all(torch.equal(v, ours[k]) for k, v in run(compiled, t, scaling=0.5).items())


def test_gradcheck_of_the_reference_and_its_fallback():
    t = problem((5, 4, 6, 2))
    leaves = tuple(t[name].double().requires_grad_() for name in NAMES)

    def update(*operands):
        return ops.lora_update(*operands, scaling=0.5, dropout_p=0.2, seed=torch.tensor(5))

    assert torch.autograd.gradcheck(update, leaves)
    assert torch.autograd.gradgradcheck(update, leaves)


def test_second_derivative_is_refused():
    t = problem((5, 4, 6, 2))
    leaves = [t[n].clone().requires_grad_() for n in NAMES]
    y = ops.lora_update(*leaves, scaling=0.5)
    (dx,) = torch.autograd.grad(y.square().sum(), leaves[1], create_graph=True)
    with pytest.raises(RuntimeError, match="no second derivative"):
        dx.sum().backward()


def test_autocast_casts_x_and_keeps_the_adapters():
    t = problem((5, 4, 6, 2))
    base = t["base"].bfloat16()
    with torch.autocast("cpu", torch.bfloat16):
        y = ops.lora_update(base, t["x"], t["lora_a"], t["lora_b"], scaling=0.5)
    expected = ops.lora_update(base, t["x"].bfloat16(), t["lora_a"], t["lora_b"], scaling=0.5)
    assert y.dtype == torch.bfloat16
    assert torch.equal(y, expected)


def test_base_of_another_dtype_takes_plain_torch():
    t = problem((5, 4, 6, 2))
    base = t["base"].bfloat16()
    assert "the base gave" in ops.update_fallback_reason(base, t["x"], t["lora_a"], t["lora_b"])
    y = ops.lora_update(base, t["x"], t["lora_a"], t["lora_b"], scaling=0.5)
    assert y.dtype == torch.bfloat16
    assert torch.equal(
        y, reference.lora_update(base, t["x"], t["lora_a"], t["lora_b"], scaling=0.5)
    )


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"base": torch.zeros(5, 3)}, r"base has shape \(5, 3\); expected \(5, 4\)"),
        ({"x": torch.zeros(5, 5)}, r"x has shape \(5, 5\); expected \[..., 6\]"),
        ({"lora_a": torch.zeros(0, 6)}, r"lora_a has shape \(0, 6\)"),
        ({"lora_b": torch.zeros(4, 3)}, r"lora_b has shape \(4, 3\); expected \[N, 2\]"),
        ({"base": torch.zeros(5, 4, device="meta")}, "base is on meta; expected cpu"),
        ({"lora_b": torch.zeros(4, 2, device="meta")}, "lora_b is on meta; expected cpu"),
    ],
)
def test_bad_operands_are_named(change, message):
    t = {n: problem((5, 4, 6, 2))[n] for n in NAMES} | change
    with pytest.raises(ValueError, match=message):
        ops.lora_update(*t.values(), scaling=0.5)
