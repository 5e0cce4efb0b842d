"""LoRA layers split over the processes of one mesh dimension.

Shoeybi et al., "Megatron-LM", 2019, section 3, split a weight ``[N, K]`` by its rows
("column-wise", after the columns of ``W^T``) or its columns ("row-wise"). Of ``lora_a [R, K]``,
``lora_b [N, R]`` the factor that has the split side is split along, the other one is whole in every
process. Then each process runs the fused op on its parts, and nothing has to be sent for the
adapter that is not sent for the base layer:

===========  ===========================================  =========================================
             column-wise                                  row-wise
===========  ===========================================  =========================================
x            whole                                        columns
weight       rows                                         columns
lora_a       whole                                        columns
lora_b       rows                                         whole
bias         rows                                         whole, added in the first process
y            columns: W_i x + B_i (A x)                   a term of the sum: W_i x_i + B (A_i x_i)
gradients    dx and dlora_a are terms of sums             dlora_b is a term of a sum
===========  ===========================================  =========================================

Row-wise, ``s = A x`` is itself a sum over the processes. ``B s`` is linear in it, so its terms join
those of ``W x`` before the one reduction of y: the alternative, a reduction of s first, would cost
a second message in every layer's forward and backward. What is summed besides is the gradient of
the whole factor, R (K or N) elements a layer and step.
"""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Partial, Placement, Replicate, Shard
from torch.distributed.tensor import distribute_tensor as distribute
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel

from .. import reference
from ..nn.adapter_spec import AdapterSpec
from ..nn.initializers import changes_base_weight
from ..nn.lora_linear import LoraLinear


class ColwiseLoraParallel(ColwiseParallel):
    """torch's ColwiseParallel, also for LoraLinear: output features are split.

    For use in the plan of ``torch.distributed.tensor.parallel.parallelize_module``. Any other
    module is torch's business, so one plan serves a model whichever of its layers are adapted.

    Args:
        input_layouts: how x comes in; Replicate by default. ``Shard(1)`` gathers a sequence.
        output_layouts: how y goes out; ``Shard(-1)`` by default.
        use_local_output: y is this process's part, not a DTensor.

    Raises:
        ValueError: N is no multiple of the number of processes.
        RuntimeError: the layer is split already.
    """

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        if not isinstance(module, LoraLinear):
            return super()._apply(module, device_mesh)
        return _split_layer(module, device_mesh, self, split_dim=0)


class RowwiseLoraParallel(RowwiseParallel):
    """torch's RowwiseParallel, also for LoraLinear: input features are split.

    For use as :class:`ColwiseLoraParallel`.

    Args:
        input_layouts: how x comes in; ``Shard(-1)`` by default.
        output_layouts: how y goes out; Replicate by default. ``Shard(1)`` scatters a sequence.
        use_local_output: y is this process's part, not a DTensor.

    Raises:
        ValueError: K is no multiple of the number of processes.
        RuntimeError: the layer is split already.
    """

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        if not isinstance(module, LoraLinear):
            return super()._apply(module, device_mesh)
        return _split_layer(module, device_mesh, self, split_dim=1)


class TensorParallelLoraLinear(LoraLinear):
    """A LoraLinear whose parameters are DTensors; :class:`ColwiseLoraParallel` makes it.

    Adapters are added, merged, deleted, saved and loaded as ever, by all processes together.

    Dropout draws from torch's default generator, which therefore has to be in the same state in all
    processes of the mesh dimension, as for any other dropout between split layers. Column-wise all
    of them then drop the same elements of x; row-wise each its own, by the seed plus its rank.

    Attributes:
        mesh: the one dimension of processes over which it is split.
        split_dim: of the weight ``[N, K]``: 0 column-wise, 1 row-wise.
    """

    mesh: DeviceMesh
    split_dim: int
    _input_layouts: tuple[Placement, ...]
    _output_layouts: tuple[Placement, ...]
    _use_local_output: bool

    def _take_layouts(self, mesh: DeviceMesh, split_dim: int, style: Any) -> None:
        self.mesh, self.split_dim = mesh, split_dim
        self._input_layouts, self._output_layouts = style.input_layouts, style.output_layouts
        self._use_local_output = style.use_local_output

    def forward(self, x: Tensor) -> Tensor:
        """``[..., K] -> [..., N]``, each as the style's layouts say."""
        local = self._forward_general(self._local_input(x))
        made: Placement = Shard(local.ndim - 1) if self.split_dim == 0 else Partial()
        y = DTensor.from_local(local, self.mesh, (made,), run_check=False)
        goal = tuple(_from_front(p, local.ndim) for p in self._output_layouts)
        if y.placements != goal:
            y = y.redistribute(placements=goal)
        return y.to_local() if self._use_local_output else y

    def _local_input(self, x: Tensor) -> Tensor:
        given = (
            x
            if isinstance(x, DTensor)
            else DTensor.from_local(x, self.mesh, self._input_layouts, run_check=False)
        )
        wanted: Placement = Replicate() if self.split_dim == 0 else Shard(x.ndim - 1)
        if given.placements != (wanted,):
            given = given.redistribute(placements=(wanted,))
        # Column-wise every process has a term of dx: that of its own output features.
        dx_placement: Placement = Partial() if self.split_dim == 0 else wanted
        return given.to_local(grad_placements=(dx_placement,))

    def _base(self) -> tuple[Tensor, Tensor | None]:
        weight = self._local(self.weight)
        weight = weight.t() if self.fan_in_fan_out else weight
        whole_bias = self._parameters["bias"]
        if whole_bias is None:
            return weight, None
        bias = self._local(whole_bias)
        if self.split_dim == 1 and self.mesh.get_local_rank() != 0:
            # y is a sum over the processes. A trained bias has the same gradient in all of them,
            # for dy is whole in each.
            return weight, bias - bias.detach() if bias.requires_grad else None
        return weight, bias

    def _factors(self, name: str) -> tuple[Tensor, Tensor]:
        if self.split_dim == 0:
            return self._local_of_whole(self.lora_A[name]), self._local(self.lora_B[name])
        return self._local(self.lora_A[name]), self._local_of_whole(self.lora_B[name])

    def _local(self, parameter: Tensor) -> Tensor:
        return self._checked(parameter).to_local()

    def _local_of_whole(self, parameter: Tensor) -> Tensor:
        """A whole factor, whose gradients in the processes are to be summed."""
        # redistribute changes nothing on the way forward; backward it is what sums.
        whole = self._checked(parameter).redistribute(placements=(Replicate(),))
        return whole.to_local(grad_placements=(Partial(),))

    def _checked(self, parameter: Tensor) -> DTensor:
        if not isinstance(parameter, DTensor) or parameter.device_mesh.ndim != 1:
            raise RuntimeError(
                "a parameter is sharded by fully_shard now; call the module that was given to "
                "fully_shard, which gathers it"
            )
        return parameter

    def _new_seed(self, x: Tensor) -> Tensor:
        seed = super()._new_seed(x)
        return seed if self.split_dim == 0 else seed + self.mesh.get_local_rank()

    def _dropped(self, x: Tensor, p: float) -> Tensor:
        # Not F.dropout, which knows no seed: row-wise each process needs a mask of its own.
        keep = reference.dropout_keep(x.shape, p, self._new_seed(x))
        return torch.where(keep, x / (1.0 - p), torch.zeros_like(x))

    def check_start(self, kind: bool | str, r: int) -> None:
        """As LoraLayer's; no start may decompose the weight, of which each process has a part."""
        super().check_start(kind, r)
        if changes_base_weight(kind):
            raise ValueError(
                f"init_lora_weights is {kind!r} and the weight is split over processes; add the "
                "adapter before parallelize_module"
            )

    def new_pair(self, spec: AdapterSpec, dtype: torch.dtype | None) -> tuple[Tensor, Tensor]:
        """As LoraLayer's, split; the values are those of the mesh's first process."""
        return self._split_pair(*super().new_pair(spec, dtype), 0)

    def install(self, name: str, spec: AdapterSpec, lora_a: Tensor, lora_b: Tensor) -> None:
        """As LoraLayer's; the values are those of the mesh's first process."""
        super().install(name, spec, *self._split_pair(lora_a, lora_b, 0))

    def _split_pair(
        self, lora_a: Tensor, lora_b: Tensor, source: int | None
    ) -> tuple[DTensor, DTensor]:
        whole, part = Replicate(), Shard(self.split_dim)
        placements = (whole, part) if self.split_dim == 0 else (part, whole)
        a, b = (
            distribute(factor.detach(), self.mesh, (placement,), src_data_rank=source)
            for factor, placement in zip((lora_a, lora_b), placements, strict=True)
        )
        return a, b

    def check_mergeable(self) -> None:
        """Raise ValueError where fully_shard has the parts of the weight in turn."""
        if getattr(self.weight, "device_mesh", self.mesh).ndim != 1:
            super().check_mergeable()

    def extra_repr(self) -> str:
        """As LoraLinear's, and how the layer is split."""
        how = ("column", "row")[self.split_dim]
        return f"{super().extra_repr()}, split {how}-wise over {self.mesh.size()} processes"


def _from_front(placement: Placement, ndim: int) -> Placement:
    if isinstance(placement, Shard) and placement.dim < 0:
        return Shard(placement.dim + ndim)
    return placement


def _split_layer(layer: LoraLinear, mesh: DeviceMesh, style: Any, split_dim: int) -> nn.Module:
    _check_splittable(layer, mesh, split_dim)
    source = style.src_data_rank
    parameters: dict[str, nn.Parameter | None] = {}
    stored = 1 - split_dim if layer.fan_in_fan_out else split_dim
    placements: dict[str, Placement] = {
        "weight": Shard(stored),
        "bias": Shard(0) if split_dim == 0 else Replicate(),
    }
    for name, placement in placements.items():
        parameter = layer._parameters[name]
        if parameter is None:
            continue
        split = distribute(parameter.detach(), mesh, (placement,), src_data_rank=source)
        parameters[name] = nn.Parameter(split, requires_grad=parameter.requires_grad)
    # The same object, for whoever holds it; its class says how its parameters lie.
    layer.__class__ = TensorParallelLoraLinear
    split_layer = cast(TensorParallelLoraLinear, layer)
    split_layer._take_layouts(mesh, split_dim, style)
    layer._parameters.update(parameters)
    for name in layer.r:
        old = layer.lora_A[name], layer.lora_B[name]
        new = split_layer._split_pair(*old, source)
        for by_name, was, factor in zip((layer.lora_A, layer.lora_B), old, new, strict=True):
            by_name[name] = nn.Parameter(factor, requires_grad=was.requires_grad)
    return layer


def _check_splittable(layer: LoraLinear, mesh: DeviceMesh, split_dim: int) -> None:
    if type(layer) is not LoraLinear:
        raise RuntimeError(
            f"the layer is a {type(layer).__name__}; expected a LoraLinear that is not split yet, "
            "and parallelize_module before fully_shard"
        )
    if mesh.ndim != 1:
        raise ValueError(
            f"device_mesh has {mesh.ndim} dimensions; expected one of them: mesh['tp']"
        )
    features = (layer.out_features, layer.in_features)[split_dim]
    if features % mesh.size():
        what = ("out_features", "in_features")[split_dim]
        raise ValueError(
            f"{what} is {features}; expected a multiple of {mesh.size()}, the processes that the "
            "layer is split over"
        )
