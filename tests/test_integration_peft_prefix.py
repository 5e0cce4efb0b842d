"""Prefix-tuned PEFT models with the fused attention; PEFT unfused is the measure."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from backends import relative_error
from torch import Tensor, nn
from transformers import DynamicCache

pytest.importorskip("peft")

import peft
from peft_models import MAKES_ENCODER_DECODERS, config, fill, recorded_calls
from prefix_models import inputs, mask, model, task, tokens

from fused_peft.integrations import _peft_prefix
from fused_peft.integrations.peft import fuse, fused, unfuse

Calls = list[dict[str, Any]]
P = 5
#: Kinds of models, as they have to be to be fused.
KINDS: dict[str, dict[str, Any]] = {
    "llama": {},
    "mistral": {"sliding_window": None},
    "qwen2": {"use_sliding_window": False},
    "qwen3": {},
    "gpt2": {},
    "gpt_neox": {},
    "opt": {},
    "bert": {},
    "roberta": {},
    "llama classifier": {},
    "bart": {},
}
EACH = [
    pytest.param(kind, marks=MAKES_ENCODER_DECODERS if task(kind) == "SEQ_2_SEQ_LM" else ())
    for kind in KINDS
]
BART = pytest.param("bart", marks=MAKES_ENCODER_DECODERS)
GENERATE = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False, "pad_token_id": 0}


@pytest.fixture
def op_calls(monkeypatch: pytest.MonkeyPatch) -> Calls:
    return recorded_calls(monkeypatch, "prefix_attention")


def prefix_tuned(kind: str, base: nn.Module | None = None, **changed: Any) -> Any:
    base = model(kind, **KINDS.get(kind, {})) if base is None else base
    arguments = {"task_type": task(kind), "num_virtual_tokens": P, **changed}
    return fill(peft.get_peft_model(base, peft.PrefixTuningConfig(**arguments))).eval()


def results(built: Any, kind: str, weight: Tensor | None = None, **given: Any) -> dict[str, Tensor]:
    """Logits, and the gradients of PEFT's own parameters for a loss of squares."""
    built.zero_grad()
    logits = built(**inputs(kind), **given).logits
    if weight is not None and task(kind) == "CAUSAL_LM":
        logits = logits * weight[..., None]  # what comes out at padding means nothing
    logits.square().sum().backward()
    gradients = {n: p.grad.clone() for n, p in built.named_parameters() if p.grad is not None}
    assert any(name.startswith("prompt_encoder.") for name in gradients)
    return {"logits": logits.detach(), **gradients}


def assert_equal_results(one: dict[str, Tensor], other: dict[str, Tensor]) -> None:
    assert one.keys() == other.keys()
    for name, expected in other.items():
        torch.testing.assert_close(one[name], expected, rtol=1e-3, atol=1e-5, msg=name)


@pytest.mark.parametrize("padding", [None, "none", "left", "right"])
@pytest.mark.parametrize("kind", EACH)
def test_logits_and_gradients_are_peft_s(kind: str, padding: str | None, op_calls: Calls) -> None:
    built = prefix_tuned(kind)
    keep = torch.ones(3, 9, dtype=torch.int64) if padding in (None, "none") else mask(padding)
    given = {} if padding is None else {"attention_mask": keep}
    expected = results(built, kind, keep, **given)
    assert not op_calls
    with torch.no_grad():
        bare = built.get_base_model()(**inputs(kind), **given).logits
    fuse(built)
    assert_equal_results(results(built, kind, keep, **given), expected)
    layers = len(built.get_prompt(1)) if kind != "bart" else 2
    sizes = [
        (key.shape[2], prefix_k.shape[1])
        for _, key, _, prefix_k, _ in (call["args"] for call in op_calls)
        if prefix_k is not None
    ]
    assert sizes == [(9, P)] * layers  # the sequence's own keys, the prefix beside them
    assert (expected["logits"] - bare).abs().max() > 1e-2
    with torch.no_grad():
        again = built.get_base_model()(**inputs(kind), **given).logits
    if padding != "left":  # rows that see nothing but padding differ between implementations
        torch.testing.assert_close(again, bare, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", ["llama", "gpt2", "bert", BART])
def test_gradients_through_the_mlp(kind: str) -> None:
    built = prefix_tuned(kind, prefix_projection=True, encoder_hidden_size=12)
    given = {"attention_mask": mask("right")}
    expected = results(built, kind, mask("right"), **given)
    assert len(expected) >= 6  # embedding, two weights, two biases
    assert_equal_results(results(fuse(built), kind, mask("right"), **given), expected)


def test_float64_gradients_are_exact() -> None:
    built = prefix_tuned(
        "llama", model("llama").double(), prefix_projection=True, encoder_hidden_size=12
    ).double()
    expected = results(built, "llama")
    for name, value in results(fuse(built), "llama").items():
        assert value.dtype == torch.float64
        assert relative_error(value, expected[name]) < 1e-12, name


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_no_worse_than_peft(dtype: torch.dtype) -> None:
    exact = prefix_tuned("llama", model("llama").to(dtype))
    built = copy.deepcopy(exact)
    exact.double()
    truth = results(exact, "llama")
    unfused = results(built, "llama")
    for name, value in results(fuse(built), "llama").items():
        assert value.dtype == unfused[name].dtype
        # A quarter more for chance: few values, rounded at other places.
        allowed = 1.25 * relative_error(unfused[name], truth[name])
        assert relative_error(value, truth[name]) <= allowed, name


@pytest.mark.parametrize("search", [{}, {"num_beams": 3}], ids=["greedy", "beams"])
@pytest.mark.parametrize("kind", ["llama", "gpt2", "opt", BART])
def test_generate(kind: str, search: dict[str, Any], op_calls: Calls) -> None:
    built = prefix_tuned(kind)
    given = {"input_ids": tokens(), "attention_mask": mask("left"), **GENERATE, **search}
    with torch.no_grad():
        expected = built.generate(**given)
        fuse(built)
        assert torch.equal(built.generate(**given), expected)
    assert op_calls
    keys = max(call["args"][1].shape[2] for call in op_calls if call["args"][3] is not None)
    assert keys == (GENERATE["max_new_tokens"] if kind == "bart" else 9 + 5)


def test_the_cache_counts_the_prefix() -> None:
    built = fuse(prefix_tuned("llama"))
    with torch.no_grad():
        cache = built(tokens()).past_key_values
    first = cache.layers[0]
    assert isinstance(first, _peft_prefix.PrefixCacheLayer)
    assert first.prefix_k.shape == (2, P, 8)
    assert first.keys.shape == (3, 2, 9, 8)
    assert cache.get_seq_length() == P + 9
    assert first.get_mask_sizes(4) == (13, P)
    first.crop(-2)
    assert (first.keys.shape[2], first.get_seq_length()) == (7, P + 7)
    first.crop(P + 4)  # transformers before 5.20: the length that is left
    assert first.keys.shape[2] == 4
    kept = first.keys.clone()
    first.batch_repeat_interleave(2)
    first.batch_select_indices(torch.tensor([0, 2, 4]))
    assert torch.equal(first.keys, kept)
    first.reorder_cache(torch.tensor([2, 1, 0]))
    assert torch.equal(first.keys, kept.flip(0))
    empty = _peft_prefix.PrefixCacheLayer(first.prefix_k, first.prefix_v)
    empty.reorder_cache(torch.tensor([0]))
    empty.batch_repeat_interleave(2)
    empty.batch_select_indices(torch.tensor([0]))
    empty.crop(-1)
    assert empty.get_seq_length() == P


def test_unfuse_goes_back() -> None:
    built = prefix_tuned("llama")
    base = built.get_base_model()
    attributes = {name: dict(vars(module)) for name, module in built.named_modules()}
    hooks = {n: list(m._forward_pre_hooks) for n, m in built.named_modules()}
    before = base.config._attn_implementation
    state = list(built.state_dict())
    expected = results(built, "llama")
    fuse(fuse(built))
    assert base.config._attn_implementation == "fused_peft"
    assert list(built.state_dict()) == state
    unfuse(unfuse(built))
    assert base.config._attn_implementation == before
    assert {name: set(vars(m)) for name, m in built.named_modules()} == {
        name: set(values) for name, values in attributes.items()
    }
    assert {n: list(m._forward_pre_hooks) for n, m in built.named_modules()} == hooks
    for name, value in results(built, "llama").items():
        assert torch.equal(value, expected[name]), name


def test_other_attention_after_fusing_is_peft_s(op_calls: Calls) -> None:
    built = prefix_tuned("llama")
    expected = results(built, "llama")
    fuse(built).get_base_model().set_attn_implementation("eager")
    assert_equal_results(results(built, "llama"), expected)
    assert not op_calls


def test_several_adapters(op_calls: Calls) -> None:
    built = fuse(prefix_tuned("llama"))
    built.add_adapter(
        "second", peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)
    )
    fill(built)
    outputs = []
    for name in ("default", "second"):
        built.set_adapter(name)
        op_calls.clear()
        outputs.append(results(built, "llama")["logits"])
        assert {call["args"][3].shape[1] for call in op_calls} == {
            built.active_peft_config.num_virtual_tokens
        }
        fused_results = results(built, "llama")
        assert_equal_results(results(unfuse(built), "llama"), fused_results)
        fuse(built)
    assert not torch.allclose(*outputs, atol=1e-2)


def test_training_learns_what_peft_s_learns() -> None:
    curves = []
    for fusing in (False, True):
        built = prefix_tuned("llama")
        if fusing:
            fuse(built)
        optimizer = torch.optim.SGD([p for p in built.parameters() if p.requires_grad], 2.0)
        losses = []
        for _ in range(20):
            loss = built(**inputs("llama")).loss
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        curves.append(losses)
    assert curves[0][-1] < curves[0][0] - 0.05
    torch.testing.assert_close(*(torch.tensor(c) for c in curves), rtol=1e-4, atol=0.0)


def test_a_broken_off_pass_leaves_no_prefix_behind(monkeypatch: pytest.MonkeyPatch) -> None:
    built = fuse(prefix_tuned("llama"))
    with built.disable_adapter(), torch.no_grad():
        expected = built(tokens()).logits

    def out_of_memory(*args: Any, **kwargs: Any) -> None:
        raise RuntimeError("out of memory")

    with monkeypatch.context() as patch:
        attention = built.get_base_model().model.layers[0].self_attn
        patch.setattr(type(attention.config), "_attn_implementation", property(out_of_memory))
        with pytest.raises(RuntimeError, match="out of memory"):
            built.get_base_model().model.layers[0](
                torch.zeros(1, 2, 32),
                position_embeddings=(torch.ones(1, 2, 8), torch.ones(1, 2, 8)),
                past_key_values=prefix_cache(),
            )
    with built.disable_adapter(), torch.no_grad():
        assert torch.equal(built(tokens()).logits, expected)


def prefix_cache() -> DynamicCache:
    layer = _peft_prefix.PrefixCacheLayer(torch.ones(2, P, 8), torch.ones(2, P, 8))
    cache = DynamicCache()
    cache.layers = [layer]
    return cache


def test_within_the_context() -> None:
    with fused():
        built = prefix_tuned("llama")
        windowed = prefix_tuned("llama", model("mistral"))
    assert _peft_prefix.is_fused(built)
    assert not _peft_prefix.is_fused(windowed)
    assert_equal_results(results(built, "llama"), results(unfuse(built), "llama"))


def test_loaded(tmp_path: Any) -> None:
    built = prefix_tuned("llama")
    expected = built(tokens()).logits
    built.save_pretrained(tmp_path)
    loaded = fuse(peft.PeftModel.from_pretrained(model("llama"), tmp_path)).eval()
    assert loaded.active_peft_config.inference_mode
    torch.testing.assert_close(loaded(tokens()).logits, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("mistral", "sliding_window is 4, and PEFT's prefix slides out of the window"),
        pytest.param(
            "t5",
            "its relative position bias is computed over the keys",
            marks=MAKES_ENCODER_DECODERS,
        ),
    ],
)
def test_refusals(kind: str, message: str) -> None:
    built = peft.get_peft_model(
        model(kind), peft.PrefixTuningConfig(task_type=task(kind), num_virtual_tokens=P)
    )
    before = built.get_base_model().config._attn_implementation
    with pytest.raises(ValueError, match=f"LoRA layers: none. Prefix: {message}"):
        fuse(built)
    assert "get_prompt" not in vars(built)
    assert built.get_base_model().config._attn_implementation == before


def test_a_model_with_a_prefix_of_ours_is_refused() -> None:
    from fused_peft import PrefixTuningConfig, get_peft_model

    base = model("llama")
    built = prefix_tuned("llama", base)
    get_peft_model(base, PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2))
    with pytest.raises(ValueError, match="it has a prefix of fused_peft already"):
        fuse(built)


def test_lora_beside_the_prefix() -> None:
    """A PEFT model whose base has LoRA layers injected: both are fused."""
    base = model("llama")
    peft.inject_adapter_in_model(config(target_modules=["q_proj"]), base)
    built = prefix_tuned("llama", base)
    expected = results(built, "llama")
    assert_equal_results(results(fuse(built), "llama"), expected)
    q = built.get_base_model().model.layers[0].self_attn.q_proj
    assert type(q).__name__ == "FusedLinear"
    assert _peft_prefix.is_fused(built)
