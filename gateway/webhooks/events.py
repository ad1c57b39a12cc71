"""Which entries of the log are events, who may hear of them, and what is told.

The log is the outbox: an entry is written in the transaction of its fact, so an event can neither be lost nor be told
of what did not happen, and its receiver can find it again in the log, under ``log_index``.
"""

import json
from collections.abc import Mapping
from datetime import UTC, datetime
from typing import Any

from sqlalchemy import select
from sqlalchemy.ext.asyncio import AsyncConnection

from audit.transparency.entry import KINDS
from audit.transparency.tables import log_leaf, log_opening, log_state
from tenancy.webhooks import Endpoint

LEAVES_MAX = 500  # looked at in one round for one endpoint
# Too many, or about ourselves.
NEVER = frozenset({"request.admitted", "request.settled", "request.replayed", "limit.would_refuse", "audit.heartbeat"})
EVENT_KINDS = frozenset(kind for kind in KINDS if kind not in NEVER and not kind.startswith("webhook."))
VIOLATION = "isolation.violation"
ALERT_KINDS = frozenset({VIOLATION, "worker.lost", "budget.alert", "credit.expired", "key.revoked", "key.rotated"})
VIOLATION_FIELDS_OF_TENANTS = ("epoch", "rule", "step")

Body = Mapping[str, Any]


async def num_leaves(conn: AsyncConnection) -> int:
    return int((await conn.execute(select(log_state.c.num_leaves))).scalar() or 0)


async def new_events(conn: AsyncConnection, endpoint: Endpoint) -> tuple[list[tuple[int, str]], int]:
    """(leaf index, kind) of what the endpoint is to hear, from where it is, and where it is then."""
    end = await num_leaves(conn)
    if endpoint.next_leaf_index >= end:
        return [], endpoint.next_leaf_index
    query = (
        select(log_leaf.c.leaf_index, log_leaf.c.kind, log_opening.c.tenant_id, log_opening.c.body)
        .join(log_opening, log_opening.c.leaf_index == log_leaf.c.leaf_index)
        .where(
            log_leaf.c.leaf_index >= endpoint.next_leaf_index,
            log_leaf.c.leaf_index < end,
            log_leaf.c.kind.in_(sorted(endpoint.kinds)),
        )
        .order_by(log_leaf.c.leaf_index)
        .limit(LEAVES_MAX)
    )
    rows = (await conn.execute(query)).all()
    found = [(row.leaf_index, row.kind) for row in rows if concerns(endpoint, row.kind, row.tenant_id, row.body)]
    return found, rows[-1].leaf_index + 1 if len(rows) == LEAVES_MAX else end


def concerns(endpoint: Endpoint, kind: str, tenant_id: str, body: bytes) -> bool:
    """The operator's endpoint hears of everything."""
    return not endpoint.tenant_id or concerns_tenant(endpoint.tenant_id, kind, tenant_id, body)


def concerns_tenant(reader_id: str, kind: str, tenant_id: str, body: bytes) -> bool:
    """A tenant hears of its own entries, and of violations that touched it."""
    return reader_id in json.loads(body)["domains"] if kind == VIOLATION else tenant_id == reader_id


def told_to_tenant(kind: str, body: Body) -> Body:
    """Of a violation, not who else was touched."""
    return {name: body[name] for name in VIOLATION_FIELDS_OF_TENANTS} if kind == VIOLATION else body


async def payload(conn: AsyncConnection, endpoint: Endpoint, leaf_index: int) -> bytes | None:
    """The JSON to send; None where the entry was erased."""
    query = (
        select(log_leaf.c.kind, log_leaf.c.at_ns, log_opening.c.tenant_id, log_opening.c.body)
        .join(log_opening, log_opening.c.leaf_index == log_leaf.c.leaf_index)
        .where(log_leaf.c.leaf_index == leaf_index)
    )
    row = (await conn.execute(query)).one_or_none()
    if row is None or not concerns(endpoint, row.kind, row.tenant_id, row.body):
        return None
    data = json.loads(row.body)
    if endpoint.tenant_id:
        data = told_to_tenant(row.kind, data)
    event = {
        "type": row.kind,
        "timestamp": datetime.fromtimestamp(row.at_ns / 10**9, UTC).isoformat(timespec="milliseconds"),
        "tenant_id": endpoint.tenant_id or row.tenant_id,
        "log_index": leaf_index,
        "data": data,
    }
    return json.dumps(event, separators=(",", ":"), ensure_ascii=False).encode()
