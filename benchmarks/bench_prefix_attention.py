"""Prefix attention: fused_peft against concatenation + SDPA, and against no prefix at all.

    python benchmarks/bench_prefix_attention.py --dtype bfloat16 --json out.json --plot out.png

Peers, all on the same tensors, which lie in memory as a projection leaves them ([B, S, H, D]):
    bare      scaled_dot_product_attention without the prefix: the floor of every unfused design
    concat    the prefix expanded over the batch and concatenated with k and v, then SDPA with the
              mask that makes the prefix visible: what PEFT and transformers do
    ours      fused_peft.prefix_attention
Times are interleaved medians; ratios below 1 mean that ours is faster. MB is what the process's
peak memory grew by during the pass, the outputs included.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable

import torch
from timing import (
    interleaved_medians,
    keep_freed_memory,
    machine,
    peak_growth,
    plot_relative,
    print_geomeans,
    print_table,
    write_json,
)
from torch import Tensor
from torch.nn import functional as F

from fused_peft import prefix_attention

# B, Hq, Hkv, S, D, P (and T where it is not S): SmolLM2's heads at three lengths, a head of 128 as
# in 7B models, decoding with a cache.
DEFAULT_PROBLEMS = (
    "4x9x3x128x64x32,2x9x3x512x64x32,1x9x3x2048x64x64,1x32x8x1024x128x128,8x9x3x1x64x32x512"
)
PEERS = ("bare", "concat", "ours")
Attention = Callable[..., Tensor]


def peers_for(batch: int, queries: int, keys: int, prefix: int) -> dict[str, Attention]:
    # One query sees all keys: no mask is needed, and SDPA is faster without.
    mask = None
    if queries > 1:
        mask = torch.ones(queries, keys, dtype=torch.bool).tril(keys - queries)
        mask = F.pad(mask, (prefix, 0), value=True)

    def concat(q: Tensor, k: Tensor, v: Tensor, prefix_k: Tensor, prefix_v: Tensor) -> Tensor:
        k = torch.cat((prefix_k.expand(batch, -1, -1, -1), k), dim=2)
        v = torch.cat((prefix_v.expand(batch, -1, -1, -1), v), dim=2)
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=True)

    def bare(q: Tensor, k: Tensor, v: Tensor, _prefix_k: Tensor, _prefix_v: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(q, k, v, is_causal=queries > 1, enable_gqa=True)

    def ours(*operands: Tensor) -> Tensor:
        return prefix_attention(*operands, causal=True)

    return {"bare": bare, "concat": concat, "ours": ours}


def forward(attention: Attention, operands: list[Tensor]) -> None:
    with torch.no_grad():
        attention(*operands)


def training(attention: Attention, operands: list[Tensor], dout: Tensor) -> None:
    out = attention(*operands)
    torch.autograd.grad(out, operands, dout, allow_unused=True)


def measure(args: argparse.Namespace, problem: str, dtype: torch.dtype) -> list[dict[str, object]]:
    b, hq, hkv, s, d, p, *more = (int(part) for part in problem.split("x"))
    t = more[0] if more else s
    torch.manual_seed(0)

    def heads(count: int, length: int) -> Tensor:
        return torch.randn(b, length, count, d).to(dtype).transpose(1, 2)

    q, k, v, dout = heads(hq, s), heads(hkv, t), heads(hkv, t), heads(hq, s)
    prefix_k, prefix_v = (torch.randn(hkv, p, d).to(dtype) for _ in range(2))
    operands = [x.requires_grad_() for x in (q, k, v, prefix_k, prefix_v)]
    peers = {n: f for n, f in peers_for(b, s, t, p).items() if n in args.peers}
    pairs = b * hq * (s * p + s * (t - s) + s * (s + 1) // 2)  # of queries and keys they see
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
        seconds = interleaved_medians(by_peer, seconds=args.seconds)
        products = 7 if name == "forward+backward" else 2
        results.append(
            {
                "problem": problem,
                "pass": name,
                "seconds": seconds,
                "megabytes": {n: peak_growth(run) / 1e6 for n, run in by_peer.items()},
                "gflops": 2e-9 * products * pairs * d / seconds["ours"],
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
    parser.add_argument("--device", default="cpu", choices=["cpu"])
    parser.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float32", "float16"])
    parser.add_argument(
        "--problems", default=DEFAULT_PROBLEMS, help="BxHqxHkvxSxDxP or ...xPxT, comma-separated"
    )
    parser.add_argument("--peers", default=",".join(PEERS), help="comma-separated")
    parser.add_argument("--seconds", type=float, default=2.0, help="per table row")
    parser.add_argument("--threads", type=int, default=None)
    parser.add_argument(
        "--keep-memory", action="store_true", help="glibc keeps freed blocks: no page faults"
    )
    parser.add_argument("--json")
    parser.add_argument("--plot")
    args = parser.parse_args()
    args.peers = args.peers.split(",")
    if set(args.peers) - set(PEERS) or not {"bare", "ours"} <= set(args.peers):
        parser.error(f"--peers must hold bare and ours, of {PEERS}; got {args.peers}")
    return args


def main() -> None:
    args = parse()
    if args.keep_memory:
        keep_freed_memory()
    if args.threads:
        torch.set_num_threads(args.threads)
    dtype = getattr(torch, args.dtype)
    print(f"{machine()}, {args.dtype}\n")
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
