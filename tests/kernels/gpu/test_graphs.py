"""Decode batches on kept launches: the same bits as launched one by one, whatever was there before, and nothing of
anyone else's. Without a GPU a replay is tests/kernels/gpu/replay.py's; `make gpu` captures real graphs."""

import importlib.util
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from torch import Tensor

from kernels.backend import OwnershipError, StepTables
from kernels.gpu import graphs
from kernels.gpu.backend import TritonBackend
from kernels.gpu.capture import CalledAgain, Capture, CudaCapture
from kernels.gpu.launch import is_interpreted
from kernels.gpu.plan import Plan
from tests.kernels.gpu.replay import Replayed
from tests.kernels.gpu.steps import DEVICE, few
from tests.kernels.native import bits

SPLIT, BLOCK_SIZE, NUM_BLOCKS, CONTEXT_MAX = 16, 4, 40, 40
HEADS, KV_HEADS, SIZE, VOCABULARY = 2, 1, 16, 32
ROW_BLOCKS = -(-CONTEXT_MAX // BLOCK_SIZE)
SIZES = (1, 3)
SEQUENCE = [[18, 40, 7], [3, 33], [5], [2, 2, 2], [20]]  # many and long, then few and short
TAGS = np.array([11, 12, 13], dtype=np.int64)


def capture() -> Capture:
    return Replayed() if is_interpreted() else CudaCapture(DEVICE)


@dataclass
class Layer:
    """One layer of attention over a cache: token ids pick rows of ``table``; what comes out are the logits."""

    backend: TritonBackend = field(default_factory=lambda: TritonBackend(SPLIT))
    module: ModuleType = graphs
    capture: Callable[[], Capture] = capture

    def __post_init__(self) -> None:
        generator = torch.Generator().manual_seed(1)
        table = torch.randn((VOCABULARY, HEADS + 2 * KV_HEADS, SIZE), generator=generator)
        self.table, angles = table.to(DEVICE), torch.randn((CONTEXT_MAX, SIZE // 2), generator=generator)
        self.cos, self.sin = angles.cos().to(DEVICE), angles.sin().to(DEVICE)
        shape = (2, NUM_BLOCKS, BLOCK_SIZE, KV_HEADS, SIZE)
        self.numbers = torch.randn(shape, generator=generator).to(DEVICE)
        self.cache = torch.zeros(shape, device=DEVICE)
        self.device_tags = self.backend.new_tags(NUM_BLOCKS)
        self.block_tags = np.zeros(NUM_BLOCKS, dtype=np.int64)
        self.graphs = self.module.DecodeGraphs(
            self.forward,
            SIZES,
            device_tags=self.device_tags,
            block_size=BLOCK_SIZE,
            context_max=CONTEXT_MAX,
            split=SPLIT,
            capture=self.capture(),
        )

    def forward(self, token_ids: Tensor, positions: Tensor, plan: Plan, wanted: Tensor) -> Tensor:
        qkv = self.table[token_ids]
        cos, sin = self.cos[positions], self.sin[positions]
        key_cache, value_cache = self.cache
        out = self.backend.attend(qkv, cos, sin, key_cache, value_cache, num_heads=HEADS, plan=plan, scale=SIZE**-0.5)
        self.backend.check(plan)
        return out.flatten(1)[wanted]

    def tables(self, kv_lens: list[int]) -> StepTables:
        """Rows in blocks of their own; every slot that is none of theirs, or beyond their end, holds NaN."""
        rows = len(kv_lens)
        blocks = np.random.default_rng(sum(kv_lens)).permutation(NUM_BLOCKS)[: rows * ROW_BLOCKS]
        tables = blocks.reshape(rows, ROW_BLOCKS).astype(np.int32)
        self.cache.fill_(float("nan"))
        self.block_tags[:] = 99
        for row, kv_len in enumerate(kv_lens):
            num_blocks = -(-kv_len // BLOCK_SIZE)
            tables[row, num_blocks:] = -1
            self.block_tags[tables[row, :num_blocks]] = TAGS[row]
            at = np.arange(kv_len - 1)
            slots = torch.from_numpy(tables[row, at // BLOCK_SIZE].astype(np.int64) * BLOCK_SIZE + at % BLOCK_SIZE)
            slots = slots.to(DEVICE)
            self.cache.flatten(1, 2)[:, slots] = self.numbers.flatten(1, 2)[:, slots]
        self.device_tags.copy_(torch.from_numpy(self.block_tags))
        last = np.array(kv_lens, dtype=np.int64) - 1
        slots_new = tables[np.arange(rows), last // BLOCK_SIZE].astype(np.int64) * BLOCK_SIZE + last % BLOCK_SIZE
        return StepTables(
            cu_seqlens=np.arange(rows + 1, dtype=np.int32),
            kv_lens=np.array(kv_lens, dtype=np.int32),
            block_tables=tables[:, : max(1, -(-max(kv_lens) // BLOCK_SIZE))].copy(),
            slot_mapping=slots_new,
            row_tags=TAGS[:rows],
            block_tags=self.block_tags,
            block_size=BLOCK_SIZE,
            device_tags=self.device_tags,
        )

    def both(self, kv_lens: list[int]) -> tuple[Tensor, Tensor]:
        """Logits launched one by one, and replayed; the caches that they leave must be the same."""
        token_ids = np.arange(len(kv_lens), dtype=np.int64) * 3 + kv_lens[0] % VOCABULARY // 3
        positions = np.array(kv_lens, dtype=np.int64) - 1
        tables = self.tables(kv_lens)
        assert self.graphs.fits(tables)
        wanted = torch.arange(len(kv_lens), device=DEVICE)
        put = (torch.from_numpy(token_ids).to(DEVICE), torch.from_numpy(positions).to(DEVICE))
        single = self.forward(*put, self.backend.plan(tables), wanted).clone()
        after = self.cache.clone()
        self.tables(kv_lens)
        replayed = self.graphs.run(tables, token_ids, positions)
        assert torch.equal(bits(self.cache.cpu()), bits(after.cpu())), "it wrote what the others wrote"
        held = replayed.tables
        assert held.block_tables[: len(kv_lens)].tolist() == tables.block_tables.tolist()
        assert held.kv_lens.tolist() == kv_lens + [0] * (len(held.kv_lens) - len(kv_lens))
        return single.cpu(), replayed.logits.cpu()

    def same(self, batches: list[list[int]]) -> None:
        for kv_lens in batches:
            single, replayed = self.both(kv_lens)
            assert torch.equal(bits(single), bits(replayed)), kv_lens
            assert replayed.isfinite().all()

    def refuses(self) -> None:
        """The second row's first block is somebody else's: it is named after the replay, and the next step is clean."""
        tables = self.tables([18, 20, 7])
        victim = int(tables.block_tables[0, 0])
        tables.block_tables[1, 0] = victim
        with pytest.raises(OwnershipError) as refused:
            self.graphs.run(tables, np.arange(3), np.array([17, 19, 6]))
        assert (refused.value.tokens, refused.value.block_id) == ((1,), victim)
        self.same([[18, 20, 7]])


@pytest.fixture(scope="module")
def layer() -> Layer:
    return Layer()


LENGTHS = st.sampled_from([1, BLOCK_SIZE, BLOCK_SIZE + 1, SPLIT, SPLIT + 1, 2 * SPLIT + 1, CONTEXT_MAX])
BATCHES = st.lists(st.lists(LENGTHS, min_size=1, max_size=3), min_size=1, max_size=3)


@settings(few, max_examples=6)
@example(batches=SEQUENCE)
@given(batches=BATCHES)
def test_a_replay_gives_the_bits_of_single_launches(layer: Layer, batches: list[list[int]]) -> None:
    """One after the other on the same memory: long rows, then short ones, many, then few."""
    layer.same(batches)


@pytest.mark.deep
@settings(max_examples=100, deadline=None)
@given(batches=BATCHES)
def test_and_in_many_more_orders(layer: Layer, batches: list[list[int]]) -> None:
    layer.same(batches)


def test_a_refusal_is_found_after_the_replay_and_forgotten_by_the_next(layer: Layer) -> None:
    layer.refuses()


def test_a_slot_of_somebody_else_is_not_written(layer: Layer) -> None:
    tables = layer.tables([5, 6])
    foreign = int(np.flatnonzero(layer.block_tags == 99)[0])
    tables.slot_mapping[1] = foreign * BLOCK_SIZE
    with pytest.raises(OwnershipError) as refused:
        layer.graphs.run(tables, np.arange(2), np.array([4, 5]))
    assert (refused.value.tokens, refused.value.block_id) == ((1,), foreign)
    assert layer.cache[:, foreign].isnan().all()


def test_two_books_of_owners_that_differ_are_told(layer: Layer) -> None:
    """The row's own tag on the device, nobody's on the host: the kernels alone would not see it."""
    tables = layer.tables([5, 9])
    block = int(tables.block_tables[1, 1])
    layer.block_tags[block] = 0
    with pytest.raises(OwnershipError, match="another on the host") as refused:
        layer.graphs.run(tables, np.arange(2), np.array([4, 8]))
    assert (refused.value.tokens, refused.value.block_id) == ((1,), block)


def test_the_memory_is_the_same_each_time(layer: Layer) -> None:
    places = set()
    for kv_lens in ([18, 20, 7], [3, 3], [40, 40, 40]):
        done = layer.graphs.run(layer.tables(kv_lens), np.arange(len(kv_lens)), np.array(kv_lens) - 1)
        graph = layer.graphs._graphs[3]
        places.add((done.logits.data_ptr(), *(one.data_ptr() for one in graph._inputs.device.values())))
    assert len(places) == 1


def test_what_has_no_graph_is_launched_by_itself(layer: Layer) -> None:
    fits = layer.graphs.fits
    tables = layer.tables([5, 6, 7])
    assert fits(tables)
    assert layer.graphs._num_splits == 3

    def changed(**arrays: NDArray[np.int32]) -> StepTables:
        given = {name: getattr(tables, name) for name in StepTables.__slots__}
        return StepTables(**{**given, **arrays})

    assert not fits(changed(cu_seqlens=np.array([0, 1, 2, 4], dtype=np.int32))), "a chunk of a prompt"
    assert not fits(changed(kv_lens=np.array([5, 6, 3 * SPLIT + 1], dtype=np.int32))), "longer than its splits"
    wide = np.zeros((3, ROW_BLOCKS + 3), dtype=np.int32)
    assert not fits(changed(block_tables=wide)), "more blocks than its tables have room for"
    four = np.zeros(4, dtype=np.int32)
    assert not fits(
        changed(kv_lens=four, cu_seqlens=np.arange(5, dtype=np.int32), block_tables=np.zeros((4, 1), dtype=np.int32))
    ), "more rows than the largest size"


def test_calling_again_is_a_replay_too() -> None:
    """What interpreted kernels get outside of these tests."""
    Layer(capture=CalledAgain).same([[18, 20, 7], [5]])


def test_what_is_captured_never_waits_and_copies_nothing_to_the_host() -> None:
    kept = Replayed()
    Layer(capture=lambda: kept)
    if is_interpreted():
        kernels = [name for name in kept.launched if name.endswith("_kernel")]
        assert kernels == ["rope_and_store_kv_kernel", "paged_attention_kernel", "merge_kernel"]
        assert not {"_to_copy", "copy_", "_local_scalar_dense", "nonzero"} & {*kept.launched}


PLANTS: dict[str, tuple[str, str, Callable[[Layer], None]]] = {
    "the step is not copied in": ("self._inputs.send()\n        logits", "logits", lambda one: one.same(SEQUENCE)),
    "lengths of an earlier batch stay behind": (
        'given["kv_lens"][...] = filled.kv_lens',
        'given["kv_lens"][:num_rows] = tables.kv_lens',
        lambda one: one.same(SEQUENCE),
    ),
    "slots of an earlier batch stay behind": (
        'given["slot_mapping"][...] = filled.slot_mapping',
        'given["slot_mapping"][:num_rows] = tables.slot_mapping',
        lambda one: one.same(SEQUENCE),
    ),
    "waiting sums of an earlier batch stay behind": (
        'given["merge_tokens"][...] = np.where(filled.kv_lens > self._split, self._cu_seqlens[:-1], -1)',
        'np.copyto(given["merge_tokens"], self._cu_seqlens[:-1], where=filled.kv_lens > self._split)',
        lambda one: one.same(SEQUENCE),
    ),
    "blocks of the row before": (
        'given["block_tables"][:, :width] = filled.block_tables',
        'given["block_tables"][:, :width] = np.roll(filled.block_tables, 1, axis=0)',
        lambda one: one.same(SEQUENCE),
    ),
    "one split for all": ("num_splits_max=num_splits,", "num_splits_max=1,", lambda one: one.same(SEQUENCE)),
    "flags are not cleared": ("flags.fill_(NO_BLOCK)", "pass", Layer.refuses),
    "flags are not read": ("raise_refused(self.plan, held)", "pass", Layer.refuses),
}


@pytest.mark.skipif(not is_interpreted(), reason="a graph that is wrong may end the process on a GPU")
@pytest.mark.parametrize("name", PLANTS)
def test_planted_bugs_are_seen(name: str, tmp_path: Path) -> None:
    right, wrong, check = PLANTS[name]
    with pytest.raises((AssertionError, OwnershipError, pytest.fail.Exception)):
        check(Layer(module=planted(right, wrong, tmp_path)))


@pytest.mark.skipif(not is_interpreted(), reason="a graph that is wrong may end the process on a GPU")
@pytest.mark.parametrize(
    "waits",
    [
        'given["kv_lens"].max().item()',
        "wanted.cpu()",
        'given["positions"].tolist()',
        'bool(given["kv_lens"].any())',
        'given["kv_lens"].nonzero()',
        'torch.from_numpy(self._inputs.host["kv_lens"])',
        "torch.tensor([1])",
    ],
)
def test_a_capture_that_would_wait_is_refused(waits: str, tmp_path: Path) -> None:
    right = "flags.fill_(NO_BLOCK)"
    with pytest.raises(RuntimeError, match="a graph"):
        Layer(module=planted(right, f"{right}; {waits}", tmp_path))


def planted(right: str, wrong: str, folder: Path) -> ModuleType:
    source = Path(graphs.__file__).read_text()
    assert source.count(right) == 1
    path = folder / "planted_graphs.py"
    path.write_text(source.replace(right, wrong))
    spec = importlib.util.spec_from_file_location("planted_graphs", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["planted_graphs"] = module
    spec.loader.exec_module(module)
    return module
