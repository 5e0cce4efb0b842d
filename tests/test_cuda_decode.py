"""The decode layer of sm_90 in the simulator: choice, counts, many drawn problems, faults.

At most 16 tokens, one launch: W through TMA, k split over a cluster whose sums meet in distributed
shared memory.
"""

from __future__ import annotations

import itertools

import pytest
import torch
from backends import SIMULATED_CUDA, forced, relative_error
from cuda_faults import (
    ROOT,
    Fault,
    assert_seen,
    build,
    forward_check,
    needs_build_folder,
    run_check,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from test_cuda_lora import A100, H100, RTX4090
from test_lora_ops import assert_no_worse_than_torch, make

from fused_peft import _C, ops, reference, simulator

pytestmark = pytest.mark.skipif(
    not simulator.has_kernels(), reason="no nvcc, so no CUDA kernels were built"
)

KERNEL = "lora_decode_sm90_kernel"
BLOCK_N, BLOCK_K = 128, 64


# ---- the plan is a pure function


@pytest.mark.parametrize(
    ("shape", "options", "cluster"),
    [
        # 32 tiles of 128 columns, two CTAs an SM: clusters of 8 fill 128 of 132 SMs.
        ((1, 4096, 4096, 16), {}, 8),
        ((16, 4096, 4096, 64), {"factor_float": True}, 8),
        ((1, 4104, 4096, 16), {}, 4),
        ((1, 14336, 4096, 16), {}, 2),
        ((1, 32000, 4096, 16), {}, 1),
        # No CTA without a k-block of 64.
        ((1, 256, 512, 16), {}, 8),
        ((1, 256, 448, 16), {}, 4),
        ((1, 256, 64, 16), {}, 1),
        # Rows that TMA cannot address.
        ((1, 4096, 4096, 16), {"aligned": False}, 0),
    ],
)
def test_cluster(shape, options, cluster):
    plan = _C.lora_linear_plan(*shape, **options, **H100)
    assert plan["forward"] == "decode"
    assert plan["forward_launches"] == 1
    assert plan["decode_cluster"] == cluster
    tiles = -(-shape[1] // (BLOCK_N if cluster else 32))
    assert plan["decode_ctas"] == tiles * max(cluster, 1)


@pytest.mark.parametrize(
    "device",
    [
        A100,
        RTX4090,
        # Clusters, but no room for the ring.
        {"num_sms": 170, "shared_per_block": 99 * 1024, "major": 12},
    ],
    ids=["A100", "RTX 4090", "RTX 5090"],
)
def test_other_devices_keep_the_sm80_kernel(device):
    assert _C.lora_linear_plan(1, 4096, 4096, 16, **device)["decode_cluster"] == 0


@pytest.mark.parametrize("sms", [78, 114, 132, 148])
def test_all_ctas_are_resident_at_once(sms):
    device = H100 | {"num_sms": sms}
    for n, k in itertools.product(range(128, 9000, 128), (64, 512, 4096)):
        plan = _C.lora_linear_plan(4, n, k, 16, **device)
        if plan["decode_cluster"] > 1:
            assert plan["decode_ctas"] <= 2 * sms


# ---- what a layer costs


def forward_counters(shape, factor=torch.bfloat16):
    t = make(*shape, torch.bfloat16, factor)
    with forced(SIMULATED_CUDA):
        ops.lora_linear(t["x"], t["weight"], t["lora_a"], t["lora_b"], t["bias"], scaling=0.5)
        return simulator.counters()


@pytest.mark.parametrize("factor", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("shape", [(1, 1024, 1024, 16), (16, 1024, 1024, 16), (16, 512, 2048, 64)])
def test_one_launch_reads_the_weight_once(shape, factor):
    m, n, k, r = shape
    (launch,) = forward_counters(shape, factor)
    assert KERNEL in launch.kernel
    # Every tile of columns reads x and lora_a; all else is read once, the bias once a token.
    # A copy reads its descriptor; float32 lora_a comes in copies of 8 columns.
    tiles, copies = n // BLOCK_N, 3 if factor == torch.bfloat16 else 2 + BLOCK_K // 8
    again = tiles * k * (2 * m + factor.itemsize * r) + tiles * k // BLOCK_K * copies * 128
    assert launch.global_load_bytes == 2 * n * k + again + factor.itemsize * n * r + 2 * m * n
    compulsory = 2 * (n * k + m * k + n) + factor.itemsize * r * (n + k)
    assert launch.global_unique_load_bytes == compulsory
    assert launch.global_store_bytes == 2 * m * n + 4 * m * r
    assert launch.sector_use >= 0.95
    assert launch.local_load_bytes == launch.local_store_bytes == 0
    # The main loop reads shared memory by ldmatrix, and float32 lora_a by pairs.
    for line in launch.conflicts:
        assert "ldmatrix" not in line.instruction
        assert ".v2" not in line.instruction


def test_tensor_core_work_is_that_of_sixteen_rows():
    m, n, k, r = 4, 1024, 1024, 16
    (launch,) = forward_counters((m, n, k, r))
    assert launch.tensor_flop == 2 * 16 * k * (n + n // BLOCK_N * r)


# ---- right over many problems and schedules


@settings(max_examples=120, deadline=None)
@given(
    m=st.integers(1, 16),
    n=st.sampled_from([8, 16, 72, 120, 128, 136, 264, 400]),
    k=st.sampled_from([8, 16, 56, 64, 72, 128, 200, 520, 1000]),
    r=st.sampled_from([1, 2, 3, 7, 8, 9, 12, 16, 17, 24, 33, 48, 63, 64]),
    half=st.sampled_from([torch.bfloat16, torch.float16]),
    factor_float=st.booleans(),
    seed=st.integers(0, 1000),
)
def test_drawn_problems_have_no_findings(m, n, k, r, half, factor_float, seed):
    t = make(m, n, k, r, half, torch.float32 if factor_float else half, seed=seed)
    # Few SMs: fewer CTAs at a time, and smaller clusters.
    with forced(SIMULATED_CUDA), simulator.options(seed=seed, max_sms=(0, 2, 8, 32)[seed % 4]):
        assert_no_worse_than_torch(t, scaling=0.7)
        assert KERNEL in simulator.counters()[0].kernel


def check_views(t, kernel):
    """The layer on views as they are (autograd's leaves would be copies), and which kernel ran."""
    operands = [t[name] for name in ("x", "weight", "lora_a", "lora_b", "bias")]
    with forced(SIMULATED_CUDA):
        ours = ops.lora_linear(*operands, scaling=0.7)
        (launch,) = simulator.counters()
    assert f"{kernel}I" in launch.kernel
    truth = reference.lora_linear(*(o.double() for o in operands), scaling=0.7)
    torchs = reference.lora_linear(*operands, scaling=0.7)
    assert relative_error(ours, truth) <= relative_error(torchs, truth)


def test_a_view_with_wider_rows():
    t = make(5, 136, 200, 12, torch.bfloat16, torch.bfloat16)
    for name in ("x", "weight", "lora_a", "lora_b"):
        wide = torch.full((t[name].shape[0], t[name].shape[1] + 24), float("nan")).bfloat16()
        wide[:, 8:-16] = t[name]
        t[name] = wide[:, 8:-16]
    check_views(t, KERNEL)


@pytest.mark.parametrize("name", ["x", "weight", "lora_a"])
def test_rows_off_the_16_byte_grid_take_the_sm80_kernel(name):
    t = make(5, 136, 200, 12, torch.bfloat16, torch.bfloat16)
    wide = torch.zeros(t[name].shape[0], t[name].shape[1] + 1).bfloat16()
    wide[:, 1:] = t[name]
    t[name] = wide[:, 1:]
    check_views(t, "lora_decode_kernel")


# A rank of K blocks that wraps around the ring several times, two tiles, several clusters at once.
@pytest.mark.parametrize(
    "shape", [(16, 264, 1480, 24), (3, 72, 5000, 64), (7, 400, 64, 8)], ids=str
)
@pytest.mark.parametrize("factor", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("sms", [8, 132])
def test_bits_do_not_depend_on_the_schedule(shape, factor, sms):
    t = make(*shape, torch.bfloat16, factor)
    results = []
    for seed, timing in itertools.product(range(4), ("early", "late", "random")):
        with (
            forced(SIMULATED_CUDA),
            simulator.options(seed=seed, async_timing=timing, max_sms=sms),
        ):
            results.append(
                torch.ops.fused_peft_simulated.lora_linear(
                    t["x"], t["weight"], t["lora_a"], t["lora_b"], t["bias"], 0.7, 0.0, None
                )
            )
    for y, s in results[1:]:
        assert torch.equal(y, results[0][0])
        assert torch.equal(s, results[0][1])


def test_infinities_of_one_column_stay_in_it():
    """A product with a zero that only fills a tile up would make NaN of them."""
    t = make(3, 72, 136, 8, torch.bfloat16, torch.bfloat16)
    t["weight"][5, 135] = float("inf")
    with forced(SIMULATED_CUDA):
        y = ops.lora_linear(t["x"], t["weight"], t["lora_a"], t["lora_b"], scaling=0.7)
    assert torch.isinf(y[:, 5]).all()
    y[:, 5] = 0
    assert torch.isfinite(y).all()


# ---- faults

HEADERS = ("lora_decode_sm90.cuh", "skinny_sm90.cuh", "ring_sm90.cuh")
FULL_WAIT = "ptx::mbarrier_wait(ring.full(place.stage), place.phase);"
EMPTY_WAIT = "ptx::mbarrier_wait(ring.empty(place.stage), place.phase ^ 1);"
RELEASE = "ring.release(place.stage, lane);"
RING_FREE = "__syncthreads();  // with the producer: the ring is free"
FAULTS = {
    "wrong phase bit of a consumer": (FULL_WAIT, FULL_WAIT.replace("phase)", "phase ^ 1)")),
    "wrong phase bit of the producer": (
        EMPTY_WAIT, EMPTY_WAIT.replace("phase ^ 1", "phase")),
    "a stage filled before it is free": (EMPTY_WAIT, ""),
    "a stage freed before it is read": (
        FULL_WAIT, FULL_WAIT + RELEASE, f"    {RELEASE}\n", ""),
    "a stage never freed": (RELEASE, ""),
    "phase not turned": ("      phase ^= 1;\n", ""),
    "fewer bytes expected than come": (
        "mbarrier_arrive_expect(barrier, Tile::kStageBytes)",
        "mbarrier_arrive_expect(barrier, Tile::kXOffset)"),
    "one consumer too few counted": (
        "mbarrier_init(empty(i), Tile::kConsumers)",
        "mbarrier_init(empty(i), Tile::kConsumers - 1)"),
    "no barrier after the barriers' init": (
        "ptx::mbarrier_init_fence();\n    }\n    __syncthreads();",
        "ptx::mbarrier_init_fence();\n    }"),
    "sums written into a ring in use": (
        RING_FREE, "", "__syncwarp();\n    __syncthreads();", "__syncwarp();"),
    "no cluster barrier before peers are read": (
        "ptx::cluster_arrive();\n", "__syncthreads();\n", "ptx::cluster_wait();\n", ""),
    "arrival before the peers are read": (
        "ptx::cluster_wait();\n", "ptx::cluster_wait();\n  ptx::cluster_arrive();\n",
        "ptx::cluster_arrive();  // this CTA has read its peers' memory", ""),
    "exit before a peer has read": ("ptx::cluster_wait();  // until they have read this one's", ""),
    "one rank's sums lost": ("rank = 1; rank < ranks", "rank = 2; rank < ranks"),
    "one k16 step of s lost": ("part = 1; part < Tile::kSteps", "part = 2; part < Tile::kSteps"),
    "no barrier between s and its use": (
        "__syncthreads();\n  ptx::cluster_arrive();  //", "ptx::cluster_arrive();  //"),
    "columns beyond N written": ("if (n >= p.n) continue;", ""),
    "every rank the same k-blocks": (
        "int block = ptx::cluster_cta_rank(); block < p.k_blocks; block += ranks",
        "int block = 0; block < p.k_blocks; block += ranks"),
}  # fmt: skip

CHECK = forward_check(
    """[
    ((16, 264, 3400, 24), 0.0, "late"), ((5, 72, 3400, 8), 0.0, "early"),
    ((9, 136, 520, 16), 0.0, "random"),
]""",
    "hang_budget=300_000",
)


def build_changed(folder, changes=()):
    """With texts of the headers replaced: old, new, old, new ..."""
    texts = {name: (ROOT / "csrc/kernels/cuda" / name).read_text() for name in HEADERS}
    faults = [
        Fault(next((name for name in HEADERS if old in texts[name]), HEADERS[0]), old, new)
        for old, new in zip(changes[::2], changes[1::2], strict=True)
    ]
    return build(folder, "lora_decode_bf16_sm90.cu", *faults)


@needs_build_folder
def test_the_kernel_as_it_is_passes(tmp_path):
    done = run_check(build_changed(tmp_path), CHECK)
    assert done.returncode == 0, done.stderr


@needs_build_folder
@pytest.mark.parametrize("fault", FAULTS)
def test_fault_is_seen(fault, tmp_path):
    assert_seen(run_check(build_changed(tmp_path, FAULTS[fault]), CHECK))
