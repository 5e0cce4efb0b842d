"""Tiny models with a prefix or prompt whose values are random."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import prefix_models as models
import torch
from torch import Tensor, nn

import fused_peft
from fused_peft import PrefixTuningConfig, PromptTuningConfig, PTuningConfig

P = 3
KINDS = ["llama", "gpt2", "bert", "t5"]
KEY = "prompt_embeddings"
# Method: our config class, the name of PEFT's, and what both are told.
METHODS: dict[str, tuple[Any, str, dict[str, Any]]] = {
    "prefix": (PrefixTuningConfig, "PrefixTuningConfig", {}),
    "prefix MLP": (
        PrefixTuningConfig,
        "PrefixTuningConfig",
        {"prefix_projection": True, "encoder_hidden_size": 20},
    ),
    "prompt": (PromptTuningConfig, "PromptTuningConfig", {}),
    "MLP": (PTuningConfig, "PromptEncoderConfig", {"encoder_hidden_size": 20}),
    "LSTM": (
        PTuningConfig,
        "PromptEncoderConfig",
        {"encoder_hidden_size": 20, "encoder_reparameterization_type": "LSTM"},
    ),
}
ENCODED = ["prefix MLP", "MLP", "LSTM"]


def config(method: str, kind: str, **fields: Any) -> Any:
    cls, _, own = METHODS[method]
    return cls(**{"num_virtual_tokens": P, "task_type": models.task(kind), **own, **fields})


def fill(model: nn.Module, seed: int = 1) -> nn.Module:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)
    return model


def trained(method: str, kind: str = "llama", seed: int = 1, **fields: Any) -> nn.Module:
    model = fused_peft.get_peft_model(models.model(kind), config(method, kind, **fields))
    return fill(model, seed).eval()


def logits(model: nn.Module, kind: str = "llama") -> Tensor:
    with torch.no_grad():
        result: Tensor = model(**models.inputs(kind)).logits
    return result


def close(got: Tensor, wanted: Tensor, what: str = "") -> None:
    torch.testing.assert_close(got, wanted, atol=2e-6, rtol=1e-5, msg=lambda m: f"{what}: {m}")


def names(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.iterdir())
