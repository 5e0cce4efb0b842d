"""LoraLinear: merging, several adapters, state, the same as PEFT's layer."""

from __future__ import annotations

import copy
import math
import pickle
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from lora_layers import HALF, make, randomize, relative_error, truth
from torch import nn
from torch.nn import functional as F

from fused_peft import LoraLinear

# ---- merging


@pytest.mark.parametrize("adapter_dtype", [None, torch.float32])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, *HALF])
def test_merge_rounds_once(dtype: torch.dtype, adapter_dtype: torch.dtype | None) -> None:
    layer = make(dtype=dtype, adapter_dtype=adapter_dtype, lora_alpha=5)
    layer.add_adapter("other", r=3, adapter_dtype=adapter_dtype)
    randomize(layer)
    layer.set_adapter(["default", "other"])
    weight, version = layer.weight, layer.weight._version
    before = weight.detach().clone()
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    expected = before.to(wide)
    for name in ("default", "other"):
        delta = layer.lora_B[name].to(wide) @ layer.lora_A[name].to(wide)
        expected = expected + layer.scaling[name] * delta.detach()
    layer.merge()
    assert layer.merged
    assert layer.merged_adapters == ["default", "other"]
    assert layer.weight is weight
    assert weight._version > version
    if dtype in HALF:
        assert (weight.detach() != expected.to(dtype)).float().mean() < 0.02  # ties of fp32 sums
    torch.testing.assert_close(weight.detach(), expected.to(dtype))
    layer.unmerge()
    assert not layer.merged
    rounding = torch.finfo(dtype).eps * expected.abs().max().item()
    torch.testing.assert_close(weight.detach(), before, rtol=0, atol=2 * rounding)


@settings(max_examples=15, deadline=None)
@given(k=st.integers(1, 16), n=st.integers(1, 16), r=st.integers(1, 6), safe=st.booleans())
def test_merged_layer_computes_the_same(k: int, n: int, r: int, safe: bool) -> None:
    layer = make(k, n, r=r, dtype=torch.float64)
    x = torch.randn(3, k, dtype=torch.float64)
    expected = layer(x)
    layer.merge(safe=safe)
    torch.testing.assert_close(layer(x), expected)
    layer.unmerge()
    torch.testing.assert_close(layer(x), expected)


def test_merge_under_autocast_keeps_precision() -> None:
    layer, plain = make(), make()
    with torch.autocast("cpu", torch.bfloat16):
        layer.merge()
    plain.merge()
    assert torch.equal(layer.weight, plain.weight)


def test_merge_by_name_and_again() -> None:
    layer = make()
    layer.add_adapter("other")
    randomize(layer)
    x = torch.randn(2, 12)
    layer.merge(adapter_names=["other"])
    assert layer.merged_adapters == ["other"]
    torch.testing.assert_close(layer(x), F.linear(x, layer.weight, layer.bias))
    layer.merge()
    assert layer.merged_adapters == ["other", "default"]
    with pytest.warns(UserWarning, match="merged already"):
        layer.merge()
    layer.unmerge()
    with pytest.warns(UserWarning, match="no adapter is merged"):
        layer.unmerge()
    with pytest.raises(TypeError, match="adapter_names is 'other'"):
        layer.merge(adapter_names="other")
    with pytest.raises(ValueError, match=r"'othr' is unknown.*near matches: other"):
        layer.merge(adapter_names=["othr"])
    assert not layer.merged


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_safe_merge_leaves_the_layer_alone(bad: float) -> None:
    layer = make()
    layer.add_adapter("broken")
    randomize(layer)
    layer.set_adapter(["default", "broken"])
    with torch.no_grad():
        layer.lora_B["broken"][3, 1] = bad
    before = layer.weight.detach().clone()
    version = layer.weight._version
    with pytest.raises(ValueError, match="NaN or infinity"):
        layer.merge(safe=True)
    assert torch.equal(layer.weight, before)
    assert layer.weight._version == version
    assert not layer.merged
    layer.merge()
    assert not torch.isfinite(layer.weight).all()


# ---- several adapters, switched


def test_disabled_layer_is_the_base() -> None:
    layer = make()
    x = torch.randn(2, 12)
    with_adapter = layer(x)
    layer.enable_adapters(False)
    assert not layer.adapters_enabled
    assert torch.equal(layer(x), F.linear(x, layer.weight, layer.bias))
    layer.enable_adapters(True)
    assert torch.equal(layer(x), with_adapter)


def test_disabled_merged_layer_is_unmerged_in_forward() -> None:
    layer = make(dtype=torch.float64)
    x = torch.randn(2, 12, dtype=torch.float64)
    base = truth(layer, x, [])
    with_adapter = layer(x)
    layer.merge()
    layer.enable_adapters(False)
    torch.testing.assert_close(layer(x), base)
    assert not layer.merged
    layer.enable_adapters(True)
    torch.testing.assert_close(layer(x), with_adapter)


def test_set_adapter_trains_only_the_active() -> None:
    layer = make()
    layer.add_adapter("other", lora_alpha=3)
    randomize(layer)
    assert layer.active_adapters == ["default"]
    flags = lambda: {n: p.requires_grad for n, p in layer.named_parameters()}  # noqa: E731
    assert [n for n, on in flags().items() if on] == ["lora_A.default", "lora_B.default"]
    layer.set_adapter("other")
    assert [n for n, on in flags().items() if on] == ["lora_A.other", "lora_B.other"]
    x = torch.randn(2, 12)
    torch.testing.assert_close(layer(x).double(), truth(layer, x, ["other"]), atol=1e-5, rtol=1e-5)
    layer.set_adapter(["other", "default"], inference_mode=True)
    assert not any(flags().values())
    layer.set_adapter([])
    assert torch.equal(layer(x), F.linear(x, layer.weight, layer.bias))
    with pytest.raises(ValueError, match="'nope' is unknown"):
        layer.set_adapter(["default", "nope"])
    with pytest.raises(ValueError, match="each adapter once"):
        layer.set_adapter(["default", "default"])
    assert layer.active_adapters == []


def test_set_adapter_unmerges_first() -> None:
    layer = make()
    layer.add_adapter("other")
    before = layer.weight.detach().clone()
    layer.merge()
    with pytest.warns(UserWarning, match="unmerged"):
        layer.set_adapter("other")
    assert not layer.merged
    torch.testing.assert_close(layer.weight.detach(), before)


def test_lists_of_names_are_copies() -> None:
    layer = make()
    layer.active_adapters.append("x")
    layer.merged_adapters.append("x")
    assert layer.active_adapters == ["default"]
    assert not layer.merged


def test_add_adapter_twice() -> None:
    layer = make()
    with pytest.raises(ValueError, match=r"adapter_name is 'default'; the layer has \['default'\]"):
        layer.add_adapter("default")


def test_delete_adapter() -> None:
    layer = make()
    layer.add_adapter("other", r=2)
    layer.add_adapter("third", r=2)
    randomize(layer)
    layer.set_adapter(["default", "third"])
    layer.delete_adapter("third")
    assert layer.active_adapters == ["default"]
    layer.delete_adapter("default")
    assert layer.active_adapters == ["other"]
    assert layer.lora_A["other"].requires_grad
    assert [n for n, _ in layer.named_parameters()] == [
        "weight",
        "bias",
        "lora_A.other",
        "lora_B.other",
    ]
    layer.merge()
    with pytest.raises(ValueError, match="unmerge first"):
        layer.delete_adapter("other")
    layer.unmerge()
    layer.delete_adapter("other")
    x = torch.randn(2, 12)
    assert torch.equal(layer(x), F.linear(x, layer.weight, layer.bias))
    with pytest.raises(ValueError, match="'other' is unknown"):
        layer.delete_adapter("other")


def test_deleting_keeps_an_adapter_for_inference_frozen() -> None:
    layer = make()
    layer.add_adapter("other")
    layer.set_adapter("default", inference_mode=True)
    layer.delete_adapter("default")
    assert layer.active_adapters == ["other"]
    assert not layer.lora_A["other"].requires_grad


# ---- state


def test_plain_state_dict_loads() -> None:
    linear, layer = nn.Linear(12, 10), make()
    missing, unexpected = layer.load_state_dict(linear.state_dict(), strict=False)
    assert sorted(missing) == ["lora_A.default", "lora_B.default"]
    assert unexpected == []
    assert torch.equal(layer.weight, linear.weight)


def test_state_dict_round_trip() -> None:
    layer, other = make(seed=1), make(seed=2)
    x = torch.randn(3, 12)
    assert not torch.equal(other(x), layer(x))
    other.load_state_dict(layer.state_dict())
    assert torch.equal(other(x), layer(x))


@pytest.mark.parametrize("how", ["deepcopy", "pickle"])
def test_copies_are_whole_and_apart(how: str) -> None:
    layer = make(lora_dropout=0.1)
    layer.add_adapter("other", lora_alpha=3)
    randomize(layer)
    layer.set_adapter(["other", "default"])
    layer.eval()
    copied = copy.deepcopy(layer) if how == "deepcopy" else pickle.loads(pickle.dumps(layer))  # noqa: S301
    x = torch.randn(3, 12)
    assert torch.equal(copied(x), layer(x))
    assert repr(copied) == repr(layer)
    flags = [p.requires_grad for p in layer.parameters()]
    assert [p.requires_grad for p in copied.parameters()] == flags
    copied.set_adapter("default")
    copied.merge()
    copied.scaling["default"] = 7.0
    assert layer.active_adapters == ["other", "default"]
    assert not layer.merged
    assert layer.scaling["default"] == 1.0
    assert not torch.equal(copied.weight, layer.weight)


@pytest.mark.parametrize(
    ("convert", "dtype"),
    [
        (lambda m: m.half(), torch.float16),
        (lambda m: m.double(), torch.float64),
        (lambda m: m.to(torch.bfloat16), torch.bfloat16),
    ],
)
def test_conversions(convert: Any, dtype: torch.dtype) -> None:
    layer = make()
    x = torch.randn(3, 12)
    expected = truth(layer, x)
    layer = convert(layer)
    assert {p.dtype for p in layer.parameters()} == {dtype}
    y = layer(x.to(dtype))
    assert y.dtype == dtype
    assert relative_error(y, expected) < max(4 * torch.finfo(dtype).eps, 1e-6)


def test_meta_device() -> None:
    layer = LoraLinear(12, 10, r=4, device="meta")
    assert {p.device.type for p in layer.parameters()} == {"meta"}
    assert layer(torch.empty(3, 12, device="meta")).shape == (3, 10)
    source = make(r=4)
    assigned = copy.deepcopy(layer)
    assigned.load_state_dict(source.state_dict(), assign=True)
    x = torch.randn(3, 12)
    assert torch.equal(assigned(x), source(x))
    layer.to_empty(device="cpu")
    with torch.no_grad():
        for p in layer.parameters():
            p.fill_(math.nan)
    layer.reset_parameters()
    torch.testing.assert_close(layer(x), F.linear(x, layer.weight, layer.bias))
    bound = 1 / math.sqrt(12)
    assert 0.5 * bound < layer.lora_A["default"].abs().max() <= bound
    assert not layer.weight.requires_grad


@pytest.mark.parametrize("kind", ["pissa", "olora"])
def test_reset_of_a_start_from_the_weight(kind: str) -> None:
    layer = LoraLinear(12, 10, r=3, lora_alpha=6, init_lora_weights=kind)
    layer.reset_parameters()
    first = layer.weight + 2 * layer.lora_B["default"] @ layer.lora_A["default"]
    before = torch.linalg.svdvals(first)
    if kind == "pissa":
        torch.testing.assert_close(torch.linalg.svdvals(layer.weight)[:7], before[3:])
    layer.merge()
    torch.testing.assert_close(layer.weight, first)
    with pytest.raises(ValueError, match="unmerge first"):
        layer.reset_adapter("default")


def test_repr_shows_the_adapters() -> None:
    layer = make(r=4, lora_alpha=16, lora_dropout=0.25, use_rslora=True)
    text = repr(layer)
    assert "in_features=12, out_features=10, bias=True" in text
    assert "default: r=4, lora_alpha=16, lora_dropout=0.25, use_rslora=True" in text
    assert "active=['default'], merged=[]" in text
    layer.merge()
    assert "merged=['default']" in repr(layer)
    layer.enable_adapters(False)
    assert "disabled" in repr(layer)


# ---- the same as PEFT's layer


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("names", [["a"], ["b", "a"]])
def test_equals_peft(dtype: torch.dtype, names: list[str]) -> None:
    peft = pytest.importorskip("peft")
    torch.manual_seed(0)
    linear = nn.Linear(48, 40, dtype=dtype)
    kinds = {"a": {"r": 4, "lora_alpha": 12}, "b": {"r": 8, "use_rslora": True}}
    theirs = peft.tuners.lora.Linear(
        copy.deepcopy(linear), "a", peft.LoraConfig(**kinds["a"]), r=4, lora_alpha=12
    )
    theirs.update_layer("b", 8, 8, peft.LoraConfig(**kinds["b"]))
    ours = LoraLinear.from_linear(linear, adapter_name="a", **kinds["a"])
    ours.add_adapter("b", **kinds["b"])
    randomize(ours)
    for name in ("a", "b"):
        theirs.lora_A[name].weight.data.copy_(ours.lora_A[name])
        theirs.lora_B[name].weight.data.copy_(ours.lora_B[name])
    ours.set_adapter(names)
    theirs.set_adapter(names)
    x = torch.randn(6, 48).to(dtype)
    expected = truth(ours, x)
    error = relative_error(ours(x), expected)
    assert error <= 1.05 * relative_error(theirs(x), expected) + 1e-7
    assert error < 2 * torch.finfo(dtype).eps
    ours.merge()
    theirs.merge()
    # PEFT rounds each delta to the weight's dtype before it adds them, we only the sum.
    ulp = torch.finfo(dtype).eps
    torch.testing.assert_close(
        ours.weight.detach(), theirs.base_layer.weight.detach(), rtol=3 * ulp, atol=3 * ulp
    )


@pytest.mark.parametrize("kind", ["pissa", "olora"])
def test_starts_equal_peft(kind: str) -> None:
    peft = pytest.importorskip("peft")
    torch.manual_seed(0)
    linear = nn.Linear(24, 20)
    config = peft.LoraConfig(r=4, lora_alpha=12, init_lora_weights=kind)
    theirs = peft.tuners.lora.Linear(copy.deepcopy(linear), "default", config, 4, 12)
    ours = LoraLinear.from_linear(linear, r=4, lora_alpha=12, init_lora_weights=kind)
    torch.testing.assert_close(
        ours.lora_B["default"] @ ours.lora_A["default"],
        theirs.lora_B["default"].weight @ theirs.lora_A["default"].weight,
    )
    torch.testing.assert_close(ours.weight.detach(), theirs.base_layer.weight.detach())
