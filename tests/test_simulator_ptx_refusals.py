"""What PTX the simulator refuses, and with what words."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
from simulator_kernels import needs_simulator
from simulator_ptx import TWICE, accepted, refused, text

from fused_peft import simulator

pytestmark = needs_simulator


@pytest.fixture(autouse=True)
def fresh():
    simulator.reset()


# ---- refusals

REFUSALS = [
    ("add.s32 %r1, %r2;", r"'add\.s32 %r1, %r2'.*missing"),
    ("add.s32 %r1, %r2, %r3, %r4;", r"too many operands"),
    ("add.s32 %r1, %r2, %rd3;", r"'%rd3' is 64 bits wide"),
    ("add.s32 %p1, %r2, %r3;", r"'%p1' is a predicate"),
    ("add.s32 %r1, %r2, %x;", r"unknown register '%x'"),
    ("add.s32 %r1, %r2, nothing;", r"nothing"),
    ("add.s32.wonder %r1, %r2, %r3;", r"\.wonder"),
    ("wonder.s32 %r1, %r2;", r"instruction wonder"),
    ("add.f32 %f1, %f2, 1;", r"constant"),
    ("mov.b16 %h1, 1.0;", r"constant"),
    ("mov.u32 %r1, 1/0;", r"division by zero"),
    ("mov.u32 %r1, 99999999999999999999999;", r"64 bits"),
    ("mov.f32 %f1, 0f3F80;", r"8 hexadecimal digits"),
    ("mov.u32 %r1, 12x;", r"12x"),
    ("mov.u32 %r1, !%r2;", r"negated"),
    ("bra nowhere;", r"nowhere"),
    ("@%r1 bra nowhere;", r"guard '%r1'"),
    ("L: L: bra L;", r"'L' stands twice"),
    (".reg .b32 %r<3>;", r"'%r' is declared twice"),
    (".reg .b32 a, a;", r"'a' is declared twice"),
    (".reg .b32 a[3];", r"arrays"),
    (".reg .wonder a;", r"\.wonder"),
    (".shared .align 3 .b8 x[4];", r"power of two"),
    (".shared .b8 x[99999999999];", r"shared memory"),
    (".local .b8 x[4] = {1, 2};", r"initialiser"),
    ("ld.global.v2.u32 {%r1, %r2, %r3}, [%rd1];", r"ld\.global\.v2"),
    ("call missing;", r"no function 'missing'"),
    ("mov.u32 %r1, %r2", r"expected ';'"),
    ("mov.u32 %r1 %r2;", r"expected ';'"),
    ('.pragma "open;', r"string"),
    ("/* open", r"comment"),
    ("{", r"end of the text"),
]


@pytest.mark.parametrize(("body", "message"), REFUSALS, ids=[b for b, _ in REFUSALS])
def test_refusals_name_the_line_and_the_reason(body, message):
    ptx = text(f"\n//\n{body}\n")
    line = ptx[: ptx.index(body)].count("\n") + 1
    words = refused(ptx)
    assert re.search(message, words), words
    where = int(re.search(r"PTX line (\d+)", words)[1])
    # An error of the whole rest of the text (an open brace or comment) is found at its end.
    assert where == line or (where > line and body in ("{", "mov.u32 %r1, %r2")), words


def with_module(module: str) -> str:
    return text("st.global.u32 [%rd1], 1;", module=module)


@pytest.mark.parametrize(
    ("ptx", "message"),
    [
        ("", r"\.version"),
        (".version 9.0", r"\.target"),
        (".version 9.0\n.target wonder_1", r"\.target"),
        (".version 9.0\n.target sm_90\n.address_size 32", r"address_size"),
        (with_module(".global .u32 a[2] = {1, 2, 3};"), r"more values"),
        (with_module(".global .u32 a = nobody;"), r"nobody"),
        (with_module(".global .u32 a; .global .u32 a;"), r"'a' is defined twice"),
        (with_module(".global .f32 a = {1};").replace("{1}", "0x1"), r"wrong kind"),
        (with_module(".wonder"), r"\.wonder"),
        (with_module(".global .b8 a[99999999999];"), r"larger"),
        (with_module(".func f() { ret; } .func f() { ret; }"), r"'f' is defined twice"),
        (text("", behind=".section .debug_str { .b8 1"), r"brace"),
        (with_module("\x01"), r"directive"),
    ],
)
def test_module_refusals(ptx, message):
    words = refused(ptx)
    assert re.search(message, words), words


@pytest.mark.parametrize(
    ("module", "body", "message"),
    [
        (".func f() { call f; ret; }", "call f;", r"recursion"),
        (".func g(); .func f() { call g; } .func g() { call f; }", "call f;", r"recursion"),
        (".extern .func f();", "call f;", r"'f' is not defined"),
        (TWICE, "call twice;", r"returns 1 and takes 1"),
        (TWICE, "{ .param .b8 a; call (%r1), twice, (a); }", r"1 bytes"),
        (".extern .global .b32 g;", "ld.global.u32 %r1, [g];", r"'g' is not defined"),
        ("", "mov.u64 %rd2, 0; P: .callprototype _ (); call %rd2, (), P;", r"pointer|operands"),
    ],
)
def test_calls_that_cannot_be_inlined(module, body, message):
    words = refused(text(body, module=module))
    assert re.search(message, words), words


def test_an_error_in_one_kernel_leaves_the_others():
    ptx = text("st.global.u32 [%rd1], 5;") + ".entry bad() { wonder.s32; }"
    module = simulator.load(ptx)
    assert module.kernels == ["k", "bad"]
    with pytest.raises(simulator.SimulatorError, match="wonder"):
        module.parameters("bad")
    out = np.zeros(1, np.uint32)
    module.launch("k", 1, 1, [out])
    assert out[0] == 5


@pytest.mark.skipif(shutil.which("ptxas") is None, reason="ptxas is not installed")
def test_ptxas_takes_the_same_texts(tmp_path: Path):
    """Runs last: the texts that the tests before have run are PTX to NVIDIA's assembler too."""
    source = tmp_path / "k.ptx"
    failures = []
    for ptx in accepted:
        source.write_text(ptx)
        result = subprocess.run(
            ["ptxas", "-arch=sm_90a", source, "-o", tmp_path / "k.cubin"],
            capture_output=True,
            text=True,
        )
        if result.returncode:
            failures.append(ptx + result.stderr)
    assert not failures, "\n".join(failures)
