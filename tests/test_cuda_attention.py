"""Prefix attention's CUDA kernels: what they cost, and that the same problem gives the same bits.

That they are right, shape by shape, is in test_attention_ops.py, which runs them as one more
backend.
"""

from __future__ import annotations

import pytest
import torch
from backends import SIMULATED_CUDA, forced
from test_attention_ops import NAMES, make, run

from fused_peft import ops, simulator

pytestmark = pytest.mark.skipif(
    not simulator.has_kernels(), reason="no nvcc, so no CUDA kernels were built"
)


def counted(shape, **kwargs):
    """Counters of the forward launches and of the backward launches."""
    t = make(*shape, torch.bfloat16)
    leaves = [t[name].requires_grad_() for name in NAMES]
    with forced(SIMULATED_CUDA):
        out = ops.prefix_attention(*leaves, **kwargs)
        forward = simulator.counters()
        simulator.reset()
        out.backward(t["dout"])
        return forward, simulator.counters()


@pytest.mark.parametrize("head_dim", [64, 128])
def test_flop_bytes_and_bank_conflicts(head_dim):
    heads, length, prefix = 2, 512, 64
    forward, backward = counted((1, heads, 1, length, length, head_dim, prefix), causal=True)
    assert len(forward) == 1
    # A causal sequence's pairs of query and key, two products over the head dimension.
    pairs = heads * (length * prefix + length * (length + 1) // 2)
    assert forward[0].tensor_flop <= 1.10 * 4 * pairs * head_dim
    # q once; K and V of the tiles at or before the diagonal, and of the prefix, once a query tile.
    tiles = heads * sum(1 + i + 1 for i in range(length // 64))
    rows = heads * length + tiles * 64 * 2
    assert forward[0].global_load_bytes == rows * head_dim * 2
    for counters in (*forward, *backward):
        assert counters.shared_wavefronts == counters.shared_ideal_wavefronts, counters.kernel
        assert counters.local_load_bytes == counters.local_store_bytes == 0
        assert counters.global_atomic_bytes == 0


@pytest.mark.parametrize("shape", [(3, 4, 2, 70, 90, 64, 70), (2, 4, 1, 1, 600, 64, 64)], ids=str)
def test_same_bits_in_every_run(shape):
    t = make(*shape, torch.bfloat16)
    with forced(SIMULATED_CUDA):
        first = run(ops.prefix_attention, t, causal=True)
        second = run(ops.prefix_attention, t, causal=True)
    for name, value in first.items():
        assert torch.equal(second[name], value), name


def test_one_token_is_split_over_the_keys():
    forward, _ = counted((1, 4, 2, 1, 1000, 64, 64), causal=True)
    assert ["forward" in c.kernel or "combine" in c.kernel for c in forward] == [True, True]
