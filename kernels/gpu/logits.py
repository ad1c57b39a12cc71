"""What the sampler asks of a step's logits, so that a few numbers of a row go to the host and not the vocabulary.

    greedy    the first place of the largest number, and whether all numbers are finite
    top_k     the k largest, the largest first, and their places; of equals the one in the lower place first

Each number and its place become one integer that orders as the answer does, and all of them are different:

    key = (bits of the number, made monotone) * 2^32 + (2^31 - 1 - place)

So every step is a maximum of integers: no order of programs, pieces or threads changes a result, and a row's answer
knows no other row. A program takes PIECE numbers of one row; what the pieces leave is merged. Zeros of either sign are
equal. Twins: reference.greedy, reference.top_k.
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
def _number(key):
    ordered = (key >> 32).to(tl.int32)
    return tl.where(ordered < 0, ordered ^ 0x7FFFFFFF, ordered).to(tl.float32, bitcast=True)


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
    value_ptr,  # float32 [R, K]
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
        tl.store(value_ptr + row * K + rank, _number(best))
        tl.store(place_ptr + row * K + rank, _place(best))
        key = tl.where(key == best, _NO_KEY, key)


def greedy(logits: Tensor) -> tuple[Tensor, Tensor]:
    """float32 [R, V], V > 0 -> (int64 [R] places, bool [R] whether all of the row's numbers are finite; where they are
    not, the place means nothing)."""
    num_rows, size = logits.shape
    check(logits, (num_rows, size))
    assert logits.dtype == torch.float32
    assert size > 0
    num_pieces = triton.cdiv(size, PIECE)
    best = torch.empty((num_rows, num_pieces), dtype=torch.int64, device=logits.device)
    places = torch.empty(num_rows, dtype=torch.int64, device=logits.device)
    is_finite = torch.ones(num_rows, dtype=torch.int32, device=logits.device)
    if num_rows:
        greedy_kernel[(num_rows, num_pieces)](logits, best, is_finite, size, num_pieces, PIECE=PIECE, **options())
        pieces = power_of_two(num_pieces)
        greedy_merge_kernel[(num_rows,)](best, places, num_pieces, PIECES=pieces, **options(num_warps=1))
    return places, is_finite.bool()


def top_k(logits: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """float32 [R, V], 0 < k <= V and TOP_K_MAX -> (float32 [R, k] values, int64 [R, k] places). Every number of a row
    must be finite: ask `greedy` first."""
    num_rows, size = logits.shape
    check(logits, (num_rows, size))
    assert logits.dtype == torch.float32
    assert 0 < k <= min(size, TOP_K_MAX)
    num_pieces = triton.cdiv(size, PIECE)
    best = torch.empty((num_rows, num_pieces, k), dtype=torch.int64, device=logits.device)
    values = torch.empty((num_rows, k), dtype=torch.float32, device=logits.device)
    places = torch.empty((num_rows, k), dtype=torch.int64, device=logits.device)
    if num_rows:
        top_k_kernel[(num_rows, num_pieces)](logits, best, size, num_pieces, PIECE=PIECE, K=k, **options())
        num_keys = num_pieces * k
        top_k_merge_kernel[(num_rows,)](
            best, values, places, num_keys, KEYS=power_of_two(num_keys), K=k, **options(NUM_WARPS_MERGE)
        )
    return values, places
