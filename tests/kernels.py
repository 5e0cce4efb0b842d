"""What the tests of the ops share: forcing an instruction set, and distances."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from torch import Tensor

from fused_peft import _C

ISAS = _C.available_cpu_isas()


@contextlib.contextmanager
def forced(isa: str) -> Iterator[None]:
    """The CPU kernels of one instruction set, whatever this processor would choose."""
    before = _C.cpu_isa()
    _C.set_cpu_isa(isa)
    try:
        yield
    finally:
        _C.set_cpu_isa(before)


def relative_error(out: Tensor, ref: Tensor) -> float:
    """``||out - ref|| / ||ref||``, or ``||out||`` where ref is zero; ref is float64."""
    norm = ref.norm()
    return ((out.double() - ref).norm() / norm if norm > 0 else (out.double() - ref).norm()).item()
