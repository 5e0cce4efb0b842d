"""A small model, adapters of it, and ways to damage an adapter's files."""

from __future__ import annotations

import copy
import json
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from fused_peft.checkpoint import CONFIG_NAME, WEIGHTS_NAME
from fused_peft.tuners import LoraConfig, get_peft_model

PREFIX = "base_model.model."


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.q = nn.Linear(8, 12)
        self.v = nn.Linear(12, 8, bias=False)
        self.norm = nn.LayerNorm(8)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(x + self.v(torch.tanh(self.q(x))))


class Net(nn.Module):
    def __init__(self, n_layers: int = 2) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Block() for _ in range(n_layers))
        self.head = nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return self.head(x)


def make_net(n_layers: int = 2, dtype: torch.dtype = torch.float32) -> Net:
    torch.manual_seed(0)
    return Net(n_layers).to(dtype).eval()


def fill(model: nn.Module, seed: int) -> nn.Module:
    """Random values in all that is trainable: a fresh lora_B is zero, which would hide errors."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)
    return model


def trained(seed: int = 1, n_layers: int = 2, **fields: Any) -> nn.Module:
    config = LoraConfig(**{"target_modules": ["q", "v"], "r": 4, "lora_alpha": 6, **fields})
    return fill(get_peft_model(make_net(n_layers), config), seed).eval()


def snapshot(model: nn.Module) -> dict[str, Any]:
    """All that load_adapter could change about a model: a copy, comparable by :func:`same`."""
    return {
        "state": {k: v.clone() for k, v in model.state_dict().items()},
        "grad": {k: p.requires_grad for k, p in model.named_parameters()},
        "modules": {k: (id(m), type(m), m.training) for k, m in model.named_modules()},
        "parameters": {k: id(p) for k, p in model.named_parameters()},
        "configs": copy.deepcopy(getattr(model, "fused_peft_config", None)),
        "attributes": sorted(vars(model)),
        "random": torch.get_rng_state(),
    }


def assert_same(before: dict[str, Any], after: dict[str, Any]) -> None:
    assert before.keys() == after.keys()
    for part, value in before.items():
        if part == "state":
            assert value.keys() == after[part].keys()
            for key, tensor in value.items():
                assert torch.equal(tensor, after[part][key]), key
        elif part == "random":
            assert torch.equal(value, after[part])
        else:
            assert value == after[part], part


def edit_config(directory: Path, **fields: Any) -> None:
    file = directory / CONFIG_NAME
    file.write_text(json.dumps({**json.loads(file.read_text()), **fields}))


def edit_weights(directory: Path, edit: Callable[[dict[str, Tensor]], None]) -> None:
    tensors = load_file(directory / WEIGHTS_NAME)
    edit(tensors)
    save_file(tensors, directory / WEIGHTS_NAME)


def cut(file: Path, size: int) -> None:
    file.write_bytes(file.read_bytes()[:size])


def lie_about_size(directory: Path) -> None:
    """A header that is whole, and tensors that would reach past the end of the file."""
    file = directory / WEIGHTS_NAME
    content = file.read_bytes()
    (n,) = struct.unpack("<Q", content[:8])
    file.write_bytes(content[: 8 + n + 100])


KEY = f"{PREFIX}layers.0.q.lora_A.weight"
KEY_B = f"{PREFIX}layers.1.v.lora_B.weight"


def set_value(key: str, value: float) -> Callable[[dict[str, Tensor]], None]:
    def edit(tensors: dict[str, Tensor]) -> None:
        tensors[key].view(-1)[-1] = value

    return edit
