"""Linear layers whose weight is quantised, of several makes, and what they compute in full."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F


class Int8Linear(nn.Linear):
    """A subclass of nn.Linear with a forward of its own: int8 values and a scale for each row."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__(linear.in_features, linear.out_features, linear.bias is not None)
        weight = linear.weight.detach()
        self.register_buffer("scale", weight.abs().amax(1, keepdim=True) / 127)
        packed = torch.round(weight / self.scale).to(torch.int8)
        self.weight = nn.Parameter(packed, requires_grad=False)
        self.bias = linear.bias

    def dequantised(self) -> Tensor:
        return self.weight.float() * self.scale

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.dequantised().to(x.dtype), self.bias)


class Packed4bitLinear(nn.Module):
    """No nn.Linear at all: two values a byte in a buffer, which has no weight Parameter."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        weight = linear.weight.detach()
        scale = weight.abs().amax() / 7
        values = (torch.round(weight / scale) + 8).to(torch.uint8)
        self.register_buffer("qweight", values[:, 0::2] | values[:, 1::2] << 4)
        self.register_buffer("scale", scale)
        self.register_buffer("offset", linear.bias.detach().clone())

    def dequantised(self) -> Tensor:
        pairs = torch.stack((self.qweight & 15, self.qweight >> 4), dim=-1)
        return (pairs.flatten(1).float() - 8) * self.scale

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.dequantised().to(x.dtype), self.offset.to(x.dtype))


def bitsandbytes_4bit(linear: nn.Linear) -> nn.Module:
    bnb = pytest.importorskip("bitsandbytes")
    layer = bnb.nn.Linear4bit(
        linear.in_features, linear.out_features, quant_type="nf4", compute_dtype=torch.float32
    )
    layer.load_state_dict(linear.state_dict())
    return layer.to("cpu")


def bitsandbytes_8bit(linear: nn.Linear) -> nn.Module:
    bnb = pytest.importorskip("bitsandbytes")
    layer = bnb.nn.Linear8bitLt(linear.in_features, linear.out_features, has_fp16_weights=False)
    layer.load_state_dict(linear.state_dict())
    return layer.to("cpu")


def torchao_int8(linear: nn.Linear) -> nn.Module:
    quantization = pytest.importorskip("torchao.quantization")
    layer = nn.Linear(linear.in_features, linear.out_features)
    layer.load_state_dict(linear.state_dict())
    holder = nn.Sequential(layer)
    quantization.quantize_(holder, quantization.Int8WeightOnlyConfig())
    return holder[0]


def gguf_q8_0(linear: nn.Linear) -> nn.Module:
    gguf = pytest.importorskip("gguf")
    utils = pytest.importorskip("transformers.integrations.gguf.utils")
    kind = gguf.GGMLQuantizationType.Q8_0
    layer = utils.GgufLinear(linear.in_features, linear.out_features, int(kind), bias=True)
    packed = torch.from_numpy(gguf.quantize(linear.weight.detach().numpy(), kind))
    layer.weight = nn.Parameter(packed, requires_grad=False)
    layer.bias = nn.Parameter(linear.bias.detach().clone(), requires_grad=False)
    return layer


#: How a quantised layer is made of nn.Linear.
MAKERS: dict[str, Callable[[nn.Linear], nn.Module]] = {
    "subclass of nn.Linear": Int8Linear,
    "module without a weight": Packed4bitLinear,
    "bitsandbytes 4-bit": bitsandbytes_4bit,
    "bitsandbytes 8-bit": bitsandbytes_8bit,
    "torchao int8": torchao_int8,
    "GGUF Q8_0": gguf_q8_0,
}


class Net(nn.Module):
    """Two linear layers, quantised where a maker is given."""

    def __init__(self, make: Callable[[nn.Linear], nn.Module] | None = None) -> None:
        super().__init__()
        torch.manual_seed(0)
        linears: list[Any] = [nn.Linear(64, 128), nn.Linear(128, 32)]
        self.first, self.second = [make(layer) if make else layer for layer in linears]

    def forward(self, x: Tensor) -> Tensor:
        return self.second(torch.relu(self.first(x)))


def quantised_llama(make: Callable[[nn.Linear], nn.Module]) -> Any:
    """A tiny Llama whose layers' linear modules are made quantised."""
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=64,
        hidden_size=64,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        initializer_range=0.3,
        attention_bias=True,
        mlp_bias=True,
        bos_token_id=None,
        eos_token_id=0,
        pad_token_id=0,
    )
    model = transformers.LlamaForCausalLM(config)
    for layer in model.model.layers:
        for parent in (layer.self_attn, layer.mlp):
            for name, child in list(parent.named_children()):
                if isinstance(child, nn.Linear):
                    setattr(parent, name, make(child))
    return model
