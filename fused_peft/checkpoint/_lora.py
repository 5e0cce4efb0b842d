"""What the files of a LoRA adapter hold, and how a model takes it."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import re
import warnings
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from ..errors import AdapterError
from ..nn.adapter_spec import near_matches
from ..nn.lora_layer import LoraLayer
from ..tuners.config import LoraConfig
from ..tuners.lora import inject_adapter
from ..tuners.modules_to_save import ModulesToSaveWrapper
from ..tuners.prompt_inject import prompt_adapters
from ._files import (
    Saved,
    base_name,
    config_document,
    read_tensors,
    shortened,
    weights_file,
    writable,
)
from ._modules import adapter_names, embedding_paths, modules, outline, plain, refuse_meta
from ._sharded import assign
from ._side_files import Contents

_PREFIX = "base_model.model."
_EMBEDDING_NAMES = ("embed_tokens", "lm_head")

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


def contents(model: nn.Module, adapter_name: str) -> Contents:
    """What to write.

    Raises:
        ValueError: the model has no such adapter, or base weights belong in the file while an
            adapter is merged into them.
        AdapterError: a tensor has NaN or infinity, or no values.
    """
    config = config_of(model, adapter_name)
    own = _own_tensors(model, adapter_name)
    embeddings = _embeddings_to_write(model, config, adapter_name)
    _refuse_merged(model, embeddings)
    tensors = writable({**own, **embeddings})
    return Contents(config_document(model, config.to_dict(), _UNUSED_FIELDS), tensors)


def prepare(
    model: nn.Module, saved: Saved, adapter_name: str, *, is_new: bool, is_trainable: bool
) -> Callable[[], None]:
    """Read and check everything; the function that is returned then changes the model.

    Raises:
        AdapterError, ValueError: as :func:`fused_peft.load_adapter`.
    """
    try:
        config = LoraConfig.from_dict(saved.document)
    except AdapterError as error:
        raise AdapterError(f"{saved.config_file}: {error}") from error
    config = dataclasses.replace(config, inference_mode=not is_trainable)
    if is_new:
        target = _outline_with(model, saved, config, adapter_name)
    else:
        _check_replaceable(model, saved, config, adapter_name)
        target = model
    values = _read_checked(saved, target, adapter_name)

    def apply() -> None:
        if is_new:
            _put_in(model, saved, config, adapter_name)
        _assign(model, adapter_name, values, is_trainable)

    return apply


# ---- what the files hold


def _named_state(model: nn.Module, adapter_name: str) -> dict[str, Tensor]:
    """Every tensor of the model under the name that PEFT would give it, other adapters left out."""
    layers = {path for path, module in modules(model) if isinstance(module, LoraLayer)}
    wrappers = _wrappers(model)
    state: dict[str, Tensor] = {}
    for key, tensor in model.state_dict(keep_vars=True).items():
        owner, _, leaf = plain(key).rpartition(".")
        if owner.partition(".")[0] == "prompt_adapters" and prompt_adapters(model) is not None:
            continue
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
    return [path for path, m in modules(model) if isinstance(m, ModulesToSaveWrapper)]


def _adapter_of_copy(key: str, wrappers: Iterable[str]) -> str | None:
    """What follows ``modules_to_save.`` in the key, where it lies in one of those wrappers."""
    for path in wrappers:
        inside = key.removeprefix(f"{_PREFIX}{path}.modules_to_save.")
        if inside != key:
            return inside.partition(".")[0]
    return None


def _own_tensors(model: nn.Module, adapter_name: str) -> dict[str, Tensor]:
    """File key -> the live tensor, for all that the adapter's file has to have."""
    config = config_of(model, adapter_name)
    state = _named_state(model, adapter_name)
    own: dict[str, Tensor] = {}
    for path, module in modules(model):
        prefix = f"{_PREFIX}{path}." if path else _PREFIX
        if isinstance(module, LoraLayer):
            wanted = ["lora_A.weight", "lora_B.weight"] if adapter_name in module.r else []
            # As in PEFT, the biases of all adapted layers, whichever adapter is on them.
            wanted += ["base_layer.bias"] if config.bias == "lora_only" else []
            own.update({prefix + k: state[prefix + k] for k in wanted if prefix + k in state})
        elif isinstance(module, ModulesToSaveWrapper) and adapter_name in module.modules_to_save:
            copied = module.modules_to_save[adapter_name].state_dict(keep_vars=True)
            own.update({prefix + plain(k): tensor for k, tensor in copied.items()})
    if config.bias == "all":
        own.update({k: v for k, v in state.items() if k.rpartition(".")[2] == "bias"})
    return own


def _embedding_tensors(
    model: nn.Module, adapter_name: str, *, adapted_only: bool = False
) -> dict[str, Tensor]:
    """File key -> the live tensor, for the base weights of input and output embeddings."""
    prefixes = []
    for path, layer in embedding_paths(model):
        adapted = isinstance(layer, LoraLayer)
        if adapted or not adapted_only:
            prefixes.append(f"{_PREFIX}{path}." + ("base_layer." if adapted else ""))
    state = _named_state(model, adapter_name)
    return {k: v for k, v in state.items() if k.startswith(tuple(prefixes))} if prefixes else {}


def _embeddings_to_write(
    model: nn.Module, config: LoraConfig, adapter_name: str
) -> dict[str, Tensor]:
    """PEFT's ``save_embedding_layers="auto"``: adapted ones, or all of a resized vocabulary."""
    targets = config.target_modules
    if isinstance(targets, str):
        ends = {path for path, _ in modules(model) if path.rpartition(".")[2] in _EMBEDDING_NAMES}
        adapted = any(re.fullmatch(targets, path) for path in ends)
    else:
        adapted = not set(_EMBEDDING_NAMES).isdisjoint(targets or ())
    if adapted or vocabulary_was_resized(model, base_name(model, config.base_model_name_or_path)):
        return _embedding_tensors(model, adapter_name, adapted_only=adapted)
    return {}


def vocabulary_was_resized(model: nn.Module, name: str | None) -> bool:
    """Whether the base model's own config, on this machine, has another vocabulary size."""
    size = getattr(getattr(model, "config", None), "vocab_size", None)
    if not size or not name:
        return False
    file: Any = Path(name) / "config.json"
    if not file.is_file():
        with contextlib.suppress(ImportError, ValueError):
            from huggingface_hub import try_to_load_from_cache

            file = try_to_load_from_cache(name, "config.json")
    try:
        original = json.loads(Path(file).read_text(encoding="utf-8")).get("vocab_size", size)
    except (TypeError, OSError, ValueError, AttributeError):  # not there, or not such a config
        return False
    return bool(original != size)


def _refuse_merged(model: nn.Module, keys: Iterable[str]) -> None:
    """Raise ValueError where a key is a base weight that adapters are merged into."""
    merged = {
        f"{_PREFIX}{path}.base_layer.weight": module.merged_adapters
        for path, module in modules(model)
        if isinstance(module, LoraLayer) and module.merged
    }
    for key in keys:
        if key in merged:
            raise ValueError(
                f"the file has the base weight {key}, and adapters {merged[key]} are merged into "
                "that weight now; unmerge them first"
            )


# ---- reading


def _outline_with(
    model: nn.Module, saved: Saved, config: LoraConfig, adapter_name: str
) -> nn.Module:
    """What the model will be with the adapter in, without values: its names, shapes and dtypes."""
    refuse_meta(model)
    twin = outline(model)
    with warnings.catch_warnings():
        # Those come when the adapter is put in for real. What a layer starts with is no matter,
        # and some ways need the weight's values.
        warnings.simplefilter("ignore")
        config = dataclasses.replace(config, init_lora_weights=True)
        _put_in(twin, saved, config, adapter_name)
    return twin


def _read_checked(saved: Saved, model: nn.Module, adapter_name: str) -> dict[str, Tensor]:
    """The file's tensors in the model's dtypes, after every check of them against ``model``."""
    # With bias="all" PEFT writes the biases of modules_to_save a second time, under a name that
    # nothing reads.
    wrappers = _wrappers(model)

    def is_second_name(key: str) -> bool:
        return _adapter_of_copy(key, wrappers) is not None

    own = _own_tensors(model, adapter_name)
    required = {k: v for k, v in own.items() if not is_second_name(k)}
    return read_tensors(
        saved,
        weights_file(saved.directory),
        model,
        required=required,
        known={**_embedding_tensors(model, adapter_name), **required},
        ignored=is_second_name,
        also=lambda keys: _refuse_merged(model, keys),
    )


def _check_replaceable(
    model: nn.Module, saved: Saved, config: LoraConfig, adapter_name: str
) -> None:
    merged = [p for p, m in modules(model) if _has_merged(m, adapter_name)]
    if merged:
        raise ValueError(
            f"adapter {adapter_name!r} is merged into {shortened(merged)}; unmerge it first"
        )
    current = config_of(model, adapter_name)
    for field in _FIELDS_OF_SCALING:
        here, there = getattr(current, field), getattr(config, field)
        if here != there:
            raise AdapterError(
                f"{field} is {there!r} in {saved.config_file} and {here!r} in the "
                f"model's adapter {adapter_name!r}; load it under another name, or delete the "
                "model's first"
            )


def _has_merged(module: nn.Module, adapter_name: str) -> bool:
    return isinstance(module, LoraLayer) and adapter_name in module.merged_adapters


def _put_in(model: nn.Module, saved: Saved, config: LoraConfig, adapter_name: str) -> None:
    try:
        inject_adapter(model, config, adapter_name, strict=False)
    except (TypeError, ValueError) as error:
        raise saved.misfit(model, error) from error


def _assign(
    model: nn.Module, adapter_name: str, values: Mapping[str, Tensor], is_trainable: bool
) -> None:
    own = _own_tensors(model, adapter_name)
    destinations = {**_embedding_tensors(model, adapter_name), **own}
    for key, value in values.items():
        assign(destinations[key], value)
    for key, tensor in own.items():
        if isinstance(tensor, nn.Parameter) and ".original_module." not in key:
            tensor.requires_grad_(is_trainable)


# ---- the adapters of a model


def config_of(model: nn.Module, adapter_name: str) -> LoraConfig:
    """The config an adapter was put in with; read off the layers of a model that was built so."""
    config = getattr(model, "fused_peft_config", {}).get(adapter_name)
    if isinstance(config, LoraConfig):
        return config
    layers = {
        path: module
        for path, module in modules(model)
        if isinstance(module, LoraLayer) and adapter_name in module.r
    }
    if not layers:
        known = adapter_names(model)
        raise ValueError(
            f"adapter_name is {adapter_name!r}; the model has the adapters {known}"
            f"{near_matches(str(adapter_name), known)}"
        )
    if "" in layers:
        raise ValueError("model is a LoRA layer; expected a module that has it under a name")
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
