"""Adapters on disk in Hugging Face PEFT's format: what either library saves, the other loads.

A directory holds ``adapter_config.json`` and ``adapter_model.safetensors``; an adapter that is not
named "default" gets a directory of its own below, ``<path>/<name>/``. The adapter's name is in
neither file. Tensors are named as in PEFT 0.21 (``peft/utils/save_and_load.py``), with
``<module>`` the path in the model that was given to ``get_peft_model``:

==============================================  ==================================================
``base_model.model.<module>.lora_A.weight``     ``[r, K]``
``base_model.model.<module>.lora_B.weight``     ``[N, r]``
``base_model.model.<module>.base_layer.bias``   ``[N]``, with ``bias="lora_only"`` or ``"all"``
``base_model.model.<module>.bias``              every other bias, with ``bias="all"``
``base_model.model.<module>.<parameter>``       a module of ``modules_to_save``
``...<embedding>.base_layer.weight``            input or output embedding with an adapter on it
``...<embedding>.weight``                       both, where the vocabulary was resized
==============================================  ==================================================

Both files change at once: a save that is killed at any moment leaves the old adapter or the new
one, whole, and every other file in the directory stays as it is. How: :mod:`fused_peft._atomic`.

Nothing here reads or writes pickle.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import json
import os
import re
import warnings
from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from ._atomic import locate, reading, replace_files
from .errors import AdapterError
from .nn.adapter_spec import check_adapter_name, near_matches
from .nn.lora_linear import LoraLinear
from .tuners.config import LoraConfig
from .tuners.lora import inject_adapter
from .tuners.modules_to_save import ModulesToSaveWrapper

CONFIG_NAME = "adapter_config.json"
WEIGHTS_NAME = "adapter_model.safetensors"
PEFT_VERSION = "0.21.2"
"""The version of PEFT whose layout is written, noted in the config as its own save does."""

_PREFIX = "base_model.model."
_EMBEDDING_NAMES = ("embed_tokens", "lm_head")
_SHOWN = 4

# Fields of PEFT 0.21's LoraConfig for what this package does not do, as PEFT writes them unused.
_UNUSED_FIELDS: Mapping[str, Any] = {
    "alora_invocation_tokens": None,
    "arrow_config": None,
    "corda_config": None,
    "ensure_weight_tying": False,
    "eva_config": None,
    "kasa_config": None,
    "layer_replication": None,
    "loftq_config": {},
    "lora_bias": False,
    "lora_ga_config": None,
    "megatron_config": None,
    "megatron_core": "megatron.core",
    "monteclora_config": None,
    "qalora_group_size": 16,
    "target_parameters": None,
    "trainable_token_indices": None,
    "use_bdlora": None,
    "use_dora": False,
    "use_qalora": False,
    "velora_config": None,
}

# Fields that decide what a given pair of lora_A, lora_B computes.
_FIELDS_OF_SCALING = ("r", "lora_alpha", "use_rslora", "rank_pattern", "alpha_pattern")


def save_adapter(
    model: nn.Module, path: str | os.PathLike[str], adapter_name: str = "default"
) -> None:
    """Write an adapter so that :func:`load_adapter` and PEFT's ``from_pretrained`` read it.

    Args:
        model: with the adapter, as ``get_peft_model`` or :func:`load_adapter` left it; it may be
            compiled.
        path: directory, made if need be. An adapter not named "default" goes to ``path/<name>``.
        adapter_name: which adapter.

    Raises:
        ValueError: the model has no such adapter, or base weights belong in the file while an
            adapter is merged into them.
        AdapterError: ``path`` is a file, or a tensor has NaN or infinity, or is on the meta device.
        OSError: a file cannot be written, for one because the disk is full. As for every error,
            the files that were there before are whole.
    """
    model = _unwrap(model)
    config = _config_of(model, adapter_name)
    directory = Path(path) if adapter_name == "default" else Path(path) / adapter_name
    if Path(adapter_name).name != adapter_name:
        raise ValueError(f"adapter_name is {adapter_name!r}; expected one that can name a folder")
    for place in (Path(path), directory):
        if place.exists() and not place.is_dir():
            raise AdapterError(f"{place} is a file; expected a directory, or nothing yet")
    tensors = _tensors_to_write(model, config, adapter_name)
    document = json.dumps(_config_document(model, config), indent=2, sort_keys=True)

    def write_config(file: Path) -> None:
        file.write_text(document, encoding="utf-8")

    def write_weights(file: Path) -> None:
        try:
            save_file(tensors, file, metadata={"format": "pt"})
        except SafetensorError as error:
            raise OSError(f"cannot write {directory / WEIGHTS_NAME}: {error}") from error
        # safetensors makes files that only their owner can read; the umask is the user's choice.
        file.chmod((file.parent / CONFIG_NAME).stat().st_mode)

    replace_files(directory, {CONFIG_NAME: write_config, WEIGHTS_NAME: write_weights})


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

    Args:
        model: the base model, or one with adapters; it may be compiled.
        path: the directory that holds the two files. For an adapter saved under a name that is
            ``<path of save_adapter>/<name>``.
        adapter_name: its name in the model; it need not be the one it was saved under.
        is_trainable: whether its parameters require grad afterwards. If not, the model is put in
            eval mode too, so that dropout is off, as PEFT does.

    Returns:
        ``model``.

    Raises:
        AdapterError: a file is missing, damaged, or no safetensors or JSON; the config is not one
            of a LoRA adapter that can be computed here; a tensor is missing, unexpected, or of the
            wrong shape or kind of dtype, or has NaN or infinity.
        ValueError: ``adapter_name`` is merged into the weights now.
    """
    base = _unwrap(model)
    check_adapter_name(adapter_name)
    directory = Path(path)
    if not directory.is_dir():
        what = "is a file" if directory.exists() else "does not exist"
        raise AdapterError(f"{directory} {what}; expected the directory of an adapter")
    with reading(directory):
        saved = _read_config(directory, is_trainable)
        is_new = adapter_name not in _adapter_names(base)
        if is_new:
            target = _outline_with(base, saved, adapter_name)
        else:
            _check_replaceable(base, saved, adapter_name)
            target = base
        values = _read_checked(saved, target, adapter_name)
    if is_new:
        _put_in(base, saved, saved.config, adapter_name)
    _assign(base, adapter_name, values, is_trainable)
    if not is_trainable:
        base.eval()
    return model


@dataclasses.dataclass(frozen=True)
class _Saved:
    """An adapter's directory and its config, as the file has it and as it is used."""

    directory: Path
    document: Mapping[str, Any]
    config: LoraConfig

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


# ---- what the files hold


def _named_state(model: nn.Module, adapter_name: str) -> dict[str, Tensor]:
    """Every tensor of the model under the name that PEFT would give it, other adapters left out."""
    layers = {path for path, module in _modules(model) if isinstance(module, LoraLinear)}
    wrappers = _wrappers(model)
    state: dict[str, Tensor] = {}
    for key, tensor in model.state_dict(keep_vars=True).items():
        owner, _, leaf = _plain(key).rpartition(".")
        module, _, container = owner.rpartition(".")
        name = f"{owner}.{leaf}" if owner else leaf
        if owner in layers:
            name = f"{owner}.base_layer.{leaf}".removeprefix(".")
        elif module in layers and container in ("lora_A", "lora_B"):
            if leaf != adapter_name:
                continue
            name = f"{module}.{container}.weight".removeprefix(".")
        elif (copy_of := _adapter_of_copy(_PREFIX + name, wrappers)) is not None:
            if copy_of != adapter_name:
                continue
            # PEFT takes the name out where it is the last but one part, and only there.
            name = re.sub(rf"\.{re.escape(adapter_name)}(\.[^.]*)$", r"\1", name)
        state[_PREFIX + name] = tensor
    return state


def _wrappers(model: nn.Module) -> list[str]:
    return [path for path, m in _modules(model) if isinstance(m, ModulesToSaveWrapper)]


def _adapter_of_copy(key: str, wrappers: Iterable[str]) -> str | None:
    """What follows ``modules_to_save.`` in the key, where it lies in one of those wrappers."""
    for path in wrappers:
        inside = key.removeprefix(f"{_PREFIX}{path}.modules_to_save.")
        if inside != key:
            return inside.partition(".")[0]
    return None


def _own_tensors(model: nn.Module, adapter_name: str) -> dict[str, Tensor]:
    """File key -> the live tensor, for all that the adapter's file has to have."""
    config = _config_of(model, adapter_name)
    state = _named_state(model, adapter_name)
    own: dict[str, Tensor] = {}
    for path, module in _modules(model):
        prefix = f"{_PREFIX}{path}." if path else _PREFIX
        if isinstance(module, LoraLinear):
            wanted = ["lora_A.weight", "lora_B.weight"] if adapter_name in module.r else []
            # As in PEFT, the biases of all adapted layers, whichever adapter is on them.
            wanted += ["base_layer.bias"] if config.bias == "lora_only" else []
            own.update({prefix + k: state[prefix + k] for k in wanted if prefix + k in state})
        elif isinstance(module, ModulesToSaveWrapper) and adapter_name in module.modules_to_save:
            copied = module.modules_to_save[adapter_name].state_dict(keep_vars=True)
            own.update({prefix + _plain(k): tensor for k, tensor in copied.items()})
    if config.bias == "all":
        own.update({k: v for k, v in state.items() if k.rpartition(".")[2] == "bias"})
    return own


def _embedding_tensors(
    model: nn.Module, adapter_name: str, *, adapted_only: bool = False
) -> dict[str, Tensor]:
    """File key -> the live tensor, for the base weights of input and output embeddings."""
    prefixes = []
    for getter in ("get_input_embeddings", "get_output_embeddings"):
        layer = None
        with contextlib.suppress(NotImplementedError):  # so say models without such a layer
            layer = getattr(model, getter, lambda: None)()
        adapted = isinstance(layer, LoraLinear)
        path = next((p for p, module in _modules(model) if module is layer), None)
        if path is not None and (adapted or not adapted_only):
            prefixes.append(f"{_PREFIX}{path}." + ("base_layer." if adapted else ""))
    state = _named_state(model, adapter_name)
    return {k: v for k, v in state.items() if k.startswith(tuple(prefixes))} if prefixes else {}


def _embeddings_to_write(
    model: nn.Module, config: LoraConfig, adapter_name: str
) -> dict[str, Tensor]:
    """PEFT's ``save_embedding_layers="auto"``: adapted ones, or all of a resized vocabulary."""
    targets = config.target_modules
    if isinstance(targets, str):
        ends = {path for path, _ in _modules(model) if path.rpartition(".")[2] in _EMBEDDING_NAMES}
        adapted = any(re.fullmatch(targets, path) for path in ends)
    else:
        adapted = not set(_EMBEDDING_NAMES).isdisjoint(targets or ())
    if adapted or _vocabulary_was_resized(model, _base_name(model, config)):
        return _embedding_tensors(model, adapter_name, adapted_only=adapted)
    return {}


def _vocabulary_was_resized(model: nn.Module, base_name: str | None) -> bool:
    """Whether the base model's own config, on this machine, has another vocabulary size."""
    size = getattr(getattr(model, "config", None), "vocab_size", None)
    if not size or not base_name:
        return False
    file: Any = Path(base_name) / "config.json"
    if not file.is_file():
        with contextlib.suppress(ImportError, ValueError):
            from huggingface_hub import try_to_load_from_cache

            file = try_to_load_from_cache(base_name, "config.json")
    try:
        original = json.loads(Path(file).read_text(encoding="utf-8")).get("vocab_size", size)
    except (TypeError, OSError, ValueError, AttributeError):  # not there, or not such a config
        return False
    return bool(original != size)


def _tensors_to_write(model: nn.Module, config: LoraConfig, adapter_name: str) -> dict[str, Tensor]:
    own = _own_tensors(model, adapter_name)
    embeddings = _embeddings_to_write(model, config, adapter_name)
    _refuse_merged(model, embeddings)
    tensors: dict[str, Tensor] = {}
    memory: set[int] = set()
    for key, tensor in {**own, **embeddings}.items():
        if tensor.is_meta:
            raise AdapterError(f"{key} is on the meta device, without values; nothing is written")
        if not _is_finite(tensor):
            raise AdapterError(f"{key} has NaN or infinity; nothing is written")
        value = tensor.detach().contiguous()
        # The format has no two names for one memory, as tied embeddings have.
        storage = value.untyped_storage().data_ptr()
        tensors[key] = value.clone() if storage in memory else value
        memory.add(storage)
    return tensors


def _refuse_merged(model: nn.Module, keys: Iterable[str]) -> None:
    """Raise ValueError where a key is a base weight that adapters are merged into."""
    merged = {
        f"{_PREFIX}{path}.base_layer.weight": module.merged_adapters
        for path, module in _modules(model)
        if isinstance(module, LoraLinear) and module.merged
    }
    for key in keys:
        if key in merged:
            raise ValueError(
                f"the file has the base weight {key}, and adapters {merged[key]} are merged into "
                "that weight now; unmerge them first"
            )


def _config_document(model: nn.Module, config: LoraConfig) -> dict[str, Any]:
    document = {
        **_UNUSED_FIELDS,
        **config.to_dict(),
        "base_model_name_or_path": _base_name(model, config),
        "inference_mode": True,
        "peft_version": PEFT_VERSION,
    }
    if config.task_type is None:
        document["auto_mapping"] = {
            "base_model_class": type(model).__name__,
            "parent_library": type(model).__module__,
        }
    return document


# ---- reading, with every check before the model is touched


def _read_config(directory: Path, is_trainable: bool) -> _Saved:
    file = locate(directory, CONFIG_NAME)
    if not file.is_file():
        below = sorted(p.parent.name for p in directory.glob(f"*/{CONFIG_NAME}"))
        hint = f"; there are adapters in its folders {_shortened(below)}" if below else ""
        raise AdapterError(f"{directory} has no {CONFIG_NAME}{hint}")
    try:
        document = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:  # json's and UTF-8's errors both are
        raise AdapterError(f"{file} is no JSON, or is cut off: {error}") from error
    try:
        config = LoraConfig.from_dict(document)
    except AdapterError as error:
        raise AdapterError(f"{file}: {error}") from error
    return _Saved(directory, document, dataclasses.replace(config, inference_mode=not is_trainable))


def _weights_file(directory: Path) -> Path:
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


def _check_replaceable(model: nn.Module, saved: _Saved, adapter_name: str) -> None:
    merged = [p for p, m in _modules(model) if _has_merged(m, adapter_name)]
    if merged:
        raise ValueError(
            f"adapter {adapter_name!r} is merged into {_shortened(merged)}; unmerge it first"
        )
    config = _config_of(model, adapter_name)
    for field in _FIELDS_OF_SCALING:
        here, there = getattr(config, field), getattr(saved.config, field)
        if here != there:
            raise AdapterError(
                f"{field} is {there!r} in {saved.directory / CONFIG_NAME} and {here!r} in the "
                f"model's adapter {adapter_name!r}; load it under another name, or delete the "
                "model's first"
            )


def _has_merged(module: nn.Module, adapter_name: str) -> bool:
    return isinstance(module, LoraLinear) and adapter_name in module.merged_adapters


def _outline_with(model: nn.Module, saved: _Saved, adapter_name: str) -> nn.Module:
    """What the model will be with the adapter in, without values: its names, shapes and dtypes."""
    for key, tensor in model.state_dict().items():
        if tensor.is_meta:
            raise ValueError(f"{key} of the model is on the meta device; give it values first")
    outline = _outline(model, {})
    with warnings.catch_warnings():
        # Those come when the adapter is put in for real. What a layer starts with is no matter,
        # and some ways need the weight's values.
        warnings.simplefilter("ignore")
        config = dataclasses.replace(saved.config, init_lora_weights=True)
        _put_in(outline, saved, config, adapter_name)
    return outline


def _put_in(model: nn.Module, saved: _Saved, config: LoraConfig, adapter_name: str) -> None:
    try:
        inject_adapter(model, config, adapter_name, strict=False)
    except (TypeError, ValueError) as error:
        raise saved.misfit(model, error) from error


def _outline(module: nn.Module, made: dict[int, nn.Module | Tensor]) -> nn.Module:
    """The module tree again with meta tensors; nothing done to it changes the original.

    Not by deepcopy: a module may carry what cannot be copied, and tensors of any size.
    """
    known = made.get(id(module))
    if isinstance(known, nn.Module):
        return known
    twin = made[id(module)] = module.__class__.__new__(module.__class__)
    for name, value in vars(module).items():
        vars(twin)[name] = copy.copy(value) if isinstance(value, (dict, list, set)) else value
    kinds: tuple[dict[str, Any], ...] = (twin._parameters, twin._buffers)
    for tensors in kinds:
        for name, tensor in tensors.items():
            tensors[name] = None if tensor is None else _outline_tensor(tensor, made)
    for name, child in twin._modules.items():
        twin._modules[name] = None if child is None else _outline(child, made)
    return twin


def _outline_tensor(tensor: Tensor, made: dict[int, nn.Module | Tensor]) -> Tensor:
    known = made.get(id(tensor))
    if isinstance(known, Tensor):
        return known
    twin = torch.empty(tensor.shape, dtype=tensor.dtype, device="meta")
    if isinstance(tensor, nn.Parameter):
        twin = nn.Parameter(twin, requires_grad=tensor.requires_grad)
    made[id(tensor)] = twin
    return twin


def _read_checked(saved: _Saved, model: nn.Module, adapter_name: str) -> dict[str, Tensor]:
    """The file's tensors in the model's dtypes, after every check of them against ``model``."""
    file = _weights_file(saved.directory)
    # With bias="all" PEFT writes the biases of modules_to_save a second time, under a name that
    # nothing reads.
    wrappers = _wrappers(model)
    required = {
        k: v
        for k, v in _own_tensors(model, adapter_name).items()
        if _adapter_of_copy(k, wrappers) is None
    }
    known = {**_embedding_tensors(model, adapter_name), **required}
    try:
        with safe_open(file, framework="pt", device="cpu") as opened:
            keys = [k for k in opened.keys() if _adapter_of_copy(k, wrappers) is None]  # noqa: SIM118
            _check_keys(saved, model, keys, required, known)
            _refuse_merged(model, keys)
            shapes = {k: tuple(opened.get_slice(k).get_shape()) for k in keys}
            _check_shapes(file, shapes, known)
            return {k: _checked_value(file, k, opened.get_tensor(k), known[k]) for k in keys}
    except (SafetensorError, OSError) as error:
        raise AdapterError(
            f"{file} is no safetensors file, is cut off or damaged: {error}"
        ) from error


def _check_keys(
    saved: _Saved,
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
            f"it has none of the tensors needed; has {_shortened(unexpected)}, "
            f"expected {_shortened(missing)}",
        )
    found = [("missing", missing), ("unexpected", unexpected)]
    raise saved.misfit(model, "; ".join(f"{what} {_shortened(k)}" for what, k in found if k))


def _check_shapes(
    file: Path, shapes: Mapping[str, tuple[int, ...]], known: Mapping[str, Tensor]
) -> None:
    wrong = []
    for key, shape in shapes.items():
        expected = tuple(known[key].shape)
        if shape != expected:
            wrong.append(
                f"{key} {list(shape)}, expected {list(expected)}{_rank_note(key, shape, expected)}"
            )
    if wrong:
        raise AdapterError(f"{file} has tensors of the wrong shape: {_shortened(wrong)}")


def _rank_note(key: str, shape: tuple[int, ...], expected: tuple[int, ...]) -> str:
    for suffix, rank, other in ((".lora_A.weight", 0, 1), (".lora_B.weight", 1, 0)):
        if key.endswith(suffix) and len(shape) == 2 and shape[other] == expected[other]:
            return f" (rank {shape[rank]}, not {expected[rank]})"
    return ""


def _checked_value(file: Path, key: str, value: Tensor, destination: Tensor) -> Tensor:
    if value.dtype != destination.dtype and not (
        value.is_floating_point() and destination.is_floating_point()
    ):
        raise AdapterError(f"{key} in {file} is {value.dtype}, expected {destination.dtype}")
    if not _is_finite(value):
        raise AdapterError(f"{key} in {file} has NaN or infinity")
    cast = value.to(destination.dtype)
    if not _is_finite(cast):
        raise AdapterError(f"{key} in {file} has values too large for {destination.dtype}")
    return cast


def _assign(
    model: nn.Module, adapter_name: str, values: Mapping[str, Tensor], is_trainable: bool
) -> None:
    own = _own_tensors(model, adapter_name)
    destinations = {**_embedding_tensors(model, adapter_name), **own}
    with torch.no_grad():
        for key, value in values.items():
            destinations[key].copy_(value)
    for key, tensor in own.items():
        if isinstance(tensor, nn.Parameter) and ".original_module." not in key:
            tensor.requires_grad_(is_trainable)


# ---- small things


def _modules(model: nn.Module) -> list[tuple[str, nn.Module]]:
    return [(_plain(path), module) for path, module in model.named_modules()]


def _plain(name: str) -> str:
    """The name without what torch.compile puts into it."""
    return ".".join(part for part in name.split(".") if part != "_orig_mod")


def _unwrap(model: nn.Module) -> nn.Module:
    if not isinstance(model, nn.Module):
        raise TypeError(f"model is a {type(model).__name__}; expected a torch.nn.Module")
    inner = getattr(model, "_orig_mod", model)
    return inner if isinstance(inner, nn.Module) else model


def _adapter_names(model: nn.Module) -> set[str]:
    return {name for _, m in _modules(model) if isinstance(m, LoraLinear) for name in m.r}


def _config_of(model: nn.Module, adapter_name: str) -> LoraConfig:
    """The config an adapter was put in with; read off the layers of a model that was built so."""
    configs: dict[str, LoraConfig] = getattr(model, "fused_peft_config", {})
    if adapter_name in configs:
        return configs[adapter_name]
    layers = {
        path: module
        for path, module in _modules(model)
        if isinstance(module, LoraLinear) and adapter_name in module.r
    }
    if not layers:
        known = sorted(_adapter_names(model))
        raise ValueError(
            f"adapter_name is {adapter_name!r}; the model has the adapters {known}"
            f"{near_matches(str(adapter_name), known)}"
        )
    if "" in layers:
        raise ValueError("model is a LoraLinear; expected a module that has it under a name")
    common: dict[str, Any] = {}
    for field in ("lora_dropout", "use_rslora", "init_lora_weights"):
        found = {getattr(layer, field)[adapter_name] for layer in layers.values()}
        if len(found) > 1:
            raise ValueError(f"{field} is {found} over the layers; a file can only have one")
        common[field] = found.pop()
    ranks = {path: layer.r[adapter_name] for path, layer in layers.items()}
    alphas = {path: layer.lora_alpha[adapter_name] for path, layer in layers.items()}
    r, alpha = next(iter(ranks.values())), next(iter(alphas.values()))
    return LoraConfig(
        r=r,
        lora_alpha=alpha,
        rank_pattern={f"^{re.escape(path)}": v for path, v in ranks.items() if v != r},
        alpha_pattern={f"^{re.escape(path)}": v for path, v in alphas.items() if v != alpha},
        # An expression is matched whole; a name would also match where another ends with it.
        target_modules="|".join(re.escape(path) for path in layers),
        fan_in_fan_out=any(layer.fan_in_fan_out for layer in layers.values()),
        **common,
    )


def _base_name(model: nn.Module, config: LoraConfig) -> str | None:
    return config.base_model_name_or_path or vars(model).get("name_or_path") or None


def _is_finite(tensor: Tensor) -> bool:
    if not tensor.is_floating_point() and not tensor.is_complex():
        return True
    # float8 has no isfinite of its own
    wide = tensor if tensor.element_size() > 1 else tensor.float()
    return bool(torch.isfinite(wide).all())


def _shortened(entries: Sequence[str]) -> str:
    rest = len(entries) - _SHOWN
    return ", ".join(entries[:_SHOWN]) + (f" and {rest} more" if rest > 0 else "")
