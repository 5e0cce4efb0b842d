"""LoraLinear layers for tests, and what they compute in float64."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fused_peft import LoraLinear

HALF = (torch.bfloat16, torch.float16)


def randomize(layer: LoraLinear, seed: int = 0) -> LoraLinear:
    """Gives every adapter of the layer a lora_B that is not zero."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in [*layer.lora_A.values(), *layer.lora_B.values()]:
        values = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
        parameter.data.copy_(values * parameter.shape[1] ** -0.5)
    return layer


def make(k: int = 12, n: int = 10, seed: int = 0, **kwargs: Any) -> LoraLinear:
    torch.manual_seed(seed)
    return randomize(LoraLinear(k, n, **kwargs), seed)


def truth(layer: LoraLinear, x: Tensor, names: list[str] | None = None) -> Tensor:
    """Equation 3 of the LoRA paper in float64, from the layer's parameters."""
    weight = layer.weight.double().t() if layer.fan_in_fan_out else layer.weight.double()
    total = F.linear(x.double(), weight, None if layer.bias is None else layer.bias.double())
    for name in layer.active_adapters if names is None else names:
        update = x.double() @ layer.lora_A[name].double().t() @ layer.lora_B[name].double().t()
        total = total + update * layer.scaling[name]
    return total


def relative_error(actual: Tensor, expected: Tensor) -> float:
    return float((actual.detach().double() - expected.detach()).norm() / expected.detach().norm())


def versions_and_values(layer: nn.Module) -> list[tuple[Any, ...]]:
    return [
        (name, id(p), p._version, p.requires_grad, p.detach().clone().tolist())
        for name, p in layer.named_parameters()
    ]
