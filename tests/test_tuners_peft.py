"""get_peft_model against Hugging Face PEFT's: outputs, training, matching rules."""

from __future__ import annotations

import copy
import warnings
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tuner_models import (
    gpt2,
    ids,
    llama,
    llama_classifier,
    logits,
    lora_layers,
    nested,
    peft_twin,
    randomize,
    tiny,
)

from fused_peft import (
    LoraConfig,
    disable_adapter,
    get_nb_trainable_parameters,
    get_peft_model,
    merge_adapter,
    unmerge_adapter,
)
from fused_peft.tuners.targets import DEFAULT_TARGETS

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
