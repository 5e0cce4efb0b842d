"""Layers that compute with adapters."""

from .lora_layer import LoraLayer
from .lora_linear import LoraLinear
from .lora_wrapped import LoraWrappedLinear
from .prefix_attention import PrefixAttention, PrefixMultiheadAttention
from .prefix_encoder import PrefixEncoder
from .prompt_adapters import PromptAdapters
from .prompt_embedding import PromptEmbedding
from .prompt_encoder import PromptEncoder

__all__ = [
    "LoraLayer",
    "LoraLinear",
    "LoraWrappedLinear",
    "PrefixAttention",
    "PrefixEncoder",
    "PrefixMultiheadAttention",
    "PromptAdapters",
    "PromptEmbedding",
    "PromptEncoder",
]
