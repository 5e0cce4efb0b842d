"""Building CUDA programs with nvcc, unmodified, and running them under the simulator."""

from __future__ import annotations

import importlib.util
import json
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from fused_peft import simulator

NVCC = shutil.which("nvcc") or shutil.which("nvcc", path="/usr/local/cuda/bin")


def cutlass() -> Path:
    """The sources inside the PyPI package nvidia-cutlass."""
    spec = importlib.util.find_spec("cutlass_library")
    assert spec is not None, "requirements-dev.txt installs nvidia-cutlass"
    return Path(spec.submodule_search_locations[0]) / "source"


def build(source: Path, target: Path, architecture: str) -> Path:
    """Compiles a program to plain PTX for one architecture ("80", "90a") and links it."""
    folder = cutlass()
    subprocess.run(
        [
            NVCC, "-std=c++17", "-O3", "-DNDEBUG", "-lineinfo", "--no-compress",
            "-cudart", "shared", "--expt-relaxed-constexpr",
            f"-I{folder / 'include'}", f"-I{folder / 'tools/util/include'}",
            "-gencode", f"arch=compute_{architecture},code=compute_{architecture}",
            "-o", str(target), str(source),
        ],
        check=True, capture_output=True, text=True,
    )  # fmt: skip
    return target


@dataclass
class Run:
    code: int
    output: str
    errors: str
    counters: list[simulator.Counters]
    findings: list[simulator.Finding]
    buffers: Path

    def buffer(self, number: int, dtype: type, shape: tuple[int, ...]) -> np.ndarray:
        """Contents of the program's n-th device buffer when it was freed."""
        return np.fromfile(self.buffers / f"{number}.bin", dtype).reshape(shape)


def run(
    program: Path, folder: Path, *arguments: object, device: str = "h100", seed: int = 0
) -> Run:
    """Runs a built program with all checks on."""
    report, buffers = folder / "report.json", folder / "buffers"
    done = subprocess.run(
        [
            sys.executable, "-m", "fused_peft.simulator", "run",
            "--device", device, "--seed", str(seed), "--json", str(report), "--dump", str(buffers),
            str(program), *map(str, arguments),
        ],
        capture_output=True, text=True, timeout=600,
    )  # fmt: skip
    results = json.loads(report.read_text())
    return Run(
        done.returncode,
        done.stdout,
        done.stderr,
        [simulator._results.counters_from(c) for c in results["counters"]],
        [simulator._results.finding_from(f) for f in results["findings"]],
        buffers,
    )
