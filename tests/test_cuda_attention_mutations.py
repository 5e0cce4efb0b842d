"""Deliberate faults in prefix attention's CUDA kernels: each must turn a check red."""

from __future__ import annotations

import pytest
from cuda_faults import Fault, assert_seen, build, needs_build_folder, run_check

pytestmark = needs_build_folder

FORWARD, BACKWARD = "prefix_attention_forward", "prefix_attention_backward"
TILE, DQ, DKV = (f"prefix_attention_{part}_sm80.cuh" for part in ("tile", "dq", "dkv"))
# Other heads than those of 64 columns are left out: they take most of the time to compile.
ONE_HEAD = Fault(
    "prefix_attention_instances.h",
    """    case 96: return run(HeadTile<96>{});
    case 128: return run(HeadTile<128>{});
    case 256: return run(HeadTile<256>{});
""",
    "",
)
# What it breaks: (source that is compiled, header, text, text instead).
FAULTS = {
    "the next keys are not waited for": (
        FORWARD, f"{FORWARD}_sm80.cuh",
        "if (tile > begin) {\n      ptx::cp_async_wait<0>();", "if (tile > begin) {"),
    "no barrier before a stage is filled again": (
        FORWARD, f"{FORWARD}_sm80.cuh",
        "if (tile > begin) {\n      ptx::cp_async_wait<0>();\n      __syncthreads();",
        "if (tile > begin) {\n      ptx::cp_async_wait<0>();"),
    "values of the other stage": (
        FORWARD, f"{FORWARD}_sm80.cuh", "slot_of(tile) + Kernel::kTileBytes, offsets",
        "slot_of(tile + 1) + Kernel::kTileBytes, offsets"),
    "a query sees the key after its own": (
        FORWARD, TILE, "clamp(position + 1, range.hi)", "clamp(position + 2, range.hi)"),
    "sliding window a key too long": (
        FORWARD, TILE, "clamp(position - window + 1, keys)", "clamp(position - window, keys)"),
    "the prefix's ragged tail is not masked": (
        FORWARD, f"{FORWARD}_sm80.cuh", "prefix ? key + kKeys > tiles.prefix :",
        "prefix ? false :"),
    "the prefix moves with the batch row": (
        FORWARD, TILE, "head_rows<Element>(keys, b, kv_head, at)",
        "head_rows<Element>(keys, 0, kv_head, at) + b * p.k.batch_stride"),
    "query heads of a group are not neighbours": (
        FORWARD, f"{FORWARD}_sm80.cuh", "kPacked ? head : head / group",
        "kPacked ? head : head % group"),
    "earlier sums are not rescaled": (
        FORWARD, f"{FORWARD}_sm80.cuh", "fmaf(sum[half], rescale[half], added)",
        "sum[half] + added"),
    "lse in base 2": (
        FORWARD, f"{FORWARD}_sm80.cuh", "lse2[half] * kLn2", "lse2[half]"),
    "a split is left out of the output": (
        FORWARD, f"{FORWARD}_sm80.cuh",
        "for (int32_t split = 0; split < splits; ++split) {\n      const int64_t at",
        "for (int32_t split = 1; split < splits; ++split) {\n      const int64_t at"),
    "a cascade's parts lie where those of the sequence do": (
        FORWARD, f"{FORWARD}_sm80.cuh", "split + (cascade ? 0 : p.cascade_splits)",
        "split"),
    "delta without half of its terms": (
        BACKWARD, f"{BACKWARD}_sm80.cuh", "fmaf(x.x, y.x, fmaf(x.y, y.y, sum))",
        "fmaf(x.x, y.x, sum)"),
    "a split of the prefix's gradient is lost": (
        BACKWARD, f"{BACKWARD}_sm80.cuh", "split < p.prefix_splits",
        "split + 1 < p.prefix_splits"),
    "a query's lse for both queries of a pair": (
        BACKWARD, DKV, "i % 2 ? -lse2.y : -lse2.x", "-lse2.x"),
    "the prefix's gradient stays in the first batch row": (
        BACKWARD, DKV, "head = kv_head * group;\n    ++b;", "head = kv_head * group;"),
    "dq's ring is filled while it is read": (
        BACKWARD, DQ, "ptx::cp_async_wait<0>();\n      __syncthreads();\n    }",
        "ptx::cp_async_wait<0>();\n    }"),
}  # fmt: skip

# B, Hq, Hkv, S, T, D, P. Tiles of a prefix and of a causal sequence; a window; decode, split; a
# cascade; more batch rows than splits of the prefix's gradient.
CHECK = """
import sys, torch
sys.path.insert(0, sys.argv[1])
from test_attention_ops import assert_no_worse_than_torch, make
from fused_peft import simulator

PROBLEMS = [
    ((2, 4, 2, 150, 150, 64, 70), {"causal": True}),
    ((1, 2, 1, 100, 100, 64, 8), {"causal": True, "sliding_window": 20}),
    ((1, 4, 2, 3, 300, 64, 5), {"causal": True}),
    ((9, 4, 2, 1, 20, 64, 130), {}),
    ((40, 16, 8, 1, 2, 64, 3), {}),
]
for shape, options in PROBLEMS:
    for timing in ("late", "early"):
        simulator.reset()
        with simulator.simulated_cuda(), simulator.options(async_timing=timing, max_sms=2):
            try:
                assert_no_worse_than_torch(make(*shape, torch.bfloat16), **options)
            except AssertionError as wrong:
                sys.exit(f"wrong: {wrong}")
            finally:
                for finding in simulator.findings():
                    sys.exit(f"finding: {finding.kind} at {finding.source}")
"""


@pytest.mark.parametrize("source", [FORWARD, BACKWARD])
def test_kernels_as_they_are_pass(source, tmp_path):
    done = run_check(build(tmp_path, f"{source}_bf16_sm80.cu", ONE_HEAD), CHECK)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("fault", FAULTS)
def test_fault_is_seen(fault, tmp_path):
    source, *edit = FAULTS[fault]
    library = build(tmp_path, f"{source}_bf16_sm80.cu", ONE_HEAD, Fault(*edit))
    assert_seen(run_check(library, CHECK))
