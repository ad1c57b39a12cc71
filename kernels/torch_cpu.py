"""The same ops as kernels/reference.py, quicker on a CPU with nothing but torch.

Decode rows (one new token each) share one attention call over keys gathered into a padded rectangle. What a row
computes may therefore depend in its last bits on how long its neighbours are: fit for relaxed isolation only. What it
*reads* may not: every padded position is overwritten with zeros after the gather, so that no stale or foreign number,
NaN included, can reach a sum.
"""

from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels import reference
from kernels.backend import StepTables
from kernels.products import Activated, NormThenProduct, PlainHead, PlainProduct, Product


def rms_norm(x: Tensor, weight: Tensor, epsilon: float, residual: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """See reference.rms_norm."""
    total = x.float() if residual is None else residual + x
    normed = F.rms_norm(total, (total.shape[-1],), None, epsilon)
    return normed.mul_(weight).to(weight.dtype), total


def silu_and_mul(gate_up: Tensor) -> Tensor:
    """See reference.silu_and_mul."""
    gate, up = gate_up.chunk(2, dim=-1)
    return F.silu(gate.float()).mul_(up).to(gate_up.dtype)


def top(logits: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """See reference.top."""
    found = torch.zeros((len(logits), count), dtype=torch.int64)
    finite = logits.isfinite().all(dim=-1)
    for row in finite.nonzero().flatten().tolist():
        columns = (logits[row] >= logits[row].topk(count).values[-1]).nonzero().flatten()
        found[row] = columns[logits[row, columns].sort(descending=True, stable=True).indices[:count]]
    return found, finite


rope = reference.rope


def store_kv(key: Tensor, value: Tensor, key_cache: Tensor, value_cache: Tensor, slot_mapping: Tensor) -> None:
    """See reference.store_kv."""
    key_cache.flatten(0, 1).index_copy_(0, slot_mapping, key)
    value_cache.flatten(0, 1).index_copy_(0, slot_mapping, value)


@dataclass(frozen=True, slots=True)
class ChunkRow:
    """A row with more than one new token: tokens start..end, its blocks, its length and how far each key is ahead."""

    start: int
    end: int
    blocks: Tensor  # int64 [b]
    kv_len: int
    ahead: Tensor  # int64 [n, kv_len], key's position minus token's


@dataclass(frozen=True, slots=True)
class AttentionPlan:
    """What a step's block tables mean for attention; the same in every layer, so worked out once a step."""

    decode_tokens: Tensor  # int64 [d] place in the batch of each decode row's token
    decode_blocks: Tensor  # int64 [d * b] blocks to gather, rows padded with their own first block
    decode_padding: Tensor  # bool [d, b * block_size, 1, 1], True beyond the row's length
    decode_ahead: Tensor  # int64 [d, 1, 1, b * block_size], key's position minus token's
    chunks: tuple[ChunkRow, ...]
    masks: dict[int, "Masks"] = field(default_factory=dict)  # by window, each made at its first use

    def masks_of(self, window: int) -> "Masks":
        if window not in self.masks:
            self.masks[window] = Masks(
                decode=_visible(self.decode_ahead, window),
                chunks=tuple(_visible(chunk.ahead, window) for chunk in self.chunks),
            )
        return self.masks[window]


@dataclass(frozen=True, slots=True)
class Masks:
    """True where a token may look; shapes as the plan's ``ahead``."""

    decode: Tensor
    chunks: tuple[Tensor, ...]


@dataclass(frozen=True, slots=True)
class Rule:
    """How scores become weights, beyond the mask: see reference.paged_attention."""

    scale: float
    soft_cap: float = 0.0
    sinks: Tensor | None = None

    @property
    def is_plain(self) -> bool:
        return self.soft_cap == 0 and self.sinks is None


def _visible(ahead: Tensor, window: int) -> Tensor:
    return (ahead <= 0) & (ahead > -window) if window > 0 else ahead <= 0


def plan_attention(*, cu_seqlens: Tensor, kv_lens: Tensor, block_tables: Tensor, block_size: int) -> AttentionPlan:
    """Arguments as in reference.paged_attention."""
    num_new = (cu_seqlens[1:] - cu_seqlens[:-1]).long()
    rows = (num_new == 1).nonzero().flatten()
    lengths = kv_lens[rows].long()
    num_blocks_max = -(-int(lengths.max()) // block_size) if len(rows) else 0
    blocks = block_tables[rows, :num_blocks_max].long()
    in_use = torch.arange(num_blocks_max)[None, :] * block_size < lengths[:, None]
    blocks = torch.where(in_use, blocks, blocks[:, :1])
    ahead = torch.arange(num_blocks_max * block_size)[None, :] - (lengths[:, None] - 1)
    chunks = []
    for row in (num_new > 1).nonzero().flatten().tolist():
        start, end, kv_len = int(cu_seqlens[row]), int(cu_seqlens[row + 1]), int(kv_lens[row])
        positions = torch.arange(kv_len - (end - start), kv_len)
        chunks.append(
            ChunkRow(
                start=start,
                end=end,
                blocks=block_tables[row, : -(-kv_len // block_size)].long(),
                kv_len=kv_len,
                ahead=torch.arange(kv_len)[None, :] - positions[:, None],
            )
        )
    return AttentionPlan(
        decode_tokens=cu_seqlens[:-1][rows].long(),
        decode_blocks=blocks.flatten(),
        decode_padding=(ahead > 0)[:, :, None, None],
        decode_ahead=ahead[:, None, None, :],
        chunks=tuple(chunks),
    )


def paged_attention(
    query: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    *,
    plan: AttentionPlan,
    scale: float,
    window: int = 0,
    soft_cap: float = 0.0,
    sinks: Tensor | None = None,
) -> Tensor:
    """See reference.paged_attention; the tables come as a plan."""
    out = torch.empty_like(query)
    masks, rule = plan.masks_of(window), Rule(scale, soft_cap, sinks)
    if len(plan.decode_tokens):
        tokens = plan.decode_tokens
        out[tokens] = _decode_rows(query[tokens], key_cache, value_cache, plan, masks.decode, rule)
    for chunk, mask in zip(plan.chunks, masks.chunks, strict=True):
        rows = slice(chunk.start, chunk.end)
        out[rows] = _chunk_row(query[rows], key_cache, value_cache, chunk, mask, rule)
    return out


def _decode_rows(
    query: Tensor, key_cache: Tensor, value_cache: Tensor, plan: AttentionPlan, mask: Tensor, rule: Rule
) -> Tensor:
    """query [d, Hq, D] -> [d, Hq, D]. The query heads of one key head become its query rows: no key is repeated."""
    num_rows, num_heads, head_size = query.shape
    num_kv_heads = key_cache.shape[2]
    key = _gather(key_cache, plan, num_rows)
    value = _gather(value_cache, plan, num_rows)
    packed = query.view(num_rows, num_kv_heads, num_heads // num_kv_heads, head_size)
    if rule.is_plain:
        attended = F.scaled_dot_product_attention(packed, key, value, attn_mask=mask, scale=rule.scale)
    else:
        sinks = None if rule.sinks is None else rule.sinks.view(num_kv_heads, -1, 1)
        attended = _attend(packed, key, value, mask, rule, sinks)
    return attended.reshape(num_rows, num_heads, head_size)


def _attend(query: Tensor, key: Tensor, value: Tensor, mask: Tensor, rule: Rule, sinks: Tensor | None) -> Tensor:
    """query [B, H, n, D], key and value [B, H, L, D], mask to [B, H, n, L], sinks to [B, H, n, 1]; for the rules that
    torch's own attention does not know."""
    scores = (query.float() @ key.float().transpose(-1, -2)) * rule.scale
    if rule.soft_cap > 0:
        scores = torch.tanh(scores / rule.soft_cap) * rule.soft_cap
    scores = scores.masked_fill(~mask, float("-inf"))
    if sinks is not None:
        scores = torch.cat((scores, sinks.expand(*scores.shape[:-1], 1)), dim=-1)
    weights = scores.softmax(dim=-1)[..., : key.shape[-2]]
    return (weights @ value.float()).to(query.dtype)


def _gather(cache: Tensor, plan: AttentionPlan, num_rows: int) -> Tensor:
    """The rows' slots as one padded rectangle [d, Hkv, L, D], zero wherever there is padding."""
    _, _, num_kv_heads, head_size = cache.shape
    gathered = cache.index_select(0, plan.decode_blocks).view(num_rows, -1, num_kv_heads, head_size)
    return gathered.masked_fill_(plan.decode_padding, 0).transpose(1, 2)


def _chunk_row(
    query: Tensor, key_cache: Tensor, value_cache: Tensor, chunk: ChunkRow, mask: Tensor, rule: Rule
) -> Tensor:
    """query [n, Hq, D] -> [n, Hq, D]."""
    key = key_cache.index_select(0, chunk.blocks).flatten(0, 1)[: chunk.kv_len].transpose(0, 1)[None]
    value = value_cache.index_select(0, chunk.blocks).flatten(0, 1)[: chunk.kv_len].transpose(0, 1)[None]
    heads = query.transpose(0, 1)[None]
    if rule.is_plain:
        attended = F.scaled_dot_product_attention(heads, key, value, attn_mask=mask, scale=rule.scale, enable_gqa=True)
    else:
        group_size = heads.shape[1] // key.shape[1]
        key, value = key.repeat_interleave(group_size, dim=1), value.repeat_interleave(group_size, dim=1)
        attended = _attend(heads, key, value, mask, rule, None if rule.sinks is None else rule.sinks[:, None, None])
    return attended[0].transpose(0, 1)


@dataclass(frozen=True, slots=True)
class TorchPlan:
    attention: AttentionPlan
    slot_mapping: Tensor


class TorchBackend:
    """These ops behind kernels/backend.py's face."""

    name = "torch-cpu"
    exact = False
    takes_fp8_cache = False
    device = torch.device("cpu")

    def plan(self, tables: StepTables) -> TorchPlan:
        attention = plan_attention(
            cu_seqlens=torch.from_numpy(tables.cu_seqlens),
            kv_lens=torch.from_numpy(tables.kv_lens),
            block_tables=torch.from_numpy(tables.block_tables),
            block_size=tables.block_size,
        )
        return TorchPlan(attention, torch.from_numpy(tables.slot_mapping))

    def linear(self, weight: Tensor, bias: Tensor | None = None) -> PlainProduct:
        return PlainProduct(weight, bias)

    def gate_up(self, weight: Tensor, bias: Tensor | None = None) -> Activated:
        return Activated(self.linear(weight, bias), self.silu_and_mul)

    def head(self, weight: Tensor) -> PlainHead:
        return PlainHead(weight)

    def rms_norm(
        self, x: Tensor, weight: Tensor, epsilon: float, residual: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        return rms_norm(x, weight, epsilon, residual)

    def normed(self, weight: Tensor, epsilon: float, product: Product) -> NormThenProduct:
        return NormThenProduct(self.rms_norm, weight, epsilon, product)

    def silu_and_mul(self, gate_up: Tensor) -> Tensor:
        return silu_and_mul(gate_up)

    def attend(
        self,
        qkv: Tensor,
        cos: Tensor | None,
        sin: Tensor | None,
        key_cache: Tensor,
        value_cache: Tensor,
        *,
        num_heads: int,
        plan: TorchPlan,
        scale: float,
        window: int = 0,
        soft_cap: float = 0.0,
        sinks: Tensor | None = None,
    ) -> Tensor:
        value_start = num_heads + key_cache.shape[2]
        rotated = qkv[:, :value_start]
        if cos is not None and sin is not None:
            rotated = rope(rotated, cos, sin)
        store_kv(rotated[:, num_heads:], qkv[:, value_start:], key_cache, value_cache, plan.slot_mapping)
        return paged_attention(
            rotated[:, :num_heads],
            key_cache,
            value_cache,
            plan=plan.attention,
            scale=scale,
            window=window,
            soft_cap=soft_cap,
            sinks=sinks,
        )

    def top(self, logits: Tensor, count: int) -> tuple[Tensor, Tensor]:
        return top(logits, count)

    def check(self, plan: TorchPlan) -> None:
        """Torch itself raises on a block out of range; owners are the auditor's business alone here."""
