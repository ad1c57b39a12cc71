"""The meter: one usage row a request, written in the same transaction that captures its money, never changed after.

A request belongs to the period in which it finished, so a period that has ended gains no rows.
"""

from dataclasses import asdict, dataclass
from typing import Any, Final

from sqlalchemy import RowMapping, func, insert, select
from sqlalchemy.dialects import postgresql
from sqlalchemy.ext.asyncio import AsyncConnection

from tenancy import tables
from tenancy.money import require_amount, require_int


class UsageConflictError(ValueError):
    """The request is already recorded with other figures."""


@dataclass(frozen=True, slots=True)
class Usage:
    """Tokens of one request. Cached tokens are part of the prompt tokens, not beside them."""

    num_prompt_tokens: int
    num_cached_tokens: int
    num_completion_tokens: int

    def __post_init__(self) -> None:
        require_amount(self.num_prompt_tokens, "num_prompt_tokens")
        require_amount(self.num_cached_tokens, "num_cached_tokens")
        require_amount(self.num_completion_tokens, "num_completion_tokens")
        if self.num_cached_tokens > self.num_prompt_tokens:
            raise ValueError(f"{self.num_cached_tokens} cached tokens of {self.num_prompt_tokens} prompt tokens")


@dataclass(frozen=True, slots=True)
class Effort:
    """What one request took of the engine, as that measured it. Nobody is billed by it."""

    engine_ns: int  # its parts of the steps' time
    block_ns: int  # blocks of the cache times the time for which it had them
    num_prefill_tokens: int
    num_recomputed_tokens: int  # computed again after its blocks were taken
    num_decode_steps: int

    def __post_init__(self) -> None:
        for name in self.__slots__:
            require_amount(getattr(self, name), name)


@dataclass(frozen=True, slots=True)
class UsageRecord:
    request_id: str
    tenant_id: str
    project_id: str
    key_id: str
    model: str
    usage: Usage
    price_id: str
    amount_nano_usd: int
    started_ns: int
    finished_ns: int
    finish_reason: str
    stream: bool
    tier: str = "default"  # the service tier that it ran in
    num_tokens_before: int = 0  # where it stands on the steps of its price (volume.py)
    effort: Effort | None = None  # None: not measured

    def __post_init__(self) -> None:
        require_amount(self.amount_nano_usd, "amount_nano_usd")
        if require_int(self.started_ns, "started_ns") > require_int(self.finished_ns, "finished_ns"):
            raise ValueError(f"finished at {self.finished_ns}, before it started at {self.started_ns}")


@dataclass(frozen=True, slots=True)
class TenantUsage:
    """Sums over one tenant's requests that finished in the period."""

    tenant_id: str
    num_requests: int
    num_prompt_tokens: int
    num_cached_tokens: int
    num_completion_tokens: int
    amount_nano_usd: int


async def record_usage(conn: AsyncConnection, record: UsageRecord) -> bool:
    """Write the row; False where the same row is already there. Raises UsageConflictError for another one."""
    values = asdict(record)
    values.update(values.pop("usage"))
    values.update(values.pop("effort") or dict.fromkeys(tables.EFFORT))
    # On SQLite looked for beforehand: its trigger refuses an insert over a row that is there, conflict clause or not.
    existing = await get_usage(conn, record.request_id) if conn.dialect.name == "sqlite" else None
    if existing is None and (await conn.execute(_NEW[conn.dialect.name], values)).rowcount == 1:
        return True
    if (existing or await get_usage(conn, record.request_id)) != record:
        raise UsageConflictError(f"request {record.request_id} is already recorded with other figures")
    return False


async def get_usage(conn: AsyncConnection, request_id: str) -> UsageRecord | None:
    row = (await conn.execute(select(_TABLE).where(_TABLE.c.request_id == request_id))).mappings().first()
    return usage_record_of(row) if row is not None else None


def usage_record_of(row: RowMapping) -> UsageRecord:
    """From a row that has the table's columns, perhaps among others."""
    values = {column.name: row[column.name] for column in _TABLE.columns}
    usage = Usage(**{name: values.pop(name) for name in Usage.__slots__})
    measured = {name: values.pop(name) for name in tables.EFFORT}
    effort = None if measured["engine_ns"] is None else Effort(**measured)
    return UsageRecord(usage=usage, effort=effort, **values)


async def usage_by_tenant(conn: AsyncConnection, since_ns: int, until_ns: int) -> list[TenantUsage]:
    """Sums per tenant of what finished in [since_ns, until_ns), by tenant id; tenants without requests are absent."""
    rows = await conn.execute(
        select(
            _TABLE.c.tenant_id,
            func.count(),
            func.sum(_TABLE.c.num_prompt_tokens),
            func.sum(_TABLE.c.num_cached_tokens),
            func.sum(_TABLE.c.num_completion_tokens),
            func.sum(_TABLE.c.amount_nano_usd),
        )
        .where(_TABLE.c.finished_ns >= since_ns, _TABLE.c.finished_ns < until_ns)
        .group_by(_TABLE.c.tenant_id)
        .order_by(_TABLE.c.tenant_id)
    )
    return [TenantUsage(tenant_id, *map(int, sums)) for tenant_id, *sums in rows]


_TABLE: Final = tables.usage_record
_NEW: Final[dict[str, Any]] = {
    "postgresql": postgresql.insert(_TABLE).on_conflict_do_nothing(index_elements=["request_id"]),
    "sqlite": insert(_TABLE),
}
