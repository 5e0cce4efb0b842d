"""Tiny random transformers models, and ones with a prefix, that prefix tuning is tested on."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fused_peft import PrefixTuningConfig, get_peft_model
from fused_peft.nn.prefix_encoder import PrefixEncoder

SIZES = {
    "vocab_size": 40,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
GQA = {**SIZES, "num_key_value_heads": 2}
T5 = {
    "vocab_size": 40,
    "d_model": 32,
    "d_kv": 8,
    "d_ff": 48,
    "num_layers": 3,
    "num_heads": 4,
    "decoder_start_token_id": 0,
}
BART = {
    "vocab_size": 40,
    "d_model": 32,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 48,
    "decoder_ffn_dim": 48,
    "max_position_embeddings": 64,
}
OPT = {
    "vocab_size": 40,
    "hidden_size": 32,
    "ffn_dim": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
    "word_embed_proj_dim": 32,
}

#: Name of a kind: model class, config class, its arguments, PEFT's task type.
KINDS: dict[str, tuple[str, str, dict[str, Any], str]] = {
    "llama": ("LlamaForCausalLM", "LlamaConfig", GQA, "CAUSAL_LM"),
    "mistral": ("MistralForCausalLM", "MistralConfig", {**GQA, "sliding_window": 4}, "CAUSAL_LM"),
    "qwen2": (
        "Qwen2ForCausalLM",
        "Qwen2Config",
        {**GQA, "use_sliding_window": True, "sliding_window": 4, "max_window_layers": 1},
        "CAUSAL_LM",
    ),
    "qwen3": ("Qwen3ForCausalLM", "Qwen3Config", {**GQA, "head_dim": 16}, "CAUSAL_LM"),
    "gpt2": (
        "GPT2LMHeadModel",
        "GPT2Config",
        {
            "vocab_size": 40,
            "n_embd": 32,
            "n_layer": 2,
            "n_head": 4,
            "n_positions": 64,
            "bos_token_id": 1,
            "eos_token_id": 2,
        },
        "CAUSAL_LM",
    ),
    "gpt_neox": ("GPTNeoXForCausalLM", "GPTNeoXConfig", SIZES, "CAUSAL_LM"),
    "opt": ("OPTForCausalLM", "OPTConfig", OPT, "CAUSAL_LM"),
    # softcap; attention sinks and a sliding window; chunks
    "gemma2": (
        "Gemma2ForCausalLM",
        "Gemma2Config",
        {
            **GQA,
            "head_dim": 8,
            "sliding_window": 4,
            "query_pre_attn_scalar": 8,
            "attn_logit_softcapping": 0.5,
        },
        "CAUSAL_LM",
    ),
    "gemma": ("GemmaForCausalLM", "GemmaConfig", {**GQA, "head_dim": 8}, "CAUSAL_LM"),
    "gpt_oss": (
        "GptOssForCausalLM",
        "GptOssConfig",
        {
            **GQA,
            "head_dim": 8,
            "sliding_window": 4,
            "num_local_experts": 2,
            "num_experts_per_tok": 1,
            "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
        },
        "CAUSAL_LM",
    ),
    "llama4": (
        "Llama4ForCausalLM",
        "Llama4TextConfig",
        {
            **GQA,
            "head_dim": 8,
            "attention_chunk_size": 4,
            "num_local_experts": 1,
            "intermediate_size_mlp": 32,
        },
        "CAUSAL_LM",
    ),
    "bert": ("BertForSequenceClassification", "BertConfig", SIZES, "SEQ_CLS"),
    "roberta": (
        "RobertaForSequenceClassification",
        "RobertaConfig",
        {**SIZES, "pad_token_id": 1},
        "SEQ_CLS",
    ),
    "llama classifier": ("LlamaForSequenceClassification", "LlamaConfig", GQA, "SEQ_CLS"),
    "t5": ("T5ForConditionalGeneration", "T5Config", T5, "SEQ_2_SEQ_LM"),
    "bart": ("BartForConditionalGeneration", "BartConfig", BART, "SEQ_2_SEQ_LM"),
}


def model(kind: str, seed: int = 0, **changed: Any) -> nn.Module:
    """A model of a kind in eval mode, with weights wide enough to make attention uneven."""
    transformers = pytest.importorskip("transformers")
    cls, config, arguments, _ = KINDS[kind]
    torch.manual_seed(seed)
    built = getattr(transformers, cls)(getattr(transformers, config)(**{**arguments, **changed}))
    for name, parameter in built.named_parameters():
        if parameter.dim() > 1 and "lm_head" not in name:
            nn.init.normal_(parameter, std=0.15)
    return built.eval()


def task(kind: str) -> str:
    return KINDS[kind][3]


def tokens(rows: int = 3, length: int = 9, seed: int = 5) -> Tensor:
    return torch.randint(3, 40, (rows, length), generator=torch.Generator().manual_seed(seed))


def inputs(kind: str, ids: Tensor | None = None) -> dict[str, Tensor]:
    """Tokens, and labels that give a loss for the kind's task."""
    ids = tokens() if ids is None else ids
    labels = torch.arange(len(ids)) % 2 if task(kind) == "SEQ_CLS" else ids
    return {"input_ids": ids, "labels": labels}


def mask(kind: str) -> Tensor:
    """An attention mask ``[3, 9]``: a full row, ``"left"`` or ``"right"`` or ``"both"`` padded."""
    keep = torch.ones(3, 9, dtype=torch.int64)
    if kind in ("left", "both"):
        keep[1, :4] = 0
    if kind in ("right", "both"):
        keep[2, 6:] = 0
    return keep


# ---- with a prefix

P = 5
#: Without a window that PEFT's prefix would slide out of.
WIDE: dict[str, dict[str, Any]] = {
    "mistral": {"sliding_window": 40},
    "qwen2": {"use_sliding_window": False},
    "gemma2": {"sliding_window": 40},
}


def tuned(built: nn.Module, tokenizer: Any = None, **changed: Any) -> nn.Module:
    kind = next(k for k, v in KINDS.items() if v[0] == type(built).__name__)
    arguments = {"task_type": task(kind), "num_virtual_tokens": P, **changed}
    get_peft_model(built, PrefixTuningConfig(**arguments), tokenizer=tokenizer)
    return built.eval()


def encoder(built: nn.Module, name: str = "default") -> PrefixEncoder:
    found = built.prompt_adapters.adapters[name]
    assert isinstance(found, PrefixEncoder)
    return found


def with_peft(kind: str, **changed: Any) -> tuple[nn.Module, nn.Module]:
    """The same model with the same prefix, ours and PEFT's."""
    peft = pytest.importorskip("peft")
    theirs = peft.get_peft_model(
        model(kind, **WIDE.get(kind, {})),
        peft.PrefixTuningConfig(task_type=task(kind), num_virtual_tokens=P, **changed),
    ).eval()
    ours = tuned(model(kind, **WIDE.get(kind, {})), **changed)
    if changed.get("prefix_projection"):
        encoder(ours).load_encoder_state(theirs.prompt_encoder["default"].state_dict())
    else:
        encoder(ours).load_prompt_embeddings(theirs.get_prompt_embedding_to_save("default"))
    return ours, theirs


def grad_of(embeddings: PrefixEncoder) -> Tensor:
    """The gradient in the layout of PEFT's parameter."""
    assert embeddings.folded
    grads = [torch.zeros_like(p) if p.grad is None else p.grad for p in embeddings.prefix]
    return torch.stack(grads).permute(3, 0, 1, 2, 4).reshape(P, -1)


class Words:
    """A tokenizer of numbers."""

    def __call__(self, text: str, **kwargs: Any) -> dict[str, list[int]]:
        return {"input_ids": [int(word) for word in text.split()]}


def rand(*shape: int, seed: int = 1) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def before(tokens: Tensor, x: Tensor, batch_first: bool) -> Tensor:
    if x.dim() == 2:
        return torch.cat((tokens, x))
    if batch_first:
        return torch.cat((tokens.expand(x.shape[0], -1, -1), x), dim=1)
    return torch.cat((tokens[:, None].expand(-1, x.shape[1], -1), x), dim=0)
