"""The fine-tuning methods: what each can be told, its defaults, and the config it makes of them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import fused_peft

INIT_TEXT = (
    "Complete the Python function below: write its docstring, one short sentence in the imperative "
    "mood that says what the function does and what it returns.\n"
)


@dataclass(frozen=True)
class Method:
    """One way to fine-tune.

    ``defaults`` has an entry for every option of the method, ``learning_rate`` among them.
    """

    title: str
    defaults: Mapping[str, Any]
    make_config: Callable[[Mapping[str, Any]], Any]


def _lora(options: Mapping[str, Any]) -> Any:
    return fused_peft.LoraConfig(
        r=options["rank"],
        lora_alpha=options["alpha"],
        lora_dropout=options["dropout"],
        target_modules="all-linear",
        task_type="CAUSAL_LM",
    )


def _prefix(options: Mapping[str, Any]) -> Any:
    return fused_peft.PrefixTuningConfig(
        num_virtual_tokens=options["virtual_tokens"],
        prefix_dropout=options["dropout"],
        prefix_init="text",
        prefix_init_text=options["init_text"],
        task_type="CAUSAL_LM",
    )


def _prompt(options: Mapping[str, Any]) -> Any:
    return fused_peft.PromptTuningConfig(
        num_virtual_tokens=options["virtual_tokens"],
        prompt_tuning_init="TEXT",
        prompt_tuning_init_text=options["init_text"],
        task_type="CAUSAL_LM",
    )


def _ptuning(options: Mapping[str, Any]) -> Any:
    return fused_peft.PTuningConfig(
        num_virtual_tokens=options["virtual_tokens"],
        encoder_hidden_size=options["encoder_hidden_size"],
        encoder_dropout=options["dropout"],
        task_type="CAUSAL_LM",
    )


METHODS: Mapping[str, Method] = {
    "lora": Method(
        "LoRA",
        {"learning_rate": 1e-3, "rank": 16, "alpha": 32, "dropout": 0.0},
        _lora,
    ),
    "prefix": Method(
        "prefix tuning",
        {"learning_rate": 1e-2, "virtual_tokens": 32, "dropout": 0.0, "init_text": INIT_TEXT},
        _prefix,
    ),
    "prompt": Method(
        "prompt tuning",
        {"learning_rate": 3e-2, "virtual_tokens": 32, "init_text": INIT_TEXT},
        _prompt,
    ),
    "ptuning": Method(
        "P-tuning",
        {"learning_rate": 5e-3, "virtual_tokens": 32, "dropout": 0.0, "encoder_hidden_size": 576},
        _ptuning,
    ),
}
