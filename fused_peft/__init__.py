"""Parameter-efficient fine-tuning of PyTorch models with fused kernels."""

from importlib.metadata import PackageNotFoundError, version

from fused_peft import ops, reference
from fused_peft.checkpoint import load_adapter, save_adapter
from fused_peft.diagnostics import explain
from fused_peft.errors import AdapterError
from fused_peft.integrations.fuse import fuse_model, unfuse_model
from fused_peft.integrations.transformers import use_fused_attention
from fused_peft.nn import (
    LoraLinear,
    LoraWrappedLinear,
    PrefixAttention,
    PrefixEncoder,
    PrefixMultiheadAttention,
    PromptAdapters,
    PromptEmbedding,
    PromptEncoder,
)
from fused_peft.ops import prefix_attention
from fused_peft.simulator import simulated_cuda
from fused_peft.tuners import (
    LoraConfig,
    PrefixTuningConfig,
    PromptEncoderConfig,
    PromptTuningConfig,
    PTuningConfig,
    add_adapter,
    check_optimizer,
    delete_adapter,
    disable_adapter,
    get_nb_trainable_parameters,
    get_peft_model,
    merge_adapter,
    print_trainable_parameters,
    set_adapter,
    trainable_parameters,
    unmerge_adapter,
)

try:
    __version__ = version("fused-peft")
except PackageNotFoundError:  # a source tree that is not installed
    __version__ = "0+unknown"

__all__ = [
    "AdapterError",
    "LoraConfig",
    "LoraLinear",
    "LoraWrappedLinear",
    "PTuningConfig",
    "PrefixAttention",
    "PrefixEncoder",
    "PrefixMultiheadAttention",
    "PrefixTuningConfig",
    "PromptAdapters",
    "PromptEmbedding",
    "PromptEncoder",
    "PromptEncoderConfig",
    "PromptTuningConfig",
    "add_adapter",
    "check_optimizer",
    "delete_adapter",
    "disable_adapter",
    "explain",
    "fuse_model",
    "get_nb_trainable_parameters",
    "get_peft_model",
    "load_adapter",
    "merge_adapter",
    "ops",
    "prefix_attention",
    "print_trainable_parameters",
    "reference",
    "save_adapter",
    "set_adapter",
    "simulated_cuda",
    "trainable_parameters",
    "unfuse_model",
    "unmerge_adapter",
    "use_fused_attention",
]
