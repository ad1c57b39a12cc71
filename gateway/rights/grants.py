"""Grants for the role that the server connects as: what is declared, and nothing else.

The owner of the tables gives them after each migration, in the migration's own transaction: a server that runs
meanwhile never lacks a right, and a new table is never there without its grants. A role that was given them once is
found again by its right to add holds, so that nobody has to name it at each upgrade.

What this cannot take away (the role is a superuser's, owns something, has rights through another role) is what
gateway/rights/standing.py finds.
"""

from sqlalchemy import Connection, text

from gateway.rights.declared import CALLED_FUNCTIONS, declared

MARK = "hold"  # a role that may add to it without being its owner serves


class RoleError(Exception):
    """The role cannot be given the server's rights; the message says why, and what to do."""


def renew_grants(connection: Connection, role: str = "") -> list[str]:
    """Give every role that serves its rights, and `role` if it is named; which they were. As the tables' owner, in the
    caller's transaction. Raises RoleError."""
    if connection.dialect.name != "postgresql":
        if role:
            raise RoleError("SQLite has no roles: --serving-role is for PostgreSQL (BULKHEAD_DATABASE_URL)")
        return []
    if role:
        _require_fit(connection, role)
    roles = sorted({*_serving_roles(connection), *([role] if role else [])})
    for one in roles:
        _grant(connection, one)
    return roles


def _serving_roles(connection: Connection) -> list[str]:
    query = text(
        "SELECT DISTINCT pg_get_userbyid(a.grantee) FROM pg_class c, aclexplode(c.relacl) a"
        " WHERE c.oid = to_regclass(:mark) AND a.privilege_type = 'INSERT' AND a.grantee NOT IN (0, c.relowner)"
    )
    return [str(name) for name in connection.execute(query, {"mark": MARK}).scalars()]


def _require_fit(connection: Connection, role: str) -> None:
    query = text("SELECT rolsuper, pg_has_role(rolname, current_user, 'MEMBER') FROM pg_roles WHERE rolname = :role")
    found = connection.execute(query, {"role": role}).first()
    owner = connection.execute(text("SELECT current_user")).scalar_one()
    if found is None:
        raise RoleError(f"there is no role {role}: CREATE ROLE {role} LOGIN; with a password, then run this again")
    is_superuser, is_owner = found
    if is_superuser:
        raise RoleError(f"{role} is a superuser, whom no grant limits: name a role that is not")
    if is_owner:
        raise RoleError(
            f"{role} is {owner}, who owns the tables, or a member of it: name a role for the server alone,"
            " and connect as the owner here (BULKHEAD_MIGRATION_DATABASE_URL)"
        )


def _grant(connection: Connection, role: str) -> None:
    quote = connection.dialect.identifier_preparer.quote_identifier
    who, from_all = quote(role), f"PUBLIC, {quote(role)}"

    def run(statement: str) -> None:
        connection.exec_driver_sql(statement)

    schema = connection.execute(text("SELECT current_schema()")).scalar_one()
    may = text("SELECT has_schema_privilege(:role, :schema, 'USAGE'), has_schema_privilege(:role, :schema, 'CREATE')")
    may_use, may_create = connection.execute(may, {"role": role, "schema": schema}).one()
    if not may_use:
        run(f"GRANT USAGE ON SCHEMA {quote(schema)} TO {who}")
    if may_create:
        run(f"REVOKE CREATE ON SCHEMA {quote(schema)} FROM {from_all}")
    there = text("SELECT relname FROM pg_class WHERE relnamespace = CAST(:schema AS regnamespace) AND relkind = 'r'")
    tables = set(connection.execute(there, {"schema": quote(schema)}).scalars())
    for name, rights in declared().items():
        if name not in tables:
            continue
        table = f"{quote(schema)}.{quote(name)}"
        run(f"REVOKE ALL ON {table} FROM {from_all}")  # with it, all rights on single columns
        run(f"GRANT {', '.join(sorted(rights.on_table))} ON {table} TO {who}")
        if rights.changed:
            columns = ", ".join(quote(column) for column in sorted(rights.changed))
            run(f"GRANT UPDATE ({columns}) ON {table} TO {who}")
    for sequence in _sequences(connection, schema):
        run(f"REVOKE ALL ON SEQUENCE {sequence} FROM {from_all}")
        run(f"GRANT USAGE ON SEQUENCE {sequence} TO {who}")
    for function in _functions(connection, schema):
        run(f"REVOKE ALL ON FUNCTION {function} FROM {from_all}")
        run(f"GRANT EXECUTE ON FUNCTION {function} TO {who}")


def _sequences(connection: Connection, schema: str) -> list[str]:
    """Those that number our tables' rows, as SQL names them."""
    query = text(
        "SELECT s.oid::regclass::text FROM pg_class s"
        " JOIN pg_depend d ON d.objid = s.oid AND d.classid = 'pg_class'::regclass AND d.deptype IN ('a', 'i')"
        " JOIN pg_class t ON t.oid = d.refobjid JOIN pg_namespace n ON n.oid = t.relnamespace"
        " WHERE s.relkind = 'S' AND n.nspname = :schema AND t.relname = ANY(:names)"
    )
    return list(connection.execute(query, {"schema": schema, "names": list(declared())}).scalars())


def _functions(connection: Connection, schema: str) -> list[str]:
    query = text(
        "SELECT p.oid::regprocedure::text FROM pg_proc p JOIN pg_namespace n ON n.oid = p.pronamespace"
        " WHERE n.nspname = :schema AND p.proname = ANY(:names)"
    )
    return list(connection.execute(query, {"schema": schema, "names": list(CALLED_FUNCTIONS)}).scalars())
