"""Prefix tuning in transformers models; Hugging Face PEFT is the measure."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

pytest.importorskip("transformers")

from prefix_models import KINDS, inputs, mask, model, task, tokens
from transformers import DynamicCache

from fused_peft import (
    LoraConfig,
    PrefixTuningConfig,
    add_adapter,
    delete_adapter,
    disable_adapter,
    get_nb_trainable_parameters,
    get_peft_model,
    merge_adapter,
    ops,
    set_adapter,
)
from fused_peft.nn.prefix_encoder import PrefixEncoder

P = 5
#: Without a window that PEFT's prefix would slide out of.
WIDE: dict[str, dict[str, Any]] = {
    "mistral": {"sliding_window": 40},
    "qwen2": {"use_sliding_window": False},
    "gemma2": {"sliding_window": 40},
}
COMPARED = [
    "llama",
    "mistral",
    "qwen2",
    "qwen3",
    "gpt2",
    "gpt_neox",
    "opt",
    "gemma2",
    "bert",
    "roberta",
    "llama classifier",
    "t5",
    "bart",
]


def tuned(built: nn.Module, tokenizer: Any = None, **changed: Any) -> nn.Module:
    kind = next(k for k, v in KINDS.items() if v[0] == type(built).__name__)
    arguments = {"task_type": task(kind), "num_virtual_tokens": P, **changed}
    get_peft_model(built, PrefixTuningConfig(**arguments), tokenizer=tokenizer)
    return built.eval()


def encoder(built: nn.Module, name: str = "default") -> PrefixEncoder:
    found = built.prompt_adapters.adapters[name]
    assert isinstance(found, PrefixEncoder)
    return found


def with_peft(kind: str, **changed: Any) -> tuple[nn.Module, nn.Module]:
    """The same model with the same prefix, ours and PEFT's."""
    peft = pytest.importorskip("peft")
    theirs = peft.get_peft_model(
        model(kind, **WIDE.get(kind, {})),
        peft.PrefixTuningConfig(task_type=task(kind), num_virtual_tokens=P, **changed),
    ).eval()
    ours = tuned(model(kind, **WIDE.get(kind, {})), **changed)
    if changed.get("prefix_projection"):
        encoder(ours).load_encoder_state(theirs.prompt_encoder["default"].state_dict())
    else:
        encoder(ours).load_prompt_embeddings(theirs.get_prompt_embedding_to_save("default"))
    return ours, theirs


def grad_of(embeddings: PrefixEncoder) -> Tensor:
    """The gradient in the layout of PEFT's parameter."""
    assert embeddings.folded
    grads = [torch.zeros_like(p) if p.grad is None else p.grad for p in embeddings.prefix]
    return torch.stack(grads).permute(3, 0, 1, 2, 4).reshape(P, -1)


@pytest.mark.parametrize(
    ("kind", "padding"),
    [(kind, padding) for kind in COMPARED for padding in (None, "none", "left", "right")]
    # Encoder-decoders take no position ids.
    + [(kind, "positions") for kind in COMPARED if task(kind) != "SEQ_2_SEQ_LM"],
)
def test_logits_and_gradients_are_peft_s(kind: str, padding: str | None) -> None:
    ours, theirs = with_peft(kind)
    arguments = inputs(kind)
    keep = torch.ones(3, 9, dtype=torch.int64)
    if padding == "positions":
        # RoBERTa's position 1 is padding, which takes no prefix into account.
        arguments["position_ids"] = torch.arange(10, 1, -1).expand(3, -1).contiguous()
    elif padding is not None:
        keep = mask(padding)
    if padding is not None:
        arguments["attention_mask"] = keep
    if kind == "roberta":  # token 1 is padding, which it sees by itself
        arguments["input_ids"] = torch.where(keep == 1, arguments["input_ids"], 1)
    weight = keep[..., None] if task(kind) == "CAUSAL_LM" else torch.ones(1)
    results = []
    for built in (ours, theirs):
        logits = built(**arguments).logits * weight
        (logits**2).sum().backward()
        results.append(logits.detach())
    with disable_adapter(ours), torch.no_grad():
        bare = ours(**arguments).logits * weight
    assert (results[0] - bare).abs().max() > 20 * 1e-5  # the prefix does something
    torch.testing.assert_close(results[0], results[1], rtol=1e-4, atol=1e-5)
    expected = theirs.prompt_encoder["default"].embedding.weight.grad
    torch.testing.assert_close(grad_of(encoder(ours)), expected, rtol=1e-3, atol=1e-5)
    others = [n for n, p in ours.named_parameters() if p.grad is not None]
    assert others
    assert all(name.startswith("prompt_adapters.") or "modules_to_save" in name for name in others)


@pytest.mark.parametrize("kind", ["llama", "gpt2", "t5"])
def test_with_the_mlp(kind: str) -> None:
    ours, theirs = with_peft(kind, prefix_projection=True, encoder_hidden_size=12)
    results = []
    for built in (ours, theirs):
        logits = built(**inputs(kind), attention_mask=mask("right")).logits[:2]
        (logits**2).sum().backward()
        results.append(logits.detach())
    torch.testing.assert_close(*results, rtol=1e-4, atol=1e-5)
    module, other = encoder(ours), theirs.prompt_encoder["default"]
    assert module.embedding is not None
    assert module.hidden is not None
    torch.testing.assert_close(
        module.embedding.grad, other.embedding.weight.grad, rtol=1e-3, atol=1e-5
    )
    torch.testing.assert_close(
        module.hidden.weight.grad, other.transform[0].weight.grad, rtol=1e-3, atol=1e-5
    )
    last = [
        torch.zeros_like(output.weight) if output.weight.grad is None else output.weight.grad
        for output in module.outputs
    ]
    torch.testing.assert_close(
        torch.cat(last), other.transform[2].weight.grad, rtol=1e-3, atol=1e-5
    )
    module.fold_reparameterization()
    folded = ours(**inputs(kind), attention_mask=mask("right")).logits[:2]
    torch.testing.assert_close(folded, results[0], rtol=1e-5, atol=1e-5)


def test_attention_weights_are_peft_s() -> None:
    ours, theirs = with_peft("llama")
    theirs.base_model.set_attn_implementation("eager")
    arguments = {"attention_mask": mask("right"), "output_attentions": True}
    got = ours(tokens(), **arguments).attentions
    expected = theirs(tokens(), **arguments).attentions
    for mine, true in zip(got, expected, strict=True):
        assert mine.shape == (3, 4, 9, P + 9)
        torch.testing.assert_close(mine[:2], true[:2], rtol=1e-4, atol=1e-5)


def joined(built: nn.Module, ids: Tensor, seen: Tensor) -> Tensor:
    """Eager attention over a cache that begins with the prefix; ``seen`` is bool [B, 1, S, S]."""
    eager = copy.deepcopy(built)
    eager.set_attn_implementation("eager")
    cache = DynamicCache()
    module = encoder(built)
    for layer in range(module.num_layers):
        keys, values = (x.detach().expand(len(ids), -1, -1, -1) for x in module.key_value(layer))
        cache.update(keys, values, layer)
    wide = torch.where(nn.functional.pad(seen, (P, 0), value=True), 0.0, -1e9)
    positions = torch.arange(P, P + ids.shape[1])[None]
    with disable_adapter(eager), torch.no_grad():
        return eager(ids, attention_mask=wide, past_key_values=cache, position_ids=positions).logits


CAUSAL = torch.ones(1, 1, 9, 9, dtype=torch.bool).tril()
PATTERN = CAUSAL & (torch.rand(3, 1, 9, 9, generator=torch.Generator().manual_seed(2)) > 0.4)


def test_the_prefix_stays_visible_beyond_a_sliding_window() -> None:
    built = tuned(model("mistral"))
    seen = (CAUSAL & ~CAUSAL.tril(-4)).expand(3, -1, -1, -1)
    torch.testing.assert_close(
        built(tokens()).logits, joined(built, tokens(), seen), rtol=1e-4, atol=1e-5
    )


@pytest.mark.parametrize("additive", [False, True])
def test_a_mask_in_4_dimensions(additive: bool) -> None:
    built = tuned(model("llama"))
    given = torch.where(PATTERN, 0.0, -1e9) if additive else PATTERN
    torch.testing.assert_close(
        built(tokens(), attention_mask=given).logits,
        joined(built, tokens(), PATTERN),
        rtol=1e-4,
        atol=1e-5,
    )


def test_packed_sequences_each_have_the_whole_prefix() -> None:
    built = tuned(model("llama"))
    ids = tokens(1)
    positions = torch.tensor([[0, 1, 2, 3, 0, 1, 2, 0, 1]])
    got = built(ids, position_ids=positions, use_cache=False).logits
    parts = [built(ids[:, a:b]).logits for a, b in ((0, 4), (4, 7), (7, 9))]
    torch.testing.assert_close(got, torch.cat(parts, dim=1), rtol=1e-4, atol=1e-5)


def generated(built: nn.Module, ids: Tensor, **arguments: Any) -> tuple[Tensor, Tensor]:
    out = built.generate(
        input_ids=ids,
        max_new_tokens=6,
        do_sample=False,
        pad_token_id=0,
        eos_token_id=None,
        output_logits=True,
        return_dict_in_generate=True,
        **arguments,
    )
    return out.sequences, torch.stack(out.logits, dim=1)


@pytest.mark.parametrize("search", [{}, {"num_beams": 3}])
@pytest.mark.parametrize("kind", ["llama", "qwen2", "gpt2", "t5", "bart"])
def test_generate_without_padding_is_peft_s(kind: str, search: dict[str, Any]) -> None:
    ours, theirs = with_peft(kind)
    arguments = {"attention_mask": mask("none"), **search}
    got, expected = generated(ours, tokens(), **arguments), generated(theirs, tokens(), **arguments)
    assert torch.equal(got[0], expected[0])
    torch.testing.assert_close(got[1], expected[1], rtol=1e-4, atol=1e-5)
    with disable_adapter(ours):
        assert not torch.equal(generated(ours, tokens(), **arguments)[0], got[0])


@pytest.mark.parametrize(
    "cache", [{}, {"cache_implementation": "static"}, {"use_cache": False}, {"num_beams": 2}]
)
@pytest.mark.parametrize("kind", ["llama", "mistral", "qwen2", "gpt2", "gemma2"])
def test_generate_with_left_padding(kind: str, cache: dict[str, Any]) -> None:
    built = tuned(model(kind))
    ids, keep = tokens(), mask("left")
    sequences, logits = generated(built, ids, attention_mask=keep, **cache)
    # A padded row is generated as it is alone and unpadded.
    alone = generated(built, ids[1:2, 4:], **cache)
    assert torch.equal(sequences[1:2, 9:], alone[0][:, 5:])
    if "num_beams" in cache:
        return
    torch.testing.assert_close(logits[1:2], alone[1], rtol=1e-4, atol=1e-5)
    # Every step is the forward pass over all tokens up to it.
    keep = nn.functional.pad(keep, (0, 6), value=1)
    positions = (keep.cumsum(1) - 1).clamp(min=0)
    whole = built(sequences, attention_mask=keep, position_ids=positions).logits[:, 8:-1]
    torch.testing.assert_close(logits, whole, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("cache", [{"cache_implementation": "static"}, {"use_cache": False}])
@pytest.mark.parametrize("kind", ["t5", "bart"])
def test_generate_of_encoder_decoders_with_any_cache(kind: str, cache: dict[str, Any]) -> None:
    built = tuned(model(kind))
    arguments = {"attention_mask": mask("both")}
    expected = generated(built, tokens(), **arguments)
    got = generated(built, tokens(), **arguments, **cache)
    assert torch.equal(got[0], expected[0])
    torch.testing.assert_close(got[1], expected[1], rtol=1e-4, atol=1e-5)


def test_the_cache_has_the_sequence_s_own_length() -> None:
    built = tuned(model("llama"))
    out = built(tokens(), use_cache=True)
    assert out.past_key_values.get_seq_length() == 9
    more = built(tokens(3, 2), past_key_values=out.past_key_values).logits
    whole = built(torch.cat((tokens(), tokens(3, 2)), dim=1)).logits[:, 9:]
    torch.testing.assert_close(more, whole, rtol=1e-4, atol=1e-5)


def gradients(built: nn.Module, arguments: dict[str, Any]) -> Tensor:
    built.zero_grad()
    built(**arguments).loss.backward()
    assert all(p.grad is None for p in built.parameters() if not p.requires_grad)
    parameters = encoder(built).parameters()
    return torch.cat([p.grad.flatten() for p in parameters if p.grad is not None])


QUIET = {
    "gpt2": {"attn_pdrop": 0.0, "resid_pdrop": 0.0, "embd_pdrop": 0.0},
    "bert": {"attention_probs_dropout_prob": 0.0, "hidden_dropout_prob": 0.0},
    "t5": {"dropout_rate": 0.0},
}


@pytest.mark.parametrize("projection", [False, True])
@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("kind", ["llama", "mistral", "gpt2", "bert", "t5"])
def test_checkpointing_changes_nothing(kind: str, reentrant: bool, projection: bool) -> None:
    arguments = {**inputs(kind), "attention_mask": mask("right")}
    expected = None
    for checkpointing in ("off", "before the adapter", "after"):
        built = model(kind, **QUIET.get(kind, {}))
        if checkpointing == "before the adapter":
            built.gradient_checkpointing_enable({"use_reentrant": reentrant})
            built.disable_input_require_grads()  # which not every version does by itself
        torch.manual_seed(1)
        built = tuned(built, prefix_projection=projection).train()
        if checkpointing == "after":
            built.gradient_checkpointing_enable({"use_reentrant": reentrant})
        got = gradients(built, arguments)
        expected = got if expected is None else expected
        assert got.abs().max() > 1e-6
        torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-8)


def test_checkpointing_with_dropout_on_the_prefix() -> None:
    built = tuned(model("llama"), prefix_dropout=0.5).train()
    torch.manual_seed(0)
    expected = gradients(built, inputs("llama"))
    assert not torch.equal(gradients(built, inputs("llama")), expected)
    for reentrant in (True, False):
        built.gradient_checkpointing_enable({"use_reentrant": reentrant})
        torch.manual_seed(0)
        got = gradients(built, inputs("llama"))
        torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-8)


@pytest.mark.parametrize("padding", [None, "right"])
@pytest.mark.parametrize("kind", ["llama", "mistral", "gpt2", "bert", "t5"])
def test_compiles_without_a_graph_break(kind: str, padding: str | None) -> None:
    built = tuned(model(kind))
    arguments = inputs(kind)
    if kind == "gpt2":  # transformers warns about its loss, which breaks the graph
        del arguments["labels"]
    if padding is not None:
        arguments["attention_mask"] = mask(padding)
    torch._dynamo.reset()
    compiled = torch.compile(built, fullgraph=True, backend="aot_eager")
    outs, grads = [], []
    for run in (compiled, built):
        built.zero_grad()
        out = run(**arguments).logits
        (out**2).sum().backward()
        outs.append(out.detach())
        grads.append(grad_of(encoder(built)))
    torch.testing.assert_close(*outs, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(*grads, rtol=1e-4, atol=1e-6)


class Words:
    """A tokenizer of numbers."""

    def __call__(self, text: str, **kwargs: Any) -> dict[str, list[int]]:
        return {"input_ids": [int(word) for word in text.split()]}


@pytest.mark.parametrize("projection", [False, True])
@pytest.mark.parametrize("text", ["7 9 11 30 5", "7 9"])
@pytest.mark.parametrize("kind", ["llama", "mistral", "qwen3", "gpt2", "gemma2"])
def test_started_from_a_text_the_prefix_is_the_text(kind: str, text: str, projection: bool) -> None:
    built = model(kind, **WIDE.get(kind, {})).train()
    modes = [module.training for module in built.modules()]
    more = {"prefix_projection": projection, "encoder_hidden_size": 16}
    torch.manual_seed(0)
    get_peft_model(
        built,
        PrefixTuningConfig(
            task_type="CAUSAL_LM",
            num_virtual_tokens=P,
            prefix_init="text",
            prefix_init_text=text,
            **more,
        ),
        tokenizer=Words(),
    )
    assert [m.training for n, m in built.named_modules() if "prompt_adapters" not in n] == modes
    built.eval()
    words = ([int(word) for word in text.split()] * P)[:P]
    before = torch.tensor([words] * 3)
    with disable_adapter(built):
        expected = built(torch.cat((before, tokens()), dim=1)).logits[:, P:]
    torch.testing.assert_close(built(tokens()).logits, expected, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("kind", ["bert", "t5"])
def test_started_from_a_text_in_an_encoder_and_an_encoder_decoder(kind: str) -> None:
    built = tuned(model(kind), Words(), prefix_init="text", prefix_init_text="7 9 11 30 5")
    ids = torch.tensor([[7, 9, 11, 30, 5]])
    # By hand: the values of layer 0 and, in the decoder, of layer 1, which has PEFT's plane 2.
    with disable_adapter(built), torch.no_grad():
        if kind == "bert":
            layer = built.bert.encoder.layer[0].attention.self
            expected = {0: layer.value(built.bert.embeddings(ids))}
        else:
            states = built(
                input_ids=ids, decoder_input_ids=ids, output_hidden_states=True
            ).decoder_hidden_states
            blocks = [block.layer[0] for block in built.decoder.block]
            values = [
                b.SelfAttention.v(b.layer_norm(s)) for b, s in zip(blocks, states, strict=False)
            ]
            expected = {0: values[0], 2: values[1], 1: values[2]}
    for plane, value in expected.items():
        got = encoder(built).key_value(plane)[1].permute(1, 0, 2).flatten(1)
        torch.testing.assert_close(got, value[0], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("precision", ["bfloat16", "autocast"])
def test_half_precision(precision: str) -> None:
    exact = tuned(model("llama"))
    built = tuned(model("llama"))
    encoder(built).load_prompt_embeddings(encoder(exact).prompt_embeddings())
    expected = exact(tokens()).logits
    if precision == "bfloat16":
        for name, module in built.named_children():
            if name != "prompt_adapters":
                module.to(torch.bfloat16)
        got = built(tokens()).logits
    else:
        with torch.autocast("cpu", torch.bfloat16):
            got = built(tokens()).logits
    assert got.dtype == torch.bfloat16
    torch.testing.assert_close(got.float(), expected, rtol=5e-2, atol=5e-2)
    got.float().sum().backward()
    assert all(p.grad is not None and p.grad.dtype == torch.float32 for p in encoder(built).prefix)


def test_only_the_prefix_is_trainable_and_it_learns() -> None:
    built = tuned(model("llama"), prefix_init="zero").train()
    trainable, _ = get_nb_trainable_parameters(built)
    assert trainable == P * 2 * 2 * 16  # layers, keys and values, 2 heads of 8
    frozen = {n: p.clone() for n, p in built.named_parameters() if not p.requires_grad}
    optimizer = torch.optim.Adam([p for p in built.parameters() if p.requires_grad], lr=0.1)
    losses = []
    for _ in range(15):
        loss = built(**inputs("llama")).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 0.1
    assert all(torch.equal(frozen[n], p) for n, p in built.named_parameters() if n in frozen)


def test_adapters_are_switched_disabled_and_deleted() -> None:
    built = model("llama")
    base, before = built(tokens()).logits, built.config._attn_implementation
    tuned(built)
    first = built(tokens()).logits
    add_adapter(built, PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3), "second")
    assert torch.equal(built(tokens()).logits, first)
    set_adapter(built, "second")
    second = built(tokens()).logits
    assert (second - first).abs().max() > 1e-3
    with disable_adapter(built):
        torch.testing.assert_close(built(tokens()).logits, base, rtol=1e-4, atol=1e-5)
    assert torch.equal(built(tokens()).logits, second)
    set_adapter(built, "default")
    assert torch.equal(built(tokens()).logits, first)
    with pytest.raises(ValueError, match=r"merg|no LoRA|prefix|PREFIX"):
        merge_adapter(built)
    delete_adapter(built, "second")
    assert torch.equal(built(tokens()).logits, first)
    delete_adapter(built, "default")
    torch.testing.assert_close(built(tokens()).logits, base, rtol=1e-4, atol=1e-5)
    assert built.config._attn_implementation == before
    assert not any(m._forward_pre_hooks or m._forward_hooks for m in built.modules())
    assert not any("fused_peft_prefix" in vars(m) for m in built.modules())


def test_a_text_runs_through_the_base_model_whatever_is_active() -> None:
    config = PrefixTuningConfig(
        task_type="CAUSAL_LM",
        num_virtual_tokens=P,
        prefix_init="text",
        prefix_init_text="7 9 11 30 5",
    )
    built, fresh = tuned(model("llama")), model("llama")
    add_adapter(built, config, "text", tokenizer=Words())
    get_peft_model(fresh, config, tokenizer=Words())
    got = encoder(built, "text").prompt_embeddings()
    torch.testing.assert_close(got, encoder(fresh).prompt_embeddings(), rtol=1e-5, atol=1e-5)
    assert built.prompt_adapters.enabled


def test_a_copy_has_a_prefix_of_its_own() -> None:
    built = tuned(model("llama"))
    twin = copy.deepcopy(built)
    before = built(tokens()).logits
    assert torch.equal(twin(tokens()).logits, before)
    encoder(twin).load_prompt_embeddings(torch.zeros_like(encoder(twin).prompt_embeddings()))
    assert torch.equal(built(tokens()).logits, before)
    assert (twin(tokens()).logits - before).abs().max() > 1e-3
    names = set(built.state_dict())
    assert {n for n in names if "prefix" in n} == {
        f"prompt_adapters.adapters.default.prefix.{layer}" for layer in range(2)
    }


def test_together_with_lora() -> None:
    built = tuned(model("llama"))
    add_adapter(built, LoraConfig(r=4, target_modules=["q_proj", "v_proj"]), "lora")
    for name, parameter in built.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.1)
    prefix_only = built(tokens()).logits
    set_adapter(built, ["lora", "default"])
    got = built(tokens()).logits
    assert (got - prefix_only).abs().max() > 1e-3
    out = built(**inputs("llama"))
    out.loss.backward()
    for name, parameter in built.named_parameters():
        assert (parameter.grad is not None) == ("lora_" in name or "prompt_adapters" in name)
    merge_adapter(built, adapter_names=["lora"])
    torch.testing.assert_close(built(tokens()).logits, got, rtol=1e-4, atol=1e-5)


def test_the_op_gets_the_prefix_and_no_mask(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[tuple[Any, ...]] = []
    original = ops.prefix_attention

    def seen(*args: Any, **kwargs: Any) -> Tensor:
        calls.append((*args, kwargs))
        return original(*args, **kwargs)

    built = tuned(model("llama"))
    monkeypatch.setattr(ops, "prefix_attention", seen)
    built(tokens(), attention_mask=mask("none"))
    assert len(calls) == 2
    for layer, (q, k, _, prefix_k, prefix_v, kwargs) in enumerate(calls):
        keys, values = encoder(built).key_value(layer)
        assert torch.equal(prefix_k, keys)
        assert torch.equal(prefix_v, values)
        assert q.shape == (3, 4, 9, 8)
        assert k.shape == (3, 2, 9, 8)
        assert kwargs["causal"]
        assert kwargs["key_mask"] is None


def unchanged(built: nn.Module, attempt: Callable[[], Any], error: Any, message: str) -> None:
    state = {name: tensor.clone() for name, tensor in built.state_dict().items()}
    grads = [p.requires_grad for p in built.parameters()]
    implementation = getattr(getattr(built, "config", None), "_attn_implementation", None)
    with pytest.raises(error, match=message):
        attempt()
    assert state.keys() == built.state_dict().keys()
    assert all(torch.equal(state[name], t) for name, t in built.state_dict().items())
    assert [p.requires_grad for p in built.parameters()] == grads
    assert getattr(getattr(built, "config", None), "_attn_implementation", None) == implementation
    assert not any(m._forward_pre_hooks or m._forward_hooks for m in built.modules())


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"num_layers": 3}, "num_layers is 3; expected 2"),
        ({"num_attention_heads": 4}, "num_attention_heads is 4; expected 2"),
        ({"token_dim": 32}, "token_dim is 32; expected 16"),
        ({"num_virtual_tokens": 0}, "num_virtual_tokens is 0"),
        ({"prefix_init": "text", "prefix_init_text": "1 2 3 4 5 6"}, "has 6 tokens; expected 1 to"),
        ({"prefix_init": "text", "prefix_init_text": "  "}, "prefix_init_text"),
    ],
)
def test_a_config_that_does_not_fit(changed: dict[str, Any], message: str) -> None:
    built = model("llama")
    unchanged(built, lambda: tuned(built, Words(), **changed), (TypeError, ValueError), message)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"num_layers": 3}, "num_layers is 3; expected 2, the layers of LlamaForCausalLM"),
        ({"num_attention_heads": 4}, "num_attention_heads is 4; expected 2, the key/value heads"),
        ({"token_dim": 32}, "token_dim is 32; expected 16, 2 key/value heads of 8"),
    ],
)
def test_the_model_s_own_modules_are_asked(changed: dict[str, Any], message: str) -> None:
    from fused_peft.tuners.prefix import check_prefix

    sizes = {"num_layers": 2, "num_attention_heads": 2, "token_dim": 16}
    built = model("llama")
    check_prefix(built, PrefixTuningConfig(num_virtual_tokens=P, **sizes))
    config = PrefixTuningConfig(num_virtual_tokens=P, **{**sizes, **changed})
    unchanged(built, lambda: check_prefix(built, config), ValueError, message)


def test_a_text_without_a_tokenizer() -> None:
    built = model("llama")
    unchanged(
        built,
        lambda: tuned(built, prefix_init="text", prefix_init_text="5"),
        ValueError,
        "tokenizer",
    )


def test_more_virtual_tokens_than_positions() -> None:
    built = model("gpt2")
    unchanged(
        built,
        lambda: tuned(built, num_virtual_tokens=64),
        ValueError,
        "num_virtual_tokens is 64; expected less than the 64 positions",
    )


def test_a_model_that_keeps_its_attention(monkeypatch: pytest.MonkeyPatch) -> None:
    built = model("llama")

    def other(self: nn.Module, name: str) -> None:
        self.config._attn_implementation_internal = "eager"

    monkeypatch.setattr(type(built), "set_attn_implementation", other)
    unchanged(
        built, lambda: tuned(built), ValueError, "keeps its attention implementation, 'eager'"
    )


def test_a_table_of_positions_that_counts_from_where_the_cache_ends() -> None:
    from transformers.models.bart.modeling_bart import BartLearnedPositionalEmbedding

    from fused_peft.tuners.prefix import _ShiftPositions

    table = BartLearnedPositionalEmbedding(40, 4)
    adapters = tuned(model("bart")).prompt_adapters
    shifted = copy.deepcopy(table)
    shifted.register_forward_pre_hook(_ShiftPositions(adapters, shifted), with_kwargs=True)
    ids = tokens(2, 6)
    for arguments in ({}, {"past_key_values_length": 3}, {"position_ids": torch.arange(6)}):
        ahead = {**arguments}
        name = "position_ids" if "position_ids" in arguments else "past_key_values_length"
        ahead[name] = ahead.get(name, 0) + P
        assert torch.equal(shifted(ids, **arguments), table(ids, **ahead))


def test_models_whose_attention_cannot_be_replaced() -> None:
    transformers = pytest.importorskip("transformers")
    config = PrefixTuningConfig(
        num_virtual_tokens=P, num_layers=2, num_attention_heads=4, token_dim=32
    )
    bloom = transformers.BloomForCausalLM(
        transformers.BloomConfig(vocab_size=40, hidden_size=32, n_layer=2, n_head=4)
    )
    unchanged(
        bloom,
        lambda: get_peft_model(bloom, config),
        ValueError,
        "its attention does not go through",
    )
    plain = nn.Sequential(nn.Linear(4, 4))
    unchanged(
        plain, lambda: get_peft_model(plain, config), TypeError, "expected a transformers model"
    )
