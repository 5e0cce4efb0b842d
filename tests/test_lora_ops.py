"""The ops against float64 and against plain torch at the same dtype, on every instruction set."""

import math

import pytest
import torch
from backends import BACKENDS, SIMULATED_CUDA, forced, relative_error
from hypothesis import given, settings
from hypothesis import strategies as st

from fused_peft import ops, reference

DTYPES = {
    "fp32": (torch.float32, torch.float32),
    "bf16": (torch.bfloat16, torch.bfloat16),
    "bf16-fp32": (torch.bfloat16, torch.float32),
    "fp16": (torch.float16, torch.float16),
    "fp16-fp32": (torch.float16, torch.float32),
}
# M, N, K, R: one row, decode, primes, nothing a multiple of 8, ranks up to 256, long sums.
SHAPES = [
    (1, 1, 1, 1),
    (1, 64, 96, 16),
    (5, 17, 23, 3),
    (16, 100, 130, 8),
    (17, 48, 64, 16),
    (64, 96, 128, 16),
    (101, 67, 131, 7),
    (130, 50, 70, 64),
    (40, 40, 48, 256),
    (513, 36, 52, 5),
    (33, 20, 2100, 12),
    (33, 2100, 20, 12),
]


# Fewer rounding errors than this are too few to speak of chance.
FEW = 32


def make(m, n, k, r, dtype, adapter_dtype, seed=0, lead=()):
    g = torch.Generator().manual_seed(seed)

    def draw(*shape, scale=1.0):
        return torch.randn(*shape, generator=g) * scale

    return {
        "x": draw(*lead, m, k).to(dtype),
        "weight": draw(n, k, scale=k**-0.5).to(dtype),
        "lora_a": draw(r, k, scale=k**-0.5).to(adapter_dtype),
        "lora_b": draw(n, r, scale=r**-0.5).to(adapter_dtype),
        "bias": draw(n).to(dtype),
        "dy": draw(*lead, m, n).to(dtype),
    }


def run(fn, t, **kwargs):
    """y and the gradients of x, lora_a, lora_b, bias."""
    leaves = {
        name: t[name].detach().clone().requires_grad_()
        for name in ("x", "lora_a", "lora_b", "bias")
    }
    y = fn(leaves["x"], t["weight"], leaves["lora_a"], leaves["lora_b"], leaves["bias"], **kwargs)
    y.backward(t["dy"])
    return {"y": y.detach()} | {"d" + name: leaf.grad for name, leaf in leaves.items()}


def kernel_dtype(backend):
    """A dtype that this backend has kernels for, float32 if it can be."""
    return torch.bfloat16 if backend == SIMULATED_CUDA else torch.float32


def exact(t, **kwargs):
    return run(reference.lora_linear, {k: v.double() for k, v in t.items()}, **kwargs)


def assert_no_worse_than_torch(t, **kwargs):
    """The rule: no error is larger than that of plain torch at the same dtype.

    Two sets of n independent rounding errors of one size have norms that differ by about
    1 / sqrt(n) of it by chance, so four of those are allowed, and half a unit of the format for a
    single number. The gradients of a few rows inherit the errors of s: [M, R] of them. Where
    dropout keeps only a handful of elements, each 1 / (1 - p) as large as the others, the norms are
    those few elements'. Where there are too few to speak of chance, that half unit is one of the
    sum's terms, which may cancel.
    """
    rows = t["dy"][..., 0].numel() * t["lora_a"].shape[0]
    kept = rows
    if kwargs.get("dropout_p"):
        keep = reference.dropout_keep(t["x"].shape, kwargs["dropout_p"], kwargs["seed"])
        kept = int(keep.sum()) if keep.sum() < FEW else rows
    ours = run(ops.lora_linear, t, **kwargs)
    torchs = run(reference.lora_linear, t, **kwargs)
    truth = exact(t, **kwargs)
    terms = exact({name: value.abs() for name, value in t.items()}, **kwargs)
    for name, ref in truth.items():
        assert ours[name].dtype == torchs[name].dtype
        assert ours[name].shape == torchs[name].shape
        error, allowed = relative_error(ours[name], ref), relative_error(torchs[name], ref)
        independent = max(1, min(ref.numel(), rows, rows if name == "dbias" else kept))
        by_chance = 4.0 / math.sqrt(independent)
        unit = torch.finfo(ours[name].dtype).eps / 2
        if independent < FEW and ref.norm() > 0:
            unit *= (terms[name].norm() / ref.norm()).item()
        assert error <= allowed * (1 + by_chance) + unit * by_chance, (name, error, allowed)


@pytest.mark.parametrize("dtypes", DTYPES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_error_is_not_above_plain_torch(backend, shape, dtypes):
    assert_no_worse_than_torch(make(*shape, *DTYPES[dtypes]), scaling=0.7)


@pytest.mark.parametrize("dtypes", DTYPES)
@pytest.mark.parametrize("shape", [(3, 20, 70, 4), (70, 65, 131, 9), (600, 40, 64, 8)], ids=str)
def test_dropout_matches_the_reference_mask(backend, shape, dtypes):
    seed = torch.tensor(0x0123456789ABCDEF)
    t = make(*shape, *DTYPES[dtypes])
    assert_no_worse_than_torch(t, scaling=0.7, dropout_p=0.3, seed=seed)


@pytest.mark.parametrize(
    "shape", [(79, 77, 172, 12), (12, 51, 163, 23), (492, 79, 69, 16)], ids=str
)
def test_a_factor_between_two_floats_is_in_no_element_rounded(backend, shape):
    # 1.796 / 0.1 lies in the middle of two floats. The update is also far larger than the rest:
    # the sums of the rest must not each be rounded to its size.
    t = make(*shape, torch.float32, torch.float32)
    assert_no_worse_than_torch(t, scaling=1.796, dropout_p=0.9, seed=torch.tensor(7))


@pytest.mark.parametrize("m", [1, 40])
def test_an_infinite_sum_stays_infinite(backend, m):
    one = torch.ones(1, 1)
    x = torch.full((m, 1), float("inf"))
    for scaling in (0.3, 0.7):  # one is below its nearest float, one above
        y = ops.lora_linear(x, one, one, one, scaling=scaling)
        assert torch.equal(y, x)


def test_dropout_mask_against_known_philox_words():
    # Random123's known-answer test for philox4x32-10, counter 0, key 0.
    words = reference.philox4x32(torch.zeros(1, dtype=torch.int64), torch.tensor(0))
    assert [hex(w) for w in words[0].tolist()] == [
        "0x6627e8d5",
        "0xe169c58d",
        "0xbc57ac4c",
        "0x9b00dbd8",
    ]


def test_dropout_rate_and_seed(backend):
    x = torch.ones(1, 100_000)
    keep = []
    for seed in (1, 2, 1):
        lora_a, lora_b = torch.ones(1, 100_000), torch.ones(1, 1)
        y = ops.lora_linear(
            x, torch.zeros(1, 100_000), lora_a, lora_b,
            scaling=1.0, dropout_p=0.25, seed=torch.tensor(seed),
        )  # fmt: skip
        keep.append(y.item() * 0.75)
    # 100 000 draws at 0.75: the standard deviation is 137.
    assert abs(keep[0] - 75_000) < 700
    assert keep[0] == keep[2]
    assert keep[0] != keep[1]


@settings(max_examples=60, deadline=None)
@given(
    m=st.integers(0, 90),
    n=st.integers(1, 120),
    k=st.integers(1, 200),
    r=st.integers(1, 40),
    dtypes=st.sampled_from(sorted(DTYPES)),
    backend=st.sampled_from(BACKENDS),
    p=st.sampled_from([0.0, 0.0, 0.1, 0.9]),
    scaling=st.sampled_from([1.3, 1.796, 1.834]),
)
def test_drawn_problems(m, n, k, r, dtypes, backend, p, scaling):
    with forced(backend):
        t = make(m, n, k, r, *DTYPES[dtypes], seed=m + 7 * n + 13 * k)
        assert_no_worse_than_torch(t, scaling=scaling, dropout_p=p, seed=torch.tensor(99))


def test_rank_512_and_leading_dimensions(backend):
    assert_no_worse_than_torch(make(20, 30, 40, 512, torch.float32, torch.float32), scaling=0.1)
    assert_no_worse_than_torch(
        make(7, 30, 40, 4, torch.float32, torch.float32, lead=(2, 3)), scaling=1.0
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_no_rows(backend, dtype):
    t = make(0, 6, 8, 2, dtype, dtype)
    out = run(ops.lora_linear, t, scaling=1.0)
    assert out["y"].shape == (0, 6)
    assert out["dx"].shape == (0, 8)
    for name in ("dlora_a", "dlora_b", "dbias"):
        assert torch.equal(out[name], torch.zeros_like(out[name]))


@pytest.mark.parametrize("m", [4, 40])
@pytest.mark.parametrize(
    "view",
    [
        lambda x: x.repeat(1, 2)[:, : x.shape[1]],  # rows further apart
        lambda x: x.t().contiguous().t(),  # column major
        lambda x: x[:1].expand(x.shape),  # one row many times
        lambda x: torch.stack((x, x), 1).transpose(0, 1),  # [2, M, K], dimensions swapped
        lambda x: x.unsqueeze(0).expand(3, *x.shape),
    ],
)
def test_strided_x_is_read_right(backend, m, view):
    dtype = kernel_dtype(backend)
    t = make(m, 24, 36, 4, dtype, dtype)
    x = view(t["x"])
    args = (t["weight"], t["lora_a"], t["lora_b"], t["bias"])
    strided = ops.lora_linear(x, *args, scaling=0.5)
    assert torch.equal(strided, ops.lora_linear(x.contiguous(), *args, scaling=0.5))


@pytest.mark.parametrize("m", [4, 40])
def test_transposed_weight_and_strided_adapters(backend, m):
    t = make(m, 24, 36, 4, torch.bfloat16, torch.bfloat16)
    plain = run(ops.lora_linear, t, scaling=0.5)
    t["weight"] = t["weight"].t().contiguous().t()  # as transformers' Conv1D stores it
    t["lora_a"] = torch.cat((t["lora_a"],) * 2, 1)[:, :36]
    t["lora_b"] = t["lora_b"].t().contiguous().t()
    strided = run(ops.lora_linear, t, scaling=0.5)
    for name, value in plain.items():
        assert relative_error(strided[name], value.double()) < 3e-3, name


@pytest.mark.parametrize("names", [("x",), ("lora_a",), ("lora_b",), ("bias",), ("x", "lora_b")])
def test_only_asked_gradients_are_formed(names):
    t = make(20, 24, 36, 4, torch.float32, torch.float32)
    every = run(ops.lora_linear, t, scaling=0.5)
    for name in names:
        t[name].requires_grad_()
    y = ops.lora_linear(t["x"], t["weight"], t["lora_a"], t["lora_b"], t["bias"], scaling=0.5)
    y.backward(t["dy"])
    for name in ("x", "lora_a", "lora_b", "bias"):
        if name in names:
            assert torch.equal(t[name].grad, every["d" + name])
        else:
            assert t[name].grad is None


def test_saved_for_backward_is_x_and_s_only():
    t = make(64, 24, 36, 4, torch.float32, torch.float32)
    x = t["x"].requires_grad_()
    shapes = []
    with torch.autograd.graph.saved_tensors_hooks(lambda s: (shapes.append(s), s)[1], lambda s: s):
        ops.lora_linear(x, t["weight"], t["lora_a"], t["lora_b"], scaling=0.5)
    inputs = {t[name].data_ptr() for name in ("x", "weight", "lora_a", "lora_b")}
    new = [s for s in shapes if s.data_ptr() not in inputs]
    assert [(tuple(s.shape), s.dtype) for s in new] == [((64, 4), torch.float32)]


@pytest.mark.parametrize("p", [0.0, 0.2])
def test_same_bits_from_run_to_run_and_for_any_threads(p):
    t = make(200, 300, 260, 16, torch.bfloat16, torch.float32)
    before = torch.get_num_threads()
    runs = []
    try:
        for threads in (before, before, 1, 3):
            torch.set_num_threads(threads)
            runs.append(run(ops.lora_linear, t, scaling=1.0, dropout_p=p, seed=torch.tensor(5)))
    finally:
        torch.set_num_threads(before)
    for other in runs[1:]:
        for name, value in runs[0].items():
            assert torch.equal(value, other[name]), name


def test_infinity_in_an_unrelated_row_stays_there(backend):
    # Padding of an odd K must not multiply the next row's first element by zero.
    t = make(40, 9, 33, 3, torch.bfloat16, torch.bfloat16)
    t["x"][20] = float("inf")
    y = ops.lora_linear(t["x"], t["weight"], t["lora_a"], t["lora_b"], scaling=1.0)
    finite = torch.isfinite(y).all(dim=1)
    assert finite.sum() == 39
    assert not finite[20]
