"""LoraConfig, and get_peft_model with what drives the adapters afterwards; PEFT is the measure."""

from __future__ import annotations

import copy
import dataclasses
import json
import math
import re
import warnings
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from fused_peft import (
    AdapterError,
    LoraConfig,
    LoraLinear,
    add_adapter,
    delete_adapter,
    disable_adapter,
    get_nb_trainable_parameters,
    get_peft_model,
    merge_adapter,
    print_trainable_parameters,
    set_adapter,
    unmerge_adapter,
)
from fused_peft.tuners import ModulesToSaveWrapper, active_adapters, inject_adapter
from fused_peft.tuners.targets import DEFAULT_TARGETS


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.q_proj = nn.Linear(8, 8)
        self.v_proj = nn.Linear(8, 8, bias=False)
        self.mlp = nn.Sequential(nn.Linear(8, 12), nn.ReLU(), nn.Linear(12, 8))
        self.norm = nn.LayerNorm(8)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(x + self.mlp(torch.tanh(self.q_proj(x)) * self.v_proj(x)))


class Tiny(nn.Module):
    """Two blocks between an embedding and a classifier."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, 8)
        self.layers = nn.ModuleList([Block(), Block(), Block()])
        self.conv = nn.Conv2d(1, 1, 1)
        self.q_proj = nn.Linear(8, 8)
        self.score = nn.Linear(8, 3)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids)
        for layer in self.layers:
            x = layer(x)
        return self.score(self.conv(self.q_proj(x)[:, None])[:, 0])


def tiny(seed: int = 0) -> Tiny:
    torch.manual_seed(seed)
    return Tiny()


def nested() -> nn.Module:
    return nn.Sequential(tiny())


def ids() -> Tensor:
    return torch.randint(0, 11, (2, 5), generator=torch.Generator().manual_seed(9))


def llama(seed: int = 0, **kwargs: Any) -> nn.Module:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(seed)
    config = transformers.LlamaConfig(
        vocab_size=40,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        **kwargs,
    )
    return transformers.LlamaForCausalLM(config).eval()


def gpt2(seed: int = 0) -> nn.Module:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(seed)
    config = transformers.GPT2Config(vocab_size=40, n_embd=16, n_layer=2, n_head=2, n_positions=16)
    return transformers.GPT2LMHeadModel(config).eval()


def llama_classifier(seed: int = 0) -> nn.Module:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(seed)
    config = transformers.LlamaConfig(
        vocab_size=40,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_labels=3,
        pad_token_id=0,
    )
    return transformers.LlamaForSequenceClassification(config).eval()


def lora_layers(model: nn.Module) -> dict[str, LoraLinear]:
    return {name: m for name, m in model.named_modules() if isinstance(m, LoraLinear)}


def randomize(model: nn.Module) -> None:
    """The same weights for the same adapter of the same layer at every call."""
    for layer in lora_layers(model).values():
        for by_name in (layer.lora_A, layer.lora_B):
            for i, parameter in enumerate(by_name.values()):
                generator = torch.Generator().manual_seed(i)
                parameter.data.copy_(0.2 * torch.randn(parameter.shape, generator=generator))


def trainable(model: nn.Module) -> set[str]:
    return {name for name, p in model.named_parameters() if p.requires_grad}


def state(model: nn.Module) -> list[tuple[Any, ...]]:
    """Everything that an operation which fails has to leave as it was."""
    modules = [(name, id(m), type(m), m.training) for name, m in model.named_modules()]
    parameters = [
        (name, id(p), p.requires_grad, p._version) for name, p in model.named_parameters()
    ]
    return [*modules, *parameters, ("attributes", *sorted(vars(model)))]


def logits(model: nn.Module, tokens: Tensor) -> Tensor:
    output = model(tokens)
    return (output if isinstance(output, Tensor) else output.logits).detach()


# ---- the same as PEFT

CASES: dict[str, tuple[Any, dict[str, Any]]] = {
    "names": (tiny, {"target_modules": ["q_proj", "mlp.0"]}),
    "full name": (tiny, {"target_modules": ["layers.1.q_proj"]}),
    "regex": (tiny, {"target_modules": r".*\.(q_proj|mlp\.[02])"}),
    "regex, whole names only": (tiny, {"target_modules": r"layers\.\d\.v_proj|q_proj"}),
    "all-linear": (tiny, {"target_modules": "all-linear"}),
    "all-linear, other case": (tiny, {"target_modules": "All-Linear"}),
    "exclude names": (
        tiny,
        {"target_modules": "all-linear", "exclude_modules": ["score", "mlp.2"]},
    ),
    "exclude regex": (
        tiny,
        {"target_modules": ["q_proj"], "exclude_modules": r"layers\.[12]\..*"},
    ),
    "layer index": (nested, {"target_modules": ["q_proj"], "layers_to_transform": 1}),
    "layer indices": (nested, {"target_modules": ["v_proj"], "layers_to_transform": [0, 2, 7]}),
    "no layer indices": (tiny, {"target_modules": ["v_proj"], "layers_to_transform": []}),
    "layers pattern": (
        tiny,
        {
            "target_modules": ["v_proj", "q_proj"],
            "layers_to_transform": [1],
            "layers_pattern": "layers",
        },
    ),
    "layers patterns": (
        tiny,
        {
            "target_modules": ["v_proj", "layers.2.q_proj"],
            "layers_to_transform": [1],
            "layers_pattern": ["h", "layers"],
        },
    ),
    "rank pattern": (
        tiny,
        {
            "target_modules": ["q_proj", "v_proj"],
            "rank_pattern": {"layers.0.q_proj": 2, "v_proj": 3, r"^q_proj": 5, r".*q_proj": 6},
            "alpha_pattern": {r"layers\.[12]\.v_proj": 20, "q_proj": 30},
            "use_rslora": True,
        },
    ),
    "bias all": (tiny, {"target_modules": ["q_proj"], "bias": "all", "modules_to_save": ["conv"]}),
    "bias lora_only": (tiny, {"target_modules": ["q_proj", "v_proj"], "bias": "lora_only"}),
    "modules_to_save": (
        tiny,
        {"target_modules": "all-linear", "modules_to_save": ["score", "norm"]},
    ),
    "llama, default": (llama, {}),
    "llama, all-linear": (llama, {"target_modules": "all-linear", "lora_alpha": 24}),
    "llama, tied, all-linear": (
        lambda: llama(tie_word_embeddings=True),
        {"target_modules": "all-linear"},
    ),
    "gpt2, default": (gpt2, {"fan_in_fan_out": True}),
    "gpt2, all-linear": (gpt2, {"target_modules": "all-linear", "fan_in_fan_out": True}),
    "gpt2, mixed": (gpt2, {"target_modules": ["c_attn", "mlp.c_proj"], "fan_in_fan_out": True}),
    "classifier": (llama_classifier, {"target_modules": "all-linear", "task_type": "SEQ_CLS"}),
}


def peft_twin(model: nn.Module, ours: nn.Module, kwargs: dict[str, Any]) -> Any:
    """PEFT's model over a copy of ``model``, with the adapter weights of ``ours``."""
    peft = pytest.importorskip("peft")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = peft.get_peft_model(copy.deepcopy(model), peft.LoraConfig(r=4, **kwargs))
    root = theirs.base_model.model
    for path, layer in lora_layers(ours).items():
        twin = root.get_submodule(path)
        twin.lora_A["default"].weight.data.copy_(layer.lora_A["default"])
        twin.lora_B["default"].weight.data.copy_(layer.lora_B["default"])
    return theirs


@pytest.mark.parametrize(("build", "kwargs"), CASES.values(), ids=CASES)
def test_equals_peft(build: Any, kwargs: dict[str, Any]) -> None:
    peft = pytest.importorskip("peft")
    model = build().eval()
    ours = copy.deepcopy(model)
    assert get_peft_model(ours, LoraConfig(r=4, **kwargs)) is ours
    randomize(ours)
    theirs = peft_twin(model, ours, kwargs)
    root = theirs.base_model.model
    twins = {n: m for n, m in root.named_modules() if isinstance(m, peft.tuners.lora.LoraLayer)}
    assert set(lora_layers(ours)) == set(twins)
    for path, layer in lora_layers(ours).items():
        assert layer.r == twins[path].r
        assert layer.scaling == twins[path].scaling
    assert get_nb_trainable_parameters(ours) == theirs.get_nb_trainable_parameters()

    tokens = ids()
    output = logits(ours, tokens)
    torch.testing.assert_close(output, logits(theirs, tokens))
    assert (output - logits(model, tokens)).abs().max() > 1e-4

    merge_adapter(ours)
    theirs.merge_adapter()
    for path, layer in lora_layers(ours).items():
        torch.testing.assert_close(layer.weight.detach(), twins[path].base_layer.weight.detach())
    torch.testing.assert_close(logits(ours, tokens), logits(theirs, tokens))
    unmerge_adapter(ours)
    torch.testing.assert_close(logits(ours, tokens), output)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # biases that stay
        with disable_adapter(ours), theirs.disable_adapter():
            torch.testing.assert_close(logits(ours, tokens), logits(theirs, tokens))


def test_trains_as_peft_does() -> None:
    model = llama()
    kwargs = {"target_modules": ["q_proj", "down_proj"], "bias": "none"}
    ours = get_peft_model(copy.deepcopy(model), LoraConfig(r=4, **kwargs))
    randomize(ours)
    theirs = peft_twin(model, ours, kwargs)
    losses: list[list[float]] = []
    for run in (ours, theirs):
        optimizer = torch.optim.SGD([p for p in run.parameters() if p.requires_grad], lr=0.5)
        losses.append([])
        for _ in range(4):
            loss = run(ids(), labels=ids()).loss
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses[-1].append(loss.item())
    assert losses[0][-1] < losses[0][0]
    torch.testing.assert_close(losses[0], losses[1])
    twins = theirs.base_model.model
    for path, layer in lora_layers(ours).items():
        twin = twins.get_submodule(path).lora_A["default"].weight
        torch.testing.assert_close(layer.lora_A["default"], twin)


indexed = st.tuples(st.sampled_from(["layers", "h", "experts"]), st.sampled_from(["0", "1", "12"]))
keys = st.builds(
    lambda root, lists, leaf: ".".join([*root, *(part for pair in lists for part in pair), leaf]),
    st.sampled_from([[], ["model"]]),
    st.lists(indexed, max_size=2),
    st.sampled_from(["q_proj", "proj", "mlp.0", "q"]),
)
name_lists = st.lists(
    st.sampled_from(["q_proj", "proj", "q", "0", "mlp", "layers.1.proj"]), min_size=1, max_size=2
)
RULES: dict[str, dict[str, Any]] = {
    "target": {"target_modules": st.one_of(name_lists, st.sampled_from([".*proj", "q", ".*p"]))},
    "exclude": {"exclude_modules": st.one_of(name_lists, st.sampled_from([".*1.*", "q"]))},
    "saved": {"modules_to_save": name_lists},
    "layers": {
        "target_modules": st.just(["proj", "q", "model.layers.1.experts.0.q", "layers.0.q_proj"]),
        "layers_to_transform": st.one_of(st.integers(0, 1), st.lists(st.integers(0, 12))),
        "layers_pattern": st.sampled_from([None, "layers", "experts", ["h", "experts"], []]),
    },
}


@pytest.mark.parametrize("rules", RULES.values(), ids=RULES)
def test_matching_rules_are_peft_s(rules: dict[str, Any]) -> None:
    peft = pytest.importorskip("peft")
    from fused_peft.tuners.targets import is_excluded, is_target

    @settings(max_examples=150, deadline=None, database=None)
    @given(key=keys, kwargs=st.fixed_dictionaries(rules))
    def check(key: str, kwargs: dict[str, Any]) -> None:
        kwargs.setdefault("target_modules", ".*")
        theirs = peft.LoraConfig(**kwargs)
        expected = bool(peft.tuners.tuners_utils.check_target_module_exists(theirs, key))
        ours = LoraConfig(**kwargs)
        assert (not is_excluded(ours, key) and is_target(ours, key)) == expected

    check()


@settings(max_examples=40, deadline=None)
@given(
    path=st.lists(st.sampled_from(["a", "ab", "b", "0", "1"]), min_size=1, max_size=4).map(
        ".".join
    ),
    keys=st.lists(
        st.sampled_from(["a", "b", "a.b", "^a", r"a\.\d", "a|b", ".*b", "b.0$"]),
        max_size=3,
        unique=True,
    ),
)
def test_pattern_rules_are_peft_s(path: str, keys: list[str]) -> None:
    from fused_peft.tuners.targets import spec_for

    other = pytest.importorskip("peft.utils.other")
    pattern = {key: i + 20 for i, key in enumerate(keys)}
    spec = spec_for(LoraConfig(rank_pattern=pattern, alpha_pattern=pattern), path)
    expected = other.get_pattern_key(pattern.keys(), path)
    assert (spec.r, spec.lora_alpha) == (pattern.get(expected, 8), pattern.get(expected, 8))


def test_default_targets_are_peft_s() -> None:
    constants = pytest.importorskip("peft.utils.constants")
    theirs = constants.TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING
    assert {"llama", "mistral", "qwen2", "qwen3", "gemma", "gpt2", "bert", "t5"} <= set(
        DEFAULT_TARGETS
    )
    for model_type, targets in DEFAULT_TARGETS.items():
        assert targets == theirs[model_type]


# ---- putting it in


def test_only_the_adapter_is_trainable() -> None:
    model = get_peft_model(tiny(), LoraConfig(target_modules=["v_proj"]))
    assert trainable(model) == {
        f"layers.{i}.v_proj.lora_{side}.default" for i in range(3) for side in "AB"
    }
    assert active_adapters(model) == ["default"]
    model.score.weight.requires_grad_(True)
    assert get_nb_trainable_parameters(model)[0] == 3 * 2 * 8 * 8 + 24


def test_weights_are_the_same_objects() -> None:
    model = tiny()
    before = {name: id(p) for name, p in model.named_parameters()}
    get_peft_model(model, LoraConfig(target_modules="all-linear"))
    after = {name: id(p) for name, p in model.named_parameters() if ".lora_" not in name}
    assert after == before


def test_user_s_config_is_left_alone() -> None:
    config = LoraConfig(target_modules="all-linear", task_type="SEQ_CLS")
    model = get_peft_model(tiny(), config)
    assert config == LoraConfig(target_modules="all-linear", task_type="SEQ_CLS")
    kept = model.fused_peft_config["default"]
    # In full, since "0" would name the first block too.
    assert kept.target_modules == set(lora_layers(model))
    assert kept.modules_to_save == ["classifier", "score"]
    again = get_peft_model(tiny(), kept)
    assert set(lora_layers(again)) == set(lora_layers(model))


def test_all_linear_is_kept_as_full_names_where_short_ones_would_match_more() -> None:
    model = nn.ModuleDict({"a": nn.ModuleDict({"x": nn.Linear(2, 2)}), "x": nn.Embedding(2, 2)})
    get_peft_model(model, LoraConfig(target_modules="all-linear"))
    assert model.fused_peft_config["default"].target_modules == {"a.x"}


def test_adapters_over_half_are_float32_unless_told() -> None:
    config = LoraConfig(target_modules=["q_proj"])
    for dtype in (torch.bfloat16, torch.float16):
        layer = get_peft_model(tiny().to(dtype), config).q_proj
        assert (layer.weight.dtype, layer.lora_A["default"].dtype) == (dtype, torch.float32)
        same = get_peft_model(tiny().to(dtype), config, autocast_adapter_dtype=False).q_proj
        assert same.lora_B["default"].dtype == dtype
    layer = get_peft_model(tiny().double(), config).q_proj
    assert layer.lora_A["default"].dtype == torch.float64


def test_conv1d_is_seen_from_its_type() -> None:
    model = get_peft_model(gpt2(), LoraConfig())
    assert model.fused_peft_config["default"].fan_in_fan_out
    assert all(layer.fan_in_fan_out for layer in lora_layers(model).values())
    with pytest.warns(UserWarning, match="fan_in_fan_out"):
        model = get_peft_model(tiny(), LoraConfig(target_modules=["q_proj"], fan_in_fan_out=True))
    assert not model.fused_peft_config["default"].fan_in_fan_out


def test_tied_weights_stay_tied() -> None:
    model = llama(tie_word_embeddings=True)
    embedding = model.model.embed_tokens.weight
    get_peft_model(model, LoraConfig(target_modules=["lm_head", "q_proj"]))
    assert isinstance(model.lm_head, LoraLinear)
    assert model.lm_head.weight is embedding
    assert model.model.embed_tokens.weight is embedding
    model.tie_weights()
    assert model.lm_head.weight is model.model.embed_tokens.weight
    randomize(model)
    before = state(model)
    with pytest.raises(ValueError, match=r"merging would change the weight of 'lm_head'.*embed"):
        merge_adapter(model)
    assert state(model) == before


@pytest.mark.parametrize("kind", ["pissa", "olora"])
def test_a_start_that_changes_a_tied_weight_is_refused(kind: str) -> None:
    model = llama(tie_word_embeddings=True)
    before = state(model)
    with pytest.raises(ValueError, match=r"'model\.embed_tokens' shares"):
        get_peft_model(
            model, LoraConfig(r=4, target_modules=["q_proj", "lm_head"], init_lora_weights=kind)
        )
    assert state(model) == before


def test_weights_that_share_memory_are_seen() -> None:
    model = nn.ModuleDict({"a": nn.Linear(3, 3), "b": nn.Linear(3, 3)})
    model["b"].weight.data = model["a"].weight.data
    get_peft_model(model, LoraConfig(target_modules=["a"], r=2))
    with pytest.raises(ValueError, match="'b' shares"):
        merge_adapter(model)


def test_a_shared_module_is_replaced_wherever_it_is() -> None:
    shared = nn.Linear(4, 4)
    model = nn.ModuleDict({"first": shared, "second": nn.Sequential(shared, nn.ReLU())})
    get_peft_model(model, LoraConfig(target_modules=["first"]))
    assert isinstance(model["first"], LoraLinear)
    assert model["second"][0] is model["first"]
    merge_adapter(model)
    assert model["first"].merged


@pytest.mark.parametrize("kind", [True, "gaussian", "orthogonal", "pissa", "olora"])
def test_starts_keep_the_model_s_output(kind: bool | str) -> None:
    model = llama()
    expected = logits(model, ids())
    before = model.model.layers[0].self_attn.q_proj.weight.detach().clone()
    get_peft_model(
        model, LoraConfig(r=4, lora_alpha=6, target_modules="all-linear", init_lora_weights=kind)
    )
    after = model.model.layers[0].self_attn.q_proj.weight
    assert torch.equal(before, after) == (kind not in ("pissa", "olora"))
    torch.testing.assert_close(logits(model, ids()), expected, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("grad", [False, True])
def test_transformer_encoder_s_fast_path_does_not_pass_the_adapter_by(grad: bool) -> None:
    torch.manual_seed(0)
    model = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True).eval()
    get_peft_model(model, LoraConfig(target_modules=["linear1", "linear2"]))
    x = torch.randn(2, 3, 8)
    with torch.set_grad_enabled(grad):
        before = model(x)
        randomize(model)
        assert (model(x) - before).abs().max() > 1e-3
    assert len(copy.deepcopy(model).linear1._forward_hooks) == 1


def test_attention_s_output_projection() -> None:
    model = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
    before = state(model)
    with pytest.raises(TypeError, match=r"'self_attn.out_proj' belongs to .*MultiheadAttention"):
        get_peft_model(model, LoraConfig(target_modules=["linear1", "out_proj"]))
    assert state(model) == before
    get_peft_model(model, LoraConfig(target_modules="all-linear"))
    assert set(lora_layers(model)) == {"linear1", "linear2"}


def test_all_linear_leaves_a_head_out() -> None:
    model = nn.ModuleDict({"body": nn.Linear(2, 2), "lm_head": nn.Linear(2, 2)})
    plain = nn.Sequential(nn.Linear(2, 2))
    plain.lm_head = nn.Linear(2, 2)
    get_peft_model(plain, LoraConfig(target_modules="all-linear"))
    assert set(lora_layers(plain)) == {"0"}
    get_peft_model(model, LoraConfig(target_modules=["body", "lm_head"]))
    assert set(lora_layers(model)) == {"body", "lm_head"}


def test_compiles_to_one_graph() -> None:
    model = get_peft_model(tiny(), LoraConfig(target_modules="all-linear", lora_dropout=0.2))
    randomize(model)
    model.eval()
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(ids()), model(ids()))
    model(ids()).sum().backward()
    expected = [p.grad.clone() for p in model.parameters() if p.grad is not None]
    model.zero_grad()
    compiled(ids()).sum().backward()
    actual = [p.grad for p in model.parameters() if p.grad is not None]
    assert len(actual) == 2 * (3 * 4 + 2)
    torch.testing.assert_close(actual, expected)


# ---- what is refused, and leaves the model as it was

BAD: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "no such name": (
        {"target_modules": ["q_proj", "v_porj"]},
        ValueError,
        r"target_modules has 'v_porj', which matches no module; near matches: .*v_proj",
    ),
    "no such regex": ({"target_modules": r".*w_proj"}, ValueError, "which matches no module"),
    "regex of a part": ({"target_modules": "layers"}, TypeError, "'layers' is a .*ModuleList"),
    "all excluded": (
        {"target_modules": ["score"], "exclude_modules": ["score"]},
        ValueError,
        "exclude_modules is {'score'}",
    ),
    "no such layer": (
        {"target_modules": ["v_proj"], "layers_to_transform": [9]},
        ValueError,
        r"layers_to_transform is \[9\]",
    ),
    "convolution": (
        {"target_modules": ["q_proj", "conv"]},
        TypeError,
        "target module 'conv' is a torch.nn.modules.conv.Conv2d; expected torch.nn.Linear",
    ),
    "embedding": ({"target_modules": ["embed"]}, TypeError, "'embed' is a .*Embedding"),
    "no default": ({}, ValueError, "target_modules is None and the model's type is None"),
    "odd rank": (
        {"target_modules": ["q_proj"], "r": 3, "init_lora_weights": "orthogonal"},
        ValueError,
        r"target module 'layers\.0\.q_proj': r is 3",
    ),
    "rank too large": (
        {
            "target_modules": ["v_proj"],
            "rank_pattern": {"layers.2.v_proj": 9},
            "init_lora_weights": "pissa",
        },
        ValueError,
        r"target module 'layers\.2\.v_proj': r is 9.* r <= 8",
    ),
    "no such saved module": (
        {"target_modules": ["q_proj"], "modules_to_save": ["scoer"]},
        ValueError,
        "modules_to_save has 'scoer', which matches no module; near matches: score",
    ),
    "saved list": (
        {"target_modules": ["score"], "modules_to_save": ["layers"]},
        TypeError,
        "modules_to_save names 'layers', a ModuleList",
    ),
    "saved inside saved": (
        {"target_modules": ["q_proj"], "modules_to_save": ["mlp", "mlp.0"]},
        ValueError,
        "'layers.0.mlp' and 'layers.0.mlp.0'",
    ),
    "saved by a piece of a name": (
        {"target_modules": ["q_proj"], "modules_to_save": ["_proj"]},
        ValueError,
        "modules_to_save names 'layers.0.q_proj'",
    ),
}


@pytest.mark.parametrize(("kwargs", "error", "said"), BAD.values(), ids=BAD)
def test_refused(kwargs: dict[str, Any], error: type[Exception], said: str) -> None:
    model = tiny()
    before = state(model)
    with pytest.raises(error, match=said):
        get_peft_model(model, LoraConfig(**kwargs))
    assert state(model) == before


def test_refused_arguments() -> None:
    model = tiny()
    before = state(model)
    config = LoraConfig(target_modules=["q_proj"])
    with pytest.raises(TypeError, match="config is a dict"):
        get_peft_model(model, {"r": 8})
    with pytest.raises(TypeError, match="model is a int"):
        inject_adapter(3, config, "default")
    with pytest.raises(ValueError, match=r"adapter_name is 'a\.b'"):
        get_peft_model(model, config, "a.b")
    assert state(model) == before


def test_a_failure_halfway_leaves_the_model_alone() -> None:
    model = tiny()
    with torch.no_grad():
        model.layers[2].v_proj.weight[0, 0] = math.inf
    before = state(model)
    with pytest.raises(ValueError, match=r"'layers\.2\.v_proj': weight has NaN or infinity"):
        get_peft_model(model, LoraConfig(target_modules=["v_proj"], init_lora_weights="pissa"))
    assert state(model) == before

    class Uncopyable(nn.Linear):
        def __deepcopy__(self, memo: Any) -> Any:
            raise RuntimeError("no copies")

    model.score = Uncopyable(8, 3)
    before = state(model)
    with pytest.raises(RuntimeError, match="no copies"):
        get_peft_model(
            model, LoraConfig(target_modules=["q_proj"], modules_to_save=["norm", "score"])
        )
    assert state(model) == before


def test_the_same_name_twice() -> None:
    config = LoraConfig(target_modules=["q_proj"])
    model = get_peft_model(tiny(), config)
    before = state(model)
    with pytest.raises(ValueError, match=r"adapter_name is 'default'; the model has \['default'\]"):
        get_peft_model(model, config)
    with pytest.raises(ValueError, match="use add_adapter"):
        get_peft_model(model, config, "other")
    with pytest.raises(ValueError, match="adapter_name is 'default'"):
        add_adapter(model, config, "default")
    assert state(model) == before


def test_entries_that_match_nothing_pass_where_asked() -> None:
    config = LoraConfig(target_modules=["q_proj", "query"], modules_to_save=["head"])
    model = tiny()
    inject_adapter(model, config, "default", strict=False)
    assert set(lora_layers(model)) == {"q_proj", *(f"layers.{i}.q_proj" for i in range(3))}
    with pytest.raises(ValueError, match="matches no module"):
        inject_adapter(tiny(), LoraConfig(target_modules=["query"]), "default", strict=False)


def test_unused_patterns_are_told() -> None:
    config = LoraConfig(
        target_modules=["q_proj"], rank_pattern={"k_proj": 4}, exclude_modules=["nothing"]
    )
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        get_peft_model(tiny(), config)
    assert [str(warning.message) for warning in caught] == [
        "exclude_modules is {'nothing'} and excludes no module",
        "rank_pattern has ['k_proj'], which match no adapted module",
    ]
    assert {warning.filename for warning in caught} == {__file__}


# ---- several adapters


def two_adapters() -> Tiny:
    model = get_peft_model(tiny(), LoraConfig(target_modules=["q_proj"]), "first")
    add_adapter(model, LoraConfig(r=4, target_modules=["q_proj", "v_proj"]), "second")
    randomize(model)
    return model


def test_a_further_adapter_waits() -> None:
    model = get_peft_model(tiny(), LoraConfig(target_modules=["q_proj"]), "first")
    randomize(model)
    expected, flags = logits(model, ids()), trainable(model)
    add_adapter(model, LoraConfig(r=4, target_modules=["q_proj", "v_proj"]), "second")
    randomize(model)
    assert list(model.fused_peft_config) == ["first", "second"]
    assert active_adapters(model) == ["first"]
    assert trainable(model) == flags
    torch.testing.assert_close(logits(model, ids()), expected)
    assert model.q_proj.r == {"first": 8, "second": 4}
    assert model.layers[0].v_proj.r == {"second": 4}
    assert not any(p.requires_grad for p in model.layers[0].v_proj.parameters())


def test_a_further_adapter_freezes_the_weights_it_is_put_over() -> None:
    model = get_peft_model(tiny(), LoraConfig(target_modules=["q_proj"]))
    model.score.requires_grad_(True)
    model.embed.requires_grad_(True)
    model.conv.requires_grad_(True)
    config = LoraConfig(target_modules=["score"], modules_to_save=["conv"])
    add_adapter(model, config, "other")
    assert not model.score.weight.requires_grad
    assert not any(p.requires_grad for p in model.conv.parameters())
    assert model.embed.weight.requires_grad  # as the user set it


def test_set_adapter() -> None:
    model = two_adapters()
    first = logits(model, ids())
    set_adapter(model, "second")
    assert active_adapters(model) == ["second"]
    assert all(name.endswith(".second") for name in trainable(model))
    assert len(trainable(model)) == 2 * (4 + 3)
    second = logits(model, ids())
    assert (first - second).abs().max() > 1e-3
    set_adapter(model, ["first", "second"])
    assert len(trainable(model)) == 2 * (4 + 4 + 3)
    both = logits(model, ids())
    assert min((both - first).abs().max(), (both - second).abs().max()) > 1e-3
    set_adapter(model, "first", inference_mode=True)
    assert trainable(model) == set()
    torch.testing.assert_close(logits(model, ids()), first)
    before = state(model)
    with pytest.raises(ValueError, match=r"'frst' is unknown.*near matches: first"):
        set_adapter(model, ["second", "frst"])
    with pytest.raises(ValueError, match="each adapter once"):
        set_adapter(model, ["second", "second"])
    assert state(model) == before
    assert active_adapters(model) == ["first"]


def test_set_adapter_equals_peft() -> None:
    peft = pytest.importorskip("peft")
    model = tiny()
    ours = get_peft_model(copy.deepcopy(model), LoraConfig(target_modules=["q_proj"]), "first")
    add_adapter(ours, LoraConfig(r=4, target_modules=["q_proj", "v_proj"]), "second")
    randomize(ours)
    theirs = peft.get_peft_model(model, peft.LoraConfig(target_modules=["q_proj"]), "first")
    theirs.add_adapter("second", peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj"]))
    for path, layer in lora_layers(ours).items():
        twin = theirs.base_model.model.get_submodule(path)
        for name in layer.r:
            twin.lora_A[name].weight.data.copy_(layer.lora_A[name])
            twin.lora_B[name].weight.data.copy_(layer.lora_B[name])
    for active in ("first", "second", ["first", "second"]):
        set_adapter(ours, active)
        theirs.base_model.set_adapter(active)
        torch.testing.assert_close(logits(ours, ids()), logits(theirs, ids()))
        assert get_nb_trainable_parameters(ours) == theirs.get_nb_trainable_parameters()


def test_inference_mode_trains_nothing() -> None:
    config = LoraConfig(
        target_modules=["q_proj"], inference_mode=True, bias="all", modules_to_save=["score"]
    )
    model = get_peft_model(tiny(), config)
    assert trainable(model) == set()
    assert active_adapters(model) == ["default"]


def test_delete_adapter() -> None:
    model = two_adapters()
    set_adapter(model, "second")
    expected = logits(model, ids())
    delete_adapter(model, "first")
    assert list(model.fused_peft_config) == ["second"]
    torch.testing.assert_close(logits(model, ids()), expected)
    add_adapter(model, LoraConfig(target_modules=["score"]), "third")
    merge_adapter(model)
    with pytest.raises(ValueError, match="'second' is merged"):
        delete_adapter(model, "second")
    unmerge_adapter(model)
    with pytest.warns(UserWarning, match="now 'third' is"):
        delete_adapter(model, "second")
    assert active_adapters(model) == ["third"]
    assert trainable(model) == {"score.lora_A.third", "score.lora_B.third"}
    delete_adapter(model, "third")
    torch.testing.assert_close(logits(model, ids()), logits(tiny(), ids()))
    with pytest.raises(ValueError, match="'third' is unknown"):
        delete_adapter(model, "third")
    get_peft_model(model, LoraConfig(target_modules=["q_proj"]), "fourth")
    assert active_adapters(model) == ["fourth"]


def test_deleting_one_of_two_active_activates_no_third() -> None:
    model = two_adapters()
    add_adapter(model, LoraConfig(target_modules=["v_proj"]), "third")
    set_adapter(model, ["first", "second"])
    delete_adapter(model, "second")
    assert active_adapters(model) == ["first"]
    assert trainable(model) == {n for n in trainable(model) if n.endswith(".first")}


def test_one_adapter_with_biases() -> None:
    model = get_peft_model(tiny(), LoraConfig(target_modules=["q_proj"], bias="lora_only"))
    biases = {n for n in trainable(model) if n.endswith("bias")}
    assert biases == {"q_proj.bias", *(f"layers.{i}.q_proj.bias" for i in range(3))}
    before = state(model)
    with pytest.raises(ValueError, match="bias is 'all' and adapter 'default' trains biases"):
        add_adapter(model, LoraConfig(target_modules=["q_proj"], bias="all"), "other")
    assert state(model) == before
    add_adapter(model, LoraConfig(target_modules=["v_proj"]), "other")
    set_adapter(model, "other")
    assert not any(n.endswith("bias") for n in trainable(model))
    set_adapter(model, "default")
    assert biases <= trainable(model)
    logits_of = model(ids()).sum()
    logits_of.backward()
    assert model.layers[0].q_proj.bias.grad.abs().sum() > 0
    with pytest.warns(UserWarning, match="bias='lora_only'"), disable_adapter(model):
        pass
    set_adapter(model, "other")
    delete_adapter(model, "default")
    assert not any(n.endswith("bias") for n in trainable(model))


# ---- modules_to_save


def test_modules_to_save() -> None:
    model = tiny()
    base = logits(model, ids())
    head = model.score
    get_peft_model(model, LoraConfig(target_modules=["q_proj"], modules_to_save=["score"]))
    assert isinstance(model.score, ModulesToSaveWrapper)
    assert model.score.original_module is head
    assert {n for n in trainable(model) if "score" in n} == {
        "score.modules_to_save.default.weight",
        "score.modules_to_save.default.bias",
    }
    assert model.score.weight is model.score.modules_to_save["default"].weight
    assert model.score.out_features == 3
    with pytest.raises(AttributeError, match="nothing_like_it"):
        model.score.nothing_like_it  # noqa: B018
    torch.testing.assert_close(logits(model, ids()), base)
    with torch.no_grad():
        model.score.weight.add_(1)
    assert (logits(model, ids()) - base).abs().max() > 1e-2
    with disable_adapter(model):
        torch.testing.assert_close(logits(model, ids()), base)
    copied = copy.deepcopy(model)
    torch.testing.assert_close(logits(copied, ids()), logits(model, ids()))


def test_modules_to_save_of_several_adapters() -> None:
    model = tiny()
    base = logits(model, ids())
    config = LoraConfig(target_modules=["q_proj"], modules_to_save=["score"])
    get_peft_model(model, config, "first")
    with torch.no_grad():
        model.score.weight.add_(1)
    first = logits(model, ids())
    add_adapter(model, config, "second")
    add_adapter(model, LoraConfig(target_modules=["v_proj"]), "bare")
    torch.testing.assert_close(logits(model, ids()), first)
    set_adapter(model, "second")
    torch.testing.assert_close(logits(model, ids()), base)  # a copy of the original, not of first
    assert {n for n in trainable(model) if "score" in n} == {
        "score.modules_to_save.second.weight",
        "score.modules_to_save.second.bias",
    }
    with pytest.raises(ValueError, match=r"'score' \(modules_to_save\)"):
        set_adapter(model, ["first", "second"])
    assert active_adapters(model) == ["second"]
    set_adapter(model, ["bare", "first"])
    torch.testing.assert_close(logits(model, ids()), first)
    set_adapter(model, "bare")
    torch.testing.assert_close(logits(model, ids()), base)
    delete_adapter(model, "first")
    assert list(model.score.modules_to_save) == ["second"]
    with pytest.raises(ValueError, match="'first' has no copy"):
        model.score.set_adapter("first")
    with pytest.raises(ValueError, match="'first' has no copy"):
        model.score.delete_adapter("first")
    with pytest.raises(ValueError, match="has a copy"):
        model.score.add_adapter("second", nn.Linear(8, 3))


def test_a_task_s_head_is_saved() -> None:
    model = get_peft_model(llama_classifier(), LoraConfig(task_type="SEQ_CLS"))
    assert isinstance(model.score, ModulesToSaveWrapper)
    assert "score.modules_to_save.default.weight" in trainable(model)


def test_an_adapted_module_is_not_saved_too() -> None:
    model = get_peft_model(tiny(), LoraConfig(target_modules=["score"]))
    before = state(model)
    with pytest.raises(TypeError, match="modules_to_save names 'score', which has adapters"):
        add_adapter(model, LoraConfig(target_modules=["q_proj"], modules_to_save=["score"]), "b")
    assert state(model) == before
    saved = LoraConfig(target_modules=["q_proj"], modules_to_save=["score"])
    model = get_peft_model(tiny(), saved)
    before = state(model)
    with pytest.raises(TypeError, match=r"'score' is a .*ModulesToSaveWrapper"):
        add_adapter(model, LoraConfig(target_modules=["score"]), "b")
    assert state(model) == before


# ---- merging and disabling a model


def test_merge_of_some_adapters() -> None:
    model = two_adapters()
    set_adapter(model, ["first", "second"])
    both = logits(model, ids())
    merge_adapter(model, adapter_names=["second"])
    assert model.q_proj.merged_adapters == ["second"]
    assert model.layers[0].v_proj.merged_adapters == ["second"]
    merge_adapter(model)
    torch.testing.assert_close(logits(model, ids()), both)
    with pytest.warns(UserWarning, match="merged already"):
        merge_adapter(model)
    unmerge_adapter(model)
    torch.testing.assert_close(logits(model, ids()), both)
    with pytest.warns(UserWarning, match="no adapter is merged"):
        unmerge_adapter(model)
    with pytest.raises(ValueError, match="'thrid' is unknown"):
        merge_adapter(model, adapter_names=["thrid"])
    with pytest.raises(TypeError, match="adapter_names is 'first'"):
        merge_adapter(model, adapter_names="first")


def test_safe_merge_changes_all_layers_or_none() -> None:
    model = get_peft_model(tiny(), LoraConfig(target_modules=["q_proj"]))
    randomize(model)
    with torch.no_grad():
        model.q_proj.lora_B["default"][0, 0] = math.nan  # the last layer that is merged
    before = state(model)
    with pytest.raises(ValueError, match=r"'q_proj': merging adapters .* NaN or infinity"):
        merge_adapter(model, safe=True)
    assert state(model) == before
    assert not any(layer.merged for layer in lora_layers(model).values())


def test_disable_adapter_restores_what_was() -> None:
    model = get_peft_model(tiny(), LoraConfig(target_modules=["q_proj"]))
    randomize(model)
    adapted, base = logits(model, ids()), logits(tiny(), ids())
    model.q_proj.enable_adapters(False)
    with disable_adapter(model):
        with disable_adapter(model):
            torch.testing.assert_close(logits(model, ids()), base)
        torch.testing.assert_close(logits(model, ids()), base)
    with pytest.raises(RuntimeError, match="inside"), disable_adapter(model):
        raise RuntimeError("inside")
    assert not model.q_proj.adapters_enabled
    assert model.layers[0].q_proj.adapters_enabled
    model.q_proj.enable_adapters(True)
    torch.testing.assert_close(logits(model, ids()), adapted)
    merge_adapter(model)
    with disable_adapter(model):
        torch.testing.assert_close(logits(model, ids()), base)
    torch.testing.assert_close(logits(model, ids()), adapted)


def test_a_model_without_adapters_is_refused() -> None:
    model = tiny()
    for action in (merge_adapter, unmerge_adapter):
        with pytest.raises(ValueError, match="Tiny has no adapter"):
            action(model)
    with pytest.raises(ValueError, match="Tiny has no adapter"), disable_adapter(model):
        pass
    with pytest.raises(ValueError, match="'default' is unknown"):
        set_adapter(model, "default")


def test_layers_put_in_by_hand_are_driven_too() -> None:
    model = nn.Sequential(LoraLinear(4, 4), nn.ReLU(), LoraLinear(4, 2))
    randomize(model)
    x = torch.randn(3, 4)
    expected = model(x)
    merge_adapter(model)
    torch.testing.assert_close(model(x), expected)
    unmerge_adapter(model)
    add_adapter(model, LoraConfig(target_modules=["0"]), "other")
    set_adapter(model, "other")
    assert trainable(model) == {"0.lora_A.other", "0.lora_B.other"}
    with pytest.raises(ValueError, match="adapter_name is 'default'"):
        get_peft_model(model, LoraConfig(target_modules=["0"]))


def test_print_trainable_parameters(capsys: pytest.CaptureFixture[str]) -> None:
    model = llama()
    ours = get_peft_model(copy.deepcopy(model), LoraConfig(r=4))
    print_trainable_parameters(ours)
    printed = capsys.readouterr().out
    peft_twin(model, ours, {}).print_trainable_parameters()
    assert printed == capsys.readouterr().out
    assert re.fullmatch(r"trainable params: \d[\d,]* \|\| all params: .*%: \d+\.\d{4}\n", printed)


# ---- LoraConfig


def test_fields_and_defaults_are_peft_s() -> None:
    theirs = pytest.importorskip("peft").LoraConfig().to_dict()
    ours = LoraConfig().to_dict()
    assert ours.items() >= {"r": 8, "lora_alpha": 8, "bias": "none"}.items()
    for name, value in ours.items():
        assert theirs[name] == value, name


VALUES = {
    "r": st.integers(1, 64),
    "lora_alpha": st.one_of(st.integers(1, 64), st.floats(0.5, 64)),
    "lora_dropout": st.floats(0, 0.9),
    "target_modules": st.lists(st.sampled_from(["q", "v", "k"]), min_size=1, unique=True),
    "exclude_modules": st.one_of(st.none(), st.just(".*x"), st.just(["x"])),
    "layers_to_transform": st.one_of(st.none(), st.integers(0, 3), st.just([0, 2])),
    "rank_pattern": st.dictionaries(st.sampled_from(["q", "^v"]), st.integers(1, 9)),
    "alpha_pattern": st.dictionaries(st.sampled_from(["q", "^v"]), st.integers(1, 9)),
    "use_rslora": st.booleans(),
    "bias": st.sampled_from(["none", "all", "lora_only"]),
    "modules_to_save": st.one_of(st.none(), st.just(["head"])),
    "fan_in_fan_out": st.booleans(),
    "init_lora_weights": st.sampled_from([True, False, "gaussian", "pissa", "olora", "orthogonal"]),
    "task_type": st.sampled_from([None, "CAUSAL_LM", "SEQ_CLS"]),
    "base_model_name_or_path": st.sampled_from([None, "a/b"]),
    "revision": st.sampled_from([None, "main"]),
    "inference_mode": st.booleans(),
}


@settings(max_examples=40, deadline=None)
@given(kwargs=st.fixed_dictionaries({}, optional=VALUES))
def test_config_round_trips_through_json_and_peft(kwargs: dict[str, Any]) -> None:
    peft = pytest.importorskip("peft")
    config = LoraConfig(**kwargs)
    content = json.loads(json.dumps(config.to_dict()))
    assert LoraConfig.from_dict(content) == config
    theirs = peft.PeftConfig.from_peft_type(**content)
    assert isinstance(theirs, peft.LoraConfig)
    for field in dataclasses.fields(config):
        assert getattr(theirs, field.name) == getattr(config, field.name), field.name
    written = {k: list(v) if isinstance(v, set) else v for k, v in theirs.to_dict().items()}
    assert LoraConfig.from_dict(json.loads(json.dumps(written))) == config


def test_config_takes_peft_s_task_type() -> None:
    peft = pytest.importorskip("peft")
    assert LoraConfig(task_type=peft.TaskType.CAUSAL_LM).task_type == "CAUSAL_LM"


@pytest.mark.parametrize(
    ("kwargs", "error", "said"),
    [
        ({"rr": 8}, TypeError, r"no field 'rr'; near matches: .*r"),
        ({"lora_aplha": 8}, TypeError, "'lora_aplha'; near matches: .*lora_alpha"),
        ({"target_module": []}, TypeError, "'target_module'; near matches: target_modules"),
        ({"use_dora": True}, TypeError, "use_dora is a field of PEFT's"),
        ({"r": 0}, ValueError, "r is 0; expected an int >= 1"),
        ({"r": "8"}, TypeError, "r is '8'"),
        ({"lora_alpha": -1}, ValueError, "lora_alpha is -1"),
        ({"lora_dropout": 1}, ValueError, "lora_dropout is 1"),
        ({"bias": "some"}, ValueError, "bias is 'some'; expected one of none, all, lora_only"),
        ({"use_rslora": 1}, TypeError, "use_rslora is 1; expected a bool"),
        ({"inference_mode": None}, TypeError, "inference_mode is None"),
        ({"revision": 3}, TypeError, "revision is 3"),
        ({"target_modules": 3}, TypeError, "target_modules is 3"),
        ({"target_modules": ["a", 3]}, TypeError, "target_modules has the entry 3"),
        ({"target_modules": [""]}, TypeError, "target_modules has the entry ''"),
        ({"target_modules": "(a"}, ValueError, r"target_modules is '\(a', no regular expression"),
        ({"exclude_modules": {"a": 1, 2: 3}}, TypeError, "exclude_modules has the entry 2"),
        ({"modules_to_save": "head"}, TypeError, "modules_to_save is 'head'; expected a list"),
        ({"rank_pattern": {"a": 0}}, ValueError, r"rank_pattern\['a'\] is 0"),
        ({"rank_pattern": ["a"]}, TypeError, r"rank_pattern is \['a'\]"),
        ({"rank_pattern": {"(": 1}}, ValueError, r"rank_pattern key is '\('"),
        ({"alpha_pattern": {"a": "b"}}, TypeError, r"alpha_pattern\['a'\] is 'b'"),
        ({"alpha_pattern": {3: 1}}, TypeError, "alpha_pattern has the key 3"),
        ({"layers_to_transform": "1"}, TypeError, "layers_to_transform is '1'"),
        ({"layers_to_transform": [True]}, TypeError, r"layers_to_transform is \[True\]"),
        ({"layers_to_transform": -1}, ValueError, "layers_to_transform is -1"),
        ({"layers_pattern": "h"}, ValueError, "layers_pattern is 'h' and layers_to_transform is"),
        (
            {"layers_to_transform": 1, "target_modules": "all-linear"},
            ValueError,
            "layers_to_transform is 1 and target_modules is the str 'all-linear'",
        ),
        ({"init_lora_weights": "loftq"}, ValueError, "init_lora_weights is 'loftq'"),
        ({"init_lora_weights": "pissa_niter_"}, ValueError, "init_lora_weights is 'pissa_niter_'"),
        ({"task_type": "CAUSAL"}, ValueError, "task_type is 'CAUSAL'"),
    ],
)
def test_config_refuses(kwargs: dict[str, Any], error: type[Exception], said: str) -> None:
    with pytest.raises(error, match=said):
        LoraConfig(**kwargs)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ({"use_dora": True}, "use_dora = True"),
        ({"lora_bias": True}, "lora_bias = True"),
        ({"target_parameters": ["a"], "use_qalora": True}, "target_parameters = .* use_qalora"),
        ({"trainable_token_indices": [1]}, "trainable_token_indices"),
        ({"layer_replication": [[0, 1]]}, "layer_replication"),
        ({"alora_invocation_tokens": [3]}, "alora_invocation_tokens"),
        ({"megatron_config": {"a": 1}}, "megatron_config"),
        ({"peft_type": "IA3"}, "peft_type is 'IA3'"),
        ({"peft_type": None}, "peft_type is None"),
        ({"r": -1}, "r is -1"),
        ({"bias": 3}, "bias is 3"),
        ({"init_lora_weights": "corda"}, "init_lora_weights is 'corda'"),
    ],
)
def test_from_dict_refuses(content: dict[str, Any], said: str) -> None:
    with pytest.raises(AdapterError, match=said):
        LoraConfig.from_dict({"peft_type": "LORA", **content})


def test_from_dict_refuses_what_is_no_object() -> None:
    with pytest.raises(AdapterError, match="expected a JSON object"):
        LoraConfig.from_dict(["r"])


def test_from_dict_knows_every_field_of_peft() -> None:
    written = pytest.importorskip("peft").LoraConfig(target_modules=["q"]).to_dict()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        config = LoraConfig.from_dict(written)
    assert config == LoraConfig(target_modules=["q"])


def test_from_dict_drops_unknown_keys_with_a_warning() -> None:
    with pytest.warns(UserWarning, match=r"unexpected keys \['from_the_future'\]"):
        config = LoraConfig.from_dict({"peft_type": "LORA", "r": 3, "from_the_future": 1})
    assert config == LoraConfig(r=3)


def test_config_copies() -> None:
    config = LoraConfig(r=3, target_modules=["a"], rank_pattern={"a": 2})
    assert copy.deepcopy(config) == config
    assert dataclasses.replace(config, r=4).rank_pattern == {"a": 2}
