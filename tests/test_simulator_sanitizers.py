"""The simulator's sanitizers: kernels with one fault each, and the same kernels mended.

The kernels are tests/cuda/sanitizer_faults*.cu, whose comments say which line must be named.
"""

from __future__ import annotations

import re
import shutil
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pytest
from simulator_kernels import needs_simulator

from fused_peft import simulator
from fused_peft.simulator._library import call

NVCC = shutil.which("nvcc") or shutil.which("nvcc", path="/usr/local/cuda/bin")
pytestmark = [needs_simulator, pytest.mark.skipif(NVCC is None, reason="no nvcc")]

FOLDER = Path(__file__).parent / "cuda"
SOURCES = {"sanitizer_faults.cu": "compute_80", "sanitizer_faults_sm90.cu": "compute_90a"}
Modules = dict[str, simulator.Module]  # by file
THREADS = 128


class Fresh:
    """An array that the simulator takes for device memory that nobody has written yet."""

    def __init__(self, count: int, dtype: type):
        self.array = np.zeros(count, dtype)

    def __enter__(self) -> int:
        call("register", self.array.ctypes.data, self.array.nbytes, 0, b"fresh")
        return self.array.ctypes.data

    def __exit__(self, *_: object) -> None:
        call("unregister", self.array.ctypes.data)


def floats(count: int = THREADS) -> np.ndarray:
    return np.arange(count, dtype=np.float32)


def ints(count: int = THREADS) -> np.ndarray:
    return np.zeros(count, np.int32)


def quads() -> np.ndarray:
    return floats(4 * THREADS)


# Arguments of each kernel, and the number of blocks where it is not one.
ARGUMENTS = {
    "global_read_behind_end": lambda: [floats(), floats(), THREADS],
    "global_write_before_start": lambda: [floats()],
    "null_pointer": lambda: [floats(), floats(), 0],
    "shared_write_behind_end": lambda: [floats()],
    "shared_null": lambda: [floats()],
    "local_read_behind_end": lambda: [floats(), 8],
    "global_misaligned": lambda: [floats(4 * THREADS + 1), quads()],
    "shared_misaligned": lambda: [np.zeros(THREADS)],
    "constant_behind_end": lambda: [ints(), 32],
    "atomic_behind_end": lambda: [ints(8), 8],
    "shared_uninitialised": lambda: [floats()],
    "register_uninitialised": lambda: [floats()],
    "global_uninitialised": lambda: [Fresh(THREADS, np.float32), floats()],
    "uninitialised_index": lambda: [floats(), floats()],
    "uninitialised_counter": lambda: [ints(1)],
    "uninitialised_branch": lambda: [ints()],
    "read_before_barrier": lambda: [floats()],
    "write_before_readers_are_done": lambda: [floats()],
    "two_warps_write": lambda: [ints(1)],
    "neighbouring_bytes": lambda: [np.zeros(THREADS, np.uint8)],
    "blocks_write_one_word": lambda: [ints(1)],
    "write_behind_readers_of_other_blocks": lambda: [ints(), ints(1), ints(1)],
    "plain_beside_atomic": lambda: [ints(1)],
    "ticket_without_fence": lambda: [ints(6), ints(1), ints(1)],
    "flag_without_fence": lambda: [ints(), ints(1), ints()],
    "fence_of_narrow_scope": lambda: [ints(1), ints(1), ints(1)],
    "reader_without_acquire": lambda: [ints(1), ints(1), ints(1)],
    "named_barrier_missing": lambda: [floats(64)],
    "lanes_without_syncwarp": lambda: [floats()],
    "half_warp_reads_the_other_half": lambda: [floats()],
    "divergent_barrier": lambda: [floats()],
    "copy_not_waited": lambda: [quads(), quads()],
    "copy_waited_for_too_few": lambda: [quads(), quads()],
    "copy_not_committed": lambda: [quads(), quads()],
    "copy_without_barrier": lambda: [quads(), quads()],
    "copy_over_readers": lambda: [quads(), quads()],
    "matrix_load_not_waited": lambda: [quads(), ints(32)],
    "copy_from_behind_end": lambda: [quads(), quads()],
    "mbarrier_init_without_fence": lambda: [ints(2 * THREADS)],
    "multicast_before_init": lambda: [ints(), ints(2 * THREADS)],
    "store_to_remote_before_cluster_barrier": lambda: [ints(2 * THREADS)],
    "bulk_store_without_proxy_fence": lambda: [ints(2 * THREADS)],
    "refill_over_readers": lambda: [ints(2 * THREADS), ints(2 * THREADS)],
    "bulk_load_not_waited": lambda: [ints(), ints(2 * THREADS)],
}
BLOCKS = {
    "blocks_write_one_word": 6,
    "write_behind_readers_of_other_blocks": 6,
    "plain_beside_atomic": 6,
    "ticket_without_fence": 6,
    "flag_without_fence": 2,
    "fence_of_narrow_scope": 2,
    "reader_without_acquire": 2,
}
SHARED_BYTES = {"shared_write_behind_end": 4 * THREADS}
SCHEDULES = [(seed, timing) for seed in range(3) for timing in ("early", "late", "random")]


@dataclass
class Expected:
    """Lines of one kernel and the kinds of finding that name them."""

    file: str
    must: dict[int, set[str]] = field(default_factory=dict)
    may: dict[int, set[str]] = field(default_factory=dict)


def read_expectations() -> dict[str, Expected]:
    kernels: dict[str, Expected] = {}
    for file in SOURCES:
        for number, line in enumerate((FOLDER / file).read_text().splitlines(), 1):
            if start := re.match(r"KERNEL (\w+)\(", line):
                kernels[start[1]] = current = Expected(file)
            for word, kinds in re.findall(r"// (expect|or): ([a-z |]+)", line):
                wanted = current.must if word == "expect" else current.may
                wanted[number] = {kind.strip() for kind in kinds.split("|")}
    return kernels


EXPECTED = read_expectations()


@pytest.fixture(scope="module")
def modules(tmp_path_factory: pytest.TempPathFactory) -> list[Modules]:
    """Each file's kernels mended, and with their faults."""
    loaded: list[Modules] = [{}, {}]
    for faulty, of_file in enumerate(loaded):
        for file, architecture in SOURCES.items():
            ptx = tmp_path_factory.mktemp("faults") / "faults.ptx"
            command = [NVCC, "-std=c++17", "-lineinfo", f"-arch={architecture}"]
            subprocess.run(
                [*command, f"-DFAULTY={faulty}", "-ptx", FOLDER / file, "-o", ptx], check=True
            )
            of_file[file] = simulator.load(ptx.read_text())
    return loaded


def launch(modules: Modules, kernel: str) -> list[simulator.Finding]:
    """What the sanitizers find in one launch."""
    file = EXPECTED[kernel].file
    cluster = 2 if file == "sanitizer_faults_sm90.cu" else 1
    simulator.reset()
    arguments = ARGUMENTS[kernel]()
    fresh = [a for a in arguments if isinstance(a, Fresh)]
    pointers = {id(a): a.__enter__() for a in fresh}
    try:
        modules[file].launch(
            kernel,
            BLOCKS.get(kernel, cluster),
            THREADS,
            [pointers.get(id(a), a) for a in arguments],
            SHARED_BYTES.get(kernel, 0),
            cluster=cluster,
        )
    except simulator.SimulatorError:
        # A fault ends the launch with an error, as on the device, but never without a finding.
        assert simulator.findings()
    finally:
        for a in fresh:
            a.__exit__()
    return simulator.findings()


def schedules() -> Iterator[str]:
    for seed, timing in SCHEDULES:
        with simulator.options(seed=seed, async_timing=timing, max_sms=2):
            yield f"seed {seed}, copies {timing}"


def line_of(finding: simulator.Finding) -> int:
    """Of the .cu file: that of the call where the instruction is of an inlined function."""
    found = re.search(r"sanitizer_faults\w*\.cu:(\d+)$", finding.source)
    assert found, finding
    return int(found[1])


def test_every_kernel_is_tried() -> None:
    assert set(ARGUMENTS) == set(EXPECTED)
    assert len(EXPECTED) >= 20
    assert all(expected.must for expected in EXPECTED.values())


@pytest.mark.parametrize("kernel", EXPECTED)
def test_fault_is_named_at_its_line(modules: list[Modules], kernel: str) -> None:
    expected = EXPECTED[kernel]
    for schedule in schedules():
        found = launch(modules[1], kernel)
        named = [(line_of(finding), finding.kind) for finding in found]
        assert any(kind in expected.must.get(line, ()) for line, kind in named), (schedule, found)
        for line, kind in named:
            allowed = expected.must.get(line, set()) | expected.may.get(line, set())
            assert kind in allowed, (schedule, line, kind)


@pytest.mark.parametrize("kernel", EXPECTED)
def test_mended_kernel_is_clean(modules: list[Modules], kernel: str) -> None:
    for schedule in schedules():
        assert launch(modules[0], kernel) == [], schedule


def test_finding_says_who_and_where(modules: list[Modules]) -> None:
    launch(modules[1], "global_read_behind_end")
    (finding,) = simulator.findings()
    assert finding.kernel == "global_read_behind_end"
    assert (finding.block, finding.thread) == ((0, 0, 0), (THREADS - 1, 0, 0))
    assert finding.instruction.startswith("ld.global")
    assert "0 bytes behind the end of" in finding.text


def test_race_names_the_other_access(modules: list[Modules]) -> None:
    launch(modules[1], "flag_without_fence")
    (finding,) = simulator.findings()
    store = next(
        number
        for number, line in enumerate((FOLDER / "sanitizer_faults.cu").read_text().splitlines(), 1)
        if "data[threadIdx.x] = threadIdx.x;" in line
    )
    assert "block (0,0,0)" in finding.text
    assert f"sanitizer_faults.cu:{store}" in finding.text


@pytest.mark.parametrize(
    ("check", "kernel"),
    [
        ("initcheck", "shared_uninitialised"),
        ("racecheck", "ticket_without_fence"),
        ("synccheck", "copy_waited_for_too_few"),
    ],
)
def test_check_switched_off(modules: list[Modules], check: str, kernel: str) -> None:
    every = ("memcheck", "initcheck", "racecheck", "synccheck")
    with simulator.options(seed=0, checks=tuple(c for c in every if c != check)):
        assert launch(modules[1], kernel) == []
    with simulator.options(seed=0, checks=True):
        assert launch(modules[1], kernel) != []


def test_findings_of_one_instruction_are_counted(
    modules: list[Modules],
) -> None:
    launch(modules[1], "global_misaligned")
    (finding,) = simulator.findings()
    assert finding.count == THREADS // 32
