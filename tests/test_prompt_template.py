"""P-tuning with a cloze template: the prompt in the places of a pseudo token."""

from __future__ import annotations

import prefix_models as models
import pytest
import torch
from prompt_models import close, config

import fused_peft


def test_template_puts_the_prompt_where_the_pseudo_token_is() -> None:
    template = config("MLP", "llama", cloze_template=(1, 2, 0), prompt_token_id=99)
    ours = fused_peft.get_peft_model(models.model("llama"), template)
    rows = [template.fill_template([5, 6, 7], [8]), template.fill_template([9], [10, 11, 12])]
    assert rows == [[99, 5, 6, 7, 99, 99, 8], [99, 9, 99, 99, 10, 11, 12]]
    ids = torch.tensor(rows)
    prompt = ours.prompt_adapters.current.virtual_tokens()
    embed = ours.get_input_embeddings()
    first = torch.cat([prompt[:1], embed(ids[0, 1:4]), prompt[1:], embed(ids[0, 6:])])
    second = torch.cat([prompt[:1], embed(ids[1, 1:2]), prompt[1:], embed(ids[1, 4:])])
    labels = ids.masked_fill(ids == 99, -100)
    got = ours(ids, labels=ids)
    with fused_peft.disable_adapter(ours):
        want = ours(inputs_embeds=torch.stack([first, second]), labels=labels)
    close(got.logits, want.logits)
    close(got.loss, want.loss)
    options = {"max_new_tokens": 4, "do_sample": False, "pad_token_id": 0}
    static = ours.generate(ids, cache_implementation="static", **options)
    assert ours.generate(ids, use_cache=False, **options).tolist() == static.tolist()


@pytest.mark.parametrize("kind", ["bert", "t5"])
def test_template_in_an_encoder(kind: str) -> None:
    ours = fused_peft.get_peft_model(models.model(kind), config("LSTM", kind, prompt_token_id=-1))
    ids = models.tokens()
    ids[:, [0, 4, 8]] = -1
    embeds = ours.get_input_embeddings()(ids.clamp(min=0))
    embeds[:, [0, 4, 8]] = ours.prompt_adapters.current.virtual_tokens()
    rest = {} if kind == "bert" else {"decoder_input_ids": models.tokens(length=4)}
    got = ours(ids, attention_mask=torch.ones_like(ids), **rest).logits
    ours.prompt_adapters.enabled = False  # the head stays
    close(got, ours(inputs_embeds=embeds, **rest).logits)


def test_row_without_its_pseudo_tokens_is_an_error() -> None:
    ours = fused_peft.get_peft_model(
        models.model("llama"), config("MLP", "llama", prompt_token_id=39)
    )
    ids = torch.tensor([[39, 39, 39, 5], [39, 39, 6, 5]])
    with pytest.raises(ValueError, match=r"prompt_token_id 39 \[3, 2\] times.*expected .*3, in"):
        ours(ids)
    with pytest.raises(ValueError, match="input_ids is None"):
        ours(inputs_embeds=torch.zeros(1, 4, 32))
