"""The class that :func:`fused_peft.integrations.peft.fuse` gives to a PEFT ``lora.Linear``.

It adds a ``forward`` and nothing else: no attribute, parameter or buffer. What the layer is (its
adapters, which are active, scaling, dropout) is read from PEFT's own attributes at every call, so
whatever PEFT does to the layer afterwards holds in the next one.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from peft.tuners.lora import Linear, LoraLayer
from torch import Tensor, nn
from torch.nn.modules import module as _torch_module
from transformers.pytorch_utils import Conv1D

from fused_peft import ops
from fused_peft.nn.adapter_sum import Adapter, linear_with_adapters
from fused_peft.ops._common import KERNEL_DTYPES, autocast, differentiated_otherwise

_PLAIN = (Tensor, nn.Parameter)


class _Operands(NamedTuple):
    x: Tensor  # [..., K]
    weight: Tensor  # [N, K]
    bias: Tensor | None  # [N]
    adapters: list[Adapter]


class FusedLinear(Linear):
    """PEFT's ``lora.Linear`` with :func:`fused_peft.ops.lora_linear` as its forward pass.

    What the op does not cover runs PEFT's own forward: merged or disabled adapters, extra
    arguments (``adapter_names``), DoRA and every other variant, bases other than a frozen
    ``nn.Linear`` or Conv1D, hooks on the layer's parts, dtypes and devices without a kernel,
    ``torch.func`` transforms.
    """

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """As PEFT's: ``[..., K] -> [..., N]``."""
        if args or kwargs:
            return super().forward(x, *args, **kwargs)
        operands = operands_of(self, x)
        if isinstance(operands, str):
            return super().forward(x)
        return linear_with_adapters(*operands)

    def _get_name(self) -> str:
        return "Linear[fused_peft]"

    def _explain_path(self, x: Tensor) -> dict[str, float] | str:
        """The dropout of each active adapter, or why PEFT's own forward runs on x."""
        operands = operands_of(self, x)
        if isinstance(operands, str):
            return operands
        names = [name for name in self.active_adapters if name in self.lora_A]
        dropout = [adapter.dropout_p for adapter in operands.adapters]
        return dict(zip(names, dropout, strict=True))


# ---- who is served -------------------------------------------------------------------------------


def base_reason(base: nn.Module) -> str | None:
    """Why the op cannot stand for ``base(x)``; None where it can."""
    kind = type(base)
    stock = kind.forward is nn.Linear.forward or kind is Conv1D
    if not stock:
        return f"is a {kind.__name__}, not a plain nn.Linear or Conv1D"
    return None


def operands_of(layer: Any, x: Tensor) -> _Operands | str:
    """What the op is called with for ``layer(x)``, or why PEFT's own forward has to run."""
    if layer.disable_adapters:
        return "the adapters are disabled"
    if layer.merged_adapters:
        return f"{layer.merged_adapters} are merged into the weight"
    if type(x) not in _PLAIN:
        return f"x is a {type(x).__name__}"
    base = layer._modules["base_layer"]
    reason = base_reason(base) or _interference(base)
    if reason is not None:
        return f"the base layer {reason}"
    if (
        _torch_module._global_forward_hooks
        or _torch_module._global_forward_pre_hooks
        or _torch_module._global_backward_hooks
        or _torch_module._global_backward_pre_hooks
    ):
        return "there is a hook for all modules"
    if differentiated_otherwise():
        return "a torch.func transform or forward-mode AD is running"
    dtype = ops.autocast_dtype(x.device.type)
    adapters = _active_adapters(layer, x, dtype is not None)
    if isinstance(adapters, str):
        return adapters
    weight, bias = _weight_of(base), base.bias
    reason = _base_operand_reason(x, weight, bias, dtype is not None)
    if reason is not None:
        return reason
    if type(base) is Conv1D:
        weight = weight.t()
    if x.dim() == 0 or x.shape[-1] != weight.shape[1]:
        return f"x has shape {tuple(x.shape)}; expected [..., {weight.shape[1]}]"
    if dtype is not None:
        x, weight = autocast(x, dtype), autocast(weight, dtype)
        bias = None if bias is None else autocast(bias, dtype)
    rank = 0
    for adapter in adapters:
        reason = ops.fallback_reason(x, weight, adapter.lora_a, adapter.lora_b)
        if reason is not None:
            return reason
        rank += adapter.lora_a.shape[0]
    if rank > ops.MAX_RANK:
        return f"the ranks add up to {rank}; kernels exist up to {ops.MAX_RANK}"
    return _Operands(x, weight, bias, adapters)


def _interference(module: nn.Module) -> str | None:
    """What calling ``module`` does beside its class's forward, which the op would leave out."""
    if "forward" in module.__dict__:
        return "has a forward of its own"
    if (
        module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
    ):
        return "has a hook"
    return None


def _weight_of(linear: Any) -> Any:
    # The dictionary first: a look-up through nn.Module.__getattr__ costs as much as all of this.
    weight = linear._parameters.get("weight")
    return linear.weight if weight is None else weight


def _base_operand_reason(x: Tensor, weight: Any, bias: Any, autocast: bool) -> str | None:
    """Why the base layer's tensors are not the op's: PEFT then computes, or raises, its own way."""
    for name, operand in (("weight", weight), ("bias", bias)):
        if operand is None and name == "bias":
            continue
        if type(operand) not in _PLAIN:
            return f"the base layer's {name} is a {type(operand).__name__}"
        if operand.device != x.device:
            return f"the base layer's {name} is on {operand.device} and x is on {x.device}"
        if not autocast:
            if operand.dtype != x.dtype:
                return f"the base layer's {name} is {operand.dtype} and x is {x.dtype}"
        elif operand.dtype not in KERNEL_DTYPES or x.dtype not in KERNEL_DTYPES:
            return f"the base layer's {name} is {operand.dtype}, x is {x.dtype}, under autocast"
    if weight.requires_grad:
        return "the base layer's weight is trained"
    return None


def _active_adapters(layer: Any, x: Tensor, autocast: bool) -> list[Adapter] | str:
    """The active adapters that the layer has, or why one of them is none of the op's."""
    parts = layer._modules
    every_a, every_b = parts["lora_A"]._modules, parts["lora_B"]._modules
    adapters = []
    for name in layer.active_adapters:
        lora_a = every_a.get(name)
        if lora_a is None:
            continue
        if name in layer.lora_variant:
            variant = type(layer.lora_variant[name]).__name__
            return f"adapter {name!r} is a variant of LoRA ({variant})"
        lora_b, dropout = every_b[name], parts["lora_dropout"]._modules[name]
        for part, module, reason in (
            ("lora_A", lora_a, _factor_reason(lora_a, x)),
            ("lora_B", lora_b, _factor_reason(lora_b, x, bias_allowed=True)),
            ("lora_dropout", dropout, _dropout_reason(dropout)),
        ):
            reason = reason or _interference(module)
            if reason is not None:
                return f"{part} of adapter {name!r} {reason}"
        weight_a, weight_b = _weight_of(lora_a), _weight_of(lora_b)
        dtype = weight_a.dtype
        if weight_b.dtype != dtype:
            return f"adapter {name!r} is {dtype} and {weight_b.dtype}"
        if dtype != x.dtype and not autocast and not layer.cast_input_dtype_enabled:
            return f"adapter {name!r} is {dtype}, x is {x.dtype} and PEFT is not to cast it"
        dropout_p = dropout.p if type(dropout) is nn.Dropout and dropout.training else 0.0
        adapters.append(Adapter(weight_a, weight_b, layer.scaling[name], dropout_p, lora_b.bias))
    return adapters or "no adapter is active"


def _factor_reason(factor: nn.Module, x: Tensor, bias_allowed: bool = False) -> str | None:
    if type(factor) is not nn.Linear:
        return f"is a {type(factor).__name__}"
    weight = _weight_of(factor)
    if type(weight) not in _PLAIN:
        return f"is a {type(weight).__name__}"
    if weight.device != x.device:
        return f"is on {weight.device} and x is on {x.device}"
    return None if bias_allowed or factor.bias is None else "has a bias"


def _dropout_reason(dropout: nn.Module) -> str | None:
    if type(dropout) is nn.Dropout:
        return f"is {dropout}" if dropout.inplace or dropout.p >= 1.0 else None
    return None if type(dropout) is nn.Identity else f"is a {type(dropout).__name__}"


# ---- changing a layer's class --------------------------------------------------------------------


def unfusable_reason(module: nn.Module) -> str | None:
    """Why a layer of PEFT's LoRA stays as it is; None where it can be, or is, fused."""
    kind = type(module)
    if kind is FusedLinear:
        return None
    if kind is not Linear:
        return f"a {kind.__name__}"
    if "forward" in module.__dict__:
        return "a Linear with a forward of its own"
    base: Any = module.base_layer
    reason = base_reason(base)
    return None if reason is None else f"a Linear whose base layer {reason}"


def unfusable_layers(model: nn.Module) -> str:
    """Which LoRA layers cannot be fused and why, each reason once."""
    found: dict[str, int] = {}
    for module in model.modules():
        if isinstance(module, LoraLayer):
            reason = unfusable_reason(module) or _variants(module)
            if reason is not None:
                found[reason] = found.get(reason, 0) + 1
    return ", ".join(f"{count} x {reason}" for reason, count in found.items())


def has_fusable_layer(model: nn.Module) -> bool:
    """Whether there is a layer that the op serves for one of its adapters."""
    return any(
        isinstance(module, Linear) and unfusable_reason(module) is None and not _variants(module)
        for module in model.modules()
    )


def _variants(layer: Any) -> str | None:
    """The variants of LoRA that the layer's adapters are, where none is plain LoRA."""
    if not layer.lora_A or any(name not in layer.lora_variant for name in layer.lora_A):
        return None
    names = {type(variant).__name__ for variant in layer.lora_variant.values()}
    return f"a Linear with {', '.join(sorted(names))}"


def fuse_layer(module: Any) -> None:
    """Make it a FusedLinear if it is a LoRA layer that can be one."""
    if type(module) is Linear and unfusable_reason(module) is None:
        module.__class__ = FusedLinear


def unfuse_layer(module: Any) -> None:
    """Give PEFT's class back."""
    if type(module) is FusedLinear:
        module.__class__ = Linear  # type: ignore[assignment]
