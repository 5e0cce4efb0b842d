"""Deliberate faults in the CUDA kernels: each must turn a check red.

A changed copy of csrc/kernels is compiled for bfloat16, linked with the other objects of the build
folder into another simulated_cuda.so, and checked in a process of its own.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from cuda_programs import NVCC

from fused_peft import simulator

ROOT = Path(__file__).parents[1]
BINDING = "CMakeFiles/simulated_cuda.dir/csrc/binding/lora_linear_cuda.cpp.o"
BUILD = next((p.parents[4] for p in ROOT.glob(f"build/*/{BINDING}")), None)

pytestmark = pytest.mark.skipif(
    not simulator.has_kernels() or NVCC is None or BUILD is None,
    reason="needs nvcc and the build folder of an editable install",
)

GEMM, BACKWARD, SKINNY = "gemm_dual", "lora_backward", "lora_skinny"
# What it breaks: (source that is compiled, header, text, text instead).
FAULTS = {
    "wait leaves one group too many pending": (
        GEMM, "gemm_dual_sm80.cuh", "cp_async_wait<kStages - 2>()", "cp_async_wait<kStages - 1>()"),
    "no barrier before a stage is filled again": (
        GEMM, "gemm_dual_sm80.cuh",
        "ptx::cp_async_wait<kStages - 2>();\n    __syncthreads();",
        "ptx::cp_async_wait<kStages - 2>();"),
    "a stage too far on": (
        GEMM, "gemm_dual_sm80.cuh", "fill(tile + kStages - 1, next_slot)",
        "fill(tile + kStages - 1, slot)"),
    "row predicate off by one": (
        GEMM, "gemm_dual_sm80.cuh", "m0 + row + 32 * i < m}", "m0 + row + 32 * i <= m}"),
    "fragments swapped": (
        GEMM, "gemm_dual_sm80.cuh", "acc[i][2 * pair], a[i], b[0], b[1]",
        "acc[i][2 * pair], a[i], b[1], b[0]"),
    "tail of a row written unmasked": (
        GEMM, "gemm_dual_sm80.cuh", "e < kChunk && n + e < p.n; ++e", "e < kChunk; ++e"),
    "bias added twice": (
        GEMM, "gemm_dual_sm80.cuh", "acc[i][j][2 * half] + add[0]",
        "acc[i][j][2 * half] + 2 * add[0]"),
    "mask applied a tile late": (
        GEMM, "gemm_dual_sm80.cuh", "tile + 1 == tiles_first", "tile == tiles_first"),
    "one warp's partial sum lost": (
        BACKWARD, "lora_backward_sm80.cuh", "for (int w = 1; w < kWarps; ++w) sum += sums[(w * kP",
        "for (int w = 2; w < kWarps; ++w) sum += sums[(w * kP"),
    "dropout counters of another element": (
        BACKWARD, "lora_backward_sm80.cuh", "static_cast<uint64_t>(m * p.k + k)",
        "static_cast<uint64_t>(m * p.k + k + 4)"),
    "no barrier before the sums are read": (
        BACKWARD, "lora_backward_sm80.cuh", "  __syncthreads();\n  for (int i = threadIdx.x; i < r",
        "  for (int i = threadIdx.x; i < r"),
    "ds not scaled": (
        BACKWARD, "lora_backward_sm80.cuh", "sum = scaled(sum, p.scaling);", ""),
    "missing rows not filled with zeros": (
        BACKWARD, "lora_backward_sm80.cuh", "for (int i = thread; i < rows * (kRank / kChunk)",
        "for (int i = thread; i < (rows < valid_rows ? rows : valid_rows) * (kRank / kChunk)"),
    "one part of dlora_b lost": (
        BACKWARD, "lora_backward_sm80.cuh", "part < p.count", "part + 1 < p.count"),
    "s not scaled": (
        SKINNY, "lora_down_sm80.cuh",
        "if (column < r) p.s[m * r + column] = scaled(sum, p.scaling);",
        "if (column < r) p.s[m * r + column] = sum;"),
    "decode leaves a warp's share of k out": (
        SKINNY, "skinny_sm80.cuh", "for (int w = 1; w < kSkinnyWarps; ++w)",
        "for (int w = 2; w < kSkinnyWarps; ++w)"),
}  # fmt: skip

CHECK = """
import itertools, sys, torch
sys.path.insert(0, sys.argv[1])
from backends import relative_error
from test_lora_ops import exact, make, run
from fused_peft import ops, simulator

for shape, p, timing in itertools.product(
    [(70, 136, 264, 24), (9, 40, 328, 8), (41, 44, 72, 8)], [0.0, 0.5], ["late", "early"]
):
    t = make(*shape, torch.bfloat16, torch.bfloat16)
    options = {"scaling": 0.7, "dropout_p": p, "seed": torch.tensor(5)}
    simulator.reset()
    with simulator.simulated_cuda(), simulator.options(async_timing=timing, max_sms=2):
        ours = run(ops.lora_linear, t, **options)
    for finding in simulator.findings():
        sys.exit(f"finding: {finding.kind} at {finding.source}")
    for name, truth in exact(t, **options).items():
        error = relative_error(ours[name], truth)
        if not error < 1e-2:
            sys.exit(f"{name}: {error}")
"""


def build(
    folder: Path, source: str, header: str = "", *changes: str, architecture: str = "80"
) -> Path:
    """A simulated_cuda.so with texts of one header changed: old, new, old, new ..."""
    kernels = folder / "kernels"
    shutil.copytree(ROOT / "csrc/kernels", kernels)
    if header:
        path = kernels / "cuda" / header
        text = path.read_text()
        for old, new in zip(changes[::2], changes[1::2], strict=True):
            assert old in text, "the kernel has changed: this fault needs another text"
            text = text.replace(old, new)
        path.write_text(text)
    name = f"{source}_bf16_sm{architecture}.cu"
    subprocess.run(
        [NVCC, "-std=c++17", "-O3", "-DNDEBUG", "--extended-lambda", "--expt-relaxed-constexpr",
         "-lineinfo", "--no-compress", "-Xcompiler=-fPIC", "-cudart", "none", f"-I{folder}",
         "-gencode", f"arch=compute_{architecture},code=compute_{architecture}",
         "-c", "-o", str(folder / "changed.o"), str(kernels / "cuda" / name)],
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


def check(library: Path, script: str = CHECK) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", script, str(ROOT / "tests")],
        env={**os.environ, "FUSED_PEFT_SIMULATED_CUDA_LIBRARY": str(library)},
        capture_output=True, text=True, timeout=300,
    )  # fmt: skip


@pytest.mark.parametrize("source", [GEMM, BACKWARD, SKINNY])
def test_kernels_as_they_are_pass(source, tmp_path):
    done = check(build(tmp_path, source))
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("fault", FAULTS)
def test_fault_is_seen(fault, tmp_path):
    done = check(build(tmp_path, *FAULTS[fault]))
    assert done.returncode != 0
    assert done.stderr.splitlines()[-1].startswith(("finding:", "y:", "dx:", "dlora", "RuntimeErr"))
