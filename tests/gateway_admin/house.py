"""A whole admin site: real SQLite, real Valkey, a worker that speaks the real protocol, a clock moved by hand."""

import asyncio
import os
import re
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path
from typing import Any

import httpx
from starlette.applications import Starlette

from audit.transparency.entry import Entry
from audit.transparency.outbox import append
from audit.transparency.tables import metadata as audit_metadata
from engine.client import EngineClient
from engine.protocol import PROTOCOL_VERSION, Ready, Stats, encode_frame
from engine.text.tokenizer import Tokenizer
from gateway.admin import admin_routes
from gateway.api.app import create_app
from gateway.database import Database
from gateway.engine_link import EngineLink
from gateway.host.valkey import connect_redis
from gateway.secrets import Secrets
from gateway.services import Services
from gateway.settings import Settings
from gateway.world import World, new_id
from tenancy.access.directory import create_organisation, create_project, create_tenant
from tenancy.access.keys import mint_key
from tenancy.access.operators import create_operator
from tenancy.accounts.ledger import Hold, capture, grant_credit, place_hold
from tenancy.accounts.posting import CURRENCY
from tenancy.pricing.price_book import add_price
from tenancy.pricing.prices import Price, charge_nano_usd, worst_case_nano_usd
from tenancy.quotas.quota import Quota
from tenancy.tables import metadata as tenancy_metadata
from tenancy.usage.meter import Effort, Usage, UsageRecord, record_usage
from tests.model import demo_model_dir

NS_PER_S = 10**9
NOON_NS = 1_795_435_200 * NS_PER_S  # 2026-11-23 12:00:00 UTC
NAME = "olga"
PASSWORD = "correct horse battery"
ORIGIN = "https://127.0.0.1:8443"
MODEL = "smollm2-135m-instruct"
HEARTBEAT = {"num_steps": 4_321, "num_slots_checked": 1_234_567, "num_violations": 0, "num_self_tests": 12}
SAMPLED = {"slots_per_step": 256, "num_slots_read": 9, "replay_percent": 5, "num_sequences": 40, "num_replays": 2}
CSRF = re.compile(r'name="csrf_token" value="([^"]+)"')


@dataclass
class Clock:
    at_ns: int = NOON_NS

    def __call__(self) -> int:
        return self.at_ns

    def advance(self, seconds: int) -> None:
        self.at_ns += seconds * NS_PER_S


@dataclass(frozen=True)
class Customer:
    tenant_id: str
    project_id: str
    key_id: str
    secret_text: str
    organisation_id: str


@dataclass
class House:
    services: Services
    clock: Clock
    worker: "Worker"
    price: Price
    app: Starlette
    customers: dict[str, Customer] = field(default_factory=dict)

    def browser(self, address: str = "127.0.0.1") -> httpx.AsyncClient:
        """A client that behaves as a browser on our own pages; cookies are kept, redirects are not followed."""
        transport = httpx.ASGITransport(app=self.app, client=(address, 50_000))
        headers = {"origin": "null", "sec-fetch-site": "same-origin"}
        return httpx.AsyncClient(transport=transport, base_url=ORIGIN, headers=headers)

    @asynccontextmanager
    async def visitor(self) -> AsyncIterator[httpx.AsyncClient]:
        """A browser that is logged in."""
        async with self.browser() as browser:
            answer = await log_in(browser)
            assert answer.status_code == 303
            yield browser

    async def add_tenant(self, name: str, *, credit_nano_usd: int = 5 * 10**9, currency: str = CURRENCY) -> Customer:
        entropy, now_ns = os.urandom, self.clock()
        async with self.services.database.transaction() as conn:
            organisation = await create_organisation(conn, f"{name[:80]} Inc", entropy=entropy, now_ns=now_ns)
            tenant = await create_tenant(
                conn, organisation.organisation_id, name, entropy=entropy, now_ns=now_ns, currency=currency
            )
            project = await create_project(conn, tenant.tenant_id, "default", entropy=entropy, now_ns=now_ns)
            key = await mint_key(
                conn,
                project.project_id,
                "laptop",
                ["inference", "usage"],
                pepper=self.services.secrets.key_pepper,
                entropy=entropy,
                now_ns=now_ns,
            )
            if credit_nano_usd:
                await grant_credit(
                    conn, tenant.tenant_id, credit_nano_usd, transfer_id=new_id("trf", entropy), now_ns=now_ns
                )
        customer = Customer(
            tenant.tenant_id, project.project_id, key.key_id, key.secret_text, organisation.organisation_id
        )
        self.customers[name] = customer
        return customer

    async def hold(self, customer: Customer, num_prompt_tokens: int, max_tokens: int) -> Hold:
        async with self.services.database.transaction() as conn:
            placed = await place_hold(
                conn,
                hold_id=new_id("hold", os.urandom),
                tenant_id=customer.tenant_id,
                request_id=new_id("req", os.urandom),
                price_id=self.price.price_id,
                amount_nano_usd=worst_case_nano_usd(self.price, num_prompt_tokens, max_tokens),
                expires_ns=self.clock() + 600 * NS_PER_S,
                now_ns=self.clock(),
            )
        assert isinstance(placed, Hold)
        return placed

    async def settle(
        self, customer: Customer, hold: Hold, usage: Usage, *, ago_s: int = 0, effort: Effort | None = None
    ) -> None:
        amount = charge_nano_usd(self.price, usage)
        finished_ns = self.clock() - ago_s * NS_PER_S
        async with self.services.database.transaction() as conn:
            await capture(conn, hold.hold_id, amount, self.clock())
            record = UsageRecord(
                hold.request_id,
                customer.tenant_id,
                customer.project_id,
                customer.key_id,
                MODEL,
                usage,
                self.price.price_id,
                amount,
                finished_ns - NS_PER_S,
                finished_ns,
                "stop",
                stream=True,
                effort=effort,
            )
            await record_usage(conn, record)

    async def serve(self, customer: Customer, prompt: int, cached: int, completion: int, *, ago_s: int = 0) -> None:
        """One request, from hold to usage row."""
        placed = await self.hold(customer, prompt, completion + 5)
        await self.settle(customer, placed, Usage(prompt, cached, completion), ago_s=ago_s)

    async def log(self, kind: str, body: dict[str, Any], *, ago_s: int = 0) -> None:
        entry = Entry(kind, "", self.clock() - ago_s * NS_PER_S, body)
        async with self.services.database.transaction() as conn:
            await append(conn, entry, entropy=os.urandom)

    async def heartbeat(self, *, ago_s: int = 0, **body: Any) -> None:
        full = {"epoch": self.worker.ready.epoch, **HEARTBEAT, "last_self_test_ok": True, **body}
        full = {**SAMPLED, "num_replays_differing": 0, "num_canaries": 1, **full}
        await self.log("audit.heartbeat", full, ago_s=ago_s)


@dataclass
class Worker:
    """Sends Ready and Stats over a unix socket, as the engine worker does on connect; nothing else."""

    path: Path
    ready: Ready
    stats: Stats
    server: asyncio.Server | None = None
    writers: list[asyncio.StreamWriter] = field(default_factory=list)

    async def start(self) -> None:
        self.server = await asyncio.start_unix_server(self._serve, path=str(self.path))

    async def _serve(self, _reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.writers.append(writer)
        writer.write(encode_frame(self.ready) + encode_frame(self.stats))
        await writer.drain()

    async def report(self, blocks_by_domain: dict[str, int]) -> None:
        num_free = self.stats.num_blocks - sum(blocks_by_domain.values())
        frame = encode_frame(
            Stats(self.stats.step + 1, 1, 0, self.stats.num_blocks, num_free, blocks_by_domain, 0, 0, 0, {})
        )
        for writer in self.writers:
            writer.write(frame)
            await writer.drain()

    async def stop(self) -> None:
        for writer in self.writers:
            writer.close()
        if self.server is not None:
            self.server.close()
            await self.server.wait_closed()
            self.server = None


@asynccontextmanager
async def build_house(
    folder: Path, valkey_socket: Path, *, clock: Any = None, database_url: str = ""
) -> AsyncIterator[House]:
    """`clock` is a Clock that stands still, unless another is given; the database is SQLite, unless one is named."""
    clock = clock or Clock()
    world = World(now_ns=clock, monotonic_ns=time.monotonic_ns, entropy=os.urandom, environ={})
    database = Database(database_url or f"sqlite+aiosqlite:///{folder / 'bulkhead.db'}")
    if database.is_sqlite:
        async with database.transaction() as conn:
            await conn.run_sync(tenancy_metadata.create_all)
            await conn.run_sync(audit_metadata.create_all)
    redis = connect_redis(f"unix://{valkey_socket}")
    await redis.flushall()
    ready = Ready(
        protocol_version=PROTOCOL_VERSION,
        epoch="e7c1",
        pid=os.getpid(),
        model_id=MODEL,
        model_digest="sha256:00",
        context_max=2048,
        vocab_size=49_152,
        block_size=32,
        num_blocks=512,
        dtype="bfloat16",
        device="cpu",
        kernels="torch",
        isolation="strict",
    )
    worker = Worker(folder / "worker.sock", ready, Stats(0, 0, 0, 512, 512, {}, 0, 0, 0, {}))
    await worker.start()
    client = await EngineClient.connect(worker.path, timeout_s=5)
    engine = EngineLink()
    engine.attach(client)
    services = Services(
        settings=replace(Settings(), data_dir=folder),
        world=world,
        database=database,
        redis=redis,
        quota=Quota(redis),
        engine=engine,
        tokenizer=_tokenizer(),
        secrets=Secrets(os.urandom(32), os.urandom(32), os.urandom(32)),
    )
    async with database.transaction() as conn:
        await create_operator(conn, NAME, PASSWORD, clock(), entropy=os.urandom)
        price = await add_price(
            conn,
            model=MODEL,
            input_pico_usd=150_001,
            cached_input_pico_usd=15_001,
            output_pico_usd=600_007,
            effective_from_ns=0,
            entropy=os.urandom,
            now_ns=0,
        )
    house = House(services, clock, worker, price, create_app(services, extra_routes=admin_routes(services)))
    try:
        yield house
    finally:
        await client.close()
        await worker.stop()
        await redis.aclose()
        await database.dispose()


async def log_in(browser: httpx.AsyncClient, name: str = NAME, password: str = PASSWORD) -> httpx.Response:
    return await browser.post("/admin/login", data={"name": name, "password": password})


def csrf_token(page: httpx.Response) -> str:
    found = CSRF.search(page.text)
    assert found is not None, "the page has no form of this session"
    return found.group(1)


@cache
def _tokenizer() -> Tokenizer:
    return Tokenizer.load(demo_model_dir())
