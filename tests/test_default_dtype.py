"""torch.set_default_dtype changes nothing of what the package decides."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

pytest.importorskip("transformers")

import prompt_models
from prefix_models import model

from fused_peft import (
    LoraConfig,
    fuse_model,
    get_peft_model,
    load_adapter,
    save_adapter,
    trainable_parameters,
)


@pytest.fixture(params=[torch.bfloat16, torch.float16, torch.float64], autouse=True)
def default_dtype(request: pytest.FixtureRequest) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(request.param)
    yield
    torch.set_default_dtype(before)


def test_norms_and_mlps_are_recognised() -> None:
    counts = fuse_model(model("llama"))
    assert counts == {"attention": 2, "rms_norm": 5, "mlp": 2, "loss": 1}


@pytest.mark.parametrize("method", ["LoRA", *prompt_models.METHODS])
def test_a_saved_adapter_comes_back_bit_for_bit(method: str, tmp_path: Path) -> None:
    base = model("llama").float()
    config = (
        LoraConfig(r=2, target_modules="all-linear")
        if method == "LoRA"
        else prompt_models.config(method, "llama")
    )
    trained = prompt_models.fill(get_peft_model(copy.deepcopy(base), config))
    with torch.no_grad():
        for parameter in trainable_parameters(trained):
            parameter.mul_(1.1)  # no value of a half dtype any more
    save_adapter(trained, tmp_path)
    loaded = load_adapter(base, tmp_path, is_trainable=True)
    state = trained.state_dict()
    assert all(torch.equal(tensor, state[name]) for name, tensor in loaded.state_dict().items())
    assert all(p.dtype == torch.float32 for p in loaded.parameters() if p.requires_grad)
