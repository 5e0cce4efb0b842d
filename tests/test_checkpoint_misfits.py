"""Adapters on disk that are whole, and do not fit the model: nothing is changed."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from adapter_files import (
    KEY_B,
    PREFIX,
    assert_same,
    edit_weights,
    make_net,
    set_value,
    snapshot,
    trained,
)
from torch import nn

from fused_peft.checkpoint import load_adapter, save_adapter
from fused_peft.errors import AdapterError


def test_another_architecture(tmp_path: Path) -> None:
    save_adapter(trained(), tmp_path)

    class Convolution(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.projection = nn.Linear(8, 8)

    model = Convolution()
    before = snapshot(model)
    with pytest.raises(AdapterError, match=r"trained on Net, does not fit this Convolution"):
        load_adapter(model, tmp_path)
    assert_same(before, snapshot(model))


def test_a_deeper_model_lists_a_few_keys_and_a_count(tmp_path: Path) -> None:
    save_adapter(trained(n_layers=9), tmp_path)
    model = make_net(2)
    before = snapshot(model)
    with pytest.raises(AdapterError, match=r"unexpected .* and 24 more") as caught:
        load_adapter(model, tmp_path)
    assert str(caught.value).count("lora_") == 4
    assert_same(before, snapshot(model))


def test_a_failure_after_other_adapters(tmp_path: Path) -> None:
    """A further adapter that does not fit leaves those that are there as they were."""
    save_adapter(trained(), tmp_path)
    edit_weights(tmp_path, set_value(KEY_B, float("nan")))
    model = trained(seed=2, modules_to_save=["head"]).train()
    before = snapshot(model)
    with pytest.raises(AdapterError, match="NaN"):
        load_adapter(model, tmp_path, "second")
    assert_same(before, snapshot(model))


def test_scaling_unlike_the_models(tmp_path: Path) -> None:
    save_adapter(trained(lora_alpha=32), tmp_path)
    model = trained(seed=2, lora_alpha=16)
    before = snapshot(model)
    with pytest.raises(AdapterError, match=r"lora_alpha is 32 in .* 16 in the model's"):
        load_adapter(model, tmp_path)
    assert_same(before, snapshot(model))


def test_values_that_the_models_dtype_cannot_hold(tmp_path: Path) -> None:
    save_adapter(trained(modules_to_save=["head"]), tmp_path)
    edit_weights(tmp_path, set_value(f"{PREFIX}head.0.weight", 1e6))
    with pytest.raises(AdapterError, match=r"too large for torch\.float16"):
        load_adapter(make_net(dtype=torch.float16), tmp_path)
