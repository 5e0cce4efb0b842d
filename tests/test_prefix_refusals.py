"""What prefix tuning refuses; nothing is changed then."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

pytest.importorskip("transformers")

from prefix_models import P, Words, model, tuned

from fused_peft import PrefixTuningConfig, get_peft_model


def unchanged(built: nn.Module, attempt: Callable[[], Any], error: Any, message: str) -> None:
    state = {name: tensor.clone() for name, tensor in built.state_dict().items()}
    grads = [p.requires_grad for p in built.parameters()]
    implementation = getattr(getattr(built, "config", None), "_attn_implementation", None)
    with pytest.raises(error, match=message):
        attempt()
    assert state.keys() == built.state_dict().keys()
    assert all(torch.equal(state[name], t) for name, t in built.state_dict().items())
    assert [p.requires_grad for p in built.parameters()] == grads
    assert getattr(getattr(built, "config", None), "_attn_implementation", None) == implementation
    assert not any(m._forward_pre_hooks or m._forward_hooks for m in built.modules())


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"num_layers": 3}, "num_layers is 3; expected 2"),
        ({"num_attention_heads": 4}, "num_attention_heads is 4; expected 2"),
        ({"token_dim": 32}, "token_dim is 32; expected 16"),
        ({"num_virtual_tokens": 0}, "num_virtual_tokens is 0"),
        ({"prefix_init": "text", "prefix_init_text": "1 2 3 4 5 6"}, "has 6 tokens; expected 1 to"),
        ({"prefix_init": "text", "prefix_init_text": "  "}, "prefix_init_text"),
    ],
)
def test_a_config_that_does_not_fit(changed: dict[str, Any], message: str) -> None:
    built = model("llama")
    unchanged(built, lambda: tuned(built, Words(), **changed), (TypeError, ValueError), message)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"num_layers": 3}, "num_layers is 3; expected 2, the layers of LlamaForCausalLM"),
        ({"num_attention_heads": 4}, "num_attention_heads is 4; expected 2, the key/value heads"),
        ({"token_dim": 32}, "token_dim is 32; expected 16, 2 key/value heads of 8"),
    ],
)
def test_the_model_s_own_modules_are_asked(changed: dict[str, Any], message: str) -> None:
    from fused_peft.tuners.prefix import check_prefix

    sizes = {"num_layers": 2, "num_attention_heads": 2, "token_dim": 16}
    built = model("llama")
    check_prefix(built, PrefixTuningConfig(num_virtual_tokens=P, **sizes))
    config = PrefixTuningConfig(num_virtual_tokens=P, **{**sizes, **changed})
    unchanged(built, lambda: check_prefix(built, config), ValueError, message)


def test_a_text_without_a_tokenizer() -> None:
    built = model("llama")
    unchanged(
        built,
        lambda: tuned(built, prefix_init="text", prefix_init_text="5"),
        ValueError,
        "tokenizer",
    )


def test_more_virtual_tokens_than_positions() -> None:
    built = model("gpt2")
    unchanged(
        built,
        lambda: tuned(built, num_virtual_tokens=64),
        ValueError,
        "num_virtual_tokens is 64; expected less than the 64 positions",
    )


def test_a_model_that_keeps_its_attention(monkeypatch: pytest.MonkeyPatch) -> None:
    built = model("llama")

    def other(self: nn.Module, name: str) -> None:
        self.config._attn_implementation_internal = "eager"

    monkeypatch.setattr(type(built), "set_attn_implementation", other)
    unchanged(
        built, lambda: tuned(built), ValueError, "keeps its attention implementation, 'eager'"
    )


def test_models_whose_attention_cannot_be_replaced() -> None:
    transformers = pytest.importorskip("transformers")
    config = PrefixTuningConfig(
        num_virtual_tokens=P, num_layers=2, num_attention_heads=4, token_dim=32
    )
    bloom = transformers.BloomForCausalLM(
        transformers.BloomConfig(vocab_size=40, hidden_size=32, n_layer=2, n_head=4)
    )
    unchanged(
        bloom,
        lambda: get_peft_model(bloom, config),
        ValueError,
        "its attention does not go through",
    )
    plain = nn.Sequential(nn.Linear(4, 4))
    unchanged(
        plain, lambda: get_peft_model(plain, config), TypeError, "expected a transformers model"
    )
