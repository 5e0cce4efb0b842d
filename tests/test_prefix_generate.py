"""Generation with a prefix: caches, padding, beams."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

pytest.importorskip("transformers")

from prefix_models import mask, model, tokens, tuned, with_peft

from fused_peft import disable_adapter


def generated(built: nn.Module, ids: Tensor, **arguments: Any) -> tuple[Tensor, Tensor]:
    out = built.generate(
        input_ids=ids,
        max_new_tokens=6,
        do_sample=False,
        pad_token_id=0,
        eos_token_id=None,
        output_logits=True,
        return_dict_in_generate=True,
        **arguments,
    )
    return out.sequences, torch.stack(out.logits, dim=1)


@pytest.mark.parametrize("search", [{}, {"num_beams": 3}])
@pytest.mark.parametrize("kind", ["llama", "qwen2", "gpt2", "t5", "bart"])
def test_generate_without_padding_is_peft_s(kind: str, search: dict[str, Any]) -> None:
    ours, theirs = with_peft(kind)
    arguments = {"attention_mask": mask("none"), **search}
    got, expected = generated(ours, tokens(), **arguments), generated(theirs, tokens(), **arguments)
    assert torch.equal(got[0], expected[0])
    torch.testing.assert_close(got[1], expected[1], rtol=1e-4, atol=1e-5)
    with disable_adapter(ours):
        assert not torch.equal(generated(ours, tokens(), **arguments)[0], got[0])


@pytest.mark.parametrize(
    "cache", [{}, {"cache_implementation": "static"}, {"use_cache": False}, {"num_beams": 2}]
)
@pytest.mark.parametrize("kind", ["llama", "mistral", "qwen2", "gpt2", "gemma2"])
def test_generate_with_left_padding(kind: str, cache: dict[str, Any]) -> None:
    built = tuned(model(kind))
    ids, keep = tokens(), mask("left")
    sequences, logits = generated(built, ids, attention_mask=keep, **cache)
    # A padded row is generated as it is alone and unpadded.
    alone = generated(built, ids[1:2, 4:], **cache)
    assert torch.equal(sequences[1:2, 9:], alone[0][:, 5:])
    if "num_beams" in cache:
        return
    torch.testing.assert_close(logits[1:2], alone[1], rtol=1e-4, atol=1e-5)
    # Every step is the forward pass over all tokens up to it.
    keep = nn.functional.pad(keep, (0, 6), value=1)
    positions = (keep.cumsum(1) - 1).clamp(min=0)
    whole = built(sequences, attention_mask=keep, position_ids=positions).logits[:, 8:-1]
    torch.testing.assert_close(logits, whole, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("cache", [{"cache_implementation": "static"}, {"use_cache": False}])
@pytest.mark.parametrize("kind", ["t5", "bart"])
def test_generate_of_encoder_decoders_with_any_cache(kind: str, cache: dict[str, Any]) -> None:
    built = tuned(model(kind))
    arguments = {"attention_mask": mask("both")}
    expected = generated(built, tokens(), **arguments)
    got = generated(built, tokens(), **arguments, **cache)
    assert torch.equal(got[0], expected[0])
    torch.testing.assert_close(got[1], expected[1], rtol=1e-4, atol=1e-5)


def test_the_cache_has_the_sequence_s_own_length() -> None:
    built = tuned(model("llama"))
    out = built(tokens(), use_cache=True)
    assert out.past_key_values.get_seq_length() == 9
    more = built(tokens(3, 2), past_key_values=out.past_key_values).logits
    whole = built(torch.cat((tokens(), tokens(3, 2)), dim=1)).logits[:, 9:]
    torch.testing.assert_close(more, whole, rtol=1e-4, atol=1e-5)
