"""mma.sync of the simulator against NumPy."""

from __future__ import annotations

from dataclasses import dataclass
from fractions import Fraction

import numpy as np
import pytest
from simulator_fragments import PLACES, from_registers, place_c, to_registers
from simulator_kernels import needs_simulator
from simulator_numeric import BF16, E4M3, E5M2, F16, F32, F64, TF32, Format

from fused_peft import simulator

pytestmark = needs_simulator

_QUARTER = Fraction(1, 4)
FORMATS = {"f16": F16, "bf16": BF16, "tf32": TF32, "e4m3": E4M3, "e5m2": E5M2, "f64": F64}
INTEGER_BITS = {"s8": 8, "u8": 8, "s4": 4, "u4": 4}


def warp_kernel(instruction: str, registers: dict[str, tuple[int, int]]) -> str:
    """PTX of one warp: loads arrays [registers, 32] of each name but d, and stores those of d.

    ``registers`` is how many registers and their bytes.
    """
    lines = []
    for name, (count, size) in registers.items():
        lines.append(f".reg .b{8 * size} %{name}<{count}>;")
        lines.append(f"ld.param.u64 %p, [{name}]; mad.wide.u32 %p, %lane, {size}, %p;")
        access = "st" if name == "d" else "ld"
        moves = []
        for i in range(count):
            at, register = f"[%p+{32 * size * i}]", f"%{name}{i}"
            operands = f"{at}, {register}" if access == "st" else f"{register}, {at}"
            moves.append(f"{access}.global.b{8 * size} {operands};")
        if name == "d":
            stores = [lines.pop(), *moves]
        else:
            lines += moves
    names = {
        n: "{" + ", ".join(f"%{n}{i}" for i in range(c)) + "}" for n, (c, _) in registers.items()
    }
    params = ", ".join(f".param .u64 {name}" for name in registers)
    newline = "\n  "
    return f""".version 8.7
.target sm_90
.address_size 64
.visible .entry k({params})
{{
  .reg .b32 %lane;
  .reg .b64 %p;
  mov.u32 %lane, %tid.x;
  {newline.join(lines)}
  {instruction.format(**names)}
  {newline.join(stores)}
  ret;
}}
"""


def run_warp(instruction: str, d: np.ndarray, **sources: np.ndarray) -> np.ndarray:
    """Registers of d after the instruction; every array is [registers, 32 lanes]."""
    arrays = {"d": d, **sources}
    ptx = warp_kernel(instruction, {n: (len(v), v.itemsize) for n, v in arrays.items()})
    simulator.reset()
    simulator.launch(ptx, "k", 1, 32, list(arrays.values()))
    assert simulator.findings() == []
    return d


@dataclass(frozen=True)
class Shape:
    m: int
    k: int
    a: str
    b: str
    d: str

    @property
    def bits(self) -> int:
        kind = FORMATS.get(self.a)
        return 32 if self.a == "tf32" else kind.width if kind else INTEGER_BITS[self.a]

    @property
    def instruction(self) -> str:
        types = f"{self.d}.{self.a}.{self.b}.{self.d}"
        return f"mma.sync.aligned.m{self.m}n8k{self.k}.row.col.{types} {{d}}, {{a}}, {{b}}, {{c}};"

    def __str__(self) -> str:
        return f"m{self.m}k{self.k}-{self.d}-{self.a}-{self.b}"


FLOAT_SHAPES = [
    *(Shape(16, k, "f16", "f16", d) for k in (8, 16) for d in ("f16", "f32")),
    *(Shape(16, k, "bf16", "bf16", "f32") for k in (8, 16)),
    *(Shape(16, k, "tf32", "tf32", "f32") for k in (4, 8)),
    *(
        Shape(16, 32, a, b, d)
        for a in ("e4m3", "e5m2")
        for b in ("e4m3", "e5m2")
        for d in ("f16", "f32")
    ),
    Shape(16, 16, "e4m3", "e5m2", "f32"),
    Shape(8, 4, "f64", "f64", "f64"),
    *(Shape(16, k, "f64", "f64", "f64") for k in (4, 8, 16)),
]
INTEGER_SHAPES = [
    *(
        Shape(m, k, a, b, "s32")
        for m, k in ((8, 16), (16, 16), (16, 32))
        for a in ("s8", "u8")
        for b in ("s8", "u8")
    ),
    *(
        Shape(m, k, a, b, "s32")
        for m, k in ((8, 32), (16, 32), (16, 64))
        for a in ("s4", "u4")
        for b in ("s4", "u4")
    ),
]


def multiply(
    shape: Shape, a: np.ndarray, b: np.ndarray, c: np.ndarray, suffix: str = ""
) -> np.ndarray:
    """D's element bits [m, 8] of the raw element bits of A [m, k], B [k, 8] and C [m, 8]."""
    register_bits = 64 if shape.a == "f64" else 32
    d_bits = {"f16": 16, "f64": 64}.get(shape.d, 32)
    place_a, place_b = (make(shape.k) for make in PLACES[shape.bits])
    sources = {
        "a": to_registers(a, place_a, shape.bits, register_bits),
        "b": to_registers(b, place_b, shape.bits, register_bits),
        "c": to_registers(c, place_c, d_bits, register_bits),
    }
    d = np.zeros_like(sources["c"])
    instruction = shape.instruction.replace(".row.col", ".row.col" + suffix)
    run_warp(instruction, d, **sources)
    return from_registers(d, place_c, c.shape, d_bits)


def decoded(format: Format, bits: np.ndarray, shift: int = 0) -> np.ndarray:
    return np.vectorize(lambda v: format.to_float(int(v) >> shift), otypes=[np.float64])(bits)


def accumulator(shape: Shape) -> tuple[Format, type, type]:
    return {
        "f16": (F16, np.float16, np.uint16),
        "f32": (F32, np.float32, np.uint32),
        "f64": (F64, np.float64, np.uint64),
    }[shape.d]


def small_numbers(format: Format, shape: tuple[int, int], rng: np.random.Generator) -> np.ndarray:
    """Bits of multiples of a quarter below two: sums of their products are exact."""
    table = [format.round(quarters * _QUARTER) for quarters in range(8)]
    chosen = np.array(table, np.uint64)[rng.integers(0, len(table), shape)]
    return chosen | rng.integers(0, 2, shape).astype(np.uint64) << np.uint64(format.width - 1)


@pytest.mark.parametrize("shape", FLOAT_SHAPES, ids=str)
def test_exact_sums(shape: Shape) -> None:
    rng = np.random.default_rng(3)
    format_a, format_b = FORMATS[shape.a], FORMATS[shape.b]
    shift = 13 if shape.a == "tf32" else 0  # the register's 13 low bits are not looked at
    a = small_numbers(format_a, (shape.m, shape.k), rng) << np.uint64(shift)
    b = small_numbers(format_b, (shape.k, 8), rng) << np.uint64(shift)
    format_d, real, raw = accumulator(shape)
    c = rng.integers(-16, 17, (shape.m, 8)) / 4.0
    if shift:
        a |= rng.integers(0, 2**13, a.shape).astype(np.uint64)
        b |= rng.integers(0, 2**13, b.shape).astype(np.uint64)
    got = multiply(shape, a, b, c.astype(real).view(raw))
    expected = decoded(format_a, a, shift) @ decoded(format_b, b, shift) + c
    assert np.array_equal(got, expected.astype(real).view(raw))
    assert format_d.width == 8 * np.dtype(real).itemsize
    assert np.unique(expected).size > 20


@pytest.mark.parametrize("shape", FLOAT_SHAPES, ids=str)
def test_random_numbers(shape: Shape) -> None:
    """Random finite fragments: within the rounding of sums in the accumulator's precision."""
    rng = np.random.default_rng(4)
    format_a, format_b = FORMATS[shape.a], FORMATS[shape.b]
    format_d, real, raw = accumulator(shape)
    shift = 13 if shape.a == "tf32" else 0

    def draw(format: Format, size: tuple[int, int]) -> np.ndarray:
        span = min(5, 2 ** (format.exponent_bits - 2))
        middle = (1 << (format.exponent_bits - 1)) - 1
        exponent = rng.integers(middle - span, middle + span, size).astype(np.uint64)
        mantissa = rng.integers(0, 2**format.mantissa_bits, size).astype(np.uint64)
        sign = rng.integers(0, 2, size).astype(np.uint64) << np.uint64(format.width - 1)
        return (sign | exponent << np.uint64(format.mantissa_bits) | mantissa) << np.uint64(shift)

    a, b = draw(format_a, (shape.m, shape.k)), draw(format_b, (shape.k, 8))
    c = rng.standard_normal((shape.m, 8)).astype(real)
    got = multiply(shape, a, b, c.view(raw)).astype(raw).view(real).astype(np.float64)
    real_a, real_b = decoded(format_a, a, shift), decoded(format_b, b, shift)
    expected = real_a @ real_b + c
    scale = np.abs(real_a) @ np.abs(real_b) + np.abs(c)
    # One rounding of each step in single precision (double of doubles), one of the result.
    steps = (shape.k + 1) * scale * 2.0 ** -(53 if shape.d == "f64" else 24)
    bound = steps + np.abs(expected) * 2.0 ** -(format_d.mantissa_bits + 1)
    assert np.all(np.abs(got - expected) <= bound + 1e-300)
    assert np.any(got != expected) or shape.d == "f64"


@pytest.mark.parametrize("shape", INTEGER_SHAPES, ids=str)
@pytest.mark.parametrize("saturate", [False, True])
def test_integers(shape: Shape, saturate: bool) -> None:
    rng = np.random.default_rng(5)

    def draw(name: str, size: tuple[int, int]) -> tuple[np.ndarray, np.ndarray]:
        bits = INTEGER_BITS[name]
        values = rng.integers(0, 2**bits, size)
        values[: size[0] // 2] = rng.choice(
            [0, 2**bits - 1, 2 ** (bits - 1)], (size[0] // 2, size[1])
        )
        numbers = (
            np.where(values >= 2 ** (bits - 1), values - 2**bits, values)
            if name[0] == "s"
            else values
        )
        return values, numbers

    a, real_a = draw(shape.a, (shape.m, shape.k))
    b, real_b = draw(shape.b, (shape.k, 8))
    c = rng.integers(-(2**31), 2**31, (shape.m, 8))
    c[::2] = rng.choice([-(2**31), 2**31 - 1, 0], (shape.m // 2, 8))
    got = multiply(shape, a, b, c & 0xFFFFFFFF, ".satfinite" if saturate else "")
    expected = real_a @ real_b + c
    if saturate:
        assert np.any(expected > 2**31 - 1) or np.any(expected < -(2**31))
        expected = np.clip(expected, -(2**31), 2**31 - 1)
    assert np.array_equal(got, (expected & 0xFFFFFFFF).astype(np.uint64))


@pytest.mark.parametrize(("m", "k"), [(8, 128), (16, 128), (16, 256)])
@pytest.mark.parametrize("op", ["xor", "and"])
def test_bits(m: int, k: int, op: str) -> None:
    rng = np.random.default_rng(6)
    a, b = rng.integers(0, 2, (m, k)), rng.integers(0, 2, (k, 8))
    c = rng.integers(0, 1000, (m, 8))
    place_a, place_b = (make(k) for make in PLACES[1])
    sources = {
        "a": to_registers(a, place_a, 1),
        "b": to_registers(b, place_b, 1),
        "c": to_registers(c, place_c, 32),
    }
    d = np.zeros_like(sources["c"])
    run_warp(
        f"mma.sync.aligned.m{m}n8k{k}.row.col.s32.b1.b1.s32.{op}.popc {{d}}, {{a}}, {{b}}, {{c}};",
        d,
        **sources,
    )
    both = a @ b
    expected = c + (both if op == "and" else a.sum(1)[:, None] + b.sum(0) - 2 * both)
    assert np.array_equal(from_registers(d, place_c, c.shape, 32), expected.astype(np.uint64))


@pytest.mark.parametrize("shape", [s for s in FLOAT_SHAPES if s.d != "f64"], ids=str)
def test_special_values(shape: Shape) -> None:
    """A NaN in A makes its row of D the canonical NaN, one in B the column; infinities add up."""
    format_a, format_b = FORMATS[shape.a], FORMATS[shape.b]
    format_d, real, raw = accumulator(shape)
    shift = np.uint64(13 if shape.a == "tf32" else 0)
    one_a, one_b = (np.uint64(f.round(_QUARTER * 4)) << shift for f in (format_a, format_b))
    a, b = np.full((16, shape.k), one_a), np.full((shape.k, 8), one_b)
    a[3, shape.k - 1] = np.uint64(format_a.nan) << shift
    b[0, 6] = np.uint64(format_b.nan) << shift
    expected = np.full((16, 8), float(shape.k))
    if format_a.infinity is not None:
        a[5, 1] = np.uint64(format_a.infinity) << shift
        a[7, 0] = np.uint64(format_a.infinity | format_a.sign) << shift
        expected[5], expected[7] = np.inf, -np.inf
    c = np.zeros((16, 8), real)
    c[5, 2] = -np.inf
    want = expected.astype(real).view(raw)
    if format_a.infinity is not None:
        want[5, 2] = format_d.nan
    else:
        want[5, 2] = format_d.infinity | format_d.sign
    want[3, :], want[:, 6] = format_d.nan, format_d.nan
    assert np.array_equal(multiply(shape, a, b, c.view(raw)), want)


# ---- taint


def test_a_tainted_row_or_column_taints_what_depends_on_it() -> None:
    """Rows 2 and 9 of A, column 5 of B and one element of C come from fresh shared memory."""
    shape = Shape(16, 16, "f16", "f16", "f32")
    instruction = shape.instruction.format(
        d="{%d0, %d1, %d2, %d3}", a="{%a0, %a1, %a2, %a3}", b="{%b0, %b1}", c="{%c0, %c1, %c2, %c3}"
    )
    # lane -> which of its registers is overwritten by an uninitialised word
    tainted = {"a2": (2 << 2) + 1, "a1": (1 << 2) + 3, "b1": (5 << 2) + 2, "c3": 29}
    taints = "\n".join(
        f"setp.eq.u32 %q, %lane, {lane}; @%q ld.shared.b32 %{name}, [%smem];"
        for name, lane in tainted.items()
    )
    # Stores the element whose validity is asked for: a finding appears where it is tainted.
    registers = [(i, lane) for i in range(4) for lane in range(32)]
    expected = []
    for i, lane in registers:
        row, column = place_c(lane, i)
        if row in (2, 9) or column == 5 or (i == 3 and lane == 29):
            expected.append((i, lane))
    ptx = f""".version 8.7
.target sm_90
.address_size 64
.visible .entry k(.param .u64 out)
{{
  .reg .b32 %lane, %smem, %a<4>, %b<2>, %c<4>, %d<4>;
  .reg .b64 %p;
  .reg .pred %q;
  .shared .align 16 .b8 fresh[64];
  mov.u32 %lane, %tid.x;
  mov.u32 %smem, fresh;
  mov.b32 %a0, 0; mov.b32 %a1, 0; mov.b32 %a2, 0; mov.b32 %a3, 0; mov.b32 %b0, 0; mov.b32 %b1, 0;
  mov.b32 %c0, 0; mov.b32 %c1, 0; mov.b32 %c2, 0; mov.b32 %c3, 0;
  {taints}
  {instruction}
  ld.param.u64 %p, [out];
  mad.wide.u32 %p, %lane, 4, %p;
  st.global.b32 [%p], %d0;
  st.global.b32 [%p+128], %d1;
  st.global.b32 [%p+256], %d2;
  st.global.b32 [%p+384], %d3;
  ret;
}}
"""
    found = []
    for i, lane in registers:
        # Only one lane stores, only one register: everything else goes unseen.
        one = ptx.replace(
            "ld.param.u64 %p, [out];",
            f"setp.ne.u32 %q, %lane, {lane}; @%q ret; ld.param.u64 %p, [out];",
        )
        lines = [ln for ln in one.splitlines() if "st.global" not in ln or ln.endswith(f"%d{i};")]
        simulator.reset()
        simulator.launch("\n".join(lines), "k", 1, 32, [np.zeros(128, np.uint32)])
        if simulator.findings():
            found.append((i, lane))
    assert found == expected


@pytest.mark.parametrize(
    ("instruction", "complaint"),
    [
        ("mma.sync.aligned.m16n8k16.row.col.f32.bf16.f16.f32", "go together"),
        ("mma.sync.aligned.m16n8k16.row.col.f16.bf16.bf16.f16", "D of a type"),
        ("mma.sync.aligned.m16n8k32.row.col.f32.f16.f16.f32", "shape"),
        ("mma.sync.aligned.m16n8k16.col.col.f32.f16.f16.f32", "layout"),
    ],
)
def test_forms_that_do_not_exist(instruction: str, complaint: str) -> None:
    ptx = warp_kernel(
        instruction + " {d}, {a}, {b}, {c};", {"d": (4, 4), "a": (4, 4), "b": (2, 4), "c": (4, 4)}
    )
    with pytest.raises(simulator.SimulatorError, match=complaint):
        simulator.launch(ptx, "k", 1, 32, [np.zeros((4, 32), np.uint32)] * 4)


def test_lanes_that_are_missing_are_reported() -> None:
    """The other half of the warp has left: undefined on the device, a finding here."""
    shape = Shape(16, 8, "bf16", "bf16", "f32")
    registers = {"d": (4, 4), "a": (2, 4), "b": (1, 4), "c": (4, 4)}
    leave = ".reg .pred %q; setp.gt.u32 %q, %lane, 15; @%q ret; "
    ptx = warp_kernel(leave + shape.instruction, registers)
    simulator.reset()
    simulator.launch(ptx, "k", 1, 32, [np.zeros((4, 32), np.uint32)] * 4)
    (finding,) = simulator.findings()
    assert finding.instruction.startswith("mma.sync")
    assert "ffff0000" in finding.text
