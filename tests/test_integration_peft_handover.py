"""LoRA layers of a fused PEFT model that run PEFT's own forward, and the reason that is given."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

pytest.importorskip("peft")

import peft
from peft.helpers import disable_input_dtype_casting
from peft_models import (
    K,
    N,
    adapted,
    config,
    fill,
    in_dtypes,
    inputs,
    layer,
    recorded_calls,
    results,
    two_adapters,
)

from fused_peft import explain, ops
from fused_peft.integrations.peft import fuse, unfuse

Calls = list[dict[str, Any]]


@pytest.fixture
def op_calls(monkeypatch: pytest.MonkeyPatch) -> Calls:
    return recorded_calls(monkeypatch, "lora_linear")


class AddsOne:
    """A variant of LoRA, of which PEFT has a dozen."""

    @staticmethod
    def forward(module: Any, active_adapter: str, x: Tensor, result: Tensor, **_: Any) -> Tensor:
        return result + 1.0


class DoubledLinear(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return 2.0 * super().forward(x)


def merged(model: peft.PeftModel) -> None:
    model.merge_adapter()


def disabled(model: peft.PeftModel) -> None:
    model.base_model.disable_adapter_layers()


def none_active(model: peft.PeftModel) -> None:
    layer(model)._active_adapter = []


def unknown_active(model: peft.PeftModel) -> None:
    layer(model)._active_adapter = ["elsewhere"]


def variant(model: peft.PeftModel) -> None:
    layer(model).lora_variant["default"] = AddsOne()


def own_forward(model: peft.PeftModel) -> None:
    base = layer(model).base_layer
    base.forward = lambda x: nn.Linear.forward(base, x) + 1.0


def other_base(model: peft.PeftModel) -> None:
    layer(model).base_layer.__class__ = DoubledLinear


def base_hook(model: peft.PeftModel) -> None:
    layer(model).base_layer.register_forward_hook(lambda module, args, y: y + 1.0)


def factor_hook(model: peft.PeftModel) -> None:
    layer(model).lora_A["default"].register_forward_pre_hook(lambda module, args: (args[0] * 2,))


def dropout_hook(model: peft.PeftModel) -> None:
    layer(model).lora_dropout["default"].register_forward_hook(lambda module, args, y: y * 3.0)


def backward_hook(model: peft.PeftModel) -> None:
    layer(model).lora_B["default"].register_full_backward_hook(lambda module, dx, dy: (dx[0] * 2,))


def parametrized(model: peft.PeftModel) -> None:
    parametrize.register_parametrization(layer(model).lora_B["default"], "weight", nn.Tanh())


def trained_base(model: peft.PeftModel) -> None:
    layer(model).base_layer.weight.requires_grad_()


def other_dropout(model: peft.PeftModel) -> None:
    layer(model).lora_dropout["default"] = nn.Tanh()


def all_dropped(model: peft.PeftModel) -> None:
    layer(model).lora_dropout["default"] = nn.Dropout(1.0)


def half_adapter(model: peft.PeftModel) -> None:
    layer(model).lora_A["default"].bfloat16()
    layer(model).lora_B["default"].bfloat16()


def wide(model: peft.PeftModel) -> None:
    model.add_adapter("wide", config(r=ops.MAX_RANK))
    model.base_model.set_adapter(["default", "wide"])
    fill(model)


HANDED_OVER: dict[str, tuple[Callable[[peft.PeftModel], None], str]] = {
    "merged": (merged, "merged into the weight"),
    "disabled": (disabled, "disabled"),
    "none active": (none_active, "no adapter is active"),
    "another layer's adapter": (unknown_active, "no adapter is active"),
    "variant": (variant, "variant of LoRA .AddsOne"),
    "base with a forward of its own": (own_forward, "the base layer has a forward of its own"),
    "base of another class": (other_base, "the base layer is a DoubledLinear"),
    "hook on the base": (base_hook, "the base layer has a hook"),
    "hook on lora_A": (factor_hook, "lora_A of adapter 'default' has a hook"),
    "hook on the dropout": (dropout_hook, "lora_dropout of adapter 'default' has a hook"),
    "backward hook on lora_B": (backward_hook, "lora_B of adapter 'default' has a hook"),
    "parametrized lora_B": (parametrized, "lora_B of adapter 'default' is a Parametrized"),
    "trained base": (trained_base, "weight is trained"),
    "dropout of another class": (other_dropout, "lora_dropout of adapter 'default' is a Tanh"),
    "everything dropped": (all_dropped, "is Dropout"),
    "bfloat16 adapter over float32": (half_adapter, "lora_a is torch.bfloat16"),
    "ranks above the kernels'": (wide, f"the ranks add up to {ops.MAX_RANK + 8}"),
}


@pytest.mark.parametrize("case", HANDED_OVER)
def test_handed_to_peft(case: str, op_calls: Calls) -> None:
    change, reason = HANDED_OVER[case]
    model = fuse(adapted())
    change(model)
    x = inputs()
    assert "PEFT: its own forward, because " in explain(layer(model), x)
    assert_explained(model, x, reason)
    fused = results(model, x)
    assert not op_calls
    unfused = results(unfuse(model), x)
    assert fused.keys() == unfused.keys()
    for name, value in unfused.items():
        assert torch.equal(fused[name], value), name
    same = torch.allclose(fused["y"], adapted()(x), rtol=1e-5, atol=1e-5)
    assert same is (case in ("merged", "trained base", "backward hook on lora_B"))


def assert_explained(model: peft.PeftModel, x: Tensor, reason: str) -> None:
    text = explain(layer(model), x)
    assert re.search(reason, text), text


def test_dora_is_handed_to_peft(op_calls: Calls) -> None:
    model = two_adapters(adapted(), use_dora=True)
    assert type(layer(fuse(model))).__name__ == "FusedLinear"
    x = inputs()
    assert_explained(model, x, "adapter 'second' is a variant of LoRA .DoraLinearVariant")
    fused = results(model, x)
    assert not op_calls
    model.set_adapter("default")
    model(x)
    assert len(op_calls) == 1  # the other adapter is plain
    model.base_model.set_adapter(["default", "second"])
    for name, value in results(unfuse(model), x).items():
        assert torch.equal(fused[name], value), name


def test_mixed_batches_are_handed_to_peft(op_calls: Calls) -> None:
    model = adapted().eval()
    model.add_adapter("second", config(r=4))
    fill(model)
    names = ["default", "second", "__base__", "default"]
    x = inputs(4)
    expected = model(x, adapter_names=names)
    assert torch.equal(fuse(model)(x, adapter_names=names), expected)
    assert not op_calls
    assert not torch.allclose(expected, model(x), atol=1e-3)
    with pytest.raises(ValueError, match="adapter_names"):
        model(x, adapter_names=names[:3])


def test_hooks_for_all_modules_run(op_calls: Calls) -> None:
    model = fuse(adapted())
    seen = []
    hook = nn.modules.module.register_module_forward_hook(lambda module, x, y: seen.append(module))
    try:
        model(inputs())
    finally:
        hook.remove()
    part = layer(model)
    for module in (part, part.base_layer, part.lora_A["default"], part.lora_B["default"]):
        assert any(module is other for other in seen)
    assert not op_calls
    model(inputs())
    assert op_calls


def test_hooks_on_the_layer_run(op_calls: Calls) -> None:
    model = adapted()
    part = layer(model)
    part.register_forward_pre_hook(lambda module, args: (args[0] * 2.0,))
    part.register_forward_hook(lambda module, args, y: y - 1.0)
    x = inputs()
    expected = model(x)
    torch.testing.assert_close(fuse(model)(x), expected, rtol=1e-5, atol=1e-5)
    assert op_calls


def test_function_transforms_are_peft_s(op_calls: Calls) -> None:
    model = fuse(adapted())
    x = inputs(3)
    jacobian = torch.func.vmap(torch.func.jacrev(lambda row: model(row)))(x)
    part = layer(model)
    a, b = part.lora_A["default"].weight, part.lora_B["default"].weight
    expected = (part.base_layer.weight + 1.5 * b @ a).expand(3, N, K)
    torch.testing.assert_close(jacobian, expected, rtol=1e-4, atol=1e-5)
    assert not op_calls


def test_what_peft_refuses_is_refused_alike() -> None:
    plain, model = adapted(), fuse(adapted())
    for x in (
        torch.randn(3, K + 1),
        torch.randn(3, K, dtype=torch.bfloat16),
        torch.randn(3, K).int(),
    ):
        with pytest.raises(RuntimeError) as theirs:
            plain(x)
        with pytest.raises(RuntimeError) as ours:
            model(x)
        assert str(ours.value) == str(theirs.value)


def test_input_that_is_not_cast(op_calls: Calls) -> None:
    model = fuse(in_dtypes(adapted(), torch.bfloat16, torch.float32))
    x = inputs(8, torch.bfloat16)
    model(x)
    assert len(op_calls) == 1
    with disable_input_dtype_casting(model), pytest.raises(RuntimeError, match="dtype"):
        model(x)  # as PEFT: float32 adapters get bfloat16 input
    assert len(op_calls) == 1
