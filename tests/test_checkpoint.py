"""Adapters on disk: round trips, and refusals that change nothing."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from adapter_files import (
    KEY,
    KEY_B,
    PREFIX,
    Net,
    assert_same,
    cut,
    edit_config,
    edit_weights,
    fill,
    lie_about_size,
    make_net,
    set_value,
    snapshot,
    trained,
)
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from fused_peft.checkpoint import CONFIG_NAME, WEIGHTS_NAME, load_adapter, save_adapter
from fused_peft.errors import AdapterError
from fused_peft.nn import LoraLinear
from fused_peft.tuners import (
    LoraConfig,
    add_adapter,
    get_peft_model,
    merge_adapter,
    set_adapter,
)


@pytest.fixture
def x() -> Tensor:
    return torch.randn(5, 8, generator=torch.Generator().manual_seed(3))


# ---- round trips


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"use_rslora": True, "rank_pattern": {"layers.1.q": 2}, "alpha_pattern": {"v": 11}},
        {"bias": "lora_only"},
        {"bias": "all", "modules_to_save": ["head"]},
        {
            "modules_to_save": ["layers.1.norm"],
            "layers_to_transform": [0],
            "layers_pattern": "layers",
        },
        {"target_modules": r".*\.1\.(q|v)", "lora_dropout": 0.5},
        {"target_modules": "all-linear"},
    ],
)
@pytest.mark.parametrize("name", ["default", "other"])
def test_round_trip(tmp_path: Path, x: Tensor, fields: dict[str, Any], name: str) -> None:
    model = trained(**fields)
    wanted = model(x)
    assert (wanted - make_net()(x)).abs().max() > 1e-2
    save_adapter(model, tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == [CONFIG_NAME, WEIGHTS_NAME]
    loaded = make_net().train()
    assert load_adapter(loaded, tmp_path, name) is loaded
    assert torch.equal(loaded(x), wanted)
    assert not loaded.training
    assert not any(p.requires_grad for p in loaded.parameters())


def test_over_an_adapter_that_is_there(tmp_path: Path, x: Tensor) -> None:
    model = trained(seed=1, bias="all", modules_to_save=["head"])
    save_adapter(model, tmp_path)
    other = trained(seed=2, bias="all", modules_to_save=["head"])
    modules = {k: id(m) for k, m in other.named_modules()}
    parameters = {k: id(p) for k, p in other.named_parameters()}
    load_adapter(other, tmp_path, is_trainable=True)
    assert torch.equal(other(x), model(x))
    assert {k: id(m) for k, m in other.named_modules()} == modules
    assert {k: id(p) for k, p in other.named_parameters()} == parameters  # an optimizer holds them


@pytest.mark.parametrize("bias", ["none", "lora_only", "all"])
def test_is_trainable(tmp_path: Path, bias: str) -> None:
    model = trained(bias=bias, modules_to_save=["head"])
    wanted = {k for k, p in model.named_parameters() if p.requires_grad}
    save_adapter(model, tmp_path)
    loaded = load_adapter(make_net().train(), tmp_path, is_trainable=True)
    assert {k for k, p in loaded.named_parameters() if p.requires_grad} == wanted
    assert loaded.training
    load_adapter(loaded, tmp_path)
    assert not any(p.requires_grad for p in loaded.parameters())


def test_named_adapters_have_folders_of_their_own(tmp_path: Path, x: Tensor) -> None:
    model = trained(seed=1)
    add_adapter(model, LoraConfig(target_modules=["v"], r=2, modules_to_save=["head"]), "b")
    set_adapter(model, "b")
    fill(model, 5)
    b_logits = model.eval()(x)
    save_adapter(model, tmp_path)
    save_adapter(model, tmp_path, "b")
    assert sorted(p.name for p in (tmp_path / "b").iterdir()) == [CONFIG_NAME, WEIGHTS_NAME]
    assert not any("layers.0.q" in key for key in load_file(tmp_path / "b" / WEIGHTS_NAME))
    assert not any("head" in key for key in load_file(tmp_path / WEIGHTS_NAME))
    loaded = load_adapter(make_net(), tmp_path)
    load_adapter(loaded, tmp_path / "b", "second")
    set_adapter(model, "default")
    assert torch.equal(loaded(x), model(x))  # the second one is not active
    set_adapter(loaded, "second")
    assert torch.equal(loaded(x), b_logits)


def test_files_are_those_of_the_format(tmp_path: Path) -> None:
    model = trained(bias="all", modules_to_save=["head"], task_type="CAUSAL_LM")
    save_adapter(model, tmp_path)
    text = (tmp_path / CONFIG_NAME).read_text()
    document = json.loads(text)
    assert text == json.dumps(document, indent=2, sort_keys=True)
    assert document["peft_type"] == "LORA"
    assert document["inference_mode"] is True
    assert document["target_modules"] == ["q", "v"]
    assert document["r"] == 4
    assert document["auto_mapping"] is None
    with safe_open(tmp_path / WEIGHTS_NAME, "pt") as file:
        assert file.metadata() == {"format": "pt"}
    tensors = load_file(tmp_path / WEIGHTS_NAME)
    layer = f"{PREFIX}layers.0."
    assert {k for k in tensors if k.startswith(layer)} == {
        f"{layer}q.lora_A.weight",
        f"{layer}q.lora_B.weight",
        f"{layer}q.base_layer.bias",
        f"{layer}v.lora_A.weight",
        f"{layer}v.lora_B.weight",
        f"{layer}norm.bias",
    }
    assert tensors[f"{PREFIX}head.1.num_batches_tracked"].dtype == torch.int64
    assert tensors[f"{layer}q.lora_A.weight"].shape == (4, 8)
    mode = (tmp_path / WEIGHTS_NAME).stat().st_mode
    assert mode == (tmp_path / CONFIG_NAME).stat().st_mode  # not only for their owner


def test_a_model_built_of_lora_linear(tmp_path: Path, x: Tensor) -> None:
    def build() -> nn.Module:
        torch.manual_seed(0)
        inner = nn.Sequential(LoraLinear(8, 8, r=2, lora_alpha=4), nn.Linear(8, 8))
        inner[1].requires_grad_(False)
        return nn.Sequential(LoraLinear(8, 8, r=3, lora_alpha=4), inner)

    model = fill(build(), 1)
    save_adapter(model, tmp_path)
    same = build()
    assert not torch.equal(same(x), model(x))
    load_adapter(same, tmp_path)
    assert torch.equal(same(x), model(x))
    torch.manual_seed(0)
    plain = nn.Sequential(nn.Linear(8, 8), nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8)))
    plain.load_state_dict(model.state_dict(), strict=False)
    load_adapter(plain, tmp_path)
    assert torch.equal(plain(x), model(x))
    assert type(plain[1][1]) is nn.Linear


def test_a_compiled_model(tmp_path: Path, x: Tensor) -> None:
    model = trained()
    save_adapter(torch.compile(model), tmp_path / "a")
    save_adapter(model, tmp_path / "b")
    for name in (CONFIG_NAME, WEIGHTS_NAME):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()
    inside = make_net()
    inside.layers[0] = torch.compile(inside.layers[0], backend="eager")
    load_adapter(torch.compile(inside, backend="eager"), tmp_path / "a")
    save_adapter(inside, tmp_path / "c")
    assert (tmp_path / "c" / WEIGHTS_NAME).read_bytes() == (
        tmp_path / "b" / WEIGHTS_NAME
    ).read_bytes()


def test_dtypes_are_the_models(tmp_path: Path) -> None:
    """An adapter of a bfloat16 model is float32, and stays so whatever the file has."""
    save_adapter(trained(), tmp_path)
    tensors = load_file(tmp_path / WEIGHTS_NAME)
    key = f"{PREFIX}layers.0.q.lora_A.weight"
    half = {k: v.to(torch.bfloat16) for k, v in tensors.items()}
    save_file(half, tmp_path / WEIGHTS_NAME)
    model = load_adapter(make_net(dtype=torch.bfloat16), tmp_path)
    lora_a = model.layers[0].q.lora_A["default"]
    assert lora_a.dtype == torch.float32
    assert torch.equal(lora_a, half[key].float())


def test_tied_weights_are_written_twice(tmp_path: Path) -> None:
    model = make_net()
    model.layers[1].norm.weight = model.layers[0].norm.weight
    get_peft_model(model, LoraConfig(target_modules=["q"], modules_to_save=["norm"]))
    wrappers = [layer.norm.modules_to_save["default"] for layer in model.layers]
    wrappers[1].weight = wrappers[0].weight
    save_adapter(model, tmp_path)
    tensors = load_file(tmp_path / WEIGHTS_NAME)
    for i in range(2):
        assert torch.equal(tensors[f"{PREFIX}layers.{i}.norm.weight"], wrappers[0].weight)


# ---- refusals


DAMAGE: dict[str, tuple[Callable[[Path], None], str]] = {
    "no directory": (shutil.rmtree, "does not exist"),
    "no config": (lambda d: (d / CONFIG_NAME).unlink(), f"has no {CONFIG_NAME}"),
    "empty config": (lambda d: cut(d / CONFIG_NAME, 0), "no JSON"),
    "cut config": (lambda d: cut(d / CONFIG_NAME, 200), "cut off"),
    "binary config": (lambda d: (d / CONFIG_NAME).write_bytes(b"\xff\xfe{}"), "no JSON"),
    "config is a list": (lambda d: (d / CONFIG_NAME).write_text("[1]"), "JSON object"),
    "another peft_type": (lambda d: edit_config(d, peft_type="LOHA"), "peft_type is 'LOHA'"),
    "no peft_type": (lambda d: edit_config(d, peft_type=None), "peft_type is None"),
    "dora": (lambda d: edit_config(d, use_dora=True), "use_dora"),
    "rank 0": (lambda d: edit_config(d, r=0), "r is 0"),
    "rank of the wrong type": (lambda d: edit_config(d, r="8"), "r is '8'"),
    "no weights": (lambda d: (d / WEIGHTS_NAME).unlink(), f"has no {WEIGHTS_NAME}"),
    "only pickle": (
        lambda d: (d / WEIGHTS_NAME).rename(d / "adapter_model.bin"),
        "pickle.*save_pretrained",
    ),
    "empty weights": (lambda d: cut(d / WEIGHTS_NAME, 0), "cut off or damaged"),
    "weights cut in the header": (lambda d: cut(d / WEIGHTS_NAME, 100), "cut off or damaged"),
    "weights cut in the tensors": (lie_about_size, "cut off or damaged"),
    "weights are no safetensors": (
        lambda d: (d / WEIGHTS_NAME).write_bytes(b"PK\x03\x04" * 500),
        "cut off or damaged",
    ),
    "missing key": (lambda d: edit_weights(d, lambda t: t.pop(KEY)), f"missing {KEY}"),
    "extra key": (
        lambda d: edit_weights(d, lambda t: t.update({"extra": torch.ones(1)})),
        "unexpected extra",
    ),
    "wrong rank of one tensor": (
        lambda d: edit_weights(d, lambda t: t.update({KEY: torch.ones(3, 8)})),
        r"layers\.0\.q\.lora_A\.weight \[3, 8\], expected \[4, 8\] \(rank 3, not 4\)",
    ),
    "rank unlike the config's": (lambda d: edit_config(d, r=5), r"r is 5|rank 4, not 5"),
    "wrong width": (
        lambda d: edit_weights(d, lambda t: t.update({KEY: torch.ones(4, 9)})),
        r"\[4, 9\], expected \[4, 8\]",
    ),
    "flat": (
        lambda d: edit_weights(d, lambda t: t.update({KEY: torch.ones(32)})),
        r"\[32\], expected \[4, 8\]",
    ),
    "integers": (
        lambda d: edit_weights(d, lambda t: t.update({KEY: torch.ones(4, 8, dtype=torch.int32)})),
        "is torch.int32, expected torch.float32",
    ),
    "NaN": (lambda d: edit_weights(d, set_value(KEY_B, float("nan"))), f"{KEY_B} in .* NaN"),
    "infinity": (lambda d: edit_weights(d, set_value(KEY_B, float("-inf"))), f"{KEY_B} in .* inf"),
}


@pytest.mark.parametrize("case", DAMAGE)
@pytest.mark.parametrize("there_already", [False, True])
def test_a_damaged_adapter_changes_nothing(tmp_path: Path, case: str, there_already: bool) -> None:
    directory = tmp_path / "adapter"
    save_adapter(trained(seed=1), directory)
    damage, message = DAMAGE[case]
    damage(directory)
    model = (trained(seed=2) if there_already else make_net()).train()
    before = snapshot(model)
    with pytest.raises(AdapterError, match=message):
        load_adapter(model, directory)
    assert_same(before, snapshot(model))


def test_a_pickle_beside_safetensors_is_not_read(tmp_path: Path, x: Tensor) -> None:
    model = trained()
    save_adapter(model, tmp_path)
    (tmp_path / "adapter_model.bin").write_bytes(b"cos\nsystem\n(S'exit 1'\ntR.")
    assert torch.equal(load_adapter(make_net(), tmp_path)(x), model(x))


def test_the_folder_above_named_adapters(tmp_path: Path) -> None:
    save_adapter(get_peft_model(make_net(), LoraConfig(target_modules=["q"]), "b"), tmp_path, "b")
    with pytest.raises(AdapterError, match=r"has no adapter_config\.json.* in its folders b"):
        load_adapter(make_net(), tmp_path)


def test_a_merged_adapter_is_not_overwritten(tmp_path: Path) -> None:
    model = trained()
    save_adapter(model, tmp_path)
    merge_adapter(model)
    before = snapshot(model)
    with pytest.raises(ValueError, match=r"'default' is merged into layers\.0\.q"):
        load_adapter(model, tmp_path)
    assert_same(before, snapshot(model))
    save_adapter(model, tmp_path / "merged")
    one, two = load_file(tmp_path / WEIGHTS_NAME), load_file(tmp_path / "merged" / WEIGHTS_NAME)
    assert all(torch.equal(one[key], two[key]) for key in one.keys() | two.keys())


def test_a_model_on_the_meta_device(tmp_path: Path) -> None:
    save_adapter(trained(), tmp_path)
    with torch.device("meta"):
        model = Net()
    with pytest.raises(ValueError, match="meta device"):
        load_adapter(model, tmp_path)
    assert not hasattr(model, "fused_peft_config")


def test_unknown_config_keys_are_dropped_with_a_warning(tmp_path: Path, x: Tensor) -> None:
    model = trained()
    save_adapter(model, tmp_path)
    edit_config(tmp_path, a_field_of_the_future=1)
    loaded = make_net()
    with pytest.warns(UserWarning, match="a_field_of_the_future"):
        load_adapter(loaded, tmp_path)
    assert torch.equal(loaded(x), model(x))


def test_a_target_that_this_model_lacks(tmp_path: Path, x: Tensor) -> None:
    """PEFT asks only that one entry of target_modules matches."""
    model = trained()
    save_adapter(model, tmp_path)
    edit_config(tmp_path, target_modules=["q", "v", "query_key_value"])
    assert torch.equal(load_adapter(make_net(), tmp_path)(x), model(x))


@pytest.mark.parametrize("name", ["nobody", "defaul"])
def test_saving_an_adapter_that_is_not_there(tmp_path: Path, name: str) -> None:
    with pytest.raises(ValueError, match=rf"{name}.*\['default'\]"):
        save_adapter(trained(), tmp_path / "new", name)
    assert not (tmp_path / "new").exists()


def test_saving_onto_a_file_or_with_nan(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    model = trained()
    with pytest.raises(AdapterError, match="is a file"):
        save_adapter(model, tmp_path / "file")
    save_adapter(model, tmp_path / "good")
    before = (tmp_path / "good" / WEIGHTS_NAME).read_bytes()
    with torch.no_grad():
        model.layers[0].q.lora_B["default"][0, 0] = float("nan")
    with pytest.raises(AdapterError, match=r"layers\.0\.q\.lora_B\.weight has NaN"):
        save_adapter(model, tmp_path / "good")
    assert (tmp_path / "good" / WEIGHTS_NAME).read_bytes() == before
    assert (tmp_path / "file").read_text() == "mine"


def test_a_name_that_would_leave_the_directory(tmp_path: Path) -> None:
    model = get_peft_model(make_net(), LoraConfig(target_modules=["q"]), "a/b")
    with pytest.raises(ValueError, match="'a/b'"):
        save_adapter(model, tmp_path, "a/b")
    assert list(tmp_path.iterdir()) == []
