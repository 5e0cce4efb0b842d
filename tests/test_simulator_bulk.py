"""cp.async.bulk of the simulator: both ways, multicast, between CTAs, reductions, order."""

from __future__ import annotations

import contextlib

import numpy as np
import pytest
from simulator_kernels import needs_simulator
from simulator_text import kernel, launch, stored

from fused_peft import simulator

pytestmark = needs_simulator

SHARED = ".shared .align 8 .b64 bar; .shared .align 128 .b32 data[256];"
TIMINGS = ["early", "late", "random"]


def ptx(body: str, params: str = "out source", **how: str) -> str:
    return kernel(
        f"""
  setp.eq.u32 %p0, %t, 0;
  mov.u32 %r10, bar; mov.u32 %r11, data;
  ld.param.u64 %rd1, [{params.split()[-1]}];
  ld.param.u64 %rd2, [out];
  mov.u32 %r9, %cluster_ctarank;
  shl.b32 %r8, %t, 2; add.u32 %r8, %r8, %r11;
  @%p0 mbarrier.init.shared::cta.b64 [%r10], 1;
  @%p0 fence.mbarrier_init.release.cluster;
  barrier.cluster.arrive.aligned; barrier.cluster.wait.aligned;
  {body}""",
        params,
        globals_=SHARED,
        **how,
    )


WAIT = """
W: mbarrier.try_wait.parity.shared.b64 %p9, [%r10], 0; @!%p9 bra W;
"""
LOAD = """
  @%p0 mbarrier.arrive.expect_tx.shared.b64 _, [%r10], 256;
  @%p0 cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes
       [%r11], [%rd1], 256, [%r10];
"""


@pytest.mark.parametrize("timing", TIMINGS)
def test_global_to_shared(timing):
    source = np.arange(100, 164, dtype=np.uint32)
    body = f"{LOAD} {WAIT} ld.shared.u32 %r0, [%r8]; {{store}}"
    assert np.array_equal(stored(ptx(body), 64, source, async_timing=timing), source)


@pytest.mark.parametrize("timing", TIMINGS)
@pytest.mark.parametrize("read", ["", ".read"])
def test_shared_to_global(timing, read):
    out = np.zeros(64, np.uint32)
    body = f"""
  st.shared.u32 [%r8], %t;
  fence.proxy.async.shared::cta;
  bar.sync 0;
  @%p0 cp.async.bulk.global.shared::cta.bulk_group [%rd2], [%r11], 256;
  @%p0 cp.async.bulk.commit_group;
  @%p0 cp.async.bulk.wait_group{read} 0;"""
    assert launch(ptx(body, "out"), 1, 64, out, async_timing=timing) == []
    assert out.tolist() == list(range(64))


def test_a_source_overwritten_before_the_group_is_done():
    """With late data the store sees the new values: what the missing wait_group allows."""
    out = np.zeros(64, np.uint32)
    body = """
  st.shared.u32 [%r8], %t;
  fence.proxy.async;
  bar.sync 0;
  @%p0 cp.async.bulk.global.shared::cta.bulk_group [%rd2], [%r11], 256;
  @%p0 cp.async.bulk.commit_group;
  bar.sync 0;
  st.shared.u32 [%r8], 77;
  fence.proxy.async;
  bar.sync 0;
  @%p0 cp.async.bulk.wait_group.read 0;"""
    launch(ptx(body, "out"), 1, 64, out, async_timing="late")
    assert out.tolist() == [77] * 64


@pytest.mark.parametrize(("half", "seen"), [("lt", [*range(64)]), ("ge", [*range(32), *[77] * 32])])
def test_groups_complete_in_order(half, seen):
    """wait_group 1 waits for the first of two groups, whose source may change then, and leaves the
    last one alone: with late data a change of its source is seen."""
    out = np.zeros(64, np.uint32)
    body = f"""
  st.shared.u32 [%r8], %t;
  fence.proxy.async;
  bar.sync 0;
  add.u64 %rd3, %rd2, 128; add.u32 %r12, %r11, 128;
  @%p0 cp.async.bulk.global.shared::cta.bulk_group [%rd2], [%r11], 128;
  @%p0 cp.async.bulk.commit_group;
  @%p0 cp.async.bulk.global.shared::cta.bulk_group [%rd3], [%r12], 128;
  @%p0 cp.async.bulk.commit_group;
  @%p0 cp.async.bulk.wait_group.read 1;
  bar.sync 0;
  setp.{half}.u32 %p1, %t, 32;
  @%p1 st.shared.u32 [%r8], 77;
  fence.proxy.async;
  bar.sync 0;
  @%p0 cp.async.bulk.wait_group 0;"""
    findings = launch(ptx(body, "out"), 1, 64, out, async_timing="late")
    assert out.tolist() == seen
    assert half == "ge" or findings == []


def test_groups_are_a_threads_own():
    """Another lane waits for its own groups, of which there are none: the copy is still to come."""
    out = np.zeros(64, np.uint32)
    body = """
  setp.eq.u32 %p1, %t, 1;
  st.shared.u32 [%r8], %t;
  fence.proxy.async;
  bar.sync 0;
  @%p0 cp.async.bulk.global.shared::cta.bulk_group [%rd2], [%r11], 256;
  @%p0 cp.async.bulk.commit_group;
  @%p1 cp.async.bulk.commit_group;
  @%p1 cp.async.bulk.wait_group 0;
  bar.sync 0;
  st.shared.u32 [%r8], 77;
  fence.proxy.async;
  bar.sync 0;
  @%p0 cp.async.bulk.wait_group 0;"""
    launch(ptx(body, "out"), 1, 64, out, async_timing="late")
    assert out.tolist() == [77] * 64


@pytest.mark.parametrize("timing", TIMINGS)
def test_multicast(timing):
    source = np.arange(7, 71, dtype=np.uint32)
    body = f"""
  @%p0 mbarrier.arrive.expect_tx.shared.b64 _, [%r10], 256;
  barrier.cluster.arrive.aligned; barrier.cluster.wait.aligned;
  setp.eq.and.u32 %p1, %r9, 1, %p0;
  .reg .b16 %mask; mov.u16 %mask, 3;
  @%p1 cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes.multicast::cluster
       [%r11], [%rd1], 256, [%r10], %mask;
  {WAIT} ld.shared.u32 %r0, [%r8]; {{store}}
  barrier.cluster.arrive.aligned; barrier.cluster.wait.aligned;"""
    out = np.zeros(128, np.uint32)
    assert launch(ptx(body), 2, 64, out, source, cluster=2, async_timing=timing) == []
    assert out.tolist() == [*source, *source]


@pytest.mark.parametrize("timing", TIMINGS)
@pytest.mark.parametrize("mask", [1, 2])
def test_multicast_to_one_of_two(timing, mask):
    """Rank 0 issues; the other one's data stay and its mbarrier hears nothing."""
    source = np.arange(7, 71, dtype=np.uint32)
    body = f"""
  st.shared.u32 [%r8], 5; fence.proxy.async;
  shr.u32 %r1, {mask}, %r9; and.b32 %r1, %r1, 1; setp.ne.u32 %p1, %r1, 0;
  and.pred %p2, %p1, %p0;
  @%p2 mbarrier.arrive.expect_tx.shared.b64 _, [%r10], 256;
  barrier.cluster.arrive.aligned; barrier.cluster.wait.aligned;
  setp.eq.and.u32 %p3, %r9, 0, %p0;
  .reg .b16 %mask; mov.u16 %mask, {mask};
  @%p3 cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes.multicast::cluster
       [%r11], [%rd1], 256, [%r10], %mask;
  @!%p1 bra DONE;
  {WAIT}
DONE:
  barrier.cluster.arrive.aligned; barrier.cluster.wait.aligned;
  ld.shared.u32 %r0, [%r8]; {{store}}"""
    out = np.zeros(128, np.uint32)
    assert launch(ptx(body), 2, 64, out, source, cluster=2, async_timing=timing) == []
    expected = [[5] * 64, [5] * 64]
    expected[mask - 1] = source.tolist()
    assert out.reshape(2, 64).tolist() == expected


@pytest.mark.parametrize("timing", TIMINGS)
def test_between_ctas(timing):
    body = f"""
  mad.lo.u32 %r1, %r9, 1000, %t;
  add.u32 %r2, %r8, 512; st.shared.u32 [%r2], %r1;
  @%p0 mbarrier.arrive.expect_tx.shared.b64 _, [%r10], 256;
  fence.proxy.async;
  barrier.cluster.arrive.aligned; barrier.cluster.wait.aligned;
  xor.b32 %r3, %r9, 1; add.u32 %r4, %r11, 512;
  mapa.shared::cluster.u32 %r5, %r11, %r3; mapa.shared::cluster.u32 %r6, %r10, %r3;
  @%p0 cp.async.bulk.shared::cluster.shared::cta.mbarrier::complete_tx::bytes
       [%r5], [%r4], 256, [%r6];
  {WAIT} ld.shared.u32 %r0, [%r8]; {{store}}
  barrier.cluster.arrive.aligned; barrier.cluster.wait.aligned;"""
    out = np.zeros(128, np.uint32)
    assert launch(ptx(body, "out"), 2, 64, out, cluster=2, async_timing=timing) == []
    assert out.tolist() == [*range(1000, 1064), *range(64)]


@pytest.mark.parametrize(
    ("operation", "function"),
    [(".add.u32", np.add), (".max.u32", np.maximum), (".xor.b32", np.bitwise_xor)],
)
def test_reduction(operation, function):
    out = np.arange(64, dtype=np.uint32)[::-1].copy()
    expected = function(out, np.arange(64, dtype=np.uint32))
    body = f"""
  st.shared.u32 [%r8], %t;
  fence.proxy.async;
  bar.sync 0;
  @%p0 cp.reduce.async.bulk.global.shared::cta.bulk_group{operation} [%rd2], [%r11], 256;
  @%p0 cp.async.bulk.commit_group;
  @%p0 cp.async.bulk.wait_group 0;"""
    assert launch(ptx(body, "out"), 1, 64, out) == []
    assert np.array_equal(out, expected)


def test_identical_lanes_issue_once():
    """All 32 lanes execute the reduction; the instruction is the warp's."""
    out = np.zeros(64, np.uint32)
    body = """
  st.shared.u32 [%r8], 1;
  fence.proxy.async;
  bar.sync 0;
  setp.lt.u32 %p1, %t, 32;
  @%p1 cp.reduce.async.bulk.global.shared::cta.bulk_group.add.u32 [%rd2], [%r11], 256;
  @%p1 cp.async.bulk.commit_group;
  @%p1 cp.async.bulk.wait_group 0;"""
    assert launch(ptx(body, "out"), 1, 64, out) == []
    assert out.tolist() == [1] * 64


def test_prefetch():
    body = "@%p0 cp.async.bulk.prefetch.L2.global [%rd1], 256; mov.u32 %r0, 1; {store}"
    assert stored(ptx(body), 32, np.zeros(64, np.uint32)).tolist() == [1] * 32


@pytest.mark.parametrize(
    ("old", "new", "kind"),
    [
        ("256, [%r10]", "250, [%r10]", "misaligned"),
        ("[%rd1], 256", "[%rd1+8], 256", "misaligned"),
        ("[%r11], [%rd1]", "[%r11+4], [%rd1]", "misaligned"),
        ("[%rd1], 256", "[%rd1+16], 256", "out of bounds"),
        ("[%r11], [%rd1]", "[%r11+65536], [%rd1]", "out of bounds"),
    ],
)
def test_faults(old, new, kind):
    body = LOAD.replace(old, new)
    source, out = np.zeros(64, np.uint32), np.zeros(64, np.uint32)
    with contextlib.suppress(simulator.SimulatorError):  # the launch fails; its findings are kept
        launch(ptx(body), 1, 64, out, source)
    assert kind in {f.kind for f in simulator.findings()}


@pytest.mark.parametrize("timing", TIMINGS)
def test_data_read_without_the_wait(timing):
    """Another warp reads the words that the copy brings."""
    body = f"""{LOAD}
  setp.ge.u32 %p1, %t, 32;
  @%p1 ld.shared.u32 %r0, [%r8];
  {WAIT}"""
    kinds = set()
    for seed in range(6):
        source = np.zeros(64, np.uint32)
        findings = launch(
            ptx(body), 1, 64, np.zeros(64, np.uint32), source, seed=seed, async_timing=timing
        )
        kinds |= {f.kind for f in findings}
    assert kinds & {"asynchronous copy not waited for", "race", "uninitialised"}
