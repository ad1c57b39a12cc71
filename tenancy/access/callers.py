"""Who presents a key, and the limits that it is counted in: one statement for both."""

from types import SimpleNamespace
from typing import Any, Final

from sqlalchemy import Select
from sqlalchemy.ext.asyncio import AsyncConnection

from tenancy import tables
from tenancy.access.keys import PresentedKey, Principal, by_public_id, principal_of
from tenancy.quotas.limits import ScopeLimits, chain_of, limits_of

_LIMIT: Final = tables.scope_limit.alias("of_scope")
_PREFIX: Final = "scope_"


async def identify(
    conn: AsyncConnection, key: PresentedKey, *, now_ns: int, peer: str | None = None
) -> tuple[Principal, tuple[ScopeLimits, ...]]:
    """As keys.authenticate and limits.load_scopes. Raises InvalidApiKeyError."""
    rows = (await conn.execute(_CALLER, {"public_id": key.public_id})).all()
    principal = principal_of(key, rows[0] if rows else None, now_ns, peer)
    found = {}
    for row in rows:  # one for each scope that has limits; one without where none has
        columns = SimpleNamespace(**{column.name: getattr(row, _PREFIX + column.name) for column in _LIMIT.c})
        if columns.scope_id is not None:
            found[columns.scope_id] = limits_of(columns)
    return principal, tuple(chain_of(principal, found))


def _caller() -> Select[Any]:
    """Built once, as in posting.py."""
    key, project, tenant = tables.api_key, tables.project, tables.tenant
    scopes = (tenant.c.organisation_id, tenant.c.id, project.c.id, key.c.id)
    return (
        by_public_id()
        .add_columns(*(column.label(_PREFIX + column.name) for column in _LIMIT.c))
        .outerjoin(_LIMIT, _LIMIT.c.scope_id.in_(scopes))
    )


_CALLER: Final = _caller()
