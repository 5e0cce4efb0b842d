"""Deliberate faults in the CUDA kernels for sm_80: each must turn a check red."""

from __future__ import annotations

import pytest
from cuda_faults import Fault, assert_seen, build, needs_build_folder, run_check

pytestmark = needs_build_folder

GEMM, BACKWARD, SKINNY = (
    f"{name}_bf16_sm80.cu" for name in ("gemm_dual", "lora_backward", "lora_skinny")
)
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
        BACKWARD, "lora_backward_sm80.cuh", "for (int w = 1; w < kWarps; ++w) sum += sums[(w * kR",
        "for (int w = 2; w < kWarps; ++w) sum += sums[(w * kR"),
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
    with (
        simulator.use_device("a100"),
        simulator.simulated_cuda(),
        simulator.options(async_timing=timing, max_sms=2),
    ):
        ours = run(ops.lora_linear, t, **options)
    for finding in simulator.findings():
        sys.exit(f"finding: {finding.kind} at {finding.source}")
    for name, truth in exact(t, **options).items():
        error = relative_error(ours[name], truth)
        if not error < 1e-2:
            sys.exit(f"{name}: {error}")
"""


@pytest.mark.parametrize("source", [GEMM, BACKWARD, SKINNY])
def test_kernels_as_they_are_pass(source, tmp_path):
    done = run_check(build(tmp_path, source), CHECK)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("name", FAULTS)
def test_fault_is_seen(name, tmp_path):
    source, *fault = FAULTS[name]
    assert_seen(run_check(build(tmp_path, source, Fault(*fault)), CHECK))
