"""The losses of one process and of many, on top of each other.

Runs ``finetune_distributed.py`` through torchrun with 1, 2 and 4 processes on the same batches,
and draws every loss curve into one picture, with the distance from that of one process below.

    python examples/compare_distributed.py --steps 30 --out out/distributed
    python examples/compare_distributed.py --runs ddp:1 tp:2 -- --model path/to/model

What follows ``--`` is passed on.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from finetune_distributed import LOSSES, PARALLEL
from finetune_smollm2 import COUNT

RUNS = ["ddp:1", "ddp:2", "ddp:4", "fsdp:2", "fsdp:4", "tp:2", "tp_fsdp:4"]
PICTURE = "loss_curves_distributed.png"


def parse_run(text: str) -> tuple[str, int]:
    """``ddp:2`` as a way to share the work and a number of processes."""
    parallel, _, processes = text.partition(":")
    if parallel not in PARALLEL or not processes.isdigit() or int(processes) < 1:
        raise argparse.ArgumentTypeError(
            f"expected one of {', '.join(PARALLEL)}, a colon and a number, got {text!r}"
        )
    return parallel, int(processes)


def train(parallel: str, processes: int, out: Path, options: list[str]) -> dict[str, Any]:
    """What a run measured.

    Raises:
        CalledProcessError: it failed.
    """
    example = Path(__file__).with_name("finetune_distributed.py")
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    given = [str(example), "--parallel", parallel, "--out", str(out), *options]
    print(f"{parallel}, {processes} processes", flush=True)
    subprocess.run([sys.executable, *launcher, *given], check=True)
    result: dict[str, Any] = json.loads((out / LOSSES).read_text(encoding="utf-8"))
    return result


def plot(path: Path, results: list[dict[str, Any]]) -> None:
    """All curves, each thinner than the one below it, and their distance from the first."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    figure = Figure(figsize=(9, 6), layout="constrained")
    above, below = figure.subplots(2, sharex=True, height_ratios=(2, 1))
    first = results[0]["losses"]
    steps = range(1, len(first) + 1)
    for index, result in enumerate(results):
        label = f"{result['parallel']}, {result['processes']}"
        label += " process" if result["processes"] == 1 else " processes"
        width = 1.0 + 1.6 * (len(results) - 1 - index)
        above.plot(steps, result["losses"], color=f"C{index}", linewidth=width, label=label)
        if index:
            apart = [
                abs(ours - theirs) for ours, theirs in zip(result["losses"], first, strict=True)
            ]
            below.plot(steps, apart, color=f"C{index}", linewidth=1.0)
    above.set(ylabel="training loss, nats a token")
    figure.legend(loc="outside right upper")
    below.set(xlabel="step", ylabel=f"distance from\n{results[0]['processes']} process")
    below.set_yscale("symlog", linthresh=1e-7)
    below.set_ylim(0, None)
    below.xaxis.set_major_locator(MaxNLocator(integer=True))
    figure.savefig(path, dpi=120)


def main(argv: list[str] | None = None) -> int:
    """The exit status: 0, or 1 where a curve lies further from the first than ``--within``."""
    parser = argparse.ArgumentParser(
        description=(__doc__ or "").partition("\n")[0],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--runs", type=parse_run, nargs="+", default=[parse_run(r) for r in RUNS])
    parser.add_argument("--steps", type=COUNT, default=30)
    parser.add_argument("--within", type=float, default=1e-3, help="greatest distance allowed")
    parser.add_argument("--dtype", choices=["bfloat16", "float32"], default="float32")
    parser.add_argument("--out", type=Path, default=Path("out/distributed"))
    parser.add_argument("options", nargs="*", help="for finetune_distributed.py, after --")
    args = parser.parse_args(argv)
    options = ["--steps", str(args.steps), "--dtype", args.dtype, *args.options]
    results = [train(p, n, args.out / f"{p}_{n}", options) for p, n in args.runs]
    plot(args.out / PICTURE, results)
    first = results[0]["losses"]
    worst = 0.0
    for result in results:
        pairs = zip(result["losses"], first, strict=True)
        apart = max(abs(ours - theirs) for ours, theirs in pairs)
        worst = max(worst, apart)
        print(
            f"{result['parallel']:8} {result['processes']} processes: loss {first[0]:.3f} to "
            f"{result['losses'][-1]:.3f}, at most {apart:.1e} from the first curve, "
            f"{result['seconds']:.0f} s"
        )
    print(f"{args.out / PICTURE}")
    return 0 if worst <= args.within else 1


if __name__ == "__main__":
    sys.exit(main())
