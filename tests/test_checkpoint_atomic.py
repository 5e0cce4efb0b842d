"""Saves that are killed, or fail, or meet others: the directory holds one whole adapter."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
import tempfile
import textwrap
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from adapter_files import KEY, make_net, trained
from safetensors.torch import load_file
from torch import Tensor, nn

from fused_peft.checkpoint import CONFIG_NAME, WEIGHTS_NAME, load_adapter, save_adapter
from fused_peft.errors import AdapterError


@pytest.fixture
def x() -> Tensor:
    return torch.randn(5, 8, generator=torch.Generator().manual_seed(3))


def test_other_files_survive(tmp_path: Path) -> None:
    model = trained(seed=1)
    save_adapter(model, tmp_path)
    kept = {"README.md": "card", "checkpoint-5/optimizer.pt": "big", "b/adapter_config.json": "{}"}
    for name, content in kept.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(content)
    identity = (tmp_path.stat().st_ino, (tmp_path / "README.md").stat().st_ino)
    save_adapter(trained(seed=2), tmp_path)
    assert {name: (tmp_path / name).read_text() for name in kept} == kept
    assert (tmp_path.stat().st_ino, (tmp_path / "README.md").stat().st_ino) == identity
    names = sorted(p.name for p in tmp_path.iterdir())
    assert names == ["README.md", CONFIG_NAME, WEIGHTS_NAME, "b", "checkpoint-5"]


def test_links_of_the_user_are_replaced_not_written_through(tmp_path: Path, x: Tensor) -> None:
    """A Hugging Face cache holds links to files that other snapshots share."""
    save_adapter(trained(seed=1), tmp_path / "blobs")
    before = (tmp_path / "blobs" / WEIGHTS_NAME).read_bytes()
    (tmp_path / "snapshot").mkdir()
    for name in (CONFIG_NAME, WEIGHTS_NAME):
        (tmp_path / "snapshot" / name).symlink_to(f"../blobs/{name}")
    model = trained(seed=2)
    save_adapter(model, tmp_path / "snapshot")
    assert torch.equal(load_adapter(make_net(), tmp_path / "snapshot")(x), model(x))
    assert not (tmp_path / "snapshot" / WEIGHTS_NAME).is_symlink()
    assert (tmp_path / "blobs" / WEIGHTS_NAME).read_bytes() == before


# Runs in a process of its own: forks a child for every point at which to kill. The audit hook sees
# each file operation of Python before it is done; the n-th of them is not done any more.
DRIVER = """
import errno, os, pathlib, shutil, signal, sys, time, random
sys.path.insert(0, {tests!r})
from adapter_files import trained
from fused_peft.checkpoint import save_adapter

mode, root = sys.argv[1], pathlib.Path(sys.argv[2])
EVENTS = {{"open", "os.rename", "os.symlink", "os.link", "os.mkdir", "os.remove", "os.rmdir",
          "os.chmod", "shutil.rmtree", "shutil.copyfile"}}
state = {{"left": None}}

def hook(event, arguments):
    if state["left"] is not None and event in EVENTS:
        if state["left"] == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        state["left"] -= 1

sys.addaudithook(hook)
os.fsync = lambda descriptor: None  # a kill, unlike a power failure, loses no write that was made
if mode == "no-links":
    def refuse(*arguments, **keywords):
        raise OSError(errno.EPERM, "no links here")
    os.symlink = refuse
    os.link = refuse

def in_child(work):
    pid = os.fork()
    if pid == 0:
        try:
            work()
        finally:
            os._exit(0)
    return os.waitpid(pid, 0)[1]

old, new = trained(seed=1), trained(seed=2, r=6, lora_alpha=5)

def killed_at(directory, n):
    def work():
        state["left"] = n
        save_adapter(new, directory)
    return in_child(work)

for start in ("old", "nothing"):
    n = 0
    while True:
        directory = root / f"{{start}}-{{n}}"
        directory.mkdir()
        (directory / "README.md").write_text("card")
        if start == "old":
            save_adapter(old, directory)
        status = killed_at(directory, n)
        if not os.WIFSIGNALED(status):
            assert status == 0, status
            break
        # Killed again while the next save tidies up what the first one left.
        if n % 3 == 2:
            killed_at(directory, 5 + n % 7)
        n += 1
    print(start, n, flush=True)

# Not before a file operation but at any instant, in the middle of a write as well.
random.seed(0)
directory = root / "instants"
save_adapter(old, directory)
began = time.perf_counter()
for adapter in (old, new, old):
    save_adapter(adapter, directory)
each = min((time.perf_counter() - began) / 3, 0.05)
for attempt in range(40):
    pid = os.fork()
    if pid == 0:
        while True:
            save_adapter(new, directory)
            save_adapter(old, directory)
    time.sleep(random.uniform(0.0, 6 * each))
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    shutil.copytree(directory, root / f"instant-{{attempt}}", symlinks=True)
shutil.rmtree(directory)
"""


def kill_all_over(mode: str, root: Path) -> dict[str, int]:
    """Directories as kills left them, in ``root``; how many points there were, by start."""
    code = textwrap.dedent(DRIVER).format(tests=str(Path(__file__).parent))
    done = subprocess.run(
        [sys.executable, "-c", code, mode, str(root)], capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    return {start: int(n) for start, n in (line.split() for line in done.stdout.splitlines())}


def read_plainly(directory: Path) -> tuple[dict[str, Any], dict[str, Tensor]] | None:
    """What a reader that knows nothing of this package finds; None where there is no adapter."""
    if not (directory / CONFIG_NAME).exists() and not (directory / WEIGHTS_NAME).exists():
        return None
    return (
        json.loads((directory / CONFIG_NAME).read_text()),
        load_file(directory / WEIGHTS_NAME),
    )


def which(directory: Path, outputs: dict[str, Tensor], x: Tensor) -> str:
    """Which adapter load_adapter gives, bit for bit."""
    model = make_net()
    try:
        load_adapter(model, directory)
    except AdapterError as caught:
        error = str(caught)
    else:
        error = ""
    if error:
        assert f"has no {CONFIG_NAME}" in error, directory.name
        return "nothing"
    y = model(x)
    found = [name for name, output in outputs.items() if torch.equal(y, output)]
    assert len(found) == 1, directory.name
    return found[0]


@pytest.fixture
def no_sync(monkeypatch: pytest.MonkeyPatch) -> None:
    """Flushing matters for a power failure, which these tests do not cause, and takes long."""
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)


@pytest.fixture
def in_memory(tmp_path: Path) -> Iterator[Path]:
    """A directory in memory where there is one: a kill leaves the same there, and no disk waits."""
    memory = Path("/dev/shm")
    if not (memory.is_dir() and os.access(memory, os.W_OK)):
        yield tmp_path
        return
    with tempfile.TemporaryDirectory(dir=memory) as directory:
        yield Path(directory)


@pytest.fixture
def outputs(x: Tensor) -> dict[str, Tensor]:
    return {"old": trained(seed=1)(x), "new": trained(seed=2, r=6, lora_alpha=5)(x)}


@pytest.mark.skipif(sys.platform == "win32", reason="needs fork and SIGKILL")
@pytest.mark.usefixtures("no_sync")
@pytest.mark.parametrize("mode", ["links", "no-links"])
def test_killed_at_every_file_operation(
    in_memory: Path, x: Tensor, outputs: dict[str, Tensor], mode: str
) -> None:
    points = kill_all_over(mode, in_memory)
    assert points["old"] >= 20
    assert points["nothing"] >= 15
    seen: dict[str, set[str]] = {"old": set(), "nothing": set(), "instant": set()}
    for directory in sorted(in_memory.iterdir()):
        start = directory.name.split("-")[0]
        if mode == "links":
            plain = read_plainly(directory)
            if plain is not None:
                document, tensors = plain
                r = document["r"]
                assert document["lora_alpha"] == {4: 6, 6: 5}[r]
                assert tensors[KEY].shape == (r, 8), directory.name
        before = which(directory, outputs, x)
        seen[start].add(before)
        if start != "instant":
            assert (directory / "README.md").read_text() == "card"
        # The next save tidies up, whatever the killed one left.
        save_adapter(trained(seed=1), directory)
        left = {p.name for p in directory.iterdir()} - {"README.md"}
        assert left == {CONFIG_NAME, WEIGHTS_NAME}
        assert not any(p.is_symlink() for p in directory.iterdir())
        assert which(directory, outputs, x) == "old"
    assert seen["old"] == {"old", "new"}
    assert seen["nothing"] == {"nothing", "new"}
    assert seen["instant"] == {"old", "new"}


@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="reads names of descriptors there")
@pytest.mark.parametrize("links", [True, False], ids=["links", "no-links"])
def test_each_step_is_on_disk_before_the_next(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, links: bool
) -> None:
    """The order that a power failure must not undo: flush, link, flush, commit, flush, unlink."""
    save_adapter(trained(seed=1), tmp_path)
    steps: list[str] = []

    def short(path: object) -> str:
        return str(Path(str(path)).relative_to(tmp_path)).replace(".fused_peft_save", "S")

    def record_sync(descriptor: int, original: Callable[[int], None] = os.fsync) -> None:
        steps.append(f"sync {short(Path(f'/proc/self/fd/{descriptor}').readlink())}")
        original(descriptor)

    def record_rename(
        source: Path, target: Path, original: Callable[[Path, Path], Path] = Path.replace
    ) -> Path:
        steps.append(f"{short(source)} -> {short(target)}")
        return original(source, target)

    def record_touch(path: Path, original: Callable[[Path], None] = Path.touch) -> None:
        steps.append(f"touch {short(path)}")
        original(path)

    def refuse(*arguments: object, **keywords: object) -> None:
        raise OSError(errno.EPERM, "no links here")

    monkeypatch.setattr(os, "fsync", record_sync)
    monkeypatch.setattr(Path, "replace", record_rename)
    monkeypatch.setattr(Path, "touch", record_touch)
    if not links:
        monkeypatch.setattr(Path, "symlink_to", refuse)
    save_adapter(trained(seed=2), tmp_path)
    first = steps.index(f"S/{CONFIG_NAME} -> {CONFIG_NAME}" if links else "touch S/committed")
    assert {f"sync S/new/{CONFIG_NAME}", f"sync S/new/{WEIGHTS_NAME}"} <= set(steps[:first])
    assert {"sync S/new", "sync S/old", "sync S", "sync ."} <= set(steps[:first])
    switch = [
        f"S/{CONFIG_NAME} -> {CONFIG_NAME}",
        f"S/{WEIGHTS_NAME} -> {WEIGHTS_NAME}",
        "sync .",
        "S/next -> S/current",
    ]
    assert steps[first:] == [
        *(switch if links else ["touch S/committed"]),
        "sync S",
        f"S/new/{CONFIG_NAME} -> {CONFIG_NAME}",
        f"S/new/{WEIGHTS_NAME} -> {WEIGHTS_NAME}",
        "sync .",
    ]


FULL_DISK = """
import pathlib, resource, sys
sys.path.insert(0, {tests!r})
from adapter_files import trained
from fused_peft.checkpoint import save_adapter
# Every write past this size fails as on a full disk, in Python and in safetensors alike.
resource.setrlimit(resource.RLIMIT_FSIZE, ({limit}, {limit}))
try:
    save_adapter(trained(seed=2, r=6, lora_alpha=5), pathlib.Path({directory!r}))
except OSError as error:
    print(type(error).__name__, error)
"""


@pytest.mark.skipif(sys.platform == "win32", reason="needs resource limits")
@pytest.mark.parametrize("full_in", [CONFIG_NAME, WEIGHTS_NAME])
def test_a_full_disk(tmp_path: Path, x: Tensor, outputs: dict[str, Tensor], full_in: str) -> None:
    save_adapter(trained(seed=1), tmp_path)
    before = {p.name: p.read_bytes() for p in tmp_path.iterdir()}
    limit = len(before[full_in]) - 10
    if full_in == WEIGHTS_NAME:
        assert len(before[CONFIG_NAME]) + 10 < limit
    tests = str(Path(__file__).parent)
    code = FULL_DISK.format(tests=tests, limit=limit, directory=str(tmp_path))
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300)
    assert "File too large" in done.stdout, done.stdout + done.stderr
    assert {p.name: p.read_bytes() for p in tmp_path.iterdir()} == before
    assert which(tmp_path, outputs, x) == "old"


@pytest.mark.parametrize("failing", range(7))
def test_a_rename_that_fails(
    tmp_path: Path,
    x: Tensor,
    outputs: dict[str, Tensor],
    monkeypatch: pytest.MonkeyPatch,
    failing: int,
) -> None:
    """The error comes out; the adapter is whole, and nothing is left to trip the next save."""
    save_adapter(trained(seed=1), tmp_path)
    left = [failing]

    def replace(
        source: Path, target: Path, original: Callable[[Path, Path], Path] = Path.replace
    ) -> Path:
        left[0] -= 1
        if left[0] == -1:
            raise OSError(errno.EIO, "the disk broke")
        return original(source, target)

    monkeypatch.setattr(Path, "replace", replace)
    renames = 5
    if failing < renames:
        with pytest.raises(OSError, match="the disk broke"):
            save_adapter(trained(seed=2, r=6, lora_alpha=5), tmp_path)
    else:
        save_adapter(trained(seed=2, r=6, lora_alpha=5), tmp_path)
    commit = 2
    assert which(tmp_path, outputs, x) == ("old" if failing <= commit else "new")
    assert sorted(p.name for p in tmp_path.iterdir()) == [CONFIG_NAME, WEIGHTS_NAME]
    assert not any(p.is_symlink() for p in tmp_path.iterdir())


@pytest.mark.skipif(sys.platform == "win32", reason="needs flock")
@pytest.mark.usefixtures("no_sync")
def test_savers_and_loaders_at_once(in_memory: Path, x: Tensor, outputs: dict[str, Tensor]) -> None:
    models = [trained(seed=1), trained(seed=2, r=6, lora_alpha=5)]
    save_adapter(models[0], in_memory)
    stop = threading.Event()

    def save_again_and_again(model: nn.Module) -> int:
        count = 0
        while not stop.is_set():
            save_adapter(model, in_memory)
            count += 1
        return count

    with ThreadPoolExecutor(2) as pool:
        savers = [pool.submit(save_again_and_again, model) for model in models]
        try:
            found = [which(in_memory, outputs, x) for _ in range(40)]
        finally:
            stop.set()
        assert all(saver.result() > 0 for saver in savers)
    assert set(found) == {"old", "new"}
    assert sorted(p.name for p in in_memory.iterdir()) == [CONFIG_NAME, WEIGHTS_NAME]
