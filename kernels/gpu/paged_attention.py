"""Causal attention over a paged cache: prompt chunks and decode tokens in one kernel (FlashAttention's running softmax,
arXiv 2205.14135; query heads packed as in arXiv 2511.11581; sinks arXiv 2309.17453; soft cap arXiv 2408.00118).

    score = cap * tanh(query . key * scale / cap)          for keys in sight, and in blocks of the row's own domain
    out = sum exp(score - m) value / (sum exp(score - m) + exp(sink - m))

A program takes BLOCK_Q tokens of one row with all query heads of one key head, and walks the keys of one split, SPLIT
positions from the row's beginning, in tiles of TILE. A row of one split is done then; the sums of longer rows are
merged by `merge_kernel`, in the order of the positions. A tile or a split without a key in sight changes nothing at
all. So a token's bits depend on its own row up to itself, whatever the batch, the chunk or the blocks.

Ownership: every block is compared with the row's domain before it is read. One that is out of range or somebody else's
is not read, adds nothing, and raises the row's flag.

A cache of bytes holds e4m3: what is read becomes numbers of the query's dtype, exactly, and the scales of keys and
values, powers of two, go into the score and the sum.

Twin: reference.paged_attention, on reference.from_e4m3 of a cache in 8 bits.
"""

import triton
import triton.language as tl

from kernels.gpu.fp8 import from_e4m3

LOG2_E = tl.constexpr(1.4426950408889634)
NO_BLOCK = tl.constexpr(-(2**31))  # what `refused` begins with


@triton.jit
def _dot(a, b, CAST: tl.constexpr):
    """Sums in float32. The interpreter multiplies bfloat16 as if it were integers: it gets float32."""
    if CAST:
        a, b = a.to(tl.float32), b.to(tl.float32)
    return tl.dot(a, b, input_precision="ieee")


@triton.jit
def _weight(exponent, top):
    """2^(exponent - top): 0 where exponent is -inf, also where top is."""
    return tl.exp2(exponent - tl.where(top == float("-inf"), 0.0, top))


@triton.jit
def _merge(acc, top, total, acc_new, top_new, total_new):
    """Two sums [M, D] with the exponents [M] that they are relative to, and their denominators [M]."""
    merged = tl.maximum(top, top_new)
    old, new = _weight(top, merged), _weight(top_new, merged)
    return acc * old[:, None] + acc_new * new[:, None], merged, total * old + total_new * new


@triton.jit
def _finish(acc, top, total, sink, HAS_SINKS: tl.constexpr):
    """[M, D] out. A row without any key is 0; adding 0.0 leaves one zero, not two."""
    if HAS_SINKS:
        merged = tl.maximum(top, sink)
        old = _weight(top, merged)
        acc = acc * old[:, None]
        total = total * old + _weight(sink, merged)
    return acc / tl.where(total == 0.0, 1.0, total)[:, None] + 0.0


@triton.jit
def _row_of(cu_seqlens_ptr, num_rows, index, BLOCK_Q: tl.constexpr):
    """The last row r whose first program, cu_seqlens[r] // BLOCK_Q + r, is not beyond ``index``. Rows get one program
    more than they may need: the grid depends on the number of tokens and rows alone."""
    low, high = 0, num_rows
    while low < high:
        middle = (low + high) // 2
        if tl.load(cu_seqlens_ptr + middle) // BLOCK_Q + middle <= index:
            low = middle + 1
        else:
            high = middle
    return low - 1


@triton.jit
def paged_attention_kernel(
    query_ptr,  # [T, *, D], query_stride numbers from token to token
    key_ptr,  # [N, BLOCK_SIZE, HKV, D]
    value_ptr,
    out_ptr,  # [T, HKV * RATIO, D]
    partial_ptr,  # float32 [P, HKV * RATIO, D] sums that wait for merge_kernel, relative to
    partial_top_ptr,  # float32 [P, HKV * RATIO]
    partial_total_ptr,
    cu_seqlens_ptr,  # int32 [R + 1]
    kv_lens_ptr,  # int32 [R]
    block_tables_ptr,  # int32 [R, table_width]
    row_tags_ptr,  # int64 [R]
    block_tags_ptr,  # int64 [N]
    partial_starts_ptr,  # int64 [R] the row's first place in partial_ptr
    sinks_ptr,  # float32 [HKV * RATIO]
    refused_ptr,  # int32 [R] NO_BLOCK, or a block that was not read
    scale,
    key_scale,  # as value_scale, of a cache in e4m3
    value_scale,
    soft_cap,
    window,
    num_rows,
    num_blocks,
    table_width,
    query_stride,
    HKV: tl.constexpr,
    RATIO: tl.constexpr,
    D: tl.constexpr,
    D_PAD: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    TILE: tl.constexpr,
    SPLIT: tl.constexpr,
    HAS_WINDOW: tl.constexpr,
    HAS_CAP: tl.constexpr,
    HAS_SINKS: tl.constexpr,
    FP8: tl.constexpr,
    CHECK: tl.constexpr,
    CAST: tl.constexpr,
):
    BLOCK_Q: tl.constexpr = BLOCK_M // RATIO
    kv_head, split = tl.program_id(1), tl.program_id(2)
    row = _row_of(cu_seqlens_ptr, num_rows, tl.program_id(0), BLOCK_Q)
    start = tl.load(cu_seqlens_ptr + row)
    num_new = tl.load(cu_seqlens_ptr + row + 1) - start
    first = (tl.program_id(0) - (start // BLOCK_Q + row)) * BLOCK_Q
    kv_len = tl.load(kv_lens_ptr + row)
    past = kv_len - num_new
    end = past + tl.minimum(first + BLOCK_Q, num_new)  # keys that the last of these tokens sees
    # Not a spare program, nor a split behind the last token's end. A row without any key is 0, in its first split.
    if (first < num_new) & (split * SPLIT < tl.maximum(end, 1)):
        begin = split * SPLIT
        if HAS_WINDOW:
            begin = tl.maximum(past + first - window + 1, begin)
        end = tl.minimum(split * SPLIT + SPLIT, end)
        member = tl.arange(0, BLOCK_M)
        head = member % RATIO
        token = member // RATIO
        live = (member < BLOCK_Q * RATIO) & (first + token < num_new)
        position = past + first + token
        channel = tl.arange(0, D_PAD)
        column = tl.arange(0, TILE)
        inside = live[:, None] & (channel < D)[None, :]
        query_ptr += (start + first).to(tl.int64) * query_stride + kv_head * (RATIO * D)
        query = tl.load(
            query_ptr + (token * query_stride + head * D)[:, None] + channel[None, :], mask=inside, other=0.0
        )
        block_tables_ptr += row.to(tl.int64) * table_width
        row_tag = tl.load(row_tags_ptr + row)
        acc = tl.zeros([BLOCK_M, D_PAD], dtype=tl.float32)
        top = tl.full([BLOCK_M], float("-inf"), dtype=tl.float32)
        total = tl.zeros([BLOCK_M], dtype=tl.float32)
        refused = tl.full([TILE], NO_BLOCK, dtype=tl.int32)
        if FP8:
            scale *= key_scale
        for tile in range(begin // TILE * TILE, end, TILE):
            at = tile + column
            wanted = (at >= begin) & (at < end)
            block = tl.load(block_tables_ptr + at // BLOCK_SIZE, mask=wanted, other=0)
            readable = wanted & (block >= 0) & (block < num_blocks)
            if CHECK:
                owner = tl.load(block_tags_ptr + block, mask=readable, other=0)
                readable = readable & (owner == row_tag)
            refused = tl.maximum(refused, tl.where(wanted & (readable == 0), block, NO_BLOCK))
            slot = (block.to(tl.int64) * BLOCK_SIZE + at % BLOCK_SIZE) * HKV + kv_head
            key = tl.load(
                key_ptr + slot[None, :] * D + channel[:, None],
                mask=readable[None, :] & (channel < D)[:, None],
                other=0,
            )
            if FP8:
                key = from_e4m3(key, query.dtype)
            scores = _dot(query, key, CAST) * scale
            if HAS_CAP:
                scores = soft_cap * (2.0 / (1.0 + tl.exp(-2.0 * (scores / soft_cap))) - 1.0)
            in_sight = readable[None, :] & (at[None, :] <= position[:, None])
            if HAS_WINDOW:
                in_sight = in_sight & (at[None, :] > position[:, None] - window)
            scores = tl.where(in_sight, scores * LOG2_E, float("-inf"))
            merged = tl.maximum(top, tl.max(scores, axis=1))
            weights = _weight(scores, merged[:, None])
            old = _weight(top, merged)
            value = tl.load(
                value_ptr + slot[:, None] * D + channel[None, :],
                mask=readable[:, None] & (channel < D)[None, :],
                other=0,
            )
            if FP8:
                value = from_e4m3(value, query.dtype)
            total = total * old + tl.sum(weights, axis=1)
            acc = acc * old[:, None] + _dot(weights.to(value.dtype), value, CAST)
            top = merged
        if FP8:
            acc *= value_scale
        num_splits = tl.cdiv(kv_len, SPLIT)
        if num_splits <= 1:
            sink = top
            if HAS_SINKS:
                sink = tl.load(sinks_ptr + kv_head * RATIO + head) * LOG2_E
            out = _finish(acc, top, total, sink, HAS_SINKS)
            out_ptr += ((start + first).to(tl.int64) * HKV + kv_head) * (RATIO * D)
            out_at = (token * (HKV * RATIO) + head)[:, None] * D + channel[None, :]
            tl.store(out_ptr + out_at, out.to(out_ptr.dtype.element_ty), mask=inside)
        else:
            place = tl.load(partial_starts_ptr + row) + first.to(tl.int64) * num_splits + split
            place = (place * HKV + kv_head) * RATIO
            sum_at = token * (num_splits * HKV * RATIO) + head
            tl.store(partial_ptr + place * D + sum_at[:, None] * D + channel[None, :], acc, mask=inside)
            tl.store(partial_top_ptr + place + sum_at, top, mask=live)
            tl.store(partial_total_ptr + place + sum_at, total, mask=live)
        worst = tl.max(refused, axis=0)
        if worst != NO_BLOCK:
            tl.atomic_max(refused_ptr + row, worst)


@triton.jit
def merge_kernel(
    out_ptr,
    partial_ptr,
    partial_top_ptr,
    partial_total_ptr,
    tokens_ptr,  # int32 [M] tokens whose sums wait; below 0: nobody's
    places_ptr,  # int64 [M] and their first place
    ends_ptr,  # int32 [M] keys that the token sees
    sinks_ptr,
    HKV: tl.constexpr,
    RATIO: tl.constexpr,
    RATIO_PAD: tl.constexpr,
    D: tl.constexpr,
    D_PAD: tl.constexpr,
    SPLIT: tl.constexpr,
    HAS_SINKS: tl.constexpr,
):
    """One token's sums with the query heads of one key head, from the first split to its last."""
    index = tl.program_id(0)
    token = tl.load(tokens_ptr + index).to(tl.int64)
    if token >= 0:
        place = tl.load(places_ptr + index)
        num_splits = tl.cdiv(tl.load(ends_ptr + index), SPLIT)
        member = tl.arange(0, RATIO_PAD)
        head = tl.program_id(1) * RATIO + member
        channel = tl.arange(0, D_PAD)
        inside = (member < RATIO)[:, None] & (channel < D)[None, :]
        acc = tl.zeros([RATIO_PAD, D_PAD], dtype=tl.float32)
        top = tl.full([RATIO_PAD], float("-inf"), dtype=tl.float32)
        total = tl.zeros([RATIO_PAD], dtype=tl.float32)
        for split in range(num_splits):
            at = (place + split) * (HKV * RATIO) + head
            top_new = tl.load(partial_top_ptr + at, mask=member < RATIO, other=float("-inf"))
            total_new = tl.load(partial_total_ptr + at, mask=member < RATIO, other=0.0)
            acc_new = tl.load(partial_ptr + at[:, None] * D + channel[None, :], mask=inside, other=0.0)
            acc, top, total = _merge(acc, top, total, acc_new, top_new, total_new)
        sink = top
        if HAS_SINKS:
            sink = tl.load(sinks_ptr + head, mask=member < RATIO, other=0.0) * LOG2_E
        out = _finish(acc, top, total, sink, HAS_SINKS)
        at = (token * (HKV * RATIO) + head)[:, None] * D + channel[None, :]
        tl.store(out_ptr + at, out.to(out_ptr.dtype.element_ty), mask=inside)
