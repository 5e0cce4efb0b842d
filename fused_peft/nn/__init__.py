"""Layers that compute with adapters."""

from .lora_linear import LoraLinear
from .prefix_attention import PrefixAttention, PrefixMultiheadAttention
from .prefix_encoder import PrefixEncoder
from .prompt_adapters import PromptAdapters
from .prompt_embedding import PromptEmbedding
from .prompt_encoder import PromptEncoder

__all__ = [
    "LoraLinear",
    "PrefixAttention",
    "PrefixEncoder",
    "PrefixMultiheadAttention",
    "PromptAdapters",
    "PromptEmbedding",
    "PromptEncoder",
]
