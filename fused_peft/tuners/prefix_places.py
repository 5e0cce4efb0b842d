"""Finds the modules of a transformers model that a prefix concerns."""

from __future__ import annotations

import inspect
import re
from typing import Any, NamedTuple

from torch import nn

_CROSS = re.compile(r"cross_?att|encoder_attn|encdecattention", re.IGNORECASE)
_POSITION_TABLES = ("wpe", "position_embeddings", "embed_positions")


class PrefixPlaces(NamedTuple):
    """Modules of a model that have to do with its prefix, with their paths.

    Attributes:
        attention: the self-attention of each layer.
        positions: rotary embeddings and tables of positions.
        stack: the model, or its decoder or language model where it has more.
    """

    attention: list[tuple[str, nn.Module]]
    positions: list[tuple[str, nn.Module]]
    stack: nn.Module


def find_places(model: nn.Module) -> PrefixPlaces:
    """Where a prefix goes in.

    Raises:
        TypeError: it is no transformers model.
        ValueError: its attention does not go through transformers' AttentionInterface in every
            layer, or it has no positions that can be shifted.
    """
    kind = type(model).__name__
    config = getattr(model, "config", None)
    if not hasattr(model, "set_attn_implementation") or not hasattr(config, "get_text_config"):
        raise TypeError(
            f"model is a {kind}; prefix tuning expected a transformers model with "
            "set_attn_implementation"
        )
    assert config is not None
    stack: Any = model
    if config.is_encoder_decoder or config.get_text_config() is not config:
        stack = model.get_decoder()  # type: ignore[operator]
    found: dict[int, tuple[str, nn.Module]] = {}
    positions: list[tuple[str, nn.Module]] = []
    for path, module in stack.named_modules():
        name = path.rpartition(".")[2]
        if "RotaryEmbedding" in type(module).__name__ or (
            name in _POSITION_TABLES and isinstance(module, nn.Embedding)
        ):
            positions.append((path, module))
        layer = getattr(module, "layer_idx", None)
        if not isinstance(layer, int) or not _uses_interface(module) or _is_cross(path, module):
            continue
        if layer in found:
            raise ValueError(
                f"model {kind} cannot get a prefix: {found[layer][0]!r} and {path!r} both are the "
                f"self-attention of layer {layer}"
            )
        found[layer] = (path, module)
    if not found or not type(model)._can_set_attn_implementation():  # type: ignore[attr-defined]
        raise ValueError(
            f"model {kind} cannot get a prefix: its attention does not go through transformers' "
            "AttentionInterface, so it cannot be replaced"
        )
    missing = [layer for layer in range(max(found) + 1) if layer not in found]
    if missing:
        raise ValueError(
            f"model {kind} cannot get a prefix: layers {missing} have no self-attention that can "
            "be replaced"
        )
    places = PrefixPlaces([found[layer] for layer in sorted(found)], positions, stack)
    if not positions and bias_module(places) is None:
        raise ValueError(
            f"model {kind} cannot get a prefix: it has neither a rotary embedding nor a table of "
            f"positions ({', '.join(_POSITION_TABLES)}) nor a relative bias to shift"
        )
    return places


def _uses_interface(module: nn.Module) -> bool:
    code = getattr(inspect.unwrap(type(module).forward), "__code__", None)
    return code is not None and "ALL_ATTENTION_FUNCTIONS" in code.co_names


def _is_cross(path: str, module: nn.Module) -> bool:
    return bool(getattr(module, "is_cross_attention", False) or _CROSS.search(path))


def bias_module(places: PrefixPlaces) -> nn.Module | None:
    """The attention module that has the relative position bias of all layers (T5)."""
    holders = [m for _, m in places.attention if getattr(m, "has_relative_attention_bias", False)]
    return holders[0] if holders else None


def kv_heads(module: nn.Module) -> int:
    """Key/value heads of an attention module."""
    config: Any = module.config
    if getattr(config, "num_key_value_heads", None) is not None:
        return int(config.num_key_value_heads)
    for name in ("num_heads", "n_heads", "num_attention_heads"):
        if isinstance(getattr(module, name, None), int):
            return int(getattr(module, name))
    return int(config.num_attention_heads)


def head_dim(module: nn.Module) -> int:
    """Size of an attention module's heads."""
    for name in ("head_dim", "attention_head_size", "key_value_proj_dim"):
        if isinstance(getattr(module, name, None), int):
            return int(getattr(module, name))
    config: Any = module.config
    return int(config.hidden_size // config.num_attention_heads)


def model_configs(model: nn.Module) -> list[Any]:
    """The configs of the model and of the models within it, each once."""
    configs: dict[int, Any] = {}
    for module in model.modules():
        config = getattr(module, "config", None)
        if hasattr(config, "_attn_implementation_internal"):
            configs[id(config)] = config
    return list(configs.values())
