"""cp.async.bulk.tensor of the simulator against NumPy: ranks, types, swizzles, reductions."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Sequence

import numpy as np
import pytest
from simulator_kernels import needs_simulator
from simulator_tensors import (
    INVALID_VALUE,
    NOT_SUPPORTED,
    encode,
    indices_of_box,
    swizzle_bytes,
    tensor_map,
)

from fused_peft import simulator

pytestmark = needs_simulator

HEADER = """.version 8.7
.target sm_90a
.address_size 64
.extern .shared .align 1024 .b8 tile[];
.shared .align 8 .b64 bar;
"""
COPY_OUT = """
  shl.b32 %r1, %t, 4;
LOOP:
  setp.ge.u32 %p1, %r1, {bytes};
  @%p1 bra END;
  mov.u32 %r2, tile; add.u32 %r2, %r2, %r1;
  cvt.u64.u32 %rd3, %r1; add.u64 %rd3, %rd2, %rd3;
  ld.shared.v4.b32 {{%r4, %r5, %r6, %r7}}, [%r2];
  st.global.v4.b32 [%rd3], {{%r4, %r5, %r6, %r7}};
  add.u32 %r1, %r1, 512;
  bra LOOP;
END:
"""
COPY_IN = COPY_OUT.replace(
    "ld.shared.v4.b32 {{%r4, %r5, %r6, %r7}}, [%r2];",
    "ld.global.v4.b32 {{%r4, %r5, %r6, %r7}}, [%rd3];",
).replace(
    "st.global.v4.b32 [%rd3], {{%r4, %r5, %r6, %r7}};",
    "st.shared.v4.b32 [%r2], {{%r4, %r5, %r6, %r7}};",
)


def entry(body: str) -> str:
    return f"""{HEADER}
.visible .entry k(.param .align 64 .b8 map[128], .param .u64 tensor, .param .u64 tile_bytes)
{{
  .reg .pred %p<9>; .reg .b16 %h<3>; .reg .b32 %r<20>, %t; .reg .b64 %rd<9>;
  mov.u32 %t, %tid.x;
  mov.b64 %rd1, map;
  cvta.param.u64 %rd1, %rd1;
  ld.param.u64 %rd2, [tile_bytes];
  setp.eq.u32 %p0, %t, 0;
  mov.u32 %r10, bar;
  mov.u32 %r11, tile;
  {body}
  ret;
}}
"""


def coordinates(start: Sequence[int]) -> str:
    return "{" + ", ".join(str(c) for c in start[::-1]) + "}"


def load_kernel(rank: int, start: Sequence[int], num_bytes: int) -> str:
    instruction = f"cp.async.bulk.tensor.{rank}d.shared::cluster.global.tile"
    return entry(f"""
  @%p0 mbarrier.init.shared::cta.b64 [%r10], 1;
  @%p0 fence.mbarrier_init.release.cluster;
  bar.sync 0;
  @%p0 mbarrier.arrive.expect_tx.shared::cta.b64 _, [%r10], {num_bytes};
  @%p0 {instruction}.mbarrier::complete_tx::bytes [%r11], [%rd1, {coordinates(start)}], [%r10];
WAIT:
  mbarrier.try_wait.parity.shared::cta.b64 %p2, [%r10], 0;
  @!%p2 bra WAIT;
  {COPY_OUT.format(bytes=num_bytes)}""")


def load(
    array: np.ndarray,
    box: Sequence[int],
    start: Sequence[int],
    timing: str = "random",
    **how: object,
) -> bytes:
    """A box as it lies in shared memory."""
    steps = how.get("element_strides") or [1] * array.ndim
    counts = [math.ceil(b / s) for b, s in zip(box[:-1], steps, strict=False)] + [box[-1]]
    num_bytes = math.prod(counts) * array.itemsize
    out = np.full(num_bytes, 0xCD, np.uint8)
    map_bytes = tensor_map(array, box, **how)
    simulator.reset()
    with simulator.options(async_timing=timing):
        simulator.launch(
            load_kernel(array.ndim, start, num_bytes),
            "k",
            1,
            32,
            [map_bytes, array, out],
            shared_bytes=num_bytes,
        )
    assert simulator.findings() == []
    return out.tobytes()


def expected_load(
    array: np.ndarray,
    box: Sequence[int],
    start: Sequence[int],
    swizzle: int = 0,
    fill: float = 0,
    steps: Sequence[int] | None = None,
) -> bytes:
    steps = [*(steps or [1] * array.ndim)[:-1], 1]
    index, inside = indices_of_box(array.shape, box, start, steps)
    values = np.where(inside, array[tuple(index)], np.asarray(fill, array.dtype))
    return swizzle_bytes(values.astype(array.dtype).tobytes(), swizzle)


def numbers(shape: Sequence[int], dtype: object) -> np.ndarray:
    values = np.arange(1, math.prod(shape) + 1) % 2039
    return values.reshape(shape).astype(dtype)


@pytest.mark.parametrize("swizzle", [0, 32, 64, 128])
@pytest.mark.parametrize("dtype", ["u1", "f2", "f4", "f8"])
@pytest.mark.parametrize("start", [(0, 0), (5, 16), (-3, 0), (30, -16), (29, 48), (100, 0)])
def test_two_dimensions(swizzle, dtype, start):
    array = numbers((32, 64), dtype)
    inner = (swizzle or 128) // array.itemsize
    box = (16, min(inner, 64))
    assert load(array, box, start, swizzle=swizzle) == expected_load(array, box, start, swizzle)


@pytest.mark.parametrize("timing", ["early", "late", "random"])
@pytest.mark.parametrize(
    ("shape", "box", "start"),
    [
        ((100,), (32,), (80,)),
        ((100,), (32,), (-5,)),
        ((5, 6, 32), (2, 3, 16), (4, -1, 8)),
        ((3, 4, 5, 16), (2, 2, 2, 8), (1, 3, -1, 4)),
        ((2, 3, 4, 5, 16), (2, 2, 2, 2, 8), (-1, 2, 1, 4, 12)),
    ],
)
def test_one_to_five_dimensions(shape, box, start, timing):
    array = numbers(shape, "f4")
    assert load(array, box, start, timing) == expected_load(array, box, start)


@pytest.mark.parametrize("timing", ["early", "late", "random"])
@pytest.mark.parametrize("mask", [1, 2, 3])
def test_multicast(mask, timing):
    """Rank 1 of a cluster of two issues; what the mask leaves out keeps its fives."""
    array = numbers((8, 16), "f4")
    sync = "barrier.cluster.arrive.aligned; barrier.cluster.wait.aligned;"
    text = entry(f"""
  mov.u32 %r9, %cluster_ctarank; mul.wide.u32 %rd4, %r9, 512; add.u64 %rd2, %rd2, %rd4;
  shl.b32 %r1, %t, 4; add.u32 %r1, %r1, %r11; mov.u32 %r2, 5;
  st.shared.v4.b32 [%r1], {{%r2, %r2, %r2, %r2}}; fence.proxy.async;
  shr.u32 %r3, {mask}, %r9; and.b32 %r3, %r3, 1; setp.ne.u32 %p3, %r3, 0; and.pred %p4, %p3, %p0;
  @%p0 mbarrier.init.shared::cta.b64 [%r10], 1;
  @%p0 fence.mbarrier_init.release.cluster;
  @%p4 mbarrier.arrive.expect_tx.shared::cta.b64 _, [%r10], 512;
  {sync}
  setp.eq.and.u32 %p5, %r9, 1, %p0; mov.u16 %h1, {mask};
  @%p5 cp.async.bulk.tensor.2d.shared::cluster.global.tile
       .mbarrier::complete_tx::bytes.multicast::cluster [%r11], [%rd1, {{0, 0}}], [%r10], %h1;
  @!%p3 bra DONE;
WAIT: mbarrier.try_wait.parity.shared::cta.b64 %p2, [%r10], 0; @!%p2 bra WAIT;
DONE:
  {sync}
  {COPY_OUT.format(bytes=512)}""")
    out = np.zeros((2, 128), np.uint32)
    simulator.reset()
    with simulator.options(async_timing=timing):
        args = [tensor_map(array, (8, 16)), array, out]
        simulator.launch(text, "k", 2, 32, args, shared_bytes=512, cluster=2)
    assert simulator.findings() == []
    for rank in range(2):
        expected = array.view(np.uint32).ravel() if mask >> rank & 1 else np.full(128, 5)
        assert np.array_equal(out[rank], expected)


def test_a_part_of_sixteen_bytes_is_outside():
    """The tensor's edges cut through 16-byte pieces: 3 elements of 2 bytes on one side."""
    array = numbers((8, 24), "f2")
    for column in (-3, 21, -13):
        assert load(array, (4, 16), (2, column)) == expected_load(array, (4, 16), (2, column))


def test_fill_with_nan():
    array = numbers((8, 16), "f4")
    data = np.frombuffer(load(array, (4, 16), (6, 8), nan_fill=True), np.float32).reshape(4, 16)
    assert np.array_equal(data[:2, :8], array[6:, 8:])
    assert np.isnan(data[2:]).all()
    assert np.isnan(data[:, 8:]).all()


def test_element_strides():
    array = numbers((16, 16, 16), "f4")
    box, start, steps = (6, 5, 8), (3, 2, 4), (2, 3, 1)
    assert load(array, box, start, element_strides=steps) == expected_load(
        array, box, start, steps=steps
    )


def store_kernel(
    rank: int, start: Sequence[int], num_bytes: int, instruction: str, fence: str, wait: str
) -> str:
    return entry(
        f"""
  {COPY_IN.format(bytes=num_bytes)}
  {fence}
  bar.sync 0;
  @%p0 {instruction}.{rank}d.global.shared::cta{{how}}.bulk_group
       [%rd1, {coordinates(start)}], [%r11];
  @%p0 cp.async.bulk.commit_group;
  {wait}
""".replace("{how}", "")
    )


def store(
    array: np.ndarray,
    tile: np.ndarray,
    start: Sequence[int],
    *,
    swizzle: int = 0,
    operation: str = "",
    fence: str = "fence.proxy.async.shared::cta;",
    wait: str = "@%p0 cp.async.bulk.wait_group 0;",
    timing: str = "random",
    **how: object,
) -> list[simulator.Finding]:
    """Stores the tile into the array."""
    instruction = "cp.reduce.async.bulk.tensor" if operation else "cp.async.bulk.tensor"
    ptx = store_kernel(array.ndim, start, tile.nbytes, instruction, fence, wait)
    ptx = ptx.replace(".bulk_group", f"{operation}.tile.bulk_group" if operation else ".bulk_group")
    placed = np.frombuffer(swizzle_bytes(tile.tobytes(), swizzle), np.uint8).copy()
    args = [tensor_map(array, tile.shape, swizzle=swizzle, **how), array, placed]
    simulator.reset()
    with simulator.options(async_timing=timing):
        simulator.launch(ptx, "k", 1, 32, args, shared_bytes=tile.nbytes)
    return simulator.findings()


@pytest.mark.parametrize("swizzle", [0, 32, 64, 128])
@pytest.mark.parametrize("start", [(0, 0), (5, 16), (-3, -8), (30, 40)])
def test_store(swizzle, start):
    array = numbers((32, 64), "f2")
    tile = -numbers((16, (swizzle or 64) // 2), "f2")
    before = array.copy()
    assert store(array, tile, start, swizzle=swizzle) == []
    index, inside = indices_of_box(array.shape, tile.shape, start, (1, 1))
    before[tuple(i[inside] for i in index)] = tile[inside]
    assert np.array_equal(array, before)


@pytest.mark.parametrize(
    ("operation", "dtype", "function"),
    [
        (".add", "f2", np.add),
        (".add", "f4", np.add),
        (".add", "i4", np.add),
        (".min", "i4", np.minimum),
        (".max", "f2", np.maximum),
        (".max", "u4", np.maximum),
        (".and", "u4", np.bitwise_and),
        (".or", "u4", np.bitwise_or),
        (".xor", "u4", np.bitwise_xor),
    ],
)
def test_reductions(operation, dtype, function):
    array, tile = numbers((8, 16), dtype), numbers((4, 8), dtype)[::-1].copy()
    expected = array.copy()
    expected[6:, 4:12] = function(array[6:, 4:12], tile[:2])
    assert store(array, tile, (6, 4), operation=operation) == []
    assert np.array_equal(array, expected)


def test_a_missing_proxy_fence_is_found():
    array, tile = numbers((8, 16), "f4"), numbers((4, 16), "f4")
    for timing in ("early", "late"):
        findings = store(array, tile, (0, 0), fence="", timing=timing)
        assert {f.kind for f in findings} == {"missing proxy fence"}
        assert "cp.async.bulk.tensor" in findings[0].instruction


def test_the_fence_of_the_issuing_thread_will_do():
    array, tile = numbers((8, 16), "f4"), numbers((4, 16), "f4")
    assert store(array, tile, (0, 0), fence="bar.sync 0; fence.proxy.async;") == []


def test_a_tile_read_before_its_mbarrier():
    array = numbers((16, 16), "f4")
    ptx = load_kernel(2, (0, 0), 512).replace("@!%p2 bra WAIT;", "")
    simulator.reset()
    with simulator.options(async_timing="late"):
        args = [tensor_map(array, (8, 16)), array, np.zeros(512, np.uint8)]
        simulator.launch(ptx, "k", 1, 32, args, shared_bytes=512)
    assert "asynchronous copy not waited for" in {f.kind for f in simulator.findings()}


def test_a_tensor_beyond_its_buffer():
    array = numbers((16, 16), "f4")
    rows = array[:8]
    map_bytes = tensor_map(array, (16, 16))
    simulator.reset()
    args = [map_bytes, rows, np.zeros(1024, np.uint8)]
    with pytest.raises(simulator.SimulatorError):
        simulator.launch(load_kernel(2, (0, 0), 1024), "k", 1, 32, args, shared_bytes=1024)
    assert "out of bounds" in {f.kind for f in simulator.findings()}


def test_a_box_at_16_bytes():
    array = numbers((16, 16), "f4")
    ptx = load_kernel(2, (0, 0), 512).replace("[%r11], [%rd1", "[%r11+16], [%rd1")
    simulator.reset()
    args = [tensor_map(array, (8, 16)), array, np.zeros(512, np.uint8)]
    with contextlib.suppress(simulator.SimulatorError):  # nothing arrives at the mbarrier
        simulator.launch(ptx, "k", 1, 32, args, shared_bytes=1024)
    assert [f.kind for f in simulator.findings()] == ["misaligned"]


@pytest.mark.parametrize("map_bytes", [bytes(128), b"\x01" * 128])
def test_what_is_no_tensor_map(map_bytes):
    simulator.reset()
    array = numbers((16, 16), "f4")
    ptx = load_kernel(2, (0, 0), 512).replace("@!%p2 bra WAIT;", "")
    args = [map_bytes, array, np.zeros(512, np.uint8)]
    simulator.launch(ptx, "k", 1, 32, args, shared_bytes=512)
    assert any("tensor map" in f.text for f in simulator.findings())


@pytest.mark.parametrize(
    ("changed", "code"),
    [
        ({"rank": 0}, INVALID_VALUE),
        ({"rank": 6}, INVALID_VALUE),
        ({"address": 8}, INVALID_VALUE),
        ({"dims": (0, 16)}, INVALID_VALUE),
        ({"dims": (2**32 + 1, 16)}, INVALID_VALUE),
        ({"strides": (24,)}, INVALID_VALUE),
        ({"strides": (2**40,)}, INVALID_VALUE),
        ({"box": (257, 1)}, INVALID_VALUE),
        ({"box": (0, 1)}, INVALID_VALUE),
        ({"box": (3, 1)}, INVALID_VALUE),
        ({"element_strides": (1, 9)}, INVALID_VALUE),
        ({"swizzle": 1}, INVALID_VALUE),
        ({"fill": 1, "type": 2}, INVALID_VALUE),
        ({"interleave": 1}, NOT_SUPPORTED),
        ({"type": 13}, NOT_SUPPORTED),
        ({}, 0),
    ],
)
def test_the_driver_checks_its_arguments(changed, code):
    array = numbers((16, 32), "f4")
    assert encode(array, (8, 16), changed=changed)[0] == code
