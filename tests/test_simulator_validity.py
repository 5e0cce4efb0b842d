"""How far data that nobody initialised reaches through instructions that choose a source."""

from __future__ import annotations

import numpy as np
import pytest
from simulator_kernels import needs_simulator

from fused_peft import simulator

pytestmark = needs_simulator


def taints(instruction: str, result: str = "%r") -> bool:
    """Whether the result counts as uninitialised.

    ``%bad`` is an uninitialised word, ``%doubt`` a predicate computed from it (false), ``%zero``
    and ``%one`` are good words, ``%yes`` and ``%no`` good predicates.
    """
    ptx = f""".version 8.7
.target sm_90
.address_size 64
.visible .entry k(.param .u64 out)
{{
  .reg .b32 %bad, %zero, %one, %r, %s;
  .reg .b64 %p, %wide;
  .reg .pred %yes, %no, %doubt, %q, %q2;
  .shared .align 4 .b8 fresh[4];
  mov.b32 %zero, 0;
  mov.b32 %one, 1;
  mov.b32 %r, 0;
  setp.eq.u32 %yes, %zero, %zero;
  setp.ne.u32 %no, %zero, %zero;
  mov.pred %q, %no;
  ld.shared.b32 %bad, [fresh];
  setp.eq.u32 %doubt, %bad, 12345;
  ld.param.u64 %p, [out];
  {instruction}
  st.global.b32 [%p], {result};
  ret;
}}
"""
    simulator.reset()
    simulator.launch(ptx, "k", 1, 1, [np.zeros(1, np.uint32)])
    kinds = {finding.kind for finding in simulator.findings()}
    assert kinds <= {"uninitialised"}
    return bool(kinds)


AS_WORD = "selp.u32 %r, 1, 0, %q;"


@pytest.mark.parametrize(
    ("instruction", "tainted"),
    [
        ("add.u32 %r, %bad, %zero;", True),
        ("mul.lo.u32 %r, %bad, %zero;", True),
        ("mov.b64 %wide, {%one, %bad}; mov.b64 {%r, _}, %wide;", True),
        ("mov.b32 %r, %one;", False),
        # selp and slct: the source that is taken, and what it is taken by.
        ("selp.b32 %r, %one, %bad, %yes;", False),
        ("selp.b32 %r, %one, %bad, %no;", True),
        ("selp.b32 %r, %one, %zero, %doubt;", True),
        ("slct.b32.s32 %r, %one, %bad, %zero;", False),
        ("slct.b32.s32 %r, %bad, %one, %zero;", True),
        ("slct.b32.s32 %r, %one, %one, %bad;", True),
        # Predicates: a known operand may decide alone.
        (f"and.pred %q, %doubt, %no; {AS_WORD}", False),
        (f"and.pred %q, %no, %doubt; {AS_WORD}", False),
        (f"and.pred %q, %doubt, %yes; {AS_WORD}", True),
        (f"or.pred %q, %doubt, %yes; {AS_WORD}", False),
        (f"or.pred %q, %yes, %doubt; {AS_WORD}", False),
        (f"or.pred %q, %doubt, %no; {AS_WORD}", True),
        (f"xor.pred %q, %doubt, %yes; {AS_WORD}", True),
        (f"not.pred %q, %doubt; {AS_WORD}", True),
        (f"setp.eq.and.u32 %q, %zero, %one, %doubt; {AS_WORD}", False),
        (f"setp.eq.and.u32 %q, %bad, %one, %no; {AS_WORD}", False),
        (f"setp.eq.and.u32 %q, %zero, %zero, %doubt; {AS_WORD}", True),
        (f"setp.eq.or.u32 %q, %zero, %zero, %doubt; {AS_WORD}", False),
        # The second predicate is of the inverse comparison: unknown where the first is known.
        (f"setp.eq.and.u32 %q2|%q, %zero, %one, %doubt; {AS_WORD}", True),
        (f"setp.eq.and.u32 %q2|%q, %zero, %zero, %doubt; {AS_WORD}", False),
        (f"lop3.or.b32 %s|%q, %one, %zero, %zero, 0xfe, %doubt; {AS_WORD}", False),
        (f"lop3.and.b32 %s|%q, %one, %zero, %zero, 0xfe, %doubt; {AS_WORD}", True),
        ("lop3.or.b32 %r|%q, %bad, %zero, %zero, 0xfe, %yes;", True),
        ("set.eq.or.u32.u32 %r, %bad, %one, %yes;", False),
        ("set.eq.and.u32.u32 %r, %bad, %one, %yes;", True),
    ],
)
def test_choice(instruction: str, tainted: bool) -> None:
    assert taints(instruction) == tainted
