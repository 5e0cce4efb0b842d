"""Calls of device functions in the simulator, by hand and as nvcc writes them."""

from __future__ import annotations

import ctypes
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
from simulator_kernels import needs_simulator
from simulator_ptx import TWICE, run

from fused_peft import simulator

pytestmark = needs_simulator


@pytest.fixture(autouse=True)
def fresh():
    simulator.reset()


# ---- calls


def test_call_with_param_variables():
    body = """
    { .param .b32 a; .param .b32 r; st.param.b32 [a], 21; call.uni (r), twice, (a);
      ld.param.b32 %r1, [r]; }
    { .param .b32 a; .param .b32 r; st.param.b32 [a+0], %r1; call (r), twice, (a);
      ld.param.b32 %r2, [r+0]; }
    st.global.v2.u32 [%rd1], {%r1, %r2};
    """
    assert run(body, 2, module=TWICE).tolist() == [42, 84]


def test_call_with_registers_and_constants():
    module = """
    .func (.reg .u32 sum, .reg .pred odd) add3(.reg .u32 a, .reg .u32 b, .param .b32 c)
    { .reg .b32 %r<3>; ld.param.u32 %r1, [c]; add.u32 sum, a, b; add.u32 sum, sum, %r1;
      and.b32 %r2, sum, 1; setp.ne.u32 odd, %r2, 0; ret; }
    .func (.param .b64 r) wide(.param .b64 x)
    { .reg .b64 %rd<2>; ld.param.b64 %rd1, [x]; st.param.b64 [r], %rd1; ret; }
    """
    body = """
    mov.u32 %r1, 5;
    call (%r2, %p1), add3, (%r1, 7, 9);
    selp.u32 %r3, 1, 0, %p1;
    mov.b64 %rd2, 123;
    call (%rd3), wide, (%rd2); cvt.u32.u64 %r4, %rd3;
    st.global.v4.u32 [%rd1], {%r1, %r2, %r3, %r4};
    """
    assert run(body, 4, module=module).tolist() == [5, 21, 1, 123]


def test_call_with_a_struct():
    module = """
    .func (.param .align 16 .b8 result[32]) rotate(.param .align 16 .b8 x[32], .param .b32 n)
    { .reg .b64 %rd<9>; .reg .b32 %r<3>;
      ld.param.v2.b64 {%rd1, %rd2}, [x]; ld.param.v2.b64 {%rd3, %rd4}, [x+16];
      ld.param.b32 %r1, [n]; cvt.u64.u32 %rd5, %r1; add.u64 %rd1, %rd1, %rd5;
      st.param.v2.b64 [result], {%rd2, %rd3}; st.param.v2.b64 [result+16], {%rd4, %rd1}; ret; }
    """
    body = """
    { .param .align 16 .b8 a[32]; .param .b32 n; .param .align 16 .b8 r[32];
      st.param.b64 [a], 1; st.param.b64 [a+8], 2; st.param.v2.b64 [a+16], {3, 4};
      st.param.b32 [n], 10;
      call.uni (r), rotate, (a, n);
      ld.param.v2.b64 {%rd2, %rd3}, [r]; ld.param.b64 %rd4, [r+16]; ld.param.b64 %rd5, [r+24]; }
    st.global.v2.b64 [%rd1], {%rd2, %rd3}; st.global.v2.b64 [%rd1+16], {%rd4, %rd5};
    """
    assert run(body, 4, np.uint64, module=module).tolist() == [2, 3, 4, 11]


def test_nested_calls_keep_their_parameters_and_local_memory():
    module = """
    .func (.param .b32 r) leaf(.param .b32 x)
    { .reg .b32 %r<4>; .reg .b64 %rd<2>; .local .align 4 .b8 depot[8];
      ld.param.u32 %r1, [x]; mov.u64 %rd1, depot; st.local.u32 [%rd1+4], %r1;
      ld.local.u32 %r2, [depot+4]; add.u32 %r3, %r2, 1; st.param.b32 [r], %r3; ret; }
    .func (.param .b32 r) middle(.param .b32 x)
    { .reg .b32 %r<9>; .local .align 4 .b8 depot[8];
      ld.param.u32 %r1, [x]; st.local.u32 [depot+4], %r1; mul.lo.u32 %r2, %r1, 10;
      { .param .b32 a; .param .b32 q; st.param.b32 [a], %r2; call (q), leaf, (a);
        ld.param.b32 %r3, [q]; }
      ld.local.u32 %r4, [depot+4]; ld.param.u32 %r5, [x];
      mad.lo.u32 %r6, %r4, 1000, %r3; mad.lo.u32 %r6, %r5, 100000, %r6;
      st.param.b32 [r], %r6; ret; }
    """
    body = """
    mov.u32 %r1, %tid.x; add.u32 %r1, %r1, 1;
    { .param .b32 a; .param .b32 q; st.param.b32 [a], %r1; call (q), middle, (a);
      ld.param.b32 %r2, [q]; }
    mov.u32 %r3, %tid.x; mad.wide.u32 %rd2, %r3, 4, %rd1; st.global.u32 [%rd2], %r2;
    """
    out = run(body, 40, block=40, module=module)
    x = np.arange(1, 41)
    assert out.tolist() == (x * 100000 + x * 1000 + x * 10 + 1).tolist()


def test_guarded_calls_and_early_returns():
    module = """
    .global .u32 seen;
    .func (.param .b32 r) clamp(.param .b32 x)
    { .reg .b32 %r<3>; .reg .pred %p<2>; ld.param.u32 %r1, [x]; st.param.b32 [r], %r1;
      setp.lt.u32 %p1, %r1, 4; @%p1 ret; st.param.b32 [r], 4; ret; }
    .func count() { .reg .b32 %r<2>; atom.global.add.u32 %r1, [seen], 1; }
    """
    body = """
    mov.u32 %r1, %tid.x;
    { .param .b32 a; .param .b32 q; st.param.b32 [a], %r1; call (q), clamp, (a);
      ld.param.b32 %r2, [q]; }
    setp.ge.u32 %p1, %r1, 6;
    @!%p1 call count;
    mad.wide.u32 %rd2, %r1, 4, %rd1; st.global.u32 [%rd2], %r2;
    bar.sync 0;
    setp.eq.u32 %p2, %r1, 0; ld.global.u32 %r3, [seen];
    @%p2 st.global.u32 [%rd1+32], %r3;
    """
    out = run(body, 9, block=8, module=module)
    assert out.tolist() == [0, 1, 2, 3, 4, 4, 4, 4, 6]


def test_declarations_aliases_and_noreturn():
    module = """
    .func (.param .b32 r) later(.param .b32 x);
    .weak .func stop() .noreturn;
    """
    behind = """
    .func (.param .b32 r) later(.param .b32 x)
    { .reg .b32 %r<3>; ld.param.u32 %r1, [x]; add.u32 %r2, %r1, 5; st.param.b32 [r], %r2; ret; }
    .weak .func stop() .noreturn { exit; }
    """
    body = """
    { .param .b32 a; .param .b32 q; st.param.b32 [a], 1; call (q), later, (a);
      ld.param.b32 %r1, [q]; }
    st.global.u32 [%rd1], %r1;
    call stop;
    st.global.u32 [%rd1], 99;
    """
    assert run(body, module=module, behind=behind)[0] == 6


def test_alias():
    module = """
    .visible .func (.param .b32 r) original(.param .b32 x)
    { .reg .b32 %r<3>; ld.param.u32 %r1, [x]; add.u32 %r2, %r1, 7; st.param.b32 [r], %r2; ret; }
    .visible .func (.param .b32 r) other(.param .b32 x);
    .alias other, original;
    """
    body = """
    { .param .b32 a; .param .b32 q; st.param.b32 [a], 1; call (q), other, (a);
      ld.param.b32 %r1, [q]; }
    st.global.u32 [%rd1], %r1;
    """
    assert run(body, module=module)[0] == 8


def test_brx_idx():
    body = """
    mov.u32 %r1, %tid.x;
    table: .branchtargets $A, $B, $C, $B;
    brx.idx %r1, table;
    $A: mov.u32 %r2, 10; bra $END;
    $B: mov.u32 %r2, 20; bra $END;
    $C: mov.u32 %r2, 30;
    $END: mad.wide.u32 %rd2, %r1, 4, %rd1; st.global.u32 [%rd2], %r2;
    """
    assert run(body, 4, block=4).tolist() == [10, 20, 30, 20]


# ---- NVIDIA's own tools

NVCC_PROGRAM = r"""
struct Big { int values[20]; double scale; };
__device__ int counter = 3;
__device__ int* pointer = &counter;
__device__ int table[4][2] = {{1, 2}, {3, 4}, {5}};
__constant__ float weights[4] = {1.5f, 2, 3};
__device__ __noinline__ Big grow(Big b, int k) {
  for (int i = 0; i < 20; i++) b.values[i] += k * i;
  b.scale *= 2;
  return b;
}
__device__ __noinline__ int choose(int n, int x) {
  switch (n) {
    case 0: return x + 1;
    case 1: return x * 3;
    case 2: return x - 7;
    case 3: return x << 2;
    case 4: return x ^ 21;
    case 5: return -x;
    default: return 0;
  }
}
extern "C" __global__ void __launch_bounds__(64, 2) k(Big b, int* out, int n) {
  extern __shared__ int dynamic[];
  __shared__ int fixed[64];
  const int t = threadIdx.x;
  fixed[t] = choose(t % 8, t);
  dynamic[t] = table[t % 4][1];
  __syncthreads();
  Big c = grow(grow(b, n), t);
  out[t] = c.values[t % 20] + int(c.scale) + fixed[63 - t] + dynamic[t ^ 1] +
           *pointer + int(weights[t % 3] * 2);
}
"""


@pytest.mark.skipif(shutil.which("nvcc") is None, reason="nvcc is not installed")
@pytest.mark.parametrize("flags", [["-lineinfo"], ["-G"], ["-rdc=true"]], ids=lambda f: f[0])
def test_nvcc_output(tmp_path: Path, flags):
    source, ptx = tmp_path / "k.cu", tmp_path / "k.ptx"
    source.write_text(NVCC_PROGRAM)
    subprocess.run(
        ["nvcc", "-arch=compute_80", *flags, "-ptx", source, "-o", ptx],
        check=True,
        capture_output=True,
    )

    class Big(ctypes.Structure):
        _fields_ = (("values", ctypes.c_int * 20), ("scale", ctypes.c_double))

    big = Big((ctypes.c_int * 20)(*range(0, 200, 10)), 2.5)
    out = np.zeros(64, np.int32)
    simulator.launch(ptx.read_bytes(), "k", 1, 64, [bytes(big), out, 3], shared_bytes=256)

    def choose(n: int, x: int) -> int:
        return [x + 1, x * 3, x - 7, x << 2, x ^ 21, -x, 0, 0][n]

    rows = [2, 4, 0, 0]
    expected = [
        10 * (t % 20) + 3 * (t % 20) + t * (t % 20)
        + 10
        + choose((63 - t) % 8, 63 - t)
        + rows[(t ^ 1) % 4]
        + 3
        + [3, 4, 6][t % 3]
        for t in range(64)
    ]  # fmt: skip
    assert out.tolist() == expected
    assert not simulator.findings()
