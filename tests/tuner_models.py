"""The models that the tests of get_peft_model adapt, and what they compare."""

from __future__ import annotations

import copy
import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fused_peft import LoraLinear


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.q_proj = nn.Linear(8, 8)
        self.v_proj = nn.Linear(8, 8, bias=False)
        self.mlp = nn.Sequential(nn.Linear(8, 12), nn.ReLU(), nn.Linear(12, 8))
        self.norm = nn.LayerNorm(8)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(x + self.mlp(torch.tanh(self.q_proj(x)) * self.v_proj(x)))


class Tiny(nn.Module):
    """Two blocks between an embedding and a classifier."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, 8)
        self.layers = nn.ModuleList([Block(), Block(), Block()])
        self.conv = nn.Conv2d(1, 1, 1)
        self.q_proj = nn.Linear(8, 8)
        self.score = nn.Linear(8, 3)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids)
        for layer in self.layers:
            x = layer(x)
        return self.score(self.conv(self.q_proj(x)[:, None])[:, 0])


def tiny(seed: int = 0) -> Tiny:
    torch.manual_seed(seed)
    return Tiny()


def nested() -> nn.Module:
    return nn.Sequential(tiny())


def ids() -> Tensor:
    return torch.randint(0, 11, (2, 5), generator=torch.Generator().manual_seed(9))


def llama(seed: int = 0, cls: str = "LlamaForCausalLM", **fields: Any) -> nn.Module:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(seed)
    config = transformers.LlamaConfig(
        vocab_size=40,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        **fields,
    )
    return getattr(transformers, cls)(config).eval()


def llama_classifier(seed: int = 0) -> nn.Module:
    return llama(seed, "LlamaForSequenceClassification", num_labels=3, pad_token_id=0)


def gpt2(seed: int = 0) -> nn.Module:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(seed)
    config = transformers.GPT2Config(vocab_size=40, n_embd=16, n_layer=2, n_head=2, n_positions=16)
    return transformers.GPT2LMHeadModel(config).eval()


def lora_layers(model: nn.Module) -> dict[str, LoraLinear]:
    return {name: m for name, m in model.named_modules() if isinstance(m, LoraLinear)}


def randomize(model: nn.Module) -> None:
    """The same weights for the same adapter of the same layer at every call."""
    for layer in lora_layers(model).values():
        for by_name in (layer.lora_A, layer.lora_B):
            for i, parameter in enumerate(by_name.values()):
                generator = torch.Generator().manual_seed(i)
                parameter.data.copy_(0.2 * torch.randn(parameter.shape, generator=generator))


def trainable(model: nn.Module) -> set[str]:
    return {name for name, p in model.named_parameters() if p.requires_grad}


def state(model: nn.Module) -> list[tuple[Any, ...]]:
    """Everything that an operation which fails has to leave as it was."""
    modules = [(name, id(m), type(m), m.training) for name, m in model.named_modules()]
    parameters = [
        (name, id(p), p.requires_grad, p._version) for name, p in model.named_parameters()
    ]
    return [*modules, *parameters, ("attributes", *sorted(vars(model)))]


def logits(model: nn.Module, tokens: Tensor) -> Tensor:
    output = model(tokens)
    return (output if isinstance(output, Tensor) else output.logits).detach()


def peft_twin(model: nn.Module, ours: nn.Module, kwargs: dict[str, Any]) -> Any:
    """PEFT's model over a copy of ``model``, with the adapter weights of ``ours``."""
    peft = pytest.importorskip("peft")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = peft.get_peft_model(copy.deepcopy(model), peft.LoraConfig(r=4, **kwargs))
    root = theirs.base_model.model
    for path, layer in lora_layers(ours).items():
        twin = root.get_submodule(path)
        twin.lora_A["default"].weight.data.copy_(layer.lora_A["default"])
        twin.lora_B["default"].weight.data.copy_(layer.lora_B["default"])
    return theirs
