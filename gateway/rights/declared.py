"""What the server needs of each table, from what both rooms say of their tables in `Table.info`.

append_only  rows are added and read                   (tenancy/tables.py make_append_only, with triggers)
changed      the columns that are changed; none named: all, of a table that is not append-only
deleted      rows are deleted

So a table that is added later has its rights by what it is, and nobody has to think of it.
"""

from dataclasses import dataclass
from functools import cache
from typing import Final

from sqlalchemy import Table

from audit.transparency import tables as audit_tables
from tenancy import rights as rights  # and with it all tables that are in the same metadata
from tenancy import row_security
from tenancy import tables as tenancy_tables
from tenancy.accounts.one_trip import FUNCTIONS

REVISION_TABLE: Final = "alembic_version"
TRIGGER_FUNCTION: Final = "tenancy_refuse_change"
OUR_FUNCTIONS: Final = (*FUNCTIONS, TRIGGER_FUNCTION)
CALLED_FUNCTIONS: Final = FUNCTIONS


@dataclass(frozen=True, slots=True)
class Rights:
    """On the whole table, and UPDATE of single columns where it is not among those."""

    on_table: frozenset[str]
    changed: frozenset[str] = frozenset()


@cache
def declared() -> dict[str, Rights]:
    """By the table's name; what is not here is none of ours."""
    found = {table.name: rights_of(table) for table in _tables()}
    return found | {REVISION_TABLE: Rights(frozenset({"SELECT"}))}


@cache
def append_only_tables() -> frozenset[str]:
    """Those that triggers hold, too."""
    return frozenset(table.name for table in _tables() if table.info.get("append_only"))


@cache
def walled_tables() -> frozenset[str]:
    """Those behind row-level security."""
    return frozenset(table.name for table in (*row_security.RULES, *audit_tables.OF_TENANTS))


def _tables() -> list[Table]:
    return [*tenancy_tables.metadata.sorted_tables, *audit_tables.metadata.sorted_tables]


def rights_of(table: Table) -> Rights:
    """From what its room says of it."""
    changed = table.info.get("changed")
    deleted = bool(table.info.get("deleted"))
    on_table = {"SELECT", "INSERT"}
    if table.info.get("append_only"):
        assert not changed, f"{table.name} is append-only: nothing of it is changed"
        assert not deleted, f"{table.name} is append-only: nothing of it is deleted"
        return Rights(frozenset(on_table))
    assert changed is None or set(changed) <= set(table.c.keys()), f"{table.name} has no such columns: {changed}"
    if changed is None:
        on_table.add("UPDATE")
    if deleted:
        on_table.add("DELETE")
    return Rights(frozenset(on_table), frozenset(changed or ()))
