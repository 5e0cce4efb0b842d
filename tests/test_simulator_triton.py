"""Kernels of another compiler: those of tests/triton_kernels/generate.py, by Triton."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest
from simulator_kernels import needs_simulator

from fused_peft import simulator

pytestmark = needs_simulator

THREADS = 128
FOLDER = Path(__file__).parent / "triton_kernels"


def launch(name: str, grid: tuple[int, ...] | int, *args: object) -> simulator.Counters:
    ptx = (FOLDER / f"{name}.ptx").read_text()
    shared = re.match(r"// shared bytes: (\d+)\n", ptx)
    assert shared
    kernel, architecture = name.split("_sm")
    simulator.reset()
    with simulator.use_device({"80": "a100", "90": "h100"}[architecture]):
        module = simulator.load(ptx)
        # Triton adds scratch pointers, which these kernels do not use.
        scratch = [np.uint64(0)] * (len(module.parameters(kernel)) - len(args))
        module.launch(kernel, grid, THREADS, [*args, *scratch], int(shared[1]))
    assert simulator.findings() == []
    return simulator.counters()[0]


@pytest.mark.parametrize("name", ["matmul_sm80", "matmul_sm90"])
@pytest.mark.parametrize("shape", [(128, 64, 96), (100, 80, 48)], ids=str)
def test_matmul(name, shape):
    m, n, k = shape
    rng = np.random.default_rng(0)
    x, y = (rng.integers(-8, 8, size).astype(np.float16) for size in ((m, k), (k, n)))
    out = np.zeros((m, n), np.float16)
    tiles = (-(-m // 64), -(-n // 64))
    counters = launch(name, tiles, x, y, out, np.int32(m), np.int32(n), np.int32(k))
    # Every sum is an integer, which float32 holds and float16 rounds once.
    np.testing.assert_array_equal(out, (x.astype(np.int64) @ y.astype(np.int64)).astype(np.float16))
    assert counters.tensor_flop == 2 * (tiles[0] * 64) * (tiles[1] * 64) * -(-k // 32) * 32
    assert counters.global_unique_load_bytes == x.nbytes + y.nbytes
    assert counters.global_unique_store_bytes == out.nbytes


def test_softmax():
    x = np.random.default_rng(1).standard_normal((7, 1000)).astype(np.float32)
    out = np.zeros_like(x)
    counters = launch("softmax_sm80", len(x), x, out, np.int32(x.shape[1]))
    powers = np.exp(x.astype(np.float64) - x.max(1, keepdims=True))
    # ex2.approx and div.full are right to 2 units in the last place, the exponent's rounding
    # grows with its size.
    np.testing.assert_allclose(out, powers / powers.sum(1, keepdims=True), rtol=2e-6)
    assert counters.global_load_bytes == counters.global_store_bytes == x.nbytes


def test_layer_norm():
    rng = np.random.default_rng(2)
    x = rng.standard_normal((5, 500)).astype(np.float32)
    weight, bias = rng.standard_normal((2, 500)).astype(np.float32)
    out = np.zeros_like(x)
    counters = launch(
        "layer_norm_sm80", len(x), x, weight, bias, out, np.int32(500), np.float32(1e-5)
    )
    centred = x.astype(np.float64) - x.mean(1, keepdims=True, dtype=np.float64)
    scale = 1 / np.sqrt((centred**2).mean(1, keepdims=True) + 1e-5)
    np.testing.assert_allclose(out, centred * scale * weight + bias, atol=4e-6)
    assert counters.global_load_bytes == x.nbytes + len(x) * (weight.nbytes + bias.nbytes)
