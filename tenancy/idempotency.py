"""Idempotency keys: a tenant's own name for a request, so that sending it again neither runs nor bills it again.

    claim    in the request's first transaction, beside its hold: of two at once one gets it
    retain   when the answer is whole; it is given again until the claim expires
    drop     when the request cost nothing and has no answer: the key is free again

Whether a claimed request still runs is not written here: its hold says so (`Claimed.hold_state`), and that one is
settled by whoever is left after a crash. So nothing has to be repaired: a claim whose hold was captured and that has no
answer is lost, and stays a refusal until it expires, because running it again would bill it twice.
"""

from dataclasses import dataclass
from typing import Final

from sqlalchemy import ColumnElement, delete, func, select, update
from sqlalchemy.dialects import postgresql, sqlite
from sqlalchemy.ext.asyncio import AsyncConnection

from tenancy import tables
from tenancy.accounts.ledger import HoldState
from tenancy.money import require_int

KEY_CHARS_MAX: Final = 255


class TooManyKeysError(Exception):
    """The tenant has as many claims as it may have; they end by expiring."""


@dataclass(frozen=True, slots=True)
class IdempotencyKey:
    """`fingerprint` is a digest of the route and body: the same key may not come with another one."""

    tenant_id: str
    key: str
    fingerprint: bytes


@dataclass(frozen=True, slots=True)
class Claimed:
    request_id: str
    fingerprint: bytes
    content_type: str | None
    answer: bytes | None  # None: not there yet, or lost
    hold_state: HoldState
    captured_nano_usd: int
    settled_ns: int | None  # None while it runs


async def find_claim(conn: AsyncConnection, key: IdempotencyKey, now_ns: int) -> Claimed | None:
    hold = tables.hold
    query = (
        select(
            _TABLE.c.request_id,
            _TABLE.c.fingerprint,
            _TABLE.c.content_type,
            _TABLE.c.answer,
            hold.c.state,
            func.coalesce(hold.c.captured_nano_usd, 0),
            hold.c.settled_ns,
        )
        .join(hold, hold.c.request_id == _TABLE.c.request_id)
        .where(_TABLE.c.tenant_id == key.tenant_id, _TABLE.c.key == key.key, _TABLE.c.expires_ns > now_ns)
    )
    row = (await conn.execute(query)).first()
    return None if row is None else Claimed(*row)


async def claim(
    conn: AsyncConnection, key: IdempotencyKey, request_id: str, *, now_ns: int, expires_ns: int, keys_max: int
) -> bool:
    """False where another request has the key. Raises TooManyKeysError."""
    if require_int(expires_ns, "expires_ns") <= require_int(now_ns, "now_ns"):
        raise ValueError(f"expires_ns must be later than now ({now_ns}): {expires_ns}")
    mine = _TABLE.c.tenant_id == key.tenant_id
    await conn.execute(delete(_TABLE).where(mine, _TABLE.c.key == key.key, _TABLE.c.expires_ns <= now_ns))
    num_keys = await conn.scalar(select(func.count()).select_from(_TABLE).where(mine)) or 0
    dialect = postgresql if conn.dialect.name == "postgresql" else sqlite
    row = {
        "tenant_id": key.tenant_id,
        "key": key.key,
        "request_id": request_id,
        "fingerprint": key.fingerprint,
        "created_ns": now_ns,
        "expires_ns": expires_ns,
    }
    made = await conn.execute(
        dialect.insert(_TABLE).values(row).on_conflict_do_nothing(index_elements=["tenant_id", "key"])
    )
    if made.rowcount == 0:
        return False
    if num_keys >= keys_max:
        raise TooManyKeysError(f"{key.tenant_id} has {num_keys} idempotency keys")
    return True


async def retain(conn: AsyncConnection, key: IdempotencyKey, request_id: str, content_type: str, answer: bytes) -> None:
    """Keep a whole answer. Nothing happens where the claim is gone."""
    await conn.execute(update(_TABLE).where(*_of(key, request_id)).values(content_type=content_type, answer=answer))


async def drop(conn: AsyncConnection, key: IdempotencyKey, request_id: str) -> None:
    """Free the key of a request that has no answer."""
    await conn.execute(delete(_TABLE).where(*_of(key, request_id), _TABLE.c.answer.is_(None)))


async def forget_expired(conn: AsyncConnection, now_ns: int) -> int:
    """Delete claims that have expired, with their answers; how many."""
    return int((await conn.execute(delete(_TABLE).where(_TABLE.c.expires_ns <= now_ns))).rowcount)


async def forget_tenant(conn: AsyncConnection, tenant_id: str) -> None:
    await conn.execute(delete(_TABLE).where(_TABLE.c.tenant_id == tenant_id))


def _of(key: IdempotencyKey, request_id: str) -> tuple[ColumnElement[bool], ...]:
    return _TABLE.c.tenant_id == key.tenant_id, _TABLE.c.key == key.key, _TABLE.c.request_id == request_id


_TABLE: Final = tables.idempotency_key
