"""A cluster's CTA reads another one's shared memory: only while that CTA is there."""

from __future__ import annotations

import contextlib

import numpy as np
import pytest
from simulator_kernels import needs_simulator
from simulator_text import kernel, launch

from fused_peft import simulator

pytestmark = needs_simulator

BARRIER = "barrier.cluster.arrive.aligned; barrier.cluster.wait.aligned;"


def exchange(end: str) -> str:
    """Each of two CTAs stores its thread numbers and reads the other's."""
    return kernel(
        f"""
  mov.u32 %r11, data; mov.u32 %r9, %cluster_ctarank;
  shl.b32 %r8, %t, 2; add.u32 %r8, %r8, %r11;
  mad.lo.u32 %r1, %r9, 1000, %t;
  st.shared.u32 [%r8], %r1;
  {BARRIER}
  xor.b32 %r3, %r9, 1; mapa.shared::cluster.u32 %r5, %r8, %r3;
  ld.shared::cluster.u32 %r0, [%r5];
  {end}
  {{store}}""",
        "out",
        globals_=".shared .align 4 .b32 data[64];",
    )


@pytest.mark.parametrize("seed", range(6))
def test_a_barrier_behind_the_reads_is_enough(seed):
    out = np.zeros(128, np.uint32)
    assert launch(exchange(BARRIER), 2, 64, out, cluster=2, seed=seed) == []
    assert out.tolist() == [*range(1000, 1064), *range(64)]


def findings_of(text: str, **options: object) -> list[simulator.Finding]:
    """An access to memory that is gone fails the launch; its findings are kept."""
    with contextlib.suppress(simulator.SimulatorError):
        launch(text, 2, 64, np.zeros(128, np.uint32), cluster=2, **options)
    return simulator.findings()


@pytest.mark.parametrize("end", ["", "barrier.cluster.arrive.aligned;"], ids=["none", "arrive"])
@pytest.mark.parametrize("seed", range(6))
def test_exit_before_the_peer_has_read(seed, end):
    """A finding under every schedule, whichever of the two comes first."""
    findings = findings_of(exchange(end), seed=seed)
    assert findings
    for found in findings:
        assert found.kind in ("race", "out of bounds")
        assert "ld.shared::cluster" in found.instruction


def test_a_cta_that_ended_long_ago():
    body = f"""
  mov.u32 %r11, data; mov.u32 %r9, %cluster_ctarank;
  {BARRIER}
  setp.eq.u32 %p1, %r9, 1;
  @%p1 exit;
  mov.u32 %r4, 0;
L: nanosleep.u32 1000; add.u32 %r4, %r4, 1; setp.lt.u32 %p2, %r4, 2000; @%p2 bra L;
  mov.u32 %r3, 1; mapa.shared::cluster.u32 %r5, %r11, %r3;
  st.shared::cluster.u32 [%r5], %r4;"""
    text = kernel(body, "out", globals_=".shared .align 4 .b32 data[64];")
    (found,) = findings_of(text)
    assert found.kind == "out of bounds"
    assert "has ended" in found.text
