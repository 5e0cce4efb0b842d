"""Optimizer groups and gradient norm of parameters that are split in different ways."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor


def parameter_groups(parameters: Iterable[Tensor]) -> list[dict[str, Any]]:
    """The parameters as optimizer groups: one for each device mesh, one for plain tensors.

    torch's foreach and fused optimizers take a group in one call, which refuses to mix tensors of
    different meshes, or DTensors with plain tensors. A model has such a mix where only some of the
    adapted layers are in the plan of ``parallelize_module``.

    Args:
        parameters: those to train; others may be among them and are left out.

    Returns:
        ``[{"params": [...]}, ...]`` for a ``torch.optim`` optimizer, in the order of appearance.
    """
    by_mesh: dict[DeviceMesh | None, list[Tensor]] = {}
    for parameter in parameters:
        if parameter.requires_grad:
            by_mesh.setdefault(_mesh(parameter), []).append(parameter)
    return [{"params": members} for members in by_mesh.values()]


@torch.no_grad()
def clip_grad_norm_(
    parameters: Iterable[Tensor], max_norm: float, norm_type: float = 2.0
) -> Tensor:
    """``torch.nn.utils.clip_grad_norm_`` over parameters of several meshes, and plain ones.

    The norm is that of the whole gradients, wherever their parts lie, so it is the same in every
    process. A plain gradient counts once: it is taken to be the same everywhere, as those of
    replicated parameters are. Every process has to call it.

    Args:
        parameters: those without a gradient are passed over.
        max_norm: the gradients are scaled down to this norm where theirs is above.
        norm_type: p of the p-norm; may be ``float("inf")``.

    Returns:
        The norm before clipping, a plain tensor without dimensions.
    """
    by_mesh: dict[DeviceMesh | None, list[Tensor]] = {}
    for parameter in parameters:
        if parameter.grad is not None:
            by_mesh.setdefault(_mesh(parameter.grad), []).append(parameter)
    norms = []
    for members in by_mesh.values():
        grads = [parameter.grad for parameter in members if parameter.grad is not None]
        norm = torch.nn.utils.get_total_norm(grads, norm_type)
        norms.append(norm.full_tensor() if isinstance(norm, DTensor) else norm)
    if not norms:
        return torch.tensor(0.0)
    total: Tensor = torch.linalg.vector_norm(torch.stack(norms), norm_type)
    for members in by_mesh.values():
        torch.nn.utils.clip_grads_with_norm_(members, max_norm, total)
    return total


def _mesh(tensor: Tensor) -> DeviceMesh | None:
    return tensor.device_mesh if isinstance(tensor, DTensor) else None
