"""Replacing several files of a directory at once: a reader, or a crash, sees all old or all new.

One ``rename`` is atomic, two are not: a kill between them would pair a new ``adapter_config.json``
with old weights. Swapping the whole directory for a rebuilt one (``RENAME_EXCHANGE``) would be
atomic, but the directory is not ours alone: a trainer keeps gigabytes of checkpoints and open
files in it, it may be a mount point or the working directory, and its parent may be read-only. So
the directory stays, and both names are sent through one symbolic link, which one rename flips::

    adapter_config.json       -> .fused_peft_save/current/adapter_config.json
    adapter_model.safetensors -> .fused_peft_save/current/adapter_model.safetensors
    .fused_peft_save/current  -> old | new

1. Write the new files to ``.fused_peft_save/new``, flush them to disk, hard-link (else copy) the
   old ones to ``.fused_peft_save/old``; ``current -> old``.
2. Replace each file by its link. What is read through it does not change: still the old file.
3. Rename a link ``-> new`` over ``current``: both files change in this one call. The commit.
4. Move each new file over its link (again the same content), remove ``.fused_peft_save``.

Any plain reader that follows links, Hugging Face PEFT among them, thus finds a whole adapter after
a kill at any moment, with no repair first; between saves the directory holds plain files only. The
next save first finishes what a killed one left. Where nothing was saved before, ``old`` is empty:
until the commit the links dangle, which readers take for "no such file".

Where links are not supported (FAT, some network shares) the commit is an empty file
``.fused_peft_save/committed`` instead, followed by the renames. A kill among those is rolled
forward by the next save, and :func:`locate` already reads the committed version; another reader
may find a mixed pair until then, which no order of renames can prevent.

Each step is flushed to disk before the next, so the order holds through a power failure as well.
Savers of one directory exclude each other, and :func:`reading` excludes them, by ``flock`` on the
directory itself where the file system has it.
"""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path

if sys.platform != "win32":
    import fcntl

_STAGING = ".fused_peft_save"
_NO_LINKS = {errno.EPERM, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.EINVAL}
_NO_DIRECTORY_SYNC = _NO_LINKS | {errno.EACCES, errno.EBADF, errno.EISDIR}


def replace_files(
    directory: Path, writers: Mapping[str, Callable[[Path], None]], obsolete: Iterable[str] = ()
) -> None:
    """Write files into ``directory`` so that all of them change at once; other entries stay.

    Args:
        directory: made, with its parents, where it does not exist.
        writers: file name -> function that writes that file at the path it is given. They are
            called in this order, in one folder. All have returned, and their files are on disk,
            before a name in ``directory`` changes.
        obsolete: names of files to remove after the change. A kill may leave them, so a reader
            must be able to tell that they are none of the new files.

    Raises:
        OSError: what a file operation raised, or whatever a writer raised. ``directory`` then
            holds the old files, or the new ones where the error came after the commit.
    """
    _make_directory(directory)
    with _lock(directory, exclusive=True):
        _settle(directory)
        try:
            _stage(directory, writers)
            if _point_at_old(directory, writers):
                _swap_by_link(directory, writers)
            else:
                _commit_by_marker(directory)
        except BaseException:
            # The first error is the one to report; what cannot be tidied now the next save does.
            with contextlib.suppress(OSError):
                _settle(directory)
            raise
        for name in obsolete:
            (directory / name).unlink(missing_ok=True)


def locate(directory: Path, name: str) -> Path:
    """The path from which to read file ``name`` of ``directory``, which need not exist."""
    staging = directory / _STAGING
    staged = staging / "new" / name
    if (staging / "committed").exists() and staged.exists():
        return staged
    return directory / name


@contextlib.contextmanager
def reading(directory: Path) -> Iterator[None]:
    """While held, no :func:`replace_files` in another thread or process changes ``directory``."""
    with _lock(directory, exclusive=False):
        yield


@contextlib.contextmanager
def _lock(directory: Path, *, exclusive: bool) -> Iterator[None]:
    if sys.platform == "win32":
        yield
        return
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        # Some network file systems have no flock, or none on a directory: then there is no lock.
        with contextlib.suppress(OSError):
            fcntl.flock(descriptor, fcntl.LOCK_EX if exclusive else fcntl.LOCK_SH)
        yield
    finally:
        os.close(descriptor)


def _make_directory(directory: Path) -> None:
    missing = [p for p in (directory, *directory.parents) if not p.exists()]
    directory.mkdir(parents=True, exist_ok=True)
    for path in missing:
        _sync_directory(path.parent)


def _stage(directory: Path, writers: Mapping[str, Callable[[Path], None]]) -> None:
    """Put the new files on disk, and a second name (else a copy) of the old ones beside them."""
    staging = directory / _STAGING
    for folder in (staging, staging / "new", staging / "old"):
        folder.mkdir()
    for name, write in writers.items():
        write(staging / "new" / name)
        _sync_file(staging / "new" / name)
    for name in writers:
        final = directory / name
        if final.exists():
            _link_or_copy(final.resolve(), staging / "old" / name)
    for folder in (staging / "new", staging / "old", staging, directory):
        _sync_directory(folder)


def _point_at_old(directory: Path, names: Iterable[str]) -> bool:
    """Make the symbolic links, none of them in use yet; False where there are no such links."""
    staging = directory / _STAGING
    try:
        (staging / "current").symlink_to("old", target_is_directory=True)
        (staging / "next").symlink_to("new", target_is_directory=True)
        for name in names:
            (staging / name).symlink_to(_link_text(name))
    except NotImplementedError:
        return False
    except OSError as error:
        if error.errno not in _NO_LINKS:
            raise
        return False
    return True


def _swap_by_link(directory: Path, names: Iterable[str]) -> None:
    staging = directory / _STAGING
    _sync_directory(staging)
    for name in names:
        (staging / name).replace(directory / name)
    _sync_directory(directory)
    (staging / "next").replace(staging / "current")  # the commit
    _sync_directory(staging)
    _settle(directory)


def _commit_by_marker(directory: Path) -> None:
    staging = directory / _STAGING
    (staging / "committed").touch()
    _sync_directory(staging)
    _settle(directory)


def _settle(directory: Path) -> None:
    """End a save, ours or a killed one: plain files again, committed content, no leftovers.

    A file is only ever replaced by one of the same content, or by the committed one in the mode
    without links, so this too may be killed anywhere and run again.
    """
    staging = directory / _STAGING
    if not staging.is_dir():
        return
    # The killed save's files need not be those of the next one. A name whose new file has moved to
    # its place already is not listed, and is no link any more.
    for name in sorted({file.name for file in (staging / "new").glob("*")}):
        final = directory / name
        if final.is_symlink() and final.readlink() == Path(_link_text(name)):
            if final.exists():
                final.resolve().replace(final)
            else:
                final.unlink()
        elif (source := locate(directory, name)) != final:
            source.replace(final)
    _sync_directory(directory)
    shutil.rmtree(staging)


def _link_text(name: str) -> str:
    return f"{_STAGING}/current/{name}"


def _link_or_copy(source: Path, target: Path) -> None:
    try:
        target.hardlink_to(source)
    except OSError:  # no hard links here, or the source lies on another file system
        shutil.copy2(source, target)
        _sync_file(target)


def _sync_file(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _sync_directory(path: Path) -> None:
    try:
        _sync_file(path)
    except OSError as error:
        # Some systems cannot open or flush a directory; a real I/O error must not be hidden.
        if error.errno not in _NO_DIRECTORY_SYNC:
            raise
