"""Mistakes that people make: each has a message that says what to do, before anything changes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from fused_peft import (
    AdapterError,
    LoraConfig,
    PrefixTuningConfig,
    add_adapter,
    check_optimizer,
    disable_adapter,
    explain,
    get_peft_model,
    load_adapter,
    merge_adapter,
    save_adapter,
    set_adapter,
    trainable_parameters,
    unmerge_adapter,
)

peft = pytest.importorskip("peft")

CONFIG = {"target_modules": ["0", "2"], "r": 2, "init_lora_weights": False}


def net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 4))


def adapted() -> nn.Sequential:
    return get_peft_model(net(), LoraConfig(**CONFIG))


def snapshot(model: nn.Module) -> dict[str, Any]:
    """Classes, values and what is trained."""
    classes = {name: type(module) for name, module in model.named_modules()}
    state = {name: tensor.tolist() for name, tensor in model.state_dict().items()}
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    return {"classes": classes, "state": state, "trained": trained}


def step(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    model(torch.randn(3, 8)).square().sum().backward()
    optimizer.step()


# ---- an optimizer of what is frozen


@pytest.mark.parametrize("kind", [torch.optim.AdamW, torch.optim.SGD])
def test_an_optimizer_made_before_the_adapter_does_not_pass_over_everything(kind: Any) -> None:
    model = net()
    optimizer = kind(model.parameters(), lr=0.1)
    get_peft_model(model, LoraConfig(**CONFIG))
    before = snapshot(model)
    with pytest.raises(
        ValueError, match=r"all 4 parameters of this (AdamW|SGD) are frozen: it was"
    ):
        step(model, optimizer)
    assert snapshot(model) == before


def test_an_optimizer_of_all_parameters_trains_the_adapter() -> None:
    model = adapted()
    before = model[0].lora_A["default"].clone()
    step(model, torch.optim.AdamW(model.parameters(), lr=0.1))
    assert not torch.equal(model[0].lora_A["default"], before)


def test_other_models_in_the_process_are_left_alone() -> None:
    adapted()
    other = net().requires_grad_(False)
    optimizer = torch.optim.SGD(other.parameters(), lr=0.1)
    optimizer.step()  # somebody's own choice
    thawed = net()
    optimizer = torch.optim.SGD(thawed.parameters(), lr=0.1)
    get_peft_model(thawed, LoraConfig(**CONFIG))
    thawed[0].weight.requires_grad_(True)  # trained besides the adapter, by choice
    thawed[0].weight.grad = torch.ones(8, 8)
    before = thawed[0].weight.clone()
    optimizer.step()
    assert not torch.equal(thawed[0].weight, before)


def test_check_optimizer_says_what_is_missing() -> None:
    model = net()
    early = torch.optim.AdamW(model.parameters())
    get_peft_model(model, LoraConfig(**CONFIG))
    with pytest.raises(ValueError, match=r"has 4 parameters and none of the 4 .*made before the"):
        check_optimizer(model, early)
    some = torch.optim.AdamW([model[0].lora_A["default"]])
    with pytest.raises(ValueError, match=r"lacks 3 of the 4 .*'0\.lora_B\.default'"):
        check_optimizer(model, some)
    check_optimizer(model, torch.optim.AdamW(model.parameters()))
    check_optimizer(model, torch.optim.AdamW(trainable_parameters(model)))
    with pytest.raises(TypeError, match="optimizer is a Sequential; expected a torch optimizer"):
        check_optimizer(model, model)  # type: ignore[arg-type]


def test_trainable_parameters() -> None:
    model = adapted()
    assert len(trainable_parameters(model)) == 4
    assert all(parameter.requires_grad for parameter in trainable_parameters(model))
    set_adapter(model, "default", inference_mode=True)
    with pytest.raises(ValueError, match=r"no parameter that requires a gradient.*is_trainable"):
        trainable_parameters(model)


# ---- a model that is merged, or adapted, already


def test_training_while_merged() -> None:
    model = adapted()
    optimizer = torch.optim.AdamW(trainable_parameters(model))
    merge_adapter(model)
    with pytest.raises(ValueError, match=r"\['default'\] are merged into the weight of '0'.*unm"):
        check_optimizer(model, optimizer)
    unmerge_adapter(model)
    check_optimizer(model, optimizer)


def test_an_adapter_on_a_merged_model() -> None:
    model = adapted()
    merge_adapter(model)
    before = snapshot(model)
    for name in ("default", "other"):
        with pytest.raises(
            ValueError, match=r"\['default'\] are merged into its weights, and a new"
        ):
            get_peft_model(model, LoraConfig(**CONFIG), name)
    assert snapshot(model) == before
    # A further one is put in, not in force: it comes into force as the merged one leaves.
    add_adapter(model, LoraConfig(**CONFIG), "other")
    assert model[0].merged_adapters == ["default"]
    with pytest.warns(UserWarning, match="were merged; they are unmerged"):
        set_adapter(model, "other")


def test_get_peft_model_twice() -> None:
    model = adapted()
    before = snapshot(model)
    with pytest.raises(ValueError, match="was get_peft_model called twice"):
        get_peft_model(model, LoraConfig(**CONFIG))
    with pytest.raises(ValueError, match="use add_adapter"):
        get_peft_model(model, LoraConfig(**CONFIG), "other")
    assert snapshot(model) == before


def test_a_model_of_peft() -> None:
    theirs = peft.get_peft_model(net(), peft.LoraConfig(**CONFIG))
    before = snapshot(theirs)
    config = LoraConfig(target_modules="all-linear")
    with pytest.raises(
        ValueError, match=r"PeftModel of Hugging Face PEFT.*integrations\.peft\.fuse"
    ):
        get_peft_model(theirs, config)
    base = theirs.get_base_model()
    with pytest.raises(ValueError, match=r"'0' is a layer of Hugging Face PEFT .*unload"):
        get_peft_model(base, config)
    theirs.merge_adapter()
    with pytest.raises(
        ValueError, match="'0' is a layer of Hugging Face PEFT with adapters merged"
    ):
        get_peft_model(base, config)
    theirs.unmerge_adapter()
    assert snapshot(theirs)["classes"] == before["classes"]
    get_peft_model(theirs.merge_and_unload(), config)


def test_peft_s_adapter_on_ours(tmp_path: Path) -> None:
    """Loading onto a model that PEFT has adapted is refused as well."""
    save_adapter(adapted(), tmp_path)
    theirs = peft.get_peft_model(net(), peft.LoraConfig(**CONFIG)).get_base_model()
    before = snapshot(theirs)
    with pytest.raises(ValueError, match="is a layer of Hugging Face PEFT"):
        load_adapter(theirs, tmp_path)
    assert snapshot(theirs) == before


# ---- nothing to adapt


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (None, "model is a NoneType; expected a torch.nn.Module"),
        ("gpt2", "model is a str; expected a torch.nn.Module"),
        (nn.Linear(4, 4), "model is itself a linear layer, a torch.nn.modules.linear.Linear"),
        (nn.Sequential(nn.ReLU()), "model is a Sequential without a linear layer"),
    ],
    ids=["None", "a name", "one layer", "no layer"],
)
def test_nothing_to_adapt(model: Any, message: str) -> None:
    with pytest.raises((TypeError, ValueError), match=message):
        get_peft_model(model, LoraConfig(target_modules="all-linear"))


def test_no_config() -> None:
    model = net()
    for config in (None, {}, peft.LoraConfig(**CONFIG)):
        with pytest.raises(TypeError, match="expected a LoraConfig, PrefixTuningConfig"):
            get_peft_model(model, config)
    with pytest.raises((TypeError, ValueError), match="Sequential"):
        get_peft_model(model, PrefixTuningConfig(num_virtual_tokens=3))
    with pytest.raises(ValueError, match="Sequential has no adapter"), disable_adapter(model):
        pass


# ---- devices and dtypes


def test_x_elsewhere_than_the_weight() -> None:
    model = adapted()
    with pytest.raises(ValueError, match="weight is on cpu; expected meta, where x is"):
        model(torch.randn(3, 8, device="meta"))
    model[0].lora_A.to("meta")
    with pytest.raises(ValueError, match="lora_a is on meta; expected cpu, where x is"):
        model(torch.randn(3, 8))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_x_of_another_dtype_than_the_weight(dtype: torch.dtype) -> None:
    model = adapted()
    with pytest.raises(ValueError, match=f"x is {dtype} and weight is torch.float32; expected"):
        model(torch.randn(3, 8).to(dtype))
    if dtype != torch.float64:
        with torch.autocast("cpu", dtype):  # as the message says: one dtype for both
            assert model(torch.randn(3, 8)).dtype == dtype


@pytest.mark.parametrize("pair", [(torch.bfloat16, torch.float16), (torch.float32, torch.bfloat16)])
def test_adapters_of_another_half_dtype_compute_and_explain_tells(
    pair: tuple[torch.dtype, torch.dtype],
) -> None:
    weight, adapter = pair
    model = adapted().to(weight)
    truth = adapted().double()
    for layer, exact in ((model[0], truth[0]), (model[2], truth[2])):
        for mine, other in ((layer.lora_A, exact.lora_A), (layer.lora_B, exact.lora_B)):
            mine["default"].data = other["default"].to(adapter)
    x = torch.randn(3, 8)
    y: Tensor = model(x.to(weight))
    assert y.dtype == weight
    torch.testing.assert_close(y.double(), truth(x.double()), rtol=3e-2, atol=3e-2)
    told = explain(model[0], x.to(weight))
    assert told.startswith("torch: ")
    assert f"lora_a is {adapter}; kernels take x's dtype or float32" in told


# ---- files that are no adapter for here


def saved(path: Path, tensors: dict[str, Tensor] | None = None, **fields: Any) -> Path:
    """An adapter's folder with tensors and fields of its config replaced."""
    save_adapter(adapted(), path)
    config, weights = path / "adapter_config.json", path / "adapter_model.safetensors"
    config.write_text(json.dumps({**json.loads(config.read_text()), **fields}))
    save_file({**load_file(weights), **(tensors or {})}, weights)
    return path


A = "base_model.model.0.lora_A.weight"


@pytest.mark.parametrize(
    "tensors",
    [
        {A: torch.zeros(8, 1, dtype=torch.uint8)},
        {A: torch.zeros(2, 8, dtype=torch.int8)},
        {A: torch.zeros(8, 1, dtype=torch.uint8), f"{A}.absmax": torch.zeros(1)},
        {"base_model.model.0.base_layer.weight": torch.zeros(32, 1, dtype=torch.uint8)},
    ],
    ids=["packed", "8-bit", "with bitsandbytes' state", "packed base weight"],
)
def test_a_quantised_adapter(tensors: dict[str, Tensor], tmp_path: Path) -> None:
    model = net()
    before = snapshot(model)
    with pytest.raises(AdapterError, match=r"of (U8|I8), quantised values; expected F32.*QLoRA"):
        load_adapter(model, saved(tmp_path, tensors))
    assert snapshot(model) == before


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"peft_type": "IA3"}, "peft_type is 'IA3'; expected 'LORA'"),
        ({"peft_type": "VERA"}, "peft_type is 'VERA'; expected 'LORA'"),
        ({"peft_type": None}, "peft_type is None"),
        ({"use_qalora": True}, "use_qalora = True; this is not supported"),
        ({"use_dora": True}, "use_dora = True; this is not supported"),
        ({"init_lora_weights": "loftq"}, "init_lora_weights is 'loftq'"),
    ],
    ids=lambda value: str(value) if isinstance(value, dict) else "",
)
def test_an_adapter_of_another_kind(fields: dict[str, Any], message: str, tmp_path: Path) -> None:
    model = net()
    before = snapshot(model)
    with pytest.raises(AdapterError, match=message):
        load_adapter(model, saved(tmp_path, **fields))
    assert snapshot(model) == before
