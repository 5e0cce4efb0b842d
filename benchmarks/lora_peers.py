"""The layers that bench_lora_linear.py compares, all with the same weights and rank.

linear         nn.Linear without any adapter: the floor of every unfused design
peft           Hugging Face PEFT's lora.Linear with its defaults (float32 adapters)
peft-compiled  the same by torch.compile
unsloth        Unsloth's order of operations in torch: the base product, then ``addmm_`` of the
               update; the backward pass recomputes ``x lora_a^T``
lorafusion     LoRAFusion's order of operations in torch: s first and kept, ``addmm`` of the update;
               the backward pass takes ds and dlora_b from dy, then dx, then dlora_a
ours           fused_peft.LoraLinear, adapters in the base dtype
ours-fp32      fused_peft.LoraLinear with float32 adapters, PEFT's default
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from fused_peft import LoraLinear

PEERS = ("linear", "peft", "peft-compiled", "unsloth", "lorafusion", "ours", "ours-fp32")


class UnslothOrder(torch.autograd.Function):
    """y = x W^T, then the update added in place; nothing but the operands is kept."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, lora_a: Tensor, lora_b: Tensor, scaling: float
    ) -> Tensor:
        """``[M, K] -> [M, N]``."""
        ctx.save_for_backward(x, weight, lora_a, lora_b)
        ctx.scaling = scaling
        return (x @ weight.t()).addmm_(x @ lora_a.t(), lora_b.t(), alpha=scaling)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        """Gradients of x, lora_a and lora_b."""
        x, weight, lora_a, lora_b = ctx.saved_tensors
        ds = dy @ lora_b
        dlora_a = (ds.t() @ x) * ctx.scaling
        dlora_b = (dy.t() @ (x @ lora_a.t())) * ctx.scaling
        dx = (dy @ weight).addmm_(ds, lora_a, alpha=ctx.scaling)
        return dx, None, dlora_a, dlora_b, None


class LoraFusionOrder(torch.autograd.Function):
    """s = scaling x lora_a^T is kept; each product of the backward pass reads dy or x once."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, lora_a: Tensor, lora_b: Tensor, scaling: float
    ) -> Tensor:
        """``[M, K] -> [M, N]``."""
        s = (x @ lora_a.t()) * scaling
        ctx.save_for_backward(x, weight, lora_a, lora_b, s)
        ctx.scaling = scaling
        return torch.addmm(x @ weight.t(), s, lora_b.t())

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        """Gradients of x, lora_a and lora_b."""
        x, weight, lora_a, lora_b, s = ctx.saved_tensors
        ds, dlora_b = (dy @ lora_b) * ctx.scaling, dy.t() @ s
        return torch.addmm(dy @ weight, ds, lora_a), None, ds.t() @ x, dlora_b, None


class InOrder(nn.Module):
    """A linear layer with LoRA that follows one of the orders above."""

    def __init__(self, order: type, weight: Tensor, a: Tensor, b: Tensor, scaling: float) -> None:
        super().__init__()
        self.order, self.weight, self.scaling = order, weight, scaling
        self.lora_a, self.lora_b = nn.Parameter(a), nn.Parameter(b)

    def forward(self, x: Tensor) -> Tensor:
        """``[M, K] -> [M, N]``."""
        y = self.order.apply(x, self.weight, self.lora_a, self.lora_b, self.scaling)  # type: ignore[attr-defined]
        assert isinstance(y, Tensor)
        return y


def build(
    peers: list[str], k: int, n: int, r: int, dtype: torch.dtype, device: str
) -> dict[str, nn.Module]:
    """The layers asked for, ``K -> N`` with rank ``r``, on one frozen weight."""
    torch.manual_seed(0)
    base = nn.Linear(k, n, bias=False, dtype=dtype, device=device).requires_grad_(False)

    def fresh() -> nn.Linear:  # the same weight tensor for all
        linear = nn.Linear(k, n, bias=False, dtype=dtype, device="meta")
        linear.weight = base.weight
        return linear

    alpha, scaling = 2 * r, 2.0
    lora_a = torch.randn(r, k, device=device) / k**0.5
    lora_b = torch.randn(n, r, device=device)

    def peft_layer() -> nn.Module:
        from peft import LoraConfig, get_peft_model

        model = nn.ModuleDict({"proj": fresh()})
        config = LoraConfig(r=r, lora_alpha=alpha, target_modules=["proj"])
        layer = get_peft_model(model, config).base_model.model["proj"]
        layer.lora_A["default"].weight.data.copy_(lora_a)
        layer.lora_B["default"].weight.data.copy_(lora_b)
        assert isinstance(layer, nn.Module)
        return layer

    def ours(adapter_dtype: torch.dtype) -> nn.Module:
        layer = LoraLinear.from_linear(fresh(), r=r, lora_alpha=alpha, adapter_dtype=adapter_dtype)
        layer.lora_A["default"].data.copy_(lora_a)
        layer.lora_B["default"].data.copy_(lora_b)
        return layer

    def in_order(order: type) -> nn.Module:
        return InOrder(order, base.weight, lora_a.to(dtype), lora_b.to(dtype), scaling)

    makers: dict[str, Callable[[], nn.Module]] = {
        "linear": fresh,
        "peft": peft_layer,
        "peft-compiled": lambda: torch.compile(peft_layer()),
        "unsloth": lambda: in_order(UnslothOrder),
        "lorafusion": lambda: in_order(LoraFusionOrder),
        "ours": lambda: ours(dtype),
        "ours-fp32": lambda: ours(torch.float32),
    }
    return {name: makers[name]() for name in peers}
