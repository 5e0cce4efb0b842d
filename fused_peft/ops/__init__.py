"""The package's torch ops: shape functions, autograd, and the choice between kernel and fallback.

``torch.ops.fused_peft.*`` are the kernels themselves. The functions here are what layers call: they
check their arguments, follow autocast, and take :mod:`fused_peft.reference` wherever no kernel
covers the problem, with the same result.
"""

from ._common import MAX_RANK, autocast_dtype, new_seed
from ._frozen_layers import cross_entropy, rms_norm, swiglu
from ._lora_linear import fallback_reason, lora_linear
from ._lora_update import lora_update, update_fallback_reason
from ._prefix_attention import MAX_HEAD_DIM, attention_fallback_reason, prefix_attention

__all__ = [
    "MAX_HEAD_DIM",
    "MAX_RANK",
    "attention_fallback_reason",
    "autocast_dtype",
    "cross_entropy",
    "fallback_reason",
    "lora_linear",
    "lora_update",
    "new_seed",
    "prefix_attention",
    "rms_norm",
    "swiglu",
    "update_fallback_reason",
]
