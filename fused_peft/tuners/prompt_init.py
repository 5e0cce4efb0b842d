"""How a prompt starts: rows of the model's own input embeddings."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ..nn.base_layer import execution_device
from .prompt_config import PromptTuningConfig


def load_tokenizer(name: str | None, why: str, kwargs: dict[str, Any] | None = None) -> Any:
    """The tokenizer that a config names.

    Raises:
        ValueError: there is no name.
    """
    if not name:
        raise ValueError(
            f"tokenizer is None and so is tokenizer_name_or_path; {why} needs one of them"
        )
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(name, **(kwargs or {}))


def initial_rows(
    config: PromptTuningConfig, embeddings: nn.Module, rows: int, tokenizer: Any = None
) -> Tensor | None:
    """What the prompt starts as.

    Args:
        config: of prompt tuning.
        embeddings: the model's input embeddings, from ids to vectors.
        rows: num_virtual_tokens * num_transformer_submodules.
        tokenizer: for TEXT and CLASS_LABELS; None loads the one that the config names.

    Returns:
        float32 ``[rows, token_dim]``, or None where it is to be N(0, 1).

    Raises:
        ValueError: a text without tokens or of more than num_virtual_tokens; a label without
            tokens; an id beyond the embeddings; fewer tokens than vocab_size_limit.
    """
    kind = config.prompt_tuning_init
    if kind == "RANDOM":
        return None
    if kind == "SAMPLE_VOCAB":
        return _embed(embeddings, _sample(config, embeddings, rows), kind)
    if tokenizer is None:
        why = f"prompt_tuning_init={kind!r}"
        tokenizer = load_tokenizer(config.tokenizer_name_or_path, why, config.tokenizer_kwargs)
    if kind == "TEXT":
        return _embed(embeddings, _text_ids(config, tokenizer, rows), "prompt_tuning_init_text")
    labels = [_label_row(embeddings, label, tokenizer) for label in config.class_labels or []]
    left = rows - len(labels)
    if not left:
        return torch.stack(labels)
    drawn = _embed(embeddings, _sample(config, embeddings, left), kind)
    return torch.cat([torch.stack(labels), drawn])


def _text_ids(config: PromptTuningConfig, tokenizer: Any, rows: int) -> list[int]:
    text = config.prompt_tuning_init_text
    ids = list(tokenizer(text)["input_ids"])
    if not 0 < len(ids) <= config.num_virtual_tokens:
        raise ValueError(
            f"prompt_tuning_init_text {text!r} has {len(ids)} tokens; expected 1 to "
            f"{config.num_virtual_tokens}, num_virtual_tokens"
        )
    return (ids * rows)[:rows]


def _label_row(embeddings: nn.Module, label: str, tokenizer: Any) -> Tensor:
    ids = list(tokenizer(label, add_special_tokens=False)["input_ids"])
    unknown = getattr(tokenizer, "unk_token_id", None)
    if not ids or all(i == unknown for i in ids):
        raise ValueError(
            f"class_labels has {label!r}, for which the tokenizer has no token; expected labels of "
            "at least one known token"
        )
    return _embed(embeddings, ids, f"class_labels' {label!r}").mean(0)


def _sample(config: PromptTuningConfig, embeddings: nn.Module, count: int) -> list[int]:
    size = _size(embeddings)
    limit = config.vocab_size_limit
    if limit is None:
        return torch.randint(0, size, (count,)).tolist()
    if limit > size:
        raise ValueError(f"vocab_size_limit is {limit}; expected at most {size}, the vocabulary")
    drawn = torch.randint(0, limit, (count,))
    if config.token_frequencies is None:
        return drawn.tolist()
    known = len(config.token_frequencies)
    if not limit <= known <= size:
        raise ValueError(
            f"token_frequencies has {known} numbers; expected {limit} (vocab_size_limit) to {size} "
            "(the vocabulary)"
        )
    frequencies = torch.tensor(config.token_frequencies, dtype=torch.float64)
    return frequencies.argsort(descending=True, stable=True)[drawn].tolist()


def _embed(embeddings: nn.Module, ids: list[int], what: str) -> Tensor:
    size = _size(embeddings)
    if max(ids) >= size:
        raise ValueError(
            f"{what} has the token id {max(ids)}; expected ids below {size}, the vocabulary of the "
            "model: the tokenizer is another model's"
        )
    weight = embeddings.weight
    assert isinstance(weight, Tensor)
    with torch.no_grad():
        rows: Tensor = embeddings(torch.tensor(ids, device=execution_device(embeddings, weight)))
    return rows.detach().float()


def _size(embeddings: nn.Module) -> int:
    weight = embeddings.weight
    assert isinstance(weight, Tensor)
    return weight.shape[0]
