"""One LoRA linear layer: fused_peft against nn.Linear alone, HF PEFT's layer and other orders.

    python benchmarks/bench_lora_linear.py --dtype bfloat16 --json out.json --plot out.png
    python benchmarks/bench_lora_linear.py --device cuda
    python benchmarks/bench_lora_linear.py --device simulated-cuda

The peers are in lora_peers.py. Times are interleaved medians; on the CPU over several placements of
the tensors in memory, on a GPU of CUDA-graph replays with the L2 cache flushed. Ratios below 1 mean
that ours is faster. ``simulated-cuda`` runs the CUDA kernels without a GPU and prints what they do
instead of how long they take.
"""

from __future__ import annotations

import argparse
import random
import statistics
from collections.abc import Callable

import torch
from command_line import add_options, begin
from lora_counts import count
from lora_peers import PEERS, build
from timing import (
    machine,
    medians,
    plot_relative,
    print_geomeans,
    print_table,
    write_json,
)
from torch import Tensor, nn

from fused_peft import simulator

# M x K x N: SmolLM2-135M's projections at 512 tokens, two square layers, and decoding on those.
DEFAULT_SHAPES = (
    "512x576x576,512x576x192,512x576x1536,512x1536x576,512x2048x2048,512x4096x4096,"
    "1x2048x2048,16x2048x2048,1x4096x4096,16x4096x4096"
)
# The problem that the simulator's counts are quoted for, and a small one that takes one launch.
COUNTED_SHAPES = "512x1024x1024,512x576x192,8x1024x1024"
DEFAULT_PEERS = {
    "cpu": "linear,peft,unsloth,lorafusion,ours,ours-fp32",
    "cuda": ",".join(PEERS),
    "simulated-cuda": "linear,ours",
}


def forward_runs(layers: dict[str, nn.Module], x: Tensor) -> dict[str, Callable[[], object]]:
    return {name: (lambda layer=layer: layer(x)) for name, layer in layers.items()}


def training_runs(
    layers: dict[str, nn.Module], x: Tensor, dy: Tensor
) -> dict[str, Callable[[], object]]:
    x = x.clone().requires_grad_()

    def step(layer: nn.Module) -> None:
        x.grad = None
        for p in layer.parameters():
            p.grad = None
        layer(x).backward(dy)

    return {name: (lambda layer=layer: step(layer)) for name, layer in layers.items()}


def measure(args: argparse.Namespace, shape: str, dtype: torch.dtype) -> list[dict[str, object]]:
    """Median over several placements in memory of the medians in each.

    Where a tensor happens to lie moves every peer's time by up to 15 %, nn.Linear's included, so
    the tensors are made anew several times behind a block of a drawn size.
    """
    m, k, n = (int(part) for part in shape.split("x"))
    seconds = args.seconds / args.placements
    sizes = random.Random(0)
    by_pass: dict[str, list[dict[str, float]]] = {}
    for _ in range(args.placements):
        _shift = torch.ones(sizes.randrange(1 << 20))
        layers = build(args.peers, k, n, args.r, dtype, args.device)
        x = torch.randn(m, k, dtype=dtype, device=args.device)
        dy = torch.randn(m, n, dtype=dtype, device=args.device)
        with torch.no_grad():
            times = medians(args.device)(forward_runs(layers, x), seconds=seconds)
        by_pass.setdefault("decode" if m <= 16 else "forward", []).append(times)
        if m > 16:
            times = medians(args.device)(training_runs(layers, x, dy), seconds=seconds)
            by_pass.setdefault("forward+backward", []).append(times)
    results: list[dict[str, object]] = [
        {
            "shape": shape,
            "pass": name,
            "seconds": {p: statistics.median(t[p] for t in runs) for p in runs[0]},
        }
        for name, runs in by_pass.items()
    ]
    for result in results:
        gemms = 2 if result["pass"] == "forward+backward" else 1
        seconds = result["seconds"]["ours"]  # type: ignore[index]
        result["gflops"] = gemms * 2e-9 * m * n * k / seconds
        result["gbytes"] = gemms * 1e-9 * dtype.itemsize * (n * k + m * k + m * n) / seconds
    return results


def report(results: list[dict[str, object]], peers: list[str]) -> dict[str, dict[str, float]]:
    header = ["M x K x N", "pass", *(f"{p} us" for p in peers), "GFLOP/s", "GB/s"]
    ours = [p for p in peers if p.startswith("ours")]
    others = [p for p in peers if not p.startswith("ours")]
    pairs = [(a, b) for a in ours for b in others]
    header += [f"{a}/{b}" for a, b in pairs]
    rows = []
    ratios: dict[str, dict[str, list[float]]] = {}
    for result in results:
        seconds: dict[str, float] = result["seconds"]  # type: ignore[assignment]
        row = [str(result["shape"]), str(result["pass"])]
        row += [f"{seconds[p] * 1e6:.1f}" for p in peers]
        row += [f"{result['gflops']:.0f}", f"{result['gbytes']:.1f}"]
        group = "training" if result["pass"] == "forward+backward" else "forward, decode"
        for a, b in pairs:
            ratio = seconds[a] / seconds[b]
            row.append(f"{ratio:.3f}")
            ratios.setdefault(group, {}).setdefault(f"{a}/{b}", []).append(ratio)
        rows.append(row)
    print_table(header, rows)
    return print_geomeans(ratios)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add_options(parser, PEERS)
    parser.add_argument("--shapes", help="MxKxN, comma-separated")
    parser.add_argument("--r", type=int, default=16)
    parser.add_argument("--placements", type=int, default=5, help="of the tensors in memory")
    args = parser.parse_args()
    if args.shapes is None:
        args.shapes = COUNTED_SHAPES if args.device == "simulated-cuda" else DEFAULT_SHAPES
    args.peers = (args.peers or DEFAULT_PEERS[args.device]).split(",")
    if args.dtype == "float32":
        args.peers = [p for p in args.peers if p != "ours-fp32"]
    unknown = set(args.peers) - set(PEERS)
    if unknown or not {"linear", "ours"} <= set(args.peers):
        parser.error(f"--peers must hold linear and ours, of {PEERS}; got {args.peers}")
    return args


def main() -> None:
    args = parse()
    dtype = begin(args, f"r={args.r}")
    if args.device == "simulated-cuda":
        with simulator.use_device(args.simulated_device):
            counts = [count(shape, args.r, dtype) for shape in args.shapes.split(",")]
        write_json(
            args.json,
            {"device": args.simulated_device, "dtype": args.dtype, "r": args.r, "counts": counts},
        )
        return
    results = [r for shape in args.shapes.split(",") for r in measure(args, shape, dtype)]
    means = report(results, args.peers)
    content = {"machine": machine(), "dtype": args.dtype, "r": args.r}
    write_json(args.json, content | {"results": results, "geomeans": means})
    if args.plot:
        labels = [f"{r['shape']}\n{r['pass']}" for r in results]
        seconds = [r["seconds"] for r in results]
        plot_relative(
            args.plot,
            seconds,
            labels,
            args.peers,
            "linear",
            f"LoRA linear layer, {args.dtype}, r={args.r}",
        )


if __name__ == "__main__":
    main()
