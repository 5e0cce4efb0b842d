"""Atomics of the simulator: one warp on one word, so old values show the order of its lanes."""

from __future__ import annotations

from collections.abc import Callable
from fractions import Fraction

import numpy as np
import pytest
from simulator_kernels import needs_simulator
from simulator_memory_kernels import LANES, kernel, launch
from simulator_numeric import BF16, F16, Format

pytestmark = needs_simulator

rng = np.random.default_rng(1)

INTEGERS: dict[str, Callable[[int, int, int], int]] = {
    "add": lambda old, b, n: (old + b) % n,
    "min": lambda old, b, n: min(old, b),
    "max": lambda old, b, n: max(old, b),
    "and": lambda old, b, n: old & b,
    "or": lambda old, b, n: old | b,
    "xor": lambda old, b, n: old ^ b,
    "exch": lambda old, b, n: b,
    "inc": lambda old, b, n: 0 if old >= b else old + 1,
    "dec": lambda old, b, n: b if old == 0 or old > b else old - 1,
}
INTEGER_KINDS = {
    "add": "us",
    "min": "us",
    "max": "us",
    "and": "b",
    "or": "b",
    "xor": "b",
    "exch": "b",
}
INTEGER_FORMS = [
    *(
        (op, kind + size)
        for op, kinds in INTEGER_KINDS.items()
        for kind in kinds
        for size in ("32", "64")
    ),
    ("inc", "u32"),
    ("dec", "u32"),
]


def atomic_body(form: str, space: str, size: int, data_bytes: int, third: str = "") -> str:
    """Word 0 of out goes to the space, the operation runs there, and the word comes back."""
    value = {2: "%h0", 4: "%r0", 8: "%d0", 16: "%q0"}[size]
    old = {2: "%h1", 4: "%r1", 8: "%d1", 16: "%q1"}[size]
    word = {"global": "%out", "shared": "tile", "generic": "%y"}[space]
    qualifier = "" if space == "generic" else f".{space}"
    copy_in = copy_out = ""
    if space != "global":
        move = f"b{8 * size} {value}"
        copy_in = f"@%p ld.global.{move}, [%out]; @%p st.shared.b{8 * size} [tile], {value};"
        copy_out = f"@%p ld.shared.{move}, [tile]; @%p st.global.b{8 * size} [%out], {value};"
    operation = form.format(space=qualifier)
    operands = f"{old}, [{word}], {value}" + (f", {third}" if third else "")
    return f"""
      setp.eq.u32 %p, %t, 0;
      {copy_in}
      bar.warp.sync 0xffffffff;
      mov.u64 %y, tile; cvta.shared.u64 %y, %y;
      mad.wide.u32 %x, %t, {data_bytes}, %in;
      ld.global.b{8 * size} {value}, [%x];
      {operation} {operands};
      mad.wide.u32 %z, %t, {size}, %out;
      st.global.b{8 * size} [%z+{size}], {old};
      bar.warp.sync 0xffffffff;
      {copy_out}"""


@pytest.mark.parametrize("space", ["global", "shared", "generic"])
@pytest.mark.parametrize(("op", "kind"), INTEGER_FORMS)
def test_integer_atomic(op: str, kind: str, space: str) -> None:
    dtype = np.dtype(("int" if kind[0] == "s" else "uint") + kind[1:])
    data = np.frombuffer(rng.bytes(LANES * dtype.itemsize), dtype).copy()
    if op in ("inc", "dec"):
        data = rng.integers(0, 4, LANES).astype(dtype)
    out = np.zeros(LANES + 1, dtype)
    out[0] = data[7] if op not in ("inc", "dec") else 2
    size = dtype.itemsize
    expected = [int(out[0])]
    for b in data:
        expected.append(INTEGERS[op](expected[-1], int(b), 2 ** (8 * size)))
    body = atomic_body(f"atom{{space}}.{op}.{kind}", space, size, size)
    launch(kernel(body), [data, out])
    modulus = 2 ** (8 * size)
    np.testing.assert_array_equal(
        [int(v) % modulus for v in [*out[1:], out[0]]], [v % modulus for v in expected]
    )


@pytest.mark.parametrize(
    "sem", ["", ".relaxed.gpu", ".acquire.gpu", ".release.gpu", ".acq_rel.sys"]
)
def test_reduction_from_many_blocks(sem: str) -> None:
    body = f"mov.u32 %r0, %ctaid.x; red{sem}.global.add.u32 [%out], %r0;"
    out = np.zeros(1, np.uint32)
    launch(kernel(body), [np.zeros(1), out], threads=96, grid=20)
    assert out[0] == 96 * sum(range(20))


@pytest.mark.parametrize("size", [2, 4, 8, 16])
@pytest.mark.parametrize("space", ["global", "shared", "generic"])
def test_compare_and_swap(size: int, space: str) -> None:
    """Lane i finds i and leaves i + 1, up to lane 5, which compares with what is not there."""
    register = {2: "%h", 4: "%r", 8: "%d", 16: "%q"}[size]
    load = (
        f"mad.wide.u32 %z, %t, {size}, %in; ld.global.b{8 * size} {register}2, [%z+{LANES * size}];"
    )
    form = f"{load} atom{{space}}.cas.b{8 * size}"
    body = atomic_body(form, space, size, size, third=f"{register}2")
    words = size // 2
    data = np.zeros((2 * LANES, words), np.uint16)
    data[:LANES, -1] = np.arange(LANES)
    data[LANES:, -1] = np.arange(1, LANES + 1)
    data[5, -1] = 77
    out = np.zeros((LANES + 1, words), np.uint16)
    launch(kernel(body), [data, out])
    np.testing.assert_array_equal(out[1:, -1], np.minimum(np.arange(LANES), 5))
    np.testing.assert_array_equal(out[0], [0] * (words - 1) + [5])


def test_float_atomics_flush_subnormals_in_global_memory_only() -> None:
    data = np.full(LANES, 0x00000003, np.uint32)  # 3 * 2^-149
    for space, expected in [("global", 0), ("shared", 3 * LANES), ("generic", 3 * LANES)]:
        out = np.zeros(LANES + 1, np.uint32)
        launch(kernel(atomic_body("atom{space}.add.f32", space, 4, 4)), [data, out])
        assert out[0] == expected, space


@pytest.mark.parametrize("space", ["global", "shared", "generic"])
def test_float_atomic_add(space: str) -> None:
    for dtype, kind in [(np.float32, "f32"), (np.float64, "f64")]:
        data = rng.standard_normal(LANES).astype(dtype)
        out = np.zeros(LANES + 1, dtype)
        out[0] = 0.5
        expected = [dtype(0.5)]
        for value in data:
            expected.append(dtype(expected[-1] + value))
        size = data.itemsize
        launch(kernel(atomic_body(f"atom{{space}}.add.{kind}", space, size, size)), [data, out])
        np.testing.assert_array_equal([*out[1:], out[0]], expected)


def half_bits(format: Format, count: int) -> np.ndarray:
    """Numbers between 1/16 and 16, and some subnormals."""
    bits = [format.round(format.value(int(b))) for b in rng.integers(1, 40, count // 8)]
    while len(bits) < count:
        value = Fraction(int(rng.integers(-4096, 4096)), 256)
        bits.append(format.round(value))
    return np.array(bits, np.uint16)


@pytest.mark.parametrize("space", ["global", "shared", "generic"])
@pytest.mark.parametrize("format", [F16, BF16], ids=lambda f: f.name)
def test_half_atomic_add(format: Format, space: str) -> None:
    data = half_bits(format, LANES)
    out = np.zeros(LANES + 1, np.uint16)
    expected = [0]
    for bits in data:
        expected.append(format.round(format.value(expected[-1]) + format.value(int(bits))))
    launch(kernel(atomic_body(f"atom{{space}}.add.noftz.{format.name}", space, 2, 2)), [data, out])
    np.testing.assert_array_equal([*out[1:], out[0]], expected)


@pytest.mark.parametrize("format", [F16, BF16], ids=lambda f: f.name)
@pytest.mark.parametrize("op", ["add", "min", "max"])
def test_vector_reductions(op: str, format: Format) -> None:
    data = half_bits(format, 8 * LANES).reshape(LANES, 8)
    out = half_bits(format, 8)
    apply = {"add": lambda a, b: a + b, "min": min, "max": max}[op]
    expected = [format.value(int(bits)) for bits in out]
    for row in data:
        for i, bits in enumerate(row):
            result = format.round(apply(expected[i], format.value(int(bits))))
            expected[i] = format.value(result)
    body = f"""
      mad.wide.u32 %x, %t, 16, %in;
      ld.global.v4.b32 {{%r0, %r1, %r2, %r3}}, [%x];
      red.global.{op}.noftz.v4.{format.name}x2 [%out], {{%r0, %r1, %r2, %r3}};"""
    launch(kernel(body), [data, out])
    assert [format.value(int(bits)) for bits in out] == expected


def test_vector_float_atomic_returns_the_old_values() -> None:
    data = rng.standard_normal((LANES, 4)).astype(np.float32)
    out = np.zeros((LANES + 1, 4), np.float32)
    body = """
      mad.wide.u32 %x, %t, 16, %in;
      ld.global.v4.f32 {%f0, %f1, %f2, %f3}, [%x];
      atom.global.add.v4.f32 {%f4, %f5, %f6, %f7}, [%out], {%f0, %f1, %f2, %f3};
      mad.wide.u32 %z, %t, 16, %out;
      st.global.v4.f32 [%z+16], {%f4, %f5, %f6, %f7};"""
    launch(kernel(body), [data, out])
    expected = np.add.accumulate(np.concatenate([np.zeros((1, 4), np.float32), data]), axis=0)
    np.testing.assert_array_equal(out[1:], expected[:-1])
    np.testing.assert_array_equal(out[0], expected[-1])
