"""Plants between the auditor's approval and what leaves: the kernels get other arrays than the auditor saw, something
writes where nothing may, what a launch gave takes a wrong turn."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import msgspec
import numpy as np

from engine.batch import Batch
from tests.faults.array_plants import FIRST_STEP, Plant, pair, wrap
from tests.faults.stage import BLOCK_SIZE, Run, decode


def after_approval(change: Callable[[Batch], Batch | None]) -> Plant:
    """Once, when the auditor has seen the arrays."""

    def plant(run: Run) -> None:
        def make(execute: Any) -> Any:
            def faulty(batch: Batch, *rest: Any) -> Any:
                wrong = change(batch) if run.core.step_number >= FIRST_STEP and run.reached_step < 0 else None
                if wrong is not None:
                    run.reach()
                return execute(batch if wrong is None else wrong, *rest)

            return faulty

        wrap(run.runner, "execute", make)

    return plant


def other_table(batch: Batch) -> Batch | None:
    """In the very memory that the auditor was shown."""
    rows = pair(batch, alien=True)
    if rows is None:
        return None
    batch.evidence.block_tables[rows[0], 0] = batch.evidence.block_tables[rows[1], 0]
    return batch


def other_slot(batch: Batch) -> Batch | None:
    """A token is written over another row's first one."""
    rows = pair(batch, alien=True)
    if rows is None:
        return None
    own = int(batch.evidence.cu_seqlens[rows[0]])
    batch.evidence.slot_mapping[own] = batch.evidence.block_tables[rows[1], 0] * BLOCK_SIZE
    return batch


def bent(name: str, by: int) -> Callable[[Batch], Batch | None]:
    def change(batch: Batch) -> Batch | None:
        array = getattr(batch, name) if hasattr(batch, name) else getattr(batch.evidence, name)
        if not len(array) or (name == "token_ids" and array[0] + by >= 64):
            return None
        array[0] += by
        return batch

    return change


def crossed(name: str) -> Callable[[Batch], Batch | None]:
    """The first two change places; in an array of its own, the auditor's stays as it was."""

    def change(batch: Batch) -> Batch | None:
        array = np.array(getattr(batch, name))
        if len(array) < 2:
            return None
        array[[0, 1]] = array[[1, 0]]
        return replace(batch, **{name: array})

    return change


def logits_crossed(run: Run) -> None:
    """Inside the launch: two rows' logits change places before the sampler sees them."""

    def make(sample: Any) -> Any:
        def faulty(picks: Any, logits: Any, arrays: Any) -> None:
            if run.core.step_number >= FIRST_STEP and run.reached_step < 0 and len(arrays.sampled_rows) > 1:
                logits[0], logits[1] = logits[1], logits[0]
                run.reach()
            sample(picks, logits, arrays)

        return faulty

    wrap(run.runner, "sample", make)


def hidden_crossed(run: Run) -> None:
    """Before the head: two rows' hidden states change places."""

    def make(hidden: Any) -> Any:
        def faulty(arrays: Any) -> Any:
            states = hidden(arrays)
            if run.core.step_number >= FIRST_STEP and run.reached_step < 0 and len(arrays.sampled_rows) > 1:
                states[[0, 1]] = states[[1, 0]]
                run.reach()
            return states

        return faulty

    wrap(run.runner, "hidden", make)


def after_drawing(change: Callable[[Run, Any, Any, Any], bool]) -> Plant:
    """Once, inside the launch, when the tokens are drawn: given the run, picks, logits and arrays."""

    def plant(run: Run) -> None:
        def make(sample: Any) -> Any:
            def faulty(picks: Any, logits: Any, arrays: Any) -> None:
                sample(picks, logits, arrays)
                is_due = run.core.step_number >= FIRST_STEP and run.reached_step < 0
                if is_due and change(run, picks, logits, arrays):
                    run.reach()

            return faulty

        wrap(run.runner, "sample", make)

    return plant


def tokens_crossed(run: Run, picks: Any, logits: Any, arrays: Any) -> bool:
    """Drawn from the right logits; they change places before anyone is told."""
    return swap_tokens(picks)


def logprobs_crossed(run: Run, picks: Any, logits: Any, arrays: Any) -> bool:
    return swap_logprobs(picks)


def best_of_a_neighbour(run: Run, picks: Any, logits: Any, arrays: Any) -> bool:
    """A greedy row takes the token that is likeliest in another's logits; its own logit of it is told."""
    rows = [run.runner.rows[int(number)] for number in arrays.sampled_rows]
    greedy = [place for place, row in enumerate(rows) if row.plain and row.sampling.temperature == 0.0]
    if not greedy or len(rows) < 2:
        return False
    place = greedy[0]
    best = int(logits[place - 1].argmax())
    if best == picks.token_ids[place] or place in picks.logprobs:
        return False
    picks.token_ids[place], picks.head.logits[place] = best, logits[place][best]
    return True


def between_steps(change: Callable[[Run], bool]) -> Plant:
    """Once, before a step is put together."""

    def plant(run: Run) -> None:
        def make(schedule: Any) -> Any:
            def faulty() -> Any:
                if run.core.step_number >= FIRST_STEP and run.reached_step < 0 and change(run):
                    run.reach()
                return schedule()

            return faulty

        wrap(run.core.scheduler, "schedule", make)

    return plant


def stray_write(run: Run) -> bool:
    """Something writes into a block of a running sequence."""
    sequences = [one for one in run.core.scheduler.running if one.num_computed_tokens]
    if sequences:
        run.runner.slots[sequences[0].block_ids[0], 0] += 1
    return bool(sequences)


def stray_write_into_cached(run: Run) -> bool:
    """Something writes into every block that waits to be shared."""
    pool: Any = run.core.pool
    cached = [block for block in pool._published._prefix_of if block in pool._free]
    run.runner.slots[cached] += 1
    return bool(cached)


def live_block_zeroed(run: Run) -> None:
    """A scrub takes another block than it was told."""

    def make(scrub: Any) -> Any:
        def faulty(block_ids: list[int]) -> None:
            held = [b for one in run.core.scheduler.running if one.num_computed_tokens > 1 for b in one.block_ids[:1]]
            if run.reached_step < 0 and held:
                run.reach()
                scrub([*block_ids[1:], held[0]])
            else:
                scrub(block_ids)

        return faulty

    wrap(run.core.pool, "_scrub", make)


def late_scrub(run: Run) -> None:
    """The zeros come when the new owner has begun to write."""
    late: list[int] = []

    def make_scrub(scrub: Any) -> Any:
        def faulty(block_ids: list[int]) -> None:
            run.reach()
            late.extend(block_ids)

        return faulty

    def make_execute(execute: Any) -> Any:
        def faulty(batch: Batch, *rest: Any) -> Any:
            picks = execute(batch, *rest)
            run.runner.scrub(late)
            late.clear()
            return picks

        return faulty

    wrap(run.core.pool, "_scrub", make_scrub)
    wrap(run.runner, "execute", make_execute)


def dirty_at_start(run: Run) -> None:
    """Memory that was never used and is not zero."""
    run.runner.slots[:] = 5

    def make(execute: Any) -> Any:
        def faulty(batch: Batch, *rest: Any) -> Any:
            run.reach()
            return execute(batch, *rest)

        return faulty

    wrap(run.runner, "execute", make)


def in_picks(change: Callable[[Any], bool]) -> Plant:
    """After the launch, when its tokens are handed to the sequences."""

    def plant(run: Run) -> None:
        def make(update: Any) -> Any:
            def faulty(rows: Any, batch: Any, picks: Any) -> Any:
                own = replace(
                    picks,
                    token_ids=picks.token_ids.copy(),
                    logprobs=dict(picks.logprobs),
                    scores=dict(picks.scores),
                )
                if run.reached_step < 0 and change(own):
                    run.reach()
                return update(rows, batch, own)

            return faulty

        wrap(run.core, "_update", make)

    return plant


def swap_tokens(picks: Any) -> bool:
    if len(picks.token_ids) < 2 or picks.token_ids[0] == picks.token_ids[1]:
        return False
    picks.token_ids[[0, 1]] = picks.token_ids[[1, 0]]
    return True


def swap_logprobs(picks: Any) -> bool:
    if len(picks.logprobs) < 2:
        return False
    a, b = list(picks.logprobs)[:2]
    picks.logprobs[a], picks.logprobs[b] = picks.logprobs[b], picks.logprobs[a]
    return True


def swap_scores(picks: Any) -> bool:
    told = [row for row, scores in picks.scores.items() if scores]
    if len(told) < 2:
        return False
    a, b = told[:2]
    picks.scores[a], picks.scores[b] = picks.scores[b], picks.scores[a]
    return True


def answers_crossed(run: Run) -> bool:
    """Two sequences make text with each other's state."""
    answers = run.core._answers
    names = sorted(run.core._sequences, key=lambda name: -answers[name]._detokenizer._num_unfinished)
    if len(names) < 2 or not answers[names[0]]._detokenizer._num_unfinished:
        return False
    answers[names[0]], answers[names[1]] = answers[names[1]], answers[names[0]]
    return True


def prompt_said(output: Any, run: Run) -> Any:
    """An answer's text begins with the prompt's."""
    sequence = run.core._sequences.get(output.sequence_id)
    prompt = decode(sequence.token_ids[: sequence.num_prompt_tokens]) if sequence else ""
    return msgspec.structs.replace(output, text=prompt + output.text)
