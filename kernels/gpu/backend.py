"""The Triton kernels behind kernels/backend.py's face: on a GPU, or interpreted on the CPU for tests.

Exact by construction: every row has one order of sums (paged_attention.py, matmul.py, rms_norm.py). Bits are promised
per GPU architecture and version of Triton.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from kernels.backend import KernelError, StepTables, check_tables
from kernels.gpu.attention import paged_attention
from kernels.gpu.capture import CalledAgain, Capture, CudaCapture
from kernels.gpu.graphs import DecodeGraphs, Forward
from kernels.gpu.launch import SPLIT, is_interpreted
from kernels.gpu.launch_table import AttentionShape, attention_shape
from kernels.gpu.logits import TOP_K_MAX, top
from kernels.gpu.matmul import TritonProduct
from kernels.gpu.plan import Plan, plan_step, raise_refused
from kernels.gpu.rms_norm import rms_norm
from kernels.gpu.rope_and_store_kv import rope_and_store_kv
from kernels.gpu.scrub_blocks import scrub_blocks
from kernels.gpu.silu_and_mul import silu_and_mul
from kernels.products import Activated, NormThenProduct, Product

CAPABILITY_MIN = 80  # bfloat16 in the matrix units


class TritonBackend:
    """``split`` is part of what a bit is, see paged_attention.py; tests want it short. Raises KernelError where there
    is neither a GPU nor the interpreter."""

    exact = True
    takes_fp8_cache = True
    top_max = TOP_K_MAX

    def __init__(self, split: int = SPLIT) -> None:
        self.split = split
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
        return plan_step(tables, self.device, self.split)

    def linear(self, weight: Tensor, bias: Tensor | None = None) -> TritonProduct:
        return TritonProduct(weight, bias, self.device)

    def gate_up(self, weight: Tensor, bias: Tensor | None = None) -> Activated:
        return Activated(self.linear(weight, bias), self.silu_and_mul)

    def head(self, weight: Tensor) -> TritonProduct:
        return TritonProduct(weight, None, self.device, head=True)

    def rms_norm(
        self, x: Tensor, weight: Tensor, epsilon: float, residual: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        return rms_norm(x.contiguous(), weight, epsilon, residual)

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
        """Waits for the device. In a graph nobody can: its owner does."""
        if plan.tables is not None:
            raise_refused(plan, plan.tables)

    def new_tags(self, num_blocks: int) -> Tensor:
        return torch.zeros(num_blocks, dtype=torch.int64, device=self.device)

    def scrub(self, memory: Sequence[Tensor], tags: Tensor, block_ids: Sequence[int]) -> None:
        blocks = torch.tensor(block_ids, dtype=torch.int64, device=self.device)
        for one in memory:
            scrub_blocks(one, blocks, tags)

    def graphs(
        self,
        forward: Forward,
        sizes: Sequence[int],
        *,
        device_tags: Tensor,
        block_size: int,
        context_max: int,
    ) -> DecodeGraphs:
        return DecodeGraphs(
            forward,
            sizes,
            device_tags=device_tags,
            block_size=block_size,
            context_max=context_max,
            split=self.split,
            capture=self.capture(),
        )

    def capture(self) -> Capture:
        return CudaCapture(self.device) if self.device.type == "cuda" else CalledAgain()
