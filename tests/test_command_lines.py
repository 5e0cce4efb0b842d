"""What a wrong word in an environment variable or on a command line is told."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from simulator_kernels import needs_simulator


def run(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, *arguments]
    return subprocess.run(
        command, capture_output=True, text=True, env={**os.environ, **environment}, timeout=300
    )


def test_an_unknown_instruction_set_is_named_with_its_variable() -> None:
    done = run("-c", "import fused_peft", FUSED_PEFT_CPU_ISA="avx3")
    assert done.returncode == 1
    assert "ValueError: FUSED_PEFT_CPU_ISA: isa is 'avx3'; expected portable, avx2" in done.stderr


def test_an_empty_variable_chooses_nothing() -> None:
    done = run(
        "-c", "from fused_peft import _C; print(_C.available_cpu_isas()[-1] == _C.cpu_isa())",
        FUSED_PEFT_CPU_ISA="",
    )  # fmt: skip
    assert done.stdout == "True\n", done.stderr


@needs_simulator
@pytest.mark.parametrize("program", ["missing", "text"])
def test_a_program_that_cannot_be_started(program: str, tmp_path: Path) -> None:
    (tmp_path / "text").write_text("no program")
    done = run("-m", "fused_peft.simulator", "run", str(tmp_path / program))
    assert done.returncode == 2
    assert "Traceback" not in done.stderr
    assert f"error: program {tmp_path / program}: " in done.stderr
