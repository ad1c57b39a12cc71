"""The real HTTP application over real parts: SQLite, Valkey, the ledger, the log's outbox, an engine over its socket.

Only the model is small: arithmetic behind the engine's real protocol (integer_worker.py), or whatever worker listens on
the socket that is given.
"""

import json
import os
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from redis.asyncio import Redis
from sqlalchemy import func, select
from starlette.applications import Starlette

from audit.transparency import tables as audit_tables
from engine.client import EngineClient
from engine.text.tokenizer import Tokenizer
from gateway.api.app import create_app
from gateway.api.settlement import Settler
from gateway.database import Database
from gateway.engine_link import EngineLink
from gateway.secrets import Secrets
from gateway.services import Services
from gateway.settings import Settings
from gateway.world import World
from tenancy import tables as tenancy_tables
from tenancy.access.directory import create_organisation, create_project, create_tenant
from tenancy.access.keys import mint_key
from tenancy.accounts.ledger import balance, grant_credit, pending_holds
from tenancy.accounts.ledger_check import check_ledger
from tenancy.pricing.price_book import add_price
from tenancy.quotas.quota import Quota, QuotaUnavailableError
from tenancy.quotas.quota_epochs import change_epoch, counters_of, lock_epoch, lock_tenants
from tests.fakes.asgi import Answer, Call
from tests.fakes.flaky_database import FlakyDatabase

CREDIT_NANO_USD = 10**12
USD = 10**9


@dataclass(frozen=True)
class Account:
    tenant_id: str
    project_id: str
    key_id: str
    secret: str


@dataclass
class Hall:
    app: Starlette
    services: Services
    accounts: dict[str, Account]

    @property
    def database(self) -> FlakyDatabase:
        database = self.services.database
        assert isinstance(database, FlakyDatabase)
        return database

    @property
    def settler(self) -> Settler:
        settler: Settler = self.app.state.settler
        return settler

    async def call(
        self, method: str, path: str, body: Any = None, *, tenant: str | None = "acme", **how: Any
    ) -> Answer:
        return await self.prepare(method, path, body, tenant=tenant, **how).run(self.app)

    def prepare(self, method: str, path: str, body: Any = None, *, tenant: str | None = "acme", **how: Any) -> Call:
        """A call that has not been made yet. `body` is bytes as they are, or anything that JSON can hold."""
        headers = dict(how.pop("headers", {}))
        if tenant is not None:
            headers.setdefault("authorization", f"Bearer {self.accounts[tenant].secret}")
        content = body if isinstance(body, bytes) else b"" if body is None else json.dumps(body).encode()
        return Call(method, path, headers, how.pop("chunks", [content]), **how)

    async def chat(self, text: str = "hello", *, tenant: str = "acme", **fields: Any) -> Answer:
        how = {name: fields.pop(name) for name in ("leave_after", "stall_after", "on_sent") if name in fields}
        body = chat_body(self.services.tokenizer.model_id, text, **fields)
        return await self.call("POST", "/v1/chat/completions", body, tenant=tenant, **how)

    async def usage_rows(self) -> dict[str, Any]:
        async with self.services.database.read() as conn:
            rows = await conn.execute(select(tenancy_tables.usage_record))
            return {row.request_id: row for row in rows}

    async def outbox(self, kind: str) -> list[dict[str, Any]]:
        table = audit_tables.outbox
        async with self.services.database.read() as conn:
            rows = await conn.execute(select(table.c.body).where(table.c.kind == kind).order_by(table.c.id))
            return [json.loads(row.body) for row in rows]

    async def num_rows(self) -> dict[str, int]:
        names = (tenancy_tables.hold, tenancy_tables.usage_record, tenancy_tables.ledger_transaction)
        async with self.services.database.read() as conn:
            return {t.name: (await conn.execute(select(func.count()).select_from(t))).scalar_one() for t in names}

    async def credit(self, tenant: str = "acme") -> Any:
        async with self.services.database.read() as conn:
            return await balance(conn, self.accounts[tenant].tenant_id)

    async def leases(self) -> int:
        """Places taken in Valkey over all scopes."""
        total = 0
        async for key in self.services.redis.scan_iter("*"):
            if await self.services.redis.type(key) == b"zset":
                total += int(await self.services.redis.zcard(key))
        return total

    async def check_books(self) -> None:
        """The invariants after every request has ended."""
        assert await self.settler.drain(5) == 0
        async with self.services.database.read() as conn:
            assert await pending_holds(conn) == []
            checked = await check_ledger(conn)
            assert checked.unbalanced == []
            assert checked.total_nano_usd == 0
            holds = {row.request_id: row for row in await conn.execute(select(tenancy_tables.hold))}
        rows = await self.usage_rows()
        settled = {body["request_id"]: body for body in await self.outbox("request.settled")}
        admitted = {body["request_id"] for body in await self.outbox("request.admitted")}
        assert settled.keys() == admitted == holds.keys()
        for request_id, row in rows.items():
            hold, body = holds[request_id], settled[request_id]
            assert hold.captured_nano_usd == row.amount_nano_usd == int(body["amount_nano_usd"])
            assert row.amount_nano_usd <= hold.amount_nano_usd
            assert body["num_completion_tokens"] == row.num_completion_tokens
            assert body["outcome"] == hold.state


def chat_body(model: str, text: str = "hello", **fields: Any) -> dict[str, Any]:
    """Seeded unless the test says otherwise: a drawn seed would end one answer in 23 with its first token."""
    return {"model": model, "messages": [{"role": "user", "content": text}], "seed": 5, **fields}


def world(environ: dict[str, str] | None = None) -> World:
    return World(time.time_ns, time.monotonic_ns, os.urandom, environ or {})


@asynccontextmanager
async def open_hall(
    folder: Path,
    redis: Redis,
    model_dir: Path,
    socket_path: Path,
    *,
    database_url: str = "",
    world: World,
    credit_nano_usd: int = CREDIT_NANO_USD,
    output_pico_usd: int = 600_000,
    remember: bool = False,
    **settings: Any,
) -> AsyncIterator[Hall]:
    """Two tenants with credit, keys and a price; connected to the worker that listens on `socket_path`."""
    client = await EngineClient.connect(socket_path, timeout_s=60)
    own = Settings(data_dir=folder, **settings)
    database = FlakyDatabase(database_url or f"sqlite+aiosqlite:///{folder / 'hall.db'}")
    if database.is_sqlite:  # on PostgreSQL they are the owner's, and there (PostgresServer.new_served_database)
        await _create_tables(database)
    tokenizer = Tokenizer.load(model_dir)
    secrets = Secrets(b"p" * 32, b"c" * 32, b"s" * 32)
    accounts = {}
    async with database.transaction() as conn:
        for name in ("acme", "globex"):
            accounts[name] = await _open_account(conn, name, secrets, world, credit_nano_usd)
        await add_price(
            conn,
            model=tokenizer.model_id,
            input_pico_usd=150_000,
            cached_input_pico_usd=75_000,
            output_pico_usd=output_pico_usd,
            request_nano_usd=7,
            effective_from_ns=0,
            entropy=world.entropy,
            now_ns=world.now_ns(),
        )
    link = EngineLink()
    link.attach(client)
    services = Services(own, world, database, redis, Quota(redis), link, tokenizer, secrets)
    standing = await services.standing.look()
    assert standing.append_only == ("triggers" if database.is_sqlite else "rights"), standing.sentence()
    if not remember:  # most tests change limits and go on at once
        services.remembered.keep_caller = lambda *_: None  # type: ignore[method-assign]
    await _count_from_the_start(services)
    app = create_app(services)
    try:
        yield Hall(app, services, accounts)
    finally:
        await app.state.settler.drain(5)
        await services.allowance.close()
        await client.close()
        if link._client is not None and link._client is not client:
            await link._client.close()
        await database.dispose()


async def reconnect(hall: Hall, socket_path: Path) -> None:
    """What the supervisor does when the worker is back."""
    hall.services.engine.attach(await EngineClient.connect(socket_path, timeout_s=20))


async def _create_tables(database: Database) -> None:
    async with database.transaction() as conn:
        await conn.run_sync(tenancy_tables.metadata.create_all)
        await conn.run_sync(audit_tables.metadata.create_all)


async def _count_from_the_start(services: Services) -> None:
    """What a tenant's first request does, done beforehand: tests count transactions."""
    async with services.database.transaction() as conn:
        for organisation_id in list((await conn.execute(select(tenancy_tables.organisation.c.id))).scalars()):
            tenant_ids = await lock_tenants(conn, organisation_id)
            await lock_epoch(conn, organisation_id, now_ns=0)
            counters = await counters_of(conn, organisation_id, tenant_ids, now_ns=services.world.now_ns())
            with suppress(QuotaUnavailableError):
                await services.quota.rebuild(counters, epoch=organisation_id, lease_ttl_ms=1_000)
            await change_epoch(conn, organisation_id, organisation_id, now_ns=0)


async def _open_account(conn: Any, name: str, secrets: Secrets, world: World, credit_nano_usd: int) -> Account:
    now_ns, entropy = world.now_ns(), world.entropy
    organisation = await create_organisation(conn, name, entropy=entropy, now_ns=now_ns)
    tenant = await create_tenant(conn, organisation.organisation_id, name, entropy=entropy, now_ns=now_ns)
    project = await create_project(conn, tenant.tenant_id, "main", entropy=entropy, now_ns=now_ns)
    key = await mint_key(
        conn, project.project_id, "test", {"inference"}, pepper=secrets.key_pepper, entropy=entropy, now_ns=now_ns
    )
    await grant_credit(conn, tenant.tenant_id, credit_nano_usd, transfer_id=f"grant-{name}", now_ns=now_ns, memo="test")
    return Account(tenant.tenant_id, project.project_id, key.key_id, key.secret_text)
