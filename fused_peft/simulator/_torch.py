"""CPU tensors through the CUDA kernels: the same binding source, built against the simulator."""

from __future__ import annotations

import contextlib
import ctypes
import functools
import os
from collections.abc import Iterator
from pathlib import Path

import torch

from fused_peft.ops._devices import set_simulating
from fused_peft.simulator._library import SimulatorError, library, library_path


def kernels_path() -> Path:
    """The CUDA kernels and their binding, built against the simulator.

    ``FUSED_PEFT_SIMULATED_CUDA_LIBRARY`` names another build of them.

    Raises:
        SimulatorError: the package was built without the simulator or without CUDA kernels.
    """
    override = os.environ.get("FUSED_PEFT_SIMULATED_CUDA_LIBRARY")
    path = Path(override) if override else library_path().parent / "simulated_cuda.so"
    if not path.exists():
        raise SimulatorError(f"{path} does not exist: fused_peft was built without CUDA kernels")
    return path


def has_kernels() -> bool:
    """Whether :func:`fused_peft.simulated_cuda` can be entered."""
    try:
        kernels_path()
    except SimulatorError:
        return False
    return True


@functools.cache
def load_kernels() -> None:
    """Loads the CUDA kernels that were built against the simulator; registers their torch ops.

    Raises:
        SimulatorError: the package was built without the simulator or without CUDA kernels.
    """
    library()
    path = kernels_path()
    # Its own symbols first: a CUDA build of torch brings the real runtime's of the same names.
    ctypes.CDLL(str(path), mode=os.RTLD_LOCAL | os.RTLD_DEEPBIND)
    torch.ops.load_library(str(path))  # type: ignore[no-untyped-call]


@contextlib.contextmanager
def simulated_cuda() -> Iterator[None]:
    """Within the context, layers on CPU tensors run the CUDA kernels in the simulator.

    Forward and backward passes both: enter it around the whole step. What the kernels did is in
    :func:`fused_peft.simulator.counters`, what the sanitizers found in
    :func:`fused_peft.simulator.findings`. Dtypes without a CUDA kernel run plain torch.
    Not for compiled models, which keep the CPU kernels. Contexts may be nested.

    Raises:
        SimulatorError: the package was built without the simulator or without CUDA kernels.
    """
    load_kernels()
    before = set_simulating(True)
    try:
        yield
    finally:
        set_simulating(before)
