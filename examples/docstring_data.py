"""Training text: the standard library's own docstrings, or the lines of a JSONL file.

Both give a :class:`Corpus`, whose held-out part shares no group with its training part: a group is
a module of the standard library, or one distinct line of the file.
"""

from __future__ import annotations

import ast
import hashlib
import json
import sysconfig
import textwrap
import tokenize
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

# Tests, vendored and installed packages, applications. And tkinter: many systems install Python
# without it, and its 600 docstrings have a style of their own, so figures would not compare.
SKIPPED_FOLDERS = frozenset(
    {
        "__pycache__",
        "_vendor",
        "dist-packages",
        "ensurepip",
        "idlelib",
        "lib2to3",
        "pydoc_data",
        "site-packages",
        "test",
        "tests",
        "tkinter",
        "turtledemo",
    }
)
# About 80 tokens: of a longer docstring the first paragraph is taken, never half a sentence.
MAX_DOCSTRING_CHARS = 320
# A shorter docstring ("Stub.", "See above") says nothing about its function.
MIN_DOCSTRING_WORDS = 3
# A signature of more than about 80 tokens is all prompt and little to learn.
MAX_PROMPT_CHARS = 320
DOCSTRING_END = '"""'


class InputError(ValueError):
    """What the user gave cannot be used; the message is all that he needs to see."""


@dataclass(frozen=True)
class Example:
    """A prompt and the text that should follow it; the held-out split keeps a group whole."""

    prompt: str
    completion: str
    group: str
    origin: str
    """Where it came from, for messages: ``email.message.Message.get_payload`` or ``line 7``."""


@dataclass(frozen=True)
class Corpus:
    """Examples to train on and to measure on.

    ``end`` is the text that closes every completion, or None where the tokenizer's end-of-sequence
    token does. The docstrings close with their quotes and no end-of-sequence token follows: the
    base model would never expect one there, and learning that alone would flatter the result.
    """

    name: str
    train: list[Example]
    held_out: list[Example]
    end: str | None

    def fingerprint(self) -> str:
        """SHA-256 over both parts, so that a resumed run can tell that its data has not changed."""
        digest = hashlib.sha256()
        for part in (self.train, self.held_out):
            rows = [[example.prompt, example.completion] for example in part]
            digest.update(json.dumps(rows).encode())
        return digest.hexdigest()


def group_share(group: str) -> float:
    """A number in [0, 1) that depends on the group's name alone, the same on every machine."""
    return int.from_bytes(hashlib.sha256(group.encode()).digest()[:8], "big") / 2.0**64


def split_by_group(examples: list[Example], held_out: float) -> tuple[list[Example], list[Example]]:
    """Training and held-out examples: a group is held out when its share is below ``held_out``.

    Where that leaves one side empty, as it can with a handful of groups, the group nearest to the
    threshold changes sides.

    Raises:
        InputError: fewer than two groups.
    """
    groups = sorted({example.group for example in examples}, key=group_share)
    if len(groups) < 2:
        raise InputError(f"{len(groups)} distinct example(s); a held-out split needs at least 2")
    count = sum(group_share(group) < held_out for group in groups)
    held = set(groups[: min(max(count, 1), len(groups) - 1)])
    train = [example for example in examples if example.group not in held]
    return train, [example for example in examples if example.group in held]


# ------------------------------------------------------------------- the standard library


def standard_library_docstrings(held_out: float, root: Path | None = None) -> Corpus:
    """Every function of the running interpreter's standard library that has a docstring.

    The sources are parsed, never imported. A docstring seen before is dropped, so none is on both
    sides of the split.

    Args:
        held_out: share of the modules to hold out, in (0, 1).
        root: the library's folder; None takes the running interpreter's.

    Raises:
        InputError: ``root`` holds too few documented functions to split.
    """
    root = Path(sysconfig.get_path("stdlib")) if root is None else root
    examples, seen = [], set()
    for path in sorted(root.rglob("*.py")):
        parts = path.relative_to(root).with_suffix("").parts
        if not SKIPPED_FOLDERS.isdisjoint(parts):
            continue
        for example in _examples_of_file(path, ".".join(parts).removesuffix(".__init__")):
            if example.completion not in seen:
                seen.add(example.completion)
                examples.append(example)
    train, held = split_by_group(examples, held_out)
    return Corpus("docstrings of the standard library", train, held, end=DOCSTRING_END)


def _examples_of_file(path: Path, module: str) -> Iterator[Example]:
    try:
        with tokenize.open(path) as file:
            tree = ast.parse(file.read())
    except (SyntaxError, UnicodeDecodeError):
        return  # a few files, such as templates, are not meant to parse
    for class_name, function in _functions(tree, None):
        docstring = _shortened(ast.get_docstring(function) or "")
        if not docstring:
            continue
        prompt, indent = _prompt(class_name, function)
        if len(prompt) > MAX_PROMPT_CHARS:
            continue
        name = ".".join(filter(None, (module, class_name, function.name)))
        # A docstring's first line follows the opening quotes; the others are indented like code.
        body = textwrap.indent(docstring, indent).removeprefix(indent)
        end = f"\n{indent}{DOCSTRING_END}" if "\n" in body else DOCSTRING_END
        yield Example(prompt, body + end, group=module, origin=name)


def _functions(
    node: ast.AST, class_name: str | None
) -> Iterator[tuple[str | None, ast.FunctionDef | ast.AsyncFunctionDef]]:
    """Functions and methods with the class they are in; functions inside functions are left out."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.ClassDef):
            yield from _functions(child, child.name)
        elif isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef)):
            yield class_name, child
        elif not isinstance(child, ast.expr):
            yield from _functions(child, class_name)


def _prompt(
    class_name: str | None, function: ast.FunctionDef | ast.AsyncFunctionDef
) -> tuple[str, str]:
    """The source up to the docstring's opening quotes, and the docstring's indentation."""
    keyword = "async def" if isinstance(function, ast.AsyncFunctionDef) else "def"
    returns = f" -> {ast.unparse(function.returns)}" if function.returns else ""
    signature = f"{keyword} {function.name}({ast.unparse(function.args)}){returns}:"
    outer = "    " if class_name else ""
    header = f"class {class_name}:\n" if class_name else ""
    return f'{header}{outer}{signature}\n{outer}    """', f"{outer}    "


def _shortened(docstring: str) -> str:
    """The docstring, its first paragraph when it is long, nothing when it is too short or long."""
    text = docstring.strip()
    if len(text) > MAX_DOCSTRING_CHARS:
        text = text.split("\n\n", 1)[0]
    too_long = len(text) > MAX_DOCSTRING_CHARS
    return "" if too_long or len(text.split()) < MIN_DOCSTRING_WORDS else text


# ------------------------------------------------------------------- the user's own text


def read_jsonl(path: Path, held_out: float) -> Corpus:
    """Lines ``{"text": ...}`` or ``{"prompt": ..., "completion": ...}``; blank lines are skipped.

    Args:
        path: the file, UTF-8.
        held_out: share of the distinct lines to hold out, in (0, 1).

    Raises:
        InputError: a line is not one of the two, with its number; or too few lines to split.
    """
    examples = []
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            if line.strip():
                examples.append(_example_of_line(line, f"{path}, line {number}"))
    try:
        train, held = split_by_group(examples, held_out)
    except InputError as error:
        raise InputError(f"{path}: {error}") from None
    return Corpus(path.name, train, held, end=None)


def _example_of_line(line: bytes, origin: str) -> Example:
    try:
        row = json.loads(line)
    except ValueError as error:  # bad JSON and bad UTF-8 alike
        raise InputError(f"{origin}: not JSON ({error})") from None
    if not isinstance(row, dict):
        raise InputError(f"{origin}: expected a JSON object, got {type(row).__name__}")
    if set(row) not in ({"text"}, {"prompt", "completion"}):
        raise InputError(
            f'{origin}: expected the keys "text", or "prompt" and "completion", got {sorted(row)}'
        )
    for key, value in row.items():
        if not isinstance(value, str):
            raise InputError(f"{origin}: {key!r} must be a string, got {type(value).__name__}")
    prompt, completion = row.get("prompt", ""), row.get("completion", row.get("text"))
    if not completion:
        raise InputError(f"{origin}: the text to learn is empty")
    return Example(prompt, completion, group=json.dumps([prompt, completion]), origin=origin)


# ---------------------------------------------------------------------- tokens


@dataclass(frozen=True)
class Encoded:
    """One example's tokens; the first ``prompt_length`` carry no loss."""

    ids: list[int]
    prompt_length: int


def encode(corpus: Corpus, examples: list[Example], tokenizer: Any, limit: int) -> list[Encoded]:
    """Tokenises prompt and completion apart, so that no token straddles the two.

    An example over ``limit`` tokens is cut there.

    Raises:
        InputError: a prompt leaves no room for a token to learn; names the example.
    """
    prompts = tokenizer([example.prompt for example in examples])["input_ids"]
    completions = tokenizer([example.completion for example in examples], add_special_tokens=False)[
        "input_ids"
    ]
    ends = corpus.end is None and tokenizer.eos_token_id is not None
    closing = [tokenizer.eos_token_id] if ends else []
    encoded = []
    for example, prompt, completion in zip(examples, prompts, completions, strict=True):
        ids = (prompt + completion + closing)[:limit]
        # The first token of all has nothing before it to be predicted from.
        if len(ids) <= max(1, len(prompt)):
            raise InputError(
                f"{example.origin}: {len(prompt)} prompt and {len(completion)} completion tokens "
                f"leave none to learn within --max-length {limit}"
            )
        encoded.append(Encoded(ids, len(prompt)))
    return encoded
