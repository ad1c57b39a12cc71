"""The Triton kernels behind kernels/backend.py's face: on a GPU, or interpreted on the CPU for tests.

Exact by construction: every row has one order of sums (paged_attention.py, matmul.py, rms_norm.py). Bits are promised
per GPU architecture and version of Triton.
"""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from kernels.backend import KernelError, OwnershipError, StepTables, check_tables
from kernels.gpu.attention import AttentionPlan, paged_attention, plan_attention
from kernels.gpu.launch import NO_BLOCK, SPLIT, is_interpreted
from kernels.gpu.launch_table import AttentionShape, attention_shape
from kernels.gpu.matmul import TritonProduct
from kernels.gpu.rms_norm import rms_norm
from kernels.gpu.rope_and_store_kv import rope_and_store_kv
from kernels.gpu.silu_and_mul import silu_and_mul
from kernels.torch_cpu import top

CAPABILITY_MIN = 80  # bfloat16 in the matrix units


@dataclass(frozen=True, slots=True)
class Plan:
    tables: StepTables
    attention: AttentionPlan
    slot_mapping: Tensor  # int64 [T]
    token_tags: Tensor  # int64 [T]
    refused: Tensor  # int32 [T], out: blocks that were not written


class TritonBackend:
    """``split`` is part of what a bit is, see paged_attention.py; tests want it short. Raises KernelError where there
    is neither a GPU nor the interpreter."""

    exact = True
    takes_fp8_cache = True

    def __init__(self, split: int = SPLIT) -> None:
        self._split = split
        if is_interpreted():
            self.device, self.capability, self.name = torch.device("cpu"), 0, "triton-interpreted"
            return
        if not torch.cuda.is_available():
            raise KernelError("the Triton kernels want a GPU, and PyTorch finds none")
        self.device = torch.device("cuda", torch.cuda.current_device())
        major, minor = torch.cuda.get_device_capability(self.device)
        self.capability = 10 * major + minor
        if self.capability < CAPABILITY_MIN:
            raise KernelError(f"the Triton kernels want compute capability 8.0 or newer, this GPU has {major}.{minor}")
        self.name = f"triton-sm{self.capability}"

    def plan(self, tables: StepTables) -> Plan:
        check_tables(tables, may_pad=True)
        num_tokens = int(tables.cu_seqlens[-1])
        return Plan(
            tables,
            plan_attention(tables, self.device, split=self._split),
            torch.from_numpy(tables.slot_mapping).to(self.device),
            torch.from_numpy(np.repeat(tables.row_tags, np.diff(tables.cu_seqlens))).to(self.device),
            torch.full((num_tokens,), NO_BLOCK, dtype=torch.int32, device=self.device),
        )

    def linear(self, weight: Tensor, bias: Tensor | None = None) -> TritonProduct:
        return TritonProduct(weight, bias, self.device)

    def head(self, weight: Tensor) -> TritonProduct:
        return TritonProduct(weight, None, self.device)

    def rms_norm(
        self, x: Tensor, weight: Tensor, epsilon: float, residual: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        return rms_norm(x.contiguous(), weight, epsilon, residual)

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
        plan: Plan,
        scale: float,
        window: int = 0,
        soft_cap: float = 0.0,
        sinks: Tensor | None = None,
    ) -> Tensor:
        rope_and_store_kv(
            qkv,
            cos,
            sin,
            key_cache,
            value_cache,
            num_heads=num_heads,
            slot_mapping=plan.slot_mapping,
            token_tags=plan.token_tags,
            block_tags=plan.attention.block_tags,
            refused=plan.refused,
        )
        return paged_attention(
            qkv[:, :num_heads],
            key_cache,
            value_cache,
            plan=plan.attention,
            shape=self.attention_shape(qkv, key_cache, num_heads),
            scale=scale,
            window=window,
            soft_cap=soft_cap,
            sinks=sinks,
        )

    def attention_shape(self, qkv: Tensor, key_cache: Tensor, num_heads: int) -> AttentionShape:
        _, block_size, num_kv_heads, size = key_cache.shape
        ratio = num_heads // num_kv_heads
        return attention_shape(self.capability, size, ratio, block_size, qkv.dtype.itemsize, key_cache.dtype.itemsize)

    def top(self, logits: Tensor, count: int) -> tuple[Tensor, Tensor]:
        return top(logits, count)

    def check(self, plan: Plan) -> None:
        """Waits for the device: what it refused must be known before anything leaves."""
        tokens, rows = plan.refused.cpu().numpy(), plan.attention.refused.cpu().numpy()
        not_written, not_read = np.flatnonzero(tokens != NO_BLOCK), np.flatnonzero(rows != NO_BLOCK)
        if len(not_written) or len(not_read):
            blocks = np.concatenate((tokens[not_written], rows[not_read]))
            is_there = (blocks >= 0) & (blocks < len(plan.tables.block_tags))
            kinds = (("a block id out of range", ~is_there), ("a block of another owner", is_there))
            found = " and ".join(text for text, has in kinds if has.any())
            places = np.union1d(not_written, plan.tables.cu_seqlens[not_read])
            raise OwnershipError(f"a kernel met {found}, and did not touch it", places.tolist(), int(blocks[0]))
