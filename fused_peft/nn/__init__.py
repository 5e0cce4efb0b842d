"""Layers that compute with adapters."""

from .lora_linear import LoraLinear

__all__ = ["LoraLinear"]
