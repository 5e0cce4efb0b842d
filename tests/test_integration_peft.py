"""PEFT's LoRA layers with the fused forward: values, gradients, and who is handed to PEFT."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from backends import relative_error
from torch import Tensor
from torch.utils.checkpoint import checkpoint

pytest.importorskip("peft")

import peft
from peft.helpers import rescale_adapter_scale
from peft_models import (
    K,
    Net,
    adapted,
    config,
    fill,
    in_dtypes,
    inputs,
    layer,
    net,
    recorded_calls,
    results,
    two_adapters,
    two_layers,
)

from fused_peft import explain, ops, reference
from fused_peft.integrations.peft import fuse, unfuse

Calls = list[dict[str, Any]]


@pytest.fixture
def op_calls(monkeypatch: pytest.MonkeyPatch) -> Calls:
    return recorded_calls(monkeypatch, "lora_linear")


#: Name of a case: what makes its model.
PLAIN: dict[str, Callable[[], peft.PeftModel]] = {
    "one adapter": adapted,
    "no bias": lambda: adapted(net(bias=False)),
    "rslora": lambda: adapted(use_rslora=True),
    "lora_bias": lambda: adapted(lora_bias=True),
    "trained bias": lambda: adapted(bias="lora_only"),
    "conv1d": lambda: adapted(net("conv1d"), fan_in_fan_out=True),
    "two adapters": lambda: two_adapters(adapted(), lora_alpha=6),
    "two scalings": lambda: two_adapters(adapted(), lora_alpha=5),
    "one of two": lambda: set_one(two_adapters(adapted())),
    "two with lora_bias": lambda: two_adapters(adapted(lora_bias=True)),
    "two layers": lambda: adapted(two_layers(), target_modules=["lin", "other"]),
}
#: dtypes of the base and of the adapters.
DTYPES = {
    "fp32": (torch.float32, torch.float32),
    "bf16": (torch.bfloat16, torch.bfloat16),
    "bf16-fp32": (torch.bfloat16, torch.float32),
    "fp16": (torch.float16, torch.float16),
    "fp16-fp32": (torch.float16, torch.float32),
}


def set_one(model: peft.PeftModel) -> peft.PeftModel:
    model.set_adapter("second")
    return model


def assert_no_worse(
    fused: dict[str, Tensor], unfused: dict[str, Tensor], truth: dict[str, Tensor], independent: int
) -> None:
    """Every error against float64 is at most PEFT's own at the same dtype.

    Both round the same number of independent values, so their root mean squares differ by chance.
    """
    assert fused.keys() == unfused.keys() == truth.keys()
    for name, ref in truth.items():
        ours, theirs = fused[name], unfused[name]
        assert ours.dtype == theirs.dtype, name
        assert ours.shape == theirs.shape, name
        by_chance = 4.0 / math.sqrt(min(ref.numel(), independent))
        unit = torch.finfo(ours.dtype).eps / 2
        error, allowed = relative_error(ours, ref), relative_error(theirs, ref)
        assert error <= allowed * (1 + by_chance) + unit * by_chance, (name, error, allowed)


@pytest.mark.parametrize("dtypes", DTYPES)
@pytest.mark.parametrize("case", PLAIN)
def test_no_worse_than_peft(case: str, dtypes: str, op_calls: Calls) -> None:
    model = in_dtypes(PLAIN[case](), *DTYPES[dtypes])
    x = inputs(64, torch.bfloat16).to(DTYPES[dtypes][0]).view(4, 16, K)
    unfused = results(model, x)
    truth = results(copy.deepcopy(model).double(), x.double())
    assert not op_calls
    fuse(model)
    fused = results(model, x)
    assert len(op_calls) == (2 if case == "two layers" else 1)
    assert_no_worse(fused, unfused, truth, independent=4 * 64)
    assert explain(layer(model), x).startswith("kernel: cpu")


@pytest.mark.parametrize("base", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("case", ["one adapter", "lora_bias", "conv1d", "two scalings"])
def test_no_worse_than_peft_under_autocast(case: str, base: torch.dtype, op_calls: Calls) -> None:
    model = in_dtypes(PLAIN[case](), base, torch.float32)
    x = inputs(64, torch.bfloat16).to(base)
    unfused = results(model, x, dtype=torch.bfloat16)
    truth = results(copy.deepcopy(model).double(), x.double())
    fuse(model)
    fused = results(model, x, dtype=torch.bfloat16)
    assert len(op_calls) == 1
    assert fused["y"].dtype == torch.bfloat16
    assert_no_worse(fused, unfused, truth, independent=4 * 64)


@pytest.mark.parametrize("case", PLAIN)
def test_float64_is_peft_itself(case: str, op_calls: Calls) -> None:
    model = PLAIN[case]().double()
    x = inputs(12, torch.float64)
    unfused = results(model, x)
    fused = results(fuse(model), x)
    assert not op_calls
    for name, value in unfused.items():
        assert torch.equal(fused[name], value), name


def test_inference_gives_the_same(op_calls: Calls) -> None:
    model = adapted()
    x = inputs()
    with torch.inference_mode():
        expected = model(x)
        torch.testing.assert_close(fuse(model)(x), expected, rtol=1e-5, atol=1e-5)
    assert op_calls


@pytest.mark.parametrize("rows", [(), (0,), (3, 0, 2), (2, 3, 5)])
def test_shapes(rows: tuple[int, ...], op_calls: Calls) -> None:
    model = adapted()
    x = torch.randn(*rows, K)
    expected = model(x)
    torch.testing.assert_close(fuse(model)(x), expected, rtol=1e-5, atol=1e-5)
    assert op_calls


# ---- dropout -------------------------------------------------------------------------------------


def test_dropout_drops_as_the_seed_says(monkeypatch: pytest.MonkeyPatch) -> None:
    model = adapted(lora_dropout=0.5)
    seed = torch.tensor(11)
    monkeypatch.setattr(ops, "new_seed", lambda device="cpu": seed)
    fuse(model).train()
    x = inputs()
    part = layer(model)
    kept = x * reference.dropout_keep(x.shape, 0.5, seed) * 2.0
    lora_a, lora_b = part.lora_A["default"].weight, part.lora_B["default"].weight
    expected = part.base_layer(x) + kept @ lora_a.t() @ lora_b.t() * 1.5
    torch.testing.assert_close(model(x), expected, rtol=1e-5, atol=1e-5)


def test_dropout_follows_its_own_module(op_calls: Calls) -> None:
    model = fuse(adapted(lora_dropout=0.5)).train()
    x = inputs()
    part = layer(model)
    part.lora_dropout.eval()
    calm = model(x)
    part.eval()
    assert torch.equal(model(x), calm)
    part.lora_dropout["default"].train()
    part.lora_dropout["default"].p = 0.25
    assert not torch.equal(model(x), calm)
    assert [call.get("dropout_p", 0.0) for call in op_calls] == [0.0, 0.0, 0.25]


@pytest.mark.parametrize("dropped", [(0.5, 0.5), (0.5, 0.0), (0.0, 0.25)], ids=str)
def test_dropout_of_several_adapters(dropped: tuple[float, float], op_calls: Calls) -> None:
    """Each has a mask of its own: one's part vanishes where its input is dropped, not the other's.

    With the factors of an adapter being its one-hot selection of one input, its part of the output
    is that input, dropped or scaled.
    """
    model = two_adapters(adapted(lora_dropout=dropped[0]), lora_dropout=dropped[1])
    part = layer(fuse(model))
    with torch.no_grad():
        for row, name in enumerate(("default", "second")):
            part.lora_A[name].weight.zero_()[0, 0] = 1.0
            part.lora_B[name].weight.zero_()[row, 0] = 1.0
            part.scaling[name] = 1.0
    x = torch.ones(2000, K)
    torch.manual_seed(1)
    parts = (model.train()(x) - part.base_layer(x))[:, :2]
    assert len(op_calls) == 1
    for p, values in zip(dropped, parts.t(), strict=True):
        kept = values.abs() > 1e-3
        torch.testing.assert_close(values[kept], torch.full_like(values[kept], 1 / (1 - p)))
        # Five standard deviations of a binomial count.
        assert abs(kept.float().mean() - (1 - p)) <= 5 * math.sqrt(p * (1 - p) / len(x))
    if all(dropped):
        both = (parts.abs() > 1e-3).all(dim=1).float().mean()
        assert abs(both - 0.25) < 5 * math.sqrt(0.25 * 0.75 / len(x))


def test_checkpointing_draws_the_same_mask() -> None:
    model = fuse(adapted(lora_dropout=0.5)).train()
    gradients = []
    for with_checkpoint in (False, True):
        torch.manual_seed(5)
        model.zero_grad()
        x = inputs().requires_grad_()
        y = checkpoint(model, x, use_reentrant=False) if with_checkpoint else model(x)
        y.square().sum().backward()
        gradients.append([p.grad.clone() for p in (*model.parameters(), x) if p.requires_grad])
    for one, two in zip(*gradients, strict=True):
        assert torch.equal(one, two)


# ---- what PEFT changes at run time ---------------------------------------------------------------


def compare(model: peft.PeftModel, calls: Calls) -> Tensor:
    """The fused output, which is PEFT's."""
    x = inputs()
    calls.clear()
    fused = model(x)
    assert calls
    unfuse(model)
    torch.testing.assert_close(fused, model(x), rtol=1e-5, atol=1e-5)
    fuse(model)
    return fused.detach()


def test_scaling_is_read_at_every_call(op_calls: Calls) -> None:
    model = fuse(adapted())
    part = layer(model)
    seen = [compare(model, op_calls)]
    part.set_scale("default", 3.0)
    seen.append(compare(model, op_calls))
    part.scale_layer(0.5)
    seen.append(compare(model, op_calls))
    part.unscale_layer()
    assert torch.equal(compare(model, op_calls), seen[0])
    with rescale_adapter_scale(model, 0.25):
        seen.append(compare(model, op_calls))
    for i, one in enumerate(seen):
        assert not any(torch.allclose(one, other, atol=1e-3) for other in seen[:i])


def test_adapters_come_and_go(op_calls: Calls) -> None:
    model = fuse(adapted())
    first = compare(model, op_calls)
    model.add_adapter("second", config(r=4))
    fill(model)
    assert torch.equal(compare(model, op_calls), first)
    model.set_adapter("second")
    other = compare(model, op_calls)
    model.base_model.set_adapter(["default", "second"])
    both = compare(model, op_calls)
    base = layer(model).base_layer(inputs())
    torch.testing.assert_close(both, first + other - base, rtol=1e-4, atol=1e-5)
    with model.disable_adapter():
        assert torch.equal(model(inputs()), base)
    model.delete_adapter("default")
    torch.testing.assert_close(compare(model, op_calls), other)


def test_values_changed_in_place_are_seen() -> None:
    model = fuse(adapted())
    before = model(inputs())
    with torch.no_grad():
        layer(model).base_layer.weight.add_(0.5)
        layer(model).lora_B["default"].weight.zero_()
    expected = layer(model).base_layer(inputs())
    torch.testing.assert_close(model(inputs()), expected, rtol=1e-5, atol=1e-5)
    assert not torch.allclose(before, expected, atol=1e-3)


def test_merging_and_unmerging(op_calls: Calls) -> None:
    model = fuse(adapted())
    expected = compare(model, op_calls)
    op_calls.clear()
    model.merge_adapter()
    torch.testing.assert_close(model(inputs()), expected, rtol=1e-4, atol=1e-5)
    assert not op_calls
    model.unmerge_adapter()
    torch.testing.assert_close(compare(model, op_calls), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("case", ["one adapter", "two scalings"])
def test_compiles_without_a_graph_break(case: str) -> None:
    model = fuse(PLAIN[case]())
    x = inputs()
    expected = results(model, x)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    y = compiled(x)
    torch.testing.assert_close(y, expected["y"], rtol=1e-5, atol=1e-5)
    layer(model).set_scale("default", 0.0)
    assert not torch.allclose(compiled(x), expected["y"], atol=1e-3)


def test_training_learns_what_peft_s_learns() -> None:
    losses = []
    for fusing in (False, True):
        model = adapted(Net(*(copy.deepcopy(m) for m in two_layers().children())))
        if fusing:
            fuse(model)
        optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], 1e-2)
        curve = []
        for step in range(20):
            loss = (model(inputs(32, seed=step)) - 1.0).square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            curve.append(loss.item())
        losses.append(curve)
    torch.testing.assert_close(*(torch.tensor(c) for c in losses), rtol=1e-4, atol=0.0)
    assert losses[0][-1] < 0.8 * losses[0][0]
