"""Plants in the engine itself: its rows, its pool and prefix cache, its outputs."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import msgspec

from engine.cache.block_pool import BlockState
from engine.events import EngineEvent
from engine.protocol import TokenLogprob
from tests.faults.array_plants import FIRST_STEP, Plant, wrap
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


def reference_lost(run: Run) -> None:
    """A reference is never given back."""

    def make(release: Any) -> Any:
        def faulty(block_ids: Any, *, sequence_id: str) -> None:
            if run.reached_step < 0 and block_ids:
                run.reach()
                block_ids = block_ids[:-1]
            release(block_ids, sequence_id=sequence_id)

        return faulty

    wrap(run.core.pool, "release", make)


def block_forgotten(run: Run) -> bool:
    """The free list forgets a block."""
    free = run.core.pool._free
    if free.lengths[""]:
        free.remove(free.first_of(""))
        return True
    return False


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

        wrap(pool, "find", make)
        pool.knows = lambda key: True
        believe(pool)

    return plant


def believe(pool: Any) -> None:
    """The pool shares whatever it is told to, without its own checks."""

    def share(block: Any, domain: str, sequence_id: str) -> None:
        if block.block_id in pool._free:
            pool._free.remove(block.block_id)
            block.state = BlockState.SEALED
        pool._refer(block, domain)
        pool._emit("share", block, domain=domain, sequence_id=sequence_id)

    pool._share = share


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


def lower(logprobs: tuple[TokenLogprob, ...]) -> tuple[TokenLogprob, ...]:
    return tuple(msgspec.structs.replace(one, logprob=one.logprob - 1.0) for one in logprobs)


def changed(**make: Callable[[Any], Any]) -> Plant:
    def change(output: Any, _: Run) -> Any:
        return msgspec.structs.replace(output, **{name: of(getattr(output, name)) for name, of in make.items()})

    return in_output(change)


def unheard(kind: str) -> Plant:
    """A begin or an end that is not told."""

    def plant(run: Run) -> None:
        def make(show: Any) -> Any:
            def faulty() -> None:
                lost = [event for event in run.core._events if event.kind == kind]
                if lost and run.core.step_number >= FIRST_STEP and run.reached_step < 0:
                    run.core._events.remove(lost[0])
                    run.reach()
                show()

            return faulty

        wrap(run.core, "_show_events", make)

    return plant


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


def to_another(run: Run, event: EngineEvent) -> list[EngineEvent]:
    """An allocation is told in another sequence's name."""
    names = [name for name, one in run.core._sequences.items() if one.domain != event.domain]
    if event.kind != "allocate" or run.reached_step >= 0 or not names:
        return [event]
    run.reach()
    return [replace(event, sequence_id=names[0], domain=run.core._sequences[names[0]].domain)]


def told_twice(run: Run, event: EngineEvent) -> list[EngineEvent]:
    """A release is told twice, as if the block were on the free list twice."""
    if event.kind != "free" or run.reached_step >= 0:
        return [event]
    run.reach()
    return [event, event]


def given_twice(run: Run) -> None:
    """A block that is given to a sequence stays on the free list: the next one gets it too."""
    pool: Any = run.core.pool

    def make(take: Any) -> Any:
        def faulty(domain: str, floor: int) -> Any:
            block = take(domain, floor)
            if run.core.step_number >= FIRST_STEP and run.reached_step < 0:
                run.reach()
                pool._free.push_first(block.block_id)
            elif run.reached_step >= 0 and block.state is not BlockState.FREE:
                block.state, block.num_references = BlockState.FREE, 0
            return block

        return faulty

    wrap(pool, "_take", make)


def count_clamped(run: Run) -> None:
    """The count of a shared block's readers is set to one: it goes when the first of them goes."""

    def make(release: Any) -> Any:
        def faulty(block_ids: Any, *, sequence_id: str) -> None:
            for block_id in block_ids:
                block = run.core.pool.blocks[block_id]
                if block.num_references > 1:
                    run.reach()
                    block.num_references = 1
            release([b for b in block_ids if run.core.pool.blocks[b].num_references], sequence_id=sequence_id)

        return faulty

    wrap(run.core.pool, "release", make)


def not_pinned(run: Run) -> None:
    """A cached block that was found stays where it can be taken for somebody else."""
    pool: Any = run.core.pool

    def make(share: Any) -> Any:
        def faulty(block: Any, domain: str, sequence_id: str) -> None:
            was_free = block.block_id in pool._free
            share(block, domain, sequence_id)
            if was_free and run.reached_step < 0:
                run.reach()
                pool._published.drop(block.block_id)
                block.state = BlockState.FREE
                pool._free.push_first(block.block_id)

        return faulty

    wrap(pool, "_share", make)


def published_early(run: Run) -> None:
    """A block can be found before it is written."""
    pool: Any = run.core.pool

    def make(schedule: Any) -> Any:
        def faulty() -> Any:
            plan = schedule()
            for row in plan.rows:
                sequence = row.sequence
                for index in range(sequence.num_computed_tokens // 4, sequence.num_tokens // 4):
                    block = pool.blocks[sequence.block_ids[index]]
                    name = sequence.prefix(index, 4)
                    if block.state is BlockState.WRITING and pool._published.add(block.block_id, name):
                        run.reach()
                        pool._emit("publish", block, domain=block.domain, sequence_id=sequence.sequence_id)
            return plan

        return faulty

    def once(publish: Any) -> Any:
        def fine(block_id: int, prefix: Any, *, sequence_id: str) -> None:
            if block_id not in pool._published:
                publish(block_id, prefix, sequence_id=sequence_id)

        return fine

    wrap(run.core.scheduler, "schedule", make)
    wrap(pool, "publish", once)
    believe(pool)


def published_as_another(run: Run) -> None:
    """A block is published under what another sequence of its domain holds at that place."""
    pool: Any = run.core.pool

    def make(publish: Any) -> Any:
        def faulty(block_id: int, prefix: Any, *, sequence_id: str) -> None:
            index = run.core._sequences[sequence_id].block_ids.index(block_id)
            for other in run.core._sequences.values():
                if other.domain == prefix.domain and other.num_tokens > index * 4 + 4 and not other.num_computed_tokens:
                    wrong = other.prefix(index, 4)
                    if wrong.token_ids != prefix.token_ids and wrong.key not in pool._published._block_of:
                        run.reach()
                        prefix = wrong
                        break
            publish(block_id, prefix, sequence_id=sequence_id)

        return faulty

    wrap(pool, "publish", make)


def computed_twice(run: Run) -> bool:
    """A sequence goes back over a block that is sealed."""
    for sequence in run.core.scheduler.running:
        if sequence.num_computed_tokens >= 8:
            sequence.num_computed_tokens -= 4
            return True
    return False


def rows_exchanged(run: Run) -> bool:
    """Two sequences change stable rows, their states stay where they were."""
    running = [one for one in run.core.scheduler.running if one.num_computed_tokens and one.row >= 0]
    if len(running) < 2:
        return False
    running[0].row, running[1].row = running[1].row, running[0].row
    return True


def of_a_row(change: Callable[[Any], bool]) -> Callable[[Run], bool]:
    """Of the first running row that it can happen to."""
    return lambda run: any(change(run.runner.rows[one.row]) for one in run.core.scheduler.running)


def counts_bent(row: Any) -> bool:
    if row._counts is None:
        return False
    row._counts[(row.token_ids[-1] + 1) % len(row._counts)] += 4
    return True


def matcher_fed(row: Any) -> bool:
    """A mask's state has read a token that the answer does not have."""
    if row.matcher is None or not row.matcher.consumed:
        return False
    row.matcher.consumed[-1] += 1
    return True


def history_taken(run: Run) -> bool:
    """A row that counts its tokens looks at another sequence's."""
    rows = [run.runner.rows[one.row] for one in run.core.scheduler.running if one.num_completion_tokens]
    counting = [row for row in rows if row.has_penalties]
    others = [row for row in rows if counting and row.token_ids is not counting[0].token_ids]
    if not others:
        return False
    counting[0].token_ids = others[0].token_ids
    return True
