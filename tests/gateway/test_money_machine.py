"""Money from admission to settlement in any order: grants, price changes, budgets, crashes, refunds, an emptied Valkey.

The real T1 and T2, the real recovery and a real Valkey, against a model of a few lines a tenant. After each step: used
and held of a hard budget are within its limit, entries sum to zero, every charge is its usage at the price that was in
force when it was admitted. At the end the same operations are done again: on the same database they change nothing,
on a fresh one they give the same ledger, entry by entry.
"""

import asyncio
from collections.abc import Callable
from dataclasses import dataclass, replace
from fractions import Fraction
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from types import SimpleNamespace
from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st
from sqlalchemy import select

from audit.transparency import tables as audit_tables
from engine.protocol import SamplingParams
from gateway.api.admission import Admission, write_admission
from gateway.api.auth import Caller
from gateway.api.choices import NOTHING
from gateway.api.problems import CreditExhaustedError
from gateway.api.settlement import Outcome, write_settlement
from gateway.api.translation import Work
from gateway.clerk import Clerk
from gateway.database import Database
from gateway.host.overdue import settle_abandoned
from gateway.settings import Settings
from tenancy import tables
from tenancy.access.keys import Principal
from tenancy.accounts.budget_use import budget_uses
from tenancy.accounts.corrections import CorrectionError
from tenancy.accounts.ledger import Balance, balance, due_holds, get_hold, pending_holds, place_hold
from tenancy.accounts.ledger_check import check_ledger
from tenancy.pricing.price_book import list_prices
from tenancy.pricing.prices import Step
from tenancy.quotas.limits import ScopeLimits
from tenancy.quotas.quota import Lease, Quota
from tenancy.usage.meter import Usage
from tests.tenancy.conftest import opened, redis_client
from tests.tenancy.test_ledger import MEMORY_DISK
from tests.tenancy.world import SECOND, T0, Populated, counting_entropy, populate

MODEL = "m"
TENANTS = ("acme", "globex")
TTL_S = 60
CREDIT = 5_000  # of each, to begin with
BUDGET = 7_000  # of acme, in all
CONCURRENCY_MAX = 3
Operation = Callable[[Any], Any]


@cache
def prepared() -> tuple[bytes, dict[str, Populated]]:
    """The file of a database with two tenants, and a hard budget of the first."""

    async def run(url: str) -> dict[str, Populated]:
        entropy = counting_entropy()
        async with opened(url) as database, database.transaction() as conn:
            await conn.run_sync(tables.metadata.create_all)
            await conn.run_sync(audit_tables.metadata.create_all)
            made = {name: await populate(conn, name, entropy=entropy) for name in TENANTS}
            clerk = Clerk(conn, entropy, T0)
            for tenant in made.values():
                await clerk.grant_credit(tenant.tenant_id, CREDIT, memo="")
            await clerk.set_budget("tenant", made["acme"].tenant_id, "total", hard=True, limit_nano_usd=BUDGET)
            return made

    with TemporaryDirectory(dir=MEMORY_DISK) as folder:
        path = Path(folder) / "bulkhead.db"
        made = asyncio.run(run(f"sqlite+aiosqlite:///{path}"))
        return path.read_bytes(), made


@dataclass
class Running:
    """A request between T1 and T2: what its worker has produced of it, and what of that has been sent."""

    admission: Admission
    num_tokens: int = 0
    num_sent: int = 0


@dataclass
class Model:
    """What a tenant's money is, without entries and accounts."""

    granted: int = CREDIT
    charged: int = 0
    refunded: int = 0
    held: int = 0
    volume: int = 0  # tokens at prices with steps; all in one month

    @property
    def credit(self) -> int:
        return self.granted + self.refunded - self.charged - self.held


class MoneyMachine:
    def __init__(self, valkey_socket: Path) -> None:
        self.runner = asyncio.Runner()
        self.folder = TemporaryDirectory(dir=MEMORY_DISK)
        self.template, self.tenants = prepared()
        self.database = self.copy("first.db")
        self.redis = redis_client(valkey_socket)
        self.quota = Quota(self.redis, prefix="machine")
        self.runner.run(self.redis.flushall())
        self.now_ns = T0 + SECOND  # the first price begins at T0
        self.models = {name: Model() for name in TENANTS}
        self.running: dict[str, Running] = {}
        self.journal: dict[str, Usage] = {}  # survives every crash of the gateway
        self.refunds: dict[str, int] = {}  # request -> refunded
        self.operations: list[Operation] = []
        self.repeats: dict[int, Operation] = {}  # of those that ask twice and are answered by what is left then

    def copy(self, name: str) -> Database:
        path = Path(self.folder.name) / name
        path.write_bytes(self.template)
        return Database(f"sqlite+aiosqlite:///{path}")

    def replay(self) -> None:
        """Again on the same database: nothing changes. On a fresh one: the same ledger."""
        second = self.copy("second.db")
        try:
            before = self.runner.run(ledger_of(self.database))
            for number, operation in enumerate(self.operations):
                self.runner.run(in_transaction(self.database, self.repeats.get(number, operation)))
                self.runner.run(in_transaction(second, operation))
            assert self.runner.run(ledger_of(self.database)) == before
            assert self.runner.run(ledger_of(second)) == before
        finally:
            self.runner.run(second.dispose())

    def close(self) -> None:
        self.runner.run(self.redis.aclose())
        self.runner.run(self.database.dispose())
        self.runner.close()
        self.folder.cleanup()

    def do(self, operation: Operation) -> Any:
        """One transaction; kept for the replay if it came through."""
        result = self.runner.run(in_transaction(self.database, operation))
        self.operations.append(operation)
        return result

    def services(self) -> Any:
        """As much of the gateway as T1, T2 and recovery look at; every call has its own entropy and its own now."""
        now_ns, entropy = self.now_ns, counting_entropy(str(len(self.operations)))
        world = SimpleNamespace(now_ns=lambda: now_ns, entropy=entropy)
        return SimpleNamespace(world=world, settings=Settings(hold_ttl_s=TTL_S), gateway_id="")

    # --- what tenants and operators do --------------------------------------------------------------------------------

    def grant(self, name: str, amount: int) -> None:
        tenant_id, number, now_ns = self.tenants[name].tenant_id, len(self.operations), self.now_ns

        async def operation(conn: Any) -> None:
            clerk = Clerk(conn, counting_entropy(f"grant{number}"), now_ns)
            await clerk.grant_credit(tenant_id, amount, transfer_id=f"grant{number}", memo="")

        self.do(operation)
        self.models[name].granted += amount

    def change_price(self, figures: tuple[int, int, int, int, int]) -> None:
        number, now_ns = len(self.operations), self.now_ns
        names = ("input_pico_usd", "cached_input_pico_usd", "output_pico_usd", "request_nano_usd")

        async def operation(conn: Any) -> None:
            clerk = Clerk(conn, counting_entropy(f"price{number}"), now_ns)
            start, dear, _, cheap = figures[4], *figures[:3]
            steps = (Step(start, cheap, dear, cheap),) if start else ()  # its output may cost more or less than before
            await clerk.add_price(MODEL, **dict(zip(names, figures[:4], strict=True)), steps=steps)

        self.do(operation)
        self.now_ns += 1  # one price an instant

    def admit(self, name: str, num_prompt: int, max_tokens: int) -> None:
        tenant, number = self.tenants[name], len(self.operations)
        request_id = f"req_{number}"
        scopes = (ScopeLimits(tenant.tenant_id, concurrency_max=CONCURRENCY_MAX, organisation_id="org"),)
        lease = self.runner.run(
            self.quota.acquire(
                scopes, tenant_id="", lease_id=request_id, num_tokens=num_prompt + max_tokens, lease_ttl_ms=60_000
            )
        )
        if not isinstance(lease, Lease):
            return
        principal = Principal("org", tenant.tenant_id, name, tenant.project_id, tenant.key_id, frozenset())
        work = Work(MODEL, [1] * num_prompt, SamplingParams(max_tokens=max_tokens), 1, "", True, False, "")
        caller, services = Caller(principal, scopes), self.services()

        async def operation(conn: Any) -> Admission:
            return await write_admission(conn, services, caller, work, request_id, lease, f"hold_{number}")

        model, available = self.models[name], self.available(name)
        try:
            admission: Admission = self.do(operation)
        except CreditExhaustedError as error:
            assert error.needed_nano_usd > available  # noqa: PT017 - it may also come through
            self.runner.run(self.quota.release(lease, 0))
            return
        self.repeats[number] = lambda conn: place_hold(
            conn,
            hold_id=admission.hold_id,
            tenant_id=tenant.tenant_id,
            request_id=request_id,
            price_id=admission.price.price_id,
            amount_nano_usd=admission.hold_nano_usd,
            expires_ns=admission.expires_ns,
            now_ns=admission.started_ns,
        )
        assert admission.hold_nano_usd <= available
        assert (admission.max_tokens == max_tokens) == (not admission.lowered_by)
        model.held += admission.hold_nano_usd
        self.running[request_id] = Running(replace(admission, lease=lease))
        self.now_ns += SECOND

    def available(self, name: str) -> int:
        model = self.models[name]
        left = BUDGET - model.charged - model.held if name == "acme" else model.credit
        return min(model.credit, left)

    def produce(self, num_tokens: int, num_sent: int) -> None:
        """The worker goes on with all that it has."""
        for request_id, one in self.running.items():
            one.num_tokens = min(one.admission.max_tokens, one.num_tokens + num_tokens)
            one.num_sent = min(one.num_tokens, one.num_sent + num_sent)
            self.journal[request_id] = self.usage(one, one.num_tokens)

    def usage(self, one: Running, num_tokens: int) -> Usage:
        num_prompt = one.admission.num_prompt_tokens
        return Usage(num_prompt, num_prompt // 2, num_tokens) if num_tokens else NOTHING

    # --- how requests end ---------------------------------------------------------------------------------------------

    def end(self, which: int, worker_dies: bool) -> None:
        """As it should, or with what had been sent when the worker died."""
        if not self.running:
            return
        request_id = sorted(self.running)[which % len(self.running)]
        one = self.running.pop(request_id)
        usage = self.usage(one, one.num_sent if worker_dies else one.num_tokens)
        outcome = Outcome(usage, "engine_gone" if worker_dies else "length", self.now_ns, 0)
        entropy = counting_entropy(f"end{len(self.operations)}")

        async def operation(conn: Any) -> None:
            await write_settlement(conn, one.admission, outcome, entropy=entropy)

        self.do(operation)
        self.ended(one, usage)
        self.runner.run(self.quota.release(one.admission.lease, usage.num_completion_tokens))

    def gateway_dies(self) -> None:
        """All that it knew is gone; the next one settles every open hold from the worker's journal."""
        for hold in self.runner.run(in_transaction(self.database, pending_holds)):
            self.abandon(hold)
        assert not self.running

    def reap(self, seconds: int) -> None:
        """Time passes; what nobody settled within its hold's life is settled by the reaper."""
        self.now_ns += seconds * SECOND
        now_ns = self.now_ns
        for hold in self.runner.run(in_transaction(self.database, lambda conn: due_holds(conn, now_ns, 100))):
            self.abandon(hold)

    def abandon(self, hold: Any) -> None:
        services, counted = self.services(), self.journal.get(hold.request_id)
        charged = self.do(lambda conn: settle_abandoned(conn, services, hold, counted))
        one = self.running.pop(hold.request_id)
        usage = counted if counted is not None else NOTHING
        assert charged == self.ended(one, usage)

    def ended(self, one: Running, usage: Usage) -> int:
        """What the model says of a settled request; its charge, added up in fractions and rounded by them."""
        price, model = one.admission.price, self.models[one.admission.principal.tenant_name]
        kinds = ["cached_input"] * usage.num_cached_tokens
        kinds += ["input"] * (usage.num_prompt_tokens - usage.num_cached_tokens)
        kinds += ["output"] * usage.num_completion_tokens
        exact, at = Fraction(0), model.volume
        for number, kind in enumerate(kinds):  # each token on its own step
            on = [one for one in price.all_steps if one.from_tokens <= at + number][-1]
            exact += Fraction(getattr(on, f"{kind}_pico_usd"), 1_000)
        model.volume += len(kinds) if price.steps else 0
        charge = round(exact + price.request_nano_usd) if usage != NOTHING else 0
        model.held -= one.admission.hold_nano_usd
        model.charged += charge
        if charge:
            self.refunds[one.admission.request_id] = 0
        return charge

    def refund(self, which: int, percent: int) -> None:
        if not self.refunds:
            return
        request_id = sorted(self.refunds)[which % len(self.refunds)]
        row = self.runner.run(in_transaction(self.database, lambda conn: usage_row(conn, request_id)))
        number, now_ns, amount = len(self.operations), self.now_ns, 1 + row.amount_nano_usd * percent // 100

        async def operation(conn: Any) -> str:
            clerk = Clerk(conn, counting_entropy(f"refund{number}"), now_ns)
            return await clerk.refund(request_id, amount, transfer_id=f"refund{number}", reason="")

        try:
            tenant_id = self.do(operation)
        except CorrectionError:
            assert self.refunds[request_id] + amount > row.amount_nano_usd
            return
        self.refunds[request_id] += amount
        assert self.refunds[request_id] <= row.amount_nano_usd
        name = next(name for name, tenant in self.tenants.items() if tenant.tenant_id == tenant_id)
        self.models[name].refunded += amount

    def adjust(self, name: str, amount: int) -> None:
        tenant_id, number, now_ns = self.tenants[name].tenant_id, len(self.operations), self.now_ns

        async def operation(conn: Any) -> None:
            clerk = Clerk(conn, counting_entropy(f"adjust{number}"), now_ns)
            await clerk.adjust_credit(tenant_id, amount, transfer_id=f"adjust{number}", reason="")

        try:
            self.do(operation)
        except CorrectionError:
            assert self.models[name].credit + amount < 0
            return
        self.models[name].granted += amount

    def empty_valkey(self) -> None:
        """Leases are forgotten; money is not there to be forgotten."""
        self.runner.run(self.redis.flushall())

    # --- what always holds --------------------------------------------------------------------------------------------

    def agrees_with_the_model(self) -> None:
        self.runner.run(in_transaction(self.database, self.compare))

    async def compare(self, conn: Any) -> None:
        for name, model in self.models.items():
            tenant_id = self.tenants[name].tenant_id
            assert await balance(conn, tenant_id) == Balance(model.credit, model.held, model.charged - model.refunded)
        (use,) = await budget_uses(conn, self.tenants["acme"].tenant_id, self.now_ns)
        acme = self.models["acme"]
        assert (use.used_nano_usd, use.held_nano_usd) == (acme.charged, acme.held)
        assert use.used_nano_usd + use.held_nano_usd <= BUDGET
        check = await check_ledger(conn)
        assert check.ok, check
        for one in self.running.values():
            hold = await get_hold(conn, one.admission.hold_id)
            assert hold is not None
            assert (hold.state, hold.price_id) == ("pending", one.admission.price.price_id)


async def in_transaction(database: Database, operation: Operation) -> Any:
    async with database.transaction() as conn:
        return await operation(conn)


async def usage_row(conn: Any, request_id: str) -> Any:
    table = tables.usage_record
    return (await conn.execute(select(table).where(table.c.request_id == request_id))).one()


async def ledger_of(database: Database) -> list[Any]:
    """All that is money: entries, balances, holds, usage rows, prices."""
    async with database.read() as conn:
        found = []
        for table in (tables.ledger_transaction, tables.ledger_entry, tables.account, tables.hold, tables.usage_record):
            found.append(sorted(map(tuple, await conn.execute(select(table))), key=repr))
        return [*found, await list_prices(conn)]


def step(method: Any, *arguments: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    return st.tuples(st.just(method), st.tuples(*arguments))


tenants, which = st.sampled_from(TENANTS), st.integers(0, 9)
# Not rules of a state machine: Hypothesis would leave most of them out of most runs, and money moves in their company.
STEPS = st.one_of(
    step(MoneyMachine.admit, tenants, st.integers(1, 30), st.integers(1, 30)),
    step(MoneyMachine.admit, tenants, st.integers(1, 30), st.integers(1, 30)),
    step(MoneyMachine.produce, st.integers(1, 30), st.integers(0, 30)),
    step(MoneyMachine.end, which, st.booleans()),
    step(MoneyMachine.refund, which, st.integers(1, 150)),
    step(MoneyMachine.change_price, st.tuples(*[st.integers(0, 40_000)] * 3, st.integers(0, 20), st.integers(0, 60))),
    step(MoneyMachine.grant, tenants, st.integers(1, 700)),
    step(MoneyMachine.adjust, tenants, st.integers(-300, 300).filter(bool)),
    step(MoneyMachine.reap, st.sampled_from([1, 20, 70])),
    step(MoneyMachine.gateway_dies),
    step(MoneyMachine.empty_valkey),
)


@given(steps=st.lists(STEPS, min_size=30, max_size=60))
@settings(max_examples=max(8, settings.default.max_examples // 5), derandomize=settings.default.max_examples <= 40)
def test_money_adds_up_whatever_happens_and_when(valkey_socket: Path, steps: list[Any]) -> None:
    machine = MoneyMachine(valkey_socket)
    try:
        for method, arguments in steps:
            method(machine, *arguments)
            machine.agrees_with_the_model()
        machine.replay()
    finally:
        machine.close()
