"""Where the PTX ISA puts the elements of mma's matrices.

The formulas are those of its "Matrix fragments for mma" sections. Each takes (lane, i), i the
element's number in the fragment, and gives (row, column).
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

Place = Callable[[int, int], tuple[int, int]]


def _a_16bit(k: int) -> Place:
    def place(lane: int, i: int) -> tuple[int, int]:
        group, thread = lane >> 2, lane % 4
        if k == 8:
            return (group if i < 2 else group + 8), thread * 2 + (i & 1)
        row = group if i < 2 or 4 <= i < 6 else group + 8
        return row, thread * 2 + (i & 1) + (0 if i < 4 else 8)

    return place


def _b_16bit(k: int) -> Place:
    del k
    return lambda lane, i: ((lane % 4) * 2 + (i & 1) + (0 if i < 2 else 8), lane >> 2)


def _a_tf32(k: int) -> Place:
    def place(lane: int, i: int) -> tuple[int, int]:
        group, thread = lane >> 2, lane % 4
        if k == 4:
            return (group if i == 0 else group + 8), thread
        return (group if i in (0, 2) else group + 8), (thread if i < 2 else thread + 4)

    return place


def _b_tf32(k: int) -> Place:
    del k
    return lambda lane, i: (lane % 4 + (0 if i == 0 else 4), lane >> 2)


def _a_8bit(k: int) -> Place:
    def place(lane: int, i: int) -> tuple[int, int]:
        group, thread = lane >> 2, lane % 4
        if k == 16:
            return (group if i < 4 else group + 8), thread * 4 + (i & 3)
        row = group if i < 4 or 8 <= i < 12 else group + 8
        return row, thread * 4 + (i & 3) + (0 if i < 8 else 16)

    return place


def _b_8bit(k: int) -> Place:
    del k
    return lambda lane, i: ((lane % 4) * 4 + (i & 3) + (0 if i < 4 else 16), lane >> 2)


def _a_4bit(k: int) -> Place:
    def place(lane: int, i: int) -> tuple[int, int]:
        group, thread = lane >> 2, lane % 4
        if k == 32:
            return (group if i < 8 else group + 8), thread * 8 + (i & 7)
        row = group if i < 8 or 16 <= i < 24 else group + 8
        return row, thread * 8 + (i & 7) + (0 if i < 16 else 32)

    return place


def _b_4bit(k: int) -> Place:
    del k
    return lambda lane, i: ((lane % 4) * 8 + (i & 7) + (0 if i < 8 else 32), lane >> 2)


def _a_1bit(k: int) -> Place:
    def place(lane: int, i: int) -> tuple[int, int]:
        group, thread = lane >> 2, lane % 4
        if k == 128:
            return (group if i < 32 else group + 8), thread * 32 + (i & 0x1F)
        row = group if i < 32 or 64 <= i < 96 else group + 8
        return row, thread * 32 + (i & 0x1F) + (0 if i < 64 else 128)

    return place


def _b_1bit(k: int) -> Place:
    del k
    return lambda lane, i: ((lane % 4) * 32 + (i & 0x1F) + (0 if i < 32 else 128), lane >> 2)


def _a_64bit(k: int) -> Place:
    def place(lane: int, i: int) -> tuple[int, int]:
        group, thread = lane >> 2, lane % 4
        if k == 4:
            return (group if i == 0 else group + 8), thread
        if k == 8:
            return (group if i in (0, 2) else group + 8), (thread if i < 2 else thread + 4)
        row = group if i % 2 == 0 else group + 8
        return row, (i * 2 + thread if i % 2 == 0 else i * 2 - 2 + thread)

    return place


def _b_64bit(k: int) -> Place:
    del k
    return lambda lane, i: (lane % 4 + i * 4, lane >> 2)


def place_c(lane: int, i: int) -> tuple[int, int]:
    """Of every type, of 16 rows and (i < 2) of 8."""
    return (lane >> 2) + (0 if i < 2 else 8), (lane % 4) * 2 + (i & 1)


# By bits of an element: the places in A with 16 rows and in B, by k.
PLACES = {
    1: (_a_1bit, _b_1bit),
    4: (_a_4bit, _b_4bit),
    8: (_a_8bit, _b_8bit),
    16: (_a_16bit, _b_16bit),
    32: (_a_tf32, _b_tf32),
    64: (_a_64bit, _b_64bit),
}


def to_registers(
    matrix: np.ndarray, place: Place, bits: int, register_bits: int = 32
) -> np.ndarray:
    """[registers, 32 lanes] of a matrix of raw element bits."""
    per_register = register_bits // bits
    elements = matrix.size // 32
    registers = np.zeros((elements // per_register, 32), np.uint64)
    for lane in range(32):
        for i in range(elements):
            value = np.uint64(matrix[place(lane, i)])
            registers[i // per_register, lane] |= value << np.uint64(bits * (i % per_register))
    return registers.astype(np.uint64 if register_bits == 64 else np.uint32)


def from_registers(
    registers: np.ndarray, place: Place, shape: tuple[int, int], bits: int
) -> np.ndarray:
    """The matrix of raw element bits that the registers hold."""
    per_register = registers.itemsize * 8 // bits
    matrix = np.zeros(shape, np.uint64)
    for lane in range(32):
        for i in range(matrix.size // 32):
            word = int(registers[i // per_register, lane])
            matrix[place(lane, i)] = word >> (bits * (i % per_register)) & ((1 << bits) - 1)
    return matrix
