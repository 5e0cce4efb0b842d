"""``LoraConfig``: PEFT's field names, defaults and ``adapter_config.json``, checked when made."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

from ..errors import AdapterError
from ..nn.adapter_spec import check_alpha, check_dropout, check_rank
from ..nn.initializers import check_init_kind
from .base_config import AdapterConfig, name_list

_BIAS_KINDS = ("none", "all", "lora_only")


@dataclass(kw_only=True)
class LoraConfig(AdapterConfig):
    """Which modules of a model get an adapter, and of what kind. Fields and defaults are PEFT's.

    Args:
        r: rank, from 1.
        lora_alpha: scaling is alpha/r.
        lora_dropout: probability in [0, 1).
        target_modules: names, each matched as a whole or as the end of a module's name behind a
            dot; or a regular expression for the whole name; or "all-linear": every linear layer
            but the output embedding. None takes PEFT's default for the model's type.
        exclude_modules: names or a regular expression, matched likewise, that are left out.
        layers_to_transform: indices of the layers to take (target_modules as names only).
        layers_pattern: name of the module list that those indices count ("layers", "h").
        rank_pattern: r for the modules whose name ends with a match of the key, a regular
            expression; the first key that matches counts.
        alpha_pattern: the same for lora_alpha.
        use_rslora: scaling is alpha/sqrt(r).
        bias: "none", "all" or "lora_only": the biases to train, besides.
        modules_to_save: ends of names of modules to train and save whole.
        fan_in_fan_out: kept for the file format; it is seen from a layer's type.
        init_lora_weights: True, False, "gaussian", "orthogonal", "pissa", "pissa_niter_<n>",
            "olora".
        task_type: one of PEFT's task types; the classification ones and QUESTION_ANS add the
            model's head to modules_to_save.
        base_model_name_or_path: noted in the adapter's file.
        revision: noted in the adapter's file.
        inference_mode: put the adapter in without making it trainable.

    Raises:
        TypeError, ValueError: a field is unknown or its value is not one of the above; the message
            names the field, the value and what was expected.
    """

    peft_type: ClassVar[str] = "LORA"
    _unsupported: ClassVar[frozenset[str]] = frozenset(
        {
            "alora_invocation_tokens",
            "arrow_config",
            "ensure_weight_tying",
            "kasa_config",
            "layer_replication",
            "lora_bias",
            "megatron_config",
            "monteclora_config",
            "target_parameters",
            "trainable_token_indices",
            "use_bdlora",
            "use_dora",
            "use_qalora",
            "velora_config",
        }
    )
    _irrelevant: ClassVar[frozenset[str]] = AdapterConfig._irrelevant | frozenset(
        {
            "corda_config",
            "eva_config",
            "loftq_config",
            "lora_ga_config",
            "megatron_core",
            "qalora_group_size",
        }
    )

    r: int = 8
    lora_alpha: float = 8
    lora_dropout: float = 0.0
    target_modules: list[str] | set[str] | str | None = None
    exclude_modules: list[str] | set[str] | str | None = None
    layers_to_transform: list[int] | int | None = None
    layers_pattern: list[str] | str | None = None
    rank_pattern: dict[str, int] = field(default_factory=dict)
    alpha_pattern: dict[str, float] = field(default_factory=dict)
    use_rslora: bool = False
    bias: str = "none"
    modules_to_save: list[str] | None = None
    fan_in_fan_out: bool = False
    init_lora_weights: bool | str = True
    task_type: str | None = None
    base_model_name_or_path: str | None = None
    revision: str | None = None
    inference_mode: bool = False

    def __post_init__(self) -> None:
        check_rank("r", self.r)
        check_alpha("lora_alpha", self.lora_alpha)
        check_dropout("lora_dropout", self.lora_dropout)
        self.init_lora_weights = check_init_kind(self.init_lora_weights)
        self._check_bools("use_rslora", "fan_in_fan_out", "inference_mode")
        self._check_strings("base_model_name_or_path", "revision")
        if self.bias not in _BIAS_KINDS:
            raise ValueError(f"bias is {self.bias!r}; expected one of {', '.join(_BIAS_KINDS)}")
        if self.modules_to_save is not None:
            self.modules_to_save = name_list("modules_to_save", self.modules_to_save)
        for name in ("target_modules", "exclude_modules"):
            value = getattr(self, name)
            if isinstance(value, str):
                _check_regex(name, value)
            elif value is not None:
                setattr(self, name, set(name_list(name, value)))
        self._check_task_type()
        self._check_layers()
        self.rank_pattern = _pattern("rank_pattern", self.rank_pattern, check_rank)
        self.alpha_pattern = _pattern("alpha_pattern", self.alpha_pattern, check_alpha)

    def _check_layers(self) -> None:
        indices = self.layers_to_transform
        if indices is not None:
            as_list = [indices] if isinstance(indices, int) else indices
            if not _are_ints(as_list):
                raise TypeError(
                    f"layers_to_transform is {indices!r}; expected an int, a list of int or None"
                )
            if any(i < 0 for i in as_list):
                raise ValueError(f"layers_to_transform is {indices!r}; expected indices from 0")
        if self.layers_pattern is not None and not isinstance(self.layers_pattern, str):
            self.layers_pattern = name_list("layers_pattern", self.layers_pattern)
        if self.layers_pattern and indices is None:
            raise ValueError(
                f"layers_pattern is {self.layers_pattern!r} and layers_to_transform is None; "
                "expected the indices that it counts"
            )
        for name in ("layers_to_transform", "layers_pattern"):
            if isinstance(self.target_modules, str) and getattr(self, name) is not None:
                raise ValueError(
                    f"{name} is {getattr(self, name)!r} and target_modules is the str "
                    f"{self.target_modules!r}; expected a list of names with {name}"
                )

    def to_dict(self) -> dict[str, Any]:
        """The content of PEFT's ``adapter_config.json``, ready for ``json.dumps``."""
        content: dict[str, Any] = {
            "peft_type": self.peft_type,
            "auto_mapping": None,
            "lora_bias": False,
            "use_dora": False,
        }
        for f in dataclasses.fields(self):
            value = getattr(self, f.name)
            if isinstance(value, set):
                value = sorted(value)
            elif isinstance(value, (list, dict)):
                value = value.copy()
            content[f.name] = value
        return content

    @classmethod
    def from_dict(cls, content: Mapping[str, Any]) -> LoraConfig:
        """The config in an ``adapter_config.json`` that PEFT or :meth:`to_dict` wrote.

        Keys that PEFT 0.21 does not know either are dropped with a warning, as PEFT does.

        Args:
            content: what ``json.load`` gave.

        Raises:
            AdapterError: it is no LoRA config, or has a key that changes the computation in a way
                that is not supported (use_dora, lora_bias, target_parameters ...), or a value that
                is out of range.
        """
        values = cls._fields_in(content)
        try:
            return cls(**values)
        except (TypeError, ValueError) as error:
            raise AdapterError(f"the adapter's config: {error}") from error


def _are_ints(value: object) -> bool:
    return isinstance(value, (list, tuple)) and all(type(i) is int for i in value)


def _pattern(name: str, value: object, check: Callable[[str, object], Any]) -> dict[str, Any]:
    if value is None:
        return {}
    if not isinstance(value, Mapping):
        raise TypeError(f"{name} is {value!r}; expected a dict from name pattern to number")
    for key, number in value.items():
        if not isinstance(key, str):
            raise TypeError(f"{name} has the key {key!r}; expected a str")
        check(f"{name}[{key!r}]", number)
        _check_regex(f"{name} key", key)
    return dict(value)


def _check_regex(name: str, pattern: str) -> None:
    try:
        re.compile(pattern)
    except re.error as error:
        raise ValueError(f"{name} is {pattern!r}, no regular expression: {error}") from error
