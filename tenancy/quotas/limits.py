"""Limits are rules; quota.py holds what is left of them. Each of the four scopes of a request may have its own.

Beside them stands a tenant's weight: not a limit but its share of the engine while others want it, too.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Final, Literal, get_args

from sqlalchemy import bindparam, delete, insert, select
from sqlalchemy.ext.asyncio import AsyncConnection

from tenancy import tables
from tenancy.access.directory import ScopeKind
from tenancy.access.keys import Principal
from tenancy.money import require_int

# Lua counts in doubles: a minute's allowance in quota.py's units (1/60,000,000 of a token) stays below 2^53.
PER_MINUTE_MAX: Final = 100_000_000
PER_DAY_MAX: Final = 10**12
CONCURRENCY_MAX: Final = 100_000
WEIGHT_MAX: Final = 1_000
_MAXIMA: Final = {
    "requests_per_minute": PER_MINUTE_MAX,
    "tokens_per_minute": PER_MINUTE_MAX,
    "concurrency_max": CONCURRENCY_MAX,
    "tokens_per_day": PER_DAY_MAX,
}
LimitName = Literal["requests_per_minute", "tokens_per_minute", "concurrency_max", "tokens_per_day"]
LIMIT_NAMES: Final[tuple[LimitName, ...]] = get_args(LimitName)  # in the scripts' order


class LimitError(ValueError):
    """A limit is negative or above what can be counted exactly, or a weight is out of place; the message names it."""


@dataclass(frozen=True, slots=True)
class ScopeLimits:
    """The limits of one scope; None is unlimited, 0 admits nothing. `weight` is a tenant's: other scopes have 1.

    Days are UTC's. A limit in `shadow` refuses nothing: it only tells what it would have refused.

    `organisation_id` is where the counters live: every scope of an organisation shares one Redis hash tag, because
    one script checks them all and an organisation's own counters are shared by its tenants.
    """

    scope_id: str
    requests_per_minute: int | None = None
    tokens_per_minute: int | None = None
    concurrency_max: int | None = None
    organisation_id: str = ""
    weight: int = 1
    tokens_per_day: int | None = None
    shadow: frozenset[LimitName] = frozenset()

    def __post_init__(self) -> None:
        for name, maximum in _MAXIMA.items():
            value = getattr(self, name)
            if value is not None and not 0 <= require_int(value, name) <= maximum:
                raise LimitError(f"{name} must be between 0 and {maximum}, or None: {value}")
        if unknown := sorted(self.shadow - set(LIMIT_NAMES)):
            raise LimitError(f"there is no limit {unknown[0]!r} that could be in shadow: {', '.join(LIMIT_NAMES)}")
        if not 1 <= require_int(self.weight, "weight") <= WEIGHT_MAX:
            raise LimitError(f"weight must be between 1 and {WEIGHT_MAX}: {self.weight}")


async def set_limits(
    conn: AsyncConnection,
    scope_kind: ScopeKind,
    scope_id: str,
    *,
    requests_per_minute: int | None = None,
    tokens_per_minute: int | None = None,
    concurrency_max: int | None = None,
    weight: int = 1,
    tokens_per_day: int | None = None,
    shadow: frozenset[LimitName] = frozenset(),
    now_ns: int,
) -> ScopeLimits:
    """Replace the limits of one scope; what is already used stays counted. Raises LimitError or TypeError."""
    limits = ScopeLimits(
        scope_id,
        requests_per_minute,
        tokens_per_minute,
        concurrency_max,
        weight=weight,
        tokens_per_day=tokens_per_day,
        shadow=shadow,
    )
    if weight != 1 and scope_kind != "tenant":
        raise LimitError(f"weight is a tenant's: set it with the scope tenant, not {scope_kind}")
    table = tables.scope_limit
    await conn.execute(delete(table).where(table.c.scope_id == scope_id))
    await conn.execute(
        insert(table).values(
            scope_kind=scope_kind,
            scope_id=scope_id,
            requests_per_minute=requests_per_minute,
            tokens_per_minute=tokens_per_minute,
            concurrency_max=concurrency_max,
            updated_ns=now_ns,
            weight=weight,
            tokens_per_day=tokens_per_day,
            shadow=" ".join(sorted(shadow)) or None,
        )
    )
    return limits


async def get_limits(conn: AsyncConnection, scope_ids: list[str]) -> Mapping[str, ScopeLimits]:
    """The limits of those scopes that have any, by scope id."""
    rows = await conn.execute(_OF_SCOPES, {"of": scope_ids})
    return {row.scope_id: limits_of(row) for row in rows}


def limits_of(row: Any) -> ScopeLimits:
    """From a row with the columns of scope_limit."""
    return ScopeLimits(
        row.scope_id,
        row.requests_per_minute,
        row.tokens_per_minute,
        row.concurrency_max,
        weight=1 if row.weight is None else row.weight,
        tokens_per_day=row.tokens_per_day,
        shadow=limit_names(row.shadow),
    )


def limit_names(text: str | None) -> frozenset[LimitName]:
    """As scope_limit.shadow is stored."""
    return frozenset(name for name in LIMIT_NAMES if name in (text or "").split())


async def load_scopes(conn: AsyncConnection, principal: Principal) -> list[ScopeLimits]:
    """The four scopes that a request of this principal is counted in: organisation, tenant, project, key."""
    return chain_of(principal, await get_limits(conn, scope_ids_of(principal)))


def scope_ids_of(principal: Principal) -> list[str]:
    return [principal.organisation_id, principal.tenant_id, principal.project_id, principal.key_id]


def chain_of(principal: Principal, found: Mapping[str, ScopeLimits]) -> list[ScopeLimits]:
    """The four scopes of a principal; `found`: those that have limits."""
    organisation_id = principal.organisation_id
    every = (found.get(id_, ScopeLimits(id_)) for id_ in scope_ids_of(principal))
    return [replace(limits, organisation_id=organisation_id) for limits in every]


# Built once, as in posting.py.
_OF_SCOPES: Final = select(tables.scope_limit).where(tables.scope_limit.c.scope_id.in_(bindparam("of", expanding=True)))
