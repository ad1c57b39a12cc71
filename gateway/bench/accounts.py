"""Tenants for a benchmark, made as an operator makes them, and what the books say of them afterwards."""

from dataclasses import dataclass
from pathlib import Path

from sqlalchemy import func, select
from sqlalchemy.ext.asyncio import AsyncConnection

from engine.journal import read_journals
from gateway.bench.servers import MODEL_ID
from gateway.clerk import Clerk
from gateway.sequences import usage_by_request
from gateway.world import World
from tenancy import tables
from tenancy.quotas.failure_policy import FailurePolicy

TOKEN_PICO_USD = 1_000  # of every token: one nano-USD, so that a budget in nano-USD is one in tokens


@dataclass(frozen=True, slots=True)
class Account:
    tenant_id: str
    secret: str


@dataclass(frozen=True, slots=True)
class Books:
    num_tokens_by_tenant: dict[str, int]  # billed
    num_engine_tokens_by_tenant: dict[str, int]  # what the workers' journals count
    entries_sum_nano_usd: int
    num_pending_holds: int
    num_usage_rows: int
    num_tokens_unbilled: dict[str, int]  # that journals count and the ledger does not, by the request's finish reason


async def open_accounts(
    conn: AsyncConnection, world: World, pepper: bytes, num_tenants: int, *, budget_tokens: int | None
) -> list[Account]:
    """Each in an organisation of its own, with limits that are counted and do not bind."""
    clerk = Clerk(conn, world.entropy, world.now_ns())
    await clerk.add_price(
        MODEL_ID,
        input_pico_usd=TOKEN_PICO_USD,
        cached_input_pico_usd=TOKEN_PICO_USD,
        output_pico_usd=TOKEN_PICO_USD,
        request_nano_usd=0,
    )
    made = []
    for number in range(num_tenants):
        tenant_id, project_id = await clerk.create_tenant(f"tenant-{number}", organisation=f"tenant-{number}")
        await clerk.set_limits("tenant", tenant_id, 1_000_000, 90_000_000, 10_000, tokens_per_day=10**10)
        await clerk.set_policy(tenant_id, FailurePolicy())
        await clerk.grant_credit(tenant_id, 10**15, memo="benchmark")
        if budget_tokens is not None:
            await clerk.set_budget("tenant", tenant_id, "total", hard=True, limit_nano_usd=budget_tokens)
        key = await clerk.create_key(tenant_id, project_id, "benchmark", pepper)
        made.append(Account(tenant_id, key.secret_text))
    return made


async def num_pending(conn: AsyncConnection) -> int:
    hold = tables.hold
    pending = select(func.count()).select_from(hold).where(hold.c.state == "pending")
    return int(await conn.scalar(pending) or 0)


async def read_books(conn: AsyncConnection, counts: Path) -> Books:
    row, hold, entry = tables.usage_record, tables.hold, tables.ledger_entry
    total = func.sum(row.c.num_prompt_tokens + row.c.num_completion_tokens)
    billed = {
        one[0]: int(one[1]) for one in await conn.execute(select(row.c.tenant_id, total).group_by(row.c.tenant_id))
    }
    owners = {one.request_id: one.tenant_id for one in await conn.execute(select(hold.c.request_id, hold.c.tenant_id))}
    endings = {
        one.request_id: (one.num_tokens, one.finish_reason)
        for one in await conn.execute(
            select(
                row.c.request_id,
                (row.c.num_prompt_tokens + row.c.num_completion_tokens).label("num_tokens"),
                row.c.finish_reason,
            )
        )
    }
    counted: dict[str, int] = {}
    unbilled: dict[str, int] = {}
    for request_id, usage in usage_by_request(read_journals(counts)).items():
        if usage.num_completion_tokens:
            tenant_id = owners[request_id]
            num_tokens = usage.num_prompt_tokens + usage.num_completion_tokens
            counted[tenant_id] = counted.get(tenant_id, 0) + num_tokens
            num_billed, reason = endings.get(request_id, (0, "nothing"))
            if num_billed != num_tokens:
                unbilled[reason] = unbilled.get(reason, 0) + num_tokens - num_billed
    return Books(
        billed,
        counted,
        int(await conn.scalar(select(func.coalesce(func.sum(entry.c.amount_nano_usd), 0))) or 0),
        await num_pending(conn),
        len(endings),
        unbilled,
    )
