"""cvt in the simulator, bit by bit, against exact rational arithmetic."""

from __future__ import annotations

import functools
import math
from fractions import Fraction

import numpy as np
import pytest
from simulator_kernels import assert_same_bits, needs_simulator, run
from simulator_numeric import (
    AWAY,
    BF16,
    DIRECTED,
    E4M3,
    E5M2,
    F16,
    F32,
    F64,
    NEAREST,
    STORAGE,
    TF32,
    ZERO,
    Format,
    apply,
    flush,
    random_bits,
)

pytestmark = needs_simulator

COUNT = 1024
INTEGERS = ["u8", "s8", "u16", "s16", "u32", "s32", "u64", "s64"]
FLOATS = [F16, BF16, F32, F64]
TO_INTEGER = {"rni": NEAREST, "rzi": ZERO, "rmi": "rm", "rpi": "rp"}


def width_of(type_name: str) -> int:
    return int(type_name[1:])


def read(bits: int, type_name: str) -> int:
    width = width_of(type_name)
    bits &= (1 << width) - 1
    return bits - (1 << width) if type_name[0] == "s" and bits >> (width - 1) else bits


def bounds(type_name: str) -> tuple[int, int]:
    width = width_of(type_name)
    if type_name[0] == "s":
        return -(1 << (width - 1)), (1 << (width - 1)) - 1
    return 0, (1 << width) - 1


def clamp(value: int, type_name: str) -> int:
    least, most = bounds(type_name)
    return min(max(value, least), most)


def integer_operands(width: int, seed: int) -> np.ndarray:
    """Edge values of every width, and random ones of every size."""
    rng = np.random.default_rng(seed)
    values = rng.integers(0, 2**width, COUNT, dtype=np.uint64)
    values >>= rng.integers(0, width, COUNT, dtype=np.uint64)
    values ^= np.where(rng.integers(0, 2, COUNT) == 0, np.uint64(2**width - 1), np.uint64(0))
    edges = [2**n + d for n in (0, 7, 8, 11, 15, 16, 24, 31, 32, 53, 63) for d in (-1, 0, 1)]
    edges = [e % 2**width for e in edges] + [-e % 2**width for e in edges]
    values[: len(edges)] = edges
    return values.astype(STORAGE[width])


def float_operands(format: Format, seed: int) -> np.ndarray:
    """Of every size, near one, and around the ends of the integer types, halves among them."""
    values = random_bits(format, COUNT, seed)
    edges: list[int] = []
    for n in (-1, 0, 1, 2, 7, 8, 15, 16, 24, 31, 32, 63, 64):
        for quarter in range(-4, 5):
            exact = Fraction(2) ** n + Fraction(quarter, 4)
            edges += [
                format.round(exact, mode) | s for mode in ("rm", "rp") for s in (0, format.sign)
            ]
    values[-len(edges) :] = edges
    return values


def sign_extended(value: int, type_name: str, width: int) -> int:
    """As a register of another width holds it."""
    return read(value, type_name) & ((1 << width) - 1)


# ---- between integers


@pytest.mark.parametrize("source", INTEGERS)
@pytest.mark.parametrize("dest", INTEGERS)
def test_integers(dest: str, source: str) -> None:
    values = integer_operands(width_of(source), 1)
    dtype = STORAGE[width_of(dest)]
    mask = (1 << width_of(dest)) - 1
    (got,) = run(f"cvt.{dest}.{source} {{d0}}, {{a0}};", [values], [dtype])
    want = apply(lambda v: read(v, source) & mask, values, dtype=dtype)
    assert_same_bits(got, want, values, instruction=f"{dest}.{source}")
    (got,) = run(f"cvt.sat.{dest}.{source} {{d0}}, {{a0}};", [values], [dtype])
    want = apply(lambda v: clamp(read(v, source), dest) & mask, values, dtype=dtype)
    assert_same_bits(got, want, values, instruction=f"sat.{dest}.{source}")


@pytest.mark.parametrize("register", [16, 32, 64])
@pytest.mark.parametrize("narrow", ["u8", "s8", "u16", "s16", "u32", "s32"])
def test_registers_wider_than_the_type(narrow: str, register: int) -> None:
    """The source's upper bits are not looked at; the destination is extended by its type's sign."""
    if register < width_of(narrow):
        return
    values = integer_operands(register, 2)
    (got,) = run(f"cvt.{narrow}.{narrow} {{d0}}, {{a0}};", [values], [STORAGE[register]])
    want = apply(lambda v: sign_extended(v, narrow, register), values, dtype=STORAGE[register])
    assert_same_bits(got, want, values, instruction=narrow)


# ---- between integers and floats


@pytest.mark.parametrize("source", INTEGERS)
@pytest.mark.parametrize("dest", FLOATS, ids=lambda f: f.name)
@pytest.mark.parametrize("mode", DIRECTED)
def test_integer_to_float(mode: str, dest: Format, source: str) -> None:
    values = integer_operands(width_of(source), 3)
    dtype = STORAGE[dest.width]
    (got,) = run(f"cvt.{mode}.{dest.name}.{source} {{d0}}, {{a0}};", [values], [dtype])
    want = apply(lambda v: dest.round(Fraction(read(v, source)), mode), values, dtype=dtype)
    assert_same_bits(got, want, values, instruction=f"{dest.name}.{source}")


def round_fraction(value: Fraction, mode: str) -> int:
    """To an integer."""
    below = math.floor(value)
    if mode == "rm":
        return below
    if mode == "rp":
        return math.ceil(value)
    if mode == ZERO:
        return math.trunc(value)
    return round(value)  # ties to even


@pytest.mark.parametrize("source", FLOATS, ids=lambda f: f.name)
@pytest.mark.parametrize("dest", INTEGERS)
@pytest.mark.parametrize("mode", TO_INTEGER)
def test_float_to_integer(mode: str, dest: str, source: Format) -> None:
    values = float_operands(source, 4)
    dtype, width = STORAGE[width_of(dest)], width_of(dest)

    def expected(bits: int) -> int:
        if source.is_nan(bits):
            return 1 << (width - 1) if source is F64 or width == 64 else 0
        if source.is_infinite(bits):
            result = bounds(dest)[0 if bits & source.sign else 1]
        else:
            result = clamp(round_fraction(source.value(bits), TO_INTEGER[mode]), dest)
        return result & ((1 << width) - 1)

    (got,) = run(f"cvt.{mode}.{dest}.{source.name} {{d0}}, {{a0}};", [values], [dtype])
    want = apply(expected, values, dtype=dtype)
    assert_same_bits(got, want, values, instruction=f"{mode}.{dest}.{source.name}")


# ---- between floats


def convert(
    bits: int,
    source: Format,
    dest: Format,
    mode: str,
    *,
    relu: bool = False,
    satfinite: bool = False,
) -> int:
    if source.is_nan(bits):
        return dest.nan
    if relu and bits & source.sign:
        return 0
    if source.is_infinite(bits):
        end = dest.largest if satfinite or dest.infinity is None else dest.infinity
        return end | (dest.sign if bits & source.sign else 0)
    return dest.round(
        source.value(bits), mode, negative_zero=bool(bits & source.sign), saturate=satfinite
    )


NARROWING = [(s, d) for s in FLOATS for d in FLOATS if d.width < s.width or {s, d} == {F16, BF16}]


@pytest.mark.parametrize(("source", "dest"), NARROWING, ids=lambda f: f.name)
@pytest.mark.parametrize("mode", DIRECTED)
def test_narrowing(mode: str, source: Format, dest: Format) -> None:
    values = float_operands(source, 5)
    dtype = STORAGE[dest.width]
    (got,) = run(f"cvt.{mode}.{dest.name}.{source.name} {{d0}}, {{a0}};", [values], [dtype])
    want = apply(lambda v: convert(v, source, dest, mode), values, dtype=dtype)
    assert_same_bits(got, want, values, instruction=f"{mode}.{dest.name}.{source.name}")


@pytest.mark.parametrize(
    ("source", "dest"),
    [(F16, F32), (BF16, F32), (F16, F64), (BF16, F64), (F32, F64)],
    ids=lambda f: f.name,
)
def test_widening(source: Format, dest: Format) -> None:
    values = float_operands(source, 6)
    dtype = STORAGE[dest.width]
    (got,) = run(f"cvt.{dest.name}.{source.name} {{d0}}, {{a0}};", [values], [dtype])
    want = apply(lambda v: convert(v, source, dest, NEAREST), values, dtype=dtype)
    if dest is F64:  # any NaN
        nan = apply(source.is_nan, values, dtype=np.bool_)
        assert all(dest.is_nan(int(v)) for v in got[nan])
        got = np.where(nan, want, got)
    assert_same_bits(got, want, values, instruction=f"{dest.name}.{source.name}")


@pytest.mark.parametrize("format", FLOATS, ids=lambda f: f.name)
@pytest.mark.parametrize("mode", TO_INTEGER)
def test_rounding_to_an_integral_value(mode: str, format: Format) -> None:
    values = float_operands(format, 7)

    def expected(bits: int) -> int:
        if format.is_nan(bits):
            return format.nan
        if format.is_infinite(bits):
            return bits
        integral = round_fraction(format.value(bits), TO_INTEGER[mode])
        return format.round(Fraction(integral), negative_zero=bool(bits & format.sign))

    dtype = STORAGE[format.width]
    (got,) = run(f"cvt.{mode}.{format.name}.{format.name} {{d0}}, {{a0}};", [values], [dtype])
    want = apply(expected, values, dtype=dtype)
    if format is F64:
        nan = apply(format.is_nan, values, dtype=np.bool_)
        got = np.where(nan, want, got)
    assert_same_bits(got, want, values, instruction=f"{mode}.{format.name}")


def test_saturation_and_flushing() -> None:
    """.sat clamps to [0, 1]; .ftz takes single subnormals as zeros, and gives zeros for them."""
    one = F32.round(Fraction(1))

    def sat(bits: int) -> int:
        return 0 if F32.is_nan(bits) or bits & F32.sign or bits == 0 else min(bits, one)

    single = float_operands(F32, 8)
    (got,) = run("cvt.sat.f32.f32 {d0}, {a0};", [single], [np.uint32])
    assert_same_bits(got, apply(sat, single, dtype=np.uint32), single)
    (got,) = run("cvt.ftz.f32.f32 {d0}, {a0};", [single], [np.uint32])
    want = apply(lambda v: flush(F32, F32.nan if F32.is_nan(v) else v), single, dtype=np.uint32)
    assert_same_bits(got, want, single)
    (got,) = run("cvt.rpi.ftz.s32.f32 {d0}, {a0};", [single], [np.uint32])
    assert got[single == 1] == [0]  # the least subnormal would round up to one
    (got,) = run("cvt.rn.sat.f16.f32 {d0}, {a0};", [single], [np.uint16])
    want = apply(lambda v: convert(sat(v), F32, F16, NEAREST), single, dtype=np.uint16)
    assert_same_bits(got, want, single)
    double = float_operands(F64, 9)
    for mode in DIRECTED:
        (got,) = run(f"cvt.{mode}.ftz.f32.f64 {{d0}}, {{a0}};", [double], [np.uint32])
        want = apply(lambda v, m=mode: flush(F32, convert(v, F64, F32, m)), double, dtype=np.uint32)
        assert_same_bits(got, want, double)
    words = integer_operands(32, 10)
    (got,) = run("cvt.rn.sat.f32.s32 {d0}, {a0};", [words], [np.uint32])
    want = apply(
        lambda v: F32.round(Fraction(min(max(read(v, "s32"), 0), 1))), words, dtype=np.uint32
    )
    assert_same_bits(got, want, words)


HALF_QUALIFIERS = ["", ".relu", ".satfinite", ".relu.satfinite"]


@pytest.mark.parametrize("dest", [F16, BF16], ids=lambda f: f.name)
@pytest.mark.parametrize("mode", [NEAREST, ZERO])
@pytest.mark.parametrize("qualifiers", HALF_QUALIFIERS)
def test_halves(qualifiers: str, mode: str, dest: Format) -> None:
    a, b = float_operands(F32, 11), float_operands(F32, 12)
    relu, satfinite = ".relu" in qualifiers, ".satfinite" in qualifiers

    def one(bits: int) -> int:
        return convert(bits, F32, dest, mode, relu=relu, satfinite=satfinite)

    (got,) = run(f"cvt.{mode}{qualifiers}.{dest.name}.f32 {{d0}}, {{a0}};", [a], [np.uint16])
    assert_same_bits(got, apply(one, a, dtype=np.uint16), a, instruction=qualifiers)
    (got,) = run(
        f"cvt.{mode}{qualifiers}.{dest.name}x2.f32 {{d0}}, {{a0}}, {{a1}};", [a, b], [np.uint32]
    )
    want = apply(lambda x, y: one(x) << 16 | one(y), a, b, dtype=np.uint32)
    assert_same_bits(got, want, a, b, instruction=qualifiers)


@pytest.mark.parametrize(
    ("mode", "qualifiers"),
    [(AWAY, ""), (AWAY, ".satfinite"), *((m, q) for m in (NEAREST, ZERO) for q in HALF_QUALIFIERS)],
)
def test_tf32(mode: str, qualifiers: str) -> None:
    values = float_operands(F32, 13)

    def expected(bits: int) -> int:
        if F32.is_nan(bits):
            return F32.nan
        relu, satfinite = ".relu" in qualifiers, ".satfinite" in qualifiers
        return convert(bits, F32, TF32, mode, relu=relu, satfinite=satfinite) << 13

    (got,) = run(f"cvt.{mode}{qualifiers}.tf32.f32 {{d0}}, {{a0}};", [values], [np.uint32])
    assert_same_bits(got, apply(expected, values, dtype=np.uint32), values, instruction=qualifiers)


@functools.cache
def nearest_bytes(format: Format) -> np.ndarray:
    """What every half rounds to: its magnitude does, and keeps the sign; a NaN has none."""
    positive = [convert(v, F16, format, NEAREST, satfinite=True) for v in range(2**15)]
    negative = [bits if F16.is_nan(v) else bits | 0x80 for v, bits in enumerate(positive)]
    return np.array(positive + negative, np.uint8)


@pytest.mark.parametrize("format", [E4M3, E5M2], ids=lambda f: f.name)
@pytest.mark.parametrize("relu", ["", ".relu"])
def test_to_bytes(relu: str, format: Format) -> None:
    every_half = np.arange(2**16, dtype=np.uint16)
    known = nearest_bytes(format)
    if relu:
        known = np.where(every_half > 0xFC00, known, np.where(every_half < 0x8000, known, 0))
    name = f"{format.name}x2"
    (got,) = run(
        f"cvt.rn.satfinite{relu}.{name}.f16x2 {{d0}}, {{a0}};",
        [every_half.view(np.uint32)],
        [np.uint16],
    )
    assert_same_bits(got.view(np.uint8), known.astype(np.uint8), every_half)

    a, b = float_operands(F32, 14), float_operands(F32, 15)

    def one(bits: int) -> int:
        return convert(bits, F32, format, NEAREST, relu=bool(relu), satfinite=True)

    (got,) = run(f"cvt.rn.satfinite{relu}.{name}.f32 {{d0}}, {{a0}}, {{a1}};", [a, b], [np.uint16])
    want = apply(lambda x, y: one(x) << 8 | one(y), a, b, dtype=np.uint16)
    assert_same_bits(got, want, a, b)


@pytest.mark.parametrize("format", [E4M3, E5M2], ids=lambda f: f.name)
@pytest.mark.parametrize("relu", ["", ".relu"])
def test_from_bytes(relu: str, format: Format) -> None:
    values = np.arange(2**16, dtype=np.uint16)
    (got,) = run(f"cvt.rn{relu}.f16x2.{format.name}x2 {{d0}}, {{a0}};", [values], [np.uint32])
    table = [convert(v, format, F16, NEAREST, relu=bool(relu)) for v in range(256)]
    want = np.array([table[v >> 8] << 16 | table[v & 255] for v in values.tolist()], np.uint32)
    assert_same_bits(got, want, values)


@pytest.mark.parametrize("element", ["s16", "u16", "s8", "u8", "s4", "u4", "s2", "u2"])
def test_pack(element: str) -> None:
    columns = [
        integer_operands(32, 16),
        integer_operands(32, 17)[::-1].copy(),
        integer_operands(32, 18),
    ]
    width = width_of(element)

    def expected(a: int, b: int, c: int) -> int:
        high, low = (clamp(read(v, "s32"), element) & ((1 << width) - 1) for v in (a, b))
        rest = 0 if width == 16 else c << (2 * width)
        return (rest | high << width | low) & 0xFFFFFFFF

    merge = "" if width == 16 else ".b32"
    third = "" if width == 16 else ", {a2}"
    (got,) = run(
        f"cvt.pack.sat.{element}.s32{merge} {{d0}}, {{a0}}, {{a1}}{third};", columns, [np.uint32]
    )
    assert_same_bits(got, apply(expected, *columns, dtype=np.uint32), *columns, instruction=element)
