"""Gateways on one database must have the same secrets: one log has one key, and a key's HMAC one pepper.

Looked at by the log's last checkpoint: the signing keys lie in the same folder as the others.
"""

from pathlib import Path

from sqlalchemy import select
from sqlalchemy.ext.asyncio import AsyncConnection

from audit.transparency.checkpoint import parse_note
from audit.transparency.keyring import Keyring
from audit.transparency.tables import checkpoint


class ForeignKeysError(Exception):
    """The database's log is signed with other keys than those of this gateway; the message says what to do."""


async def require_same_keys(conn: AsyncConnection, keyring: Keyring, folder: Path) -> None:
    """Raises ForeignKeysError."""
    newest = select(checkpoint.c.note).order_by(checkpoint.c.num_leaves.desc()).limit(1)
    note = await conn.scalar(newest)
    if note is None:
        return
    signers = {line.key_id for line in parse_note(note).signatures}
    if keyring.log.ed25519_id not in signers:
        raise ForeignKeysError(
            f"the log in this database is signed with other keys than those in {folder}:"
            " all gateways of a database need the same secrets; copy that folder from a gateway that has them,"
            " or name it with BULKHEAD_SECRETS_DIR, and check BULKHEAD_LOG_ORIGIN"
        )
