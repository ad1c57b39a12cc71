"""Holds between a request, what is left of a killed process in PostgreSQL, the reaper and a database that is away."""

import asyncio
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import asyncpg
import pytest
from redis.asyncio import Redis
from sqlalchemy import select

from engine.journal import Journal, JournalRecord
from gateway.api import admission as admissions
from gateway.api.settlement import Outcome, write_settlement
from gateway.database import DatabaseUnavailableError
from gateway.host.folders import open_folders
from gateway.host.housekeeping import Housekeeping
from gateway.host.overdue import settle_abandoned
from gateway.host.recovery import recover
from tenancy.accounts.ledger import Hold, get_hold, pending_holds
from tenancy.accounts.ledger_check import check_ledger
from tenancy.tables import hold as hold_table
from tenancy.usage.meter import Usage
from tests.fakes.hall import Hall
from tests.fakes.integer_worker import IntegerModel, Script
from tests.gateway.conftest import Stage
from tests.servers import PostgresServer

LONG = IntegerModel(eos_every=1_000_003)


@pytest.fixture
def postgres_stage(
    runner: asyncio.Runner, redis: Redis, tmp_path: Path, short_folder: Path, postgres_server: PostgresServer
) -> Iterator[Stage]:
    one = Stage(runner, redis, tmp_path, short_folder, postgres_server.new_served_database)
    yield one
    one.close()


async def only_hold(hall: Hall) -> Hold:
    async with hall.database.read() as conn:
        hold = await get_hold(conn, str(await conn.scalar(select(hold_table.c.id))))
    assert hold is not None
    return hold


async def nothing_is_open(hall: Hall) -> None:
    async with hall.database.read() as conn:
        assert await pending_holds(conn) == []
        assert (await check_ledger(conn)).ok


def house(hall: Hall, folder: Path) -> Housekeeping:
    folders = open_folders(folder / "data")
    return Housekeeping(hall.services, folders, cast(Any, None), cast(Any, SimpleNamespace(heartbeat=None)))


def test_recovery_waits_for_what_the_killed_process_was_at(
    postgres_stage: Stage, runner: asyncio.Runner, tmp_path: Path
) -> None:
    """Its T2 waits in PostgreSQL with a lock on the hold, and is rolled back when it finds nobody to answer to. Until
    then the hold is neither settled nor may its journal go."""
    hall, _ = postgres_stage.make()

    async def scenario() -> None:
        hall.settler._settle = lambda *_: asyncio.sleep(0, True)  # type: ignore[method-assign]  # killed before T2
        answer = await hall.chat(max_tokens=5)
        folders = open_folders(tmp_path / "data")
        journal = Journal(folders.journal, "old")
        journal.append([JournalRecord(answer.headers["x-request-id"], 4, 5, "length")])
        journal.close()
        url = hall.services.database.url.replace("+asyncpg", "")
        left = await asyncpg.connect(url)
        await left.execute("BEGIN")
        await left.execute("UPDATE hold SET num_tokens = 0 WHERE state = 'pending'")
        recovering = asyncio.create_task(recover(hall.services, folders, "new"))
        await asyncio.sleep(0.3)
        assert not recovering.done()
        assert journal.path.exists()
        await left.execute("ROLLBACK")
        await left.close()
        recovered = await recovering
        assert (recovered.num_captured, recovered.num_voided) == (1, 0)
        assert not journal.path.exists()
        (row,) = (await hall.usage_rows()).values()
        assert row.num_completion_tokens == 5
        assert row.model == "integer"
        await nothing_is_open(hall)

    runner.run(scenario())


def test_a_hold_that_is_open_here_is_not_reaped_here(stage: Stage, runner: asyncio.Runner, tmp_path: Path) -> None:
    """The database is away when the answer ends, until long after the hold's end: it is settled as it ended."""
    hall, _ = stage.make(hold_ttl_s=1)

    async def scenario() -> None:
        hall.database.faults[:] = ["none", *["before"] * 4]
        answer = await hall.chat(max_tokens=5, stream=True)
        assert answer.events()[-1] == "[DONE]"
        hold = await only_hold(hall)
        while hall.services.world.now_ns() <= hold.expires_ns:
            await asyncio.sleep(0.1)
        await house(hall, tmp_path).reap()  # takes no transaction, and so no fault
        assert await hall.settler.drain(10) == 0
        (row,) = (await hall.usage_rows()).values()
        assert (row.num_completion_tokens, row.finish_reason) == (5, "length")
        await hall.check_books()

    runner.run(scenario())


def test_a_request_that_waited_for_its_hold_has_less_time_left(
    stage: Stage, runner: asyncio.Runner, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The hold's life begins with T1, whose wait for the tenant's accounts is part of it."""
    hall, worker = stage.make(hold_ttl_s=2)
    worker.model = LONG
    worker.scripts.append(Script(delay_s=0.05))
    place = admissions.place_hold

    async def slow(*args: Any, **kwargs: Any) -> Any:
        await asyncio.sleep(1.2)
        return await place(*args, **kwargs)

    monkeypatch.setattr(admissions, "place_hold", slow)

    async def scenario() -> None:
        answer = await hall.chat(max_tokens=200, stream=True)
        assert b"deadline_exceeded" in answer.body
        await hall.check_books()
        hold = await only_hold(hall)
        assert hold.state == "captured"
        assert hold.settled_ns is not None
        assert hold.settled_ns < hold.expires_ns

    runner.run(scenario())


@pytest.mark.parametrize("stream", [True, False])
def test_what_cannot_be_billed_does_not_leave(
    stage: Stage, runner: asyncio.Runner, tmp_path: Path, stream: bool
) -> None:
    """Another gateway has expired the hold of an answer that is whole: only what had left of a stream is lost."""
    hall, worker = stage.make()
    worker.scripts.append(Script(delay_s=0.02))

    async def scenario() -> None:
        asking = asyncio.create_task(hall.chat(max_tokens=20, stream=stream))
        while not (await hall.num_rows())["hold"]:
            await asyncio.sleep(0.01)
        hold = await only_hold(hall)
        async with hall.database.transaction() as conn:
            await settle_abandoned(conn, hall.services, hold, None)
        answer = await asking
        if not stream:
            assert (answer.status, answer.json()["error"]["code"]) == (504, "deadline_exceeded")
        assert await hall.usage_rows() == {}

    runner.run(scenario())


def test_a_request_and_a_reaper_never_wait_for_each_other(postgres_stage: Stage, runner: asyncio.Runner) -> None:
    """Both settle the same hold at once, many times: one of them does, and neither is killed by a deadlock."""
    hall, _ = postgres_stage.make()
    outcomes: list[tuple[Any, Outcome]] = []

    async def keep(admission: Any, outcome: Outcome) -> bool:
        outcomes.append((admission, outcome))
        return True

    async def scenario() -> None:
        hall.settler._settle = keep  # type: ignore[method-assign,assignment]
        for _ in range(30):
            assert (await hall.chat(max_tokens=2)).status == 200

        async def own(admission: Any, outcome: Outcome) -> str:
            try:
                async with hall.database.transaction(admission.principal.tenant_id) as conn:
                    await write_settlement(conn, admission, outcome, entropy=hall.services.world.entropy)
            except Exception as error:
                return type(error).__name__
            return "settled"

        async def others(admission: Any, wait: bool) -> int:
            async with hall.database.read() as conn:
                hold = await get_hold(conn, admission.hold_id)
            assert hold is not None
            async with hall.database.transaction() as conn:
                return await settle_abandoned(conn, hall.services, hold, Usage(1, 0, 1), wait=wait)

        async def both(number: int, admission: Any, outcome: Outcome) -> tuple[Any, ...]:
            asked = [own(admission, outcome), others(admission, bool(number % 2))]
            first = number % 3 == 0
            found = await asyncio.gather(*(reversed(asked) if first else asked))
            return admission, *(reversed(found) if first else found)

        found = await asyncio.gather(*(both(number, *one) for number, one in enumerate(outcomes)))
        rows = await hall.usage_rows()
        assert len(rows) == 30
        for admission, ending, charged in found:
            assert ending in ("settled", "HoldSettledError")
            assert (ending == "settled") == (charged == 0)
            assert (rows[admission.request_id].finish_reason == "gateway_lost") == bool(charged)
        await nothing_is_open(hall)

    runner.run(scenario())


def test_what_postgresql_refuses_for_now_is_tried_again(postgres_stage: Stage, runner: asyncio.Runner) -> None:
    """A deadlock, a lock that takes too long, a server that goes down: not our bug, and not the client's."""
    hall, _ = postgres_stage.make()

    async def refused(sqlstate: str) -> None:
        async with hall.database.transaction() as conn:
            await conn.exec_driver_sql(f"DO $$ BEGIN RAISE EXCEPTION 'x' USING ERRCODE = '{sqlstate}'; END $$")

    async def scenario() -> None:
        for sqlstate in ("40001", "40P01", "55P03", "57014", "57P01", "53300", "25006", "58030"):
            with pytest.raises(DatabaseUnavailableError):
                await refused(sqlstate)
        for sqlstate in ("22012", "42703"):
            with pytest.raises(Exception, match="x") as found:
                await refused(sqlstate)
            assert not isinstance(found.value, DatabaseUnavailableError)

    runner.run(scenario())
