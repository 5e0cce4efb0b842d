"""Changed copies of the CUDA kernels: compiled, linked and checked in a process of their own.

A changed copy of csrc/kernels is compiled for bfloat16, linked with the other objects of the build
folder into another simulated_cuda.so.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from cuda_programs import NVCC

from fused_peft import simulator

ROOT = Path(__file__).parents[1]
BINDING = "CMakeFiles/simulated_cuda.dir/csrc/binding/lora_linear_cuda.cpp.o"
BUILD = next((p.parents[4] for p in ROOT.glob(f"build/*/{BINDING}")), None)

needs_build_folder = pytest.mark.skipif(
    not simulator.has_kernels() or NVCC is None or BUILD is None,
    reason="needs nvcc and the build folder of an editable install",
)


class Edit(NamedTuple):
    """A text of a header in csrc/kernels/cuda, and what takes its place."""

    header: str
    old: str
    new: str


def build(folder: Path, source: str, *edits: Edit) -> Path:
    """A simulated_cuda.so whose ``{source}_bf16_sm80.cu`` is compiled from changed headers."""
    kernels = folder / "kernels"
    shutil.copytree(ROOT / "csrc/kernels", kernels)
    for header, old, new in edits:
        path = kernels / "cuda" / header
        text = path.read_text()
        assert old in text, "the kernel has changed: this fault needs another text"
        path.write_text(text.replace(old, new))
    name = f"{source}_bf16_sm80.cu"
    subprocess.run(
        [NVCC, "-std=c++17", "-O3", "-DNDEBUG", "--extended-lambda", "--expt-relaxed-constexpr",
         "-lineinfo", "--no-compress", "-Xcompiler=-fPIC", "-cudart", "none", f"-I{folder}",
         "-gencode", "arch=compute_80,code=compute_80", "-c", "-o", str(folder / "changed.o"),
         str(kernels / "cuda" / name)],
        check=True, capture_output=True, text=True,
    )  # fmt: skip
    archive = folder / "kernels.a"
    shutil.copy(BUILD / "libfused_peft_cuda_simulated.a", archive)
    subprocess.run(["ar", "d", str(archive), f"{name}.o"], check=True)
    binding = sorted((BUILD / BINDING).parent.glob("*.o"))
    library = folder / "simulated_cuda.so"
    simulated = simulator.library_path()
    subprocess.run(
        ["c++", "-shared", "-o", str(library), *map(str, binding), str(folder / "changed.o"),
         str(archive), str(simulated),
         str(Path(torch.__file__).parent / "lib/libtorch_cpu.so"),
         f"-Wl,-rpath,{simulated.parent}"],
        check=True, capture_output=True, text=True,
    )  # fmt: skip
    return library


def check(library: Path, script: str) -> subprocess.CompletedProcess[str]:
    """Runs a script, whose first argument is the folder of the tests, on a changed library."""
    return subprocess.run(
        [sys.executable, "-c", script, str(ROOT / "tests")],
        env={**os.environ, "FUSED_PEFT_SIMULATED_CUDA_LIBRARY": str(library)},
        capture_output=True, text=True, timeout=300,
    )  # fmt: skip
