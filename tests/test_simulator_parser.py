"""The simulator's PTX front end: what a text means, and what it is refused for.

Values are computed here in Python from the PTX ISA's words; every text of these tests that is not
meant to be refused also passes NVIDIA's own ptxas where it is found.
"""

import ctypes
import re
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest

from fused_peft import simulator

pytestmark = pytest.mark.skipif(
    not simulator.is_available(), reason="the package was built without the simulator"
)

REGISTERS = """
  .reg .pred %p<8>;
  .reg .b16 %h<8>;
  .reg .b32 %r<40>;
  .reg .b64 %rd<20>;
  .reg .f32 %f<8>;
  .reg .f64 %d<8>;
"""
accepted: list[str] = []  # texts that ran, for ptxas


@pytest.fixture(autouse=True)
def fresh():
    simulator.reset()


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


# ---- constants

INTEGERS = [
    ("0x1F", 31),
    ("0X1f", 31),
    ("017", 15),
    ("0b101", 5),
    ("12U", 12),
    ("-5", -5),
    ("~0", -1),
    ("!0", 1),
    ("!7", 0),
    ("- - 3", 3),
    ("+4", 4),
    ("(1+2)*3", 9),
    ("1+2*3", 7),
    ("7/2", 3),
    ("-7/2", -3),
    ("-7 % 3", -1),
    ("1<<4|1", 17),
    ("-16>>2", -4),
    ("0xFFFFFFFFFFFFFFFF>>60", 15),
    ("0xFFFFFFFFFFFFFFF0U/16", (2**64 - 16) // 16),
    ("6&3", 2),
    ("6^3", 5),
    ("5==5", 1),
    ("5!=5", 0),
    ("3<=3 && 4>5", 0),
    ("3<2 || 4>=4", 1),
    ("1 ? 10 : 20", 10),
    ("0 ? 10 : 1 ? 30 : 40", 30),
    ("WARP_SZ*2", 64),
    ("2*(WARP_SZ-1)", 62),
    ("(.u64)-1 >> 63", 1),
    ("9223372036854775807", 2**63 - 1),
    ("10-3-2", 5),
    ("100/5/2", 10),
    ("-1 < 1U", 0),
    ("-1 < 1", 1),
]


@pytest.mark.parametrize(("constant", "value"), INTEGERS, ids=[c for c, _ in INTEGERS])
def test_integer_constants(constant, value):
    out = run(f"mov.b64 %rd2, {constant}; st.global.b64 [%rd1], %rd2;", dtype=np.int64)
    assert out[0] == value


@pytest.mark.parametrize(
    ("instruction", "value"),
    [
        ("mov.u32 %r1, -5", 2**32 - 5),
        ("mov.u32 %r1, 0x1FFFFFFFF", 2**32 - 1),
        ("mov.b32 %r1, 0f40490FDB", 0x40490FDB),
        ("mov.b32 %r1, 0f7FC00001", 0x7FC00001),  # a NaN's payload
        ("mov.f32 %r1, 1.5e-3", int(np.float32(1.5e-3).view(np.uint32))),
        ("mov.f32 %r1, 0d3FF8000000000000", 0x3FC00000),
        ("add.u32 %r1, 7, WARP_SZ", 39),
    ],
)
def test_constants_take_the_type_of_the_instruction(instruction, value):
    assert run(f"{instruction}; st.global.b32 [%rd1], %r1;")[0] == value


def test_a_single_constant_is_widened_for_f64():
    out = run("mov.f64 %d1, 0f3FC00000; st.global.f64 [%rd1], %d1;", dtype=np.float64)
    assert out[0] == 1.5


# ---- names and scopes


def test_numbered_registers():
    body = """
    .reg .b32 x<3>;       // x0 x1 x2
    .reg .b32 y<2>, z;    // y0 y1
    mov.u32 x0, 1; mov.u32 x2, 3; mov.u32 y0, 10; mov.u32 y1, 11; mov.u32 z, 7;
    st.global.u32 [%rd1], x0; st.global.u32 [%rd1+4], x2; st.global.u32 [%rd1+8], y0;
    st.global.u32 [%rd1+12], y1; st.global.u32 [%rd1+16], z;
    """
    assert run(body, 5).tolist() == [1, 3, 10, 11, 7]
    assert "x3" in refused(text(".reg .b32 x<3>; mov.u32 x3, 1;"))


def test_thousands_of_registers():
    lines = "".join(f"mov.u32 %x{i}, {i * 7};" for i in range(0, 6000, 3))
    sums = "mov.u32 %r1, 0;" + "".join(f"add.u32 %r1, %r1, %x{i};" for i in range(0, 6000, 3))
    out = run(f".reg .b32 %x<6000>; {lines} {sums} st.global.u32 [%rd1], %r1;")
    assert out[0] == 7 * sum(range(0, 6000, 3))


def test_blocks_scope_registers_and_labels():
    body = """
    .reg .b32 t;
    mov.u32 t, 1;
    mov.u32 %r2, 0;
    { .reg .b32 t; .reg .pred q; mov.u32 t, 5;
      LAB: add.u32 %r2, %r2, 1; setp.lt.u32 q, %r2, t; @q bra LAB; bra DONE; DONE: }
    { .reg .b32 t; .reg .pred q; mov.u32 t, 9;
      LAB: add.u32 %r2, %r2, 1; setp.lt.u32 q, %r2, t; @q bra LAB;
      { bra DONE; } add.u32 %r2, %r2, 100; DONE: }
    st.global.u32 [%rd1], %r2;
    st.global.u32 [%rd1+4], t;
    """
    assert run(body, 2).tolist() == [9, 1]


def test_a_branch_does_not_see_into_a_block():
    message = refused(text("{ INNER: mov.u32 %r1, 1; } bra INNER;"))
    assert "INNER" in message


def test_branches_forward_and_backward():
    body = """
    mov.u32 %r1, 0; bra $FORWARD;
    $BACK: add.u32 %r1, %r1, 100; bra $END;
    $FORWARD: add.u32 %r1, %r1, 1; setp.lt.u32 %p1, %r1, 10; @%p1 bra $FORWARD;
    @!%p1 bra $BACK;
    add.u32 %r1, %r1, 1000;
    $END: st.global.u32 [%rd1], %r1;
    """
    assert run(body)[0] == 110


def test_vector_registers_and_components():
    body = """
    .reg .v4 .f32 v;
    .reg .v2 .b32 w;
    mov.f32 v.x, 0f3F800000; mov.f32 v.y, 0f40000000;
    mov.f32 v.b, 0f40400000; mov.f32 v.a, 0f40800000;
    st.global.v4.f32 [%rd1], v;
    mov.b64 %rd2, 0x0000000700000005;
    mov.b64 w, %rd2;
    cvt.rn.f32.u32 %f1, w.y;
    st.global.f32 [%rd1+16], %f1;
    """
    assert run(body, 5, np.float32).tolist() == [1, 2, 3, 4, 7]


def test_sinks_and_pairs():
    body = """
    mov.u32 %r1, 3;
    setp.lt.u32 %p1|%p2, %r1, 5;
    selp.u32 %r2, 1, 0, %p1; selp.u32 %r3, 1, 0, %p2;
    setp.gt.u32 _|%p3, %r1, 5; selp.u32 %r4, 1, 0, %p3;
    st.global.v4.u32 [%rd1], {%r2, %r3, %r4, 9};
    ld.global.v4.u32 {_, %r5, _, %r6}, [%rd1+0];
    st.global.u32 [%rd1+16], %r6;
    """
    assert run(body, 5).tolist() == [1, 0, 1, 9, 9]


def test_special_registers_with_and_without_component():
    body = """
    mov.v4.u32 {%r1, %r2, %r3, %r4}, %ntid;
    mov.u32 %r5, %tid.x;
    setp.eq.u32 %p1, %r5, 2;
    mov.u32 %r6, %nctaid.x; add.u32 %r6, %r6, 40;
    @%p1 st.global.v2.u32 [%rd1], {%r1, %r2};
    @%p1 st.global.v2.u32 [%rd1+8], {%r3, %r6};
    """
    assert run(body, 4, block=5).tolist() == [5, 1, 1, 41]


# ---- variables


def test_initialisers():
    module = """
    .global .align 4 .s32 flat[] = {1, -2, 3};
    .global .s32 nested[3][2] = {{1, 2}, {3}, {5, 6}};
    .global .align 8 .b8 bytes[8] = {1, 0xFF, -1};
    .const .f32 floats[3] = {0f3F800000, 1.5, -2.0};
    .global .f64 wide = 0.1;
    .global .u64 big = 0xFFFFFFFFFFFFFFFF;
    .global .v4 .u16 vectors[2] = {{1, 2, 3, 4}, {5, 6, 7, 8}};
    """
    body = """
    ld.global.s32 %r1, [flat+4]; st.global.b32 [%rd1], %r1;
    ld.global.s32 %r1, [nested+8]; st.global.b32 [%rd1+4], %r1;
    ld.global.s32 %r1, [nested+12]; st.global.b32 [%rd1+8], %r1;
    ld.global.s32 %r1, [nested+20]; st.global.b32 [%rd1+12], %r1;
    ld.global.b32 %r1, [bytes]; st.global.b32 [%rd1+16], %r1;
    ld.const.f32 %f1, [floats+8]; st.global.f32 [%rd1+20], %f1;
    ld.global.f64 %d1, [wide]; cvt.rn.f32.f64 %f1, %d1; st.global.f32 [%rd1+24], %f1;
    ld.global.u64 %rd2, [big]; shr.u64 %rd2, %rd2, 60; cvt.u32.u64 %r1, %rd2;
    st.global.b32 [%rd1+28], %r1;
    ld.global.v4.u16 {%h1, %h2, %h3, %h4}, [vectors+8]; cvt.u32.u16 %r1, %h1;
    st.global.b32 [%rd1+32], %r1;
    """
    out = run(body, 9, module=module).view(np.int32)
    assert out[:5].tolist() == [-2, 3, 0, 6, 0x00FFFF01]
    assert out[5:7].view(np.float32).tolist() == [-2.0, np.float32(0.1)]
    assert out[7:].tolist() == [15, 5]


def test_addresses_in_initialisers():
    module = """
    .global .s32 data[4] = {10, 11, 12, 13};
    .global .u64 pointers[3] = {data, generic(data)+8, 0};
    .global .align 8 .u8 pieces[8] = {
      0xFF(data), 0xFF00(data), 0xFF0000(data), 0xFF000000(data),
      0xFF00000000(data), 0xFF0000000000(data), 0xFF000000000000(data), 0xFF00000000000000(data)};
    """
    body = """
    ld.global.u64 %rd2, [pointers]; ld.global.u32 %r1, [%rd2+4]; st.global.u32 [%rd1], %r1;
    ld.global.u64 %rd2, [pointers+8]; ld.u32 %r1, [%rd2]; st.global.u32 [%rd1+4], %r1;
    ld.global.u64 %rd2, [pieces]; ld.global.u32 %r1, [%rd2+12]; st.global.u32 [%rd1+8], %r1;
    mov.u64 %rd2, data+4; ld.global.u32 %r1, [%rd2]; st.global.u32 [%rd1+12], %r1;
    """
    assert run(body, 4, module=module).tolist() == [11, 12, 13, 11]


def test_static_and_dynamic_shared_memory_do_not_overlap():
    module = """
    .extern .shared .align 128 .b8 dynamic[];
    .shared .align 4 .b8 unused[4000];
    .shared .align 16 .b8 first[20];
    """
    ptx = text(
        """
    .shared .align 8 .b8 second[8];
    mov.u32 %r1, first; mov.u32 %r2, second; mov.u32 %r3, dynamic; mov.u32 %r4, dynamic+12;
    sub.u32 %r4, %r4, %r3;
    st.global.v4.u32 [%rd1], {%r1, %r2, %r3, %r4};
    """,
        module=module,
    )
    accepted.append(ptx)
    out = np.zeros(4, np.uint32)
    simulator.launch(ptx, "k", 1, 1, [out], shared_bytes=256)
    first, second, dynamic, offset = out.tolist()
    assert offset == 12
    assert first % 16 == 0 and second % 8 == 0 and dynamic % 128 == 0
    assert second >= first + 20 or first >= second + 8
    assert dynamic >= max(first + 20, second + 8)


def test_parameters_of_a_kernel_are_laid_out_as_in_c():
    ptx = """
    .version 8.6
    .target sm_80
    .address_size 64
    .entry k(.param .u64 .ptr .global .align 16 out, .param .u8 a, .param .align 8 .b8 s[12],
             .param .u16 b, .param .f64 c)
    {
      .reg .b32 %r<9>; .reg .b64 %rd<9>; .reg .f64 %d<2>;
      ld.param.u64 %rd1, [out];
      ld.param.u8 %r1, [a];
      mov.b64 %rd2, s;
      ld.param.u32 %r2, [%rd2+8];
      ld.param.u16 %r3, [b];
      ld.param.f64 %d1, [c];
      cvt.rzi.u32.f64 %r4, %d1;
      st.global.v4.u32 [%rd1], {%r1, %r2, %r3, %r4};
    }
    """
    accepted.append(ptx)
    module = simulator.load(ptx)
    assert module.parameters("k") == [("out", 8), ("a", 1), ("s", 12), ("b", 2), ("c", 8)]
    out = np.zeros(4, np.uint32)
    struct = np.array([1, 2, 3], np.uint32).tobytes()
    module.launch("k", 1, 1, [out, np.uint8(200), struct, np.uint16(60000), 7.0])
    assert out.tolist() == [200, 3, 60000, 7]


# ---- calls

TWICE = """
.func (.param .b32 result) twice(.param .b32 x)
{ .reg .b32 %r<3>; ld.param.u32 %r1, [x]; add.u32 %r2, %r1, %r1; st.param.b32 [result], %r2; ret; }
"""


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


# ---- what no thread sees


def test_directives_without_effect():
    module = """
    /* a comment
       of two lines */
    .pragma "nounroll";
    .global .attribute(.managed) .b32 managed;
    .visible .global .align 4 .b8 unused[7];
    .common .global .b32 common_one;
    """
    behind = """
    .file 1 "k.cu", 1700000000, 1234
    .section .debug_str
    {
    $L__info_string0:
    .b8 95,90,0
    }
    .section .debug_abbrev { .b8 1 }
    """
    body = """
    .reg.b32 x; // no blank behind .reg
    .pragma "nounroll", "used_bytes_mask 1";
    mov.u32 x, 3;
    st.global
      .u32 [ %rd1 ] , /* here */ x ; {} { { } }
    """
    assert run(body, module=module, behind=behind)[0] == 3


@pytest.mark.parametrize("target", ["sm_80", "sm_90", "sm_90a, debug", "sm_89, texmode_independent"])
def test_targets(target):
    assert run("st.global.u32 [%rd1], 1;", target=target)[0] == 1


def test_source_lines_of_findings():
    """The store of line 12 is out of bounds; that of header.cuh:30 is inlined at k.cu:20, through
    header.cuh:40."""
    behind = '.file 1 "/src/k.cu"\n.file 2 "/src/header.cuh"'
    body = """
    .loc 1 12 3
    st.global.u32 [%rd1+64], 1;
    .loc 2 40 1, function_name $L__info_string0, inlined_at 1 20 5
    add.u64 %rd2, %rd1, 128;
    .loc 2 30 7, function_name $L__info_string1+3, inlined_at 2 40 1
    st.global.u32 [%rd2], 1;
    """
    with pytest.raises(simulator.SimulatorError):
        simulator.launch(text(body, behind=behind), "k", 1, 1, [np.zeros(1, np.uint32)])
        raise simulator.SimulatorError("findings need not raise")
    sources = [finding.source for finding in simulator.findings()]
    assert any("k.cu:12" in source for source in sources), sources


# ---- refusals

REFUSALS = [
    ("add.s32 %r1, %r2;", r"'add\.s32 %r1, %r2'.*missing"),
    ("add.s32 %r1, %r2, %r3, %r4;", r"too many operands"),
    ("add.s32 %r1, %r2, %rd3;", r"'%rd3' is 64 bits wide"),
    ("add.s32 %p1, %r2, %r3;", r"'%p1' is a predicate"),
    ("add.s32 %r1, %r2, %x;", r"unknown register '%x'"),
    ("add.s32 %r1, %r2, nothing;", r"nothing"),
    ("add.s32.wonder %r1, %r2, %r3;", r"\.wonder"),
    ("wonder.s32 %r1, %r2;", r"instruction wonder"),
    ("add.f32 %f1, %f2, 1;", r"constant"),
    ("mov.b16 %h1, 1.0;", r"constant"),
    ("mov.u32 %r1, 1/0;", r"division by zero"),
    ("mov.u32 %r1, 99999999999999999999999;", r"64 bits"),
    ("mov.f32 %f1, 0f3F80;", r"8 hexadecimal digits"),
    ("mov.u32 %r1, 12x;", r"12x"),
    ("mov.u32 %r1, !%r2;", r"negated"),
    ("bra nowhere;", r"nowhere"),
    ("@%r1 bra nowhere;", r"guard '%r1'"),
    ("L: L: bra L;", r"'L' stands twice"),
    (".reg .b32 %r<3>;", r"'%r' is declared twice"),
    (".reg .b32 a, a;", r"'a' is declared twice"),
    (".reg .b32 a[3];", r"arrays"),
    (".reg .wonder a;", r"\.wonder"),
    (".shared .align 3 .b8 x[4];", r"power of two"),
    (".shared .b8 x[99999999999];", r"shared memory"),
    (".local .b8 x[4] = {1, 2};", r"initialiser"),
    ("ld.global.v2.u32 {%r1, %r2, %r3}, [%rd1];", r"ld\.global\.v2"),
    ("call missing;", r"no function 'missing'"),
    ("mov.u32 %r1, %r2", r"expected ';'"),
    ("mov.u32 %r1 %r2;", r"expected ';'"),
    ('.pragma "open;', r"string"),
    ("/* open", r"comment"),
    ("{", r"end of the text"),
]


@pytest.mark.parametrize(("body", "message"), REFUSALS, ids=[b for b, _ in REFUSALS])
def test_refusals_name_the_line_and_the_reason(body, message):
    ptx = text(f"\n//\n{body}\n")
    line = ptx[: ptx.index(body)].count("\n") + 1
    words = refused(ptx)
    assert re.search(message, words), words
    where = int(re.search(r"PTX line (\d+)", words)[1])
    # An error of the whole rest of the text (an open brace or comment) is found at its end.
    assert where == line or (where > line and body in ("{", "mov.u32 %r1, %r2")), words


def with_module(module: str) -> str:
    return text("st.global.u32 [%rd1], 1;", module=module)


@pytest.mark.parametrize(
    ("ptx", "message"),
    [
        ("", r"\.version"),
        (".version 9.0", r"\.target"),
        (".version 9.0\n.target wonder_1", r"\.target"),
        (".version 9.0\n.target sm_90\n.address_size 32", r"address_size"),
        (with_module(".global .u32 a[2] = {1, 2, 3};"), r"more values"),
        (with_module(".global .u32 a = nobody;"), r"nobody"),
        (with_module(".global .u32 a; .global .u32 a;"), r"'a' is defined twice"),
        (with_module(".global .f32 a = {1};").replace("{1}", "0x1"), r"wrong kind"),
        (with_module(".wonder"), r"\.wonder"),
        (with_module(".global .b8 a[99999999999];"), r"larger"),
        (with_module(".func f() { ret; } .func f() { ret; }"), r"'f' is defined twice"),
        (text("", behind=".section .debug_str { .b8 1"), r"brace"),
        (with_module("\x01"), r"directive"),
    ],
)
def test_module_refusals(ptx, message):
    words = refused(ptx)
    assert re.search(message, words), words


@pytest.mark.parametrize(
    ("module", "body", "message"),
    [
        (".func f() { call f; ret; }", "call f;", r"recursion"),
        (".func g(); .func f() { call g; } .func g() { call f; }", "call f;", r"recursion"),
        (".extern .func f();", "call f;", r"'f' is not defined"),
        (TWICE, "call twice;", r"returns 1 and takes 1"),
        (TWICE, "{ .param .b8 a; call (%r1), twice, (a); }", r"1 bytes"),
        (".extern .global .b32 g;", "ld.global.u32 %r1, [g];", r"'g' is not defined"),
        ("", "mov.u64 %rd2, 0; P: .callprototype _ (); call %rd2, (), P;", r"pointer|operands"),
    ],
)
def test_calls_that_cannot_be_inlined(module, body, message):
    words = refused(text(body, module=module))
    assert re.search(message, words), words


def test_an_error_in_one_kernel_leaves_the_others():
    ptx = text("st.global.u32 [%rd1], 5;") + ".entry bad() { wonder.s32; }"
    module = simulator.load(ptx)
    assert module.kernels == ["k", "bad"]
    with pytest.raises(simulator.SimulatorError, match="wonder"):
        module.parameters("bad")
    out = np.zeros(1, np.uint32)
    module.launch("k", 1, 1, [out])
    assert out[0] == 5


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


@pytest.mark.skipif(shutil.which("ptxas") is None, reason="ptxas is not installed")
def test_ptxas_takes_the_same_texts(tmp_path: Path):
    """Runs last: the texts that the tests before have run are PTX to NVIDIA's assembler too."""
    source = tmp_path / "k.ptx"
    failures = []
    for ptx in accepted:
        source.write_text(ptx)
        result = subprocess.run(
            ["ptxas", "-arch=sm_90a", source, "-o", tmp_path / "k.cubin"],
            capture_output=True,
            text=True,
        )
        if result.returncode:
            failures.append(ptx + result.stderr)
    assert not failures, "\n".join(failures)
