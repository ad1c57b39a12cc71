"""Counters that outlive their store: two gateways, one Valkey that is emptied and cut off at any moment, one ledger.

The model is the ledger itself: whatever happened, today's holds in SQL use and reserve no more than the limits of each
scope. At the end everybody is connected, the store is emptied once more, and what it is told is exactly what is left.
"""

import asyncio
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from random import Random
from tempfile import TemporaryDirectory
from types import SimpleNamespace
from typing import Any

from hypothesis import settings
from redis.asyncio import Redis
from redis.exceptions import ConnectionError as RedisConnectionError
from sqlalchemy import select

from audit.transparency import tables as audit_tables
from engine.protocol import SamplingParams
from gateway.allowance import Allowance
from gateway.api.admission import Admission, StaleLeaseError, write_admission
from gateway.api.auth import Caller
from gateway.api.settlement import Outcome, write_settlement
from gateway.api.translation import Work
from gateway.clerk import Clerk
from gateway.database import Database
from gateway.host.overdue import settle_abandoned
from gateway.metrics import Metrics
from gateway.settings import Settings
from gateway.world import World
from tenancy import tables
from tenancy.access.keys import Principal
from tenancy.accounts.ledger import pending_holds
from tenancy.quotas.failure_policy import FailurePolicy
from tenancy.quotas.limits import ScopeLimits
from tenancy.quotas.quota import Lease, Quota, QuotaUnavailableError
from tenancy.usage.meter import Usage
from tests.tenancy.conftest import redis_client

ORGANISATION_TOKENS, TENANT_TOKENS = 90, 60
ORGANISATION_SLOTS, TENANT_SLOTS = 6, 4
REQUESTS = 16
PREFIX = "quota-machine"
LEASE_TTL_S = 3_600  # nobody renews here: longer than any machine that runs this stands still


class Cable:
    """The real client, which can be cut off."""

    def __init__(self, redis: Redis) -> None:
        self._redis = redis
        self.is_cut = False

    def __getattr__(self, name: str) -> Any:
        async def call(*arguments: Any) -> Any:
            if self.is_cut:
                raise RedisConnectionError("cut")
            return await getattr(self._redis, name)(*arguments)

        return call


@dataclass
class Tenant:
    caller: Caller
    tenant_id: str


@dataclass
class Gateway:
    """One process; `again` is the next one on its folder."""

    machine: "QuotaMachine"
    name: str
    cable: Any = None
    allowance: Any = None
    asked: list[tuple[Tenant, Work, str, Lease]] = field(default_factory=list)
    running: list[Admission] = field(default_factory=list)

    def again(self) -> None:
        machine, metrics = self.machine, Metrics()
        self.cable = Cable(machine.redis)
        world = World(time.time_ns, lambda: time.monotonic_ns() + machine.waited_ns, os.urandom, {})
        quota = Quota(self.cable, prefix=PREFIX)
        self.allowance = Allowance(quota, self.cable, machine.database, world, metrics, LEASE_TTL_S)
        self.services: Any = SimpleNamespace(
            world=world, settings=Settings(), metrics=metrics, gateway_id=self.name, allowance=self.allowance
        )
        self.asked.clear()
        self.running.clear()


class QuotaMachine:
    def __init__(self, valkey_socket: Path) -> None:
        self.runner = asyncio.Runner()
        self.folder = TemporaryDirectory(dir="/dev/shm" if os.access("/dev/shm", os.W_OK) else None)
        self.database = Database(f"sqlite+aiosqlite:///{Path(self.folder.name) / 'machine.db'}")
        self.redis = redis_client(valkey_socket)
        self.began = time.monotonic()
        self.waited_ns = 0
        self.number = 0
        self.tenants = self.runner.run(self._prepare())
        self.gateways = [Gateway(self, "one"), Gateway(self, "two")]
        for gateway in self.gateways:
            gateway.again()

    async def _prepare(self) -> dict[str, Tenant]:
        await self.redis.flushall()
        made = {}
        async with self.database.transaction() as conn:
            await conn.run_sync(tables.metadata.create_all)
            await conn.run_sync(audit_tables.metadata.create_all)
            clerk = Clerk(conn, os.urandom, time.time_ns())
            prices = dict.fromkeys(("input_pico_usd", "cached_input_pico_usd", "output_pico_usd"), 1_000)
            await clerk.add_price("model", **prices, request_nano_usd=0)
            for name, mode in (("acme", "lease"), ("globex", "closed")):
                tenant_id, project_id = await clerk.create_tenant(name, organisation="org")
                await clerk.grant_credit(tenant_id, 10**9, memo="")
                key = await clerk.create_key(tenant_id, project_id, "key", b"p" * 32)
                organisation_id = await conn.scalar(select(tables.organisation.c.id))
                policy = FailurePolicy(mode, 25)  # type: ignore[arg-type]
                principal = Principal(
                    str(organisation_id), tenant_id, name, project_id, key.key_id, frozenset(), policy=policy
                )
                common = {"organisation_id": str(organisation_id), "requests_per_minute": REQUESTS}
                scopes = (
                    ScopeLimits(
                        str(organisation_id),
                        concurrency_max=ORGANISATION_SLOTS,
                        tokens_per_day=ORGANISATION_TOKENS,
                        organisation_id=str(organisation_id),
                    ),
                    ScopeLimits(tenant_id, concurrency_max=TENANT_SLOTS, tokens_per_day=TENANT_TOKENS, **common),  # type: ignore[arg-type]
                    ScopeLimits(project_id, organisation_id=str(organisation_id)),
                    ScopeLimits(key.key_id, tokens_per_minute=TENANT_TOKENS, organisation_id=str(organisation_id)),
                )
                made[name] = Tenant(Caller(principal, scopes), tenant_id)
        return made

    # --- steps --------------------------------------------------------------------------------------------------------

    async def ask(self, gateway: Gateway, name: str, num_tokens: int) -> None:
        self.number += 1
        tenant, request_id = self.tenants[name], f"req_{self.number}"
        work = Work("model", [1], SamplingParams(max_tokens=num_tokens), 1, "", True, False, "")
        try:
            lease = await gateway.allowance.acquire(
                tenant.caller.principal, tenant.caller.limits, lease_id=request_id, num_tokens=1 + num_tokens
            )
        except QuotaUnavailableError:
            assert gateway.cable.is_cut, "only a store that is gone is not available"
            return
        if isinstance(lease, Lease):
            assert lease.mode == "store" or (name == "acme" and gateway.cable.is_cut)
            gateway.asked.append((tenant, work, request_id, lease))

    async def hold(self, gateway: Gateway) -> None:
        """T1 of all that has been asked."""
        for tenant, work, request_id, lease in gateway.asked:
            try:
                async with self.database.transaction() as conn:
                    admission = await write_admission(
                        conn, gateway.services, tenant.caller, work, request_id, lease, f"hold_{request_id}"
                    )
            except StaleLeaseError:
                gateway.allowance.stale(lease)
                continue
            gateway.running.append(admission)
        gateway.asked.clear()

    async def serve(self, gateway: Gateway, name: str, num_tokens: int) -> None:
        await self.ask(gateway, name, num_tokens)
        await self.hold(gateway)

    async def fill(self, gateway: Gateway, name: str, num_tokens: int) -> None:
        """As much as there is, all at once or one after the other."""
        for _ in range(TENANT_SLOTS + 1):
            await self.serve(gateway, name, num_tokens)
            if num_tokens % 2:
                await self.end(gateway, 0, num_tokens)

    async def end(self, gateway: Gateway, which: int, num_tokens: int) -> None:
        if not gateway.running:
            return
        admission = gateway.running.pop(which % len(gateway.running))
        usage = Usage(1, 0, min(num_tokens, admission.max_tokens))
        outcome = Outcome(usage, "length", time.time_ns(), 1 + usage.num_completion_tokens)
        async with self.database.transaction() as conn:
            await write_settlement(conn, admission, outcome, entropy=os.urandom)
        with unavailable_if(gateway.cable.is_cut):
            await gateway.allowance.release(admission.lease, outcome.num_quota_tokens)

    async def die(self, gateway: Gateway) -> None:
        """Killed and started again: its open requests are settled as its worker's journal has them."""
        async with self.database.read() as conn:
            holds = [one for one in await pending_holds(conn) if one.gateway_id == gateway.name]
        for hold in holds:
            async with self.database.transaction() as conn:
                await settle_abandoned(conn, gateway.services, hold, Usage(1, 0, 1))
        gateway.again()

    async def empty(self) -> None:
        await self.redis.flushall()

    async def cut(self, gateway: Gateway) -> None:
        gateway.cable.is_cut = True

    async def mend(self, gateway: Gateway) -> None:
        gateway.cable.is_cut = False
        await self.watch(gateway)
        await self.watch(gateway)

    async def watch(self, gateway: Gateway) -> None:
        """Slices are cut; a store that is back is noticed."""
        self.waited_ns += 11 * 10**9
        await gateway.allowance.watch()
        if gateway.allowance._breaker._probing is not None:
            await asyncio.gather(gateway.allowance._breaker._probing, return_exceptions=True)

    # --- what always holds --------------------------------------------------------------------------------------------

    async def holds(self) -> list[Any]:
        async with self.database.read() as conn:
            return list(await conn.execute(select(tables.hold)))

    async def check(self) -> None:
        holds = await self.holds()
        for tenant_id, tokens_max, slots_max in (
            *((one.tenant_id, TENANT_TOKENS, TENANT_SLOTS) for one in self.tenants.values()),
            (None, ORGANISATION_TOKENS, ORGANISATION_SLOTS),
        ):
            mine = [one for one in holds if tenant_id in (None, one.tenant_id)]
            assert sum(one.num_tokens for one in mine) <= tokens_max, "used + held <= limit"
            assert sum(one.state == "pending" for one in mine) <= slots_max
            if tenant_id is not None:
                minutes = (time.monotonic() - self.began) / 60
                assert len(mine) <= REQUESTS * (1 + minutes)

    async def settle_up(self) -> None:
        for gateway in self.gateways:
            await self.mend(gateway)
            await self.hold(gateway)
        while any(gateway.running for gateway in self.gateways):
            for gateway in self.gateways:
                await self.end(gateway, 0, 2)
        await self.empty()
        used = {
            name: sum(one.num_tokens for one in await self.holds() if one.tenant_id == tenant.tenant_id)
            for name, tenant in self.tenants.items()
        }
        # The first request finds the store empty; it is asked for too much, so that it takes nothing.
        tenant = self.tenants["globex"]
        await self.gateways[0].allowance.acquire(
            tenant.caller.principal, tenant.caller.limits, lease_id="look", num_tokens=TENANT_TOKENS + 1
        )
        for name, tenant in self.tenants.items():
            left = await self.gateways[0].allowance.usage_now(tenant.tenant_id, tenant.caller.limits[1:2])
            assert left.remaining_tokens_per_day == TENANT_TOKENS - used[name]
            assert left.num_leases == 0
        for gateway in self.gateways:
            await self.is_served(gateway)

    async def is_served(self, gateway: Gateway) -> None:
        """Nobody is refused for safety's sake where there is room."""
        for name, tenant in self.tenants.items():
            scopes, looked = tenant.caller.limits, time.monotonic()
            now = await gateway.allowance.usage_now(tenant.tenant_id, scopes)
            room = min(now.remaining_tokens_per_day, now.remaining_tokens) >= 2 and now.remaining_requests >= 1
            before = len(await self.holds())
            await self.serve(gateway, name, 1)
            served = len(await self.holds()) - before
            stood_still = time.monotonic() - looked > 1  # meanwhile a minute's counters give something back
            assert served == room or (served == 1 and stood_still)
            await self.end(gateway, 0, 1)

    def close(self) -> None:
        async def end() -> None:
            for gateway in self.gateways:
                await gateway.allowance.close()
            await self.redis.aclose()
            await self.database.dispose()

        self.runner.run(end())
        self.runner.close()
        self.folder.cleanup()


@contextmanager
def unavailable_if(is_cut: bool) -> Iterator[None]:
    try:
        yield
    except QuotaUnavailableError:
        assert is_cut


def drawn(seed: int) -> list[tuple[Any, ...]]:
    """(step, gateway or None, arguments...). Drawn evenly, which Hypothesis's lists are not: faults need company."""
    random = Random(seed)

    def one() -> tuple[Any, ...]:
        gateway, name = random.randrange(2), random.choice(("acme", "acme", "globex"))
        size = random.choice((1, 3, 8, 14, 15, 24, 25))
        return random.choice(
            (
                (QuotaMachine.fill, gateway, name, size),
                (QuotaMachine.fill, gateway, name, size),
                (QuotaMachine.ask, gateway, name, size),
                (QuotaMachine.ask, gateway, name, size),
                (QuotaMachine.hold, gateway),
                (QuotaMachine.end, gateway, random.randrange(6), size),
                (QuotaMachine.end, gateway, random.randrange(6), 1),
                (QuotaMachine.watch, gateway),
                (QuotaMachine.cut, gateway),
                (QuotaMachine.mend, gateway),
                (QuotaMachine.empty, None),
                (QuotaMachine.die, gateway),
            )
        )

    return [one() for _ in range(random.randrange(5, 30))]


NUM_RUNS = 12 if settings.default.max_examples <= 40 else 1_500


def test_used_and_held_never_exceed_a_limit_whatever_becomes_of_the_store(valkey_socket: Path) -> None:
    for seed in range(NUM_RUNS):
        machine, done = QuotaMachine(valkey_socket), []
        try:
            for method, gateway, *arguments in drawn(seed):
                done.append((method.__name__, gateway, *arguments))
                where = () if gateway is None else (machine.gateways[gateway],)
                machine.runner.run(method(machine, *where, *arguments))
                machine.runner.run(machine.check())
            machine.runner.run(machine.settle_up())
        except AssertionError as error:
            error.add_note(f"seed {seed}: {done}")
            raise
        finally:
            machine.close()
