"""Training in two and four processes gives the losses, gradients and adapters of one process."""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from typing import Any

import distributed_cases as cases
import pytest
import torch
from distributed_cases import Run
from distributed_world import World
from torch import Tensor

#: A mean over 56 tokens and products over at most 32 terms, summed in another order; values and
#: gradients are below 4 in size. A step of AdamW passes a relative error on as it is.
BOUNDS = {torch.float64: 1e-13, torch.float32: 4e-6}


@cache
def alone(run: Run) -> dict[str, Any]:
    """The same training in one process."""
    return cases.train(replace(run, parallel="none", static_graph=False))


def check(world: World, run: Run) -> None:
    expected, results = alone(run), world.run(cases.train, run)
    bound = BOUNDS[run.dtype]
    for result in results:
        for what in ("losses", "norms"):
            assert result[what] == pytest.approx(expected[what], rel=0, abs=bound), what
        for what in ("grads", "final"):
            assert result[what].keys() == expected[what].keys()
            for name, value in expected[what].items():
                close = {"rtol": 0, "atol": bound}
                torch.testing.assert_close(result[what][name], value, **close, msg=name)
        # Bit for bit what the first process has.
        assert result["losses"] == results[0]["losses"]
        for name, value in results[0]["final"].items():
            assert torch.equal(result["final"][name], value), name
    losses = expected["losses"]
    assert min(losses[1:]) < losses[0] - 0.2  # or the curves would agree on nothing


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("parallel", ["ddp", "fsdp", "tp", "tp_mlp"])
def test_two_processes(two_processes: World, parallel: str, dtype: torch.dtype) -> None:
    check(two_processes, Run(parallel, dtype))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("parallel", ["ddp", "fsdp", "tp", "tp_fsdp"])
def test_four_processes(four_processes: World, parallel: str, dtype: torch.dtype) -> None:
    check(four_processes, Run(parallel, dtype))


@pytest.mark.parametrize("parallel", ["ddp", "fsdp", "tp", "tp_mlp"])
def test_checkpointing_and_accumulation(two_processes: World, parallel: str) -> None:
    check(two_processes, Run(parallel, checkpointing=True, micro_batches=2))


@pytest.mark.parametrize("parallel", ["ddp", "fsdp", "tp"])
def test_second_adapter_and_biases(two_processes: World, parallel: str) -> None:
    check(two_processes, Run(parallel, second=True, bias="all"))


@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
def test_module_that_is_trained_whole(two_processes: World, parallel: str) -> None:
    check(two_processes, Run(parallel, train_head=True))


def test_all_at_once_on_a_mesh_of_two_dimensions(four_processes: World) -> None:
    run = Run("tp_fsdp", second=True, bias="all", checkpointing=True, micro_batches=2)
    check(four_processes, run)


def test_static_graph(two_processes: World) -> None:
    check(two_processes, Run("ddp", static_graph=True, checkpointing=True))


def grad_error(result: dict[str, Any], truth: dict[str, Any]) -> float:
    """Of all first gradients together, relative."""
    pairs = [(result["grads"][name].double(), value) for name, value in truth["grads"].items()]
    error, size = (
        torch.stack([t.square().sum() for t in ts]).sum().sqrt()
        for ts in ([a - b for a, b in pairs], [b for _, b in pairs])
    )
    return float(error / size)


@pytest.mark.parametrize("parallel", ["ddp", "fsdp", "tp"])
def test_half_base_with_float32_adapters(two_processes: World, parallel: str) -> None:
    """As near to what float64 makes of the same values as one process comes in bfloat16.

    tp rounds more often: each term of a sum over the processes.
    """
    half = Run(parallel, torch.bfloat16)
    truth, single = alone(replace(half, widened=True)), alone(half)
    allowed = 1.25 if parallel == "tp" else 1.01
    for result in two_processes.run(cases.train, half):
        assert {value.dtype for value in result["final"].values()} == {torch.float32}
        assert {value.dtype for value in result["grads"].values()} == {torch.float32}
        assert grad_error(result, truth) <= allowed * grad_error(single, truth)
        assert result["losses"] == pytest.approx(truth["losses"], rel=2**-7)


def test_fully_shard_computes_in_bfloat16(two_processes: World) -> None:
    """Parameters and their sums over processes are float32, what is computed is bfloat16."""
    cast = Run("fsdp", torch.float32, cast=True)
    half = Run("none", torch.bfloat16, adapter_dtype=torch.bfloat16)
    truth = alone(replace(cast, parallel="none", cast=False, widened=True))
    for result in two_processes.run(cases.train, cast):
        assert {value.dtype for value in result["final"].values()} == {torch.float32}
        assert {value.dtype for value in result["grads"].values()} == {torch.float32}
        assert grad_error(alone(cast), truth) < 1e-5 < grad_error(result, truth)
        assert grad_error(result, truth) <= 1.01 * grad_error(alone(half), truth)
        assert result["losses"] == pytest.approx(truth["losses"], rel=2**-7)


def test_ddp_makes_adapters_the_same(two_processes: World) -> None:
    first, second = two_processes.run(cases.adapters_of_ddp)
    assert first.keys() == second.keys()
    for name, value in first.items():
        assert torch.equal(value, second[name])


def test_dropout_follows_the_seed_of_the_process(two_processes: World) -> None:
    (y0, grads0), (y1, grads1) = two_processes.run(cases.dropout_of_ddp, (1, 2))
    assert not torch.equal(y0, y1)
    for name, grad in grads0.items():
        assert torch.equal(grad, grads1[name])
    (same0, _), (same1, _) = two_processes.run(cases.dropout_of_ddp, (1, 1))
    assert torch.equal(same0, y0)
    assert torch.equal(same1, y0)


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
@pytest.mark.parametrize("method", ["prefix", "prefix MLP", "prompt", "MLP"])
def test_prompt_methods(
    two_processes: World, method: str, parallel: str, checkpointing: bool
) -> None:
    pytest.importorskip("transformers")
    expected = cases.prompt_gradients(method, "none", checkpointing)
    assert all(grad.abs().max() > 0 for grad in expected.values())
    results: list[dict[str, Tensor]]
    results = two_processes.run(cases.prompt_gradients, method, parallel, checkpointing)
    for result in results:
        assert result.keys() == expected.keys()
        for name, value in expected.items():
            bound = 1e-5 * value.abs().max().item()  # float32, sums of some hundred terms
            torch.testing.assert_close(result[name], value, rtol=0, atol=bound, msg=name)
            assert torch.equal(result[name], results[0][name])


def test_refusals_change_nothing(two_processes: World) -> None:
    two_processes.run(cases.refusals)
