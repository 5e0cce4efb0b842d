"""Files of prefixes and prompts that are damaged, do not fit, or were left by a killed save."""

from __future__ import annotations

import copy
import json
import os
import shutil
import subprocess
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any

import prefix_models as models
import pytest
import torch
from adapter_files import assert_same, cut, edit_config, edit_weights, set_value, snapshot
from prompt_models import (
    KEY,
    METHODS,
    logits,
    names,
    trained,
)
from safetensors.torch import load_file
from torch import Tensor, nn

import fused_peft
from fused_peft import AdapterError, LoraConfig, load_adapter, save_adapter
from fused_peft.checkpoint import CONFIG_NAME, WEIGHTS_NAME
from fused_peft.checkpoint._side_files import ENCODER_NAME, EXTRA_NAME

pytest.importorskip("transformers")

# ---- refusals


def put_encoder(directory: Path, edit: Callable[[dict[str, Tensor]], None]) -> None:
    """An encoder's file that was changed, with its new digest: only its content can tell."""
    import hashlib

    from safetensors.torch import save_file

    tensors = load_file(directory / ENCODER_NAME)
    edit(tensors)
    save_file(tensors, directory / ENCODER_NAME)
    document = json.loads((directory / EXTRA_NAME).read_text())
    content = (directory / ENCODER_NAME).read_bytes()
    document["sha256"][ENCODER_NAME] = hashlib.sha256(content).hexdigest()
    (directory / EXTRA_NAME).write_text(json.dumps(document))


def edit_extra(directory: Path, **fields: Any) -> None:
    document = json.loads((directory / EXTRA_NAME).read_text())
    (directory / EXTRA_NAME).write_text(json.dumps({**document, **fields}))


def put(shape: tuple[int, ...], dtype: torch.dtype = torch.float32) -> Callable[[Path], None]:
    return lambda d: edit_weights(d, lambda t: t.update({KEY: torch.ones(shape, dtype=dtype)}))


def drop(key: str) -> Callable[[Path], None]:
    return lambda d: edit_weights(d, lambda t: t.pop(key))


HEAD = "base_model.classifier.weight"
# Method and kind of the adapter, what is done to its files, and the error's message.
DAMAGE: dict[str, tuple[str, str, Callable[[Path], None], str]] = {
    "no weights": ("MLP", "llama", lambda d: (d / WEIGHTS_NAME).unlink(), f"has no {WEIGHTS_NAME}"),
    "cut weights": (
        "prompt",
        "llama",
        lambda d: cut(d / WEIGHTS_NAME, 150),
        "cut off or damaged",
    ),
    "no key": (
        "prompt",
        "llama",
        lambda d: edit_weights(d, lambda t: t.pop(KEY)),
        "missing prompt",
    ),
    "no head": (
        "prefix",
        "bert",
        lambda d: edit_weights(d, lambda t: t.pop(HEAD)),
        f"missing {HEAD}",
    ),
    "extra key": (
        "prefix",
        "llama",
        lambda d: edit_weights(d, lambda t: t.update({"extra": torch.ones(1)})),
        "unexpected extra",
    ),
    "P unlike the config's": (
        "prompt",
        "llama",
        lambda d: edit_config(d, num_virtual_tokens=5),
        r"\(3 virtual tokens, not 5\)|num_virtual_tokens is 5 in .* and 3 in the model's",
    ),
    "P of a prefix": ("prefix", "llama", put((4, 64)), r"\(4 virtual tokens, not 3\)"),
    "width": ("prompt", "llama", put((3, 31)), r"\[3, 31\], expected \[3, 32\]"),
    "one dimension": ("prompt", "llama", put((96,)), r"\[96\], expected \[3, 32\]"),
    "rows of one submodule": ("MLP", "t5", put((3, 32)), r"\[3, 32\], expected \[6, 32\]"),
    "integers": ("prompt", "llama", put((3, 32), torch.int32), "is torch.int32, expected torch.fl"),
    "NaN": (
        "prefix",
        "llama",
        lambda d: edit_weights(d, set_value(KEY, float("nan"))),
        f"{KEY} in .* has NaN",
    ),
    "infinite head": (
        "LSTM",
        "bert",
        lambda d: edit_weights(d, set_value(HEAD, float("inf"))),
        f"{HEAD} in .* has NaN or infinity",
    ),
    "token_dim": ("prompt", "llama", lambda d: edit_config(d, token_dim=16), "token_dim is 16"),
    "num_layers": ("prefix", "gpt2", lambda d: edit_config(d, num_layers=3), "num_layers is 3"),
    "heads": (
        "prefix",
        "llama",
        lambda d: edit_config(d, num_attention_heads=4),
        "num_attention_heads is 4; expected 2",
    ),
    "submodules": (
        "prompt",
        "llama",
        lambda d: edit_config(d, num_transformer_submodules=2),
        "num_transformer_submodules is 2; expected 1",
    ),
    "P is 0": (
        "prompt",
        "llama",
        lambda d: edit_config(d, num_virtual_tokens=0),
        f"{CONFIG_NAME}.*num_virtual_tokens is 0",
    ),
    "no P": (
        "prompt",
        "llama",
        lambda d: edit_config(d, num_virtual_tokens=None),
        "no num_virtual_tokens",
    ),
    "type of encoder": (
        "MLP",
        "llama",
        lambda d: edit_config(d, encoder_reparameterization_type="GRU"),
        "encoder_reparameterization_type is 'GRU'",
    ),
    "cut config of ours": ("MLP", "llama", lambda d: cut(d / EXTRA_NAME, 30), "is no JSON"),
    "config of ours is a list": (
        "MLP",
        "llama",
        lambda d: (d / EXTRA_NAME).write_text("[]"),
        f"{EXTRA_NAME} is no JSON object with fields",
    ),
    "later format": ("MLP", "llama", lambda d: edit_extra(d, format=2), "format 2; expected 1"),
    "unknown field of ours": (
        "MLP",
        "llama",
        lambda d: edit_extra(d, fields={"cloze": [1, 2]}),
        "no field 'cloze'",
    ),
    "cut encoder": ("MLP", "llama", lambda d: cut(d / ENCODER_NAME, 500), "cut off or damaged"),
    "another encoder": (
        "LSTM",
        "llama",
        lambda d: (d / ENCODER_NAME).write_bytes((d / WEIGHTS_NAME).read_bytes()),
        "not the one that was saved with this adapter",
    ),
    "encoder key": (
        "prefix MLP",
        "llama",
        lambda d: put_encoder(d, lambda t: t.pop("transform.0.bias")),
        "missing transform.0.bias",
    ),
    "encoder shape": (
        "MLP",
        "llama",
        lambda d: put_encoder(d, lambda t: t.update({"mlp_head.0.bias": torch.ones(7)})),
        r"mlp_head.0.bias \[7\], expected \[20\]",
    ),
    "encoder NaN": (
        "MLP",
        "llama",
        lambda d: put_encoder(d, set_value("embedding.weight", float("nan"))),
        "embedding.weight in .* NaN",
    ),
    "encoder of another size": (
        "LSTM",
        "llama",
        lambda d: edit_config(d, encoder_hidden_size=8),
        "wrong shape: .*lstm_head|lstm_head.*expected",
    ),
}


@pytest.mark.filterwarnings("ignore:fused_peft_config.json in .* was there before")
@pytest.mark.parametrize("case", DAMAGE)
@pytest.mark.parametrize("there_already", [False, True])
def test_a_damaged_adapter_changes_nothing(tmp_path: Path, case: str, there_already: bool) -> None:
    method, kind, damage, message = DAMAGE[case]
    save_adapter(trained(method, kind, seed=1), tmp_path)
    damage(tmp_path)
    model = trained(method, kind, seed=2) if there_already else models.model(kind)
    model.train()
    before, wanted = snapshot(model), logits(copy.deepcopy(model).eval(), kind)
    with pytest.raises(AdapterError, match=message):
        load_adapter(model, tmp_path, is_trainable=True)
    assert_same(before, snapshot(model))
    assert torch.equal(logits(model.eval(), kind), wanted)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(("saved_on", "loaded_on"), [("gpt2", "llama"), ("llama", "bert")])
def test_another_architecture(tmp_path: Path, method: str, saved_on: str, loaded_on: str) -> None:
    changed = {"num_hidden_layers": 3, "hidden_size": 48, "num_attention_heads": 6}
    save_adapter(trained(method, saved_on), tmp_path)
    model = models.model(loaded_on, **changed)
    before = snapshot(model)
    with pytest.raises(AdapterError, match=r"does not fit this \w+: \w+ is \d+; expected \d+"):
        load_adapter(model, tmp_path)
    assert_same(before, snapshot(model))
    assert not hasattr(model, "prompt_adapters")


def test_a_model_without_attention_to_reach(tmp_path: Path) -> None:
    save_adapter(trained("prefix"), tmp_path)
    model = nn.Sequential(nn.Linear(4, 4))
    before = snapshot(model)
    with pytest.raises(AdapterError, match="does not fit this Sequential"):
        load_adapter(model, tmp_path)
    assert_same(before, snapshot(model))


def test_an_adapter_of_another_kind_under_the_name(tmp_path: Path) -> None:
    save_adapter(trained("prompt"), tmp_path / "prompt")
    save_adapter(trained("prefix"), tmp_path / "prefix")
    lora = LoraConfig(target_modules=["q_proj"], r=2)
    with_lora = fused_peft.get_peft_model(models.model("llama"), lora)
    save_adapter(with_lora, tmp_path / "lora")
    for model, path, message in (
        (with_lora, "prompt", "'default' is of another kind"),
        (trained("prompt"), "lora", "'default' is of another kind"),
        (trained("prompt"), "prefix", "peft_type is 'PREFIX_TUNING' in .* and 'PROMPT_TUNING' in"),
        (trained("prompt", num_virtual_tokens=4), "prompt", "num_virtual_tokens is 3 in .* and 4"),
    ):
        before = snapshot(model)
        with pytest.raises(AdapterError, match=message):
            load_adapter(model, tmp_path / path)
        assert_same(before, snapshot(model))


@pytest.mark.parametrize(
    "there", [{}, {"prompt_token_id": 38}, {"prompt_token_id": 39, "cloze_template": (2, 1)}]
)
def test_prompts_in_other_places_than_the_models(tmp_path: Path, there: dict[str, Any]) -> None:
    save_adapter(trained("MLP", prompt_token_id=39, cloze_template=(1, 2)), tmp_path)
    model = trained("MLP", seed=2, **there)
    before = snapshot(model)
    with pytest.raises(AdapterError, match=r"(prompt_token_id|cloze_template) is .* in .* and "):
        load_adapter(model, tmp_path)
    assert_same(before, snapshot(model))


def test_nothing_bad_is_saved(tmp_path: Path) -> None:
    model = trained("MLP")
    save_adapter(model, tmp_path)
    before = {name: (tmp_path / name).read_bytes() for name in names(tmp_path)}
    with torch.no_grad():
        model.prompt_adapters.current.mlp_head[0].weight[0, 0] = float("nan")
    with pytest.raises(AdapterError, match="has NaN or infinity; nothing is written"):
        save_adapter(model, tmp_path)
    with pytest.raises(ValueError, match=r"'other'; the model has the adapters \['default'\]"):
        save_adapter(model, tmp_path, "other")
    assert {name: (tmp_path / name).read_bytes() for name in names(tmp_path)} == before


# ---- killed saves


# The audit hook sees each file operation of Python before it is done; the n-th is not done.
DRIVER = """
import os, pathlib, signal, sys
import torch
torch.set_num_threads(1)  # a forked process has none of its parent's OpenMP threads to wait for
sys.path.insert(0, {tests!r})
from prompt_models import trained
from fused_peft import save_adapter

root = pathlib.Path(sys.argv[1])
EVENTS = {{"open", "os.rename", "os.symlink", "os.link", "os.mkdir", "os.remove", "os.rmdir",
          "os.chmod", "shutil.rmtree"}}
left = None

def hook(event, arguments):
    global left
    if left is not None and event in EVENTS:
        if left == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        left -= 1

sys.addaudithook(hook)
os.fsync = lambda descriptor: None  # a kill, unlike a power failure, loses no write that was made
adapters = {{name: trained(name) for name in ("MLP", "prefix MLP", "prompt")}}
for old, new in (("MLP", "prefix MLP"), ("prompt", "MLP"), ("MLP", "prompt")):
    n = 0
    while True:
        directory = root / f"{{old}}-{{new}}-{{n}}"
        save_adapter(adapters[old], directory)
        pid = os.fork()
        if pid == 0:
            try:
                left = n
                save_adapter(adapters[new], directory)
            finally:
                os._exit(0)
        status = os.waitpid(pid, 0)[1]
        if not os.WIFSIGNALED(status):
            assert status == 0, status
            break
        n += 1
    print(n, flush=True)
"""


@pytest.mark.skipif(sys.platform == "win32", reason="needs fork and SIGKILL")
@pytest.mark.filterwarnings("ignore:fused_peft_config.json in .* was there before")
def test_killed_at_every_file_operation(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The old adapter or the new one, whole, its encoder included, and never another's."""
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)
    code = textwrap.dedent(DRIVER).format(tests=str(Path(__file__).parent))
    command = [sys.executable, "-c", code, str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert min(map(int, done.stdout.split())) >= 25
    states = {}
    for name in ("MLP", "prefix MLP", "prompt"):
        adapter = trained(name).prompt_adapters.current
        states[name] = (adapter.encoder_state(), adapter.prompt_embeddings())
    seen = set()
    lora = fused_peft.get_peft_model(
        models.model("llama"), LoraConfig(target_modules=["q_proj"], r=2)
    )
    for directory in sorted(tmp_path.iterdir()):
        old, new, _ = directory.name.split("-")
        loaded = load_adapter(models.model("llama"), directory, is_trainable=True)
        adapter = loaded.prompt_adapters.current
        encoder, prompt = adapter.encoder_state(), adapter.prompt_embeddings()
        found = [n for n in (old, new) if torch.equal(prompt, states[n][1])]
        assert len(found) == 1, directory.name
        expected = states[found[0]][0]
        assert encoder.keys() == expected.keys(), directory.name
        assert all(torch.equal(encoder[key], expected[key]) for key in expected), directory.name
        seen.add((old, new, found[0]))
        # The next save tidies up, whatever the killed one left, also one of other files.
        save_adapter(lora, directory)
        assert names(directory) == [CONFIG_NAME, WEIGHTS_NAME]
        assert not any(path.is_symlink() for path in directory.iterdir())
    assert len(seen) == 6
    shutil.rmtree(tmp_path)
