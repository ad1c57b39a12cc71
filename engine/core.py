"""The engine as one synchronous object: add, abort, step. No I/O, no clock of its own, no threads, no global state.

One step, numbered here and marked below:

1. schedule    who computes how many tokens; blocks are allocated
2. arrays      the batch, built once
3. evidence    the observer sees the block events and the very arrays; sequences that break isolation end here,
               unexecuted, and what is left is built and shown again
4. launch      the model computes; blocks released from now on wait behind the fence
5. update      counters move, full blocks are sealed and published, new tokens are appended and turned into text
6. finish      stop, length or error; blocks and rows go back
7. release     the observer sees every output, an abort's between two steps too; what is not its sequence's own does
               not leave

A kernel that refuses a block did so because steps 1 to 3 failed: whoever asked is punished as if the observer had named
it (`kernel_ownership`), and what is left is built, shown and launched again. Any other launch that raises costs its
sequences their lives (`engine_failure`), not the engine: its blocks are released, the next step starts clean.
`num_failures_in_a_row` tells the worker when to give up. A launch that is broken off counts as if it had not been.
"""

import traceback
from collections.abc import Callable
from collections.abc import Sequence as Line

from msgspec.structs import replace

from engine.batch import Batch, build_batch, refused
from engine.cache.block_pool import BlockPool
from engine.cache.cache_shares import CacheShares
from engine.contamination import contaminated
from engine.endings import is_valid, refusal, with_endings, withheld
from engine.errors import BrokenOffError, GrammarError
from engine.events import EngineEvent, Observer, Violation, begin_event
from engine.model_runner import Runner
from engine.protocol import Incident, Stats, Submit, TokenLogprob, TokenOutput
from engine.sampling.matcher import Matcher
from engine.sampling.row import Row
from engine.sampling.sampler import NOT_FINITE, Picks
from engine.scheduling import order
from engine.scheduling.break_off import BreakOffs, Newcomers
from engine.scheduling.schedule import ScheduledRow
from engine.scheduling.scheduler import Scheduler
from engine.sequence import Event, Sequence
from engine.step_result import StepResult
from engine.text.answer import Answer, Piece, output_of
from engine.timekeeper import Timekeeper
from kernels.backend import OwnershipError


class EngineCore:
    """``decode`` turns token ids into text; ``vocab_size`` bounds the ids that a prompt may hold; ``model_digest`` is
    part of every name in the prefix cache; ``matchers`` makes what keeps an answer in a form (None: no form is
    served), and raises GrammarError. ``clock_ns`` is for the accounts (engine/timekeeper.py): no decision sees it."""

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
        wait_max_tokens: int = order.WAIT_MAX_TOKENS,
        max_prompt_tokens: int = 0,
        break_off_percent: int = 0,
        prefix_cache: bool = True,
        cache_floor_percent: int = 0,
        cache_ceiling_percent: int = 100,
        model_digest: str = "",
        matchers: Callable[[str], Matcher] | None = None,
        clock_ns: Callable[[], int] = lambda: 0,
    ) -> None:
        self.step_number = 0
        self.num_failures_in_a_row = 0
        self._runner = runner
        self._decode, self._output = decode, output_of
        self._eos_token_ids = eos_token_ids
        self._vocab_size = vocab_size
        self._max_waiting = max_waiting
        self.observer = self._observer = observer
        self._prefix_cache = prefix_cache
        self._model_digest = model_digest
        self._events: list[EngineEvent] = []
        self._between = StepResult()
        self.timekeeper = Timekeeper(clock_ns)
        shares = CacheShares(cache_floor_percent, cache_ceiling_percent, -(-context_max // runner.block_size))
        self.pool = BlockPool(runner.num_blocks, scrub=runner.scrub, on_event=self._events.append, shares=shares)
        self.scheduler = Scheduler(
            self.pool,
            block_size=runner.block_size,
            max_batched_tokens=max_batched_tokens,
            max_num_seqs=max_num_seqs,
            context_max=context_max,
            policy=order.POLICIES[scheduling],
            prefix_cache=prefix_cache,
            wait_max_tokens=wait_max_tokens,
            max_prompt_tokens=max_prompt_tokens,
        )
        self.break_offs = BreakOffs(break_off_percent, max_batched_tokens, self._owed_now, self.scheduler.charge_domain)
        self._sequences: dict[str, Sequence] = {}
        self._answers: dict[str, Answer] = {}
        self.matchers = matchers
        self._forms: dict[str, Matcher] = {}  # of those that must have one
        self._rows: dict[str, Row] = {}  # of those that run
        self._num_arrived = 0
        self._num_prompt_tokens = self._num_completion_tokens = 0
        self._num_batch_tokens = self._num_batch_rows = 0
        self._max_num_seqs = max_num_seqs

    @property
    def has_work(self) -> bool:
        return bool(self._sequences)

    def refuse(self, submit: Submit) -> TokenOutput | None:
        """Its ending where it cannot be taken in now: invalid_input, busy or too_long. Nothing is done."""
        valid = is_valid(submit, self._vocab_size, forms=self.matchers is not None)
        if not valid or submit.sequence_id in self._sequences:
            return refusal(submit, "invalid_input")
        if self.scheduler.num_waiting_from(submit.priority) >= self._max_waiting:
            return refusal(submit, "busy")
        if not self.scheduler.can_ever_fit(submit):
            return refusal(submit, "too_long")
        return None

    def add(self, submit: Submit, form: Matcher | None = None) -> TokenOutput | None:
        """Take a sequence in, with the matcher of its form where that was made already; else it is made here, and all
        steps wait. Returns its ending where it is refused."""
        refused = self.refuse(submit)
        if refused is not None:
            return refused
        if submit.sampling.grammar and self.matchers is not None:
            try:
                self._forms[submit.sequence_id] = form or self.matchers(submit.sampling.grammar)
            except GrammarError:
                return refusal(submit, "invalid_input")
        sequence = Sequence.of(submit, arrival=self._num_arrived, model_digest=self._model_digest)
        self._num_arrived += 1
        self._sequences[sequence.sequence_id] = sequence
        self._answers[sequence.sequence_id] = Answer(self._decode, submit.sampling)
        self.timekeeper.enter(sequence)
        self.scheduler.add(sequence)
        self._events.append(begin_event(self.step_number, submit))
        return None

    def _owed_now(self, submit: Submit) -> Sequence | None:
        sequence = Sequence.of(submit, arrival=self._num_arrived, model_digest=self._model_digest)
        owed = self.refuse(submit) is None and self.scheduler.is_owed_now(sequence)
        return sequence if owed else None

    def abort(self, sequence_id: str) -> TokenOutput | None:
        """End a sequence now; None if it is not (or no longer) here."""
        sequence = self._sequences.get(sequence_id)
        if sequence is None:
            return None
        sequence.apply(Event.ABORT)
        outputs = self._released([self._finish(sequence)])
        self._between.outputs += outputs[:-1]
        return outputs[-1]

    def abort_all(self, error: str = "") -> list[TokenOutput]:
        """End everything: as aborts, or as failures with ``error``, which say nothing: the observer may have broken."""
        outputs = []
        for sequence in list(self._sequences.values()):
            if error:
                sequence.fail(error)
            else:
                sequence.apply(Event.ABORT)
            outputs.append(self._finish(sequence))
        return [replace(one, text="", logprobs=()) for one in outputs] if error else self._released(outputs)

    def take_between(self) -> StepResult:
        """What endings between two steps have brought about besides themselves: the next step tells it, if not this."""
        between, self._between = self._between, StepResult()
        return between

    def erase_domain(self, domain: str) -> tuple[list[TokenOutput], int]:
        """Whose domain it is has left: its sequences end, its blocks are zeroed. Their endings; how many blocks."""
        outputs = [self.abort(name) for name, one in list(self._sequences.items()) if one.domain == domain]
        num_blocks = self.pool.erase(domain)
        self._show_events()
        return [output for output in outputs if output is not None], num_blocks

    def step(self, newcomers: Newcomers | None = None) -> StepResult:
        """Advance every scheduled sequence by its share of the budget. ``newcomers`` tells who has come since it was
        last asked, and is not added yet: for one of them the step may be broken off, and nothing has happened then."""
        result = self.take_between()
        self.timekeeper.begin_step()
        self.step_number += 1
        self.pool.step = self.step_number
        plan = self.scheduler.schedule()  # 1
        result.outputs += [self._finish(sequence) for sequence in plan.too_long]
        for sequence in plan.admitted:
            self._runner.set_row(sequence.row, self._row_of(sequence))
        rows = plan.rows
        go_on = self.break_offs.watch(plan, newcomers)
        try:
            picks = None
            while (batch := self._audited_batch(rows, result)) is not None:  # 2, 3
                rows = [row for row in rows if not row.sequence.finished]
                self.pool.launched(self.step_number)
                try:
                    picks = self._runner.execute(batch, go_on)  # 4
                    self._observer.after_launch(self.step_number, picks)
                    break
                except BrokenOffError as broken:
                    self._observer.broken_off(self.step_number, broken)
                    self.break_offs.broken(plan, broken.share)
                    self.timekeeper.break_off(self.break_offs.cause)
                    break
                except OwnershipError as refusal:
                    self._punish([refused(refusal, batch)], rows, result)
                    rows = [row for row in rows if not row.sequence.finished]
        except Exception:  # whatever it was, these sequences cannot be trusted any more
            result.failure = traceback.format_exc()
            self.num_failures_in_a_row += 1
            result.outputs += self._fail_rows(rows)
        else:
            if batch is not None and picks is not None:
                self.num_failures_in_a_row = 0
                self._num_batch_tokens += len(batch.token_ids)
                self._num_batch_rows += len(rows)
                self.break_offs.ended(plan)
                result.outputs += self._update(rows, batch, picks)  # 5, 6
        finally:
            self.pool.completed(self.step_number)
        self._withhold(result)  # 7
        self._show_events()
        self.timekeeper.end_step(plan.rows)
        return result

    def stats(self) -> Stats:
        num_slots = sum(self.pool.num_by_domain.values()) * self._runner.block_size
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
            num_batch_tokens=self._num_batch_tokens,
            num_batch_rows=self._num_batch_rows,
            num_rows_max=self._max_num_seqs,
            num_slots_held=num_slots,
            num_slots_filled=num_slots - self.scheduler.num_slots_empty(),
            num_blocks_scrubbed=self.pool.num_scrubbed,
            num_preemptions_kept=self.scheduler.num_preemptions_kept,
            num_rescued=self.scheduler.rescue.num_rescued,
            num_steps_broken_off=self.break_offs.num_broken_off,
            num_tokens_lost=self.break_offs.num_tokens_lost,
            step_ns=self.timekeeper.step_ns,
            own_ns=self.timekeeper.own_ns,
        )

    def _audited_batch(self, rows: Line[ScheduledRow], result: StepResult) -> Batch | None:
        """Arrays that the observer has nothing to say against, or None where no row is left."""
        self._show_events()
        while rows:
            runner, num_free = self._runner, self.pool.num_free
            batch = build_batch(self.step_number, rows, runner.block_size, runner.state_of, num_free)
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
            incident = Incident(kind, self.step_number, list(sequence_ids), list(domains), int(block_id), detail)
            result.incidents.append(incident)
        in_batch = {row.sequence.sequence_id for row in rows}
        if not named & in_batch:
            named |= in_batch
        self._quarantine(named, result)

    def _withhold(self, result: StepResult) -> None:
        """Fail closed once more: an output of a named sequence becomes its ending, and no byte of it leaves."""
        outputs = result.outputs
        violations = self._observer.before_release(self.step_number, outputs)
        if not violations:
            return
        result.outputs = []
        self._punish(violations, [], result)
        self.pool.forget_domains(sorted({domain for violation in violations for domain in violation[2]}))
        result.outputs = with_endings(outputs, {name for found in violations for name in found[1]}, result.outputs)

    def _released(self, outputs: list[TokenOutput]) -> list[TokenOutput]:
        """Endings between two steps, as they may leave."""
        self._show_events()  # one may have begun since the last step
        result = StepResult(outputs)
        self._withhold(result)
        self._between.incidents += result.incidents
        return result.outputs

    def _quarantine(self, named: set[str], result: StepResult) -> None:
        affected = contaminated(self._sequences.values(), named)
        self.pool.forget_domains(sorted({sequence.domain for sequence in affected}))
        for sequence in affected:
            self.pool.quarantine(sequence.block_ids, sequence_id=sequence.sequence_id)
            sequence.block_ids = []
            sequence.fail("isolation_violation")
            result.outputs.append(withheld(self._finish(sequence)))

    def _fail_rows(self, rows: Line[ScheduledRow]) -> list[TokenOutput]:
        outputs = []
        for row in rows:
            if not row.sequence.finished:
                row.sequence.fail("engine_failure")
                outputs.append(self._finish(row.sequence))
        return outputs

    def _row_of(self, sequence: Sequence) -> Row:
        name, tokens, num_prompt = sequence.sequence_id, sequence.token_ids, sequence.num_prompt_tokens
        form = self._forms.get(name)
        self._rows[name] = row = Row(sequence.sampling, tokens, num_prompt, self._eos_token_ids, form, name)
        return row

    def _update(self, rows: Line[ScheduledRow], batch: Batch, picks: Picks) -> list[TokenOutput]:
        for row in rows:
            self._advance(row.sequence, row.num_new_tokens)
        sampled = {index: place for place, index in enumerate(batch.sampled_index)}
        outputs = []
        for index, row in enumerate(rows):
            scores = picks.scores.get(index, ())
            if scores is None:
                row.sequence.fail("engine_failure")
                outputs.append(self._finish(row.sequence))
                continue
            row.sequence.num_scored_tokens += len(scores)
            if index in sampled:
                place = sampled[index]
                output = self._take_token(row.sequence, int(picks.token_ids[place]), picks.logprobs.get(place))
                outputs.append(replace(output, prompt_logprobs=scores) if scores else output)
            elif scores:
                outputs.append(replace(self._output(row.sequence, Piece(), ()), prompt_logprobs=scores))
        return outputs

    def _advance(self, sequence: Sequence, num_new_tokens: int) -> None:
        block_size = self._runner.block_size
        num_full_before = sequence.num_computed_tokens // block_size
        self._num_prompt_tokens += sequence.advance(num_new_tokens)
        for index in range(num_full_before, sequence.num_computed_tokens // block_size):
            block_id, sequence_id = sequence.block_ids[index], sequence.sequence_id
            self.pool.seal(block_id, sequence_id=sequence_id)
            if self._prefix_cache:
                self.pool.publish(block_id, sequence.prefix(index, block_size), sequence_id=sequence_id)

    def _take_token(self, sequence: Sequence, token_id: int, logprob: TokenLogprob | None) -> TokenOutput:
        if token_id == NOT_FINITE:
            sequence.fail("engine_failure")
            return self._finish(sequence)
        sequence.token_ids.append(token_id)
        self._num_completion_tokens += 1
        sampling, piece = sequence.sampling, Piece()
        if token_id in sampling.stop_token_ids or (token_id in self._eos_token_ids and not sampling.ignore_eos):
            sequence.apply(Event.STOP)
        else:
            answer = self._answers[sequence.sequence_id]
            piece = answer.push(token_id, logprob)
            if answer.stopped or self._rows[sequence.sequence_id].form_complete:
                sequence.apply(Event.STOP)
            elif sequence.num_completion_tokens >= sampling.max_tokens:
                sequence.apply(Event.LENGTH)
        if sequence.finished:
            return self._finish(sequence, piece, (token_id,))
        return self._output(sequence, piece, (token_id,))

    def _finish(self, sequence: Sequence, piece: Piece | None = None, token_ids: tuple[int, ...] = ()) -> TokenOutput:
        """The last output of a sequence in a terminal state. Withheld text goes out, unless isolation is in doubt."""
        if sequence.error:
            self.pool.forget(sequence.block_ids)  # numbers of a failed sequence serve nobody else
        self.scheduler.remove(sequence)
        self._events.append(EngineEvent("end", self.step_number, -1, 0, sequence.domain, sequence.sequence_id))
        del self._sequences[sequence.sequence_id]
        self._rows.pop(sequence.sequence_id, None)
        self._forms.pop(sequence.sequence_id, None)
        piece, rest = piece or Piece(), self._answers.pop(sequence.sequence_id).finish()
        if sequence.error != "isolation_violation":
            piece = Piece(piece.text + rest.text, piece.logprobs + rest.logprobs)
        return self._output(sequence, piece, token_ids)

    def _show_events(self) -> None:
        if self._events:
            events = self._events.copy()
            self._events.clear()
            self.timekeeper.hear(events)
            self._observer.on_events(events)
