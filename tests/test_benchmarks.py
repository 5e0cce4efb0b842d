"""The benchmarks run from start to end on small problems; what they measure is not tested."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from fused_peft import simulator

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"


def ran(script: str, path: Path, *arguments: str) -> dict:
    command = [sys.executable, BENCHMARKS / script, *arguments, "--json", path]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(path.read_text())


def test_lora_linear(tmp_path):
    peers = "linear,peft,unsloth,lorafusion,ours,ours-fp32"
    small = ("--shapes", "17x64x48,2x64x48", "--seconds", "0.01", "--placements", "2")
    found = ran("bench_lora_linear.py", tmp_path / "out.json", *small)
    assert [r["pass"] for r in found["results"]] == ["forward", "forward+backward", "decode"]
    for result in found["results"]:
        assert list(result["seconds"]) == peers.split(",")
        assert min(result["seconds"].values()) > 0


def test_prefix_attention(tmp_path):
    small = ("--problems", "1x2x1x17x16x4,1x2x1x1x16x4x33", "--seconds", "0.01")
    peers = ("--peers", "bare,concat,flash,ours")
    found = ran("bench_prefix_attention.py", tmp_path / "out.json", *small, *peers)
    assert [r["pass"] for r in found["results"]] == ["forward", "forward+backward", "decode"]
    for result in found["results"]:
        assert min(result["seconds"].values()) > 0


@pytest.mark.skipif(not simulator.has_kernels(), reason="no nvcc, so no CUDA kernels were built")
@pytest.mark.parametrize(
    ("script", "problem"),
    [
        ("bench_lora_linear.py", ("--shapes", "128x128x64")),
        ("bench_prefix_attention.py", ("--problems", "1x2x1x64x64x64")),
    ],
)
def test_counts_of_the_cuda_kernels(script, problem, tmp_path):
    found = ran(script, tmp_path / "out.json", "--device", "simulated-cuda", *problem)
    (counts,) = found["counts"]
    forward, backward = counts["passes"]
    assert forward["launches"] == 1
    for one in (forward, backward):
        # A kernel does no less than the products, and moves each byte at least once.
        assert one["tensor_flop"] >= one["ideal_flop"] > 0
        assert one["global_bytes"] >= one["compulsory_bytes"] > 0
        assert one["local_bytes"] == one["bank_conflicts"] == 0
    for ours, torchs in counts.get("errors", {}).values():
        assert ours <= torchs * 1.02
