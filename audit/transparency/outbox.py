"""The outbox: entries are written in the same transaction as the fact that they record.

Either both commit or neither does, so nothing can happen unlogged and nothing is logged that did not happen. A later
transaction (audit/transparency/log.py) moves the rows into the tree.
"""

from collections.abc import Callable
from typing import Final

from sqlalchemy import insert
from sqlalchemy.ext.asyncio import AsyncConnection

from audit.transparency.commitment import NONCE_BYTES
from audit.transparency.entry import Entry
from audit.transparency.tables import outbox


async def append(conn: AsyncConnection, entry: Entry, *, entropy: Callable[[int], bytes]) -> None:
    """Record `entry` when the caller's transaction commits. `entropy` gives the commitment's nonce."""
    await conn.execute(_NEW, dict(zip(_COLUMNS, values_of(entry, entropy=entropy), strict=True)))


def values_of(entry: Entry, *, entropy: Callable[[int], bytes]) -> tuple[str | int | bytes, ...]:
    """The entry's row, for `append_where`."""
    nonce = entropy(NONCE_BYTES)
    if len(nonce) != NONCE_BYTES:
        raise ValueError(f"entropy gave {len(nonce)} bytes instead of {NONCE_BYTES}")
    return (entry.kind, entry.version, entry.tenant_id, entry.at_ns, nonce, entry.canonical_body())


def append_where(condition: str, first: int) -> str:
    """PostgreSQL's text that appends an entry for each row of `condition`, with its values in $first and following."""
    values = ", ".join(f"${first + number}::{kind}" for number, kind in enumerate(_TYPES))
    return f"INSERT INTO outbox ({', '.join(_COLUMNS)}) SELECT {values} FROM {condition}"  # noqa: S608 - our own words


_COLUMNS: Final = ("kind", "version", "tenant_id", "at_ns", "nonce", "body")
_TYPES: Final = ("text", "smallint", "text", "bigint", "bytea", "bytea")
_NEW = insert(outbox).inline()  # built once; nobody asks for the row's id
