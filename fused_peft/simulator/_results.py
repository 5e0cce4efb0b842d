"""What launches did and what the sanitizers found."""

from __future__ import annotations

import json
from dataclasses import dataclass, field, fields
from typing import Any

from fused_peft.simulator._library import call, text_of


@dataclass(frozen=True)
class LineConflicts:
    """Shared-memory accesses of one instruction that took more wavefronts than their bytes need."""

    source: str
    instruction: str
    wavefronts: int
    ideal_wavefronts: int


@dataclass(frozen=True)
class Counters:
    """Counts of one launch, or a sum of launches.

    Attributes:
        kernel: mangled name.
        launches: how many launches these are.
        warp_instructions, thread_instructions: executed by warps with at least one lane; by lanes.
        by_class: warp instructions by class of instruction.
        tensor_flop: 2 m n k of every mma and wgmma.
        global_load_bytes, global_store_bytes, global_atomic_bytes: asked for by lanes.
        global_load_sectors, global_store_sectors: 32-byte sectors touched, per warp instruction.
        global_unique_load_bytes, global_unique_store_bytes: each byte once in the launch.
        shared_load_bytes, shared_store_bytes: asked for by lanes.
        shared_wavefronts, shared_ideal_wavefronts: passes over shared memory, and how many there
            would be without bank conflicts.
        local_load_bytes, local_store_bytes: local memory (spills and indexed arrays).
        barriers: CTA barriers passed.
        seconds: of this process, not of any GPU.
        conflicts: where the bank conflicts are.
    """

    kernel: str
    launches: int = 0
    warp_instructions: int = 0
    thread_instructions: int = 0
    tensor_flop: int = 0
    global_load_bytes: int = 0
    global_store_bytes: int = 0
    global_atomic_bytes: int = 0
    global_load_sectors: int = 0
    global_store_sectors: int = 0
    global_unique_load_bytes: int = 0
    global_unique_store_bytes: int = 0
    shared_load_bytes: int = 0
    shared_store_bytes: int = 0
    shared_wavefronts: int = 0
    shared_ideal_wavefronts: int = 0
    local_load_bytes: int = 0
    local_store_bytes: int = 0
    barriers: int = 0
    seconds: float = 0.0
    by_class: dict[str, int] = field(default_factory=dict)
    conflicts: tuple[LineConflicts, ...] = ()

    @property
    def bank_conflicts(self) -> int:
        """Wavefronts beyond the ideal."""
        return self.shared_wavefronts - self.shared_ideal_wavefronts

    @property
    def sector_use(self) -> float:
        """Bytes moved over the bytes of the sectors touched; above 1 where lanes share."""
        sectors = self.global_load_sectors + self.global_store_sectors
        moved = self.global_load_bytes + self.global_store_bytes
        return moved / (32 * sectors) if sectors else 1.0


@dataclass(frozen=True)
class Finding:
    """One fault that a sanitizer saw.

    Attributes:
        kind: "out of bounds", "race", ...
        kernel: mangled name.
        block, thread: of the first lane concerned.
        instruction: its PTX text.
        source: "file.cu:12" where the PTX has line information, else the PTX line.
        text: the whole finding for people.
        count: how often it happened at this instruction.
    """

    kind: str
    kernel: str
    block: tuple[int, int, int]
    thread: tuple[int, int, int]
    instruction: str
    source: str
    text: str
    count: int


def _report() -> dict[str, Any]:
    report = json.loads(text_of(call("report")))
    assert isinstance(report, dict)
    return report


def counters() -> list[Counters]:
    """Counts of every launch since the last ``reset``, in order."""
    return [counters_from(launch) for launch in _report()["counters"]]


def counters_from(launch: dict[str, Any]) -> Counters:
    """Counts out of one entry of a report's "counters"."""
    conflicts = tuple(LineConflicts(**line) for line in launch["conflicts"])
    return Counters(**{**launch, "conflicts": conflicts})


def findings() -> list[Finding]:
    """What the sanitizers found since the last ``reset``."""
    return [finding_from(found) for found in _report()["findings"]]


def finding_from(found: dict[str, Any]) -> Finding:
    """A finding out of one entry of a report's "findings"."""
    return Finding(**{**found, "block": tuple(found["block"]), "thread": tuple(found["thread"])})


def reset() -> None:
    """Forgets counters, findings and errors."""
    call("reset")


def print_counters(launches: list[Counters]) -> None:
    """Prints the counts as a table, a column per kernel; launches of one kernel are summed."""
    by_kernel: dict[str, Counters] = {}
    for launch in launches:
        known = by_kernel.get(launch.kernel)
        by_kernel[launch.kernel] = launch if known is None else _sum(known, launch)
    rows = [f.name for f in fields(Counters) if f.name not in ("kernel", "by_class", "conflicts")]
    rows.append("bank_conflicts")
    for kernel, total in by_kernel.items():
        print(kernel)
        for row in rows:
            value = getattr(total, row)
            print(f"  {row:28} {value:>16,.3f}" if row == "seconds" else f"  {row:28} {value:>16,}")
        for name, count in sorted(total.by_class.items(), key=lambda item: -item[1]):
            if count:
                print(f"    {name:26} {count:>16,}")
        for line in total.conflicts:
            print(
                f"  conflicts at {line.source}: {line.wavefronts:,} wavefronts, "
                f"{line.ideal_wavefronts:,} without ({line.instruction})"
            )


def _sum(a: Counters, b: Counters) -> Counters:
    values: dict[str, Any] = {"kernel": a.kernel, "conflicts": a.conflicts + b.conflicts}
    names = a.by_class.keys() | b.by_class.keys()
    values["by_class"] = {name: a.by_class.get(name, 0) + b.by_class.get(name, 0) for name in names}
    for f in fields(Counters):
        if f.name not in values:
            values[f.name] = getattr(a, f.name) + getattr(b, f.name)
    return Counters(**values)
