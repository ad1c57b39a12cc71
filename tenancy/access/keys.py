"""API keys: `bk-...`, a public id and a secret of which an HMAC is stored (presented.py).

`authenticate` does the same work for every kind of wrong key - one query, one HMAC, one constant-time compare - and
answers all of them with one message, also a good key from a network that it may not come from.
"""

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Final, Literal

from sqlalchemy import Select, bindparam, insert, select, update
from sqlalchemy.ext.asyncio import AsyncConnection

from tenancy import tables
from tenancy.access.key_rules import UNRESTRICTED, KeyRules, loaded, stored
from tenancy.access.presented import Presented
from tenancy.ids import Entropy, new_id, require_name
from tenancy.money import require_int
from tenancy.quotas import quota_tables
from tenancy.quotas.failure_policy import CLOSED, FailurePolicy, policy_of

SCOPES: Final = frozenset({"inference", "usage", "audit", "admin"})


class InvalidApiKeyError(Exception):
    """The presented key does not authenticate. Deliberately says nothing about why."""

    def __init__(self) -> None:
        super().__init__("Incorrect API key provided.")


class KeyRevokedError(Exception):
    """The key was revoked while what it had asked for ran."""


class KeyScopeError(ValueError):
    """A key was asked for with no scope, or with a scope that does not exist; the message names it."""


class UnknownKeyIdError(LookupError):
    """There is no key with this id (an administrator's mistake, not a client's)."""


@dataclass(frozen=True, slots=True)
class Principal:
    """Whom a request acts for. Made only by `authenticate`."""

    organisation_id: str
    tenant_id: str
    tenant_name: str
    project_id: str
    key_id: str
    scopes: frozenset[str]
    rules: KeyRules = KeyRules()
    weight: int = 1  # its tenant's share of the engine
    policy: FailurePolicy = CLOSED  # of its tenant, while the store of quotas is gone


@dataclass(frozen=True, slots=True)
class MintedKey:
    """A new key: `secret_text` exists here and nowhere else, and is left out of the repr."""

    key_id: str
    secret_text: str = field(repr=False)


@dataclass(frozen=True, slots=True)
class ApiKey:
    """What may be shown of a key, ever after."""

    key_id: str
    project_id: str
    public_id: str
    name: str
    scopes: frozenset[str]
    created_ns: int
    expires_ns: int | None
    revoked_ns: int | None
    last_used_ns: int | None  # behind by up to a minute
    rules: KeyRules

    def state(self, now_ns: int) -> Literal["active", "expired", "revoked"]:
        if self.revoked_ns is not None:
            return "revoked"
        return "active" if _alive(self.expires_ns, None, now_ns) else "expired"


async def mint_key(
    conn: AsyncConnection,
    project_id: str,
    name: str,
    scopes: Iterable[str],
    *,
    pepper: bytes,
    entropy: Entropy,
    now_ns: int,
    expires_ns: int | None = None,
    rules: KeyRules = UNRESTRICTED,
) -> MintedKey:
    """Create a key; half-open, it works while created <= now < expires.

    Raises KeyScopeError, InvalidNameError, or ValueError for an expiry that is not in the future.
    """
    wanted = frozenset(scopes)
    if not wanted or not wanted <= SCOPES:
        raise KeyScopeError(f"scopes must be some of {sorted(SCOPES)}, not {sorted(wanted)}")
    if expires_ns is not None and require_int(expires_ns, "expires_ns") <= now_ns:
        raise ValueError(f"expires_ns must be later than now ({now_ns}): {expires_ns}")
    key_id = new_id("key", entropy)
    secret_text, made = PresentedKey.mint(entropy, pepper)
    await conn.execute(
        insert(tables.api_key).values(
            id=key_id,
            project_id=project_id,
            public_id=made.public_id,
            secret_hmac=made.secret_hmac,
            name=require_name(name),
            scopes=" ".join(sorted(wanted)),
            created_ns=now_ns,
            expires_ns=expires_ns,
            revoked_ns=None,
            models=stored(rules.models),
            networks=stored(rules.networks),
            tiers=stored(rules.tiers),
            last_used_ns=None,
        )
    )
    return MintedKey(key_id, secret_text)


class PresentedKey(Presented):
    __slots__ = ()
    PREFIX = "bk"
    CONTEXT = "bulkhead/api-key/v1"


async def authenticate(
    conn: AsyncConnection, presented: str, *, pepper: bytes, now_ns: int, peer: str | None = None
) -> Principal:
    """The principal of a key text as a client sent it, or InvalidApiKeyError for every reason there is.

    `peer` is the address of the client's connection, None where there is none to know.
    """
    key = PresentedKey.of(presented, pepper)
    row = (await conn.execute(_BY_PUBLIC_ID, {"public_id": key.public_id})).first()
    return principal_of(key, row, now_ns, peer)


def principal_of(key: PresentedKey, row: Any, now_ns: int, peer: str | None) -> Principal:
    """`row`: of by_public_id, or None. Raises InvalidApiKeyError."""
    matches = key.matches(None if row is None else row.secret_hmac)
    if row is None or not matches or row.status != "active" or not _alive(row.expires_ns, row.revoked_ns, now_ns):
        raise InvalidApiKeyError
    rules = loaded(row.models, row.networks, row.tiers)
    if not rules.allows_peer(peer):
        raise InvalidApiKeyError
    return Principal(
        organisation_id=row.organisation_id,
        tenant_id=row.tenant_id,
        tenant_name=row.tenant_name,
        project_id=row.project_id,
        key_id=row.key_id,
        scopes=frozenset(row.scopes.split(" ")),
        rules=rules,
        weight=row.weight or 1,
        policy=policy_of(row),
    )


async def require_alive(conn: AsyncConnection, key_id: str, now_ns: int) -> None:
    """Raises InvalidApiKeyError for a key that has been revoked or has expired since it was authenticated."""
    query = select(tables.api_key.c.expires_ns, tables.api_key.c.revoked_ns).where(tables.api_key.c.id == key_id)
    row = (await conn.execute(query)).first()
    if row is None or not _alive(row.expires_ns, row.revoked_ns, now_ns):
        raise InvalidApiKeyError


async def revoke_key(conn: AsyncConnection, key_id: str, *, now_ns: int) -> bool:
    """Revoke from the next authentication on. False where it already was. Raises UnknownKeyIdError."""
    table = tables.api_key
    revoked = await conn.execute(
        update(table).where(table.c.id == key_id, table.c.revoked_ns.is_(None)).values(revoked_ns=now_ns)
    )
    if revoked.rowcount:
        return True
    if not await conn.scalar(select(table.c.id).where(table.c.id == key_id)):
        raise UnknownKeyIdError(f"there is no key {key_id!r}")
    return False


async def list_keys(conn: AsyncConnection, tenant_id: str) -> list[ApiKey]:
    """Every key of a tenant, oldest first, revoked and expired ones included; never a secret."""
    table, project = tables.api_key, tables.project
    query = select(table).join(project, project.c.id == table.c.project_id).where(project.c.tenant_id == tenant_id)
    return [_api_key(row) for row in await conn.execute(query.order_by(table.c.created_ns, table.c.id))]


async def get_key(conn: AsyncConnection, key_id: str) -> ApiKey:
    """Raises UnknownKeyIdError."""
    row = (await conn.execute(select(tables.api_key).where(tables.api_key.c.id == key_id))).first()
    if row is None:
        raise UnknownKeyIdError(f"there is no key {key_id!r}; see: bulkhead key list")
    return _api_key(row)


async def revoke_keys_of(conn: AsyncConnection, tenant_id: str, *, now_ns: int) -> int:
    """Revoke every key of a tenant; how many were not revoked before."""
    table, project = tables.api_key, tables.project
    own = select(project.c.id).where(project.c.tenant_id == tenant_id)
    revoked = await conn.execute(
        update(table).where(table.c.project_id.in_(own), table.c.revoked_ns.is_(None)).values(revoked_ns=now_ns)
    )
    return revoked.rowcount


async def revoked_among(conn: AsyncConnection, key_ids: Collection[str]) -> set[str]:
    """Those of the keys that are revoked."""
    table = tables.api_key
    query = select(table.c.id).where(table.c.id.in_(key_ids), table.c.revoked_ns.is_not(None))
    return set((await conn.execute(query)).scalars())


async def note_uses(conn: AsyncConnection, uses: Mapping[str, int]) -> None:
    """Remember when keys were last used (key id -> ns); an older time changes nothing."""
    table = tables.api_key
    for key_id, used_ns in sorted(uses.items()):  # one order, so that two replicas never wait for each other in a ring
        older = table.c.last_used_ns.is_(None) | (table.c.last_used_ns < used_ns)
        await conn.execute(update(table).where(table.c.id == key_id, older).values(last_used_ns=used_ns))


def _api_key(row: Any) -> ApiKey:
    return ApiKey(
        row.id,
        row.project_id,
        row.public_id,
        row.name,
        frozenset(row.scopes.split(" ")),
        row.created_ns,
        row.expires_ns,
        row.revoked_ns,
        row.last_used_ns,
        loaded(row.models, row.networks, row.tiers),
    )


def _alive(expires_ns: int | None, revoked_ns: int | None, now_ns: int) -> bool:
    return revoked_ns is None and (expires_ns is None or now_ns < expires_ns)


def by_public_id() -> Select[Any]:
    """A key with all that makes its principal, by the parameter `public_id`."""
    key, project, tenant, limit = tables.api_key, tables.project, tables.tenant, tables.scope_limit
    policy = quota_tables.failure_policy
    return (
        select(
            key.c.id.label("key_id"),
            key.c.secret_hmac,
            key.c.scopes,
            key.c.expires_ns,
            key.c.revoked_ns,
            key.c.models,
            key.c.networks,
            key.c.tiers,
            project.c.id.label("project_id"),
            tenant.c.id.label("tenant_id"),
            tenant.c.name.label("tenant_name"),
            tenant.c.status,
            tenant.c.organisation_id,
            limit.c.weight,
            policy.c.mode,
            policy.c.slice_percent,
            policy.c.requests_per_minute,
            policy.c.tokens_per_minute,
            policy.c.concurrency_max,
        )
        .join(project, project.c.id == key.c.project_id)
        .join(tenant, tenant.c.id == project.c.tenant_id)
        .outerjoin(limit, limit.c.scope_id == tenant.c.id)
        .outerjoin(policy, policy.c.tenant_id == tenant.c.id)
        .where(key.c.public_id == bindparam("public_id"))
    )


_BY_PUBLIC_ID: Final = by_public_id()
