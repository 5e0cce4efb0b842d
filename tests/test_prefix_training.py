"""Training a prefix: checkpointing, compiling, half precision, what learns."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

pytest.importorskip("transformers")

from prefix_models import P, encoder, grad_of, inputs, mask, model, tokens, tuned

from fused_peft import get_nb_trainable_parameters


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
