"""Digests of whole blocks: one changed byte anywhere shows at reuse; the budget holds."""

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from audit.runtime.block_digests import BlockDigests
from engine.cache.kv_cache import KVCache
from engine.core import EngineCore
from engine.models.facts import CacheLayer
from engine.protocol import SamplingParams, Submit
from gateway.audit_observer import AuditObserver
from kernels.backend import KernelError
from kernels.cpu.library import load
from tests.faults.stage import BLOCK_SIZE, NUM_BLOCKS, VOCAB_SIZE, PlainRunner

LAYERS = [CacheLayer(2, 8), CacheLayer(1, 4), CacheLayer(2, 8)]
NUM = 5


def cache() -> KVCache:
    made = KVCache(layers=LAYERS, num_blocks=NUM, block_size=4, dtype=torch.bfloat16)
    for keys, values in made._layers:
        for part in (keys, values):
            part.copy_(torch.randn(part.shape, generator=torch.Generator().manual_seed(3)))
    return made


@pytest.fixture(scope="module", autouse=True)
def native() -> None:
    try:
        load()
    except KernelError as error:  # pragma: no cover
        pytest.skip(str(error))


@given(st.integers(0, 2), st.booleans(), st.integers(0, NUM - 1), st.integers(0, NUM - 1), st.data())
def test_one_byte_of_one_layer_changes_its_blocks_digest_and_no_other(
    layer: int, is_key: bool, written: int, looked_at: int, data: st.DataObject
) -> None:
    own = cache()
    digest = own.digester()
    assert digest is not None
    before = digest(looked_at, (1, 2))
    assert before.shape == (2,)
    block = own.layer(layer)[0 if is_key else 1][written].view(torch.uint8).view(-1)
    at = data.draw(st.integers(0, len(block) - 1))
    block[at] ^= data.draw(st.integers(1, 255))
    assert np.array_equal(before, digest(looked_at, (1, 2))) == (written != looked_at)
    assert not np.array_equal(digest(looked_at, (1, 2)), digest(looked_at, (1, 3)))


def test_layers_do_not_change_places_unseen() -> None:
    own = cache()
    digest = own.digester()
    assert digest is not None
    own.layer(2)[0][1] += 1
    before = digest(1, (1, 2))
    first, last = own.layer(0)[0][1].clone(), own.layer(2)[0][1].clone()
    own.layer(0)[0][1], own.layer(2)[0][1] = last, first
    assert not np.array_equal(before, digest(1, (1, 2)))
    for beyond in (-1, NUM):
        with pytest.raises(IndexError):
            digest(beyond, (1, 2))


def test_the_budget_is_for_each_step() -> None:
    content, read = np.zeros(8, np.int64), list[int]()

    def digest(block_id: int, key: tuple[int, int]) -> Any:
        read.append(block_id)
        return np.array([content[block_id], key[0]])

    digests = BlockDigests(digest, 8, 2, seed=0)
    for block_id in range(4):
        digests.seal(block_id, 7)
    assert (read, digests.num_taken) == ([0, 1], 2)
    content[:] = 1
    assert not digests.changed(0, 7), "the budget is spent"
    digests.new_step()
    assert not digests.changed(2, 7), "it was never taken"
    assert not digests.changed(0, 8), "another generation"
    assert digests.changed(0, 7)
    assert digests.changed(1, 7)
    assert not digests.changed(0, 7), "spent again"
    assert digests.num_compared == 2
    off = BlockDigests(None, 8, 2, seed=0)
    off.seal(0, 1)
    assert not off.changed(0, 1)


@pytest.mark.parametrize("where", [None, 0, 1])
def test_a_write_into_one_place_of_one_slot_is_found_at_reuse(where: int | None) -> None:
    """The slot's samples may have been read elsewhere: here they are not read at all."""
    runner = PlainRunner()
    other_layer = np.zeros((NUM_BLOCKS, BLOCK_SIZE), np.int64)

    def digest(block_id: int, key: tuple[int, int]) -> Any:
        return np.array([hash((key, runner.slots[block_id].tobytes(), other_layer[block_id].tobytes())), 0])

    core = EngineCore(
        runner,
        decode=lambda ids: "",
        eos_token_ids=frozenset(),
        context_max=96,
        vocab_size=VOCAB_SIZE,
        max_batched_tokens=32,
        max_num_seqs=5,
        max_waiting=100,
        observer=AuditObserver(NUM_BLOCKS, BLOCK_SIZE, digest=digest, blocks_per_step=8),
    )
    incidents = []
    for name in ("first", "second"):
        core.add(Submit(name, "a", b"", list(range(9)), SamplingParams(2, temperature=0.0, ignore_eos=True)))
        while core.has_work:
            incidents += core.step().incidents
        if where is not None and name == "first":
            cached = sorted(core.pool._published._prefix_of)
            other_layer[cached[where], 1] ^= 1
    counters = core.observer.counters()
    assert counters["num_blocks_digested"] >= 2
    assert counters["num_digests_compared"] >= 1
    assert [(one.kind, one.sequence_ids) for one in incidents][:1] == (
        [] if where is None else [("changed_bytes", ["second"])]
    )
