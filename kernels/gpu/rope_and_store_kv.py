"""Rotary positions (arXiv 2104.09864) and the write into the paged cache, in one pass over the step's projections.

    query head: turned in place      key head: turned, written to its slot      value head: written to its slot
    turned(x)[i] = x[i] cos - x[i + D/2] sin        turned(x)[i + D/2] = x[i + D/2] cos + x[i] sin

A slot is written only where its block belongs to the token's domain: a block that is nobody's (tag 0) becomes the
token's with an atomic exchange, a block of another owner or out of range is left alone and named in `refused`. A token
that fills up a batch has PADDING_SLOT and is not written anywhere.
Each number is computed from its own pair: nothing is summed. Twins: reference.rope, reference.store_kv, and
reference.to_e4m3 for a cache in 8 bits.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.backend import PADDING_SLOT
from kernels.gpu.fp8 import to_e4m3
from kernels.gpu.launch import check, options, power_of_two

HEADS = 8  # heads of one program
PADDING = tl.constexpr(PADDING_SLOT)


@triton.jit
def rope_and_store_kv_kernel(
    qkv_ptr,  # [T, HQ + 2 * HKV, D]
    cos_ptr,  # float32 [T, D / 2]
    sin_ptr,
    key_ptr,  # [N, BLOCK_SIZE, HKV, D]
    value_ptr,
    slots_ptr,  # int64 [T]
    token_tags_ptr,  # int64 [T]
    block_tags_ptr,  # int64 [N]
    refused_ptr,  # int32 [T] NO_BLOCK, or the block that was not written
    num_blocks,
    key_factor,  # as value_factor, before a number becomes e4m3
    value_factor,
    HQ: tl.constexpr,
    HKV: tl.constexpr,
    D: tl.constexpr,
    HALF: tl.constexpr,  # D / 2 or more, a power of two
    BLOCK_SIZE: tl.constexpr,
    HEADS: tl.constexpr,
    ROTATE: tl.constexpr,
    FP8: tl.constexpr,
    CHECK: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64)
    first_head = tl.program_id(1) * HEADS
    head = (first_head + tl.arange(0, HEADS))[:, None]
    pair = tl.arange(0, HALF)[None, :]
    inside = (head < HQ + 2 * HKV) & (pair < D // 2)
    low_at = qkv_ptr + (token * (HQ + 2 * HKV) + head) * D + pair
    low = tl.load(low_at, mask=inside, other=0.0)
    high = tl.load(low_at + D // 2, mask=inside, other=0.0)
    if ROTATE:
        cos = tl.load(cos_ptr + token * (D // 2) + pair, mask=pair < D // 2, other=0.0)
        sin = tl.load(sin_ptr + token * (D // 2) + pair, mask=pair < D // 2, other=0.0)
        first, second = low.to(tl.float32), high.to(tl.float32)
        turns = head < HQ + HKV
        low = tl.where(turns, (first * cos - second * sin).to(low.dtype), low)
        high = tl.where(turns, (second * cos + first * sin).to(high.dtype), high)
        is_query = inside & (head < HQ)
        tl.store(low_at, low, mask=is_query)
        tl.store(low_at + D // 2, high, mask=is_query)
    if first_head + HEADS > HQ:  # some of these heads are keys or values
        slot = tl.load(slots_ptr + token)
        block = slot // BLOCK_SIZE
        is_ours = (slot >= 0) & (block < num_blocks)
        if CHECK and is_ours:
            tag = tl.load(token_tags_ptr + token)
            owner = tl.atomic_cas(block_tags_ptr + block, tl.zeros_like(tag), tag)
            is_ours = (owner == 0) | (owner == tag)
        if is_ours:
            if FP8:
                factor = tl.where(head < HQ + HKV, key_factor, value_factor)
                low_kept, high_kept = to_e4m3(low.to(tl.float32) * factor), to_e4m3(high.to(tl.float32) * factor)
            else:
                low_kept, high_kept = low, high
            is_key = inside & (head >= HQ) & (head < HQ + HKV)
            key_at = key_ptr + (slot * HKV + head - HQ) * D + pair
            tl.store(key_at, low_kept, mask=is_key)
            tl.store(key_at + D // 2, high_kept, mask=is_key)
            goes_to_values = inside & (head >= HQ + HKV)
            value_at = value_ptr + (slot * HKV + head - HQ - HKV) * D + pair
            tl.store(value_at, low_kept, mask=goes_to_values)
            tl.store(value_at + D // 2, high_kept, mask=goes_to_values)
        elif slot != PADDING:  # an id of more than 32 bits is reported as the largest: it is out of range all the same
            tl.atomic_max(refused_ptr + token, tl.minimum(block, 2**31 - 1).to(tl.int32))


def rope_and_store_kv(
    qkv: Tensor,
    cos: Tensor | None,
    sin: Tensor | None,
    key_cache: Tensor,
    value_cache: Tensor,
    *,
    num_heads: int,
    slot_mapping: Tensor,
    token_tags: Tensor,
    block_tags: Tensor,
    refused: Tensor,
    scales: tuple[float, float] = (1.0, 1.0),
    check_owners: bool = True,
) -> None:
    """qkv [T, Hq + 2 * Hkv, D], whose query heads are turned in place; cos and sin float32 [T, D / 2], or None for no
    rotation; caches [N, block_size, Hkv, D]; slot_mapping int64 [T]; token_tags int64 [T], never 0; block_tags int64
    [N], 0 where a block is nobody's, filled in; refused int32 [T], NO_BLOCK of kernels/gpu/launch.py, becomes the block
    of a token whose slot was not written. Caches of uint8 hold e4m3 (kernels/gpu/fp8.py): keys and values are divided
    by their ``scales``, powers of two, and rounded a second time.

    ``check_owners`` False exists to measure what the check costs.
    """
    num_tokens, all_heads, size = qkv.shape
    num_blocks, block_size, num_kv_heads, _ = key_cache.shape
    check(qkv, (num_tokens, num_heads + 2 * num_kv_heads, size))
    for cache in (key_cache, value_cache):
        check(cache, (num_blocks, block_size, num_kv_heads, size), qkv)
        assert cache.dtype in (qkv.dtype, torch.uint8)
    for angle in (cos, sin):
        if angle is not None:
            check(angle, (num_tokens, size // 2), qkv)
    for per_token in (slot_mapping, token_tags, refused):
        check(per_token, (num_tokens,), qkv)
    check(block_tags, (num_blocks,), qkv)
    assert size % 2 == 0
    assert (cos is None) == (sin is None)
    if not num_tokens:
        return
    rope_and_store_kv_kernel[(num_tokens, triton.cdiv(all_heads, HEADS))](
        qkv,
        qkv if cos is None else cos,
        qkv if sin is None else sin,
        key_cache,
        value_cache,
        slot_mapping,
        token_tags,
        block_tags,
        refused,
        num_blocks,
        1.0 / scales[0],
        1.0 / scales[1],
        HQ=num_heads,
        HKV=num_kv_heads,
        D=size,
        HALF=power_of_two(size // 2),
        BLOCK_SIZE=block_size,
        HEADS=HEADS,
        ROTATE=cos is not None,
        FP8=key_cache.dtype == torch.uint8,
        CHECK=check_owners,
        **options(),
    )
