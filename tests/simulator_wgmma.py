"""Kernels of wgmma: its operands in shared memory (canonical layouts, descriptors), its text."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

# Bytes of a line of the swizzle pattern -> the layout's code in a descriptor.
SWIZZLES = {0: 0, 128: 1, 64: 2, 32: 3}


SHARED = 96 * 1024  # bytes of dynamic shared memory
START = 1024  # its address


@dataclass(frozen=True)
class Layout:
    """Where a [rows, 32 bytes of k] operand lies from ``start`` on.

    ``swizzle`` is 0, 32, 64 or 128; ``mn_major`` (16-bit elements alone) puts the rows' elements
    of one k side by side instead of one row's.
    """

    start: int
    swizzle: int
    mn_major: bool
    rows: int

    @property
    def strides(self) -> tuple[int, int]:
        """Leading and stride byte offset."""
        groups = -(-self.rows // 8)
        if not self.mn_major:
            # 8 rows (of one line each, or of 16 bytes) follow one another; without a swizzle the
            # second chunk of k lies behind all rows, one gap further.
            return (groups * 128 + 16, 128) if not self.swizzle else (16, 8 * self.swizzle)
        if not self.swizzle:
            return groups * 128 + 32, 128
        return 16 * self.swizzle + 1024, 8 * self.swizzle

    @property
    def descriptor(self) -> int:
        leading, stride = self.strides
        return (
            self.start >> 4
            | (leading >> 4) << 16
            | (stride >> 4) << 32
            | SWIZZLES[self.swizzle] << 62
        )

    def place(self, row: int, chunk: int) -> int:
        """Byte address of 16 bytes: of a row along k, or (MN-major) of ``row`` = k along rows."""
        leading, stride = self.strides
        line, group = row % 8, row // 8
        if not self.mn_major:
            if not self.swizzle:
                return self.start + 16 * line + stride * group + leading * chunk
            linear = self.start + self.swizzle * line + stride * group + 16 * chunk
        else:
            if not self.swizzle:
                return self.start + 16 * line + leading * group + stride * chunk
            wide = self.swizzle // 16
            linear = self.start + self.swizzle * line + stride * group
            linear += 16 * (chunk % wide) + leading * (chunk // wide)
        # In lines of 128 bytes, the chunk's number is changed by the line's.
        number, slot = linear // 128, linear % 128 // 16
        return number * 128 + 16 * (slot ^ (number % (self.swizzle // 16)))

    def store(self, image: np.ndarray, matrix: np.ndarray) -> None:
        """Writes [rows, k] raw elements into the bytes of shared memory."""
        source = matrix.T if self.mn_major else matrix
        rows = np.ascontiguousarray(source).view(np.uint8).reshape(source.shape[0], -1, 16)
        for row in range(rows.shape[0]):
            for chunk in range(rows.shape[1]):
                at = self.place(row, chunk)
                image[at : at + 16] = rows[row, chunk]


def place_d(thread: int, i: int) -> tuple[int, int]:
    """Row and column of element i of a thread's fragment of D (64 x n)."""
    warp, lane = divmod(thread, 32)
    row = 16 * warp + lane // 4 + 8 * (i // 2 % 2)
    return row, 8 * (i // 4) + 2 * (lane % 4) + i % 2


@dataclass(frozen=True)
class Case:
    n: int = 64
    a: str = "f16"
    b: str = "f16"
    d: str = "f32"
    swizzle_a: int = 128
    swizzle_b: int = 128
    trans_a: bool = False
    trans_b: bool = False
    registers: bool = False
    scale_d: int = 1
    scale_a: int = 1
    scale_b: int = 1
    suffix: str = ""

    @property
    def element_bytes(self) -> int:
        return {"tf32": 4, "f16": 2, "bf16": 2}.get(self.a, 1)

    @property
    def k(self) -> int:
        return 32 // self.element_bytes

    @property
    def num_d(self) -> int:
        return self.n // (4 if self.d == "f16" else 2)

    def instruction(self) -> str:
        types = f"{self.d}.{self.a}.{self.b}"
        shape = f"m64n{self.n}k{self.k}"
        d = "{" + ", ".join(f"%d{i}" for i in range(self.num_d)) + "}"
        a = "{%a0, %a1, %a2, %a3}" if self.registers else "%desc_a"
        text = (
            f"wgmma.mma_async.sync.aligned.{shape}{self.suffix}.{types} {d}, {a}, %desc_b, %scale"
        )
        if self.d != "s32":
            text += f", {self.scale_a}, {self.scale_b}"
        if self.k == 16:
            text += "" if self.registers else f", {int(self.trans_a)}"
            text += f", {int(self.trans_b)}"
        return text + ";"


def kernel(case: Case, body: str) -> str:
    """A warpgroup: copies `image` into shared memory, loads fragments, runs the body, stores D."""
    d, a = range(case.num_d), range(4)
    loads = [f"ld.global.b32 %d{i}, [%p+{512 * i}];" for i in d]
    stores = [f"st.global.b32 [%p+{512 * i}], %d{i};" for i in d]
    fragments = [f"ld.global.b32 %a{i}, [%p+{512 * i}];" for i in a]
    newline = "\n  "
    return f""".version 8.7
.target sm_90a
.address_size 64
.extern .shared .align 1024 .b8 space[];
.visible .entry k(.param .u64 image, .param .u64 d, .param .u64 a, .param .u64 desc_a,
                  .param .u64 desc_b, .param .u32 scale, .param .u32 bytes)
{{
  .reg .b32 %t, %i, %n, %s, %w<4>, %d<{case.num_d}>, %a<4>;
  .reg .b64 %p, %q, %desc_a, %desc_b;
  .reg .pred %scale, %more;
  mov.u32 %t, %tid.x;
  ld.param.u64 %q, [image];
  ld.param.u32 %n, [bytes];
  mul.lo.u32 %i, %t, 16;
COPY:
  cvt.u64.u32 %p, %i;
  add.u64 %p, %p, %q;
  ld.global.v4.b32 {{%w0, %w1, %w2, %w3}}, [%p];
  mov.u32 %s, space;
  add.u32 %s, %s, %i;
  st.shared.v4.b32 [%s], {{%w0, %w1, %w2, %w3}};
  add.u32 %i, %i, 2048;
  setp.lt.u32 %more, %i, %n;
  @%more bra COPY;
  fence.proxy.async;
  bar.sync 0;
  ld.param.u64 %desc_a, [desc_a];
  ld.param.u64 %desc_b, [desc_b];
  ld.param.u32 %i, [scale];
  setp.ne.u32 %scale, %i, 0;
  ld.param.u64 %p, [a];
  mad.wide.u32 %p, %t, 4, %p;
  {newline.join(fragments)}
  ld.param.u64 %p, [d];
  mad.wide.u32 %p, %t, 4, %p;
  {newline.join(loads)}
  wgmma.fence.sync.aligned;
  {body}
  {newline.join(stores)}
  ret;
}}
"""


WAIT = "wgmma.commit_group.sync.aligned;\n  wgmma.wait_group.sync.aligned 0;"
