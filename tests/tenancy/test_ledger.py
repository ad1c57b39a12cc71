"""The ledger against a ten-line model, in any order and with repeats; then each refusal, on both databases."""

import asyncio
from contextlib import suppress
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, cast

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, invariant, rule
from sqlalchemy import insert, text, update

from gateway.database import Database
from tenancy import tables
from tenancy.accounts.ledger import (
    Balance,
    Hold,
    HoldSettledError,
    InsufficientCredit,
    LedgerConflictError,
    UnknownHoldError,
    balance,
    capture,
    claim_pending,
    due_holds,
    expire,
    get_hold,
    grant_credit,
    pending_holds,
    place_hold,
    void,
)
from tenancy.accounts.ledger_check import check_ledger
from tenancy.accounts.posting import UnknownAccountError, open_accounts
from tenancy.money import MoneyRangeError
from tests.servers import owner_of
from tests.tenancy.conftest import create_tables, opened
from tests.tenancy.world import SECOND, T0, Populated, counting_entropy, populate

MEMORY_DISK = "/dev/shm" if Path("/dev/shm").is_dir() else None  # thousands of commits: spare the disk


async def expire_due(conn: Any, now_ns: int, limit: int) -> list[Hold]:
    """What the reaper does, in one transaction."""
    ended = []
    for hold in await due_holds(conn, now_ns, limit):
        if await claim_pending(conn, hold.hold_id):
            await expire(conn, hold.hold_id, now_ns)
            ended.append(cast(Hold, await get_hold(conn, hold.hold_id)))
    return ended


class LedgerModel:
    """What the ledger means, without entries, accounts or SQL."""

    def __init__(self) -> None:
        self.credit = self.captured = 0
        self.holds: dict[str, tuple[int, str, int]] = {}  # id -> amount, state, captured

    def place(self, id_: str, amount: int) -> None:
        if id_ not in self.holds and amount <= self.credit:
            self.credit -= amount
            self.holds[id_] = amount, "pending", 0

    def settle(self, id_: str, state: str, captured: int = 0) -> None:
        amount, now, _ = self.holds.get(id_, (0, "unknown", 0))
        if now == "pending" and captured <= amount:
            self.credit += amount - captured
            self.captured += captured
            self.holds[id_] = amount, state, captured

    @property
    def held(self) -> int:
        return sum(amount for amount, state, _ in self.holds.values() if state == "pending")


@cache
def two_tenants() -> tuple[bytes, dict[str, Populated]]:
    """The file of a database with two tenants in it, made once and copied for every example."""

    async def run(url: str) -> dict[str, Populated]:
        await create_tables(url)
        entropy = counting_entropy()
        async with opened(url) as database, database.transaction() as conn:
            return {name: await populate(conn, name, entropy=entropy) for name in LedgerMachine.TENANTS}

    with TemporaryDirectory(dir=MEMORY_DISK) as folder:
        path = Path(folder) / "bulkhead.db"
        made = asyncio.run(run(f"sqlite+aiosqlite:///{path}"))
        return path.read_bytes(), made


class LedgerMachine(RuleBasedStateMachine):
    """Grants, holds and settlements of two tenants in any order, each repeated at any time."""

    hold_ids = Bundle("hold_ids")
    TENANTS = ("acme", "globex")

    def __init__(self) -> None:
        super().__init__()
        self.runner = asyncio.Runner()
        self.folder = TemporaryDirectory(dir=MEMORY_DISK)
        path = Path(self.folder.name) / "bulkhead.db"
        template, self.tenants = two_tenants()
        path.write_bytes(template)
        self.database = Database(f"sqlite+aiosqlite:///{path}")
        self.now_ns = T0
        self.models = {name: LedgerModel() for name in self.TENANTS}
        self.transfers: dict[str, int] = {}

    def run(self, function: Any, *args: Any, **kwargs: Any) -> Any:
        async def in_transaction() -> Any:
            async with self.database.transaction() as conn:
                return await function(conn, *args, **kwargs)

        return self.runner.run(in_transaction())

    def teardown(self) -> None:
        self.runner.run(self.database.dispose())
        self.runner.close()
        self.folder.cleanup()

    @rule(name=st.sampled_from(TENANTS), amount=st.integers(1, 100), number=st.integers(0, 9))
    def grant(self, name: str, amount: int, number: int) -> None:
        transfer_id = f"{name}-{number}"
        call = (self.tenants[name].tenant_id, amount)
        if self.transfers.setdefault(transfer_id, amount) != amount:
            with pytest.raises(LedgerConflictError):
                self.run(grant_credit, *call, transfer_id=transfer_id, now_ns=self.now_ns)
            return
        if not (repeated := self.run(get_transfer, transfer_id)):
            self.models[name].credit += amount
        made = self.run(grant_credit, *call, transfer_id=transfer_id, now_ns=self.now_ns)
        assert made.credit_nano_usd == self.models[name].credit, repeated

    @rule(target=hold_ids, name=st.sampled_from(TENANTS), number=st.integers(0, 20), amount=st.integers(0, 60))
    def hold(self, name: str, number: int, amount: int) -> str:
        hold_id, tenant, model = f"hold_{name}_{number}", self.tenants[name], self.models[name]
        arguments = {
            "hold_id": hold_id,
            "tenant_id": tenant.tenant_id,
            "request_id": f"req_{number}",
            "price_id": tenant.price_id,
            "amount_nano_usd": amount,
            "expires_ns": T0 + (1_000 + number) * SECOND,
            "now_ns": min(self.now_ns, T0 + 999 * SECOND),
        }
        known = model.holds.get(hold_id)
        if known is not None and known[0] != amount:
            with pytest.raises(LedgerConflictError):
                self.run(place_hold, **arguments)
            return hold_id
        free = model.credit
        model.place(hold_id, amount)
        made = self.run(place_hold, **arguments)
        if hold_id in model.holds:
            assert isinstance(made, Hold)
            assert made.state == model.holds[hold_id][1]
        else:
            assert made == InsufficientCredit(available_nano_usd=free, needed_nano_usd=amount)
        return hold_id

    @rule(hold_id=hold_ids, amount=st.integers(0, 70))
    def capture(self, hold_id: str, amount: int) -> None:
        with suppress(UnknownHoldError, HoldSettledError, MoneyRangeError):
            self.run(capture, hold_id, amount, self.now_ns)
        self.model_of(hold_id).settle(hold_id, "captured", amount)

    @rule(hold_id=hold_ids)
    def void(self, hold_id: str) -> None:
        with suppress(UnknownHoldError, HoldSettledError):
            self.run(void, hold_id, self.now_ns)
        self.model_of(hold_id).settle(hold_id, "voided")

    @rule(seconds=st.integers(0, 1_030), limit=st.integers(1, 5))
    def expire(self, seconds: int, limit: int) -> None:
        for hold in self.run(expire_due, T0 + seconds * SECOND, limit):
            assert hold.expires_ns <= T0 + seconds * SECOND
            assert hold.state == "expired"
            self.model_of(hold.hold_id).settle(hold.hold_id, "expired")

    def model_of(self, hold_id: str) -> LedgerModel:
        return self.models[hold_id.split("_")[1]]

    @invariant()
    def agrees_with_the_model(self) -> None:
        self.run(self.compare)

    async def compare(self, conn: Any) -> None:
        for name, model in self.models.items():
            now = await balance(conn, self.tenants[name].tenant_id)
            assert now == Balance(model.credit, model.held, model.captured)
            assert min(now.credit_nano_usd, now.held_nano_usd) >= 0
        pending = {hold.hold_id for hold in await pending_holds(conn)}
        holds = {id_: hold for model in self.models.values() for id_, hold in model.holds.items()}
        assert pending == {id_ for id_, (_, state, _) in holds.items() if state == "pending"}
        check = await check_ledger(conn)
        assert check.ok, check
        num_settled = sum(state != "pending" for _, state, _ in holds.values())
        num_grants = len(await transfers(conn))
        assert check.num_transactions == num_grants + len(holds) + num_settled  # exactly once, each


async def transfers(conn: Any) -> list[str]:
    return list(await conn.scalars(text("SELECT id FROM ledger_transaction WHERE kind = 'grant'")))


async def get_transfer(conn: Any, transfer_id: str) -> bool:
    return transfer_id in await transfers(conn)


TestLedgerMachine = LedgerMachine.TestCase
TestLedgerMachine.settings = settings(stateful_step_count=20)


async def _fund(database: Database, amount: int = 1_000) -> Populated:
    async with database.transaction() as conn:
        made = await populate(conn, entropy=counting_entropy())
        await grant_credit(conn, made.tenant_id, amount, transfer_id="first", now_ns=T0)
    return made


async def _hold(
    conn: Any, made: Populated, hold_id: str = "hold_1", amount: int = 100, ttl_s: int = 60
) -> Hold | InsufficientCredit:
    return await place_hold(
        conn,
        hold_id=hold_id,
        tenant_id=made.tenant_id,
        request_id=f"req_{hold_id}",
        price_id=made.price_id,
        amount_nano_usd=amount,
        expires_ns=T0 + ttl_s * SECOND,
        now_ns=T0,
    )


def test_one_request_from_grant_to_capture(database_url: str) -> None:
    async def run() -> None:
        async with opened(database_url) as database:
            made = await _fund(database)
            async with database.transaction() as conn:
                assert isinstance(await _hold(conn, made, amount=400), Hold)
                assert await balance(conn, made.tenant_id) == Balance(600, 400, 0)
            async with database.transaction() as conn:
                settled = await capture(conn, "hold_1", 150, T0 + SECOND)
                assert (settled.state, settled.captured_nano_usd, settled.released_nano_usd) == ("captured", 150, 250)
                assert await capture(conn, "hold_1", 150, T0 + 9 * SECOND) == settled  # the first result
                assert await balance(conn, made.tenant_id) == Balance(850, 0, 150)
                for late in (void(conn, "hold_1", T0), capture(conn, "hold_1", 151, T0)):
                    with pytest.raises(HoldSettledError, match="already captured with 150"):
                        await late
            async with database.read() as conn:
                check = await check_ledger(conn)
                assert check.ok
                assert (check.num_transactions, check.num_entries, check.total_nano_usd) == (3, 7, 0)

    asyncio.run(run())


def test_refusals_move_nothing(database_url: str) -> None:
    async def run() -> None:
        async with opened(database_url) as database:
            made = await _fund(database)
            async with database.transaction() as conn:
                assert await _hold(conn, made, amount=1_001) == InsufficientCredit(1_000, 1_001)
                await _hold(conn, made)
                with pytest.raises(MoneyRangeError, match="cannot capture 101 of hold hold_1: it is 100"):
                    await capture(conn, "hold_1", 101, T0)
                with pytest.raises(UnknownHoldError, match="hold_2"):
                    await void(conn, "hold_2", T0)
                with pytest.raises(UnknownAccountError, match="ten_nobody"):
                    await grant_credit(conn, "ten_nobody", 1, transfer_id="t", now_ns=T0)
                with pytest.raises(LedgerConflictError, match="hold_1"):
                    await _hold(conn, made, amount=101)
                with pytest.raises(LedgerConflictError, match="first"):
                    await grant_credit(conn, made.tenant_id, 1, transfer_id="first", now_ns=T0)
                with pytest.raises(MoneyRangeError, match="beyond"):
                    await grant_credit(conn, made.tenant_id, 2**63 - 1, transfer_id="huge", now_ns=T0)
                await open_accounts(conn, made.tenant_id, now_ns=T0)  # a second time: nothing happens
                assert await balance(conn, made.tenant_id) == Balance(900, 100, 0)
                assert (await check_ledger(conn)).ok

    asyncio.run(run())


@pytest.mark.parametrize("amount", [1.0, True, "5", None])
def test_only_integers_are_money(sqlite_url: str, amount: Any) -> None:
    async def run() -> None:
        async with opened(sqlite_url) as database:
            made = await _fund(database)
            async with database.transaction() as conn:
                for refused in (
                    _hold(conn, made, amount=amount),
                    capture(conn, "hold_1", amount, T0),
                    grant_credit(conn, made.tenant_id, amount, transfer_id="t", now_ns=T0),
                ):
                    with pytest.raises(TypeError, match=f"not {type(amount).__name__}: {amount!r}"):
                        await refused

    asyncio.run(run())


def test_expiry_takes_the_oldest_first_and_each_once(database_url: str) -> None:
    async def run() -> None:
        async with opened(database_url) as database:
            made = await _fund(database)
            async with database.transaction() as conn:
                for number in range(3):
                    await _hold(conn, made, f"hold_{number}")
                assert await expire_due(conn, T0 + 60 * SECOND - 1, 10) == []
                assert len(await expire_due(conn, T0 + 60 * SECOND, 2)) == 2
                assert len(await expire_due(conn, T0 + 60 * SECOND, 10)) == 1
                assert await expire_due(conn, T0 + 60 * SECOND, 10) == []
                assert await pending_holds(conn) == []
                assert await balance(conn, made.tenant_id) == Balance(1_000, 0, 0)

    asyncio.run(run())


def _write_attempts(dialect: str) -> list[str]:
    attempts = [
        "UPDATE ledger_entry SET amount_nano_usd = 0",
        "DELETE FROM ledger_entry",
        "UPDATE ledger_transaction SET memo = 'x'",
        "DELETE FROM ledger_transaction",
        "UPDATE price SET input_pico_usd = 0",
        "DELETE FROM price",
    ]
    if dialect == "sqlite":
        return [
            *attempts,
            "INSERT OR REPLACE INTO ledger_entry SELECT transaction_id, line, account_id, 0 FROM ledger_entry",
        ]
    return [*attempts, "TRUNCATE ledger_entry", "TRUNCATE price CASCADE"]


def test_the_database_itself_refuses_to_rewrite_history(database_url: str) -> None:
    """Whoever asks: the owner of the tables is a role that no right is taken from."""

    async def run() -> None:
        async with opened(owner_of(database_url)) as database:
            await _fund(database)
            for attempt in _write_attempts(database_url.split("+")[0]):
                with pytest.raises(Exception, match="append-only"):
                    async with database.transaction() as conn:
                        await conn.execute(text(attempt))
            async with database.read() as conn:
                assert (await check_ledger(conn)).num_entries == 2

    asyncio.run(run())


def test_the_check_finds_each_kind_of_damage(sqlite_url: str) -> None:
    """A check that cannot fail proves nothing: damage each figure it vouches for and see it named."""

    async def run() -> None:
        async with opened(sqlite_url) as database:
            made = await _fund(database)
            credit = f"{made.tenant_id}:credit:USD"
            async with database.transaction() as conn:
                await _hold(conn, made)
            async with database.transaction() as conn:
                await conn.execute(
                    update(tables.account).where(tables.account.c.id == credit).values(balance_nano_usd=5)
                )
                assert (await check_ledger(conn)).wrong_balances == [credit]
                await conn.rollback()
            async with database.transaction() as conn:
                entry = {"transaction_id": "first", "line": 7, "account_id": credit, "amount_nano_usd": 3}
                await conn.execute(insert(tables.ledger_entry).values(entry))
                check = await check_ledger(conn)
                assert (check.unbalanced, check.total_nano_usd) == (["first"], 3)
                await conn.rollback()
            async with database.transaction() as conn:
                await conn.execute(update(tables.hold).values(state="voided", captured_nano_usd=0, settled_ns=T0))
                check = await check_ledger(conn)
                assert (check.wrong_held, check.wrong_holds) == ([made.tenant_id], ["hold_1"])
                await conn.rollback()

    asyncio.run(run())


def test_forty_holds_at_once_against_credit_for_ten(postgres_url: str) -> None:
    async def run() -> None:
        async with opened(postgres_url) as database:
            made = await _fund(database, amount=1_000)

            async def one(number: int) -> Hold | InsufficientCredit:
                async with database.transaction() as conn:
                    return await _hold(conn, made, f"hold_{number}", amount=100)

            results = await asyncio.gather(*(one(number) for number in range(40)))
            assert sum(isinstance(result, Hold) for result in results) == 10
            async with database.read() as conn:
                assert await balance(conn, made.tenant_id) == Balance(0, 1_000, 0)
                assert (await check_ledger(conn)).ok

    asyncio.run(run())


def test_the_same_ids_at_once_move_money_once(postgres_url: str) -> None:
    async def run() -> None:
        async with opened(postgres_url) as database:
            made = await _fund(database, amount=1_000)

            async def one() -> Hold | InsufficientCredit:
                async with database.transaction() as conn:
                    await grant_credit(conn, made.tenant_id, 50, transfer_id="second", now_ns=T0)
                    return await _hold(conn, made)

            results = await asyncio.gather(*(one() for _ in range(12)))
            assert len({result.hold_id for result in results if isinstance(result, Hold)}) == 1
            async with database.read() as conn:
                assert await balance(conn, made.tenant_id) == Balance(950, 100, 0)
                assert (await check_ledger(conn)).num_transactions == 3

    asyncio.run(run())


def test_racing_settlements_end_a_hold_once(postgres_url: str) -> None:
    """Captures, voids and expiries of the same holds at once, and new holds, two tenants: no deadlock, one end each."""

    async def run() -> None:
        async with opened(postgres_url) as database:
            entropy = counting_entropy()
            async with database.transaction() as conn:
                tenants = [await populate(conn, name, entropy=entropy) for name in ("acme", "globex")]
                for tenant in tenants:
                    await grant_credit(conn, tenant.tenant_id, 1_000, transfer_id=tenant.tenant_id, now_ns=T0)
                ids = [f"hold_{number}" for number in range(10)]
                for number, id_ in enumerate(ids):
                    await _hold(conn, tenants[number % 2], id_)

            async def settle(function: Any, *args: Any) -> int:
                async with database.transaction() as conn:
                    try:
                        await function(conn, *args)
                    except HoldSettledError:
                        return 0
                return 1

            async def sweep() -> int:
                num_ended = 0
                for _ in range(3):  # one transaction a hold: see the ledger's lock order
                    async with database.transaction() as conn:
                        num_ended += len(await expire_due(conn, T0 + 60 * SECOND, 1))
                return num_ended

            async def place(number: int) -> int:
                async with database.transaction() as conn:
                    assert isinstance(await _hold(conn, tenants[number % 2], f"new_{number}", 1, ttl_s=99), Hold)
                return 0

            now_ns = T0 + SECOND
            calls = []
            for number, id_ in enumerate(ids):
                calls += [settle(capture, id_, 60, now_ns), settle(void, id_, now_ns), sweep(), place(number)]
            assert sum(await asyncio.gather(*calls)) == len(ids)
            async with database.read() as conn:
                ends = [await get_hold(conn, id_) for id_ in ids]
                captured = sum(hold.captured_nano_usd or 0 for hold in ends if hold is not None)
                left = [await balance(conn, tenant.tenant_id) for tenant in tenants]
                assert sum(b.credit_nano_usd + b.held_nano_usd for b in left) + captured == 2_000
                assert sum(b.captured_nano_usd for b in left) == captured
                assert (await check_ledger(conn)).ok

    asyncio.run(run())


def test_tables_are_created_twice_without_harm(database_url: str) -> None:
    asyncio.run(create_tables(owner_of(database_url)))
