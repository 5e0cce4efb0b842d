"""Fusing whole PEFT models: files, copies, PEFT's own operations, the context manager, refusals."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

pytest.importorskip("peft")

import peft
import prefix_models
from peft.tuners import lora
from peft.utils.hotswap import hotswap_adapter, prepare_model_for_compiled_hotswap
from peft_models import (
    K,
    N,
    Net,
    adapted,
    config,
    fill,
    in_kernel,
    inputs,
    kinds,
    layer,
    net,
    only_embedding,
    prompt_tuned,
    two_layers,
    with_adalora,
)

from fused_peft import explain, fuse_model, ops, unfuse_model
from fused_peft.integrations.peft import fuse, fused, unfuse

Make = Callable[[], Any]
BOTH = {"target_modules": ["lin", "other"]}


def close(one: Tensor, other: Tensor) -> None:
    torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


# ---- in place, and back --------------------------------------------------------------------------


def test_fuse_changes_the_class_and_nothing_else() -> None:
    model = adapted(two_layers(), **BOTH)
    state, parameters = model.state_dict(), dict(model.named_parameters())
    attributes = dict(vars(layer(model)))
    assert fuse(model) is model
    assert kinds(model) == ["FusedLinear"] * 2
    assert isinstance(layer(model), lora.Linear)
    assert repr(layer(model)).startswith("lora.Linear[fused_peft](")
    assert vars(layer(model)) == attributes
    after = model.state_dict()
    assert list(after) == list(state)
    assert all(after[key].data_ptr() == value.data_ptr() for key, value in state.items())
    assert all(p is parameters[name] for name, p in model.named_parameters())
    assert fuse(model) is model
    assert kinds(model) == ["FusedLinear"] * 2


def test_unfuse_leaves_peft_s_classes() -> None:
    model = adapted(two_layers(), **BOTH)
    attributes = {name: set(vars(module)) for name, module in model.named_modules()}
    assert unfuse(model) is model  # nothing to do
    fuse(model)
    assert unfuse(unfuse(model)) is model
    assert all(type(m) is lora.Linear for m in model.modules() if isinstance(m, lora.LoraLayer))
    assert {name: set(vars(module)) for name, module in model.named_modules()} == attributes
    model.add_adapter("second", config(**BOTH))
    assert kinds(model) == ["Linear"] * 2


def test_only_plain_linear_layers_are_fused() -> None:
    class Mixed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embedding = nn.Embedding(7, K)
            self.lin = nn.Linear(K, N)
            self.conv = nn.Conv1d(N, 3, 1)

        def forward(self, ids: Tensor) -> Tensor:
            return self.conv(self.lin(self.embedding(ids)).transpose(1, 2))

    torch.manual_seed(0)
    model = adapted(Mixed(), target_modules=["embedding", "lin", "conv"])
    ids = torch.arange(6).view(2, 3)
    expected = model(ids)
    assert kinds(fuse(model)) == ["Embedding", "FusedLinear", "Conv1d"]
    close(model(ids), expected)


class OtherLinear(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * 2.0


def replaced_forward() -> Any:
    model = adapted()
    layer(model).forward = lambda x: x
    return model


def not_a_model() -> Any:
    return 3


def without_peft() -> Any:
    return net()


def only_dora() -> Any:
    return adapted(use_dora=True)


def other_base() -> Any:
    return adapted(Net(OtherLinear(K, N)))


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (not_a_model, TypeError, r"model is a builtins.int; expected a model made by peft.get_pe"),
        (without_peft, TypeError, r"model is a peft_models.Net without any PEFT layer; expected"),
        (with_adalora, ValueError, r"nothing that can be fused. LoRA layers: 1 x a SVDLinear"),
        (only_embedding, ValueError, r"LoRA layers: 1 x a Embedding. Prefix: it is not prefix-tu"),
        (only_dora, ValueError, r"LoRA layers: 1 x a Linear with DoraLinearVariant. Prefix"),
        (other_base, ValueError, r"1 x a Linear whose base layer is a OtherLinear, not a plain"),
        (replaced_forward, ValueError, r"1 x a Linear with a forward of its own"),
        (prompt_tuned, ValueError, r"LoRA layers: none. Prefix: it is not prefix-tuned"),
    ],
)
def test_refusals(make: Make, error: type[Exception], message: str) -> None:
    model = make()
    with pytest.raises(error, match=message):
        fuse(model)
    if isinstance(model, nn.Module):
        assert "FusedLinear" not in kinds(model)
        assert not any("inject_adapter" in vars(module) for module in model.modules())
    if error is TypeError:
        with pytest.raises(error, match=message):
            unfuse(model)


def test_explain_of_an_unfused_layer_says_what_to_do() -> None:
    with pytest.raises(TypeError, match=r"layer is Linear; .*fused_peft.integrations.peft.fuse"):
        explain(layer(adapted()), inputs())


# ---- files and copies ----------------------------------------------------------------------------


def test_saved_files_are_the_same(tmp_path: Path) -> None:
    model = adapted(two_layers(), **BOTH)
    model.save_pretrained(tmp_path / "plain")
    fuse(model).save_pretrained(tmp_path / "fused")
    for name in ("adapter_model.safetensors", "adapter_config.json"):
        one, other = ((tmp_path / kind / name).read_bytes() for kind in ("plain", "fused"))
        assert one == other
    state = model.state_dict()
    other = fuse(adapted(two_layers(seed=1), **BOTH))
    other.load_state_dict(state)
    assert torch.equal(other(inputs()), model(inputs()))


def test_loaded_models(tmp_path: Path) -> None:
    model = adapted(two_layers(), **BOTH)
    model.save_pretrained(tmp_path)
    expected = model(inputs())
    loaded = fuse(peft.PeftModel.from_pretrained(two_layers(), tmp_path))
    close(loaded(inputs()), expected)
    with fused():
        again = peft.PeftModel.from_pretrained(two_layers(), tmp_path, is_trainable=True)
    assert kinds(again) == ["FusedLinear"] * 2
    again.load_adapter(tmp_path, "twin")
    again.set_adapter("twin")
    close(again(inputs()), expected)
    assert in_kernel(again)


@pytest.mark.parametrize("how", ["deepcopy", "pickle", "torch.save"])
@pytest.mark.parametrize("kind", ["lora", "prefix"])
def test_copies(kind: str, how: str) -> None:
    if kind == "lora":
        model, x = fuse(adapted(two_layers(), **BOTH)), inputs()
    else:
        model, x = fuse(prefix_tuned()), prefix_models.tokens()
    expected = model(x)
    if how == "deepcopy":
        other = copy.deepcopy(model)
    elif how == "pickle":
        other = pickle.loads(pickle.dumps(model))  # noqa: S301
    else:
        torch.save(model, stream := io.BytesIO())
        stream.seek(0)
        other = torch.load(stream, weights_only=False)
    with torch.no_grad():  # the copy has nothing in common with the model any more
        for parameter in model.parameters():
            parameter.zero_()
    if kind == "lora":
        assert torch.equal(other(x), expected)
        assert kinds(other) == ["FusedLinear"] * 2
        other.add_adapter("second", config(target_modules=["lin"]))
        assert set(layer(other).lora_A) == {"default", "second"}
        assert set(layer(model).lora_A) == {"default"}
    else:
        assert torch.equal(other(x).logits, expected.logits)
        assert other.get_prompt.args[0] is other
    assert "FusedLinear" not in kinds(unfuse(other))
    assert not any("fused_peft" in name for m in other.modules() for name in vars(m))


def prefix_tuned() -> Any:
    return fill(
        peft.get_peft_model(
            prefix_models.model("llama"),
            peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=5),
        )
    ).eval()


# ---- PEFT's operations ---------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["merge_and_unload", "unload"])
def test_unloading(method: str) -> None:
    model = adapted(two_layers(), **BOTH)
    plain = getattr(copy.deepcopy(model), method)()
    ours = getattr(fuse(model), method)()
    assert [type(m) for m in ours.modules()] == [type(m) for m in plain.modules()]
    for one, other in zip(ours.parameters(), plain.parameters(), strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("combination", ["linear", "cat", "svd"])
def test_weighted_adapters(combination: str) -> None:
    outputs = []
    for fusing in (False, True):
        model = adapted()
        model.add_adapter("second", config(r=8))
        fill(model)
        if fusing:
            fuse(model)
        names, weights = ["default", "second"], [0.5, 2.0]
        model.add_weighted_adapter(names, weights, "mix", combination_type=combination)
        model.set_adapter("mix")
        assert in_kernel(model) if fusing else True
        outputs.append(model(inputs()))
    close(*outputs)


@pytest.mark.parametrize("prepared", [False, True])
def test_hotswap(tmp_path: Path, prepared: bool) -> None:
    """Prepared for a compiled model, PEFT makes tensors of the scalings and pads the ranks."""
    other = adapted(lora_alpha=40, r=4)
    with torch.no_grad():
        layer(other).lora_B["default"].weight.mul_(-2.0)
    other.save_pretrained(tmp_path)
    expected = other(inputs())
    model = adapted()
    first = model(inputs()).detach()
    if prepared:
        prepare_model_for_compiled_hotswap(model, target_rank=8)
        assert isinstance(layer(model).scaling["default"], Tensor)
    fuse(model)
    close(model(inputs()), first)
    hotswap_adapter(model, str(tmp_path), adapter_name="default")
    close(model(inputs()), expected)
    assert in_kernel(model)
    assert not torch.allclose(first, expected, atol=1e-2)


def test_bfloat16_model_with_float32_adapters() -> None:
    model = fuse(adapted(net().bfloat16()))
    x = inputs(8, torch.bfloat16)
    assert layer(model).lora_A["default"].weight.dtype == torch.float32
    assert model(x).dtype == torch.bfloat16
    assert in_kernel(model, x)


def test_mixed_model() -> None:
    mixed = peft.get_peft_model(two_layers(), config(**BOTH), mixed=True)
    mixed.add_adapter("loha", peft.LoHaConfig(target_modules=["other"], init_weights=False))
    mixed.set_adapter(["default", "loha"])
    fill(mixed)
    expected = mixed(inputs())
    fuse(mixed)
    assert in_kernel(mixed)
    close(mixed(inputs()), expected)


def test_together_with_fuse_model() -> None:
    """The model's frozen layers by fuse_model, its adapters by fuse, in either order."""
    for first in ("layers", "adapters"):
        llama = prefix_models.model("llama")
        model = fill(peft.get_peft_model(llama, config(target_modules="all-linear"))).eval()
        arguments = prefix_models.inputs("llama")
        expected = model(**arguments)
        if first == "adapters":
            fuse(model)
        assert fuse_model(llama)["mlp"] == 2
        fuse(model)
        close(model(**arguments).logits, expected.logits)
        unfuse(model)
        unfuse_model(llama)
        assert torch.equal(model(**arguments).logits, expected.logits)


def test_a_transformers_model() -> None:
    llama = prefix_models.model("llama")
    model = fill(peft.get_peft_model(llama, config(target_modules="all-linear"))).eval()
    arguments = {**prefix_models.inputs("llama"), "attention_mask": prefix_models.mask("left")}
    expected = model(**arguments)
    tokens = model.generate(
        input_ids=arguments["input_ids"],
        attention_mask=arguments["attention_mask"],
        max_new_tokens=5,
        do_sample=False,
    )
    fuse(model)
    assert set(kinds(model)) == {"FusedLinear"}
    result = model(**arguments)
    close(result.logits, expected.logits)
    close(result.loss, expected.loss)
    again = model.generate(
        input_ids=arguments["input_ids"],
        attention_mask=arguments["attention_mask"],
        max_new_tokens=5,
        do_sample=False,
    )
    assert torch.equal(again, tokens)
    q = model.get_submodule("base_model.model.model.layers.0.self_attn.q_proj")
    assert explain(q, torch.randn(3, 9, 32)).startswith(f"kernel: cpu {ops._common._C.cpu_isa()}")
