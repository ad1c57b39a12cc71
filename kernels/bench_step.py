"""What norms, rope and activation take of a whole step, with the caches as a step leaves them.

A step's products and attention run for real, between the ops that are timed: so the weights have gone through the
caches, and an op finds its numbers where the product before it has just written them. The same ops one after the other
without the products (`warm_ms`) are the least they can take.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from kernels.backend import StepTables
from kernels.call_times import inside
from kernels.cpu.backend import NativeBackend
from kernels.cpu.library import load
from kernels.memory import zeros

NUM_LAYERS = 30
BLOCK_SIZE = 32
EPSILON = 1e-5

Timer = Callable[[str, Callable[[], object]], Any]  # calls, and gives what comes


@dataclass(frozen=True, slots=True)
class StepFigure:
    """Milliseconds of one step of ``layers`` layers, the best of several; ``library_ms`` is the part of ``together_ms``
    that is spent inside the library."""

    rows: int
    layers: int
    norms_ms: float
    rope_ms: float
    activation_ms: float
    together_ms: float
    library_ms: float
    warm_ms: float
    step_ms: float  # everything: products and attention, too


@dataclass(frozen=True, slots=True)
class LayerShape:
    hidden: int
    intermediate: int
    num_heads: int
    num_kv_heads: int
    head_size: int


class Step:
    """``num_copies`` layers of random bfloat16 weights, gone through in turn until NUM_LAYERS were."""

    def __init__(self, backend: NativeBackend, shape: LayerShape, tables: StepTables, num_copies: int) -> None:
        self._backend, self._shape, self._tables = backend, shape, tables
        self._num_rows = len(tables.slot_mapping)
        heads = shape.num_heads + 2 * shape.num_kv_heads
        sizes = (
            (shape.hidden, heads * shape.head_size),
            (shape.num_heads * shape.head_size, shape.hidden),
            (shape.hidden, 2 * shape.intermediate),
            (shape.intermediate, shape.hidden),
        )
        cache = (len(tables.block_tags), tables.block_size, shape.num_kv_heads, shape.head_size)
        self._layers = [
            (
                [backend.linear(torch.randn((out, num)).mul(num**-0.5).bfloat16()) for num, out in sizes],
                in_huge_pages(torch.randn(cache).bfloat16()),
                in_huge_pages(torch.randn(cache).bfloat16()),
            )
            for _ in range(num_copies)
        ]
        self._weight = torch.ones(shape.hidden).bfloat16()
        self._x = torch.randn((self._num_rows, shape.hidden)).bfloat16()
        angles = torch.randn((self._num_rows, shape.head_size // 2))
        self._cos, self._sin = angles.cos(), angles.sin()

    def run(self, timed: Timer, *, products: bool) -> None:
        """One step. Every norm, rope and activation goes through ``timed``; without ``products`` nothing else runs."""
        ops, shape = self._backend, self._shape
        plan = ops.plan(self._tables)
        x, residual = self._x, torch.zeros((self._num_rows, shape.hidden))
        heads = torch.zeros((self._num_rows, shape.num_heads + 2 * shape.num_kv_heads, shape.head_size)).bfloat16()
        attended = heads[:, : shape.num_heads].contiguous()
        gate_up = torch.zeros((self._num_rows, 2 * shape.intermediate)).bfloat16()
        for index in range(NUM_LAYERS):
            (qkv, output, into, down), keys, values = self._layers[index % len(self._layers)]
            x = timed("norms", lambda x=x: ops.rms_norm(x, self._weight, EPSILON, residual)[0])  # type: ignore[misc]
            if products:
                heads = qkv(x).view(heads.shape)
            rope = (heads, self._cos, self._sin, keys, values)
            timed("rope", lambda r=rope: ops.rope_and_store(*r, num_heads=shape.num_heads, plan=plan))  # type: ignore[misc]
            if products:
                attended = ops.attend(
                    heads, None, None, keys, values, num_heads=shape.num_heads, plan=plan, scale=shape.head_size**-0.5
                )
                x = output(attended.flatten(1))
            x = timed("norms", lambda x=x: ops.rms_norm(x, self._weight, EPSILON, residual)[0])  # type: ignore[misc]
            if products:
                gate_up = into(x)
            activated = timed("activation", lambda g=gate_up: ops.silu_and_mul(g))  # type: ignore[misc]
            x = down(activated) if products else self._x


def measure(
    backend: NativeBackend, shape: LayerShape, tables: StepTables, num_copies: int, num_rounds: int
) -> StepFigure:
    step = Step(backend, shape, tables, num_copies)
    spent: dict[str, float] = {}

    def timed(name: str, call: Callable[[], object]) -> Any:
        started = time.perf_counter()
        result = call()
        spent[name] = spent.get(name, 0.0) + time.perf_counter() - started
        return result

    def rounds(*, products: bool) -> Sequence[dict[str, float]]:
        found = []
        for _ in range(num_rounds + 1):  # the first finds memory that nobody has touched
            spent.clear()
            started = time.perf_counter()
            step.run(timed, products=products)
            found.append(dict(spent) | {"step": time.perf_counter() - started})
        return found[1:]

    def together(one: dict[str, float]) -> float:
        return one["norms"] + one["rope"] + one["activation"]

    best = min(rounds(products=True), key=together)
    warm = min(together(one) for one in rounds(products=False))
    library = float("inf")
    for _ in range(num_rounds):
        within = 0.0

        def within_library(_: str, call: Callable[[], object]) -> Any:
            nonlocal within
            with inside(load()) as calls:
                result = call()
            within += calls.seconds
            return result

        step.run(within_library, products=True)
        library = min(library, within)
    return StepFigure(
        rows=len(tables.slot_mapping),
        layers=NUM_LAYERS,
        norms_ms=round(best["norms"] * 1e3, 3),
        rope_ms=round(best["rope"] * 1e3, 3),
        activation_ms=round(best["activation"] * 1e3, 3),
        together_ms=round(together(best) * 1e3, 3),
        library_ms=round(library * 1e3, 3),
        warm_ms=round(warm * 1e3, 3),
        step_ms=round(best["step"] * 1e3, 2),
    )


def scattered(num_rows: int, num_new: int, kv_len: int) -> StepTables:
    """Scattered blocks, each row its own."""
    blocks_each = -(-kv_len // BLOCK_SIZE)
    blocks = np.random.default_rng(0).permutation(num_rows * blocks_each).astype(np.int32).reshape(num_rows, -1)
    at = np.arange(kv_len - num_new, kv_len)
    tags = np.arange(1, num_rows + 1, dtype=np.int64)
    block_tags = np.zeros(blocks.size, dtype=np.int64)
    block_tags[blocks] = tags[:, None]
    return StepTables(
        cu_seqlens=(np.arange(num_rows + 1) * num_new).astype(np.int32),
        kv_lens=np.full(num_rows, kv_len, dtype=np.int32),
        block_tables=blocks,
        slot_mapping=(blocks[:, at // BLOCK_SIZE].astype(np.int64) * BLOCK_SIZE + at % BLOCK_SIZE).ravel(),
        row_tags=tags,
        block_tags=block_tags,
        block_size=BLOCK_SIZE,
    )


def in_huge_pages(tensor: Tensor) -> Tensor:
    """A copy in memory like the cache's, whose page walks are fewer than those of ordinary memory."""
    return zeros(tuple(tensor.shape), tensor.dtype).copy_(tensor)
