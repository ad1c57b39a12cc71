"""What engines have counted, between any two instants."""

import asyncio

import pytest
from sqlalchemy.exc import IntegrityError

from tenancy.usage.engine_time import EngineTime, note_engine_time, read_engine_time
from tests.tenancy.conftest import opened

NOTES = (  # epoch, gateway, when, all steps, own
    ("e1", "g1", 10, 7, 1),
    ("e1", "g1", 20, 12, 1),
    ("e1", "g1", 40, 30, 4),
    ("e2", "g1", 60, 5, 5),  # a worker that was started again counts from nothing
    ("e3", "g2", 35, 20, 0),
    ("e3", "g2", 70, 40, 2),
)


def test_counts_of_a_period_are_what_its_epochs_gained_in_it(database_url: str) -> None:
    async def run() -> None:
        async with opened(database_url) as database:
            async with database.transaction() as conn:
                for epoch, gateway_id, at_ns, step_ns, own_ns in NOTES:
                    await note_engine_time(
                        conn, epoch=epoch, at_ns=at_ns, gateway_id=gateway_id, step_ns=step_ns, own_ns=own_ns
                    )
            async with database.read() as conn:
                found = {
                    (since, until): await read_engine_time(conn, since, until)
                    for since, until in ((0, 5), (0, 11), (0, 20), (11, 41), (20, 40), (41, 61), (0, 100))
                }
            assert found == {
                (0, 5): EngineTime(0, 0, 1),
                (0, 11): EngineTime(7, 1, 1),
                (0, 20): EngineTime(7, 1, 1),  # half open
                (11, 41): EngineTime(23 + 20, 3, 2),
                (20, 40): EngineTime(5 + 20, 0, 2),
                (41, 61): EngineTime(5, 5, 1),
                (0, 100): EngineTime(30 + 5 + 40, 4 + 5 + 2, 2),
            }
            # Periods that follow each other lose nothing.
            parts = [found[0, 11], found[11, 41], found[41, 61]]
            assert sum(part.step_ns for part in parts) == 7 + 43 + 5
            with pytest.raises(IntegrityError):
                async with database.transaction() as conn:
                    await note_engine_time(conn, epoch="e4", at_ns=1, gateway_id="g1", step_ns=1, own_ns=2)

    asyncio.run(run())
