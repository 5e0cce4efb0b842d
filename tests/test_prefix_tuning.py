"""Prefix tuning computes what Hugging Face PEFT does in transformers models."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

pytest.importorskip("transformers")

from prefix_models import (
    P,
    encoder,
    grad_of,
    inputs,
    mask,
    model,
    task,
    tokens,
    tuned,
    with_peft,
)
from transformers import DynamicCache

from fused_peft import disable_adapter, ops

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
