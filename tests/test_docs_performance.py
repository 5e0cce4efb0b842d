"""The pages on performance and on kernels: their Python runs, their C++ is the repository's."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]


def blocks(page: str, language: str) -> list[str]:
    text = (ROOT / "docs" / page).read_text(encoding="utf-8")
    found = re.findall(rf"^```{language}\n(.*?)^```", text, re.M | re.S)
    assert found
    return found


@pytest.mark.parametrize("page", ["performance.md", "adding_a_kernel.md"])
def test_python_of_a_page_is_one_script(page: str) -> None:
    torch._dynamo.reset()
    torch.manual_seed(0)
    exec(compile("\n".join(blocks(page, "python")), page, "exec"), {})


@pytest.mark.parametrize("block", blocks("adding_a_kernel.md", "cpp"), ids=lambda b: b.split()[1])
def test_cpp_of_the_page_is_what_the_file_holds(block: str) -> None:
    path, _, code = block.removeprefix("// ").partition("\n")
    assert code in (ROOT / path).read_text(encoding="utf-8")
