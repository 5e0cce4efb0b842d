"""What every op of the package shares: the extension, seeds, autocast, who may use the kernels."""

from __future__ import annotations

import os

import torch
from torch import Tensor

try:
    from fused_peft import _C
except ImportError as error:
    raise ImportError(
        f"fused_peft's compiled extension cannot be loaded ({error}). If this is a source tree, "
        "install it with `pip install .` and import it from another directory, or use `pip "
        "install -e .`"
    ) from error

KERNEL_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
MAX_RANK: int = _C.max_rank

if _isa := os.environ.get("FUSED_PEFT_CPU_ISA"):
    try:
        _C.set_cpu_isa(_isa)
    except ValueError as error:
        raise ValueError(f"FUSED_PEFT_CPU_ISA: {error}") from None


def new_seed(device: torch.device | str = "cpu") -> Tensor:
    """Draw a dropout seed from torch's default generator of ``device``.

    Returns:
        int64 tensor without dimensions. ``torch.manual_seed`` makes it repeatable, and activation
        checkpointing, which restores the generator, draws the same one again.
    """
    return torch.randint(2**62, (), dtype=torch.int64, device=device)


def autocast_dtype(device_type: str) -> torch.dtype | None:
    """The dtype that autocast casts to on this kind of device now, None where it is off."""
    if device_type == "meta" or not torch.is_autocast_enabled(device_type):
        return None
    return torch.get_autocast_dtype(device_type)


def autocast(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """The tensor as autocast to ``dtype`` gives it to a torch op: float64 and integers stay."""
    eligible = tensor.is_floating_point() and tensor.dtype != torch.float64
    return tensor.to(dtype) if eligible else tensor


def differentiated_otherwise() -> bool:
    """Whether a torch.func transform or forward-mode AD runs, which need the plain torch ops."""
    if torch.compiler.is_compiling():
        return False
    return (
        torch._C._functorch.peek_interpreter_stack() is not None
        or torch.autograd.forward_ad._current_level >= 0
    )


def check_dropout(dropout_p: float, seed: Tensor | None) -> None:
    """ValueError where the probability is outside [0, 1), or above 0 without a usable seed."""
    if dropout_p == 0.0:
        return
    if not 0.0 <= dropout_p < 1.0:
        raise ValueError(f"dropout_p is {dropout_p}; expected 0 <= dropout_p < 1")
    if seed is None or seed.numel() != 1 or seed.dtype != torch.int64:
        raise ValueError(f"seed is {seed!r}; dropout_p > 0 needs an int64 tensor with one element")
