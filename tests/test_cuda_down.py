"""lora_down of sm_90 in the simulator: choice, counts, many drawn problems, schedules, faults."""

from __future__ import annotations

import itertools

import pytest
import torch
from backends import A100, H100, SIMULATED_CUDA, forced
from cuda_faults import Fault, assert_seen, build, forward_check, needs_build_folder, run_check
from hypothesis import given, settings
from hypothesis import strategies as st
from test_lora_ops import assert_no_worse_than_torch, make

from fused_peft import _C, simulator

pytestmark = pytest.mark.skipif(
    not simulator.has_kernels(), reason="no nvcc, so no CUDA kernels were built"
)

KERNEL = "lora_down_sm90_kernel"
ROWS, BLOCK_K = 64, 64


@pytest.mark.parametrize(
    ("shape", "cluster"),
    [
        # 128 tiles of 64 rows, two CTAs an SM.
        ((8192, 4096, 4096, 16), 2),
        ((512, 4096, 4096, 64), 8),
        # No CTA without a k-block of 64.
        ((512, 4096, 192, 64), 2),
    ],
)
def test_cluster(shape, cluster):
    plan = _C.lora_linear_plan(*shape, dropout=True, **H100)["down"]
    assert plan["cluster"] == cluster
    assert plan["ctas"] == -(-shape[0] // ROWS) * cluster
    assert _C.lora_linear_plan(*shape, dropout=True, **A100)["down"]["cluster"] == 0
    assert _C.lora_linear_plan(*shape, aligned=False, **H100)["down"]["cluster"] == 0


def test_large_ranks_keep_the_sm80_kernel():
    for r, cluster in ((64, 8), (65, 0)):
        plan = _C.lora_linear_plan(512, 4096, 4096, r, dropout=True, **H100)
        assert plan["down"]["cluster"] == cluster


def forward(t, p=0.0):
    """y, s, and the counters of lora_down, which is the first of two launches."""
    operands = [t[name] for name in ("x", "weight", "lora_a", "lora_b", "bias")]
    simulator.reset()
    y, s = torch.ops.fused_peft_simulated.lora_linear(*operands, 0.7, p, torch.tensor(5))
    down, _ = simulator.counters()
    assert KERNEL in down.kernel
    return y, s, down


@pytest.mark.parametrize(
    ("r", "factor"),
    [(16, torch.bfloat16), (16, torch.float32), (64, torch.bfloat16), (64, torch.float32)],
    ids=str,
)
def test_reads_x_once_and_lora_a_once_a_tile(r, factor):
    m, n, k = 256, 1024, 1024
    # With dropout, which does not go in a single launch.
    with forced(SIMULATED_CUDA), simulator.options(max_sms=1):
        _, _, down = forward(make(m, n, k, r, torch.bfloat16, factor), p=0.3)
    tiles, size = m // ROWS, factor.itemsize
    copies = 2 if size == 2 else 1 + BLOCK_K // 8
    descriptors = tiles * (k // BLOCK_K) * copies * 128
    # In float32 lora_b is copied on the way, as an operand of the GEMM.
    factor_copy = 0 if size == 2 else 4 * n * r * 3
    operands = 2 * m * k + size * r * k * tiles
    seed = 8 * 256 * tiles  # by each thread that masks
    assert down.global_load_bytes == operands + descriptors + factor_copy + seed
    assert down.tensor_flop == 2 * m * k * r * (1 if size == 2 else 3)
    assert down.sector_use >= 0.95
    for line in down.conflicts:
        assert "ldmatrix" not in line.instruction
        assert ".v2" not in line.instruction


@settings(max_examples=100, deadline=None)
@given(
    m=st.sampled_from([1, 9, 17, 63, 64, 65, 130, 200]),
    n=st.sampled_from([8, 72, 520]),
    k=st.sampled_from([8, 56, 64, 72, 200, 520]),
    r=st.sampled_from([1, 3, 8, 12, 16, 17, 40, 64, 65, 100, 256]),
    half=st.sampled_from([torch.bfloat16, torch.float16]),
    factor_float=st.booleans(),
    seed=st.integers(0, 1000),
)
def test_drawn_problems_have_no_findings(m, n, k, r, half, factor_float, seed):
    t = make(m, n, k, r, half, torch.float32 if factor_float else half, seed=seed)
    # Dropout is what always takes two launches.
    with forced(SIMULATED_CUDA), simulator.options(seed=seed, max_sms=(0, 2, 8, 32)[seed % 4]):
        assert_no_worse_than_torch(t, scaling=0.7, dropout_p=0.3, seed=torch.tensor(seed))
        assert (KERNEL in simulator.counters()[0].kernel) == (r <= 64)


@pytest.mark.parametrize("shape", [(130, 520, 1480, 24), (70, 520, 3000, 64)], ids=str)
@pytest.mark.parametrize("p", [0.0, 0.3])
def test_bits_do_not_depend_on_the_schedule(shape, p):
    t = make(*shape, torch.bfloat16, torch.bfloat16)
    t["weight"] = t["weight"].t().contiguous().t()  # as no single launch takes it
    results = []
    for seed, timing in itertools.product(range(3), ("early", "late", "random")):
        with (
            forced(SIMULATED_CUDA),
            simulator.options(seed=seed, async_timing=timing, max_sms=8),
        ):
            results.append(forward(t, p))
    for y, s, _ in results[1:]:
        assert torch.equal(y, results[0][0])
        assert torch.equal(s, results[0][1])


# ---- faults

DOWN, RING = "lora_down_sm90.cuh", "skinny_sm90.cuh"
FULL_WAIT = "ptx::mbarrier_wait(ring.full(place.stage), place.phase);"
FAULTS = {
    "wrong phase bit": (DOWN, FULL_WAIT, FULL_WAIT.replace("place.phase", "place.phase ^ 1")),
    "a stage filled before it is free": (
        DOWN, "ptx::mbarrier_wait(ring.empty(place.stage), place.phase ^ 1);", ""),
    "dropout counters of another tile": (
        DOWN, "mask.apply(stage, row0 * p.k + ", "mask.apply(stage, "),
    "half of the warps' sums lost": (DOWN, "add_quads(*at, at[Tile::kHalf / 4])", "*at"),
    "no cluster barrier before peers are read": (
        RING, "ptx::cluster_sync();\n  const int rows", "__syncthreads();\n  const int rows"),
    "exit before a peer has read": (
        RING, "ptx::cluster_sync();  // until no CTA reads this one's memory any more", ""),
    "rows beyond M written": (RING, "out.first + row >= out.rows || ", ""),
}  # fmt: skip

CHECK = forward_check(
    """[
    ((70, 520, 4360, 24), 0.3, "late"), ((70, 520, 4360, 24), 0.0, "early"),
    ((130, 520, 520, 8), 0.3, "random"),
]""",
    "max_sms=8, hang_budget=300_000",
)


def build_changed(folder, *change):
    faults = [Fault(*change)] if change else []
    return build(folder, "lora_down_bf16_sm90.cu", *faults)


@needs_build_folder
def test_the_kernel_as_it_is_passes(tmp_path):
    done = run_check(build_changed(tmp_path), CHECK)
    assert done.returncode == 0, done.stderr


@needs_build_folder
@pytest.mark.parametrize("fault", FAULTS)
def test_fault_is_seen(fault, tmp_path):
    assert_seen(run_check(build_changed(tmp_path, *FAULTS[fault]), CHECK))
