"""get_peft_model: what it puts in, and what it refuses."""

from __future__ import annotations

import copy
import math
import warnings
from typing import Any

import pytest
import torch
from torch import nn
from tuner_models import (
    gpt2,
    ids,
    llama,
    logits,
    lora_layers,
    randomize,
    state,
    tiny,
    trainable,
)

from fused_peft import (
    LoraConfig,
    LoraLinear,
    add_adapter,
    get_nb_trainable_parameters,
    get_peft_model,
    merge_adapter,
)
from fused_peft.tuners import active_adapters, inject_adapter

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
