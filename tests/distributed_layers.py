"""One split layer in every process against the whole one in plain torch; run by the processes."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Placement, Replicate, Shard
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    RowwiseParallel,
    parallelize_module,
)

import fused_peft
from fused_peft import LoraConfig, LoraLinear, reference
from fused_peft.distributed import (
    ColwiseLoraParallel,
    RowwiseLoraParallel,
    TensorParallelLoraLinear,
    clip_grad_norm_,
    parameter_groups,
)

K, N = 12, 8
SHAPE = (2, 8, K)  # batch, sequence, features


@dataclass(frozen=True)
class Layout:
    """How a layer is split, and how x comes and y goes; None is the style's default."""

    style: str
    x: Placement | None = None
    y: Placement | None = None
    local: bool = True
    dtype: torch.dtype = torch.float64
    transposed: bool = False
    trained_bias: bool = True

    def make(self) -> Any:
        kind = ColwiseLoraParallel if self.style == "column" else RowwiseLoraParallel
        return kind(input_layouts=self.x, output_layouts=self.y, use_local_output=self.local)

    def of_x(self) -> Placement:
        return self.x or (Replicate() if self.style == "column" else Shard(2))

    def of_y(self) -> Placement:
        return self.y or (Shard(2) if self.style == "column" else Replicate())


def tolerance(dtype: torch.dtype) -> dict[str, float]:
    """A sum of at most 24 terms of size 1 in another order."""
    bound = 24 * torch.finfo(dtype).eps
    return {"rtol": bound, "atol": bound}


def part(tensor: Tensor, placement: Placement) -> Tensor:
    """What this process has of a tensor."""
    if isinstance(placement, Shard):
        tensor = tensor.chunk(dist.get_world_size(), placement.dim)[dist.get_rank()]
    return tensor.detach().clone()


def make_layer(layout: Layout, dropout: float = 0.0, adapters: int = 1) -> LoraLinear:
    """The same in every process."""
    torch.manual_seed(0)
    linear: nn.Module = nn.Linear(K, N).to(layout.dtype)
    if layout.transposed:
        from transformers.pytorch_utils import Conv1D

        linear = Conv1D(N, K).to(layout.dtype)
        nn.init.normal_(linear.weight, std=0.3)
        nn.init.normal_(linear.bias)
    options: dict[str, Any] = {"lora_dropout": dropout, "init_lora_weights": False}
    layer = LoraLinear.from_linear(linear, r=3, lora_alpha=6, **options)
    for index in range(1, adapters):
        layer.add_adapter(f"adapter{index}", r=2, lora_alpha=1 + index, **options)
    layer.set_adapter(list(layer.r))
    layer.bias.requires_grad_(layout.trained_bias)
    return layer


def split(layer: LoraLinear, layout: Layout) -> LoraLinear:
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    result = parallelize_module(layer, mesh, layout.make())
    assert result is layer
    assert isinstance(layer, TensorParallelLoraLinear)
    return layer


def expected(layer: LoraLinear, x: Tensor, keep: list[Tensor] | None = None) -> Tensor:
    """The layer's definition, in plain torch and float64; ``keep`` are the dropout masks."""
    wide = x.double()
    y = wide @ layer.base_weight().double().t() + layer.bias.double()
    for index, name in enumerate(layer.active_adapters):
        dropped = wide
        if keep is not None:
            dropped = wide * keep[index] / (1 - layer.lora_dropout[name])
        a, b = layer.lora_A[name].double(), layer.lora_B[name].double()
        y = y + layer.scaling[name] * (dropped @ a.t() @ b.t())
    return y


def check(layout: Layout, dropout: float = 0.0, adapters: int = 1) -> None:
    """Output and every gradient of a split layer."""
    generator = torch.Generator().manual_seed(1)
    x, dy = (torch.randn(s, generator=generator) for s in (SHAPE, (*SHAPE[:-1], N)))
    x, dy = x.to(layout.dtype), dy.to(layout.dtype)
    whole_layer, layer = (
        make_layer(layout, dropout, adapters),
        make_layer(layout, dropout, adapters),
    )
    split(layer, layout)
    torch.manual_seed(7)
    keep = [mask_of(layout, dropout) for _ in range(adapters)] if dropout else None
    whole_x = x.clone().requires_grad_()
    y_expected = expected(whole_layer, whole_x, keep)
    y_expected.backward(dy.double())

    torch.manual_seed(7)
    local_x = part(x, layout.of_x()).requires_grad_()
    y = layer(local_x)
    bounds = tolerance(layout.dtype)
    if layout.local:
        assert not isinstance(y, DTensor)
        y.backward(part(dy, layout.of_y()))
        torch.testing.assert_close(y, part(y_expected, layout.of_y()).to(y.dtype), **bounds)
    else:
        assert y.placements == (layout.of_y(),)
        y.backward(DTensor.from_local(part(dy, layout.of_y()), y.device_mesh, y.placements))
        torch.testing.assert_close(y.full_tensor(), y_expected.to(x.dtype), **bounds)
    dx = part(whole_x.grad, layout.of_x()).to(x.dtype)
    torch.testing.assert_close(local_x.grad, dx, **bounds)
    whole_parameters = dict(whole_layer.named_parameters())
    for name, parameter in layer.named_parameters():
        assert parameter.requires_grad == whole_parameters[name].requires_grad, name
        if not parameter.requires_grad:
            assert parameter.grad is None, name
            continue
        assert parameter.grad.placements == parameter.placements, name
        grad = whole_parameters[name].grad
        # Summed over 16 tokens, so their size is that of several terms.
        torch.testing.assert_close(
            parameter.grad.full_tensor(), grad, rtol=4 * bounds["rtol"], atol=8 * bounds["atol"]
        )


def mask_of(layout: Layout, p: float) -> Tensor:
    """The mask over the whole of x that a layer draws next."""
    seed = fused_peft.ops.new_seed()
    if layout.style == "column":
        return reference.dropout_keep(SHAPE, p, seed)
    size = dist.get_world_size()
    local = (*SHAPE[:-1], K // size)
    masks = [reference.dropout_keep(local, p, seed + rank) for rank in range(size)]
    assert not torch.equal(masks[0], masks[1])
    return torch.cat(masks, -1)


def check_adapters(style: str) -> None:
    """Adapters come, go, are disabled, merged and unmerged in a split layer as in a whole one."""
    layout = Layout(style, y=Replicate())
    layer = make_layer(layout)
    x = torch.randn(SHAPE, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    local = part(x, layout.of_x())
    split(layer, layout)
    torch.manual_seed(dist.get_rank())  # a new adapter is the same everywhere all the same
    layer.add_adapter("second", r=2, lora_alpha=3, init_lora_weights=False)
    twin = make_layer(layout)
    twin.add_adapter("second", r=2, lora_alpha=3)
    with torch.no_grad():
        for name in ("lora_A", "lora_B"):
            getattr(twin, name)["second"].copy_(getattr(layer, name)["second"].full_tensor())

    def same(**tolerances: float) -> Tensor:
        y = layer(local)
        bounds = tolerances or tolerance(torch.float64)
        torch.testing.assert_close(y, expected(twin, x), **bounds)
        return y

    for names in (["default", "second"], ["second"], ["default"], []):
        layer.set_adapter(names)
        twin.set_adapter(names)
        same()
    both = ["default", "second"]
    layer.set_adapter(both)
    twin.set_adapter(both)
    y = same()
    layer.merge(safe=True)
    torch.testing.assert_close(layer(local), y, **tolerance(torch.float64))
    update = layer.weight.full_tensor() - twin.weight
    deltas = [twin.scaling[n] * twin.lora_B[n] @ twin.lora_A[n] for n in both]
    torch.testing.assert_close(update, sum(deltas), **tolerance(torch.float64))
    layer.enable_adapters(False)
    base = x @ twin.weight.t() + twin.bias
    torch.testing.assert_close(layer(local), base, **tolerance(torch.float64))
    assert not layer.merged
    layer.enable_adapters(True)
    layer.delete_adapter("default")
    twin.delete_adapter("default")
    same()
    layer.reset_adapter("second")
    assert layer.lora_B["second"].full_tensor().std() > 0
    with torch.no_grad():
        layer.lora_A["second"].mul_(math.inf)
    with pytest.raises(ValueError, match="NaN or infinity"):
        layer.merge(safe=True)
    assert not layer.merged


def check_compiled(style: str) -> None:
    """One graph without a break, forward and backward, that computes the same."""
    layout = Layout(style, dtype=torch.float32)
    layer = split(make_layer(layout), layout)
    assert f"split {style}-wise over 2 processes" in repr(layer)
    x = part(torch.randn(SHAPE, generator=torch.Generator().manual_seed(1)), layout.of_x())
    results = []
    for call in (layer, torch.compile(layer, fullgraph=True, backend="aot_eager")):
        leaf = x.clone().requires_grad_()
        y = call(leaf)
        y.square().sum().backward()
        grads = [p.grad.full_tensor() for p in layer.parameters() if p.grad is not None]
        results.append([y.detach(), leaf.grad, *grads])
        layer.zero_grad()
    for eager, compiled in zip(*results, strict=True):
        torch.testing.assert_close(compiled, eager)


def raises(kind: type[Exception], message: str, call: Callable[[], Any]) -> None:
    with pytest.raises(kind, match=message):
        call()


def check_refusals() -> None:
    """Each leaves the layer as it was."""
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    layer = make_layer(Layout("column"))
    before = {name: (id(p), p.detach().clone()) for name, p in layer.named_parameters()}
    for style in (ColwiseParallel(), RowwiseParallel()):
        raises(TypeError, "ColwiseLoraParallel", lambda s=style: parallelize_module(layer, mesh, s))
    odd = LoraLinear(7, 5, r=2)
    match = "expected a multiple of 2"
    raises(
        ValueError,
        f"out_features is 5; {match}",
        lambda: parallelize_module(odd, mesh, ColwiseLoraParallel()),
    )
    raises(
        ValueError,
        f"in_features is 7; {match}",
        lambda: parallelize_module(odd, mesh, RowwiseLoraParallel()),
    )
    assert type(odd) is LoraLinear
    for name, parameter in layer.named_parameters():
        assert id(parameter) == before[name][0]
        assert torch.equal(parameter, before[name][1])
    split(layer, Layout("column"))
    raises(
        RuntimeError,
        "not split yet",
        lambda: parallelize_module(layer, mesh, RowwiseLoraParallel()),
    )
    raises(
        ValueError,
        "init_lora_weights is 'pissa'",
        lambda: layer.add_adapter("p", r=2, init_lora_weights="pissa"),
    )
    assert list(layer.r) == ["default"]
    # A base that torch has split takes no adapter any more.
    model = nn.Sequential(nn.Linear(K, N))
    parallelize_module(model, mesh, {"0": ColwiseParallel()})
    raises(
        TypeError,
        "add adapters before",
        lambda: fused_peft.get_peft_model(model, LoraConfig(target_modules=["0"])),
    )


def check_plain_modules() -> None:
    """Layers without an adapter are split by torch, as its own styles split them."""
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(6, K), nn.Linear(K, N), nn.ReLU(), nn.Linear(N, K))
    ids = torch.arange(6)
    whole = model(ids)
    plan = {
        "0": RowwiseLoraParallel(input_layouts=Replicate()),
        "1": ColwiseLoraParallel(),
        "3": RowwiseLoraParallel(),
    }
    parallelize_module(model, mesh, plan)
    torch.testing.assert_close(model(ids), whole)


def check_mixed_parameters() -> None:
    """clip_grad_norm_ and parameter_groups over DTensors and plain tensors."""
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    torch.manual_seed(0)
    model, twin = (nn.Sequential(*(nn.Linear(4, 4) for _ in range(3))) for _ in range(2))
    twin.load_state_dict(model.state_dict())
    parallelize_module(model, mesh, {"0": ColwiseParallel(), "1": RowwiseParallel()})
    model[2].bias.requires_grad_(False)
    twin[2].bias.requires_grad_(False)
    x = torch.randn(5, 4)
    for each in (model, twin):
        each(x).square().sum().backward()
    for norm_type in (2.0, math.inf):
        norm = clip_grad_norm_(model.parameters(), 0.25, norm_type)
        torch.testing.assert_close(
            norm, nn.utils.clip_grad_norm_(twin.parameters(), 0.25, norm_type)
        )
    groups = parameter_groups(model.parameters())
    assert [len(group["params"]) for group in groups] == [4, 1]
    for optimized in (groups, parameter_groups(twin.parameters())):
        torch.optim.AdamW(optimized, fused=True).step()
    for ours, theirs in zip(model.parameters(), twin.parameters(), strict=True):
        ours = ours.full_tensor() if isinstance(ours, DTensor) else ours
        torch.testing.assert_close(ours, theirs)
    assert clip_grad_norm_([nn.Parameter(torch.ones(2))], 1.0).item() == 0.0
