"""Keeps ``model.prompt_adapters``, for prefixes and prompts alike."""

from __future__ import annotations

import dataclasses
from typing import Any

from torch import nn

from ..nn.prefix_encoder import PrefixEncoder
from ..nn.prompt_adapters import PromptAdapters
from ..nn.prompt_embedding import PromptEmbedding
from . import prefix, prompt
from .prompt_config import (
    PrefixTuningConfig,
    PromptLearningConfig,
    PromptTuningConfig,
    PTuningConfig,
)
from .prompt_init import load_tokenizer


def prompt_adapters(model: nn.Module) -> PromptAdapters | None:
    """The model's prompt adapters, or None where it has none."""
    found = model._modules.get("prompt_adapters")
    return found if isinstance(found, PromptAdapters) else None


def prompt_names(model: nn.Module) -> list[str]:
    """Names of the model's prefixes and prompts."""
    adapters = prompt_adapters(model)
    return [] if adapters is None else list(adapters.adapters)


def new_prompt(model: nn.Module, config: PromptLearningConfig, tokenizer: Any = None) -> nn.Module:
    """The module of a new adapter; the model is left as it was.

    Args:
        model: a transformers model.
        config: as :func:`fused_peft.tuners.resolve_prompt_config` gives it.
        tokenizer: for a start from text; None loads the one that the config names.

    Raises:
        TypeError, ValueError: the model cannot get such an adapter, or its start fails.
    """
    if hasattr(model, "prompt_adapters") and prompt_adapters(model) is None:
        raise ValueError(
            f"model {type(model).__name__} has an attribute prompt_adapters of its own; expected "
            "the name to be free"
        )
    if isinstance(config, (PromptTuningConfig, PTuningConfig)):
        return prompt.new_prompt_adapter(model, config, tokenizer)
    if not isinstance(config, PrefixTuningConfig):
        raise TypeError(
            f"config is a {type(config).__name__}; expected a PrefixTuningConfig, "
            "PromptTuningConfig or PTuningConfig"
        )
    if config.prefix_init != "text":
        return prefix.new_prefix_encoder(model, config)
    if config.inference_mode:
        plain = dataclasses.replace(config, prefix_init="random", prefix_init_text=None)
        encoder = prefix.new_prefix_encoder(model, plain)
        encoder.config = config
        return encoder
    if tokenizer is None:
        tokenizer = load_tokenizer(config.tokenizer_name_or_path, "prefix_init='text'")
    return prefix.new_prefix_encoder(model, config, tokenizer)


def put_prompt(model: nn.Module, name: str, adapter: nn.Module) -> None:
    """Hook the model, once for each kind, and take the adapter in, not active."""
    adapters = prompt_adapters(model)
    if adapters is None:
        adapters = PromptAdapters()
        adapters.train(model.training)
    if isinstance(adapter, PrefixEncoder):
        prefix.install(model, adapters)
    else:
        prompt.install(model, adapters)
    adapter.train(model.training)
    adapters.add(name, adapter)
    model.prompt_adapters = adapters


def set_prompt(model: nn.Module, name: str | None, *, inference_mode: bool = False) -> None:
    """Make a prefix or prompt the active one, or none; nothing where the model has none."""
    adapters = prompt_adapters(model)
    if adapters is not None:
        adapters.set_adapter(name, inference_mode=inference_mode)


def delete_prompt(model: nn.Module, name: str) -> bool:
    """Drop a prefix or prompt, and the hooks of the last of its kind; whether it was trainable."""
    adapters = prompt_adapters(model)
    assert adapters is not None
    trainable = any(p.requires_grad for p in adapters.adapters[name].parameters())
    adapters.delete(name)
    left = list(adapters.adapters.values())
    if not any(isinstance(adapter, PrefixEncoder) for adapter in left):
        prefix.uninstall(model)
    if not any(isinstance(adapter, PromptEmbedding) for adapter in left):
        prompt.uninstall(model)
    if not left:
        del model.prompt_adapters
    return trainable
