"""PTX kernels written as text, for tests of the simulator's control flow and checks."""

from __future__ import annotations

import numpy as np

from fused_peft import simulator


def kernel(
    body: str,
    params: str = "out",
    *,
    target: str = "sm_90",
    directives: str = "",
    globals_: str = "",
) -> str:
    """PTX of a kernel ``k`` with 64-bit parameters (names, space-separated).

    %t, %l, %w and %c hold the thread's x indices; %addr is free; %p0 to %p9 are
    predicates, %r0 to %r19, %rd0 to %rd9 registers. ``{store}`` in the body stands for storing
    %r0 to element %c * %ntid + %t of the array at the first parameter.
    """
    names = params.split()
    store = f"""
  mad.lo.u32 %r19, %c, %n, %t;
  ld.param.u64 %addr, [{names[0]}];
  mad.wide.u32 %addr, %r19, 4, %addr;
  st.global.u32 [%addr], %r0;
"""
    return f""".version 8.7
.target {target}
.address_size 64
{globals_}
.visible .entry k({", ".join(f".param .u64 {name}" for name in names)})
{directives}
{{
  .reg .pred %p<10>;
  .reg .b32 %r<20>;
  .reg .b64 %rd<10>;
  .reg .b32 %t, %l, %w, %c, %n;
  .reg .b64 %addr;
  mov.u32 %t, %tid.x;
  mov.u32 %l, %laneid;
  mov.u32 %c, %ctaid.x;
  mov.u32 %n, %ntid.x;
  shr.u32 %w, %t, 5;
  {body.replace("{store}", store)}
  ret;
}}
"""


def launch(
    ptx: str, grid: int, block: int, *args: object, cluster: int = 1, **settings: object
) -> list[simulator.Finding]:
    """Runs the kernel ``k``; what the sanitizers found."""
    simulator.reset()
    with simulator.options(**settings):  # type: ignore[arg-type]
        simulator.launch(ptx, "k", grid, block, list(args), cluster=cluster)
    return simulator.findings()


def stored(ptx: str, block: int, *args: object, grid: int = 1, **settings: object) -> np.ndarray:
    """The array that a kernel without findings stores by ``{store}``, one uint32 a thread."""
    out = np.full(grid * block, 0xDEADBEEF, np.uint32)
    assert launch(ptx, grid, block, out, *args, **settings) == []
    return out
