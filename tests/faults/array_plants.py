"""Plants in what a step is computed from: one array of a batch is wrong, and the auditor sees what the kernels get.

A plant takes a run that is about to begin and changes its engine, from outside and for that run only; it tells the run
when its faulty code did something.
"""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np

from engine.batch import Batch
from tests.faults.stage import BLOCK_SIZE, NUM_BLOCKS, Run

Plant = Callable[[Run], None]
FIRST_STEP = 4  # faults wait until something can go wrong


def wrap(owner: Any, name: str, make: Callable[[Any], Any]) -> None:
    setattr(owner, name, make(getattr(owner, name)))


def in_batch(change: Callable[[Batch], Batch | None]) -> Plant:
    """Once, in what the engine builds: the auditor is shown what the kernels get."""

    def plant(run: Run) -> None:
        def faulty(batch: Batch) -> Batch:
            wrong = change(batch) if run.core.step_number >= FIRST_STEP and run.reached_step < 0 else None
            if wrong is None:
                return batch
            run.reach()
            return wrong

        run.change_batch = faulty

    return plant


def evidence(batch: Batch, **arrays: Any) -> Batch:
    own = {name: value for name, value in arrays.items() if hasattr(batch, name)}
    return replace(batch, **own, evidence=replace(batch.evidence, **arrays))


def pair(batch: Batch, *, alien: bool) -> tuple[int, int] | None:
    domains = batch.evidence.domains
    for a in range(len(domains)):
        for b in range(len(domains)):
            if a != b and (domains[a] != domains[b]) == alien:
                return a, b
    return None


def read_of(alien: bool) -> Plant:
    def change(batch: Batch) -> Batch | None:
        rows = pair(batch, alien=alien)
        tables = batch.evidence.block_tables.copy()
        if rows is None or tables[rows[0], 0] == tables[rows[1], 0]:
            return None
        tables[rows[0], 0] = tables[rows[1], 0]
        return evidence(batch, block_tables=tables)

    return in_batch(change)


def swapped_rows(name: str) -> Plant:
    def change(batch: Batch) -> Batch | None:
        array = np.array(getattr(batch.evidence, name))
        if len(array) < 2 or np.array_equal(array[0], array[1]):
            return None
        array[[0, 1]] = array[[1, 0]]
        return evidence(batch, **{name: array})

    return in_batch(change)


def shifted(name: str, by: int) -> Plant:
    def change(batch: Batch) -> Batch | None:
        array = np.array(getattr(batch.evidence, name))
        if not len(array):
            return None
        array[0] += by
        return evidence(batch, **{name: array})

    return in_batch(change)


def swapped_columns(batch: Batch) -> Batch | None:
    tables = batch.evidence.block_tables.copy()
    if tables.shape[1] < 2 or tables[0, 1] < 0 or batch.evidence.kv_lens[0] <= 4:
        return None
    tables[0, [0, 1]] = tables[0, [1, 0]]
    return evidence(batch, block_tables=tables)


def beyond(name: str, value: int) -> Plant:
    """The last row of a table's owners, or a token, gets what belongs to nobody."""

    def change(batch: Batch) -> Batch | None:
        tables = batch.evidence.block_tables.copy()
        if batch.evidence.kv_lens[0] <= BLOCK_SIZE:
            return None
        tables[0, 0] = value if value >= 0 else next(b for b in range(NUM_BLOCKS) if b not in tables)
        return evidence(batch, **{name: tables})

    return in_batch(change)


def merged(batch: Batch) -> Batch | None:
    """All rows as one."""
    cu = batch.evidence.cu_seqlens.copy()
    if len(cu) < 3:
        return None
    cu[1:-1] = cu[-1]
    return evidence(batch, cu_seqlens=cu)


def placeholders(batch: Batch) -> Batch | None:
    """Tokens that are not there yet are computed as if they were."""
    tokens = batch.token_ids.copy()
    if not len(tokens) or tokens[-1] == 0:
        return None
    tokens[-1] = 0
    return evidence(batch, token_ids=tokens)


def slot_of_the_block_before(batch: Batch) -> Batch | None:
    """At a block's border, the first token of the next block is written into the one before."""
    slots = batch.evidence.slot_mapping.copy()
    for row, kv_len in enumerate(batch.evidence.kv_lens.tolist()):
        token = int(batch.evidence.cu_seqlens[row + 1]) - 1
        if kv_len > BLOCK_SIZE and kv_len % BLOCK_SIZE == 1:
            slots[token] = batch.evidence.block_tables[row, kv_len // BLOCK_SIZE - 1] * BLOCK_SIZE
            return evidence(batch, slot_mapping=slots)
    return None


def write_into_shared(batch: Batch) -> Batch | None:
    """A row writes into a block that another one reads too."""
    tables, slots = batch.evidence.block_tables, batch.evidence.slot_mapping.copy()
    ids, counts = np.unique(tables[tables >= 0], return_counts=True)
    shared = ids[counts > 1]
    if not len(shared) or not len(slots):
        return None
    slots[0] = shared[0] * BLOCK_SIZE
    return evidence(batch, slot_mapping=slots)


def scored_elsewhere(batch: Batch) -> Batch | None:
    """A prompt is scored from the logits of the place after."""
    places = batch.scored_tokens.copy()
    if not len(places) or len(batch.token_ids) < 2:
        return None
    places[0] = (places[0] + 1) % len(batch.token_ids)
    return evidence(batch, scored_tokens=places)


def scored_against_another(batch: Batch) -> Batch | None:
    part = next((one for one in batch.scored if one.next_token_ids), None)
    if part is None:
        return None
    other = replace(part, next_token_ids=((part.next_token_ids[0] + 1) % 64, *part.next_token_ids[1:]))
    return evidence(batch, scored=tuple(other if one is part else one for one in batch.scored))


def last_slot(batch: Batch) -> Batch | None:
    slots = batch.evidence.slot_mapping.copy()
    slots[0] = -1
    return evidence(batch, slot_mapping=slots)


def boundary(batch: Batch) -> Batch | None:
    cu = batch.evidence.cu_seqlens.copy()
    if len(cu) < 3 or cu[2] - cu[1] < 2:
        return None
    cu[1] += 1
    return evidence(batch, cu_seqlens=cu)


def states(batch: Batch, order: list[int]) -> Batch:
    """Rows sampled with other rows' states."""
    rows, old = batch.sampled_rows[order], batch.evidence.sampling
    return evidence(batch, sampled_rows=rows, sampling=tuple(old[index] for index in order))


def state_swap(batch: Batch) -> Batch | None:
    num = len(batch.sampled_rows)
    return states(batch, [1, 0, *range(2, num)]) if num > 1 else None


def state_shared(batch: Batch) -> Batch | None:
    num = len(batch.sampled_rows)
    return states(batch, [1, 1, *range(2, num)]) if num > 1 else None
