"""The native ops behind kernels/backend.py's face. Sizes are checked here, once a step; the library checks every block
id and owner itself.

The library's rule (src/isa.cpp) makes rows exact. Bits are promised per instruction set.

Which set serves is decided by the processor's flags and a trial of its products (kernels/cpu/trial.py), never by a
stopwatch, so that a restart computes the same bits.
"""

import ctypes
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from kernels.backend import KernelError, OwnershipError, StepTables, check_tables
from kernels.cpu.library import (
    DTYPES,
    ActivationArgs,
    AttentionArgs,
    NormArgs,
    RopeArgs,
    TopArgs,
    load,
    optional_pointer,
    pointer,
)
from kernels.cpu.normed import NativeNormedProduct
from kernels.cpu.product import NativeProduct
from kernels.cpu.trial import multiplies
from kernels.memory import Arena
from kernels.products import Head, NormedProduct, NormThenProduct, Product

ITEM_TOKENS_MAX = 16  # new tokens of a row that share one walk over its keys
ROPE, ATTENTION = 1, 2  # halves of `attend`
SILU, GELU_TANH, GELU_ERF = 0, 1, 2
FLAGS = {1: "a block id out of range", 2: "a block of another owner"}


@dataclass(slots=True)
class Plan:
    """Holds the arrays that the structs point into. Layers are alike: what the structs hold of one is checked and
    written where it is not the last one's."""

    tables: StepTables
    items: NDArray[np.int32]  # [I, 3] row, first and end of a range of its new tokens
    token_tags: NDArray[np.int64]  # [T]
    flags: NDArray[np.int32]  # [T] what was refused to the token
    refused: NDArray[np.int64]  # [T] and one of the blocks
    rope: RopeArgs
    attention: AttentionArgs
    heads: tuple[object, ...] = ()  # that the structs hold: see NativeBackend._take_heads
    rule: tuple[float, int, float, int | None] | None = None
    cos: Tensor | None = None  # the last layer's
    sin: Tensor | None = None
    angles: tuple[int | None, int | None] = (None, None)  # where these two lie


class NativeBackend:
    """``isa`` empty takes the best that this machine has and that passes its trial; ``log`` hears of those that do not.
    Raises KernelError where it cannot be had."""

    exact = True
    takes_fp8_cache = False
    device = torch.device("cpu")

    def __init__(self, isa: str = "", num_threads: int = 1, log: Callable[[str], None] = lambda line: None) -> None:
        self._library = load()
        isas = self._library.isas()
        if isa and isa not in isas:
            raise KernelError(f"this machine's native kernels are {', '.join(isas)}, not {isa}")
        self.isa = self._tried([isa] if isa else list(isas), log)
        self._isa = isas[self.isa]
        self._arena = Arena()
        self.name = f"native-{self.isa}"
        self._library.set_num_threads(num_threads)

    def _tried(self, names: list[str], log: Callable[[str], None]) -> str:
        for name in names:
            if multiplies(self._library, self._library.isas()[name]):
                return name
            log(f"the native kernels {name} multiply wrongly on this machine and are not used")
        raise KernelError(f"no native kernels multiply as they should on this machine: tried {', '.join(names)}")

    def plan(self, tables: StepTables) -> Plan:
        num_new = np.diff(tables.cu_seqlens)
        num_tokens = int(tables.cu_seqlens[-1])
        check_tables(tables)
        num_items = -(-num_new // ITEM_TOKENS_MAX)
        rows = np.repeat(np.arange(len(num_new)), num_items)
        first = (np.arange(len(rows)) - np.repeat(np.cumsum(num_items) - num_items, num_items)) * ITEM_TOKENS_MAX
        items = np.stack((rows, first, np.minimum(first + ITEM_TOKENS_MAX, num_new[rows])), axis=1).astype(np.int32)
        cost = (items[:, 2] - items[:, 1]) * tables.kv_lens[rows].astype(np.int64)
        items = np.ascontiguousarray(items[np.argsort(-cost, kind="stable")])  # long ones first: threads end together
        token_tags = np.repeat(tables.row_tags, num_new)
        flags = np.zeros(num_tokens, dtype=np.int32)
        refused = np.full(num_tokens, -1, dtype=np.int64)
        common = {
            "block_tags": address(tables.block_tags, np.int64),
            "flags": address(flags, np.int32),
            "refused": address(refused, np.int64),
            "num_blocks": len(tables.block_tags),
            "block_size": tables.block_size,
        }
        rope = RopeArgs(
            slots=address(tables.slot_mapping, np.int64),
            token_tags=address(token_tags, np.int64),
            num_tokens=num_tokens,
            **common,
        )
        attention = AttentionArgs(
            cu_seqlens=address(tables.cu_seqlens, np.int32),
            kv_lens=address(tables.kv_lens, np.int32),
            block_tables=address(tables.block_tables, np.int32),
            items=address(items, np.int32),
            row_tags=address(tables.row_tags, np.int64),
            num_items=len(items),
            table_width=tables.block_tables.shape[1],
            item_tokens_max=ITEM_TOKENS_MAX,
            **common,
        )
        return Plan(tables, items, token_tags, flags, refused, rope, attention)

    def linear(self, weight: Tensor, bias: Tensor | None = None) -> Product:
        return NativeProduct(self._library, self._isa, self._arena, weight, bias)

    def gate_up(self, weight: Tensor, bias: Tensor | None = None) -> Product:
        return NativeProduct(self._library, self._isa, self._arena, weight, bias, gated=True)

    def head(self, weight: Tensor) -> Head:
        return NativeProduct(self._library, self._isa, self._arena, weight, head=True)

    def rms_norm(
        self, x: Tensor, weight: Tensor, epsilon: float, residual: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        num_tokens, size = shape = x.shape
        assert x.dtype == weight.dtype
        assert weight.shape == (size,)
        total = torch.empty(shape, dtype=torch.float32) if residual is None else residual
        assert total.shape == shape
        assert total.dtype == torch.float32
        out = torch.empty_like(x)
        at = pointer(total)
        args = NormArgs(  # by place: by name it takes as long as the op itself
            pointer(x),
            pointer(weight),
            None if residual is None else at,
            at,
            out.data_ptr(),
            num_tokens,
            size,
            epsilon,
            DTYPES[x.dtype],
        )
        self._library.rms_norm(self._isa, ctypes.byref(args))
        return out, total

    def normed(self, weight: Tensor, epsilon: float, product: Product) -> NormedProduct:
        if isinstance(product, NativeProduct):
            return NativeNormedProduct(self._library, self._isa, weight, epsilon, product)
        return NormThenProduct(self.rms_norm, weight, epsilon, product)

    def silu_and_mul(self, gate_up: Tensor) -> Tensor:
        return self._activate_and_mul(gate_up, SILU)

    def gelu_and_mul(self, gate_up: Tensor, *, tanh: bool) -> Tensor:
        """See reference.gelu_and_mul."""
        return self._activate_and_mul(gate_up, GELU_TANH if tanh else GELU_ERF)

    def _activate_and_mul(self, gate_up: Tensor, kind: int) -> Tensor:
        num_tokens, width = gate_up.shape
        assert width % 2 == 0
        out = torch.empty((num_tokens, width // 2), dtype=gate_up.dtype)
        args = ActivationArgs(
            pointer(gate_up), pointer(out), num_tokens, width // 2, DTYPES[gate_up.dtype], kind
        )  # fmt: skip
        self._library.activate_and_mul(self._isa, ctypes.byref(args))
        return out

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
        self._take_heads(plan, qkv, key_cache, value_cache, num_heads)
        self._take_rule(plan, num_heads, scale, window, soft_cap, sinks)
        out = torch.empty((len(qkv), num_heads, qkv.shape[2]), dtype=qkv.dtype)
        self._attend(plan, ROPE | ATTENTION, qkv, cos, sin, key_cache, value_cache, out)
        return out

    def rope_and_store(
        self,
        qkv: Tensor,
        cos: Tensor | None,
        sin: Tensor | None,
        key_cache: Tensor,
        value_cache: Tensor,
        *,
        num_heads: int,
        plan: Plan,
    ) -> None:
        """The first half of ``attend``, to measure: queries are rotated in place, keys and values are written into the
        cache."""
        self._take_heads(plan, qkv, key_cache, value_cache, num_heads)
        self._attend(plan, ROPE, qkv, cos, sin, key_cache, value_cache, qkv)

    def attention(
        self, qkv: Tensor, key_cache: Tensor, value_cache: Tensor, *, num_heads: int, plan: Plan, scale: float
    ) -> Tensor:
        """The second half, to measure, without window, cap and sinks."""
        self._take_heads(plan, qkv, key_cache, value_cache, num_heads)
        self._take_rule(plan, num_heads, scale, 0, 0.0, None)
        out = torch.empty((len(qkv), num_heads, qkv.shape[2]), dtype=qkv.dtype)
        self._attend(plan, ATTENTION, qkv, None, None, key_cache, value_cache, out)
        return out

    def _take_heads(self, plan: Plan, qkv: Tensor, key_cache: Tensor, value_cache: Tensor, num_heads: int) -> None:
        """Checked, and written into the structs, where the layer before was another."""
        shape = key_cache.shape
        heads = (qkv.shape, shape, value_cache.shape, qkv.dtype, key_cache.dtype, value_cache.dtype, num_heads)
        if heads == plan.heads:
            return
        num_tokens, all_heads, head_size = qkv.shape
        num_blocks, block_size, num_kv_heads, _ = shape
        assert shape == value_cache.shape == (num_blocks, block_size, num_kv_heads, head_size)
        assert (num_blocks, block_size) == (len(plan.tables.block_tags), plan.tables.block_size)
        assert all_heads == num_heads + 2 * num_kv_heads
        assert num_heads % num_kv_heads == 0
        assert head_size % 2 == 0
        assert num_tokens == len(plan.token_tags)
        assert qkv.dtype == key_cache.dtype == value_cache.dtype
        for args in (plan.rope, plan.attention):
            args.num_heads, args.num_kv_heads, args.head_size = num_heads, num_kv_heads, head_size
            args.dtype = DTYPES[qkv.dtype]
        plan.attention.query_stride = all_heads * head_size
        plan.heads = heads
        plan.cos, plan.sin, plan.angles = None, None, (None, None)  # they may not fit these heads

    def _take_rule(
        self, plan: Plan, num_heads: int, scale: float, window: int, soft_cap: float, sinks: Tensor | None
    ) -> None:
        """The same of how scores become weights."""
        assert sinks is None or (sinks.shape == (num_heads,) and sinks.dtype == torch.float32)
        rule = (scale, window, soft_cap, optional_pointer(sinks))
        if rule != plan.rule:
            assert 0 <= window < 2**31
            assert soft_cap >= 0
            args = plan.attention
            args.scale, args.window, args.soft_cap, args.sinks = plan.rule = rule

    def _attend(
        self,
        plan: Plan,
        halves: int,
        qkv: Tensor,
        cos: Tensor | None,
        sin: Tensor | None,
        key_cache: Tensor,
        value_cache: Tensor,
        out: Tensor,
    ) -> None:
        if cos is not plan.cos or sin is not plan.sin:
            assert (cos is None) == (sin is None)
            for angles in (cos, sin):
                assert angles is None or angles.shape == (len(plan.token_tags), qkv.shape[2] // 2)
                assert angles is None or angles.dtype == torch.float32
            plan.angles = (optional_pointer(cos), optional_pointer(sin))
            plan.cos, plan.sin = cos, sin
        self._library.attend(
            self._isa,
            ctypes.byref(plan.rope) if halves & ROPE else None,
            ctypes.byref(plan.attention) if halves & ATTENTION else None,
            pointer(qkv),
            *plan.angles,
            pointer(key_cache),
            pointer(value_cache),
            pointer(out),
        )

    def top(self, logits: Tensor, count: int) -> tuple[Tensor, Tensor]:
        num_rows, num_columns = logits.shape
        assert logits.dtype == torch.float32
        assert 1 <= count <= num_columns < 2**32
        ids = torch.zeros((num_rows, count), dtype=torch.int64)
        finite = torch.zeros(num_rows, dtype=torch.bool)
        args = TopArgs(pointer(logits), pointer(ids), pointer(finite), num_rows, num_columns, count)
        self._library.top(self._isa, ctypes.byref(args))
        return ids, finite

    def check(self, plan: Plan) -> None:
        tokens = np.flatnonzero(plan.flags).tolist()
        if tokens:
            bits = int(np.bitwise_or.reduce(plan.flags))
            found = " and ".join(text for bit, text in FLAGS.items() if bits & bit)
            raise OwnershipError(f"a kernel met {found}, and did not touch it", tokens, int(plan.refused[tokens[0]]))


def address(array: NDArray[np.generic], dtype: type[np.generic]) -> int:
    assert array.dtype == dtype
    assert array.flags.c_contiguous
    return array.ctypes.data
