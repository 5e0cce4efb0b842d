"""PrefixEncoder; PEFT is the measure."""

from __future__ import annotations

import copy
import io
import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from prefix_models import rand
from torch import Tensor, nn

from fused_peft.nn.prefix_encoder import PrefixEncoder

P, LAYERS, HEADS, DIM = 5, 3, 2, 4


def config(**changed: Any) -> Any:
    fields: dict[str, Any] = {
        "num_virtual_tokens": P,
        "num_layers": LAYERS,
        "num_attention_heads": HEADS,
        "token_dim": HEADS * DIM,
        "prefix_projection": False,
        "encoder_hidden_size": None,
        "prefix_dropout": 0.0,
        "prefix_init": "random",
        "num_transformer_submodules": 1,
    }
    return SimpleNamespace(**{**fields, **changed})


def encoder(seed: int = 0, **changed: Any) -> PrefixEncoder:
    torch.manual_seed(seed)
    return PrefixEncoder(config(**changed))


def peft_encoder(state: dict[str, Tensor], hidden: int) -> nn.Module:
    peft = pytest.importorskip("peft")
    module = peft.PrefixEncoder(
        peft.PrefixTuningConfig(
            num_virtual_tokens=P,
            num_layers=LAYERS,
            num_attention_heads=HEADS,
            token_dim=HEADS * DIM,
            prefix_projection=True,
            encoder_hidden_size=hidden,
        )
    )
    module.load_state_dict(state)
    return module


def peft_planes(embeddings: Tensor) -> Tensor:
    """PEFT's own steps from an encoder's output to ``[2 * layers, heads, P, dim]``."""
    return embeddings.view(1, P, 2 * LAYERS, HEADS, DIM).permute(2, 0, 3, 1, 4)[:, 0]


@pytest.mark.parametrize("projection", [False, True])
def test_the_planes_are_peft_s(projection: bool) -> None:
    module = encoder(prefix_projection=projection)
    planes = peft_planes(module.prompt_embeddings())
    for layer in range(LAYERS):
        keys, values = module.key_value(layer)
        torch.testing.assert_close(keys, planes[2 * layer], rtol=0, atol=0)
        torch.testing.assert_close(values, planes[2 * layer + 1], rtol=0, atol=0)
        assert keys.shape == (HEADS, P, DIM)
        assert keys.requires_grad
    assert not module.prompt_embeddings().requires_grad


def test_the_mlp_is_peft_s_with_its_gradients() -> None:
    module = encoder(prefix_projection=True, encoder_hidden_size=7)
    theirs = peft_encoder(module.encoder_state(), 7)
    expected = theirs(torch.arange(P))
    torch.testing.assert_close(module.prompt_embeddings(), expected.detach(), rtol=1e-6, atol=1e-6)
    weight = rand(2 * LAYERS, HEADS, P, DIM)
    (peft_planes(expected) * weight).sum().backward()
    pairs = [module.key_value(layer) for layer in range(LAYERS)]
    sum((torch.stack(p) * weight[2 * i : 2 * i + 2]).sum() for i, p in enumerate(pairs)).backward()
    assert module.embedding is not None
    assert module.hidden is not None
    grads = {
        "embedding.weight": module.embedding.grad,
        "transform.0.weight": module.hidden.weight.grad,
        "transform.0.bias": module.hidden.bias.grad,
        "transform.2.weight": torch.cat([o.weight.grad for o in module.outputs]),
        "transform.2.bias": torch.cat([o.bias.grad for o in module.outputs]),
    }
    for name, parameter in theirs.named_parameters():
        torch.testing.assert_close(grads[name], parameter.grad, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("projection", [False, True])
def test_random_start_has_peft_s_distribution(projection: bool) -> None:
    sizes = {"num_virtual_tokens": 64, "num_layers": 8, "token_dim": 64, "num_attention_heads": 4}
    module = encoder(prefix_projection=projection, encoder_hidden_size=48, **sizes)
    if not projection:
        std = module.prompt_embeddings().std().item()
        assert std == pytest.approx(1.0, abs=5 / math.sqrt(2 * 64 * 8 * 2 * 64))
        return
    for name, tensor in module.encoder_state().items():
        if name == "embedding.weight":
            assert tensor.std().item() == pytest.approx(1.0, abs=5 / math.sqrt(2 * 64 * 64))
        else:  # uniform in +-1/sqrt(in_features)
            bound = 1 / math.sqrt(64 if name.startswith("transform.0") else 48)
            assert 0.9 * bound < tensor.abs().max().item() <= bound


@pytest.mark.parametrize("projection", [False, True])
def test_zero_start_gives_zeros_and_can_learn(projection: bool) -> None:
    module = encoder(prefix_projection=projection, prefix_init="zero")
    assert module.prompt_embeddings().abs().max() == 0
    module.key_value(1)[0].sum().backward()
    assert any(p.grad is not None and p.grad.abs().max() > 0 for p in module.parameters())


def test_loading_embeddings_folds_and_holds_exactly_them() -> None:
    module = encoder(prefix_projection=True)
    wanted = rand(P, 2 * LAYERS * HEADS * DIM)
    module.load_prompt_embeddings(wanted)
    assert module.folded
    assert torch.equal(module.prompt_embeddings(), wanted)
    assert module.encoder_state() == {}
    wanted.zero_()  # a copy was taken
    assert module.prompt_embeddings().abs().max() > 0
    assert all(p.requires_grad for p in module.parameters())


def test_folding_keeps_the_values_drops_the_mlp_and_is_idempotent() -> None:
    module = encoder(prefix_projection=True, prefix_dropout=0.5).requires_grad_(False)
    before = module.prompt_embeddings()
    module.train().fold_reparameterization()
    names = {name for name, _ in module.named_parameters()}
    assert names == {f"prefix.{layer}" for layer in range(LAYERS)}
    assert not any(p.requires_grad for p in module.parameters())
    assert torch.equal(module.prompt_embeddings(), before)
    held = list(module.parameters())
    module.fold_reparameterization()
    assert all(a is b for a, b in zip(held, module.parameters(), strict=True))


def test_encoder_state_resumes() -> None:
    module, other = encoder(prefix_projection=True), encoder(1, prefix_projection=True)
    assert not torch.equal(module.prompt_embeddings(), other.prompt_embeddings())
    other.load_encoder_state(module.encoder_state())
    assert torch.equal(module.prompt_embeddings(), other.prompt_embeddings())
    assert not other.folded
    encoder().load_encoder_state({})


def test_dropout_in_training_only_drops_whole_entries_and_scales_the_rest() -> None:
    module = encoder(prefix_dropout=0.5, num_virtual_tokens=200)
    plain = torch.stack(module.eval().key_value(0))
    torch.testing.assert_close(plain, module.prefix[0], rtol=0, atol=0)
    dropped = torch.stack(module.train().key_value(0))
    zero = dropped == 0
    assert 0.4 < zero.float().mean().item() < 0.6
    torch.testing.assert_close(dropped[~zero], 2 * plain[~zero])
    assert not torch.equal(dropped, torch.stack(module.key_value(0)))


@pytest.mark.parametrize("projection", [False, True])
def test_start_from_given_keys_and_values(projection: bool) -> None:
    module = encoder(prefix_projection=projection)
    layers = [(rand(HEADS, P, DIM, seed=i), rand(HEADS, P, DIM, seed=9 + i)) for i in range(LAYERS)]
    module.start_from(layers)
    for layer, (keys, values) in enumerate(layers):
        got = module.key_value(layer)
        torch.testing.assert_close(got[0], keys, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(got[1], values, rtol=1e-5, atol=1e-5)
    assert module.folded != projection


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"num_virtual_tokens": 0}, "num_virtual_tokens is 0"),
        ({"num_layers": None}, "num_layers is None"),
        ({"token_dim": 7}, "token_dim is 7; expected a multiple of num_attention_heads, 2"),
        ({"prefix_dropout": 1.0}, "prefix_dropout is 1.0"),
        ({"prefix_projection": True, "encoder_hidden_size": -1}, "encoder_hidden_size is -1"),
    ],
)
def test_sizes_that_make_no_sense(changed: dict[str, Any], message: str) -> None:
    with pytest.raises((TypeError, ValueError), match=message):
        encoder(**changed)


def test_what_does_not_fit_is_refused_and_changes_nothing() -> None:
    module = encoder(prefix_projection=True, encoder_hidden_size=P - 1)
    before = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    with pytest.raises(ValueError, match=r"shape \(5, 47\); expected .*\(5, 48\)"):
        module.load_prompt_embeddings(torch.zeros(P, 47))
    with pytest.raises(ValueError, match="int64"):
        module.load_prompt_embeddings(torch.zeros(P, 48, dtype=torch.int64))
    state = module.encoder_state()
    with pytest.raises(ValueError, match=r"'transform.0.bias' has shape"):
        module.load_encoder_state({**state, "transform.0.bias": torch.zeros(1)})
    with pytest.raises(ValueError, match=r"'embedding.weight' is missing"):
        module.load_encoder_state({k: v for k, v in state.items() if k != "embedding.weight"})
    with pytest.raises(ValueError, match="'more' is unknown"):
        module.load_encoder_state({**state, "more": torch.zeros(1)})
    layers = [(torch.zeros(HEADS, P, DIM),) * 2] * LAYERS
    with pytest.raises(ValueError, match=r"encoder_hidden_size is 4; expected at least .*5"):
        module.start_from(layers)
    with pytest.raises(ValueError, match="2 layers"):
        module.start_from(layers[:2])
    with pytest.raises(ValueError, match="layer 0 has keys of shape"):
        module.start_from([(torch.zeros(HEADS, 1, DIM),) * 2] * LAYERS)
    assert all(torch.equal(before[name], t) for name, t in module.state_dict().items())
    with pytest.raises(ValueError, match=r"'embedding.weight' is unknown"):
        encoder().load_encoder_state(state)


@pytest.mark.parametrize("projection", [False, True])
def test_copies_and_state_dicts(projection: bool) -> None:
    module = encoder(prefix_projection=projection)
    twin = copy.deepcopy(module)
    other = encoder(2, prefix_projection=projection)
    buffer = io.BytesIO()
    torch.save(module.state_dict(), buffer)
    buffer.seek(0)
    other.load_state_dict(torch.load(buffer, weights_only=True))
    for copied in (twin, other):
        assert torch.equal(copied.prompt_embeddings(), module.prompt_embeddings())
    with torch.no_grad():
        next(twin.parameters()).add_(1.0)
    assert not torch.equal(twin.prompt_embeddings(), module.prompt_embeddings())
