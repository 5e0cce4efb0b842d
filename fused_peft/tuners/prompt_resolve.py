"""Fills a prompt config's sizes in from a model, with PEFT's rules."""

from __future__ import annotations

import dataclasses
from typing import Any, TypeVar

from torch import Tensor, nn

from .prompt_config import PrefixTuningConfig, PromptLearningConfig
from .targets import task_heads

_ConfigT = TypeVar("_ConfigT", bound=PromptLearningConfig)

_NAMES = {
    "num_layers": ("num_hidden_layers", "num_layers", "n_layer"),
    "token_dim": ("hidden_size", "n_embd", "d_model"),
    "num_attention_heads": (
        "num_attention_heads",
        "n_head",
        "num_heads",
        "encoder_attention_heads",
    ),
}


def resolve_prompt_config(model: nn.Module, config: _ConfigT) -> _ConfigT:
    """A copy of ``config`` with the sizes of ``model`` and the task's head; changes neither.

    Args:
        model: a transformers model.
        config: of any prompt method.

    Raises:
        ValueError: the model has no config or no input embeddings, or a size that is given is not
            the model's.
    """
    found = _sizes(model, config)
    for name, size in found.items():
        given = getattr(config, name)
        if given is not None and given != size:
            raise ValueError(
                f"{name} is {given}; expected {size}, which {type(model).__name__} has"
            )
    submodules = config.num_transformer_submodules
    if submodules is None:
        submodules = 2 if config.task_type == "SEQ_2_SEQ_LM" else 1
    elif submodules == 2 and not is_encoder_decoder(model):
        raise ValueError(
            f"num_transformer_submodules is 2; expected 1, since {type(model).__name__} is no "
            "encoder-decoder model"
        )
    changes: dict[str, Any] = {**found, "num_transformer_submodules": submodules}
    if getattr(config, "encoder_hidden_size", 0) is None:
        changes["encoder_hidden_size"] = found["token_dim"]
    saved = [*(config.modules_to_save or []), *task_heads(config.task_type)]
    return dataclasses.replace(config, modules_to_save=saved or None, **changes)


def input_embeddings(model: nn.Module) -> nn.Module:
    """What makes vectors of token ids.

    Raises:
        ValueError: the model does not say, or it has no weight ``[vocabulary, dim]``.
    """
    get = getattr(model, "get_input_embeddings", None)
    try:
        embeddings = get() if callable(get) else None
    except NotImplementedError:
        embeddings = None
    weight = getattr(embeddings, "weight", None)
    if not isinstance(embeddings, nn.Module) or not isinstance(weight, Tensor) or weight.dim() != 2:
        raise ValueError(
            f"model {type(model).__name__} has no input embeddings for a prompt to join; expected "
            "a transformers model with get_input_embeddings()"
        )
    return embeddings


def is_encoder_decoder(model: nn.Module) -> bool:
    """Whether a transformers model has an encoder of its own before the decoder."""
    return bool(getattr(getattr(model, "config", None), "is_encoder_decoder", False))


def _sizes(model: nn.Module, config: PromptLearningConfig) -> dict[str, int]:
    model_config: Any = getattr(model, "config", None)
    if hasattr(model_config, "get_text_config"):
        model_config = model_config.get_text_config()
    found: dict[str, int] = {}
    for field, names in _NAMES.items():
        sizes = [getattr(model_config, name, None) for name in names]
        size = next((s for s in sizes if isinstance(s, int)), getattr(config, field))
        if size is None:
            raise ValueError(
                f"{field} is None and model {type(model).__name__} has no config that says it; "
                "expected it to be given"
            )
        found[field] = size
    if not isinstance(config, PrefixTuningConfig):
        # Not always the hidden size: OPT-350m's is half of it.
        weight = input_embeddings(model).weight
        assert isinstance(weight, Tensor)
        return {**found, "token_dim": weight.shape[1]}
    if isinstance(getattr(model_config, "d_kv", None), int):  # T5's heads need not fill the width
        return {**found, "token_dim": model_config.d_kv * found["num_attention_heads"]}
    heads = getattr(model_config, "num_key_value_heads", None)
    if heads is not None:
        dim = getattr(model_config, "head_dim", None)
        dim = dim or found["token_dim"] // found["num_attention_heads"]
        found |= {"token_dim": dim * heads, "num_attention_heads": heads}
    return found
