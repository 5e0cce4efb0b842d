"""tensormap.replace and tensormap.cp_fenceproxy of the simulator: maps that a kernel makes."""

from __future__ import annotations

import contextlib

import numpy as np
import pytest
from simulator_kernels import needs_simulator
from simulator_ptx import refused
from simulator_tensors import tensor_map

from fused_peft import simulator

pytestmark = needs_simulator

# 0 ...: the numbers of the PTX ISA's table, which are not the driver's.
ELEMENT_TYPES = {"u1": 0, "u2": 1, "u4": 2, "i4": 3, "f2": 6, "f4": 7, "f8": 9}
SWIZZLES = {0: 0, 32: 1, 64: 2, 128: 3}


def kernel(body: str) -> str:
    """%rd1: the 128 bytes at the first parameter; %rd2: the second parameter."""
    return f""".version 8.7
.target sm_90a
.address_size 64
.shared .align 128 .b8 map[128];
.visible .entry k(.param .u64 maps, .param .u64 value)
{{
  .reg .pred %p<9>; .reg .b32 %r<20>, %t; .reg .b64 %rd<9>;
  mov.u32 %t, %tid.x; setp.eq.u32 %p0, %t, 0;
  ld.param.u64 %rd1, [maps]; ld.param.u64 %rd2, [value];
  {body}
  ret;
}}
"""


def aligned(data: bytes) -> np.ndarray:
    whole = np.zeros(192, np.uint8)
    start = -whole.ctypes.data % 64
    out = whole[start : start + 128]
    out[:] = np.frombuffer(data, np.uint8)
    return out


def run(body: str, data: bytes, value: int = 0) -> bytes:
    """The map behind the kernel's work, which is without findings."""
    maps = aligned(data)
    simulator.reset()
    simulator.launch(kernel(body), "k", 1, 32, [maps, np.uint64(value)])
    assert simulator.findings() == []
    return maps.tobytes()


def replacements(array: np.ndarray, box: tuple[int, ...], swizzle: int, nan_fill: bool) -> str:
    """All fields of the map that the driver makes of these arguments, on [%rd1]."""
    fields = [
        ("elemtype", "", "b32", ELEMENT_TYPES[array.dtype.str[1:]]),
        ("interleave_layout", "", "b32", 0),
        ("swizzle_mode", "", "b32", SWIZZLES[swizzle]),
        ("fill_mode", "", "b32", int(nan_fill)),
        ("rank", "", "b32", array.ndim - 1),
        ("global_address", "", "b64", "%rd2"),
    ]
    for i, (size, length) in enumerate(zip(array.shape[::-1], box[::-1], strict=True)):
        fields += [
            ("global_dim", f"{i}, ", "b32", size),
            ("box_dim", f"{i}, ", "b32", length),
            ("element_stride", f"{i}, ", "b32", 1),
        ]
    for i, stride in enumerate(array.strides[::-1][1:]):
        fields.append(("global_stride", f"{i}, ", "b64", stride))
    return "\n".join(
        f"@%p0 tensormap.replace.tile.{field}{{space}}.b1024.{kind} [{{at}}], {ord_}{value};"
        for field, ord_, kind, value in fields
    )


CASES = [
    ("f2", (64, 128), (16, 64), 128, False),
    ("f4", (4, 6, 32), (2, 3, 16), 64, True),
    ("u1", (512,), (128,), 0, False),
    ("i4", (2, 3, 4, 5, 16), (1, 1, 2, 2, 8), 32, False),
]


@pytest.mark.parametrize(("dtype", "shape", "box", "swizzle", "nan_fill"), CASES)
@pytest.mark.parametrize("space", [".global", ""])
def test_from_zeros_in_global_memory(dtype, shape, box, swizzle, nan_fill, space):
    array = np.zeros(shape, dtype)
    body = replacements(array, box, swizzle, nan_fill).replace("{space}", space)
    made = run(body.replace("{at}", "%rd1"), bytes(128), array.ctypes.data)
    assert made == tensor_map(array, box, swizzle=swizzle, nan_fill=nan_fill)


@pytest.mark.parametrize(("dtype", "shape", "box", "swizzle", "nan_fill"), CASES[:2])
def test_changed_in_shared_memory_and_copied_out(dtype, shape, box, swizzle, nan_fill):
    """As grouped GEMMs do: another tensor's map, changed in shared memory."""
    array, other = np.zeros(shape, dtype), np.zeros((3, 32), np.uint32)
    body = replacements(array, box, swizzle, nan_fill).replace("{space}", ".shared::cta")
    text = f"""
  mov.u32 %r1, map; shl.b32 %r2, %t, 2; add.u32 %r3, %r1, %r2; mad.wide.u32 %rd3, %t, 4, %rd1;
  ld.global.u32 %r4, [%rd3]; st.shared.u32 [%r3], %r4;
  bar.warp.sync 0xffffffff;
  {body.replace("{at}", "%r1")}
  bar.warp.sync 0xffffffff;
  tensormap.cp_fenceproxy.global.shared::cta.tensormap::generic.release.gpu.sync.aligned
      [%rd1], [%r1], 128;"""
    made = run(text, tensor_map(other, (1, 4), swizzle=128), array.ctypes.data)
    assert made == tensor_map(array, box, swizzle=swizzle, nan_fill=nan_fill)


def faults(body: str, data: bytes) -> list[simulator.Finding]:
    simulator.reset()
    with contextlib.suppress(simulator.SimulatorError):
        simulator.launch(kernel(body), "k", 1, 32, [aligned(data), np.uint64(0)])
    return simulator.findings()


RANK = "@%p0 tensormap.replace.tile.rank.global.b1024.b32 [%rd1], 2;"


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        (", 2", ", 5", "no value for rank"),
        ("rank", "box_dim", "no value for box_dim"),
        ("[%rd1]", "[%rd1+32]", "multiple of 64"),
        ("[%rd1]", "[%rd1+64]", "behind the end"),
        ("@%p0", "@%p0 st.global.u32 [%rd1+4], 9;  @%p0", "not that of a tensor map"),
    ],
)
def test_misuse(old, new, words):
    body = RANK.replace(old, new)
    if "box_dim" in new:
        body = body.replace(", 2", ", 1, 257")
    found = faults(body, bytes(128))
    assert any(words in f.text for f in found), found


def test_two_warps_race_for_one_map():
    simulator.reset()
    text = kernel("@%p0 bra A; setp.eq.u32 %p0, %t, 32; A:" + RANK)
    simulator.launch(text, "k", 1, 64, [aligned(bytes(128)), np.uint64(0)])
    assert {f.kind for f in simulator.findings()} == {"race"}


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("tile.rank", "tile.swizzle_atomicity"),
        ("tile.rank.global.b1024.b32 [%rd1], 2", "tile.swizzle_mode.global.b1024.b32 [%rd1], 4"),
        ("tile.rank.global.b1024.b32 [%rd1], 2", "tile.elemtype.global.b1024.b32 [%rd1], 13"),
        ("tile.rank.global.b1024.b32 [%rd1], 2", "tile.box_dim.global.b1024.b32 [%rd1], 5, 1"),
        ("b1024.b32", "b1024.b64"),
    ],
)
def test_what_is_refused(old, new):
    assert "tensormap" in refused(kernel(RANK.replace(old, new)))
