"""What each engine has counted since its epoch began, noted now and then: how long its steps took, and what of that was
no tenant's. The counts of an epoch only grow, so a note that is lost or written twice changes nothing.

    a period's time = for each epoch, its last note before the period's end less its last one before its beginning
"""

from dataclasses import dataclass

from sqlalchemy import CheckConstraint, Column, Index, String, Table, func, select
from sqlalchemy.ext.asyncio import AsyncConnection

from tenancy.tables import ExactInteger, make_append_only, metadata

engine_time = Table(
    "engine_time",
    metadata,
    Column("epoch", String(64), primary_key=True),
    Column("at_ns", ExactInteger(), primary_key=True, autoincrement=False),
    Column("gateway_id", String(64), nullable=False),
    Column("step_ns", ExactInteger(), nullable=False),
    Column("own_ns", ExactInteger(), nullable=False),
    CheckConstraint("own_ns BETWEEN 0 AND step_ns", name="own"),
    Index(None, "at_ns"),
)
make_append_only(engine_time)


@dataclass(frozen=True, slots=True)
class EngineTime:
    """Of a period: over all engines that worked in it."""

    step_ns: int = 0
    own_ns: int = 0  # part of it
    num_engines: int = 1  # gateways whose engines have worked; one at least


async def note_engine_time(
    conn: AsyncConnection, *, epoch: str, at_ns: int, gateway_id: str, step_ns: int, own_ns: int
) -> None:
    """One note for an epoch and instant."""
    values = {"epoch": epoch, "at_ns": at_ns, "gateway_id": gateway_id, "step_ns": step_ns, "own_ns": own_ns}
    await conn.execute(engine_time.insert().values(values))


async def read_engine_time(conn: AsyncConnection, since_ns: int, until_ns: int) -> EngineTime:
    """Of [since_ns, until_ns), as exact as notes were taken often."""
    t = engine_time.c
    sums = (t.epoch, t.gateway_id, func.max(t.step_ns), func.max(t.own_ns))
    inside = select(*sums).where(t.at_ns >= since_ns, t.at_ns < until_ns).group_by(t.epoch, t.gateway_id)
    here = {(epoch, gateway): (step, own) for epoch, gateway, step, own in await conn.execute(inside)}
    epochs = {epoch for epoch, _ in here}
    earlier = select(*sums).where(t.at_ns < since_ns, t.epoch.in_(epochs)).group_by(t.epoch, t.gateway_id)
    before = {(epoch, gateway): (step, own) for epoch, gateway, step, own in await conn.execute(earlier)}
    step_ns = sum(step - before.get(key, (0, 0))[0] for key, (step, _) in here.items())
    own_ns = sum(own - before.get(key, (0, 0))[1] for key, (_, own) in here.items())
    return EngineTime(step_ns, own_ns, max(1, len({gateway for _, gateway in here})))
