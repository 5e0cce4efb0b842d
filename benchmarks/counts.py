"""Counts of CUDA kernels that ran in the simulator, as tables."""

from __future__ import annotations

import argparse
import re
import statistics
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from timing import print_table
from torch import Tensor

import fused_peft
from fused_peft import simulator
from fused_peft.simulator import DEVICES, Counters


def add_device_options(parser: argparse.ArgumentParser) -> None:
    """``--device``, and which GPU is simulated."""
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda", "simulated-cuda"])
    parser.add_argument("--simulated-device", default="h100", choices=DEVICES)


@dataclass(frozen=True)
class Pass:
    """The launches of one pass, and the FLOP that its products need."""

    name: str
    launches: list[Counters]
    ideal_flop: int

    def summary(self) -> dict[str, Any]:
        """What is printed, for a file."""
        return {
            "pass": self.name,
            "launches": len(self.launches),
            "compulsory_bytes": compulsory_bytes(self.launches),
            "global_bytes": sum(c.global_load_bytes + c.global_store_bytes for c in self.launches),
            "tensor_flop": sum(c.tensor_flop for c in self.launches),
            "ideal_flop": self.ideal_flop,
            "sector_use": min(c.sector_use for c in self.launches),
            "bank_conflicts": sum(c.bank_conflicts for c in self.launches),
            "local_bytes": sum(c.local_load_bytes + c.local_store_bytes for c in self.launches),
        }


def simulated_passes(
    forward: Callable[[], Tensor], dout: Tensor, ideal_forward: int, ideal_backward: int
) -> list[Pass]:
    """Runs ``forward`` and its backward pass on the simulated device.

    Raises:
        SystemExit: a sanitizer found something; counts of such a run mean nothing.
    """
    simulator.reset()
    passes = []
    with fused_peft.simulated_cuda():
        out = forward()
        passes.append(Pass("forward", simulator.counters(), ideal_forward))
        found = simulator.findings()
        simulator.reset()
        out.backward(dout)
        passes.append(Pass("backward", simulator.counters(), ideal_backward))
    if found := [*found, *simulator.findings()]:
        raise SystemExit("\n".join(finding.text for finding in found))
    return passes


def compulsory_bytes(launches: list[Counters]) -> int:
    """Global memory that a pass moves if each launch moves each byte once."""
    return sum(c.global_unique_load_bytes + c.global_unique_store_bytes for c in launches)


def kernel_name(mangled: str) -> str:
    """The name of a kernel without its template arguments.

    A mangled nested name is a length and that many characters, several times over; the last of
    those before the template arguments is the function's.
    """
    names, at = [], mangled.find("N") + 1
    while match := re.compile(r"\d+").match(mangled, at):
        end = match.end() + int(match.group())
        names.append(mangled[match.end() : end])
        at = end
    return names[-1] if names else mangled


def print_launches(problem: str, passes: list[Pass]) -> None:
    """A row a launch, a row a pass."""
    header = ["problem", "pass", "launch", "warp instructions", "tensor FLOP / ideal"]
    header += ["MB loaded", "MB stored", "compulsory MB", "sectors used"]
    header += ["bank conflicts / wavefronts", "local bytes"]
    rows = []
    for one in passes:
        for launch in one.launches:
            rows.append([problem, one.name, kernel_name(launch.kernel), *_cells([launch], None)])
        rows.append([problem, one.name, f"all {len(one.launches)}"])
        rows[-1] += _cells(one.launches, one.ideal_flop)
    print_table(header, rows)


def _cells(launches: list[Counters], ideal_flop: int | None) -> list[str]:
    def total(name: str) -> int:
        return sum(getattr(launch, name) for launch in launches)

    flop = total("tensor_flop")
    use = statistics.fmean if len(launches) == 1 else min
    return [
        f"{total('warp_instructions'):,}",
        f"{flop / ideal_flop:.3f}" if ideal_flop else "",
        f"{total('global_load_bytes') / 1e6:.2f}",
        f"{total('global_store_bytes') / 1e6:.2f}",
        f"{compulsory_bytes(launches) / 1e6:.2f}",
        f"{100 * use(launch.sector_use for launch in launches):.0f} %",
        f"{total('bank_conflicts'):,} / {total('shared_wavefronts'):,}",
        f"{total('local_load_bytes') + total('local_store_bytes')}",
    ]
