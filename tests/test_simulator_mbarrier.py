"""mbarrier objects of the simulator: counts, phases, order, misuse (PTX ISA, mbarrier)."""

from __future__ import annotations

import numpy as np
import pytest
from simulator_kernels import needs_simulator
from simulator_text import kernel, launch, stored

from fused_peft import simulator

pytestmark = needs_simulator

SHARED = ".shared .align 8 .b64 bar[4]; .shared .align 16 .b32 data[1024];"


def ptx(body: str, params: str = "out", count: int | str = 1, **how: str) -> str:
    """A kernel whose thread 0 has made bar[0] with this count."""
    return kernel(
        f"""
  setp.eq.u32 %p0, %t, 0;
  mov.u32 %r10, bar;
  @%p0 mbarrier.init.shared.b64 [%r10], {count};
  bar.sync 0;
  {body}""",
        params,
        globals_=SHARED,
        **how,
    )


def wait(parity: int, name: str, address: str = "%r10", predicate: str = "%p9") -> str:
    return f"""
WAIT_{name}: mbarrier.try_wait.parity.shared.b64 {predicate}, [{address}], {parity};
  @!{predicate} bra WAIT_{name};"""


PRODUCE = "shl.b32 %r1, %t, 2; mov.u32 %r2, data; add.u32 %r1, %r1, %r2; st.shared.u32 [%r1], %t;"
READ_NEIGHBOUR = """
  xor.b32 %r3, %t, 33; shl.b32 %r3, %r3, 2; add.u32 %r3, %r3, %r2;
  ld.shared.u32 %r0, [%r3];
  {store}
"""


@pytest.mark.parametrize("seed", range(4))
def test_arrive_and_wait_order_memory(seed):
    body = f"""{PRODUCE}
  mbarrier.arrive.shared.b64 _, [%r10];
  {wait(0, "A")}
  {READ_NEIGHBOUR}"""
    out = stored(ptx(body, count=128), 128, seed=seed)
    assert out.tolist() == [t ^ 33 for t in range(128)]


def test_without_the_wait_it_is_a_race():
    body = f"{PRODUCE} mbarrier.arrive.shared.b64 _, [%r10]; {READ_NEIGHBOUR}"
    findings = launch(ptx(body, count=128), 1, 128, np.zeros(128, np.uint32))
    assert "race" in {f.kind for f in findings}


def test_relaxed_arrivals_order_nothing():
    body = f"""{PRODUCE}
  mbarrier.arrive.relaxed.cta.shared.b64 _, [%r10];
  {wait(0, "A")}
  {READ_NEIGHBOUR}"""
    findings = launch(ptx(body, count=128, target="sm_90"), 1, 128, np.zeros(128, np.uint32))
    assert "race" in {f.kind for f in findings}


def test_relaxed_waits_order_nothing():
    body = f"""{PRODUCE}
  mbarrier.arrive.shared.b64 _, [%r10];
  {wait(0, "A").replace(".parity", ".parity.relaxed.cta")}
  {READ_NEIGHBOUR}"""
    findings = launch(ptx(body, count=128, target="sm_90"), 1, 128, np.zeros(128, np.uint32))
    assert "race" in {f.kind for f in findings}


def test_a_ring_of_phases():
    """Warp 0 writes a word 20 times, warp 1 adds up what it reads: a full and an empty mbarrier."""
    body = """
  add.u32 %r11, %r10, 8; mov.u32 %r12, data; mov.u32 %r4, 0; mov.u32 %r5, 0;
  @%p0 mbarrier.init.shared.b64 [%r11], 32;
  bar.sync 0;
  setp.ge.u32 %p1, %t, 32;
  @%p1 bra CONSUME;
PRODUCE:
  and.b32 %r6, %r4, 1; xor.b32 %r6, %r6, 1;
W1: mbarrier.try_wait.parity.shared.b64 %p2, [%r11], %r6; @!%p2 bra W1;
  mul.lo.u32 %r7, %r4, %r4;
  @%p0 st.shared.u32 [%r12], %r7;
  mbarrier.arrive.shared.b64 _, [%r10];
  add.u32 %r4, %r4, 1; setp.lt.u32 %p3, %r4, 20; @%p3 bra PRODUCE;
  bra END;
CONSUME:
  and.b32 %r6, %r4, 1;
W2: mbarrier.try_wait.parity.shared.b64 %p2, [%r10], %r6; @!%p2 bra W2;
  ld.shared.u32 %r7, [%r12]; add.u32 %r5, %r5, %r7;
  mbarrier.arrive.shared.b64 _, [%r11];
  add.u32 %r4, %r4, 1; setp.lt.u32 %p3, %r4, 20; @%p3 bra CONSUME;
END:
  mov.u32 %r0, %r5;
  {store}"""
    for seed in range(3):
        out = stored(ptx(body, count=32), 64, seed=seed)
        assert out[32:].tolist() == [sum(i * i for i in range(20))] * 32


def test_states_and_pending_counts():
    body = """
  @!%p0 bra END;
  ld.param.u64 %addr, [out];
  mbarrier.arrive.shared.b64 %rd1, [%r10];
  mbarrier.pending_count.b64 %r1, %rd1; st.global.u32 [%addr], %r1;
  mbarrier.test_wait.shared.b64 %p1, [%r10], %rd1; selp.u32 %r1, 1, 0, %p1;
  st.global.u32 [%addr+4], %r1;
  mbarrier.arrive.noComplete.shared.b64 %rd2, [%r10], 2;
  mbarrier.pending_count.b64 %r1, %rd2; st.global.u32 [%addr+8], %r1;
  mbarrier.arrive.shared.b64 %rd3, [%r10], 2;
  mbarrier.test_wait.shared.b64 %p1, [%r10], %rd3; selp.u32 %r1, 1, 0, %p1;
  st.global.u32 [%addr+12], %r1;
  mbarrier.arrive_drop.shared.b64 %rd4, [%r10], 3;
  mbarrier.pending_count.b64 %r1, %rd4; st.global.u32 [%addr+16], %r1;
  mbarrier.arrive.shared.b64 %rd4, [%r10], 2;
  mbarrier.arrive.shared.b64 %rd4, [%r10];
  mbarrier.pending_count.b64 %r1, %rd4; st.global.u32 [%addr+20], %r1;
  mbarrier.inval.shared.b64 [%r10];
END:"""
    out = np.zeros(6, np.uint32)
    assert launch(ptx(body, count=5), 1, 32, out) == []
    # 5 wanted, 1 arrives, 2 more, 2 more complete it; a drop of 3 leaves 2 a phase.
    assert out.tolist() == [5, 0, 4, 1, 5, 2]


def test_transaction_counts():
    body = f"""
  @!%p0 bra OTHERS;
  mbarrier.expect_tx.relaxed.cta.shared.b64 [%r10], 48;
  mbarrier.arrive.expect_tx.shared.b64 _, [%r10], 16;
  mbarrier.test_wait.parity.shared.b64 %p1, [%r10], 0; selp.u32 %r4, 1, 0, %p1;
  mbarrier.complete_tx.relaxed.cta.shared.b64 [%r10], 60;
  mbarrier.test_wait.parity.shared.b64 %p1, [%r10], 0; selp.u32 %r5, 1, 0, %p1;
  mbarrier.complete_tx.relaxed.cta.shared.b64 [%r10], 4;
OTHERS:
  {wait(0, "A")}
  mad.lo.u32 %r0, %r4, 10, %r5; add.u32 %r0, %r0, 7;
  @!%p0 mov.u32 %r0, 7;
  {{store}}"""
    assert stored(ptx(body), 32).tolist() == [7] * 32


def test_cp_async_arrives():
    body = f"""
  ld.param.u64 %rd1, [source]; mad.wide.u32 %rd1, %t, 4, %rd1;
  shl.b32 %r1, %t, 2; mov.u32 %r2, data; add.u32 %r1, %r1, %r2;
  cp.async.ca.shared.global [%r1], [%rd1], 4;
  cp.async.mbarrier.arrive.noinc.shared.b64 [%r10];
  {wait(0, "A")}
  {READ_NEIGHBOUR}"""
    source = np.arange(500, 564, dtype=np.uint32)
    for timing in ("early", "late"):
        out = stored(ptx(body, "out source", count=64), 64, source, async_timing=timing)
        assert out.tolist() == [500 + (t ^ 33) for t in range(64)]


def test_without_noinc_the_count_is_not_used_up():
    body = f"""
  cp.async.mbarrier.arrive.shared.b64 [%r10];
  mbarrier.test_wait.parity.shared.b64 %p1, [%r10], 0; selp.u32 %r0, 1, 0, %p1;
  bar.sync 0;
  mbarrier.arrive.shared.b64 _, [%r10];
  {wait(0, "A")}
  {{store}}"""
    assert stored(ptx(body, count=32), 32).tolist() == [0] * 32


def test_arrival_at_another_cta():
    body = """
  mov.u32 %r9, data; @%p0 st.shared.u32 [%r9], 0;
  barrier.cluster.arrive.aligned; barrier.cluster.wait.aligned;
  mov.u32 %r3, %cluster_ctarank; xor.b32 %r4, %r3, 1;
  mapa.shared::cluster.u32 %r5, %r10, %r4;
  mapa.shared::cluster.u32 %r6, %r9, %r4;
  add.u32 %r7, %r3, 40;
  @%p0 st.shared::cluster.u32 [%r6], %r7;
  @%p0 mbarrier.arrive.release.cluster.shared::cluster.b64 _, [%r5];
W: mbarrier.try_wait.parity.acquire.cluster.shared.b64 %p1, [%r10], 0; @!%p1 bra W;
  ld.shared.u32 %r0, [%r9];
  barrier.cluster.arrive.aligned; barrier.cluster.wait.aligned;
  {store}"""
    text = ptx(body)
    out = np.zeros(64, np.uint32)
    assert launch(text, 2, 32, out, cluster=2) == []
    assert out.tolist() == [41] * 32 + [40] * 32


def test_generic_addresses():
    body = """
  mov.u64 %rd1, bar; cvta.shared.u64 %rd1, %rd1;
  mbarrier.arrive.b64 %rd2, [%rd1];
WAIT: mbarrier.test_wait.b64 %p1, [%rd1], %rd2; @!%p1 bra WAIT;
  mov.u32 %r0, 3;
  {store}"""
    assert stored(ptx(body, count=32), 32).tolist() == [3] * 32


@pytest.mark.parametrize(
    ("body", "kind", "words"),
    [
        ("@%p0 mbarrier.arrive.shared.b64 _, [%r10], 3;", "barrier count", "waits for 2"),
        ("@%p0 mbarrier.arrive.shared.b64 _, [%r10+8];", "uninitialised", ""),
        (
            "@%p0 st.shared.u64 [%r10+8], 0; @%p0 mbarrier.arrive.shared.b64 _, [%r10+8];",
            "uninitialised",
            "no mbarrier.init",
        ),
        (
            "@%p0 mbarrier.expect_tx.relaxed.cta.shared.b64 [%r10], 1048576;",
            "barrier count",
            "2^20",
        ),
        (
            "@%p0 mbarrier.arrive.noComplete.shared.b64 %rd1, [%r10], 2;",
            "barrier count",
            "noComplete",
        ),
        ("@%p0 mbarrier.init.shared.b64 [%r10], 0;", "barrier count", "count of 0"),
        (
            "@%p0 st.shared.u64 [%r10], 5; @%p0 mbarrier.arrive.shared.b64 _, [%r10];",
            "other",
            "overwritten",
        ),
    ],
)
def test_misuse(body, kind, words):
    findings = launch(ptx(body, count=2), 1, 32, np.zeros(32, np.uint32))
    assert any(words in f.text and (kind == f.kind or kind in f.text) for f in findings), findings


def test_a_misaligned_mbarrier():
    body = "@%p0 mbarrier.arrive.shared.b64 _, [%r10+4];"
    with pytest.raises(simulator.SimulatorError, match="misaligned"):
        launch(ptx(body), 1, 32, np.zeros(32, np.uint32))


def test_a_wait_that_never_ends():
    body = f"{wait(0, 'A')} mov.u32 %r0, 0; {{store}}"
    with pytest.raises(simulator.SimulatorError, match=r"hang|hung|deadlock|timed out|progress"):
        launch(ptx(body, count=2), 1, 32, np.zeros(32, np.uint32))


def test_initialisation_needs_a_barrier():
    """The second warp may arrive before the first has made the mbarrier."""
    text = ptx("@%p1 mbarrier.arrive.shared.b64 _, [%r10];", count=1).replace(
        "bar.sync 0;", "setp.eq.u32 %p1, %t, 32;", 1
    )
    found = set()
    for seed in range(6):
        found |= {f.kind for f in launch(text, 1, 64, np.zeros(64, np.uint32), seed=seed)}
    assert found & {"race", "uninitialised"}
