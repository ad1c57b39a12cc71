"""Bytes and floating-point operations of one layer's ops and of those after the last, and the time below which no GPU
can do them.

    floor = max(bytes / bandwidth, operations / rate)

Counted is what must be read and written once: weights, activations, the keys and values that are in sight, block table
and owners. Rates are the makers' dense bfloat16 figures (data sheets of A100 80 GB SXM and H100 SXM).
"""

from collections.abc import Iterator
from dataclasses import dataclass

from kernels.gpu.variants import BLOCK_SIZE, LLAMA_8B, LLAMA_70B, Model

ITEM = 2  # bytes of a bfloat16


@dataclass(frozen=True, slots=True)
class Gpu:
    name: str
    bytes_per_s: float
    flop_per_s: float


GPUS = (Gpu("A100", 2.039e12, 312e12), Gpu("H100", 3.35e12, 989e12))


@dataclass(frozen=True, slots=True)
class Work:
    op: str
    bytes: int
    flop: int

    def floor_us(self, gpu: Gpu) -> float:
        return 1e6 * max(self.bytes / gpu.bytes_per_s, self.flop / gpu.flop_per_s)


@dataclass(frozen=True, slots=True)
class Load:
    """``num_rows`` sequences of ``kv_len`` tokens, ``num_new`` of them in this step."""

    name: str
    num_rows: int
    num_new: int
    kv_len: int


LOADS = (Load("decode, 32 rows of 2048", 32, 1, 2048), Load("prefill, 1 row of 2048", 1, 2048, 2048))


def layer(model: Model, load: Load, cache_item: int = ITEM) -> Iterator[Work]:
    """``cache_item``: bytes of a number in the cache."""
    tokens = load.num_rows * load.num_new
    heads = model.num_heads + 2 * model.num_kv_heads
    attended = model.num_heads * model.head_size
    yield Work("rms_norm", tokens * model.hidden * (2 * ITEM + 8), 4 * tokens * model.hidden)
    yield product("qkv", tokens, model.hidden, heads * model.head_size)
    # All heads are read, all are written: queries in place, keys and values into the cache.
    kept = 2 * model.num_kv_heads * model.head_size
    written = tokens * (attended * ITEM + kept * cache_item)
    yield Work("rope_and_store_kv", tokens * (heads * model.head_size * ITEM + 4 * model.head_size) + written, 0)
    num_blocks = load.num_rows * -(-load.kv_len // BLOCK_SIZE)
    keys = load.num_rows * load.kv_len * kept * cache_item
    pairs = load.num_rows * sum(range(load.kv_len - load.num_new + 1, load.kv_len + 1))  # a token and a key in sight
    yield Work("paged_attention", 2 * tokens * attended * ITEM + keys + 12 * num_blocks, 4 * pairs * attended)
    yield product("output", tokens, attended, model.hidden)
    yield product("gate_up", tokens, model.hidden, 2 * model.intermediate)
    yield Work("silu_and_mul", tokens * 3 * model.intermediate * ITEM, 4 * tokens * model.intermediate)
    yield product("down", tokens, model.intermediate, model.hidden)


def after_layers(model: Model, load: Load) -> Iterator[Work]:
    """Once a step, for the rows that sample: one token each."""
    rows = load.num_rows
    moved = ITEM * (model.vocabulary + rows) * model.hidden + 4 * rows * model.vocabulary  # float32 out
    yield Work("matmul head, once a step", moved, 2 * rows * model.hidden * model.vocabulary)
    yield Work("greedy or top_k, once a step", 4 * rows * model.vocabulary, 0)


def product(name: str, tokens: int, num_inputs: int, num_outputs: int) -> Work:
    moved = ITEM * (num_inputs * num_outputs + tokens * (num_inputs + num_outputs))
    return Work(f"matmul {name}", moved, 2 * tokens * num_inputs * num_outputs)


def table() -> str:
    """In markdown."""
    lines = [
        "| model | step | op | MB | GFLOP | floor A100, us | floor H100, us |",
        "|---|---|---|---|---|---|---|",
    ]
    for model in (LLAMA_8B, LLAMA_70B):
        for load in LOADS:
            for work in (*layer(model, load), *after_layers(model, load)):
                floors = " | ".join(f"{work.floor_us(gpu):.1f}" for gpu in GPUS)
                figures = f"{work.bytes / 1e6:.2f} | {work.flop / 1e9:.2f} | {floors}"
                lines.append(f"| {model.name} | {load.name} | {work.op} | {figures} |")
    return "\n".join(lines)
