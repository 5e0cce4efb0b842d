"""ldmatrix, stmatrix and movmatrix of the simulator against NumPy."""

from __future__ import annotations

import numpy as np
import pytest
from simulator_kernels import needs_simulator

from fused_peft import simulator

pytestmark = needs_simulator


def matrix_kernel(body: str) -> str:
    """One warp with 1 KiB of shared memory, from `in` to `out`; registers, `words` to `got`."""
    copies = {
        "in": "ld.global.b32 %v, [%p+{o}]; st.shared.b32 [%s+{o}], %v;",
        "out": "ld.shared.b32 %v, [%s+{o}]; st.global.b32 [%p+{o}], %v;",
        "words": "ld.global.b32 %r{i}, [%p+{o}];",
        "got": "st.global.b32 [%p+{o}], %r{i};",
    }

    def copy(name: str, count: int) -> str:
        steps = [copies[name].format(o=128 * i, i=i) for i in range(count)]
        return f"ld.param.u64 %p, [{name}]; mad.wide.u32 %p, %lane, 4, %p;\n" + "\n".join(steps)

    return f""".version 8.7
.target sm_90
.address_size 64
.visible .entry k(.param .u64 in, .param .u64 out, .param .u64 words, .param .u64 got,
                  .param .u64 rows)
{{
  .reg .b32 %lane, %s, %v, %row, %r<4>;
  .reg .b64 %p, %generic;
  .shared .align 16 .b8 space[1024];
  mov.u32 %lane, %tid.x;
  mov.u32 %s, space;
  mad.lo.u32 %s, %lane, 4, %s;
  {copy("in", 8)}
  {copy("words", 4)}
  bar.warp.sync 0xffffffff;
  ld.param.u64 %p, [rows];
  mad.wide.u32 %p, %lane, 4, %p;
  ld.global.b32 %row, [%p];
  mov.u32 %v, space;
  add.u32 %row, %row, %v;
  cvt.u64.u32 %generic, %row;
  cvta.shared.u64 %generic, %generic;
  {body}
  bar.warp.sync 0xffffffff;
  {copy("out", 8)}
  {copy("got", 4)}
  ret;
}}
"""


def run_matrices(body: str, rows: np.ndarray) -> tuple[np.ndarray, ...]:
    rng = np.random.default_rng(7)
    shared = rng.integers(0, 2**32, 256, dtype=np.uint32)
    words = rng.integers(0, 2**32, (4, 32), dtype=np.uint32)
    out, got = np.zeros_like(shared), np.zeros_like(words)
    simulator.reset()
    simulator.launch(matrix_kernel(body), "k", 1, 32, [shared, out, words, got, rows])
    assert simulator.findings() == []
    return shared.view(np.uint16), out.view(np.uint16), words, got


def fragment_of(matrix: np.ndarray) -> np.ndarray:
    """Registers of the 32 lanes: elements 2 (lane % 4) and the next of row lane / 4."""
    return np.ascontiguousarray(matrix.astype(np.uint16)).view(np.uint32).reshape(32)


def matrix_of(register: np.ndarray) -> np.ndarray:
    return register.view(np.uint16).reshape(8, 8)


@pytest.mark.parametrize("count", [1, 2, 4])
@pytest.mark.parametrize("transpose", [False, True])
@pytest.mark.parametrize("space", [".shared", ".shared::cta", ""])
def test_ldmatrix(count: int, transpose: bool, space: str) -> None:
    # A row twice, and rows in any order; lanes that give no address have one far outside.
    rows = np.random.default_rng(8).integers(0, 63, 32).astype(np.uint32) * 16
    rows[8 * count :] = 0x7FFFFF0
    trans = ".trans" if transpose else ""
    registers = "{" + ", ".join(f"%r{i}" for i in range(count)) + "}"
    address = "%row+16" if space else "%generic+16"
    shared, _, words, got = run_matrices(
        f"ldmatrix.sync.aligned.m8n8.x{count}{trans}{space}.b16 {registers}, [{address}];", rows
    )
    for i in range(4):
        if i >= count:
            assert np.array_equal(got[i], words[i])
            continue
        matrix = np.array([shared[r // 2 + 8 : r // 2 + 16] for r in rows[8 * i : 8 * i + 8]])
        assert np.array_equal(got[i], fragment_of(matrix.T if transpose else matrix))


@pytest.mark.parametrize("count", [1, 2, 4])
@pytest.mark.parametrize("transpose", [False, True])
def test_stmatrix(count: int, transpose: bool) -> None:
    rows = np.random.default_rng(9).permutation(64)[:32].astype(np.uint32) * 16
    trans = ".trans" if transpose else ""
    registers = "{" + ", ".join(f"%r{i}" for i in range(count)) + "}"
    shared, out, words, _ = run_matrices(
        f"stmatrix.sync.aligned.m8n8.x{count}{trans}.shared.b16 [%row], {registers};", rows
    )
    expected = shared.copy()
    for i in range(count):
        matrix = matrix_of(words[i])
        for row, address in enumerate(rows[8 * i : 8 * i + 8]):
            expected[address // 2 : address // 2 + 8] = matrix[:, row] if transpose else matrix[row]
    assert np.array_equal(out, expected)


def test_movmatrix() -> None:
    rows = np.zeros(32, np.uint32)
    _, _, words, got = run_matrices("movmatrix.sync.aligned.m8n8.trans.b16 %r1, %r0;", rows)
    assert np.array_equal(got[1], fragment_of(matrix_of(words[0]).T))


@pytest.mark.parametrize("transpose", [False, True])
def test_ldmatrix_of_a_partly_initialised_row(transpose: bool) -> None:
    """Of columns 6 and 7 of row 3, only the lane or lanes that hold them are tainted."""
    trans = ".trans" if transpose else ""
    found = []
    for lane in range(32):
        ptx = f""".version 8.7
.target sm_90
.address_size 64
.visible .entry k(.param .u64 out)
{{
  .reg .b32 %lane, %s, %r, %o;
  .reg .b64 %p;
  .reg .pred %q;
  .shared .align 16 .b8 space[128];
  mov.u32 %lane, %tid.x;
  mov.u32 %s, space;
  mad.lo.u32 %o, %lane, 4, %s;
  setp.ne.u32 %q, %lane, 15;
  @%q st.shared.b32 [%o], %lane;
  bar.warp.sync 0xffffffff;
  and.b32 %o, %lane, 7;
  mad.lo.u32 %o, %o, 16, %s;
  ldmatrix.sync.aligned.m8n8.x1{trans}.shared.b16 {{%r}}, [%o];
  setp.ne.u32 %q, %lane, {lane};
  @%q ret;
  ld.param.u64 %p, [out];
  st.global.b32 [%p], %r;
  ret;
}}
"""
        simulator.reset()
        simulator.launch(ptx, "k", 1, 32, [np.zeros(1, np.uint32)])
        if simulator.findings():
            found.append(lane)
    # Lane 4 row + pair; transposed, lanes 4 column + row / 2 of columns 6 and 7.
    assert found == ([4 * 6 + 1, 4 * 7 + 1] if transpose else [4 * 3 + 3])
