"""explain() of layers with several adapters says what their forward does, op by op."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from fused_peft import (
    LoraLinear,
    LoraWrappedLinear,
    explain,
    ops,
    reference,
    simulated_cuda,
    simulator,
)


def several(make: Callable[..., Any], *, r: int = 2, **dropout: float) -> Any:
    """A layer with an active adapter for every keyword, of the dropout it gives."""
    names = list(dropout)
    options = [{"r": r, "lora_dropout": p} for p in dropout.values()]
    layer = make(**options[0], adapter_name=names[0])
    for name, option in zip(names[1:], options[1:], strict=True):
        layer.add_adapter(name, **option)
    layer.set_adapter(names)
    return layer


def plain(**options: Any) -> LoraLinear:
    return LoraLinear(12, 8, **options)


def wrapped(**options: Any) -> LoraWrappedLinear:
    return LoraWrappedLinear(nn.Linear(12, 8), **options)


X = torch.randn(3, 12)


def test_what_drops_is_no_part_of_the_pass() -> None:
    layer = several(plain, a=0.5, b=0.0, c=0.5, d=0.0)
    told = explain(layer, X)
    assert told.startswith("kernel: cpu")
    assert "adapters ['b', 'd'] in one pass" in told
    assert told.endswith("; ['a', 'c'] by torch's ops, for they drop elements of their own")
    assert "adapters ['a', 'b', 'c', 'd'] in one pass" in explain(layer.eval(), X)


def test_one_that_drops_is_part_of_it_where_all_do() -> None:
    told = explain(several(plain, a=0.5, b=0.5), X)
    assert "adapters ['a'] in one pass" in told
    assert told.endswith("; ['b'] by torch's ops, for they drop elements of their own")


def test_each_that_drops_is_a_pass_of_a_wrapped_layer() -> None:
    told = explain(several(wrapped, a=0.5, b=0.0, c=0.0), X)
    assert "2 passes over what the base gave (3 rows)" in told
    assert told.endswith("adapters ['b', 'c'], then ['a']")


@pytest.mark.parametrize(("make", "op"), [(plain, "lora_linear"), (wrapped, "lora_update")])
def test_the_ranks_add_up(
    make: Callable[..., Any], op: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    layer = several(make, r=ops.MAX_RANK // 2 + 1, a=0.0, b=0.0)
    ran = []
    original = getattr(reference, op)
    monkeypatch.setattr(reference, op, lambda *a, **k: ran.append(op) or original(*a, **k))
    layer(X)
    assert ran == [op]
    assert f"the rank is {ops.MAX_RANK + 2}; kernels exist up to {ops.MAX_RANK}" in explain(
        layer, X
    )


@pytest.mark.skipif(not simulator.has_kernels(), reason="no nvcc, so no CUDA kernels were built")
def test_the_simulated_device_is_in_force_to_the_end_of_the_outermost_context() -> None:
    layer, x = plain(dtype=torch.bfloat16), X.bfloat16()
    with simulated_cuda():
        with simulated_cuda():
            assert explain(layer, x).startswith("kernel: CUDA")
        assert explain(layer, x).startswith("kernel: CUDA")
    assert explain(layer, x).startswith("kernel: cpu")
