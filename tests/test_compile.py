"""torch.compile: how many graphs, none broken, none compiled again, and eager's results.

Sizes start at 2: torch makes a graph of its own for a size of 1, whatever the code does.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.utils import counters
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from fused_peft import LoraLinear
from fused_peft.nn import PrefixAttention

# Batch and length of the calls.
SIZES = [(3, 7), (4, 19), (2, 5), (6, 12), (2, 40)]
#: Graphs that a changing size makes: none to start with is one for its sizes and one for any.
GRAPHS = {True: 1, None: 2}


@pytest.fixture(autouse=True)
def _fresh_compiler() -> Iterator[None]:
    torch._dynamo.reset()
    counters.clear()
    torch.manual_seed(0)
    yield
    torch._dynamo.reset()


def graphs() -> int:
    assert not counters["graph_break"]
    return counters["stats"]["unique_graphs"]


def value_and_gradients(
    run: Callable[..., Tensor], inputs: tuple[Any, ...], parameters: list[nn.Parameter]
) -> tuple[Tensor, ...]:
    torch.manual_seed(1)
    y = run(*inputs)
    leaves = [x for x in (*parameters, *inputs) if isinstance(x, Tensor) and x.requires_grad]
    return (y.detach(), *torch.autograd.grad(y.square().sum(), leaves))


def assert_compiles(
    run: Callable[..., Tensor],
    calls: list[tuple[Any, ...]],
    parameters: list[nn.Parameter],
    dynamic: bool | None,
    *,
    backend: str = "aot_eager",
) -> None:
    """Each call's value and gradients are eager's, and the graphs are those of ``GRAPHS``."""
    compiled = torch.compile(run, fullgraph=True, dynamic=dynamic, backend=backend)
    for i, inputs in enumerate(calls):
        expected = value_and_gradients(run, inputs, parameters)
        with torch._dynamo.config.patch(error_on_recompile=i >= GRAPHS[dynamic]):
            actual = value_and_gradients(compiled, inputs, parameters)
        torch.testing.assert_close(actual, expected)
    assert graphs() == GRAPHS[dynamic]


def trainable(module: nn.Module) -> list[nn.Parameter]:
    return [p for p in module.parameters() if p.requires_grad]


# ---- LoRA ----------------------------------------------------------------------------------------


def lora_model(dropout: float = 0.0, adapters: tuple[str, ...] = ("default",)) -> nn.Sequential:
    first = LoraLinear(20, 32, r=4, lora_dropout=dropout)
    second = LoraLinear(32, 8, bias=False, r=3, lora_alpha=5, lora_dropout=dropout)
    for layer in (first, second):
        for i, name in enumerate(adapters[1:]):
            layer.add_adapter(name, r=5 + i, lora_alpha=3, lora_dropout=dropout)
        layer.set_adapter(adapters)
        for lora_b in layer.lora_B.values():
            nn.init.normal_(lora_b)
    return nn.Sequential(first, nn.ReLU(), second)


def lora_case(case: str) -> nn.Module:
    dropout = 0.4 if "dropout" in case else 0.0
    model = lora_model(dropout, ("default", "other") if "two" in case else ("default",))
    if case == "merged":
        model[0].merge()
        model[2].merge()
    if case == "disabled":
        model[0].enable_adapters(False)
        model[2].enable_adapters(False)
    return model


@pytest.mark.parametrize("dynamic", GRAPHS)
@pytest.mark.parametrize("case", ["one", "dropout", "two", "two, dropout", "merged", "disabled"])
def test_lora(case: str, dynamic: bool | None) -> None:
    model = lora_case(case)
    calls = [(torch.randn(*size, 20, requires_grad=True),) for size in SIZES]
    used = [] if case in ("merged", "disabled") else trainable(model)
    assert_compiles(model, calls, used, dynamic)


def test_lora_in_bfloat16_under_autocast() -> None:
    model = lora_model()

    def run(x: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return model(x).float()

    calls = [(torch.randn(*size, 20),) for size in SIZES]
    assert_compiles(run, calls, trainable(model), True)


def test_a_checkpointed_block_draws_its_mask_once() -> None:
    """The recomputation in the backward graph restores the generator, as eager's does."""
    model = lora_model(0.4)
    calls = [(torch.randn(*size, 20, requires_grad=True),) for size in SIZES]
    assert_compiles(
        lambda x: checkpoint(model, x, use_reentrant=False), calls, trainable(model), True
    )


def test_layers_that_share_one_graph() -> None:
    """Regional compilation: other values of the scaling and the rank are graphs of their own."""
    layers = [LoraLinear(8, 8, r=2, lora_alpha=alpha) for alpha in (2, 4)]
    same = copy.deepcopy(layers[0])
    for layer in (*layers, same):
        nn.init.normal_(layer.lora_B["default"])
        layer.compile(fullgraph=True, dynamic=True, backend="aot_eager")
    x = torch.randn(5, 8)
    for layer in layers:
        torch.testing.assert_close(layer(x), layer.forward(x))
    before = graphs()
    with torch._dynamo.config.patch(error_on_recompile=True):
        torch.testing.assert_close(same(x), same.forward(x))
    assert graphs() == before


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_every_layer_and_every_call_has_a_mask_of_its_own(backend: str) -> None:
    """Also where layers share their input: two draws are no common subexpression."""
    layers = nn.ModuleList(LoraLinear(40, 40, bias=False, lora_dropout=0.5) for _ in range(2))
    for layer in layers:
        nn.init.zeros_(layer.weight)
        nn.init.eye_(layer.lora_A["default"])
        nn.init.eye_(layer.lora_B["default"])

    @torch.compile(fullgraph=True, backend=backend)
    def run(x: Tensor) -> list[Tensor]:
        return [layer(x)[:, :8] for layer in layers]

    masks = [mask for _ in range(3) for mask in run(torch.ones(6, 40))]
    for i, mask in enumerate(masks):
        assert set(mask.unique().tolist()) == {0.0, 2.0}
        for other in masks[:i]:
            assert not torch.equal(mask, other)


def test_inductor_draws_eagers_masks_with_eagers_generator() -> None:
    model = lora_model(0.4, ("default", "other"))
    calls = [(torch.randn(*size, 20, requires_grad=True),) for size in SIZES[:3]]
    with torch._inductor.config.patch(fallback_random=True):
        assert_compiles(model, calls, trainable(model), True, backend="inductor")


# ---- attention with a prefix ---------------------------------------------------------------------


def qkv(batch: int, queries: int, keys: int, *, grad: bool = True) -> tuple[Tensor, ...]:
    return tuple(
        torch.randn(batch, heads, length, 8, requires_grad=grad)
        for heads, length in ((4, queries), (2, keys), (2, keys))
    )


@pytest.mark.parametrize("dynamic", GRAPHS)
@pytest.mark.parametrize("case", ["causal", "padding", "dropout"])
def test_prefix_attention(case: str, dynamic: bool | None) -> None:
    attention = PrefixAttention(2, 8, 3)

    def run(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        dropout = 0.3 if case == "dropout" else 0.0
        causal = mask is None
        return attention(q, k, v, mask, dropout, causal, enable_gqa=True)

    calls = []
    for batch, length in SIZES:
        mask = None
        if case == "padding":
            mask = torch.rand(batch, 1, 1, length) < 0.7
        calls.append((*qkv(batch, length, length), mask))
    assert_compiles(run, calls, trainable(attention), dynamic)


@pytest.mark.parametrize("dynamic", GRAPHS)
def test_prefix_attention_decoding(dynamic: bool | None) -> None:
    """One query over keys that become more: the length of the cache is dynamic, too."""
    attention = PrefixAttention(2, 8, 3)

    def run(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return attention(q, k, v, enable_gqa=True)

    calls = [qkv(batch, 1, length) for batch, length in SIZES]
    assert_compiles(run, calls, trainable(attention), dynamic)


# ---- CUDA graphs ---------------------------------------------------------------------------------


class Recorder(TorchDispatchMode):
    """Keeps the devices of what every operation returns."""

    def __init__(self) -> None:
        super().__init__()
        self.devices: dict[str, set[str]] = {}

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        tensors = [x for x in torch.utils._pytree.tree_leaves(out) if isinstance(x, Tensor)]
        self.devices.setdefault(str(func), set()).update(x.device.type for x in tensors)
        return out


@pytest.mark.parametrize("case", ["one", "two", "dropout", "causal", "decode", "key_mask"])
def test_nothing_of_a_step_lies_on_the_host(case: str) -> None:
    """What a CUDA graph cannot hold: a value that the host reads, a tensor that it makes.

    The meta device has no values, so that reading one raises.
    """
    with torch.device("meta"):
        if case in ("one", "two", "dropout"):
            module: nn.Module = lora_case(case).to("meta")
            inputs: tuple[Any, ...] = (torch.empty(6, 20, requires_grad=True),)
        else:
            module = PrefixAttention(2, 8, 3)
            inputs = qkv(3, 1 if case == "decode" else 6, 6)
            if case == "causal":
                inputs = (*inputs, None, 0.3, True)
            if case == "key_mask":
                inputs = (*inputs, torch.empty(3, 1, 1, 6, dtype=torch.bool))
    kwargs = {} if isinstance(module, nn.Sequential) else {"enable_gqa": True}
    with Recorder() as recorder:
        module(*inputs, **kwargs).square().sum().backward()
    assert len(recorder.devices) > 5
    assert set().union(*recorder.devices.values()) == {"meta"}
