"""Operands of wgmma in shared memory: the canonical layouts and their descriptors."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

# Bytes of a line of the swizzle pattern -> the layout's code in a descriptor.
SWIZZLES = {0: 0, 128: 1, 64: 2, 32: 3}


@dataclass(frozen=True)
class Layout:
    """Where a [rows, 32 bytes of k] operand lies from ``start`` on.

    ``swizzle`` is 0, 32, 64 or 128; ``mn_major`` (16-bit elements alone) puts the rows' elements
    of one k side by side instead of one row's.
    """

    start: int
    swizzle: int
    mn_major: bool
    rows: int

    @property
    def strides(self) -> tuple[int, int]:
        """Leading and stride byte offset."""
        groups = -(-self.rows // 8)
        if not self.mn_major:
            # 8 rows (of one line each, or of 16 bytes) follow one another; without a swizzle the
            # second chunk of k lies behind all rows, one gap further.
            return (groups * 128 + 16, 128) if not self.swizzle else (16, 8 * self.swizzle)
        if not self.swizzle:
            return groups * 128 + 32, 128
        return 16 * self.swizzle + 1024, 8 * self.swizzle

    @property
    def descriptor(self) -> int:
        leading, stride = self.strides
        return (
            self.start >> 4
            | (leading >> 4) << 16
            | (stride >> 4) << 32
            | SWIZZLES[self.swizzle] << 62
        )

    def place(self, row: int, chunk: int) -> int:
        """Byte address of 16 bytes: of a row along k, or (MN-major) of ``row`` = k along rows."""
        leading, stride = self.strides
        line, group = row % 8, row // 8
        if not self.mn_major:
            if not self.swizzle:
                return self.start + 16 * line + stride * group + leading * chunk
            linear = self.start + self.swizzle * line + stride * group + 16 * chunk
        else:
            if not self.swizzle:
                return self.start + 16 * line + leading * group + stride * chunk
            wide = self.swizzle // 16
            linear = self.start + self.swizzle * line + stride * group
            linear += 16 * (chunk % wide) + leading * (chunk // wide)
        # In lines of 128 bytes, the chunk's number is changed by the line's.
        number, slot = linear // 128, linear % 128 // 16
        return number * 128 + 16 * (slot ^ (number % (self.swizzle // 16)))

    def store(self, image: np.ndarray, matrix: np.ndarray) -> None:
        """Writes [rows, k] raw elements into the bytes of shared memory."""
        source = matrix.T if self.mn_major else matrix
        rows = np.ascontiguousarray(source).view(np.uint8).reshape(source.shape[0], -1, 16)
        for row in range(rows.shape[0]):
            for chunk in range(rows.shape[1]):
                at = self.place(row, chunk)
                image[at : at + 16] = rows[row, chunk]


def place_d(thread: int, i: int) -> tuple[int, int]:
    """Row and column of element i of a thread's fragment of D (64 x n)."""
    warp, lane = divmod(thread, 32)
    row = 16 * warp + lane // 4 + 8 * (i // 2 % 2)
    return row, 8 * (i // 4) + 2 * (lane % 4) + i % 2
