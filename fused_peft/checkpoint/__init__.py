"""Adapters on disk in Hugging Face PEFT's format: what either library saves, the other loads.

A directory holds ``adapter_config.json`` and ``adapter_model.safetensors``; an adapter that is not
named "default" gets a directory of its own below, ``<path>/<name>/``. The adapter's name is in
neither file. Tensors are named as in PEFT 0.21 (``peft/utils/save_and_load.py``), with
``<module>`` the path in the model that was given to ``get_peft_model``:

==============================================  ==================================================
``base_model.model.<module>.lora_A.weight``     ``[r, K]``
``base_model.model.<module>.lora_B.weight``     ``[N, r]``
``base_model.model.<module>.base_layer.bias``   ``[N]``, with ``bias="lora_only"`` or ``"all"``
``base_model.model.<module>.bias``              every other bias, with ``bias="all"``
``base_model.model.<module>.<parameter>``       a module of ``modules_to_save``
``...<embedding>.base_layer.weight``            input or output embedding with an adapter on it
``...<embedding>.weight``                       both, where the vocabulary was resized
==============================================  ==================================================

Of prefix tuning, prompt tuning and P-tuning there is what the virtual tokens are in the end:

==============================================  ==================================================
``prompt_embeddings`` (prefix tuning)           ``[P, 2 * layers * token_dim]``: layer 0's keys,
                                                its values, layer 1's keys ...
``prompt_embeddings`` (the other two)           ``[P * submodules, token_dim]``
``base_model.<module>.<parameter>``             a module of ``modules_to_save``
==============================================  ==================================================

The MLP or LSTM that computes them is saved beside, in ``prompt_encoder.safetensors``, and what
PEFT's config cannot say in ``fused_peft_config.json``; PEFT reads neither.

All files change at once: a save that is killed at any moment leaves the old adapter or the new
one, whole, and every other file in the directory stays as it is. How
is told in ``fused_peft/checkpoint/_atomic.py``.

Nothing here reads or writes pickle.
"""

from ._adapters import load_adapter, save_adapter
from ._files import CONFIG_NAME, PEFT_VERSION, WEIGHTS_NAME

__all__ = ["CONFIG_NAME", "PEFT_VERSION", "WEIGHTS_NAME", "load_adapter", "save_adapter"]
