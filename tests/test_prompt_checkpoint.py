"""Prefixes and prompts on disk: PEFT's files both ways, and training that goes on."""

from __future__ import annotations

import copy
import json
import warnings
from pathlib import Path
from typing import Any

import prefix_models as models
import pytest
import torch
from adapter_files import edit_weights, set_value
from prompt_models import (
    ENCODED,
    KEY,
    KINDS,
    METHODS,
    P,
    close,
    config,
    fill,
    logits,
    names,
    trained,
)
from safetensors.torch import load_file
from torch import nn

import fused_peft
from fused_peft import AdapterError, LoraConfig, load_adapter, save_adapter
from fused_peft.checkpoint import CONFIG_NAME, PEFT_VERSION, WEIGHTS_NAME
from fused_peft.checkpoint._side_files import ENCODER_NAME, EXTRA_NAME

pytest.importorskip("transformers")

# PEFT warns of the position ids it drops, transformers of what PEFT calls.
pytestmark = [
    pytest.mark.filterwarnings("ignore:Position ids are not supported:UserWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
]


def step(model: nn.Module, optimizer: torch.optim.Optimizer, kind: str = "llama") -> None:
    model(**models.inputs(kind)).loss.backward()
    optimizer.step()
    optimizer.zero_grad()


def adam(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)


# ---- to and from PEFT


def peft_model(method: str, kind: str) -> Any:
    peft = pytest.importorskip("peft")
    _, cls, own = METHODS[method]
    given = getattr(peft, cls)(num_virtual_tokens=P, task_type=models.task(kind), **own)
    return fill(peft.get_peft_model(models.model(kind), given)).eval()


def assert_same_files(ours: Path, theirs: Path) -> None:
    import peft

    assert (ours / WEIGHTS_NAME).read_bytes() == (theirs / WEIGHTS_NAME).read_bytes()
    document = json.loads((ours / CONFIG_NAME).read_text())
    expected = json.loads((theirs / CONFIG_NAME).read_text())
    for content in (document, expected):  # PEFT names a head twice
        content["modules_to_save"] = sorted(set(content["modules_to_save"] or []))
    if peft.__version__ != PEFT_VERSION:  # fields of a later version are not known here
        expected = {k: v for k, v in expected.items() if k in document}
        document["peft_version"] = peft.__version__
    assert document == expected


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("method", METHODS)
def test_from_peft(tmp_path: Path, method: str, kind: str) -> None:
    theirs = peft_model(method, kind)
    theirs.save_pretrained(tmp_path / "theirs")
    wanted = logits(theirs, kind)
    base = models.model(kind)
    plain = logits(base, kind)
    assert (wanted[:, -plain.shape[1] :] - plain).abs().max() > 1e-2
    for name in ("default", "renamed"):
        ours = load_adapter(models.model(kind), tmp_path / "theirs", name)
        close(logits(ours, kind), wanted)
    assert not any(p.requires_grad for p in ours.parameters())
    ours = load_adapter(models.model(kind), tmp_path / "theirs")
    save_adapter(ours, tmp_path / "ours")
    assert_same_files(tmp_path / "ours", tmp_path / "theirs")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("method", METHODS)
def test_to_peft(tmp_path: Path, method: str, kind: str) -> None:
    peft = pytest.importorskip("peft")
    ours = trained(method, kind)
    save_adapter(ours, tmp_path / "ours")
    assert names(tmp_path / "ours") == sorted(
        [CONFIG_NAME, WEIGHTS_NAME] + ([ENCODER_NAME, EXTRA_NAME] if method in ENCODED else [])
    )
    theirs = peft.PeftModel.from_pretrained(models.model(kind), tmp_path / "ours").eval()
    close(logits(theirs, kind), logits(ours, kind))
    theirs.save_pretrained(tmp_path / "theirs")
    assert_same_files(tmp_path / "ours", tmp_path / "theirs")
    # And back, through PEFT's own save.
    close(logits(load_adapter(models.model(kind), tmp_path / "theirs"), kind), logits(ours, kind))


def test_a_resized_vocabulary(tmp_path: Path) -> None:
    """The rows of new tokens are in no other file, so both embeddings are saved along."""
    peft = pytest.importorskip("peft")
    transformers = pytest.importorskip("transformers")
    models.model("llama").save_pretrained(tmp_path / "base")

    def resized() -> Any:
        model = transformers.LlamaForCausalLM.from_pretrained(tmp_path / "base")
        torch.manual_seed(1)
        model.resize_token_embeddings(44, mean_resizing=False)
        return model.eval()

    given = peft.PromptTuningConfig(num_virtual_tokens=P, task_type="CAUSAL_LM")
    theirs = fill(peft.get_peft_model(resized(), given)).eval()
    theirs.save_pretrained(tmp_path / "theirs")
    assert "base_model.model.embed_tokens.weight" in load_file(tmp_path / "theirs" / WEIGHTS_NAME)
    ours = resized()
    with torch.no_grad():
        ours.get_input_embeddings().weight.zero_()
    load_adapter(ours, tmp_path / "theirs")
    close(logits(ours), logits(theirs))
    save_adapter(ours, tmp_path / "ours")
    assert_same_files(tmp_path / "ours", tmp_path / "theirs")


# ---- training goes on


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("method", METHODS)
def test_training_resumes_exactly(tmp_path: Path, method: str, kind: str) -> None:
    """Three steps, a save, three more; against the same in one go: the same bits."""
    whole = trained(method, kind).train()
    optimizer = adam(whole)
    for number in range(6):
        torch.manual_seed(number)  # dropout of the base model
        step(whole, optimizer, kind)
        if number == 2:
            save_adapter(whole, tmp_path)
            state = copy.deepcopy(optimizer.state_dict())

    resumed = load_adapter(models.model(kind).train(), tmp_path, is_trainable=True)
    assert resumed.training
    optimizer = adam(resumed)
    optimizer.load_state_dict(state)
    for number in range(3, 6):
        torch.manual_seed(number)
        step(resumed, optimizer, kind)
    expected, got = whole.state_dict(), resumed.state_dict()
    assert expected.keys() == got.keys()
    for key, tensor in expected.items():
        assert torch.equal(got[key], tensor), key
    trainable = [{k for k, p in m.named_parameters() if p.requires_grad} for m in (whole, resumed)]
    assert trainable[0] == trainable[1]


@pytest.mark.parametrize("method", ENCODED)
def test_without_the_side_files_the_prompt_itself_is_trained(tmp_path: Path, method: str) -> None:
    model = trained(method)
    save_adapter(model, tmp_path)
    for name in (ENCODER_NAME, EXTRA_NAME):
        (tmp_path / name).unlink()
    loaded = load_adapter(models.model("llama").train(), tmp_path, is_trainable=True)
    adapter = loaded.prompt_adapters.current
    assert adapter.folded
    close(logits(loaded.eval()), logits(model))
    before = adapter.prompt_embeddings()
    step(loaded, adam(loaded))
    assert not torch.equal(adapter.prompt_embeddings(), before)


@pytest.mark.parametrize("method", ENCODED)
def test_a_lost_encoder_is_told(tmp_path: Path, method: str) -> None:
    save_adapter(trained(method), tmp_path)
    (tmp_path / ENCODER_NAME).unlink()
    with pytest.warns(UserWarning, match=f"has no {ENCODER_NAME} any more"):
        loaded = load_adapter(models.model("llama"), tmp_path, is_trainable=True)
    assert loaded.prompt_adapters.current.folded
    load_adapter(models.model("llama"), tmp_path)  # for inference it is not missed


@pytest.mark.parametrize("method", METHODS)
def test_over_an_adapter_that_is_there(tmp_path: Path, method: str) -> None:
    save_adapter(trained(method, seed=1), tmp_path)
    other = trained(method, seed=2).train()
    held = {k: id(p) for k, p in other.named_parameters()}
    load_adapter(other, tmp_path, is_trainable=True)
    assert {k: id(p) for k, p in other.named_parameters()} == held  # an optimizer holds them
    assert torch.equal(logits(other.eval()), logits(trained(method, seed=1)))
    load_adapter(other, tmp_path)
    assert other.prompt_adapters.current.folded
    assert not any(p.requires_grad for p in other.parameters())
    close(logits(other), logits(trained(method, seed=1)))
    load_adapter(other, tmp_path, is_trainable=True)  # and the encoder comes back
    assert other.prompt_adapters.current.folded == (method not in ENCODED)
    assert torch.equal(logits(other), logits(trained(method, seed=1)))


def test_two_prompts_in_folders_of_their_own(tmp_path: Path) -> None:
    model = trained("prefix")
    wanted = {"default": logits(model)}
    fused_peft.add_adapter(model, config("LSTM", "llama"), "b")
    fused_peft.set_adapter(model, "b")
    wanted["b"] = logits(fill(model, 7).eval())
    for name in wanted:
        save_adapter(model, tmp_path, name)
    loaded = load_adapter(models.model("llama"), tmp_path)
    load_adapter(loaded, tmp_path / "b", "b")
    close(logits(loaded), wanted["default"])  # the first stays the active one
    fused_peft.set_adapter(loaded, "b")
    close(logits(loaded), wanted["b"])


def test_values_that_the_adapters_dtype_cannot_hold(tmp_path: Path) -> None:
    save_adapter(trained("prompt"), tmp_path)
    edit_weights(tmp_path, set_value(KEY, 1e6))
    with pytest.raises(AdapterError, match=r"too large for torch\.float16"):
        load_adapter(trained("prompt", seed=2).half(), tmp_path)
    load_adapter(models.model("llama").half(), tmp_path)  # a new one is float32


def test_an_adapter_keeps_its_dtype(tmp_path: Path) -> None:
    save_adapter(trained("MLP"), tmp_path)
    model = trained("MLP", seed=2).bfloat16()
    load_adapter(model, tmp_path)
    (prompt,) = model.prompt_adapters.parameters()
    assert prompt.dtype == torch.bfloat16
    assert torch.equal(prompt, load_file(tmp_path / WEIGHTS_NAME)[KEY].bfloat16())


def test_random_numbers_are_left_alone(tmp_path: Path) -> None:
    save_adapter(trained("LSTM"), tmp_path)
    model = models.model("llama")
    before = torch.get_rng_state()
    load_adapter(model, tmp_path, is_trainable=True)
    assert torch.equal(torch.get_rng_state(), before)


# ---- what PEFT's file cannot say


def test_our_own_fields_come_back(tmp_path: Path) -> None:
    own = {"prompt_token_id": 39, "cloze_template": (1, 2)}
    model = trained("MLP", **own)
    save_adapter(model, tmp_path)
    assert "cloze_template" not in json.loads((tmp_path / CONFIG_NAME).read_text())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        loaded = load_adapter(models.model("llama"), tmp_path)
    found = loaded.fused_peft_config["default"]
    assert (found.prompt_token_id, found.cloze_template) == (39, (1, 2))
    ids = torch.tensor([found.fill_template([5, 6, 7])])
    with torch.no_grad():
        close(loaded(input_ids=ids).logits, model(input_ids=ids).logits)


def test_a_start_from_text_needs_no_tokenizer_later(tmp_path: Path) -> None:
    class Tokenizer:
        unk_token_id = 1

        def __call__(self, text: str, **_: Any) -> dict[str, list[int]]:
            return {"input_ids": [3 + len(word) for word in text.split()]}

    text = {"prompt_tuning_init": "TEXT", "prompt_tuning_init_text": "say what"}
    given = config("prompt", "llama", **text)
    model = fused_peft.get_peft_model(models.model("llama"), given, tokenizer=Tokenizer())
    save_adapter(model, tmp_path)
    loaded = load_adapter(models.model("llama"), tmp_path, is_trainable=True)
    assert torch.equal(logits(loaded), logits(model.eval()))
    assert loaded.fused_peft_config["default"] == model.fused_peft_config["default"]


def test_beside_lora(tmp_path: Path) -> None:
    model = trained("prefix MLP")
    lora = LoraConfig(target_modules=["q_proj"], r=2, bias="none")
    fused_peft.add_adapter(model, lora, "lora")
    fused_peft.set_adapter(model, ["lora", "default"])
    fill(model, 5).eval()
    save_adapter(model, tmp_path)
    save_adapter(model, tmp_path, "lora")
    assert names(tmp_path / "lora") == [CONFIG_NAME, WEIGHTS_NAME]
    assert all("q_proj.lora_" in key for key in load_file(tmp_path / "lora" / WEIGHTS_NAME))
    loaded = load_adapter(models.model("llama"), tmp_path / "lora", "lora")
    load_adapter(loaded, tmp_path, "prefix", is_trainable=True)
    fused_peft.set_adapter(loaded, ["lora", "prefix"])
    assert torch.equal(logits(loaded), logits(model))


def test_biases_of_lora_are_not_those_of_an_encoder(tmp_path: Path) -> None:
    model = trained("MLP", "gpt2")
    lora = LoraConfig(target_modules=["c_attn"], r=2, bias="all", fan_in_fan_out=True)
    fused_peft.add_adapter(model, lora, "lora")
    save_adapter(model, tmp_path, "lora")
    assert not any("prompt" in key for key in load_file(tmp_path / "lora" / WEIGHTS_NAME))
    load_adapter(models.model("gpt2"), tmp_path / "lora")


@pytest.mark.parametrize("method", METHODS)
def test_a_compiled_model(tmp_path: Path, method: str) -> None:
    model = trained(method)
    save_adapter(torch.compile(model), tmp_path / "a")
    save_adapter(model, tmp_path / "b")
    assert names(tmp_path / "a") == names(tmp_path / "b")
    for name in names(tmp_path / "a"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes(), name
    loaded = models.model("llama")
    load_adapter(torch.compile(loaded, backend="eager"), tmp_path / "a")
    close(logits(loaded), logits(model))


def test_a_bfloat16_model(tmp_path: Path) -> None:
    """The prompt stays float32, as in PEFT."""
    model = fused_peft.get_peft_model(models.model("bert").bfloat16(), config("prompt", "bert"))
    fill(model)
    save_adapter(model, tmp_path)
    tensors = load_file(tmp_path / WEIGHTS_NAME)
    assert tensors[KEY].dtype == torch.float32
    assert tensors["base_model.classifier.weight"].dtype == torch.bfloat16
    loaded = load_adapter(models.model("bert").bfloat16(), tmp_path)
    assert torch.equal(logits(loaded, "bert"), logits(model.eval(), "bert"))


# ---- side files of another adapter


def test_side_files_of_an_earlier_adapter_are_not_taken(tmp_path: Path) -> None:
    """PEFT knows nothing of them, and leaves them where it saves another adapter."""
    own = {"prompt_token_id": 39, "cloze_template": (1, 2)}
    save_adapter(trained("MLP", seed=2, **own), tmp_path)
    theirs = peft_model("MLP", "llama")
    theirs.save_pretrained(tmp_path)
    assert {ENCODER_NAME, EXTRA_NAME} <= set(names(tmp_path))
    with pytest.warns(UserWarning, match="is of an adapter that was there before, and ignored"):
        loaded = load_adapter(models.model("llama"), tmp_path, is_trainable=True)
    assert loaded.prompt_adapters.current.folded
    assert loaded.fused_peft_config["default"].cloze_template is None
    close(logits(loaded.eval()), logits(theirs))


@pytest.mark.parametrize("second", ["prompt", "LoRA"])
def test_our_own_save_removes_them(tmp_path: Path, second: str) -> None:
    save_adapter(trained("prefix MLP"), tmp_path)
    (tmp_path / "README.md").write_text("card")
    if second == "LoRA":
        lora = LoraConfig(target_modules=["q_proj"], r=2)
        model = fill(fused_peft.get_peft_model(models.model("llama"), lora)).eval()
    else:
        model = trained("prompt")
    save_adapter(model, tmp_path)
    assert names(tmp_path) == ["README.md", CONFIG_NAME, WEIGHTS_NAME]
    assert torch.equal(logits(load_adapter(models.model("llama"), tmp_path)), logits(model))
