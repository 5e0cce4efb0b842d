"""Integer operands and expectations, for tests of the simulator."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from simulator_kernels import assert_same_bits, run
from simulator_numeric import apply

STORAGE = {1: np.uint8, 2: np.uint16, 4: np.uint32, 8: np.uint64}
COUNT = 1024


def signed(value: int, width: int) -> int:
    value &= (1 << width) - 1
    return value - (1 << width) if value >> (width - 1) else value


def unsigned(value: int, width: int) -> int:
    return value & ((1 << width) - 1)


def read(value: int, type_name: str) -> int:
    width = int(type_name[1:])
    return signed(value, width) if type_name[0] == "s" else unsigned(value, width)


def integers(width: int, count: int, seed: int, small: int | None = None) -> np.ndarray:
    """Edge values, powers of two and random ones; below ``small`` half of the time if given."""
    rng = np.random.default_rng(seed)
    values = rng.integers(0, 2**width, count, dtype=np.uint64)
    values >>= rng.integers(0, width, count, dtype=np.uint64)
    if small is not None:
        few = rng.integers(0, small, count, dtype=np.uint64)
        values = np.where(rng.integers(0, 2, count) == 0, few, values)
    edges = [0, 1, 2, 3, 2**width - 1, 2**width - 2, 2 ** (width - 1), 2 ** (width - 1) - 1]
    edges += [2 ** (width - 1) + 1, 0x55555555 % 2**width]
    rng.shuffle(edges)
    pairs = [(a, b) for a in edges for b in edges]
    values[: len(pairs)] = [pair[seed % 2] for pair in pairs]
    return values.astype(STORAGE[width // 8])


def check(
    instruction: str,
    expected: Callable[..., int],
    in_widths: list[int],
    out_width: int,
    small: dict[int, int] | None = None,
) -> None:
    """``expected`` of the raw unsigned sources, wrapped to the destination."""
    small = small or {}
    sources = [integers(w, COUNT, i, small.get(i)) for i, w in enumerate(in_widths)]
    dtype = STORAGE[out_width // 8]
    (got,) = run(instruction, sources, [dtype])
    want = apply(lambda *s: unsigned(expected(*s), out_width), *sources, dtype=dtype)
    assert_same_bits(got, want, *sources, instruction=instruction)
