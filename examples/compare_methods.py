"""Fine-tune one model by every method, on the same data with the same budget, and compare them.

Each method runs ``finetune_smollm2.py`` in a process of its own, so that its peak memory is its
own, one after the other, so that none takes time from another. An option of some methods goes to
those, and every option that is not listed here is passed on to all, ``--data`` say.

    python examples/compare_methods.py
    python examples/compare_methods.py --methods lora prefix --steps 100 --data mine.jsonl

Ctrl-C or SIGTERM saves at the end of the running step, and the same command with ``--resume``
goes on there; methods that are done are not run again.
"""

from __future__ import annotations

import argparse
import json
import signal
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import finetune_smollm2
from docstring_data import InputError
from methods import METHODS
from results import FIGURES, plot_comparison, write_json

UNFINISHED = "unfinished"


def parse_arguments(argv: list[str] | None) -> tuple[argparse.Namespace, list[str]]:
    """Our own arguments, and those for ``finetune_smollm2.py``; makes the folders."""
    parser = argparse.ArgumentParser(
        description=(__doc__ or "").partition("\n")[0],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
        epilog="Every other option is one of finetune_smollm2.py.",
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("--methods", choices=list(METHODS), nargs="+", default=list(METHODS))
    add("--out", type=Path, default=Path("out/compare"), help="folder with one for each method")
    add("--steps", type=finetune_smollm2.COUNT, default=150, help="of each method")
    finetune_smollm2.add_method_options(parser)
    add("--resume", action="store_true", help="continue the interrupted comparison in --out")
    add(
        "--require-improvement",
        type=finetune_smollm2.SHARE,
        metavar="SHARE",
        help="exit with status 1 unless every method lowers the held-out perplexity by this share",
    )
    args, passed_on = parser.parse_known_args(argv)
    args.methods = list(dict.fromkeys(args.methods))
    if "--method" in passed_on:
        parser.error("--method: expected --methods, with one or more")
    for name, _, _ in finetune_smollm2.METHOD_OPTIONS:
        if hasattr(args, name) and not any(name in METHODS[m].defaults for m in args.methods):
            option = finetune_smollm2.option_of(name)
            parser.error(f"{option} is an option of none of {', '.join(args.methods)}")
    marker = args.out / UNFINISHED
    if args.resume and not marker.exists():
        parser.error(f"--resume: there is no interrupted comparison in {args.out}")
    if not args.resume and marker.exists():
        parser.error(f"{marker} is of an unfinished comparison: add --resume, or remove {args.out}")
    return args, passed_on


def arguments_of(
    method: str, args: argparse.Namespace, folder: Path, passed_on: list[str]
) -> list[str]:
    """The command line of ``finetune_smollm2.py`` for a method."""
    interrupted = args.resume and (folder / finetune_smollm2.CHECKPOINT).exists()
    resume = ["--resume"] if interrupted else []
    given = ["--method", method, "--out", str(folder), "--steps", str(args.steps)]
    own = [
        f"{finetune_smollm2.option_of(name)}={getattr(args, name)}"
        for name, _, _ in finetune_smollm2.METHOD_OPTIONS
        if hasattr(args, name) and name in METHODS[method].defaults
    ]
    return [*given, *own, *passed_on, *resume]


def read_figures(folder: Path) -> dict[str, Any]:
    """What a finished run wrote."""
    figures: dict[str, Any] = json.loads((folder / FIGURES).read_text(encoding="utf-8"))
    return figures


def run_in_process(arguments: list[str]) -> int:
    """The exit status of ``finetune_smollm2.py``; SIGTERM is handed on to it.

    Ctrl-C reaches it from the terminal, as it does this process, which waits for it to save.
    """
    command = [sys.executable, finetune_smollm2.__file__, *arguments]
    numbers = (signal.SIGINT, signal.SIGTERM)
    before = [signal.getsignal(number) for number in numbers]
    try:
        signal.signal(signal.SIGINT, lambda number, frame: None)
        with subprocess.Popen(command) as process:
            signal.signal(signal.SIGTERM, lambda number, frame: process.terminate())
            return process.wait()
    finally:
        for number, handler in zip(numbers, before, strict=True):
            signal.signal(number, handler)


def print_table(results: dict[str, dict[str, Any]]) -> None:
    """One line a method."""
    rows = [["method", "trainable", "file", "s/step", "peak", "held-out loss", "perplexity", ""]]
    for method, result in results.items():
        held, training = result["held_out"], result["training"]
        rows.append(
            [
                METHODS[method].title,
                f"{result['trainable_parameters']:,}",
                f"{result['adapter_bytes'] / 2**20:.2f} MiB",
                f"{training['seconds_per_step']:.3f}",
                f"{result['peak_rss_mib']:.0f} MiB",
                f"{held['loss_before']:.3f} -> {held['loss_after']:.3f}",
                f"{held['perplexity_before']:.2f} -> {held['perplexity_after']:.2f}",
                f"down {held['perplexity_fall']:.1%}",
            ]
        )
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        title, *cells = (
            cell.ljust(width) if index == 0 else cell.rjust(width)
            for index, (cell, width) in enumerate(zip(row, widths, strict=True))
        )
        print("  ".join([title, *cells]).rstrip())


def compare(args: argparse.Namespace, passed_on: list[str]) -> int:
    """Runs what is not done yet, and writes the comparison; the exit status."""
    folders = {method: args.out / method for method in args.methods}
    # A bad option should not wait for the methods before it.
    parsed = {
        method: finetune_smollm2.parse_arguments(arguments_of(method, args, folder, passed_on))
        for method, folder in folders.items()
    }
    corpus = finetune_smollm2.read_corpus(parsed[args.methods[0]])
    if not args.resume:
        for folder in folders.values():  # an older comparison's must not pass for this one's
            (folder / FIGURES).unlink(missing_ok=True)
        (args.out / UNFINISHED).touch()
    for method, folder in folders.items():
        settings = asdict(finetune_smollm2.settings_of(parsed[method], corpus))
        if (folder / FIGURES).exists() and read_figures(folder)["hyper_parameters"] == settings:
            print(f"{METHODS[method].title}: done before")
            continue
        print(f"\n---- {METHODS[method].title}", flush=True)
        status = run_in_process(arguments_of(method, args, folder, passed_on))
        if status != 0:
            print(f"{METHODS[method].title} ended with status {status}; --resume continues")
            return status if status > 0 else 128 - status
    results = {method: read_figures(folder) for method, folder in folders.items()}
    write_json(args.out / "comparison.json", results)
    plot_comparison(
        args.out / "comparison.png",
        {METHODS[method].title: result for method, result in results.items()},
    )
    (args.out / UNFINISHED).unlink()
    print()
    print_table(results)
    print(f"comparison.png and comparison.json are in {args.out}/, adapters in folders below")
    if args.require_improvement is None:
        return 0
    short = [
        METHODS[method].title
        for method, result in results.items()
        if result["held_out"]["perplexity_fall"] < args.require_improvement
    ]
    verdict = f"FAILED: {', '.join(short)}" if short else "PASSED"
    print(f"each down by at least {args.require_improvement:.0%}: {verdict}")
    return 1 if short else 0


def main(argv: list[str] | None = None) -> int:
    """The exit status: 0, 1 for too little improvement, 2 for bad input, 128 + n for signal n."""
    args, passed_on = parse_arguments(argv)
    try:
        return compare(args, passed_on)
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
