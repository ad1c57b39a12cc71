"""What happens to a tenant's requests while the store of quotas is gone. Never to its money: that is held in SQL.

closed   nothing is served (the default)
lease    each gateway spends the slice of every limit that it took while the store was there (slices.py); over all
         gateways never more than the limit
open     each gateway counts by itself, up to a cap: N gateways may together serve N times the cap
"""

from dataclasses import dataclass
from typing import Any, Final, Literal, cast, get_args

from sqlalchemy import delete, insert, select
from sqlalchemy.ext.asyncio import AsyncConnection

from tenancy.money import require_int
from tenancy.quotas import quota_tables

FailureMode = Literal["closed", "lease", "open"]
SLICE_PERCENT_MAX: Final = 25
SLICE_PERCENT: Final = 10
CAP_MAXIMA: Final = {"requests_per_minute": 10**8, "tokens_per_minute": 10**8, "concurrency_max": 10**5}  # as limits.py


class FailurePolicyError(ValueError):
    """The policy cannot be carried out as written; the message says what is missing or too much."""


@dataclass(frozen=True, slots=True)
class FailurePolicy:
    """`slice_percent` is for lease, of each limit and for each gateway; the caps are for open, for each gateway."""

    mode: FailureMode = "closed"
    slice_percent: int = SLICE_PERCENT
    requests_per_minute: int = 0
    tokens_per_minute: int = 0
    concurrency_max: int = 0

    def __post_init__(self) -> None:
        if self.mode not in get_args(FailureMode):
            raise FailurePolicyError(f"there is no policy {self.mode!r}: {', '.join(get_args(FailureMode))}")
        if not 1 <= require_int(self.slice_percent, "slice_percent") <= SLICE_PERCENT_MAX:
            raise FailurePolicyError(f"a slice is 1 to {SLICE_PERCENT_MAX} percent of a limit: {self.slice_percent}")
        for name, maximum in CAP_MAXIMA.items():
            cap = require_int(getattr(self, name), name)
            if self.mode == "open" and not 1 <= cap <= maximum:
                raise FailurePolicyError(f"open needs a cap: {name} between 1 and {maximum}, not {cap}")
            if self.mode != "open" and cap:
                raise FailurePolicyError(f"{name} is a cap of the policy open, not of {self.mode}")


CLOSED: Final = FailurePolicy()


async def set_policy(conn: AsyncConnection, tenant_id: str, policy: FailurePolicy, *, now_ns: int) -> None:
    """Replace a tenant's policy; requests that are authenticated from now on follow it."""
    table = quota_tables.failure_policy
    await conn.execute(delete(table).where(table.c.tenant_id == tenant_id))
    if policy != CLOSED:
        values = {name: getattr(policy, name) for name in ("mode", "slice_percent", *CAP_MAXIMA)}
        await conn.execute(insert(table).values(tenant_id=tenant_id, updated_ns=now_ns, **values))


async def get_policy(conn: AsyncConnection, tenant_id: str) -> FailurePolicy:
    table = quota_tables.failure_policy
    return policy_of((await conn.execute(select(table).where(table.c.tenant_id == tenant_id))).first())


def policy_of(row: Any) -> FailurePolicy:
    """From a row with the table's columns, or with nulls in them where the tenant has none."""
    if row is None or row.mode is None:
        return CLOSED
    return FailurePolicy(
        cast(FailureMode, row.mode),
        row.slice_percent,
        row.requests_per_minute,
        row.tokens_per_minute,
        row.concurrency_max,
    )
