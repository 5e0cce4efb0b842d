"""Floating-point formats and rounding in exact rational arithmetic, for tests of the simulator.

Nothing here manipulates bits to round: a value's neighbours are found by bisection over the
format's numbers, which ascend with their bits, and compared as fractions.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from fractions import Fraction

import numpy as np

NEAREST, ZERO, DOWN, UP, AWAY = "rn", "rz", "rm", "rp", "rna"
DIRECTED = (NEAREST, ZERO, DOWN, UP)


@dataclass(frozen=True)
class Format:
    """A binary floating-point format; ``largest`` and ``nan`` are bits without the sign."""

    name: str
    exponent_bits: int
    mantissa_bits: int
    largest: int
    nan: int
    infinity: int | None

    @property
    def width(self) -> int:
        return 1 + self.exponent_bits + self.mantissa_bits

    @property
    def sign(self) -> int:
        return 1 << (self.width - 1)

    def is_nan(self, bits: int) -> bool:
        magnitude = bits & (self.sign - 1)
        return magnitude == self.nan if self.infinity is None else magnitude > self.infinity

    def is_infinite(self, bits: int) -> bool:
        return self.infinity is not None and bits & (self.sign - 1) == self.infinity

    def is_subnormal(self, bits: int) -> bool:
        return 0 < bits & (self.sign - 1) < 1 << self.mantissa_bits

    def magnitude(self, bits: int) -> Fraction:
        """Of a finite number."""
        bias = (1 << (self.exponent_bits - 1)) - 1
        exponent, mantissa = divmod(bits & (self.sign - 1), 1 << self.mantissa_bits)
        if exponent:
            mantissa += 1 << self.mantissa_bits
        return mantissa * Fraction(2) ** (max(exponent, 1) - bias - self.mantissa_bits)

    def value(self, bits: int) -> Fraction:
        return -self.magnitude(bits) if bits & self.sign else self.magnitude(bits)

    def to_float(self, bits: int) -> float:
        """As a Python float: exact but for nothing."""
        if self.is_nan(bits):
            return math.nan
        result = math.inf if self.is_infinite(bits) else float(self.magnitude(bits))
        return -result if bits & self.sign else result

    def round(
        self,
        exact: Fraction,
        mode: str = NEAREST,
        *,
        negative_zero: bool = False,
        saturate: bool = False,
    ) -> int:
        """Bits of the number that ``exact`` rounds to; ``negative_zero`` is the sign of a zero."""
        negative = exact < 0 or (exact == 0 and negative_zero)
        sign = self.sign if negative else 0
        size = abs(exact)
        low, high = 0, self.largest + 1  # value(low) <= size < value(high)
        while high - low > 1:
            middle = (low + high) // 2
            if self.magnitude(middle) <= size:
                low = middle
            else:
                high = middle
        below = self.magnitude(low)
        if below == size:
            return sign | low
        # One past the largest stands for the number that would follow it.
        above = 2 * below - self.magnitude(low - 1) if low == self.largest else self.magnitude(high)
        if low == self.largest and size >= above:
            to_above = True
            if mode == ZERO or (mode == DOWN and not negative) or (mode == UP and negative):
                to_above = False
        elif mode == ZERO:
            to_above = False
        elif mode == DOWN:
            to_above = negative
        elif mode == UP:
            to_above = not negative
        elif size - below == above - size:
            to_above = mode == AWAY or low % 2 == 1
        else:
            to_above = size - below > above - size
        chosen = low + 1 if to_above else low
        if chosen > self.largest:
            overflow = self.nan if self.infinity is None else self.infinity
            chosen = self.largest if saturate else overflow
        return sign | chosen


F64 = Format("f64", 11, 52, 0x7FEFFFFFFFFFFFFF, 0x7FF8000000000000, 0x7FF0000000000000)
F32 = Format("f32", 8, 23, 0x7F7FFFFF, 0x7FFFFFFF, 0x7F800000)
TF32 = Format("tf32", 8, 10, 0x3FBFF, 0x3FFFF, 0x3FC00)
F16 = Format("f16", 5, 10, 0x7BFF, 0x7FFF, 0x7C00)
BF16 = Format("bf16", 8, 7, 0x7F7F, 0x7FFF, 0x7F80)
E4M3 = Format("e4m3", 4, 3, 0x7E, 0x7F, None)
E5M2 = Format("e5m2", 5, 2, 0x7B, 0x7F, 0x7C)

STORAGE = {8: np.uint8, 16: np.uint16, 32: np.uint32, 64: np.uint64}


def special_bits(format: Format) -> list[int]:
    """Zeros, the ends of the ranges, one and its neighbours, infinities, NaNs."""
    one = ((1 << (format.exponent_bits - 1)) - 1) << format.mantissa_bits
    least_normal = 1 << format.mantissa_bits
    positive = [0, 1, 2, least_normal - 1, least_normal, least_normal + 1, one - 1, one, one + 1]
    positive += [one + least_normal // 2, one + least_normal, format.largest - 1, format.largest]
    if format.infinity is not None:
        positive += [format.infinity, format.infinity + 1]
    positive += [format.nan]
    return [bits | sign for bits in positive for sign in (0, format.sign)]


def random_bits(format: Format, count: int, seed: int) -> np.ndarray:
    """Special numbers, then numbers of every size and near one (whose sums round)."""
    rng = np.random.default_rng(seed)
    special = special_bits(format)
    anything = rng.integers(0, 2**format.width, count, dtype=np.uint64)
    bias = (1 << (format.exponent_bits - 1)) - 1
    exponent = rng.integers(bias - 3, bias + 4, count).astype(np.uint64)
    mantissa = rng.integers(0, 2**format.mantissa_bits, count, dtype=np.uint64)
    near_one = exponent << np.uint64(format.mantissa_bits) | mantissa
    near_one |= rng.integers(0, 2, count, dtype=np.uint64) << np.uint64(format.width - 1)
    chosen = np.where(rng.integers(0, 2, count) == 0, anything, near_one)
    chosen[: len(special)] = special[:count]
    return chosen.astype(STORAGE[format.width])


def operand_sets(format: Format, operands: int, count: int, seed: int = 0) -> list[np.ndarray]:
    """All pairs of special numbers where there are two operands or more, then random ones."""
    special = special_bits(format)
    columns = [random_bits(format, count, seed + i) for i in range(operands)]
    if operands > 1:
        pairs = [(a, b) for a in special for b in special][: count // 2]
        for i in range(2):
            columns[i][: len(pairs)] = [pair[i] for pair in pairs]
    if operands > 2:
        rng = np.random.default_rng(seed + 99)
        columns[2][: count // 2] = rng.choice(special, count // 2)
    return columns


def flush(format: Format, bits: int) -> int:
    """A subnormal as the zero of its sign."""
    return bits & format.sign if format.is_subnormal(bits) else bits


def is_negative_zero_sum(a: int, b: int, mode: str, format: Format) -> bool:
    """The sign of a sum that is exactly zero (IEEE 754, 6.3)."""
    negative_a, negative_b = bool(a & format.sign), bool(b & format.sign)
    return negative_a if negative_a == negative_b else mode == DOWN


def apply(function: Callable[..., int], *columns: np.ndarray, dtype: type) -> np.ndarray:
    """The function on rows of integers."""
    rows = zip(*(column.tolist() for column in columns), strict=True)
    return np.array([function(*row) for row in rows], dtype)
