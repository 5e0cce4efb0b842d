"""The LoRA layer in a single launch (sm_90a), forward, and backward but for dlora_a.

The number of SMs chooses the tile, so a device of few SMs runs every kernel on small problems.
"""

from __future__ import annotations

import itertools

import pytest
import torch
from backends import H100, SIMULATED_CUDA, forced, relative_error
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from test_lora_ops import assert_no_worse_than_torch, exact, make, run

from fused_peft import _C, ops, simulator

pytestmark = pytest.mark.skipif(
    not simulator.has_kernels() or "90" not in _C.build_info()["cuda_architectures"],
    reason="no CUDA kernels for sm_90 were built",
)

FORWARD = "single launch"
BACKWARD = "GEMM with the dy pass, then x pass"


def plan_on(num_sms, shape, **options):
    return _C.lora_linear_plan(*shape, **options, **{**H100, "num_sms": num_sms})


@pytest.mark.parametrize(
    ("shape", "options", "forward", "backward"),
    [
        ((512, 1024, 1024, 16), {}, True, True),
        ((512, 1024, 1024, 64), {}, True, True),
        ((8192, 4096, 4096, 16), {}, True, True),
        # As many flags as a launch has, and one row more.
        ((262144, 4096, 4096, 16), {}, True, True),
        ((262145, 4096, 4096, 16), {}, False, False),
        ((512, 1024, 1024, 12), {}, False, False),
        ((512, 1024, 1024, 72), {}, False, False),
        ((512, 1024, 1024, 16), {"dropout": True}, False, False),
        ((512, 1024, 1024, 16), {"factor_float": True}, False, False),
        ((512, 1024, 1024, 16), {"weight_k_major": False}, False, False),
        ((512, 1024, 1024, 16), {"aligned": False}, False, False),
    ],
)
def test_which_problems_take_it(shape, options, forward, backward):
    plan = plan_on(132, shape, **options)
    assert plan["forward"] == (FORWARD if forward else "down projection, then GEMM")
    assert plan["forward_launches"] == (1 if forward else 2)
    assert plan["backward"] == (BACKWARD if backward else "dy pass, x pass, GEMM")
    assert plan["backward_launches"] == (2 if backward else 3)


def test_tiles_in_clusters():
    """Of the reference problem, as the GEMM in two launches has them."""
    plan = plan_on(132, (8192, 4096, 4096, 16))
    assert plan["gemm"] == plan_on(132, (8192, 4096, 4096, 16), dropout=True)["gemm"]
    assert plan["gemm"] == plan["gemm_backward"]
    assert (plan["gemm"]["block_n"], plan["gemm"]["cluster"]) == (256, 2)


def test_a_few_tokens_take_decode_and_the_single_launch_back():
    plan = plan_on(132, (8, 1024, 1024, 16))
    assert (plan["forward"], plan["backward"]) == ("decode", BACKWARD)


def layer(t, *, frozen=(), **kwargs):
    """y, the gradients, and the counters of the forward's and the backward's launches."""
    leaves = {
        name: t[name].clone().requires_grad_(name not in frozen)
        for name in ("x", "lora_a", "lora_b")
    }
    x, lora_a, lora_b = leaves.values()
    with forced(SIMULATED_CUDA):
        y = ops.lora_linear(x, t["weight"], lora_a, lora_b, **kwargs)
        forward = simulator.counters()
        simulator.reset()
        y.backward(t["dy"])
        backward = simulator.counters()
    return {name: leaf.grad for name, leaf in leaves.items()}, forward, backward


def compulsory_bytes(launches):
    """Each operand of each launch once."""
    return sum(c.global_unique_load_bytes + c.global_unique_store_bytes for c in launches)


def test_it_costs_the_compulsory_bytes():
    """M=512, N=K=1024, R=16. The bounds are 4.28 and 5.39 MB.

    LoRAFusion takes 2 launches and 5.34 MB forward, 7 and 6.88 MB backward; PEFT 5 and 11.63 MB, 7
    and 13.83 MB.
    """
    m, n, k, r = 512, 1024, 1024, 16
    t = make(m, n, k, r, torch.bfloat16, torch.bfloat16)
    _, forward, backward = layer(t, scaling=0.5)
    assert [len(forward), len(backward)] == [1, 2]
    assert compulsory_bytes(forward) <= 4.4e6
    assert compulsory_bytes(backward) <= 6.0e6
    update = 2 * m * r * (n + k)
    assert forward[0].tensor_flop == 2 * m * n * k + update
    assert sum(c.tensor_flop for c in backward) == 2 * m * n * k + 2 * update
    for launch in forward + backward:
        assert not launch.conflicts
        assert launch.local_load_bytes == launch.local_store_bytes == 0


@pytest.mark.parametrize("frozen", [["x"], ["lora_a"], ["lora_b"], ["lora_a", "lora_b"]])
def test_what_is_frozen_gets_no_gradient(frozen):
    """Without dx there is a dy pass."""
    t = make(130, 72, 136, 16, torch.bfloat16, torch.bfloat16)
    gradients, _, backward = layer(t, scaling=0.5, frozen=frozen)
    assert any("lora_single" in launch.kernel for launch in backward) == ("x" not in frozen)
    truth = exact({**t, "bias": torch.zeros(72)}, scaling=0.5)
    for name, gradient in gradients.items():
        if name in frozen:
            assert gradient is None
        else:
            assert relative_error(gradient, truth["d" + name]) < 4e-3


# ---- right over many problems and schedules


@settings(max_examples=150, deadline=None)
@given(
    m=st.sampled_from([1, 17, 64, 100, 128, 130, 257, 300]),
    n=st.sampled_from([8, 72, 136, 520, 576, 584, 776]),
    k=st.sampled_from([8, 24, 64, 72, 136, 200, 520, 776]),
    r=st.sampled_from([8, 16, 24, 32, 40, 48, 56, 64]),
    half=st.sampled_from([torch.bfloat16, torch.float16]),
    num_sms=st.integers(1, 7),
    seed=st.integers(0, 1000),
)
def test_drawn_problems_have_no_findings(m, n, k, r, half, num_sms, seed):
    plan = plan_on(num_sms, (m, n, k, r))
    assume(plan["forward"] == FORWARD or plan["backward"] == BACKWARD)
    t = make(m, n, k, r, half, half, seed=seed)
    with forced(SIMULATED_CUDA), simulator.options(seed=seed, max_sms=num_sms):
        assert_no_worse_than_torch(t, scaling=0.7)
        first, *others = (launch.kernel for launch in simulator.counters())
    assert ("lora_single" in first) == (plan["forward"] == FORWARD)
    assert any("lora_single" in kernel for kernel in others) == (plan["backward"] == BACKWARD)


@pytest.mark.parametrize(
    ("shape", "num_sms", "forward", "backward"),
    [
        ((130, 264, 72, 16), 1, (256, 1), (256, 1)),
        ((257, 520, 72, 24), 4, (256, 1), (64, 1)),
        ((130, 520, 72, 16), 7, (64, 1), (64, 1)),
        ((257, 72, 520, 24), 4, None, (256, 1)),
        ((130, 136, 264, 40), 6, None, (64, 1)),
        ((200, 520, 72, 24), 3, (256, 2), (64, 1)),
        ((385, 136, 392, 16), 4, None, (256, 2)),
        ((385, 264, 520, 16), 5, (256, 2), (256, 2)),
    ],
    ids=str,
)
def test_bits_under_many_schedules(shape, num_sms, forward, backward):
    """36 schedules of CTAs at unequal speeds, back to back: each finds the state of the last."""
    plan = plan_on(num_sms, shape)
    for name, gemm, takes_it, tile in (
        ("forward", "gemm", FORWARD, forward),
        ("backward", "gemm_backward", BACKWARD, backward),
    ):
        if tile:
            assert plan[name] == takes_it
            assert (plan[gemm]["block_n"], plan[gemm]["cluster"]) == tile
    t = make(*shape, torch.bfloat16, torch.bfloat16)
    truth = None
    for seed, timing in itertools.product(range(12), ("early", "late", "random")):
        with (
            forced(SIMULATED_CUDA),
            simulator.options(seed=seed, async_timing=timing, max_sms=num_sms),
        ):
            results = run(ops.lora_linear, t, scaling=0.7)
        truth = results if truth is None else truth
        for name, result in results.items():
            assert torch.equal(result, truth[name]), (name, seed, timing)


def test_launches_of_several_sizes_share_the_state():
    """A flag that a larger problem left does not speak for a smaller one, nor the other way."""
    problems = [
        (make(m, 520, 264, 16, torch.bfloat16, torch.bfloat16, seed=m), sms)
        for m, sms in [(130, 4), (300, 4), (64, 4), (300, 1), (130, 7)]
    ]
    alone = []
    for t, sms in problems * 2:
        with forced(SIMULATED_CUDA), simulator.options(max_sms=sms):
            alone.append(run(ops.lora_linear, t, scaling=0.7))
    for (t, _), first, second in zip(problems, alone, alone[len(problems) :], strict=False):
        truth = exact(t, scaling=0.7)
        for name in ("y", "dx", "dlora_a", "dlora_b"):
            assert torch.equal(first[name], second[name])
            assert relative_error(first[name], truth[name]) < 4e-3
