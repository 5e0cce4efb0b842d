"""Deliberate faults in the narrow backward passes of sm_90: each must turn a check red."""

from __future__ import annotations

import pytest
from cuda_faults import Fault, assert_seen, backward_check, build, needs_build_folder, run_check

pytestmark = needs_build_folder

X_PASS, RING, NARROW = "lora_x_pass_sm90.cuh", "skinny_sm90.cuh", "narrow_sm90.cuh"
REDUCE = "lora_backward_sm80.cuh"
FULL_WAIT = "ptx::mbarrier_wait(ring.full(place.stage), place.phase);"
# What it breaks: (header, text, text instead) ....
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

# Rings that go round, clusters of two and more, tails in every direction, both kinds of factors.
CHECK = backward_check(
    """[
    ((1300, 72, 72, 24), 0.3, "late", "bfloat16"),
    ((2100, 136, 136, 8), 0.0, "early", "bfloat16"),
    ((700, 72, 72, 40), 0.3, "random", "float32"),
    ((1300, 72, 72, 16), 0.3, "random", "bfloat16"),
]""",
    "max_sms=8, hang_budget=300_000",
)


def build_changed(folder, source, faults=()):
    header, *texts = faults or (None,)
    changes = [Fault(header, *texts[i : i + 2]) for i in range(0, len(texts), 2)]
    return build(folder, source, *changes)


@pytest.mark.parametrize("source", ["lora_x_pass_bf16_sm90.cu"])
def test_kernels_as_they_are_pass(source, tmp_path):
    done = run_check(build_changed(tmp_path, source), CHECK)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("fault", X_FAULTS)
def test_fault_of_the_x_pass_is_seen(fault, tmp_path):
    library = build_changed(tmp_path, "lora_x_pass_bf16_sm90.cu", X_FAULTS[fault])
    assert_seen(run_check(library, CHECK))
