"""What the files of a prefix or prompt hold, and how a model takes it."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn

from ..errors import AdapterError
from ..nn.prefix_encoder import PrefixEncoder
from ..nn.prompt_embedding import PromptEmbedding
from ..tuners.lora import inject_adapter
from ..tuners.modules_to_save import ModulesToSaveWrapper
from ..tuners.places import original_module
from ..tuners.prompt_config import PROMPT_CONFIGS, PrefixTuningConfig, PromptLearningConfig
from ..tuners.prompt_inject import new_prompt, prompt_adapters
from ..tuners.prompt_resolve import resolve_prompt_config
from ..tuners.targets import saved_modules, task_heads
from ._files import (
    PROMPT_KEY,
    Saved,
    base_name,
    config_document,
    read_tensors,
    weights_file,
    writable,
)
from ._lora import vocabulary_was_resized
from ._modules import embedding_paths, modules, plain, refuse_meta
from ._sharded import assign, gathered
from ._side_files import Contents, encoder_file, read_extra

_Prompt = PrefixEncoder | PromptEmbedding

# PEFT puts no wrapper of its own between for these methods: LoRA's names have "base_model.model.".
_PREFIX = "base_model."

# What the tensors of an adapter compute depends on these.
_FIELDS_OF_THE_RESULT = (
    "num_virtual_tokens",
    "num_transformer_submodules",
    "prompt_token_id",
    "cloze_template",
)
# A module differs from another of the same shapes by none of these.
_FIELDS_OF_THE_FILE = ("base_model_name_or_path", "revision", "inference_mode")


def contents(model: nn.Module, adapter_name: str) -> Contents:
    """What to write.

    Raises:
        AdapterError: a tensor has NaN or infinity, or no values.
    """
    adapter = _adapter(model, adapter_name)
    config = _config_of(model, adapter_name)
    if any(parameter.is_meta for parameter in adapter.parameters()):
        raise AdapterError(f"adapter {adapter_name!r} is on the meta device; nothing is written")
    whole = gathered(adapter)
    assert isinstance(whole, (PrefixEncoder, PromptEmbedding))
    tensors = {PROMPT_KEY: whole.prompt_embeddings(), **_copies(model, adapter_name)}
    if vocabulary_was_resized(model, base_name(model, config.base_model_name_or_path)):
        tensors |= _embeddings(model)
    return Contents(
        config_document(model, config.to_dict(), {}),
        writable(tensors),
        writable(whole.encoder_state()),
        config.extra_fields(),
    )


def prepare(
    model: nn.Module, saved: Saved, adapter_name: str, *, is_new: bool, is_trainable: bool
) -> Callable[[], None]:
    """Read and check everything; the function that is returned then changes the model.

    Raises:
        AdapterError, ValueError: as :func:`fused_peft.load_adapter`.
    """
    extra, encoder_digest = read_extra(saved.directory)
    kind = PROMPT_CONFIGS[saved.document["peft_type"]]
    try:
        config = kind.from_dict(saved.document, extra)
    except AdapterError as error:
        raise AdapterError(f"{saved.config_file}: {error}") from error
    if is_new:
        refuse_meta(model)
    config, adapter, expected = _blank(model, saved, config)
    if not is_new:
        _check_replaceable(model, saved, config, adapter_name)
        dtype = next(_adapter(model, adapter_name).parameters()).dtype
        adapter.to(dtype)
        expected[PROMPT_KEY] = expected[PROMPT_KEY].to(dtype)
    values = read_tensors(
        saved,
        weights_file(saved.directory),
        model,
        required=expected,
        known={**_embeddings(model), **expected},
    )
    prompt = values.pop(PROMPT_KEY)
    file = encoder_file(saved.directory, encoder_digest) if is_trainable else None
    if file is None:
        adapter.load_prompt_embeddings(prompt)
    else:
        encoder = adapter.encoder_state()
        adapter.load_encoder_state(
            read_tensors(saved, file, model, required=encoder, known=encoder)
        )

    def apply() -> None:
        if is_new:
            with torch.random.fork_rng(devices=[]):
                inject_adapter(model, config, adapter_name, strict=False)
        _take(model, adapter_name, adapter, values, is_trainable)
        kept = dataclasses.replace(config, inference_mode=not is_trainable)
        _adapter(model, adapter_name).config = kept
        configs = getattr(model, "fused_peft_config", {})
        model.__dict__["fused_peft_config"] = {**configs, adapter_name: kept}

    return apply


def _blank(
    model: nn.Module, saved: Saved, config: PromptLearningConfig
) -> tuple[PromptLearningConfig, _Prompt, dict[str, Tensor]]:
    """The config with the model's sizes, a module of it apart from the model, and the file's keys.

    Each key has a tensor of the shape and dtype to be found there.
    """
    # For inference nothing is started from a text, which may need a tokenizer that is not here.
    config = dataclasses.replace(config, inference_mode=True)
    try:
        resolved = resolve_prompt_config(model, config)
        wrapped = saved_modules(
            model, resolved.modules_to_save or [], task_heads(config.task_type), strict=False
        )
        with torch.random.fork_rng(devices=[]):
            adapter = new_prompt(model, resolved)
    except (TypeError, ValueError) as error:
        raise saved.misfit(model, error) from error
    assert isinstance(adapter, (PrefixEncoder, PromptEmbedding))
    dtype = next(adapter.parameters()).dtype
    expected = {PROMPT_KEY: torch.empty(_prompt_shape(resolved), dtype=dtype, device="meta")}
    for path, module in wrapped.items():
        state = original_module(module).state_dict()
        expected.update({f"{_PREFIX}{plain(path)}.{plain(k)}": v for k, v in state.items()})
    return resolved, adapter, expected


def _prompt_shape(config: PromptLearningConfig) -> tuple[int, int]:
    """Of ``prompt_embeddings``, for a config with the model's sizes."""
    token_dim, submodules = config.token_dim, config.num_transformer_submodules
    assert token_dim is not None
    assert submodules is not None
    if not isinstance(config, PrefixTuningConfig):
        return config.num_virtual_tokens * submodules, token_dim
    assert config.num_layers is not None
    return config.num_virtual_tokens, 2 * config.num_layers * token_dim


def _check_replaceable(
    model: nn.Module, saved: Saved, config: PromptLearningConfig, adapter_name: str
) -> None:
    current = _config_of(model, adapter_name)
    for field in ("peft_type", *_FIELDS_OF_THE_RESULT):
        here, there = getattr(current, field, None), getattr(config, field, None)
        if here != there:
            raise AdapterError(
                f"{field} is {there!r} in {saved.directory} and {here!r} in the model's adapter "
                f"{adapter_name!r}; load it under another name, or delete the model's first"
            )


def _take(
    model: nn.Module,
    adapter_name: str,
    adapter: _Prompt,
    values: Mapping[str, Tensor],
    is_trainable: bool,
) -> None:
    """Give the model the adapter's module and copies, in place where they are alike."""
    adapters = prompt_adapters(model)
    assert adapters is not None
    current = _adapter(model, adapter_name)
    if _are_alike(current, adapter):
        values_of = current.state_dict(keep_vars=True)  # an optimizer may hold the parameters
        for key, value in adapter.state_dict().items():
            assign(values_of[key], value)
        adapter = current
    else:
        adapters.adapters[adapter_name] = adapter.train(model.training)
    copies = _copies(model, adapter_name)
    destinations = {**_embeddings(model), **copies}
    for key, value in values.items():
        assign(destinations[key], value)
    for tensor in [*adapter.parameters(), *copies.values()]:
        if isinstance(tensor, nn.Parameter):
            tensor.requires_grad_(is_trainable)


def _are_alike(one: _Prompt, two: _Prompt) -> bool:
    shapes = [{k: v.shape for k, v in m.state_dict().items()} for m in (one, two)]
    # A folded module has no use for the fields of its encoder.
    fields = [
        {
            f.name: getattr(m.config, f.name)
            for f in dataclasses.fields(m.config)  # type: ignore[arg-type]
            if f.name not in _FIELDS_OF_THE_FILE
        }
        for m in (one, two)
    ]
    return shapes[0] == shapes[1] and fields[0] == fields[1]


def _adapter(model: nn.Module, adapter_name: str) -> _Prompt:
    adapters = prompt_adapters(model)
    assert adapters is not None
    adapter = adapters.adapters[adapter_name]
    assert isinstance(adapter, (PrefixEncoder, PromptEmbedding))
    return adapter


def _config_of(model: nn.Module, adapter_name: str) -> PromptLearningConfig:
    config = getattr(model, "fused_peft_config", {}).get(adapter_name)
    if config is None:
        config = _adapter(model, adapter_name).config
    assert isinstance(config, PromptLearningConfig)
    return config


def _copies(model: nn.Module, adapter_name: str) -> dict[str, Tensor]:
    """File key -> the live tensor, for the adapter's copies of whole modules."""
    found: dict[str, Tensor] = {}
    for path, module in modules(model):
        if isinstance(module, ModulesToSaveWrapper) and adapter_name in module.modules_to_save:
            state = module.modules_to_save[adapter_name].state_dict(keep_vars=True)
            found.update({f"{_PREFIX}{path}.{plain(k)}": tensor for k, tensor in state.items()})
    return found


def _embeddings(model: nn.Module) -> dict[str, Tensor]:
    """File key -> the live tensor, for the model's embeddings, which a resized vocabulary adds."""
    return {
        f"{_PREFIX}{path}.{key}": tensor
        for path, layer in embedding_paths(model)
        for key, tensor in layer.state_dict(keep_vars=True).items()
        if key in ("weight", "bias")
    }
