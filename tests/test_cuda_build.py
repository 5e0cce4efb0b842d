"""The machine code in the package: registers, spills, tensor-core and copy instructions.

Read from the built extension itself by cuobjdump and nvdisasm (both on PyPI as nvidia-cuda-...).
"""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import subprocess
from collections import Counter
from pathlib import Path

import pytest

from fused_peft import _C

ARCHITECTURES = [str(a) for a in _C.build_info()["cuda_architectures"]]
SPEC = importlib.util.find_spec("nvidia.cu13")
FOLDER = Path(next(iter(SPEC.submodule_search_locations))) / "bin" if SPEC else Path()
SEARCH = f"{FOLDER}{os.pathsep}{os.environ['PATH']}"
CUOBJDUMP = shutil.which("cuobjdump", path=SEARCH)

pytestmark = [
    pytest.mark.skipif(not ARCHITECTURES, reason="no nvcc, so no CUDA kernels were built"),
    pytest.mark.skipif(CUOBJDUMP is None, reason="cuobjdump is not installed"),
]


def cuobjdump(*arguments: str) -> str:
    return subprocess.run(
        [CUOBJDUMP, *arguments, _C.__file__],
        check=True, capture_output=True, text=True, env={**os.environ, "PATH": SEARCH},
    ).stdout  # fmt: skip


def resources() -> dict[tuple[str, str], dict[str, int]]:
    """REG, STACK, SHARED (static), LOCAL ... of each (architecture, kernel)."""
    found, architecture, kernel = {}, "", ""
    for line in cuobjdump("-res-usage").splitlines():
        if match := re.match(r"\s*arch = sm_(\d+)", line):
            architecture = match[1]
        elif match := re.match(r"\s*Function (\w+):", line):
            kernel = match[1]
        elif "REG:" in line and kernel:
            found[architecture, kernel] = {k: int(v) for k, v in re.findall(r"(\w+):(\d+)", line)}
    return found


def loops(lines: list[tuple[int, str]]) -> list[Counter[str]]:
    """Opcodes of each loop: from the target of a backward branch to the branch."""
    result = []
    for address, text in lines:
        match = re.search(r"\bBRA\b.*?(0x[0-9a-f]+)", text)
        if match and int(match[1], 16) < address:
            first = int(match[1], 16)
            body = [t for a, t in lines if first <= a <= address]
            result.append(Counter(re.sub(r"^@!?\w+ ", "", t).split()[0] for t in body))
    return result


def machine_code(architecture: str) -> dict[str, list[tuple[int, str]]]:
    """Address and text of each instruction of each kernel."""
    kernels: dict[str, list[tuple[int, str]]] = {}
    lines: list[tuple[int, str]] = []
    for line in cuobjdump("-sass", "-arch", f"sm_{architecture}").splitlines():
        if match := re.match(r"\s+Function : (\w+)", line):
            lines = kernels.setdefault(match[1], [])
        elif match := re.match(r"\s+/\*([0-9a-f]{4,})\*/\s+(.*?);", line):
            lines.append((int(match[1], 16), match[2].strip()))
    return kernels


def test_no_kernel_uses_local_memory():
    found = resources()
    assert {architecture for architecture, _ in found} == set(ARCHITECTURES)
    assert len(found) >= 80 * len(ARCHITECTURES)
    for key, usage in found.items():
        architecture, name = key
        if architecture.startswith("12") and "sm90" in name:
            # One front end serves sm_90 to sm_120; these need more shared memory than sm_12x has,
            # so that the plan never chooses them there.
            continue
        assert usage["LOCAL"] == 0, key
        assert usage["STACK"] == 0, key
        assert 0 < usage["REG"] <= 255, key
        assert usage["SHARED"] <= 48 * 1024, key


@pytest.mark.parametrize("architecture", [a for a in ("80", "90") if a in ARCHITECTURES])
def test_main_loops(architecture):
    kernels = machine_code(architecture)
    tiled = 0
    for name, lines in kernels.items():
        opcodes = Counter(re.sub(r"^@!?\w+ ", "", text).split()[0] for _, text in lines)
        assert not any(o.startswith(("LDL", "STL")) for o in opcodes), name
        parts = ("gemm_dual", "x_pass", "dy_pass", "forward_kernel", "dq_kernel", "dkv_kernel")
        if "sm90" in name or not any(part in name for part in parts):
            continue
        # The loop that both copies and multiplies.
        main = [
            loop
            for loop in loops(lines)
            if any(o.startswith("HMMA") for o in loop) and any(o.startswith("LDGSTS") for o in loop)
        ]
        assert main, name
        for loop in main:
            assert any(o.startswith("LDSM") for o in loop), name
            assert any(re.match(r"LDGSTS\.E\.BYPASS\.(LTC\w+\.)?128", o) for o in loop), name
        if "_pass" not in name:
            tiled += 1
            assert any(o.startswith("STG.E.128") for o in opcodes), name
    assert tiled >= 40


@pytest.mark.parametrize(
    ("note", "code"),
    [
        ("(C7510) Potential Performance Loss: wgmma.mma_async instructions are serialized due", 1),
        ("Used 168 registers", 0),
    ],
)
def test_serialised_wgmma_fails_the_build(note, code):
    script = Path(__file__).parents[1] / "csrc/kernels/cuda/refuse_serialised.sh"
    done = subprocess.run([script, "sh", "-c", f"echo 'ptxas info : {note}' >&2"], check=False)
    assert done.returncode == code


def test_a_failed_compilation_fails_the_build():
    script = Path(__file__).parents[1] / "csrc/kernels/cuda/refuse_serialised.sh"
    assert subprocess.run([script, "sh", "-c", "exit 3"], check=False).returncode == 3


@pytest.mark.skipif("90" not in ARCHITECTURES, reason="not built for sm_90")
def test_hopper_main_loops():
    gemms = {name: lines for name, lines in machine_code("90").items() if "gemm_dual_sm90" in name}
    assert len(gemms) == 24  # two types, three tiles, two layouts of b, with a mask and without
    for name, lines in gemms.items():
        opcodes = Counter(re.sub(r"^@!?\w+ ", "", text).split()[0] for _, text in lines)
        for opcode in ("UTMALDG.2D", "UTMALDG.2D.MULTICAST", "UTMASTG.2D", "ACQBULK"):
            assert opcodes[opcode], (name, opcode)
        # The innermost loop that multiplies whole tiles of k: four steps and at most the loop of
        # one step for the last tile, and no fence of the whole device.
        main = [loop for loop in loops(lines) if sum(loop[o] for o in loop if "HGMMA" in o) >= 4]
        smallest = min(main, key=lambda loop: loop.total())
        assert smallest.total() < 180, name
        assert not smallest["MEMBAR.ALL.GPU"], name
        assert not any(o.startswith(("LDS", "LDG", "STS")) for o in smallest), name


@pytest.mark.skipif("90" not in ARCHITECTURES, reason="not built for sm_90")
def test_decode_streams_by_tensor_copies():
    found = 0
    for name, lines in machine_code("90").items():
        if "lora_decode_sm90" not in name:
            continue
        found += 1
        opcodes = Counter(re.sub(r"^@!?\w+ ", "", text).split()[0] for _, text in lines)
        # W, x and lora_a, in float32 by eight panels.
        assert opcodes["UTMALDG.2D"] == (10 if "fLi" in name else 3), name
        assert opcodes["UCGABAR_ARV"] == opcodes["UCGABAR_WAIT"] == 2, name
        main = [loop for loop in loops(lines) if any(o.startswith("HMMA") for o in loop)]
        smallest = min(main, key=lambda loop: loop.total())
        # W and x in each of four steps, x for s, and lora_a in 16 bits where a warp has 32 ranks.
        assert smallest["LDSM.16.M88.4"] == (11 if "S2_Li64" in name else 9), name
        assert not any(o.startswith(("LDG", "STS", "MEMBAR")) for o in smallest), name
    assert found == 8  # two types, two of factors, two ranks


@pytest.mark.skipif("90" not in ARCHITECTURES, reason="not built for sm_90")
@pytest.mark.parametrize(
    ("kernel", "instances", "plain", "transposed"),
    # Two types, two of factors, two ranks and, over dy in 16 bits, two heights of a tile.
    [("x_pass_sm90", 8, 0, 4), ("dy_pass_sm90", 12, 4, 4)],
)
def test_backward_passes_stream_by_tensor_copies(kernel, instances, plain, transposed):
    found = 0
    for name, lines in machine_code("90").items():
        if kernel not in name:
            continue
        found += 1
        opcodes = Counter(re.sub(r"^@!?\w+ ", "", text).split()[0] for _, text in lines)
        assert opcodes["UTMALDG.2D"] >= 2, name
        assert opcodes["UCGABAR_ARV"] == opcodes["UCGABAR_WAIT"] == 2, name
        # A warp's loop over blocks: at least so many fragments as they lie and transposed.
        main = [loop for loop in loops(lines) if any(o.startswith("HMMA") for o in loop)]
        smallest = min(main, key=lambda loop: loop.total())
        assert smallest["LDSM.16.M88.4"] >= plain, name
        assert smallest["LDSM.16.MT88.4"] >= transposed, name
        assert not any(o.startswith("LDG") for o in smallest), name
        assert not smallest["MEMBAR.ALL.GPU"], name
    assert found == instances


@pytest.mark.skipif("90" not in ARCHITECTURES, reason="not built for sm_90")
def test_single_launch():
    singles = {n: lines for n, lines in machine_code("90").items() if "lora_single" in n}
    assert len(singles) == 16  # two directions, two types, two tiles, two ranks
    for name, lines in singles.items():
        main = [loop for loop in loops(lines) if sum(loop[o] for o in loop if "HGMMA" in o) >= 4]
        # The loop of the first column's tiles, which forms s too, and that of the others.
        smallest = sorted(main, key=lambda loop: loop.total())[:2]
        products = [sum(loop[o] for o in loop if "HGMMA" in o) for loop in smallest]
        assert max(products) >= 8, name
        for loop in smallest:
            assert not loop["MEMBAR.ALL.GPU"], name
            assert not any(o.startswith(("LDS", "LDG", "STS")) for o in loop), name
