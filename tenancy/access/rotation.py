"""Rotation: a new key that may do what the old one may, and an end for the old one.

    old   ------------------------------>|            [created, now + overlap), sooner where it had to end sooner
    new                    |------------------->      [now, its own expiry)

In the overlap both work, so no request fails while clients change over. Both have the old key's own limits, counted
apart: for that time a limit of the key, unlike those of its project and tenant, counts twice.
"""

from dataclasses import dataclass
from typing import Final

from sqlalchemy import update
from sqlalchemy.ext.asyncio import AsyncConnection

from tenancy import tables
from tenancy.access.keys import MintedKey, get_key, mint_key
from tenancy.ids import Entropy
from tenancy.money import require_int
from tenancy.quotas.limits import get_limits, set_limits

OVERLAP_NS_MAX: Final = 90 * 86_400 * 10**9


class RotationError(ValueError):
    """The key cannot be rotated as asked; the message says why."""


@dataclass(frozen=True, slots=True)
class Rotated:
    minted: MintedKey
    project_id: str
    old_expires_ns: int
    expires_ns: int | None  # of the new key


async def rotate_key(
    conn: AsyncConnection,
    key_id: str,
    *,
    overlap_ns: int,
    pepper: bytes,
    entropy: Entropy,
    now_ns: int,
    expires_ns: int | None = None,
) -> Rotated:
    """Mint the successor of a live key. Without `expires_ns` it keeps the old key's expiry.

    Raises UnknownKeyIdError, RotationError for a dead key or an overlap that is no time or too long, ValueError for an
    expiry in the past.
    """
    if not 0 <= require_int(overlap_ns, "overlap_ns") <= OVERLAP_NS_MAX:
        raise RotationError(f"the overlap must be between 0 and {OVERLAP_NS_MAX} ns: {overlap_ns}")
    old = await get_key(conn, key_id)
    if old.state(now_ns) != "active":
        raise RotationError(f"key {key_id} is {old.state(now_ns)}: create a new one instead")
    end_ns = now_ns + overlap_ns
    old_expires_ns = end_ns if old.expires_ns is None else min(old.expires_ns, end_ns)
    table = tables.api_key
    ended = await conn.execute(
        update(table).where(table.c.id == key_id, table.c.revoked_ns.is_(None)).values(expires_ns=old_expires_ns)
    )
    if ended.rowcount == 0:  # revoked meanwhile: it must not live on in a successor
        raise RotationError(f"key {key_id} is revoked: create a new one instead")
    new_expires_ns = old.expires_ns if expires_ns is None else expires_ns
    minted = await mint_key(
        conn,
        old.project_id,
        old.name,
        old.scopes,
        pepper=pepper,
        entropy=entropy,
        now_ns=now_ns,
        expires_ns=new_expires_ns,
        rules=old.rules,
    )
    own = (await get_limits(conn, [key_id])).get(key_id)
    if own is not None:
        await set_limits(
            conn,
            "key",
            minted.key_id,
            requests_per_minute=own.requests_per_minute,
            tokens_per_minute=own.tokens_per_minute,
            concurrency_max=own.concurrency_max,
            tokens_per_day=own.tokens_per_day,
            shadow=own.shadow,
            now_ns=now_ns,
        )
    return Rotated(minted, old.project_id, old_expires_ns, new_expires_ns)
