"""Which modules can get an adapter, and what they say about their weight."""

from __future__ import annotations

import sys
from typing import Any

import torch
from torch import Tensor, nn

_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
_EXPECTED = "expected torch.nn.Linear or transformers' Conv1D"


def is_conv1d(module: nn.Module) -> bool:
    """Whether ``module`` is transformers' Conv1D, a linear layer with its weight stored [K, N]."""
    # Where transformers was never imported no module can be one of its Conv1D.
    pytorch_utils = sys.modules.get("transformers.pytorch_utils")
    return pytorch_utils is not None and isinstance(module, pytorch_utils.Conv1D)


def kind_of(module: nn.Module) -> str:
    """The module's type in full, for messages."""
    return f"{type(module).__module__}.{type(module).__qualname__}"


def has_own_forward(module: nn.Module) -> bool:
    """Whether a linear layer computes by code of its own, or from a weight that is no plain tensor.

    accelerate's hooks, which put a forward around the class's on the instance, do not count.
    """
    if isinstance(module, nn.Linear):
        own = type(module).forward is not nn.Linear.forward
    elif is_conv1d(module):
        own = type(module).__name__ != "Conv1D"
    else:
        return True
    replaced = "forward" in vars(module) and accelerate_hook(module) is None
    weight = module._parameters.get("weight")
    return own or replaced or (weight is not None and not _is_plain(weight))


def _is_plain(weight: Tensor) -> bool:
    """Whether a weight holds its values; a quantised one is a tensor subclass that computes them.

    torch's own subclasses (DTensor, FakeTensor, a parameter not yet made) are no quantised ones.
    """
    kind = type(weight)
    if kind in (Tensor, nn.Parameter) or kind.__module__.split(".")[0] == "torch":
        return True
    return (
        kind.__torch_dispatch__ is nn.Parameter.__torch_dispatch__
        and kind.__torch_function__ is nn.Parameter.__torch_function__
    )


def check_base(module: nn.Module, path: str = "linear") -> nn.Parameter:
    """The weight of ``module``, if a :class:`fused_peft.LoraLinear` can take its place.

    Raises:
        TypeError: it is neither nn.Linear nor transformers' Conv1D, or computes something else
            (a subclass or an instance with a forward of its own), or has no plain weight Parameter
            of a floating dtype. The message begins with ``path``.
    """
    kind = kind_of(module)
    if not isinstance(module, nn.Linear) and not is_conv1d(module):
        raise TypeError(f"{path} is a {kind}; {_EXPECTED}")
    if has_own_forward(module):
        raise TypeError(
            f"{path} is a {kind} with a forward of its own; {_EXPECTED}, or "
            "fused_peft.LoraWrappedLinear around it"
        )
    weight = module._parameters.get("weight")
    if weight is None:
        raise TypeError(
            f"{path} is a {kind} whose weight is no plain parameter (parametrized or pruned?); "
            f"{_EXPECTED} with a weight Parameter"
        )
    if hasattr(weight, "placements"):
        raise TypeError(
            f"{path} has a weight that is split over processes already; add adapters before "
            "parallelize_module or fully_shard"
        )
    if weight.dtype not in _DTYPES:
        names = ", ".join(str(dtype).removeprefix("torch.") for dtype in _DTYPES)
        raise TypeError(f"{path} has a weight of {weight.dtype}; expected one of {names}")
    if nn.parameter.is_lazy(weight):
        raise TypeError(f"{path} is a {kind} that has not run yet; run it once to give it a size")
    return weight


def features_of(module: nn.Module) -> tuple[int, int] | None:
    """K and N as the module itself says them, None where it does not."""
    names = ("nx", "nf") if is_conv1d(module) else ("in_features", "out_features")
    k, n = (getattr(module, name, None) for name in names)
    if type(k) is not int or type(n) is not int or min(k, n) < 1:
        return None
    return k, n


def check_wrappable(module: nn.Module, path: str = "base_layer") -> tuple[int, int]:
    """K and N of ``module``, if a :class:`fused_peft.LoraWrappedLinear` can be put around it.

    Raises:
        TypeError: it does not say its sizes. The message begins with ``path``.
    """
    features = features_of(module)
    if features is None:
        raise TypeError(
            f"{path} is a {kind_of(module)}; {_EXPECTED}, or a linear layer of another kind that "
            "has in_features and out_features"
        )
    return features


def check_target(module: nn.Module, path: str) -> None:
    """Raise TypeError where ``module`` can get no adapter of either class."""
    if has_own_forward(module):
        check_wrappable(module, path)
    else:
        check_base(module, path)


def outline_weight(module: nn.Module) -> Tensor:
    """``[N, K]``: of a plain linear layer its weight, else what has the same shape and device.

    That has no memory and no values. Its dtype is that of a floating weight, else float32, and its
    device that where the layer computes, also while its weight is offloaded.
    """
    weight = module._parameters.get("weight")
    if weight is not None and not has_own_forward(module):
        plain = weight.t() if is_conv1d(module) else weight
        return on_execution_device(module, plain)
    k, n = check_wrappable(module)
    tensors = [t for t in (*module.parameters(), *module.buffers()) if t is not None]
    dtype = weight.dtype if weight is not None and weight.is_floating_point() else torch.float32
    device = tensors[0].device if tensors else torch.device("cpu")
    return on_execution_device(module, torch.empty((), dtype=dtype, device=device).expand(n, k))


# ---- accelerate's hooks: a dispatched or offloaded model ----------------------------------------


def accelerate_hook(module: nn.Module) -> Any:
    """The hook that accelerate put around a module's own forward, or None.

    ``accelerate.hooks.add_hook_to_module`` shadows the class's forward on the instance, and keeps
    that in ``_old_forward``.
    """
    old = vars(module).get("_old_forward")
    hook = vars(module).get("_hf_hook")
    if hook is None or getattr(old, "__func__", None) is not type(module).forward:
        return None
    return hook


def is_offloaded(module: nn.Module) -> bool:
    """Whether accelerate brings the module's weights in for each forward only."""
    hook = vars(module).get("_hf_hook")
    return any(getattr(h, "offload", False) for h in getattr(hook, "hooks", [hook]))


def on_execution_device(module: nn.Module, weight: Tensor) -> Tensor:
    """``weight``, or in place of an offloaded one a tensor without memory where it computes."""
    device = execution_device(module, weight)
    if device == weight.device:
        return weight
    return torch.empty((), dtype=weight.dtype, device=device).expand(weight.shape)


def execution_device(module: nn.Module, weight: Tensor) -> torch.device:
    """Where ``module`` computes with ``weight``: its own device, unless it is offloaded."""
    if not weight.is_meta or not is_offloaded(module):
        return weight.device
    hook = vars(module)["_hf_hook"]
    devices = [getattr(h, "execution_device", None) for h in getattr(hook, "hooks", [hook])]
    return torch.device(next((device for device in devices if device is not None), "cpu"))


def move_hook(hook: Any, module: nn.Module) -> None:
    """Let accelerate's hook run around ``module``, whose parameters it has placed already."""
    from accelerate.hooks import add_hook_to_module

    def already_placed(module: nn.Module) -> nn.Module:
        return module

    hook.init_hook = already_placed  # its own would look for the adapters among the weights
    try:
        add_hook_to_module(module, hook)
    finally:
        del hook.init_hook
