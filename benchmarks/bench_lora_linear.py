"""One LoRA linear layer: fused_peft against nn.Linear alone, HF PEFT's layer and plain addmm.

    python benchmarks/bench_lora_linear.py --dtype bfloat16 --json out.json --plot out.png

Peers, all with the same weights and rank:
    linear    nn.Linear without any adapter: the floor of every unfused design
    peft      Hugging Face PEFT's lora.Linear with its defaults (float32 adapters)
    addmm     y = x W^T, then addmm_ of the low-rank update, adapters in the base dtype
    ours      fused_peft.LoraLinear, adapters in the base dtype
    ours-fp32 fused_peft.LoraLinear with float32 adapters, PEFT's default
Times are interleaved medians, over several placements of the tensors in memory; ratios below 1
mean that ours is faster.
"""

from __future__ import annotations

import argparse
import random
import statistics
from collections.abc import Callable

import torch
from timing import (
    interleaved_medians,
    keep_freed_memory,
    machine,
    plot_relative,
    print_geomeans,
    print_table,
    write_json,
)
from torch import Tensor, nn

from fused_peft import LoraLinear

# M x K x N: SmolLM2-135M's projections at 512 tokens, two square layers, and decoding on those.
DEFAULT_SHAPES = (
    "512x576x576,512x576x192,512x576x1536,512x1536x576,512x2048x2048,512x4096x4096,"
    "1x2048x2048,16x2048x2048,1x4096x4096,16x4096x4096"
)
PEERS = ("linear", "peft", "addmm", "ours", "ours-fp32")


class AddmmLora(nn.Module):
    """The base product, then ``addmm_`` of the low-rank update into it."""

    def __init__(self, linear: nn.Linear, lora_a: Tensor, lora_b: Tensor, scaling: float) -> None:
        super().__init__()
        self.linear, self.scaling = linear, scaling
        self.lora_a, self.lora_b = nn.Parameter(lora_a), nn.Parameter(lora_b)

    def forward(self, x: Tensor) -> Tensor:
        """``[M, K] -> [M, N]``."""
        y = self.linear(x)
        s = x @ self.lora_a.t()
        if torch.is_grad_enabled():
            return torch.addmm(y, s, self.lora_b.t(), alpha=self.scaling)
        return y.addmm_(s, self.lora_b.t(), alpha=self.scaling)


def peft_layer(linear: nn.Linear, r: int, alpha: int) -> nn.Module:
    from peft import LoraConfig, get_peft_model

    model = nn.ModuleDict({"proj": linear})
    config = LoraConfig(r=r, lora_alpha=alpha, target_modules=["proj"])
    return get_peft_model(model, config).base_model.model["proj"]


def build(peers: list[str], k: int, n: int, r: int, dtype: torch.dtype) -> dict[str, nn.Module]:
    torch.manual_seed(0)
    base = nn.Linear(k, n, bias=False, dtype=dtype).requires_grad_(False)

    def fresh() -> nn.Linear:  # the same weight tensor for all
        linear = nn.Linear(k, n, bias=False, dtype=dtype, device="meta")
        linear.weight = base.weight
        return linear

    lora_a, lora_b = torch.randn(r, k) / k**0.5, torch.randn(n, r)
    alpha = 2 * r
    layers: dict[str, nn.Module] = {"linear": fresh()}
    if "peft" in peers:
        layers["peft"] = peft_layer(fresh(), r, alpha)
        layers["peft"].lora_A["default"].weight.data.copy_(lora_a)  # type: ignore[union-attr]
        layers["peft"].lora_B["default"].weight.data.copy_(lora_b)  # type: ignore[union-attr]
    layers["addmm"] = AddmmLora(fresh(), lora_a.to(dtype), lora_b.to(dtype), 2.0)
    for name, adapter_dtype in (("ours", dtype), ("ours-fp32", torch.float32)):
        layer = LoraLinear.from_linear(fresh(), r=r, lora_alpha=alpha, adapter_dtype=adapter_dtype)
        layer.lora_A["default"].data.copy_(lora_a)
        layer.lora_B["default"].data.copy_(lora_b)
        layers[name] = layer
    if dtype == torch.float32:
        del layers["ours-fp32"]
    return {name: layer for name, layer in layers.items() if name in peers}


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
        layers = build(args.peers, k, n, args.r, dtype)
        x, dy = torch.randn(m, k, dtype=dtype), torch.randn(m, n, dtype=dtype)
        with torch.no_grad():
            times = interleaved_medians(forward_runs(layers, x), seconds=seconds)
        by_pass.setdefault("decode" if m <= 16 else "forward", []).append(times)
        if m > 16:
            times = interleaved_medians(training_runs(layers, x, dy), seconds=seconds)
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
    parser.add_argument("--device", default="cpu", choices=["cpu"])
    parser.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float32", "float16"])
    parser.add_argument("--shapes", default=DEFAULT_SHAPES, help="MxKxN, comma-separated")
    parser.add_argument("--peers", default=",".join(PEERS), help="comma-separated")
    parser.add_argument("--r", type=int, default=16)
    parser.add_argument("--seconds", type=float, default=2.0, help="per table row")
    parser.add_argument("--placements", type=int, default=5, help="of the tensors in memory")
    parser.add_argument("--threads", type=int, default=None)
    parser.add_argument(
        "--keep-memory", action="store_true", help="glibc keeps freed blocks: no page faults"
    )
    parser.add_argument("--json")
    parser.add_argument("--plot")
    args = parser.parse_args()
    args.peers = args.peers.split(",")
    unknown = set(args.peers) - set(PEERS)
    if unknown or not {"linear", "ours"} <= set(args.peers):
        parser.error(f"--peers must hold linear and ours, of {PEERS}; got {args.peers}")
    return args


def main() -> None:
    args = parse()
    if args.keep_memory:
        keep_freed_memory()
    if args.threads:
        torch.set_num_threads(args.threads)
    dtype = getattr(torch, args.dtype)
    peers = [p for p in args.peers if p != "ours-fp32" or dtype != torch.float32]
    print(f"{machine()}, {args.dtype}, r={args.r}\n")
    results = [r for shape in args.shapes.split(",") for r in measure(args, shape, dtype)]
    means = report(results, peers)
    content = {"machine": machine(), "dtype": args.dtype, "r": args.r}
    write_json(args.json, content | {"results": results, "geomeans": means})
    if args.plot:
        labels = [f"{r['shape']}\n{r['pass']}" for r in results]
        seconds = [r["seconds"] for r in results]
        plot_relative(
            args.plot,
            seconds,
            labels,
            peers,
            "linear",
            f"LoRA linear layer, {args.dtype}, r={args.r}",
        )


if __name__ == "__main__":
    main()
