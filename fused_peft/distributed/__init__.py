"""What LoRA layers need beyond torch's own engine on many processes.

DistributedDataParallel and ``fully_shard`` take models with adapters as they are. Tensor
parallelism needs styles that split ``lora_A`` and ``lora_B`` along with the weight:
:class:`ColwiseLoraParallel` and :class:`RowwiseLoraParallel`. Importing this package imports
``torch.distributed.tensor``; ``import fused_peft`` does not.
"""

from .checkpoint import save_adapter
from .gradients import clip_grad_norm_, parameter_groups
from .tensor_parallel import (
    ColwiseLoraParallel,
    RowwiseLoraParallel,
    TensorParallelLoraLinear,
)

__all__ = [
    "ColwiseLoraParallel",
    "RowwiseLoraParallel",
    "TensorParallelLoraLinear",
    "clip_grad_norm_",
    "parameter_groups",
    "save_adapter",
]
