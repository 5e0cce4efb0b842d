"""Interleaved medians: what the benchmarks share."""

from __future__ import annotations

import ctypes
import json
import math
import platform
import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch


def keep_freed_memory() -> None:
    """Make glibc keep large blocks instead of returning them to the system after every call.

    By default a large temporary costs page faults in every call, which is part of what its user
    pays; with this it does not, which compares the kernels alone. All peers are treated alike.
    """
    if platform.libc_ver()[0] == "glibc":
        trim_threshold, mmap_threshold = -1, -3  # malloc.h
        for option in (trim_threshold, mmap_threshold):
            ctypes.CDLL(None).mallopt(option, 1 << 30)


def interleaved_medians(
    runs: dict[str, Callable[[], object]],
    *,
    seconds: float,
    min_rounds: int = 7,
    max_rounds: int = 400,
) -> dict[str, float]:
    """Median seconds of each callable, run in turn so that the machine's drift hits all alike.

    The order turns by one each round: what runs before a callable changes too.
    """
    for run in runs.values():
        for _ in range(2):
            run()
    times: dict[str, list[float]] = {name: [] for name in runs}
    for name in _turns(list(runs), seconds, min_rounds, max_rounds):
        begin = time.perf_counter()
        runs[name]()
        times[name].append(time.perf_counter() - begin)
    return {name: statistics.median(values) for name, values in times.items()}


def graph_medians(
    runs: dict[str, Callable[[], object]],
    *,
    seconds: float,
    min_rounds: int = 7,
    max_rounds: int = 400,
) -> dict[str, float]:
    """Median seconds on the current GPU of a CUDA-graph replay of each callable, run in turn.

    The L2 cache is flushed before every replay: a layer's operands come from memory in a model,
    too. A graph leaves the launches' cost on the host out, for all alike.
    """
    graphs = {name: _captured(run) for name, run in runs.items()}
    flush = torch.empty(
        2 * torch.cuda.get_device_properties().L2_cache_size, dtype=torch.int8, device="cuda"
    )
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    times: dict[str, list[float]] = {name: [] for name in runs}
    for name in _turns(list(runs), seconds, min_rounds, max_rounds):
        flush.zero_()
        begin.record()
        graphs[name].replay()
        end.record()
        end.synchronize()
        times[name].append(begin.elapsed_time(end) * 1e-3)
    return {name: statistics.median(values) for name, values in times.items()}


def _captured(run: Callable[[], object]) -> torch.cuda.CUDAGraph:
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            run()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    return graph


def medians(device: str) -> Callable[..., dict[str, float]]:
    """What times callables on a device."""
    return graph_medians if device == "cuda" else interleaved_medians


def _turns(names: list[str], seconds: float, min_rounds: int, max_rounds: int) -> Iterator[str]:
    """The names over and over for a number of seconds; the order turns by one each round."""
    started = time.perf_counter()
    rounds = 0
    while rounds < max_rounds and (rounds < min_rounds or time.perf_counter() - started < seconds):
        yield from names[rounds % len(names) :] + names[: rounds % len(names)]
        rounds += 1


def peak_growth(run: Callable[[], object], device: str) -> float:
    """Bytes by which a call raises the peak of the GPU memory in use, or of the process's.

    On the CPU freed memory goes back to the system first, and the kernel's record of the peak is
    reset; NaN where that is not Linux's.
    """
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run()
        return float(torch.cuda.max_memory_allocated() - before)
    reset, status = Path("/proc/self/clear_refs"), Path("/proc/self/status")
    if not reset.exists() or platform.libc_ver()[0] != "glibc":
        return math.nan

    def kilobytes(field: str) -> int:
        line = next(li for li in status.read_text().splitlines() if li.startswith(field + ":"))
        return int(line.split()[1])

    ctypes.CDLL(None).malloc_trim(0)
    reset.write_text("5")
    resident = kilobytes("VmRSS")
    run()
    return (kilobytes("VmHWM") - resident) * 1024.0


def geomean(values: list[float]) -> float:
    """Geometric mean of positive values."""
    return math.exp(statistics.fmean(math.log(v) for v in values))


def machine() -> dict[str, Any]:
    """What the figures depend on."""
    from fused_peft import _C

    model = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text().splitlines():
            if line.startswith("model name"):
                model = line.partition(":")[2].strip()
                break
    facts = {
        "cpu": model,
        "threads": torch.get_num_threads(),
        "isa": _C.cpu_isa(),
        "torch": torch.__version__,
    }
    return facts | ({"gpu": torch.cuda.get_device_name()} if torch.cuda.is_available() else {})


def print_table(header: list[str], rows: list[list[str]]) -> None:
    """A table with columns as wide as they need, in Markdown."""
    widths = [max(len(row[i]) for row in [header, *rows]) for i in range(len(header))]
    for row in [header, ["-" * w for w in widths], *rows]:
        print("| " + " | ".join(f"{cell:>{w}}" for cell, w in zip(row, widths, strict=True)) + " |")


def print_geomeans(ratios: dict[str, dict[str, list[float]]]) -> dict[str, dict[str, float]]:
    """Print and return the geometric mean of each group's ratios, with the worst one beside it."""
    means = {g: {k: geomean(v) for k, v in by.items()} for g, by in ratios.items()}
    print()
    for group, by_pair in means.items():
        worst = {pair: max(values) for pair, values in ratios[group].items()}
        text = ", ".join(f"{p} {v:.3f} (worst {worst[p]:.3f})" for p, v in by_pair.items())
        print(f"geomean, {group}: {text}")
    return means


def plot_relative(
    path: str,
    seconds: list[dict[str, float]],
    labels: list[str],
    peers: list[str],
    base: str,
    title: str,
) -> None:
    """Bars of every peer's time over that of ``base``, a group for each label, as a PNG."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(12, 4.5))
    width = 0.8 / len(peers)
    for i, peer in enumerate(peers):
        heights = [times[peer] / times[base] for times in seconds]
        axes.bar([j + i * width for j in range(len(seconds))], heights, width, label=peer)
    axes.axhline(1.0, color="black", linewidth=0.8)
    axes.set_xticks([j + 0.4 - width / 2 for j in range(len(seconds))])
    axes.set_xticklabels(labels, fontsize=7)
    axes.set_ylabel(f"time / {base}")
    axes.set_title(title)
    axes.legend()
    figure.tight_layout()
    figure.savefig(path, dpi=120)


def write_json(path: str | None, content: dict[str, Any]) -> None:
    """Write the figures beside the table where a path is given."""
    if path:
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        Path(path).write_text(json.dumps(content, indent=2) + "\n")
