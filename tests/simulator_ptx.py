"""Small PTX texts around a few lines of a kernel's body, and what came of them."""

from __future__ import annotations

import numpy as np
import pytest

from fused_peft import simulator

REGISTERS = """
  .reg .pred %p<8>;
  .reg .b16 %h<8>;
  .reg .b32 %r<40>;
  .reg .b64 %rd<20>;
  .reg .f32 %f<8>;
  .reg .f64 %d<8>;
"""
# A device function: its result is twice its parameter.
TWICE = """
.func (.param .b32 result) twice(.param .b32 x)
{ .reg .b32 %r<3>; ld.param.u32 %r1, [x]; add.u32 %r2, %r1, %r1; st.param.b32 [result], %r2; ret; }
"""
accepted: list[str] = []  # texts that ran, for ptxas


def text(body: str, module: str = "", target: str = "sm_90a", behind: str = "") -> str:
    return f"""
.version 8.6
.target {target}
.address_size 64
{module}
.visible .entry k(.param .u64 out)
{{
{REGISTERS}
  ld.param.u64 %rd1, [out];
{body}
  ret;
}}
{behind}
"""


def run(
    body: str, count: int = 1, dtype=np.uint32, block: int = 1, target: str = "sm_90a", **rest: str
) -> np.ndarray:
    """What a kernel has stored at [%rd1 + ...]."""
    out = np.zeros(count, dtype)
    ptx = text(body, target=target, **rest)
    if "debug" not in target:  # ptxas wants debug information then
        accepted.append(ptx)
    simulator.launch(ptx, "k", 1, block, [out])
    return out


def refused(ptx: str, kernel: str = "k") -> str:
    """The message that a text is refused with."""
    with pytest.raises(simulator.SimulatorError) as caught:
        simulator.load(ptx).parameters(kernel)
    return str(caught.value)
