"""Which modules a :class:`fused_peft.LoraLinear` can stand in for."""

from __future__ import annotations

import sys

import torch
from torch import nn

_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def is_conv1d(module: nn.Module) -> bool:
    """Whether ``module`` is transformers' Conv1D, a linear layer with its weight stored [K, N]."""
    # Where transformers was never imported no module can be one of its Conv1D.
    pytorch_utils = sys.modules.get("transformers.pytorch_utils")
    return pytorch_utils is not None and isinstance(module, pytorch_utils.Conv1D)


def check_base(module: nn.Module, path: str = "linear") -> nn.Parameter:
    """The weight of ``module``, if it can get an adapter.

    Raises:
        TypeError: it is neither nn.Linear nor transformers' Conv1D, or computes something else
            (a subclass or an instance with a forward of its own), or has no plain weight Parameter
            of a floating dtype. The message begins with ``path``.
    """
    expected = "expected torch.nn.Linear or transformers' Conv1D"
    kind = f"{type(module).__module__}.{type(module).__qualname__}"
    if isinstance(module, nn.Linear):
        own_forward = type(module).forward is not nn.Linear.forward
    elif is_conv1d(module):
        own_forward = type(module).__name__ != "Conv1D"
    else:
        raise TypeError(f"{path} is a {kind}; {expected}")
    if own_forward or "forward" in vars(module):
        raise TypeError(f"{path} is a {kind} with a forward of its own; {expected}")
    weight = module._parameters.get("weight")
    if weight is None:
        raise TypeError(
            f"{path} is a {kind} whose weight is no plain parameter (parametrized or pruned?); "
            f"{expected} with a weight Parameter"
        )
    if weight.dtype not in _DTYPES:
        names = ", ".join(str(dtype).removeprefix("torch.") for dtype in _DTYPES)
        raise TypeError(f"{path} has a weight of {weight.dtype}; expected one of {names}")
    return weight
