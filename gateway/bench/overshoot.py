"""How exact a hard budget is: several gateways, many streams, one gateway killed and Valkey emptied meanwhile.

Each tenant has a hard budget in tokens and far more clients than it pays for. Every client sends one streamed request
after another, to any gateway, and waits as long as it is told to, until it is told that the budget is spent. What the
engines' journals count, prompts included, is the truth; the ledger must say the same, and the budget must not be
passed by one token nor left unused.
"""

import asyncio
from collections import Counter
from dataclasses import dataclass
from random import Random
from typing import Any

from gateway.bench.accounts import Account, num_pending, open_accounts, read_books
from gateway.bench.http import Connection
from gateway.bench.servers import MODEL_ID, GatewayProcess, Place, place
from gateway.database import Database
from gateway.secrets import load_secrets
from gateway.world import World

NUM_GATEWAYS = 3
RESTART_AFTER_S = 2.0  # as a service manager would
SETTLE_TIMEOUT_S = 60.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    num_tenants: int = 8
    num_streams: int = 128  # of each tenant, at the same time
    budget_tokens: int = 20_000
    max_tokens: int = 200
    time_limit_s: float = 240.0
    kill_after_s: float = 4.0
    empty_after_s: float = 7.0
    step_ms: int = 200
    tokens_per_step: int = 8


async def measure_overshoot(world: World, plan: Plan) -> dict[str, Any]:
    """The figures of one run. Raises CommandError."""
    async with place(world) as here:
        await here.make_tables()
        database = Database(here.own_url)
        try:
            pepper = load_secrets(here.secrets, world.entropy).key_pepper
            async with database.transaction() as conn:
                accounts = await open_accounts(conn, world, pepper, plan.num_tenants, budget_tokens=plan.budget_tokens)
            return await _run(here, database, plan, accounts)
        finally:
            await database.dispose()


async def _run(here: Place, database: Database, plan: Plan, accounts: list[Account]) -> dict[str, Any]:
    script = {
        "step_ms": plan.step_ms,
        "tokens_per_step": plan.tokens_per_step,
        "answer_tokens_min": plan.max_tokens // 8,
        "answer_tokens_max": plan.max_tokens + plan.max_tokens // 8,
    }
    settings = {"hold_ttl_s": "120", "lease_ttl_s": "5", "max_num_seqs": "1024"}
    first = await here.start_gateway(0, script, **settings)  # makes the log's keys, which the others read
    others = await asyncio.gather(
        *(here.start_gateway(number, script, **settings) for number in range(1, NUM_GATEWAYS))
    )
    gateways = [first, *others]
    loop = asyncio.get_running_loop()
    began = loop.time()
    told: Counter[str] = Counter()
    clients = [
        asyncio.create_task(_client(gateways, account, number, plan, told, began + plan.time_limit_s))
        for account in accounts
        for number in range(plan.num_streams)
    ]
    faults = asyncio.create_task(_faults(here, gateways[1], plan))
    await asyncio.gather(*clients)
    wall_s = loop.time() - began
    await faults
    async with asyncio.timeout(SETTLE_TIMEOUT_S):
        while await _pending(database):  # noqa: ASYNC110 - nobody tells when the last one has ended
            await asyncio.sleep(0.5)
    return await _figures(here, database, plan, accounts, told, wall_s)


async def _figures(
    here: Place, database: Database, plan: Plan, accounts: list[Account], told: Counter[str], wall_s: float
) -> dict[str, Any]:
    async with database.read() as conn:
        books = await read_books(conn, here.counts)
    counted = [books.num_engine_tokens_by_tenant.get(account.tenant_id, 0) for account in accounts]
    billed = [books.num_tokens_by_tenant.get(account.tenant_id, 0) for account in accounts]
    return {
        "tokens_over_budget": sum(max(0, one - plan.budget_tokens) for one in counted),
        "usable_share": round(min(billed) / plan.budget_tokens, 5),
        "entries_sum_nano_usd": books.entries_sum_nano_usd,
        "ledger_minus_engine_tokens": sum(abs(a - b) for a, b in zip(billed, counted, strict=True)),
        "orphan_holds": books.num_pending_holds,
        "num_tenants": plan.num_tenants,
        "num_streams": plan.num_streams,
        "budget_tokens": plan.budget_tokens,
        "num_requests_billed": books.num_usage_rows,
        "num_tokens_unbilled": books.num_tokens_unbilled,
        "num_answers": dict(sorted(told.items())),
        "wall_s": round(wall_s, 1),
    }


async def _pending(database: Database) -> int:
    async with database.read() as conn:
        return await num_pending(conn)


async def _client(
    gateways: list[GatewayProcess], account: Account, number: int, plan: Plan, told: Counter[str], deadline: float
) -> None:
    """One client until its tenant's budget is spent, or time is up."""
    loop, random = asyncio.get_running_loop(), Random(number)  # noqa: S311 - spreads waits
    connections: dict[int, Connection] = {}
    at, num_sent = number, 0
    try:
        while loop.time() < deadline:
            which = at % len(gateways)
            if which not in connections:
                connections[which] = Connection(gateways[which].port, gateways[which].tls, account.secret)
            num_sent += 1
            body = {
                "model": MODEL_ID,
                "messages": [{"role": "user", "content": f"{number}.{num_sent}"}],
                "max_tokens": plan.max_tokens,
                "seed": number * 1_000 + num_sent,
                "stream": True,
            }
            reply = await connections[which].post("/v1/chat/completions", body)
            if reply.status == 200:
                told["whole" if reply.complete and b"data: [DONE]" in reply.body else "broken"] += 1
                at += 0 if reply.complete else 1
                continue
            told[f"{reply.status} {reply.code}".strip()] += 1
            if reply.code == "insufficient_quota":
                return
            at += 1
            await asyncio.sleep(max(0.2, reply.retry_after_s) * (0.75 + random.random() / 2))
        told["out of time"] += 1
    finally:
        for one in connections.values():
            one.close()


async def _faults(here: Place, victim: GatewayProcess, plan: Plan) -> None:
    await asyncio.sleep(plan.kill_after_s)
    await victim.kill()
    await asyncio.sleep(RESTART_AFTER_S)
    await victim.start()
    await asyncio.sleep(max(0.0, plan.empty_after_s - plan.kill_after_s - RESTART_AFTER_S))
    await here.lose_valkey()
    await asyncio.sleep(0.5)
    await here.start_valkey()
