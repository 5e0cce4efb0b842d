"""How the adapters of a LoraLinear start: init_lora_weights."""

from __future__ import annotations

import math

import pytest
import torch
from lora_layers import make, relative_error
from torch import nn

from fused_peft import LoraLinear

# ---- forward


def test_default_start_is_kaiming_and_zero() -> None:
    layer = LoraLinear(400, 300, r=16)
    bound = 1 / math.sqrt(400)
    a = layer.lora_A["default"]
    assert a.abs().max() <= bound
    torch.testing.assert_close(a.std().item(), bound / math.sqrt(3), rtol=0.05, atol=0)
    assert not layer.lora_B["default"].any()


def test_gaussian_start() -> None:
    layer = LoraLinear(400, 300, r=16, init_lora_weights="Gaussian")
    torch.testing.assert_close(layer.lora_A["default"].std().item(), 1 / 16, rtol=0.05, atol=0)
    assert layer.lora_A["default"].abs().max() > 2.5 / 16  # no uniform draw reaches that
    assert not layer.lora_B["default"].any()


def test_random_start() -> None:
    layer = LoraLinear(400, 300, r=16, init_lora_weights=False)
    b = layer.lora_B["default"]
    assert b.abs().max() <= 1 / 4
    torch.testing.assert_close(b.std().item(), 1 / 4 / math.sqrt(3), rtol=0.05, atol=0)


def test_orthogonal_start() -> None:
    layer = LoraLinear(400, 300, r=16, init_lora_weights="orthogonal")
    a, b = layer.lora_A["default"], layer.lora_B["default"]
    assert (b @ a).abs().max() < 1e-6
    # Each is normal / 10 times half of an orthonormal basis of 16: variance 1/100 * 8/16.
    torch.testing.assert_close(a.std().item(), 0.1 * math.sqrt(0.5), rtol=0.1, atol=0)
    torch.testing.assert_close(b.std().item(), 0.1 * math.sqrt(0.5), rtol=0.1, atol=0)


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("kind", ["pissa", "olora", "pissa_niter_8"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_starts_from_the_weight_keep_the_output(
    kind: str, dtype: torch.dtype, transposed: bool
) -> None:
    torch.manual_seed(0)
    if transposed:
        conv1d = pytest.importorskip("transformers.pytorch_utils").Conv1D
        base = conv1d(24, 32).to(dtype)
    else:
        base = nn.Linear(32, 24, dtype=dtype)
    original = base.weight.detach().clone()
    x = torch.randn(5, 32).to(dtype)
    expected = base(x).double()
    layer = LoraLinear.from_linear(
        base, r=4, lora_alpha=6, init_lora_weights=kind, adapter_dtype=torch.float32
    )
    assert not torch.equal(layer.weight, original)
    assert relative_error(layer(x), expected) < 4 * max(torch.finfo(dtype).eps, 1e-7)
    layer.merge()
    rounding = 2 * torch.finfo(dtype).eps * original.abs().max().item()
    torch.testing.assert_close(layer.weight.detach(), original, rtol=0, atol=rounding)


def test_pissa_takes_the_leading_singular_values() -> None:
    linear = nn.Linear(20, 30, dtype=torch.float64)
    u, s, vh = torch.linalg.svd(linear.weight.detach(), full_matrices=False)
    layer = LoraLinear.from_linear(linear, r=3, lora_alpha=6, init_lora_weights="pissa")
    a, b = layer.lora_A["default"], layer.lora_B["default"]
    torch.testing.assert_close(2.0 * b @ a, u[:, :3] @ torch.diag(s[:3]) @ vh[:3])
    torch.testing.assert_close(a @ a.t(), torch.diag(s[:3] / 2))
    torch.testing.assert_close(torch.linalg.svdvals(layer.weight)[: 20 - 3], s[3:])


def test_olora_is_the_leading_part_of_qr() -> None:
    linear = nn.Linear(20, 30, dtype=torch.float64)
    original = linear.weight.detach().clone()
    q, upper = torch.linalg.qr(original)
    layer = LoraLinear.from_linear(linear, r=3, lora_alpha=6, init_lora_weights="olora")
    torch.testing.assert_close(layer.lora_A["default"].detach(), upper[:3])
    torch.testing.assert_close(layer.lora_B["default"].detach(), q[:, :3])
    torch.testing.assert_close(layer.weight.detach(), original - 2.0 * q[:, :3] @ upper[:3])


def test_starts_from_the_weight_under_autocast() -> None:
    linear = nn.Linear(32, 24)
    original = linear.weight.detach().clone()
    with torch.autocast("cpu", torch.bfloat16):
        layer = LoraLinear.from_linear(linear, init_lora_weights="pissa")
        layer.merge()
    torch.testing.assert_close(layer.weight.detach(), original, rtol=0, atol=1e-6)


@pytest.mark.parametrize("kind", ["pissa", "olora"])
def test_starts_from_the_weight_need_its_values(kind: str) -> None:
    linear = nn.Linear(6, 4)
    with torch.no_grad():
        linear.weight[1, 2] = math.nan
    with pytest.raises(ValueError, match="NaN or infinity"):
        LoraLinear.from_linear(linear, r=2, init_lora_weights=kind)
    assert linear.weight.requires_grad
    with pytest.raises(ValueError, match="meta"):
        LoraLinear.from_linear(nn.Linear(6, 4, device="meta"), r=2, init_lora_weights=kind)
    layer = make(6, 4)
    layer.merge()
    with pytest.raises(ValueError, match="unmerge first"):
        layer.add_adapter("other", r=2, init_lora_weights=kind)
