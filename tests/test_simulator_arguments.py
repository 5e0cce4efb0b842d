"""What a launch from Python takes as dimensions and arguments, and how it refuses the rest."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from simulator_kernels import needs_simulator

from fused_peft import simulator

pytestmark = needs_simulator

# Stores its second parameter, of 1, 4 or 8 bytes, to the array at the first.
STORE = """.version 8.7
.target sm_80
.address_size 64
.visible .entry k(.param .u64 out, .param .{kind} value) {{
  .reg .b64 %rd<2>;
  .reg .{register} %v;
  ld.param.u64 %rd0, [out];
  ld.param.{kind} %v, [value];
  st.global.{kind} [%rd0], %v;
  ret;
}}
"""
KINDS = {1: ("u8", "b16", np.uint8), 4: ("u32", "b32", np.uint32), 8: ("u64", "b64", np.uint64)}


def stored(value: object, size: int, grid: Any = 1, block: Any = 1) -> int:
    kind, register, dtype = KINDS[size]
    out = np.zeros(1, dtype)
    simulator.launch(STORE.format(kind=kind, register=register), "k", grid, block, [out, value])
    return int(out[0])


@pytest.mark.parametrize("dim", [1, np.int64(1), (1, 1), (np.int32(1),), np.array([1, 1, 1])])
def test_dimensions_of_any_integers(dim: Any) -> None:
    assert stored(7, 4, grid=dim, block=dim) == 7


@pytest.mark.parametrize("dim", [1.0, "1", None, (1.5,), (1, 1, 1, 1), (), -1, (1, -1)])
def test_dimensions_that_are_none(dim: Any) -> None:
    with pytest.raises(
        ValueError, match="grid, block, cluster: expected one to three numbers >= 0, got"
    ):
        stored(7, 4, grid=dim)


@pytest.mark.parametrize(
    ("value", "size", "expected"),
    [
        (255, 1, 255),
        (-1, 1, 255),
        (2**32 - 1, 4, 2**32 - 1),
        (np.uint8(9), 1, 9),
        (1.0, 4, 0x3F800000),
        (1.0, 8, 0x3FF0000000000000),
        (b"\x01\x02\x03\x04", 4, 0x04030201),
        (True, 1, 1),
    ],
)
def test_arguments_by_value(value: object, size: int, expected: int) -> None:
    assert stored(value, size) == expected


@pytest.mark.parametrize(
    ("value", "size", "error", "message"),
    [
        (256, 1, ValueError, "args: value has 1 bytes, too few for 256"),
        (-129, 1, ValueError, "args: value has 1 bytes, too few for -129"),
        (2**64, 8, ValueError, "args: value has 8 bytes, too few for"),
        (1.0, 1, TypeError, "args: value has 1 bytes, a float 2, 4 or 8"),
        (np.uint64(9), 4, ValueError, "args: value has 4 bytes, the argument 8"),
        (np.zeros(4), 4, TypeError, "args: value has 4 bytes, an array is a pointer of 8"),
        (None, 4, TypeError, "args: value is NoneType"),
        (np.zeros((4, 4))[:, ::2], 8, ValueError, "args: the array for value is not contiguous"),
    ],
)
def test_arguments_that_do_not_fit(
    value: object, size: int, error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        stored(value, size)
