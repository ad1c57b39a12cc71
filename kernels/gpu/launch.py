"""What every launch shares: whether kernels are interpreted, and how many threads a kernel gets.

`TRITON_INTERPRET=1`, set before Triton is first imported, runs the kernels on the CPU, one program after the other, in
numpy. It proves indices, masks and orders; it proves nothing about tensor cores, races or speed.

No launch parameter is found at run time: a choice by stopwatch would change bits from one start to the next. They come
from launch_table.py and from each op's own constants, and docs/kernels.md holds what they compile to.
"""

from typing import Any

import triton
from torch import Tensor

FP_FUSION = False  # a*b+c is two roundings everywhere: two kernels that share a formula give the same bits


def is_interpreted() -> bool:
    return bool(triton.knobs.runtime.interpret)


def power_of_two(number: int) -> int:
    """The least power of two that is not smaller."""
    return 1 << (number - 1).bit_length()


NO_BLOCK = -(2**31)  # in `refused`: nothing was
SPLIT = 512  # keys whose sum is finished before the next begins, at absolute positions; a multiple of every tile


def check(tensor: Tensor, shape: tuple[int, ...], like: Tensor | None = None) -> None:
    """A kernel trusts its pointers: shapes, layout and place are checked before. Raises AssertionError."""
    assert tuple(tensor.shape) == shape, f"{tuple(tensor.shape)} is not {shape}"
    assert tensor.is_contiguous()
    assert like is None or tensor.device == like.device


Options = dict[str, Any]


def options(num_warps: int = 4, num_stages: int = 1) -> Options:
    """For a launch and for the gate's compilation alike."""
    return {"num_warps": num_warps, "num_stages": num_stages, "enable_fp_fusion": FP_FUSION}
