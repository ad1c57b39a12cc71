"""Webhook endpoints and the deliveries to them. An event is an entry of the log, named by its leaf index.

A delivery's life:

    pending --2xx--> delivered        pending --the last attempt failed, or 410--> dead
    delivered, dead --resend--> pending, with all attempts before it again

A sender claims a pending delivery by moving its next attempt into the future; if it dies, the attempt comes again then.
So an event is sent at least once, and its id tells a receiver that it had it already. An endpoint has one delivery an
event, however many servers look at the log.
"""

from collections.abc import Iterable
from dataclasses import dataclass

from sqlalchemy import Row, delete, func, insert, select, update
from sqlalchemy.ext.asyncio import AsyncConnection

from tenancy.ids import Entropy, new_id
from tenancy.webhook_tables import webhook_delivery, webhook_endpoint

SECOND = 1_000_000_000
# Seconds after each failed attempt; after the last the delivery is dead: about three days in all.
RETRY_AFTER_S = (5, 30, 120, 600, 3_600, 4 * 3_600, 12 * 3_600, 24 * 3_600, 24 * 3_600)
NUM_ATTEMPTS_MAX = len(RETRY_AFTER_S) + 1
CLAIM_S = 60
ENDPOINTS_MAX = 20  # of one tenant, or of the operator
URL_CHARS_MAX = 2_000
ERROR_CHARS_MAX = 200
GONE = 410  # the receiver asks for no more


class WebhookError(Exception):
    """The endpoint or delivery cannot be had or made; the message says why."""


@dataclass(frozen=True, slots=True)
class Endpoint:
    endpoint_id: str
    tenant_id: str  # "": the operator's
    url: str
    kinds: frozenset[str]
    next_leaf_index: int
    created_ns: int
    end_reason: str  # "": active


@dataclass(frozen=True, slots=True)
class Delivery:
    delivery_id: str
    endpoint_id: str
    leaf_index: int
    kind: str
    state: str
    num_attempts: int
    next_attempt_ns: int
    created_ns: int
    last_status: int | None
    last_error: str


async def add_endpoint(
    conn: AsyncConnection,
    url: str,
    kinds: frozenset[str],
    *,
    tenant_id: str = "",
    next_leaf_index: int,
    entropy: Entropy,
    now_ns: int,
) -> Endpoint:
    """An endpoint that hears of entries from ``next_leaf_index`` on. Raises WebhookError."""
    if len(url) > URL_CHARS_MAX:
        raise WebhookError(f"a URL has at most {URL_CHARS_MAX} characters")
    if not kinds:
        raise WebhookError("an endpoint needs at least one kind of entry")
    if len(await endpoints(conn, tenant_id)) >= ENDPOINTS_MAX:
        raise WebhookError(f"there are {ENDPOINTS_MAX} endpoints already: remove one first")
    endpoint = Endpoint(new_id("whk", entropy), tenant_id, url, kinds, next_leaf_index, now_ns, "")
    await conn.execute(
        insert(webhook_endpoint).values(
            id=endpoint.endpoint_id,
            tenant_id=tenant_id or None,
            url=url,
            kinds=" ".join(sorted(kinds)),
            next_leaf_index=next_leaf_index,
            created_ns=now_ns,
        )
    )
    return endpoint


async def end_endpoint(conn: AsyncConnection, endpoint_id: str, reason: str, *, now_ns: int) -> Endpoint:
    """Nothing is sent to it any more. Raises WebhookError where it is not there or has ended before."""
    endpoint = await get_endpoint(conn, endpoint_id)
    done = await conn.execute(
        update(webhook_endpoint)
        .where(webhook_endpoint.c.id == endpoint_id, webhook_endpoint.c.ended_ns.is_(None))
        .values(ended_ns=now_ns, end_reason=reason)
    )
    if not done.rowcount:
        raise WebhookError(f"the endpoint {endpoint_id} has ended before: {endpoint.end_reason}")
    await conn.execute(
        update(webhook_delivery)
        .where(webhook_delivery.c.endpoint_id == endpoint_id, webhook_delivery.c.state == "pending")
        .values(state="dead", updated_ns=now_ns, last_error="the endpoint has ended")
    )
    return endpoint


async def get_endpoint(conn: AsyncConnection, endpoint_id: str) -> Endpoint:
    """Raises WebhookError."""
    row = (await conn.execute(select(webhook_endpoint).where(webhook_endpoint.c.id == endpoint_id))).one_or_none()
    if row is None:
        raise WebhookError(f"there is no webhook endpoint {endpoint_id!r}")
    return _endpoint(row)


async def endpoints(conn: AsyncConnection, tenant_id: str | None = None) -> list[Endpoint]:
    """The active ones, oldest first: of a tenant, of the operator (""), or all."""
    table = webhook_endpoint
    query = select(table).where(table.c.ended_ns.is_(None)).order_by(table.c.created_ns, table.c.id)
    if tenant_id is not None:
        query = query.where(table.c.tenant_id == tenant_id if tenant_id else table.c.tenant_id.is_(None))
    return [_endpoint(row) for row in await conn.execute(query)]


async def enqueue(
    conn: AsyncConnection,
    endpoint: Endpoint,
    events: Iterable[tuple[int, str]],
    *,
    next_leaf_index: int,
    entropy: Entropy,
    now_ns: int,
) -> int:
    """Deliveries of ``events`` (leaf index, kind), once, however many servers do this; how many are new."""
    table = webhook_endpoint
    moved = await conn.execute(
        update(table)
        .where(
            table.c.id == endpoint.endpoint_id,
            table.c.next_leaf_index == endpoint.next_leaf_index,
            table.c.ended_ns.is_(None),
        )
        .values(next_leaf_index=next_leaf_index)
    )
    rows = [
        {
            "id": new_id("dlv", entropy),
            "endpoint_id": endpoint.endpoint_id,
            "leaf_index": leaf_index,
            "kind": kind,
            "state": "pending",
            "num_attempts": 0,
            "next_attempt_ns": now_ns,
            "created_ns": now_ns,
            "updated_ns": now_ns,
            "last_error": "",
        }
        for leaf_index, kind in events
    ]
    if not moved.rowcount or not rows:
        return 0  # another server was first
    await conn.execute(insert(webhook_delivery), rows)
    return len(rows)


async def claim_due(conn: AsyncConnection, now_ns: int, limit: int) -> list[tuple[Endpoint, Delivery]]:
    """Pending deliveries whose time has come, claimed for CLAIM_S."""
    table = webhook_delivery
    due = await conn.execute(
        select(table)
        .where(table.c.state == "pending", table.c.next_attempt_ns <= now_ns)
        .order_by(table.c.next_attempt_ns, table.c.leaf_index)
        .limit(limit)
    )
    claimed = []
    for row in due.all():
        mine = await conn.execute(
            update(table)
            .where(table.c.id == row.id, table.c.state == "pending", table.c.next_attempt_ns == row.next_attempt_ns)
            .values(next_attempt_ns=now_ns + CLAIM_S * SECOND)
        )
        if mine.rowcount:
            claimed.append((await get_endpoint(conn, row.endpoint_id), _delivery(row)))
    return claimed


async def record_attempt(
    conn: AsyncConnection, delivery: Delivery, *, status: int | None, error: str, jitter: float, now_ns: int
) -> Delivery:
    """What an attempt came to: ``status`` is the receiver's, None without an answer; ``error`` says what was wrong
    otherwise. ``jitter`` in [0, 1) spreads the next attempt by a fifth to both sides. Returns the delivery as it is
    now. An attempt that meanwhile was resent or ended changes nothing."""
    num_attempts = delivery.num_attempts + 1
    delivered = status is not None and 200 <= status < 300
    dead = not delivered and (status == GONE or num_attempts >= NUM_ATTEMPTS_MAX)
    state = "delivered" if delivered else "dead" if dead else "pending"
    wait_ns = 0
    if state == "pending":
        wait_ns = int(RETRY_AFTER_S[num_attempts - 1] * SECOND * (0.8 + 0.4 * jitter))
    table = webhook_delivery
    await conn.execute(
        update(table)
        .where(
            table.c.id == delivery.delivery_id,
            table.c.state == "pending",
            table.c.num_attempts == delivery.num_attempts,
        )
        .values(
            state=state,
            num_attempts=num_attempts,
            next_attempt_ns=now_ns + wait_ns,
            updated_ns=now_ns,
            last_status=status,
            last_error="" if delivered else error[:ERROR_CHARS_MAX],
        )
    )
    return _delivery((await conn.execute(select(table).where(table.c.id == delivery.delivery_id))).one())


async def resend(conn: AsyncConnection, delivery_id: str, *, now_ns: int) -> Delivery:
    """Send it again, whatever became of it. Raises WebhookError where it or its endpoint is not there."""
    table = webhook_delivery
    endpoint = await get_endpoint(conn, (await get_delivery(conn, delivery_id)).endpoint_id)
    if endpoint.end_reason:
        raise WebhookError(f"the endpoint {endpoint.endpoint_id} has ended: {endpoint.end_reason}")
    await conn.execute(
        update(table)
        .where(table.c.id == delivery_id)
        .values(state="pending", num_attempts=0, next_attempt_ns=now_ns, updated_ns=now_ns)
    )
    return await get_delivery(conn, delivery_id)


async def get_delivery(conn: AsyncConnection, delivery_id: str) -> Delivery:
    """Raises WebhookError."""
    row = (await conn.execute(select(webhook_delivery).where(webhook_delivery.c.id == delivery_id))).one_or_none()
    if row is None:
        raise WebhookError(f"there is no delivery {delivery_id!r}")
    return _delivery(row)


async def deliveries(conn: AsyncConnection, *, endpoint_id: str = "", limit: int = 100) -> list[Delivery]:
    """The newest first."""
    table = webhook_delivery
    query = select(table).order_by(table.c.created_ns.desc(), table.c.leaf_index.desc()).limit(limit)
    if endpoint_id:
        query = query.where(table.c.endpoint_id == endpoint_id)
    return [_delivery(row) for row in await conn.execute(query)]


async def num_pending(conn: AsyncConnection) -> int:
    query = select(func.count()).select_from(webhook_delivery).where(webhook_delivery.c.state == "pending")
    return int((await conn.execute(query)).scalar_one())


async def forget_deliveries(conn: AsyncConnection, before_ns: int) -> None:
    """Delete those that ended before ``before_ns``; the events themselves stay in the log."""
    table = webhook_delivery
    await conn.execute(delete(table).where(table.c.state != "pending", table.c.updated_ns < before_ns))


def _endpoint(row: Row) -> Endpoint:  # type: ignore[type-arg]
    return Endpoint(
        row.id,
        row.tenant_id or "",
        row.url,
        frozenset(row.kinds.split()),
        row.next_leaf_index,
        row.created_ns,
        row.end_reason or "",
    )


def _delivery(row: Row) -> Delivery:  # type: ignore[type-arg]
    return Delivery(
        row.id,
        row.endpoint_id,
        row.leaf_index,
        row.kind,
        row.state,
        row.num_attempts,
        row.next_attempt_ns,
        row.created_ns,
        row.last_status,
        row.last_error,
    )
