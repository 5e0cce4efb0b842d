"""Puts the layers of a plan into a model, and refuses models that cannot take them."""

from __future__ import annotations

import sys
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from ..nn.adapter_spec import AdapterSpec
from ..nn.base_layer import has_own_forward, outline_weight
from ..nn.initializers import changes_base_weight, check_init_fits, init_pair
from ..nn.lora_layer import LoraLayer
from ..nn.lora_linear import LoraLinear
from ..nn.lora_wrapped import LoraWrappedLinear
from .places import Places, Sharing, put_module
from .targets import Plan


def refuse_peft(model: nn.Module) -> None:
    """Raise ValueError where Hugging Face PEFT has put adapters into the model already."""
    peft = sys.modules.get("peft")  # where it was never imported, no module can be its own
    if peft is None:
        return
    if isinstance(model, (peft.PeftModel, peft.PeftMixedModel)):
        raise ValueError(
            f"model is a {type(model).__name__} of Hugging Face PEFT, with adapters of its own; "
            "keep it and make it faster by fused_peft.integrations.peft.fuse(model), or take the "
            "base model: model.unload(), or merge_and_unload() to keep what it learned"
        )
    for path, module in model.named_modules():
        if isinstance(module, peft.tuners.tuners_utils.BaseTunerLayer):
            merged = "merged into its weight " if getattr(module, "merged", False) else ""
            raise ValueError(
                f"{path!r} is a layer of Hugging Face PEFT with adapters {merged}already; expected "
                "a model without: call the PEFT model's unload(), or merge_and_unload() to keep "
                "what they learned"
            )


def tell_trainer(model: nn.Module) -> None:
    """Let transformers' Trainer take a quantised model, which it does where it sees adapters."""
    if getattr(model, "is_quantized", False):
        model.__dict__["_hf_peft_config_loaded"] = True


def check_starts(model: nn.Module, name: str, plan: Plan) -> None:
    """What could go wrong at the start of one of the layers, before any is built.

    Raises:
        ValueError: an adapter cannot start as its config says; the message names the layer.
    """
    sharing = Sharing(model)
    for path, module in plan.layers.items():
        spec = plan.specs[path]
        try:
            if isinstance(module, LoraLayer):
                module.check_addable(name, spec)
            elif has_own_forward(module):
                LoraWrappedLinear.around(module).check_start(spec.init_lora_weights, spec.r)
            else:
                weight = module._parameters["weight"]
                assert weight is not None  # the plan has been checked
                check_init_fits(spec.init_lora_weights, spec.r, weight)
        except ValueError as error:
            raise ValueError(f"target module {path!r}: {error}") from error
        if changes_base_weight(spec.init_lora_weights):
            sharing.refuse(path, module, f"init_lora_weights={spec.init_lora_weights!r}")


def new_pairs(plan: Plan, autocast_dtype: bool) -> dict[str, tuple[Tensor, Tensor]]:
    """A fresh ``lora_a`` and ``lora_b`` for every layer of the plan, by its name."""
    return {path: _new_pair(m, plan.specs[path], autocast_dtype) for path, m in plan.layers.items()}


def _new_pair(module: nn.Module, spec: AdapterSpec, autocast_dtype: bool) -> tuple[Tensor, Tensor]:
    weight = module.base_weight() if isinstance(module, LoraLayer) else outline_weight(module)
    half = weight.dtype in (torch.float16, torch.bfloat16)
    dtype = torch.float32 if half and autocast_dtype else weight.dtype
    return init_pair(spec.init_lora_weights, spec.r, spec.scaling, weight, dtype)


def put_layers(
    plan: Plan, name: str, pairs: Mapping[str, tuple[Tensor, Tensor]], places: Places
) -> None:
    """Put a layer with adapter ``name`` in the place of every module of the plan."""
    for path, module in plan.layers.items():
        layer = _layer_for(module)
        layer.freeze_weight()
        layer.install(name, plan.specs[path], *pairs[path])
        put_module(places, module, layer)


def _layer_for(module: nn.Module) -> LoraLayer:
    if isinstance(module, LoraLayer):
        return module
    if has_own_forward(module):
        return LoraWrappedLinear.around(module)
    return LoraLinear.around(module)
