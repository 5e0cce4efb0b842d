"""What the LoRA layer's CUDA kernels do, counted in the simulator, beside other designs."""

from __future__ import annotations

from typing import Any

import torch
from counts import Pass, print_launches, simulated_passes
from lora_peers import build
from timing import print_table
from torch import Tensor

import fused_peft
from fused_peft import LoraLinear, simulator


def count(shape: str, r: int, dtype: torch.dtype) -> dict[str, Any]:
    """Counts and prints one layer's forward and backward launches."""
    m, k, n = (int(part) for part in shape.split("x"))
    layer = build(["ours"], k, n, r, dtype, "cpu")["ours"]
    assert isinstance(layer, LoraLinear)
    x = torch.randn(m, k, dtype=dtype).requires_grad_()
    dy = torch.randn(m, n, dtype=dtype)
    update = 2 * m * r * (n + k)
    passes = simulated_passes(
        lambda: layer(x), dy, 2 * m * n * k + update, 2 * m * n * k + 2 * update
    )
    print_launches(shape, passes)
    print()
    print_designs(shape, r, dtype.itemsize, passes)
    print()
    errors = print_errors(shape, layer, x, dy)
    print()
    return {"shape": shape, "passes": [p.summary() for p in passes], "errors": errors}


def designs_on_paper(m: int, n: int, k: int, r: int, width: int) -> dict[str, list[list[int]]]:
    """Launches and bytes of forward and backward passes, each operand of a launch moved once."""

    def product(rows: int, cols: int, inner: int) -> int:
        return width * (rows * inner + cols * inner + rows * cols)

    def total(*launches: int) -> list[int]:
        return [len(launches), sum(launches)]

    def mul(rows: int, cols: int) -> int:
        return 2 * width * rows * cols

    def add(rows: int, cols: int) -> int:
        return 3 * width * rows * cols

    factors, s = width * r * (n + k), width * m * r
    operands = width * (m * n + n * k + m * k)
    return {
        "GEMM, 2 skinny products, scale, add (PEFT's order)": [
            total(
                product(m, n, k), product(m, r, k), product(m, n, r), mul(m, n), add(m, n)
            ),
            total(
                mul(m, n), product(n, r, m), product(m, r, n), product(r, k, m),
                product(m, k, r), product(m, k, n), add(m, k),
            ),
        ],
        "s, then GEMM and update in one (LoRAFusion's order)": [
            total(product(m, r, k), operands + s + width * n * r),
            total(
                width * m * n + 2 * s + 2 * width * n * r,
                operands + s + width * r * k,
                product(r, k, m),
            ),
        ],
        "each operand once (the bound)": [
            total(operands + factors + s),
            total(operands + width * m * k + 2 * factors + s),
        ],
    }  # fmt: skip


def print_designs(shape: str, r: int, width: int, passes: list[Pass]) -> None:
    """Launches and compulsory bytes of the passes counted, beside other designs'."""
    m, k, n = (int(part) for part in shape.split("x"))
    counted = [p.summary() for p in passes]
    rows = [
        ["fused_peft, counted", *(_cost(c["launches"], c["compulsory_bytes"]) for c in counted)]
    ]
    for name, costs in designs_on_paper(m, n, k, r, width).items():
        rows.append([f"{name}, on paper", *(_cost(*cost) for cost in costs)])
    print_table(["launches / compulsory MB", "forward", "backward"], rows)


def _cost(launches: int, total: int) -> str:
    return f"{launches} / {total / 1e6:.2f}"


def print_errors(shape: str, layer: LoraLinear, x: Tensor, dy: Tensor) -> dict[str, list[float]]:
    """Relative errors against float64 of the kernels and of the same in plain torch."""
    operands = {
        "x": x.detach(),
        "lora_a": layer.lora_A["default"].detach(),
        "lora_b": layer.lora_B["default"].detach(),
    }
    weight, scaling = layer.weight, layer.scaling["default"]

    def composed(dtype: torch.dtype) -> list[Tensor]:
        t = {name: value.to(dtype).requires_grad_() for name, value in operands.items()}
        update = t["x"] @ t["lora_a"].t() @ t["lora_b"].t()
        y = t["x"] @ weight.to(dtype).t() + update * scaling
        return [y.detach(), *torch.autograd.grad(y, list(t.values()), dy.to(dtype))]

    leaf = operands["x"].clone().requires_grad_()
    with fused_peft.simulated_cuda():
        y = layer(leaf)
        factors = [layer.lora_A["default"], layer.lora_B["default"]]
        ours = [y.detach(), *torch.autograd.grad(y, [leaf, *factors], dy)]
    simulator.reset()
    exact, torchs = composed(torch.float64), composed(x.dtype)

    def error(value: Tensor, ref: Tensor) -> float:
        return ((value.double() - ref).norm() / ref.norm()).item()

    errors = {
        name: [error(a, ref), error(b, ref)]
        for name, a, b, ref in zip(
            ("y", "dx", "dlora_a", "dlora_b"), ours, torchs, exact, strict=True
        )
    }
    header = ["problem", "error against float64", *errors]
    rows = [
        [shape, design, *(f"{pair[i]:.2e}" for pair in errors.values())]
        for i, design in enumerate(("fused_peft", "plain torch"))
    ]
    print_table(header, rows)
    return errors
