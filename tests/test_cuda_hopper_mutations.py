"""Deliberate faults in the CUDA kernels for sm_90a: each must turn a check red."""

from __future__ import annotations

import pytest
from cuda_faults import Fault, assert_seen, build, needs_build_folder, run_check

from fused_peft import _C

pytestmark = [
    needs_build_folder,
    pytest.mark.skipif(
        "90" not in _C.build_info()["cuda_architectures"], reason="not built for sm_90"
    ),
]

SOURCE = "gemm_dual_bf16_sm90.cu"
KERNEL, CONSUMER = "gemm_dual_sm90.cuh", "gemm_consumer_sm90.cuh"
# What it breaks: (header, text, text instead).
FAULTS = {
    "wrong phase bit": (
        KERNEL, "wait(shared.full(ring.stage), ring.phase)",
        "wait(shared.full(ring.stage), ring.phase ^ 1)"),
    "phase not flipped when a warpgroup skips stages": (
        KERNEL, "phase ^= stage / kStages & 1;", ""),
    "stage filled before it is free": (
        KERNEL, "ptx::mbarrier_wait(shared.empty(ring.stage), ring.phase ^ 1);", ""),
    "stage given back before its products are done": (
        KERNEL, "product.template wait<1>();\n", "product.template wait<2>();\n"),
    "last stage given back early, its products read": (
        KERNEL, "  product.template wait<0>();\n  release_stage", "  release_stage"),
    "a stage's bytes expected in part": (
        KERNEL, "mbarrier_arrive_expect(full, Tile::kStageBytes)",
        "mbarrier_arrive_expect(full, Tile::kStageBytes / 2)"),
    "stage given back to this CTA alone": (
        KERNEL, "lane < cluster) {", "lane == static_cast<int32_t>(ptx::cluster_cta_rank())) {"),
    "halves of b swapped between the CTAs": (
        KERNEL, "shared.b(stage) + column * kLineBytes",
        "shared.b(stage) + (p.cluster == 1 ? column : Tile::BLOCK_N - columns - rank * columns +"
        " box * kSwizzledColumns) * kLineBytes"),
    "barriers used before they are known to the cluster": (
        KERNEL, "    ptx::cluster_sync();\n  else", "    ptx::cluster_cta_rank();\n  else"),
    "second source's a not switched": (
        KERNEL, "&p.a[source], k, m0", "&p.a[0], k, m0"),
    "a k step of the low-rank product lost": (
        KERNEL, "step * kWgmmaK < left", "(step + 1) * kWgmmaK < left"),
    "first product added to the last tile's": (
        KERNEL, "bool accumulate = false;", "bool accumulate = true;"),
    "mask over both products": (
        KERNEL, "kMask && source == 0", "kMask && source == 1"),
    "mask made while a buffer is still copied out": (
        KERNEL, "ptx::bulk_wait_read<0>();\n      __syncwarp();\n      make",
        "__syncwarp();\n      make"),
    "pingpong does every tile twice": (
        KERNEL, "walk.advance(Tile::kPingpong ? 2 : 1)", "walk.advance(1)"),
    "other warpgroup's stages not skipped": (
        KERNEL, "      ring.advance(k_tiles);\n    }\n    store", "    }\n    store"),
    "missing proxy fence": (CONSUMER, "ptx::fence_proxy_async_shared();", ""),
    "store buffer filled while it is copied out": (
        CONSUMER, "ptx::bulk_wait_read<1>();", "ptx::bulk_wait_read<2>();"),
    "one store buffer in place of two": (CONSUMER, "next ^= 1;", ""),
    "rows of b 4 apart": (
        CONSUMER, "Tile::BLOCK_K * kLineBytes, kPatternBytes)",
        "Tile::BLOCK_K * kLineBytes, kPatternBytes / 2)"),
    "second column's bias for both": (
        CONSUMER, "add[0] = Traits::to_float(bias[n]);", "add[0] = Traits::to_float(bias[n + 1]);"),
}  # fmt: skip

# Each kernel with and without clusters and masks, several tiles a CTA.
CHECK = """
import itertools, sys, torch
sys.path.insert(0, sys.argv[1])
from backends import relative_error
from test_lora_ops import exact, make, run
from fused_peft import ops, simulator

problems = [((385, 264, 72, 24), 2), ((200, 136, 200, 40), 3), ((256, 256, 520, 8), 5)]
for (shape, num_sms), timing, p in itertools.product(
    problems, ["late", "early", "random"], [0.0, 0.5]
):
    t = make(*shape, torch.bfloat16, torch.bfloat16)
    options = {"scaling": 0.7, "dropout_p": p, "seed": torch.tensor(5)}
    simulator.reset()
    with (
        simulator.simulated_cuda(),
        simulator.options(async_timing=timing, max_sms=num_sms, hang_budget=200000),
    ):
        ours = run(ops.lora_linear, t, **options)
    for finding in simulator.findings():
        sys.exit(f"finding: {finding.kind} at {finding.source}")
    for name, truth in exact(t, **options).items():
        error = relative_error(ours[name], truth)
        if not error < 1e-2:
            sys.exit(f"{name}: {error}")
"""


def test_kernels_as_they_are_pass(tmp_path):
    done = run_check(build(tmp_path, SOURCE), CHECK)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("name", FAULTS)
def test_fault_is_seen(name, tmp_path):
    assert_seen(run_check(build(tmp_path, SOURCE, Fault(*FAULTS[name])), CHECK))
