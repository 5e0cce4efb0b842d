"""Adapters on disk: round trips, refusals that change nothing, and saves that are killed."""

from __future__ import annotations

import copy
import errno
import json
import os
import shutil
import struct
import subprocess
import sys
import tempfile
import textwrap
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
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


# ---- what else is in the directory, and failures while saving


def test_other_files_survive(tmp_path: Path) -> None:
    model = trained(seed=1)
    save_adapter(model, tmp_path)
    kept = {"README.md": "card", "checkpoint-5/optimizer.pt": "big", "b/adapter_config.json": "{}"}
    for name, content in kept.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(content)
    identity = (tmp_path.stat().st_ino, (tmp_path / "README.md").stat().st_ino)
    save_adapter(trained(seed=2), tmp_path)
    assert {name: (tmp_path / name).read_text() for name in kept} == kept
    assert (tmp_path.stat().st_ino, (tmp_path / "README.md").stat().st_ino) == identity
    names = sorted(p.name for p in tmp_path.iterdir())
    assert names == ["README.md", CONFIG_NAME, WEIGHTS_NAME, "b", "checkpoint-5"]


def test_links_of_the_user_are_replaced_not_written_through(tmp_path: Path, x: Tensor) -> None:
    """A Hugging Face cache holds links to files that other snapshots share."""
    save_adapter(trained(seed=1), tmp_path / "blobs")
    before = (tmp_path / "blobs" / WEIGHTS_NAME).read_bytes()
    (tmp_path / "snapshot").mkdir()
    for name in (CONFIG_NAME, WEIGHTS_NAME):
        (tmp_path / "snapshot" / name).symlink_to(f"../blobs/{name}")
    model = trained(seed=2)
    save_adapter(model, tmp_path / "snapshot")
    assert torch.equal(load_adapter(make_net(), tmp_path / "snapshot")(x), model(x))
    assert not (tmp_path / "snapshot" / WEIGHTS_NAME).is_symlink()
    assert (tmp_path / "blobs" / WEIGHTS_NAME).read_bytes() == before


# Runs in a process of its own: forks a child for every point at which to kill. The audit hook sees
# each file operation of Python before it is done; the n-th of them is not done any more.
DRIVER = """
import errno, os, pathlib, shutil, signal, sys, time, random
sys.path.insert(0, {tests!r})
from test_checkpoint import trained
from fused_peft.checkpoint import save_adapter

mode, root = sys.argv[1], pathlib.Path(sys.argv[2])
EVENTS = {{"open", "os.rename", "os.symlink", "os.link", "os.mkdir", "os.remove", "os.rmdir",
          "os.chmod", "shutil.rmtree", "shutil.copyfile"}}
state = {{"left": None}}

def hook(event, arguments):
    if state["left"] is not None and event in EVENTS:
        if state["left"] == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        state["left"] -= 1

sys.addaudithook(hook)
os.fsync = lambda descriptor: None  # a kill, unlike a power failure, loses no write that was made
if mode == "no-links":
    def refuse(*arguments, **keywords):
        raise OSError(errno.EPERM, "no links here")
    os.symlink = refuse
    os.link = refuse

def in_child(work):
    pid = os.fork()
    if pid == 0:
        try:
            work()
        finally:
            os._exit(0)
    return os.waitpid(pid, 0)[1]

old, new = trained(seed=1), trained(seed=2, r=6, lora_alpha=5)

def killed_at(directory, n):
    def work():
        state["left"] = n
        save_adapter(new, directory)
    return in_child(work)

for start in ("old", "nothing"):
    n = 0
    while True:
        directory = root / f"{{start}}-{{n}}"
        directory.mkdir()
        (directory / "README.md").write_text("card")
        if start == "old":
            save_adapter(old, directory)
        status = killed_at(directory, n)
        if not os.WIFSIGNALED(status):
            assert status == 0, status
            break
        # Killed again while the next save tidies up what the first one left.
        if n % 3 == 2:
            killed_at(directory, 5 + n % 7)
        n += 1
    print(start, n, flush=True)

# Not before a file operation but at any instant, in the middle of a write as well.
random.seed(0)
directory = root / "instants"
save_adapter(old, directory)
began = time.perf_counter()
for adapter in (old, new, old):
    save_adapter(adapter, directory)
each = min((time.perf_counter() - began) / 3, 0.05)
for attempt in range(40):
    pid = os.fork()
    if pid == 0:
        while True:
            save_adapter(new, directory)
            save_adapter(old, directory)
    time.sleep(random.uniform(0.0, 6 * each))
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    shutil.copytree(directory, root / f"instant-{{attempt}}", symlinks=True)
shutil.rmtree(directory)
"""


def kill_all_over(mode: str, root: Path) -> dict[str, int]:
    """Directories as kills left them, in ``root``; how many points there were, by start."""
    code = textwrap.dedent(DRIVER).format(tests=str(Path(__file__).parent))
    done = subprocess.run(
        [sys.executable, "-c", code, mode, str(root)], capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    return {start: int(n) for start, n in (line.split() for line in done.stdout.splitlines())}


def read_plainly(directory: Path) -> tuple[dict[str, Any], dict[str, Tensor]] | None:
    """What a reader that knows nothing of this package finds; None where there is no adapter."""
    if not (directory / CONFIG_NAME).exists() and not (directory / WEIGHTS_NAME).exists():
        return None
    return (
        json.loads((directory / CONFIG_NAME).read_text()),
        load_file(directory / WEIGHTS_NAME),
    )


def which(directory: Path, outputs: dict[str, Tensor], x: Tensor) -> str:
    """Which adapter load_adapter gives, bit for bit."""
    model = make_net()
    try:
        load_adapter(model, directory)
    except AdapterError as caught:
        error = str(caught)
    else:
        error = ""
    if error:
        assert f"has no {CONFIG_NAME}" in error, directory.name
        return "nothing"
    y = model(x)
    found = [name for name, output in outputs.items() if torch.equal(y, output)]
    assert len(found) == 1, directory.name
    return found[0]


@pytest.fixture
def no_sync(monkeypatch: pytest.MonkeyPatch) -> None:
    """Flushing matters for a power failure, which these tests do not cause, and takes long."""
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)


@pytest.fixture
def in_memory(tmp_path: Path) -> Iterator[Path]:
    """A directory in memory where there is one: a kill leaves the same there, and no disk waits."""
    memory = Path("/dev/shm")
    if not (memory.is_dir() and os.access(memory, os.W_OK)):
        yield tmp_path
        return
    with tempfile.TemporaryDirectory(dir=memory) as directory:
        yield Path(directory)


@pytest.fixture
def outputs(x: Tensor) -> dict[str, Tensor]:
    return {"old": trained(seed=1)(x), "new": trained(seed=2, r=6, lora_alpha=5)(x)}


@pytest.mark.skipif(sys.platform == "win32", reason="needs fork and SIGKILL")
@pytest.mark.usefixtures("no_sync")
@pytest.mark.parametrize("mode", ["links", "no-links"])
def test_killed_at_every_file_operation(
    in_memory: Path, x: Tensor, outputs: dict[str, Tensor], mode: str
) -> None:
    points = kill_all_over(mode, in_memory)
    assert points["old"] >= 20
    assert points["nothing"] >= 15
    seen: dict[str, set[str]] = {"old": set(), "nothing": set(), "instant": set()}
    for directory in sorted(in_memory.iterdir()):
        start = directory.name.split("-")[0]
        if mode == "links":
            plain = read_plainly(directory)
            if plain is not None:
                document, tensors = plain
                r = document["r"]
                assert document["lora_alpha"] == {4: 6, 6: 5}[r]
                assert tensors[KEY].shape == (r, 8), directory.name
        before = which(directory, outputs, x)
        seen[start].add(before)
        if start != "instant":
            assert (directory / "README.md").read_text() == "card"
        # The next save tidies up, whatever the killed one left.
        save_adapter(trained(seed=1), directory)
        left = {p.name for p in directory.iterdir()} - {"README.md"}
        assert left == {CONFIG_NAME, WEIGHTS_NAME}
        assert not any(p.is_symlink() for p in directory.iterdir())
        assert which(directory, outputs, x) == "old"
    assert seen["old"] == {"old", "new"}
    assert seen["nothing"] == {"nothing", "new"}
    assert seen["instant"] == {"old", "new"}


@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="reads names of descriptors there")
@pytest.mark.parametrize("links", [True, False], ids=["links", "no-links"])
def test_each_step_is_on_disk_before_the_next(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, links: bool
) -> None:
    """The order that a power failure must not undo: flush, link, flush, commit, flush, unlink."""
    save_adapter(trained(seed=1), tmp_path)
    steps: list[str] = []

    def short(path: object) -> str:
        return str(Path(str(path)).relative_to(tmp_path)).replace(".fused_peft_save", "S")

    def record_sync(descriptor: int, original: Callable[[int], None] = os.fsync) -> None:
        steps.append(f"sync {short(Path(f'/proc/self/fd/{descriptor}').readlink())}")
        original(descriptor)

    def record_rename(
        source: Path, target: Path, original: Callable[[Path, Path], Path] = Path.replace
    ) -> Path:
        steps.append(f"{short(source)} -> {short(target)}")
        return original(source, target)

    def record_touch(path: Path, original: Callable[[Path], None] = Path.touch) -> None:
        steps.append(f"touch {short(path)}")
        original(path)

    def refuse(*arguments: object, **keywords: object) -> None:
        raise OSError(errno.EPERM, "no links here")

    monkeypatch.setattr(os, "fsync", record_sync)
    monkeypatch.setattr(Path, "replace", record_rename)
    monkeypatch.setattr(Path, "touch", record_touch)
    if not links:
        monkeypatch.setattr(Path, "symlink_to", refuse)
    save_adapter(trained(seed=2), tmp_path)
    first = steps.index(f"S/{CONFIG_NAME} -> {CONFIG_NAME}" if links else "touch S/committed")
    assert {f"sync S/new/{CONFIG_NAME}", f"sync S/new/{WEIGHTS_NAME}"} <= set(steps[:first])
    assert {"sync S/new", "sync S/old", "sync S", "sync ."} <= set(steps[:first])
    switch = [
        f"S/{CONFIG_NAME} -> {CONFIG_NAME}",
        f"S/{WEIGHTS_NAME} -> {WEIGHTS_NAME}",
        "sync .",
        "S/next -> S/current",
    ]
    assert steps[first:] == [
        *(switch if links else ["touch S/committed"]),
        "sync S",
        f"S/new/{CONFIG_NAME} -> {CONFIG_NAME}",
        f"S/new/{WEIGHTS_NAME} -> {WEIGHTS_NAME}",
        "sync .",
    ]


FULL_DISK = """
import pathlib, resource, sys
sys.path.insert(0, {tests!r})
from test_checkpoint import trained
from fused_peft.checkpoint import save_adapter
# Every write past this size fails as on a full disk, in Python and in safetensors alike.
resource.setrlimit(resource.RLIMIT_FSIZE, ({limit}, {limit}))
try:
    save_adapter(trained(seed=2, r=6, lora_alpha=5), pathlib.Path({directory!r}))
except OSError as error:
    print(type(error).__name__, error)
"""


@pytest.mark.skipif(sys.platform == "win32", reason="needs resource limits")
@pytest.mark.parametrize("full_in", [CONFIG_NAME, WEIGHTS_NAME])
def test_a_full_disk(tmp_path: Path, x: Tensor, outputs: dict[str, Tensor], full_in: str) -> None:
    save_adapter(trained(seed=1), tmp_path)
    before = {p.name: p.read_bytes() for p in tmp_path.iterdir()}
    limit = len(before[full_in]) - 10
    if full_in == WEIGHTS_NAME:
        assert len(before[CONFIG_NAME]) + 10 < limit
    tests = str(Path(__file__).parent)
    code = FULL_DISK.format(tests=tests, limit=limit, directory=str(tmp_path))
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300)
    assert "File too large" in done.stdout, done.stdout + done.stderr
    assert {p.name: p.read_bytes() for p in tmp_path.iterdir()} == before
    assert which(tmp_path, outputs, x) == "old"


@pytest.mark.parametrize("failing", range(7))
def test_a_rename_that_fails(
    tmp_path: Path,
    x: Tensor,
    outputs: dict[str, Tensor],
    monkeypatch: pytest.MonkeyPatch,
    failing: int,
) -> None:
    """The error comes out; the adapter is whole, and nothing is left to trip the next save."""
    save_adapter(trained(seed=1), tmp_path)
    left = [failing]

    def replace(
        source: Path, target: Path, original: Callable[[Path, Path], Path] = Path.replace
    ) -> Path:
        left[0] -= 1
        if left[0] == -1:
            raise OSError(errno.EIO, "the disk broke")
        return original(source, target)

    monkeypatch.setattr(Path, "replace", replace)
    renames = 5
    if failing < renames:
        with pytest.raises(OSError, match="the disk broke"):
            save_adapter(trained(seed=2, r=6, lora_alpha=5), tmp_path)
    else:
        save_adapter(trained(seed=2, r=6, lora_alpha=5), tmp_path)
    commit = 2
    assert which(tmp_path, outputs, x) == ("old" if failing <= commit else "new")
    assert sorted(p.name for p in tmp_path.iterdir()) == [CONFIG_NAME, WEIGHTS_NAME]
    assert not any(p.is_symlink() for p in tmp_path.iterdir())


@pytest.mark.skipif(sys.platform == "win32", reason="needs flock")
@pytest.mark.usefixtures("no_sync")
def test_savers_and_loaders_at_once(in_memory: Path, x: Tensor, outputs: dict[str, Tensor]) -> None:
    models = [trained(seed=1), trained(seed=2, r=6, lora_alpha=5)]
    save_adapter(models[0], in_memory)
    stop = threading.Event()

    def save_again_and_again(model: nn.Module) -> int:
        count = 0
        while not stop.is_set():
            save_adapter(model, in_memory)
            count += 1
        return count

    with ThreadPoolExecutor(2) as pool:
        savers = [pool.submit(save_again_and_again, model) for model in models]
        try:
            found = [which(in_memory, outputs, x) for _ in range(40)]
        finally:
            stop.set()
        assert all(saver.result() > 0 for saver in savers)
    assert set(found) == {"old", "new"}
    assert sorted(p.name for p in in_memory.iterdir()) == [CONFIG_NAME, WEIGHTS_NAME]
