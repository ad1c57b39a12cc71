"""What a step's launches share, and what they refused."""

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from kernels.backend import OwnershipError, StepTables
from kernels.gpu.attention import AttentionPlan, plan_attention
from kernels.gpu.gather_tags import gather_tags
from kernels.gpu.launch import NO_BLOCK

Flags = NDArray[Any]  # int32, or int64 where they came with owners


@dataclass(frozen=True, slots=True)
class Plan:
    """``tables`` None: in a CUDA graph, which cannot wait for an answer; its owner asks after each replay."""

    tables: StepTables | None
    attention: AttentionPlan
    slot_mapping: Tensor  # int64 [T]
    token_tags: Tensor  # int64 [T]
    refused: Tensor  # int32 [T], out: blocks that were not written


def plan_step(tables: StepTables, device: torch.device, split: int) -> Plan:
    num_tokens = int(tables.cu_seqlens[-1])
    return Plan(
        tables,
        plan_attention(tables, device, split=split),
        torch.from_numpy(tables.slot_mapping).to(device),
        torch.from_numpy(np.repeat(tables.row_tags, np.diff(tables.cu_seqlens))).to(device),
        torch.full((num_tokens,), NO_BLOCK, dtype=torch.int32, device=device),
    )


def raise_refused(plan: Plan, tables: StepTables) -> None:
    """Waits for the device, once: what it refused must be known before anything leaves. ``tables``: what the plan's
    arrays were made of. Raises OwnershipError, also where the device's book of owners is not the host's."""
    tokens, rows, owners = _told(plan, tables)
    not_written, not_read = np.flatnonzero(tokens != NO_BLOCK), np.flatnonzero(rows != NO_BLOCK)
    if len(not_written) or len(not_read):
        blocks = np.concatenate((tokens[not_written], rows[not_read]))
        is_there = (blocks >= 0) & (blocks < len(tables.block_tags))
        kinds = (("a block id out of range", ~is_there), ("a block of another owner", is_there))
        found = " and ".join(text for text, has in kinds if has.any())
        places = np.union1d(not_written, tables.cu_seqlens[not_read])
        raise OwnershipError(f"a kernel met {found}, and did not touch it", places.tolist(), int(blocks[0]))
    if owners is not None:
        _compare_books(owners, tables)


def _told(plan: Plan, tables: StepTables) -> tuple[Flags, Flags, NDArray[np.int64] | None]:
    """Of tokens [T] and of rows [R], what was refused; and the owner [R, B] of each block that was read, where the
    device keeps a book. In one copy."""
    attention, num_tokens, num_rows = plan.attention, len(plan.refused), len(plan.attention.refused)
    if tables.device_tags is None:
        told: Flags = torch.cat((plan.refused, attention.refused)).cpu().numpy()
        return told[:num_tokens], told[num_tokens:], None
    owners = gather_tags(attention.block_tables, attention.kv_lens, attention.block_tags, attention.block_size)
    told = torch.cat((plan.refused, attention.refused, owners.flatten())).cpu().numpy()
    of_rows = told[num_tokens : num_tokens + num_rows]
    return told[:num_tokens], of_rows, told[num_tokens + num_rows :].reshape(num_rows, -1)


def _compare_books(owners: NDArray[np.int64], tables: StepTables) -> None:
    """Every block that was read has the owner on the device that it has on the host. Nothing was refused: all of these
    blocks are there."""
    width = tables.block_tables.shape[1]
    entries = np.arange(width) * tables.block_size
    is_read = (entries[None, :] < tables.kv_lens[:, None]) & (np.diff(tables.cu_seqlens) > 0)[:, None]
    known = tables.block_tags[np.where(is_read, tables.block_tables, 0)]
    differs = is_read & (owners[:, :width] != known)
    if differs.any():
        blocks = tables.block_tables[differs]
        places = tables.cu_seqlens[np.flatnonzero(differs.any(axis=1))]
        message = "a block has one owner on the device and another on the host"
        raise OwnershipError(message, places.tolist(), int(blocks[0]))
