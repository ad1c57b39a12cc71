"""Who is served: organisation -> tenant -> project (-> key, in keys.py).

Names are unique where people type them: organisations and tenants everywhere, projects within their tenant. Ids are
what everything else refers to, so a name may be changed later without touching money or keys.
"""

from dataclasses import dataclass
from typing import Final, Literal, cast

from sqlalchemy import insert, literal, select, update
from sqlalchemy.ext.asyncio import AsyncConnection

from tenancy import tables
from tenancy.accounts.posting import CURRENCY, open_accounts
from tenancy.ids import Entropy, new_id, require_name

ScopeKind = Literal["organisation", "tenant", "project", "key"]
TenantStatus = Literal["active", "suspended", "deleted"]

# status -> the statuses it may move to. "deleted" is terminal.
TENANT_MOVES: Final[dict[TenantStatus, frozenset[TenantStatus]]] = {
    "active": frozenset({"suspended", "deleted"}),
    "suspended": frozenset({"active", "deleted"}),
    "deleted": frozenset(),
}


class DuplicateNameError(ValueError):
    """The name is taken; the message shows it."""


class UnknownIdError(LookupError):
    """There is no such organisation, tenant or project; the message shows the id."""


class TenantStatusError(ValueError):
    """A tenant cannot move from its status to the one asked for."""


@dataclass(frozen=True, slots=True)
class Organisation:
    organisation_id: str
    name: str
    created_ns: int


@dataclass(frozen=True, slots=True)
class Tenant:
    tenant_id: str
    organisation_id: str
    name: str
    status: TenantStatus
    created_ns: int


@dataclass(frozen=True, slots=True)
class Project:
    project_id: str
    tenant_id: str
    name: str
    created_ns: int


async def create_organisation(conn: AsyncConnection, name: str, *, entropy: Entropy, now_ns: int) -> Organisation:
    """Raises InvalidNameError or DuplicateNameError."""
    table = tables.organisation
    if await conn.scalar(select(table.c.id).where(table.c.name == require_name(name))):
        raise DuplicateNameError(f"an organisation named {name!r} exists")
    made = Organisation(new_id("org", entropy), name, now_ns)
    await conn.execute(insert(table).values(id=made.organisation_id, name=name, created_ns=now_ns))
    return made


async def get_organisation_by_name(conn: AsyncConnection, name: str) -> Organisation | None:
    table = tables.organisation
    query = select(table.c.id, table.c.name, table.c.created_ns).where(table.c.name == name)
    row = (await conn.execute(query)).first()
    return None if row is None else Organisation(*row)


async def create_tenant(
    conn: AsyncConnection,
    organisation_id: str,
    name: str,
    *,
    entropy: Entropy,
    now_ns: int,
    currency: str = CURRENCY,
) -> Tenant:
    """A new active tenant with its ledger accounts open, in a currency that is chosen here and stays.

    Raises UnknownIdError, CurrencyError or a name error.
    """
    organisation, table = tables.organisation, tables.tenant
    if not await conn.scalar(select(organisation.c.id).where(organisation.c.id == organisation_id)):
        raise UnknownIdError(f"there is no organisation {organisation_id!r}")
    if await conn.scalar(select(table.c.id).where(table.c.name == require_name(name))):
        raise DuplicateNameError(f"a tenant named {name!r} exists")
    made = Tenant(new_id("ten", entropy), organisation_id, name, "active", now_ns)
    await conn.execute(
        insert(table).values(
            id=made.tenant_id, organisation_id=organisation_id, name=name, status="active", created_ns=now_ns
        )
    )
    await open_accounts(conn, made.tenant_id, now_ns=now_ns, currency=currency)
    return made


async def create_project(conn: AsyncConnection, tenant_id: str, name: str, *, entropy: Entropy, now_ns: int) -> Project:
    """Raises UnknownIdError or a name error."""
    table = tables.project
    if not await conn.scalar(select(tables.tenant.c.id).where(tables.tenant.c.id == tenant_id)):
        raise UnknownIdError(f"there is no tenant {tenant_id!r}")
    taken = select(table.c.id).where(table.c.tenant_id == tenant_id, table.c.name == require_name(name))
    if await conn.scalar(taken):
        raise DuplicateNameError(f"the tenant has a project named {name!r}")
    made = Project(new_id("prj", entropy), tenant_id, name, now_ns)
    await conn.execute(insert(table).values(id=made.project_id, tenant_id=tenant_id, name=name, created_ns=now_ns))
    return made


async def list_tenants(conn: AsyncConnection) -> list[Tenant]:
    """Every tenant, by name, deleted ones included."""
    rows = await conn.execute(_TENANTS.order_by(tables.tenant.c.name))
    return [_tenant(row) for row in rows]


async def get_tenant_by_name(conn: AsyncConnection, name: str) -> Tenant | None:
    row = (await conn.execute(_TENANTS.where(tables.tenant.c.name == name))).first()
    return None if row is None else _tenant(row)


async def get_tenant(conn: AsyncConnection, tenant_id: str) -> Tenant | None:
    row = (await conn.execute(_TENANTS.where(tables.tenant.c.id == tenant_id))).first()
    return None if row is None else _tenant(row)


async def list_projects(conn: AsyncConnection, tenant_id: str) -> list[Project]:
    table = tables.project
    rows = await conn.execute(
        select(table.c.id, table.c.tenant_id, table.c.name, table.c.created_ns)
        .where(table.c.tenant_id == tenant_id)
        .order_by(table.c.name)
    )
    return [Project(*row) for row in rows]


async def owner_of(conn: AsyncConnection, kind: ScopeKind, scope_id: str) -> str:
    """The tenant that a scope belongs to, "" for an organisation. Raises UnknownIdError."""
    project, key = tables.project, tables.api_key
    query = {
        "organisation": select(literal("")).where(tables.organisation.c.id == scope_id),
        "tenant": select(tables.tenant.c.id).where(tables.tenant.c.id == scope_id),
        "project": select(project.c.tenant_id).where(project.c.id == scope_id),
        "key": select(project.c.tenant_id).join(key, key.c.project_id == project.c.id).where(key.c.id == scope_id),
    }[kind]
    row = (await conn.execute(query)).first()
    if row is None:
        raise UnknownIdError(f"there is no {kind} {scope_id!r}")
    return str(row[0])


async def set_tenant_status(conn: AsyncConnection, tenant_id: str, status: TenantStatus) -> Tenant:
    """Suspend, resume or delete: its keys answer from the next authentication on. A repeat changes nothing.

    Raises UnknownIdError, and TenantStatusError where TENANT_MOVES has no such move.
    """
    table = tables.tenant
    row = (await conn.execute(_TENANTS.where(table.c.id == tenant_id).with_for_update(key_share=True))).first()
    if row is None:
        raise UnknownIdError(f"there is no tenant {tenant_id!r}")
    current = _tenant(row)
    if status != current.status and status not in TENANT_MOVES[current.status]:
        raise TenantStatusError(f"a tenant that is {current.status} cannot become {status!r}")
    await conn.execute(update(table).where(table.c.id == tenant_id).values(status=status))
    return Tenant(current.tenant_id, current.organisation_id, current.name, status, current.created_ns)


_TENANTS: Final = select(
    tables.tenant.c.id,
    tables.tenant.c.organisation_id,
    tables.tenant.c.name,
    tables.tenant.c.status,
    tables.tenant.c.created_ns,
)


def _tenant(row: object) -> Tenant:
    tenant_id, organisation_id, name, status, created_ns = cast("tuple[str, str, str, TenantStatus, int]", row)
    return Tenant(tenant_id, organisation_id, name, status, created_ns)
