"""fuse_model's loss of causal language models against transformers' own."""

from __future__ import annotations

import prefix_models
import pytest
import torch

from fused_peft import fuse_model, unfuse_model

pytest.importorskip("transformers")
from fused_models import assert_same, build, run
from transformers.loss.loss_utils import ForCausalLMLoss


@pytest.mark.parametrize("shifted", [False, True])
@pytest.mark.parametrize("items", [None, 7, torch.tensor(11)])
@pytest.mark.parametrize("ignore_index", [-100, 5])
def test_loss_is_that_of_transformers(items, ignore_index, shifted):
    model = build("llama")
    ours = (fuse_model(model), model.loss_function)[1]
    assert ours is not ForCausalLMLoss
    generator = torch.Generator().manual_seed(1)
    logits = 5 * torch.randn(3, 6, 40, generator=generator)
    labels = torch.randint(0, 40, (3, 6), generator=generator)
    labels[0, 2] = labels[2, 5] = labels[1, 0] = ignore_index
    results = []
    for function in (ours, ForCausalLMLoss):
        x = logits.clone().requires_grad_()
        given = {"labels": None, "shift_labels": labels} if shifted else {"labels": labels}
        loss = function(
            x, vocab_size=40, num_items_in_batch=items, ignore_index=ignore_index, **given
        )
        loss.backward()
        results.append((loss, x.grad))
    for ours_, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours_, theirs, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("items", [None, 4])
def test_all_labels_ignored(items):
    model = build("llama", "lora")
    labels = torch.full((3, 9), -100)
    given = {"labels": labels, "num_items_in_batch": items}
    plain = run(model, **given)
    fuse_model(model)
    fused = run(model, **given)
    assert plain["loss"].isnan() == (items is None)
    for name, value in plain.items():
        if name != "logits":
            torch.testing.assert_close(fused[name], value, equal_nan=True, rtol=0, atol=0)


def test_accumulated_steps_as_trainer_takes_them():
    model = build("llama", "lora")
    ids = prefix_models.tokens(rows=4)
    labels = ids.clone()
    labels[0, :7] = -100
    count = (labels[:, 1:] != -100).sum()
    whole = run(model, inputs_embeds=None, input_ids=ids, labels=labels)
    fuse_model(model)
    model.zero_grad()
    for rows in (slice(0, 1), slice(1, 4)):
        model(input_ids=ids[rows], labels=labels[rows], num_items_in_batch=count).loss.backward()
    summed = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    assert_same(summed, {n: whole[n] for n in summed})


def test_loss_makes_no_float32_copy_of_bfloat16_logits():
    model = build("llama")
    fuse_model(model)
    seen = []

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            seen.extend(t for t in torch.utils._pytree.tree_leaves(out) if torch.is_tensor(t))
            return out

    logits = torch.randn(2, 6, 40, dtype=torch.bfloat16, requires_grad=True)
    labels = torch.randint(0, 40, (2, 6))
    with Watch():
        loss = model.loss_function(logits, labels, vocab_size=40)
        (gradient,) = torch.autograd.grad(loss, logits)
    assert gradient.dtype == torch.bfloat16
    assert loss.dtype == torch.float32
    assert not [t for t in seen if t.numel() >= logits.numel() and t.dtype == torch.float32]


def test_another_loss_is_left_alone():
    model = build("llama")

    def other(logits, labels, vocab_size, **kwargs):
        return logits.sum()

    model.loss_function = other
    assert fuse_model(model)["loss"] == 0
    assert model.loss_function is other
    model.loss_function = ForCausalLMLoss
    assert fuse_model(model)["loss"] == 1
    unfuse_model(model)
    assert model._loss_function is ForCausalLMLoss
