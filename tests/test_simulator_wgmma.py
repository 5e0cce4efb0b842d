"""wgmma of the simulator against NumPy: shapes, types, layouts, signs, order."""

from __future__ import annotations

from dataclasses import replace
from fractions import Fraction

import numpy as np
import pytest
from simulator_fragments import PLACES, to_registers
from simulator_kernels import needs_simulator
from simulator_numeric import BF16, E4M3, E5M2, F16, TF32, Format
from simulator_wgmma import SHARED, START, SWIZZLES, WAIT, Case, Layout, kernel, place_d

from fused_peft import simulator

pytestmark = needs_simulator

FORMATS = {"f16": F16, "bf16": BF16, "tf32": TF32, "e4m3": E4M3, "e5m2": E5M2}


def layouts(case: Case) -> tuple[Layout, Layout]:
    a = Layout(START, case.swizzle_a, case.trans_a, 64)
    return a, Layout(START + 32 * 1024, case.swizzle_b, case.trans_b, case.n)


def image_of(case: Case, a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Shared memory from address 0 on."""
    image = np.full(START + SHARED, 0x3C, np.uint8)
    layout_a, layout_b = layouts(case)
    layout_a.store(image, a)
    layout_b.store(image, b)
    return image


def fragments_of(values: np.ndarray, d: str) -> np.ndarray:
    """[registers, 128 threads] of D's raw elements [64, n]."""
    n = values.shape[1]
    out = np.zeros((n // (4 if d == "f16" else 2), 128), np.uint32)
    for thread in range(128):
        for i in range(n // 2):
            value = int(values[place_d(thread, i)])
            if d == "f16":
                out[i // 2, thread] |= value << (16 * (i % 2))
            else:
                out[i, thread] = value
    return out


def raw_type(d: str) -> tuple[type, type]:
    return {
        "f32": (np.float32, np.uint32),
        "f16": (np.float16, np.uint16),
        "s32": (np.int32, np.uint32),
    }[d]


def launch(case: Case, a: np.ndarray, b: np.ndarray, c: np.ndarray, text: str = "") -> np.ndarray:
    """Fragments of D after the kernel (of the instruction alone unless given)."""
    layout_a, layout_b = layouts(case)
    image = image_of(case, a, b)[START:]
    real, raw = raw_type(case.d)
    d = fragments_of(c.astype(real).view(raw), case.d)
    fragments = np.zeros((4, 128), np.uint32)
    if case.registers:
        bits = 8 * case.element_bytes
        place, _ = (make(case.k) for make in PLACES[bits])
        for warp in range(4):
            rows = a[16 * warp : 16 * warp + 16]
            fragments[:, 32 * warp : 32 * warp + 32] = to_registers(rows, place, bits)
    arguments = [
        image,
        d,
        fragments,
        np.uint64(layout_a.descriptor),
        np.uint64(layout_b.descriptor),
        np.uint32(case.scale_d),
        np.uint32(SHARED),
    ]
    simulator.reset()
    text = text or kernel(case, case.instruction() + WAIT)
    simulator.launch(text, "k", 1, 128, arguments, SHARED)
    return d


def draw(
    name: str, shape: tuple[int, int], rng: np.random.Generator
) -> tuple[np.ndarray, np.ndarray]:
    """Raw elements, and their values: quarters below two (sums are exact), or any integers."""
    if name in ("s8", "u8"):
        raw = rng.integers(0, 256, shape).astype(np.uint8)
        return raw, raw.view(np.int8 if name == "s8" else np.uint8).astype(np.float64)
    format: Format = FORMATS[name]
    table = [format.round(Fraction(i, 4)) for i in range(8)]
    bits = np.array(table, np.uint64)[rng.integers(0, 8, shape)]
    bits |= rng.integers(0, 2, shape).astype(np.uint64) << np.uint64(format.width - 1)
    values = np.vectorize(lambda v: format.to_float(int(v)), otypes=[np.float64])(bits)
    if name == "tf32":  # the 13 low bits are not looked at
        bits = bits << np.uint64(13) | rng.integers(0, 2**13, shape).astype(np.uint64)
        return bits.astype(np.uint32), values
    return bits.astype(np.uint16 if format.width == 16 else np.uint8), values


def check(case: Case, seed: int = 0) -> None:
    rng = np.random.default_rng(seed)
    a, real_a = draw(case.a, (64, case.k), rng)
    b, real_b = draw(case.b, (case.n, case.k), rng)
    c = rng.integers(-64, 65, (64, case.n)) / (1 if case.d == "s32" else 4)
    got = launch(case, a, b, c)
    assert simulator.findings() == []
    expected = case.scale_a * case.scale_b * (real_a @ real_b.T) + (c if case.scale_d else 0)
    real, raw = raw_type(case.d)
    assert np.unique(expected).size > 20
    assert np.array_equal(got, fragments_of(expected.astype(real).view(raw), case.d))


TYPES = [
    *((t, t, d) for t, d in (("f16", "f32"), ("f16", "f16"), ("bf16", "f32"), ("tf32", "f32"))),
    *((a, b, d) for a in ("e4m3", "e5m2") for b in ("e4m3", "e5m2") for d in ("f16", "f32")),
    *((a, b, "s32") for a in ("s8", "u8") for b in ("s8", "u8")),
]


@pytest.mark.parametrize(("a", "b", "d"), TYPES)
@pytest.mark.parametrize("registers", [False, True])
def test_types(a: str, b: str, d: str, registers: bool) -> None:
    check(Case(n=32, a=a, b=b, d=d, registers=registers))


@pytest.mark.parametrize("n", range(8, 257, 8))
def test_widths(n: int) -> None:
    check(Case(n=n), seed=n)
    if n in (8, 24, 256):
        check(Case(n=n, d="f16", trans_b=True, registers=True), seed=n)


@pytest.mark.parametrize("trans_a", [False, True])
@pytest.mark.parametrize("trans_b", [False, True])
@pytest.mark.parametrize("swizzle", list(SWIZZLES))
def test_layouts(swizzle: int, trans_a: bool, trans_b: bool) -> None:
    others = list(SWIZZLES)
    other = others[(others.index(swizzle) + 1) % 4]
    for a, b in ((swizzle, swizzle), (swizzle, other)):
        check(Case(n=136, swizzle_a=a, swizzle_b=b, trans_a=trans_a, trans_b=trans_b))


@pytest.mark.parametrize("swizzle", [32, 64, 128])
@pytest.mark.parametrize("type_name", ["tf32", "s8"])
def test_layouts_of_other_widths(swizzle: int, type_name: str) -> None:
    d = "s32" if type_name == "s8" else "f32"
    check(Case(n=72, a=type_name, b=type_name, d=d, swizzle_a=swizzle, swizzle_b=swizzle))


@pytest.mark.parametrize("scale_a", [1, -1])
@pytest.mark.parametrize("scale_b", [1, -1])
@pytest.mark.parametrize("scale_d", [1, 0])
def test_scales(scale_a: int, scale_b: int, scale_d: int) -> None:
    check(Case(n=16, scale_a=scale_a, scale_b=scale_b, scale_d=scale_d))
    check(Case(n=16, d="f16", registers=True, scale_a=scale_a, scale_b=scale_b, scale_d=scale_d))
    if scale_a == scale_b == 1:
        check(Case(n=16, a="u8", b="s8", d="s32", scale_d=scale_d))


def test_satfinite() -> None:
    case = Case(n=16, a="u8", b="u8", d="s32", suffix=".satfinite")
    a, b = np.full((64, 32), 255, np.uint8), np.full((16, 32), 255, np.uint8)
    got = launch(case, a, b, np.full((64, 16), 2**31 - 1.0))
    assert np.all(got == 2**31 - 1)
    got = launch(replace(case, suffix=""), a, b, np.full((64, 16), 2**31 - 1.0))
    assert np.all(got == np.uint32(2**31 - 1 + 32 * 255**2))


# ---- along k: the descriptor advances inside the swizzled lines


@pytest.mark.parametrize("swizzle", [64, 128])
def test_descriptor_inside_a_line(swizzle: int) -> None:
    """Two steps of k of one K-major tile, 32 bytes apart, accumulate."""
    case = Case(n=24, swizzle_a=swizzle, swizzle_b=swizzle)
    rng = np.random.default_rng(2)
    steps = swizzle // 32
    a, real_a = draw("f16", (64, 16 * steps), rng)
    b, real_b = draw("f16", (24, 16 * steps), rng)
    c = rng.integers(-64, 65, (64, 24)) / 4.0
    advance = "add.u64 %desc_a, %desc_a, 2; add.u64 %desc_b, %desc_b, 2;"
    body = f"\n{advance}\n".join([case.instruction()] * steps) + WAIT
    got = launch(case, a, b, c, kernel(case, body))
    expected = (real_a @ real_b.T + c).astype(np.float32).view(np.uint32)
    assert np.array_equal(got, fragments_of(expected, "f32"))
    assert simulator.findings() == []


# ---- order


def operands(case: Case) -> tuple[np.ndarray, ...]:
    rng = np.random.default_rng(1)
    a, real_a = draw(case.a, (64, case.k), rng)
    b, real_b = draw(case.b, (case.n, case.k), rng)
    c = rng.integers(-64, 65, (64, case.n)) / 4.0
    return a, b, c, real_a @ real_b.T


@pytest.mark.parametrize("timing", ["early", "late", "random"])
def test_groups(timing: str) -> None:
    """Two groups in flight on the same D; the wait for all but one, then for all."""
    case = Case(n=16)
    a, b, c, product = operands(case)
    commit = "wgmma.commit_group.sync.aligned;"
    body = f"{case.instruction()} {commit} {case.instruction()} {case.instruction()} {commit}"
    body += "wgmma.wait_group.sync.aligned 1; wgmma.wait_group.sync.aligned 0;"
    for seed in range(4):
        with simulator.options(async_timing=timing, seed=seed):
            got = launch(case, a, b, c, kernel(case, body))
            assert simulator.findings() == []
        expected = (3 * product + c).astype(np.float32).view(np.uint32)
        assert np.array_equal(got, fragments_of(expected, "f32"))


def test_a_missing_wait_is_seen() -> None:
    """Before the wait D has its old value, and looking at it is a finding."""
    case = Case(n=16)
    a, b, c, product = operands(case)
    body = case.instruction() + "wgmma.commit_group.sync.aligned; wgmma.wait_group.sync.aligned 1;"
    with simulator.options(async_timing="late"):
        got = launch(case, a, b, c, kernel(case, body))
        assert {finding.kind for finding in simulator.findings()} == {"uninitialised"}
    assert np.array_equal(got, fragments_of(c.astype(np.float32).view(np.uint32), "f32"))
    with simulator.options(async_timing="early"):
        got = launch(case, a, b, c, kernel(case, body))
    expected = (product + c).astype(np.float32).view(np.uint32)
    assert np.array_equal(got, fragments_of(expected, "f32"))


def test_fence_waits_for_the_warpgroup_but_orders_nothing() -> None:
    """Without the barrier all four warps have stored before any multiplies, and it is a race."""
    case = Case(n=16)
    a, b, c, product = operands(case)
    text = kernel(case, case.instruction() + WAIT)
    assert text.count("bar.sync 0;") == 1
    expected = fragments_of((product + c).astype(np.float32).view(np.uint32), "f32")
    for seed in range(8):
        with simulator.options(seed=seed):
            got = launch(case, a, b, c, text.replace("bar.sync 0;", ""))
            assert {finding.kind for finding in simulator.findings()} == {"race"}
        assert np.array_equal(got, expected)


def test_a_missing_proxy_fence_is_seen() -> None:
    """Generic stores are not ordered before wgmma's reads by the barrier alone."""
    case = Case(n=16)
    a, b, c, _ = operands(case)
    text = kernel(case, case.instruction() + WAIT)
    launch(case, a, b, c, text.replace("fence.proxy.async;", ""))
    assert {finding.kind for finding in simulator.findings()} == {"missing proxy fence"}


def test_uninitialised_operands_taint_rows_and_columns() -> None:
    """A row of A and one of B that nobody wrote: a row and a column of D, and no more."""
    case = Case(n=16)
    layout_a, layout_b = layouts(case)
    a, b, c, _ = operands(case)
    real, raw = raw_type(case.d)
    text = kernel(case, case.instruction() + WAIT)
    # Threads skip the 16 bytes of row 37 of A and of row 5 of B, both of their chunks.
    holes = [layout_a.place(37, 0), layout_a.place(37, 1), layout_b.place(5, 1)]
    skips = "".join(f"setp.ne.and.u32 %more, %s, {hole}, %more;\n" for hole in holes)
    text = text.replace(
        "  st.shared.v4", f"  setp.eq.u32 %more, %s, %s;\n{skips}  @%more st.shared.v4"
    )
    stores = [line for line in text.splitlines() if "st.global" in line]
    tainted = set()
    for i, store in enumerate(stores):
        one = "\n".join(line for line in text.splitlines() if line not in stores or line == store)
        for thread in range(128):
            only = one.replace(store, f"setp.eq.u32 %more, %t, {thread};\n@%more {store}")
            if thread % 32 not in (0, 2, 21, 22):
                continue  # rows 0 and 5 of a warp's 16, and 8 and 13; columns 0, 1, 2, 4, 5
            d = fragments_of(c.astype(real).view(raw), case.d)
            arguments = [
                image_of(case, a, b)[START:],
                d,
                np.zeros((4, 128), np.uint32),
                np.uint64(layout_a.descriptor),
                np.uint64(layout_b.descriptor),
                np.uint32(1),
                np.uint32(SHARED),
            ]
            simulator.reset()
            simulator.launch(only, "k", 1, 128, arguments, SHARED)
            if simulator.findings():
                tainted.add((thread, i))
    expected = set()
    for thread in range(128):
        if thread % 32 in (0, 2, 21, 22):
            for i in range(8):
                row, column = place_d(thread, i)
                if row == 37 or column == 5:
                    expected.add((thread, i))
    assert tainted == expected
    assert expected


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        (("m64n64k16", "m64n64k32"), "types of this shape"),
        (("m64n64k16", "m64n60k16"), "shape"),
        ((", 1, 1, 0, 0;", ", 2, 1, 0, 0;"), "imm-scale-a"),
        ((".f32.f16.f16", ".f32.f16.bf16"), "types"),
        (("%d31}", "%d31, %d0}"), "registers"),
        (("wait_group.sync.aligned 0", "wait_group.sync.aligned 8"), "wait_group"),
    ],
)
def test_forms_that_do_not_exist(change: tuple[str, str], complaint: str) -> None:
    case = Case()
    text = kernel(case, case.instruction() + WAIT)
    assert change[0] in text
    module = simulator.load(text.replace(*change))
    with pytest.raises(simulator.SimulatorError, match=complaint):
        module.parameters("k")
