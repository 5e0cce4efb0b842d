"""Saving and loading an adapter of any kind."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from torch import nn

from ..errors import AdapterError
from ..nn.adapter_spec import check_adapter_name
from ..tuners.places import refuse_wrapped
from ..tuners.prompt_config import PROMPT_CONFIGS
from ..tuners.prompt_inject import prompt_names
from . import _lora, _prompt
from ._atomic import reading, replace_files
from ._files import read_config
from ._modules import adapter_names, unwrap
from ._sharded import groups_of, is_first, same_outcome
from ._side_files import ENCODER_NAME, EXTRA_NAME, writers

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


def save_adapter(
    model: nn.Module, path: str | os.PathLike[str], adapter_name: str = "default"
) -> None:
    """Write an adapter so that :func:`load_adapter` and PEFT's ``from_pretrained`` read it.

    Where parameters are DTensors (``fully_shard``, ``parallelize_module``) every process has to
    call this; the first one writes, and all return, or raise, when it has. Of a replicated model
    each process that calls writes: see :func:`fused_peft.distributed.save_adapter`.

    Args:
        model: with the adapter, as ``get_peft_model`` or :func:`load_adapter` left it; it may be
            compiled, or wrapped by DistributedDataParallel.
        path: directory, made if need be. An adapter not named "default" goes to ``path/<name>``.
        adapter_name: which adapter.

    Raises:
        ValueError: the model has no such adapter, or base weights belong in the file while an
            adapter is merged into them.
        AdapterError: ``path`` is a file, or a tensor has NaN or infinity, or is on the meta device;
            or the process that writes has failed, and this is another one.
        OSError: a file cannot be written, for one because the disk is full. As for every error,
            the files that were there before are whole.
    """
    inner = unwrap(model)
    save_with(inner, path, adapter_name, groups_of(inner))


def save_with(
    model: nn.Module,
    path: str | os.PathLike[str],
    adapter_name: str,
    groups: Sequence[ProcessGroup],
) -> None:
    """:func:`save_adapter` of an unwrapped model, called by all processes of ``groups``."""
    kind = _prompt if adapter_name in prompt_names(model) else _lora
    if kind is _lora:
        _lora.config_of(model, adapter_name)  # raises where there is no such adapter
    directory = Path(path) if adapter_name == "default" else Path(path) / adapter_name
    if Path(adapter_name).name != adapter_name:
        raise ValueError(f"adapter_name is {adapter_name!r}; expected one that can name a folder")
    # The values are the same in all processes then, and so is what this raises.
    contents = kind.contents(model, adapter_name)
    with same_outcome(groups):
        if not is_first(groups):
            return
        for place in (Path(path), directory):
            if place.exists() and not place.is_dir():
                raise AdapterError(f"{place} is a file; expected a directory, or nothing yet")
        files = writers(contents, directory)
        obsolete = [name for name in (EXTRA_NAME, ENCODER_NAME) if name not in files]
        replace_files(directory, files, obsolete)


def load_adapter(
    model: nn.Module,
    path: str | os.PathLike[str],
    adapter_name: str = "default",
    *,
    is_trainable: bool = False,
) -> nn.Module:
    """Read an adapter that :func:`save_adapter` or PEFT wrote into ``model``, in place.

    A model that has no adapter of this name gets the layers from the file's config; the new
    adapter is active if it is the model's first, otherwise ``set_adapter`` makes it so. One that
    has it gets the weights. Every key, shape, dtype and value is checked before the model is
    touched: after an error it is as it was. Tensors are cast to the dtype they have in the model.

    Where parameters are DTensors every process has to call this. Each reads the files and takes its
    part; if one of them fails, all raise. An adapter that is new to the model goes in before
    ``fully_shard``; ``parallelize_module`` may come first.

    Args:
        model: the base model, or one with adapters; it may be compiled, or wrapped by
            DistributedDataParallel.
        path: the directory that holds the two files. For an adapter saved under a name that is
            ``<path of save_adapter>/<name>``.
        adapter_name: its name in the model; it need not be the one it was saved under.
        is_trainable: whether its parameters require grad afterwards. If not, the model is put in
            eval mode too, so that dropout is off, as PEFT does. A prefix or prompt that an encoder
            computed gets that encoder back, where :func:`save_adapter` has left it; otherwise, and
            for inference, what it computed is the adapter.

    Returns:
        ``model``.

    Raises:
        AdapterError: a file is missing, damaged, or no safetensors or JSON; the config is not one
            of an adapter that can be computed here, or is one for a model of other sizes; a tensor
            is missing, unexpected, or of the wrong shape or kind of dtype, or has NaN or infinity.
            Or reading failed in another process.
        ValueError: ``adapter_name`` is merged into the weights now, or the model has no values.
    """
    base = unwrap(model)
    with same_outcome(groups_of(base)):
        if adapter_name not in adapter_names(base):
            refuse_wrapped(model, "adding an adapter")
        apply = _prepare(base, Path(path), adapter_name, is_trainable)
    apply()
    if not is_trainable:
        base.eval()
    return model


def _prepare(
    base: nn.Module, directory: Path, adapter_name: str, is_trainable: bool
) -> Callable[[], None]:
    """Read and check everything; the function that is returned then changes the model."""
    check_adapter_name(adapter_name)
    if not directory.is_dir():
        what = "is a file" if directory.exists() else "does not exist"
        raise AdapterError(f"{directory} {what}; expected the directory of an adapter")
    with reading(directory):
        saved = read_config(directory)
        is_prompt = str(saved.document.get("peft_type")) in PROMPT_CONFIGS
        is_new = adapter_name not in adapter_names(base)
        if not is_new and is_prompt != (adapter_name in prompt_names(base)):
            raise AdapterError(
                f"{saved.config_file} has peft_type {saved.document.get('peft_type')!r}, and the "
                f"model's adapter {adapter_name!r} is of another kind; load it under another name, "
                "or delete the model's first"
            )
        kind = _prompt if is_prompt else _lora
        apply: Callable[[], None] = kind.prepare(
            base, saved, adapter_name, is_new=is_new, is_trainable=is_trainable
        )
        return apply
