"""Tiny PEFT models for the tests of fused_peft.integrations.peft."""

from __future__ import annotations

import contextlib
import zlib
from typing import Any

import peft
import prefix_models
import pytest
import torch
from peft.tuners import lora
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from fused_peft import explain, ops

K, N = 48, 80
VERSION = tuple(int(part) for part in peft.__version__.split(".")[:2])

#: What no PEFT of the version can do with the transformers here, fused or not.
MAKES_ENCODER_DECODERS = pytest.mark.skipif(
    VERSION < (0, 21), reason="PEFT before 0.21 has no prefix tuning for encoder-decoders here"
)
TRANSFORMERS_TAKES_IT = pytest.mark.skipif(
    VERSION < (0, 20), reason="transformers wants PEFT 0.20 for its add_adapter"
)


class Net(nn.Module):
    """A linear layer by the name of ``lin`` and, at choice, one named ``other`` behind it."""

    def __init__(self, lin: nn.Module, other: nn.Module | None = None) -> None:
        super().__init__()
        self.lin = lin
        self.other = nn.Identity() if other is None else other

    def forward(self, x: Tensor) -> Tensor:
        return self.other(self.lin(x))


def net(base: str = "linear", *, bias: bool = True, seed: int = 0) -> Net:
    torch.manual_seed(seed)
    if base == "conv1d":
        return Net(Conv1D(N, K))
    return Net(nn.Linear(K, N, bias=bias))


def two_layers(seed: int = 0) -> Net:
    torch.manual_seed(seed)
    return Net(nn.Linear(K, N), nn.Linear(N, 24))


def config(**changed: Any) -> peft.LoraConfig:
    return peft.LoraConfig(
        **{
            "target_modules": ["lin"],
            "r": 8,
            "lora_alpha": 12,
            "init_lora_weights": False,
            **changed,
        }
    )


def fill(model: nn.Module) -> nn.Module:
    """Values of every adapter by its name in the model: none is zero, none depends on order."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name or "prompt_encoder" in name:
                generator = torch.Generator().manual_seed(zlib.crc32(name.encode()))
                value = torch.randn(parameter.shape, generator=generator) * 0.3
                parameter.copy_(value)
    return model


def adapted(model: nn.Module | None = None, **changed: Any) -> peft.PeftModel:
    """A PEFT model with one adapter named "default"."""
    return fill(peft.get_peft_model(net() if model is None else model, config(**changed)))


def layer(model: Any) -> Any:
    """The adapted layer ``lin`` of a model."""
    return model.get_submodule("base_model.model.lin")


def inputs(rows: int = 40, dtype: torch.dtype = torch.float32, seed: int = 3) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(rows, K, generator=generator).to(dtype)


def recorded_calls(monkeypatch: pytest.MonkeyPatch, name: str) -> list[dict[str, Any]]:
    """The arguments of every call of an op from now on; positional ones under "args"."""
    calls: list[dict[str, Any]] = []
    op = getattr(ops, name)

    def recorded(*args: Any, **kwargs: Any) -> Any:
        calls.append({"args": args, **kwargs})
        return op(*args, **kwargs)

    monkeypatch.setattr(ops, name, recorded)
    return calls


def two_adapters(model: peft.PeftModel, **changed: Any) -> peft.PeftModel:
    """A second adapter, both active."""
    model.add_adapter("second", config(r=4, **changed))
    model.base_model.set_adapter(["default", "second"])
    return fill(model)


def results(model: nn.Module, x: Tensor, **autocast: Any) -> dict[str, Tensor]:
    """Output and all gradients for a loss whose gradient at the output is random."""
    model.zero_grad()
    x = x.clone().requires_grad_()
    with torch.autocast("cpu", **autocast) if autocast else contextlib.nullcontext():
        y = model(x)
    generator = torch.Generator().manual_seed(9)
    y.backward(torch.randn(y.shape, generator=generator).to(torch.bfloat16).to(y.dtype))
    assert x.grad is not None
    gradients = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    return {"y": y.detach(), "x": x.grad, **gradients}


def in_dtypes(model: peft.PeftModel, base: torch.dtype, adapters: torch.dtype) -> peft.PeftModel:
    """Base and adapters in these dtypes, their values representable in both of them."""
    for name, parameter in model.named_parameters():
        parameter.data = parameter.data.to(base).to(adapters if "lora_" in name else base)
    return model


def kinds(model: nn.Module) -> list[str]:
    """The class of every LoRA layer."""
    return [type(m).__name__ for m in model.modules() if isinstance(m, lora.LoraLayer)]


def in_kernel(model: Any, x: Tensor | None = None) -> bool:
    """Whether the layer ``lin`` runs the kernel."""
    return explain(layer(model), inputs() if x is None else x).startswith("kernel")


def with_adalora() -> Any:
    return peft.get_peft_model(
        net(), peft.AdaLoraConfig(target_modules=["lin"], total_step=4, tinit=1, tfinal=1)
    )


def only_embedding() -> Any:
    return adapted(Net(nn.Embedding(5, K)))


def prompt_tuned() -> Any:
    return peft.get_peft_model(
        prefix_models.model("llama"),
        peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3),
    )
