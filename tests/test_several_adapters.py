"""Several adapters on one model, modules_to_save, merging and disabling."""

from __future__ import annotations

import copy
import math
import re

import pytest
import torch
from torch import nn
from tuner_models import (
    Tiny,
    ids,
    llama,
    llama_classifier,
    logits,
    lora_layers,
    peft_twin,
    randomize,
    state,
    tiny,
    trainable,
)

from fused_peft import (
    LoraConfig,
    LoraLinear,
    add_adapter,
    delete_adapter,
    disable_adapter,
    get_nb_trainable_parameters,
    get_peft_model,
    merge_adapter,
    print_trainable_parameters,
    set_adapter,
    unmerge_adapter,
)
from fused_peft.tuners import ModulesToSaveWrapper, active_adapters

# ---- several adapters


def two_adapters() -> Tiny:
    model = get_peft_model(tiny(), LoraConfig(target_modules=["q_proj"]), "first")
    add_adapter(model, LoraConfig(r=4, target_modules=["q_proj", "v_proj"]), "second")
    randomize(model)
    return model


def test_a_further_adapter_waits() -> None:
    model = get_peft_model(tiny(), LoraConfig(target_modules=["q_proj"]), "first")
    randomize(model)
    expected, flags = logits(model, ids()), trainable(model)
    add_adapter(model, LoraConfig(r=4, target_modules=["q_proj", "v_proj"]), "second")
    randomize(model)
    assert list(model.fused_peft_config) == ["first", "second"]
    assert active_adapters(model) == ["first"]
    assert trainable(model) == flags
    torch.testing.assert_close(logits(model, ids()), expected)
    assert model.q_proj.r == {"first": 8, "second": 4}
    assert model.layers[0].v_proj.r == {"second": 4}
    assert not any(p.requires_grad for p in model.layers[0].v_proj.parameters())


def test_a_further_adapter_freezes_the_weights_it_is_put_over() -> None:
    model = get_peft_model(tiny(), LoraConfig(target_modules=["q_proj"]))
    model.score.requires_grad_(True)
    model.embed.requires_grad_(True)
    model.conv.requires_grad_(True)
    config = LoraConfig(target_modules=["score"], modules_to_save=["conv"])
    add_adapter(model, config, "other")
    assert not model.score.weight.requires_grad
    assert not any(p.requires_grad for p in model.conv.parameters())
    assert model.embed.weight.requires_grad  # as the user set it


def test_set_adapter() -> None:
    model = two_adapters()
    first = logits(model, ids())
    set_adapter(model, "second")
    assert active_adapters(model) == ["second"]
    assert all(name.endswith(".second") for name in trainable(model))
    assert len(trainable(model)) == 2 * (4 + 3)
    second = logits(model, ids())
    assert (first - second).abs().max() > 1e-3
    set_adapter(model, ["first", "second"])
    assert len(trainable(model)) == 2 * (4 + 4 + 3)
    both = logits(model, ids())
    assert min((both - first).abs().max(), (both - second).abs().max()) > 1e-3
    set_adapter(model, "first", inference_mode=True)
    assert trainable(model) == set()
    torch.testing.assert_close(logits(model, ids()), first)
    before = state(model)
    with pytest.raises(ValueError, match=r"'frst' is unknown.*near matches: first"):
        set_adapter(model, ["second", "frst"])
    with pytest.raises(ValueError, match="each adapter once"):
        set_adapter(model, ["second", "second"])
    assert state(model) == before
    assert active_adapters(model) == ["first"]


def test_set_adapter_equals_peft() -> None:
    peft = pytest.importorskip("peft")
    model = tiny()
    ours = get_peft_model(copy.deepcopy(model), LoraConfig(target_modules=["q_proj"]), "first")
    add_adapter(ours, LoraConfig(r=4, target_modules=["q_proj", "v_proj"]), "second")
    randomize(ours)
    theirs = peft.get_peft_model(model, peft.LoraConfig(target_modules=["q_proj"]), "first")
    theirs.add_adapter("second", peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj"]))
    for path, layer in lora_layers(ours).items():
        twin = theirs.base_model.model.get_submodule(path)
        for name in layer.r:
            twin.lora_A[name].weight.data.copy_(layer.lora_A[name])
            twin.lora_B[name].weight.data.copy_(layer.lora_B[name])
    for active in ("first", "second", ["first", "second"]):
        set_adapter(ours, active)
        theirs.base_model.set_adapter(active)
        torch.testing.assert_close(logits(ours, ids()), logits(theirs, ids()))
        assert get_nb_trainable_parameters(ours) == theirs.get_nb_trainable_parameters()


def test_inference_mode_trains_nothing() -> None:
    config = LoraConfig(
        target_modules=["q_proj"], inference_mode=True, bias="all", modules_to_save=["score"]
    )
    model = get_peft_model(tiny(), config)
    assert trainable(model) == set()
    assert active_adapters(model) == ["default"]


def test_delete_adapter() -> None:
    model = two_adapters()
    set_adapter(model, "second")
    expected = logits(model, ids())
    delete_adapter(model, "first")
    assert list(model.fused_peft_config) == ["second"]
    torch.testing.assert_close(logits(model, ids()), expected)
    add_adapter(model, LoraConfig(target_modules=["score"]), "third")
    merge_adapter(model)
    with pytest.raises(ValueError, match="'second' is merged"):
        delete_adapter(model, "second")
    unmerge_adapter(model)
    with pytest.warns(UserWarning, match="now 'third' is"):
        delete_adapter(model, "second")
    assert active_adapters(model) == ["third"]
    assert trainable(model) == {"score.lora_A.third", "score.lora_B.third"}
    delete_adapter(model, "third")
    torch.testing.assert_close(logits(model, ids()), logits(tiny(), ids()))
    with pytest.raises(ValueError, match="'third' is unknown"):
        delete_adapter(model, "third")
    get_peft_model(model, LoraConfig(target_modules=["q_proj"]), "fourth")
    assert active_adapters(model) == ["fourth"]


def test_deleting_one_of_two_active_activates_no_third() -> None:
    model = two_adapters()
    add_adapter(model, LoraConfig(target_modules=["v_proj"]), "third")
    set_adapter(model, ["first", "second"])
    delete_adapter(model, "second")
    assert active_adapters(model) == ["first"]
    assert trainable(model) == {n for n in trainable(model) if n.endswith(".first")}


def test_one_adapter_with_biases() -> None:
    model = get_peft_model(tiny(), LoraConfig(target_modules=["q_proj"], bias="lora_only"))
    biases = {n for n in trainable(model) if n.endswith("bias")}
    assert biases == {"q_proj.bias", *(f"layers.{i}.q_proj.bias" for i in range(3))}
    before = state(model)
    with pytest.raises(ValueError, match="bias is 'all' and adapter 'default' trains biases"):
        add_adapter(model, LoraConfig(target_modules=["q_proj"], bias="all"), "other")
    assert state(model) == before
    add_adapter(model, LoraConfig(target_modules=["v_proj"]), "other")
    set_adapter(model, "other")
    assert not any(n.endswith("bias") for n in trainable(model))
    set_adapter(model, "default")
    assert biases <= trainable(model)
    logits_of = model(ids()).sum()
    logits_of.backward()
    assert model.layers[0].q_proj.bias.grad.abs().sum() > 0
    with pytest.warns(UserWarning, match="bias='lora_only'"), disable_adapter(model):
        pass
    set_adapter(model, "other")
    delete_adapter(model, "default")
    assert not any(n.endswith("bias") for n in trainable(model))


# ---- modules_to_save


def test_modules_to_save() -> None:
    model = tiny()
    base = logits(model, ids())
    head = model.score
    get_peft_model(model, LoraConfig(target_modules=["q_proj"], modules_to_save=["score"]))
    assert isinstance(model.score, ModulesToSaveWrapper)
    assert model.score.original_module is head
    assert {n for n in trainable(model) if "score" in n} == {
        "score.modules_to_save.default.weight",
        "score.modules_to_save.default.bias",
    }
    assert model.score.weight is model.score.modules_to_save["default"].weight
    assert model.score.out_features == 3
    with pytest.raises(AttributeError, match="nothing_like_it"):
        model.score.nothing_like_it  # noqa: B018
    torch.testing.assert_close(logits(model, ids()), base)
    with torch.no_grad():
        model.score.weight.add_(1)
    assert (logits(model, ids()) - base).abs().max() > 1e-2
    with disable_adapter(model):
        torch.testing.assert_close(logits(model, ids()), base)
    copied = copy.deepcopy(model)
    torch.testing.assert_close(logits(copied, ids()), logits(model, ids()))


def test_modules_to_save_of_several_adapters() -> None:
    model = tiny()
    base = logits(model, ids())
    config = LoraConfig(target_modules=["q_proj"], modules_to_save=["score"])
    get_peft_model(model, config, "first")
    with torch.no_grad():
        model.score.weight.add_(1)
    first = logits(model, ids())
    add_adapter(model, config, "second")
    add_adapter(model, LoraConfig(target_modules=["v_proj"]), "bare")
    torch.testing.assert_close(logits(model, ids()), first)
    set_adapter(model, "second")
    torch.testing.assert_close(logits(model, ids()), base)  # a copy of the original, not of first
    assert {n for n in trainable(model) if "score" in n} == {
        "score.modules_to_save.second.weight",
        "score.modules_to_save.second.bias",
    }
    with pytest.raises(ValueError, match=r"'score' \(modules_to_save\)"):
        set_adapter(model, ["first", "second"])
    assert active_adapters(model) == ["second"]
    set_adapter(model, ["bare", "first"])
    torch.testing.assert_close(logits(model, ids()), first)
    set_adapter(model, "bare")
    torch.testing.assert_close(logits(model, ids()), base)
    delete_adapter(model, "first")
    assert list(model.score.modules_to_save) == ["second"]
    with pytest.raises(ValueError, match="'first' has no copy"):
        model.score.set_adapter("first")
    with pytest.raises(ValueError, match="'first' has no copy"):
        model.score.delete_adapter("first")
    with pytest.raises(ValueError, match="has a copy"):
        model.score.add_adapter("second", nn.Linear(8, 3))


def test_a_task_s_head_is_saved() -> None:
    model = get_peft_model(llama_classifier(), LoraConfig(task_type="SEQ_CLS"))
    assert isinstance(model.score, ModulesToSaveWrapper)
    assert "score.modules_to_save.default.weight" in trainable(model)


def test_an_adapted_module_is_not_saved_too() -> None:
    model = get_peft_model(tiny(), LoraConfig(target_modules=["score"]))
    before = state(model)
    with pytest.raises(TypeError, match="modules_to_save names 'score', which has adapters"):
        add_adapter(model, LoraConfig(target_modules=["q_proj"], modules_to_save=["score"]), "b")
    assert state(model) == before
    saved = LoraConfig(target_modules=["q_proj"], modules_to_save=["score"])
    model = get_peft_model(tiny(), saved)
    before = state(model)
    with pytest.raises(TypeError, match=r"'score' is a .*ModulesToSaveWrapper"):
        add_adapter(model, LoraConfig(target_modules=["score"]), "b")
    assert state(model) == before


# ---- merging and disabling a model


def test_merge_of_some_adapters() -> None:
    model = two_adapters()
    set_adapter(model, ["first", "second"])
    both = logits(model, ids())
    merge_adapter(model, adapter_names=["second"])
    assert model.q_proj.merged_adapters == ["second"]
    assert model.layers[0].v_proj.merged_adapters == ["second"]
    merge_adapter(model)
    torch.testing.assert_close(logits(model, ids()), both)
    with pytest.warns(UserWarning, match="merged already"):
        merge_adapter(model)
    unmerge_adapter(model)
    torch.testing.assert_close(logits(model, ids()), both)
    with pytest.warns(UserWarning, match="no adapter is merged"):
        unmerge_adapter(model)
    with pytest.raises(ValueError, match="'thrid' is unknown"):
        merge_adapter(model, adapter_names=["thrid"])
    with pytest.raises(TypeError, match="adapter_names is 'first'"):
        merge_adapter(model, adapter_names="first")


def test_safe_merge_changes_all_layers_or_none() -> None:
    model = get_peft_model(tiny(), LoraConfig(target_modules=["q_proj"]))
    randomize(model)
    with torch.no_grad():
        model.q_proj.lora_B["default"][0, 0] = math.nan  # the last layer that is merged
    before = state(model)
    with pytest.raises(ValueError, match=r"'q_proj': merging adapters .* NaN or infinity"):
        merge_adapter(model, safe=True)
    assert state(model) == before
    assert not any(layer.merged for layer in lora_layers(model).values())


def test_disable_adapter_restores_what_was() -> None:
    model = get_peft_model(tiny(), LoraConfig(target_modules=["q_proj"]))
    randomize(model)
    adapted, base = logits(model, ids()), logits(tiny(), ids())
    model.q_proj.enable_adapters(False)
    with disable_adapter(model):
        with disable_adapter(model):
            torch.testing.assert_close(logits(model, ids()), base)
        torch.testing.assert_close(logits(model, ids()), base)
    with pytest.raises(RuntimeError, match="inside"), disable_adapter(model):
        raise RuntimeError("inside")
    assert not model.q_proj.adapters_enabled
    assert model.layers[0].q_proj.adapters_enabled
    model.q_proj.enable_adapters(True)
    torch.testing.assert_close(logits(model, ids()), adapted)
    merge_adapter(model)
    with disable_adapter(model):
        torch.testing.assert_close(logits(model, ids()), base)
    torch.testing.assert_close(logits(model, ids()), adapted)


def test_a_model_without_adapters_is_refused() -> None:
    model = tiny()
    for action in (merge_adapter, unmerge_adapter):
        with pytest.raises(ValueError, match="Tiny has no adapter"):
            action(model)
    with pytest.raises(ValueError, match="Tiny has no adapter"), disable_adapter(model):
        pass
    with pytest.raises(ValueError, match="'default' is unknown"):
        set_adapter(model, "default")


def test_layers_put_in_by_hand_are_driven_too() -> None:
    model = nn.Sequential(LoraLinear(4, 4), nn.ReLU(), LoraLinear(4, 2))
    randomize(model)
    x = torch.randn(3, 4)
    expected = model(x)
    merge_adapter(model)
    torch.testing.assert_close(model(x), expected)
    unmerge_adapter(model)
    add_adapter(model, LoraConfig(target_modules=["0"]), "other")
    set_adapter(model, "other")
    assert trainable(model) == {"0.lora_A.other", "0.lora_B.other"}
    with pytest.raises(ValueError, match="adapter_name is 'default'"):
        get_peft_model(model, LoraConfig(target_modules=["0"]))


def test_print_trainable_parameters(capsys: pytest.CaptureFixture[str]) -> None:
    model = llama()
    ours = get_peft_model(copy.deepcopy(model), LoraConfig(r=4))
    print_trainable_parameters(ours)
    printed = capsys.readouterr().out
    peft_twin(model, ours, {}).print_trainable_parameters()
    assert printed == capsys.readouterr().out
    assert re.fullmatch(r"trainable params: \d[\d,]* \|\| all params: .*%: \d+\.\d{4}\n", printed)
