"""The outbox: entries are written in the same transaction as the fact that they record.

Either both commit or neither does, so nothing can happen unlogged and nothing is logged that did not happen. A later
transaction (audit/log.py) moves the rows into the tree.
"""

from collections.abc import Callable

from sqlalchemy import insert
from sqlalchemy.ext.asyncio import AsyncConnection

from audit.commitment import NONCE_BYTES
from audit.entry import Entry
from audit.tables import outbox


async def append(conn: AsyncConnection, entry: Entry, *, entropy: Callable[[int], bytes]) -> None:
    """Record `entry` when the caller's transaction commits. `entropy` gives the commitment's nonce."""
    nonce = entropy(NONCE_BYTES)
    if len(nonce) != NONCE_BYTES:
        raise ValueError(f"entropy gave {len(nonce)} bytes instead of {NONCE_BYTES}")
    row = {
        "kind": entry.kind,
        "version": entry.version,
        "tenant_id": entry.tenant_id,
        "at_ns": entry.at_ns,
        "nonce": nonce,
        "body": entry.canonical_body(),
    }
    await conn.execute(_NEW, row)


_NEW = insert(outbox).inline()  # built once; nobody asks for the row's id
