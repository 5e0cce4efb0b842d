"""The configs of the prompt methods: PEFT's fields and file, and what is refused."""

from __future__ import annotations

import json
from typing import Any

import pytest

import fused_peft
from fused_peft import AdapterError, PrefixTuningConfig, PromptTuningConfig, PTuningConfig
from fused_peft.tuners import PROMPT_CONFIGS

PEFT_NAMES = {
    PrefixTuningConfig: "PrefixTuningConfig",
    PromptTuningConfig: "PromptTuningConfig",
    PTuningConfig: "PromptEncoderConfig",
}


@pytest.mark.parametrize("config_class", PEFT_NAMES)
def test_fields_and_defaults_are_pefts(config_class: Any) -> None:
    peft = pytest.importorskip("peft")
    theirs = getattr(peft, PEFT_NAMES[config_class])(num_virtual_tokens=4).to_dict()
    ours = config_class(num_virtual_tokens=4).to_dict()
    # A str that is an Enum compares as the str.
    assert ours == {k: v for k, v in theirs.items() if k != "peft_version"}
    assert PROMPT_CONFIGS[ours["peft_type"]] is config_class


@pytest.mark.parametrize(
    "config",
    [
        PrefixTuningConfig(num_virtual_tokens=2, prefix_projection=True, encoder_hidden_size=7),
        PrefixTuningConfig(
            num_virtual_tokens=2, prefix_init="text", prefix_init_text="a", prefix_dropout=0.1
        ),
        PrefixTuningConfig(num_virtual_tokens=2, prefix_init="zero"),
        PromptTuningConfig(num_virtual_tokens=2, task_type="SEQ_CLS", modules_to_save=["head"]),
        PromptTuningConfig(
            num_virtual_tokens=3, prompt_tuning_init="CLASS_LABELS", class_labels=["x", "y"]
        ),
        PromptTuningConfig(
            num_virtual_tokens=3,
            prompt_tuning_init="TEXT",
            prompt_tuning_init_text="x",
            tokenizer_kwargs={"use_fast": True},
        ),
        PromptTuningConfig(
            num_virtual_tokens=3,
            prompt_tuning_init="SAMPLE_VOCAB",
            vocab_size_limit=1,
            token_frequencies=[1.0, 2.0],
        ),
        PTuningConfig(
            num_virtual_tokens=3, cloze_template=(1, 2), prompt_token_id=9, encoder_num_layers=1
        ),
    ],
)
def test_json_and_extra_fields_give_the_config_back(config: Any) -> None:
    peft = pytest.importorskip("peft")
    content, extra = json.loads(json.dumps([config.to_dict(), config.extra_fields()]))
    assert type(config).from_dict(content, extra) == config
    known = getattr(peft, PEFT_NAMES[type(config)])(num_virtual_tokens=1).to_dict()
    assert content.keys() <= known.keys()
    peft.PeftConfig.from_peft_type(**content)
    assert not extra.keys() & {"num_virtual_tokens", "peft_type", "encoder_num_layers"}


def test_zero_start_has_two_names() -> None:
    assert PrefixTuningConfig(num_virtual_tokens=1, init_weights="zero").prefix_init == "zero"
    assert PrefixTuningConfig(num_virtual_tokens=1, prefix_init="zero").init_weights == "zero"


def test_pefts_enums_are_taken() -> None:
    peft = pytest.importorskip("peft")
    config = PromptTuningConfig(
        num_virtual_tokens=1,
        task_type=peft.TaskType.CAUSAL_LM,
        prompt_tuning_init=peft.PromptTuningInit.SAMPLE_VOCAB,
    )
    assert type(config.task_type) is str
    assert type(config.prompt_tuning_init) is str
    assert config.prompt_tuning_init == "SAMPLE_VOCAB"
    assert fused_peft.PromptEncoderConfig is PTuningConfig


@pytest.mark.parametrize(
    ("config_class", "fields", "error", "message"),
    [
        (PromptTuningConfig, {"num_virtual_tokens": 0}, ValueError, "num_virtual_tokens is 0"),
        (PromptTuningConfig, {"num_virtual_tokens": "4"}, TypeError, "num_virtual_tokens is '4'"),
        (PromptTuningConfig, {"num_virtual_tokens": True}, TypeError, "num_virtual_tokens is True"),
        (PromptTuningConfig, {"num_virtual_token": 4}, TypeError, "near matches: num_virtual_tok"),
        (PromptTuningConfig, {"token_dim": 0}, ValueError, "token_dim is 0"),
        (PromptTuningConfig, {"task_type": "LM"}, ValueError, "task_type is 'LM'; expected"),
        (PromptTuningConfig, {"modules_to_save": "head"}, TypeError, "modules_to_save is 'head'"),
        (PromptTuningConfig, {"inference_mode": 1}, TypeError, "inference_mode is 1"),
        (PromptTuningConfig, {"revision": 1}, TypeError, "revision is 1"),
        (
            PromptTuningConfig,
            {"num_transformer_submodules": 3},
            ValueError,
            "num_transformer_submodules is 3",
        ),
        (
            PromptTuningConfig,
            {"num_transformer_submodules": True},
            ValueError,
            "num_transformer_submodules is True",
        ),
        (PromptTuningConfig, {"modules_to_save": [["a"]]}, TypeError, r"has the entry \['a'\]"),
        (PromptTuningConfig, {"prompt_tuning_init": "TEX"}, ValueError, "is 'TEX'; expected one"),
        (
            PromptTuningConfig,
            {"prompt_tuning_init": "TEXT"},
            ValueError,
            "prompt_tuning_init_text is None with prompt_tuning_init='TEXT'",
        ),
        (
            PromptTuningConfig,
            {"prompt_tuning_init_text": "a"},
            ValueError,
            "prompt_tuning_init_text is given with prompt_tuning_init='RANDOM'",
        ),
        (
            PromptTuningConfig,
            {"prompt_tuning_init": "CLASS_LABELS", "class_labels": list("abcde")},
            ValueError,
            "class_labels has 5 labels; expected at most num_virtual_tokens, 4",
        ),
        (
            PromptTuningConfig,
            {"prompt_tuning_init": "CLASS_LABELS", "class_labels": "good"},
            TypeError,
            "class_labels is 'good'; expected a list",
        ),
        (PromptTuningConfig, {"token_frequencies": [1.0]}, ValueError, "without vocab_size_limit"),
        (
            PromptTuningConfig,
            {"vocab_size_limit": 2, "token_frequencies": [1.0, "many"]},
            TypeError,
            r"token_frequencies is \[1.0, 'many'\]; expected a list of numbers",
        ),
        (
            PromptTuningConfig,
            {"vocab_size_limit": 2, "token_frequencies": [1.0, float("nan")]},
            ValueError,
            r"token_frequencies is \[1.0, nan\]; expected numbers from 0",
        ),
        (
            PromptTuningConfig,
            {"vocab_size_limit": 2, "token_frequencies": 3},
            TypeError,
            "token_frequencies is 3; expected a list of numbers",
        ),
        (
            PromptTuningConfig,
            {"tokenizer_kwargs": {"trust_remote_code": True}},
            ValueError,
            "trust_remote_code",
        ),
        (PrefixTuningConfig, {"prefix_init": "text"}, ValueError, "prefix_init_text is None"),
        (PrefixTuningConfig, {"prefix_dropout": 1.0}, ValueError, r"prefix_dropout is 1\.0"),
        (PrefixTuningConfig, {"init_weights": "one"}, ValueError, "init_weights is 'one'"),
        (
            PrefixTuningConfig,
            {"init_weights": "zero", "prefix_init": "text", "prefix_init_text": "a"},
            ValueError,
            "init_weights is 'zero' and prefix_init 'text'",
        ),
        (
            PTuningConfig,
            {"encoder_reparameterization_type": "GRU"},
            ValueError,
            "is 'GRU'; expected one of MLP, LSTM",
        ),
        (PTuningConfig, {"encoder_hidden_size": -1}, ValueError, "encoder_hidden_size is -1"),
        (PTuningConfig, {"encoder_num_layers": 0}, ValueError, "encoder_num_layers is 0"),
        (PTuningConfig, {"encoder_dropout": "x"}, TypeError, "encoder_dropout is 'x'"),
        (PTuningConfig, {"prompt_token_id": 1.5}, TypeError, r"prompt_token_id is 1\.5"),
        (PTuningConfig, {"cloze_template": (2, 2)}, ValueError, "prompt_token_id is None"),
        (
            PTuningConfig,
            {"cloze_template": (2, 1), "prompt_token_id": 5},
            ValueError,
            r"cloze_template is \(2, 1\); expected counts from 0 with the sum num_virtual_t",
        ),
        (
            PTuningConfig,
            {"cloze_template": (5, -1), "prompt_token_id": 5},
            ValueError,
            "expected counts from 0",
        ),
    ],
)
def test_bad_field_is_named(
    config_class: Any, fields: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        config_class(**{"num_virtual_tokens": 4, **fields})


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"peft_type": "P_TUNING", "num_virtual_tokens": 1}, "peft_type is 'P_TUNING'; expected"),
        ({"peft_type": "PROMPT_TUNING"}, "has no num_virtual_tokens"),
        (
            {"peft_type": "PROMPT_TUNING", "num_virtual_tokens": -1},
            "the adapter's config: num_virtual_tokens is -1",
        ),
        ([], r"the adapter's config is \[\]; expected a JSON object"),
    ],
)
def test_bad_file_content_is_an_adapter_error(content: Any, message: str) -> None:
    with pytest.raises(AdapterError, match=message):
        PromptTuningConfig.from_dict(content)


def test_unknown_key_of_a_file_is_ignored_with_a_warning() -> None:
    content = {"peft_type": "PROMPT_TUNING", "num_virtual_tokens": 2, "later": 1}
    with pytest.warns(UserWarning, match=r"unexpected keys \['later'\]"):
        assert PromptTuningConfig.from_dict(content).num_virtual_tokens == 2


def test_bad_parts_of_a_template() -> None:
    config = PTuningConfig(num_virtual_tokens=3, cloze_template=(1, 2), prompt_token_id=9)
    with pytest.raises(ValueError, match="parts has 2 sequences; expected 1"):
        config.fill_template([1], [2])
    with pytest.raises(ValueError, match="the pseudo token 9"):
        config.fill_template([1, 9])
    with pytest.raises(ValueError, match="cloze_template is None"):
        PTuningConfig(num_virtual_tokens=3).fill_template()
