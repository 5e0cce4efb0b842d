"""How a new pair ``lora_a[R, K]``, ``lora_b[N, R]`` starts: the values of ``init_lora_weights``."""

from __future__ import annotations

import contextlib
import math
import re
from collections.abc import Iterator

import torch
from torch import Tensor, nn

INIT_KINDS = "True, False, 'gaussian', 'orthogonal', 'olora', 'pissa' or 'pissa_niter_<count>'"
_PISSA_NITER = re.compile(r"pissa_niter_(\d+)")


@contextlib.contextmanager
def full_precision(device: torch.device) -> Iterator[None]:
    """No gradient and no autocast, in which weight arithmetic would lose its digits."""
    if torch.amp.is_autocast_available(device.type):
        with torch.no_grad(), torch.autocast(device.type, enabled=False):
            yield
    else:
        with torch.no_grad():
            yield


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype that weights of ``dtype`` are added and decomposed in."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def check_init_kind(kind: object) -> bool | str:
    """``kind`` in its canonical spelling.

    Raises:
        ValueError: it is none of :data:`INIT_KINDS`.
    """
    if isinstance(kind, bool):
        return kind
    if isinstance(kind, str):
        lowered = kind.lower()
        if lowered in ("gaussian", "orthogonal", "olora", "pissa"):
            return lowered
        if _PISSA_NITER.fullmatch(lowered):
            return lowered
    raise ValueError(f"init_lora_weights is {kind!r}; expected {INIT_KINDS}")


def changes_base_weight(kind: bool | str) -> bool:
    """Whether ``scaling * lora_b @ lora_a`` is to be taken out of the base weight at the start."""
    return isinstance(kind, str) and (kind == "olora" or kind.startswith("pissa"))


def check_init_fits(kind: bool | str, r: int, weight: Tensor) -> None:
    """Say what would make :func:`init_pair` fail, before anything is built.

    Args:
        kind: a canonical init kind.
        r: the rank.
        weight: ``[N, K]`` or its transpose.

    Raises:
        ValueError: an odd rank for "orthogonal"; for "pissa" and "olora" a rank above min(N, K), a
            weight without data (meta device) or with a value that is not finite.
    """
    if kind == "orthogonal" and r % 2:
        raise ValueError(f"r is {r}; init_lora_weights='orthogonal' needs an even rank")
    if not changes_base_weight(kind):
        return
    limit = min(weight.shape)
    if r > limit:
        raise ValueError(
            f"r is {r}; init_lora_weights={kind!r} needs r <= {limit}, the smaller side of the "
            f"weight {tuple(weight.shape)}"
        )
    if weight.is_meta:
        raise ValueError(
            f"weight is on the meta device; init_lora_weights={kind!r} needs its values"
        )
    if not torch.isfinite(weight.detach()).all():
        raise ValueError(f"weight has NaN or infinity; init_lora_weights={kind!r} decomposes it")


def init_pair(
    kind: bool | str, r: int, scaling: float, weight: Tensor, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """A fresh ``lora_a [R, K]`` and ``lora_b [N, R]`` in ``dtype`` on the weight's device.

    ============================ ==============================================================
    True                         A kaiming-uniform with a = sqrt(5), B zero (Hu et al. 2021)
    False                        A and B both kaiming-uniform: the adapter is no identity
    "gaussian"                   A normal with standard deviation 1/r, B zero
    "orthogonal"                 A and B random in complementary halves of an orthogonal basis,
                                 so that B A = 0 (datta0.github.io/posts/rethink-lora-init)
    "pissa", "pissa_niter_<n>"   the leading singular triplets of W (Meng et al. 2024, eq. 2-4);
                                 with <n>, from a randomized SVD of n iterations
    "olora"                      the leading columns and rows of W = Q R (Bueyuekakyuez 2024)
    ============================ ==============================================================

    For the last two the caller takes ``scaling * lora_b @ lora_a`` out of the weight.

    Args:
        kind: a canonical init kind that passed ``check_init_fits``.
        r: the rank.
        scaling: alpha/r or alpha/sqrt(r).
        weight: ``[N, K]``; read by "pissa" and "olora" only.
        dtype: of both.
    """
    with full_precision(weight.device):
        if kind == "orthogonal":
            lora_a, lora_b = _orthogonal(r, weight)
        elif kind == "olora":
            q, upper = torch.linalg.qr(weight.to(compute_dtype(weight.dtype)))
            lora_a, lora_b = upper[:r], q[:, :r]
        elif isinstance(kind, str) and kind.startswith("pissa"):
            lora_a, lora_b = _pissa(kind, r, scaling, weight)
        else:
            lora_a, lora_b = _random(kind, r, weight)
        # contiguous: a slice of q would keep all of q alive, and the kernels want whole rows.
        return lora_a.to(dtype).contiguous(), lora_b.to(dtype).contiguous()


def _empty(shape: tuple[int, int], weight: Tensor) -> Tensor:
    return torch.empty(shape, dtype=compute_dtype(weight.dtype), device=weight.device)


def _random(kind: bool | str, r: int, weight: Tensor) -> tuple[Tensor, Tensor]:
    lora_a, lora_b = _empty((r, weight.shape[1]), weight), _empty((weight.shape[0], r), weight)
    if kind == "gaussian":
        nn.init.normal_(lora_a, std=1 / r)
    else:
        nn.init.kaiming_uniform_(lora_a, a=math.sqrt(5))
    if kind is False:
        nn.init.kaiming_uniform_(lora_b, a=math.sqrt(5))
    else:
        nn.init.zeros_(lora_b)
    return lora_a, lora_b


def _orthogonal(r: int, weight: Tensor) -> tuple[Tensor, Tensor]:
    basis, _ = torch.linalg.qr(_empty((r, r), weight).normal_())
    for_a = _empty((weight.shape[1], r // 2), weight).normal_()
    for_b = _empty((weight.shape[0], r // 2), weight).normal_()
    return (for_a @ basis[0::2]).t() / 10.0, (for_b @ basis[1::2]) / 10.0


def _pissa(kind: str, r: int, scaling: float, weight: Tensor) -> tuple[Tensor, Tensor]:
    full = weight.to(compute_dtype(weight.dtype))
    iterations = _PISSA_NITER.fullmatch(kind)
    if iterations is None:
        u, s, vh = torch.linalg.svd(full, full_matrices=False)
    else:
        u, s, v = torch.svd_lowrank(full, r, niter=int(iterations[1]))
        vh = v.t()
    root = torch.sqrt(s[:r] / scaling)
    return root[:, None] * vh[:r], u[:, :r] * root
