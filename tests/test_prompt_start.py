"""How a prompt starts, and what cannot start."""

from __future__ import annotations

from typing import Any

import prefix_models as models
import pytest
import torch
from prompt_models import close
from torch import Tensor, nn

import fused_peft
from fused_peft import PromptTuningConfig


class Words:
    """A tokenizer of words that are numbers; "<s>" goes first."""

    unk_token_id = 3

    def __call__(self, text: str, add_special_tokens: bool = True) -> dict[str, list[int]]:
        ids = [int(word) if word.isdigit() else self.unk_token_id for word in text.split()]
        return {"input_ids": [1, *ids] if add_special_tokens else ids}


def started(**fields: Any) -> tuple[Tensor, Tensor]:
    """The prompt of a new adapter and the model's embeddings."""
    base = models.model("llama")
    fields = {"num_virtual_tokens": 5, **fields}
    ours = fused_peft.get_peft_model(base, PromptTuningConfig(**fields), tokenizer=Words())
    return ours.prompt_adapters.current.prompt_embeddings(), ours.get_input_embeddings().weight


def is_row_of(rows: Tensor, table: Tensor) -> list[bool]:
    return [bool((table == row).all(1).any()) for row in rows]


def test_random_start_is_normal() -> None:
    prompt, _ = started(num_virtual_tokens=400)
    assert abs(prompt.mean()) < 0.03
    assert abs(prompt.std() - 1) < 0.03


def test_start_from_the_vocabulary() -> None:
    prompt, table = started(prompt_tuning_init="SAMPLE_VOCAB", num_virtual_tokens=30)
    assert all(is_row_of(prompt, table))
    assert len(prompt.unique(dim=0)) > 5


def test_start_from_the_most_frequent_tokens() -> None:
    fields = {"prompt_tuning_init": "SAMPLE_VOCAB", "num_virtual_tokens": 60}
    prompt, table = started(vocab_size_limit=4, **fields)
    assert all(is_row_of(prompt, table[:4]))
    assert len(prompt.unique(dim=0)) == 4
    frequencies = [0.0] * 30
    frequencies[17], frequencies[29], frequencies[4] = 5, 9, 1
    prompt, table = started(vocab_size_limit=2, token_frequencies=frequencies, **fields)
    assert all(is_row_of(prompt, table[[17, 29]]))
    assert len(prompt.unique(dim=0)) == 2


def test_start_from_text_is_repeated() -> None:
    prompt, table = started(prompt_tuning_init="TEXT", prompt_tuning_init_text="7 8")
    assert torch.equal(prompt, table[[1, 7, 8, 1, 7]])


def test_start_from_class_labels() -> None:
    prompt, table = started(
        prompt_tuning_init="CLASS_LABELS", class_labels=["7 8 9", "5"], vocab_size_limit=6
    )
    close(prompt[0], (table[7] + table[8] + table[9]) / 3)
    assert torch.equal(prompt[1], table[5])
    assert all(is_row_of(prompt[2:], table[:6]))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (
            {"prompt_tuning_init": "TEXT", "prompt_tuning_init_text": "7 8 9 10 11"},
            "has 6 tokens; expected 1 to 5, num_virtual_tokens",
        ),
        (
            {"prompt_tuning_init": "TEXT", "prompt_tuning_init_text": "7 40"},
            "token id 40; expected ids below 40",
        ),
        (
            {"prompt_tuning_init": "CLASS_LABELS", "class_labels": ["7", "good"]},
            "class_labels has 'good', for which the tokenizer has no token",
        ),
        (
            {"prompt_tuning_init": "CLASS_LABELS", "class_labels": [" "]},
            "class_labels has ' ', for which",
        ),
        (
            {"prompt_tuning_init": "SAMPLE_VOCAB", "vocab_size_limit": 41},
            "vocab_size_limit is 41; expected at most 40",
        ),
        (
            {
                "prompt_tuning_init": "SAMPLE_VOCAB",
                "vocab_size_limit": 3,
                "token_frequencies": [1.0, 2.0],
            },
            "token_frequencies has 2 numbers; expected 3",
        ),
        ({"token_dim": 16}, "token_dim is 16; expected 32"),
        ({"num_layers": 5}, "num_layers is 5; expected 2"),
        ({"num_transformer_submodules": 2}, "num_transformer_submodules is 2; expected 1"),
        ({"modules_to_save": ["lm_hea"]}, "modules_to_save has 'lm_hea'.*near matches: lm_head"),
    ],
)
def test_bad_start_leaves_the_model_alone(fields: dict[str, Any], message: str) -> None:
    base = models.model("llama")
    before = dict(base.__dict__)
    with pytest.raises(ValueError, match=message):
        fused_peft.get_peft_model(
            base, PromptTuningConfig(num_virtual_tokens=5, **fields), tokenizer=Words()
        )
    assert base.__dict__.keys() == before.keys()
    assert "prompt_adapters" not in base._modules
    assert all(p.requires_grad for p in base.parameters())


def test_text_without_tokenizer_is_an_error_but_not_for_inference() -> None:
    fields = {"prompt_tuning_init": "TEXT", "prompt_tuning_init_text": "7", "num_virtual_tokens": 2}
    base = models.model("llama")
    with pytest.raises(ValueError, match="tokenizer is None and so is tokenizer_name_or_path"):
        fused_peft.get_peft_model(base, PromptTuningConfig(**fields))
    fused_peft.get_peft_model(base, PromptTuningConfig(inference_mode=True, **fields))
    assert not base.prompt_adapters.current.embedding.weight.requires_grad


def test_model_that_cannot_take_a_prompt_is_refused() -> None:
    sizes = {"token_dim": 4, "num_layers": 1, "num_attention_heads": 1}
    with pytest.raises(ValueError, match="Linear has no input embeddings"):
        fused_peft.get_peft_model(
            nn.Linear(4, 4), PromptTuningConfig(num_virtual_tokens=2, **sizes)
        )
