"""Approximations of the simulator: the PTX ISA's bounds of their errors, and special values."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
from simulator_kernels import needs_simulator, run
from simulator_numeric import BF16, F16, Format

pytestmark = needs_simulator

NAN, INF = np.nan, np.inf
LEAST_SUBNORMAL, LEAST_NORMAL = 2.0**-149, 2.0**-126


def of_single(name: str, values: np.ndarray) -> np.ndarray:
    """The instruction ``name`` (all but its operands) of single-precision numbers."""
    source = values.astype(np.float32)
    return run(f"{name} {{d0}}, {{a0}};", [source.view(np.uint32)], [np.uint32])[0].view(np.float32)


def uniform(low: float, high: float, seed: int, count: int = 4096) -> np.ndarray:
    return np.random.default_rng(seed).uniform(low, high, count).astype(np.float32)


def logarithmic(low: int, high: int, seed: int, count: int = 4096) -> np.ndarray:
    """Of sizes 2^low to 2^high."""
    rng = np.random.default_rng(seed)
    return np.ldexp(rng.uniform(1, 2, count), rng.integers(low, high, count)).astype(np.float32)


# Instruction, its function in double precision, arguments, largest relative error.
RELATIVE: dict[str, tuple[str, Callable[[np.ndarray], np.ndarray], np.ndarray, float]] = {
    "ex2": ("ex2.approx.f32", np.exp2, uniform(-126, 127.9, 1), 2**-22.5),
    "ex2 near 0": ("ex2.approx.f32", np.exp2, uniform(-1, 1, 2), 2**-22.5),
    "ex2 ftz": ("ex2.approx.ftz.f32", np.exp2, uniform(-126, 127.9, 3), 2**-22.5),
    "lg2": ("lg2.approx.f32", np.log2, logarithmic(-126, 127, 4), 2**-22.0),
    "lg2 ftz": ("lg2.approx.ftz.f32", np.log2, logarithmic(-126, 127, 5), 2**-22.0),
    "lg2 subnormal": ("lg2.approx.f32", np.log2, logarithmic(-148, -127, 6), 2**-22.0),
    "rcp": ("rcp.approx.f32", np.reciprocal, logarithmic(-125, 125, 7), 2**-23.0),
    "rcp ftz": ("rcp.approx.ftz.f32", np.reciprocal, -logarithmic(-125, 125, 8), 2**-23.0),
    "sqrt": ("sqrt.approx.f32", np.sqrt, logarithmic(-148, 127, 9), 2**-23.0),
    "sqrt ftz": ("sqrt.approx.ftz.f32", np.sqrt, logarithmic(-126, 127, 10), 2**-23.0),
    "rsqrt": ("rsqrt.approx.f32", lambda x: 1 / np.sqrt(x), logarithmic(-148, 127, 11), 2**-22.9),
    "rsqrt ftz": (
        "rsqrt.approx.ftz.f32",
        lambda x: 1 / np.sqrt(x),
        logarithmic(-126, 127, 12),
        2**-22.9,
    ),
    "tanh": ("tanh.approx.f32", np.tanh, uniform(-12, 12, 13), 2**-11.0),
    "tanh small": ("tanh.approx.f32", np.tanh, -logarithmic(-140, 0, 14), 2**-11.0),
}


@pytest.mark.parametrize("case", RELATIVE)
def test_relative_error(case: str) -> None:
    name, function, x, bound = RELATIVE[case]
    got = of_single(name, x).astype(np.float64)
    expected = function(x.astype(np.float64))
    # A subnormal result cannot be nearer than half of its last place.
    error = np.abs(got - expected) - LEAST_SUBNORMAL / 2
    worst = np.argmax(error / np.abs(expected))
    assert np.all(error <= bound * np.abs(expected)), (x[worst], got[worst], expected[worst])


@pytest.mark.parametrize(
    ("name", "function", "low", "high", "bound"),
    [
        ("sin.approx.f32", np.sin, -np.pi, np.pi, 2**-20.9),
        ("cos.approx.f32", np.cos, -np.pi, np.pi, 2**-20.9),
        ("sin.approx.ftz.f32", np.sin, -100 * np.pi, 100 * np.pi, 2**-14.7),
        ("cos.approx.ftz.f32", np.cos, -100 * np.pi, 100 * np.pi, 2**-14.7),
        ("sin.approx.f32", np.sin, -1e9, 1e9, 2**-14.7),
        ("cos.approx.f32", np.cos, -1e9, 1e9, 2**-14.7),
        ("lg2.approx.f32", np.log2, 0.5, 2, 2**-22.0),
    ],
)
def test_absolute_error(
    name: str, function: Callable[[np.ndarray], np.ndarray], low: float, high: float, bound: float
) -> None:
    x = uniform(low, high, 15)
    error = np.abs(of_single(name, x).astype(np.float64) - function(x.astype(np.float64)))
    assert error.max() <= bound, x[error.argmax()]


SPECIAL = [
    -INF,
    -1.0,
    -LEAST_NORMAL,
    -LEAST_SUBNORMAL,
    -0.0,
    0.0,
    LEAST_SUBNORMAL,
    LEAST_NORMAL,
    1.0,
    INF,
    NAN,
]


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        # The tables of the PTX ISA; None where the value is no special one.
        ("ex2.approx.ftz.f32", [0.0, 0.5, 1, 1, 1, 1, 1, 1, 2, INF, NAN]),
        ("ex2.approx.f32", [0.0, 0.5, 1, 1, 1, 1, 1, 1, 2, INF, NAN]),
        ("lg2.approx.ftz.f32", [NAN, NAN, NAN, -INF, -INF, -INF, -INF, -126, 0, INF, NAN]),
        ("lg2.approx.f32", [NAN, NAN, NAN, NAN, -INF, -INF, -149, -126, 0, INF, NAN]),
        (
            "sin.approx.ftz.f32",
            [NAN, None, -LEAST_NORMAL, -0.0, -0.0, 0.0, 0.0, LEAST_NORMAL, None, NAN, NAN],
        ),
        ("cos.approx.ftz.f32", [NAN, None, 1, 1, 1, 1, 1, 1, None, NAN, NAN]),
        ("cos.approx.f32", [NAN, None, 1, 1, 1, 1, 1, 1, None, NAN, NAN]),
        (
            "rcp.approx.ftz.f32",
            [-0.0, -1, -(2.0**126), -INF, -INF, INF, INF, 2.0**126, 1, 0.0, NAN],
        ),
        ("rcp.approx.f32", [-0.0, -1, -(2.0**126), -INF, -INF, INF, INF, 2.0**126, 1, 0.0, NAN]),
        ("sqrt.approx.ftz.f32", [NAN, NAN, NAN, -0.0, -0.0, 0.0, 0.0, 2.0**-63, 1, INF, NAN]),
        ("sqrt.approx.f32", [NAN, NAN, NAN, NAN, -0.0, 0.0, None, 2.0**-63, 1, INF, NAN]),
        ("rsqrt.approx.ftz.f32", [NAN, NAN, NAN, -INF, -INF, INF, INF, 2.0**63, 1, 0.0, NAN]),
        ("rsqrt.approx.f32", [NAN, NAN, NAN, NAN, -INF, INF, None, 2.0**63, 1, 0.0, NAN]),
        (
            "tanh.approx.f32",
            [
                -1,
                None,
                -LEAST_NORMAL,
                -LEAST_SUBNORMAL,
                -0.0,
                0.0,
                LEAST_SUBNORMAL,
                LEAST_NORMAL,
                None,
                1,
                NAN,
            ],
        ),
    ],
)
def test_special_values(name: str, expected: list[float | None]) -> None:
    got = of_single(name, np.array(SPECIAL))
    known = [i for i, value in enumerate(expected) if value is not None]
    want = np.array([expected[i] for i in known], np.float32)
    bits = got[known].view(np.uint32)
    assert np.array_equal(bits[np.isnan(want)], np.full(np.isnan(want).sum(), 0x7FFFFFFF))
    assert np.array_equal(bits[~np.isnan(want)], want[~np.isnan(want)].view(np.uint32))


def test_results_below_the_normal_numbers() -> None:
    x = np.arange(-127, -152, -1)
    assert np.array_equal(of_single("ex2.approx.f32", x), np.exp2(x).astype(np.float32))
    assert not of_single("ex2.approx.ftz.f32", x).any()
    assert np.array_equal(
        of_single("ex2.approx.f32", np.arange(-126, 128)), np.exp2(np.arange(-126.0, 128))
    )
    big = np.array([2.0**126, 2.0**127])
    assert np.array_equal(of_single("rcp.approx.f32", big), (1 / big).astype(np.float32))
    assert np.array_equal(
        of_single("rcp.approx.ftz.f32", big), np.array([LEAST_NORMAL, 0], np.float32)
    )


HALVES = [("ex2.approx", np.exp2, 2**-9.9), ("tanh.approx", np.tanh, 2**-10.987)]


@pytest.mark.parametrize(("name", "function", "bound"), HALVES)
@pytest.mark.parametrize("format", [F16, BF16], ids=lambda f: f.name)
@pytest.mark.parametrize("pair", ["", "x2"])
def test_every_half(
    name: str, function: Callable[[np.ndarray], np.ndarray], bound: float, format: Format, pair: str
) -> None:
    ftz = ".ftz" if format is BF16 and name == "ex2.approx" else ""
    if format is BF16:
        bound = 2**-7.0 if ftz else 2**-8.0
    bits = np.arange(2**16, dtype=np.uint16)
    source = bits.view(np.uint32) if pair else bits
    (got,) = run(f"{name}{ftz}.{format.name}{pair} {{d0}}, {{a0}};", [source], [source.dtype.type])
    got = got.view(np.uint16)
    real = np.array([format.to_float(int(v)) for v in bits])
    result = np.array([format.to_float(int(v)) for v in got])
    with np.errstate(over="ignore"):
        expected = function(real)
    nan = np.isnan(real)
    assert np.all(got[nan] == format.nan)
    # Out of range: infinity, and below the normal numbers the format's own spacing (or zero).
    inside = ~nan & (np.abs(expected) <= format.to_float(format.largest))
    outside = ~nan & (expected > format.to_float(format.largest) * (1 + bound))
    assert np.all(np.isinf(result[outside]))
    spacing = format.to_float(1 << format.mantissa_bits) if ftz else format.to_float(1) / 2
    scale = np.abs(expected[inside]) if name == "ex2.approx" else 1.0
    assert np.all(np.abs(result[inside] - expected[inside]) <= bound * scale + spacing)


@pytest.mark.parametrize(
    ("kind", "bound"), [("approx", 2.0), ("approx.ftz", 2.0), ("full", 2.0), ("full.ftz", 2.0)]
)
def test_division(kind: str, bound: float) -> None:
    """Within 2 ulp; div.approx by more than 2^126 is zero, or NaN for an infinite dividend."""
    rng = np.random.default_rng(16)
    a, b = (rng.choice([-1, 1], 4096) * logarithmic(-60, 60, s) for s in (17, 18))
    columns = [v.astype(np.float32).view(np.uint32) for v in (a, b)]
    (got,) = run(f"div.{kind}.f32 {{d0}}, {{a0}}, {{a1}};", columns, [np.uint32])
    expected = a.astype(np.float64) / b
    ulp = np.spacing(np.abs(expected).astype(np.float32)).astype(np.float64)
    assert np.all(np.abs(got.view(np.float32) - expected) <= bound * ulp)
    if kind == "approx.ftz":
        columns = [
            np.array(v, np.float32).view(np.uint32) for v in ([1.0, -1.0, INF], [2.0**127] * 3)
        ]
        (got,) = run(f"div.{kind}.f32 {{d0}}, {{a0}}, {{a1}};", columns, [np.uint32])
        assert [hex(v) for v in got] == ["0x0", "0x80000000", "0x7fffffff"]


@pytest.mark.parametrize(
    ("name", "function"), [("rcp", np.reciprocal), ("rsqrt", lambda x: 1 / np.sqrt(x))]
)
def test_double_precision_seeds(name: str, function: Callable[[np.ndarray], np.ndarray]) -> None:
    """The upper word alone: 20 bits of mantissa, no subnormals."""
    rng = np.random.default_rng(19)
    x = np.ldexp(rng.uniform(1, 2, 4096), rng.integers(-900, 900, 4096))
    (got,) = run(f"{name}.approx.ftz.f64 {{d0}}, {{a0}};", [x.view(np.uint64)], [np.uint64])
    assert not np.any(got & np.uint64(0xFFFFFFFF))
    assert np.all(np.abs(got.view(np.float64) / function(x) - 1) <= 2.0**-19)
    special = np.array([0.0, -0.0, 2.0**-1074, INF, NAN])
    (got,) = run(f"{name}.approx.ftz.f64 {{d0}}, {{a0}};", [special.view(np.uint64)], [np.uint64])
    assert np.array_equal(got.view(np.float64)[:4], [INF, -INF, INF, 0.0])
    assert np.isnan(got.view(np.float64)[4])


def test_reciprocal_root_of_double() -> None:
    x = np.ldexp(np.random.default_rng(20).uniform(1, 2, 4096), np.arange(4096) % 1800 - 900)
    (got,) = run("rsqrt.approx.f64 {d0}, {a0};", [x.view(np.uint64)], [np.uint64])
    assert np.all(np.abs(got.view(np.float64) * np.sqrt(x) - 1) <= 2.0**-51)
