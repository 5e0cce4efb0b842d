"""Counts of the simulator against paper."""

from __future__ import annotations

import numpy as np
import pytest
from simulator_kernels import needs_simulator
from simulator_memory_kernels import LANES, aligned, kernel, launch

from fused_peft import simulator

pytestmark = needs_simulator


def count(
    body: str, threads: int = LANES, grid: int = 1, bytes_in: int = 1 << 16
) -> simulator.Counters:
    """Counts of one launch of kernel(body) on an input and an output of as many bytes."""
    data, out = (aligned(np.zeros(bytes_in, np.uint8)) for _ in range(2))
    launch(kernel(body), [data, out], threads, grid=grid)
    (result,) = simulator.counters()
    return result


# ---- global memory

# Byte address of lane t, and the sectors and unique bytes of a load of 4 bytes there.
PATTERNS = {
    "neighbours": ("mul.lo.u32 %a, %t, 4;", 4, 128),
    "neighbours, 16 bytes on": ("mad.lo.u32 %a, %t, 4, 16;", 5, 128),
    "backwards": ("sub.u32 %a, 31, %t; mul.lo.u32 %a, %a, 4;", 4, 128),
    "one word": ("mov.u32 %a, 64;", 1, 4),
    "every other word": ("mul.lo.u32 %a, %t, 8;", 8, 128),
    "a sector each": ("mul.lo.u32 %a, %t, 32;", 32, 128),
    "far apart": ("mul.lo.u32 %a, %t, 1024;", 32, 128),
    "far apart, shuffled": (
        "mul.lo.u32 %a, %t, 11; and.b32 %a, %a, 31; mul.lo.u32 %a, %a, 1024;",
        32,
        128,
    ),
    "pairs share a word": ("shr.u32 %a, %t, 1; mul.lo.u32 %a, %a, 4;", 2, 64),
    "two rows": ("and.b32 %a, %t, 1; mul.lo.u32 %a, %a, 4096; mad.lo.u32 %a, %t, 4, %a;", 8, 128),
}


@pytest.mark.parametrize("pattern", PATTERNS)
def test_sectors_of_a_load(pattern: str) -> None:
    address, sectors, unique = PATTERNS[pattern]
    got = count(f"{address} cvt.u64.u32 %x, %a; add.u64 %x, %x, %in; ld.global.u32 %r0, [%x];")
    assert got.global_load_bytes == 4 * LANES
    assert got.global_load_sectors == sectors
    assert got.global_unique_load_bytes == unique
    assert got.global_store_bytes == got.global_store_sectors == got.global_unique_store_bytes == 0


@pytest.mark.parametrize(
    "pattern", [name for name in PATTERNS if "one word" not in name and "share" not in name]
)
def test_sectors_of_a_store(pattern: str) -> None:
    address, sectors, unique = PATTERNS[pattern]
    got = count(f"{address} cvt.u64.u32 %x, %a; add.u64 %x, %x, %out; st.global.u32 [%x], %t;")
    assert got.global_store_bytes == 4 * LANES
    assert got.global_store_sectors == sectors
    assert got.global_unique_store_bytes == unique
    assert got.global_load_bytes == got.global_unique_load_bytes == 0


def test_sectors_of_wide_and_partial_accesses() -> None:
    wide = count("mad.wide.u32 %x, %t, 16, %in; ld.global.v4.u32 {%r0, %r1, %r2, %r3}, [%x];")
    assert (wide.global_load_bytes, wide.global_load_sectors) == (512, 16)
    part = count("setp.lt.u32 %p, %t, 3; mad.wide.u32 %x, %t, 4, %in; @%p ld.global.u32 %r0, [%x];")
    assert (part.global_load_bytes, part.global_load_sectors) == (12, 1)
    assert part.sector_use == 12 / 32


def test_bytes_are_unique_in_the_launch() -> None:
    """Every block reads the same 4 KiB twice and writes 128 bytes of its own."""
    body = """
      mov.u32 %b, %ctaid.x; mov.u32 %r2, 0;
    LOOP:
      mad.wide.u32 %x, %t, 32, %in;
      ld.global.v4.u32 {%r4, %r5, %r6, %r7}, [%x]; ld.global.v4.u32 {%r4, %r5, %r6, %r7}, [%x+16];
      add.u32 %r2, %r2, 1; setp.lt.u32 %p, %r2, 2; @%p bra LOOP;
      mad.lo.u32 %a, %b, 128, %t; mad.wide.u32 %y, %a, 4, %out; st.global.u32 [%y], %r4;"""
    got = count(body, threads=128, grid=5)
    assert got.global_load_bytes == 5 * 2 * 4096
    assert got.global_unique_load_bytes == 4096
    assert got.global_store_bytes == got.global_unique_store_bytes == 5 * 512


def test_atomics_are_counted_apart() -> None:
    got = count("red.global.add.u32 [%out], 1; atom.global.add.u64 %d0, [%out+8], 1;", threads=40)
    assert got.global_atomic_bytes == 40 * 12
    assert got.global_load_bytes == got.global_store_bytes == 0
    assert got.by_class["atomic"] == 4


def test_parameters_and_constants_are_no_traffic() -> None:
    got = count("ld.param.u64 %x, [in]; ld.param.u64 %y, [out];")
    assert got.global_load_bytes == got.local_load_bytes == got.shared_load_bytes == 0


def test_local_memory() -> None:
    got = count("st.local.v4.u32 [own], {%t, %t, %t, %t}; ld.local.u32 %r0, [own+8];", threads=50)
    assert (got.local_store_bytes, got.local_load_bytes) == (800, 200)
    assert got.global_load_bytes == got.global_store_bytes == 0


# ---- shared memory: wavefronts of one access by 32 lanes, and how few there could be

# Lane t's byte offset.
BANKS = {
    # 4 bytes a lane
    ("u32", "mul.lo.u32 %a, %t, 4;"): (1, 1),
    ("u32", "mov.u32 %a, 0;"): (1, 1),  # all the same word
    ("u32", "mul.lo.u32 %a, %t, 8;"): (2, 1),
    ("u32", "mul.lo.u32 %a, %t, 16;"): (4, 1),
    ("u32", "mul.lo.u32 %a, %t, 128;"): (32, 1),
    ("u32", "mul.lo.u32 %a, %t, 132;"): (1, 1),  # padded by a word
    ("u32", "shr.u32 %a, %t, 4; mul.lo.u32 %a, %a, 128;"): (2, 1),  # two rows of one bank
    ("u32", "xor.b32 %a, %t, 5; mul.lo.u32 %a, %a, 4;"): (1, 1),
    # narrower: lanes of one word share it
    ("u8", "mov.u32 %a, %t;"): (1, 1),
    ("u16", "mul.lo.u32 %a, %t, 2;"): (1, 1),
    ("u16", "mul.lo.u32 %a, %t, 256;"): (32, 1),
    # 8 bytes: half warps
    ("b64", "mul.lo.u32 %a, %t, 8;"): (2, 2),
    ("b64", "mul.lo.u32 %a, %t, 16;"): (4, 2),
    ("b64", "mul.lo.u32 %a, %t, 136;"): (2, 2),
    # 16 bytes: quarter warps
    ("v4", "mul.lo.u32 %a, %t, 16;"): (4, 4),
    ("v4", "mul.lo.u32 %a, %t, 128;"): (32, 4),
    ("v4", "mul.lo.u32 %a, %t, 144;"): (4, 4),
    ("v4", "mul.lo.u32 %a, %t, 32;"): (8, 4),
}


@pytest.mark.parametrize(("form", "offset"), BANKS)
def test_bank_conflicts(form: str, offset: str) -> None:
    done, ideal = BANKS[form, offset]
    load = {
        "u32": "ld.shared.u32 %r0, [%a];",
        "u8": "ld.shared.u8 %r0, [%a];",
        "u16": "ld.shared.u16 %r0, [%a];",
        "b64": "ld.shared.b64 %d0, [%a];",
        "v4": "ld.shared.v4.u32 {%r0, %r1, %r2, %r3}, [%a];",
    }[form]
    body = f"{offset} mov.u32 %b, wide; add.u32 %a, %a, %b; {load}"
    data, out = np.zeros(64, np.uint8), np.zeros(64, np.uint8)
    launch(kernel(body, outside=".shared .align 128 .b8 wide[16384];"), [data, out])
    (got,) = simulator.counters()
    assert (got.shared_wavefronts, got.shared_ideal_wavefronts) == (done, ideal)
    assert got.bank_conflicts == done - ideal
    assert [c.wavefronts for c in got.conflicts] == ([done] if done > ideal else [])
    assert all("ld.shared" in c.instruction for c in got.conflicts)


@pytest.mark.parametrize(
    ("stride", "done"), [(16, 4), (128, 32), (144, 4)], ids=["packed", "a row of banks", "padded"]
)
def test_bank_conflicts_of_ldmatrix(stride: int, done: int) -> None:
    """Four matrices of 8 rows of 16 bytes: 4 wavefronts where the rows of each miss one another."""
    body = f"""
      mov.u32 %a, wide; mad.lo.u32 %a, %t, {stride}, %a;
      ldmatrix.sync.aligned.m8n8.x4.shared.b16 {{%r0, %r1, %r2, %r3}}, [%a];"""
    data, out = np.zeros(64, np.uint8), np.zeros(64, np.uint8)
    launch(kernel(body, outside=".shared .align 128 .b8 wide[8192];"), [data, out])
    (got,) = simulator.counters()
    assert (got.shared_wavefronts, got.shared_ideal_wavefronts) == (done, 4)
    assert got.shared_load_bytes == 512


def test_bytes_of_shared_memory() -> None:
    body = """
      mov.u32 %a, tile; mad.lo.u32 %a, %t, 8, %a; setp.ne.u32 %p, %t, 3;
      st.shared.v2.u32 [%a], {%t, %t}; ld.shared.u16 %h0, [%a]; @%p ld.shared.u32 %r0, [%a];"""
    got = count(body)
    assert got.shared_store_bytes == 256
    assert got.shared_load_bytes == 64 + 4 * 31


def test_asynchronous_copy_counts_on_both_sides() -> None:
    body = """
      mov.u32 %a, tile; mad.lo.u32 %a, %t, 16, %a; mad.wide.u32 %x, %t, 16, %in;
      cp.async.cg.shared.global [%a], [%x], 16; cp.async.wait_all;
      setp.lt.u32 %p, %t, 4; selp.u32 %r0, 16, 0, %p;
      cp.async.cg.shared.global [%a], [%x], 16, %r0; cp.async.wait_all;"""
    got = count(body)
    # Bytes filled with zeros do not come from global memory.
    assert got.global_load_bytes == 512 + 64
    assert got.global_load_sectors == 16 + 2
    assert got.global_unique_load_bytes == 512
    assert got.shared_store_bytes == 1024


# ---- instructions


def test_instructions_by_class() -> None:
    body = """
      mov.u32 %r0, 0;
    LOOP:
      add.u32 %r0, %r0, 1;
      setp.lt.u32 %p, %r0, 10;
      @%p bra LOOP;
      bar.sync 0;
      setp.lt.u32 %q, %t, 8;
      @%q add.u32 %r0, %r0, 1;"""
    got = count(body, threads=64, grid=3)
    warps = 6
    assert got.by_class["integer"] == warps * 10 + 3  # the guarded one in warps with such a lane
    assert got.by_class["predicate"] == warps * 11
    assert got.by_class["branch"] >= warps * 10
    assert got.barriers == 3
    assert got.by_class["barrier"] == warps
    # Prologue: two ld.param and mov of %tid, with all lanes; one guarded add has 8 lanes.
    assert got.warp_instructions == sum(got.by_class.values())
    assert got.thread_instructions == 32 * (got.warp_instructions - 3) + 3 * 8


@pytest.mark.parametrize(
    ("shape", "d", "a", "b"),
    [("m16n8k8.row.col.f32.f16.f16.f32", 4, 2, 1), ("m16n8k16.row.col.f32.bf16.bf16.f32", 4, 4, 2)],
)
def test_tensor_flop(shape: str, d: int, a: int, b: int) -> None:
    registers = "".join(f"mov.b32 %r{i}, 0;" for i in range(a + b))
    floats = "".join(f"mov.f32 %f{i}, 0f00000000;" for i in range(d))
    operands = [("%f", 0, d), ("%r", 0, a), ("%r", a, a + b), ("%f", 0, d)]
    vectors = [f"{{{', '.join(f'{p}{i}' for i in range(i0, i1))}}}" for p, i0, i1 in operands]
    got = count(f"{registers}{floats} mma.sync.aligned.{shape} {', '.join(vectors)};", threads=96)
    k = int(shape.split(".")[0].split("k")[1])
    assert got.tensor_flop == 3 * 2 * 16 * 8 * k
    assert got.by_class["tensor"] == 3


def test_launches_are_listed_and_reset() -> None:
    data = np.zeros(4, np.uint32)
    ptx = kernel("st.global.u32 [%out], %t;")
    simulator.reset()
    for threads in (1, 1, 1):
        simulator.launch(ptx, "k", 1, threads, [data, data])
    assert [c.kernel for c in simulator.counters()] == ["k"] * 3
    simulator.reset()
    assert simulator.counters() == []
