"""What norms, rope and activation take of a whole step, with the caches as a step leaves them.

None of them has a time of its own: a norm is the beginning of a product's call, rope and the write into the cache are
the beginning of attention's, the activation is the end of the product of gate and up. So steps come in turn, in three
forms: as the engine runs them; all ops apart; and apart but for the activation. What a call takes more than the same
work without the op is the op's. Of each call in each layer the median of all rounds counts, and layers are added up.
A difference is shown as it comes; one below zero is noise, and `together_ms` counts it as zero, never as a gain.

A step's products and attention run for real: so the weights have gone through the caches, and an op finds its numbers
where the product before it has just written them. Norms and rope one after the other without the products (`warm_ms`)
are the least that they take apart.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum
from functools import partial
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
CALLS = (
    *("normed_qkv", "qkv", "attend", "attention", "normed_gate_up", "gate_up", "gate_up_bare"),
    *("norms_apart", "rope_apart", "activation_apart"),
)
BLOCK_SIZE = 32
EPSILON = 1e-5

Timer = Callable[..., Any]  # a name, a function and its arguments: calls it, and gives what comes


class Form(Enum):
    WHOLE = "as the engine runs it"
    ACTIVATED = "all apart, but the activation is the end of its product"
    APART = "all apart"


@dataclass(frozen=True, slots=True)
class StepFigure:
    """Milliseconds of one step of ``layers`` layers: sums of medians. ``library_ms`` is the part of ``together_ms``
    that is spent inside the library."""

    rows: int
    layers: int
    norms_ms: float  # normed_qkv_ms - qkv_ms and normed_gate_up_ms - gate_up_ms
    rope_ms: float  # with the write into the cache: attend_ms - attention_ms
    activation_ms: float  # gate_up_ms - gate_up_bare_ms
    together_ms: float
    library_ms: float
    normed_qkv_ms: float
    qkv_ms: float
    attend_ms: float
    attention_ms: float
    normed_gate_up_ms: float
    gate_up_ms: float  # with the activation
    gate_up_bare_ms: float
    norms_apart_ms: float
    rope_apart_ms: float
    activation_apart_ms: float
    warm_ms: float
    step_ms: float  # everything: products and attention, too
    step_apart_ms: float


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
        self._weight = torch.ones(shape.hidden).bfloat16()
        self._layers = [
            Layer(backend, self._weight, sizes, *(in_huge_pages(torch.randn(cache).bfloat16()) for _ in range(2)))
            for _ in range(num_copies)
        ]
        self._x = torch.randn((self._num_rows, shape.hidden)).bfloat16()
        angles = torch.randn((self._num_rows, shape.head_size // 2))
        self._cos, self._sin = angles.cos(), angles.sin()

    def run(self, timed: Timer, form: Form) -> None:
        """One step; every call but those of the output and down products goes through ``timed``."""
        ops, shape, angles = self._backend, self._shape, (self._cos, self._sin)
        plan, scale = ops.plan(self._tables), shape.head_size**-0.5
        x, residual = self._x, torch.zeros((self._num_rows, shape.hidden))
        for index in range(NUM_LAYERS):
            layer = self._layers[index % len(self._layers)]
            cache, heads = (layer.keys, layer.values), {"num_heads": shape.num_heads, "plan": plan}
            if form is Form.WHOLE:
                qkv = timed("normed_qkv", layer.normed_qkv, x, residual)[0].view(self._num_rows, -1, shape.head_size)
                attended = timed("attend", ops.attend, qkv, *angles, *cache, **heads, scale=scale)
                x = layer.output(attended.flatten(1))
                x = layer.down(timed("normed_gate_up", layer.normed_gate_up, x, residual)[0])
                continue
            x = timed("norms_apart", ops.rms_norm, x, self._weight, EPSILON, residual)[0]
            qkv = timed("qkv", layer.qkv, x).view(self._num_rows, -1, shape.head_size)
            timed("rope_apart", ops.rope_and_store, qkv, *angles, *cache, **heads)
            attended = timed("attention", ops.attention, qkv, *cache, **heads, scale=scale)
            x = layer.output(attended.flatten(1))
            x = timed("norms_apart", ops.rms_norm, x, self._weight, EPSILON, residual)[0]
            if form is Form.ACTIVATED:
                x = layer.down(timed("gate_up", layer.gate_up, x))
            else:
                halves = timed("gate_up_bare", layer.gate_up_bare, x)
                x = layer.down(timed("activation_apart", ops.silu_and_mul, halves))

    def run_small(self, timed: Timer) -> None:
        """Norms and rope of a step, and nothing between them."""
        ops, heads = self._backend, self._shape.num_heads + 2 * self._shape.num_kv_heads
        plan, residual = ops.plan(self._tables), torch.zeros(self._x.shape)
        qkv = torch.zeros((self._num_rows, heads, self._shape.head_size)).bfloat16()
        for index in range(NUM_LAYERS):
            layer = self._layers[index % len(self._layers)]
            rope = (qkv, self._cos, self._sin, layer.keys, layer.values)
            timed("warm", ops.rms_norm, self._x, self._weight, EPSILON, residual)
            timed("warm", ops.rope_and_store, *rope, num_heads=self._shape.num_heads, plan=plan)
            timed("warm", ops.rms_norm, self._x, self._weight, EPSILON, residual)


class Layer:
    """One layer's products, with norm and activation and without, and its cache; ``sizes`` of qkv, output, gate and up,
    down: inputs, outputs."""

    def __init__(
        self, backend: NativeBackend, norm: Tensor, sizes: tuple[tuple[int, int], ...], keys: Tensor, values: Tensor
    ) -> None:
        qkv, output, gate_up, down = (torch.randn((out, num)).mul(num**-0.5).bfloat16() for num, out in sizes)
        self.qkv, self.output, self.down = (backend.linear(weight) for weight in (qkv, output, down))
        self.gate_up, self.gate_up_bare = backend.gate_up(gate_up), backend.linear(gate_up)
        self.normed_qkv = backend.normed(norm, EPSILON, self.qkv)
        self.normed_gate_up = backend.normed(norm, EPSILON, self.gate_up)
        self.keys, self.values = keys, values


class Times:
    """Seconds of each call, by name and by its place among the calls of that name in a step."""

    def __init__(self) -> None:
        self._found: dict[str, list[list[float]]] = {}
        self._places: dict[str, int] = {}

    def begin_step(self) -> None:
        self._places.clear()

    def add(self, name: str, seconds: float) -> None:
        place = self._places[name] = self._places.get(name, -1) + 1
        calls = self._found.setdefault(name, [])
        if place == len(calls):
            calls.append([])
        calls[place].append(seconds)

    def __getitem__(self, name: str) -> float:
        """Of a step: the sum of the medians."""
        return sum(median(seconds) for seconds in self._found[name])

    def together(self) -> float:
        """Each op's own difference: noise in one must not hide another."""
        pairs = (
            ("normed_qkv", "qkv"),
            ("attend", "attention"),
            ("normed_gate_up", "gate_up"),
            ("gate_up", "gate_up_bare"),
        )
        return sum(max(0.0, self[whole] - self[without]) for whole, without in pairs)


def outside(times: Times, name: str, call: Callable[..., Any], *args: Any, **named: Any) -> Any:
    started = time.perf_counter()
    result = call(*args, **named)
    times.add(name, time.perf_counter() - started)
    return result


def within_library(times: Times, name: str, call: Callable[..., Any], *args: Any, **named: Any) -> Any:
    with inside(load()) as spent:
        result = call(*args, **named)
    times.add(name, spent.seconds)
    return result


def measure(
    backend: NativeBackend, shape: LayerShape, tables: StepTables, num_copies: int, num_rounds: int
) -> StepFigure:
    step = Step(backend, shape, tables, num_copies)

    def rounds(timer: Timer) -> Times:
        times = Times()
        for index in range(-1, num_rounds):
            found = times if index >= 0 else Times()  # the first find memory that nobody has touched
            for form in Form:
                found.begin_step()
                started = time.perf_counter()
                step.run(partial(timer, found), form)
                found.add(form.name, time.perf_counter() - started)
        return times

    spent, library, warm = rounds(outside), rounds(within_library), Times()
    for _ in range(num_rounds):
        warm.begin_step()
        step.run_small(partial(outside, warm))
    ms = {name: round(spent[name] * 1e3, 3) for name in CALLS}
    return StepFigure(
        rows=len(tables.slot_mapping),
        layers=NUM_LAYERS,
        norms_ms=round(ms["normed_qkv"] - ms["qkv"] + ms["normed_gate_up"] - ms["gate_up"], 3),
        rope_ms=round(ms["attend"] - ms["attention"], 3),
        activation_ms=round(ms["gate_up"] - ms["gate_up_bare"], 3),
        together_ms=round(spent.together() * 1e3, 3),
        library_ms=round(library.together() * 1e3, 3),
        warm_ms=round(warm["warm"] * 1e3, 3),
        step_ms=round(spent[Form.WHOLE.name] * 1e3, 3),
        step_apart_ms=round(spent[Form.APART.name] * 1e3, 3),
        **{f"{name}_ms": value for name, value in ms.items()},
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
