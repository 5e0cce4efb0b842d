"""The simulator's control flow: divergence, barriers, schedules, and what ends a kernel."""

from __future__ import annotations

import numpy as np
import pytest
from simulator_kernels import needs_simulator
from simulator_text import kernel, launch, stored

from fused_peft import simulator

pytestmark = needs_simulator


def collatz_steps(value: int) -> int:
    steps = 0
    while value > 1:
        value = 3 * value + 1 if value % 2 else value // 2
        steps += 1
    return steps


COLLATZ = """
  mov.u32 %r0, 0;
  add.u32 %r1, %t, 1;
LOOP:
  setp.le.u32 %p0, %r1, 1;
  @%p0 bra DONE;
  and.b32 %r2, %r1, 1;
  setp.eq.u32 %p1, %r2, 0;
  @%p1 bra EVEN;
  mad.lo.u32 %r1, %r1, 3, 1;
  bra NEXT;
EVEN:
  shr.u32 %r1, %r1, 1;
NEXT:
  add.u32 %r0, %r0, 1;
  bra LOOP;
DONE:
"""


def test_lanes_loop_and_branch_each_on_its_own():
    out = stored(kernel(COLLATZ + "{store}"), 96)
    np.testing.assert_array_equal(out, [collatz_steps(i + 1) for i in range(96)])


def test_lanes_come_together_behind_a_loop():
    # The lanes that are active just behind the loop, without any instruction that waits for them.
    out = stored(kernel(COLLATZ + "activemask.b32 %r0;{store}"), 32)
    np.testing.assert_array_equal(out, np.full(32, 0xFFFFFFFF))


def test_lanes_come_together_behind_branches_that_jump_over_one_another():
    # Lanes 8 to 31 reach END first; lanes 0 to 7 are still at FEW, in front of it.
    ptx = kernel(
        """
  setp.lt.u32 %p0, %l, 8;
  setp.lt.u32 %p1, %l, 16;
  mov.u32 %r1, 0;
  @%p0 bra FEW;
  @%p1 bra END;
  mov.u32 %r1, 1;
  bra END;
FEW:
  mov.u32 %r1, 2;
END:
  activemask.b32 %r0;
{store}"""
    )
    np.testing.assert_array_equal(stored(ptx, 32), np.full(32, 0xFFFFFFFF))


def test_a_loop_is_executed_by_all_lanes_that_are_in_it():
    # As many trips as the slowest lane needs, and not one for each lane.
    ptx = kernel(
        """
  mov.u32 %r0, 0;
LOOP:
  add.u32 %r0, %r0, 1;
  setp.lt.u32 %p0, %r0, %t;
  @%p0 bra LOOP;
{store}"""
    )
    stored(ptx, 32)
    trips = [max(1, i) for i in range(32)]
    [counts] = simulator.counters()
    # A branch that no lane takes does not count; the exit does.
    assert counts.by_class["branch"] == max(trips) - 1 + 1
    # Five moves, the loop, the store's four instructions and the exit.
    assert counts.warp_instructions == 5 + 1 + 3 * max(trips) - 1 + 4 + 1
    assert counts.thread_instructions == 32 * (5 + 1 + 4 + 1) + 3 * sum(trips) - 32


def test_indexed_branch():
    ptx = kernel(
        """
  rem.u32 %r1, %t, 3;
  TABLE: .branchtargets A, B, C;
  brx.idx %r1, TABLE;
A: mov.u32 %r0, 10; bra END;
B: mov.u32 %r0, 11; bra END;
C: mov.u32 %r0, 12;
END:
{store}"""
    )
    np.testing.assert_array_equal(stored(ptx, 64), 10 + np.arange(64) % 3)


SPIN_ON_FLAG = """
  ld.param.u64 %rd0, [flag];
  setp.ne.u32 %p0, %c, {waiter};
  @%p0 bra SIGNAL;
WAIT:
  ld.acquire.gpu.global.u32 %r0, [%rd0];
  setp.eq.u32 %p1, %r0, 0;
  @%p1 bra WAIT;
  bra END;
SIGNAL:
  setp.ne.u32 %p2, %t, 0;
  mov.u32 %r0, 0;
  @%p2 bra END;
  st.release.gpu.global.u32 [%rd0], 3;
END:
{{store}}"""


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("waiter", [0, 1])
def test_a_block_that_spins_waits_for_another(waiter: int, seed: int, threads: int):
    flag = np.zeros(1, np.uint32)
    ptx = kernel(SPIN_ON_FLAG.format(waiter=waiter), "out flag")
    out = stored(ptx, 64, flag, grid=2, seed=seed, threads=threads)
    np.testing.assert_array_equal(out.reshape(2, 64)[waiter], np.full(64, 3))


def test_a_block_spins_on_one_that_starts_much_later():
    # More blocks than are started at a time; the device has room for all of them.
    flag = np.zeros(1, np.uint32)
    ptx = kernel(
        """
  ld.param.u64 %rd0, [flag];
  setp.eq.u32 %p0, %c, 599;
  @%p0 bra SIGNAL;
WAIT:
  ld.acquire.gpu.global.u32 %r0, [%rd0];
  setp.eq.u32 %p1, %r0, 0;
  @%p1 bra WAIT;
  bra END;
SIGNAL:
  st.release.gpu.global.u32 [%rd0], 3;
  mov.u32 %r0, 3;
END:
{store}""",
        "out flag",
    )
    np.testing.assert_array_equal(stored(ptx, 32, flag, grid=600), np.full(600 * 32, 3))


@pytest.mark.parametrize("seed", range(3))
def test_a_lane_spins_on_a_lane_of_its_own_warp(seed: int):
    # A lock that every thread takes: the holder is ahead of the lanes that spin.
    lock, count = np.zeros(1, np.uint32), np.zeros(1, np.uint32)
    ptx = kernel(
        """
  ld.param.u64 %rd0, [lock];
  ld.param.u64 %rd1, [count];
WAIT:
  atom.acquire.gpu.global.cas.b32 %r1, [%rd0], 0, 1;
  setp.ne.u32 %p0, %r1, 0;
  @%p0 bra WAIT;
  ld.relaxed.gpu.global.u32 %r2, [%rd1];
  add.u32 %r2, %r2, 1;
  st.relaxed.gpu.global.u32 [%rd1], %r2;
  atom.release.gpu.global.exch.b32 %r3, [%rd0], 0;
""",
        "lock count",
    )
    assert launch(ptx, 2, 64, lock, count, seed=seed) == []
    assert count[0] == 128


@pytest.mark.parametrize("threads", [2, 3])
def test_worker_threads_give_the_same_results_and_counts(threads: int):
    # A histogram by atomics on global memory, from counts that each block gathers in shared memory.
    ptx = kernel(
        """
  .shared .align 4 .b32 bins[8];
  ld.param.u64 %rd0, [total];
  mov.u32 %r5, bins;
  setp.ge.u32 %p0, %t, 8;
  mad.lo.u32 %r6, %t, 4, %r5;
  @!%p0 st.shared.u32 [%r6], 0;
  bar.sync 0;
  mad.lo.u32 %r1, %c, 7, %t;
  rem.u32 %r1, %r1, 8;
  mad.lo.u32 %r1, %r1, 4, %r5;
  red.shared.add.u32 [%r1], 1;
  bar.sync 0;
  @%p0 exit;
  ld.shared.u32 %r2, [%r6];
  mul.wide.u32 %rd1, %t, 4;
  add.u64 %rd1, %rd0, %rd1;
  red.global.add.u32 [%rd1], %r2;
""",
        "total",
    )
    results = []
    for workers in (1, threads):
        total = np.zeros(8, np.uint32)
        assert launch(ptx, 1000, 96, total, threads=workers) == []
        [counts] = simulator.counters()
        results.append((total.tolist(), counts.warp_instructions, counts.barriers, counts.by_class))
    assert results[0] == results[1]
    assert results[0][0] == [12_000] * 8


def test_a_fault_ends_all_worker_threads():
    ptx = kernel("setp.ne.u32 %p0, %c, 70; @!%p0 trap; L: bra L;", "out")
    with pytest.raises(simulator.SimulatorError, match=r"block \(70, 0, 0\).*trap"):
        launch(ptx, 100, 32, np.zeros(1, np.uint32), threads=3)


def test_results_of_a_seed_repeat_and_seeds_differ():
    # The order in which warps of several blocks draw tickets.
    ptx = kernel(
        """
  ld.param.u64 %rd0, [ticket];
  setp.ne.u32 %p0, %l, 0;
  mov.u32 %r0, 0;
  @!%p0 atom.relaxed.gpu.global.add.u32 %r0, [%rd0], 1;
{store}""",
        "out ticket",
    )

    def order(seed: int) -> bytes:
        return stored(ptx, 128, np.zeros(1, np.uint32), grid=8, seed=seed).tobytes()

    orders = [order(seed) for seed in range(5)]
    assert orders == [order(seed) for seed in range(5)]
    assert len(set(orders)) > 1
    tickets = np.frombuffer(orders[0], np.uint32)[::32]
    assert sorted(tickets) == list(range(32))


def test_hang_is_told_from_work():
    wait = """
  ld.param.u64 %rd0, [out];
WAIT:
  atom.relaxed.gpu.global.exch.b32 %r0, [%rd0], 1;
  setp.ne.u32 %p0, %r0, 2;
  @%p0 bra WAIT;
"""
    with pytest.raises(simulator.SimulatorError, match="kernel k hangs") as caught:
        launch(kernel(wait), 1, 32, np.zeros(1, np.uint32), hang_budget=20_000)
    assert caught.value.code == 702
    assert "running" in str(caught.value)
    # As many instructions, each trip of which changes memory.
    work = """
  ld.param.u64 %rd0, [out];
WAIT:
  atom.relaxed.gpu.global.add.u32 %r0, [%rd0], 1;
  setp.lt.u32 %p0, %r0, 1000000;
  @%p0 bra WAIT;
"""
    launch(kernel(work), 1, 32, np.zeros(1, np.uint32), hang_budget=20_000)


def test_waiting_loops_that_sleep_are_a_hang_soon():
    # Long before the budget of instructions; a loop that ends by the clock is none.
    ptx = """
  ld.param.u64 %rd0, [out];
  mov.u64 %rd1, %globaltimer;
WAIT:
  ld.relaxed.gpu.global.u32 %r0, [%rd0];
  nanosleep.u32 100;
  mov.u64 %rd2, %globaltimer;
  sub.u64 %rd2, %rd2, %rd1;
  setp.gt.u64 %p0, %rd2, LIMIT;
  @%p0 bra DONE;
  setp.eq.u32 %p1, %r0, 0;
  @%p1 bra WAIT;
DONE:
"""
    launch(kernel(ptx.replace("LIMIT", "1000000")), 1, 64, np.zeros(1, np.uint32))
    [counts] = simulator.counters()
    assert 2 * 8 * 1000 < counts.warp_instructions < 200_000
    with pytest.raises(simulator.SimulatorError, match="kernel k hangs"):
        launch(kernel(ptx.replace("LIMIT", "1000000000000")), 1, 64, np.zeros(1, np.uint32))


def test_trap_and_what_ran_before():
    ptx = kernel(
        """
  mov.u32 %r0, 5;
{store}
  setp.eq.u32 %p0, %t, 9;
  @%p0 trap;
"""
    )
    out = np.zeros(32, np.uint32)
    with pytest.raises(simulator.SimulatorError, match=r"warp 0, lanes 9: .*trap") as caught:
        launch(ptx, 1, 32, out)
    assert caught.value.code == 719
    np.testing.assert_array_equal(out, np.full(32, 5))


def test_results_of_uninitialised_values_are_uninitialised():
    # Lane 4 of %r1 is never written; all arithmetic on it, and what it selects, is garbage.
    ptx = kernel(
        """
  setp.ne.u32 %p0, %l, 4;
  @%p0 mov.u32 %r1, 7;
  shl.b32 %r2, %r1, 2;
  setp.gt.u32 %p1, %r2, 3;
  selp.u32 %r0, 1, 2, %p1;
{store}"""
    )
    [found] = launch(ptx, 1, 32, np.zeros(32, np.uint32))
    assert found.kind == "uninitialised"
    assert "lanes 4:" in found.text


def test_a_register_that_is_written_again_is_initialised():
    stored(kernel("add.u32 %r0, %r1, 1; mov.u32 %r0, 3;{store}"), 32)


def test_branch_on_uninitialised_predicate_is_a_finding():
    ptx = kernel(
        "setp.eq.u32 %p0, %r5, 3; @%p0 bra END; add.u32 %r1, %t, 1; END: add.u32 %r1, %t, 1;"
    )
    [found] = launch(ptx, 1, 32, np.zeros(1, np.uint32))
    assert found.kind == "uninitialised"
    assert "bra" in found.instruction
