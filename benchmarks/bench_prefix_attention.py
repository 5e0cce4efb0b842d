"""Prefix attention: fused_peft against concatenation + SDPA, and against no prefix at all.

    python benchmarks/bench_prefix_attention.py --dtype bfloat16 --json out.json --plot out.png
    python benchmarks/bench_prefix_attention.py --device cuda
    python benchmarks/bench_prefix_attention.py --device simulated-cuda

The peers are in attention_peers.py, all on the same tensors, which lie in memory as a projection
leaves them ([B, S, H, D]). Times are interleaved medians, on a GPU of CUDA-graph replays with the
L2 cache flushed; ratios below 1 mean that ours is faster. MB is what the peak memory grew by during
the pass, the outputs included. ``simulated-cuda`` runs the CUDA kernels without a GPU and prints
what they do instead of how long they take.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import dataclass

import torch
from attention_peers import PEERS, Attention, available, build
from command_line import add_options, begin
from counts import print_launches, simulated_passes
from timing import (
    machine,
    medians,
    peak_growth,
    plot_relative,
    print_geomeans,
    print_table,
    write_json,
)
from torch import Tensor

from fused_peft import prefix_attention, simulator

# B, Hq, Hkv, S, D, P (and T where it is not S): SmolLM2's heads at three lengths, a head of 128 as
# in 7B models, decoding with a cache.
DEFAULT_PROBLEMS = (
    "4x9x3x128x64x32,2x9x3x512x64x32,1x9x3x2048x64x64,1x32x8x1024x128x128,8x9x3x1x64x32x512"
)
COUNTED_PROBLEMS = "1x4x2x512x64x64,1x2x1x512x128x64,1x4x2x1x64x64x1024"
DEFAULT_PEERS = {
    "cpu": ["bare", "concat", "ours"],
    "cuda": [name for name in PEERS if available(name)],
    "simulated-cuda": ["bare", "ours"],
}


def forward(attention: Attention, operands: list[Tensor]) -> None:
    with torch.no_grad():
        attention(*operands)


def training(attention: Attention, operands: list[Tensor], dout: Tensor) -> None:
    out = attention(*operands)
    torch.autograd.grad(out, operands, dout, allow_unused=True)


@dataclass(frozen=True)
class Problem:
    """Sizes as in ``prefix_attention``; causal."""

    batch: int
    q_heads: int
    kv_heads: int
    queries: int
    head_dim: int
    prefix: int
    keys: int

    @classmethod
    def parse(cls, text: str) -> Problem:
        """``BxHqxHkvxSxDxP`` or ``...xPxT``."""
        sizes = [int(part) for part in text.split("x")]
        return cls(*sizes, *([sizes[3]] if len(sizes) == 6 else []))

    def pairs(self) -> int:
        """Of queries and keys that they see."""
        s, t = self.queries, self.keys
        return self.batch * self.q_heads * (s * self.prefix + s * (t - s) + s * (s + 1) // 2)

    def operands(self, dtype: torch.dtype, device: str) -> tuple[list[Tensor], Tensor]:
        """``q, k, v, prefix_k, prefix_v`` that take gradients, and ``dout``."""
        torch.manual_seed(0)

        def heads(count: int, length: int) -> Tensor:
            drawn = torch.randn(self.batch, length, count, self.head_dim, device=device)
            return drawn.to(dtype).transpose(1, 2)

        q, dout = (heads(self.q_heads, self.queries) for _ in range(2))
        k, v = (heads(self.kv_heads, self.keys) for _ in range(2))
        learned = (
            torch.randn(self.kv_heads, self.prefix, self.head_dim, device=device).to(dtype)
            for _ in range(2)
        )
        return [x.requires_grad_() for x in (q, k, v, *learned)], dout


# Matrix products over a head's pairs: q k^T and p v forward; those of dv, dp, dq, dk and the scores
# once more backward.
FORWARD_PRODUCTS, BACKWARD_PRODUCTS = 2, 5


def count(text: str, dtype: torch.dtype) -> dict[str, object]:
    """Counts and prints the CUDA kernels' launches of one problem in the simulator."""
    problem = Problem.parse(text)
    operands, dout = problem.operands(dtype, "cpu")
    product = 2 * problem.pairs() * problem.head_dim
    passes = simulated_passes(
        lambda: prefix_attention(*operands, causal=True),
        dout,
        FORWARD_PRODUCTS * product,
        BACKWARD_PRODUCTS * product,
    )
    print_launches(text, passes)
    print()
    return {"problem": text, "passes": [p.summary() for p in passes]}


def measure(args: argparse.Namespace, text: str, dtype: torch.dtype) -> list[dict[str, object]]:
    problem = Problem.parse(text)
    s = problem.queries
    operands, dout = problem.operands(dtype, args.device)
    peers = build(args.peers, problem.batch, s, problem.keys, problem.prefix, args.device)
    runs: dict[str, dict[str, Callable[[], object]]] = {
        "decode" if s == 1 else "forward": {
            n: (lambda f=f: forward(f, operands)) for n, f in peers.items()
        }
    }
    if s > 1:
        runs["forward+backward"] = {
            n: (lambda f=f: training(f, operands, dout)) for n, f in peers.items()
        }
    results = []
    for name, by_peer in runs.items():
        seconds = medians(args.device)(by_peer, seconds=args.seconds)
        products = FORWARD_PRODUCTS
        if name == "forward+backward":
            products += BACKWARD_PRODUCTS
        results.append(
            {
                "problem": text,
                "pass": name,
                "seconds": seconds,
                "megabytes": {n: peak_growth(run, args.device) / 1e6 for n, run in by_peer.items()},
                "gflops": 2e-9 * products * problem.pairs() * problem.head_dim / seconds["ours"],
            }
        )
    return results


def report(results: list[dict[str, object]], peers: list[str]) -> dict[str, dict[str, float]]:
    others = [p for p in peers if p != "ours"]
    header = ["B,Hq,Hkv,S,D,P(,T)", "pass", *(f"{p} ms" for p in peers), "GFLOP/s"]
    header += [*(f"ours/{p}" for p in others), *(f"{p} MB" for p in peers)]
    rows = []
    ratios: dict[str, dict[str, list[float]]] = {}
    for result in results:
        seconds: dict[str, float] = result["seconds"]  # type: ignore[assignment]
        megabytes: dict[str, float] = result["megabytes"]  # type: ignore[assignment]
        row = [str(result["problem"]).replace("x", ","), str(result["pass"])]
        row += [*(f"{seconds[p] * 1e3:.3f}" for p in peers), f"{result['gflops']:.0f}"]
        group = "training" if result["pass"] == "forward+backward" else "forward, decode"
        for other in others:
            ratio = seconds["ours"] / seconds[other]
            row.append(f"{ratio:.3f}")
            ratios.setdefault(group, {}).setdefault(f"ours/{other}", []).append(ratio)
        rows.append(row + [f"{megabytes[p]:.1f}" for p in peers])
    print_table(header, rows)
    return print_geomeans(ratios)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add_options(parser, PEERS)
    parser.add_argument("--problems", help="BxHqxHkvxSxDxP or ...xPxT, comma-separated")
    args = parser.parse_args()
    if args.problems is None:
        args.problems = COUNTED_PROBLEMS if args.device == "simulated-cuda" else DEFAULT_PROBLEMS
    args.peers = args.peers.split(",") if args.peers else DEFAULT_PEERS[args.device]
    if set(args.peers) - set(PEERS) or not {"bare", "ours"} <= set(args.peers):
        parser.error(f"--peers must hold bare and ours, of {PEERS}; got {args.peers}")
    return args


def main() -> None:
    args = parse()
    dtype = begin(args)
    if args.device == "simulated-cuda":
        with simulator.use_device(args.simulated_device):
            counts = [count(problem, dtype) for problem in args.problems.split(",")]
        write_json(
            args.json, {"device": args.simulated_device, "dtype": args.dtype, "counts": counts}
        )
        return
    results = [r for problem in args.problems.split(",") for r in measure(args, problem, dtype)]
    means = report(results, args.peers)
    content = {"machine": machine(), "dtype": args.dtype}
    write_json(args.json, content | {"results": results, "geomeans": means})
    if args.plot:
        labels = [f"{str(r['problem']).replace('x', ',')}\n{r['pass']}" for r in results]
        seconds = [r["seconds"] for r in results]
        plot_relative(
            args.plot, seconds, labels, args.peers, "bare", f"Prefix attention, {args.dtype}"
        )


if __name__ == "__main__":
    main()
