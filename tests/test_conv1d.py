"""GPT-2, whose linear layers store their weight transposed: all of it against PEFT."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from test_generate_lora import base_model, prompts
from torch import Tensor

from fused_peft import (
    LoraConfig,
    LoraLinear,
    explain,
    get_peft_model,
    load_adapter,
    merge_adapter,
    save_adapter,
    unmerge_adapter,
)

peft = pytest.importorskip("peft")

TARGETS: dict[str, Any] = {
    "default": None,
    "names": ["c_attn", "c_proj", "c_fc"],
    "all-linear": "all-linear",
}


def ours(target: Any = "all-linear", **fields: Any) -> Any:
    config = {"r": 4, "lora_alpha": 8, "init_lora_weights": False, "task_type": "CAUSAL_LM"}
    model = base_model("gpt2")
    torch.manual_seed(1)
    return get_peft_model(model, LoraConfig(**{**config, **fields}, target_modules=target))


def logits(model: Any) -> Tensor:
    found: Tensor = model(prompts(False)["input_ids"]).logits
    return found


@pytest.mark.parametrize("target", TARGETS)
def test_the_layout_is_seen_and_written(target: str, tmp_path: Path) -> None:
    """fan_in_fan_out need not be given; the file says it, as PEFT's does."""
    model = ours(TARGETS[target])
    layers = [m for m in model.modules() if isinstance(m, LoraLinear)]
    assert len(layers) == (2 if target == "default" else 8)
    assert all(layer.fan_in_fan_out for layer in layers)
    attention = model.transformer.h[0].attn.c_attn
    assert (attention.in_features, attention.out_features) == (32, 96)
    assert attention.weight.shape == (32, 96)
    assert attention.lora_A["default"].shape == (4, 32)
    assert attention.lora_B["default"].shape == (96, 4)
    save_adapter(model, tmp_path)
    assert json.loads((tmp_path / "adapter_config.json").read_text())["fan_in_fan_out"] is True


@pytest.mark.parametrize("target", TARGETS)
def test_logits_and_gradients_are_pefts(target: str, tmp_path: Path) -> None:
    model = ours(TARGETS[target])
    save_adapter(model, tmp_path)
    theirs = peft.PeftModel.from_pretrained(base_model("gpt2"), str(tmp_path), is_trainable=True)
    theirs.eval()
    torch.testing.assert_close(logits(model.eval()), logits(theirs), rtol=1e-4, atol=1e-4)
    ids = prompts(False)["input_ids"]
    for net in (model, theirs):
        net(input_ids=ids, labels=ids).loss.backward()
    found = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    truth = {n: p.grad for n, p in theirs.named_parameters() if p.grad is not None}
    assert len(found) == len(truth) > 0
    for name, gradient in found.items():
        path, _, adapter = name.rpartition(".")
        theirs_name = f"base_model.model.{path}.{adapter}.weight"
        torch.testing.assert_close(gradient, truth[theirs_name], rtol=1e-3, atol=1e-4, msg=name)


def test_an_adapter_of_peft_is_loaded_and_saved_again(tmp_path: Path) -> None:
    config = peft.LoraConfig(
        r=4, target_modules=["c_attn", "c_proj"], fan_in_fan_out=True, init_lora_weights=False
    )
    theirs = peft.get_peft_model(base_model("gpt2"), config).eval()
    theirs.save_pretrained(str(tmp_path / "theirs"))
    model = load_adapter(base_model("gpt2"), tmp_path / "theirs")
    torch.testing.assert_close(logits(model), logits(theirs), rtol=1e-4, atol=1e-4)
    save_adapter(model, tmp_path / "again")
    name = "adapter_model.safetensors"
    one, two = load_file(tmp_path / "theirs" / name), load_file(tmp_path / "again" / name)
    assert one.keys() == two.keys()
    assert all(torch.equal(one[key], two[key]) for key in one)


def test_merging_is_pefts_and_comes_out_again(tmp_path: Path) -> None:
    model = ours().eval()
    save_adapter(model, tmp_path)
    theirs = peft.PeftModel.from_pretrained(base_model("gpt2"), str(tmp_path)).merge_and_unload()
    separate, before = logits(model), model.transformer.h[0].mlp.c_fc.weight.clone()
    merge_adapter(model, safe=True)
    weight = model.transformer.h[0].mlp.c_fc.weight
    torch.testing.assert_close(weight, theirs.transformer.h[0].mlp.c_fc.weight)
    assert not torch.allclose(weight, before, atol=1e-3)
    torch.testing.assert_close(logits(model), separate, rtol=1e-4, atol=1e-4)
    unmerge_adapter(model)
    torch.testing.assert_close(model.transformer.h[0].mlp.c_fc.weight, before)
    torch.testing.assert_close(logits(model), separate, rtol=1e-4, atol=1e-4)


def test_the_kernel_reads_the_weight_as_it_is_stored() -> None:
    model = ours()
    layer = model.transformer.h[0].attn.c_attn
    stored = layer.weight.data_ptr()
    assert explain(layer, torch.randn(64, 32)).startswith("kernel: cpu")
    layer(torch.randn(64, 32)).sum().backward()
    assert layer.weight.data_ptr() == stored
    assert layer.weight.grad is None


def test_pissa_starts_from_the_transposed_weight() -> None:
    before = logits(base_model("gpt2"))
    model = ours(init_lora_weights="pissa").eval()
    torch.testing.assert_close(logits(model), before, rtol=1e-3, atol=1e-3)
    assert not torch.allclose(
        model.transformer.h[0].attn.c_attn.weight,
        base_model("gpt2").transformer.h[0].attn.c_attn.weight,
    )
