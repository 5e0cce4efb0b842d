"""The narrow backward passes of sm_90 in the simulator: choice, counts, draws, schedules."""

from __future__ import annotations

import itertools

import pytest
import torch
from backends import A100, H100, SIMULATED_CUDA, forced
from hypothesis import given, settings
from hypothesis import strategies as st
from test_lora_ops import assert_no_worse_than_torch, make

from fused_peft import _C, simulator

pytestmark = pytest.mark.skipif(
    not simulator.has_kernels(), reason="no nvcc, so no CUDA kernels were built"
)

DY, X = "dy_pass", "x_pass"
BLOCK = 64  # rows or columns of dy and x in a stage
B200 = {"num_sms": 148, "shared_per_block": 227 * 1024, "major": 10}
RTX5090 = {"num_sms": 170, "shared_per_block": 99 * 1024, "major": 12}

# ---- the plan is a pure function


@pytest.mark.parametrize(
    ("shape", "cluster"),
    [
        # 64 column tiles: two CTAs an SM.
        ((8192, 4096, 4096, 16), 4),
        ((8192, 4096, 14336, 16), 1),
        # At least four blocks of 64 rows a CTA.
        ((512, 1024, 1024, 16), 2),
        ((64, 1024, 1024, 64), 1),
    ],
)
def test_cluster_of_the_x_pass(shape, cluster):
    plan = _C.lora_linear_plan(*shape, **H100)[X]
    assert plan["cluster"] == cluster
    assert plan["ctas"] == -(-shape[2] // BLOCK) * cluster
    assert plan["rank_blocks"] == 1


@pytest.mark.parametrize(
    ("shape", "rows", "cluster"),
    [
        ((8192, 4096, 4096, 16), 128, 4),
        # Tiles of half the rows where clusters of eight would not fill the device.
        ((512, 4096, 1024, 16), 64, 8),
        # At least four blocks of 64 columns a CTA, eight where s has 64.
        ((512, 1024, 1024, 16), 64, 4),
        ((512, 1024, 1024, 64), 64, 2),
        ((4096, 64, 1024, 64), 128, 1),
    ],
)
def test_tile_and_cluster_of_the_dy_pass(shape, rows, cluster):
    plan = _C.lora_linear_plan(*shape, **H100)[DY]
    assert plan["row_blocks"] == rows // 16
    assert plan["cluster"] == cluster
    assert plan["ctas"] == -(-shape[0] // rows) * cluster


@pytest.mark.parametrize(("device", "cluster"), [(H100, 4), (B200, 4), (A100, 0), (RTX5090, 0)])
def test_passes_of_devices(device, cluster):
    plan = _C.lora_linear_plan(8192, 4096, 4096, 16, **device)
    assert plan[X]["cluster"] == plan[DY]["cluster"] == cluster


@pytest.mark.parametrize(
    ("r", "options", "sm90"),
    [
        (1, {}, True),
        (64, {}, True),
        (64, {"factor_float": True, "dropout": True}, True),
        (65, {}, False),
        (256, {"factor_float": True}, False),
        (16, {"aligned": False}, False),
    ],
)
def test_what_keeps_the_sm80_kernel(r, options, sm90):
    plan = _C.lora_linear_plan(512, 4096, 4096, r, **options, **H100)
    assert (plan[X]["cluster"] > 0) == (plan[DY]["cluster"] > 0) == sm90


def test_no_tensor_copy_of_an_empty_matrix():
    assert _C.lora_linear_plan(512, 0, 1024, 16, **H100)[DY]["cluster"] == 0
    assert _C.lora_linear_plan(512, 1024, 0, 16, **H100)[X]["cluster"] == 0


# ---- counts


def backward(t, p=0.0, s=None, wanted=(True, True, True)):
    """dx, dlora_a, dlora_b and the counters of the launches, by what they are."""
    m, r = t["x"].shape[0], t["lora_a"].shape[0]
    if s is None:
        s = torch.randn(m, r, generator=torch.Generator().manual_seed(1))
    operands = [t[name] for name in ("dy", "x", "weight", "lora_a", "lora_b")]
    simulator.reset()
    *gradients, _ = torch.ops.fused_peft_simulated.lora_linear_backward(
        *operands, s, 0.7, p, torch.tensor(5), *wanted, False
    )
    names = (DY, X, "gemm_dual", "reduce_parts")
    launches = {n: c for c in simulator.counters() for n in names if n in c.kernel}
    return gradients, launches


def counted(shape, factor=torch.bfloat16, p=0.0, device="h100"):
    t = make(*shape, torch.bfloat16, factor)
    with simulator.use_device(device), forced(SIMULATED_CUDA):
        return backward(t, p, wanted=(False, True, True))[1]


BOTH = pytest.mark.parametrize("factor", [torch.bfloat16, torch.float32], ids=str)


@BOTH
@pytest.mark.parametrize("r", [16, 64])
def test_x_pass_reads_x_once_and_ds_once_a_tile(r, factor):
    m, n, k = 512, 256, 1024
    launch = counted((m, n, k, r), factor)[X]
    assert "x_pass_sm90_kernel" in launch.kernel
    plan = _C.lora_linear_plan(m, n, k, r, factor_float=factor == torch.float32, **H100)
    size, tiles = factor.itemsize, k // BLOCK
    boxes = 1 + -(-r * size // 128)
    descriptors = tiles * (m // BLOCK) * boxes * 128
    row_tiles = -(-m // (16 * plan[DY]["row_blocks"]))
    parts = 4 * n * r * row_tiles
    assert launch.global_load_bytes == 2 * m * k + size * r * m * tiles + descriptors + parts
    assert launch.global_store_bytes == size * r * (k + n)
    assert launch.tensor_flop == 2 * m * k * r * (1 if size == 2 else 3)


@BOTH
@pytest.mark.parametrize("shape", [(512, 1024, 256, 16), (2176, 512, 72, 64)], ids=str)
def test_dy_pass_reads_dy_once_and_lora_b_once_a_tile(shape, factor):
    """Tiles of 64 and, in 16 bits, of 128 rows."""
    m, n, _, r = shape
    launch = counted(shape, factor)[DY]
    assert "dy_pass_sm90_kernel" in launch.kernel
    plan = _C.lora_linear_plan(*shape, factor_float=factor == torch.float32, **H100)[DY]
    size, tiles = factor.itemsize, plan["ctas"] // plan["cluster"]
    boxes = 1 + -(-r * size // 128)
    descriptors = tiles * (n // BLOCK) * boxes * 128
    s = 4 * m * r * plan["cluster"]
    assert launch.global_load_bytes == 2 * m * n + size * r * n * tiles + s + descriptors
    # ds as the GEMM's operand, and in float32 as it is.
    ds = 2 * m * r if size == 2 else (3 * 2 + 4) * m * r
    assert launch.global_store_bytes == 4 * n * r * tiles + ds
    assert launch.tensor_flop == 2 * 2 * m * n * r * (1 if size == 2 else 3)


@BOTH
@pytest.mark.parametrize("shape", [(512, 512, 1024, 16), (512, 512, 1024, 64), (200, 144, 272, 32)])
@pytest.mark.parametrize("p", [0.0, 0.3])
def test_no_conflicts_and_no_more_bytes_than_sm80(shape, factor, p):
    ours, before = counted(shape, factor, p), counted(shape, factor, p, "a100")
    for name in (DY, X):
        assert f"{name}_sm90_kernel" in ours[name].kernel
        assert f"{name}_kernel" in before[name].kernel
        assert ours[name].bank_conflicts == 0, ours[name].conflicts
        assert ours[name].sector_use >= 0.99
        assert ours[name].local_load_bytes == ours[name].local_store_bytes == 0
        assert ours[name].global_unique_load_bytes <= before[name].global_unique_load_bytes
        assert ours[name].global_unique_store_bytes <= before[name].global_unique_store_bytes
        assert ours[name].warp_instructions < before[name].warp_instructions


# ---- right over many problems and schedules


@settings(max_examples=100, deadline=None)
@given(
    m=st.sampled_from([1, 9, 63, 64, 65, 130, 300]),
    n=st.sampled_from([8, 72, 264, 520]),
    k=st.sampled_from([8, 56, 64, 72, 200, 520]),
    r=st.sampled_from([1, 3, 8, 12, 16, 17, 24, 40, 64, 65, 100]),
    half=st.sampled_from([torch.bfloat16, torch.float16]),
    factor_float=st.booleans(),
    p=st.sampled_from([0.0, 0.3]),
    seed=st.integers(0, 1000),
)
def test_drawn_problems_have_no_findings(m, n, k, r, half, factor_float, p, seed):
    t = make(m, n, k, r, half, torch.float32 if factor_float else half, seed=seed)
    with forced(SIMULATED_CUDA), simulator.options(seed=seed, max_sms=(0, 2, 8, 32)[seed % 4]):
        assert_no_worse_than_torch(t, scaling=0.7, dropout_p=p, seed=torch.tensor(seed))
        kernels = [c.kernel for c in simulator.counters()]
        assert any("x_pass_sm90" in kernel for kernel in kernels) == (r <= 64)
        whole = r <= 64 and r % (4 if factor_float else 8) == 0
        # Where dx's single launch does it there is no pass over dy.
        single = any("lora_single" in kernel for kernel in kernels[1:])
        assert any("dy_pass_sm90" in kernel for kernel in kernels) == (whole and not single)
        assert not single or (whole and p == 0.0 and not factor_float)


def odd_rows(t, name):
    """The same values, of one operand in rows that no tensor copy can address."""
    rows, columns = t[name].shape
    wide = torch.empty(rows, columns + 1, dtype=t[name].dtype)
    wide[:, :columns] = t[name]
    return t | {name: wide[:, :columns]}


@pytest.mark.parametrize("name", ["x", "dy", "lora_b"])
def test_rows_that_no_tensor_copy_addresses_take_the_sm80_kernel(name):
    t = make(200, 136, 264, 24, torch.bfloat16, torch.float32)
    with forced(SIMULATED_CUDA):
        expected, launches = backward(t)
        assert "x_pass_sm90" in launches[X].kernel
        assert "dy_pass_sm90" in launches[DY].kernel
        gradients, launches = backward(odd_rows(t, name))
        assert ("x_pass_sm90" in launches[X].kernel) == (name == "lora_b")
        assert "dy_pass_sm90" not in launches[DY].kernel
    for ours, other in zip(gradients, expected, strict=True):
        torch.testing.assert_close(ours, other)


@BOTH
def test_s_may_lie_at_any_float(factor):
    t = make(70, 136, 72, 24, torch.bfloat16, factor)
    s = torch.randn(70 * 24 + 1)
    without_dx = (False, True, True)
    with forced(SIMULATED_CUDA):
        aligned, _ = backward(t, s=s[1:].reshape(70, 24).clone(), wanted=without_dx)
        odd, launches = backward(t, s=s[1:].reshape(70, 24), wanted=without_dx)
        assert "dy_pass_sm90" in launches[DY].kernel
        # With dx too there would be a single launch in place of the pass, but for such an s.
        all_three, launches = backward(t, s=s[1:].reshape(70, 24))
        assert "dy_pass_sm90" in launches[DY].kernel
    for ours, other, with_dx in list(zip(odd, aligned, all_three, strict=True))[1:]:
        assert torch.equal(ours, other)
        assert torch.equal(ours, with_dx)


@pytest.mark.parametrize("wanted", list(itertools.product([False, True], repeat=3))[1:], ids=str)
@BOTH
def test_what_is_not_wanted_changes_nothing(wanted, factor):
    t = make(200, 136, 264, 12, torch.bfloat16, factor)
    with forced(SIMULATED_CUDA):
        everything, _ = backward(t)
        some, _ = backward(t, wanted=wanted)
    for want, ours, other in zip(wanted, some, everything, strict=True):
        assert torch.equal(ours, other) if want else ours.numel() == 0


@pytest.mark.parametrize("shape", [(1500, 264, 136, 24), (1100, 520, 72, 64)], ids=str)
@pytest.mark.parametrize("p", [0.0, 0.3])
@BOTH
def test_bits_do_not_depend_on_the_schedule(shape, p, factor):
    t = make(*shape, torch.bfloat16, factor)
    results = []
    for seed, timing in enumerate(("early", "late", "random", "random")):
        with (
            forced(SIMULATED_CUDA),
            simulator.options(seed=seed, async_timing=timing, max_sms=8),
        ):
            results.append(backward(t, p, wanted=(False, True, True))[0])
    for result in results[1:]:
        for ours, first in zip(result, results[0], strict=True):
            assert torch.equal(ours, first)
