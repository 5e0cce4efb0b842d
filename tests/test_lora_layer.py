"""LoraLinear: what it computes, stands for, and refuses."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from lora_layers import HALF, make, randomize, relative_error, truth, versions_and_values
from torch import Tensor, nn
from torch.nn import functional as F

from fused_peft import LoraLinear, ops, reference

# ---- forward


@settings(max_examples=40, deadline=None)
@given(
    lead=st.lists(st.integers(0, 4), max_size=3),
    k=st.integers(1, 20),
    n=st.integers(1, 20),
    r=st.integers(1, 9),
    alpha=st.sampled_from([1, 2.5, 16]),
    bias=st.booleans(),
    rslora=st.booleans(),
)
def test_forward_is_the_equation(
    lead: list[int], k: int, n: int, r: int, alpha: float, bias: bool, rslora: bool
) -> None:
    layer = make(k, n, bias=bias, r=r, lora_alpha=alpha, use_rslora=rslora, dtype=torch.float64)
    x = torch.randn(*lead, k, dtype=torch.float64)
    y = layer(x)
    assert y.shape == (*lead, n)
    assert layer.scaling["default"] == alpha / (math.sqrt(r) if rslora else r)
    torch.testing.assert_close(y, truth(layer, x))


@pytest.mark.parametrize("adapter_dtype", [None, torch.float32])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, *HALF])
def test_output_has_the_input_dtype(dtype: torch.dtype, adapter_dtype: torch.dtype | None) -> None:
    layer = make(32, 24, dtype=dtype, adapter_dtype=adapter_dtype)
    x = torch.randn(5, 32).to(dtype)
    assert layer.lora_A["default"].dtype == (adapter_dtype or dtype)
    assert layer.lora_B["default"].dtype == (adapter_dtype or dtype)
    y = layer(x)
    assert y.dtype == dtype
    eps = max(torch.finfo(p.dtype).eps for p in layer.parameters())
    assert relative_error(y, truth(layer, x)) < 4 * eps


@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("train_bias", [False, True])
def test_gradients(dropout: float, train_bias: bool) -> None:
    layer = make(lora_dropout=dropout, dtype=torch.float64)
    layer.bias.requires_grad_(train_bias)
    x = torch.randn(3, 4, 12, dtype=torch.float64, requires_grad=True)
    torch.manual_seed(5)
    layer(x).square().sum().backward()

    torch.manual_seed(5)
    seed = ops.new_seed() if dropout else None
    leaves = {n: p.detach().clone().requires_grad_() for n, p in layer.named_parameters()}
    x_again = x.detach().clone().requires_grad_()
    reference.lora_linear(
        x_again,
        leaves["weight"],
        leaves["lora_A.default"],
        leaves["lora_B.default"],
        leaves["bias"],
        scaling=1.0,
        dropout_p=dropout,
        seed=seed,
    ).square().sum().backward()
    torch.testing.assert_close(x.grad, x_again.grad)
    torch.testing.assert_close(layer.lora_A["default"].grad, leaves["lora_A.default"].grad)
    torch.testing.assert_close(layer.lora_B["default"].grad, leaves["lora_B.default"].grad)
    assert layer.weight.grad is None
    if train_bias:
        torch.testing.assert_close(layer.bias.grad, leaves["bias"].grad)
    else:
        assert layer.bias.grad is None


def test_dropout_only_while_training() -> None:
    layer = make(256, 32, lora_dropout=0.5)
    x = torch.randn(64, 256)
    torch.manual_seed(1)
    first, second = layer(x), layer(x)
    torch.manual_seed(1)
    again = layer(x)
    assert torch.equal(first, again)
    assert not torch.equal(first, second)
    update = (first.double() - truth(layer, x, [])).detach().norm()
    undropped = (truth(layer, x) - truth(layer, x, [])).detach().norm()
    # Half of the inputs at twice the size: the update's square norm is doubled in expectation.
    assert 1.3 < float(update / undropped) < 1.55
    layer.eval()
    torch.testing.assert_close(layer(x).double(), truth(layer, x), rtol=1e-4, atol=1e-5)


ADAPTERS = {
    "same scaling": [{}, {"r": 3, "lora_alpha": 3}],
    "other scaling": [{"lora_alpha": 3}, {"r": 2, "lora_alpha": 7, "use_rslora": True}, {}],
    "other dtype": [{}, {"lora_alpha": 5, "adapter_dtype": torch.float32}],
    "dropout": [{"lora_alpha": 4}, {"lora_dropout": 0.4}, {"r": 3}],
}


@pytest.mark.parametrize("kinds", ADAPTERS.values(), ids=ADAPTERS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("training", [False, True])
def test_several_active_adapters_add_up(
    kinds: list[dict[str, Any]], dtype: torch.dtype, training: bool
) -> None:
    layer = LoraLinear(32, 24, dtype=dtype, adapter_name="a0", **kinds[0])
    for i, kind in enumerate(kinds[1:], 1):
        layer.add_adapter(f"a{i}", **kind)
    randomize(layer)
    names = [f"a{i}" for i in range(len(kinds))][::-1]
    layer.set_adapter(names)
    layer.train(training)
    x = torch.randn(2, 5, 32).to(dtype).requires_grad_()
    y = layer(x)
    assert y.dtype == dtype
    y.float().sum().backward()
    for name in names:
        assert layer.lora_B[name].grad is not None
    if training and any(kind.get("lora_dropout") for kind in kinds):
        assert not torch.equal(y, layer(x))
    else:
        eps = max(torch.finfo(p.dtype).eps for p in layer.parameters())
        assert relative_error(y, truth(layer, x)) < 6 * eps


def test_dropout_of_a_further_adapter_is_its_own() -> None:
    layer = LoraLinear(64, 8, lora_dropout=0.9, bias=False)
    layer.add_adapter("plain")
    randomize(layer)
    with torch.no_grad():
        layer.lora_B["default"].zero_()
    layer.set_adapter(["default", "plain"])
    x = torch.randn(7, 64)
    torch.testing.assert_close(layer(x).double(), truth(layer, x), rtol=1e-4, atol=1e-5)
    layer.lora_dropout.update(default=0.0, plain=0.9)
    assert relative_error(layer(x), truth(layer, x)) > 0.1


def test_parameters_kept_elsewhere() -> None:
    """FSDP and DataParallel keep tensors as plain attributes."""
    layer = make()
    x = torch.randn(3, 12)
    expected = layer(x)
    weight, bias = layer.weight.detach(), layer.bias.detach()
    del layer.weight, layer.bias
    layer.weight, layer.bias = weight, bias
    assert torch.equal(layer(x), expected)


def test_functional_call_takes_the_given_parameters() -> None:
    layer, other = make(seed=1), make(seed=2)
    x = torch.randn(3, 12)
    values = {name: p.detach() for name, p in other.named_parameters()}
    assert torch.equal(torch.func.functional_call(layer, values, x), other(x))


@pytest.mark.parametrize("case", ["one", "two", "disabled", "merged", "dropout"])
def test_compiles_to_one_graph(case: str) -> None:
    layer = make(16, 8, lora_dropout=0.5 if case == "dropout" else 0.0)
    if case == "two":
        layer.add_adapter("other", lora_alpha=3)
        randomize(layer)
        layer.set_adapter(["default", "other"])
    layer.enable_adapters(case != "disabled")
    if case == "merged":
        layer.merge()
    torch._dynamo.reset()
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    results = []
    for run in (layer, compiled):
        layer.zero_grad()
        x = torch.randn(4, 16, generator=torch.Generator().manual_seed(3)).requires_grad_()
        torch.manual_seed(4)
        y = run(x)
        y.square().sum().backward()
        results.append([y, x.grad, *(p.grad for p in layer.parameters() if p.grad is not None)])
    assert len(results[0]) == {"disabled": 2, "merged": 2, "two": 6}.get(case, 4)
    for eager, graph in zip(*results, strict=True):
        torch.testing.assert_close(graph, eager)


def test_compiled_layer_follows_set_adapter() -> None:
    layer = make(16, 8)
    layer.add_adapter("other", lora_alpha=3)
    randomize(layer)
    torch._dynamo.reset()
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    x = torch.randn(4, 16)
    for names in ("default", "other", ["default", "other"], []):
        layer.set_adapter(names)
        torch.testing.assert_close(compiled(x).double(), truth(layer, x), rtol=1e-4, atol=1e-5)


# ---- in place of a linear layer


def test_from_linear_shares_the_parameters() -> None:
    linear = nn.Linear(6, 4)
    layer = LoraLinear.from_linear(linear, r=2)
    assert layer.weight is linear.weight
    assert layer.bias is linear.bias
    assert not layer.weight.requires_grad
    assert not layer.bias.requires_grad
    assert layer.lora_A["default"].requires_grad
    assert layer.lora_B["default"].requires_grad
    assert (layer.in_features, layer.out_features) == (6, 4)
    x = torch.randn(3, 6)
    torch.testing.assert_close(layer(x), linear(x))  # lora_B starts at zero


def test_from_linear_takes_hooks_mode_and_attributes_along() -> None:
    linear = nn.Linear(6, 4).eval()
    linear.note = "kept"
    handle = linear.register_forward_hook(lambda module, args, output: output + 1)
    layer = LoraLinear.from_linear(linear)
    x = torch.randn(3, 6)
    assert not layer.training
    assert layer.note == "kept"
    torch.testing.assert_close(layer(x), F.linear(x, linear.weight, linear.bias) + 1)
    handle.remove()
    torch.testing.assert_close(layer(x), F.linear(x, linear.weight, linear.bias))


def test_from_linear_leaves_the_linear_whole() -> None:
    linear = nn.Linear(6, 4)
    layer = LoraLinear.from_linear(linear)
    assert [name for name, _ in linear.named_parameters()] == ["weight", "bias"]
    assert type(linear) is nn.Linear
    shared = linear.weight
    layer.weight = nn.Parameter(torch.zeros(4, 6))
    assert linear.weight is shared


def test_from_linear_drops_a_compiled_forward() -> None:
    linear = nn.Linear(6, 4)
    linear.compile(backend="eager")
    layer = randomize(LoraLinear.from_linear(linear))
    x = torch.randn(3, 6)
    torch.testing.assert_close(layer(x).double(), truth(layer, x), rtol=1e-5, atol=1e-6)


def test_conv1d() -> None:
    conv1d = pytest.importorskip("transformers.pytorch_utils").Conv1D
    torch.manual_seed(0)
    base = conv1d(10, 6)  # out, in
    nn.init.normal_(base.bias)
    layer = randomize(LoraLinear.from_linear(base, r=2))
    assert layer.weight is base.weight
    assert layer.fan_in_fan_out
    assert (layer.in_features, layer.out_features) == (6, 10)
    assert layer.lora_A["default"].shape == (2, 6)
    x = torch.randn(3, 5, 6)
    unmerged = layer(x)
    assert relative_error(unmerged, truth(layer, x)) < 1e-6
    assert relative_error(unmerged, base(x).double()) > 0.01
    layer.merge()
    torch.testing.assert_close(layer(x), unmerged)
    torch.testing.assert_close(base(x), unmerged)  # the shared weight


class OwnForward(nn.Linear):
    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input) * 2


def patched() -> nn.Linear:
    linear = nn.Linear(2, 2)
    linear.forward = lambda x: x  # type: ignore[method-assign]
    return linear


def integer_weight() -> nn.Linear:
    linear = nn.Linear(2, 2)
    linear.weight = nn.Parameter(torch.zeros(2, 2, dtype=torch.int8), requires_grad=False)
    return linear


@pytest.mark.parametrize(
    ("module", "said"),
    [
        (nn.Conv2d(1, 1, 1), "Conv2d"),
        (nn.Embedding(2, 2), "Embedding"),
        (OwnForward(2, 2), "OwnForward with a forward of its own"),
        (patched(), "forward of its own"),
        (nn.utils.parametrizations.weight_norm(nn.Linear(2, 2)), "no plain parameter"),
        (integer_weight(), "int8"),
        (LoraLinear(2, 2), "add_adapter"),
    ],
)
def test_from_linear_refuses(module: nn.Module, said: str) -> None:
    with pytest.raises(TypeError, match=said):
        LoraLinear.from_linear(module)


@pytest.mark.parametrize(
    ("kwargs", "error", "said"),
    [
        ({"r": 0}, ValueError, "r is 0"),
        ({"r": -3}, ValueError, "r is -3"),
        ({"r": 2.0}, TypeError, r"r is 2\.0"),
        ({"r": True}, TypeError, "r is True"),
        ({"lora_alpha": 0}, ValueError, "lora_alpha is 0"),
        ({"lora_alpha": math.nan}, ValueError, "lora_alpha is nan"),
        ({"lora_alpha": "8"}, TypeError, "lora_alpha is '8'"),
        ({"lora_dropout": 1.0}, ValueError, r"lora_dropout is 1\.0"),
        ({"lora_dropout": -0.1}, ValueError, r"lora_dropout is -0\.1"),
        ({"init_lora_weights": "pisa"}, ValueError, "init_lora_weights is 'pisa'"),
        ({"init_lora_weights": None}, ValueError, "init_lora_weights is None"),
        ({"init_lora_weights": "orthogonal", "r": 3}, ValueError, "even rank"),
        ({"init_lora_weights": "pissa", "r": 5}, ValueError, "r <= 4"),
        ({"init_lora_weights": "olora", "r": 5}, ValueError, "r <= 4"),
        ({"adapter_name": "a.b"}, ValueError, r"adapter_name is 'a\.b'"),
        ({"adapter_name": ""}, ValueError, "adapter_name is ''"),
        ({"adapter_name": "keys"}, ValueError, "adapter_name is 'keys'"),
        ({"adapter_name": "training"}, ValueError, "adapter_name is 'training'"),
        ({"adapter_name": 3}, TypeError, "adapter_name is 3"),
    ],
)
def test_bad_arguments(kwargs: dict[str, Any], error: type[Exception], said: str) -> None:
    linear = nn.Linear(6, 4)
    before = versions_and_values(linear)
    with pytest.raises(error, match=said):
        LoraLinear.from_linear(linear, **kwargs)
    assert versions_and_values(linear) == before
    with pytest.raises(error, match=said):
        LoraLinear(6, 4, **kwargs)
    layer = LoraLinear(6, 4)
    before = versions_and_values(layer)
    name = kwargs.get("adapter_name", "second")
    with pytest.raises(error, match=said):
        layer.add_adapter(name, **{k: v for k, v in kwargs.items() if k != "adapter_name"})
    assert versions_and_values(layer) == before
    assert list(layer.r) == ["default"]
