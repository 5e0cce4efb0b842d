"""The simulator's shared library: where it is, and its C functions."""

from __future__ import annotations

import ctypes
import functools
import importlib.util
import os
from pathlib import Path


class SimulatorError(RuntimeError):
    """A launch that failed, or PTX that cannot be run; ``code`` is the CUDA runtime's number."""

    def __init__(self, message: str, code: int = 0):
        super().__init__(message)
        self.code = code


class OptionsStruct(ctypes.Structure):
    """Mirrors PythonOptions in csrc/simulator/runtime/control.cpp."""

    _fields_ = (
        ("seed", ctypes.c_uint64),
        ("hang_budget", ctypes.c_uint64),
        ("async_timing", ctypes.c_uint32),
        ("max_sms", ctypes.c_uint32),
        ("max_findings", ctypes.c_uint32),
        ("threads", ctypes.c_uint32),
        ("memcheck", ctypes.c_uint8),
        ("initcheck", ctypes.c_uint8),
        ("racecheck", ctypes.c_uint8),
        ("synccheck", ctypes.c_uint8),
    )


def library_path() -> Path:
    """The shared library, which also is the ``libcudart.so.13`` that simulated programs load.

    ``FUSED_PEFT_SIMULATOR_LIBRARY`` names another build of it.

    Raises:
        SimulatorError: the package was built without the simulator.
    """
    override = os.environ.get("FUSED_PEFT_SIMULATOR_LIBRARY")
    if override:
        return Path(override)
    spec = importlib.util.find_spec("fused_peft._C")
    if spec is not None and spec.origin is not None:
        path = Path(spec.origin).parent / "simulator" / "libfused_peft_simulator.so"
        if path.exists():
            return path
    raise SimulatorError(
        "fused_peft was built without the simulator: it is built where nvcc is found, or with "
        "-C cmake.define.FUSED_PEFT_SIMULATOR=ON"
    )


def is_available() -> bool:
    """Whether the package was built with the simulator."""
    try:
        library_path()
    except SimulatorError:
        return False
    return True


@functools.cache
def library() -> ctypes.CDLL:
    """The library, loaded once, with the types of its functions declared."""
    lib = ctypes.CDLL(str(library_path()))
    text, pointer = ctypes.c_char_p, ctypes.c_void_p
    signatures = {
        "load": (pointer, [text]),
        "unload": (None, [pointer]),
        "kernels": (text, [pointer]),
        "params": (text, [pointer, text]),
        "launch": (
            ctypes.c_int,
            [
                pointer,
                text,
                ctypes.POINTER(ctypes.c_uint32),
                ctypes.c_uint32,
                ctypes.c_int,
                ctypes.POINTER(pointer),
            ],
        ),
        "register": (None, [pointer, ctypes.c_uint64, ctypes.c_int, text]),
        "unregister": (ctypes.c_int, [pointer]),
        "message": (text, []),
        "report": (text, []),
        "reset": (None, []),
        "use_device": (ctypes.c_int, [text]),
        "device": (text, []),
        "get_options": (None, [ctypes.POINTER(OptionsStruct)]),
        "set_options": (None, [ctypes.POINTER(OptionsStruct)]),
    }
    for name, (result, arguments) in signatures.items():
        function = getattr(lib, f"fused_peft_sim_{name}")
        function.restype = result
        function.argtypes = arguments
    return lib


def call(name: str, *arguments: object) -> object:
    """Calls ``fused_peft_sim_<name>``."""
    return getattr(library(), f"fused_peft_sim_{name}")(*arguments)


def text_of(result: object) -> str:
    """A ``const char*`` result as str."""
    assert isinstance(result, bytes)
    return result.decode()


def message() -> str:
    """The words behind the last error."""
    return text_of(call("message"))
