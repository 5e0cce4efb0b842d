"""Other people's CUDA programs, unmodified, under the simulator, against NumPy."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from backends import SIMULATED_CUDA, forced
from cuda_programs import NVCC, build, cutlass, run
from test_lora_ops import make

from fused_peft import simulator

pytestmark = pytest.mark.skipif(
    NVCC is None or not simulator.is_available(), reason="no nvcc, so no simulator was built"
)


@pytest.fixture(scope="module")
def programs(tmp_path_factory):
    """Builds each program once, when first asked for."""
    folder = tmp_path_factory.mktemp("programs")
    tutorials = cutlass() / "examples/cute/tutorial"
    sources = {
        "cub": (Path(__file__).parent / "cuda/cub_algorithms.cu", "80"),
        "collective_gemm": (Path(__file__).parent / "cuda/collective_gemm.cu", "90a"),
        "dual_source_gemm": (Path(__file__).parent / "cuda/dual_source_gemm.cu", "90a"),
        "sgemm_sm80": (tutorials / "sgemm_sm80.cu", "80"),
        "wgmma_sm90": (tutorials / "hopper/wgmma_sm90.cu", "90a"),
        "wgmma_tma_sm90": (tutorials / "hopper/wgmma_tma_sm90.cu", "90a"),
    }

    def get(name):
        target = folder / name
        return target if target.exists() else build(sources[name][0], target, sources[name][1])

    return get


@pytest.mark.parametrize("n", [128, 10_007])
def test_cub(programs, tmp_path, n):
    result = run(programs("cub"), tmp_path, n, device="a100")
    assert result.code == 0, result.errors
    assert result.findings == []
    lines = {
        line.split()[0]: np.array(line.split()[1:], np.int64) for line in result.output.splitlines()
    }
    i = np.arange(n)
    values = i * 37 % 101 - 50
    keys = (i.astype(np.uint32) * np.uint32(2654435761)) ^ np.uint32(0x5BD1E995)
    np.testing.assert_array_equal(lines["reduce"], [values.sum()])
    np.testing.assert_array_equal(lines["scan"], values.cumsum())
    np.testing.assert_array_equal(lines["sort"], np.sort(keys))
    blocks = values[: n // 128 * 128].reshape(-1, 128).sum(1)
    np.testing.assert_array_equal(lines["blocks"], blocks)


def product(run, m, n, k):
    """A B^T of the program's first two buffers, and its third, which is column major."""
    a = run.buffer(0, np.float16, (m, k)).astype(np.float64)
    b = run.buffer(1, np.float16, (n, k)).astype(np.float64)
    c = run.buffer(2, np.float16, (n, m)).T.astype(np.float64)
    return a @ b.T, c


def bfloat16(result, number, rows, columns):
    bits = result.buffer(number, np.uint16, (rows, columns)).astype(np.uint32) << 16
    return bits.view(np.float32).astype(np.float64)


def relative_error(out, expected):
    return np.linalg.norm(out - expected) / np.linalg.norm(expected)


def test_cutlass_sgemm_sm80(programs, tmp_path):
    m, n, k = 256, 128, 192
    result = run(programs("sgemm_sm80"), tmp_path, m, n, k, "T", "N", device="a100")
    assert result.code == 0, result.errors
    assert result.findings == []
    expected, c = product(result, m, n, k)
    # It accumulates in float16: 192 roundings of 2^-11 that add up like a random walk.
    assert relative_error(c, expected) < 192**0.5 * 2**-11
    first = result.counters[0]
    assert first.tensor_flop == 2 * m * n * k
    assert first.bank_conflicts == 0


def hopper_product(result, m, n, k):
    """A^T B with the operands' rows contiguous, as the Hopper tutorials' defaults have it."""
    a = result.buffer(0, np.float16, (k, m)).T.astype(np.float64)
    b = result.buffer(1, np.float16, (k, n)).T.astype(np.float64)
    return a @ b.T, result.buffer(2, np.float16, (n, m)).T.astype(np.float64)


def test_cutlass_wgmma_tma_sm90(programs, tmp_path):
    m, n, k = 256, 128, 128
    result = run(programs("wgmma_tma_sm90"), tmp_path, m, n, k)
    assert result.code == 0, result.errors
    assert result.findings == []
    expected, c = hopper_product(result, m, n, k)
    np.testing.assert_array_equal(c, expected)  # its inputs are small integers
    assert result.counters[0].tensor_flop == 2 * m * n * k


def test_cutlass_wgmma_sm90_and_its_missing_barrier(programs, tmp_path):
    """Right values; but no barrier stands between its cp.async and the other warps' wgmma."""
    m, n, k = 256, 128, 128
    result = run(programs("wgmma_sm90"), tmp_path, m, n, k)
    expected, c = hopper_product(result, m, n, k)
    np.testing.assert_array_equal(c, expected)
    assert {finding.kind for finding in result.findings} <= {
        "race",
        "async not waited",
        "proxy fence",
    }
    assert any("wgmma" in finding.instruction for finding in result.findings)


@pytest.mark.parametrize("shape", [(256, 128, 128), (300, 200, 192)], ids=str)
def test_cutlass_collective_gemm_sm90(programs, tmp_path, shape):
    m, n, k = shape
    result = run(programs("collective_gemm"), tmp_path, m, n, k, seed=m)
    assert result.code == 0, result.errors
    assert result.findings == []

    expected = bfloat16(result, 0, m, k) @ bfloat16(result, 1, n, k).T
    # The integers add up exactly in float32; what is left is one rounding to bfloat16.
    assert np.all(np.abs(bfloat16(result, 2, m, n) - expected) <= np.abs(expected) * 2**-8)


@pytest.mark.skipif(not simulator.has_kernels(), reason="no nvcc, so no CUDA kernels were built")
@pytest.mark.parametrize("shape", [(256, 128, 128, 16), (300, 200, 184, 72)], ids=str)
def test_cutlass_dual_source_gemm_agrees_with_the_lora_layer(programs, tmp_path, shape):
    """CUTLASS's main loop with two sources, on the layer's own s, as an independent layer."""
    m, n, k, r = shape
    t = make(m, n, k, r, torch.bfloat16, torch.bfloat16)
    with forced(SIMULATED_CUDA):
        y, s = torch.ops.fused_peft_simulated.lora_linear(
            t["x"], t["weight"], t["lora_a"], t["lora_b"], None, 0.7, 0.0, None
        )
    operands = [t["x"], t["weight"], s.bfloat16(), t["lora_b"]]
    files = [tmp_path / f"operand_{i}" for i in range(len(operands))]
    for file, operand in zip(files, operands, strict=True):
        operand.contiguous().view(torch.int16).numpy().tofile(file)
    result = run(programs("dual_source_gemm"), tmp_path, m, n, k, r, *files, seed=r)
    assert result.code == 0, result.errors
    assert result.findings == []
    x, weight, terms, lora_b = (operand.double().numpy() for operand in operands)
    expected = x @ weight.T + terms @ lora_b.T
    theirs, ours = bfloat16(result, 4, m, n), y.double().numpy()
    # One rounding each of the same sum: nearly all elements are the same number.
    assert relative_error(theirs, expected) < 2**-8
    assert relative_error(ours, expected) < 2**-8
    assert np.mean(theirs == ours) > 0.99
    whole = -(-m // 256) * 256 * -(-n // 128) * 128
    tiles = -(-k // 64) + -(-r // 64)
    assert sum(launch.tensor_flop for launch in result.counters) == 2 * whole * tiles * 64
