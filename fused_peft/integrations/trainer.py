"""For transformers' Trainer: checkpoints that hold a PEFT adapter, not the base model."""

from __future__ import annotations

import functools
import os
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import TrainerCallback

from ..checkpoint import save_adapter
from ..checkpoint._modules import unwrap
from ..tuners import active_adapters, check_optimizer

# What Trainer looks for when it resumes, or takes the best checkpoint.
_RESUME_NAME = "model.safetensors"


class AdapterCheckpointCallback(TrainerCallback):
    """Saves, in each of Trainer's checkpoints, the active adapters and nothing of the base model.

    ::

        trainer = Trainer(model, args, train_dataset=data, callbacks=[AdapterCheckpointCallback()])

    A checkpoint folder is one that ``PeftModel.from_pretrained`` and
    :func:`fused_peft.load_adapter` read. Beside the adapter there is what Trainer itself needs to
    resume, or to load the best model at the end: ``model.safetensors`` with the trained parameters
    under their names in the model. ``trainer.save_model(path)`` writes the adapter alone. From the
    first Trainer on, ``model.save_pretrained`` does so too (:func:`save_adapters_only`).

    Before training it checks the optimizer: :func:`fused_peft.check_optimizer`.
    """

    def on_init_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Before anything is saved or loaded."""
        save_adapters_only(kwargs["model"])

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Raise ValueError where the optimizer would not train the adapter."""
        optimizer = kwargs.get("optimizer")
        # FSDP and DeepSpeed train parameters of their own in place of the model's.
        if optimizer is not None and not (args.fsdp or args.deepspeed):
            check_optimizer(unwrap(kwargs["model"]), optimizer)

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Put what is trained beside the adapter, for Trainer to go on from."""
        folder = Path(args.output_dir) / f"checkpoint-{state.global_step}"
        if args.should_save and folder.is_dir():
            part = folder / f"{_RESUME_NAME}.part"
            save_file(_trained_state(unwrap(kwargs["model"])), part, {"format": "pt"})
            part.replace(folder / _RESUME_NAME)


def save_adapters_only(model: nn.Module) -> None:
    """Let ``model.save_pretrained(path)`` write the active adapters, as that of a PeftModel does.

    An adapter not named "default" goes to ``path/<name>``, as with :func:`fused_peft.save_adapter`.
    To save the whole model with a LoRA adapter merged into it, merge and call
    ``type(model).save_pretrained(model, path)``.

    Args:
        model: a transformers model with an adapter; calling this twice changes nothing.

    Raises:
        ValueError: the model has no active adapter.
    """
    model = unwrap(model)
    if not active_adapters(model):
        raise ValueError(
            f"model {type(model).__name__} has no active adapter; expected one, from get_peft_model"
        )
    if "save_pretrained" in vars(model):
        return
    # No bound method and no closure: the model could not be pickled with them.
    model.__dict__["save_pretrained"] = functools.partial(_save_adapters, model)
    loading = _LoadTrained()
    model.register_load_state_dict_pre_hook(loading.before)  # type: ignore[no-untyped-call]
    model.register_load_state_dict_post_hook(loading.after)  # type: ignore[no-untyped-call]


class _LoadTrained:
    """Hooks: where ``load_state_dict`` gets all that is trained, the base model is not missing."""

    def __init__(self) -> None:
        self.trained_only = False

    def before(self, module: nn.Module, state_dict: dict[str, Any], prefix: str, *_: Any) -> None:
        self.trained_only = not prefix and state_dict.keys() == _trained_state(module).keys()

    def after(self, module: nn.Module, incompatible: Any) -> None:
        if self.trained_only:
            incompatible.missing_keys.clear()


def _save_adapters(
    model: nn.Module,
    save_directory: str | os.PathLike[str],
    is_main_process: bool = True,
    state_dict: dict[str, Tensor] | None = None,
    **unused: Any,
) -> None:
    """What takes the place of ``save_pretrained``, with its first arguments."""
    if is_main_process:
        for name in active_adapters(model):
            save_adapter(model, save_directory, name)


def _trained_state(model: nn.Module) -> dict[str, Tensor]:
    """The trained parameters by name, and the buffers of the modules that have any."""
    named: dict[str, Tensor] = {
        name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad
    }
    owners = {name.rpartition(".")[0] for name in named}
    state = model.state_dict()
    return {
        name: tensor.detach().contiguous()
        for name, tensor in state.items()
        if name in named or _is_buffer_of(model, name, owners)
    }


def _is_buffer_of(model: nn.Module, name: str, owners: set[str]) -> bool:
    owner, _, leaf = name.rpartition(".")
    return owner in owners and leaf in model.get_submodule(owner)._buffers
