"""cp.async of the simulator: what is copied, when it lands, and what the waits wait for."""

from __future__ import annotations

import numpy as np
import pytest
from simulator_kernels import needs_simulator
from simulator_memory_kernels import LANES, aligned, kernel, launch

from fused_peft import simulator
from fused_peft.simulator._library import call

pytestmark = needs_simulator

rng = np.random.default_rng(2)
TIMINGS = ("early", "late", "random")

# %a: the lane's 16 bytes of shared memory. %x: its 16 bytes of the input.
PLACE = """
  mov.u32 %a, tile; mad.lo.u32 %a, %t, 16, %a;
  mad.wide.u32 %x, %t, 16, %in;
  mad.wide.u32 %y, %t, 16, %out;"""
WAIT = "cp.async.commit_group; cp.async.wait_group 0;"
STORE = "ld.shared.v4.u32 {%r4, %r5, %r6, %r7}, [%a]; st.global.v4.u32 [%y], {%r4, %r5, %r6, %r7};"


def arrays() -> tuple[np.ndarray, np.ndarray]:
    data = aligned(rng.integers(1, 256, (LANES, 16), np.uint8))
    return data, aligned(np.zeros((LANES, 16), np.uint8))


@pytest.mark.parametrize("timing", TIMINGS)
@pytest.mark.parametrize(
    ("form", "size"),
    [
        ("ca", 4),
        ("ca", 8),
        ("ca", 16),
        ("cg", 16),
        ("ca.shared::cta", 16),
        ("cg.L2::128B", 16),
    ],
)
def test_copy(form: str, size: int, timing: str) -> None:
    cache, _, rest = form.partition(".")
    shared = rest if rest.startswith("shared") else "shared"
    hint = "." + rest if rest.startswith("L2") else ""
    pieces = "".join(
        f"cp.async.{cache}.{shared}.global{hint} [%a+{i}], [%x+{i}], {size};\n"
        for i in range(0, 16, size)
    )
    data, out = arrays()
    with simulator.options(async_timing=timing):
        launch(kernel(PLACE + pieces + WAIT + STORE), [data, out])
    np.testing.assert_array_equal(out, data)


@pytest.mark.parametrize("timing", TIMINGS)
@pytest.mark.parametrize("size", [4, 8, 16])
def test_bytes_behind_the_source_size_are_zero(size: int, timing: str) -> None:
    """Lane i copies i bytes at most; nothing behind them is read."""
    fill = "".join(f"st.shared.u32 [%a+{i}], 0xffffffff;\n" for i in range(0, 16, 4))
    copy = f"cp.async.ca.shared.global [%a], [%x], {size}, %r0;"
    body = PLACE + fill + f"rem.u32 %r0, %t, {size + 1};" + copy + WAIT + STORE
    data, out = arrays()
    with simulator.options(async_timing=timing):
        launch(kernel(body), [data, out])
    expected = np.full((LANES, 16), 0xFF, np.uint8)
    for lane in range(LANES):
        expected[lane, :size] = 0
        filled = lane % (size + 1)
        expected[lane, :filled] = data[lane, :filled]
    np.testing.assert_array_equal(out, expected)


def test_no_byte_is_read_where_the_source_size_is_zero() -> None:
    """Lanes beyond the input's end ask for nothing: how kernels treat ragged edges."""
    body = f"""{PLACE}
      setp.lt.u32 %p, %t, 5; selp.u32 %r0, 16, 0, %p;
      cp.async.cg.shared.global [%a], [%x], 16, %r0;
      {WAIT} {STORE}"""
    data, out = arrays()
    launch(kernel(body), [data[:5], out])
    np.testing.assert_array_equal(out[:5], data[:5])
    assert not out[5:].any()


def test_ignored_source() -> None:
    body = f"""{PLACE}
      and.b32 %r0, %t, 1; setp.eq.u32 %p, %r0, 1;
      cp.async.cg.shared.global [%a], [%x], 16, %p;
      {WAIT} {STORE}"""
    data, out = arrays()
    launch(kernel(body), [data, out])
    np.testing.assert_array_equal(out[::2], data[::2])
    assert not out[1::2].any()


def test_cache_policy_operand() -> None:
    body = f"""{PLACE}
      createpolicy.fractional.L2::evict_last.b64 %d0, 1.0;
      mov.u32 %r0, 12;
      cp.async.cg.shared.global.L2::cache_hint [%a], [%x], 16, %r0, %d0;
      cp.async.ca.shared.global.L2::cache_hint [%a+12], [%x+12], 4, %d0;
      cp.async.wait_all; {STORE}"""
    # The second copy goes to bytes that the first one fills with zeros: that is a finding.
    data, out = arrays()
    simulator.reset()
    simulator.launch(kernel(body), "k", 1, LANES, [data, out])
    assert {f.kind for f in simulator.findings()} == {"asynchronous copy not waited for"}
    np.testing.assert_array_equal(out[:, :12], data[:, :12])


def test_data_lands_when_the_timing_says() -> None:
    """Seen without a wait and without the checks that forbid it."""
    body = f"""{PLACE}
      st.shared.u32 [%a], 7;
      cp.async.ca.shared.global [%a], [%x], 4;
      cp.async.commit_group;
      ld.shared.u32 %r0, [%a];
      st.global.u32 [%y], %r0;
      cp.async.wait_group 0;
      ld.shared.u32 %r1, [%a];
      st.global.u32 [%y+4], %r1;"""
    seen = set()
    for seed in range(20):
        for timing in TIMINGS:
            data, out = arrays()
            with simulator.options(seed=seed, async_timing=timing, checks=False):
                launch(kernel(body), [data, out])
            before, after = out.view(np.uint32)[:, 0], out.view(np.uint32)[:, 1]
            copied = data.view(np.uint32)[:, 0]
            np.testing.assert_array_equal(after, copied)
            if timing == "early":
                np.testing.assert_array_equal(before, copied)
            elif timing == "late":
                assert (before == 7).all()
            else:
                seen.add(bool((before == 7).all()))
    assert seen == {True, False}


@pytest.mark.parametrize("pending", range(5))
def test_wait_group_leaves_the_latest_groups_under_way(pending: int) -> None:
    """Four groups of 4 bytes; with late landing, exactly those waited for are there."""
    body = [PLACE, "st.shared.v4.u32 [%a], {%r8, %r8, %r8, %r8};"]
    body[1] = "mov.u32 %r8, 7; " + body[1]
    for group in range(4):
        body.append(f"cp.async.ca.shared.global [%a+{4 * group}], [%x+{4 * group}], 4;")
        body.append("cp.async.commit_group;")
    body += [f"cp.async.wait_group {pending};", STORE, "cp.async.wait_all;"]
    data, out = arrays()
    with simulator.options(async_timing="late", checks=False):
        launch(kernel("\n".join(body)), [data, out])
    there = max(4 - pending, 0)
    expected = np.full((LANES, 4), 7, np.uint32)
    expected[:, :there] = data.view(np.uint32)[:, :there]
    np.testing.assert_array_equal(out.view(np.uint32), expected)


def test_wait_group_does_not_wait_for_what_is_not_committed() -> None:
    body = f"""{PLACE}
      mov.u32 %r8, 7; st.shared.v4.u32 [%a], {{%r8, %r8, %r8, %r8}};
      cp.async.cg.shared.global [%a], [%x], 16;
      {{}}
      {STORE}
      cp.async.wait_all;"""
    for wait, there in [
        ("cp.async.wait_group 0;", False),
        ("cp.async.wait_all;", True),
        ("cp.async.commit_group; cp.async.wait_group 0;", True),
    ]:
        data, out = arrays()
        with simulator.options(async_timing="late", checks=False):
            launch(kernel(body.replace("{}", wait)), [data, out])
        expected = data.view(np.uint32) if there else np.full((LANES, 4), 7, np.uint32)
        np.testing.assert_array_equal(out.view(np.uint32), expected)


def test_groups_are_each_lane_s_own() -> None:
    """Odd lanes commit an empty group more, so wait_group 1 makes them wait for their copy."""
    body = f"""{PLACE}
      mov.u32 %r8, 7; st.shared.v4.u32 [%a], {{%r8, %r8, %r8, %r8}};
      and.b32 %r0, %t, 1; setp.eq.u32 %p, %r0, 1;
      cp.async.cg.shared.global [%a], [%x], 16;
      cp.async.commit_group;
      @%p cp.async.commit_group;
      cp.async.wait_group 1;
      {STORE}
      cp.async.wait_all;"""
    data, out = arrays()
    with simulator.options(async_timing="late", checks=False):
        launch(kernel(body), [data, out])
    np.testing.assert_array_equal(out[1::2], data[1::2])
    assert (out.view(np.uint32)[::2] == 7).all()


@pytest.mark.parametrize("timing", TIMINGS)
def test_uninitialised_source_stays_uninitialised(timing: str) -> None:
    """A copy carries the missing initialisation along; the store of it is the finding."""
    body = f"""{PLACE}
      cp.async.cg.shared.global [%a], [%x], 16;
      {WAIT} {STORE}"""
    fresh = aligned(np.zeros((LANES, 16), np.uint8))
    out = aligned(np.zeros((LANES, 16), np.uint8))
    call("register", fresh.ctypes.data, fresh.nbytes, 0, b"fresh")
    try:
        simulator.reset()
        with simulator.options(async_timing=timing):
            simulator.launch(kernel(body), "k", 1, LANES, [int(fresh.ctypes.data), out])
    finally:
        call("unregister", fresh.ctypes.data)
    (finding,) = simulator.findings()
    assert finding.kind == "uninitialised"
    assert finding.instruction.startswith("st.global")


@pytest.mark.parametrize("size", [1, 3, 32])
def test_sizes_that_do_not_exist_are_refused(size: int) -> None:
    body = PLACE + f"cp.async.ca.shared.global [%a], [%x], {size};"
    with pytest.raises(simulator.SimulatorError, match=r"4, 8 or 16"):
        launch(kernel(body), arrays())


def test_double_buffered_pipeline() -> None:
    """Three stages, a barrier a step: the pattern of every GEMM here, with other warps' data."""
    steps, threads = 9, 128
    stage = 16 * threads
    body = [
        "mov.u32 %a, tile; mad.lo.u32 %b, %t, 16, %a;",
        "xor.b32 %c, %t, 127; mad.lo.u32 %c, %c, 16, %a;",
        "mad.wide.u32 %x, %t, 16, %in; mov.u32 %r8, 0; mad.wide.u32 %y, %t, 4, %out;",
    ]

    def copy(step: int) -> str:
        if step >= steps:
            return "cp.async.commit_group;"
        place = step % 2 * stage
        source = f"[%x+{step * stage}]"
        return f"cp.async.cg.shared.global [%b+{place}], {source}, 16; cp.async.commit_group;"

    body.append(copy(0))
    for step in range(steps):
        body.append("bar.sync 0;" + copy(step + 1) + "cp.async.wait_group 1; bar.sync 0;")
        body.append(f"ld.shared.u32 %r0, [%c+{step % 2 * stage}]; add.u32 %r8, %r8, %r0;")
    body.append("st.global.u32 [%y], %r8;")
    data = aligned(rng.integers(0, 1000, (steps, threads, 4), np.uint32))
    for seed in range(4):
        for timing in TIMINGS:
            out = aligned(np.zeros(threads, np.uint32))
            with simulator.options(seed=seed, async_timing=timing):
                launch(kernel("\n".join(body)), [data, out], threads)
            np.testing.assert_array_equal(out, data[:, ::-1, 0].sum(0))
