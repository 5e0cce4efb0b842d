"""Autocast leaves float64 and integers alone: so do the ops of the package."""

from __future__ import annotations

import pytest
import torch
from lora_layers import make, truth
from torch import Tensor
from torch.nn import functional as F

from fused_peft import explain, ops


@pytest.fixture(autouse=True)
def autocast():
    with torch.autocast("cpu", torch.bfloat16):
        yield


def test_a_float64_layer_keeps_its_digits() -> None:
    layer = make(dtype=torch.float64)
    x = torch.randn(3, 12, dtype=torch.float64)
    y = layer(x)
    assert y.dtype == F.linear(x, layer.weight).dtype == torch.float64
    with torch.autocast("cpu", enabled=False):
        torch.testing.assert_close(y, truth(layer, x, ["default"]))
    assert "x is torch.float64" in explain(layer, x)


def test_a_float64_update_keeps_its_digits() -> None:
    base, x, lora_a, lora_b = (
        torch.randn(shape, dtype=torch.float64) for shape in ((3, 6), (3, 12), (2, 12), (6, 2))
    )
    y = ops.lora_update(base, x, lora_a, lora_b, scaling=0.5)
    with torch.autocast("cpu", enabled=False):
        torch.testing.assert_close(y, base + 0.5 * x @ lora_a.t() @ lora_b.t())


def test_float64_attention_keeps_its_digits() -> None:
    q, k, v = (torch.randn(2, 2, 5, 8, dtype=torch.float64) for _ in range(3))
    prefix: Tensor = torch.randn(2, 3, 8, dtype=torch.float64)
    out = ops.prefix_attention(q, k, v, prefix, prefix)
    wide = (torch.cat((prefix.expand(2, -1, -1, -1), x), dim=2) for x in (k, v))
    with torch.autocast("cpu", enabled=False):
        torch.testing.assert_close(out, F.scaled_dot_product_attention(q, *wide))


def test_integers_are_refused_as_without_autocast() -> None:
    layer = make(dtype=torch.float32)
    with pytest.raises(ValueError, match=r"x is torch\.int64"):
        layer(torch.ones(3, 12, dtype=torch.int64))
