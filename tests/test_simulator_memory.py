"""Loads, stores and addresses of the simulator, in every space, against NumPy."""

from __future__ import annotations

import numpy as np
import pytest
from simulator_kernels import needs_simulator
from simulator_memory_kernels import LANES, aligned, kernel, launch

from fused_peft import simulator

pytestmark = needs_simulator

rng = np.random.default_rng(0)

# ---- loads and stores

# Address register of a lane's 32 bytes in each space.
PLACES = {
    "global": "mad.wide.u32 %y, %t, 32, %out;",
    "shared": "mov.u32 %a, tile; mad.lo.u32 %a, %t, 32, %a; cvt.u64.u32 %y, %a;",
    "local": "mov.u64 %y, own;",
    "generic global": "mad.wide.u32 %y, %t, 32, %out;",
    "generic shared": "mov.u64 %y, tile; cvta.shared.u64 %y, %y; mad.wide.u32 %y, %t, 32, %y;",
    "generic local": "mov.u64 %y, own; cvta.local.u64 %y, %y;",
}
SIZES = [(1, 1), (1, 2), (1, 4), (2, 1), (2, 2), (2, 4), (4, 1), (4, 2), (4, 4), (4, 8)]
SIZES += [(8, 1), (8, 2), (8, 4), (16, 1), (16, 2)]


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize(("size", "vector"), SIZES)
def test_bytes_go_through_every_space(place: str, size: int, vector: int) -> None:
    prefix = {1: "%h", 2: "%h", 4: "%r", 8: "%d", 16: "%q"}[size]
    registers = ", ".join(f"{prefix}{i}" for i in range(vector))
    value = f"{{{registers}}}" if vector > 1 else registers
    form = f"{f'.v{vector}' if vector > 1 else ''}.b{8 * size}"
    space = "" if place.startswith("generic") else f".{place}"
    body = f"""
      mad.wide.u32 %x, %t, {size * vector}, %in;
      ld.global{form} {value}, [%x];
      {PLACES[place]}
      st{space}{form} [%y], {value};
      ld{space}{form} {value}, [%y];
      mad.wide.u32 %z, %t, {size * vector}, %out;
      st.global{form} [%z+1024], {value};"""
    data = aligned(rng.integers(0, 256, LANES * size * vector, np.uint8))
    out = aligned(np.zeros(2048, np.uint8))
    launch(kernel(body), [data, out])
    np.testing.assert_array_equal(out[1024 : 1024 + data.size], data)


@pytest.mark.parametrize(
    ("source", "width"),
    [
        (sign + str(bits), width)
        for bits in (8, 16, 32)
        for sign in "us"
        for width in (16, 32, 64)
        if width >= bits
    ],
)
def test_narrow_loads_are_extended_and_stores_cut(source: str, width: int) -> None:
    dtype = np.dtype({"u": "uint", "s": "int"}[source[0]] + source[1:])
    register = {16: "%h0", 32: "%r0", 64: "%d0"}[width]
    body = f"""
      mad.wide.u32 %x, %t, {dtype.itemsize}, %in;
      ld.global.{source} {register}, [%x];
      mad.wide.u32 %y, %t, 8, %out;
      st.global.b{width} [%y], {register};
      mad.wide.u32 %z, %t, {dtype.itemsize}, %out;
      st.global.{source} [%z+256], {register};"""
    data = np.frombuffer(rng.bytes(LANES * dtype.itemsize), dtype).copy()
    out = np.zeros(512, np.uint8)
    launch(kernel(body), [data, out])
    wide = out[:256].view(np.int64).astype(f"int{width}")
    np.testing.assert_array_equal(wide, data.astype(np.int64).astype(f"int{width}"))
    np.testing.assert_array_equal(out[256 : 256 + data.nbytes].view(dtype), data)


def test_lanes_of_one_load_point_into_different_spaces() -> None:
    body = """
      mad.wide.u32 %x, %t, 4, %in;
      ld.global.u32 %r0, [%x];
      mov.u64 %y, tile; cvta.shared.u64 %y, %y; mad.wide.u32 %y, %t, 4, %y;
      st.u32 [%y], %r0;
      mov.u64 %z, own; cvta.local.u64 %z, %z;
      add.u32 %r1, %r0, 1000;
      st.u32 [%z], %r1;
      rem.u32 %r2, %t, 3;
      setp.eq.u32 %p, %r2, 1;
      selp.b64 %x, %y, %x, %p;
      setp.eq.u32 %p, %r2, 2;
      selp.b64 %x, %z, %x, %p;
      ld.u32 %r3, [%x];
      mad.wide.u32 %y, %t, 4, %out;
      st.global.u32 [%y], %r3;"""
    data = np.arange(LANES, dtype=np.uint32) * 7
    out = np.zeros(LANES, np.uint32)
    launch(kernel(body), [data, out])
    np.testing.assert_array_equal(out, data + 1000 * (np.arange(LANES) % 3 == 2))


def test_guarded_load_leaves_other_lanes_alone() -> None:
    body = """
      mov.u32 %r0, 5;
      setp.lt.u32 %p, %t, 10;
      mad.wide.u32 %x, %t, 4, %in;
      @%p ld.global.u32 %r0, [%x];
      mad.wide.u32 %y, %t, 4, %out;
      st.global.u32 [%y], %r0;"""
    out = np.zeros(LANES, np.uint32)
    launch(kernel(body), [np.arange(100, 110, dtype=np.uint32), out])
    np.testing.assert_array_equal(out, [*range(100, 110), *[5] * 22])


@pytest.mark.parametrize("threads", [1, 31, 33])
def test_partial_warp(threads: int) -> None:
    body = """
      mad.wide.u32 %x, %t, 8, %in;
      ld.global.v2.u32 {%r0, _}, [%x];
      mad.wide.u32 %y, %t, 4, %out;
      st.global.u32 [%y], %r0;"""
    data = np.arange(2 * threads, dtype=np.uint32)
    out = np.zeros(threads, np.uint32)
    launch(kernel(body), [data, out], threads)
    np.testing.assert_array_equal(out, data[::2])


@pytest.mark.parametrize(
    "form",
    [
        "ld.global.nc.u32",
        "ld.global.ca.u32",
        "ld.global.cg.u32",
        "ld.global.cv.u32",
        "ld.volatile.global.u32",
        "ld.relaxed.cta.global.u32",
        "ld.acquire.gpu.global.u32",
        "ld.acquire.sys.u32",
        "ld.weak.global.u32",
        "ld.global.L1::no_allocate.L2::128B.u32",
        "ld.global.nc.L1::no_allocate.L2::256B.u32",
        "ld.global.L1::evict_last.u32",
        "ld.relaxed.gpu.global.L1::no_allocate.u32",
        "ldu.global.u32",
    ],
)
def test_hints_and_orders_of_loads_change_no_value(form: str) -> None:
    body = f"""
      mad.wide.u32 %x, %t, 4, %in;
      prefetch.global.L2 [%x];
      {form} %r0, [%x];
      mad.wide.u32 %y, %t, 4, %out;
      st.global.u32 [%y], %r0;"""
    data = rng.integers(0, 2**32, LANES, np.uint32)
    out = np.zeros_like(data)
    launch(kernel(body), [data, out])
    np.testing.assert_array_equal(out, data)


@pytest.mark.parametrize(
    "form",
    ["st.volatile.global.u32", "st.relaxed.gpu.global.u32", "st.release.gpu.global.u32"]
    + [f"st.global.{cop}.u32" for cop in ("wb", "cg", "cs", "wt")]
    + ["st.global.L1::no_allocate.u32"],
)
def test_hints_and_orders_of_stores_change_no_value(form: str) -> None:
    body = f"""
      mad.wide.u32 %x, %t, 4, %in;
      ld.global.u32 %r0, [%x];
      mad.wide.u32 %y, %t, 4, %out;
      {form} [%y], %r0;"""
    data = rng.integers(0, 2**32, LANES, np.uint32)
    out = np.zeros_like(data)
    launch(kernel(body), [data, out])
    np.testing.assert_array_equal(out, data)


def test_cache_policy_operand() -> None:
    body = """
      createpolicy.fractional.L2::evict_first.b64 %d0, 1.0;
      mad.wide.u32 %x, %t, 4, %in;
      ld.global.L2::cache_hint.u32 %r0, [%x], %d0;
      mad.wide.u32 %y, %t, 4, %out;
      st.global.L2::cache_hint.u32 [%y], %r0, %d0;"""
    data = rng.integers(0, 2**32, LANES, np.uint32)
    out = np.zeros_like(data)
    launch(kernel(body), [data, out])
    np.testing.assert_array_equal(out, data)


def test_unknown_qualifier_is_named() -> None:
    with pytest.raises(simulator.SimulatorError, match=r"\.sideways"):
        launch(kernel("ld.global.sideways.u32 %r0, [%in];"), [np.zeros(1), np.zeros(1)])


def test_module_variables() -> None:
    outside = """
.const .align 4 .u32 table[4] = {10, 20, 30, 40};
.global .align 4 .u32 counter[2] = {7};"""
    body = """
      and.b32 %a, %t, 3;
      mov.u64 %x, table; mad.wide.u32 %x, %a, 4, %x;
      ld.const.u32 %r0, [%x];
      ld.global.u32 %r1, [counter];
      ld.global.u32 %r2, [counter+4];
      add.u32 %r0, %r0, %r1; add.u32 %r0, %r0, %r2;
      mad.wide.u32 %y, %t, 4, %out;
      st.global.u32 [%y], %r0;"""
    out = np.zeros(LANES, np.uint32)
    launch(
        kernel(body.strip(), outside=outside.replace("\n.global .align 8 .u64 link = table;", "")),
        [np.zeros(1), out],
    )
    np.testing.assert_array_equal(out, 10 * (np.arange(LANES) % 4 + 1) + 7)


def test_parameters() -> None:
    """A struct read at constant offsets, as a vector, by register and through a pointer."""
    body = """
      ld.param.u16 %h0, [rows+2];
      ld.param.v2.u32 {%r1, %r2}, [rows+8];
      mov.b64 %x, rows;
      and.b32 %a, %t, 7; mad.wide.u32 %x, %a, 4, %x;
      ld.param.u32 %r3, [%x];
      mov.b64 %y, rows; cvta.param.u64 %y, %y;
      ld.u32 %r4, [%y+28];
      cvt.u32.u16 %r0, %h0;
      mad.wide.u32 %z, %t, 32, %out;
      st.global.v4.u32 [%z], {%r0, %r1, %r2, %r3};
      st.global.u32 [%z+16], %r4;"""
    struct = rng.integers(0, 2**32, 8, np.uint32)
    out = np.zeros((LANES, 8), np.uint32)
    params = ".align 8 .b8 rows[32], .u64 out"
    launch(kernel(body, params), [struct.tobytes(), out])
    np.testing.assert_array_equal(out[:, 0], struct[0] >> 16)
    np.testing.assert_array_equal(out[:, 1:3], np.tile(struct[2:4], (LANES, 1)))
    np.testing.assert_array_equal(out[:, 3], struct[np.arange(LANES) % 8])
    np.testing.assert_array_equal(out[:, 4], struct[7])


# ---- addresses


def test_spaces_of_generic_addresses() -> None:
    spaces = ["global", "shared", "local", "shared::cta", "shared::cluster"]
    body = ["mov.u64 %d0, tile; cvta.shared.u64 %d0, %d0;"]
    body += ["mov.u64 %d1, own; cvta.local.u64 %d1, %d1; mov.u64 %d2, %out;"]
    body += ["cvta.to.shared.u64 %d3, %d0; cvta.shared.u64 %d3, %d3;"]
    for row in range(4):
        for column, space in enumerate(spaces):
            body.append(f"isspacep.{space} %p, %d{row}; selp.u32 %r0, 1, 0, %p;")
            body.append(f"st.global.u32 [%out+{4 * (row * len(spaces) + column)}], %r0;")
    out = np.full((4, len(spaces)), 9, np.uint32)
    launch(kernel("\n".join(body)), [np.zeros(1), out], threads=1)
    shared = [0, 1, 0, 1, 1]
    np.testing.assert_array_equal(out, [shared, [0, 0, 1, 0, 0], [1, 0, 0, 0, 0], shared])


@pytest.mark.parametrize("wide", [False, True])
def test_shared_memory_of_another_block_of_the_cluster(wide: bool) -> None:
    """Every block writes its rank into the next one's memory, and says whose address that was."""
    generic = """mov.u64 %x, tile; cvta.shared.u64 %x, %x;
      mapa.u64 %x, %x, %b; getctarank.u64 %c, %x;"""
    narrow = """mov.u32 %a, tile; mapa.shared::cluster.u32 %a, %a, %b;
      getctarank.shared::cluster.u32 %c, %a;"""
    body = f"""
      mov.u32 %r0, %cluster_ctarank;
      add.u32 %b, %r0, 1; and.b32 %b, %b, 3;
      {generic if wide else narrow}
      barrier.cluster.arrive; barrier.cluster.wait;
      {"st.u32 [%x+16], %r0;" if wide else "st.shared::cluster.u32 [%a+16], %r0;"}
      barrier.cluster.arrive; barrier.cluster.wait;
      ld.shared.u32 %r1, [tile+16];
      mov.u32 %r2, %ctaid.x; mad.wide.u32 %y, %r2, 8, %out;
      st.global.v2.u32 [%y], {{%r1, %c}};"""
    out = np.full((8, 2), 9, np.uint32)
    launch(kernel(body), [np.zeros(1), out], threads=1, grid=8, cluster=4)
    rank = np.arange(8) % 4
    np.testing.assert_array_equal(out, np.stack([(rank - 1) % 4, (rank + 1) % 4], 1))
