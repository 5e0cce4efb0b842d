"""torch.compile of fused transformers models: training and cached decoding, graphs counted."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.utils import counters
from transformers import (
    DynamicCache,
    LlamaConfig,
    MistralConfig,
    PreTrainedModel,
    StaticCache,
)
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

from fused_peft import (
    LoraConfig,
    PrefixTuningConfig,
    PromptEncoderConfig,
    PromptTuningConfig,
    fuse_model,
    get_peft_model,
)

VOCABULARY = 61
METHODS: dict[str, Any] = {
    "lora": LoraConfig(r=4, lora_dropout=0.3, target_modules="all-linear"),
    "prefix": PrefixTuningConfig(num_virtual_tokens=5),
    "prompt": PromptTuningConfig(num_virtual_tokens=5),
    "p-tuning": PromptEncoderConfig(num_virtual_tokens=5, encoder_hidden_size=16),
}


@pytest.fixture(autouse=True)
def _fresh_compiler() -> Iterator[None]:
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


def graphs() -> int:
    assert not counters["graph_break"]
    return counters["stats"]["unique_graphs"]


def model_for(method: str, **config: Any) -> PreTrainedModel:
    torch.manual_seed(0)
    kind = MistralConfig if "sliding_window" in config else LlamaConfig
    sizes = {
        "vocab_size": VOCABULARY,
        "hidden_size": 32,
        "intermediate_size": 40,
        "num_hidden_layers": 1,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
    }
    made = kind(**sizes, bos_token_id=None, eos_token_id=None, pad_token_id=0, **config)
    model = MODEL_FOR_CAUSAL_LM_MAPPING[kind](made)
    assert fuse_model(model) == {"attention": 1, "rms_norm": 3, "mlp": 1, "loss": 1}
    get_peft_model(model, METHODS[method])
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.1)
    return model


def batch_of(batch: int, length: int) -> tuple[Tensor, Tensor]:
    """Tokens and a mask with padding at the left of the first row."""
    ids = torch.randint(VOCABULARY, (batch, length))
    mask = torch.ones_like(ids)
    mask[0, :3] = 0
    return ids, mask


def assert_trains_in_one_graph(model: PreTrainedModel, sizes: list[tuple[int, int]]) -> None:
    def loss(ids: Tensor, mask: Tensor) -> Tensor:
        labels = ids.masked_fill(mask == 0, -100)
        out = model(input_ids=ids, attention_mask=mask, labels=labels, use_cache=False)
        return out.loss

    parameters = [p for p in model.parameters() if p.requires_grad]
    compiled = torch.compile(loss, fullgraph=True, dynamic=True, backend="aot_eager")
    for i, size in enumerate(sizes):
        inputs = batch_of(*size)
        results = []
        for run in (loss, compiled):
            torch.manual_seed(2)
            with torch._dynamo.config.patch(error_on_recompile=i > 0):
                value = run(*inputs)
            results.append((value.detach(), *torch.autograd.grad(value, parameters)))
        torch.testing.assert_close(results[1], results[0])
    assert graphs() == 1


@pytest.mark.parametrize("method", METHODS)
def test_training_is_one_graph(method: str) -> None:
    assert_trains_in_one_graph(model_for(method), [(3, 9), (2, 20), (5, 6)])


def test_lengths_on_both_sides_of_a_window_are_one_graph() -> None:
    model = model_for("prefix", sliding_window=8)
    assert_trains_in_one_graph(model, [(3, 6), (2, 20), (4, 8)])


@pytest.mark.parametrize("cache", ["dynamic", "static"])
@pytest.mark.parametrize("method", ["lora", "prefix"])
def test_decoding_is_two_graphs(method: str, cache: str) -> None:
    """One of the prompt and one of a step, over any batch, length of the prompt, and fill level."""
    model = model_for(method).eval()

    def forward(ids: Tensor, mask: Tensor, past: Any) -> Tensor:
        out = model(input_ids=ids, attention_mask=mask, past_key_values=past, use_cache=True)
        return out.logits[:, -1]

    def decode(run: Any, ids: Tensor, mask: Tensor) -> Tensor:
        past: Any = DynamicCache(config=model.config)
        if cache == "static":
            past = StaticCache(config=model.config, max_cache_len=32)
        logits = []
        for _ in range(4):
            logits.append(run(ids, mask, past))
            ids = logits[-1].argmax(-1, keepdim=True)
            mask = torch.cat((mask, torch.ones_like(ids)), dim=1)
        return torch.stack(logits)

    compiled = torch.compile(forward, fullgraph=True, dynamic=True, backend="aot_eager")
    with torch.no_grad():
        for i, size in enumerate([(3, 9), (2, 14), (4, 6)]):
            inputs = batch_of(*size)
            expected = decode(forward, *inputs)
            with torch._dynamo.config.patch(error_on_recompile=i > 0):
                torch.testing.assert_close(decode(compiled, *inputs), expected)
    assert graphs() == 2
