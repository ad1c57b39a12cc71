"""Plants in the engine itself: its rows, its pool and prefix cache, its outputs."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import msgspec

from engine.batch import Batch
from engine.cache.block_pool import BlockState
from engine.events import EngineEvent
from tests.faults.array_plants import FIRST_STEP, Plant, pair, wrap
from tests.faults.stage import Run


def in_row(change: Callable[[Any, Any], bool]) -> Plant:
    """Once, in a row that is being set: it takes something of another's."""

    def plant(run: Run) -> None:
        def make(set_row: Any) -> Any:
            def faulty(index: int, row: Any) -> None:
                others = [other for other in run.runner.rows.values() if other.sequence_id != row.sequence_id]
                if run.reached_step < 0 and any(change(row, other) for other in others):
                    run.reach()
                set_row(index, row)

            return faulty

        wrap(run.runner, "set_row", make)

    return plant


def take(*names: str) -> Callable[[Any, Any], bool]:
    def change(row: Any, other: Any) -> bool:
        if any(getattr(other, name) is None for name in names) or other.sampling == row.sampling:
            return False
        for name in names:
            setattr(row, name, getattr(other, name))
        return True

    return change


def take_form(row: Any, other: Any) -> bool:
    if not (row.matcher and other.matcher and row.matcher.grammar != other.matcher.grammar):
        return False
    row.matcher = other.matcher
    return True


def lose_form(row: Any, other: Any) -> bool:
    lost = row.has_form
    if lost:
        row.has_form, row.matcher, row.plain = False, None, True
    return bool(lost)


def take_counts(row: Any, other: Any) -> bool:
    if not row.has_penalties or other._counts is None:
        return False
    row._seen, row._counts, row._num_counted = other._seen, other._counts, len(row.token_ids)
    return True


def stale_row(run: Run) -> None:
    def make(set_row: Any) -> Any:
        def faulty(index: int, row: Any) -> None:
            if index in run.runner.rows and run.reached_step < 0:
                run.reach()
                return
            set_row(index, row)

        return faulty

    wrap(run.runner, "set_row", make)


def in_events(keep: Callable[[Run, EngineEvent], list[EngineEvent]]) -> Plant:
    def plant(run: Run) -> None:
        pool = run.core.pool
        emit = pool._on_event

        def faulty(event: EngineEvent) -> None:
            for one in keep(run, event):
                emit(one)

        pool._on_event = faulty

    return plant


def generation_kept(run: Run) -> None:
    def make(allocate: Any) -> Any:
        def faulty(num: int, **names: Any) -> Any:
            for block in run.core.pool.blocks:
                if block.state is BlockState.FREE and block.generation:
                    block.generation -= 1
                    run.reach()
            return allocate(num, **names)

        return faulty

    wrap(run.core.pool, "allocate", make)


def no_scrub(told: bool) -> Plant:
    """The bytes stay; ``told``: the engine says that they went."""

    def plant(run: Run) -> None:
        def forget(block_ids: list[int]) -> None:
            run.reach()

        run.core.pool._scrub = forget
        if not told:
            in_events(lambda _, event: [] if event.kind == "scrub" else [event])(run)

    return plant


def freed_alive(run: Run) -> None:
    """Blocks of a running sequence become free without anybody knowing."""

    def make(schedule: Any) -> Any:
        def faulty() -> Any:
            pool = run.core.pool
            if run.core.step_number >= FIRST_STEP and run.reached_step < 0:
                for block in pool.blocks:
                    if block.state is BlockState.WRITING and block.block_id not in pool._free:
                        block.state, block.num_references = BlockState.FREE, 0
                        pool._free.push_first(block.block_id)
                        run.reach()
                        break
            return schedule()

        return faulty

    wrap(run.core.scheduler, "schedule", make)


def lost_block(told: bool) -> Plant:
    """A reference that is never given back; ``told``: only the free list forgets it."""

    def plant(run: Run) -> None:
        def make(release: Any) -> Any:
            def faulty(block_ids: Any, *, sequence_id: str) -> None:
                if told and run.reached_step < 0 and block_ids:
                    run.reach()
                    release(block_ids, sequence_id=sequence_id)
                    free = [block_id for block_id in block_ids if block_id in run.core.pool._free]
                    for block_id in free[:1]:
                        run.core.pool._free.remove(block_id)
                elif run.reached_step < 0 and block_ids:
                    run.reach()
                    release(block_ids[:-1], sequence_id=sequence_id)
                else:
                    release(block_ids, sequence_id=sequence_id)

            return faulty

        wrap(run.core.pool, "release", make)

    return plant


def wrong_hit(choose: Callable[[Any, Any], int | None]) -> Plant:
    """The prefix cache finds what it should not, and the pool believes it."""

    def plant(run: Run) -> None:
        pool: Any = run.core.pool

        def make(find: Any) -> Any:
            def faulty(prefix: Any) -> int | None:
                found = find(prefix)
                wrong = choose(pool, prefix) if found is None else None
                if wrong is None or pool.blocks[wrong].state is BlockState.FENCED:
                    return found  # type: ignore[no-any-return]
                run.reach()
                return wrong

            return faulty

        def share(block: Any, domain: str, sequence_id: str) -> None:
            if block.block_id in pool._free:
                pool._free.remove(block.block_id)
                block.state = BlockState.SEALED
            pool._refer(block, domain)
            pool._emit("share", block, domain=domain, sequence_id=sequence_id)

        wrap(pool, "find", make)
        pool.knows = lambda key: True
        pool._share = share

    return plant


def published(pool: Any, fits: Callable[[Any], bool]) -> int | None:
    return next((block for block, other in pool._published._prefix_of.items() if fits(other)), None)


def writing(pool: Any, prefix: Any) -> int | None:
    blocks = (b.block_id for b in pool.blocks if b.state is BlockState.WRITING and b.domain == prefix.domain)
    return next(blocks, None)


def name_kept(run: Run) -> None:
    """A published block is given out and can still be found."""
    pool = run.core.pool

    def make(take: Any) -> Any:
        def faulty(domain: str, floor: int) -> Any:
            block = take(domain, floor)
            if block.block_id in pool._published:
                run.reach()
            return block

        return faulty

    wrap(pool, "_take", make)
    pool.forget = lambda block_ids: None  # type: ignore[method-assign]


def skipped_resume(run: Run) -> None:
    """A sequence that is admitted counts a block as computed that is not."""

    def make(schedule: Any) -> Any:
        def faulty() -> Any:
            plan = schedule()
            for index, row in enumerate(plan.rows):
                if run.reached_step < 0 and row.sequence in plan.admitted and row.num_new_tokens > 4:
                    row.sequence.num_computed_tokens += 4
                    plan.rows[index] = replace(row, num_new_tokens=row.num_new_tokens - 4)
                    run.reach()
            return plan

        return faulty

    wrap(run.core.scheduler, "schedule", make)


def in_output(change: Callable[[Any, Run], Any]) -> Plant:
    def plant(run: Run) -> None:
        def make(output: Any) -> Any:
            def faulty(*arguments: Any) -> Any:
                right = output(*arguments)
                wrong = change(right, run) if run.reached_step < 0 and right.token_ids else right
                if wrong != right:
                    run.reach()
                return wrong

            return faulty

        wrap(run.core, "_output", make)

    return plant


def other_stream(output: Any, run: Run) -> Any:
    names = [name for name in run.core._sequences if name != output.sequence_id]
    return msgspec.structs.replace(output, sequence_id=names[0]) if names else output


def changed(**make: Callable[[Any], Any]) -> Plant:
    def change(output: Any, _: Run) -> Any:
        return msgspec.structs.replace(output, **{name: of(getattr(output, name)) for name, of in make.items()})

    return in_output(change)


def in_picks(change: Callable[[Any], bool]) -> Plant:
    """After the launch, when its tokens are handed to the sequences."""

    def plant(run: Run) -> None:
        def make(update: Any) -> Any:
            def faulty(rows: Any, batch: Any, picks: Any) -> Any:
                own = replace(picks, token_ids=picks.token_ids.copy(), logprobs=dict(picks.logprobs))
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


def late_write(run: Run) -> None:
    """Something writes into a block of a running sequence between two steps."""

    def make(schedule: Any) -> Any:
        def faulty() -> Any:
            for sequence in run.core.scheduler.running:
                if run.core.step_number >= FIRST_STEP and run.reached_step < 0 and sequence.num_computed_tokens:
                    run.runner.slots[sequence.block_ids[0], 0] += 1
                    run.reach()
            return schedule()

        return faulty

    wrap(run.core.scheduler, "schedule", make)


def answers_crossed(run: Run) -> None:
    def make(step: Any) -> Any:
        def faulty() -> Any:
            names = list(run.core._sequences)
            if run.core.step_number >= FIRST_STEP and run.reached_step < 0 and len(names) > 1:
                answers = run.core._answers
                answers[names[0]], answers[names[1]] = answers[names[1]], answers[names[0]]
                run.reach()
            return step()

        return faulty

    wrap(run.core, "step", make)


def audit_sees_another(run: Run) -> None:
    """The kernels get other tables than the auditor saw."""

    def make(execute: Any) -> Any:
        def faulty(batch: Batch) -> Any:
            rows = pair(batch, alien=True)
            if run.core.step_number >= FIRST_STEP and run.reached_step < 0 and rows is not None:
                run.reach()
                batch.evidence.block_tables[rows[0], 0] = batch.evidence.block_tables[rows[1], 0]
            return execute(batch)

        return faulty

    wrap(run.runner, "execute", make)


def drop(kind: str) -> Plant:
    def keep(run: Run, event: EngineEvent) -> list[EngineEvent]:
        if event.kind == kind and run.reached_step < 0:
            run.reach()
            return []
        return [event]

    return in_events(keep)


def same(name: str) -> Callable[[Any, Any], int | None]:
    if name == "domain":
        return lambda pool, p: published(pool, lambda o: o.token_ids == p.token_ids and o.domain != p.domain)
    if name == "salt":
        return lambda pool, p: published(
            pool, lambda o: (o.token_ids, o.domain) == (p.token_ids, p.domain) and o.key != p.key
        )
    return lambda pool, p: published(pool, lambda o: o.domain == p.domain and o.token_ids != p.token_ids)
