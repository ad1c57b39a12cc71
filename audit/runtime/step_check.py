"""One step's arrays against the ledger: every rule of isolation.py that is decided before a launch."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain, pairwise
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from audit.runtime.block_ledger import (
    FREE,
    NOBODY,
    QUARANTINED,
    SEALED,
    STRANGER,
    UNREAD,
    WRITING,
    BlockLedger,
    IntArray,
)
from audit.runtime.sampling_rows import SampledRow, sampling_problems, scoring_problems
from audit.runtime.step_arrays import StepArrays, shape_problem

BoolArray = npt.NDArray[np.bool_]
NOTHING = np.zeros(0, np.int64)


class Violation(NamedTuple):
    """A broken rule. `domains` names the row's domain first, then the owner's where there is one; block_id -1: none."""

    kind: str
    sequence_ids: tuple[str, ...]
    domains: tuple[str, ...]
    block_id: int
    detail: str


@dataclass(frozen=True, slots=True)
class Verdict:
    violations: list[Violation]
    num_blocks: int
    written: tuple[IntArray, IntArray, IntArray]  # block ids, their generations, their `filled` after the step
    computed: list[tuple[str, int, list[int]]]  # sequence, first position and tokens of each row that may run
    read: tuple[IntArray, IntArray, IntArray] = (
        NOTHING,
        NOTHING,
        NOTHING,
    )  # rows, blocks, slots of history


def sampled_of(step: StepArrays) -> Sequence[SampledRow]:
    """The rows that sample, none where a row is named that is not there."""
    sampled = step.sampled or ()
    return sampled if all(0 <= one.row < len(step.sequence_ids) for one in sampled) else ()


def check(ledger: BlockLedger, step: StepArrays, distrusted: frozenset[str] = frozenset()) -> Verdict:
    """Compare the step with the ledger. Writes of `distrusted` sequences are not taken for granted afterwards."""
    num_rows = len(step.sequence_ids)
    problem = shape_problem(step)
    if problem is not None:
        everyone = Violation(
            "malformed_step", tuple(step.sequence_ids), tuple(dict.fromkeys(step.domains)), -1, problem
        )
        return Verdict([everyone], 0, (NOTHING, NOTHING, NOTHING), [])
    if num_rows == 0:
        return Verdict([], 0, (NOTHING, NOTHING, NOTHING), [])
    size, num_blocks = ledger.block_size, len(ledger.state)
    cu = np.asarray(step.cu_seqlens).astype(np.int64)
    kv = np.asarray(step.kv_lens).astype(np.int64)
    tables = np.asarray(step.block_tables).astype(np.int64)
    slots = np.asarray(step.slot_mapping).astype(np.int64)
    q = np.diff(cu)
    row_domain = np.array([ledger.domain_ids.get(name, STRANGER) for name in step.domains], np.int64)
    given = np.full(tables.shape, NOBODY, np.int64)  # what each row's sequence was given, by the ledger
    no_blocks: list[int] = []
    width = tables.shape[1]
    own = [ledger.sequences[n].blocks[:width] if n in ledger.sequences else no_blocks for n in step.sequence_ids]
    given[np.arange(width) < np.array([*map(len, own)])[:, None]] = [*chain.from_iterable(own)]
    flags = _Flags(ledger, step)

    # Lengths: a row that points outside its own table is flagged and takes no further part.
    inside = (q <= kv) & (kv >= 0) & (kv <= tables.shape[1] * size)
    flags.rows(~inside, "length_out_of_table", "kv_len is below q_len or beyond the block table")
    start = np.where(inside, kv - q, 0)
    kv = np.where(inside, kv, 0)

    # Reads: every block that the row can reach.
    row, column = np.nonzero(np.arange(tables.shape[1]) < -(-kv // size)[:, None])
    ids = tables[row, column]
    real = (ids >= 0) & (ids < num_blocks)
    flags.blocks(~real, row, ids, "block_out_of_range", "a block id in the table is outside of the pool")
    at = np.where(real, ids, 0)
    state = ledger.state[at]
    held = real & ((state == WRITING) | (state == SEALED))
    flags.blocks(real & ((state == FREE) | (state == UNREAD)), row, ids, "unallocated_block", "reads a free block")
    flags.blocks(real & (state == QUARANTINED), row, ids, "quarantined_block", "reads a block in quarantine")
    own_domain = ledger.domain[at] == row_domain[row]
    placed = given[row, column] == ids
    flags.blocks(held & ~own_domain, row, ids, "foreign_block", "reads a block of another domain")
    flags.blocks(held & own_domain & ~placed, row, ids, "foreign_lineage", "reads a block that is not its own there")

    # History: what lies in the blocks is exactly what came before.
    before = np.clip(start[row] - column * size, 0, size)
    mine = held & own_domain & placed
    flags.blocks(mine & (ledger.filled[at] != before), row, ids, "history_mismatch", "tokens before this step differ")

    # Writes: exactly the new positions, through the table, into blocks being written, one writer each.
    writer = np.repeat(np.arange(num_rows), q)
    position = start[writer] + np.arange(len(slots)) - cu[writer]
    sound = inside[writer]
    target = tables[writer, np.where(sound, position // size, 0)] if tables.shape[1] else np.full(len(slots), -1)
    expected = target * size + position % size
    slot_block = slots // size
    slot_real = (slots >= 0) & (slot_block < num_blocks)
    flags.blocks(~slot_real, writer, slot_block, "slot_out_of_range", "writes outside of the cache")
    slot_at = np.where(slot_real, slot_block, 0)
    foreign = slot_real & (ledger.domain[slot_at] != row_domain[writer])
    flags.blocks(foreign, writer, slot_block, "foreign_write", "writes into a block of another domain")
    flags.blocks(sound & (slots != expected), writer, slot_block, "slot_mismatch", "writes beside its own positions")
    closed = slot_real & ~foreign & (ledger.state[slot_at] != WRITING)
    flags.blocks(closed, writer, slot_block, "write_to_closed_block", "writes into a block not in writing state")
    in_order = np.sort(slots)
    twice = in_order[1:][in_order[1:] == in_order[:-1]]
    if len(twice):
        shared = np.isin(slots, twice)
        flags.blocks(shared, writer, slot_block, "double_writer", "a slot has two writers in this step")
    if step.positions is not None:
        beside = np.zeros(num_rows, np.bool_)
        beside[writer[sound & (np.asarray(step.positions) != position)]] = True
        flags.rows(beside, "wrong_position", "computes its tokens at other positions")

    # Tokens: every row computes its own.
    borders, all_tokens = cu.tolist(), np.asarray(step.token_ids).tolist()
    tokens = [all_tokens[begin:end] for begin, end in pairwise(borders)]
    rows = list(zip(step.sequence_ids, start.tolist(), tokens, strict=True))
    alien = np.array([not _own_tokens(ledger, *computed) for computed in rows], np.bool_)
    flags.rows(inside & alien, "foreign_tokens", "computes tokens that are not its sequence's")
    lengths = kv.tolist()
    if step.sampled is not None:
        for one, rule, detail in sampling_problems(ledger.sequences, step, borders, lengths):
            flags.row(one, rule, detail)
    for one, rule, detail in scoring_problems(ledger.sequences, step, borders, lengths):
        flags.row(one, rule, detail)
    if len(set(step.sequence_ids)) != num_rows:
        flags.rows(np.ones(num_rows, np.bool_), "duplicate_row", "a sequence has two rows in this step")

    trusted = np.array([name not in distrusted for name in step.sequence_ids], np.bool_)
    good = (trusted & ~flags.bad)[row]
    after = np.clip(kv[row] - column * size, 0, size)
    return Verdict(
        flags.found,
        len(ids),
        (ids[good], ledger.generation[at][good], after[good]),
        [computed for computed, fine in zip(rows, trusted & ~flags.bad, strict=True) if fine],
        (row[mine], ids[mine], before[mine]),
    )


def _own_tokens(ledger: BlockLedger, name: str, start: int, tokens: list[int]) -> bool:
    known = ledger.sequences[name].tokens if name in ledger.sequences else []
    return start <= len(known) and known[start : start + len(tokens)] == tokens[: max(0, len(known) - start)]


class _Flags:
    """Collects violations: one for each row and rule, with the first block that shows it."""

    def __init__(self, ledger: BlockLedger, step: StepArrays) -> None:
        self.found: list[Violation] = []
        self.bad: BoolArray = np.zeros(len(step.sequence_ids), np.bool_)
        self._ledger = ledger
        self._step = step

    def rows(self, mask: BoolArray, rule: str, detail: str) -> None:
        for row in np.flatnonzero(mask).tolist():
            self._add(row, -1, rule, detail)

    def row(self, row: int, rule: str, detail: str) -> None:
        self._add(row, -1, rule, detail)

    def blocks(self, mask: BoolArray, rows: IntArray, ids: IntArray, rule: str, detail: str) -> None:
        if not mask.any():
            return
        unique, first = np.unique(rows[mask], return_index=True)
        for row, block_id in zip(unique, ids[mask][first], strict=True):
            self._add(int(row), int(block_id), rule, detail)

    def _add(self, row: int, block_id: int, rule: str, detail: str) -> None:
        self.bad[row] = True
        sequences: tuple[str, ...] = (self._step.sequence_ids[row],)
        domains: tuple[str, ...] = (self._step.domains[row],)
        if 0 <= block_id < len(self._ledger.state):
            owners, owner_domains = self._ledger.owner(block_id)
            domains = tuple(dict.fromkeys((*domains, *owner_domains)))
            if rule in ("foreign_write", "double_writer"):  # the owner's content is at stake too
                sequences = tuple(dict.fromkeys((*sequences, *owners)))
        self.found.append(Violation(rule, sequences, domains, block_id, f"row {row}: {detail}"))
