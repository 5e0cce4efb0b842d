"""generate() of models with LoRA adapters: the tokens that PEFT and the merged model give."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from fused_peft import LoraConfig, get_peft_model, merge_adapter, save_adapter

transformers = pytest.importorskip("transformers")
peft = pytest.importorskip("peft")

SIZES: dict[str, Any] = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "initializer_range": 0.3,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": 0,
}
GPT2: dict[str, Any] = {
    "vocab_size": 64,
    "n_embd": 32,
    "n_layer": 2,
    "n_head": 4,
    "n_positions": 64,
    "initializer_range": 0.3,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": 0,
}
SEARCHES: dict[str, dict[str, Any]] = {
    "greedy": {},
    "static cache": {"cache_implementation": "static"},
    "beams": {"num_beams": 3},
    "static cache, beams": {"num_beams": 2, "cache_implementation": "static"},
    "sampling": {"do_sample": True, "top_k": 8},
    "no cache": {"use_cache": False},
}


def base_model(kind: str) -> Any:
    torch.manual_seed(0)
    if kind == "gpt2":
        return transformers.GPT2LMHeadModel(transformers.GPT2Config(**GPT2)).eval()
    if kind == "mistral":
        config = transformers.MistralConfig(**SIZES, sliding_window=4)
        return transformers.MistralForCausalLM(config).eval()
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**SIZES)).eval()


def adapted(kind: str) -> Any:
    config = LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", init_lora_weights=False)
    model = base_model(kind)
    torch.manual_seed(1)
    return get_peft_model(model, config).eval()


def prompts(padded: bool) -> dict[str, Tensor]:
    """Two rows of 7; the second with 3 of padding on the left."""
    ids = torch.randint(1, 64, (2, 7), generator=torch.Generator().manual_seed(3))
    mask = torch.ones_like(ids)
    if padded:
        ids[1, :3], mask[1, :3] = 0, 0
    return {"input_ids": ids, "attention_mask": mask}


def generated(model: Any, padded: bool, search: dict[str, Any]) -> Tensor:
    torch.manual_seed(5)
    options = {"max_new_tokens": 10, "do_sample": False, **search}
    ids: Tensor = model.generate(**prompts(padded), **options)
    return ids[:, 7:]


@pytest.mark.parametrize("padded", [False, True], ids=["full rows", "left padding"])
@pytest.mark.parametrize("search", SEARCHES)
@pytest.mark.parametrize("kind", ["llama", "mistral", "gpt2"])
def test_tokens_are_pefts_and_the_merged_models(
    kind: str, search: str, padded: bool, tmp_path: Path
) -> None:
    model = adapted(kind)
    save_adapter(model, tmp_path)
    theirs = peft.PeftModel.from_pretrained(base_model(kind), str(tmp_path)).eval()
    found = generated(model, padded, SEARCHES[search])
    assert found.shape == (2, 10)
    assert torch.equal(found, generated(theirs, padded, SEARCHES[search]))
    merged = copy.deepcopy(model)
    merge_adapter(merged)
    assert torch.equal(found, generated(merged, padded, SEARCHES[search]))
    assert not torch.equal(found, generated(base_model(kind), padded, SEARCHES[search]))


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_left_padded_rows_are_each_row_alone(kind: str) -> None:
    model = adapted(kind)
    both = generated(model, True, {})
    alone = model.generate(prompts(True)["input_ids"][1:, 3:], max_new_tokens=10, do_sample=False)[
        :, 4:
    ]
    assert torch.equal(both[1:], alone)


def test_steps_with_a_cache_are_the_forward_without() -> None:
    model = adapted("llama")
    ids = prompts(False)["input_ids"]
    with torch.no_grad():
        whole = model(ids).logits
        cache, steps = None, []
        for position in range(ids.shape[1]):
            out = model(ids[:, position : position + 1], past_key_values=cache, use_cache=True)
            cache = out.past_key_values
            steps.append(out.logits)
    torch.testing.assert_close(torch.cat(steps, 1), whole, rtol=1e-4, atol=1e-4)


def test_bfloat16_with_float32_adapters() -> None:
    config = LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False)
    model = get_peft_model(base_model("llama").bfloat16(), config).eval()
    layer = model.model.layers[0].mlp.up_proj
    assert (layer.weight.dtype, layer.lora_A["default"].dtype) == (torch.bfloat16, torch.float32)
    found = generated(model, True, {})
    static = generated(model, True, {"cache_implementation": "static"})
    assert torch.equal(found, static)
