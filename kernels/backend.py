"""What a model needs of the ops, whoever computes them.

The model builds a Plan once a step and hands it to every layer. A backend that is `exact` computes each row from its
own numbers in an order of its own: a row's bits do not depend on the other rows, on chunking, on the placement of
blocks or on the number of threads. One that is not is fit for relaxed isolation only.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from kernels.products import Head, NormedProduct, Product

PADDING_SLOT = -(2**62)  # of a token that only fills up a batch: it is written nowhere


class KernelError(Exception):
    """The kernels asked for cannot be had on this machine."""


class OwnershipError(Exception):
    """A kernel met a block that its row may not touch: it did not touch it, and what it computed must not leave.

    ``tokens`` are the places in the batch of whoever asked, empty where that is not known; ``block_id`` is one of the
    blocks, -1 where there is none.
    """

    def __init__(self, message: str, tokens: Sequence[int] = (), block_id: int = -1) -> None:
        super().__init__(message)
        self.tokens = tuple(tokens)
        self.block_id = block_id


@dataclass(frozen=True, slots=True)
class StepTables:
    """Where a step reads and writes: the arrays of kernels/reference.py, and the owners' tags.

    ``row_tags`` [R] names each row's domain, ``block_tags`` [N] each block's owner, as numbers; 0 is nobody.
    ``device_tags`` int64 [N]: the same where a DeviceBackend's kernels read them; None: they get a copy of the host's.
    """

    cu_seqlens: NDArray[np.int32]
    kv_lens: NDArray[np.int32]
    block_tables: NDArray[np.int32]
    slot_mapping: NDArray[np.int64]
    row_tags: NDArray[np.int64]
    block_tags: NDArray[np.int64]
    block_size: int
    device_tags: Tensor | None = None


def check_tables(tables: StepTables, *, may_pad: bool = False) -> None:
    """Raises ValueError on tables that cannot be. ``may_pad``: rows of one token and no key at all may be among them
    (kernels/padding.py)."""
    num_new = np.diff(tables.cu_seqlens)
    too_short = tables.kv_lens < num_new
    if may_pad:
        too_short &= (num_new != 1) | (tables.kv_lens != 0)
    if tables.cu_seqlens[0] != 0 or (num_new < 0).any() or too_short.any():
        raise ValueError("rows must be in order and no longer than their keys")
    if (tables.kv_lens > tables.block_tables.shape[1] * tables.block_size).any():
        raise ValueError("a row is longer than its block table")
    if len(tables.slot_mapping) != tables.cu_seqlens[-1] or not (
        len(tables.kv_lens) == len(num_new) == len(tables.row_tags) == len(tables.block_tables)
    ):
        raise ValueError("tables of different steps")


class Backend(Protocol):
    name: str  # as /readyz shows it
    exact: bool
    device: torch.device  # where weights, cache and a step's tensors are
    takes_fp8_cache: bool  # keys and values may be bytes in e4m3 (reference.to_e4m3), scale 1

    def plan(self, tables: StepTables) -> Any:
        """Whatever this backend wants to work out once a step. Raises ValueError on tables that cannot be."""
        ...

    def linear(self, weight: Tensor, bias: Tensor | None = None) -> Product:
        """weight [out, in], bias [out] or None: made ready once, at load. Products come in the weight's dtype."""
        ...

    def gate_up(self, weight: Tensor, bias: Tensor | None = None) -> Product:
        """weight [2 * I, in], bias [2 * I] or None, of gate and then of up: x [T, in] -> [T, I], silu_and_mul of
        the product that ``linear`` gives, to the bit."""
        ...

    def head(self, weight: Tensor) -> Head:
        """weight [out, in]; takes inputs of the weight's dtype and gives float32."""
        ...

    def rms_norm(
        self, x: Tensor, weight: Tensor, epsilon: float, residual: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """See reference.rms_norm; ``residual`` may be overwritten."""
        ...

    def normed(self, weight: Tensor, epsilon: float, product: Product) -> NormedProduct:
        """rms_norm with this weight [in] and then ``product``, which this backend made ready, to the bit."""
        ...

    def silu_and_mul(self, gate_up: Tensor) -> Tensor:
        """See reference.silu_and_mul."""
        ...

    def attend(
        self,
        qkv: Tensor,
        cos: Tensor | None,
        sin: Tensor | None,
        key_cache: Tensor,
        value_cache: Tensor,
        *,
        num_heads: int,
        plan: Any,
        scale: float,
        window: int = 0,
        soft_cap: float = 0.0,
        sinks: Tensor | None = None,
    ) -> Tensor:
        """Rope, store, attention: qkv [T, Hq + 2 * Hkv, D], which may be overwritten -> [T, Hq, D].

        ``cos`` and ``sin`` [T, D / 2] None: queries and keys come rotated already, or want no rotation. For ``window``,
        ``soft_cap`` and ``sinks`` see reference.paged_attention.
        """
        ...

    def top(self, logits: Tensor, count: int) -> tuple[Tensor, Tensor]:
        """See reference.top; the logits lie on ``device``."""
        ...

    def check(self, plan: Any) -> None:
        """After the last layer, before any output leaves. Raises OwnershipError."""
        ...


@dataclass(frozen=True, slots=True)
class Launched:
    """A step that a graph computed: float32 [R, V] of every row, and the arrays that its kernels held, filled up to
    the graph's size. All of it lasts until the next run."""

    logits: Tensor
    token_ids: NDArray[np.int64]
    positions: NDArray[np.int64]
    tables: StepTables


class Graphs(Protocol):
    """Launches of decode batches, kept and launched again (kernels/gpu/graphs.py)."""

    sizes: tuple[int, ...]

    def fits(self, tables: StepTables) -> bool: ...

    def run(self, tables: StepTables, token_ids: NDArray[np.int64], positions: NDArray[np.int64]) -> Launched:
        """Raises OwnershipError."""
        ...


@runtime_checkable
class DeviceBackend(Protocol):
    """What a backend has besides where ``device`` has a memory of its own. Blocks have owners there too: a second book,
    which the kernels keep, beside the one on the host."""

    top_max: int  # the most that `top` finds of a row

    def new_tags(self, num_blocks: int) -> Tensor:
        """int64 [num_blocks] on the device: every block is nobody's."""
        ...

    def scrub(self, memory: Sequence[Tensor], tags: Tensor, block_ids: Sequence[int]) -> None:
        """Zeros and nobody's tag for blocks, behind everything that was launched before. ``memory``: tensors [layers,
        2, N, block_size, Hkv, D], one for each shape of layers; ``tags`` int64 [N]."""
        ...

    def graphs(
        self,
        forward: Callable[[Tensor, Tensor, Any, Tensor], Tensor],
        sizes: Sequence[int],
        *,
        device_tags: Tensor,
        block_size: int,
        context_max: int,
    ) -> Graphs:
        """Of batches of 1 to max(sizes) rows; ``forward`` is given token ids, positions, a plan and the wanted tokens
        as a model is (engine/models/facts.py)."""
        ...
