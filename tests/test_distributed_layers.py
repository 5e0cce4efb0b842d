"""LoraLinear split column- and row-wise over processes."""

from __future__ import annotations

import distributed_layers as layers
import pytest
import torch
from distributed_layers import Layout
from distributed_world import World
from torch.distributed.tensor import Replicate, Shard

LAYOUTS = [
    Layout("column"),
    Layout("column", x=Shard(1)),
    Layout("column", y=Replicate()),
    Layout("column", x=Shard(1), y=Shard(1), trained_bias=False),
    Layout("column", local=False),
    Layout("row"),
    Layout("row", x=Replicate()),
    Layout("row", y=Shard(1)),
    Layout("row", y=Shard(2), trained_bias=False),
    Layout("row", local=False),
]


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_split_layer_computes_what_the_whole_one_does(two_processes: World, layout: Layout) -> None:
    two_processes.run(layers.check, layout)


@pytest.mark.parametrize("style", ["column", "row"])
def test_more_processes_kernels_and_transposed_weights(
    two_processes: World, four_processes: World, style: str
) -> None:
    four_processes.run(layers.check, Layout(style))
    four_processes.run(layers.check, Layout(style, dtype=torch.float32))
    two_processes.run(layers.check, Layout(style, dtype=torch.float32, trained_bias=False))
    two_processes.run(layers.check, Layout(style, transposed=True))


@pytest.mark.parametrize("style", ["column", "row"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_dropout_masks(two_processes: World, style: str, dtype: torch.dtype) -> None:
    """Column-wise one mask over the x that all have, row-wise one over each part."""
    two_processes.run(layers.check, Layout(style, dtype=dtype), 0.4)
    two_processes.run(layers.check, Layout(style, dtype=dtype), 0.4, 2)


@pytest.mark.parametrize("style", ["column", "row"])
def test_several_adapters(two_processes: World, style: str) -> None:
    two_processes.run(layers.check, Layout(style), 0.0, 3)
    two_processes.run(layers.check_adapters, style)


@pytest.mark.parametrize("style", ["column", "row"])
def test_compiled_in_one_graph(two_processes: World, style: str) -> None:
    two_processes.run(layers.check_compiled, style)


def test_refusals_change_nothing(two_processes: World) -> None:
    two_processes.run(layers.check_refusals)


def test_layers_without_adapters(two_processes: World) -> None:
    two_processes.run(layers.check_plain_modules)


def test_norm_and_optimizer_over_split_and_whole_parameters(two_processes: World) -> None:
    two_processes.run(layers.check_mixed_parameters)
