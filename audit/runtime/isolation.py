"""The isolation auditor: a second opinion, at every step, on who may read and write which KV block.

It shares nothing with the engine. From events it keeps its own ledger of the blocks (block_ledger.py); before
each launch it gets the very arrays that the kernels will get, and compares. What it decides, for all rows of a step:

    reads    every block that a row can reach, block_tables[row][: ceil(kv_len / block_size)], is allocated, is owned by
             the row's domain and is the one that the row's sequence was given or shared for that place
    history  each of those blocks holds exactly the tokens that were written before this step: no gap, no stale slot,
             nothing written twice. This is where a length that is off by one shows, even when all arrays agree on it
    tokens   what a row computes are the tokens of its own sequence: the prompt that it began with, and what was
             computed before; tokens beyond those become known here
    writes   the slots are exactly positions kv_len - q_len .. kv_len - 1 through the row's table; their blocks are
             owned and in `writing` state; no slot has two writers
    sampling what lies in the rows that sample is their own sequences': sampling_rows.py
    shapes   cu_seqlens starts at 0, never falls and ends at len(slot_mapping); one row per sequence

After the launch the tokens that it gave are told, and before they leave the outputs are: each must be what its own
sequence's row sampled, with counts that follow (released_tokens.py).

Violations from events are returned by the next check_step, before anything can run on them.

When a step has violations, the rows without one may still be launched as they stand, or the same step number may be
checked again with fewer rows: the newest check of a step is the one that counts.

A block is read by several sequences only after `publish` and `share` events, which block_ledger.py judges: one
domain, the same tokens up to the block's end by the auditor's own digests, sealed and full by what was written here.

Bytes are sampled (cache_bytes.py): every slot is noted when it is written; before each launch some of the slots
that it reads are compared, and all of a block when it is shared; a block that has been scrubbed, or was never used, is
read when it is given out and has to be zero.

A launch that was broken off has written slots that are no history, and nothing of it may be sent, sealed or counted.
After each launch the arrays that the kernels held are compared with what was approved (launch.py).

Not seen here: what a kernel does with correct arrays, and steps launched without asking.
"""

import threading
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from audit.runtime.approved import Approved, launch_problems
from audit.runtime.block_digests import BlockDigests, Digest
from audit.runtime.block_ledger import FREE, NOBODY, QUARANTINED, UNREAD, BlockLedger, Happening
from audit.runtime.cache_bytes import CacheBytes, CacheView
from audit.runtime.counters import fresh_counters
from audit.runtime.head_witness import HeadWitness
from audit.runtime.launch import KernelArrays, Launch
from audit.runtime.released_tokens import Output, output_problems
from audit.runtime.sampling_rows import SampledRow, SamplingFacts, ScoredRow
from audit.runtime.self_test import passes
from audit.runtime.sequence_ledger import AuditedSequence
from audit.runtime.step_arrays import StepArrays
from audit.runtime.step_check import NOTHING, Verdict, Violation, check, sampled_of

SLOTS_PER_STEP = 256  # of the cache whose bytes are compared before a launch, unless the settings say otherwise
BLOCKS_PER_STEP = 1  # whose digests are taken or compared


class IsolationAuditor:
    """One per worker and epoch. Threads take turns on a lock: a self test may come from another one than the steps.

    ``memory``: views of the cache (cache_bytes.py), none: bytes are not read. ``digest``: of whole blocks
    (block_digests.py). ``spell``: the bytes that a token stands for in text, None: text is not compared. ``head``:
    of logits (head_witness.py), None: they are not compared, and launches need not show them. ``seed`` decides which
    bytes are read.
    """

    def __init__(
        self,
        num_blocks: int,
        block_size: int,
        *,
        memory: Sequence[CacheView] = (),
        digest: Digest | None = None,
        spell: Callable[[int], bytes] | None = None,
        head: HeadWitness | None = None,
        slots_per_step: int = SLOTS_PER_STEP,
        blocks_per_step: int = BLOCKS_PER_STEP,
        seed: int = 0,
    ) -> None:
        if num_blocks < 2 or block_size < 1:
            raise ValueError(f"the auditor needs 2 blocks of 1 slot at least, not {num_blocks} of {block_size}")
        self._lock = threading.Lock()
        self._ledger = BlockLedger.empty(num_blocks, block_size)
        self._bytes = CacheBytes(memory, num_blocks, block_size, seed)
        self._digests = BlockDigests(digest, num_blocks, blocks_per_step, seed)
        self._spell = spell
        self._head = head
        self._slots_per_step = slots_per_step
        self._from_events: list[Violation] = []
        self._from_launch: list[Violation] = []
        self._approved: Approved | None = None  # of the step that was checked last
        self._written = (NOTHING, NOTHING, NOTHING)
        self._computed: list[tuple[str, int, list[int]]] = []
        self._sampled: list[str] = []  # the sequences that its sampled tokens belong to
        self._finished: list[AuditedSequence] = []  # sent their last output and have to be over by the next step
        self._free_difference = 0  # between the engine's count of free blocks and the ledger's, when last told
        self._counters = fresh_counters()

    def counters(self) -> dict[str, int]:
        digests = {"num_blocks_digested": self._digests.num_taken, "num_digests_compared": self._digests.num_compared}
        with self._lock:
            return self._counters | digests

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
        clean = event.kind == "allocate" and in_range and self._ledger.residue[event.block_id] == NOBODY
        problem = self._ledger.apply(event)
        if problem is None and clean and self._bytes.can_read:
            self._counters["num_zero_blocks_read"] += 1
            if not self._bytes.is_zero(event.block_id, event.generation):
                problem = "unscrubbed_bytes", "the block is said to be zero and is not"
        elif problem is None and event.kind == "seal":
            self._digests.seal(event.block_id, event.generation)
        elif problem is None and event.kind == "share" and self._changed_slots(event.block_id):
            problem = "changed_bytes", "the shared block does not hold what was written into it"
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
        scored: Sequence[ScoredRow] = (),
        positions: Any = None,
        num_blocks_free: int = -1,
    ) -> list[Violation]:
        """Check one step before its launch; call it once for every launch.

        Shapes: token_ids [T], cu_seqlens [R+1], kv_lens [R] (tokens after this step's writes), block_tables [R, B]
        (-1 padded), slot_mapping [T] (block * block_size + offset of each token written), all of integer type.
        ``sampled``: the rows that sample; None where that is not told. ``scored``: those whose prompts are scored.
        ``positions`` [T], ``num_blocks_free`` by the engine's own count: None and -1 where that is not told.
        The violations name the sequences that must not run. An empty list means that the step may be launched.
        """
        arrays = StepArrays(
            sequence_ids,
            domains,
            token_ids,
            cu_seqlens,
            kv_lens,
            block_tables,
            slot_mapping,
            sampled,
            scored,
            positions,
            num_blocks_free,
        )
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
            self._digests.new_step()
        found += self._endings_missing() + self._free_count(arrays.num_blocks_free)
        distrusted = frozenset(name for violation in found for name in violation.sequence_ids)
        verdict = check(self._ledger, arrays, distrusted)
        self._written = verdict.written
        self._computed = verdict.computed
        sampled = sampled_of(arrays)
        for name, start, tokens in verdict.computed:
            self._ledger.sequences[name].takes(start, tokens)
        found += verdict.violations
        if not verdict.violations:
            found += self._bytes_read(arrays, verdict)
        self._approved = Approved.of(arrays, sampled)
        self._sampled = list(self._approved.samples)
        self._counters["num_steps"] += 1
        self._counters["num_rows"] += len(arrays.sequence_ids)
        self._counters["num_rows_sampled"] += len(self._sampled)
        self._counters["num_slots_checked"] += int(np.size(arrays.slot_mapping))
        self._counters["num_blocks_checked"] += verdict.num_blocks
        self._counters["num_violations"] += len(found)
        self._counters["last_step"] = step
        return found

    def on_sampled(self, step: int, token_ids: Sequence[int], launch: Launch | None = None) -> None:
        """What the launch of the step that was checked last gave, below 0 where a row's numbers broke; and, where that
        is told, what it had been given. What does not fit becomes a violation of the step's check_outputs."""
        with self._lock:
            for name, start, tokens in self._computed:
                if name in self._ledger.sequences:
                    self._ledger.sequences[name].launched(start, len(tokens))
            if len(token_ids) != len(self._sampled):
                detail = f"step {step}: {len(token_ids)} tokens for {len(self._sampled)} rows that sample"
                self._from_launch.append(Violation("malformed_sampling", tuple(self._sampled), (), -1, detail))
                return
            for name, token_id in zip(self._sampled, token_ids, strict=True):
                if token_id >= 0 and name in self._ledger.sequences:
                    spelled = self._spell(int(token_id)) if self._spell is not None else b""
                    self._ledger.sequences[name].samples(int(token_id), spelled)
            if launch is not None:
                self._hear(step, launch, token_ids)
            self._note_written()

    def on_broken_off(self, step: int, arrays: KernelArrays | None = None) -> None:
        """The launch of the step that was checked last ended before it gave anything. What it wrote is no history, and
        no sequence has a token or a count of it; ``arrays``: what the kernels had been given all the same."""
        with self._lock:
            self._written = (NOTHING, NOTHING, NOTHING)
            self._computed, self._sampled = [], []
            if self._approved is not None:
                self._approved = replace(self._approved, samples=(), scored=())
            self._hear(step, Launch(arrays), ())

    def check_outputs(self, step: int, outputs: Sequence[Output]) -> list[Violation]:
        """Check a step's outputs before they leave. The violations name the sequences whose outputs must not."""
        with self._lock:
            sequences = self._ledger.ended | self._ledger.sequences
            self._ledger.ended.clear()
            found, self._from_launch = self._from_launch, []
            knows_text = self._spell is not None
            for name, rule, detail in output_problems(sequences, outputs, self._sampled, knows_text=knows_text):
                domains = (sequences[name].domain,) if name in sequences else ()
                found.append(Violation(rule, (name,), domains, -1, f"step {step}: {detail}"))
            self._sampled = []
            self._finished += [
                sequences[one.sequence_id] for one in outputs if one.finish_reason and one.sequence_id in sequences
            ]
            self._counters["num_outputs"] += len(outputs)
            self._counters["num_texts_checked"] += len(outputs) * knows_text
            self._counters["num_logprobs_checked"] += sum(len(o.logprobs) + len(o.prompt_logprobs) for o in outputs)
            self._counters["num_violations"] += len(found)
            return found

    def self_test(self) -> bool:
        """Whether the check still sees: on a copy of the ledger a clean row must pass and foreign rows must be flagged.

        The rows are built for this and never run. The real ledger and its violation counter stay as they are.
        """
        with self._lock:
            try:
                passed = passes(self._ledger, check)
            except Exception:  # an auditor that breaks is blind; whatever broke it
                passed = False
            self._counters["num_self_tests"] += 1
            self._counters["num_self_tests_failed"] += not passed
            self._counters["last_self_test_ok"] = int(passed)
            return passed

    def _settle(self) -> None:
        """The step before has run: its writes are history now, in blocks that have not changed hands since."""
        ids, generations, filled = self._written
        if not len(ids):
            return
        state = self._ledger.state[ids]
        same = (self._ledger.generation[ids] == generations) & (state != FREE) & (state != UNREAD)
        self._ledger.filled[ids[same]] = filled[same]
        self._written = (NOTHING, NOTHING, NOTHING)

    def _changed_slots(self, block_id: int) -> bool:
        """Whether what was noted of a block's slots is there no more."""
        size = self._ledger.block_size
        slots = np.arange(block_id * size, block_id * size + int(self._ledger.filled[block_id]))
        self._counters["num_slots_read"] += len(slots) * self._bytes.can_read
        if self._digests.changed(block_id, int(self._ledger.generation[block_id])):
            return True
        return bool(self._bytes.changed(slots, np.full(len(slots), self._ledger.generation[block_id])).any())

    def _bytes_read(self, arrays: StepArrays, verdict: Verdict) -> list[Violation]:
        """Some of the slots that the step reads: do they hold what was written?"""
        rows, ids, before = verdict.read
        ends = np.cumsum(before)
        chosen = self._bytes.choose(int(ends[-1]) if len(ends) else 0, self._slots_per_step)
        if not len(chosen):
            return []
        entry = np.searchsorted(ends, chosen, side="right")
        slots = ids[entry] * self._ledger.block_size + chosen - (ends - before)[entry]
        bad = np.unique(entry[self._bytes.changed(slots, self._ledger.generation[ids[entry]])])
        self._counters["num_slots_read"] += len(slots)
        found = []
        for row, block_id in zip(rows[bad].tolist(), ids[bad].tolist(), strict=True):
            owners, domains = self._ledger.owner(block_id)
            names = tuple(dict.fromkeys((arrays.sequence_ids[row], *owners)))
            detail = f"row {row}: a block that it reads does not hold what was written into it"
            found.append(Violation("changed_bytes", names, domains, block_id, detail))
        return found

    def _note_written(self) -> None:
        """The launch has written: remember what the slots hold now."""
        if self._approved is not None and self._bytes.can_read:
            slots = self._approved.arrays.slot_mapping.astype(np.int64)
            slots = slots[(slots >= 0) & (slots < len(self._ledger.state) * self._ledger.block_size)]
            self._bytes.note(slots, self._ledger.generation[slots // self._ledger.block_size])
            self._counters["num_slots_noted"] += len(slots)

    def _hear(self, step: int, launch: Launch, token_ids: Sequence[int]) -> None:
        """Compare what a launch had and gave with what was approved."""
        if self._approved is None:
            return
        self._counters["num_launches_compared"] += launch.arrays is not None
        self._counters["num_logits_witnessed"] += len(launch.head.logits) if self._head and launch.head else 0
        sequences = self._ledger.sequences
        found = launch_problems(self._approved, self._ledger, launch, token_ids, self._head)
        for sequence_id, (rule, detail) in found.items():
            domains = (sequences[sequence_id].domain,) if sequence_id in sequences else ()
            self._from_launch.append(Violation(rule, (sequence_id,), domains, -1, f"step {step}: {detail}"))

    def _endings_missing(self) -> list[Violation]:
        """Sequences whose last output has left and that are still alive."""
        sequences, late = self._ledger.sequences, self._finished
        self._finished = []
        return [
            Violation("end_missing", (one.sequence_id,), (one.domain,), -1, "it sent its last output and is not over")
            for one in late
            if sequences.get(one.sequence_id) is one
        ]

    def _free_count(self, num_told: int) -> list[Violation]:
        """Whether the engine's count of free blocks is the ledger's; told once for each difference. Blocks that this
        ledger alone has put into quarantine may be either."""
        if num_told < 0:
            return []
        state = self._ledger.state
        least = int(np.count_nonzero((state == FREE) | (state == UNREAD)))
        most = least + int(np.count_nonzero(state == QUARANTINED))
        difference = min(num_told - least, 0) + max(num_told - most, 0)
        known, self._free_difference = self._free_difference, difference
        if difference in (0, known):
            return []
        detail = f"the engine says that {num_told} blocks are free, by its own events {least} are"
        return [Violation("free_count", (), (), -1, detail)]
