"""What the command lines of the benchmarks of one layer share."""

from __future__ import annotations

import argparse
from collections.abc import Collection

import torch
from counts import add_device_options
from timing import keep_freed_memory, machine


def add_options(parser: argparse.ArgumentParser, peers: Collection[str]) -> None:
    """The options that say on what, for how long and into which files."""
    add_device_options(parser)
    parser.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float32", "float16"])
    parser.add_argument("--peers", help=f"comma-separated, of {', '.join(peers)}")
    parser.add_argument("--seconds", type=float, default=2.0, help="per table row")
    parser.add_argument("--threads", type=int, default=None)
    parser.add_argument(
        "--keep-memory", action="store_true", help="glibc keeps freed blocks: no page faults"
    )
    parser.add_argument("--json")
    parser.add_argument("--plot")


def begin(args: argparse.Namespace, *facts: str) -> torch.dtype:
    """Set the process up, print what the figures depend on, and give the dtype."""
    if args.keep_memory:
        keep_freed_memory()
    if args.threads:
        torch.set_num_threads(args.threads)
    print(", ".join((str(machine()), args.dtype, *facts)) + "\n")
    dtype: torch.dtype = getattr(torch, args.dtype)
    return dtype
