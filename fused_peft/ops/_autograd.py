"""Autograd of the ops whose kernels form gradients: one formula for compiled graphs and for eager.

Such an op is a pair of schemas: ``name`` gives the result and what its backward pass needs of it
besides, ``name_backward`` the gradients.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ._devices import kernel_op

Kernel = Callable[..., tuple[Tensor, ...]]
Gradients = tuple[Tensor | None, ...]


class DifferentiableOp:
    """An op and its backward op, with their shape functions and autograd registered.

    Calling it takes all operands of the op's schema and gives the result alone.

    Args:
        name: the op's, without its namespace.
        fake: the op's shape function.
        backward_fake: the backward op's shape function.
        save: ``save(ctx, operands, result, rest)`` keeps what ``gradients`` reads.
        gradients: ``gradients(ctx, dresult, backward)`` gives those of the first operands, by
            calling ``backward`` as the backward op's schema says. Those that
            ``ctx.needs_input_grad`` does not ask for, and the further operands', become None.
        cuda: whether CUDA kernels exist, which stand in on the simulated device.
    """

    def __init__(
        self,
        name: str,
        *,
        fake: Kernel,
        backward_fake: Kernel,
        save: Callable[[Any, tuple[Any, ...], Tensor, Tensor], None],
        gradients: Callable[[Any, Tensor, Kernel], Gradients],
        cuda: bool = True,
    ) -> None:
        self.name, self._backward_name = name, f"{name}_backward"
        self._op = getattr(torch.ops.fused_peft, name).default
        self._backward_op = getattr(torch.ops.fused_peft, self._backward_name).default
        self._save, self._gradients, self._cuda = save, gradients, cuda
        self._eager = _eager_function(self)
        torch.library.register_fake(f"fused_peft::{name}", fake)
        torch.library.register_fake(f"fused_peft::{self._backward_name}", backward_fake)
        torch.library.register_autograd(
            f"fused_peft::{name}", self._backward, setup_context=self._setup_context
        )
        refuse_second_derivative(name)

    def __call__(self, *operands: Any) -> Tensor:
        if torch.compiler.is_compiling():
            return self._op(*operands)[0]  # type: ignore[no-any-return]
        if torch.is_grad_enabled():
            return self._eager.apply(*operands)  # type: ignore[no-any-return, no-untyped-call]
        return self.kernel(*operands)[0]

    # ---- below autograd

    def kernel(self, *operands: Any) -> tuple[Tensor, ...]:
        """The op's kernel in force."""
        with torch._C._AutoDispatchBelowAutograd():
            op = kernel_op(self.name) if self._cuda else self._op
            return op(*operands)  # type: ignore[no-any-return]

    def backward_kernel(self, *operands: Any) -> tuple[Tensor, ...]:
        """The backward op's kernel in force."""
        with torch._C._AutoDispatchBelowAutograd():
            op = kernel_op(self._backward_name) if self._cuda else self._backward_op
            return op(*operands)  # type: ignore[no-any-return]

    # ---- the formula

    def keep(self, ctx: Any, operands: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        """Save for the backward pass."""
        ctx.set_materialize_grads(False)
        self._save(ctx, operands, *output)

    def formula(self, ctx: Any, dresult: Tensor | None, backward: Kernel | None) -> Gradients:
        """The operands' gradients by ``backward``; None: by the op, which refuses what follows."""
        needed = ctx.needs_input_grad
        if dresult is None:
            return (None,) * len(needed)
        found = self._gradients(ctx, dresult, backward or self._backward_op)
        wanted = [grad if need else None for grad, need in zip(found, needed, strict=False)]
        return (*wanted, *(None,) * (len(needed) - len(found)))

    def _setup_context(self, ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        ctx.mark_non_differentiable(*output[1:])
        self.keep(ctx, inputs, output)

    def _backward(self, ctx: Any, dresult: Tensor | None, *_drest: Tensor | None) -> Gradients:
        return self.formula(ctx, dresult, None)


def _eager_function(op: DifferentiableOp) -> type[torch.autograd.Function]:
    class EagerFunction(torch.autograd.Function):
        """Cheaper to call than register_autograd's path.

        That one is Python at the autograd key and again below it. A forward and backward pass of a
        LoRA layer of 17 x 8 x 8, which is all overhead, takes 68 us through it and 47 us through
        this.
        """

        @staticmethod
        def forward(ctx: Any, *operands: Any) -> Tensor:
            output = op.kernel(*operands)
            op.keep(ctx, operands, output)
            return output[0]

        @staticmethod
        def backward(ctx: Any, *grads: Tensor | None) -> Gradients:
            create_graph = torch.is_grad_enabled()
            return op.formula(ctx, grads[0], None if create_graph else op.backward_kernel)

    # The name that profilers and errors show, with "Backward" behind it.
    return type(op.name.title().replace("_", ""), (EagerFunction,), {})


def refuse_second_derivative(name: str) -> None:
    """Let the backward op of op ``name`` raise where it would be differentiated itself."""

    def refuse(ctx: Any, *_grads: Tensor | None) -> None:
        raise RuntimeError(
            f"fused_peft::{name} has no second derivative; fused_peft.reference.{name} is "
            "differentiable any number of times"
        )

    torch.library.register_autograd(f"fused_peft::{name}_backward", refuse)
