"""Kernels of one instruction, for tests of the simulator."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest

from fused_peft import simulator

needs_simulator = pytest.mark.skipif(
    not simulator.is_available(), reason="built without the simulator"
)

BLOCK = 128


def element_kernel(
    instruction: str, out_bytes: Sequence[int], in_bytes: Sequence[int], target: str = "sm_90"
) -> str:
    """PTX of a kernel that executes an instruction once a thread, on elements of arrays.

    Args:
        instruction: with ``{d0}``, ``{d1}`` ... for destinations and ``{a0}``, ``{a1}`` ... for
            sources; registers are untyped (.b16, .b32, .b64), those of one byte 16 bits wide.
            ``{p0}`` ... are predicates that are true where the source ``a`` of that number is odd,
            ``{q0}`` ... are predicates, stored as 0 or 1 in the destination of that number.
    """
    declared, loads, stores = [], [], []
    for kind, sizes in (("d", out_bytes), ("a", in_bytes)):
        for i, size in enumerate(sizes):
            declared.append(f".reg .b{max(16, 8 * size)} %{kind}{i};")
    for i, size in enumerate(in_bytes):
        loads.append(f"ld.param.u64 %x, [in{i}]; mad.wide.u32 %x, %i, {size}, %x;")
        loads.append(f"ld.global.{'u' if size == 1 else 'b'}{8 * size} %a{i}, [%x];")
        if f"{{p{i}}}" in instruction:
            loads.append(f".reg .pred %p{i}; .reg .b32 %odd{i};")
            loads.append(f"and.b32 %odd{i}, %a{i}, 1; setp.ne.u32 %p{i}, %odd{i}, 0;")
    for i, size in enumerate(out_bytes):
        declared.append(f".reg .pred %q{i};")
        if f"{{q{i}}}" in instruction:
            stores.append(f"selp.b{8 * size} %d{i}, 1, 0, %q{i};")
        stores.append(f"ld.param.u64 %x, [out{i}]; mad.wide.u32 %x, %i, {size}, %x;")
        stores.append(f"st.global.{'u' if size == 1 else 'b'}{8 * size} [%x], %d{i};")
    names = [f"{kind}{i}" for kind in "dapq" for i in range(16)]
    body = instruction.format(**{name: f"%{name}" for name in names})
    params = [f".param .u64 out{i}" for i in range(len(out_bytes))]
    params += [f".param .u64 in{i}" for i in range(len(in_bytes))]
    newline = "\n  "
    return f""".version 8.7
.target {target}
.address_size 64
.visible .entry k({", ".join(params)})
{{
  .reg .b32 %i, %t, %n;
  .reg .b64 %x;
  {newline.join(declared)}
  mov.u32 %t, %tid.x;
  mov.u32 %i, %ctaid.x;
  mov.u32 %n, %ntid.x;
  mad.lo.u32 %i, %i, %n, %t;
  {newline.join(loads)}
  {body}
  {newline.join(stores)}
  ret;
}}
"""


def run(
    instruction: str,
    inputs: Sequence[np.ndarray],
    outputs: Sequence[type],
    target: str = "sm_90",
) -> list[np.ndarray]:
    """What the instruction gives for each row of the inputs; see ``element_kernel``."""
    count = len(inputs[0])
    blocks = -(-count // BLOCK)
    padded = [np.resize(column, blocks * BLOCK) for column in inputs]
    results = [np.full(blocks * BLOCK, 0xA5, dtype) for dtype in outputs]
    ptx = element_kernel(
        instruction, [r.itemsize for r in results], [p.itemsize for p in padded], target
    )
    simulator.reset()
    simulator.launch(ptx, "k", blocks, BLOCK, [*results, *padded])
    assert simulator.findings() == []
    return [result[:count] for result in results]


def assert_same_bits(
    got: np.ndarray, expected: np.ndarray, *inputs: np.ndarray, instruction: str = ""
) -> None:
    """Equal in every bit; says the first inputs where not."""
    different = np.flatnonzero(got != expected)
    if different.size:
        rows = [
            f"{[hex(int(column[i])) for column in inputs]}:"
            f" got {int(got[i]):#x}, expected {int(expected[i]):#x}"
            for i in different[:5]
        ]
        pytest.fail(f"{instruction}: {different.size} of {got.size} differ\n" + "\n".join(rows))
