"""Adapters on models that accelerate has dispatched: hooks, disk and CPU offloading."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from quantised import Int8Linear, quantised_llama
from test_generate_lora import base_model, prompts
from torch import Tensor, nn

from fused_peft import (
    LoraConfig,
    LoraLinear,
    LoraWrappedLinear,
    PrefixTuningConfig,
    PromptTuningConfig,
    add_adapter,
    explain,
    get_peft_model,
    load_adapter,
    merge_adapter,
    save_adapter,
    set_adapter,
    unmerge_adapter,
)

accelerate = pytest.importorskip("accelerate")

LORA = {"r": 4, "lora_alpha": 8, "target_modules": "all-linear", "init_lora_weights": False}
LAYERS = {"model.embed_tokens": "cpu", "model.rotary_emb": "cpu", "model.norm": "cpu"}


def all_hooked(model: Any, folder: Path) -> Any:
    """Every module hooked, its weights where they were."""
    device_map = {**LAYERS, "lm_head": "cpu", "model.layers.0": "cpu", "model.layers.1": "cpu"}
    return accelerate.dispatch_model(model, device_map, main_device="cpu", force_hooks=True)


def partly_on_disk(model: Any, folder: Path) -> Any:
    device_map = {**LAYERS, "lm_head": "cpu", "model.layers.0": "cpu", "model.layers.1": "disk"}
    return accelerate.dispatch_model(
        model, device_map, main_device="cpu", offload_dir=str(folder), force_hooks=True
    )


def all_offloaded(model: Any, folder: Path) -> Any:
    return accelerate.cpu_offload(model, execution_device=torch.device("cpu"))


DISPATCHES: dict[str, Callable[[Any, Path], Any]] = {
    "hooks": all_hooked,
    "disk": partly_on_disk,
    "cpu offload": all_offloaded,
}


def adapted(model: Any) -> Any:
    torch.manual_seed(1)
    return get_peft_model(model, LoraConfig(**LORA))


def logits(model: Any) -> Tensor:
    found: Tensor = model(prompts(False)["input_ids"]).logits
    return found


@pytest.mark.parametrize("name", DISPATCHES)
def test_an_adapter_on_a_dispatched_model(name: str, tmp_path: Path) -> None:
    plain = adapted(base_model("llama"))
    model = DISPATCHES[name](base_model("llama"), tmp_path)
    offloaded = {n for n, p in model.named_parameters() if p.is_meta}
    adapted(model)
    layer = model.model.layers[1].mlp.up_proj
    assert type(layer) is LoraLinear
    assert bool(offloaded) == (name != "hooks") == layer.weight.is_meta
    assert not layer.lora_A["default"].is_meta
    assert "_hf_hook" in vars(layer)
    assert torch.equal(logits(model), logits(plain))
    assert {n for n, p in model.named_parameters() if p.is_meta} == offloaded  # gone again


@pytest.mark.parametrize("name", DISPATCHES)
def test_gradients_through_a_dispatched_model(name: str, tmp_path: Path) -> None:
    plain = adapted(base_model("llama"))
    model = adapted(DISPATCHES[name](base_model("llama"), tmp_path))
    ids = prompts(False)["input_ids"]
    for net in (plain, model):
        net(input_ids=ids, labels=ids).loss.backward()
    truth = {n: p.grad for n, p in plain.named_parameters() if p.requires_grad}
    found = {n: p.grad for n, p in model.named_parameters() if p.requires_grad}
    assert found.keys() == truth.keys()
    assert all(torch.equal(found[n], truth[n]) for n in truth)


@pytest.mark.parametrize("name", DISPATCHES)
def test_generate_and_files(name: str, tmp_path: Path) -> None:
    plain = adapted(base_model("llama")).eval()
    save_adapter(plain, tmp_path / "adapter")
    model = DISPATCHES[name](base_model("llama"), tmp_path / "offloaded")
    load_adapter(model, tmp_path / "adapter")
    options = {"max_new_tokens": 6, "do_sample": False}
    found = model.generate(**prompts(True), **options)
    assert torch.equal(found, plain.generate(**prompts(True), **options))
    save_adapter(model, tmp_path / "again")
    weights = "adapter_model.safetensors"
    assert (tmp_path / "again" / weights).read_bytes() == (
        tmp_path / "adapter" / weights
    ).read_bytes()


def test_further_adapters_and_merging_where_the_weights_stay(tmp_path: Path) -> None:
    model = adapted(all_hooked(base_model("llama"), tmp_path)).eval()
    separate = logits(model)
    merge_adapter(model)
    torch.testing.assert_close(logits(model), separate, rtol=1e-4, atol=1e-4)
    unmerge_adapter(model)
    add_adapter(model, LoraConfig(**LORA), "other")
    set_adapter(model, "other")
    assert not torch.allclose(logits(model), separate, atol=1e-3)


@pytest.mark.parametrize("name", ["disk", "cpu offload"])
def test_merging_into_offloaded_weights_is_refused(name: str, tmp_path: Path) -> None:
    model = adapted(DISPATCHES[name](base_model("llama"), tmp_path)).eval()
    before = logits(model)
    with pytest.raises(ValueError, match=r"'model\.layers\..*': the weight is offloaded by acc"):
        merge_adapter(model)
    assert not any(m.merged for m in model.modules() if isinstance(m, LoraLinear))
    assert torch.equal(logits(model), before)
    with pytest.raises(ValueError, match="weight is on the meta device"):
        add_adapter(model, LoraConfig(**{**LORA, "init_lora_weights": "pissa"}), "other")
    model.model.layers[1].mlp.up_proj.add_adapter("by hand")
    assert not model.model.layers[1].mlp.up_proj.lora_A["by hand"].is_meta


def test_weights_without_values_are_still_refused(tmp_path: Path) -> None:
    save_adapter(adapted(base_model("llama")), tmp_path)
    with torch.device("meta"):
        model = base_model("llama")
    with pytest.raises(ValueError, match="of the model is on the meta device"):
        load_adapter(model, tmp_path)


@pytest.mark.parametrize("name", DISPATCHES)
def test_around_quantised_layers(name: str, tmp_path: Path) -> None:
    plain = adapted(quantised_llama(Int8Linear))
    model = adapted(DISPATCHES[name](quantised_llama(Int8Linear), tmp_path))
    layer = model.model.layers[1].mlp.up_proj
    assert type(layer) is LoraWrappedLinear
    assert "_hf_hook" in vars(layer.base_layer)
    assert not layer.lora_A["default"].is_meta
    assert torch.equal(logits(model), logits(plain))
    assert "update, kernel" in explain(layer, torch.randn(3, 64))


@pytest.mark.parametrize("config", [PrefixTuningConfig, PromptTuningConfig])
@pytest.mark.parametrize("name", DISPATCHES)
def test_prompt_methods(name: str, config: Any, tmp_path: Path) -> None:
    fields = {"num_virtual_tokens": 4, "task_type": "CAUSAL_LM"}
    models = []
    for model in (base_model("llama"), DISPATCHES[name](base_model("llama"), tmp_path)):
        torch.manual_seed(1)
        models.append(get_peft_model(model, config(**fields)))
    plain, dispatched = models
    assert torch.equal(logits(dispatched), logits(plain))
    assert all(not p.is_meta for p in dispatched.parameters() if p.requires_grad)


def test_from_pretrained_with_a_device_map(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    base_model("llama").save_pretrained(tmp_path / "base")
    plain = adapted(base_model("llama"))
    for device_map in ("auto", "cpu", {"": "cpu"}):
        model = transformers.AutoModelForCausalLM.from_pretrained(
            tmp_path / "base", device_map=device_map
        )
        assert torch.equal(logits(adapted(model.eval())), logits(plain))


def test_a_hook_that_only_sees_the_call(tmp_path: Path) -> None:
    """Any hook of accelerate's comes along, a chain of them too, and can be taken off again."""
    calls = []

    class Seen(accelerate.hooks.ModelHook):
        def pre_forward(self, module: nn.Module, *args: Any, **kwargs: Any) -> Any:
            calls.append(type(module).__name__)
            return args, kwargs

    model = nn.Sequential(nn.Linear(8, 8))
    for _ in range(2):
        accelerate.hooks.add_hook_to_module(model[0], Seen(), append=True)
    get_peft_model(model, LoraConfig(**{**LORA, "target_modules": ["0"]}))
    x = torch.randn(3, 8)
    y = model(x)
    assert calls == ["LoraLinear"] * 2
    accelerate.hooks.remove_hook_from_module(model, recurse=True)
    assert torch.equal(model(x), y)
    assert len(calls) == 2
    assert "forward" not in vars(model[0]) or model[0].forward.__func__ is LoraLinear.forward


def test_another_forward_on_the_instance_is_the_layers_own() -> None:
    linear = nn.Linear(8, 8)
    linear.forward = functools.partial(lambda module, x: nn.Linear.forward(module, x) * 2, linear)
    model = nn.Sequential(linear)
    x = torch.randn(3, 8)
    before = model(x)
    get_peft_model(model, LoraConfig(r=2, target_modules=["0"]))
    assert type(model[0]) is LoraWrappedLinear
    assert torch.equal(model(x), before)
