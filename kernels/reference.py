"""The specification of every op, in plain torch: slow, short, obviously right. Faster twins are tested against this
file.

Shapes: T tokens of a step, R rows (sequences), H hidden size, Hq query heads, Hkv key/value heads, D head size, N
blocks of `block_size` slots. Numbers: every op computes in float32 and rounds once to the dtype of its input.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

DIGEST_A, DIGEST_B = 0x9E3779B185EBCA87, 0xC2B2AE3D27D4EB4F
_WORD = 2**64
E4M3_MAX = 448.0


def rms_norm(x: Tensor, weight: Tensor, epsilon: float, residual: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Root mean square norm (arXiv 1910.07467), with an optional residual added first.

    x [T, H], weight [H], residual float32 [T, H] or None -> (normed [T, H] in weight's dtype, x + residual float32
    [T, H]). The residual stream stays in float32: thirty layers of bfloat16 sums cost more accuracy than all else.
    """
    total = x.float() if residual is None else x.float() + residual
    scale = torch.rsqrt(total.square().mean(dim=-1, keepdim=True) + epsilon)
    return (total * scale * weight.float()).to(weight.dtype), total


def rope(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary position embedding (arXiv 2104.09864), Llama's half-rotation: element i pairs with i + D/2.

    x [T, heads, D], cos and sin [T, D/2] float32 of each token's position -> [T, heads, D] in x's dtype.
    """
    first, second = x.float().chunk(2, dim=-1)
    cos, sin = cos[:, None, :], sin[:, None, :]
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1).to(x.dtype)


def silu_and_mul(gate_up: Tensor) -> Tensor:
    """SwiGLU's activation (arXiv 2002.05202): gate_up [T, 2 * I] -> silu(first half) * second half, [T, I]."""
    gate, up = gate_up.float().chunk(2, dim=-1)
    return (F.silu(gate) * up).to(gate_up.dtype)


def gelu_and_mul(gate_up: Tensor, *, tanh: bool) -> Tensor:
    """GeGLU's activation (arXiv 2002.05202): gate_up [T, 2 * I] -> gelu(first half) * second half, [T, I]. gelu(x) is
    x * P(N(0, 1) < x), through erf, or with ``tanh`` through Hendrycks' approximation of it (arXiv 1606.08415)."""
    gate, up = gate_up.float().chunk(2, dim=-1)
    return (F.gelu(gate, approximate="tanh" if tanh else "none") * up).to(gate_up.dtype)


def to_e4m3(x: Tensor, scale: float = 1.0) -> Tensor:
    """x of any shape and float dtype -> uint8 of its shape: the bytes of x / scale in e4m3 (OFP8, 2023), rounded to the
    nearest, ties to even; beyond 448 the largest there is, NaN stays NaN. ``scale`` is a power of two, and so rounds
    nothing."""
    return (x.float() / scale).clamp(-E4M3_MAX, E4M3_MAX).to(torch.float8_e4m3fn).view(torch.uint8)


def from_e4m3(byte: Tensor, scale: float = 1.0) -> Tensor:
    """uint8 -> float32 of its shape, exactly."""
    return byte.view(torch.float8_e4m3fn).float() * scale


def store_kv(key: Tensor, value: Tensor, key_cache: Tensor, value_cache: Tensor, slot_mapping: Tensor) -> None:
    """Write each token's key and value into its slot, in place.

    key, value [T, Hkv, D]; caches [N, block_size, Hkv, D]; slot_mapping int64 [T], block_id * block_size + offset, all
    different and within the cache.
    """
    key_cache.flatten(0, 1)[slot_mapping] = key
    value_cache.flatten(0, 1)[slot_mapping] = value


def paged_attention(
    query: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    *,
    cu_seqlens: Tensor,
    kv_lens: Tensor,
    block_tables: Tensor,
    scale: float,
    window: int = 0,
    soft_cap: float = 0.0,
    sinks: Tensor | None = None,
) -> Tensor:
    """Causal attention of every row over its own blocks: prompt chunks and single decode tokens alike.

    query [T, Hq, D], caches [N, block_size, Hkv, D], cu_seqlens int32 [R+1], kv_lens int32 [R] (this step's tokens
    included), block_tables int32 [R, B] padded with -1 -> [T, Hq, D] in query's dtype.
    Token i of a row's n new tokens sees the first kv_len - n + i + 1 keys. A row of 0 new tokens does nothing. Only
    slots below kv_len are ever read. Hq is a multiple of Hkv: query head h reads key/value head h // (Hq / Hkv).

    In this order: scores = query . key * scale; with ``soft_cap`` c > 0, scores = c * tanh(scores / c) (arXiv
    2408.00118); keys out of sight are dropped: those ahead, and with ``window`` w > 0 those at w or more tokens before
    (the token at position p sees j with p - w < j <= p: transformers' sliding_window); softmax, in whose denominator
    ``sinks`` float32 [Hq] adds one more logit for each head, after the cap and without a value (arXiv 2309.17453, as
    gpt-oss learns it).
    """
    out = torch.empty_like(query)
    num_heads, num_kv_heads, block_size = query.shape[1], key_cache.shape[2], key_cache.shape[1]
    for row, kv_len in enumerate(kv_lens.tolist()):
        start, end = int(cu_seqlens[row]), int(cu_seqlens[row + 1])
        if start == end:
            continue
        blocks = block_tables[row, : -(-kv_len // block_size)].long()
        key = key_cache[blocks].flatten(0, 1)[:kv_len].float().repeat_interleave(num_heads // num_kv_heads, dim=1)
        value = value_cache[blocks].flatten(0, 1)[:kv_len].float().repeat_interleave(num_heads // num_kv_heads, dim=1)
        scores = torch.einsum("qhd,khd->hqk", query[start:end].float(), key) * scale
        if soft_cap > 0:
            scores = soft_cap * torch.tanh(scores / soft_cap)
        ahead = torch.arange(kv_len)[None, :] - torch.arange(kv_len - (end - start), kv_len)[:, None]
        hidden = (ahead > 0) | (ahead <= -window) if window > 0 else ahead > 0
        scores = scores.masked_fill(hidden, float("-inf"))
        if sinks is not None:
            scores = torch.cat((scores, sinks[:, None, None].expand(-1, end - start, 1)), dim=-1)
        weights = scores.softmax(dim=-1)[..., :kv_len]
        out[start:end] = torch.einsum("hqk,khd->qhd", weights, value).to(query.dtype)
    return out


def top(logits: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """The largest numbers of each row: logits float32 [S, V], 1 <= count <= V -> (columns int64 [S, count], the largest
    first, the smallest column first among equals; whether all numbers of the row are finite, bool [S]). Of a row with a
    NaN or an infinity, the columns mean nothing."""
    order = logits.sort(dim=-1, descending=True, stable=True).indices[:, :count]
    return order, logits.isfinite().all(dim=-1)


def scrub_blocks(memory: Tensor, block_ids: Tensor, block_tags: Tensor) -> None:
    """Zeros for blocks in every layer, and nobody's tag on them, in place: memory [layers, 2, N, block_size, Hkv, D],
    block_ids int64 [B], block_tags int64 [N]. Ids out of range are left alone."""
    blocks = block_ids[(block_ids >= 0) & (block_ids < memory.shape[2])]
    memory[:, :, blocks] = 0
    block_tags[blocks] = 0


def gather_tags(block_tables: Tensor, kv_lens: Tensor, block_tags: Tensor, block_size: int) -> Tensor:
    """The owners of the blocks that rows read: block_tables int32 [R, B], kv_lens int32 [R], block_tags int64 [N] ->
    int64 [R, B], 0 beyond a row's blocks, -1 where an id is out of range."""
    is_read = torch.arange(block_tables.shape[1])[None, :] * block_size < kv_lens[:, None]
    is_there = (block_tables >= 0) & (block_tables < len(block_tags))
    tags = block_tags[torch.where(is_there, block_tables, 0).long()].where(is_there, -1)
    return tags.where(is_read, 0)


def digest_blocks(key_cache: Tensor, value_cache: Tensor, block_ids: Tensor, key: tuple[int, int]) -> Tensor:
    """128 bits for the content of each block: caches [N, ...], block_ids int64 [B] -> int64 [B, 2].

    Exactly, on 64-bit words with everything modulo 2^64: the block's bytes of keys, then those of values, each cut
    into little-endian words, the last filled up with zeros. Four lanes begin as key[i % 2] + i * A; word j of each part
    goes into lane j % 4: lane = rotl(lane + word * B, 31) * A. Digest half h: sum = key[h] ^ bytes of one part; for
    each lane i, sum = (sum ^ rotl(lane, 29 * h)) * B + i; then sum ^= sum >> 33, sum *= A, sum ^= sum >> 29.

    Every step is a bijection of its lane, so that one changed word always changes its lane. It finds writes that should
    not have been; it is no cryptographic hash: who knows ``key`` can make two blocks with one digest.
    """
    rows = []
    for block in block_ids.tolist():
        lanes = [(key[i % 2] + i * DIGEST_A) % _WORD for i in range(4)]
        parts = [
            cache[block].contiguous().flatten().view(torch.uint8).numpy().tobytes()
            for cache in (key_cache, value_cache)
        ]
        for part in parts:
            for j in range(0, len(part), 8):
                word = int.from_bytes(part[j : j + 8], "little")
                i = j // 8 % 4
                lanes[i] = _rotl((lanes[i] + word * DIGEST_B) % _WORD, 31) * DIGEST_A % _WORD
        for half in range(2):
            sum_ = key[half] ^ len(parts[0])
            for i, lane in enumerate(lanes):
                sum_ = ((sum_ ^ _rotl(lane, 29 * half)) * DIGEST_B + i) % _WORD
            sum_ = (sum_ ^ sum_ >> 33) * DIGEST_A % _WORD
            rows.append(sum_ ^ sum_ >> 29)
    signed = [number - _WORD if number >= _WORD // 2 else number for number in rows]
    return torch.tensor(signed, dtype=torch.int64).view(-1, 2)


def _rotl(number: int, by: int) -> int:
    return (number << by | number >> 64 - by) % _WORD if by else number


def fill_blocks(key_cache: Tensor, value_cache: Tensor, block_ids: Tensor, byte: int) -> None:
    """Set every byte of blocks, in place: 0 scrubs, 255 makes every number a NaN. Arguments as in digest_blocks."""
    for cache in (key_cache, value_cache):
        cache.view(torch.uint8)[block_ids] = byte
