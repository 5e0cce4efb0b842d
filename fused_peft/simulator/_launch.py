"""Launching kernels of a PTX text on NumPy arrays."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from typing import Any

import numpy as np

from fused_peft.simulator._library import SimulatorError, call, message, text_of

Dim = int | np.integer[Any] | Sequence[int] | np.ndarray[Any, Any]


class Module:
    """A PTX text (or fat binary), parsed.

    Args:
        ptx: the text, as a compiler wrote it.

    Raises:
        SimulatorError: the text is not PTX.
    """

    def __init__(self, ptx: str | bytes):
        data = ptx.encode() if isinstance(ptx, str) else ptx
        self._handle = call("load", data)
        if not self._handle:
            raise SimulatorError(message())

    def __del__(self) -> None:
        handle = getattr(self, "_handle", None)
        if handle:
            call("unload", handle)

    @property
    def kernels(self) -> list[str]:
        """Mangled names of the entry functions."""
        return text_of(call("kernels", self._handle)).split()

    def parameters(self, kernel: str) -> list[tuple[str, int]]:
        """Name and size in bytes of each parameter.

        Raises:
            SimulatorError: there is no such kernel, or it has an instruction that the simulator
                does not implement.
        """
        self._check_name(kernel)
        lines = call("params", self._handle, kernel.encode())
        if lines is None:
            raise SimulatorError(message())
        pairs = (line.split() for line in text_of(lines).splitlines())
        return [(name, int(size)) for name, size in pairs]

    def launch(
        self,
        kernel: str,
        grid: Dim,
        block: Dim,
        args: Sequence[object],
        shared_bytes: int = 0,
        *,
        cluster: Dim = 1,
        cooperative: bool = False,
    ) -> None:
        """Runs the kernel to its end. See ``launch``."""
        sizes = self.parameters(kernel)
        if len(sizes) != len(args):
            raise ValueError(f"args: {kernel} takes {len(sizes)} parameters, got {len(args)}")
        values = [_argument(value, *size) for value, size in zip(args, sizes, strict=True)]
        pointers = (ctypes.c_void_p * len(values))(*(v.ctypes.data for v, _ in values))
        dims = (ctypes.c_uint32 * 9)(*_dim(grid), *_dim(block), *_dim(cluster))
        arrays = {a.ctypes.data: a for _, a in values if a is not None and a.nbytes}
        for address, array in arrays.items():
            call("register", address, array.nbytes, 1, f"array {array.shape}".encode())
        try:
            code = call(
                "launch",
                self._handle,
                kernel.encode(),
                dims,
                shared_bytes,
                int(cooperative),
                pointers,
            )
        finally:
            for address in arrays:
                call("unregister", address)
        if code:
            assert isinstance(code, int)
            raise SimulatorError(message() or f"CUDA error {code}", code)

    def _check_name(self, kernel: str) -> None:
        if kernel not in self.kernels:
            raise SimulatorError(f"kernel: no {kernel!r} in the module, which has {self.kernels}")


def load(ptx: str | bytes) -> Module:
    """Parses a PTX text; see ``Module``."""
    return Module(ptx)


def launch(
    ptx: str | bytes | Module,
    kernel: str,
    grid: Dim,
    block: Dim,
    args: Sequence[object],
    shared_bytes: int = 0,
    *,
    cluster: Dim = 1,
    cooperative: bool = False,
) -> None:
    """Runs a kernel of a PTX text on NumPy arrays, in place.

    Args:
        ptx: PTX text, or a ``Module`` made of it.
        kernel: mangled name of an entry function.
        grid: CTAs, one to three numbers, x first.
        block: threads of a CTA, likewise.
        args: one per parameter: a NumPy array (its memory is the device buffer; accesses outside
            it are findings), a NumPy scalar of the parameter's size, a Python int or float, or
            bytes for a struct.
        shared_bytes: dynamic shared memory.
        cluster: CTAs of a cluster, one to three numbers.
        cooperative: the grid must fit on the device at once.

    Raises:
        SimulatorError: the launch would fail on the device too (``code`` says how), the kernel
            faulted or hangs, or it uses what the simulator does not implement. Findings without a
            fault (races, uninitialised data) do not
            raise: see ``findings``.
        ValueError, TypeError: an argument does not fit the kernel's parameter.
    """
    module = ptx if isinstance(ptx, Module) else Module(ptx)
    module.launch(kernel, grid, block, args, shared_bytes, cluster=cluster, cooperative=cooperative)


def _dim(dim: Dim) -> tuple[int, int, int]:
    given = tuple(dim) if isinstance(dim, (Sequence, np.ndarray)) else (dim,)
    extents = [int(e) for e in given if isinstance(e, (int, np.integer)) and e >= 0]
    if not 1 <= len(given) <= 3 or len(extents) < len(given):
        raise ValueError(f"grid, block, cluster: expected one to three numbers >= 0, got {dim!r}")
    return (*extents, 1, 1)[:3]  # type: ignore[return-value]


def _argument(value: object, name: str, size: int) -> tuple[np.ndarray[Any, Any], Any]:
    """The parameter's bytes, and the array whose memory it points to (or None)."""
    if isinstance(value, np.ndarray):
        if size != 8:
            raise TypeError(f"args: {name} has {size} bytes, an array is a pointer of 8")
        if not value.flags.c_contiguous and not value.flags.f_contiguous:
            raise ValueError(f"args: the array for {name} is not contiguous")
        return np.array([value.ctypes.data], np.uint64), value
    if isinstance(value, bytes):
        data = np.frombuffer(value, np.uint8).copy()
    elif isinstance(value, np.generic):
        data = np.array([value])
    elif isinstance(value, float):
        dtype = {2: np.float16, 4: np.float32, 8: np.float64}.get(size)
        if dtype is None:
            raise TypeError(f"args: {name} has {size} bytes, a float 2, 4 or 8")
        data = np.array([value], dtype)
    elif isinstance(value, int):
        try:
            data = np.frombuffer(value.to_bytes(size, "little", signed=value < 0), np.uint8).copy()
        except OverflowError:
            raise ValueError(f"args: {name} has {size} bytes, too few for {value}") from None
    else:
        raise TypeError(
            f"args: {name} is {type(value).__name__}; an array, number or bytes it must be"
        )
    if data.nbytes != size:
        raise ValueError(f"args: {name} has {size} bytes, the argument {data.nbytes}")
    return data, None
