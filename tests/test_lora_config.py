"""LoraConfig: its fields, what it refuses, its way through JSON and PEFT."""

from __future__ import annotations

import copy
import dataclasses
import json
import warnings
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fused_peft import (
    AdapterError,
    LoraConfig,
)

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
        ({"target_modules": [["a"]]}, TypeError, r"target_modules has the entry \['a'\]"),
        ({"modules_to_save": b"head"}, TypeError, "modules_to_save is b'head'; expected a list"),
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
