"""Prefix attention's CUDA kernels: choice, cost, many drawn problems, and a whole model.

That they are right, shape by shape, is also in test_attention_ops.py, which runs them as one more
backend.
"""

from __future__ import annotations

import copy
import itertools
import math

import pytest
import torch
from backends import A100, H100, RTX4090, SIMULATED_CUDA, forced, relative_error
from hypothesis import given, settings
from hypothesis import strategies as st
from smollm2 import two_layers_of_smollm2
from test_attention_ops import NAMES, assert_no_worse_than_torch, concat_sdpa, exact, make, run

from fused_peft import _C, PrefixTuningConfig, get_peft_model, ops, simulator

pytestmark = pytest.mark.skipif(
    not simulator.has_kernels(), reason="no nvcc, so no CUDA kernels were built"
)


# ---- the plan is a pure function


def plan(shape, device, **options):
    """Of a shape as test_attention_ops.make takes it: B, Hq, Hkv, S, T, D, P."""
    b, hq, hkv, s, t, d, p = shape
    return _C.prefix_attention_plan(b, hq, hkv, s, t, p, d, **options, **device)


@pytest.mark.parametrize(
    ("shape", "expected"),
    [
        # A long sequence: wide tiles where there are two for each SM, but not of 256 columns.
        ((8, 32, 8, 4096, 4096, 128, 64), {"forward": "query tiles", "query_rows": 128}),
        ((8, 32, 8, 4096, 4096, 64, 64), {"query_rows": 128, "block_keys": 64}),
        ((8, 32, 8, 4096, 4096, 128, 64), {"block_keys": 32, "forward_ctas": 8192}),
        ((8, 32, 8, 4096, 4096, 256, 64), {"query_rows": 64, "block_keys": 32}),
        ((1, 2, 1, 512, 512, 128, 64), {"query_rows": 64, "block_keys": 64, "forward_ctas": 16}),
        ((1, 66, 66, 512, 512, 64, 64), {"query_rows": 128, "forward_ctas": 264}),
        ((1, 65, 65, 512, 512, 64, 64), {"query_rows": 64, "forward_ctas": 520}),
        # Columns: the head dimension rounded up to what is compiled.
        ((1, 1, 1, 100, 100, 8, 0), {"head": 64, "block_backward": 64}),
        ((1, 1, 1, 100, 100, 72, 0), {"head": 96, "block_backward": 32}),
        ((1, 1, 1, 100, 100, 104, 0), {"head": 128}),
        ((1, 1, 1, 100, 100, 136, 0), {"head": 256}),
        # Up to 16 queries the keys are split, and the group's heads share a query tile.
        ((1, 32, 8, 16, 4096, 128, 64), {"forward": "decode", "query_tiles": 1}),
        ((1, 32, 8, 17, 4096, 128, 64), {"forward": "query tiles", "forward_launches": 1}),
        ((1, 32, 8, 1, 4096, 128, 64), {"key_splits": 33, "forward_ctas": 8 * 33}),
        ((1, 32, 8, 1, 100, 128, 0), {"key_splits": 2, "forward_launches": 2}),
        ((1, 1, 1, 1, 1 << 20, 128, 0), {"key_splits": 64}),
        ((64, 32, 8, 1, 4096, 128, 0), {"key_splits": 1, "forward_launches": 1}),
        # A shared prefix is read once by all rows of a large batch; a small one not.
        (
            (32, 32, 8, 1, 4096, 128, 1024),
            {"forward": "cascade decode", "cascade_tiles": 2, "key_splits": 2},
        ),
        ((16, 32, 8, 1, 0, 128, 1024), {"cascade_tiles": 1, "cascade_splits": 16}),
        ((32, 32, 8, 1, 4096, 128, 8), {"forward": "decode", "cascade_tiles": 0}),
        ((1, 32, 8, 1, 4096, 128, 1024), {"forward": "decode", "cascade_splits": 0}),
        # The gradient of the prefix: split over the batch, or a tile of its own for each row.
        ((4, 8, 2, 128, 128, 64, 64), {"prefix_tiles": 1, "prefix_splits": 32}),
        ((4, 8, 2, 128, 128, 64, 64), {"dkv_ctas": 2 * 32 + 4 * 2 * 2, "backward_launches": 4}),
        ((1, 132, 132, 512, 512, 64, 512), {"prefix_splits": 1, "backward_launches": 3}),
        ((4, 8, 2, 128, 128, 256, 64), {"backward_launches": 5}),
        ((4, 8, 2, 128, 128, 64, 0), {"prefix_tiles": 0, "prefix_splits": 1}),
        # Nothing to do.
        ((0, 8, 2, 128, 128, 64, 0), {"forward_ctas": 0, "dq_ctas": 0, "dkv_ctas": 0}),
        ((2, 8, 2, 0, 128, 64, 4), {"forward_launches": 0, "dq_ctas": 0}),
    ],
)
def test_plan(shape, expected):
    got = plan(shape, H100)
    assert {key: got[key] for key in expected} == expected


def test_plan_follows_the_device_and_the_prefix():
    shape = (1, 64, 64, 512, 512, 64, 64)  # 256 wide tiles
    assert plan(shape, H100)["query_rows"] == 64
    assert plan(shape, A100)["query_rows"] == plan(shape, RTX4090)["query_rows"] == 128
    batched = plan((4, 8, 2, 128, 128, 64, 64), H100, shared_prefix=False)
    assert (batched["prefix_splits"], batched["dkv_ctas"]) == (1, 2 * 4 + 4 * 2 * 2)
    decode = plan((32, 32, 8, 1, 4096, 128, 1024), H100, shared_prefix=False)
    assert decode["forward"] == "decode"
    with pytest.raises(ValueError, match="must divide"):
        plan((1, 8, 3, 1, 1, 64, 0), H100)


# ---- what it costs


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


def forward_counted(shape, **kwargs):
    t = make(*shape, torch.bfloat16)
    with forced(SIMULATED_CUDA), torch.no_grad():
        ops.prefix_attention(*(t[name] for name in NAMES), **kwargs)
        return simulator.counters()


def causal_minimum(heads, length, prefix, head_dim):
    """FLOP of a causal sequence: two products for each pair of query and key."""
    return 4 * heads * (length * prefix + length * (length + 1) // 2) * head_dim


def bytes_once_per_query_tile(rows, heads, length, prefix, head_dim):
    """q once; K and V up to a tile's last query, and of the prefix, once for each query tile."""
    keys = sum(prefix + min(length, end) for end in range(rows, length + rows, rows))
    return heads * (length + 2 * keys) * head_dim * 2


@pytest.mark.parametrize("head_dim", [64, 128])
def test_flop_bytes_and_bank_conflicts(head_dim):
    heads, length, prefix = 2, 512, 64
    forward, backward = counted((1, heads, 1, length, length, head_dim, prefix), causal=True)
    assert len(forward) == 1
    assert forward[0].tensor_flop <= 1.10 * causal_minimum(heads, length, prefix, head_dim)
    bytes_ = bytes_once_per_query_tile(64, heads, length, prefix, head_dim)
    assert forward[0].global_load_bytes == bytes_
    for counters in (*forward, *backward):
        assert counters.shared_wavefronts == counters.shared_ideal_wavefronts, counters.kernel
        assert counters.local_load_bytes == counters.local_store_bytes == 0
        assert counters.global_atomic_bytes == 0


@pytest.mark.parametrize("head_dim", [64, 128])
def test_wide_tiles_read_half_the_keys(head_dim):
    length, prefix = 512, 64
    narrow_heads, heads = 2, 66  # the latter: 264 wide tiles, two for each of an H100's SMs
    (narrow,) = forward_counted((1, narrow_heads, 1, length, length, head_dim, prefix), causal=True)
    (wide,) = forward_counted((1, heads, 6, length, length, head_dim, prefix), causal=True)
    bytes_ = bytes_once_per_query_tile(128, heads, length, prefix, head_dim)
    assert wide.global_load_bytes == bytes_
    assert wide.global_load_bytes / heads <= 0.6 * narrow.global_load_bytes / narrow_heads
    minimum = causal_minimum(1, length, prefix, head_dim)
    assert wide.tensor_flop / heads <= 1.10 * minimum
    # Each fragment of K and V feeds two products. Tiles of 128 columns hold half as many keys, so
    # what a tile costs beside them comes twice as often.
    if head_dim == 64:
        assert wide.warp_instructions / heads < narrow.warp_instructions / narrow_heads
    assert wide.shared_load_bytes / heads < 0.8 * narrow.shared_load_bytes / narrow_heads
    assert wide.shared_wavefronts == wide.shared_ideal_wavefronts
    assert wide.local_load_bytes == wide.local_store_bytes == 0


def test_one_token_is_split_over_the_keys():
    forward, _ = counted((1, 4, 2, 1, 1000, 64, 64), causal=True)
    assert ["forward" in c.kernel or "combine" in c.kernel for c in forward] == [True, True]


def test_cascade_reads_a_shared_prefix_once_for_the_batch():
    batch, group, kv_heads, keys, head_dim, prefix = 16, 4, 2, 64, 64, 512
    shape = (batch, group * kv_heads, kv_heads, 1, keys, head_dim, prefix)
    chosen = plan(shape, H100)
    assert chosen["forward"] == "cascade decode"
    attend, combine = forward_counted(shape)
    row = head_dim * 2
    keys_once = kv_heads * (prefix + batch * keys) * 2 * row
    # A CTA reads its queries: of one batch row, or of all.
    query_reads = chosen["cascade_splits"] + chosen["key_splits"]
    queries = batch * group * kv_heads * query_reads * row
    assert attend.global_load_bytes == keys_once + queries
    assert "combine" in combine.kernel
    assert attend.shared_wavefronts == attend.shared_ideal_wavefronts


# ---- right over many problems and schedules

# Wide query tiles; cascades of one tile, of more than one, without keys; splits of the
# prefix's gradient that take more than one batch row.
CHOSEN = {
    "wide 64": ((11, 24, 12, 100, 130, 64, 20), {"query_rows": 128}),
    "wide 96": ((11, 24, 24, 100, 100, 80, 3), {"query_rows": 128}),
    "wide 128": ((6, 24, 6, 140, 140, 128, 37), {"query_rows": 128}),
    "cascade 64": ((7, 8, 2, 2, 70, 64, 130), {"forward": "cascade decode", "cascade_tiles": 1}),
    "cascade 128": ((20, 12, 3, 1, 5, 128, 70), {"forward": "cascade decode", "cascade_tiles": 2}),
    "cascade 256": ((9, 2, 1, 16, 33, 200, 300), {"forward": "cascade decode", "cascade_tiles": 5}),
    "cascade without keys": ((9, 4, 2, 3, 0, 96, 50), {"forward": "cascade decode"}),
    "many rows": ((40, 16, 8, 1, 2, 64, 3), {"prefix_splits": 33}),
}


@pytest.mark.parametrize("half", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", CHOSEN)
def test_choices_that_small_problems_do_not_get(name, half):
    shape, expected = CHOSEN[name]
    got = plan(shape, H100)
    assert {key: got[key] for key in expected} == expected
    b, keys = shape[0], shape[4]
    lengths = torch.arange(b) * 7 % (keys + 1)
    with forced(SIMULATED_CUDA):
        t = make(*shape, half, layout="bshd")
        assert_no_worse_than_torch(t, causal=shape[3] <= keys, key_lengths=lengths)


@st.composite
def problems(draw):
    b, hkv, group = draw(
        st.sampled_from([(1, 1, 1), (1, 1, 4), (2, 2, 1), (3, 1, 3), (2, 2, 2), (8, 1, 2)])
    )
    s = draw(st.sampled_from([1, 1, 2, 5, 16, 17, 33, 64, 65, 100]))
    keys = s + draw(st.sampled_from([0, 0, 1, 31, 64, 130]))
    p = draw(st.sampled_from([0, 1, 7, 16, 64, 65, 130]))
    d = 8 * draw(st.integers(1, 32))
    options = {
        "causal": draw(st.booleans()),
        "sliding_window": draw(st.sampled_from([None, None, None, 1, 9, 70])),
    }
    if draw(st.integers(0, 2)) == 0:
        lengths = draw(st.lists(st.integers(0, keys), min_size=b, max_size=b))
        options["key_lengths"] = torch.tensor(lengths)
    if draw(st.integers(0, 2)) == 0:
        padding = draw(st.lists(st.integers(0, keys), min_size=b, max_size=b))
        options["key_mask"] = torch.arange(keys) >= torch.tensor(padding)[:, None]
    return (b, hkv * group, hkv, s, keys, d, p), options


@settings(max_examples=160, deadline=None)
@given(
    problem=problems(),
    half=st.sampled_from([torch.bfloat16, torch.float16]),
    layout=st.sampled_from(["bshd", "bhsd"]),
    batched=st.sampled_from([False, False, True]),
    timing=st.sampled_from(["early", "late", "random"]),
    seed=st.integers(0, 1000),
)
def test_drawn_problems_have_no_findings(problem, half, layout, batched, timing, seed):
    shape, kwargs = problem
    t = make(*shape, half, seed=seed, layout=layout, batched=batched)
    schedule = simulator.options(seed=seed, async_timing=timing, max_sms=2 + seed % 3)
    with forced(SIMULATED_CUDA), schedule:
        assert_no_worse_than_torch(t, **kwargs)


@pytest.mark.parametrize("half", [torch.bfloat16, torch.float16])
def test_errors_of_many_draws_together_are_not_above_torchs(half):
    # One draw of so few queries leaves much to chance; of 24 together, little.
    shape, draws = (2, 2, 2, 40, 40, 256, 9), 24
    sums = {}
    for seed in range(draws):
        t = make(*shape, half, seed=seed)
        with forced(SIMULATED_CUDA):
            ours = run(ops.prefix_attention, t, causal=True)
        torchs = run(concat_sdpa, t, causal=True)
        for name, truth in exact(t, causal=True).items():
            pair = sums.setdefault(name, [0.0, 0.0])
            for i, result in enumerate((ours, torchs)):
                pair[i] += relative_error(result[name], truth) ** 2 / draws
    b, heads, _, queries, *_ = shape
    by_chance = 4.0 / math.sqrt(draws * b * heads * queries)
    for name, (error, allowed) in sums.items():
        assert math.sqrt(error) <= math.sqrt(allowed) * (1 + by_chance), name


@pytest.mark.parametrize(
    "shape",
    [
        (3, 4, 2, 70, 90, 64, 70),
        (2, 4, 1, 1, 600, 64, 64),
        (7, 8, 2, 2, 70, 64, 130),
        (1, 2, 1, 40, 40, 256, 9),
    ],
    ids=str,
)
def test_bits_do_not_depend_on_the_schedule(shape):
    t = make(*shape, torch.bfloat16)
    results = []
    # On one device: another number of SMs is another plan, with other splits.
    for seed, timing in itertools.product((0, 1, 2), ("early", "late", "random")):
        schedule = simulator.options(seed=seed, async_timing=timing, max_sms=2)
        with forced(SIMULATED_CUDA), schedule:
            results.append(run(ops.prefix_attention, t, causal=True))
    for other in results[1:]:
        for name, value in results[0].items():
            assert torch.equal(value, other[name]), name


# ---- a model


def test_two_layers_of_smollm2_are_as_near_to_float32_as_with_the_cpu_kernels():
    model = two_layers_of_smollm2()
    torch.manual_seed(0)
    get_peft_model(model, PrefixTuningConfig(num_virtual_tokens=20))
    length = 32
    tokens = torch.randint(0, model.config.vocab_size, (1, length))

    def step(model, backend):
        """The logits and the gradients of the prefixes of one training step."""
        model.zero_grad()
        with forced(backend):
            result = model(input_ids=tokens, labels=tokens)
            result.loss.backward()
            launched = [c.kernel for c in simulator.counters()]
        gradients = {n: p.grad for n, p in model.named_parameters() if p.requires_grad}
        return {"logits": result.logits.detach(), **gradients}, launched

    truth, _ = step(copy.deepcopy(model).float(), _C.cpu_isa())
    cpu, _ = step(model, _C.cpu_isa())
    ours, launched = step(model, SIMULATED_CUDA)
    # The input of the first layer needs no gradient.
    for part, count in (("forward_kernel", 2), ("dkv_kernel", 2), ("dq_kernel", 1)):
        assert sum(part in kernel for kernel in launched) == count, part
    assert len(truth) > 1
    for name, reference in truth.items():
        # Both round to bfloat16 at the same places, but not the same numbers. A token's errors are
        # not independent of each other, those of two tokens are: see assert_no_worse_than_torch.
        by_chance = 4.0 / math.sqrt(length)
        error, allowed = (relative_error(run_[name], reference.double()) for run_ in (ours, cpu))
        assert error <= allowed * (1 + by_chance), (name, error, allowed)
