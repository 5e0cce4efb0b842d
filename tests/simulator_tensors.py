"""Tensor maps and what a tensor copy does, in NumPy."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence

import numpy as np

from fused_peft.simulator._library import library

# CUtensorMapDataType
TYPES = {"u8": 0, "u16": 1, "u32": 2, "s32": 3, "f16": 6, "f32": 7, "f64": 8, "bf16": 9}
SWIZZLES = {0: 0, 32: 1, 64: 2, 128: 3}
INVALID_VALUE, NOT_SUPPORTED = 1, 801


def encode(
    array: np.ndarray,
    box: Sequence[int],
    *,
    swizzle: int = 0,
    element_strides: Sequence[int] | None = None,
    nan_fill: bool = False,
    dtype: str | None = None,
    changed: dict[str, object] | None = None,
) -> tuple[int, bytes]:
    """cuTensorMapEncodeTiled of a C-contiguous array; box and strides as NumPy's shape, outermost
    dimension first; ``changed`` are arguments of the driver's function that differ from what
    follows. Returns the driver's error code and the map's 128 bytes."""
    lib = library()
    function = ctypes.c_void_p()
    lib.cudaGetDriverEntryPointByVersion(
        b"cuTensorMapEncodeTiled",
        ctypes.byref(function),
        12000,
        ctypes.c_ulonglong(0),
        ctypes.c_void_p(),
    )
    assert function.value
    rank = array.ndim
    names = {"u1": "u8", "u2": "u16", "u4": "u32", "i4": "s32", "f2": "f16", "f4": "f32"}
    dtype = dtype or names.get(array.dtype.str[1:], "f64")
    buffer = ctypes.create_string_buffer(192)
    map_address = (ctypes.addressof(buffer) + 63) // 64 * 64
    values: dict[str, object] = {
        "map": map_address,
        "type": TYPES[dtype],
        "rank": rank,
        "address": array.ctypes.data,
        "dims": array.shape[::-1],
        "strides": array.strides[::-1][1:],
        "box": tuple(box)[::-1],
        "element_strides": tuple(element_strides or [1] * rank)[::-1],
        "interleave": 0,
        "swizzle": SWIZZLES[swizzle],
        "promotion": 0,
        "fill": int(nan_fill),
    } | (changed or {})
    wide, narrow = ctypes.c_uint64 * 5, ctypes.c_uint32 * 5
    encode_tiled = ctypes.CFUNCTYPE(
        ctypes.c_int,
        *(ctypes.c_void_p, ctypes.c_int, ctypes.c_uint32, ctypes.c_void_p),
        *(wide, wide, narrow, narrow),
        *(ctypes.c_int,) * 4,
    )(function.value)
    code = encode_tiled(
        values["map"],
        values["type"],
        values["rank"],
        values["address"],
        wide(*values["dims"]),  # type: ignore[misc]
        wide(*values["strides"]),  # type: ignore[misc]
        narrow(*values["box"]),  # type: ignore[misc]
        narrow(*values["element_strides"]),  # type: ignore[misc]
        *(values[name] for name in ("interleave", "swizzle", "promotion", "fill")),
    )
    return code, ctypes.string_at(map_address, 128)


def tensor_map(array: np.ndarray, box: Sequence[int], **settings: object) -> bytes:
    """The map's bytes; the arguments are sound."""
    code, data = encode(array, box, **settings)  # type: ignore[arg-type]
    assert code == 0
    return data


def indices_of_box(
    shape: Sequence[int], box: Sequence[int], start: Sequence[int], steps: Sequence[int]
) -> tuple[list[np.ndarray], np.ndarray]:
    """For each element of the box its indices in the tensor (clipped), and whether they are inside.
    Outermost dimension first."""
    axes = [
        np.arange(0, count, step) + first
        for count, first, step in zip(box, start, steps, strict=True)
    ]
    grid = np.meshgrid(*axes, indexing="ij")
    inside = np.ones(grid[0].shape, bool)
    for axis, size in zip(grid, shape, strict=True):
        inside &= (axis >= 0) & (axis < size)
    return [np.clip(g, 0, s - 1) for g, s in zip(grid, shape, strict=True)], inside


def swizzle_bytes(data: bytes, span: int) -> bytes:
    """Where shared memory that starts at a multiple of 1024 has the bytes: 16-byte pieces of each
    row of 128 bytes change places with the row's number (PTX ISA, swizzling modes)."""
    if span == 0:
        return data
    out = bytearray(len(data))
    for at in range(0, len(data), 16):
        row, piece = at // 128, at // 16 % 8
        piece ^= row % (span // 16)
        out[row * 128 + piece * 16 : row * 128 + piece * 16 + 16] = data[at : at + 16]
    return bytes(out)
