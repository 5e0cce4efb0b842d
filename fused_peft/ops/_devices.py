"""Which kernels serve which tensors: the CPU's, the GPU's, or the GPU's under the simulator."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fused_peft import _C

# Whether fused_peft.simulated_cuda is in force: CPU tensors run the CUDA kernels.
_simulating = False

CUDA_DTYPES = (torch.bfloat16, torch.float16)
CUDA_MAX_RANK: int = _C.cuda_max_rank
_MIN_CAPABILITY = (8, 0)


def set_simulating(on: bool) -> bool:
    """Switches :func:`kernel_op` and :func:`kernel_device` to the simulated device, or back.

    Returns:
        What was in force before.
    """
    global _simulating
    before, _simulating = _simulating, on
    return before


@functools.cache
def built_with_cuda() -> bool:
    """Whether the extension holds CUDA kernels."""
    return bool(_C.build_info()["cuda_architectures"])


def kernel_op(name: str) -> Callable[..., Any]:
    """The op ``name`` of the kernels in force, to be called with the schema's operands."""
    simulated = _simulating and not torch.compiler.is_compiling()
    namespace = torch.ops.fused_peft_simulated if simulated else torch.ops.fused_peft
    return getattr(namespace, name).default  # type: ignore[no-any-return]


def kernel_device(x: Tensor) -> tuple[str | None, str]:
    """Which kernels x's device has: "cpu", "cuda", or None with the reason."""
    kind = x.device.type
    if kind == "cpu":
        simulated = _simulating and not torch.compiler.is_compiling()
        return ("cuda" if simulated else "cpu"), ""
    if kind != "cuda":
        return None, f"x is on {x.device}; kernels exist for: cpu, cuda"
    if not built_with_cuda():
        return None, f"x is on {x.device}; this build has kernels for the CPU only (no nvcc)"
    if _capability(x.device.index or 0) < _MIN_CAPABILITY:
        return None, f"{x.device} is older than compute capability 8.0, where kernels begin"
    return "cuda", ""


@functools.cache
def _capability(index: int) -> tuple[int, int]:
    return torch.cuda.get_device_capability(index)
