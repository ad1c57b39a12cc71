"""The ops of the CPU kernels, each beside its twin and torch's own op, in one layer's shapes (kernels/bench.py)."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import prod
from types import ModuleType

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels import bench_step, reference, torch_cpu
from kernels.bench_step import BLOCK_SIZE, in_huge_pages, scattered
from kernels.call_times import inside
from kernels.cpu.backend import NativeBackend
from kernels.cpu.blocks import digest_blocks, fill_blocks
from kernels.cpu.library import load
from kernels.torch_cpu import TorchBackend

SETTLE_S = 0.02  # torch's threads spin for a while after an op: on cores that the next candidate wants
HIDDEN, INTERMEDIATE, HEADS, KV_HEADS, HEAD_SIZE, VOCAB = 576, 1536, 9, 3, 64, 49152
LAYER_PRODUCTS = {"qkv": (576, 960), "output": (576, 576), "gate_up": (576, 3072), "down": (1536, 576)}
COPIES_MAX = 30  # as many as there are layers
STEP_ROUNDS = 5  # of whole steps for each round: their figures are small differences of medians

Call = Callable[[], object]


@dataclass(frozen=True, slots=True)
class Figure:
    """Times in microseconds."""

    op: str
    case: str
    ours_us: float
    library_us: float  # of it, inside the library: without checks of arguments and memory for results
    twin_us: float  # kernels/torch_cpu.py
    torch_us: float  # torch's own op, promising nothing about bits; of products oneDNN with packed weights
    bytes: int
    gb_per_s: float
    copy_share: float
    gflop_per_s: float


class Bench:
    def __init__(self, num_threads: int, num_rounds: int, working_set_bytes: int) -> None:
        torch.set_num_threads(num_threads)
        self.ours = NativeBackend("", num_threads)
        self.plain = TorchBackend()
        self._num_rounds = num_rounds
        self._working_set_bytes = working_set_bytes
        large, target = (in_huge_pages(torch.ones(max(1, working_set_bytes // 4))) for _ in range(2))
        self.copy_gb_per_s = 2 * 4 * len(large) / self._best_us([[lambda: target.copy_(large)]])[0] / 1e3
        self.figures: list[Figure] = []

    def _best_us(self, candidates: Sequence[Sequence[Call]]) -> list[float]:
        best = [float("inf")] * len(candidates)
        for _ in range(self._num_rounds):
            for index, calls in enumerate(candidates):
                time.sleep(SETTLE_S)
                calls[-1]()  # wakes its own threads
                started = time.perf_counter()
                for call in calls:
                    call()
                best[index] = min(best[index], (time.perf_counter() - started) / len(calls) * 1e6)
        return best

    def _library_us(self, calls: Sequence[Call]) -> float:
        best = float("inf")
        for _ in range(self._num_rounds):
            time.sleep(SETTLE_S)
            calls[-1]()
            with inside(load()) as spent:
                for call in calls:
                    call()
            best = min(best, spent.seconds / len(calls) * 1e6)
        return best

    def num_copies(self, num_bytes: int) -> int:
        return max(1, min(COPIES_MAX, -(-self._working_set_bytes // num_bytes)))

    def measure(
        self,
        op: str,
        case: str,
        num_bytes: int,
        flop: float,
        ours: Sequence[Call],
        twin: Sequence[Call],
        plain: Sequence[Call],
        repeats: int = 1,
    ) -> None:
        """Of each, one call for each copy of the case, so many times."""
        ours, twin, plain = (list(calls) * repeats for calls in (ours, twin, plain))
        ours_us, twin_us, torch_us = self._best_us((ours, twin, plain))
        speed = num_bytes / ours_us / 1e3
        self.figures.append(
            Figure(
                op=op,
                case=case,
                ours_us=round(ours_us, 1),
                library_us=round(self._library_us(ours), 1),
                twin_us=round(twin_us, 1),
                torch_us=round(torch_us, 1),
                bytes=num_bytes,
                gb_per_s=round(speed, 2),
                copy_share=round(speed / self.copy_gb_per_s, 3),
                gflop_per_s=round(flop / ours_us / 1e3, 1),
            )
        )

    def products(self, rows: Sequence[int], dtype: torch.dtype) -> None:
        for name, (num_inputs, num_outputs) in LAYER_PRODUCTS.items():
            num_weights = num_inputs * num_outputs
            copies = self.num_copies(num_weights * dtype.itemsize)
            weights = [torch.randn((num_outputs, num_inputs)).mul(0.05).to(dtype) for _ in range(copies)]
            ours = [self.ours.linear(weight) for weight in weights]
            packed = [_packed(weight) for weight in weights]
            for num_rows in rows:
                x = torch.randn((num_rows, num_inputs)).to(dtype)
                self.measure(
                    f"{name} {num_inputs}x{num_outputs}",
                    f"{num_rows} rows {str(dtype).removeprefix('torch.')}",
                    (num_weights + num_rows * (num_inputs + num_outputs)) * dtype.itemsize,
                    2.0 * num_weights * num_rows,
                    [_applied(product, x) for product in ours],
                    [_linear(x, weight) for weight in weights],
                    [_applied(product, x) for product in packed],
                )

    def step(self, num_rows: int, context: int) -> bench_step.StepFigure:
        layer_bytes = 2 * sum(num * out for num, out in LAYER_PRODUCTS.values())
        shape = bench_step.LayerShape(HIDDEN, INTERMEDIATE, HEADS, KV_HEADS, HEAD_SIZE)
        tables, copies = scattered(num_rows, 1, context), self.num_copies(layer_bytes)
        return bench_step.measure(self.ours, shape, tables, copies, STEP_ROUNDS * self._num_rounds)

    def chunk(self, num_tokens: int) -> dict[str, float]:
        attention = [one for one in self.figures if one.op == "attention"][-1]
        products_us = round(sum(one.ours_us for one in self.figures if one.case == f"{num_tokens} rows bfloat16"), 1)
        return {
            "tokens": num_tokens,
            "attention_us": attention.ours_us,
            "products_us": products_us,
            "share": round(attention.ours_us / products_us, 3),
        }

    def head(self, rows: Sequence[int]) -> None:
        """bfloat16 in, float32 out; the others need float32 copies of both."""
        weight = torch.randn((VOCAB, HIDDEN)).mul(0.05).bfloat16()
        ours, wide = self.ours.head(weight), weight.float()
        packed = _packed(wide)
        for num_rows in rows:
            x = torch.randn((num_rows, HIDDEN)).bfloat16()
            x_wide = x.float()
            self.measure(
                f"head {HIDDEN}x{VOCAB}",
                f"{num_rows} rows float32",
                weight.numel() * 2 + num_rows * (HIDDEN * 2 + VOCAB * 4),
                2.0 * weight.numel() * num_rows,
                [_applied(ours, x)],
                [_linear(x_wide, wide)],
                [_applied(packed, x_wide)],
            )

    def top(self, num_rows: int) -> None:
        """The best of each row of logits, and a preselection."""
        logits = torch.randn((num_rows, VOCAB)).mul(3)
        for count in (1, 40, 512):
            self.measure(
                "top",
                f"{num_rows} rows, {count} of {VOCAB}",
                num_rows * (VOCAB * 4 + count * 8),
                0.0,
                [lambda c=count: self.ours.top(logits, c)],  # type: ignore[misc]
                [lambda c=count: self.plain.top(logits, c)],  # type: ignore[misc]
                [lambda c=count: logits.topk(c)],  # type: ignore[misc]
            )

    def elementwise(self, rows: Sequence[int], dtype: torch.dtype) -> None:
        """Called as often as there are layers: one call after a rest finds the code itself cold."""
        weight = torch.randn(HIDDEN).to(dtype)
        for num_rows in rows:
            case = f"{num_rows} rows"
            x, residual = torch.randn((num_rows, HIDDEN)).to(dtype), torch.randn((num_rows, HIDDEN))
            gate_up = torch.randn((num_rows, 2 * INTERMEDIATE)).to(dtype)
            self.measure(
                "rms_norm",
                case,
                num_rows * HIDDEN * (2 * dtype.itemsize + 8),
                4.0 * x.numel(),
                [lambda x=x, r=residual: self.ours.rms_norm(x, weight, 1e-5, r)],  # type: ignore[misc]
                [lambda x=x, r=residual: self.plain.rms_norm(x, weight, 1e-5, r)],  # type: ignore[misc]
                [lambda x=x: F.rms_norm(x, (HIDDEN,), weight, 1e-5)],  # type: ignore[misc]
                repeats=COPIES_MAX,
            )
            for tanh in (True, False):
                self.measure(
                    "gelu_and_mul",
                    f"{case}, {'tanh' if tanh else 'erf'}",
                    num_rows * 3 * INTERMEDIATE * dtype.itemsize,
                    8.0 * num_rows * INTERMEDIATE,
                    [lambda g=gate_up, t=tanh: self.ours.gelu_and_mul(g, tanh=t)],  # type: ignore[misc]
                    [lambda g=gate_up, t=tanh: reference.gelu_and_mul(g, tanh=t)],  # type: ignore[misc]
                    [
                        lambda g=gate_up, t="tanh" if tanh else "none": (  # type: ignore[misc]
                            F.gelu(g[:, :INTERMEDIATE], approximate=t) * g[:, INTERMEDIATE:]
                        )
                    ],
                    repeats=COPIES_MAX,
                )
            self.measure(
                "silu_and_mul",
                case,
                num_rows * 3 * INTERMEDIATE * dtype.itemsize,
                5.0 * num_rows * INTERMEDIATE,
                [lambda g=gate_up: self.ours.silu_and_mul(g)],  # type: ignore[misc]
                [lambda g=gate_up: self.plain.silu_and_mul(g)],  # type: ignore[misc]
                [lambda g=gate_up: F.silu(g[:, :INTERMEDIATE]) * g[:, INTERMEDIATE:]],  # type: ignore[misc]
                repeats=COPIES_MAX,
            )

    def blocks(self, num_blocks: int, dtype: torch.dtype) -> None:
        """Digest and fill of blocks of one layer; torch has no digest: there the bytes are summed."""
        library = load()
        shape = (num_blocks, BLOCK_SIZE, KV_HEADS, HEAD_SIZE)
        num_bytes = 2 * prod(shape) * dtype.itemsize
        caches = [
            tuple(in_huge_pages(torch.randn(shape).to(dtype)) for _ in range(2))
            for _ in range(self.num_copies(num_bytes))
        ]
        ids, one = torch.randperm(num_blocks), torch.zeros(1, dtype=torch.int64)
        one_block = [lambda k=k, v=v: reference.digest_blocks(k, v, one, (1, 2)) for k, v in caches[:1]]
        self.measure(
            "digest_blocks",
            f"{num_blocks} blocks (twin: 1)",
            num_bytes,
            0.0,
            [lambda k=k, v=v: digest_blocks(library, k, v, ids, (1, 2)) for k, v in caches],  # type: ignore[misc]
            one_block,
            [lambda k=k, v=v: (k.view(torch.int16).sum(), v.view(torch.int16).sum()) for k, v in caches],  # type: ignore[misc]
        )
        self.measure(
            "fill_blocks",
            f"{num_blocks} blocks",
            num_bytes,
            0.0,
            [lambda k=k, v=v: fill_blocks(library, k, v, ids, 0) for k, v in caches],  # type: ignore[misc]
            [lambda k=k, v=v: reference.fill_blocks(k, v, ids, 0) for k, v in caches],  # type: ignore[misc]
            [lambda k=k, v=v: (k.zero_(), v.zero_()) for k, v in caches],  # type: ignore[misc]
        )

    def attention(self, num_rows: int, num_new: int, kv_len: int, dtype: torch.dtype) -> None:
        """Rope, store and attention of ``num_new`` tokens in each row that then has ``kv_len``; torch's own op gets its
        keys and values without pages, already rotated and gathered."""
        tables = scattered(num_rows, num_new, kv_len)
        num_tokens = num_rows * num_new
        shape = (len(tables.block_tags), BLOCK_SIZE, KV_HEADS, HEAD_SIZE)
        num_bytes = 2 * num_rows * kv_len * KV_HEADS * HEAD_SIZE * dtype.itemsize
        copies = self.num_copies(num_bytes)
        caches = [tuple(in_huge_pages(torch.randn(shape).to(dtype)) for _ in range(2)) for _ in range(copies)]
        qkv = torch.randn((num_tokens, HEADS + 2 * KV_HEADS, HEAD_SIZE)).to(dtype)
        angles = torch.randn((num_tokens, HEAD_SIZE // 2))
        cos, sin = angles.cos(), angles.sin()

        def paged(backend: NativeBackend | TorchBackend) -> list[Call]:
            plan = backend.plan(tables)
            return [
                lambda k=k, v=v: backend.attend(  # type: ignore[misc]
                    qkv, cos, sin, k, v, num_heads=HEADS, plan=plan, scale=HEAD_SIZE**-0.5  # type: ignore[arg-type]
                )
                for k, v in caches
            ]  # fmt: skip

        plan, slots = self.ours.plan(tables), torch.from_numpy(tables.slot_mapping)
        self.measure(
            "rope_and_store",
            f"{num_tokens} rows",
            num_tokens * ((2 * HEADS + 4 * KV_HEADS) * dtype.itemsize + 4) * HEAD_SIZE,
            3.0 * num_tokens * (HEADS + KV_HEADS) * HEAD_SIZE,
            [
                lambda k=k, v=v: self.ours.rope_and_store(qkv, cos, sin, k, v, num_heads=HEADS, plan=plan)  # type: ignore[misc]
                for k, v in caches
            ],
            [lambda k=k, v=v: _rope_and_store(torch_cpu, qkv, cos, sin, k, v, slots) for k, v in caches],  # type: ignore[misc]
            [lambda k=k, v=v: _rope_and_store(reference, qkv, cos, sin, k, v, slots) for k, v in caches],  # type: ignore[misc]
        )
        query = torch.randn((num_rows, HEADS, num_new, HEAD_SIZE)).to(dtype)
        dense = [
            [torch.randn((num_rows, KV_HEADS, kv_len, HEAD_SIZE)).to(dtype) for _ in range(2)] for _ in range(copies)
        ]
        causal = torch.ones((num_new, kv_len), dtype=torch.bool).tril(kv_len - num_new)
        flop = 4.0 * HEADS * HEAD_SIZE * num_rows * sum(kv_len - num_new + i + 1 for i in range(num_new))
        self.measure(
            "attention",
            f"{num_rows} rows, {num_new} new of {kv_len} tokens",
            num_bytes,
            flop,
            paged(self.ours),
            paged(self.plain),
            [
                lambda k=k, v=v: F.scaled_dot_product_attention(query, k, v, attn_mask=causal, enable_gqa=True)  # type: ignore[misc]
                for k, v in dense
            ],
        )


def _packed(weight: Tensor) -> Callable[[Tensor], Tensor]:
    """oneDNN's product with its own packing, where torch has it; torch's plain one elsewhere."""
    if not torch.backends.mkldnn.is_available():  # type: ignore[no-untyped-call]
        return lambda x: F.linear(x, weight)
    try:
        packed = torch.ops.mkldnn._reorder_linear_weight(weight.contiguous(), None)
    except RuntimeError:  # this processor has none for the dtype
        return lambda x: F.linear(x, weight)
    return lambda x: torch.ops.mkldnn._linear_pointwise(x, packed, None, "none", [], "")


def _rope_and_store(
    ops: ModuleType, qkv: Tensor, cos: Tensor, sin: Tensor, key_cache: Tensor, value_cache: Tensor, slots: Tensor
) -> None:
    rotated = ops.rope(qkv[:, : HEADS + KV_HEADS], cos, sin)
    ops.store_kv(rotated[:, HEADS:], qkv[:, HEADS + KV_HEADS :], key_cache, value_cache, slots)


def _applied(product: Callable[[Tensor], Tensor], x: Tensor) -> Call:
    return lambda: product(x)


def _linear(x: Tensor, weight: Tensor) -> Call:
    return lambda: F.linear(x, weight)
