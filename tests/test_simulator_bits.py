"""Logic, shift and bit-field instructions of the simulator against Python's integers."""

from __future__ import annotations

import numpy as np
import pytest
from simulator_integers import COUNT, check, integers, read, signed, unsigned
from simulator_kernels import assert_same_bits, needs_simulator, run
from simulator_numeric import apply

pytestmark = needs_simulator


@pytest.mark.parametrize("width", [16, 32, 64])
def test_logic(width: int) -> None:
    for op, function in (("and", int.__and__), ("or", int.__or__), ("xor", int.__xor__)):
        check(f"{op}.b{width} {{d0}}, {{a0}}, {{a1}};", function, [width] * 2, width)
    check(f"not.b{width} {{d0}}, {{a0}};", int.__invert__, [width], width)
    check(f"cnot.b{width} {{d0}}, {{a0}};", lambda a: a == 0, [width], width, {0: 2})


@pytest.mark.parametrize("op", ["and", "or", "xor", "not"])
def test_logic_of_predicates(op: str) -> None:
    functions = {"and": int.__and__, "or": int.__or__, "xor": int.__xor__}
    second = "" if op == "not" else ", {p1}"
    check(
        f"{op}.pred {{q0}}, {{p0}}{second}; // {{a1}}",
        lambda a, b: 1 - (a & 1) if op == "not" else functions[op](a & 1, b & 1),
        [32, 32],
        32,
    )


@pytest.mark.parametrize("width", [16, 32, 64])
def test_shifts(width: int) -> None:
    amounts = {1: width + 3}
    bits = f"b{width}"
    check(
        f"shl.{bits} {{d0}}, {{a0}}, {{a1}};",
        lambda a, n: a << min(n, 64),
        [width, 32],
        width,
        amounts,
    )
    for type_name in (bits, f"u{width}", f"s{width}"):
        check(
            f"shr.{type_name} {{d0}}, {{a0}}, {{a1}};",
            lambda a, n, t=type_name: read(a, t) >> n,
            [width, 32],
            width,
            amounts,
        )


@pytest.mark.parametrize("mode", ["clamp", "wrap"])
@pytest.mark.parametrize("direction", ["l", "r"])
def test_funnel_shift(direction: str, mode: str) -> None:
    def expected(a: int, b: int, n: int) -> int:
        n = min(n, 32) if mode == "clamp" else n % 32
        return (b << 32 | a) << n >> 32 if direction == "l" else (b << 32 | a) >> n

    check(
        f"shf.{direction}.{mode}.b32 {{d0}}, {{a0}}, {{a1}}, {{a2}};",
        expected,
        [32] * 3,
        32,
        {2: 40},
    )


@pytest.mark.parametrize("type_name", ["u32", "s32", "u64", "s64"])
def test_bit_field_extract(type_name: str) -> None:
    width = int(type_name[1:])

    def expected(a: int, pos: int, length: int) -> int:
        pos, length = pos & 255, length & 255
        if length == 0:
            return 0
        sign = a >> min(pos + length - 1, width - 1) & 1 if type_name[0] == "s" else 0
        bits = [
            (a >> (pos + i) & 1) if i < length and pos + i < width else sign for i in range(width)
        ]
        return sum(bit << i for i, bit in enumerate(bits))

    check(
        f"bfe.{type_name} {{d0}}, {{a0}}, {{a1}}, {{a2}};",
        expected,
        [width, 32, 32],
        width,
        {1: width + 4, 2: width + 4},
    )


@pytest.mark.parametrize("width", [32, 64])
def test_bit_field_insert(width: int) -> None:
    def expected(a: int, b: int, pos: int, length: int) -> int:
        pos, length = pos & 255, length & 255
        for i in range(length):
            if pos + i < width:
                b = b & ~(1 << (pos + i)) | (a >> i & 1) << (pos + i)
        return b

    check(
        f"bfi.b{width} {{d0}}, {{a0}}, {{a1}}, {{a2}}, {{a3}};",
        expected,
        [width, width, 32, 32],
        width,
        {2: width + 4, 3: width + 4},
    )


@pytest.mark.parametrize("type_name", ["u32", "s32", "u64", "s64"])
def test_find_highest_bit(type_name: str) -> None:
    width = int(type_name[1:])

    def expected(a: int) -> int:
        value = read(a, type_name)
        return (~value if value < 0 else value).bit_length() - 1

    check(f"bfind.{type_name} {{d0}}, {{a0}};", expected, [width], 32)
    check(
        f"bfind.shiftamt.{type_name} {{d0}}, {{a0}};",
        lambda a: -1 if expected(a) < 0 else width - 1 - expected(a),
        [width],
        32,
    )


@pytest.mark.parametrize("width", [32, 64])
def test_counting_bits(width: int) -> None:
    check(f"popc.b{width} {{d0}}, {{a0}};", lambda a: bin(a).count("1"), [width], 32)
    check(f"clz.b{width} {{d0}}, {{a0}};", lambda a: width - a.bit_length(), [width], 32)
    check(
        f"brev.b{width} {{d0}}, {{a0}};", lambda a: int(f"{a:0{width}b}"[::-1], 2), [width], width
    )


def test_find_nth_set() -> None:
    def expected(mask: int, base: int, offset: int) -> int:
        offset = signed(offset, 32)
        if base > 31:
            return -1
        if offset == 0:
            return base if mask >> base & 1 else -1
        path = range(base, 32) if offset > 0 else range(base, -1, -1)
        found = [i for i in path if mask >> i & 1]
        return found[abs(offset) - 1] if abs(offset) <= len(found) else -1

    sources = [integers(32, COUNT, i) for i in range(3)]
    sources[1] %= 32
    sources[2] = (
        (np.random.default_rng(0).integers(-12, 12, COUNT)).astype(np.int32).view(np.uint32)
    )
    (got,) = run("fns.b32 {d0}, {a0}, {a1}, {a2};", sources, [np.uint32])
    want = apply(lambda *s: unsigned(expected(*s), 32), *sources, dtype=np.uint32)
    assert_same_bits(got, want, *sources)


@pytest.mark.parametrize("mode", ["clamp", "wrap"])
def test_masks_and_extension(mode: str) -> None:
    def mask(a: int, b: int) -> int:
        if mode == "wrap":
            a, b = a % 32, b % 32
        return sum(1 << i for i in range(a, min(a + b, 32))) if a < 32 else 0

    check(f"bmsk.{mode}.b32 {{d0}}, {{a0}}, {{a1}};", mask, [32, 32], 32, {0: 40, 1: 40})
    for type_name in ("u32", "s32"):

        def extended(a: int, b: int, sign: str = type_name[0]) -> int:
            width = min(b, 32) if mode == "clamp" else b % 32
            if width == 0:
                return 0
            return signed(a, width) if sign == "s" and width < 32 else a & (1 << width) - 1

        check(f"szext.{mode}.{type_name} {{d0}}, {{a0}}, {{a1}};", extended, [32, 32], 32, {1: 40})


@pytest.mark.parametrize(
    "table", [0x00, 0x01, 0x3C, 0x96, 0xCA, 0xE8, 0x80, 0xFE, 0xF8, 0x6A, 0xFF]
)
def test_lop3(table: int) -> None:
    def expected(a: int, b: int, c: int) -> int:
        return sum(
            (table >> ((a >> i & 1) * 4 + (b >> i & 1) * 2 + (c >> i & 1)) & 1) << i
            for i in range(32)
        )

    check(f"lop3.b32 {{d0}}, {{a0}}, {{a1}}, {{a2}}, {table};", expected, [32] * 3, 32)
    sources = [integers(32, COUNT, i, 4) for i in range(4)]
    for op, function in (("or", int.__or__), ("and", int.__and__)):
        got = run(
            f"lop3.{op}.b32 {{d0}}|{{q1}}, {{a0}}, {{a1}}, {{a2}}, {table}, {{p3}};",
            sources,
            [np.uint32, np.uint32],
        )
        values = apply(expected, *sources[:3], dtype=np.uint32)
        flags = apply(
            lambda v, p, f=function: f(v != 0, p % 2 == 1), values, sources[3], dtype=np.uint32
        )
        assert_same_bits(got[0], values, *sources)
        assert_same_bits(got[1], flags, *sources)


@pytest.mark.parametrize("mode", ["", ".f4e", ".b4e", ".rc8", ".ecl", ".ecr", ".rc16"])
def test_prmt(mode: str) -> None:
    def indices(c: int) -> list[int]:
        n = c & 3
        return {
            "": [c >> (4 * i) & 15 for i in range(4)],
            ".f4e": [n + i for i in range(4)],
            ".b4e": [(n - i) % 8 for i in range(4)],
            ".rc8": [n] * 4,
            ".ecl": [max(i, n) for i in range(4)],
            ".ecr": [min(i, n) for i in range(4)],
            ".rc16": [0, 1, 0, 1] if n % 2 == 0 else [2, 3, 2, 3],
        }[mode]

    def expected(a: int, b: int, c: int) -> int:
        result = 0
        for i, index in enumerate(indices(c)):
            byte = (b << 32 | a) >> (8 * (index & 7)) & 255
            result |= (0xFF * (byte >> 7) if index & 8 else byte) << (8 * i)
        return result

    check(f"prmt.b32{mode} {{d0}}, {{a0}}, {{a1}}, {{a2}};", expected, [32] * 3, 32)
