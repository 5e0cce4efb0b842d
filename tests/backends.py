"""What the tests of the ops share: forcing an instruction set or a device, and distances."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from torch import Tensor

from fused_peft import _C, simulator

ISAS = _C.available_cpu_isas()
# The CUDA kernels under the simulator, where the package was built with them.
SIMULATED_CUDA = "simulated-cuda"
BACKENDS = [*ISAS, *([SIMULATED_CUDA] if simulator.has_kernels() else [])]

# What a launch plan depends on.
H100 = {"num_sms": 132, "shared_per_block": 227 * 1024, "major": 9}
A100 = {"num_sms": 108, "shared_per_block": 163 * 1024, "major": 8}
RTX4090 = {"num_sms": 128, "shared_per_block": 99 * 1024, "major": 8}


@contextlib.contextmanager
def forced(isa: str) -> Iterator[None]:
    """The kernels of one instruction set, whatever this processor would choose.

    Or those of simulated CUDA, whose sanitizers must then find nothing.
    """
    if isa == SIMULATED_CUDA:
        simulator.reset()
        with simulator.simulated_cuda():
            yield
        assert simulator.findings() == []
        return
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
