"""Compiles the kernels below with Triton, without a GPU, into the PTX files of this folder.

``pip install triton && python tests/triton_kernels/generate.py``; the files are from Triton 3.9.0.
"""

from __future__ import annotations

import os
from pathlib import Path

os.environ["TRITON_DISABLE_LINE_INFO"] = "1"
os.environ["TRITON_DEFAULT_FP_FUSION"] = "1"

import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

WARPS = 4


@triton.jit
def matmul(x, y, out, m, n, k, TILE: tl.constexpr, TILE_K: tl.constexpr):
    rows = tl.program_id(0) * TILE + tl.arange(0, TILE)
    columns = tl.program_id(1) * TILE + tl.arange(0, TILE)
    sums = tl.zeros((TILE, TILE), tl.float32)
    for first in range(0, k, TILE_K):
        i = first + tl.arange(0, TILE_K)
        inside = (rows[:, None] < m) & (i[None, :] < k)
        left = tl.load(x + rows[:, None] * k + i[None, :], mask=inside, other=0.0)
        inside = (i[:, None] < k) & (columns[None, :] < n)
        right = tl.load(y + i[:, None] * n + columns[None, :], mask=inside, other=0.0)
        sums = tl.dot(left, right, sums)
    inside = (rows[:, None] < m) & (columns[None, :] < n)
    tl.store(out + rows[:, None] * n + columns[None, :], sums.to(tl.float16), mask=inside)


@triton.jit
def softmax(x, out, n, WIDTH: tl.constexpr):
    row = tl.program_id(0)
    i = tl.arange(0, WIDTH)
    values = tl.load(x + row * n + i, mask=i < n, other=-float("inf"))
    powers = tl.exp(values - tl.max(values, 0))
    tl.store(out + row * n + i, powers / tl.sum(powers, 0), mask=i < n)


@triton.jit
def layer_norm(x, weight, bias, out, n, eps, WIDTH: tl.constexpr):
    row = tl.program_id(0)
    i = tl.arange(0, WIDTH)
    values = tl.load(x + row * n + i, mask=i < n, other=0.0)
    centred = tl.where(i < n, values - tl.sum(values, 0) / n, 0.0)
    scale = tl.rsqrt(tl.sum(centred * centred, 0) / n + eps)
    scaled = centred * scale * tl.load(weight + i, mask=i < n)
    tl.store(out + row * n + i, scaled + tl.load(bias + i, mask=i < n), mask=i < n)


TYPES = {"n": "i32", "m": "i32", "k": "i32", "eps": "fp32"}
# Kernel, architecture, type of its arrays, constants, arguments that are multiples of 16.
CASES = [
    (matmul, 80, "fp16", {"TILE": 64, "TILE_K": 32}, "x y out n k"),
    (matmul, 90, "fp16", {"TILE": 64, "TILE_K": 32}, "x y out n k"),
    (softmax, 80, "fp32", {"WIDTH": 1024}, "x out"),
    (layer_norm, 80, "fp32", {"WIDTH": 512}, "x weight bias out"),
]


def main() -> None:
    for function, architecture, dtype, constants, multiples in CASES:
        names = list(function.arg_names)
        signature = {name: TYPES.get(name, f"*{dtype}") for name in names}
        signature |= dict.fromkeys(constants, "constexpr")
        source = ASTSource(
            function,
            signature,
            {(names.index(name),): value for name, value in constants.items()},
            {(names.index(name),): [["tt.divisibility", 16]] for name in multiples.split()},
        )
        target = GPUTarget("cuda", architecture, 32)
        compiled = triton.compile(source, target=target, options={"num_warps": WARPS})
        path = Path(__file__).parent / f"{function.__name__}_sm{architecture}.ptx"
        path.write_text(
            f"// shared bytes: {compiled.metadata.shared}\n" + compiled.asm["ptx"].strip() + "\n"
        )


if __name__ == "__main__":
    main()
