"""What training needs besides PEFT's two files: a prompt's encoder, and fields of its config.

``fused_peft_config.json`` says by digest to which ``adapter_model.safetensors`` and
``prompt_encoder.safetensors`` it belongs, since PEFT leaves both where it writes another adapter.
"""

from __future__ import annotations

import dataclasses
import hashlib
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from ..errors import AdapterError
from ._atomic import locate
from ._files import (
    CONFIG_NAME,
    WEIGHTS_NAME,
    json_writer,
    read_json,
    tensor_writer,
    weights_file,
)

ENCODER_NAME = "prompt_encoder.safetensors"
EXTRA_NAME = "fused_peft_config.json"

_FORMAT = 1


@dataclasses.dataclass(frozen=True)
class Contents:
    """What an adapter's files are to hold."""

    document: Mapping[str, Any]
    """For PEFT's config file."""
    tensors: Mapping[str, Tensor]
    encoder: Mapping[str, Tensor] = dataclasses.field(default_factory=dict)
    """What training needs beyond ``tensors``; PEFT does not read it."""
    extra: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    """Fields of the config that PEFT's file cannot have."""


def writers(contents: Contents, directory: Path) -> dict[str, Callable[[Path], None]]:
    """File name -> function that writes it; to be called in this order, in one folder."""
    files = {CONFIG_NAME: json_writer(contents.document)}
    files[WEIGHTS_NAME] = tensor_writer(contents.tensors, str(directory / WEIGHTS_NAME))
    if contents.encoder:
        files[ENCODER_NAME] = tensor_writer(contents.encoder, str(directory / ENCODER_NAME))
    if contents.encoder or contents.extra:
        files[EXTRA_NAME] = _extra_writer(contents.extra)
    return files


def _extra_writer(extra: Mapping[str, Any]) -> Callable[[Path], None]:
    """Writes our own config file, which says by digest of which adapter it is."""

    def write(file: Path) -> None:
        digests = {
            name: _sha256(file.parent / name)
            for name in (WEIGHTS_NAME, ENCODER_NAME)
            if (file.parent / name).exists()
        }
        json_writer({"fields": dict(extra), "format": _FORMAT, "sha256": digests})(file)

    return write


def read_extra(directory: Path) -> tuple[dict[str, Any], str | None]:
    """Our own config file, where it is of the adapter that is there.

    PEFT, which does not know the file, may have written another adapter over ours.

    Returns:
        the config's fields, and the digest of the encoder's file where one was saved.

    Raises:
        AdapterError: it is damaged.
    """
    file = locate(directory, EXTRA_NAME)
    if not file.is_file():
        return {}, None
    document = read_json(file)
    digests = document.get("sha256") if isinstance(document, dict) else None
    fields = document.get("fields") if isinstance(document, dict) else None
    if not isinstance(digests, dict) or not isinstance(fields, dict):
        raise AdapterError(f"{file} is no JSON object with fields and sha256")
    if document.get("format") != _FORMAT:
        raise AdapterError(
            f"{file} has format {document.get('format')!r}; expected {_FORMAT}: a later "
            "version of fused_peft may have written it"
        )
    if digests.get(WEIGHTS_NAME) != _sha256(weights_file(directory)):
        warnings.warn(
            f"{EXTRA_NAME} in {directory} is of an adapter that was there before, and ignored",
            stacklevel=4,
        )
        return {}, None
    return fields, digests.get(ENCODER_NAME)


def encoder_file(directory: Path, digest: str | None) -> Path | None:
    """Where to read the prompt's encoder from, or None where there is none of this adapter.

    Raises:
        AdapterError: it is not the file that was saved with the adapter.
    """
    file = locate(directory, ENCODER_NAME)
    if digest is None:
        return None
    if not file.is_file():
        warnings.warn(
            f"{directory} has no {ENCODER_NAME} any more; the prompt is trained on by itself",
            stacklevel=4,
        )
        return None
    if _sha256(file) != digest:
        raise AdapterError(
            f"{file} is cut off or damaged, or not the one that was saved with this adapter; "
            "remove it to train the prompt on by itself"
        )
    return file


def _sha256(file: Path) -> str:
    digest = hashlib.sha256()
    with file.open("rb") as opened:
        while block := opened.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()
