"""Reading and writing an adapter's files, with a check of every key, shape, dtype and value."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from ..errors import AdapterError
from ._atomic import locate
from ._sharded import full

CONFIG_NAME = "adapter_config.json"
WEIGHTS_NAME = "adapter_model.safetensors"
PEFT_VERSION = "0.21.2"
"""The version of PEFT whose layout is written, noted in the config as its own save does."""

PROMPT_KEY = "prompt_embeddings"

_SHOWN = 4


@dataclasses.dataclass(frozen=True)
class Saved:
    """An adapter's directory, and what its config file holds."""

    directory: Path
    document: Mapping[str, Any]

    @property
    def config_file(self) -> Path:
        """Where the config is, for messages."""
        return self.directory / CONFIG_NAME

    def misfit(self, model: nn.Module, reason: object) -> AdapterError:
        """The error that this adapter is not one for ``model``, with what is known of its own."""
        auto_mapping = self.document.get("auto_mapping")
        known = auto_mapping.get("base_model_class") if isinstance(auto_mapping, dict) else None
        trained_on = known or self.document.get("base_model_name_or_path")
        return AdapterError(
            f"the adapter in {self.directory}"
            + (f", trained on {trained_on}," if trained_on else "")
            + f" does not fit this {type(model).__name__}: {reason}"
        )


# ---- writing


def config_document(
    model: nn.Module, content: Mapping[str, Any], unused: Mapping[str, Any]
) -> dict[str, Any]:
    """What PEFT's save writes into ``adapter_config.json``.

    Args:
        model: for its name and class.
        content: the config's ``to_dict()``.
        unused: PEFT's fields for what this package does not do, with the values they have then.
    """
    document = {
        **unused,
        **content,
        "base_model_name_or_path": base_name(model, content["base_model_name_or_path"]),
        "inference_mode": True,
        "peft_version": PEFT_VERSION,
    }
    if content["task_type"] is None:
        document["auto_mapping"] = {
            "base_model_class": type(model).__name__,
            "parent_library": type(model).__module__,
        }
    return document


def base_name(model: nn.Module, configured: str | None) -> str | None:
    """Name or path of the base model: the config's, or what transformers noted in the model."""
    return configured or vars(model).get("name_or_path") or None


def writable(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors as a file can hold them: whole, contiguous, none sharing another's memory.

    Where one is a DTensor, every process has to call this.

    Raises:
        AdapterError: one has NaN or infinity, or no values at all.
    """
    ready: dict[str, Tensor] = {}
    memory: set[int] = set()
    for key, tensor in tensors.items():
        if tensor.is_meta:
            raise AdapterError(f"{key} is on the meta device, without values; nothing is written")
        value = full(tensor.detach()).contiguous()
        if not is_finite(value):
            raise AdapterError(f"{key} has NaN or infinity; nothing is written")
        # The format has no two names for one memory, as tied embeddings have.
        storage = value.untyped_storage().data_ptr()
        ready[key] = value.clone() if storage in memory else value
        memory.add(storage)
    return ready


def json_writer(document: Mapping[str, Any]) -> Callable[[Path], None]:
    """A function that writes ``document`` in the manner of PEFT to the path it is given."""
    text = json.dumps(document, indent=2, sort_keys=True)

    def write(file: Path) -> None:
        file.write_text(text, encoding="utf-8")

    return write


def tensor_writer(tensors: Mapping[str, Tensor], name: str) -> Callable[[Path], None]:
    """A function that writes ``tensors`` to the path it is given, beside the config file.

    Args:
        tensors: as :func:`writable` gave them.
        name: the file's, for messages.
    """

    def write(file: Path) -> None:
        try:
            save_file(dict(tensors), file, metadata={"format": "pt"})
        except SafetensorError as error:
            raise OSError(f"cannot write {name}: {error}") from error
        # safetensors makes files that only their owner can read; the umask is the user's choice.
        file.chmod((file.parent / CONFIG_NAME).stat().st_mode)

    return write


# ---- reading


def read_config(directory: Path) -> Saved:
    """The adapter's config file, as it is.

    Raises:
        AdapterError: it is missing, or no JSON object.
    """
    file = locate(directory, CONFIG_NAME)
    if not file.is_file():
        below = sorted(p.parent.name for p in directory.glob(f"*/{CONFIG_NAME}"))
        hint = f"; there are adapters in its folders {shortened(below)}" if below else ""
        raise AdapterError(f"{directory} has no {CONFIG_NAME}{hint}")
    document = read_json(file)
    if not isinstance(document, dict):
        raise AdapterError(f"{file}: the adapter's config is {document!r}; expected a JSON object")
    return Saved(directory, document)


def read_json(file: Path) -> Any:
    """What a JSON file holds.

    Raises:
        AdapterError: it is damaged.
    """
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:  # json's and UTF-8's errors both are
        raise AdapterError(f"{file} is no JSON, or is cut off: {error}") from error


def weights_file(directory: Path) -> Path:
    """Where to read the adapter's tensors from.

    Raises:
        AdapterError: there is no such file.
    """
    file = locate(directory, WEIGHTS_NAME)
    if file.is_file():
        return file
    if (directory / "adapter_model.bin").exists():
        raise AdapterError(
            f"{directory} has its weights in adapter_model.bin, a pickle file, which can run any "
            "code when it is read and is not read here. If you trust where it is from, load it "
            "with PEFT and save it again by save_pretrained, which writes safetensors"
        )
    raise AdapterError(f"{directory} has no {WEIGHTS_NAME}")


def read_tensors(
    saved: Saved,
    file: Path,
    model: nn.Module,
    *,
    required: Collection[str],
    known: Mapping[str, Tensor],
    ignored: Callable[[str], bool] = lambda key: False,
    also: Callable[[Iterable[str]], None] = lambda keys: None,
) -> dict[str, Tensor]:
    """The file's tensors in the dtypes of ``known``, after every check of them.

    Args:
        saved: the adapter, for messages.
        file: a safetensors file of it.
        model: for messages.
        required: keys that the file must have.
        known: key -> a tensor of the shape and dtype expected, for all keys it may have.
        ignored: whether to pass over a key.
        also: a further check of the keys that are there, before any value is read.

    Raises:
        AdapterError: the file is damaged, or a key, shape, dtype or value is not as expected.
    """
    try:
        with safe_open(file, framework="pt", device="cpu") as opened:
            keys = [k for k in opened.keys() if not ignored(k)]  # noqa: SIM118
            _refuse_quantised(file, {k: opened.get_slice(k).get_dtype() for k in keys}, known)
            _check_keys(saved, model, keys, required, known)
            also(keys)
            shapes = {k: tuple(opened.get_slice(k).get_shape()) for k in keys}
            _check_shapes(file, shapes, known)
            return {k: _checked_value(file, k, opened.get_tensor(k), known[k]) for k in keys}
    except (SafetensorError, OSError) as error:
        raise AdapterError(
            f"{file} is no safetensors file, is cut off or damaged: {error}"
        ) from error


def _refuse_quantised(file: Path, dtypes: Mapping[str, str], known: Mapping[str, Tensor]) -> None:
    """Raise AdapterError where packed values of 4 or 8 bits stand for those of an adapter."""
    for key, dtype in dtypes.items():
        if dtype in ("U8", "I8") and (key not in known or known[key].is_floating_point()):
            raise AdapterError(
                f"{key} in {file} is of {dtype}, quantised values; expected F32, BF16 or F16, as "
                "an adapter has also where its base model is quantised (QLoRA): save it from the "
                "model that trained it"
            )


def _check_keys(
    saved: Saved,
    model: nn.Module,
    there: Collection[str],
    required: Collection[str],
    known: Collection[str],
) -> None:
    missing = sorted(set(required) - set(there))
    unexpected = sorted(set(there) - set(known))
    if not missing and not unexpected:
        return
    if len(missing) == len(required) and unexpected:
        raise saved.misfit(
            model,
            f"it has none of the tensors needed; has {shortened(unexpected)}, "
            f"expected {shortened(missing)}",
        )
    found = [("missing", missing), ("unexpected", unexpected)]
    raise saved.misfit(model, "; ".join(f"{what} {shortened(k)}" for what, k in found if k))


def _check_shapes(
    file: Path, shapes: Mapping[str, tuple[int, ...]], known: Mapping[str, Tensor]
) -> None:
    wrong = []
    for key, shape in shapes.items():
        expected = tuple(known[key].shape)
        if shape != expected:
            wrong.append(
                f"{key} {list(shape)}, expected {list(expected)}{_size_note(key, shape, expected)}"
            )
    if wrong:
        raise AdapterError(f"{file} has tensors of the wrong shape: {shortened(wrong)}")


def _size_note(key: str, shape: tuple[int, ...], expected: tuple[int, ...]) -> str:
    if key == PROMPT_KEY and shape[1:] == expected[1:]:
        return f" ({shape[0]} virtual tokens, not {expected[0]})"
    for suffix, rank, other in ((".lora_A.weight", 0, 1), (".lora_B.weight", 1, 0)):
        if key.endswith(suffix) and len(shape) == 2 and shape[other] == expected[other]:
            return f" (rank {shape[rank]}, not {expected[rank]})"
    return ""


def _checked_value(file: Path, key: str, value: Tensor, destination: Tensor) -> Tensor:
    if value.dtype != destination.dtype and not (
        value.is_floating_point() and destination.is_floating_point()
    ):
        raise AdapterError(f"{key} in {file} is {value.dtype}, expected {destination.dtype}")
    if not is_finite(value):
        raise AdapterError(f"{key} in {file} has NaN or infinity")
    cast = value.to(destination.dtype)
    if not is_finite(cast):
        raise AdapterError(f"{key} in {file} has values too large for {destination.dtype}")
    return cast


def is_finite(tensor: Tensor) -> bool:
    """Whether it has neither NaN nor infinity."""
    if not tensor.is_floating_point() and not tensor.is_complex():
        return True
    # float8 has no isfinite of its own
    wide = tensor if tensor.element_size() > 1 else tensor.float()
    return bool(torch.isfinite(wide).all())


def shortened(entries: Sequence[str]) -> str:
    """The first few of them, and how many more there are."""
    rest = len(entries) - _SHOWN
    return ", ".join(entries[:_SHOWN]) + (f" and {rest} more" if rest > 0 else "")
