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

GEMM = "gemm_dual_bf16_sm90.cu"
FORWARD, BACKWARD = (f"lora_single_{name}_bf16_sm90.cu" for name in ("forward", "backward"))
KERNEL, CONSUMER = "gemm_dual_sm90.cuh", "gemm_consumer_sm90.cuh"
LAYER, LAYER_TILE, LAYER_CONSUMER, DLORA_B = (
    f"lora_single_{name}sm90.cuh" for name in ("", "tile_", "consumer_", "dlora_b_")
)
# What it breaks: (header, text, text instead).
GEMM_FAULTS = {
    "wrong phase bit": (
        KERNEL, "wait(shared.full(ring.stage), ring.phase)",
        "wait(shared.full(ring.stage), ring.phase ^ 1)"),
    "phase not flipped when a warpgroup skips stages": (
        "ring_sm90.cuh", "phase ^= stage / kStages & 1;", ""),
    "stage filled before it is free": (
        KERNEL, "ptx::mbarrier_wait(shared.empty(ring.stage), ring.phase ^ 1);", ""),
    "stage given back before its products are done": (
        KERNEL, "product.template wait<1>();\n", "product.template wait<2>();\n"),
    "last stage given back early, its products read": (
        KERNEL, "  product.template wait<0>();\n  release_stage", "  release_stage"),
    "stage given back to this CTA alone": (
        KERNEL, "lane < cluster) {", "lane == static_cast<int32_t>(ptx::cluster_cta_rank())) {"),
    "barriers used before they are known to the cluster": (
        KERNEL, "    ptx::cluster_sync();\n  else", "    ptx::cluster_cta_rank();\n  else"),
    "second source's a not switched": (
        KERNEL, "&p.a[source], k, m0", "&p.a[0], k, m0"),
    "mask made while a buffer is still copied out": (
        KERNEL, "ptx::bulk_wait_read<0>();\n      __syncwarp();\n      make",
        "__syncwarp();\n      make"),
    "other warpgroup's stages not skipped": (
        KERNEL, "      ring.advance(k_tiles);\n    }\n    store", "    }\n    store"),
    "missing proxy fence": (CONSUMER, "ptx::fence_proxy_async_shared();", ""),
    "store buffer filled while it is copied out": (
        CONSUMER, "ptx::bulk_wait_read<1>();", "ptx::bulk_wait_read<2>();"),
}  # fmt: skip

SINGLE_FAULTS = {
    "dropped flag wait": (
        LAYER_CONSUMER, "    while (ptx::load_acquire(flag(m0)) != epoch + 1) {\n    }\n", ""),
    "wait without acquire": (LAYER_CONSUMER, "ptx::load_acquire(flag", "ptx::load_relaxed(flag"),
    "published without release": (
        LAYER_CONSUMER, "ptx::store_release(flag(m0)", "ptx::store_relaxed(flag(m0)"),
    "published before it is there": (
        LAYER_CONSUMER, "const uint32_t last = multiply_k<true>();",
        "if (threadIdx.x % 32 == 0) ptx::store_release(flag(m0), epoch + 1);\n"
        "        const uint32_t last = multiply_k<true>();"),
    "state cleared by the first CTA that is done": (
        LAYER, "!= gridDim.x / p.cluster - 1", ">= gridDim.x"),
    "counter not set back": (LAYER, "  ptx::store_relaxed(&state->next_tile, 0);\n", ""),
    "epoch not advanced": (LAYER, "  ptx::store_relaxed(&state->epoch, epoch + 1);\n", ""),
    "reversed tile order": (
        LAYER, "tile = taken < cluster_rows(p) * p.tiles_n ? taken : -1;",
        "tile = cluster_rows(p) * p.tiles_n - 1 - taken;"),
    "slot of a tile written again before it is read": (
        LAYER,
        "  ptx::mbarrier_wait_cluster(shared.tile_empty(slot.stage), slot.phase ^ 1);\n", ""),
    "update multiplied before it is there": (
        LAYER_CONSUMER,
        "    ptx::mbarrier_wait(shared.full(ring.stage), ring.phase);\n#pragma unroll\n",
        "#pragma unroll\n"),
    "last stage given back early": (
        LAYER_CONSUMER, "        product.template wait<0>();\n        release(last);\n      }",
        "        release(last);\n        product.template wait<0>();\n      }"),
    "clusters: stage given back to this CTA alone": (
        KERNEL, "lane < cluster) {", "lane == static_cast<int32_t>(ptx::cluster_cta_rank())) {"),
    "clusters: barriers used before they are known": (
        LAYER, "    ptx::cluster_sync();\n  else\n    __syncthreads();",
        "    ptx::cluster_cta_rank();\n  else\n    __syncthreads();"),
    "clusters: a CTA leaves while the other copies into it": (
        LAYER, "  if (p.cluster > 1) ptx::cluster_sync();\n}", "}"),
    "clusters: next tile sent before the other CTA has read the last": (
        LAYER_TILE, "(Tile::kWarps + Tile::kSideWarps + 1) * cluster)",
        "Tile::kWarps + Tile::kSideWarps + 1)"),
    "clusters: both CTAs count themselves out": (
        LAYER, "if (leader) leave(p, epoch);", "leave(p, epoch);"),
    "clusters: both CTAs take the same rows": (
        LAYER_TILE, "static_cast<int32_t>(ptx::cluster_cta_rank())) * Tile::BLOCK_M",
        "0) * Tile::BLOCK_M"),
}  # fmt: skip

BACKWARD_FAULTS = {
    "dlora_b: block read before it is there": (
        DLORA_B, "        ptx::mbarrier_wait(shared.full(ring.stage), ring.phase);\n", ""),
    "dlora_b: stage given back before it is read": (
        LAYER_TILE, "(empty(stage), (Tile::kWarps + Tile::kSideWarps) * cluster)",
        "(empty(stage), Tile::kWarps * cluster)"),
    "dlora_b: s replaced while the other warp uses it": (
        DLORA_B, "    ptx::barrier_sync(kBarrier, kThreads);  // the s", "    // the s"),
    "dlora_b: s used before the other warp has written it": (
        DLORA_B, "    }\n    ptx::barrier_sync(kBarrier, kThreads);\n", "    }\n"),
    "tile taken before it is there": (
        LAYER_TILE, "  ptx::mbarrier_wait(shared.tile_full(slot.stage), slot.phase);\n", ""),
    "dlora_b: tile slot given back by some warps": (
        LAYER_TILE, "(Tile::kWarps + Tile::kSideWarps + 1) * cluster)",
        "(Tile::kWarps + 1) * cluster)"),
    "dlora_b: a block left to nobody": (
        DLORA_B, "mine += p.tiles_n * Tile::BLOCK_K;", "mine += (p.tiles_n + 1) * Tile::BLOCK_K;"),
    "dlora_b: update's stage not counted": (
        DLORA_B, "k < p.k + Tile::BLOCK_K; k +=", "k < p.k; k +="),
    "dlora_b: part of another row of tiles": (
        DLORA_B, "int64_t{m0 / Tile::BLOCK_M}", "int64_t{0}"),
    "lora_b's lines taken for 64 k": (
        LAYER_CONSUMER, "tile + step * kWgmmaK * kLine,", "tile + step * kWgmmaK * 2,"),
    "ds not fetched": (
        LAYER_CONSUMER, "a[i] = exists ? *ds_pair(row, column) : 0;", "a[i] = 0;"),
}  # fmt: skip

# Each kernel with and without clusters and masks, several tiles a CTA.
GEMM_CHECK = """
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
# One CTA for all tiles, a CTA a tile, and in between, one launch after another.
SINGLE_CHECK = """
import itertools, sys, torch
sys.path.insert(0, sys.argv[1])
from backends import relative_error
from test_lora_ops import exact, make, run
from fused_peft import ops, simulator

problems = [((257, 520, 72, 24), 4), ((130, 264, 136, 16), 1), ((130, 520, 72, 16), 7),
            ((257, 200, 264, 16), 5), ((130, 392, 264, 40), 2), ((385, 264, 520, 16), 1),
            ((385, 264, 520, 16), 5)]
for timing, (shape, num_sms), seed in itertools.product(
    ["late", "early", "random"], problems, range(2)
):
    t = make(*shape, torch.bfloat16, torch.bfloat16, seed=seed)
    simulator.reset()
    with (
        simulator.simulated_cuda(),
        simulator.options(seed=seed, async_timing=timing, max_sms=num_sms, hang_budget=200000),
    ):
        ours = run(ops.lora_linear, t, scaling=0.7)
    for finding in simulator.findings():
        sys.exit(f"finding: {finding.kind} at {finding.source}")
    assert any("lora_single" in launch.kernel for launch in simulator.counters())
    for name, truth in exact(t, scaling=0.7).items():
        error = relative_error(ours[name], truth)
        if not error < 1e-2:
            sys.exit(f"{name}: {error}")
"""


@pytest.mark.parametrize(
    ("source", "check"),
    [(GEMM, GEMM_CHECK), (FORWARD, SINGLE_CHECK), (BACKWARD, SINGLE_CHECK)],
)
def test_kernels_as_they_are_pass(source, check, tmp_path):
    done = run_check(build(tmp_path, source), check)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("name", GEMM_FAULTS)
def test_fault_of_the_gemm_is_seen(name, tmp_path):
    assert_seen(run_check(build(tmp_path, GEMM, Fault(*GEMM_FAULTS[name])), GEMM_CHECK))


@pytest.mark.parametrize("name", SINGLE_FAULTS)
def test_fault_of_the_single_launch_is_seen(name, tmp_path):
    assert_seen(run_check(build(tmp_path, FORWARD, Fault(*SINGLE_FAULTS[name])), SINGLE_CHECK))


@pytest.mark.parametrize("name", BACKWARD_FAULTS)
def test_fault_of_the_way_back_is_seen(name, tmp_path):
    assert_seen(run_check(build(tmp_path, BACKWARD, Fault(*BACKWARD_FAULTS[name])), SINGLE_CHECK))
