"""The engine as one synchronous object: add, abort, step. No I/O, no clock, no threads, no global state.

One step, numbered here and marked below:

1. schedule    who computes how many tokens; blocks are allocated
2. arrays      the batch, built once
3. evidence    the observer sees the block events and the very arrays; sequences that break isolation end here,
               unexecuted, and what is left is built and shown again
4. launch      the model computes; blocks released from now on wait behind the fence
5. update      counters move, full blocks are sealed and published, new tokens are appended and turned into text
6. finish      stop, length or error; blocks and rows go back

A launch that raises costs its sequences their lives (`engine_failure`), not the engine: its blocks are released, the
next step starts clean. `num_failures_in_a_row` tells the worker when to give up.
"""

import traceback
from collections.abc import Callable
from collections.abc import Sequence as Line
from dataclasses import dataclass, field

from engine import order, sampler
from engine.batch import Batch, build_batch
from engine.block_pool import BlockPool
from engine.detokenizer import IncrementalDetokenizer
from engine.events import EngineEvent, Observer, Violation
from engine.model_runner import Runner
from engine.prefix_key import root_key
from engine.protocol import Incident, Stats, Submit, TokenOutput
from engine.scheduler import ScheduledRow, Scheduler
from engine.sequence import Event, Sequence


@dataclass(slots=True)
class StepResult:
    outputs: list[TokenOutput] = field(default_factory=list)
    incidents: list[Incident] = field(default_factory=list)
    failure: str = ""  # traceback of a failed launch, for the log


class EngineCore:
    """``decode`` turns token ids into text; ``vocab_size`` bounds the ids that a prompt may hold; ``model_digest`` is
    part of every name in the prefix cache."""

    def __init__(
        self,
        runner: Runner,
        *,
        decode: Callable[[Line[int]], str],
        eos_token_ids: frozenset[int],
        context_max: int,
        vocab_size: int,
        max_batched_tokens: int,
        max_num_seqs: int,
        max_waiting: int,
        observer: Observer,
        scheduling: str = "fair",
        prefix_cache: bool = True,
        model_digest: str = "",
    ) -> None:
        self.step_number = 0
        self.num_failures_in_a_row = 0
        self._runner = runner
        self._decode = decode
        self._eos_token_ids = eos_token_ids
        self._vocab_size = vocab_size
        self._max_waiting = max_waiting
        self._observer = observer
        self._prefix_cache = prefix_cache
        self._model_digest = model_digest
        self._events: list[EngineEvent] = []
        self.pool = BlockPool(runner.num_blocks, scrub=runner.scrub, on_event=self._events.append)
        self.scheduler = Scheduler(
            self.pool,
            block_size=runner.block_size,
            max_batched_tokens=max_batched_tokens,
            max_num_seqs=max_num_seqs,
            context_max=context_max,
            policy=order.POLICIES[scheduling],
            prefix_cache=prefix_cache,
        )
        self._sequences: dict[str, Sequence] = {}
        self._detokenizers: dict[str, IncrementalDetokenizer] = {}
        self._num_arrived = 0
        self._num_prompt_tokens = 0
        self._num_completion_tokens = 0

    @property
    def has_work(self) -> bool:
        return bool(self._sequences)

    def add(self, submit: Submit) -> TokenOutput | None:
        """Take a sequence in. Returns its ending where it is refused: invalid_input, busy or too_long; nothing was
        done then."""
        invalid = not submit.prompt_token_ids or any(
            not 0 <= token_id < self._vocab_size for token_id in submit.prompt_token_ids
        )
        if invalid or submit.sequence_id in self._sequences:
            return refusal(submit.sequence_id, "invalid_input")
        if len(self.scheduler.waiting) >= self._max_waiting:
            return refusal(submit.sequence_id, "busy")
        sequence = Sequence(
            sequence_id=submit.sequence_id,
            domain=submit.domain,
            cache_salt=submit.cache_salt,
            token_ids=list(submit.prompt_token_ids),
            sampling=submit.sampling,
            arrival=self._num_arrived,
            priority=submit.priority,
            weight=submit.weight,
            root_key=root_key(domain=submit.domain, cache_salt=submit.cache_salt, model_digest=self._model_digest),
        )
        if not self.scheduler.can_ever_fit(sequence):
            return refusal(submit.sequence_id, "too_long")
        self._num_arrived += 1
        self._sequences[sequence.sequence_id] = sequence
        self._detokenizers[sequence.sequence_id] = IncrementalDetokenizer(self._decode, submit.sampling.stop)
        self.scheduler.add(sequence)
        self._events.append(
            EngineEvent(
                "begin",
                self.step_number,
                -1,
                0,
                submit.domain,
                submit.sequence_id,
                tuple(submit.prompt_token_ids),
                submit.cache_salt,
            )
        )
        return None

    def abort(self, sequence_id: str) -> TokenOutput | None:
        """End a sequence now; None if it is not (or no longer) here."""
        sequence = self._sequences.get(sequence_id)
        if sequence is None:
            return None
        sequence.apply(Event.ABORT)
        return self._finish(sequence)

    def abort_all(self, error: str = "") -> list[TokenOutput]:
        """End everything: as aborts, or as failures with ``error``."""
        outputs = []
        for sequence in list(self._sequences.values()):
            if error:
                sequence.fail(error)
            else:
                sequence.apply(Event.ABORT)
            outputs.append(self._finish(sequence))
        return outputs

    def step(self) -> StepResult:
        """Advance every scheduled sequence by its share of the budget."""
        result = StepResult()
        self.step_number += 1
        self.pool.step = self.step_number
        plan = self.scheduler.schedule()  # 1
        result.outputs += [self._finish(sequence) for sequence in plan.too_long]
        for sequence in plan.admitted:
            self._runner.set_row(sequence.row, sequence.sampling)
        rows = plan.rows
        try:
            batch = self._audited_batch(rows, result)  # 2, 3
            rows = [row for row in rows if not row.sequence.finished]
            tokens = None
            if batch is not None:
                self.pool.launched(self.step_number)
                tokens = self._runner.execute(batch).tolist()  # 4
        except Exception:  # whatever it was, these sequences cannot be trusted any more
            result.failure = traceback.format_exc()
            self.num_failures_in_a_row += 1
            result.outputs += self._fail_rows(rows)
        else:
            if batch is not None and tokens is not None:
                self.num_failures_in_a_row = 0
                result.outputs += self._update(rows, batch, tokens)  # 5, 6
        finally:
            self.pool.completed(self.step_number)
        self._show_events()
        return result

    def stats(self) -> Stats:
        return Stats(
            step=self.step_number,
            num_running=len(self.scheduler.running),
            num_waiting=len(self.scheduler.waiting) + len(self.scheduler.preempted),
            num_blocks=self.pool.num_blocks,
            num_blocks_free=self.pool.num_free,
            blocks_by_domain=dict(self.pool.num_by_domain),
            num_prompt_tokens=self._num_prompt_tokens,
            num_completion_tokens=self._num_completion_tokens,
            num_preemptions=self.scheduler.num_preemptions,
            audit=self._observer.counters(),
        )

    def _audited_batch(self, rows: Line[ScheduledRow], result: StepResult) -> Batch | None:
        """Arrays that the observer has nothing to say against, or None where no row is left."""
        self._show_events()
        while rows:
            batch = build_batch(self.step_number, rows, self._runner.block_size)
            violations = self._observer.before_launch(batch.evidence)
            if not violations:
                return batch
            self._punish(violations, rows, result)
            rows = [row for row in rows if not row.sequence.finished]
        return None

    def _punish(self, violations: Line[Violation], rows: Line[ScheduledRow], result: StepResult) -> None:
        """Fail closed: end the named sequences, whoever else holds their blocks, and everyone if nobody here was
        named."""
        named: set[str] = set()
        for kind, sequence_ids, domains, block_id, detail in violations:
            named.update(sequence_ids)
            result.incidents.append(
                Incident(kind, self.step_number, list(sequence_ids), list(domains), int(block_id), detail)
            )
        in_batch = {row.sequence.sequence_id for row in rows}
        if not named & in_batch:
            named |= in_batch
        affected = self._readers_of_the_same_blocks(named)
        self.pool.forget_domains(sorted({sequence.domain for sequence in affected}))
        for sequence in affected:
            self.pool.quarantine(sequence.block_ids, sequence_id=sequence.sequence_id)
            sequence.block_ids = []
            sequence.fail("isolation_violation")
            result.outputs.append(self._finish(sequence))

    def _readers_of_the_same_blocks(self, named: set[str]) -> list[Sequence]:
        """The named sequences, whoever shares a block with one of them, whoever shares one with those, and so on."""
        affected = [sequence for name, sequence in self._sequences.items() if name in named]
        others = [sequence for name, sequence in self._sequences.items() if name not in named]
        bad_blocks = {block_id for sequence in affected for block_id in sequence.block_ids}
        while touched := [sequence for sequence in others if bad_blocks.intersection(sequence.block_ids)]:
            affected += touched
            others = [sequence for sequence in others if sequence not in touched]
            bad_blocks.update(block_id for sequence in touched for block_id in sequence.block_ids)
        return affected

    def _fail_rows(self, rows: Line[ScheduledRow]) -> list[TokenOutput]:
        outputs = []
        for row in rows:
            if not row.sequence.finished:
                row.sequence.fail("engine_failure")
                outputs.append(self._finish(row.sequence))
        return outputs

    def _update(self, rows: Line[ScheduledRow], batch: Batch, tokens: Line[int]) -> list[TokenOutput]:
        for row in rows:
            self._advance(row.sequence, row.num_new_tokens)
        return [
            self._take_token(rows[index].sequence, token_id)
            for index, token_id in zip(batch.sampled_index, tokens, strict=True)
        ]

    def _advance(self, sequence: Sequence, num_new_tokens: int) -> None:
        block_size = self._runner.block_size
        num_full_before = sequence.num_computed_tokens // block_size
        if not sequence.num_computed_max:
            sequence.num_cached_tokens = sequence.num_computed_tokens
        sequence.num_computed_tokens += num_new_tokens
        for index in range(num_full_before, sequence.num_computed_tokens // block_size):
            block_id, sequence_id = sequence.block_ids[index], sequence.sequence_id
            self.pool.seal(block_id, sequence_id=sequence_id)
            if self._prefix_cache:
                self.pool.publish(block_id, sequence.prefix(index, block_size), sequence_id=sequence_id)
        served_before = sequence.num_prompt_tokens_served
        sequence.num_computed_max = max(sequence.num_computed_max, sequence.num_computed_tokens)
        self._num_prompt_tokens += sequence.num_prompt_tokens_served - served_before

    def _take_token(self, sequence: Sequence, token_id: int) -> TokenOutput:
        if token_id == sampler.NOT_FINITE:
            sequence.fail("engine_failure")
            return self._finish(sequence)
        sequence.token_ids.append(token_id)
        self._num_completion_tokens += 1
        sampling = sequence.sampling
        text = ""
        if token_id in self._eos_token_ids and not sampling.ignore_eos:
            sequence.apply(Event.STOP)
        else:
            detokenizer = self._detokenizers[sequence.sequence_id]
            text = detokenizer.push(token_id)
            if detokenizer.stopped:
                sequence.apply(Event.STOP)
            elif sequence.num_completion_tokens >= sampling.max_tokens:
                sequence.apply(Event.LENGTH)
        if sequence.finished:
            return self._finish(sequence, text, (token_id,))
        return self._output(sequence, text, (token_id,))

    def _finish(self, sequence: Sequence, text: str = "", token_ids: tuple[int, ...] = ()) -> TokenOutput:
        """The last output of a sequence in a terminal state. Withheld text goes out, unless isolation is in doubt."""
        if sequence.error:
            self.pool.forget(sequence.block_ids)  # numbers of a failed sequence serve nobody else
        self.scheduler.remove(sequence)
        self._events.append(EngineEvent("end", self.step_number, -1, 0, sequence.domain, sequence.sequence_id))
        del self._sequences[sequence.sequence_id]
        rest = self._detokenizers.pop(sequence.sequence_id).finish()
        if sequence.error != "isolation_violation":
            text += rest
        return self._output(sequence, text, token_ids)

    def _output(self, sequence: Sequence, text: str, token_ids: tuple[int, ...]) -> TokenOutput:
        return TokenOutput(
            sequence_id=sequence.sequence_id,
            text=text,
            token_ids=token_ids,
            num_prompt_tokens=sequence.num_prompt_tokens_served,
            num_cached_tokens=sequence.num_cached_tokens,
            num_completion_tokens=sequence.num_completion_tokens,
            finish_reason=sequence.finish_reason,
            error=sequence.error,
        )

    def _show_events(self) -> None:
        if self._events:
            events = self._events.copy()
            self._events.clear()
            self._observer.on_events(events)


def refusal(sequence_id: str, error: str) -> TokenOutput:
    """The only output of a sequence that was never taken in: nothing computed, nothing to charge."""
    return TokenOutput(sequence_id, "", (), 0, 0, 0, "error", error)
