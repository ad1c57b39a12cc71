"""What the admin page reads from the audit tables. Read only; one snapshot, the caller's.

An entry is in the outbox until the sequencer moves it to the log, so the newest of a kind is looked for in both.
"""

from dataclasses import dataclass
from typing import Any

import msgspec
from sqlalchemy import func, select
from sqlalchemy.ext.asyncio import AsyncConnection

from audit.transparency.tables import checkpoint, log_leaf, log_opening, outbox


@dataclass(frozen=True, slots=True)
class LoggedEntry:
    at_ns: int
    body: dict[str, Any]  # empty when its opening has been erased


@dataclass(frozen=True, slots=True)
class LogState:
    num_leaves: int  # of the last checkpoint; 0 when there is none
    signed_ns: int | None  # when the last checkpoint was signed
    num_waiting: int  # outbox rows that no checkpoint covers yet
    oldest_waiting_ns: int | None


async def last_entry(conn: AsyncConnection, kind: str) -> LoggedEntry | None:
    """The newest entry of a kind, sequenced or not."""
    waiting = (
        select(outbox.c.at_ns, outbox.c.body)
        .where(outbox.c.kind == kind)
        .order_by(outbox.c.at_ns.desc(), outbox.c.id.desc())
        .limit(1)
    )
    logged = (
        select(log_leaf.c.at_ns, log_opening.c.body)
        .outerjoin(log_opening, log_opening.c.leaf_index == log_leaf.c.leaf_index)
        .where(log_leaf.c.kind == kind)
        .order_by(log_leaf.c.at_ns.desc(), log_leaf.c.leaf_index.desc())
        .limit(1)
    )
    rows = [(await conn.execute(query)).first() for query in (waiting, logged)]
    found = [row for row in rows if row is not None]
    if not found:
        return None
    newest = max(found, key=lambda row: int(row.at_ns))
    return LoggedEntry(int(newest.at_ns), msgspec.json.decode(newest.body) if newest.body is not None else {})


async def count_entries(conn: AsyncConnection, kind: str) -> int:
    """How many entries of a kind there are, ever."""
    waiting = select(func.count()).select_from(outbox).where(outbox.c.kind == kind)
    logged = select(func.count()).select_from(log_leaf).where(log_leaf.c.kind == kind)
    return int((await conn.execute(waiting)).scalar_one()) + int((await conn.execute(logged)).scalar_one())


async def log_state(conn: AsyncConnection) -> LogState:
    newest = select(checkpoint.c.num_leaves, checkpoint.c.at_ns).order_by(checkpoint.c.num_leaves.desc()).limit(1)
    head = (await conn.execute(newest)).first()
    waiting = (await conn.execute(select(func.count(), func.min(outbox.c.at_ns)).select_from(outbox))).one()
    return LogState(
        num_leaves=int(head.num_leaves) if head else 0,
        signed_ns=int(head.at_ns) if head else None,
        num_waiting=int(waiting[0]),
        oldest_waiting_ns=int(waiting[1]) if waiting[1] is not None else None,
    )
