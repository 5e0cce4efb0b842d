"""Models for the tests of fuse_model, and how near their results have to be."""

from __future__ import annotations

import prefix_models
import torch

import fused_peft


def build(kind, adapter=None, dtype=torch.float32):
    """A model with norm weights that are not all alike and, if asked for, an adapter."""
    model = prefix_models.model(kind)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() == 1 and "norm" in name:
                parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator))
    if adapter == "lora":
        fused_peft.get_peft_model(model, fused_peft.LoraConfig(r=4, target_modules="all-linear"))
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if "lora_B" in name:
                    parameter.copy_(0.1 * torch.randn(parameter.shape, generator=generator))
    elif adapter == "prefix":
        fused_peft.get_peft_model(model, fused_peft.PrefixTuningConfig(num_virtual_tokens=3))
    return model.to(dtype)


def run(model, **changed):
    """Logits, loss, and the gradients of the inputs and of everything trained."""
    ids = prefix_models.tokens()
    labels = ids.clone()
    labels[1, 2:5] = -100
    embeds = model.get_input_embeddings()(ids).detach().requires_grad_()
    model.zero_grad()
    out = model(**{"inputs_embeds": embeds, "labels": labels, "use_cache": False, **changed})
    out.loss.backward()
    gradients = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    return {"logits": out.logits.detach(), "loss": out.loss.detach(), "x": embeds.grad, **gradients}


def assert_same(fused, plain):
    assert fused.keys() == plain.keys()
    for name, value in plain.items():
        scale = value.abs().max().item()
        torch.testing.assert_close(
            fused[name], value, rtol=1e-5, atol=2e-6 * scale, msg=lambda m, n=name: f"{n}: {m}"
        )


def assert_not_worse(fused, plain, exact):
    """No further from ``exact`` over all tensors; single ones, of few elements, vary by chance."""
    assert fused.keys() == plain.keys() == exact.keys()
    errors = {"fused": [], "plain": []}
    for name, value in exact.items():
        for kind, result in (("fused", fused), ("plain", plain)):
            errors[kind].append(((result[name].double() - value).norm() / value.norm()).item())
        assert errors["fused"][-1] <= 2 * errors["plain"][-1] + 2.0**-9, name
    ours, theirs = (torch.tensor(e).square().mean().sqrt().item() for e in errors.values())
    assert ours <= 1.1 * theirs
