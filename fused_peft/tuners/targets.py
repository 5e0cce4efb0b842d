"""Which modules of a model a :class:`LoraConfig` names. The rules are PEFT's.

From peft.tuners.tuners_utils: a name in a list matches the module of that name and every module
whose name ends with ``"." + name``; a str is a regular expression for the whole name; a name given
in full is taken whatever layers_to_transform says.
"""

from __future__ import annotations

import dataclasses
import re
import warnings
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from typing import TypeVar

from torch import nn

from ..nn.adapter_spec import AdapterSpec, near_matches
from ..nn.base_layer import check_base, check_target, features_of, is_conv1d, kind_of
from ..nn.lora_layer import LoraLayer
from ..nn.prompt_adapters import PromptAdapters
from .config import LoraConfig
from .modules_to_save import ModulesToSaveWrapper

_T = TypeVar("_T")

ALL_LINEAR = "all-linear"

_MODEL_TYPES_BY_TARGETS = {
    ("q_proj", "v_proj"): (
        "bart gemma gemma2 gemma3_text gpt_neo gptj llama llama4 mistral mixtral opt qwen2 qwen3 "
        "stablelm"
    ),
    ("query", "value"): "bert electra layoutlm roberta xlm-roberta",
    ("query_key_value",): "bloom chatglm falcon gpt_neox",
    ("c_attn",): "gpt2 gpt_bigcode",
    ("q", "v"): "mt5 t5",
    ("qkv_proj",): "codegen",
    ("in_proj",): "deberta",
    ("query_proj", "value_proj"): "deberta-v2",
    ("Wqkv",): "mpt",
    ("q_proj", "v_proj", "fc1", "fc2"): "phi",
}
# PEFT's defaults by transformers' model_type, for the types whose defaults are linear layers.
DEFAULT_TARGETS: Mapping[str, list[str]] = {
    model_type: list(targets)
    for targets, model_types in _MODEL_TYPES_BY_TARGETS.items()
    for model_type in model_types.split()
}

# The heads that PEFT's PeftModelFor... classes train whole, by task type.
_TASK_HEADS: Mapping[str, list[str]] = {
    "SEQ_CLS": ["classifier", "score"],
    "TOKEN_CLS": ["classifier", "score"],
    "QUESTION_ANS": ["qa_outputs"],
}


@dataclass(frozen=True)
class Plan:
    """What putting an adapter in will do; made in full before anything is done.

    ``config`` is a copy of the user's with target_modules, modules_to_save and fan_in_fan_out as
    they turned out. The dictionaries are by the module's name in the model.
    """

    config: LoraConfig
    layers: dict[str, nn.Module]
    specs: dict[str, AdapterSpec]
    saved: dict[str, nn.Module]


def make_plan(model: nn.Module, config: LoraConfig, *, strict: bool = True) -> Plan:
    """Match ``config`` against ``model`` and check every match; changes neither.

    Args:
        model: with linear layers.
        config: what to adapt and how.
        strict: an entry of target_modules or modules_to_save that matches no module is an error;
            otherwise only target_modules that match none at all.

    Raises:
        TypeError: a match is no linear layer. ValueError: something is named that is not there.
    """
    heads = task_heads(config.task_type)
    targets = config.target_modules
    config = dataclasses.replace(
        config,
        target_modules=_default_targets(model) if targets is None else targets,
        modules_to_save=[*(config.modules_to_save or []), *heads] or None,
    )
    names = [name for name, _ in own_modules(model)]
    layers = _matched_layers(model, config)
    saved = _matched_saved(model, config)
    if strict:
        _check_entries(config, names, optional=heads)
    if not layers:
        _refuse_layer_itself(model)
        raise ValueError(_nothing_matched(config, names))
    for path, module in layers.items():
        _check_layer(model, path, module)
    _check_saved(layers, saved)
    _warn_unused(config, list(layers), names)
    specs = {path: spec_for(config, path) for path in layers}
    return Plan(_resolved(config, layers, names), layers, specs, saved)


def task_heads(task_type: str | None) -> list[str]:
    """Names that the head which a task trains whole may have."""
    return _TASK_HEADS.get(task_type or "", [])


def saved_modules(
    model: nn.Module,
    wanted: Collection[str],
    optional: Collection[str] = (),
    *,
    strict: bool = True,
) -> dict[str, nn.Module]:
    """The modules that modules_to_save names, by name; changes nothing.

    Args:
        model: of which.
        wanted: ends of names.
        optional: those of them that need not be there.
        strict: each other one has to match a module.

    Raises:
        TypeError: one cannot be wrapped. ValueError: one is not there, or they overlap.
    """
    names = [name for name, _ in own_modules(model)]
    ends = tuple(wanted)
    for entry in ends if strict else ():
        if entry not in optional and not any(name.endswith(entry) for name in names):
            raise ValueError(f"modules_to_save has {entry!r}, {_no_such_module(entry, names)}")
    saved = {n: m for n, m in own_modules(model) if ends and n.endswith(ends)}
    _check_saved({}, saved)
    return saved


def own_modules(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """``named_modules`` without the root and without what adapters brought in."""
    inside = None  # named_modules goes depth first, so the last prefix is the one that counts
    for name, module in model.named_modules():
        if not name or (inside is not None and name.startswith(inside)):
            continue
        if isinstance(module, (LoraLayer, ModulesToSaveWrapper, PromptAdapters)):
            inside = name + "."
        if not isinstance(module, PromptAdapters):
            yield name, module


def spec_for(config: LoraConfig, path: str) -> AdapterSpec:
    """The hyperparameters for the module named ``path``, after rank_pattern and alpha_pattern."""
    return AdapterSpec(
        r=_by_pattern(config.rank_pattern, path, config.r),
        lora_alpha=_by_pattern(config.alpha_pattern, path, config.lora_alpha),
        lora_dropout=config.lora_dropout,
        use_rslora=config.use_rslora,
        init_lora_weights=config.init_lora_weights,
    )


def _by_pattern(pattern: Mapping[str, _T], path: str, default: _T) -> _T:
    return next((v for key, v in pattern.items() if _pattern_matches(key, path)), default)


def _pattern_matches(key: str, path: str) -> bool:
    return re.match(rf"(.*\.)?({key})$", path) is not None


def _names_match(entries: Collection[str], path: str) -> bool:
    return path in entries or any(path.endswith(f".{entry}") for entry in entries)


def is_excluded(config: LoraConfig, path: str) -> bool:
    """Whether exclude_modules names the module, or it is or is inside one of modules_to_save."""
    excluded = config.exclude_modules
    if isinstance(excluded, str):
        if excluded and re.fullmatch(excluded, path):
            return True
    elif excluded and _names_match(excluded, path):
        return True
    return any(re.match(rf"(^|.*\.){m}($|\..*)", path) for m in config.modules_to_save or [])


def is_target(config: LoraConfig, path: str) -> bool:
    """Whether target_modules names the module (not for "all-linear", which goes by type)."""
    targets = config.target_modules or []
    if isinstance(targets, str):
        return re.fullmatch(targets, path) is not None
    if path in targets:
        return True
    return _names_match(targets, path) and _in_wanted_layer(config, path)


def _in_wanted_layer(config: LoraConfig, path: str) -> bool:
    wanted = config.layers_to_transform
    if wanted is None or wanted == []:
        return True
    # The first index of the name counts: "layers.1.experts.0.w" is in layer 1.
    if not config.layers_pattern:
        match = re.match(r".*?\.[^.]*\.(\d+)\.", path)
    else:
        patterns = config.layers_pattern
        patterns = [patterns] if isinstance(patterns, str) else patterns
        found = (re.match(rf"(?:^|.*?\.){p}\.(?P<index>\d+)\.", path) for p in patterns)
        match = next((m for m in found if m), None)
    if match is None:
        return False
    index = int(match["index"] if "index" in match.re.groupindex else match[1])
    return index in ([wanted] if isinstance(wanted, int) else wanted)


def _is_all_linear(config: LoraConfig) -> bool:
    return isinstance(config.target_modules, str) and config.target_modules.lower() == ALL_LINEAR


def _default_targets(model: nn.Module) -> list[str]:
    config = getattr(model, "config", None)
    if isinstance(config, dict):
        model_type = config.get("model_type")
    else:
        model_type = getattr(config, "model_type", None)
    if not isinstance(model_type, str) or model_type not in DEFAULT_TARGETS:
        raise ValueError(
            f"target_modules is None and the model's type is {model_type!r}, for which there is no "
            "default; expected names, a regular expression or 'all-linear'"
            f"{near_matches(str(model_type), DEFAULT_TARGETS)}"
        )
    return DEFAULT_TARGETS[model_type]


def _matched_layers(model: nn.Module, config: LoraConfig) -> dict[str, nn.Module]:
    candidates = {n: m for n, m in own_modules(model) if not is_excluded(config, n)}
    if not _is_all_linear(config):
        return {n: m for n, m in candidates.items() if is_target(config, n)}
    outputs = _output_layers(model, config)
    return {
        n: m
        for n, m in candidates.items()
        if _is_linear(m)
        and not any(m is output for output in outputs)
        and not _is_read_by_its_parent(model, n)
    }


def _output_layers(model: nn.Module, config: LoraConfig) -> list[nn.Module]:
    """What "all-linear" leaves out: the output embedding, or a classification head."""
    get_output = getattr(model, "get_output_embeddings", None)
    if callable(get_output):
        output = get_output()
        if isinstance(output, nn.Module):
            return [output]
        names = _TASK_HEADS["SEQ_CLS"] if config.task_type == "SEQ_CLS" else []
    else:
        names = ["lm_head"]
    found = [getattr(model, name, None) for name in names]
    return [module for module in found if isinstance(module, nn.Module)]


def _is_linear(module: nn.Module) -> bool:
    """Whether "all-linear" takes the module: quantised layers need not be of nn.Linear's kind."""
    if isinstance(module, (nn.Linear, LoraLayer)) or is_conv1d(module):
        return True
    return features_of(module) is not None and not module._modules


def _is_read_by_its_parent(model: nn.Module, path: str) -> bool:
    """Whether a module is never called: MultiheadAttention reads its out_proj's weight itself."""
    parent = model.get_submodule(path.rpartition(".")[0])
    return isinstance(parent, nn.MultiheadAttention)


def _check_layer(model: nn.Module, path: str, module: nn.Module) -> None:
    if isinstance(module, LoraLayer):
        return
    if isinstance(module, ModulesToSaveWrapper):  # which passes for what it stands for
        check_base(module, f"target module {path!r}")
    check_target(module, f"target module {path!r}")
    if _is_read_by_its_parent(model, path):
        raise TypeError(
            f"target module {path!r} belongs to a torch.nn.MultiheadAttention, which reads its "
            "weight without calling it, so that an adapter would have no effect; expected a layer "
            "that is called"
        )


def _matched_saved(model: nn.Module, config: LoraConfig) -> dict[str, nn.Module]:
    # Ends of names without regard to dots, as in peft.utils.other._set_trainable.
    ends = tuple(config.modules_to_save or ())
    return {n: m for n, m in own_modules(model) if ends and n.endswith(ends)}


def _check_saved(layers: Mapping[str, nn.Module], saved: Mapping[str, nn.Module]) -> None:
    for path, module in saved.items():
        if isinstance(module, (nn.ModuleList, nn.ModuleDict, nn.ParameterList, nn.ParameterDict)):
            raise TypeError(
                f"modules_to_save names {path!r}, a {type(module).__name__}; "
                "expected a module that is called"
            )
        for other in [*layers, *saved]:
            if other.startswith(path + ".") or (other == path and other in layers):
                raise ValueError(
                    f"modules_to_save names {path!r} and {other!r} is to be adapted or saved too; "
                    "expected modules apart from each other"
                )
        if any(isinstance(m, (LoraLayer, ModulesToSaveWrapper)) for m in _below(module)):
            raise TypeError(f"modules_to_save names {path!r}, which has adapters; expected none")


def _below(module: nn.Module) -> list[nn.Module]:
    """A module and all inside it. A wrapper is only asked for another copy: nothing is inside."""
    return [] if isinstance(module, ModulesToSaveWrapper) else list(module.modules())


def _check_entries(config: LoraConfig, names: list[str], optional: list[str]) -> None:
    """Every entry that is a name matches at least one module."""
    targets = config.target_modules
    for entry in sorted(targets) if isinstance(targets, set) else []:
        if not any(_names_match([entry], name) for name in names):
            raise ValueError(f"target_modules has {entry!r}, {_no_such_module(entry, names)}")
    for entry in config.modules_to_save or []:
        if entry not in optional and not any(name.endswith(entry) for name in names):
            raise ValueError(f"modules_to_save has {entry!r}, {_no_such_module(entry, names)}")


def _no_such_module(entry: str, names: list[str]) -> str:
    known = [*names, *(name.rpartition(".")[2] for name in names)]
    return f"which matches no module{near_matches(entry, known)}"


def _refuse_layer_itself(model: nn.Module) -> None:
    if _is_linear(model):
        raise ValueError(
            f"model is itself a linear layer, a {kind_of(model)}; expected a model that has it "
            "under a name, or LoraLinear.from_linear(model) in its place"
        )
    if not any(_is_linear(module) for module in model.modules()):
        raise ValueError(
            f"model is a {type(model).__name__} without a linear layer; expected one to adapt"
        )


def _nothing_matched(config: LoraConfig, names: list[str]) -> str:
    targets = config.target_modules
    shown = sorted(targets) if isinstance(targets, set) else repr(targets)
    near = "" if isinstance(targets, set) else _no_such_module(str(targets), names)
    hints = [
        f"{name} is {getattr(config, name)!r}"
        for name in ("exclude_modules", "modules_to_save", "layers_to_transform", "layers_pattern")
        if getattr(config, name) is not None
    ]
    return "; ".join([f"target_modules is {shown}, {near or 'which matches no module'}", *hints])


def _warn_unused(config: LoraConfig, layers: list[str], names: list[str]) -> None:
    if config.exclude_modules and not any(is_excluded(config, name) for name in names):
        warnings.warn(
            f"exclude_modules is {config.exclude_modules!r} and excludes no module", stacklevel=5
        )
    for field in ("rank_pattern", "alpha_pattern"):
        keys = getattr(config, field)
        unused = [k for k in keys if not any(_pattern_matches(k, path) for path in layers)]
        if unused:
            warnings.warn(f"{field} has {unused}, which match no adapted module", stacklevel=5)


def _resolved(config: LoraConfig, layers: Mapping[str, nn.Module], names: list[str]) -> LoraConfig:
    """``config`` as it is kept and saved: names for "all-linear", fan_in_fan_out as found."""
    targets = config.target_modules
    if _is_all_linear(config):
        ends = {path.rpartition(".")[2] for path in layers}
        selected = {n for n in names if _names_match(ends, n) and not is_excluded(config, n)}
        targets = ends if selected == set(layers) else set(layers)
    transposed = any(
        m.fan_in_fan_out if isinstance(m, LoraLayer) else is_conv1d(m) for m in layers.values()
    )
    if config.fan_in_fan_out and not transposed:
        warnings.warn(
            "fan_in_fan_out is True and no target stores its weight so; taken as False",
            stacklevel=5,
        )
    return dataclasses.replace(config, target_modules=targets, fan_in_fan_out=transposed)
