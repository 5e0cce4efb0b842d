"""CTA barriers: every form, and what synccheck says of wrong ones."""

from __future__ import annotations

import contextlib

import numpy as np
import pytest
from simulator_kernels import needs_simulator
from simulator_text import kernel, launch, stored

from fused_peft import simulator

pytestmark = needs_simulator


def test_lanes_exit_before_a_barrier():
    # Lanes 5 of every warp and all of warp 1 leave; the others still meet at the barrier.
    ptx = kernel(
        """
  .shared .align 4 .b32 total;
  setp.ne.u32 %p0, %t, 0;
  @%p0 bra START;
  st.shared.u32 [total], 0;
START:
  bar.sync 0;
  setp.eq.u32 %p1, %l, 5;
  setp.eq.u32 %p2, %w, 1;
  mov.u32 %r0, 7;
{store}
  @%p1 exit;
  @%p2 exit;
  red.shared.add.u32 [total], 1;
  bar.sync 0;
  ld.shared.u32 %r0, [total];
{store}"""
    )
    out = stored(ptx, 128)
    leaves = (np.arange(128) % 32 == 5) | (np.arange(128) // 32 == 1)
    np.testing.assert_array_equal(out, np.where(leaves, 7, (~leaves).sum()))


def test_named_barriers_between_producer_and_consumer():
    # Warp 0 writes, arrives at barrier 1 and goes on; warp 1 waits there; then back over barrier 2.
    ptx = kernel(
        """
  .shared .align 4 .b32 data[32];
  mov.u32 %r4, data;
  mad.lo.u32 %r4, %l, 4, %r4;
  mov.u32 %r3, 0;
  mov.u32 %r0, 0;
  setp.eq.u32 %p0, %w, 1;
LOOP:
  @%p0 bra CONSUMER;
  mad.lo.u32 %r1, %r3, 100, %l;
  st.shared.u32 [%r4], %r1;
  bar.arrive 1, 64;
  bar.sync 2, 64;
  bra NEXT;
CONSUMER:
  bar.sync 1, 64;
  xor.b32 %r5, %r4, 4;
  ld.shared.u32 %r1, [%r5];
  add.u32 %r0, %r0, %r1;
  bar.arrive 2, 64;
NEXT:
  add.u32 %r3, %r3, 1;
  setp.lt.u32 %p1, %r3, 5;
  @%p1 bra LOOP;
{store}"""
    )
    for seed in range(4):
        out = stored(ptx, 64, seed=seed)
        np.testing.assert_array_equal(out[:32], np.zeros(32))
        np.testing.assert_array_equal(out[32:], 5 * (np.arange(32) ^ 1) + 1000)


def test_barrier_reductions():
    ptx = kernel(
        """
  rem.u32 %r1, %t, 3;
  setp.eq.u32 %p0, %r1, 0;
  barrier.cta.red.popc.aligned.u32 %r0, 0, %p0;
  barrier.cta.red.and.aligned.pred %p1, 1, 96, %p0;
  barrier.cta.red.or.aligned.pred %p2, 1, 96, %p0;
  bar.red.and.pred %p3, 2, !%p4;
  selp.u32 %r2, 1000, 0, %p1;
  add.u32 %r0, %r0, %r2;
  selp.u32 %r2, 2000, 0, %p2;
  add.u32 %r0, %r0, %r2;
  selp.u32 %r2, 4000, 0, %p3;
  add.u32 %r0, %r0, %r2;
{store}""".replace("bar.red.and.pred %p3", "setp.ne.u32 %p4, %t, %t; bar.red.and.pred %p3")
    )
    np.testing.assert_array_equal(stored(ptx, 96), np.full(96, 32 + 2000 + 4000))


def test_barriers_that_are_not_aligned_gather_a_warps_lanes():
    # Both sides of a branch arrive at barrier 0 with instructions of their own.
    ptx = kernel(
        """
  .shared .align 4 .b32 data[64];
  mov.u32 %r1, data;
  mad.lo.u32 %r2, %t, 4, %r1;
  and.b32 %r3, %t, 1;
  setp.eq.u32 %p0, %r3, 0;
  st.shared.u32 [%r2], %t;
  @%p0 bra EVEN;
  barrier.sync 0;
  bra END;
EVEN:
  barrier.sync 0;
END:
  xor.b32 %r4, %t, 63;
  mad.lo.u32 %r2, %r4, 4, %r1;
  ld.shared.u32 %r0, [%r2];
{store}"""
    )
    np.testing.assert_array_equal(stored(ptx, 64), np.arange(64) ^ 63)


def test_divergent_aligned_barrier_is_a_finding():
    ptx = kernel(
        """
  setp.lt.u32 %p0, %l, 7;
  @%p0 bra FEW;
  bar.sync 0;
  bra END;
FEW:
  bar.sync 0;
END:
"""
    )
    found = launch(ptx, 1, 64, np.zeros(1, np.uint32))
    assert {f.kind for f in found} == {"divergent barrier"}
    assert sorted(f.thread[0] % 32 for f in found) == [0, 7]
    assert all("bar.sync" in f.instruction for f in found)


@pytest.mark.parametrize(
    ("barrier", "text"),
    [
        ("bar.sync 1, 48;", "a count of 48 threads"),
        ("bar.sync 1, 256;", "a count of 256 threads"),
        ("@%p0 bar.sync 1, 64; @!%p0 bar.sync 1, 128;", "others that have arrived expect"),
        ("bar.arrive 1, 128; bar.arrive 1, 128; bar.sync 2;", "a second time"),
    ],
)
def test_wrong_arrival_counts_are_findings(barrier: str, text: str):
    ptx = kernel(f"setp.lt.u32 %p0, %t, 64; {barrier}")
    simulator.reset()
    with contextlib.suppress(simulator.SimulatorError):  # some of them deadlock, by the schedule
        simulator.launch(ptx, "k", 1, 128, [np.zeros(1, np.uint32)])
    found = simulator.findings()
    assert found
    assert {f.kind for f in found} == {"barrier count"}
    assert any(text in f.text for f in found)


def test_deadlock_says_who_waits_for_what():
    ptx = kernel(
        """
  setp.eq.u32 %p0, %w, 0;
  @%p0 bra ONE;
  bar.sync 0;
  bra END;
ONE:
  barrier.sync 3, 64;
END:
"""
    )
    with pytest.raises(simulator.SimulatorError, match="deadlock in kernel k") as caught:
        launch(ptx, 2, 96, np.zeros(1, np.uint32))
    assert caught.value.code == 702
    text = str(caught.value)
    for cta in (0, 1):
        assert f"block ({cta}, 0, 0), warp 0, lanes 0-31: barrier.sync 3, 64 (" in text
        assert f"block ({cta}, 0, 0), warp 1-2, lanes 0-31: bar.sync 0 (" in text
    assert "barrier 3, where 32 of 64 threads have arrived (not: warp 1, 2)" in text
    assert "barrier 0, where 64 of 96 threads have arrived (not: warp 0)" in text
