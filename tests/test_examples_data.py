"""The examples' data: docstrings of the standard library, JSONL files, the held-out split."""

from __future__ import annotations

import json
from pathlib import Path

import example_runs  # noqa: F401  the examples' folder is importable from here on
import pytest

import docstring_data  # isort: skip
from docstring_data import Example, InputError  # isort: skip


def test_no_module_of_the_standard_library_is_on_both_sides() -> None:
    corpus = docstring_data.standard_library_docstrings(0.1)
    train, held_out = ({e.group for e in part} for part in (corpus.train, corpus.held_out))
    assert not train & held_out
    assert len(corpus.train) > 1000
    assert len(corpus.held_out) > 100
    completions = [example.completion for example in corpus.train + corpus.held_out]
    assert len(completions) == len(set(completions))
    assert not {"tkinter", "test", "idlelib"} & {g.split(".")[0] for g in train | held_out}


def test_the_split_depends_on_the_name_alone() -> None:
    # The first 8 bytes of SHA-256("json.decoder") as a fraction of 2**64, from sha256sum.
    assert docstring_data.group_share("json.decoder") == 0x576BB4FF7B1A8F91 / 2**64


def test_sources_are_parsed_and_never_run(tmp_path: Path) -> None:
    (tmp_path / "pkg").mkdir()
    (tmp_path / "test").mkdir()
    documented = 'def f{0}(x, *, y=1):\n    """Return {1} of x."""\n'
    (tmp_path / "a.py").write_text("raise SystemExit('was run')\n" + documented.format(1, "one"))
    method = 'class C:\n    async def g(self) -> int:\n        """Do it now.\n\n        Twice."""\n'
    (tmp_path / "pkg" / "__init__.py").write_text(method + documented.format(2, "one"))
    (tmp_path / "pkg" / "broken.py").write_text("def f(:\n")
    (tmp_path / "test" / "t.py").write_text(documented.format(3, "three"))
    corpus = docstring_data.standard_library_docstrings(0.5, root=tmp_path)
    examples = {e.origin: e for e in corpus.train + corpus.held_out}
    assert set(examples) == {"a.f1", "pkg.C.g"}  # f2 repeats f1's text, "test" is skipped
    assert examples["a.f1"].prompt == 'def f1(x, *, y=1):\n    """'
    assert examples["a.f1"].completion == 'Return one of x."""'
    assert examples["pkg.C.g"].prompt == ('class C:\n    async def g(self) -> int:\n        """')
    assert examples["pkg.C.g"].completion == 'Do it now.\n\n        Twice.\n        """'
    assert examples["pkg.C.g"].group == "pkg"


def test_a_long_docstring_becomes_its_first_paragraph(tmp_path: Path) -> None:
    text = "First paragraph of it.\n\n    " + "word " * 100
    (tmp_path / "a.py").write_text(f'def f():\n    """{text}"""\n')
    (tmp_path / "b.py").write_text(f'def f():\n    """{"word " * 100}"""\n')
    (tmp_path / "c.py").write_text('def f():\n    """Another short docstring."""\n')
    corpus = docstring_data.standard_library_docstrings(0.5, root=tmp_path)
    completions = {e.completion for e in corpus.train + corpus.held_out}
    assert completions == {'First paragraph of it."""', 'Another short docstring."""'}


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b'{"text": "a"', "not JSON"),
        (b'{"text": "\xff"}', "not JSON"),
        (b'["text"]', "expected a JSON object, got list"),
        (b'{"txt": "a"}', r"got \['txt'\]"),
        (b'{"prompt": "a"}', r"got \['prompt'\]"),
        (b'{"text": "a", "prompt": "b"}', r"got \['prompt', 'text'\]"),
        (b'{"text": 3}', "'text' must be a string, got int"),
        (b'{"prompt": null, "completion": "b"}', "'prompt' must be a string, got NoneType"),
        (b'{"prompt": "a", "completion": ""}', "the text to learn is empty"),
    ],
)
def test_a_bad_line_is_named(tmp_path: Path, line: bytes, message: str) -> None:
    path = tmp_path / "bad.jsonl"
    path.write_bytes(b'{"text": "fine"}\n\n' + line + b"\n")
    with pytest.raises(InputError, match=rf"bad\.jsonl, line 3: .*{message}"):
        docstring_data.read_jsonl(path, 0.5)


def test_equal_lines_stay_on_one_side(tmp_path: Path) -> None:
    path = tmp_path / "twice.jsonl"
    path.write_text("".join(json.dumps({"text": f"t{i % 10}"}) + "\n" for i in range(40)))
    corpus = docstring_data.read_jsonl(path, 0.3)
    assert len(corpus.train) + len(corpus.held_out) == 40
    assert not {e.completion for e in corpus.train} & {e.completion for e in corpus.held_out}
    path.write_text('{"text": "t"}\n' * 5)
    with pytest.raises(InputError, match="needs at least 2"):
        docstring_data.read_jsonl(path, 0.3)


@pytest.mark.parametrize("held_out", [1e-9, 1 - 1e-9])
def test_neither_side_is_empty(held_out: float) -> None:
    examples = [Example("", f"t{i}", f"t{i}", f"line {i}") for i in range(3)]
    train, held = docstring_data.split_by_group(examples, held_out)
    assert min(len(train), len(held)) == 1
