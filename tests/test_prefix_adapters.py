"""A prefix among adapters: started from a text, switched, copied, beside LoRA."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

pytest.importorskip("transformers")

from prefix_models import WIDE, P, Words, encoder, inputs, model, tokens, tuned

from fused_peft import (
    LoraConfig,
    PrefixTuningConfig,
    add_adapter,
    delete_adapter,
    disable_adapter,
    get_peft_model,
    merge_adapter,
    set_adapter,
)


@pytest.mark.parametrize("projection", [False, True])
@pytest.mark.parametrize("text", ["7 9 11 30 5", "7 9"])
@pytest.mark.parametrize("kind", ["llama", "mistral", "qwen3", "gpt2", "gemma2"])
def test_started_from_a_text_the_prefix_is_the_text(kind: str, text: str, projection: bool) -> None:
    built = model(kind, **WIDE.get(kind, {})).train()
    modes = [module.training for module in built.modules()]
    more = {"prefix_projection": projection, "encoder_hidden_size": 16}
    torch.manual_seed(0)
    get_peft_model(
        built,
        PrefixTuningConfig(
            task_type="CAUSAL_LM",
            num_virtual_tokens=P,
            prefix_init="text",
            prefix_init_text=text,
            **more,
        ),
        tokenizer=Words(),
    )
    assert [m.training for n, m in built.named_modules() if "prompt_adapters" not in n] == modes
    built.eval()
    words = ([int(word) for word in text.split()] * P)[:P]
    before = torch.tensor([words] * 3)
    with disable_adapter(built):
        expected = built(torch.cat((before, tokens()), dim=1)).logits[:, P:]
    torch.testing.assert_close(built(tokens()).logits, expected, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("kind", ["bert", "t5"])
def test_started_from_a_text_in_an_encoder_and_an_encoder_decoder(kind: str) -> None:
    built = tuned(model(kind), Words(), prefix_init="text", prefix_init_text="7 9 11 30 5")
    ids = torch.tensor([[7, 9, 11, 30, 5]])
    # By hand: the values of layer 0 and, in the decoder, of layer 1, which has PEFT's plane 2.
    with disable_adapter(built), torch.no_grad():
        if kind == "bert":
            layer = built.bert.encoder.layer[0].attention.self
            expected = {0: layer.value(built.bert.embeddings(ids))}
        else:
            states = built(
                input_ids=ids, decoder_input_ids=ids, output_hidden_states=True
            ).decoder_hidden_states
            blocks = [block.layer[0] for block in built.decoder.block]
            values = [
                b.SelfAttention.v(b.layer_norm(s)) for b, s in zip(blocks, states, strict=False)
            ]
            expected = {0: values[0], 2: values[1], 1: values[2]}
    for plane, value in expected.items():
        got = encoder(built).key_value(plane)[1].permute(1, 0, 2).flatten(1)
        torch.testing.assert_close(got, value[0], rtol=1e-5, atol=1e-5)


def test_a_text_runs_through_the_base_model_whatever_is_active() -> None:
    config = PrefixTuningConfig(
        task_type="CAUSAL_LM",
        num_virtual_tokens=P,
        prefix_init="text",
        prefix_init_text="7 9 11 30 5",
    )
    built, fresh = tuned(model("llama")), model("llama")
    add_adapter(built, config, "text", tokenizer=Words())
    get_peft_model(fresh, config, tokenizer=Words())
    got = encoder(built, "text").prompt_embeddings()
    torch.testing.assert_close(got, encoder(fresh).prompt_embeddings(), rtol=1e-5, atol=1e-5)
    assert built.prompt_adapters.enabled


def test_adapters_are_switched_disabled_and_deleted() -> None:
    built = model("llama")
    base, before = built(tokens()).logits, built.config._attn_implementation
    tuned(built)
    first = built(tokens()).logits
    add_adapter(built, PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3), "second")
    assert torch.equal(built(tokens()).logits, first)
    set_adapter(built, "second")
    second = built(tokens()).logits
    assert (second - first).abs().max() > 1e-3
    with disable_adapter(built):
        torch.testing.assert_close(built(tokens()).logits, base, rtol=1e-4, atol=1e-5)
    assert torch.equal(built(tokens()).logits, second)
    set_adapter(built, "default")
    assert torch.equal(built(tokens()).logits, first)
    with pytest.raises(ValueError, match=r"merg|no LoRA|prefix|PREFIX"):
        merge_adapter(built)
    delete_adapter(built, "second")
    assert torch.equal(built(tokens()).logits, first)
    delete_adapter(built, "default")
    torch.testing.assert_close(built(tokens()).logits, base, rtol=1e-4, atol=1e-5)
    assert built.config._attn_implementation == before
    assert not any(m._forward_pre_hooks or m._forward_hooks for m in built.modules())
    assert not any("fused_peft_prefix" in vars(m) for m in built.modules())


def test_a_copy_has_a_prefix_of_its_own() -> None:
    built = tuned(model("llama"))
    twin = copy.deepcopy(built)
    before = built(tokens()).logits
    assert torch.equal(twin(tokens()).logits, before)
    encoder(twin).load_prompt_embeddings(torch.zeros_like(encoder(twin).prompt_embeddings()))
    assert torch.equal(built(tokens()).logits, before)
    assert (twin(tokens()).logits - before).abs().max() > 1e-3
    names = set(built.state_dict())
    assert {n for n in names if "prefix" in n} == {
        f"prompt_adapters.adapters.default.prefix.{layer}" for layer in range(2)
    }


def test_together_with_lora() -> None:
    built = tuned(model("llama"))
    add_adapter(built, LoraConfig(r=4, target_modules=["q_proj", "v_proj"]), "lora")
    for name, parameter in built.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.1)
    prefix_only = built(tokens()).logits
    set_adapter(built, ["lora", "default"])
    got = built(tokens()).logits
    assert (got - prefix_only).abs().max() > 1e-3
    out = built(**inputs("llama"))
    out.loss.backward()
    for name, parameter in built.named_parameters():
        assert (parameter.grad is not None) == ("lora_" in name or "prompt_adapters" in name)
    merge_adapter(built, adapter_names=["lora"])
    torch.testing.assert_close(built(tokens()).logits, got, rtol=1e-4, atol=1e-5)
