"""What the sampler asks of a step's logits, so that a few numbers of a row go to the host and not the vocabulary.

    top    the columns of the largest numbers, the largest first, of equals the lower column first; and whether all
           numbers of the row are finite

The largest alone (greedy) and several (top_k) have kernels of their own. Each number and its place become one integer
that orders as the answer does, and all of them are different:

    key = (bits of the number, made monotone) * 2^32 + (2^31 - 1 - place)

So every step is a maximum of integers: no order of programs, pieces or threads changes a result, and a row's answer
knows no other row. A program takes PIECE numbers of one row; what the pieces leave is merged. Zeros of either sign are
equal. Twin: reference.top.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.gpu.launch import check, options, power_of_two

PIECE = 2048  # numbers of one program
TOP_K_MAX = 64  # what the pieces leave must fit into one program's registers
NUM_WARPS_MERGE = 8
_LAST = tl.constexpr(2**31 - 1)
_NO_KEY = tl.constexpr(-(2**63))  # below every key


@triton.jit
def _keys(number, place):
    """int64, and never _NO_KEY."""
    bits = tl.where(number == 0.0, 0.0, number).to(tl.int32, bitcast=True)
    ordered = tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits)
    return ordered.to(tl.int64) * 4294967296 + (-place + _LAST).to(tl.int64)


@triton.jit
def _place(key):
    return -(key & 0xFFFFFFFF) + _LAST


@triton.jit
def greedy_kernel(
    logits_ptr,  # float32 [R, size]
    best_ptr,  # int64 [R, num_pieces] the largest key of each piece
    is_finite_ptr,  # int32 [R] begins with 1
    size,
    num_pieces,
    PIECE: tl.constexpr,
):
    row, piece = tl.program_id(0).to(tl.int64), tl.program_id(1)
    place = piece * PIECE + tl.arange(0, PIECE)
    inside = place < size
    number = tl.load(logits_ptr + row * size + place, mask=inside, other=0.0)
    is_broken = (number.to(tl.int32, bitcast=True) & 0x7F800000) == 0x7F800000  # infinity or NaN
    broken = tl.max((inside & is_broken).to(tl.int32), axis=0)
    tl.store(best_ptr + row * num_pieces + piece, tl.max(tl.where(inside, _keys(number, place), _NO_KEY), axis=0))
    if broken != 0:
        tl.atomic_min(is_finite_ptr + row, 0)


@triton.jit
def greedy_merge_kernel(
    best_ptr,  # int64 [R, num_pieces]
    place_ptr,  # int64 [R]
    num_pieces,
    PIECES: tl.constexpr,  # num_pieces or more
):
    row, piece = tl.program_id(0).to(tl.int64), tl.arange(0, PIECES)
    best = tl.load(best_ptr + row * num_pieces + piece, mask=piece < num_pieces, other=0)
    tl.store(place_ptr + row, _place(tl.max(tl.where(piece < num_pieces, best, _NO_KEY), axis=0)))


@triton.jit
def top_k_kernel(
    logits_ptr,  # float32 [R, size]
    best_ptr,  # int64 [R, num_pieces, K] the K largest keys of each piece, the largest first
    size,
    num_pieces,
    PIECE: tl.constexpr,
    K: tl.constexpr,
):
    row, piece = tl.program_id(0).to(tl.int64), tl.program_id(1)
    place = piece * PIECE + tl.arange(0, PIECE)
    inside = place < size
    number = tl.load(logits_ptr + row * size + place, mask=inside, other=0.0)
    key = tl.where(inside, _keys(number, place), _NO_KEY)
    best_ptr += (row * num_pieces + piece) * K
    for rank in range(K):
        best = tl.max(key, axis=0)
        tl.store(best_ptr + rank, best)
        key = tl.where(key == best, _NO_KEY, key)


@triton.jit
def top_k_merge_kernel(
    best_ptr,  # int64 [R, num_keys]
    place_ptr,  # int64 [R, K]
    num_keys,
    KEYS: tl.constexpr,  # num_keys or more
    K: tl.constexpr,
):
    row, index = tl.program_id(0).to(tl.int64), tl.arange(0, KEYS)
    key = tl.load(best_ptr + row * num_keys + index, mask=index < num_keys, other=0)
    key = tl.where(index < num_keys, key, _NO_KEY)
    for rank in range(K):
        best = tl.max(key, axis=0)
        tl.store(place_ptr + row * K + rank, _place(best))
        key = tl.where(key == best, _NO_KEY, key)


def top(logits: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """float32 [R, V], 0 < count <= V and TOP_K_MAX -> (int64 [R, count] columns, bool [R] whether all of the row's
    numbers are finite; where they are not, the columns mean nothing)."""
    num_rows, size = logits.shape
    check(logits, (num_rows, size))
    assert logits.dtype == torch.float32
    assert 0 < count <= min(size, TOP_K_MAX)
    num_pieces = triton.cdiv(size, PIECE)
    best = torch.empty((num_rows, num_pieces), dtype=torch.int64, device=logits.device)
    columns = torch.empty((num_rows, count), dtype=torch.int64, device=logits.device)
    is_finite = torch.ones(num_rows, dtype=torch.int32, device=logits.device)
    if not num_rows:
        return columns, is_finite.bool()
    greedy_kernel[(num_rows, num_pieces)](logits, best, is_finite, size, num_pieces, PIECE=PIECE, **options())
    if count == 1:
        pieces = power_of_two(num_pieces)
        greedy_merge_kernel[(num_rows,)](best, columns, num_pieces, PIECES=pieces, **options(num_warps=1))
        return columns, is_finite.bool()
    several = torch.empty((num_rows, num_pieces, count), dtype=torch.int64, device=logits.device)
    top_k_kernel[(num_rows, num_pieces)](logits, several, size, num_pieces, PIECE=PIECE, K=count, **options())
    num_keys = num_pieces * count
    top_k_merge_kernel[(num_rows,)](
        several, columns, num_keys, KEYS=power_of_two(num_keys), K=count, **options(NUM_WARPS_MERGE)
    )
    return columns, is_finite.bool()
