"""What norms, rope and activation take of a whole step, with the caches as a step leaves them.

A step's products and attention run for real, between the ops that are timed: so the weights have gone through the
caches, and an op finds its numbers where the product before it has just written them. Norms and rope one after the
other without the products (`warm_ms`) are the least they can take.

The activation has no time of its own: it is the end of the product of gate and up. So every other step runs that
product without it, and the activation as an op of its own: `activation_ms` is what the product with it takes more than
the one without, `separate_ms` what it took on its own. That is a small difference of two large numbers, so both are
medians, it is shown as it comes, and one below zero is noise: `together_ms` counts it as zero, never as a gain.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass
from statistics import median
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
    """Milliseconds of one step of ``layers`` layers, each the best of several; ``gate_up_ms`` and ``gate_up_bare_ms``
    the medians, and ``activation_ms`` the first less the second. ``together_ms``: norms, rope and ``activation_ms``
    unless that is below zero; ``library_ms`` is the part of it that is spent inside the library."""

    rows: int
    layers: int
    norms_ms: float
    rope_ms: float
    activation_ms: float
    gate_up_ms: float  # the product with the activation
    gate_up_bare_ms: float  # without
    separate_ms: float  # the activation as an op of its own
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
        makes = (backend.linear, backend.linear, backend.gate_up, backend.linear)
        cache = (len(tables.block_tags), tables.block_size, shape.num_kv_heads, shape.head_size)
        self._layers = [
            (
                [
                    make(torch.randn((out, num)).mul(num**-0.5).bfloat16())
                    for make, (num, out) in zip(makes, sizes, strict=True)
                ],
                in_huge_pages(torch.randn(cache).bfloat16()),
                in_huge_pages(torch.randn(cache).bfloat16()),
                backend.linear(torch.randn((2 * shape.intermediate, shape.hidden)).mul(shape.hidden**-0.5).bfloat16()),
            )
            for _ in range(num_copies)
        ]
        self._weight = torch.ones(shape.hidden).bfloat16()
        self._x = torch.randn((self._num_rows, shape.hidden)).bfloat16()
        angles = torch.randn((self._num_rows, shape.head_size // 2))
        self._cos, self._sin = angles.cos(), angles.sin()

    def run(self, timed: Timer, *, products: bool, separate: bool = False) -> None:
        """One step. Every norm, rope and product of gate and up goes through ``timed``, and the activation where it is
        ``separate``; without ``products`` only norms and rope run."""
        ops, shape = self._backend, self._shape
        plan = ops.plan(self._tables)
        x, residual = self._x, torch.zeros((self._num_rows, shape.hidden))
        heads = torch.zeros((self._num_rows, shape.num_heads + 2 * shape.num_kv_heads, shape.head_size)).bfloat16()
        attended = heads[:, : shape.num_heads].contiguous()
        for index in range(NUM_LAYERS):
            (qkv, output, gated, down), keys, values, bare = self._layers[index % len(self._layers)]
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
            if not products:
                x = self._x
                continue
            if separate:
                halves = timed("gate_up_bare", lambda x=x, p=bare: p(x))  # type: ignore[misc]
                activated = timed("separate", lambda h=halves: ops.silu_and_mul(h))  # type: ignore[misc]
            else:
                activated = timed("gate_up", lambda x=x, p=gated: p(x))  # type: ignore[misc]
            x = down(activated)


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

    def one_round(timer: Timer, *, products: bool = True, separate: bool = False) -> dict[str, float]:
        spent.clear()
        started = time.perf_counter()
        step.run(timer, products=products, separate=separate)
        return dict(spent) | {"step": time.perf_counter() - started}

    def within_library(name: str, call: Callable[[], object]) -> Any:
        with inside(load()) as calls:
            result = call()
        spent[name] = spent.get(name, 0.0) + calls.seconds
        return result

    def best_of(timer: Timer) -> dict[str, float]:
        """Of each part; steps with the activation in the product and apart in turn, so that a neighbour hits both."""
        found = [one_round(timer, separate=separate) for _ in range(num_rounds + 1) for separate in (False, True)]
        whole, apart = found[2::2], found[3::2]  # the first find memory that nobody has touched
        best = {name: min(one[name] for one in whole) for name in ("norms", "rope", "step")}
        best["separate"] = min(one["separate"] for one in apart)
        best["gate_up"] = median(one["gate_up"] for one in whole)
        best["gate_up_bare"] = median(one["gate_up_bare"] for one in apart)
        best["activation"] = best["gate_up"] - best["gate_up_bare"]
        return best | {"together": best["norms"] + best["rope"] + max(0.0, best["activation"])}

    best, library = best_of(timed), best_of(within_library)
    warm = [one_round(timed, products=False) for _ in range(num_rounds + 1)][1:]

    def ms(name: str) -> float:
        return round(best[name] * 1e3, 3)

    return StepFigure(
        rows=len(tables.slot_mapping),
        layers=NUM_LAYERS,
        library_ms=round(library["together"] * 1e3, 3),
        warm_ms=round(min(one["norms"] + one["rope"] for one in warm) * 1e3, 3),
        step_ms=ms("step"),
        norms_ms=ms("norms"),
        rope_ms=ms("rope"),
        activation_ms=ms("activation"),
        gate_up_ms=ms("gate_up"),
        gate_up_bare_ms=ms("gate_up_bare"),
        separate_ms=ms("separate"),
        together_ms=ms("together"),
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
