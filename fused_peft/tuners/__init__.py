"""What puts adapters into an existing model."""

from .config import LoraConfig
from .lora import (
    active_adapters,
    add_adapter,
    delete_adapter,
    disable_adapter,
    get_peft_model,
    inject_adapter,
    set_adapter,
)
from .merging import merge_adapter, unmerge_adapter
from .modules_to_save import ModulesToSaveWrapper
from .prompt_config import (
    PROMPT_CONFIGS,
    PrefixTuningConfig,
    PromptEncoderConfig,
    PromptLearningConfig,
    PromptTuningConfig,
    PTuningConfig,
)
from .prompt_resolve import resolve_prompt_config
from .trainable import (
    check_optimizer,
    get_nb_trainable_parameters,
    print_trainable_parameters,
    trainable_parameters,
)

__all__ = [
    "PROMPT_CONFIGS",
    "LoraConfig",
    "ModulesToSaveWrapper",
    "PTuningConfig",
    "PrefixTuningConfig",
    "PromptEncoderConfig",
    "PromptLearningConfig",
    "PromptTuningConfig",
    "active_adapters",
    "add_adapter",
    "check_optimizer",
    "delete_adapter",
    "disable_adapter",
    "get_nb_trainable_parameters",
    "get_peft_model",
    "inject_adapter",
    "merge_adapter",
    "print_trainable_parameters",
    "resolve_prompt_config",
    "set_adapter",
    "trainable_parameters",
    "unmerge_adapter",
]
