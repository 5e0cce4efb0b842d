"""A model with an adapter survives pickle, torch.save and deepcopy, and is a model of its own."""

from __future__ import annotations

import copy
import io
import pickle
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

pytest.importorskip("transformers")

import prompt_models
from prefix_models import inputs, model, task, tokens

from fused_peft import (
    LoraConfig,
    fuse_model,
    get_peft_model,
    load_adapter,
    save_adapter,
    use_fused_attention,
)
from fused_peft.integrations.trainer import save_adapters_only


def saved_and_loaded(built: nn.Module) -> nn.Module:
    file = io.BytesIO()
    torch.save(built, file)
    file.seek(0)
    loaded: nn.Module = torch.load(file, weights_only=False)
    return loaded


COPIES: dict[str, Callable[[nn.Module], nn.Module]] = {
    "pickle": lambda built: pickle.loads(pickle.dumps(built)),  # noqa: S301 (its own)
    "torch.save": saved_and_loaded,
    "deepcopy": copy.deepcopy,
}


def adapted(method: str, kind: str) -> nn.Module:
    config = (
        LoraConfig(r=2, target_modules="all-linear", task_type=task(kind))
        if method == "LoRA"
        else prompt_models.config(method, kind)
    )
    built = prompt_models.fill(get_peft_model(model(kind), config)).eval()
    fuse_model(built)
    return built


def generated(built: Any, **cache: str) -> Tensor:
    sequences: Tensor = built.generate(
        input_ids=tokens(2, 5),
        attention_mask=torch.ones(2, 5, dtype=torch.int64),
        max_new_tokens=6,
        do_sample=False,
        pad_token_id=0,
        eos_token_id=None,
        **cache,
    )
    return sequences


def trainable(built: nn.Module) -> dict[str, nn.Parameter]:
    return {name: p for name, p in built.named_parameters() if p.requires_grad}


@pytest.mark.parametrize("how", COPIES)
@pytest.mark.parametrize("kind", ["llama", "bert", "t5"])
@pytest.mark.parametrize("method", ["LoRA", *prompt_models.METHODS])
def test_a_copy_computes_the_same_by_parameters_of_its_own(
    method: str, kind: str, how: str
) -> None:
    built = adapted(method, kind)
    twin: Any = COPIES[how](built)
    expected = built(**inputs(kind)).logits
    torch.testing.assert_close(twin(**inputs(kind)).logits, expected, rtol=1e-4, atol=1e-5)
    assert trainable(twin).keys() == trainable(built).keys() != set()
    if kind == "llama":
        for cache in ({}, {"cache_implementation": "static"}):
            assert torch.equal(generated(twin, **cache), generated(built, **cache))
    with torch.no_grad():
        for parameter in trainable(twin).values():
            parameter.add_(0.5)
    assert (twin(**inputs(kind)).logits - expected).abs().max() > 1e-3
    assert torch.equal(built(**inputs(kind)).logits, expected)


@pytest.mark.parametrize("how", COPIES)
def test_a_copy_saves_its_own_adapter_as_a_trainer_s_model(how: str, tmp_path: Path) -> None:
    built: Any = adapted("LoRA", "llama")
    save_adapters_only(built)
    twin: Any = COPIES[how](built)
    with torch.no_grad():
        for parameter in trainable(twin).values():
            parameter.add_(0.5)
    twin.save_pretrained(tmp_path)
    assert not (tmp_path / "model.safetensors").exists()
    loaded: Any = load_adapter(model("llama"), tmp_path)
    ours = twin(**inputs("llama")).logits
    torch.testing.assert_close(loaded(**inputs("llama")).logits, ours, rtol=1e-4, atol=1e-5)
    # The state of all that is trained is a whole one for it, as for the model it was copied from.
    twin.load_state_dict({name: p.detach() for name, p in trainable(built).items()})
    save_adapter(twin, tmp_path)
    with pytest.raises(RuntimeError, match="Missing key"):
        twin.load_state_dict(dict(list(trainable(built).items())[1:]))


def test_another_process_knows_the_attention(tmp_path: Path) -> None:
    fused, attention = adapted("LoRA", "llama"), model("llama")
    use_fused_attention(attention)
    models = {"prefix": prompt_models.trained("prefix"), "fused": fused, "attention": attention}
    torch.save(models, tmp_path / "models")
    ids = torch.ones(1, 4, dtype=torch.int64)
    expected = {name: built(ids).logits for name, built in models.items()}
    script = (
        "import sys, torch\n"
        "models = torch.load(sys.argv[1], weights_only=False)\n"
        "ids = torch.ones(1, 4, dtype=torch.int64)\n"
        "torch.save({name: m(ids).logits for name, m in models.items()}, sys.argv[2])\n"
    )
    command = [sys.executable, "-c", script, tmp_path / "models", tmp_path / "logits"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    for name, logits in torch.load(tmp_path / "logits").items():
        torch.testing.assert_close(logits, expected[name], rtol=1e-4, atol=1e-5)
