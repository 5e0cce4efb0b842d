"""Puts adapters into an existing model, and drives them there: LoRA, and the prompt methods."""

from __future__ import annotations

import contextlib
import copy
import warnings
from collections.abc import Iterator, Sequence
from typing import Any, TypeVar

from torch import nn

from ..nn.adapter_spec import check_adapter_name, near_matches
from ..nn.lora_layer import LoraLayer
from .config import LoraConfig
from .inject import check_starts, new_pairs, put_layers, refuse_peft, tell_trainer
from .modules_to_save import ModulesToSaveWrapper
from .places import (
    find_places,
    original_module,
    refuse_wrapped,
    save_modules,
)
from .prompt_config import PromptLearningConfig
from .prompt_inject import (
    delete_prompt,
    new_prompt,
    prompt_adapters,
    prompt_names,
    put_prompt,
    set_prompt,
)
from .prompt_resolve import resolve_prompt_config
from .targets import Plan, make_plan, own_modules, saved_modules, task_heads
from .trainable import freeze

_ModelT = TypeVar("_ModelT", bound=nn.Module)


def get_peft_model(
    model: _ModelT,
    config: LoraConfig | PromptLearningConfig,
    adapter_name: str = "default",
    *,
    autocast_adapter_dtype: bool = True,
    tokenizer: Any = None,
) -> _ModelT:
    """Put a first adapter into ``model``, in place; everything else in it is frozen.

    For LoRA every module that ``config`` names becomes a LoraLinear over the same weight Parameter,
    so tied weights stay tied; a prefix or prompt is kept in ``model.prompt_adapters``. The config
    as it turned out is kept in ``model.fused_peft_config``.

    Args:
        model: any module with linear layers; a transformers model for a prompt method.
        config: what to adapt and how.
        adapter_name: the new adapter's name; it is active.
        autocast_adapter_dtype: LoRA adapters of a float16 or bfloat16 layer are float32. Prompts
            are float32 in any case.
        tokenizer: for a prompt that starts from text, in place of tokenizer_name_or_path.

    Returns:
        The same ``model``.

    Raises:
        TypeError, ValueError: what the config names is not there or is no linear layer, or the
            model has an adapter already. The model is left as it was.
    """
    if isinstance(model, nn.Module):
        _refuse_adapted(model, adapter_name)
    inject_adapter(
        model,
        config,
        adapter_name,
        autocast_adapter_dtype=autocast_adapter_dtype,
        tokenizer=tokenizer,
    )
    return model


def add_adapter(
    model: nn.Module,
    config: LoraConfig | PromptLearningConfig,
    adapter_name: str,
    *,
    autocast_adapter_dtype: bool = True,
    tokenizer: Any = None,
) -> None:
    """Put a further adapter in, neither active nor trainable until :func:`set_adapter` names it.

    Raises:
        TypeError, ValueError: as :func:`get_peft_model`; or a second adapter that trains biases,
            which all adapters share. The model is left as it was.
    """
    inject_adapter(
        model,
        config,
        adapter_name,
        autocast_adapter_dtype=autocast_adapter_dtype,
        tokenizer=tokenizer,
    )


def inject_adapter(
    model: nn.Module,
    config: LoraConfig | PromptLearningConfig,
    adapter_name: str,
    *,
    autocast_adapter_dtype: bool = True,
    strict: bool = True,
    tokenizer: Any = None,
) -> None:
    """What ``get_peft_model`` and ``add_adapter`` do; a first adapter becomes active.

    Args:
        model: any module with linear layers.
        config: what to adapt and how.
        adapter_name: the new adapter's name.
        autocast_adapter_dtype: adapters of a float16 or bfloat16 layer are float32.
        strict: every entry of target_modules and modules_to_save has to match a module. Adapters
            that PEFT wrote need not be so, since it only asks that one entry does.
        tokenizer: for a prompt that starts from text; not asked for where the config's
            inference_mode is True, nor is a text then.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model is a {type(model).__name__}; expected a torch.nn.Module")
    if not isinstance(config, (LoraConfig, PromptLearningConfig)):
        raise TypeError(
            f"config is a {type(config).__name__}; expected a LoraConfig, PrefixTuningConfig, "
            "PromptTuningConfig or PTuningConfig"
        )
    refuse_wrapped(model, "adding an adapter")
    refuse_peft(model)
    existing = _adapter_names(model)
    if check_adapter_name(adapter_name) in existing:
        raise ValueError(f"adapter_name is {adapter_name!r}; the model has {existing} already")
    if isinstance(config, PromptLearningConfig):
        _inject_prompt(model, config, adapter_name, tokenizer, strict, first=not existing)
        return
    with_bias = [name for name, other in _lora_configs(model).items() if other.bias != "none"]
    if config.bias != "none" and with_bias:
        raise ValueError(
            f"bias is {config.bias!r} and adapter {with_bias[0]!r} trains biases already; "
            "expected 'none' for all adapters of a model but one"
        )
    plan = make_plan(model, config, strict=strict)
    check_starts(model, adapter_name, plan)
    _apply(model, adapter_name, plan, autocast_adapter_dtype, first=not existing)


def _inject_prompt(
    model: nn.Module,
    config: PromptLearningConfig,
    name: str,
    tokenizer: Any,
    strict: bool,
    *,
    first: bool,
) -> None:
    # All that can fail comes before the first change to the model.
    resolved = resolve_prompt_config(model, config)
    heads = task_heads(config.task_type)
    saved = saved_modules(model, resolved.modules_to_save or [], heads, strict=strict)
    adapter = new_prompt(model, resolved, tokenizer)
    copies = {path: copy.deepcopy(original_module(module)) for path, module in saved.items()}
    places = find_places(model)
    if first:
        freeze(model)
    put_prompt(model, name, adapter)
    tell_trainer(model)
    save_modules(name, saved, copies, places)
    model.__dict__["fused_peft_config"] = {**_configs(model), name: resolved}
    if first:
        set_adapter(model, name, inference_mode=resolved.inference_mode)


def set_adapter(
    model: nn.Module, adapter_names: str | Sequence[str], *, inference_mode: bool = False
) -> None:
    """Make adapters the active ones, in this order, and only them trainable.

    Merged adapters are taken out of the weights first, with a warning.

    Args:
        model: with adapters.
        adapter_names: one name or several.
        inference_mode: do not make them trainable either.

    Raises:
        ValueError: a name is unknown or given twice, two of them have a copy of the same module
            (modules_to_save), or two are prefixes or prompts. Nothing is changed then.
    """
    names = [adapter_names] if isinstance(adapter_names, str) else list(adapter_names)
    check_known(model, names)
    if len(set(names)) != len(names):
        raise ValueError(f"adapter_names is {names!r}; expected each adapter once")
    prompts = [name for name in names if name in prompt_names(model)]
    if len(prompts) > 1:
        raise ValueError(
            f"adapter_names is {names!r}; {prompts} are prefixes or prompts, of which only one can "
            "be active"
        )
    wrappers = modules_of(model, ModulesToSaveWrapper)
    for path, wrapper in wrappers:
        rivals = [name for name in names if name in wrapper.modules_to_save]
        if len(rivals) > 1:
            raise ValueError(
                f"adapter_names is {names!r}; {rivals} each have a copy of {path!r} "
                "(modules_to_save), of which only one can be active"
            )
    for _, layer in modules_of(model, LoraLayer):
        layer.set_adapter([n for n in names if n in layer.r], inference_mode=inference_mode)
    for name, config in _lora_configs(model).items():
        if config.bias != "none":
            _train_biases(model, config.bias, name in names and not inference_mode)
    set_prompt(model, prompts[0] if prompts else None, inference_mode=inference_mode)
    for _, wrapper in wrappers:
        copied = next((name for name in names if name in wrapper.modules_to_save), None)
        wrapper.set_adapter(copied, inference_mode=inference_mode)


def active_adapters(model: nn.Module) -> list[str]:
    """Names of the adapters that are active in any layer of ``model``."""
    active: dict[str, None] = {}
    prompts = prompt_adapters(model)
    for _, layer in modules_of(model, LoraLayer):
        active.update(dict.fromkeys(layer.active_adapters))
    for _, wrapper in modules_of(model, ModulesToSaveWrapper):
        if wrapper.active_adapter is not None:
            active[wrapper.active_adapter] = None
    if prompts is not None and prompts.active is not None:
        active[prompts.active] = None
    return list(active)


def delete_adapter(model: nn.Module, adapter_name: str) -> None:
    """Remove an adapter. Where it was the last active one, the first left becomes active.

    Raises:
        ValueError: it is unknown, or merged. Nothing is changed then.
    """
    check_known(model, [adapter_name])
    layers = [(p, m) for p, m in modules_of(model, LoraLayer) if adapter_name in m.r]
    merged = [path for path, layer in layers if adapter_name in layer.merged_adapters]
    if merged:
        raise ValueError(f"adapter {adapter_name!r} is merged into {merged[0]!r}; unmerge first")
    was_active = active_adapters(model)
    still_active = [name for name in was_active if name != adapter_name]
    trainable = any(layer.lora_A[adapter_name].requires_grad for _, layer in layers)
    config = _configs(model).pop(adapter_name, None)
    if adapter_name in prompt_names(model):
        trainable = delete_prompt(model, adapter_name)
    if isinstance(config, LoraConfig) and config.bias != "none":
        _train_biases(model, config.bias, False)
    for _, layer in layers:
        alone = layer.active_adapters == [adapter_name]
        layer.delete_adapter(adapter_name)
        if alone and still_active:
            layer.set_adapter([])  # the layer's own choice would be one that is not active
    for _, wrapper in modules_of(model, ModulesToSaveWrapper):
        if adapter_name in wrapper.modules_to_save:
            wrapper.delete_adapter(adapter_name)
    left = _adapter_names(model)
    if left and was_active and not still_active:
        warnings.warn(f"adapter {adapter_name!r} was active; now {left[0]!r} is", stacklevel=2)
        set_adapter(model, left[0], inference_mode=not trainable)


@contextlib.contextmanager
def disable_adapter(model: nn.Module) -> Iterator[None]:
    """Within the context ``model`` computes without adapters and modules_to_save.

    Merged adapters leave the weights at the first forward. Trained biases stay.

    Raises:
        ValueError: the model has no adapter.
    """
    prompts = prompt_adapters(model)
    if prompts is None:
        require_layers(model)
    for name, config in _lora_configs(model).items():
        if config.bias != "none":
            warnings.warn(
                f"adapter {name!r} has bias={config.bias!r}: the biases it trained stay, so the "
                "output is not the base model's",
                stacklevel=3,
            )
    modules = [m for m in model.modules() if isinstance(m, (LoraLayer, ModulesToSaveWrapper))]
    before = [module.adapters_enabled for module in modules]
    for module in modules:
        module.enable_adapters(False)
    prompt_enabled = prompts is not None and prompts.enabled
    if prompts is not None:
        prompts.enabled = False
    try:
        yield
    finally:
        if prompts is not None:
            prompts.enabled = prompt_enabled
        for module, enabled in zip(modules, before, strict=True):
            module.enable_adapters(enabled)


def _refuse_adapted(model: nn.Module, adapter_name: str) -> None:
    """Raise ValueError where the model has adapters already."""
    existing = _adapter_names(model)
    merged = [name for _, layer in modules_of(model, LoraLayer) for name in layer.merged_adapters]
    if merged:
        raise ValueError(
            f"the model has adapters, of which {list(dict.fromkeys(merged))} are merged into its "
            "weights, and a new one would learn on top of them; take them out by "
            "unmerge_adapter(model), or save the merged model and start from that"
        )
    if existing and adapter_name not in existing:
        raise ValueError(
            f"the model has the adapters {existing} already; use add_adapter(model, config, "
            f"{adapter_name!r}) for a further one"
        )
    if existing:
        raise ValueError(
            f"adapter_name is {adapter_name!r}; the model has {existing} already: was "
            "get_peft_model called twice? Use add_adapter with another name for a further one, or "
            "delete_adapter before"
        )


_ModuleT = TypeVar("_ModuleT", bound=nn.Module)


def modules_of(model: nn.Module, cls: type[_ModuleT]) -> list[tuple[str, _ModuleT]]:
    """The model's modules of a class, each with its path."""
    return [(path, m) for path, m in model.named_modules() if isinstance(m, cls)]


def require_layers(model: nn.Module) -> list[tuple[str, LoraLayer]]:
    """The model's layers that LoRA can be on; ValueError where none has an adapter."""
    layers = modules_of(model, LoraLayer)
    if not any(layer.r for _, layer in layers):
        raise ValueError(f"model {type(model).__name__} has no adapter; expected one with adapters")
    return layers


def _configs(model: nn.Module) -> dict[str, LoraConfig | PromptLearningConfig]:
    configs: dict[str, LoraConfig | PromptLearningConfig]
    configs = getattr(model, "fused_peft_config", {})
    return configs


def _lora_configs(model: nn.Module) -> dict[str, LoraConfig]:
    return {name: c for name, c in _configs(model).items() if isinstance(c, LoraConfig)}


def _adapter_names(model: nn.Module) -> list[str]:
    names = dict.fromkeys(_configs(model))
    for _, layer in modules_of(model, LoraLayer):
        names.update(dict.fromkeys(layer.r))
    names.update(dict.fromkeys(prompt_names(model)))
    return list(names)


def check_known(model: nn.Module, names: Sequence[str]) -> None:
    """Raise ValueError where the model has no adapter of one of the names."""
    known = _adapter_names(model)
    for name in names:
        if name not in known:
            raise ValueError(
                f"adapter {name!r} is unknown; the model has {known}"
                f"{near_matches(str(name), known)}"
            )


def _train_biases(model: nn.Module, kind: str, trainable: bool) -> None:
    for module in [model, *(m for _, m in own_modules(model))]:
        adapted = isinstance(module, LoraLayer)
        bias = getattr(module, "bias", None) if adapted else module._parameters.get("bias")
        if bias is not None and (kind == "all" or adapted):
            bias.requires_grad_(trainable)


def _apply(model: nn.Module, name: str, plan: Plan, autocast_dtype: bool, *, first: bool) -> None:
    # All that can fail comes before the first change to the model.
    pairs = new_pairs(plan, autocast_dtype)
    copies = {p: copy.deepcopy(original_module(module)) for p, module in plan.saved.items()}
    places = find_places(model)
    if first:
        freeze(model)
    put_layers(plan, name, pairs, places)
    tell_trainer(model)
    save_modules(name, plan.saved, copies, places)
    model.__dict__["fused_peft_config"] = {**_configs(model), name: plan.config}
    if first:
        set_adapter(model, name, inference_mode=plan.config.inference_mode)
