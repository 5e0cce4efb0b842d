"""Integer arithmetic, comparisons and moves of the simulator against Python's integers."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
from simulator_integers import COUNT, STORAGE, check, integers, read, signed, unsigned
from simulator_kernels import assert_same_bits, needs_simulator, run
from simulator_numeric import apply

pytestmark = needs_simulator

ALL = ["u16", "s16", "u32", "s32", "u64", "s64"]


def truncated_quotient(a: int, b: int, width: int) -> int:
    if b == 0:
        return (1 << width) - 1
    magnitude = abs(a) // abs(b)
    return magnitude if (a < 0) == (b < 0) else -magnitude


def truncated_remainder(a: int, b: int) -> int:
    if b == 0:
        return a
    magnitude = abs(a) % abs(b)
    return -magnitude if a < 0 else magnitude


BINARY = {
    "add": lambda a, b, w: a + b,
    "sub": lambda a, b, w: a - b,
    "mul.lo": lambda a, b, w: a * b,
    "mul.hi": lambda a, b, w: (a * b) >> w,
    "div": truncated_quotient,
    "rem": lambda a, b, w: truncated_remainder(a, b),
    "min": lambda a, b, w: min(a, b),
    "max": lambda a, b, w: max(a, b),
}


@pytest.mark.parametrize("type_name", ALL)
@pytest.mark.parametrize("op", BINARY)
def test_binary(op: str, type_name: str) -> None:
    width = int(type_name[1:])
    check(
        f"{op}.{type_name} {{d0}}, {{a0}}, {{a1}};",
        lambda a, b: BINARY[op](read(a, type_name), read(b, type_name), width),
        [width, width],
        width,
        {1: 9} if op in ("div", "rem") else None,
    )


@pytest.mark.parametrize("type_name", ["s16", "s32", "s64"])
@pytest.mark.parametrize("op", ["abs", "neg"])
def test_unary(op: str, type_name: str) -> None:
    function = abs if op == "abs" else int.__neg__
    width = int(type_name[1:])
    check(
        f"{op}.{type_name} {{d0}}, {{a0}};", lambda a: function(read(a, type_name)), [width], width
    )


@pytest.mark.parametrize(
    ("part", "type_name"),
    [*((part, t) for part in ("lo", "hi") for t in ALL), *(("wide", t) for t in ALL[:4])],
)
def test_mad(part: str, type_name: str) -> None:
    width = int(type_name[1:])
    wide = 2 * width if part == "wide" else width
    shift = width if part == "hi" else 0
    wide_type = f"{type_name[0]}{wide}"
    check(
        f"mad.{part}.{type_name} {{d0}}, {{a0}}, {{a1}}, {{a2}};",
        lambda a, b, c: (read(a, type_name) * read(b, type_name) >> shift) + read(c, wide_type),
        [width, width, wide],
        wide,
    )
    if part == "wide":
        check(
            f"mul.wide.{type_name} {{d0}}, {{a0}}, {{a1}};",
            lambda a, b: read(a, type_name) * read(b, type_name),
            [width, width],
            wide,
        )


def clamp32(value: int) -> int:
    return max(-(2**31), min(2**31 - 1, value))


@pytest.mark.parametrize(
    ("instruction", "expected"),
    [
        ("add.sat.s32 {d0}, {a0}, {a1};", lambda a, b, c: clamp32(a + b)),
        ("sub.sat.s32 {d0}, {a0}, {a1};", lambda a, b, c: clamp32(a - b)),
        ("mad.hi.sat.s32 {d0}, {a0}, {a1}, {a2};", lambda a, b, c: clamp32((a * b >> 32) + c)),
        ("min.relu.s32 {d0}, {a0}, {a1};", lambda a, b, c: max(0, min(a, b))),
        ("max.relu.s32 {d0}, {a0}, {a1};", lambda a, b, c: max(0, a, b)),
        ("sad.s32 {d0}, {a0}, {a1}, {a2};", lambda a, b, c: abs(a - b) + c),
        ("mul24.lo.s32 {d0}, {a0}, {a1};", lambda a, b, c: signed(a, 24) * signed(b, 24)),
        ("mul24.hi.s32 {d0}, {a0}, {a1};", lambda a, b, c: signed(a, 24) * signed(b, 24) >> 16),
        (
            "mad24.lo.s32 {d0}, {a0}, {a1}, {a2};",
            lambda a, b, c: signed(a, 24) * signed(b, 24) + c,
        ),
        (
            "mad24.hi.sat.s32 {d0}, {a0}, {a1}, {a2};",
            lambda a, b, c: clamp32(signed(signed(a, 24) * signed(b, 24) >> 16, 32) + c),
        ),
        (
            "mad24.hi.u32 {d0}, {a0}, {a1}, {a2};",
            lambda a, b, c: (unsigned(a, 24) * unsigned(b, 24) >> 16) + c,
        ),
        ("slct.b32.s32 {d0}, {a0}, {a1}, {a2};", lambda a, b, c: a if c >= 0 else b),
    ],
)
def test_signed_words(instruction: str, expected: Callable[..., int]) -> None:
    check(instruction, lambda *s: expected(*(signed(v, 32) for v in (*s, 0, 0)[:3])), [32] * 3, 32)


@pytest.mark.parametrize("type_name", ["u16", "s16", "u32", "u64", "s64"])
def test_sad(type_name: str) -> None:
    width = int(type_name[1:])
    check(
        f"sad.{type_name} {{d0}}, {{a0}}, {{a1}}, {{a2}};",
        lambda a, b, c: abs(read(a, type_name) - read(b, type_name)) + c,
        [width] * 3,
        width,
    )


@pytest.mark.parametrize(
    ("op", "type_name"),
    [
        *((op, t) for op in ("add", "min", "max") for t in ("u16x2", "s16x2")),
        ("min.relu", "s16x2"),
        ("max.relu", "s16x2"),
    ],
)
def test_pairs(op: str, type_name: str) -> None:
    functions = {"add": int.__add__, "min": min, "max": max}

    def one(a: int, b: int) -> int:
        result = functions[op[:3]](read(a, type_name[:3]), read(b, type_name[:3]))
        return unsigned(max(0, result) if "relu" in op else result, 16)

    check(
        f"{op}.{type_name} {{d0}}, {{a0}}, {{a1}};",
        lambda a, b: one(a & 0xFFFF, b & 0xFFFF) | one(a >> 16, b >> 16) << 16,
        [32, 32],
        32,
    )


@pytest.mark.parametrize("a_type", ["u32", "s32"])
@pytest.mark.parametrize("b_type", ["u32", "s32"])
@pytest.mark.parametrize("op", ["dp4a", "dp2a.lo", "dp2a.hi"])
def test_dot_products(op: str, a_type: str, b_type: str) -> None:
    def field(word: int, i: int, width: int, type_name: str) -> int:
        return read(word >> (width * i), type_name[0] + str(width))

    def expected(a: int, b: int, c: int) -> int:
        if op == "dp4a":
            return c + sum(field(a, i, 8, a_type) * field(b, i, 8, b_type) for i in range(4))
        first = 2 if op.endswith("hi") else 0
        return c + sum(field(a, i, 16, a_type) * field(b, first + i, 8, b_type) for i in range(2))

    check(f"{op}.{a_type}.{b_type} {{d0}}, {{a0}}, {{a1}}, {{a2}};", expected, [32] * 3, 32)


VIDEO = {
    "vadd": lambda a, b: a + b,
    "vsub": lambda a, b: a - b,
    "vavrg": lambda a, b: (a + b + (a + b >= 0)) >> 1,
    "vabsdiff": lambda a, b: abs(a - b),
    "vmin": min,
    "vmax": max,
    "vset": lambda a, b: int(a < b),
}


@pytest.mark.parametrize("signs", ["uuu", "uus", "usu", "uss", "suu", "sus", "ssu", "sss"])
@pytest.mark.parametrize("parts", [2, 4])
@pytest.mark.parametrize("op", VIDEO)
def test_video(op: str, parts: int, signs: str) -> None:
    """Signs of the destination and the sources."""
    width = 32 // parts
    of_d, of_a, of_b = (f"{sign}{width}" for sign in signs)

    def results(a: int, b: int) -> list[int]:
        shifts = range(0, 32, width)
        return [VIDEO[op](read(a >> n, of_a), read(b >> n, of_b)) for n in shifts]

    def merged(values: list[int]) -> int:
        return sum(unsigned(value, width) << (width * i) for i, value in enumerate(values))

    def clamped(value: int) -> int:
        ends = (
            (unsigned(-1, width), 0)
            if of_d[0] == "u"
            else (2 ** (width - 1) - 1, -(2 ** (width - 1)))
        )
        return max(min(value, ends[0]), ends[1])

    dest, sources = f".{signs[0]}32", f".{signs[1]}32.{signs[2]}32"
    qualifiers = f"{sources}.lt" if op == "vset" else dest + sources
    operands = "{d0}, {a0}, {a1}, {a2};"
    name = f"{op}{parts}{qualifiers}"
    check(f"{name} {operands}", lambda a, b, c: merged(results(a, b)), [32] * 3, 32)
    check(f"{name}.add {operands}", lambda a, b, c: c + sum(results(a, b)), [32] * 3, 32)
    if op != "vset":
        check(
            f"{name}.sat {operands}",
            lambda a, b, c: merged([clamped(value) for value in results(a, b)]),
            [32] * 3,
            32,
        )


# ---- carries


@pytest.mark.parametrize("width", [32, 64])
def test_sum_of_two_registers_with_carry(width: int) -> None:
    low, high = 2 * width, (1 << width) - 1
    sources = [integers(width, COUNT, i) for i in range(6)]
    dtype = STORAGE[width // 8]
    for op, sign in (("add", 1), ("sub", -1)):
        got = run(
            f"{op}.cc.u{width} {{d0}}, {{a0}}, {{a1}}; {op}c.cc.u{width} {{d1}}, {{a2}}, {{a3}};"
            f" {op}c.u{width} {{d2}}, {{a4}}, {{a5}};",
            sources,
            [dtype] * 3,
        )
        for i, columns in enumerate(zip(*(s.tolist() for s in sources), strict=True)):
            a = columns[0] | columns[2] << width | columns[4] << low
            b = columns[1] | columns[3] << width | columns[5] << low
            total = (a + sign * b) % (1 << 3 * width)
            assert [int(g[i]) for g in got] == [total >> (width * j) & high for j in range(3)]


@pytest.mark.parametrize("type_name", ["u32", "s32", "u64", "s64"])
def test_product_of_two_registers_with_carry(type_name: str) -> None:
    """(a.wide * b) + c of twice the width: mad.lo.cc, then madc.hi."""
    width = int(type_name[1:])
    sources = [integers(width, COUNT, i) for i in range(4)]
    dtype = STORAGE[width // 8]
    got = run(
        f"mad.lo.cc.{type_name} {{d0}}, {{a0}}, {{a1}}, {{a2}};"
        f" madc.hi.{type_name} {{d1}}, {{a0}}, {{a1}}, {{a3}};",
        sources,
        [dtype] * 2,
    )
    for i, (a, b, c, d) in enumerate(zip(*(s.tolist() for s in sources), strict=True)):
        total = unsigned(read(a, type_name) * read(b, type_name) + c + (d << width), 2 * width)
        assert [int(g[i]) for g in got] == [total & (1 << width) - 1, total >> width]


# ---- moves


def test_mov_packs_and_unpacks() -> None:
    check("mov.b32 {d0}, {a0};", lambda a: a, [32], 32)
    check("mov.b64 {d0}, {{{a0}, {a1}}};", lambda a, b: a | b << 32, [32, 32], 64)
    check("mov.b32 {d0}, {{{a0}, {a1}}};", lambda a, b: a | b << 16, [16, 16], 32)
    check(
        "mov.b64 {d0}, {{{a0}, {a1}, {a2}, {a3}}};",
        lambda a, b, c, d: a | b << 16 | c << 32 | d << 48,
        [16] * 4,
        64,
    )
    check("mov.b64 {{{d0}, _}}, {a0};", lambda a: a, [64], 32)
    check("mov.b64 {{_, {d0}}}, {a0};", lambda a: a >> 32, [64], 32)
    check("mov.b32 {{_, {d0}}}, {a0};", lambda a: a >> 16, [32], 16)
    check("mov.b32 {d0}, -7;", lambda a: -7, [32], 32)
    check(
        ".reg .b128 %w; mov.b128 %w, {{{a0}, {a1}}}; mov.b128 {{_, {d0}}}, %w;",
        lambda a, b: b,
        [64, 64],
        64,
    )


@pytest.mark.parametrize("width", [16, 32, 64])
def test_selp(width: int) -> None:
    check(
        f"selp.b{width} {{d0}}, {{a0}}, {{a1}}, {{p2}};",
        lambda a, b, p: a if p % 2 else b,
        [width, width, 32],
        width,
    )


# ---- comparisons

COMPARISONS = {
    "eq": int.__eq__,
    "ne": int.__ne__,
    "lt": int.__lt__,
    "le": int.__le__,
    "gt": int.__gt__,
    "ge": int.__ge__,
    "lo": int.__lt__,
    "ls": int.__le__,
    "hi": int.__gt__,
    "hs": int.__ge__,
}


@pytest.mark.parametrize("type_name", [*ALL, "b16", "b32", "b64"])
def test_setp(type_name: str) -> None:
    width = int(type_name[1:])
    names = list(COMPARISONS)[: 2 if type_name[0] == "b" else 6 if type_name[0] == "s" else 10]
    sources = [integers(width, COUNT, i, 4) for i in range(2)] + [integers(32, COUNT, 2)]
    for name in names:
        truth = apply(
            lambda a, b, n=name: COMPARISONS[n](read(a, type_name), read(b, type_name)),
            *sources[:2],
            dtype=np.uint32,
        )
        (got,) = run(f"setp.{name}.{type_name} {{q0}}, {{a0}}, {{a1}};", sources[:2], [np.uint32])
        assert_same_bits(got, truth, *sources, instruction=name)
        other = sources[2] % 2
        for op, function in (
            ("and", np.bitwise_and),
            ("or", np.bitwise_or),
            ("xor", np.bitwise_xor),
        ):
            got = run(
                f"setp.{name}.{op}.{type_name} {{q0}}|{{q1}}, {{a0}}, {{a1}}, {{p2}};",
                sources,
                [np.uint32] * 2,
            )
            assert_same_bits(got[0], function(truth, other), *sources, instruction=op)
            assert_same_bits(got[1], function(1 - truth, other), *sources, instruction=op)


def test_setp_with_negated_predicate() -> None:
    check(
        "setp.lt.and.u32 {q0}, {a0}, {a1}, !{p2};",
        lambda a, b, p: a < b and p % 2 == 0,
        [32] * 3,
        32,
        {0: 9, 1: 9},
    )


def test_set() -> None:
    check(
        "set.lt.u32.s32 {d0}, {a0}, {a1};",
        lambda a, b: -(signed(a, 32) < signed(b, 32)),
        [32] * 2,
        32,
    )
    check(
        "set.ge.f32.u64 {d0}, {a0}, {a1};",
        lambda a, b: 0x3F800000 * (a >= b),
        [64] * 2,
        32,
        {0: 4, 1: 4},
    )
    check(
        "set.eq.or.s32.b16 {d0}, {a0}, {a1}, {p2};",
        lambda a, b, p: -(a == b or p % 2 == 1),
        [16, 16, 32],
        32,
        {0: 4, 1: 4},
    )
