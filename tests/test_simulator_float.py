"""Floating-point arithmetic of the simulator, bit by bit, against exact rational arithmetic."""

from __future__ import annotations

import math
from collections.abc import Callable
from fractions import Fraction

import numpy as np
import pytest
from simulator_kernels import assert_same_bits, needs_simulator, run
from simulator_numeric import (
    BF16,
    DIRECTED,
    DOWN,
    F16,
    F32,
    F64,
    NEAREST,
    STORAGE,
    Format,
    apply,
    flush,
    is_negative_zero_sum,
    operand_sets,
)

pytestmark = needs_simulator

COUNT = 1536


def signs_differ(format: Format, *bits: int) -> bool:
    return bool(sum(bool(b & format.sign) for b in bits) % 2)


def infinity(format: Format, negative: bool) -> int:
    assert format.infinity is not None
    return format.infinity | (format.sign if negative else 0)


def add(format: Format, a: int, b: int, mode: str) -> int:
    if format.is_nan(a) or format.is_nan(b):
        return format.nan
    if format.is_infinite(a) or format.is_infinite(b):
        if format.is_infinite(a) and format.is_infinite(b) and a != b:
            return format.nan
        return a if format.is_infinite(a) else b
    return format.round(
        format.value(a) + format.value(b),
        mode,
        negative_zero=is_negative_zero_sum(a, b, mode, format),
    )


def subtract(format: Format, a: int, b: int, mode: str) -> int:
    return add(format, a, b if format.is_nan(b) else b ^ format.sign, mode)


def multiply(format: Format, a: int, b: int, mode: str) -> int:
    negative = signs_differ(format, a, b)
    if format.is_nan(a) or format.is_nan(b):
        return format.nan
    if format.is_infinite(a) or format.is_infinite(b):
        other = b if format.is_infinite(a) else a
        is_zero = other & (format.sign - 1) == 0
        return format.nan if is_zero else infinity(format, negative)
    return format.round(format.value(a) * format.value(b), mode, negative_zero=negative)


def fused(format: Format, a: int, b: int, c: int, mode: str) -> int:
    if any(format.is_nan(x) for x in (a, b, c)):
        return format.nan
    negative = signs_differ(format, a, b)
    if format.is_infinite(a) or format.is_infinite(b):
        product = multiply(format, a, b, mode)
        opposite = format.is_infinite(c) and c != product
        return format.nan if format.is_nan(product) or opposite else product
    if format.is_infinite(c):
        return c
    exact = format.value(a) * format.value(b) + format.value(c)
    product_sign = format.sign if negative else 0
    return format.round(
        exact, mode, negative_zero=is_negative_zero_sum(product_sign, c, mode, format)
    )


def divide(format: Format, a: int, b: int, mode: str) -> int:
    negative = signs_differ(format, a, b)
    a_zero, b_zero = (x & (format.sign - 1) == 0 for x in (a, b))
    if format.is_nan(a) or format.is_nan(b) or (a_zero and b_zero):
        return format.nan
    if format.is_infinite(a):
        return format.nan if format.is_infinite(b) else infinity(format, negative)
    if format.is_infinite(b):
        return format.sign if negative else 0
    if b_zero:
        return infinity(format, negative)
    return format.round(format.value(a) / format.value(b), mode, negative_zero=negative)


def square_root(format: Format, a: int, mode: str) -> int:
    if a & (format.sign - 1) == 0:
        return a
    if format.is_nan(a) or a & format.sign:
        return format.nan
    if format.is_infinite(a):
        return a
    value = format.value(a)
    # 200 more bits than the format has, the last one sticky.
    scaled = value * Fraction(4) ** 800
    root = math.isqrt(scaled.numerator // scaled.denominator)
    exact = root * root == scaled
    return format.round((2 * Fraction(root) + (0 if exact else 1)) / 2**801, mode)


def saturated(format: Format, bits: int) -> int:
    if format.is_nan(bits) or bits & format.sign or bits == 0:
        return 0
    one = format.round(Fraction(1))
    return min(bits, one)


OPERATIONS: dict[str, tuple[Callable[..., int], int]] = {
    "add": (add, 2),
    "sub": (subtract, 2),
    "mul": (multiply, 2),
    "fma": (fused, 3),
    "div": (divide, 2),
    "sqrt": (square_root, 1),
    "rcp": (lambda format, a, mode: divide(format, format.round(Fraction(1)), a, mode), 1),
}


def same_or_both_nan(got: np.ndarray, want: np.ndarray, format: Format) -> np.ndarray:
    """NaNs of double precision keep the payload of an operand: any NaN will do there."""
    nan = np.array([format.is_nan(int(v)) for v in got]) & np.array(
        [format.is_nan(int(v)) for v in want]
    )
    return np.where(nan, want, got)


def check(
    name: str,
    format: Format,
    mode: str = NEAREST,
    *,
    suffix: str = "",
    pair: bool = False,
    finish: Callable[[Format, int], int] | None = None,
) -> None:
    """An operation's every bit. ``suffix`` is its further qualifiers, ``finish`` what they do."""
    function, operands = OPERATIONS[name]
    columns = operand_sets(format, operands, COUNT)
    ftz = ".ftz" in suffix

    def expected(*bits: int) -> int:
        if ftz:
            bits = tuple(flush(format, b) for b in bits)
        result = function(format, *bits, mode)
        if ftz:
            result = flush(format, result)
        return finish(format, result) if finish else result

    dtype = STORAGE[format.width]
    want = apply(expected, *columns, dtype=dtype)
    names = ", ".join(f"{{a{i}}}" for i in range(operands))
    type_name = format.name + ("x2" if pair else "")
    instruction = f"{name}.{mode}{suffix}.{type_name} {{d0}}, {names};"
    if pair:
        got = run(instruction, [c.view(np.uint32) for c in columns], [np.uint32])[0].view(np.uint16)
    else:
        (got,) = run(instruction, columns, [dtype])
    if format is F64:
        got = same_or_both_nan(got, want, format)
    assert_same_bits(got, want, *columns, instruction=instruction)


@pytest.mark.parametrize("format", [F32, F64], ids=lambda f: f.name)
@pytest.mark.parametrize("mode", DIRECTED)
@pytest.mark.parametrize("name", OPERATIONS)
def test_ieee(name: str, mode: str, format: Format) -> None:
    check(name, format, mode)


@pytest.mark.parametrize("mode", [NEAREST, DOWN])
@pytest.mark.parametrize("name", OPERATIONS)
def test_flush_to_zero(name: str, mode: str) -> None:
    check(name, F32, mode, suffix=".ftz")


@pytest.mark.parametrize("suffix", [".sat", ".ftz.sat"])
@pytest.mark.parametrize("name", ["add", "sub", "mul", "fma"])
def test_saturation(name: str, suffix: str) -> None:
    check(name, F32, suffix=suffix, finish=saturated)
    if suffix == ".sat":
        check(name, F32, "rp", suffix=suffix, finish=saturated)


def rectified(format: Format, bits: int) -> int:
    return bits if format.is_nan(bits) or not bits & format.sign else 0


@pytest.mark.parametrize("pair", [False, True])
@pytest.mark.parametrize("format", [F16, BF16], ids=lambda f: f.name)
@pytest.mark.parametrize("name", ["add", "sub", "mul", "fma"])
def test_halves(name: str, format: Format, pair: bool) -> None:
    check(name, format, pair=pair)
    if name == "fma":
        check(name, format, suffix=".relu", pair=pair, finish=rectified)
    if format is F16:
        check(name, format, suffix=".sat", pair=pair, finish=saturated)
        check(name, format, suffix=".ftz", pair=pair)


def test_fma_of_bf16_is_rounded_once() -> None:
    """The product lies half way between two numbers, the addend is far below its last place."""
    one_and_a_bit = BF16.round(Fraction(17, 16))
    tiny = BF16.round(Fraction(1, 2**100))
    columns = [np.array([v], np.uint16) for v in (one_and_a_bit, one_and_a_bit, tiny)]
    half_way = Fraction(17, 16) ** 2
    assert BF16.round(half_way) != BF16.round(half_way + Fraction(1, 2**100))
    (got,) = run("fma.rn.bf16 {d0}, {a0}, {a1}, {a2};", columns, [np.uint16])
    assert got[0] == BF16.round(half_way + Fraction(1, 2**100))


# ---- minimum and maximum


def extremum(format: Format, a: int, b: int, *, largest: bool, nan: bool) -> int:
    if format.is_nan(a) or format.is_nan(b):
        if nan or (format.is_nan(a) and format.is_nan(b)):
            return format.nan
        return b if format.is_nan(a) else a

    def key(bits: int) -> tuple[float, int]:
        magnitude = bits & (format.sign - 1)
        return (-magnitude if bits & format.sign else magnitude), 0 if bits & format.sign else 1

    return (max if largest else min)(a, b, key=key)


@pytest.mark.parametrize("format", [F32, F64, F16, BF16], ids=lambda f: f.name)
@pytest.mark.parametrize("suffix", ["", ".ftz", ".NaN", ".xorsign.abs", ".ftz.NaN.xorsign.abs"])
@pytest.mark.parametrize("name", ["min", "max"])
def test_extrema(name: str, suffix: str, format: Format) -> None:
    if (format is F64 and suffix) or (format is BF16 and "ftz" in suffix):
        return
    columns = operand_sets(format, 2, COUNT)
    magnitude = format.sign - 1

    def expected(a: int, b: int) -> int:
        if ".ftz" in suffix:
            a, b = flush(format, a), flush(format, b)
        sign = (a ^ b) & format.sign
        if "abs" in suffix:
            a, b = a & magnitude, b & magnitude
        result = extremum(format, a, b, largest=name == "max", nan=".NaN" in suffix)
        return result if format.is_nan(result) or "abs" not in suffix else result | sign

    dtype = STORAGE[format.width]
    want = apply(expected, *columns, dtype=dtype)
    instruction = f"{name}{suffix}.{format.name} {{d0}}, {{a0}}, {{a1}};"
    (got,) = run(instruction, columns, [dtype])
    if format is F64:
        got = same_or_both_nan(got, want, format)
    assert_same_bits(got, want, *columns, instruction=instruction)
    if format.width == 16:
        pairs = run(
            instruction.replace(format.name, format.name + "x2"),
            [c.view(np.uint32) for c in columns],
            [np.uint32],
        )
        assert_same_bits(pairs[0].view(np.uint16), want, *columns, instruction=instruction)


# ---- signs


@pytest.mark.parametrize("format", [F32, F64, F16, BF16], ids=lambda f: f.name)
def test_signs(format: Format) -> None:
    a, b = operand_sets(format, 2, COUNT)
    dtype, sign = STORAGE[format.width], format.sign
    for ftz in ("", ".ftz") if format in (F32, F16) else ("",):
        source = apply(lambda x, f=ftz: flush(format, x) if f else x, a, dtype=dtype)
        (got,) = run(f"neg{ftz}.{format.name} {{d0}}, {{a0}};", [a], [dtype])
        assert_same_bits(got, source ^ dtype(sign), a)
        (got,) = run(f"abs{ftz}.{format.name} {{d0}}, {{a0}};", [a], [dtype])
        assert_same_bits(got, source & dtype(sign - 1), a)
        if format.width == 16:
            (got,) = run(
                f"neg{ftz}.{format.name}x2 {{d0}}, {{a0}};", [a.view(np.uint32)], [np.uint32]
            )
            assert_same_bits(got.view(np.uint16), source ^ dtype(sign), a)
    if format.width >= 32:
        (got,) = run(f"copysign.{format.name} {{d0}}, {{a0}}, {{a1}};", [a, b], [dtype])
        assert_same_bits(got, (a & dtype(sign)) | (b & dtype(sign - 1)), a, b)


@pytest.mark.parametrize("format", [F32, F64], ids=lambda f: f.name)
def test_classification(format: Format) -> None:
    (a,) = operand_sets(format, 1, COUNT)
    assert format.infinity is not None

    def finite(x: int) -> bool:
        return x & (format.sign - 1) < format.infinity

    tests: dict[str, Callable[[int], bool]] = {
        "finite": finite,
        "infinite": format.is_infinite,
        "number": lambda x: not format.is_nan(x),
        "notanumber": format.is_nan,
        "normal": lambda x: finite(x) and not format.is_subnormal(x) and x & (format.sign - 1) != 0,
        "subnormal": format.is_subnormal,
    }
    for name, function in tests.items():
        (got,) = run(f"testp.{name}.{format.name} {{q0}}, {{a0}};", [a], [np.uint32])
        assert_same_bits(got, apply(function, a, dtype=np.uint32), a, instruction=name)


# ---- comparisons

ORDERED: dict[str, Callable[[float, float], bool]] = {
    "eq": lambda a, b: a == b,
    "ne": lambda a, b: a < b or a > b,
    "lt": lambda a, b: a < b,
    "le": lambda a, b: a <= b,
    "gt": lambda a, b: a > b,
    "ge": lambda a, b: a >= b,
}


def compare(name: str, a: float, b: float) -> bool:
    unordered = math.isnan(a) or math.isnan(b)
    if name in ("num", "nan"):
        return unordered == (name == "nan")
    if name in ORDERED:
        return ORDERED[name](a, b)
    return unordered or ORDERED[name[:-1]](a, b)


NAMES = [*ORDERED, *(f"{name}u" for name in ORDERED), "num", "nan"]


@pytest.mark.parametrize("format", [F32, F64, F16, BF16], ids=lambda f: f.name)
@pytest.mark.parametrize("ftz", ["", ".ftz"])
def test_setp(format: Format, ftz: str) -> None:
    if ftz and format not in (F32, F16):
        return
    a, b = operand_sets(format, 2, COUNT)
    b[::7] = a[::7]

    def real(bits: int) -> float:
        return format.to_float(flush(format, bits) if ftz else bits)

    for name in NAMES:
        want = apply(lambda x, y, n=name: compare(n, real(x), real(y)), a, b, dtype=np.uint32)
        (got,) = run(f"setp.{name}{ftz}.{format.name} {{q0}}, {{a0}}, {{a1}};", [a, b], [np.uint32])
        assert_same_bits(got, want, a, b, instruction=name)
        if format.width != 16:
            continue
        # p of the low halves, q of the high ones; set writes one or all ones into each half.
        pairs = [a.view(np.uint32), b.view(np.uint32)]
        both = run(
            f"setp.{name}{ftz}.{format.name}x2 {{q0}}|{{q1}}, {{a0}}, {{a1}};",
            pairs,
            [np.uint32] * 2,
        )
        assert_same_bits(both[0], want[::2], *pairs, instruction=name)
        assert_same_bits(both[1], want[1::2], *pairs, instruction=name)
        for dtype_name, true in (
            (f"{format.name}x2", format.round(Fraction(1))),
            ("u32", 0xFFFF),
        ):
            (got,) = run(
                f"set.{name}{ftz}.{dtype_name}.{format.name}x2 {{d0}}, {{a0}}, {{a1}};",
                pairs,
                [np.uint32],
            )
            assert_same_bits(got.view(np.uint16), (want * true).astype(np.uint16), instruction=name)
        (got,) = run(
            f"set.{name}{ftz}.{format.name}.{format.name} {{d0}}, {{a0}}, {{a1}};",
            [a, b],
            [np.uint16],
        )
        one = format.round(Fraction(1))
        assert_same_bits(got, (want * one).astype(np.uint16), a, b, instruction=name)


def test_slct_by_float() -> None:
    (c,) = operand_sets(F32, 1, COUNT)
    a, b = np.arange(COUNT, dtype=np.uint32), np.arange(COUNT, dtype=np.uint32) + 10**6
    for ftz in ("", ".ftz"):
        (got,) = run(f"slct{ftz}.u32.f32 {{d0}}, {{a0}}, {{a1}}, {{a2}};", [a, b, c], [np.uint32])
        first = apply(
            lambda x, f=ftz: F32.to_float(flush(F32, x) if f else x) >= 0, c, dtype=np.bool_
        )
        assert_same_bits(got, np.where(first, a, b), c)
