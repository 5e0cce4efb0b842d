"""The LoRA layer's GEMM for sm_90a: choice, counts, drawn problems, schedules.

The number of SMs chooses the tile, so a device of few SMs runs every kernel on small problems.
"""

from __future__ import annotations

import itertools

import pytest
import torch
from backends import H100, SIMULATED_CUDA, forced
from hypothesis import given, settings
from hypothesis import strategies as st
from test_lora_ops import assert_no_worse_than_torch, make, run

from fused_peft import _C, ops, simulator

pytestmark = pytest.mark.skipif(
    not simulator.has_kernels() or "90" not in _C.build_info()["cuda_architectures"],
    reason="no CUDA kernels for sm_90 were built",
)


def plan_on(num_sms, shape, **options):
    return _C.lora_linear_plan(*shape, **options, **{**H100, "num_sms": num_sms})


@pytest.mark.parametrize(
    ("shape", "expected"),
    [
        # 64 x 16 tiles of 128 x 256, in clusters, on all SMs but for an odd one.
        ((8192, 4096, 4096, 16), ("sm_90a cooperative", 128, 256, 1024, 2, 132)),
        # 8 x 8: too few of them, and of 128 x 128 just enough.
        ((1024, 2176, 4096, 16), ("sm_90a pingpong", 128, 128, 136, 2, 132)),
        ((512, 1024, 1024, 16), ("sm_90a pingpong", 64, 64, 128, 1, 128)),
        # 5 row tiles: no partner for the last; 17: it costs little.
        ((640, 8192, 1024, 16), ("sm_90a cooperative", 128, 256, 160, 1, 132)),
        ((2176, 4096, 1024, 16), ("sm_90a cooperative", 128, 256, 272, 2, 132)),
    ],
)
def test_tile(shape, expected):
    # With dropout, which takes two launches.
    gemm = plan_on(132, shape, dropout=True)["gemm"]
    keys = ("kernel", "block_m", "block_n", "tiles", "cluster", "ctas")
    assert tuple(gemm[key] for key in keys) == expected


def test_a_wave_covers_a_square():
    gemm = plan_on(132, (8192, 4096, 4096, 16), dropout=True)["gemm"]
    rows = gemm["raster_rows"] * gemm["cluster"]
    columns = gemm["ctas"] / rows
    assert 0.5 <= rows * gemm["block_m"] / (columns * gemm["block_n"]) <= 2.0


def layer(t, **kwargs):
    """y and dx with the counters of all launches."""
    x = t["x"].requires_grad_()
    with forced(SIMULATED_CUDA):
        y = ops.lora_linear(x, t["weight"], t["lora_a"], t["lora_b"], **kwargs)
        y.backward(t["dy"])
        return y, x.grad, simulator.counters()


@pytest.mark.parametrize("rank", [1, 12, 28, 128, 256])
def test_tensor_core_work_is_the_ideal(rank):
    """At K = 4096, for whole tiles: no more products than the layer has, but for R's last 16."""
    m, n, k = 128, 256, 4096
    t = make(m, n, k, rank, torch.bfloat16, torch.bfloat16)
    with simulator.options(max_sms=2):
        _, _, counters = layer(t, scaling=0.5)
    gemms = [c for c in counters if "gemm_dual_sm90" in c.kernel]
    assert len(gemms) == 2
    whole = -(-rank // 16) * 16
    for gemm in gemms:
        assert gemm.tensor_flop == 2 * m * n * k + 2 * m * whole * (n if gemm is gemms[0] else k)
    if rank % 16 == 0:
        ideal = 2 * m * n * k + 2 * m * rank * n
        assert gemms[0].tensor_flop <= 1.005 * ideal


def test_bytes_and_conflicts():
    m, n, k, r = 512, 1024, 1024, 72
    _, _, counters = layer(make(m, n, k, r, torch.bfloat16, torch.bfloat16), scaling=0.5)
    forward, backward = (c for c in counters if "gemm_dual_sm90" in c.kernel)
    weight, x, dy, terms = 2 * n * k, 2 * m * k, 2 * m * n, 2 * m * r
    assert forward.global_unique_load_bytes <= 1.01 * (weight + x + terms + 2 * n * r)
    assert backward.global_unique_load_bytes <= 1.01 * (weight + dy + terms + 2 * k * r)
    for launch in (forward, backward):
        assert not launch.conflicts
        assert launch.local_load_bytes == launch.local_store_bytes == 0
        assert launch.sector_use >= 0.99


# ---- right over many problems and schedules

# Each row of every operand has to be a multiple of 16 bytes.
SIZES = [8, 16, 24, 64, 72, 128, 136, 264]


@settings(max_examples=150, deadline=None)
@given(
    m=st.sampled_from([17, 31, 64, 65, 100, 128, 130, 200, 257, 300]),
    n=st.sampled_from([*SIZES, 520]),
    k=st.sampled_from([*SIZES, 200]),
    r=st.sampled_from([1, 3, 8, 12, 16, 17, 24, 48, 64, 65, 128, 129, 200, 256]),
    half=st.sampled_from([torch.bfloat16, torch.float16]),
    factor_float=st.booleans(),
    p=st.sampled_from([0.0, 0.0, 0.1, 0.9]),
    transposed=st.booleans(),
    num_sms=st.integers(1, 6),
    seed=st.integers(0, 1000),
)
def test_drawn_problems_have_no_findings(
    m, n, k, r, half, factor_float, p, transposed, num_sms, seed
):
    t = make(m, n, k, r, half, torch.float32 if factor_float else half, seed=seed)
    if transposed:
        t["weight"] = t["weight"].t().contiguous().t()
    with forced(SIMULATED_CUDA), simulator.options(seed=seed, max_sms=num_sms):
        assert_no_worse_than_torch(t, scaling=0.7, dropout_p=p, seed=torch.tensor(seed))
        names = [launch.kernel for launch in simulator.counters()]
        assert any("gemm_dual_sm90" in name or "lora_single_sm90" in name for name in names)


SCHEDULED = {
    "cooperative, clusters, several tiles": ((385, 264, 72, 24), 2, ("cooperative", 2)),
    "cooperative": ((130, 520, 72, 8), 1, ("cooperative", 1)),
    "pingpong, clusters": ((200, 136, 136, 16), 3, ("pingpong", 2)),
    "small pingpong, several tiles": ((130, 136, 72, 40), 5, ("pingpong", 1)),
}


@pytest.mark.parametrize("name", SCHEDULED)
def test_bits_do_not_depend_on_the_schedule(name):
    """54 schedules each: seeds, and copies and products that land early, late, or in between."""
    shape, num_sms, kernel = SCHEDULED[name]
    gemm = plan_on(num_sms, shape, dropout=True)["gemm"]
    assert (gemm["kernel"].removeprefix("sm_90a "), gemm["cluster"]) == kernel
    t = make(*shape, torch.bfloat16, torch.bfloat16)
    first = None
    for seed, timing in itertools.product(range(18), ("early", "late", "random")):
        with (
            forced(SIMULATED_CUDA),
            simulator.options(seed=seed, async_timing=timing, max_sms=num_sms),
        ):
            result = run(ops.lora_linear, t, scaling=0.7, dropout_p=0.2, seed=torch.tensor(5))
        first = first or result
        for key, value in first.items():
            assert torch.equal(value, result[key]), (key, seed, timing)
