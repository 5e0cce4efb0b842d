"""Deliberate faults in the narrow backward passes of sm_90: each must turn a check red."""

from __future__ import annotations

import pytest
from cuda_faults import Fault, assert_seen, backward_check, build, needs_build_folder, run_check

pytestmark = needs_build_folder

X_PASS, DY_PASS = "lora_x_pass_sm90.cuh", "lora_dy_pass_sm90.cuh"
RING, NARROW, REDUCE = "skinny_sm90.cuh", "narrow_sm90.cuh", "lora_backward_sm80.cuh"
FULL_WAIT = "ptx::mbarrier_wait(ring.full(place.stage), place.phase);"
# What it breaks: header, text, text instead, and so on.
X_FAULTS = {
    "wrong phase bit of a consumer": (
        X_PASS, FULL_WAIT, FULL_WAIT.replace("phase", "phase ^ 1")),
    "wrong phase bit of the producer": (
        X_PASS, "ring.empty(place.stage), place.phase", "ring.empty(place.stage), place.phase ^ 1"),
    "a stage filled before it is free": (
        X_PASS, "ptx::mbarrier_wait(ring.empty(place.stage), place.phase);\n", ""),
    "a stage freed before it is read": (
        X_PASS, "    ring.release(place.stage, lane);\n  }", "  }",
        FULL_WAIT, FULL_WAIT + "ring.release(place.stage, lane);"),
    "dropout counters of another column tile": (X_PASS, "* p.k + k0)", "* p.k)"),
    "one consumer too few counted": (
        RING, "mbarrier_init(empty(i), Tile::kConsumers)",
        "mbarrier_init(empty(i), Tile::kConsumers - 1)"),
    "sums written into a ring in use": (
        X_PASS, "  __syncthreads();  // with the producer: the ring is free\n", "",
        "    __syncwarp();\n    __syncthreads();\n  }\n", "    __syncwarp();\n  }\n"),
    "a part's sums lost": (
        X_PASS, "part = 1; part < Tile::kParts", "part = 2; part < Tile::kParts"),
    "no cluster barrier before peers are read": (
        X_PASS, "ptx::cluster_sync();\n  const uint32_t", "__syncthreads();\n  const uint32_t"),
    "exit before a peer has read": (
        X_PASS, "ptx::cluster_sync();  // until no CTA reads this one's memory any more", ""),
    "the first stages' ds one block off": (
        X_PASS, "  block = first;\n  for", "  block = first + ranks;\n  for"),
    "columns beyond K written": (X_PASS, "if (k >= p.k) continue;", ""),
    "swizzle of the odd rows": (NARROW, "tile_offset<64>(row + 1,", "128 + tile_offset<64>(row,"),
    "a part of dlora_b lost": (REDUCE, "part = 1; part < p.count", "part = 2; part < p.count"),
}  # fmt: skip

DY_FAULTS = {
    "wrong phase bit of a consumer": (
        DY_PASS, FULL_WAIT, FULL_WAIT.replace("phase", "phase ^ 1")),
    "a stage filled before it is free": (
        DY_PASS, "ptx::mbarrier_wait(ring.empty(place.stage), place.phase ^ 1);\n", ""),
    "a stage freed before it is read": (
        DY_PASS, "    ring.release(place.stage, warp.lane);\n", "",
        FULL_WAIT, FULL_WAIT + "ring.release(place.stage, warp.lane);"),
    "s read before it is there": (DY_PASS, "ptx::barrier_sync(1, kConsumerThreads);", ""),
    "s of rows beyond M": (DY_PASS, "if (row0 + row < p.m) {", "if (row < p.m) {"),
    "sums written into a ring in use": (
        DY_PASS, "  __syncthreads();  // with the producer: the ring is free\n", "",
        "    __syncwarp();\n    __syncthreads();\n  }\n", "    __syncwarp();\n  }\n"),
    "no cluster barrier before peers are read": (
        RING, "ptx::cluster_sync();\n  const int rows", "__syncthreads();\n  const int rows"),
    "exit before a peer has read": (
        RING, "ptx::cluster_sync();  // until no CTA reads this one's memory any more", ""),
    "columns beyond N written": (
        DY_PASS, "const bool both = n + 8 < p.n;", "const bool both = true;"),
    "every tile's dlora_b in one place": (
        DY_PASS, "static_cast<int64_t>(tile) * p.n * p.r", "0"),
    "rows beyond M written": (RING, "out.first + row >= out.rows || ", ""),
}  # fmt: skip

# 15 blocks are two CTAs', more than a ring holds; tails in every direction; both kinds of factors.
OPTIONS = "max_sms=8, hang_budget=300_000"
X_CHECK = backward_check(
    """[
    ((904, 72, 72, 24), 0.3, "late", "bfloat16"),
    ((2100, 72, 136, 8), 0.0, "early", "bfloat16"),
    ((700, 72, 72, 40), 0.3, "random", "float32"),
]""",
    OPTIONS,
)
DY_CHECK = backward_check(
    """[
    ((130, 904, 72, 24), 0.0, "late", "bfloat16"),
    ((520, 904, 72, 16), 0.0, "early", "bfloat16"),
    ((70, 904, 72, 40), 0.0, "random", "float32"),
]""",
    OPTIONS,
)
SOURCES = {X_PASS: "lora_x_pass_bf16_sm90.cu", DY_PASS: "lora_dy_pass_bf16_sm90.cu"}


def build_changed(folder, source, faults=()):
    header, *texts = faults or (None,)
    changes = [Fault(header, *texts[i : i + 2]) for i in range(0, len(texts), 2)]
    return build(folder, source, *changes)


@pytest.mark.parametrize(("kernel", "check"), [(X_PASS, X_CHECK), (DY_PASS, DY_CHECK)])
def test_kernels_as_they_are_pass(kernel, check, tmp_path):
    done = run_check(build_changed(tmp_path, SOURCES[kernel]), check)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("fault", X_FAULTS)
def test_fault_of_the_x_pass_is_seen(fault, tmp_path):
    library = build_changed(tmp_path, SOURCES[X_PASS], X_FAULTS[fault])
    assert_seen(run_check(library, X_CHECK))


@pytest.mark.parametrize("fault", DY_FAULTS)
def test_fault_of_the_dy_pass_is_seen(fault, tmp_path):
    library = build_changed(tmp_path, SOURCES[DY_PASS], DY_FAULTS[fault])
    assert_seen(run_check(library, DY_CHECK))
