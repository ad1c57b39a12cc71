"""The sequencer: outbox rows become leaves of the tree, and the new head is signed.

One call of `sequence` is one transaction of the caller's. In it: take the lock, read what waits, number it, extend
the frontier, sign, insert leaves and openings, delete the outbox rows. A crash between any two statements rolls back
all of them, so a row is sequenced exactly once; `log_leaf.outbox_id` is unique besides, and the database itself would
refuse a second time.

One sequencer at a time: before it reads what it will number, it updates the one row of log_state. That takes its row
lock on PostgreSQL and the write lock on SQLite; a second sequencer waits there and then sees the first one's result.

Order: rows are taken because they are still in the outbox, never because their id is above the last one seen.
PostgreSQL hands out ids before commit, so a low id may appear late; it then enters a later batch. Cause still comes
before effect: an entry written after another one had committed has the higher id, and is never visible without it.

Erasure is an entry too: when an `opening.erased` row is sequenced, the openings that it names are deleted in the same
transaction. Log and erasure therefore agree at every commit. (Freed database pages and backups are outside of this.)

Not known here: whether the database was restored from an old backup. `publish` finds that out, by comparing with the
checkpoint in its folder, and refuses.
"""

import asyncio
import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from sqlalchemy import bindparam, delete, insert, select, text, update
from sqlalchemy.dialects import postgresql, sqlite
from sqlalchemy.ext.asyncio import AsyncConnection

from audit.transparency import entry as entries
from audit.transparency.checkpoint import Checkpoint, sign_checkpoint
from audit.transparency.commitment import commit, leaf_bytes, pseudonym
from audit.transparency.keyring import Keyring
from audit.transparency.merkle import Frontier, leaf_hash
from audit.transparency.publish import LogForkError, publish
from audit.transparency.tables import checkpoint, log_leaf, log_opening, log_state, outbox

__all__ = ["BATCH_ROWS_MAX", "LogForkError", "SequencedBatch", "publish", "request_erasure", "sequence"]

BATCH_ROWS_MAX = 4_096  # bounds one transaction; what is left waits for the next call
PIECE_ROWS = 32  # leaves made at one go: requests wait for each piece, on the loop and in the database
ERASED_PER_ENTRY_MAX = entries.LIST_ITEMS_MAX

_LEAF_TYPES = {
    "leaf_index": "bigint",
    "outbox_id": "bigint",
    "kind": "text",
    "at_ns": "bigint",
    "pseudonym": "text",
    "leaf": "bytea",
}
_NEW_LEAVES = text(
    f"INSERT INTO log_leaf ({', '.join(_LEAF_TYPES)}) SELECT * FROM unnest("  # noqa: S608 - our own words
    + ", ".join(f"CAST(:{name} AS {kind}[])" for name, kind in _LEAF_TYPES.items())
    + ")"
)
_NEW = log_leaf.c.leaf_index >= bindparam("first_index")
_OPEN = insert(log_opening).from_select(
    ["leaf_index", "tenant_id", "nonce", "body"],
    select(log_leaf.c.leaf_index, outbox.c.tenant_id, outbox.c.nonce, outbox.c.body)
    .join(outbox, outbox.c.id == log_leaf.c.outbox_id)
    .where(_NEW),
)
_TAKE_OUT = delete(outbox).where(outbox.c.id.in_(select(log_leaf.c.outbox_id).where(_NEW)))


@dataclass(frozen=True, slots=True)
class SequencedBatch:
    first_index: int
    checkpoint: Checkpoint
    note: str  # the signed checkpoint

    @property
    def num_leaves(self) -> int:
        """How many leaves this batch added."""
        return self.checkpoint.size - self.first_index


async def sequence(
    conn: AsyncConnection,
    *,
    signer: Keyring,
    origin: str,
    now_ns: int,
    rows_max: int = BATCH_ROWS_MAX,
    pause_s: float = 0.0,
) -> SequencedBatch | None:
    """Move up to `rows_max` outbox rows into the tree and sign its head. None, without a write, if nothing waits.

    `pause_s`: between two pieces, where nobody but another sequencer waits for this transaction.
    """
    if (await conn.execute(select(outbox.c.id).limit(1))).first() is None:
        return None
    await _lock(conn)
    state = (await conn.execute(select(log_state.c.num_leaves, log_state.c.frontier))).one()
    rows = (await conn.execute(select(outbox).order_by(outbox.c.id).limit(rows_max))).all()
    if not rows:
        return None
    frontier = Frontier.load(state.num_leaves, state.frontier)
    first_index = frontier.size
    for first in range(0, len(rows), PIECE_ROWS):
        leaves = []
        for row in rows[first : first + PIECE_ROWS]:
            leaf = _leaf(row, frontier.size, signer.pseudonym_key)
            leaves.append(leaf)
            frontier.append(leaf_hash(leaf["leaf"]))
        await _insert(conn, leaves)
        await asyncio.sleep(pause_s)
    head = Checkpoint(origin, frontier.size, frontier.root())
    note = sign_checkpoint(head, signer.log, now_ns=now_ns)

    # What is moved stays in the database: these rows, and no others that have become visible meanwhile.
    await conn.execute(_OPEN, {"first_index": first_index})
    await _erase(conn, rows)
    deleted = await conn.execute(_TAKE_OUT, {"first_index": first_index})
    if deleted.rowcount != len(rows):
        raise RuntimeError(f"{len(rows)} outbox rows were read but {deleted.rowcount} deleted: rolling back")
    await conn.execute(update(log_state).values(num_leaves=frontier.size, frontier=frontier.dump()))
    await conn.execute(insert(checkpoint).values(num_leaves=head.size, root=head.root, at_ns=now_ns, note=note))
    return SequencedBatch(first_index, head, note)


def request_erasure(leaf_indexes: Sequence[int], *, reason: str, tenant_id: str, now_ns: int) -> list[entries.Entry]:
    """The entries to append so that the openings of these leaves are destroyed when they are sequenced."""
    texts = [str(index) for index in sorted(set(leaf_indexes))]
    return [
        entries.Entry(
            "opening.erased",
            tenant_id,
            now_ns,
            {"reason": reason, "leaf_indexes": texts[i : i + ERASED_PER_ENTRY_MAX]},
        )
        for i in range(0, len(texts), ERASED_PER_ENTRY_MAX)
    ]


async def _lock(conn: AsyncConnection) -> None:
    take = update(log_state).where(log_state.c.id == 1).values(num_runs=log_state.c.num_runs + 1)
    if (await conn.execute(take)).rowcount == 1:
        return
    first = {"id": 1, "num_runs": 0, "num_leaves": 0, "frontier": b""}
    dialect: Any = postgresql if conn.dialect.name == "postgresql" else sqlite
    await conn.execute(dialect.insert(log_state).values(first).on_conflict_do_nothing())
    await conn.execute(take)


async def _insert(conn: AsyncConnection, leaves: list[dict[str, Any]]) -> None:
    if conn.dialect.name != "postgresql":
        await conn.execute(insert(log_leaf), leaves)
        return
    # One statement with a list for each column: a third of the time of as many statements as there are rows.
    await conn.execute(_NEW_LEAVES, {name: [leaf[name] for leaf in leaves] for name in _LEAF_TYPES})


def _leaf(row: Any, index: int, pseudonym_key: bytes) -> dict[str, Any]:
    tenant = pseudonym(pseudonym_key, row.tenant_id)
    leaf = leaf_bytes(
        kind=row.kind, version=row.version, at_ns=row.at_ns, tenant=tenant, commitment=commit(row.nonce, row.body)
    )
    return {
        "leaf_index": index,
        "outbox_id": row.id,
        "kind": row.kind,
        "at_ns": row.at_ns,
        "pseudonym": tenant,
        "leaf": leaf,
    }


async def _erase(conn: AsyncConnection, rows: Sequence[Any]) -> None:
    """Delete the openings that receipts among `rows` name. Receipts themselves stay: they explain what is missing."""
    receipts = [json.loads(row.body) for row in rows if row.kind == "opening.erased"]
    for receipt in receipts:
        named = [int(text) for text in receipt["leaf_indexes"]]
        erasable = select(log_leaf.c.leaf_index).where(
            log_leaf.c.leaf_index.in_(named), log_leaf.c.kind != "opening.erased"
        )
        await conn.execute(delete(log_opening).where(log_opening.c.leaf_index.in_(erasable)))
