"""fuse_model: a fused transformers model computes what it computed before."""

from __future__ import annotations

import copy
import functools
import io
import pickle
import subprocess
import sys

import prefix_models
import pytest
import torch
from fused_models import assert_not_worse, assert_same, build, run
from torch import nn

import fused_peft
from fused_peft import fuse_model, unfuse_model

pytest.importorskip("transformers")

COUNTS = {
    "llama": {"attention": 2, "rms_norm": 5, "mlp": 2, "loss": 1},
    "qwen2": {"attention": 2, "rms_norm": 5, "mlp": 2, "loss": 1},
    "mistral": {"attention": 2, "rms_norm": 5, "mlp": 2, "loss": 1},
    "qwen3": {"attention": 2, "rms_norm": 9, "mlp": 2, "loss": 1},
    "gemma": {"attention": 2, "rms_norm": 0, "mlp": 0, "loss": 1},
    "gpt2": {"attention": 2, "rms_norm": 0, "mlp": 0, "loss": 1},
    "llama classifier": {"attention": 2, "rms_norm": 5, "mlp": 2, "loss": 0},
    "t5": {"attention": 9, "rms_norm": 0, "mlp": 0, "loss": 0},
}
TRAINED = ["llama", "qwen2", "mistral", "gemma", "gpt2"]


@pytest.mark.parametrize("kind", COUNTS)
def test_counts_and_idempotence(kind):
    model = build(kind)
    assert fuse_model(model) == COUNTS[kind]
    functions = [m.__dict__.get("forward") for m in model.modules()]
    assert fuse_model(model) == COUNTS[kind]
    assert [m.__dict__.get("forward") for m in model.modules()] == functions


@pytest.mark.parametrize("adapter", ["lora", "prefix", None])
@pytest.mark.parametrize("kind", TRAINED)
def test_equal_in_float32(kind, adapter):
    model = build(kind, adapter)
    plain = run(model)
    fuse_model(model)
    fused = run(model)
    assert len(fused) > 3
    assert_same(fused, plain)


@pytest.mark.parametrize("adapter", ["lora", "prefix"])
@pytest.mark.parametrize("kind", TRAINED)
def test_not_worse_in_bfloat16(kind, adapter):
    model = build(kind, adapter, torch.bfloat16)
    # The same (rounded) parameters in float64.
    exact = run(copy.deepcopy(model).double())
    plain = run(model)
    fuse_model(model)
    assert_not_worse(run(model), plain, exact)


def test_ops_are_run(monkeypatch):
    calls = []
    for name in ("rms_norm", "swiglu", "cross_entropy", "prefix_attention"):
        op = getattr(fused_peft.ops, name)

        def counted(*args, _op=op, _name=name, **kwargs):
            calls.append(_name)
            return _op(*args, **kwargs)

        monkeypatch.setattr(fused_peft.ops, name, counted)
    model = build("llama", "lora")
    fuse_model(model)
    run(model)
    assert {name: calls.count(name) for name in set(calls)} == {
        "rms_norm": 5,
        "swiglu": 2,
        "cross_entropy": 1,
        "prefix_attention": 2,
    }


def test_adapters_before_or_after():
    plain = run(build("llama", "lora"))
    model = prefix_models.model("llama")
    assert fuse_model(model) == COUNTS["llama"]
    fused_peft.get_peft_model(model, fused_peft.LoraConfig(r=4, target_modules="all-linear"))
    assert fuse_model(model) == COUNTS["llama"]
    model.load_state_dict(build("llama", "lora").state_dict())
    assert_same(run(model), plain)


# ---- what is left alone --------------------------------------------------------------------------


class RMSNorm(nn.Module):
    def __init__(self, form):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(8))
        self.eps = 1e-6
        self.form = form

    def forward(self, x):
        if self.form == "random":
            torch.rand(1)
        mean = x.square().mean(-1, keepdim=True)
        if self.form == "other eps":
            return self.weight * x * torch.rsqrt(mean + 1e-5)
        if self.form == "eps outside":
            return self.weight * x / (mean.sqrt() + self.eps)
        if self.form == "one plus":
            return (1 + self.weight) * x * torch.rsqrt(mean + self.eps)
        if self.form == "centred":
            x = x - x.mean(-1, keepdim=True)
        return self.weight * x * torch.rsqrt(mean + self.eps)


class GatedMLP(nn.Module):
    def __init__(self, form):
        super().__init__()
        self.gate_proj, self.up_proj = (nn.Linear(8, 12, bias=False) for _ in range(2))
        self.down_proj = nn.Linear(12, 8, bias=False)
        self.act_fn = nn.GELU() if form == "gelu" else nn.SiLU()
        self.form = form

    def forward(self, x):
        gate, up = self.gate_proj(x), self.up_proj(x)
        if self.form == "limit":
            gate = gate.clamp(max=7.0)
        return self.down_proj(self.act_fn(gate) * (up + 1 if self.form == "plus" else up))


@pytest.mark.parametrize(
    ("module", "counted"),
    [
        (functools.partial(RMSNorm, "plain"), "rms_norm"),
        (functools.partial(RMSNorm, "random"), "rms_norm"),
        (functools.partial(RMSNorm, "other eps"), None),
        (functools.partial(RMSNorm, "eps outside"), None),
        (functools.partial(RMSNorm, "one plus"), None),
        (functools.partial(RMSNorm, "centred"), None),
        (functools.partial(nn.RMSNorm, 8, eps=1e-6), None),
        (functools.partial(GatedMLP, "plain"), "mlp"),
        (functools.partial(GatedMLP, "gelu"), None),
        (functools.partial(GatedMLP, "limit"), None),
        (functools.partial(GatedMLP, "plus"), None),
    ],
)
def test_only_what_computes_the_same_is_fused(module, counted):
    if module.func is nn.RMSNorm:
        counted = "rms_norm"
    model = build("gpt2")
    model.extra = module()
    before = {name: value.clone() for name, value in model.extra.state_dict().items()}
    state, calls = torch.get_rng_state(), []
    model.extra.register_forward_hook(lambda *_: calls.append(1))
    counts = fuse_model(model)
    assert torch.equal(torch.get_rng_state(), state)
    assert not calls
    assert counts["rms_norm"] + counts["mlp"] == (counted is not None)
    assert counted is None or counts[counted] == 1
    after = model.extra.state_dict()
    assert after.keys() == before.keys()
    assert all(torch.equal(after[name], before[name]) for name in before)
    x = torch.randn(3, 8)
    torch.testing.assert_close(model.extra(x), type(model.extra).forward(model.extra, x))
    assert calls == [1]


def test_replaced_forward_is_left_alone():
    model = build("llama")
    norm = model.model.norm
    wrapped = functools.partial(type(norm).forward, norm)
    norm.forward = wrapped
    assert fuse_model(model)["rms_norm"] == 4
    assert norm.forward is wrapped
    unfuse_model(model)
    assert norm.forward is wrapped


def test_not_a_transformers_model():
    for function in (fuse_model, unfuse_model):
        with pytest.raises(TypeError, match="model is a Linear; expected a transformers model"):
            function(nn.Linear(2, 2))


def test_import_does_not_import_transformers():
    code = "import sys, fused_peft; fused_peft.fuse_model; sys.exit('transformers' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


# ---- ways of running -----------------------------------------------------------------------------


def test_trained_norm_weights():
    model = build("llama")
    plain = run(model)
    assert "model.norm.weight" in plain
    fuse_model(model)
    assert_same(run(model), plain)


def test_norm_weights_of_another_dtype():
    model = build("llama", dtype=torch.bfloat16)
    norm = model.model.norm.float()
    x = torch.randn(2, 8, 32, dtype=torch.bfloat16)
    plain = norm(x)
    fuse_model(model)
    assert norm(x).dtype == plain.dtype == torch.float32
    torch.testing.assert_close(norm(x), plain)


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing(reentrant):
    model = build("llama", "lora").train()
    plain = run(model)
    fuse_model(model)
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    assert_same(run(model), plain)


def test_autocast():
    model = build("qwen3", "lora")
    exact = run(copy.deepcopy(model).double())
    with torch.autocast("cpu", torch.bfloat16):
        plain = run(model)
        fuse_model(model)
        fused = run(model)
    assert {n: v.dtype for n, v in fused.items()} == {n: v.dtype for n, v in plain.items()}
    assert_not_worse(fused, plain, exact)


def test_compile():
    model = build("llama", "lora")
    plain = run(model)
    fuse_model(model)
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    ids = prefix_models.tokens()
    labels = ids.clone()
    labels[1, 2:5] = -100
    model.zero_grad()
    out = compiled(
        input_ids=ids, attention_mask=torch.ones_like(ids), labels=labels, use_cache=False
    )
    out.loss.backward()
    result = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    result = {"logits": out.logits.detach(), "loss": out.loss.detach(), **result}
    assert_same(result, {n: v for n, v in plain.items() if n != "x"})


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_greedy_generation(kind):
    model = build(kind, "lora")
    ids = prefix_models.tokens(rows=2, length=4)
    options = {"max_new_tokens": 8, "do_sample": False, "attention_mask": torch.ones_like(ids)}
    plain = model.generate(ids, **options)
    fuse_model(model)
    assert torch.equal(model.generate(ids, **options), plain)


def _pickled(model):
    return pickle.loads(pickle.dumps(model))  # noqa: S301


def _saved(model):
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=False)


@pytest.mark.parametrize("copied", [copy.deepcopy, _pickled, _saved])
def test_copies_are_fused_and_their_own(copied):
    model = build("llama")
    fuse_model(model)
    plain = run(model)
    other = copied(model)
    assert fuse_model(other) == COUNTS["llama"]
    mine = set(map(id, model.modules()))
    for module in other.modules():
        if "forward" in module.__dict__:
            assert module.forward.args[0] is module
            assert id(module) not in mine
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    assert_same(run(other), plain)
    unfuse_model(other)
    assert_same(run(other), plain)


def test_state_dict_and_save_pretrained(tmp_path):
    model = build("llama")
    before = {name: value.clone() for name, value in model.state_dict().items()}
    model.save_pretrained(tmp_path / "plain")
    fuse_model(model)
    assert model.state_dict().keys() == before.keys()
    model.save_pretrained(tmp_path / "fused")
    for name in ("config.json", "model.safetensors"):
        plain, fused = ((tmp_path / kind / name).read_bytes() for kind in ("plain", "fused"))
        assert plain == fused
    loaded = type(model).from_pretrained(tmp_path / "fused")
    assert all(torch.equal(value, before[name]) for name, value in loaded.state_dict().items())


def _functions(model):
    return {
        "forward": [m.forward.__func__ for m in model.modules()],
        "own": [m.__dict__.get("forward") for m in model.modules()],
        "loss": model.loss_function,
        "attention": model.config._attn_implementation,
    }


@pytest.mark.parametrize("attention", ["sdpa", "eager", "fused_peft"])
def test_unfuse_restores_the_very_same_functions(attention):
    model = build("llama")
    if attention == "fused_peft":
        fused_peft.use_fused_attention(model)
    else:
        model.set_attn_implementation(attention)
    before = _functions(model)
    attributes = set(model.__dict__)
    unfuse_model(model)
    assert _functions(model) == before
    fuse_model(model)
    assert model.config._attn_implementation == "fused_peft"
    assert model.loss_function is not before["loss"]
    unfuse_model(model)
    assert _functions(model) == before
    assert set(model.__dict__) == attributes


def test_unfuse_keeps_the_attention_that_a_prefix_needs():
    plain = run(build("llama", "prefix"))
    model = prefix_models.model("llama")
    fuse_model(model)
    fused_peft.get_peft_model(model, fused_peft.PrefixTuningConfig(num_virtual_tokens=3))
    model.load_state_dict(build("llama", "prefix").state_dict())
    unfuse_model(model)
    assert_same(run(model), plain)
