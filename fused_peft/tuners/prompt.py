"""Prompt tuning and P-tuning in a transformers model: where the prompt joins the input.

Before the model's own forward its ``input_ids`` become ``inputs_embeds`` with the prompt in front,
before left padding too, and masks, labels, positions and token types are extended, as PEFT's
models do: the outputs have num_virtual_tokens more positions. In an encoder-decoder model the
prompt stands before the encoder's input.

With a cache the prompt enters once, where the cache is empty. Other than in PEFT, positions that
are given are kept (those of the text come after the prompt's), so that ``generate()``, which
derives them from the mask, gives a left-padded row what it gives that row without padding.
"""

from __future__ import annotations

import functools
import inspect
from typing import Any

import torch
from torch import Tensor, nn

from ..nn.base_layer import execution_device
from ..nn.prompt_adapters import PromptAdapters
from ..nn.prompt_embedding import PromptEmbedding
from ..nn.prompt_encoder import PromptEncoder
from .prompt_config import PromptTuningConfig, PTuningConfig
from .prompt_init import initial_rows
from .prompt_resolve import input_embeddings, is_encoder_decoder

_STATE = "fused_peft_prompt_hooks"
_IGNORED = -100


def check_prompt(model: nn.Module, config: PromptTuningConfig | PTuningConfig) -> None:
    """Whether the model can get a prompt; changes nothing.

    Raises:
        TypeError, ValueError: it has no input embeddings or does not take ``inputs_embeds``.
    """
    embeddings = input_embeddings(model)
    for what, part in _entries(model):
        if "inputs_embeds" not in inspect.signature(part.forward).parameters:
            raise TypeError(
                f"{what} is a {type(part).__name__}, whose forward takes no inputs_embeds; "
                "expected one that does, for a prompt to join them"
            )
    if isinstance(config, PTuningConfig) and config.prompt_token_id is not None:
        padding = getattr(embeddings, "padding_idx", None)
        if padding is not None and config.prompt_token_id == padding:
            raise ValueError(f"prompt_token_id is {padding}; expected not the padding token")


def new_prompt_adapter(
    model: nn.Module, config: PromptTuningConfig | PTuningConfig, tokenizer: Any = None
) -> PromptEmbedding:
    """The module of a new adapter, started as the config says, or at random for inference.

    Raises:
        TypeError, ValueError: as :func:`check_prompt`, and what the start of the prompt raises.
            The model is left as it was.
    """
    check_prompt(model, config)
    embeddings = input_embeddings(model)
    device = execution_device(embeddings, embeddings.weight)  # type: ignore[arg-type]
    if isinstance(config, PTuningConfig):
        return PromptEncoder(config, device=device)
    adapter = PromptEmbedding(config, device=device)
    if not config.inference_mode:
        rows = initial_rows(config, embeddings, adapter.embedding.num_embeddings, tokenizer)
        if rows is not None:
            adapter.load_prompt_embeddings(rows)
    return adapter


def install(model: nn.Module, adapters: PromptAdapters) -> None:
    """Make the prompt in force at ``adapters`` join the inputs of ``model``. Idempotent.

    Args:
        model: a transformers model that :func:`check_prompt` accepts.
        adapters: its ``current`` is the adapter in force; anything but a PromptEmbedding or
            PromptEncoder is ignored.
    """
    if _STATE in model.__dict__:
        return
    handles = []
    embeddings, filler = input_embeddings(model), _filler(model)
    for _, part in _entries(model):
        hook = _JoinInput(adapters, part, embeddings, filler)
        handles.append(part.register_forward_pre_hook(hook, with_kwargs=True))
    if filler is not None:
        backbone: nn.Module = model.base_model  # type: ignore[assignment]
        inside = _JoinInside(adapters, backbone, embeddings)
        handles.append(backbone.register_forward_pre_hook(inside, with_kwargs=True))
    if is_encoder_decoder(model):
        decoder: nn.Module = model.get_decoder()  # type: ignore[operator]
        seeing = _SeePrompt(adapters, decoder)
        handles.append(decoder.register_forward_pre_hook(seeing, with_kwargs=True))
    elif hasattr(model, "generate"):
        _adjust_generate(model)
    model.__dict__[_STATE] = handles


def uninstall(model: nn.Module) -> None:
    """Undo :func:`install`. Idempotent."""
    for handle in model.__dict__.pop(_STATE, []):
        handle.remove()
    for name in _GENERATE:
        model.__dict__.pop(name, None)


def _entries(model: nn.Module) -> list[tuple[str, nn.Module]]:
    """The modules whose input a prompt joins, each with what an error calls it."""
    if is_encoder_decoder(model):
        return [("the encoder of the model", model.get_encoder())]  # type: ignore[operator]
    return [("model", model)]


def _prompt_in_force(adapters: PromptAdapters) -> PromptEmbedding | None:
    current = adapters.current
    return current if isinstance(current, PromptEmbedding) else None


def _pseudo_token(prompt: PromptEmbedding) -> int | None:
    return getattr(prompt.config, "prompt_token_id", None)


class _Hook:
    """A forward pre-hook that sees all arguments by name; holds modules without owning them."""

    def __init__(self, adapters: PromptAdapters, module: nn.Module) -> None:
        self.adapters = adapters
        self.names = list(inspect.signature(module.forward).parameters)

    def __call__(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        prompt = _prompt_in_force(self.adapters)
        if prompt is None:
            return None
        given = {**dict(zip(self.names, args, strict=False)), **kwargs}
        self.change(module, prompt, given)
        return (), given

    def change(self, module: nn.Module, prompt: PromptEmbedding, given: dict[str, Any]) -> None:
        raise NotImplementedError


class _JoinInput(_Hook):
    """Before the model, or its encoder.

    A model with a ``filler`` looks for padding in ``input_ids`` itself: there they are kept, with
    that token in the prompt's place, and :class:`_JoinInside` embeds them.
    """

    def __init__(
        self,
        adapters: PromptAdapters,
        module: nn.Module,
        embeddings: nn.Module,
        filler: int | None = None,
    ) -> None:
        super().__init__(adapters, module)
        self.embeddings = embeddings
        self.filler = filler

    def change(self, module: nn.Module, prompt: PromptEmbedding, given: dict[str, Any]) -> None:
        cached = _has_tokens(given.get("past_key_values"))
        token, ids = _pseudo_token(prompt), given.get("input_ids")
        inside = self.filler is not None and ids is not None
        if token is not None:
            if not cached and not inside:
                self.replace(prompt, given, token, labelled=not _classifies(module, prompt))
            return
        P = prompt.num_virtual_tokens
        # transformers 4 counts without the prompt; without it, it counts from the cache.
        if given.get("cache_position") is not None:
            given["cache_position"] = None
        _extend_mask(given, "attention_mask", P)
        positions = given.get("position_ids")
        if cached:
            if positions is not None:
                given["position_ids"] = positions + P
            return
        if self.filler is not None and ids is not None:
            tokens = ids.shape[1]
            given["input_ids"] = _before(ids, P, self.filler)
        else:
            embedded = self.embed(given)
            tokens = embedded.shape[1]
            given["inputs_embeds"] = _prepend(prompt, embedded)
        if positions is not None:
            own = torch.arange(P, device=positions.device, dtype=positions.dtype)
            own = own.expand(*positions.shape[:-1], P)
            given["position_ids"] = torch.cat([own, positions + P], dim=-1)
        if given.get("token_type_ids") is not None:
            given["token_type_ids"] = _before(given["token_type_ids"], P, 0)
        labels = None if _classifies(module, prompt) else given.get("labels")
        if isinstance(labels, Tensor) and labels.dim() == 2 and labels.shape[1] == tokens:
            given["labels"] = _before(labels, P, _IGNORED)
        for name in ("start_positions", "end_positions", "logits_to_keep"):
            if isinstance(given.get(name), Tensor):
                given[name] = given[name] + P

    def embed(self, given: dict[str, Any]) -> Tensor:
        """The embeddings of the input, taken out of ``given``."""
        ids, embedded = given.get("input_ids"), given.get("inputs_embeds")
        if (ids is None) == (embedded is None):
            raise ValueError("expected exactly one of input_ids and inputs_embeds")
        if embedded is None:
            embedded = self.embeddings(ids)
        given["input_ids"] = None
        result: Tensor = embedded
        return result

    def replace(
        self, prompt: PromptEmbedding, given: dict[str, Any], token: int, *, labelled: bool
    ) -> None:
        """The prompt in the places of the pseudo token."""
        ids = given.get("input_ids")
        if ids is None:
            raise ValueError(
                "input_ids is None; a prompt with a prompt_token_id needs them to find its places"
            )
        P = prompt.num_virtual_tokens
        places = ids == token
        if not torch.compiler.is_compiling():
            counts = places.sum(1)
            if bool((counts != P).any()):
                raise ValueError(
                    f"input_ids have the prompt_token_id {token} {counts.tolist()} times in their "
                    f"rows; expected num_virtual_tokens, {P}, in each"
                )
        # The pseudo token may be beyond the vocabulary.
        embedded = self.embeddings(ids.masked_fill(places, 0))
        rows = prompt.virtual_tokens().to(embedded.device, embedded.dtype)
        order = (places.cumsum(1) - 1).clamp(0, P - 1)
        given["input_ids"] = None
        given["inputs_embeds"] = torch.where(places[..., None], rows[order], embedded)
        labels = given.get("labels")
        if labelled and labels is not None and labels.shape == ids.shape:
            given["labels"] = labels.masked_fill(places, _IGNORED)


class _JoinInside(_JoinInput):
    """Before the model inside one that keeps ``input_ids``."""

    def change(self, module: nn.Module, prompt: PromptEmbedding, given: dict[str, Any]) -> None:
        ids = given.get("input_ids")
        if ids is None or _has_tokens(given.get("past_key_values")):
            return
        token = _pseudo_token(prompt)
        if token is not None:
            self.replace(prompt, given, token, labelled=False)
            return
        given["input_ids"] = ids[:, prompt.num_virtual_tokens :]
        given["inputs_embeds"] = _prepend(prompt, self.embed(given))


class _SeePrompt(_Hook):
    """Before a decoder: the encoder's output has the prompt in front, its mask has not."""

    def change(self, module: nn.Module, prompt: PromptEmbedding, given: dict[str, Any]) -> None:
        states, mask = given.get("encoder_hidden_states"), given.get("encoder_attention_mask")
        if states is None or mask is None or _pseudo_token(prompt) is not None:
            return
        # As wide already where the encoder ran without the prompt.
        if mask.dim() == 2 and mask.shape[1] + prompt.num_virtual_tokens == states.shape[1]:
            _extend_mask(given, "encoder_attention_mask", prompt.num_virtual_tokens)


def _prepend(prompt: PromptEmbedding, embedded: Tensor) -> Tensor:
    rows = prompt.virtual_tokens().to(embedded.device, embedded.dtype)
    return torch.cat([rows.expand(len(embedded), -1, -1), embedded], dim=1)


def _filler(model: nn.Module) -> int | None:
    """Any token but padding, for a classifier that reads the last real token; None for others."""
    if not type(model).__name__.endswith("ForSequenceClassification"):
        return None
    if not hasattr(model, "score") or not isinstance(getattr(model, "base_model", None), nn.Module):
        return None
    return 1 if getattr(model.config, "pad_token_id", None) == 0 else 0


def _before(tensor: Tensor, count: int, value: int) -> Tensor:
    return torch.cat([tensor.new_full((len(tensor), count), value), tensor], dim=1)


def _extend_mask(given: dict[str, Any], name: str, count: int) -> None:
    mask = given.get(name)
    if mask is None:
        return
    if not isinstance(mask, Tensor) or mask.dim() != 2:
        what = tuple(mask.shape) if isinstance(mask, Tensor) else type(mask).__name__
        raise ValueError(
            f"{name} is {what}; expected [batch, tokens] or None, which a prompt can be put before"
        )
    given[name] = _before(mask, count, 1)


def _has_tokens(cache: Any) -> bool:
    if cache is None:
        return False
    if isinstance(cache, (tuple, list)):
        return len(cache) > 0
    return bool(cache.get_seq_length() > 0)


def _classifies(module: nn.Module, prompt: PromptEmbedding) -> bool:
    """Whether labels are a row's, not a token's."""
    task = getattr(prompt.config, "task_type", None)
    return task == "SEQ_CLS" or type(module).__name__.endswith("ForSequenceClassification")


def _adjust_generate(model: nn.Module) -> None:
    """For caches of a fixed size: room for the prompt, and masks made where the prompt is known."""
    for name, function in _GENERATE.items():
        # A bound method could not be pickled: it is looked for under the function's name.
        model.__dict__[name] = functools.partial(function, model)


def _in_front(model: nn.Module) -> int:
    """The number of tokens that are put before the model's input."""
    prompt = _prompt_in_force(model.prompt_adapters)  # type: ignore[arg-type]
    if prompt is None or _pseudo_token(prompt) is not None:
        return 0
    return prompt.num_virtual_tokens


def _create_masks_for_generate(model: Any, *args: Any, **kwargs: Any) -> Any:
    if not args and _in_front(model):
        return kwargs.get("attention_mask")  # forward makes the mask, once the prompt is in
    if hasattr(type(model), "create_masks_for_generate"):
        overridden = inspect.getattr_static(type(model), "create_masks_for_generate")
        return overridden.__get__(model, type(model))(*args, **kwargs)
    from transformers.masking_utils import create_masks_for_generate

    return create_masks_for_generate(*args, **kwargs)


def _prepare_cache_for_generation(model: Any, *args: Any, **kwargs: Any) -> Any:
    original = type(model)._prepare_cache_for_generation
    bound = inspect.signature(original).bind(model, *args, **kwargs)
    if "max_cache_length" in bound.arguments:
        bound.arguments["max_cache_length"] += _in_front(model)
    return original(*bound.args, **bound.kwargs)


_GENERATE = {
    "create_masks_for_generate": _create_masks_for_generate,
    "_prepare_cache_for_generation": _prepare_cache_for_generation,
}
