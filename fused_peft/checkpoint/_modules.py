"""Walking a model's modules, and a twin of it without values."""

from __future__ import annotations

import contextlib
import copy
from typing import Any

import torch
from torch import Tensor, nn

from ..nn.base_layer import is_offloaded
from ..nn.lora_layer import LoraLayer
from ..tuners.prompt_inject import prompt_names


def modules(model: nn.Module) -> list[tuple[str, nn.Module]]:
    """Every module and its path, without what torch.compile puts into paths."""
    return [(plain(path), module) for path, module in model.named_modules()]


def plain(name: str) -> str:
    """The name without what torch.compile puts into it."""
    return ".".join(part for part in name.split(".") if part != "_orig_mod")


def unwrap(model: nn.Module) -> nn.Module:
    """The module that torch.compile or DistributedDataParallel wrapped, or the model itself.

    Raises:
        TypeError: it is no module.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model is a {type(model).__name__}; expected a torch.nn.Module")
    while True:
        inner = getattr(model, "_orig_mod", model)
        if isinstance(model, nn.parallel.DistributedDataParallel):
            inner = model.module
        if inner is model or not isinstance(inner, nn.Module):
            return model
        model = inner


def adapter_names(model: nn.Module) -> list[str]:
    """Names of the model's adapters of every kind, sorted."""
    names = set(getattr(model, "fused_peft_config", {})) | set(prompt_names(model))
    for _, module in modules(model):
        if isinstance(module, LoraLayer):
            names |= set(module.r)
    return sorted(names)


def embedding_paths(model: nn.Module) -> list[tuple[str, nn.Module]]:
    """The input and the output embedding of a transformers model, as far as it has them."""
    found = []
    for getter in ("get_input_embeddings", "get_output_embeddings"):
        layer = None
        with contextlib.suppress(NotImplementedError):  # so say models without such a layer
            layer = getattr(model, getter, lambda: None)()
        found += [(path, module) for path, module in modules(model) if module is layer][:1]
    return found


def refuse_meta(model: nn.Module) -> None:
    """Raise ValueError where a tensor of the model has no values, and is not offloaded either."""
    offloaded = {path for path, module in model.named_modules() if is_offloaded(module)}
    for key, tensor in model.state_dict().items():
        if tensor.is_meta and key.rpartition(".")[0] not in offloaded:
            raise ValueError(f"{key} of the model is on the meta device; give it values first")


def outline(model: nn.Module) -> nn.Module:
    """The module tree again with meta tensors; nothing done to it changes the original.

    Not by deepcopy: a module may carry what cannot be copied, and tensors of any size.
    """
    return _outline(model, {})


def _outline(module: nn.Module, made: dict[int, nn.Module | Tensor]) -> nn.Module:
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
