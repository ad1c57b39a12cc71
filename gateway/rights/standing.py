"""By what append-only and the wall between tenants are held, for the role that the server connects as.

rights    the role owns nothing and may do no more than is declared: to change what is written takes another role
triggers  the database refuses changes, but the role could take the triggers away
nothing   triggers are missing or switched off, and the role's rights do not make up for it

Asked of the database's own catalogue, rights through PUBLIC and other roles included: what the owner granted is one
thing, what somebody granted since another.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Final, Literal

import structlog
from sqlalchemy import text
from sqlalchemy.ext.asyncio import AsyncConnection

from gateway.database import Database
from gateway.rights.declared import (
    CALLED_FUNCTIONS,
    OUR_FUNCTIONS,
    append_only_tables,
    declared,
    walled_tables,
)

HOW_TO: Final = "docs/operations.md, The database roles, says how to serve as a role that owns nothing"
NAMED_MAX = 8  # of what is wrong, in one line
POWERFUL: Final = ("pg_execute_server_program", "pg_write_server_files")  # whoever has these writes the tables' files

HeldBy = Literal["rights", "triggers", "nothing"]

log = structlog.get_logger(__name__)


@dataclass(frozen=True, slots=True)
class Standing:
    """`excess`: what the role is or may do beyond what is declared. `missing`: what it may not and has to. Both in
    words; empty and without meaning on SQLite, which has no roles."""

    role: str  # "" on SQLite
    excess: tuple[str, ...] = ()
    missing: tuple[str, ...] = ()
    unguarded: tuple[str, ...] = ()  # append-only tables without all their triggers
    unwalled: tuple[str, ...] = ()  # why row-level security does not hold

    @property
    def append_only(self) -> HeldBy:
        if self.role and not self.excess:
            return "rights"
        return "nothing" if self.unguarded else "triggers"

    @property
    def row_security(self) -> bool:
        return bool(self.role) and not self.unwalled

    def sentence(self) -> str:
        """For a person, in one line."""
        if not self.role:
            if self.unguarded:
                return f"append-only is held by nothing: SQLite lacks triggers of {_some(self.unguarded)}"
            return "append-only is held by triggers: SQLite has no roles"
        if self.append_only == "rights":
            return f"append-only is held by rights: {self.role} owns nothing and may not change what is written"
        why = f"{self.role} {_some(self.excess)}"
        if self.append_only == "triggers":
            return f"append-only is held by triggers only: {why}. {HOW_TO}"
        return f"append-only is held by nothing: {_some(self.unguarded)} lack their triggers, and {why}. {HOW_TO}"


class NoTablesError(Exception):
    """There is nothing to have rights to."""


class StandingWatch:
    """What was seen last, and what is said when it changes."""

    def __init__(self, database: Database) -> None:
        self._database = database
        self.seen: Standing | None = None

    async def look(self) -> Standing:
        """Raises DatabaseUnavailableError."""
        async with self._database.read() as conn:
            found = await standing(conn)
        if found != self.seen:
            self.seen = found
            _tell(found)
        return found


def _tell(found: Standing) -> None:
    if found.append_only == "nothing":
        log.error("rights.append_only", held_by="nothing", why=found.sentence())
    elif found.role and found.append_only == "triggers":
        log.warning("rights.append_only", held_by="triggers", why=found.sentence())
    else:
        log.info("rights.append_only", held_by=found.append_only)
    if found.append_only == "rights" and found.unguarded:
        log.warning("rights.triggers", missing=found.unguarded)  # the owner's own mistakes are not refused any more
    if found.role and found.unwalled:
        log.warning("rights.row_security", holds=False, why=f"{found.role} {_some(found.unwalled)}. {HOW_TO}")


async def standing(conn: AsyncConnection) -> Standing:
    """Of the role of this connection. Raises NoTablesError, on PostgreSQL."""
    if conn.dialect.name == "sqlite":
        return Standing("", unguarded=_without(3, await conn.execute(_SQLITE_TRIGGERS)))
    who = (await conn.execute(_POWERS, {"powerful": list(POWERFUL)})).one()
    is_superuser = bool(who.rolsuper)
    here = await conn.scalar(_HERE)
    if here is None:
        raise NoTablesError(f"{who.rolname} finds no tables: run bulkhead migrate (docs/operations.md)")
    names = {"here": here, "tables": list(declared()), "functions": list(OUR_FUNCTIONS)}
    on_tables = {(row.relname, row.privilege): row.so for row in await conn.execute(_ON_TABLES, names)}
    on_columns = [tuple(row) for row in await conn.execute(_ON_COLUMNS, names)]
    sequences = (await conn.execute(_ON_SEQUENCES, names)).all()
    functions = (await conn.execute(_ON_FUNCTIONS, names | {"functions": list(CALLED_FUNCTIONS)})).all()

    excess = [word for power, word in _POWER_WORDS.items() if getattr(who, power)]
    if not is_superuser:  # of whom all the rest is true, too
        owned = [f"owns {what}" for what in (await conn.execute(_OWNED, names)).scalars()]
        excess += [f"has the rights of {other}" for other in who.others]
        excess += owned
        excess += [f"may create in the schema {name}" for name in (await conn.execute(_SCHEMA, names)).scalars()]
        if "owns the tables" not in owned:  # whose owner may do everything
            excess += _excess(on_tables, on_columns)
        excess += [f"may set {name}" for name, _, sets in sequences if sets]
        excess += [f"runs {name} with its owner's rights" for name, _, definer in functions if definer]

    missing = _missing(on_tables, on_columns)
    missing += [f"USAGE on {name}" for name, uses, _ in sequences if not uses]
    missing += [f"EXECUTE on {name}" for name, runs, _ in functions if not runs]

    unwalled = ["is a superuser"] if is_superuser else ["has BYPASSRLS"] if who.rolbypassrls else []
    bare = (await conn.execute(_WITHOUT_WALL, names | {"walled": sorted(walled_tables())})).scalars()
    unwalled += [f"sees all of {name}, which has no row-level security" for name in bare]

    unguarded = _without(2, await conn.execute(_POSTGRES_TRIGGERS, names))
    return Standing(who.rolname, tuple(excess), tuple(missing), unguarded, tuple(unwalled))


def _excess(on_tables: dict[tuple[str, str], bool], on_columns: list[tuple[str, str, str]]) -> list[str]:
    rights = declared()
    beyond = {one for one, so in on_tables.items() if so and one[1] not in rights[one[0]].on_table}
    found = [f"may {privilege} {name}" for name, privilege in sorted(beyond)]
    for name, column, privilege in on_columns:
        allowed = privilege == "UPDATE" and (column in rights[name].changed or "UPDATE" in rights[name].on_table)
        if not allowed and (name, privilege) not in beyond:  # else it was said
            found.append(f"may {privilege} {name}.{column}")
    return found


def _missing(on_tables: dict[tuple[str, str], bool], on_columns: list[tuple[str, str, str]]) -> list[str]:
    there = {name for name, _ in on_tables}
    updates = {(name, column) for name, column, privilege in on_columns if privilege == "UPDATE"}
    found = []
    for name, rights in declared().items():
        found += [f"{one} on {name}" for one in sorted(rights.on_table) if not on_tables.get((name, one), False)]
        if name in there:
            found += [f"UPDATE on {name}.{one}" for one in sorted(rights.changed) if (name, one) not in updates]
    return found


def _without(number: int, triggers: Iterable[Any]) -> tuple[str, ...]:
    there = {str(name): int(count) for name, count in triggers}
    return tuple(name for name in sorted(append_only_tables()) if there.get(name, 0) < number)


def _some(words: tuple[str, ...]) -> str:
    more = len(words) - NAMED_MAX
    return ", ".join(words[:NAMED_MAX]) + (f" and {more} more" if more > 0 else "")


# The schema is where the tables are found, as every statement finds them.
_HERE: Final = text("""
    SELECT quote_ident(n.nspname) FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace
    WHERE c.oid = to_regclass('hold')
""")
_POWER_WORDS: Final = {
    "rolsuper": "is a superuser",
    "rolbypassrls": "has BYPASSRLS",
    "rolcreaterole": "has CREATEROLE",
    "rolreplication": "has REPLICATION",
}
_POWERS: Final = text(
    "SELECT rolname, rolsuper, rolbypassrls, rolcreaterole, rolreplication,"
    " ARRAY(SELECT p.rolname FROM pg_roles p"
    "   WHERE p.rolname = ANY(:powerful) AND pg_has_role(r.oid, p.oid, 'MEMBER')) AS others"
    " FROM pg_roles r WHERE rolname = current_user"
)
# By itself or through another role: MEMBER also where it would have to SET ROLE first.
_OWNED: Final = text("""
    SELECT DISTINCT what FROM (
        SELECT 'the database' AS what, datdba AS owner FROM pg_database WHERE datname = current_database()
        UNION ALL SELECT 'the schema', nspowner FROM pg_namespace WHERE oid = to_regnamespace(:here)
        UNION ALL SELECT 'the tables', relowner FROM pg_class
            WHERE relnamespace = to_regnamespace(:here) AND relname = ANY(:tables)
        UNION ALL SELECT 'the functions', proowner FROM pg_proc
            WHERE pronamespace = to_regnamespace(:here) AND proname = ANY(:functions)
    ) owned WHERE pg_has_role(current_user, owner, 'MEMBER') ORDER BY 1
""")
_SCHEMA: Final = text("""
    SELECT nspname FROM pg_namespace
    WHERE oid = to_regnamespace(:here) AND has_schema_privilege(current_user, oid, 'CREATE')
""")
_ON_TABLES: Final = text("""
    SELECT c.relname, p.privilege, has_table_privilege(current_user, c.oid, p.privilege) AS so
    FROM pg_class c
    CROSS JOIN unnest(ARRAY['SELECT', 'INSERT', 'UPDATE', 'DELETE', 'TRUNCATE', 'REFERENCES', 'TRIGGER']) p(privilege)
    WHERE c.relnamespace = to_regnamespace(:here) AND c.relkind = 'r' AND c.relname = ANY(:tables)
""")
_ON_COLUMNS: Final = text("""
    SELECT c.relname, a.attname, p.privilege FROM pg_class c
    JOIN pg_attribute a ON a.attrelid = c.oid AND a.attnum > 0 AND NOT a.attisdropped
    CROSS JOIN unnest(ARRAY['UPDATE', 'REFERENCES']) p(privilege)
    WHERE c.relnamespace = to_regnamespace(:here) AND c.relkind = 'r' AND c.relname = ANY(:tables)
      AND has_column_privilege(current_user, c.oid, a.attnum, p.privilege)
    ORDER BY 1, 2, 3
""")
_ON_SEQUENCES: Final = text("""
    SELECT s.relname, has_sequence_privilege(current_user, s.oid, 'USAGE'),
           has_sequence_privilege(current_user, s.oid, 'UPDATE')
    FROM pg_class s
    JOIN pg_depend d ON d.objid = s.oid AND d.classid = 'pg_class'::regclass AND d.deptype IN ('a', 'i')
    JOIN pg_class t ON t.oid = d.refobjid
    WHERE s.relkind = 'S' AND t.relnamespace = to_regnamespace(:here) AND t.relname = ANY(:tables)
""")
_ON_FUNCTIONS: Final = text("""
    SELECT proname, has_function_privilege(current_user, oid, 'EXECUTE'), prosecdef FROM pg_proc
    WHERE pronamespace = to_regnamespace(:here) AND proname = ANY(:functions)
""")
_WITHOUT_WALL: Final = text("""
    SELECT relname FROM pg_class WHERE relnamespace = to_regnamespace(:here) AND relname = ANY(:walled)
      AND NOT (relrowsecurity AND relforcerowsecurity) ORDER BY 1
""")
_POSTGRES_TRIGGERS: Final = text("""
    SELECT c.relname, count(*) FROM pg_trigger t JOIN pg_class c ON c.oid = t.tgrelid
    WHERE c.relnamespace = to_regnamespace(:here) AND t.tgenabled IN ('O', 'A')
      AND t.tgname IN (c.relname || '_no_change', c.relname || '_no_truncate')
    GROUP BY 1
""")
_SQLITE_TRIGGERS: Final = text("""
    SELECT tbl_name, count(*) FROM sqlite_master
    WHERE type = 'trigger' AND name IN (tbl_name || '_no_update', tbl_name || '_no_delete', tbl_name || '_no_insert')
    GROUP BY 1
""")
