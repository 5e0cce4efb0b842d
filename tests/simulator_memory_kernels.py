"""Kernels of one warp with every kind of memory at hand, for tests of the simulator."""

from __future__ import annotations

import re
from collections.abc import Sequence

import numpy as np

from fused_peft import simulator

LANES = 32


def kernel(body: str, params: str = ".u64 in, .u64 out", outside: str = "") -> str:
    """PTX of a kernel k. %t is the thread, %in and %out the arrays' addresses."""
    loads = "".join(
        f"ld.param.u64 %{name}, [{name}];\n" for name in re.findall(r"\.u64 (in|out)\b", params)
    )
    declared = ", ".join(f".param {param.strip()}" for param in params.split(","))
    return f""".version 8.7
.target sm_90
.address_size 64
{outside}
.visible .entry k({declared})
{{
  .reg .b64 %in, %out, %x, %y, %z, %d<16>;
  .reg .b32 %t, %a, %b, %c, %r<16>;
  .reg .b16 %h<16>;
  .reg .b128 %q<4>;
  .reg .f32 %f<8>;
  .reg .f64 %g<8>;
  .reg .pred %p, %q;
  .local .align 32 .b8 own[64];
  .shared .align 32 .b8 tile[4096];
  {loads}
  mov.u32 %t, %tid.x;
  {body}
  ret;
}}
"""


def launch(ptx: str, args: Sequence[object], threads: int = LANES, **options: int) -> None:
    simulator.reset()
    simulator.launch(ptx, "k", options.pop("grid", 1), threads, args, **options)
    assert simulator.findings() == []


def aligned(data: np.ndarray) -> np.ndarray:
    """A copy at an address that is a multiple of 256, as cudaMalloc gives."""
    memory = np.empty(data.nbytes + 256, np.uint8)
    start = -memory.ctypes.data % 256
    copy = memory[start : start + data.nbytes].view(data.dtype).reshape(data.shape)
    copy[...] = data
    return copy
