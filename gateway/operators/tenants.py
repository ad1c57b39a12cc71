"""Tenants and their projects, keys, limits and failure policies."""

from typing import Annotated, Any, get_args

from msgspec import UNSET, Meta, Struct, UnsetType

from gateway.api.problems import NotThereError
from gateway.operators.desk import Ask, Name, Ns, Why
from gateway.organization.desk import listed
from gateway.records.plain import record
from gateway.records.tenants import key_record, limits_record, tenant_records
from tenancy.access.directory import ScopeKind, Tenant, list_projects, list_tenants, owner_of
from tenancy.access.key_rules import RULE_ITEMS_MAX, read_rules
from tenancy.access.keys import MintedKey, get_key, list_keys
from tenancy.access.rotation import OVERLAP_NS_MAX
from tenancy.accounts.posting import CURRENCY
from tenancy.quotas.failure_policy import (
    CAP_MAXIMA,
    SLICE_PERCENT,
    SLICE_PERCENT_MAX,
    FailureMode,
    FailurePolicy,
    get_policy,
)
from tenancy.quotas.limits import (
    CONCURRENCY_MAX,
    PER_DAY_MAX,
    PER_MINUTE_MAX,
    WEIGHT_MAX,
    LimitName,
    ScopeLimits,
    get_limits,
)

OVERLAP_NS = 86_400 * 10**9

PerMinute = Annotated[int, Meta(ge=0, le=PER_MINUTE_MAX)]
Rules = Annotated[tuple[Annotated[str, Meta(max_length=200)], ...], Meta(max_length=RULE_ITEMS_MAX)]


class NewTenant(Struct, frozen=True, forbid_unknown_fields=True):
    name: Name
    organisation: Name | None = None  # left out: its own name
    currency: Annotated[str, Meta(max_length=3)] = CURRENCY


class NewProject(Struct, frozen=True, forbid_unknown_fields=True):
    name: Name


class NewKey(Struct, frozen=True, forbid_unknown_fields=True):
    name: Name
    project_id: Annotated[str, Meta(max_length=64)] | None = None  # left out: the first by name, as of the command
    scopes: Annotated[tuple[str, ...], Meta(max_length=16)] = ("inference",)
    expires_ns: Ns | None = None
    models: Rules = ()
    networks: Rules = ()
    tiers: Rules = ()


class Rotation(Struct, frozen=True, forbid_unknown_fields=True):
    overlap_ns: Annotated[int, Meta(ge=0, le=OVERLAP_NS_MAX)] = OVERLAP_NS
    expires_ns: Ns | None = None


class NewLimits(Struct, frozen=True, forbid_unknown_fields=True):
    """All of a scope's: what is left out, or null, is not limited there."""

    requests_per_minute: PerMinute | None = None
    tokens_per_minute: PerMinute | None = None
    concurrency_max: Annotated[int, Meta(ge=0, le=CONCURRENCY_MAX)] | None = None
    tokens_per_day: Annotated[int, Meta(ge=0, le=PER_DAY_MAX)] | None = None
    shadow: Annotated[tuple[LimitName, ...], Meta(max_length=4)] = ()
    weight: Annotated[int, Meta(ge=1, le=WEIGHT_MAX)] | UnsetType = UNSET  # of a tenant; left out: 1


class NewPolicy(Struct, frozen=True, forbid_unknown_fields=True):
    mode: FailureMode
    slice_percent: Annotated[int, Meta(ge=1, le=SLICE_PERCENT_MAX)] = SLICE_PERCENT
    requests_per_minute: Annotated[int, Meta(ge=0, le=CAP_MAXIMA["requests_per_minute"])] = 0
    tokens_per_minute: Annotated[int, Meta(ge=0, le=CAP_MAXIMA["tokens_per_minute"])] = 0
    concurrency_max: Annotated[int, Meta(ge=0, le=CAP_MAXIMA["concurrency_max"])] = 0


async def tenants(ask: Ask) -> Any:
    name = ask.query.text("name")
    found = [one for one in await list_tenants(ask.conn) if name in ("", one.name)]
    page, more = ask.page(found, lambda one: one.tenant_id)
    return listed(await tenant_records(ask.conn, page), [one.tenant_id for one in page], more)


async def tenant(ask: Ask) -> Any:
    return await _record(ask, await ask.tenant())


async def create_tenant(ask: Ask, wanted: NewTenant) -> Any:
    organisation = wanted.organisation or wanted.name
    tenant_id, project_id = await ask.clerk.create_tenant(
        wanted.name, organisation=organisation, currency=wanted.currency
    )
    return await _record(ask, await ask.tenant(tenant_id)) | {"project_id": project_id}


async def suspend_tenant(ask: Ask, why: Why) -> Any:
    await ask.clerk.set_tenant_status((await ask.tenant()).tenant_id, "suspended", why.reason)
    return await tenant(ask)


async def resume_tenant(ask: Ask, why: Why) -> Any:
    await ask.clerk.set_tenant_status((await ask.tenant()).tenant_id, "active", why.reason)
    return await tenant(ask)


async def delete_tenant(ask: Ask, why: Why) -> Any:
    closed = await ask.clerk.delete_tenant((await ask.tenant()).tenant_id, why.reason)
    figures = {"num_keys_revoked": closed.num_keys_revoked, "credit_nano_usd": closed.credit_nano_usd}
    return {"tenant_id": closed.tenant.tenant_id, "deleted": True, "currency": closed.currency} | figures


async def projects(ask: Ask) -> Any:
    found = await list_projects(ask.conn, (await ask.tenant()).tenant_id)
    page, more = ask.page(found, lambda one: one.project_id)
    return listed([record(one) for one in page], [one.project_id for one in page], more)


async def create_project(ask: Ask, wanted: NewProject) -> Any:
    return record(await ask.clerk.create_project((await ask.tenant()).tenant_id, wanted.name))


async def keys(ask: Ask) -> Any:
    found = await list_keys(ask.conn, (await ask.tenant()).tenant_id)
    page, more = ask.page(found, lambda one: one.key_id)
    return listed([key_record(one, ask.now_ns) for one in page], [one.key_id for one in page], more)


async def create_key(ask: Ask, wanted: NewKey) -> Any:
    tenant_id = (await ask.tenant()).tenant_id
    own = [one.project_id for one in await list_projects(ask.conn, tenant_id)]
    project_id = wanted.project_id if wanted.project_id is not None else own[0]
    if project_id not in own:
        raise NotThereError("project", project_id)
    minted = await ask.clerk.create_key(
        tenant_id,
        project_id,
        wanted.name,
        ask.services.secrets.key_pepper,
        scopes=frozenset(wanted.scopes),
        expires_ns=ask.future_ns(wanted.expires_ns, "expires_ns"),
        rules=read_rules(wanted.models, wanted.networks, wanted.tiers),
    )
    return await _minted(ask, minted)


async def rotate_key(ask: Ask, wanted: Rotation) -> Any:
    minted = await ask.clerk.rotate_key(
        ask.path["key_id"],
        ask.services.secrets.key_pepper,
        overlap_ns=wanted.overlap_ns,
        expires_ns=ask.future_ns(wanted.expires_ns, "expires_ns"),
    )
    return await _minted(ask, minted)


async def revoke_key(ask: Ask, why: Why) -> Any:
    """A repeat changes nothing."""
    key_id = ask.path["key_id"]
    await ask.clerk.revoke_key(await owner_of(ask.conn, "key", key_id), key_id, why.reason)
    return key_record(await get_key(ask.conn, key_id), ask.now_ns)


async def limits(ask: Ask) -> Any:
    ask.query.end()
    kind, scope_id = await _scope(ask)
    found = (await get_limits(ask.conn, [scope_id])).get(scope_id, ScopeLimits(scope_id))
    return {"scope_kind": kind, "scope_id": scope_id} | limits_record(found) | {"weight": found.weight}


async def set_limits(ask: Ask, wanted: NewLimits) -> Any:
    kind, scope_id = await _scope(ask)
    await ask.clerk.set_limits(
        kind,
        scope_id,
        wanted.requests_per_minute,
        wanted.tokens_per_minute,
        wanted.concurrency_max,
        1 if wanted.weight is UNSET else wanted.weight,
        tokens_per_day=wanted.tokens_per_day,
        shadow=frozenset(wanted.shadow),
    )
    return await limits(ask)


async def policy(ask: Ask) -> Any:
    ask.query.end()
    tenant_id = (await ask.tenant()).tenant_id
    return {"tenant_id": tenant_id} | record(await get_policy(ask.conn, tenant_id))


async def set_policy(ask: Ask, wanted: NewPolicy) -> Any:
    caps = (wanted.requests_per_minute, wanted.tokens_per_minute, wanted.concurrency_max)
    await ask.clerk.set_policy((await ask.tenant()).tenant_id, FailurePolicy(wanted.mode, wanted.slice_percent, *caps))
    return await policy(ask)


async def _record(ask: Ask, one: Tenant) -> Any:
    ask.query.end()
    return (await tenant_records(ask.conn, [one]))[0]


async def _minted(ask: Ask, minted: MintedKey) -> Any:
    """The one answer that has the secret."""
    return key_record(await get_key(ask.conn, minted.key_id), ask.now_ns) | {"secret": minted.secret_text}


async def _scope(ask: Ask) -> tuple[ScopeKind, str]:
    """Raises NotThereError or UnknownIdError."""
    kind, scope_id = ask.path["scope_kind"], ask.path["scope_id"]
    for one in get_args(ScopeKind):
        if one == kind:
            await owner_of(ask.conn, one, scope_id)
            return one, scope_id
    raise NotThereError("scope", kind)


READING = (
    ("GET", "/tenants", tenants),
    ("GET", "/tenants/{tenant_id}", tenant),
    ("GET", "/tenants/{tenant_id}/projects", projects),
    ("GET", "/tenants/{tenant_id}/keys", keys),
    ("GET", "/tenants/{tenant_id}/policy", policy),
    ("GET", "/limits/{scope_kind}/{scope_id}", limits),
)
WRITING: tuple[tuple[str, str, type[Struct], Any], ...] = (
    ("POST", "/tenants", NewTenant, create_tenant),
    ("POST", "/tenants/{tenant_id}/suspend", Why, suspend_tenant),
    ("POST", "/tenants/{tenant_id}/resume", Why, resume_tenant),
    ("POST", "/tenants/{tenant_id}/delete", Why, delete_tenant),
    ("POST", "/tenants/{tenant_id}/projects", NewProject, create_project),
    ("POST", "/tenants/{tenant_id}/keys", NewKey, create_key),
    ("POST", "/keys/{key_id}/rotate", Rotation, rotate_key),
    ("POST", "/keys/{key_id}/revoke", Why, revoke_key),
    ("PUT", "/limits/{scope_kind}/{scope_id}", NewLimits, set_limits),
    ("PUT", "/tenants/{tenant_id}/policy", NewPolicy, set_policy),
)
