"""The same adapter through Hugging Face PEFT and through this package: files, configs, logits."""

from __future__ import annotations

import json
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor, nn

from fused_peft.checkpoint import (
    CONFIG_NAME,
    PEFT_VERSION,
    WEIGHTS_NAME,
    load_adapter,
    save_adapter,
)
from fused_peft.errors import AdapterError
from fused_peft.tuners import LoraConfig, add_adapter, get_peft_model, merge_adapter, set_adapter

peft = pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")

pytestmark = pytest.mark.filterwarnings("ignore")

VOCABULARY = 48
TOKENS = torch.randint(0, VOCABULARY, (2, 9), generator=torch.Generator().manual_seed(7))


def llama(cls: str = "LlamaForCausalLM", **fields: Any) -> nn.Module:
    """Two layers, grouped-query attention: four heads, two for keys and values."""
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=32,
        initializer_range=0.2,
        **{"pad_token_id": 0, **fields},
    )
    return getattr(transformers, cls)(config).eval()


def gpt2() -> nn.Module:
    """Its linear layers are Conv1D: the weight is stored transposed."""
    torch.manual_seed(0)
    config = transformers.GPT2Config(
        vocab_size=VOCABULARY,
        n_embd=32,
        n_layer=2,
        n_head=4,
        n_positions=32,
        initializer_range=0.2,
        bos_token_id=0,
        eos_token_id=0,
    )
    return transformers.GPT2LMHeadModel(config).eval()


def llama_with_bias() -> nn.Module:
    return llama(attention_bias=True, mlp_bias=True)


def tied_llama() -> nn.Module:
    return llama(tie_word_embeddings=True)


def classifier() -> nn.Module:
    return llama("LlamaForSequenceClassification", num_labels=3)


Base = Callable[[], nn.Module]
QV = {"target_modules": ["q_proj", "v_proj"], "r": 4, "lora_alpha": 6}
GPT2 = {"target_modules": ["c_attn", "c_proj"], "r": 4, "lora_alpha": 6, "fan_in_fan_out": True}

CASES: dict[str, tuple[Base, dict[str, Any]]] = {
    "llama": (llama, QV),
    "llama task type": (llama, {**QV, "task_type": "CAUSAL_LM", "lora_dropout": 0.25}),
    "llama rslora": (llama, {**QV, "use_rslora": True}),
    "llama patterns": (
        llama,
        {
            **QV,
            "target_modules": ["q_proj", "down_proj", "o_proj"],
            "rank_pattern": {"layers.1.self_attn.q_proj": 3, "^model.*down_proj": 5},
            "alpha_pattern": {r"layers.0.*q_proj": 9, "o_proj": 20},
            "use_rslora": True,
        },
    ),
    "llama layers": (llama, {**QV, "layers_to_transform": [1], "layers_pattern": "layers"}),
    "llama one layer": (llama, {**QV, "layers_to_transform": 0}),
    "llama regex": (
        llama,
        {**QV, "target_modules": r".*\.(0\.self_attn\.[qk]_proj|1\.mlp\.(up|down)_proj)"},
    ),
    "llama exclude": (
        llama,
        {**QV, "target_modules": ["q_proj", "k_proj"], "exclude_modules": ["0.self_attn.k_proj"]},
    ),
    "llama all-linear": (llama, {**QV, "target_modules": "all-linear"}),
    "llama head saved": (llama, {**QV, "modules_to_save": ["lm_head", "norm"]}),
    "llama embedding saved": (llama, {**QV, "modules_to_save": ["embed_tokens"]}),
    "llama head adapted": (llama, {**QV, "target_modules": ["q_proj", "lm_head"]}),
    "llama head adapted by regex": (llama, {**QV, "target_modules": r"lm_head|.*\.k_proj"}),
    "llama tied head adapted": (tied_llama, {**QV, "target_modules": ["q_proj", "lm_head"]}),
    "llama lora_only": (llama_with_bias, {**QV, "bias": "lora_only"}),
    "llama bias all": (llama_with_bias, {**QV, "bias": "all"}),
    "llama classifier": (classifier, {**QV, "task_type": "SEQ_CLS"}),
    "gpt2": (gpt2, GPT2),
    "gpt2 lora_only": (gpt2, {**GPT2, "bias": "lora_only", "task_type": "CAUSAL_LM"}),
    "gpt2 bias all": (gpt2, {**GPT2, "bias": "all", "modules_to_save": ["ln_f"]}),
    "gpt2 deep module saved": (
        gpt2,
        {**GPT2, "target_modules": ["c_attn"], "bias": "all", "modules_to_save": ["h.1.mlp"]},
    ),
    "gpt2 rslora patterns": (
        gpt2,
        {**GPT2, "use_rslora": True, "rank_pattern": {"h.1.attn.c_attn": 7}, "bias": "lora_only"},
    ),
}


def fill(model: nn.Module, *, seed: int = 0) -> nn.Module:
    """Values by a parameter's shape and place; a fresh lora_B is zero, which would hide errors."""
    with torch.no_grad():
        for i, parameter in enumerate(p for p in model.parameters() if p.requires_grad):
            generator = torch.Generator().manual_seed(zlib.crc32(f"{seed} {i}".encode()))
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.2)
    return model.eval()


def logits(model: nn.Module) -> Tensor:
    with torch.no_grad():
        return model(TOKENS).logits


def assert_close(got: Tensor, wanted: Tensor) -> None:
    """Equal up to float32's rounding.

    Both sum the same products, in another order: a few eps (2**-23) of the values summed in each
    of some ten linear layers behind one another, which with signs at random comes to about ten eps
    of the largest logit. Three times that is allowed. An adapter that is wrong, or left out, is off
    by more than 1e-2 of it.
    """
    limit = 32 * torch.finfo(torch.float32).eps * wanted.abs().max().item()
    assert (got - wanted).abs().max().item() <= limit


def normal(document: dict[str, Any]) -> dict[str, Any]:
    """PEFT writes sets in the order of hashes, another at every run, and names a head twice."""
    unordered = ("target_modules", "exclude_modules", "modules_to_save")
    return {
        k: sorted(set(v)) if k in unordered and isinstance(v, list) else v
        for k, v in document.items()
    }


def assert_same_files(ours: Path, theirs: Path) -> None:
    tensors, expected = load_file(ours / WEIGHTS_NAME), load_file(theirs / WEIGHTS_NAME)
    assert tensors.keys() == expected.keys()
    for key, tensor in expected.items():
        assert tensors[key].dtype == tensor.dtype, key
        assert torch.equal(tensors[key], tensor), key
    with safe_open(ours / WEIGHTS_NAME, "pt") as one, safe_open(theirs / WEIGHTS_NAME, "pt") as two:
        assert one.metadata() == two.metadata()
    assert (ours / WEIGHTS_NAME).read_bytes() == (theirs / WEIGHTS_NAME).read_bytes()
    document = normal(json.loads((ours / CONFIG_NAME).read_text()))
    expected_document = normal(json.loads((theirs / CONFIG_NAME).read_text()))
    if peft.__version__ != PEFT_VERSION:  # fields of a later version are not known here
        expected_document = {k: v for k, v in expected_document.items() if k in document}
        document["peft_version"] = peft.__version__
    assert document == expected_document


@pytest.mark.parametrize("case", CASES)
def test_from_peft(tmp_path: Path, case: str) -> None:
    base, fields = CASES[case]
    theirs = fill(peft.get_peft_model(base(), peft.LoraConfig(**fields)))
    theirs.save_pretrained(tmp_path / "theirs")
    wanted = logits(theirs)
    assert (wanted - logits(base())).abs().max() > 1e-2 * wanted.abs().max()
    # The name in the model is free: PEFT's file has none, but for a slip of bias="all".
    for name in ("default", "renamed"):
        ours = load_adapter(base(), tmp_path / "theirs", name)
        assert_close(logits(ours), wanted)
    ours = load_adapter(base(), tmp_path / "theirs")
    save_adapter(ours, tmp_path / "ours")
    assert_same_files(tmp_path / "ours", tmp_path / "theirs")


@pytest.mark.parametrize("case", CASES)
def test_to_peft(tmp_path: Path, case: str) -> None:
    base, fields = CASES[case]
    ours = fill(get_peft_model(base(), LoraConfig(**fields)))
    save_adapter(ours, tmp_path / "ours")
    wanted = logits(ours)
    assert (wanted - logits(base())).abs().max() > 1e-2 * wanted.abs().max()
    theirs = peft.PeftModel.from_pretrained(base(), tmp_path / "ours").eval()
    assert_close(logits(theirs), wanted)
    theirs.save_pretrained(tmp_path / "theirs")
    assert_same_files(tmp_path / "ours", tmp_path / "theirs")


def test_two_named_adapters(tmp_path: Path) -> None:
    second = {"target_modules": ["v_proj", "up_proj"], "r": 3, "modules_to_save": ["norm"]}
    theirs = peft.get_peft_model(llama(), peft.LoraConfig(**QV))
    fill(theirs, seed=1)
    theirs.add_adapter("second", peft.LoraConfig(**second))
    theirs.set_adapter("second")
    fill(theirs, seed=2)
    theirs.save_pretrained(tmp_path / "theirs")
    wanted = {}
    for name in ("default", "second"):
        theirs.set_adapter(name)
        wanted[name] = logits(theirs.eval())
    assert (wanted["default"] - wanted["second"]).abs().max() > 1e-2

    ours = load_adapter(llama(), tmp_path / "theirs")
    load_adapter(ours, tmp_path / "theirs" / "second", "second")
    for name in ("default", "second"):
        set_adapter(ours, name)
        assert_close(logits(ours), wanted[name])
        save_adapter(ours, tmp_path / "ours", name)
    assert_same_files(tmp_path / "ours", tmp_path / "theirs")
    assert_same_files(tmp_path / "ours" / "second", tmp_path / "theirs" / "second")

    back = peft.PeftModel.from_pretrained(llama(), tmp_path / "ours")
    back.load_adapter(tmp_path / "ours" / "second", "second")
    for name in ("default", "second"):
        back.set_adapter(name)
        assert_close(logits(back.eval()), wanted[name])


def test_ours_in_a_folder_of_its_name(tmp_path: Path) -> None:
    ours = get_peft_model(llama(), LoraConfig(**QV), "first")
    add_adapter(ours, LoraConfig(target_modules=["k_proj"], r=2), "second")
    set_adapter(ours, "second")
    wanted = logits(fill(ours))
    save_adapter(ours, tmp_path, "second")
    back = peft.PeftModel.from_pretrained(llama(), tmp_path / "second", adapter_name="x")
    assert_close(logits(back.eval()), wanted)


@pytest.mark.parametrize("adapters_in", [torch.float32, torch.bfloat16])
def test_bfloat16_base(tmp_path: Path, adapters_in: torch.dtype) -> None:
    """float32 adapters over a bfloat16 model, PEFT's default, and adapters left in bfloat16."""
    autocast = adapters_in == torch.float32

    def base(dtype: torch.dtype = torch.bfloat16) -> nn.Module:
        return llama().to(torch.bfloat16).to(dtype)

    theirs = peft.get_peft_model(base(), peft.LoraConfig(**QV), autocast_adapter_dtype=autocast)
    fill(theirs).save_pretrained(tmp_path / "theirs")
    ours = get_peft_model(base(), LoraConfig(**QV), autocast_adapter_dtype=autocast)
    load_adapter(ours, tmp_path / "theirs")
    save_adapter(ours, tmp_path / "ours")
    assert_same_files(tmp_path / "ours", tmp_path / "theirs")
    assert {t.dtype for t in load_file(tmp_path / "ours" / WEIGHTS_NAME).values()} == {adapters_in}
    back = peft.PeftModel.from_pretrained(
        base(), tmp_path / "ours", autocast_adapter_dtype=autocast
    ).eval()
    assert torch.equal(logits(back), logits(theirs))
    # Each rounds to bfloat16 at places of its own, so they are not compared with each other but
    # with float64: the file has been read right where ours is no further from it than PEFT is.
    # A quarter more is allowed for chance on so few logits.
    exact = logits(load_adapter(base(torch.float64), tmp_path / "ours"))
    error, their_error = (
        torch.linalg.vector_norm(logits(m).double() - exact).item() for m in (ours, theirs)
    )
    assert error <= 1.25 * their_error
    assert error < 0.1 * torch.linalg.vector_norm(exact - logits(base(torch.float64))).item()


def resized(directory: Path) -> nn.Module:
    if not directory.exists():
        llama().save_pretrained(directory)
    model = transformers.LlamaForCausalLM.from_pretrained(directory)
    torch.manual_seed(1)
    model.resize_token_embeddings(VOCABULARY + 4, mean_resizing=False)
    return model.eval()


def test_resized_vocabulary(tmp_path: Path) -> None:
    """The rows of new tokens are in no other file, so both embeddings are saved along."""
    theirs = fill(peft.get_peft_model(resized(tmp_path / "base"), peft.LoraConfig(**QV)))
    theirs.save_pretrained(tmp_path / "theirs")
    keys = load_file(tmp_path / "theirs" / WEIGHTS_NAME).keys()
    assert "base_model.model.model.embed_tokens.weight" in keys
    ours = resized(tmp_path / "base")
    with torch.no_grad():
        ours.get_input_embeddings().weight.zero_()
    load_adapter(ours, tmp_path / "theirs")
    assert_close(logits(ours), logits(theirs))
    save_adapter(ours, tmp_path / "ours")
    assert_same_files(tmp_path / "ours", tmp_path / "theirs")
    not_resized = transformers.LlamaForCausalLM.from_pretrained(tmp_path / "base")
    with pytest.raises(AdapterError, match=r"embed_tokens.weight \[52, 32\], expected \[48, 32\]"):
        load_adapter(not_resized, tmp_path / "theirs")


def test_base_weights_are_not_saved_merged(tmp_path: Path) -> None:
    """They would have the adapter in them, and it would be added once more on loading."""
    ours = fill(get_peft_model(llama(), LoraConfig(**{**QV, "target_modules": ["lm_head"]})))
    merge_adapter(ours)
    with pytest.raises(ValueError, match="unmerge them first"):
        save_adapter(ours, tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_base_weights_are_not_loaded_over_merged_ones(tmp_path: Path) -> None:
    """Unmerging would take an adapter out of a weight that does not have it."""
    fields = {**QV, "target_modules": ["lm_head"]}
    save_adapter(get_peft_model(llama(), LoraConfig(**fields)), tmp_path)
    ours = fill(get_peft_model(llama(), LoraConfig(**fields)))
    merge_adapter(ours)
    before = {k: v.clone() for k, v in ours.state_dict().items()}
    with pytest.raises(ValueError, match="unmerge them first"):
        load_adapter(ours, tmp_path, "second")
    assert before.keys() == ours.state_dict().keys()
    assert all(torch.equal(value, ours.state_dict()[key]) for key, value in before.items())


@pytest.mark.parametrize("kind", ["gaussian", "orthogonal", "pissa", "olora"])
def test_inits_from_peft(tmp_path: Path, kind: str) -> None:
    """PiSSA and OLoRA change the base weight when the adapter is put in, on loading as well."""
    theirs = peft.get_peft_model(llama(), peft.LoraConfig(**QV, init_lora_weights=kind))
    with torch.no_grad():
        for parameter in theirs.parameters():
            if parameter.requires_grad:
                parameter.mul_(1.5).add_(0.05)
    theirs.eval().save_pretrained(tmp_path / "theirs")
    ours = load_adapter(llama(), tmp_path / "theirs")
    # Decompositions of the same weight by other routines agree to about 1e-6 of its size.
    torch.testing.assert_close(logits(ours), logits(theirs), rtol=1e-4, atol=1e-4)
    save_adapter(ours, tmp_path / "ours")
    assert_same_files(tmp_path / "ours", tmp_path / "theirs")


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({"use_dora": True}, "use_dora"),
        ({"lora_bias": True}, "lora_bias"),
        ({"trainable_token_indices": [1, 2]}, "trainable_token_indices"),
        ({"target_modules": ["q_proj", "embed_tokens"]}, "embed_tokens"),
    ],
)
def test_what_only_peft_does_is_refused(tmp_path: Path, fields: dict[str, Any], named: str) -> None:
    config = peft.LoraConfig(**{**QV, **fields})
    peft.get_peft_model(llama(), config).save_pretrained(tmp_path)
    model = llama()
    before = {k: (v.data_ptr(), v.clone()) for k, v in model.state_dict().items()}
    with pytest.raises(AdapterError, match=named):
        load_adapter(model, tmp_path)
    after = model.state_dict()
    assert after.keys() == before.keys()
    for key, (pointer, value) in before.items():
        assert after[key].data_ptr() == pointer
        assert torch.equal(after[key], value)


def test_another_method_is_refused(tmp_path: Path) -> None:
    config = peft.IA3Config(task_type="CAUSAL_LM")
    peft.get_peft_model(llama(), config).save_pretrained(tmp_path)
    with pytest.raises(AdapterError, match="peft_type is 'IA3'"):
        load_adapter(llama(), tmp_path)


def test_an_adapter_of_another_architecture(tmp_path: Path) -> None:
    peft.get_peft_model(gpt2(), peft.LoraConfig(**GPT2)).save_pretrained(tmp_path)
    with pytest.raises(AdapterError, match="trained on GPT2LMHeadModel, does not fit this Llama"):
        load_adapter(llama(), tmp_path)
