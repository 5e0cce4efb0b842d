"""st.async and red.async of the simulator: into the other CTA of a cluster, by its mbarrier."""

from __future__ import annotations

import contextlib

import numpy as np
import pytest
from simulator_kernels import needs_simulator
from simulator_ptx import refused
from simulator_text import kernel, launch

from fused_peft import simulator

pytestmark = needs_simulator

SHARED = ".shared .align 8 .b64 bar; .shared .align 128 .b32 data[256];"
TIMINGS = ["early", "late", "random"]
STORE = "st.async.weak.shared::cluster.mbarrier::complete_tx::bytes"
REDUCE = "red.async.relaxed.cluster.shared::cluster.mbarrier::complete_tx::bytes"
SYNC = "barrier.cluster.arrive.aligned; barrier.cluster.wait.aligned;"
WAIT = """
W: mbarrier.try_wait.parity.acquire.cluster.shared.b64 %p9, [%r10], 0; @!%p9 bra W;
"""


def ptx(body: str, expected: int, init: str = "0") -> str:
    """%r5 and %r6 are the other CTA's data (at the thread's word) and mbarrier, which expects so
    many bytes."""
    return kernel(
        f"""
  setp.eq.u32 %p0, %t, 0;
  mov.u32 %r10, bar; mov.u32 %r11, data;
  mov.u32 %r9, %cluster_ctarank; xor.b32 %r4, %r9, 1;
  shl.b32 %r8, %t, 2; add.u32 %r8, %r8, %r11;
  st.shared.u32 [%r8], {init};
  @%p0 mbarrier.init.shared::cta.b64 [%r10], 1;
  @%p0 mbarrier.arrive.expect_tx.shared.b64 _, [%r10], {expected};
  {SYNC}
  mapa.shared::cluster.u32 %r5, %r8, %r4; mapa.shared::cluster.u32 %r6, %r10, %r4;
  {body}""",
        globals_=SHARED,
    )


def both(body: str, expected: int = 256, init: str = "0", **settings: object) -> np.ndarray:
    """What the two CTAs of 64 threads store, without findings."""
    out = np.zeros(128, np.uint32)
    text = ptx(f"{body} {WAIT} ld.shared.u32 %r0, [%r8]; {{store}} {SYNC}", expected, init)
    assert launch(text, 2, 64, out, cluster=2, **settings) == []
    return out.reshape(2, 64)


@pytest.mark.parametrize("timing", TIMINGS)
@pytest.mark.parametrize("seed", range(3))
def test_store(timing, seed):
    out = both(
        f"mad.lo.u32 %r1, %r9, 1000, %t; {STORE}.u32 [%r5], %r1, [%r6];",
        async_timing=timing,
        seed=seed,
    )
    assert out[0].tolist() == list(range(1000, 1064))
    assert out[1].tolist() == list(range(64))


@pytest.mark.parametrize(
    ("stride", "store"),
    [
        (2, f"{STORE}.v2.b32 [%r5], {{%r1, %r2}}, [%r6];"),
        (2, f"mov.b64 %rd1, {{%r1, %r2}}; {STORE}.b64 [%r5], %rd1, [%r6];"),
        (4, f"{STORE}.v4.u32 [%r5], {{%r1, %r2, %r3, %r7}}, [%r6];"),
        (
            4,
            f"mov.b64 %rd1, {{%r1, %r2}}; mov.b64 %rd2, {{%r3, %r7}};"
            f"{STORE}.v2.b64 [%r5], {{%rd1, %rd2}}, [%r6];",
        ),
    ],
)
def test_widths(stride, store):
    """Every ``stride``-th thread stores that many words."""
    values = "mul.lo.u32 %r1, %t, 3; add.u32 %r2, %r1, 3; add.u32 %r3, %r1, 6; add.u32 %r7, %r1, 9;"
    choose = f"rem.u32 %r12, %t, {stride}; setp.eq.u32 %p1, %r12, 0; @!%p1 bra DONE;"
    out = both(f"{values} {choose} {store} DONE:")
    assert out.tolist() == [[3 * t for t in range(64)]] * 2


def test_generic_addresses_and_offsets():
    out = both(
        """
  cvt.u64.u32 %rd1, %r5; cvta.shared::cluster.u64 %rd1, %rd1; sub.u64 %rd1, %rd1, 8;
  cvt.u64.u32 %rd2, %r6; cvta.shared::cluster.u64 %rd2, %rd2; add.u64 %rd2, %rd2, 16;
  st.async.mbarrier::complete_tx::bytes.u32 [%rd1+8], %t, [%rd2+-16];"""
    )
    assert out.tolist() == [list(range(64))] * 2


@pytest.mark.parametrize("timing", TIMINGS)
@pytest.mark.parametrize(
    ("operation", "old", "value", "expected"),
    [
        (".add.u32", 7, 5, 17),
        (".add.s32", 2**32 - 3, 2, 1),
        (".min.u32", 7, 2**31, 7),
        (".min.s32", 7, 2**31, 2**31),
        (".max.u32", 7, 2**31, 2**31),
        (".max.s32", 7, 2**31, 7),
        (".inc.u32", 4, 5, 0),
        (".dec.u32", 1, 5, 5),
        (".and.b32", 12, 10, 8),
        (".or.b32", 12, 10, 14),
        (".xor.b32", 12, 10, 12),
    ],
)
def test_reduction(operation, old, value, expected, timing):
    """Each word is reduced twice, by the thread and the one 32 further on."""
    body = f"""
  and.b32 %r1, %t, 31; shl.b32 %r1, %r1, 2; mapa.shared::cluster.u32 %r2, %r11, %r4;
  add.u32 %r2, %r2, %r1; mov.u32 %r3, {value};
  {REDUCE}{operation} [%r2], %r3, [%r6];"""
    out = both(body, init=str(old), async_timing=timing)
    assert out.tolist() == [[expected] * 32 + [old] * 32] * 2


def test_reduction_of_64_bits():
    body = f"""
  setp.lt.u32 %p1, %t, 32; @!%p1 bra DONE;
  shl.b32 %r1, %t, 3; mapa.shared::cluster.u32 %r2, %r11, %r4; add.u32 %r2, %r2, %r1;
  mov.u64 %rd1, 0x200000001; {REDUCE}.add.u64 [%r2], %rd1, [%r6];
DONE:"""
    assert both(body, init="0xffffffff").tolist() == [[0, 2] * 32] * 2


@pytest.mark.parametrize("instruction", [STORE, f"{REDUCE}.add"])
@pytest.mark.parametrize("seed", range(4))
def test_read_before_the_phase_is_complete(instruction, seed):
    body = f"{instruction}.u32 [%r5], %t, [%r6]; ld.shared.u32 %r0, [%r8]; {WAIT} {SYNC}"
    findings = launch(ptx(body, 256), 2, 64, np.zeros(128, np.uint32), cluster=2, seed=seed)
    assert {f.kind for f in findings} & {"race", "asynchronous copy not waited for"}


@pytest.mark.parametrize("timing", ["early", "late"])
def test_an_uninitialised_value_is_carried(timing):
    body = f"{STORE}.u32 [%r5], %r18, [%r6]; {WAIT} ld.shared.u32 %r0, [%r8]; {{store}} {SYNC}"
    findings = launch(
        ptx(body, 256), 2, 64, np.zeros(128, np.uint32), cluster=2, async_timing=timing
    )
    assert {f.kind for f in findings} == {"uninitialised"}
    assert findings[0].instruction.startswith("st.global")


@pytest.mark.parametrize(
    ("addresses", "words"),
    [
        ("[%r8], %t, [%r10]", "not in the thread's own"),
        ("[%r5], %t, [%r10]", "one CTA"),
        ("[%r5+2], %t, [%r6]", "multiple of 4"),
        ("[%r5], %t, [%r6+8]", "uninitialised shared memory"),
    ],
)
def test_misuse(addresses, words):
    simulator.reset()
    with contextlib.suppress(simulator.SimulatorError):
        launch(ptx(f"{STORE}.u32 {addresses}; {SYNC}", 0), 2, 64, np.zeros(128), cluster=2)
    assert any(words in f.text for f in simulator.findings()), simulator.findings()


@pytest.mark.parametrize(
    "instruction",
    [
        f"{STORE}.b16 [%r5], %h1, [%r6];",
        f"{STORE}.v4.b64 [%r5], {{%rd1, %rd2, %rd3, %rd4}}, [%r6];",
        f"{REDUCE}.min.u64 [%r5], %rd1, [%r6];",
        f"{REDUCE}.and.u32 [%r5], %r1, [%r6];",
        "red.async.release.gpu.global.add.u32 [%rd1], %r1;",
    ],
)
def test_what_the_isa_does_not_have(instruction):
    assert "async" in refused(ptx(f".reg .b16 %h1; {instruction}", 0))
