"""Prefix attention against float64 and against plain torch, on every instruction set."""

import math

import pytest
import torch
from backends import BACKENDS, forced, relative_error
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from fused_peft import ops, reference

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
NAMES = ("q", "k", "v", "prefix_k", "prefix_v")


def make(b, hq, hkv, s, t, d, p, dtype, *, seed=0, batched=False, layout="bhsd"):
    g = torch.Generator().manual_seed(seed)

    def draw(*shape):
        return torch.randn(*shape, generator=g).to(dtype)

    def heads(count, length):
        if layout == "bshd":
            return draw(b, length, count, d).transpose(1, 2)
        if layout == "columns":  # D is not the contiguous dimension
            return draw(b, count, d, length).transpose(2, 3)
        return draw(b, count, length, d)

    prefix = (b, hkv, p, d) if batched else (hkv, p, d)
    return {
        "q": heads(hq, s),
        "k": heads(hkv, t),
        "v": heads(hkv, t),
        "prefix_k": draw(*prefix),
        "prefix_v": draw(*prefix),
        "dout": heads(hq, s),
    }


def run(fn, t, **kwargs):
    """Output and the gradients of q, k, v, prefix_k, prefix_v."""
    leaves = [t[name].detach().requires_grad_() for name in NAMES]
    out = fn(*leaves, **kwargs)
    grads = torch.autograd.grad(out, leaves, t["dout"])
    return {"out": out.detach()} | {"d" + n: g for n, g in zip(NAMES, grads, strict=True)}


def keep_of(t, **kwargs):
    options = ("causal", "key_lengths", "key_mask", "query_start", "sliding_window")
    given_options = {"causal": False} | {k: v for k, v in kwargs.items() if k in options}
    keep = reference.attention_keep(
        t["q"].shape[2], t["k"].shape[2], batch=t["q"].shape[0], **given_options
    )
    return F.pad(keep, (t["prefix_k"].shape[-2], 0), value=True)[:, None]


def concat_sdpa(q, k, v, prefix_k, prefix_v, **kwargs):
    """What PEFT and transformers run: the prefix expanded and concatenated, and a mask."""
    keep = keep_of({"q": q, "k": k, "prefix_k": prefix_k}, **kwargs)
    k = torch.cat((prefix_k.expand(q.shape[0], -1, -1, -1), k), dim=2)
    v = torch.cat((prefix_v.expand(q.shape[0], -1, -1, -1), v), dim=2)
    return F.scaled_dot_product_attention(
        q, k, v, attn_mask=keep, scale=kwargs.get("scale"), enable_gqa=True
    )


def exact(t, **kwargs):
    return run(reference.prefix_attention, {k: v.double() for k, v in t.items()}, **kwargs)


def sizes_of_terms(t, **kwargs):
    """Norms of the sums' terms, without the cancellation between them, in float64."""
    t = {name: value.double() for name, value in t.items()}
    batch, heads, _, d = t["q"].shape
    group = heads // t["k"].shape[1]
    scale = kwargs.get("scale") or d**-0.5
    k, v = (
        torch.cat((t["prefix_" + n].expand(batch, -1, -1, -1), t[n]), dim=2).repeat_interleave(
            group, dim=1
        )
        for n in ("k", "v")
    )
    scores = (t["q"] @ k.mT * scale).masked_fill(~keep_of(t, **kwargs), -1e300)
    weights = scores.softmax(-1).masked_fill(~keep_of(t, **kwargs), 0.0)
    weights = weights / (1.0 - kwargs.get("dropout_p", 0.0))
    dweights = t["dout"].abs() @ v.abs().mT
    ds = weights * (dweights + (weights * dweights).sum(-1, keepdim=True)) * scale
    return {
        "out": (weights @ v.abs()).norm(),
        "dq": (ds @ k.abs()).norm(),
        "dk": (ds.mT @ t["q"].abs()).norm(),
        "dv": (weights.mT @ t["dout"].abs()).norm(),
    }


def assert_no_worse_than_torch(t, **kwargs):
    """The rule: no error is larger than that of plain torch at the same dtype.

    Two sets of n independent rounding errors of one size have norms that differ by about
    1 / sqrt(n) of it by chance, and four of those are allowed. The errors of a query's weights are
    one error, that of its sum: there are B Hq S of them. Half a unit of the format is that of the
    terms of the sums, which may cancel: a query that sees one key has gradients of zero.
    """
    plain = reference.prefix_attention if kwargs.get("dropout_p") else concat_sdpa
    ours, torchs, truth = run(ops.prefix_attention, t, **kwargs), run(plain, t, **kwargs), None
    truth = exact(t, **kwargs)
    terms = sizes_of_terms(t, **kwargs)
    queries = t["q"][..., 0].numel()
    for name, ref in truth.items():
        assert ours[name].dtype == torchs[name].dtype
        assert ours[name].shape == torchs[name].shape
        if ref.numel() == 0:
            continue
        error, allowed = relative_error(ours[name], ref), relative_error(torchs[name], ref)
        by_chance = 4.0 / math.sqrt(max(1, min(ref.numel(), queries)))
        unit = torch.finfo(ours[name].dtype).eps / 2
        norm = ref.norm().item()
        unit *= terms[name.replace("prefix_", "")].item() / (norm if norm > 0 else 1.0)
        assert error <= allowed * (1 + by_chance) + unit * by_chance, (name, error, allowed)


# B, Hq, Hkv, S, T, D, P: one token, primes, cache longer than the queries, more than one block of
# keys and of queries, MQA, every width of head, no prefix, no multiple of 8 in S, T or P.
SHAPES = [
    (1, 1, 1, 1, 1, 8, 1),
    (2, 3, 1, 1, 60, 64, 5),
    (2, 6, 2, 17, 17, 64, 7),
    (1, 4, 4, 65, 70, 32, 0),
    (2, 8, 1, 40, 41, 96, 33),
    (1, 2, 2, 133, 133, 80, 130),
    (3, 2, 1, 7, 11, 136, 2),
    (1, 3, 3, 30, 600, 64, 64),
    (1, 2, 1, 300, 300, 128, 31),
    (2, 2, 2, 20, 20, 256, 9),
    (1, 2, 1, 5, 9, 64, 4096),
]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_error_is_not_above_plain_torch(backend, shape, causal, dtype):
    assert_no_worse_than_torch(make(*shape, DTYPES[dtype]), causal=causal)


OPTIONS = {
    "key_lengths": {"key_lengths": torch.tensor([23, 40])},
    "left_padding": {"key_mask": torch.arange(40) >= torch.tensor([[5], [0]])},
    "holes": {"key_mask": torch.arange(40) % torch.tensor([[3], [7]]) != 1},
    "query_start": {"query_start": torch.tensor([3, 7])},
    "one_query_start": {"query_start": torch.tensor(5)},
    "window": {"sliding_window": 9},
    "window_and_lengths": {"sliding_window": 4, "key_lengths": torch.tensor([33, 12])},
    "scale": {"scale": 0.5},
}


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("batched", [False, True])
@pytest.mark.parametrize("option", OPTIONS)
def test_masks_and_options(backend, option, batched, causal, dtype):
    t = make(2, 6, 2, 33, 40, 64, 10, DTYPES[dtype], batched=batched)
    assert_no_worse_than_torch(t, causal=causal, **OPTIONS[option])


@pytest.mark.parametrize("layout", ["bshd", "columns"])
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_strided_layouts_give_the_same_bits(backend, layout, dtype):
    t = make(2, 6, 2, 33, 40, 64, 10, DTYPES[dtype], layout=layout)
    strided = run(ops.prefix_attention, t, causal=True)
    plain = run(ops.prefix_attention, {k: v.contiguous() for k, v in t.items()}, causal=True)
    for name, value in plain.items():
        assert torch.equal(strided[name], value), name


def test_a_prefix_expanded_by_the_caller_gets_a_gradient_for_each_row(backend):
    t = make(3, 4, 2, 9, 9, 32, 5, torch.float32)
    expanded = {k: v.expand(3, -1, -1, -1) if "prefix" in k else v for k, v in t.items()}
    shared = run(ops.prefix_attention, t, causal=True)
    separate = run(ops.prefix_attention, expanded, causal=True)
    for name in ("dprefix_k", "dprefix_v"):
        assert separate[name].shape == (3, 2, 5, 32)
        torch.testing.assert_close(separate[name].sum(0), shared[name])


@settings(max_examples=80, deadline=None)
@given(
    b=st.integers(1, 3),
    hkv=st.integers(1, 3),
    group=st.integers(1, 5),
    s=st.integers(1, 140),
    more_keys=st.integers(0, 150),
    d=st.sampled_from([8, 16, 24, 40, 64, 72, 96, 104, 128, 200]),
    p=st.integers(0, 140),
    causal=st.booleans(),
    window=st.sampled_from([None, None, 1, 13]),
    drop=st.sampled_from([0.0, 0.0, 0.2]),
    dtype=st.sampled_from(sorted(DTYPES)),
    backend=st.sampled_from(BACKENDS),
    data=st.data(),
)
def test_drawn_problems(
    b, hkv, group, s, more_keys, d, p, causal, window, drop, dtype, backend, data
):
    with forced(backend):
        keys = s + more_keys
        t = make(b, hkv * group, hkv, s, keys, d, max(p, 1), DTYPES[dtype], seed=s + 7 * d + p)
        options = {"causal": causal, "sliding_window": window}
        if data.draw(st.booleans()):
            lengths = data.draw(st.lists(st.integers(0, keys), min_size=b, max_size=b))
            options["key_lengths"] = torch.tensor(lengths)
        if drop:
            options |= {"dropout_p": drop, "seed": torch.tensor(77)}
        assert_no_worse_than_torch(t, **options)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(2, 6, 2, 33, 40, 64, 10), (1, 2, 1, 150, 600, 32, 70)], ids=str)
def test_dropout_matches_the_reference_mask(backend, shape, dtype):
    seed = torch.tensor(0x0123456789ABCDEF)
    t = make(*shape, DTYPES[dtype])
    assert_no_worse_than_torch(t, causal=True, dropout_p=0.3, seed=seed)
    # Left padding moves the kernel's list of keys against the mask's columns.
    mask = torch.arange(shape[4]).expand(shape[0], -1) >= 9
    assert_no_worse_than_torch(t, key_mask=mask, dropout_p=0.3, seed=seed)


def test_a_query_without_keys_gives_zeros(backend):
    t = make(2, 2, 1, 6, 6, 16, 0, torch.float32)
    mask = torch.tensor([[False] * 6, [True] * 6])
    out = run(ops.prefix_attention, t, causal=True, key_mask=mask)
    for name in ("out", "dq", "dk", "dv"):
        assert torch.equal(out[name][0], torch.zeros_like(out[name][0])), name
        assert torch.isfinite(out[name]).all()
    assert out["out"][1].abs().min() > 0


@pytest.mark.parametrize("empty", ["batch", "queries", "keys"])
def test_empty_dimensions(backend, empty):
    b, s, keys = (
        0 if empty == n else size for n, size in (("batch", 2), ("queries", 3), ("keys", 5))
    )
    t = make(b, 4, 2, s, keys, 16, 3, torch.float32)
    out = run(ops.prefix_attention, t)
    assert out["out"].shape == (b, 4, s, 16)
    if empty == "keys":
        for name, ref in exact(t).items():
            assert relative_error(out[name], ref) < 1e-6
    else:
        for name in ("dk", "dv", "dprefix_k", "dprefix_v"):
            assert torch.equal(out[name], torch.zeros_like(out[name]))


@pytest.mark.parametrize("order", ["rising", "falling"])
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_the_largest_score_anywhere(backend, order, dtype):
    # Scores of 50 to 100 that rise from block to block of keys, so each has a larger maximum than
    # all before it, or fall, so that whole blocks weigh nothing.
    t = make(1, 4, 2, 130, 1300, 64, 20, DTYPES[dtype])
    slope = torch.linspace(0.5, 4.0, 1300)
    if order == "falling":
        slope = slope.flip(0)
    t["k"] = (t["k"].float() * slope[:, None]).to(DTYPES[dtype])
    assert_no_worse_than_torch(t, causal=True, scale=0.3)


def test_prefix_alone_equals_the_same_keys_in_the_sequence(backend):
    t = make(2, 4, 2, 9, 9, 32, 6, torch.float32)
    joined = dict(t)
    for n in ("k", "v"):
        joined[n] = torch.cat((t["prefix_" + n].expand(2, -1, -1, -1), t[n]), dim=2)
        joined["prefix_" + n] = t["prefix_" + n][:, :0]
    # Queries stand behind the prefix, which a causal mask then does not hide.
    out = ops.prefix_attention(*(t[n] for n in NAMES), causal=True)
    torch.testing.assert_close(ops.prefix_attention(*(joined[n] for n in NAMES), causal=True), out)


@pytest.mark.parametrize("names", [("q",), ("k",), ("v",), ("prefix_k",), ("prefix_k", "prefix_v")])
def test_only_asked_gradients_are_formed(names):
    t = make(2, 6, 2, 33, 40, 64, 10, torch.float32)
    every = run(ops.prefix_attention, t, causal=True)
    leaves = {n: t[n].detach().requires_grad_(n in names) for n in NAMES}
    ops.prefix_attention(**leaves, causal=True).backward(t["dout"])
    for name in NAMES:
        if name in names:
            torch.testing.assert_close(leaves[name].grad, every["d" + name])
        else:
            assert leaves[name].grad is None


def test_saved_for_backward_is_out_and_lse_only():
    t = make(2, 4, 2, 20, 20, 32, 5, torch.float32)
    leaves = [t[n].requires_grad_() for n in NAMES]
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda s: (saved.append(s), s)[1], lambda s: s):
        out = ops.prefix_attention(*leaves, causal=True)
    inputs = {t[n].data_ptr() for n in NAMES} | {out.data_ptr()}
    new = [s for s in saved if s.data_ptr() not in inputs]
    assert [(tuple(s.shape), s.dtype) for s in new] == [((2, 4, 20), torch.float64)]


@pytest.mark.parametrize("p", [0.0, 0.2])
def test_same_bits_from_run_to_run(p):
    t = make(3, 6, 2, 300, 300, 64, 20, torch.bfloat16)
    runs = [
        run(ops.prefix_attention, t, causal=True, dropout_p=p, seed=torch.tensor(5))
        for _ in range(4)
    ]
    for other in runs[1:]:
        for name, value in runs[0].items():
            assert torch.equal(value, other[name]), name


@pytest.mark.parametrize("threads", [1, 2, 3, 5, 16])
@pytest.mark.parametrize("shape", [(1, 3, 1, 300, 300, 32, 20), (3, 4, 2, 40, 40, 32, 20)], ids=str)
def test_any_number_of_threads(shape, threads):
    # Heads then are shared between threads, some between more than two.
    t = make(*shape, torch.float32)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(threads)
        assert_no_worse_than_torch(t, causal=True)
    finally:
        torch.set_num_threads(before)


def test_masked_keys_of_any_value_do_not_matter(backend):
    t = make(2, 4, 2, 20, 32, 64, 5, torch.bfloat16)
    lengths = torch.tensor([20, 28])
    options = {"causal": True, "query_start": lengths - 20}
    clean = run(ops.prefix_attention, t, **options)
    for b in range(2):
        for name in ("k", "v"):
            t[name][b, :, int(lengths[b]) :] = float("nan")
    unfilled = run(ops.prefix_attention, t, **options)
    assert torch.equal(unfilled["out"], clean["out"])
