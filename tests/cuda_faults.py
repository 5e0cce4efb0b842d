"""Deliberate faults in the CUDA kernels: a changed copy is compiled, linked, and run by a check.

A changed copy of csrc/kernels is compiled for bfloat16 and linked with the other objects of the
build folder into another simulated_cuda.so; the check runs in a process of its own.
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


class Fault(NamedTuple):
    """A text of a file of csrc/kernels/cuda and what stands there instead."""

    header: str
    old: str
    new: str


def build(folder: Path, source: str, *faults: Fault) -> Path:
    """A simulated_cuda.so whose ``source``, a file of csrc/kernels/cuda, has the faults."""
    kernels = folder / "kernels"
    shutil.copytree(ROOT / "csrc/kernels", kernels)
    for fault in faults:
        path = kernels / "cuda" / fault.header
        text = path.read_text()
        assert fault.old in text, "the kernel has changed: this fault needs another text"
        path.write_text(text.replace(fault.old, fault.new))
    arch = "compute_90a" if "sm90" in source else "compute_80"
    subprocess.run(
        [NVCC, "-std=c++17", "-O3", "-DNDEBUG", "-DFUSED_PEFT_SM90A", "--extended-lambda",
         "--expt-relaxed-constexpr", "-lineinfo", "--no-compress", "-Xcompiler=-fPIC",
         "-cudart", "none", f"-I{folder}", "-gencode", f"arch={arch},code={arch}",
         "-c", "-o", str(folder / "changed.o"), str(kernels / "cuda" / source)],
        check=True, capture_output=True, text=True,
    )  # fmt: skip
    archive = folder / "kernels.a"
    shutil.copy(BUILD / "libfused_peft_cuda_simulated.a", archive)
    subprocess.run(["ar", "d", str(archive), f"{source}.o"], check=True)
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


def run_check(library: Path, program: str) -> subprocess.CompletedProcess[str]:
    """A Python program on that library, with tests/ as its first argument."""
    return subprocess.run(
        [sys.executable, "-c", program, str(ROOT / "tests")],
        env={**os.environ, "FUSED_PEFT_SIMULATED_CUDA_LIBRARY": str(library)},
        capture_output=True, text=True, timeout=300,
    )  # fmt: skip


def forward_check(problems: str, options: str) -> str:
    """A program that runs the layer's forward kernels on (shape, dropout_p, timing) in a list."""
    return f"""
import sys, torch
sys.path.insert(0, sys.argv[1])
from backends import relative_error
from test_lora_ops import make
from fused_peft import reference, simulator

simulator._torch.load_kernels()
for shape, p, timing in {problems}:
    t = make(*shape, torch.bfloat16, torch.bfloat16)
    operands = [t[name] for name in ("x", "weight", "lora_a", "lora_b", "bias")]
    simulator.reset()
    with simulator.simulated_cuda(), simulator.options(async_timing=timing, {options}):
        y, s = torch.ops.fused_peft_simulated.lora_linear(*operands, 0.7, p, torch.tensor(5))
    for finding in simulator.findings():
        sys.exit(f"finding: {{finding.kind}} at {{finding.source}}")
    kwargs = {{"dropout_p": p, "seed": torch.tensor(5)}} if p else {{}}
    truth = reference.lora_linear(*(o.double() for o in operands), scaling=0.7, **kwargs)
    error = relative_error(y, truth)
    if not error < 1e-2:
        sys.exit(f"y: {{error}}")
"""


def backward_check(problems: str, options: str) -> str:
    """The same of the narrow passes of its backward kernels, without dx.

    A problem is (shape, dropout_p, timing, the factors' type).
    """
    return f"""
import sys, torch
sys.path.insert(0, sys.argv[1])
from backends import relative_error
from test_lora_ops import make
from fused_peft import reference, simulator

simulator._torch.load_kernels()
for shape, p, timing, factor in {problems}:
    t = make(*shape, torch.bfloat16, getattr(torch, factor))
    seed = torch.tensor(5)
    leaves = [t[name].double().requires_grad_() for name in ("x", "lora_a", "lora_b")]
    kwargs = {{"dropout_p": p, "seed": seed}} if p else {{}}
    y = reference.lora_linear(
        leaves[0], t["weight"].double(), leaves[1], leaves[2], scaling=0.7, **kwargs
    )
    truth = torch.autograd.grad(y, leaves[1:], t["dy"].double())
    operands = [t[name] for name in ("x", "weight", "lora_a", "lora_b")]
    _, s = torch.ops.fused_peft.lora_linear(*operands, None, 0.7, p, seed)
    simulator.reset()
    with simulator.simulated_cuda(), simulator.options(async_timing=timing, {options}):
        _, *ours, _ = torch.ops.fused_peft_simulated.lora_linear_backward(
            t["dy"], *operands, s, 0.7, p, seed, False, True, True, False
        )
    for finding in simulator.findings():
        sys.exit(f"finding: {{finding.kind}} at {{finding.source}}")
    for name, value, exact in zip(("dlora_a", "dlora_b"), ours, truth):
        error = relative_error(value, exact)
        if not error < 1e-2:
            sys.exit(f"{{name}}: {{error}}")
"""


def assert_seen(done: subprocess.CompletedProcess[str]) -> None:
    """The check has failed, by a finding, an error or a launch that could not go on."""
    assert done.returncode != 0
    last = done.stderr.splitlines()[-1]
    assert last.startswith(("finding:", "wrong:", "y:", "dx:", "dlora", "RuntimeError")), last
