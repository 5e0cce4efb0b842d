"""The compact mask of the attention "fused_peft" says what transformers' own says."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

pytest.importorskip("transformers")

from prefix_models import mask

from fused_peft.integrations import transformers as integration
from fused_peft.integrations._compact_mask import ReadMask, compact_mask

integration.register()


def seen(compact: Tensor | None, queries: int, keys: int, window: int | None = None) -> Tensor:
    """The ``[B, S, T]`` of a compact mask, as the attention reads it."""
    module = nn.Module()
    module.is_causal = True
    module.config = type("Config", (), {"sliding_window": window})()
    taken = ReadMask(module, compact, None, keys)
    full = taken.expand(torch.zeros(3, 1, queries, 2), 0, keys)
    if full is None:
        return torch.ones(3, queries, keys, dtype=torch.bool)
    return full[:, 0]


@pytest.mark.parametrize("tensors", [False, True])
@pytest.mark.parametrize("padding", [None, "none", "left", "right", "both"])
@pytest.mark.parametrize(
    ("what", "queries", "keys", "q_offset", "kv_offset"),
    [
        (what, *sizes)
        for sizes in [(9, 9, 0, 0), (4, 4, 0, 0), (3, 3, 0, 0), (1, 1, 0, 0)]
        for what in ("causal", "window", "bidirectional")
    ]
    + [("bidirectional", 9, 12, 0, 0)]
    + [
        (what, *sizes)
        for sizes in [(1, 9, 8, 0), (3, 9, 6, 0), (4, 12, 2, 0), (1, 12, 3, 0), (2, 6, 7, 3)]
        for what in ("causal", "window")
    ],
)
def test_a_compact_mask_says_what_transformers_mask_says(
    what: str,
    queries: int,
    keys: int,
    q_offset: int,
    kv_offset: int,
    padding: str | None,
    tensors: bool,
) -> None:
    from transformers import masking_utils

    config = type("Config", (), {"sliding_window": 3})()
    arguments: dict[str, Any] = {
        "batch_size": 3,
        "q_length": queries,
        "kv_length": keys,
        "q_offset": torch.tensor(q_offset) if tensors else q_offset,
        "kv_offset": torch.tensor(kv_offset) if tensors else kv_offset,
        "mask_function": {
            "causal": masking_utils.causal_mask_function,
            "window": masking_utils.sliding_window_causal_mask_function(3),
            "bidirectional": masking_utils.bidirectional_mask_function,
        }[what],
        "attention_mask": None if padding is None else mask(padding).bool(),
        "config": config,
        "local_size": 3 if what == "window" else None,
    }
    got = compact_mask(**arguments)
    expected = masking_utils.sdpa_mask(
        **arguments, allow_is_causal_skip=False, allow_is_bidirectional_skip=False
    )[:, 0]
    if got is None and what == "bidirectional":
        assert expected.all()
        return
    assert torch.equal(seen(got, queries, keys, 3), expected)
    assert got is None or got.dtype == torch.int32
    assert got is None or got.numel() <= 3 * 4 * keys
    full = padding is None or (
        kv_offset + keys <= 9 and mask(padding)[:, kv_offset : kv_offset + keys].all()
    )
    plain = full and not tensors and q_offset + queries == kv_offset + keys
    assert (got is None) == (plain and (what != "window" or keys <= 3))


def test_a_window_that_does_not_bite_and_a_key_mask_without_padding_cost_nothing() -> None:
    from transformers import masking_utils

    config = type("Config", (), {"sliding_window": 9})()
    got = compact_mask(
        3,
        9,
        9,
        mask_function=masking_utils.sliding_window_causal_mask_function(9),
        attention_mask=torch.ones(3, 9, dtype=torch.bool),
        config=config,
        local_size=9,
    )
    assert got is None


def test_chunks_as_long_as_the_window_are_no_window() -> None:
    from transformers import masking_utils

    config = type("Config", (), {"sliding_window": 3})()
    chunks = masking_utils.chunked_causal_mask_function(3, torch.zeros(3, dtype=torch.int64))
    arguments: dict[str, Any] = {"mask_function": chunks, "local_size": 3}
    got = compact_mask(3, 9, 9, config=config, **arguments)
    expected = masking_utils.sdpa_mask(3, 9, 9, allow_is_causal_skip=False, **arguments)
    assert torch.equal(got, expected)
