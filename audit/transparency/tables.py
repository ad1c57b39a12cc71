"""The log's tables. Times and sizes are BIGINT; nothing here is a float.

outbox      entries written by business transactions, waiting for the sequencer; a row lives for seconds
log_leaf    the public leaves, dense indexes from 0, never changed
log_opening what opens a leaf's commitment (nonce and body); deleting a row is erasure
log_state   one row: tree size and frontier, and the lock that lets one sequencer work at a time
checkpoint  every signed tree head

A server may change no row but log_state's, and delete those of outbox and log_opening only: `Table.info` says so, and
the hall makes grants of it on PostgreSQL.

On PostgreSQL, in a transaction that is bound to a tenant (`bulkhead.tenant`, set by the hall), entries of others are
not there; those that concern no tenant are.
"""

from typing import Final

from sqlalchemy import (
    DDL,
    BigInteger,
    Column,
    ForeignKey,
    Index,
    Integer,
    LargeBinary,
    MetaData,
    SmallInteger,
    Table,
    Text,
    event,
)

metadata = MetaData(
    naming_convention={
        "ix": "ix_%(column_0_label)s",
        "uq": "uq_%(table_name)s_%(column_0_name)s",
        "ck": "ck_%(table_name)s_%(constraint_name)s",
        "fk": "fk_%(table_name)s_%(column_0_name)s_%(referred_table_name)s",
        "pk": "pk_%(table_name)s",
    }
)

outbox = Table(
    "outbox",
    metadata,
    # AUTOINCREMENT on SQLite: without it the id of a deleted row is given out again.
    Column("id", BigInteger().with_variant(Integer, "sqlite"), primary_key=True, autoincrement=True),
    Column("kind", Text, nullable=False),
    Column("version", SmallInteger, nullable=False),
    Column("tenant_id", Text, nullable=False),  # "" = none
    Column("at_ns", BigInteger, nullable=False),
    Column("nonce", LargeBinary, nullable=False),  # 32 random bytes
    Column("body", LargeBinary, nullable=False),  # canonical JSON
    sqlite_autoincrement=True,
    info={"changed": (), "deleted": True},
)

log_leaf = Table(
    "log_leaf",
    metadata,
    Column("leaf_index", BigInteger, primary_key=True, autoincrement=False),
    Column("outbox_id", BigInteger, nullable=False, unique=True),  # no entry can be sequenced twice
    Column("kind", Text, nullable=False),
    Column("at_ns", BigInteger, nullable=False),
    Column("pseudonym", Text, nullable=False),
    Column("leaf", LargeBinary, nullable=False),  # the bytes that are hashed into the tree
    Index("ix_log_leaf_kind_at_ns", "kind", "at_ns"),
    Index("ix_log_leaf_at_ns", "at_ns"),
    info={"changed": ()},
)

log_opening = Table(
    "log_opening",
    metadata,
    Column("leaf_index", BigInteger, ForeignKey(log_leaf.c.leaf_index), primary_key=True, autoincrement=False),
    Column("tenant_id", Text, nullable=False),
    Column("nonce", LargeBinary, nullable=False),
    Column("body", LargeBinary, nullable=False),
    info={"changed": (), "deleted": True},
)

log_state = Table(
    "log_state",
    metadata,
    Column("id", SmallInteger, primary_key=True, autoincrement=False),  # always 1
    Column("num_runs", BigInteger, nullable=False),  # updating it takes the lock
    Column("num_leaves", BigInteger, nullable=False),
    Column("frontier", LargeBinary, nullable=False),  # roots of the perfect subtrees, left to right, 32 bytes each
)

checkpoint = Table(
    "checkpoint",
    metadata,
    Column("num_leaves", BigInteger, primary_key=True, autoincrement=False),
    Column("root", LargeBinary, nullable=False),
    Column("at_ns", BigInteger, nullable=False),
    Column("note", Text, nullable=False),  # the signed note, as published
    info={"changed": ()},
)

OF_TENANTS: Final = (outbox, log_opening)


def row_security_ddl(table: Table) -> list[str]:
    """The statements that hide other tenants' rows, to run one by one, on PostgreSQL only."""
    name, bound = table.name, "coalesce(current_setting('bulkhead.tenant', true), '')"
    return [
        f"ALTER TABLE {name} ENABLE ROW LEVEL SECURITY",
        f"ALTER TABLE {name} FORCE ROW LEVEL SECURITY",
        f"CREATE POLICY {name}_of_tenant ON {name} USING ({bound} = '' OR tenant_id IN ('', {bound}))",
    ]


for _table in OF_TENANTS:
    for _statement in row_security_ddl(_table):
        _ddl = DDL(_statement.replace("%", "%%"))  # type: ignore[no-untyped-call]  # it formats with %
        event.listen(_table, "after_create", _ddl.execute_if(dialect="postgresql"))
