"""Batches that are filled up: the others keep their bits, nothing is read or written for who fills up, and the auditor
lets such rows pass and no others."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from engine.core import EngineCore
from engine.models.llama import LlamaModel
from gateway.audit_observer import AuditObserver
from kernels import padding
from kernels.backend import PADDING_SLOT, StepTables, check_tables
from kernels.gpu.backend import TritonBackend
from kernels.padding import pad, padded_size
from tests.engine.test_gpu_runner import SPLIT, Recording, core_of, play, tiny_model, work

SIZES = (1, 2, 4)


def decode(kv_lens: list[int], num_new: int = 1) -> StepTables:
    """Rows of decode tokens, in blocks of 4."""
    rows, width = len(kv_lens), max([-(-length // 4) for length in kv_lens], default=0)
    return StepTables(
        cu_seqlens=np.arange(rows + 1, dtype=np.int32) * num_new,
        kv_lens=np.array(kv_lens, dtype=np.int32),
        block_tables=np.arange(rows * width, dtype=np.int32).reshape(rows, width),
        slot_mapping=np.arange(rows * num_new, dtype=np.int64),
        row_tags=np.arange(1, rows + 1, dtype=np.int64),
        block_tags=np.ones(rows * width, dtype=np.int64),
        block_size=4,
    )


@given(kv_lens=st.lists(st.integers(1, 9), min_size=1, max_size=5), more=st.integers(0, 4))
def test_the_rows_come_first_and_who_fills_up_touches_nothing(kv_lens: list[int], more: int) -> None:
    tables = decode(kv_lens)
    rows, padded = len(kv_lens), pad(tables, len(kv_lens) + more)
    for name in ("cu_seqlens", "kv_lens", "block_tables", "slot_mapping", "row_tags"):
        before, after = getattr(tables, name), getattr(padded, name)
        assert before.dtype == after.dtype
        assert np.array_equal(after[: len(before)], before), name
    assert np.diff(padded.cu_seqlens).tolist() == [1] * (rows + more)
    assert padded.kv_lens[rows:].tolist() == [0] * more
    assert (padded.block_tables[rows:] == -1).all()
    assert padded.slot_mapping[rows:].tolist() == [PADDING_SLOT] * more
    assert padded.row_tags[rows:].tolist() == [padding.NOBODY] * more
    check_tables(padded, may_pad=True)
    if more:
        with pytest.raises(ValueError, match="no longer than their keys"):
            check_tables(padded)


@pytest.mark.parametrize(("num_rows", "num_new", "size"), [(1, 1, 1), (3, 1, 4), (4, 1, 4), (5, 1, 5), (3, 2, 3)])
def test_only_decode_tokens_are_filled_up_and_only_to_a_size(num_rows: int, num_new: int, size: int) -> None:
    assert padded_size(decode([4] * num_rows, num_new), SIZES) == size


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> LlamaModel:
    folder: Path = tmp_path_factory.mktemp("tiny")
    return tiny_model(
        folder, TritonBackend(SPLIT), num_hidden_layers=1, vocab_size=320, max_position_embeddings=2 * SPLIT
    )


def test_a_filled_up_batch_gives_the_same_bits(model: LlamaModel) -> None:
    submits = work([18, 2, 5], 3)
    plain, padded = Recording(model), Recording(model, graph_sizes=(4,))
    assert play(plain, submits) == play(padded, submits)
    assert (max(plain.num_rows), padded.num_rows[-1]) == (3, 4), "batches were filled up"
    assert plain.seen.keys() == padded.seen.keys()
    for key, logits in plain.seen.items():
        assert np.array_equal(logits.view(np.int32), padded.seen[key].view(np.int32)), key
    for ours, theirs in zip(padded.cache.layer(0), plain.cache.layer(0), strict=True):
        assert torch.equal(ours, theirs), "the same cache: nothing else was written"


def finished(core: EngineCore) -> list[str]:
    """What incidents there were until all is done."""
    for submit in work([5, 6, 7], 3):
        assert core.add(submit) is None
    kinds = []
    while core.has_work:
        kinds += [incident.kind for incident in core.step().incidents]
    return kinds


def test_the_auditor_lets_who_fills_up_pass(model: LlamaModel) -> None:
    runner = Recording(model, graph_sizes=(4,))
    observer = AuditObserver(runner.num_blocks, runner.block_size, memory=runner.cache.words())
    assert finished(core_of(runner, observer)) == []
    assert 4 in runner.num_rows
    assert observer.counters()["num_launches_compared"] > 0


def with_a_key(tables: StepTables) -> None:
    tables.kv_lens[-1] = 1


def with_a_block(tables: StepTables) -> None:
    tables.block_tables[-1, 0] = tables.block_tables[0, 0]


def with_a_slot(tables: StepTables) -> None:
    tables.slot_mapping[-1] = 63 * tables.block_size


@pytest.mark.parametrize("plant", [with_a_key, with_a_block, with_a_slot])
def test_and_no_others(model: LlamaModel, plant: Callable[[StepTables], None], monkeypatch: pytest.MonkeyPatch) -> None:
    """A row that is not one of the step's and reads or writes: everybody's output is withheld."""

    def planted(tables: StepTables, size: int) -> StepTables:
        tables = pad(tables, size)
        if size > len(np.flatnonzero(tables.kv_lens)):
            plant(tables)
        return tables

    monkeypatch.setattr("kernels.gpu.graphs.pad", planted)
    runner = Recording(model, graph_sizes=(4,))
    kinds = finished(core_of(runner, AuditObserver(runner.num_blocks, runner.block_size)))
    assert set(kinds) <= {"unapproved_launch", "kernel_ownership"}
    assert kinds
