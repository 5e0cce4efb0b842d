"""The pages: their Python runs, what they name exists, and the reference is whole."""

from __future__ import annotations

import importlib
import os
import re
import subprocess
import sys
import zlib
from pathlib import Path

import pytest

import fused_peft
from fused_peft import distributed, simulator
from fused_peft import ops as fused_ops
from fused_peft.integrations import peft as peft_integration

ROOT = Path(__file__).resolve().parents[1]
PAGES = sorted(ROOT.glob("docs/*.md"))
TEXTS = [*PAGES, *(ROOT / name for name in ("README.md", "CONTRIBUTING.md"))]
# distributed.md is run by tests/test_examples_distributed.py, in one process and under torchrun.
SCRIPTS = [page for page in (*PAGES, ROOT / "README.md") if page.name not in {"distributed.md"}]
TIMEOUT = 300.0  # seconds; the longest page takes about 30 on an idle machine
FOLDERS = r"(?:\.ci|benchmarks|csrc|docs|examples|fused_peft|tests)"


def name(path: Path) -> str:
    return path.name


def blocks(path: Path, language: str) -> list[str]:
    text = path.read_text(encoding="utf-8")
    return re.findall(rf"^```{language}\n(.*?)^```", text, re.M | re.S)


def run(*command: str, cwd: Path) -> str:
    """What a process prints; an assertion error with it where the process fails."""
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "HF_HUB_OFFLINE": "1",
        "PYTHONWARNINGS": "error:::fused_peft",
    }
    done = subprocess.run(
        command, cwd=cwd, env=environment, timeout=TIMEOUT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stderr


def test_every_page_but_the_index_has_a_script() -> None:
    without = {page.name for page in SCRIPTS if not blocks(page, "python")}
    assert without == {"index.md"}


@pytest.mark.parametrize("page", [p for p in SCRIPTS if blocks(p, "python")], ids=name)
def test_python_of_a_page_is_one_script(page: Path, tmp_path: Path) -> None:
    script = tmp_path / f"{page.stem}_page.py"
    script.write_text("\n\n".join(blocks(page, "python")), encoding="utf-8")
    run(sys.executable, str(script), cwd=tmp_path)


CPP_BLOCKS = blocks(ROOT / "docs" / "adding_a_kernel.md", "cpp")


def test_the_page_on_kernels_shows_cpp() -> None:
    assert len(CPP_BLOCKS) >= 4


@pytest.mark.parametrize("block", CPP_BLOCKS, ids=lambda block: block.split()[1])
def test_cpp_of_the_page_is_what_the_file_holds(block: str) -> None:
    path, _, code = block.removeprefix("// ").partition("\n")
    assert code in (ROOT / path).read_text(encoding="utf-8")


# ---- what a page names ---------------------------------------------------------------------------


def anchors(path: Path) -> set[str]:
    """GitHub's, of a Markdown file's headings."""
    headings = re.findall(r"^#+ (.*)$", path.read_text(encoding="utf-8"), re.M)
    return {re.sub(r"[^\w\- ]", "", h.lower()).replace(" ", "-") for h in headings}


@pytest.mark.parametrize("page", TEXTS, ids=name)
def test_links_lead_somewhere(page: Path) -> None:
    for link in re.findall(r"\]\(([^)\s]+)\)", page.read_text(encoding="utf-8")):
        if "://" in link:
            continue
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        assert target.exists(), link
        assert not anchor or anchor in anchors(target), link


@pytest.mark.parametrize("page", TEXTS, ids=name)
def test_files_that_a_page_names_exist(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    for path in re.findall(rf"(?<![\w/.<>-]){FOLDERS}/[\w./*-]*", text):
        path = path.rstrip(".")
        assert any(ROOT.glob(path)) if "*" in path else (ROOT / path).exists(), path


@pytest.mark.parametrize("page", TEXTS, ids=name)
def test_make_targets_that_a_page_names_exist(page: Path) -> None:
    rules = re.findall(r"^([\w-]+):(?!=)", (ROOT / "Makefile").read_text(encoding="utf-8"), re.M)
    text = page.read_text(encoding="utf-8")
    named = re.findall(r"(?:^|`)make (?:[A-Z]+=\S+ )*([a-z]\w*)", text, re.M)
    assert set(named) <= set(rules)


@pytest.mark.parametrize("page", TEXTS, ids=name)
def test_modules_and_names_of_a_page_exist(page: Path) -> None:
    text = re.sub(r"torch\.ops\.fused_peft\.\w+", "", page.read_text(encoding="utf-8"))
    for dotted in set(re.findall(r"(?<![\w/])fused_peft(?:\.[A-Za-z_]\w*)+", text)):
        if not dotted.endswith((".py", ".md")):
            assert resolved(dotted) is not None, dotted


def resolved(dotted: str) -> object:
    """The object of this name; None if there is none."""
    found: object = fused_peft
    path = "fused_peft"
    for part in dotted.split(".")[1:]:
        path = f"{path}.{part}"
        found = getattr(found, part, None)
        if found is None:
            try:
                found = importlib.import_module(path)
            except ModuleNotFoundError:
                return None
    return found


# ---- the reference -------------------------------------------------------------------------------


def documented(inventory: Path) -> set[str]:
    """Names of Python objects in Sphinx's objects.inv: four lines of text, then zlib."""
    lines = zlib.decompress(inventory.read_bytes().split(b"\n", 4)[4]).decode().splitlines()
    return {line.split(" ", 1)[0] for line in lines if " py:" in line}


def test_the_reference_builds_without_warnings_and_is_whole(tmp_path: Path) -> None:
    pytest.importorskip("sphinx")
    site = tmp_path / "site"
    run(sys.executable, "-m", "sphinx", "-qW", "--keep-going", "-b", "html",
        str(ROOT / "docs"), str(site), cwd=tmp_path)  # fmt: skip
    names = documented(site / "objects.inv")
    public = {f"fused_peft.{name}" for name in fused_peft.__all__}
    public |= {f"fused_peft.distributed.{name}" for name in distributed.__all__}
    public |= {f"fused_peft.ops.{name}" for name in fused_ops.__all__}
    public |= {f"fused_peft.simulator.{name}" for name in simulator.__all__}
    public |= {f"{peft_integration.__name__}.{name}" for name in ("fuse", "unfuse", "fused")}
    public -= {"fused_peft.simulator.simulated_cuda"}  # it is fused_peft.simulated_cuda
    assert public <= names, sorted(public - names)
    assert {page.stem for page in PAGES} <= {page.stem for page in site.glob("*.html")}
    # Nothing to be fetched when the site is read.
    for page in site.rglob("*.html"):
        sources = re.findall(
            r'<(?:script|link|img)[^>]+(?:src|href)="(https?:[^"]+)', page.read_text()
        )
        assert not sources, page
