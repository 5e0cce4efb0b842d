"""The simulator's PTX front end: what constants, names and declarations mean.

Values are computed here in Python from the PTX ISA's words.
"""

from __future__ import annotations

import contextlib

import numpy as np
import pytest
from simulator_kernels import needs_simulator
from simulator_ptx import accepted, refused, run, text

from fused_peft import simulator

pytestmark = needs_simulator


@pytest.fixture(autouse=True)
def fresh():
    simulator.reset()


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
    assert (first % 16, second % 8, dynamic % 128) == (0, 0, 0)
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


@pytest.mark.parametrize(
    "target", ["sm_80", "sm_90", "sm_90a, debug", "sm_89, texmode_independent"]
)
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
    with contextlib.suppress(simulator.SimulatorError):  # out of bounds ends the launch
        simulator.launch(text(body, behind=behind), "k", 1, 1, [np.zeros(1, np.uint32)])
    sources = [finding.source for finding in simulator.findings()]
    assert any("k.cu:12" in source for source in sources), sources
