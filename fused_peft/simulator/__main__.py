"""``python -m fused_peft.simulator run ./program args``: a CUDA program without a GPU."""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

from fused_peft.simulator._library import library_path
from fused_peft.simulator._results import counters_from, print_counters
from fused_peft.simulator._settings import DEVICES


def main() -> int:
    """Parses the command line, runs the program and prints what was counted and found."""
    parser = argparse.ArgumentParser(prog="python -m fused_peft.simulator")
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("path", help="print the simulator's library, to link against or preload")
    run = commands.add_parser(
        "run", help="run a program built with nvcc -cudart shared --no-compress and PTX in it"
    )
    run.add_argument("--device", default="h100", choices=DEVICES)
    run.add_argument("--seed", type=int, default=0, help="of the schedule of warps and CTAs")
    run.add_argument(
        "--checks", default="all", help="memcheck,initcheck,racecheck,synccheck, all or none"
    )
    run.add_argument(
        "--sms", type=int, default=0, help="SMs that take CTAs (default: the device's)"
    )
    run.add_argument("--threads", type=int, default=1)
    run.add_argument("--json", type=Path, help="write counters and findings to this file")
    run.add_argument(
        "--dump", type=Path, help="write each device buffer to this folder when it is freed"
    )
    run.add_argument("--counters", action="store_true", help="print the counters of each kernel")
    run.add_argument("program")
    run.add_argument("arguments", nargs=argparse.REMAINDER)
    args = parser.parse_args()
    if args.command == "path":
        print(library_path())
        return 0
    return _run(args)


def _run(args: argparse.Namespace) -> int:
    library = library_path()
    with tempfile.TemporaryDirectory() as folder:
        # Programs ask for the runtime by this name.
        (Path(folder) / "libcudart.so.13").symlink_to(library)
        report = Path(folder) / "report.json"
        environment = {
            **os.environ,
            "LD_PRELOAD": str(library),
            "LD_LIBRARY_PATH": ":".join(filter(None, (folder, os.environ.get("LD_LIBRARY_PATH")))),
            "FUSED_PEFT_SIMULATOR_DEVICE": args.device,
            "FUSED_PEFT_SIMULATOR_SEED": str(args.seed),
            "FUSED_PEFT_SIMULATOR_CHECKS": args.checks,
            "FUSED_PEFT_SIMULATOR_SMS": str(args.sms),
            "FUSED_PEFT_SIMULATOR_THREADS": str(args.threads),
            "FUSED_PEFT_SIMULATOR_REPORT": str(report),
        }
        if args.dump:
            args.dump.mkdir(parents=True, exist_ok=True)
            environment["FUSED_PEFT_SIMULATOR_DUMP"] = str(args.dump)
        try:
            code = subprocess.run([args.program, *args.arguments], env=environment).returncode
        except OSError as error:
            print(f"error: program {args.program}: {error.strerror}", file=sys.stderr)
            return 2
        if not report.exists():
            print(
                "simulator: the program wrote no report: it did not end by exit or return",
                file=sys.stderr,
            )
            return code or 1
        text = report.read_text()
    if args.json:
        args.json.write_text(text)
    results = json.loads(text)
    if args.counters:
        print_counters([counters_from(launch) for launch in results["counters"]])
    if results["total_findings"]:
        print(f"simulator: {results['total_findings']} findings", file=sys.stderr)
        return code or 1
    return code


if __name__ == "__main__":
    sys.exit(main())
