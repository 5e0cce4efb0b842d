"""Instructions that pass values between lanes, against the PTX ISA's definitions in NumPy."""

from __future__ import annotations

import numpy as np
import pytest
from simulator_kernels import needs_simulator
from simulator_text import kernel, launch, stored

from fused_peft import simulator

pytestmark = needs_simulator

LANES = np.arange(32)
FULL = 0xFFFFFFFF


def run(body: str, *columns: np.ndarray, warps: int = 1) -> np.ndarray:
    """%r0 of every thread, where %r1, %r2 ... hold the columns' elements."""
    loads = "".join(
        f"ld.param.u64 %addr, [in{i}]; mad.wide.u32 %addr, %t, 4, %addr;"
        f" ld.global.u32 %r{i + 1}, [%addr];\n"
        for i in range(len(columns))
    )
    params = " ".join(["out", *(f"in{i}" for i in range(len(columns)))])
    arrays = [np.ascontiguousarray(column, np.uint32) for column in columns]
    return stored(kernel(loads + body + "{store}", params), 32 * warps, *arrays)


def shuffle(mode: str, lane: int, b: int, c: int) -> tuple[int, bool]:
    """Source lane and range predicate of shfl.sync, as the ISA's pseudocode has them."""
    bval, cval, segment = b & 0x1F, c & 0x1F, c >> 8 & 0x1F
    max_lane = (lane & segment) | (cval & ~segment & 0x1F)
    min_lane = lane & segment
    source = {
        "up": lane - bval,
        "down": lane + bval,
        "bfly": lane ^ bval,
        "idx": min_lane | (bval & ~segment & 0x1F),
    }[mode]
    inside = source >= max_lane if mode == "up" else source <= max_lane
    return (source if inside else lane), inside


@pytest.mark.parametrize("mode", ["up", "down", "bfly", "idx"])
def test_shfl(mode: str):
    rng = np.random.default_rng(0)
    for width in (1, 2, 4, 8, 16, 32):
        clamp = 0 if mode == "up" else 31
        c = np.full(32, (32 - width) << 8 | clamp)
        for b in (rng.integers(0, 64, 32), np.full(32, rng.integers(32))):
            values = rng.integers(0, 2**32, 32)
            expected = [shuffle(mode, lane, int(b[lane]), int(c[lane])) for lane in LANES]
            got = run(f"shfl.sync.{mode}.b32 %r0, %r1, %r2, %r3, -1;", values, b, c)
            np.testing.assert_array_equal(got, values[[source for source, _ in expected]])
            got = run(
                f"shfl.sync.{mode}.b32 %r4|%p0, %r1, %r2, %r3, -1; selp.u32 %r0, 1, 0, %p0;",
                values,
                b,
                c,
            )
            np.testing.assert_array_equal(got, [inside for _, inside in expected])


def test_shfl_with_constants():
    values = LANES * 3 + 1
    got = run("shfl.sync.bfly.b32 %r0, %r1, 16, 31, 0xffffffff;", values)
    np.testing.assert_array_equal(got, values[LANES ^ 16])
    got = run("shfl.sync.idx.b32 %r0, %r1, 7, 0x181f, 0xffffffff;", values)  # width 8
    np.testing.assert_array_equal(got, values[(LANES & 24) | 7])


def test_lanes_with_different_masks_in_one_instruction():
    # Tiled partitions: each group of eight names itself, and all lanes are together.
    masks = (0xFF << (LANES // 8 * 8)).astype(np.uint32)
    values = np.random.default_rng(1).integers(0, 1000, 32)
    got = run("redux.sync.add.u32 %r0, %r1, %r2;", values, masks)
    np.testing.assert_array_equal(got, values.reshape(4, 8).sum(1).repeat(8))
    got = run(
        "and.b32 %r3, %r1, 1; setp.eq.u32 %p0, %r3, 1; vote.sync.ballot.b32 %r0, %p0, %r2;",
        values,
        masks,
    )
    ballot = int(np.dot(values % 2, 1 << LANES))
    np.testing.assert_array_equal(got, ballot & masks)


def test_vote():
    for votes in (0, FULL, 1, 0x80000000, 0x7FFFFFFF, 0xF0F0F0F0):
        votes_of = votes >> LANES & 1
        condition = "setp.ne.u32 %p0, %r1, 0;"
        for mode, expected in {
            "all": votes == FULL,
            "any": votes != 0,
            "uni": votes in (0, FULL),
        }.items():
            got = run(
                condition + f"vote.sync.{mode}.pred %p1, %p0, -1; selp.u32 %r0, 1, 0, %p1;",
                votes_of,
            )
            np.testing.assert_array_equal(got, np.full(32, expected), err_msg=f"{mode} {votes:x}")
        got = run(condition + "vote.sync.ballot.b32 %r0, %p0, -1;", votes_of)
        np.testing.assert_array_equal(got, np.full(32, votes))
        got = run(condition + "vote.sync.ballot.b32 %r0, !%p0, -1;", votes_of)
        np.testing.assert_array_equal(got, np.full(32, votes ^ FULL))


@pytest.mark.parametrize("bits", [32, 64])
def test_match(bits: int):
    rng = np.random.default_rng(2)
    values = rng.integers(0, 5, 32)
    wide = "mov.b64 %rd1, {%r1, %r1};" if bits == 64 else ""
    source = "%rd1" if bits == 64 else "%r1"
    got = run(wide + f"match.any.sync.b{bits} %r0, {source}, -1;", values)
    equal = values[:, None] == values[None, :]
    np.testing.assert_array_equal(got, (equal << LANES).sum(1))
    for column in (np.full(32, 9), values):
        got = run(
            wide + f"match.all.sync.b{bits} %r4|%p0, {source}, -1; selp.u32 %r0, %r4, 5, %p0;"
            " @!%p0 add.u32 %r0, %r0, %r4;",
            column,
        )
        np.testing.assert_array_equal(got, np.full(32, FULL if len(set(column)) == 1 else 5))


REDUX = {
    "add.u32": lambda v: v.sum(dtype=np.uint32),
    "add.s32": lambda v: v.sum(dtype=np.uint32),
    "min.u32": lambda v: v.min(),
    "max.u32": lambda v: v.max(),
    "min.s32": lambda v: v.view(np.int32).min().view(np.uint32),
    "max.s32": lambda v: v.view(np.int32).max().view(np.uint32),
    "and.b32": np.bitwise_and.reduce,
    "or.b32": np.bitwise_or.reduce,
    "xor.b32": np.bitwise_xor.reduce,
}


@pytest.mark.parametrize("form", REDUX)
def test_redux(form: str):
    rng = np.random.default_rng(3)
    values = rng.integers(0, 2**32, 32, np.uint32)
    values |= np.uint32(0x100)
    members = np.array([lane % 3 == 0 for lane in LANES])
    mask = int((members << LANES).sum())
    got = run(f"redux.sync.{form} %r0, %r1, -1;", values)
    np.testing.assert_array_equal(got, np.full(32, REDUX[form](values)))
    # Only the lanes of the mask take part; the others have taken another way.
    got = run(
        f"rem.u32 %r2, %l, 3; setp.ne.u32 %p0, %r2, 0; mov.u32 %r0, 0; @%p0 bra END;"
        f" redux.sync.{form} %r0, %r1, {mask}; END:",
        values,
    )
    np.testing.assert_array_equal(got, np.where(members, REDUX[form](values[members]), 0))


def test_elect_and_activemask():
    got = run("elect.sync %r1|%p0, -1; selp.u32 %r2, 100, 0, %p0; add.u32 %r0, %r1, %r2;")
    np.testing.assert_array_equal(got, np.where(LANES == 0, 100, 0))
    got = run(
        "setp.lt.u32 %p1, %l, 5; mov.u32 %r0, 0; @%p1 bra END;"
        " elect.sync %r1|%p0, 0xffffffe0; selp.u32 %r2, 100, 0, %p0; add.u32 %r0, %r1, %r2; END:"
    )
    np.testing.assert_array_equal(got, np.where(LANES < 5, 0, np.where(LANES == 5, 105, 5)))
    got = run(
        "and.b32 %r1, %l, 1; setp.eq.u32 %p0, %r1, 1; @%p0 bra ODD; activemask.b32 %r0; bra END;"
        " ODD: activemask.b32 %r0; END:"
    )
    np.testing.assert_array_equal(got, np.where(LANES % 2, 0xAAAAAAAA, 0x55555555))
    got = run("mov.u32 %r0, 3; setp.gt.u32 %p0, %l, 29; @%p0 activemask.b32 %r0;")
    np.testing.assert_array_equal(got, np.where(LANES > 29, 0xC0000000, 3))


@pytest.mark.parametrize("seed", range(3))
def test_lanes_that_arrive_late_are_waited_for(seed: int):
    # Every lane counts to a number of its own; those done first wait at the shuffle.
    ptx = kernel(
        """
  mov.u32 %r1, 0;
  xor.b32 %r2, %l, 21;
LOOP:
  add.u32 %r1, %r1, 1;
  setp.le.u32 %p0, %r1, %r2;
  @%p0 bra LOOP;
  shfl.sync.bfly.b32 %r0, %r1, 1, 31, -1;
{store}"""
    )
    np.testing.assert_array_equal(stored(ptx, 32, seed=seed), ((LANES ^ 1) ^ 21) + 1)


def test_lanes_ahead_of_a_branch_are_waited_for():
    # The code of the lanes that are behind lies at a higher address.
    ptx = kernel(
        """
  setp.lt.u32 %p0, %l, 16;
  mov.u32 %r1, %l;
  @%p0 bra FAR;
BACK:
  redux.sync.add.u32 %r0, %r1, -1;
  bra END;
FAR:
  add.u32 %r1, %r1, 100;
  bra BACK;
END:
{store}"""
    )
    np.testing.assert_array_equal(stored(ptx, 32), np.full(32, LANES.sum() + 1600))


def test_warp_barriers_at_different_places_meet():
    # Even lanes write, odd lanes read what they wrote; each side has its own bar.warp.sync.
    ptx = kernel(
        """
  .shared .align 4 .b32 data[32];
  mov.u32 %r1, data;
  mad.lo.u32 %r2, %l, 4, %r1;
  and.b32 %r3, %l, 1;
  setp.eq.u32 %p0, %r3, 1;
  mov.u32 %r0, 0;
  @%p0 bra ODD;
  st.shared.u32 [%r2], %l;
  bar.warp.sync 0xffffffff;
  bra END;
ODD:
  bar.warp.sync 0xffffffff;
  ld.shared.u32 %r0, [%r2+-4];
END:
{store}"""
    )
    np.testing.assert_array_equal(stored(ptx, 32), np.where(LANES % 2, LANES - 1, 0))


def test_exited_lanes_are_not_waited_for():
    got = run("setp.lt.u32 %p0, %l, 8; @%p0 exit; mov.u32 %r1, 1; redux.sync.add.u32 %r0, %r1, -1;")
    np.testing.assert_array_equal(got, np.where(LANES < 8, 0xDEADBEEF, 24))


def test_partial_warp():
    out = np.zeros(20, np.uint32)
    assert (
        launch(kernel("mov.u32 %r1, 1; redux.sync.add.u32 %r0, %r1, -1;{store}"), 1, 20, out) == []
    )
    np.testing.assert_array_equal(out, np.full(20, 20))


def test_missing_lanes_are_a_deadlock():
    ptx = kernel(
        """
  setp.lt.u32 %p0, %l, 4;
  @%p0 bra OTHER;
  shfl.sync.idx.b32 %r0, %t, 0, 31, -1;
  bra END;
OTHER:
  vote.sync.any.pred %p1, %p0, -1;
END:
"""
    )
    with pytest.raises(simulator.SimulatorError) as caught:
        launch(ptx, 1, 32, np.zeros(1, np.uint32))
    assert caught.value.code == 702
    text = str(caught.value)
    assert "lanes 4-31: shfl.sync" in text
    assert "(lanes 0-3 are elsewhere)" in text
    assert "lanes 0-3: vote.sync" in text
    assert "(lanes 4-31 are elsewhere)" in text


def test_a_lane_outside_its_mask_is_a_finding():
    [found] = launch(
        kernel("shfl.sync.idx.b32 %r0, %t, 0, 31, 0x7fffffff;"), 1, 32, np.zeros(1, np.uint32)
    )
    assert "lanes 31 are not in the membermask they name" in found.text


def test_uninitialised_values_pass_through_shuffles():
    # Lane 3's value was never computed: only the lane that reads it stores garbage.
    ptx = kernel(
        "setp.ne.u32 %p0, %l, 3; @%p0 mov.u32 %r1, 1;"
        " shfl.sync.down.b32 %r0, %r1, 1, 31, -1;{store}"
    )
    [found] = launch(ptx, 1, 32, np.zeros(32, np.uint32))
    assert found.kind == "uninitialised"
    assert found.thread == (2, 0, 0)
