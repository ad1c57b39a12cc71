"""The isolation auditor: a second opinion, at every step, on who may read and write which KV block.

It shares nothing with the engine. From events it keeps its own ledger of the blocks (audit/block_ledger.py); before
each launch it gets the very arrays that the kernels will get, and compares. What it decides, for all rows of a step:

    reads    every block that a row can reach, block_tables[row][: ceil(kv_len / block_size)], is allocated, is owned by
             the row's domain and is the one that the row's sequence was given or shared for that place
    history  each of those blocks holds exactly the tokens that were written before this step: no gap, no stale slot,
             nothing written twice. This is where a length that is off by one shows, even when all arrays agree on it
    tokens   what a row computes are the tokens of its own sequence: the prompt that it began with, and what was
             computed before; tokens beyond those become known here
    writes   the slots are exactly positions kv_len - q_len .. kv_len - 1 through the row's table; their blocks are
             owned and in `writing` state; no slot has two writers
    sampling what lies in the rows that sample is their own sequences': audit/sampling_rows.py
    shapes   cu_seqlens starts at 0, never falls and ends at len(slot_mapping); one row per sequence

After the launch the tokens that it gave are told, and before they leave the outputs are: each must be what its own
sequence's row sampled, with counts that follow (audit/released_tokens.py).

Violations from events are returned by the next check_step, before anything can run on them.

When a step has violations, the rows without one may still be launched as they stand, or the same step number may be
checked again with fewer rows: the newest check of a step is the one that counts.

A block is read by several sequences only after `publish` and `share` events, which audit/block_ledger.py judges: one
domain, the same tokens up to the block's end by the auditor's own digests, sealed and full by what was written here.

Not seen here: the bytes in the cache, what a kernel does with correct arrays, and steps launched without asking.
"""

import threading
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from audit.block_ledger import (
    FREE,
    NOBODY,
    QUARANTINED,
    SEALED,
    STRANGER,
    UNREAD,
    WRITING,
    BlockLedger,
    Happening,
    IntArray,
)
from audit.released_tokens import Output, output_problems
from audit.sampling_rows import SampledRow, SamplingFacts, sampling_problems
from audit.self_test import passes
from audit.step_arrays import StepArrays, shape_problem

BoolArray = npt.NDArray[np.bool_]


class Violation(NamedTuple):
    """A broken rule. `domains` names the row's domain first, then the owner's where there is one; block_id -1: none."""

    kind: str
    sequence_ids: tuple[str, ...]
    domains: tuple[str, ...]
    block_id: int
    detail: str


@dataclass(frozen=True, slots=True)
class _Verdict:
    violations: list[Violation]
    num_blocks: int
    written: tuple[IntArray, IntArray, IntArray]  # block ids, their generations, their `filled` after the step
    computed: list[tuple[str, int, list[int]]]  # sequence, first position and tokens of each row that may run


_NONE = np.zeros(0, np.int64)


class IsolationAuditor:
    """One per worker and epoch. Threads take turns on a lock: a self test may come from another one than the steps."""

    def __init__(self, num_blocks: int, block_size: int) -> None:
        if num_blocks < 2 or block_size < 1:
            raise ValueError(f"the auditor needs 2 blocks of 1 slot at least, not {num_blocks} of {block_size}")
        self._lock = threading.Lock()
        self._ledger = BlockLedger.empty(num_blocks, block_size)
        self._from_events: list[Violation] = []
        self._written = (_NONE, _NONE, _NONE)
        self._computed: list[tuple[str, int, list[int]]] = []  # of the step that was checked last
        self._sampled: list[str] = []  # the sequences that its sampled tokens belong to
        self._counters = {
            "num_steps": 0,
            "num_rows": 0,
            "num_rows_sampled": 0,
            "num_outputs": 0,
            "num_slots_checked": 0,
            "num_blocks_checked": 0,
            "num_events": 0,
            "num_violations": 0,
            "num_self_tests": 0,
            "num_self_tests_failed": 0,
            "last_self_test_ok": 0,
            "last_step": -1,
        }

    def counters(self) -> dict[str, int]:
        with self._lock:
            return dict(self._counters)

    def on_event(
        self,
        kind: str,
        step: int,
        block_id: int,
        generation: int,
        domain: str,
        sequence_id: str,
        token_ids: Sequence[int] = (),
        cache_salt: bytes = b"",
        sampling: SamplingFacts | None = None,
    ) -> None:
        """Take note of an event; an illegal one becomes a violation of the next check_step."""
        event = Happening(kind, block_id, generation, domain, sequence_id, tuple(token_ids), cache_salt, sampling)
        with self._lock:
            self._take_note(step, event)

    def _take_note(self, step: int, event: Happening) -> None:
        self._counters["num_events"] += 1
        if event.kind == "seal":  # the step has run: nothing is sealed before it is written
            self._settle()
        in_range = 0 <= event.block_id < len(self._ledger.state)
        owners, owner_domains = self._ledger.owner(event.block_id) if in_range and event.kind != "scrub" else ((), ())
        problem = self._ledger.apply(event)
        if problem is not None:
            rule, detail = problem
            sequences = tuple(dict.fromkeys((*filter(None, [event.sequence_id]), *owners)))
            domains = tuple(dict.fromkeys((*filter(None, [event.domain]), *owner_domains)))
            self._from_events.append(Violation(rule, sequences, domains, event.block_id, f"step {step}: {detail}"))

    def check_step(
        self,
        *,
        step: int,
        sequence_ids: Sequence[str],
        domains: Sequence[str],
        token_ids: Any,
        cu_seqlens: Any,
        kv_lens: Any,
        block_tables: Any,
        slot_mapping: Any,
        sampled: Sequence[SampledRow] | None = None,
    ) -> list[Violation]:
        """Check one step before its launch; call it once for every launch.

        Shapes: token_ids [T], cu_seqlens [R+1], kv_lens [R] (tokens after this step's writes), block_tables [R, B]
        (-1 padded), slot_mapping [T] (block * block_size + offset of each token written), all of integer type.
        ``sampled``: the rows that sample; None where that is not told.
        The violations name the sequences that must not run. An empty list means that the step may be launched.
        """
        arrays = StepArrays(sequence_ids, domains, token_ids, cu_seqlens, kv_lens, block_tables, slot_mapping, sampled)
        with self._lock:
            return self._check_step(step, arrays)

    def _check_step(self, step: int, arrays: StepArrays) -> list[Violation]:
        found = self._from_events
        self._from_events = []
        if step < self._counters["last_step"]:
            detail = f"step {step} after step {self._counters['last_step']}"
            everyone = tuple(arrays.sequence_ids), tuple(dict.fromkeys(arrays.domains))
            found.append(Violation("step_order", *everyone, -1, detail))
        elif step > self._counters["last_step"]:
            self._settle()
        distrusted = frozenset(name for violation in found for name in violation.sequence_ids)
        verdict = _check(self._ledger, arrays, distrusted)
        self._written = verdict.written
        self._computed = verdict.computed
        self._sampled = [arrays.sequence_ids[one.row] for one in sampled_of(arrays)]
        for name, start, tokens in verdict.computed:
            self._ledger.sequences[name].takes(start, tokens)
        found += verdict.violations
        self._counters["num_steps"] += 1
        self._counters["num_rows"] += len(arrays.sequence_ids)
        self._counters["num_rows_sampled"] += len(self._sampled)
        self._counters["num_slots_checked"] += int(np.size(arrays.slot_mapping))
        self._counters["num_blocks_checked"] += verdict.num_blocks
        self._counters["num_violations"] += len(found)
        self._counters["last_step"] = step
        return found

    def on_sampled(self, step: int, token_ids: Sequence[int]) -> None:
        """What the launch of the step that was checked last gave, below 0 where a row's numbers broke."""
        with self._lock:
            for name, start, tokens in self._computed:
                if name in self._ledger.sequences:
                    self._ledger.sequences[name].launched(start, len(tokens))
            if len(token_ids) != len(self._sampled):
                detail = f"step {step}: {len(token_ids)} tokens for {len(self._sampled)} rows that sample"
                self._from_events.append(Violation("malformed_sampling", tuple(self._sampled), (), -1, detail))
                return
            for name, token_id in zip(self._sampled, token_ids, strict=True):
                if token_id >= 0 and name in self._ledger.sequences:
                    self._ledger.sequences[name].samples(int(token_id))

    def check_outputs(self, step: int, outputs: Sequence[Output]) -> list[Violation]:
        """Check a step's outputs before they leave. The violations name the sequences whose outputs must not."""
        with self._lock:
            sequences = self._ledger.sequences
            found = []
            for name, rule, detail in output_problems(sequences, outputs, self._sampled):
                domains = (sequences[name].domain,) if name in sequences else ()
                found.append(Violation(rule, (name,), domains, -1, f"step {step}: {detail}"))
            self._sampled = []
            self._counters["num_outputs"] += len(outputs)
            self._counters["num_violations"] += len(found)
            return found

    def self_test(self) -> bool:
        """Whether the check still sees: on a copy of the ledger a clean row must pass and foreign rows must be flagged.

        The rows are built for this and never run. The real ledger and its violation counter stay as they are.
        """
        with self._lock:
            try:
                passed = passes(self._ledger, _check)
            except Exception:  # an auditor that breaks is blind; whatever broke it
                passed = False
            self._counters["num_self_tests"] += 1
            self._counters["num_self_tests_failed"] += not passed
            self._counters["last_self_test_ok"] = int(passed)
            return passed

    def _settle(self) -> None:
        """The step before has run: its writes are history now, in blocks that have not changed hands since."""
        ids, generations, filled = self._written
        same = (self._ledger.generation[ids] == generations) & ~np.isin(self._ledger.state[ids], (FREE, UNREAD))
        self._ledger.filled[ids[same]] = filled[same]
        self._written = (_NONE, _NONE, _NONE)


def sampled_of(step: StepArrays) -> Sequence[SampledRow]:
    """The rows that sample, none where a row is named that is not there."""
    sampled = step.sampled or ()
    return sampled if all(0 <= one.row < len(step.sequence_ids) for one in sampled) else ()


def _check(ledger: BlockLedger, step: StepArrays, distrusted: frozenset[str] = frozenset()) -> _Verdict:
    """Compare the step with the ledger. Writes of `distrusted` sequences are not taken for granted afterwards."""
    num_rows = len(step.sequence_ids)
    problem = shape_problem(step)
    if problem is not None:
        everyone = Violation(
            "malformed_step", tuple(step.sequence_ids), tuple(dict.fromkeys(step.domains)), -1, problem
        )
        return _Verdict([everyone], 0, (_NONE, _NONE, _NONE), [])
    if num_rows == 0:
        return _Verdict([], 0, (_NONE, _NONE, _NONE), [])
    size, num_blocks = ledger.block_size, len(ledger.state)
    cu = np.asarray(step.cu_seqlens).astype(np.int64)
    kv = np.asarray(step.kv_lens).astype(np.int64)
    tables = np.asarray(step.block_tables).astype(np.int64)
    slots = np.asarray(step.slot_mapping).astype(np.int64)
    q = np.diff(cu)
    row_domain = np.array([ledger.domain_ids.get(name, STRANGER) for name in step.domains], np.int64)
    given = np.full(tables.shape, NOBODY, np.int64)  # what each row's sequence was given, by the ledger
    for index, name in enumerate(step.sequence_ids):
        if name in ledger.sequences:
            own = ledger.sequences[name].blocks[: tables.shape[1]]
            given[index, : len(own)] = own
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
    _, first, count = np.unique(slots, return_inverse=True, return_counts=True)
    flags.blocks(count[first] > 1, writer, slot_block, "double_writer", "a slot has two writers in this step")
    # Tokens: every row computes its own.
    tokens = [part.tolist() for part in np.split(np.asarray(step.token_ids), cu[1:-1])]
    rows = list(zip(step.sequence_ids, start.tolist(), tokens, strict=True))
    alien = np.array([not _own_tokens(ledger, *computed) for computed in rows], np.bool_)
    flags.rows(inside & alien, "foreign_tokens", "computes tokens that are not its sequence's")
    if step.sampled is not None:
        for one, rule, detail in sampling_problems(ledger.sequences, step, cu.tolist(), kv.tolist()):
            flags.row(one, rule, detail)
    twice = len(set(step.sequence_ids)) != num_rows
    flags.rows(np.full(num_rows, twice), "duplicate_row", "a sequence has two rows in this step")

    trusted = np.array([name not in distrusted for name in step.sequence_ids], np.bool_)
    good = (trusted & ~flags.bad)[row]
    after = np.clip(kv[row] - column * size, 0, size)
    return _Verdict(
        flags.found,
        len(ids),
        (ids[good], ledger.generation[at][good], after[good]),
        [computed for computed, fine in zip(rows, trusted & ~flags.bad, strict=True) if fine],
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
        for row in np.nonzero(mask)[0]:
            self._add(int(row), -1, rule, detail)

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
