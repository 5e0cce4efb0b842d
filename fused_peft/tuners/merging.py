"""LoRA adapters into the weights of a model's layers, and out again."""

from __future__ import annotations

import warnings
from collections.abc import Sequence

from torch import nn

from ..nn.lora_layer import LoraLayer
from .lora import check_known, modules_of, require_layers
from .places import Sharing, refuse_wrapped
from .prompt_inject import prompt_names


def merge_adapter(
    model: nn.Module, safe: bool = False, adapter_names: Sequence[str] | None = None
) -> None:
    """Add adapters to the base weights in place; see :meth:`fused_peft.nn.LoraLayer.merge`.

    Args:
        model: with adapters.
        safe: check first that every new weight is finite.
        adapter_names: None means the active ones.

    Raises:
        ValueError: there is no adapter; a name is unknown or that of a prefix or prompt, which
            belongs to no weight; a weight is shared with another module, which would change along,
            or sharded by FSDP, or offloaded; or ``safe`` and a result is not finite.
        TypeError: a layer's weight is quantised. Nothing is changed.
    """
    _refuse_prompts(model, adapter_names)
    layers = require_layers(model)
    if isinstance(adapter_names, str):
        raise TypeError(f"adapter_names is {adapter_names!r}; expected a list of names")
    if adapter_names is not None:
        check_known(model, adapter_names)
    refuse_wrapped(model, "merging", replicated=False)
    sharing = Sharing(model)
    todo = []
    for path, layer in layers:
        wanted = layer.active_adapters if adapter_names is None else list(adapter_names)
        names = [n for n in wanted if n in layer.r and n not in layer.merged_adapters]
        if names:
            _check_mergeable(path, layer)
            sharing.refuse(path, layer, "merging")
            todo.append((path, layer, names))
    if not todo:
        warnings.warn("all adapters are merged already, nothing to do", stacklevel=2)
    for path, layer, names in todo if safe else []:
        try:
            layer.check_merge(names)
        except ValueError as error:
            raise ValueError(f"{path!r}: {error}") from error
    for _, layer, names in todo:
        layer.merge(adapter_names=names)


def unmerge_adapter(model: nn.Module) -> None:
    """Take all merged adapters out of the base weights again, up to rounding.

    Raises:
        ValueError: the model has no adapter.
    """
    merged = [layer for _, layer in require_layers(model) if layer.merged]
    if not merged:
        warnings.warn("no adapter is merged, nothing to do", stacklevel=2)
    for layer in merged:
        layer.unmerge()


def _check_mergeable(path: str, layer: LoraLayer) -> None:
    try:
        layer.check_mergeable()
    except (TypeError, ValueError) as error:
        raise type(error)(f"{path!r}: {error}") from None


def _refuse_prompts(model: nn.Module, adapter_names: Sequence[str] | None) -> None:
    prompts = prompt_names(model)
    merged = prompts if adapter_names is None else [n for n in adapter_names if n in prompts]
    has_lora = any(layer.r for _, layer in modules_of(model, LoraLayer))
    if merged and (adapter_names is not None or not has_lora):
        raise ValueError(
            f"adapter {merged[0]!r} is a prefix or prompt, which no weight can take in; expected "
            "LoRA adapters to merge"
        )
