"""How long each op takes on this GPU, beside the floor that kernels/gpu/roofline.py counts: the rest of
`bulkhead bench kernels` where there is a GPU.

A figure is the median of single launches between two events on the device's own clock. Every case exists in enough
copies that they do not fit the cache of the GPU together, and they take turns, as a model's layers do.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from statistics import median
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from kernels.backend import StepTables
from kernels.gpu.attention import paged_attention, plan_attention
from kernels.gpu.gather_tags import gather_tags
from kernels.gpu.launch import NO_BLOCK
from kernels.gpu.launch_table import attention_shape
from kernels.gpu.logits import top
from kernels.gpu.matmul import matmul
from kernels.gpu.rms_norm import rms_norm
from kernels.gpu.roofline import GPUS, LOADS, Gpu, Load, Work, layer
from kernels.gpu.rope_and_store_kv import rope_and_store_kv
from kernels.gpu.scrub_blocks import scrub_blocks
from kernels.gpu.silu_and_mul import silu_and_mul
from kernels.gpu.variants import BLOCK_SIZE, LLAMA_8B, Model

WORKING_SET_BYTES = 512 << 20  # several times what any GPU of today caches
COPIES_MAX = 16
TOP_K = 20
IN_BYTES = "e4m3 cache"

Call = Callable[[], object]


class Timer(Protocol):
    def __call__(self, calls: Sequence[Call], num_rounds: int) -> list[float]:
        """Microseconds of each call, in turn, ``num_rounds`` times over; what a first call alone does is not counted.
        ``calls`` do the same work on memory of their own."""
        ...


def device_us(calls: Sequence[Call], num_rounds: int) -> list[float]:
    """A Timer: CUDA events around each launch."""
    for call in calls:
        call()  # compiles
    events = []
    for _ in range(num_rounds):
        for call in calls:
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record()
            call()
            end.record()
            events.append((begin, end))
    torch.cuda.synchronize()
    return [begin.elapsed_time(end) * 1e3 for begin, end in events]


@dataclass(frozen=True, slots=True)
class Figure:
    op: str
    case: str
    median_us: float
    bytes: int
    gb_per_s: float
    tflop_per_s: float
    floor_us: float | None  # None: a GPU whose data sheet roofline.py does not have
    of_floor: float | None  # 1: as fast as can be


@dataclass(frozen=True, slots=True)
class Case:
    work: Work
    label: str
    calls: list[Call]


def figure(case: Case, times_us: Sequence[float], gpu: Gpu | None) -> Figure:
    middle, work = median(times_us), case.work
    floor = None if gpu is None else work.floor_us(gpu)
    return Figure(
        op=work.op,
        case=case.label,
        median_us=round(middle, 2),
        bytes=work.bytes,
        gb_per_s=round(work.bytes / middle / 1e3, 1),
        tflop_per_s=round(work.flop / middle / 1e6, 2),
        floor_us=None if floor is None else round(floor, 2),
        of_floor=None if floor is None else round(floor / middle, 3),
    )


def known(name: str) -> Gpu | None:
    """The data sheet of a GPU by the name that its driver gives."""
    return next((gpu for gpu in GPUS if gpu.name in name), None)


def num_copies(num_bytes: int, working_set_bytes: int) -> int:
    return max(1, min(COPIES_MAX, -(-working_set_bytes // max(1, num_bytes))))


@dataclass(frozen=True, slots=True)
class Layer:
    """One layer's tensors and step, at random."""

    model: Model
    load: Load
    dtype: torch.dtype
    device: torch.device
    working_set_bytes: int

    @property
    def num_tokens(self) -> int:
        return self.load.num_rows * self.load.num_new

    def random(self, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        return torch.randn(shape, dtype=dtype or self.dtype, device=self.device)

    def copies(self, num_bytes: int, make: Callable[[], Call]) -> list[Call]:
        return [make() for _ in range(num_copies(num_bytes, self.working_set_bytes))]

    def cases(self) -> Iterator[Case]:
        model = self.model
        attended = model.num_heads * model.head_size
        heads = model.num_heads + 2 * model.num_kv_heads
        products = {
            "matmul qkv": (model.hidden, heads * model.head_size),
            "matmul output": (attended, model.hidden),
            "matmul gate_up": (model.hidden, 2 * model.intermediate),
            "matmul down": (model.intermediate, model.hidden),
        }
        in_bytes = {work.op: work for work in layer(model, self.load, cache_item=1)}
        for work in layer(model, self.load):
            makes: dict[str, Callable[[], Call]]
            match work.op:
                case "rms_norm":
                    makes = {"": self._norm}
                case "silu_and_mul":
                    makes = {"": self._silu}
                case "rope_and_store_kv":
                    makes = self._kinds(self._rope)
                case "paged_attention":
                    makes = self._kinds(self._attention)
                case _:
                    makes = {"": partial(self._product, *products[work.op])}
            for label, make in makes.items():
                moved = in_bytes[work.op] if label == IN_BYTES else work
                yield Case(moved, label, self.copies(moved.bytes, make))
        yield from self._of_logits()
        yield from self._of_blocks()

    def _kinds(self, make: Callable[..., Call]) -> dict[str, Callable[[], Call]]:
        """What the ownership check costs is the first beside the second."""
        return {"": make, "unchecked": partial(make, check_owners=False), IN_BYTES: partial(make, fp8=True)}

    def _product(self, num_inputs: int, num_outputs: int) -> Call:
        return partial(matmul, self.random(self.num_tokens, num_inputs), self.random(num_outputs, num_inputs))

    def _norm(self) -> Call:
        size = self.model.hidden
        x, residual = self.random(self.num_tokens, size), self.random(self.num_tokens, size, dtype=torch.float32)
        return partial(rms_norm, x, self.random(size), 1e-5, residual)

    def _silu(self) -> Call:
        return partial(silu_and_mul, self.random(self.num_tokens, 2 * self.model.intermediate))

    def tables(self) -> StepTables:
        """Scattered blocks, each row its own."""
        load = self.load
        each = -(-load.kv_len // BLOCK_SIZE)
        blocks = np.random.default_rng(0).permutation(load.num_rows * each).astype(np.int32).reshape(load.num_rows, -1)
        at = np.arange(load.kv_len - load.num_new, load.kv_len)
        tags = np.arange(1, load.num_rows + 1, dtype=np.int64)
        block_tags = np.zeros(blocks.size, dtype=np.int64)
        block_tags[blocks] = tags[:, None]
        return StepTables(
            cu_seqlens=(np.arange(load.num_rows + 1) * load.num_new).astype(np.int32),
            kv_lens=np.full(load.num_rows, load.kv_len, dtype=np.int32),
            block_tables=blocks,
            slot_mapping=(blocks[:, at // BLOCK_SIZE].astype(np.int64) * BLOCK_SIZE + at % BLOCK_SIZE).ravel(),
            row_tags=tags,
            block_tags=block_tags,
            block_size=BLOCK_SIZE,
        )

    def _caches(self, fp8: bool) -> tuple[Tensor, Tensor]:
        model, load = self.model, self.load
        num_blocks = load.num_rows * -(-load.kv_len // BLOCK_SIZE)
        shape = (num_blocks, BLOCK_SIZE, model.num_kv_heads, model.head_size)
        if fp8:
            key, value = (torch.randint(0, 0x60, shape, dtype=torch.uint8, device=self.device) for _ in range(2))
            return key, value
        return self.random(*shape), self.random(*shape)

    def _qkv(self) -> Tensor:
        model = self.model
        return self.random(self.num_tokens, model.num_heads + 2 * model.num_kv_heads, model.head_size)

    def _rope(self, *, fp8: bool = False, check_owners: bool = True) -> Call:
        tables, tokens = self.tables(), self.num_tokens
        angles = self.random(tokens, self.model.head_size // 2, dtype=torch.float32)
        return partial(
            rope_and_store_kv,
            self._qkv(),
            angles.cos(),
            angles.sin(),
            *self._caches(fp8),
            num_heads=self.model.num_heads,
            slot_mapping=torch.from_numpy(tables.slot_mapping).to(self.device),
            token_tags=torch.from_numpy(tables.row_tags.repeat(self.load.num_new)).to(self.device),
            block_tags=torch.from_numpy(tables.block_tags).to(self.device),
            refused=torch.full((tokens,), NO_BLOCK, dtype=torch.int32, device=self.device),
            check_owners=check_owners,
        )

    def _attention(self, *, fp8: bool = False, check_owners: bool = True) -> Call:
        model, key_value = self.model, self._caches(fp8)
        capability = 0
        if self.device.type == "cuda":
            major, minor = torch.cuda.get_device_capability(self.device)
            capability = 10 * major + minor
        numbers = (self.dtype.itemsize, key_value[0].dtype.itemsize)
        return partial(
            paged_attention,
            self._qkv()[:, : model.num_heads],
            *key_value,
            plan=plan_attention(self.tables(), self.device),
            shape=attention_shape(capability, model.head_size, model.ratio, BLOCK_SIZE, *numbers),
            scale=model.head_size**-0.5,
            check_owners=check_owners,
        )

    def _of_logits(self) -> Iterator[Case]:
        """Of the rows that sample: one each."""
        rows, size = self.load.num_rows, self.model.vocabulary
        work = Work("greedy", rows * size * 4, 0)
        yield Case(work, "", self.copies(work.bytes, lambda: partial(top, self._logits(), 1)))
        work, k = Work("top_k", rows * size * 4, 0), min(TOP_K, size)
        yield Case(work, f"k {k}", self.copies(work.bytes, lambda: partial(top, self._logits(), k)))

    def _logits(self) -> Tensor:
        return self.random(self.load.num_rows, self.model.vocabulary, dtype=torch.float32)

    def _of_blocks(self) -> Iterator[Case]:
        """The blocks of the first row, in one layer."""
        model, tables = self.model, self.tables()
        ids = torch.from_numpy(tables.block_tables[0].astype(np.int64)).to(self.device)
        tags = torch.from_numpy(tables.block_tags).to(self.device)
        work = Work("scrub_blocks", 2 * len(ids) * BLOCK_SIZE * model.num_kv_heads * model.head_size * 2, 0)
        yield Case(work, f"{len(ids)} blocks", self.copies(work.bytes, lambda: self._scrub(ids, tags.clone())))
        block_tables, kv_lens = (
            torch.from_numpy(part).to(self.device) for part in (tables.block_tables, tables.kv_lens)
        )
        work = Work("gather_tags", tables.block_tables.size * 20, 0)
        yield Case(work, "", [partial(gather_tags, block_tables, kv_lens, tags, BLOCK_SIZE)])

    def _scrub(self, ids: Tensor, tags: Tensor) -> Call:
        memory = torch.stack(self._caches(fp8=False))[None]
        return partial(scrub_blocks, memory, ids, tags)


def measure(
    layers: Sequence[Layer], timer: Timer, gpu: Gpu | None, num_rounds: int
) -> Iterator[tuple[str, str, Figure]]:
    """Model, step and figure, one after the other: their memory is given back in between."""
    for one in layers:
        for case in one.cases():
            yield one.model.name, one.load.name, figure(case, timer(case.calls, num_rounds), gpu)


def on_this_gpu(num_rounds: int) -> dict[str, Any]:
    """All of it, for Llama-3-8B in bfloat16. Wants a GPU."""
    device = torch.device("cuda", torch.cuda.current_device())
    name = torch.cuda.get_device_name(device)
    layers = [Layer(LLAMA_8B, load, torch.bfloat16, device, WORKING_SET_BYTES) for load in LOADS]
    return {"device": name, "figures": rows(measure(layers, device_us, known(name), num_rounds))}


def rows(measured: Iterator[tuple[str, str, Figure]]) -> list[dict[str, Any]]:
    return [{"model": model, "step": step, **asdict(found)} for model, step, found in measured]
