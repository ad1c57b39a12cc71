"""Budgets against a model that adds up holds: any order, over midnights and month ends; then at once on PostgreSQL."""

import asyncio
from collections.abc import Iterator
from contextlib import suppress
from datetime import UTC, datetime, timedelta
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule
from sqlalchemy import select

from gateway.database import Database
from tenancy import tables
from tenancy.access.directory import UnknownIdError, create_project
from tenancy.access.keys import mint_key
from tenancy.accounts.budget_use import THRESHOLDS_PERCENT, BudgetAlert, BudgetScope, budget_uses
from tenancy.accounts.budgets import BudgetError, remove_budget, set_budget
from tenancy.accounts.ledger import (
    Hold,
    HoldSettledError,
    InsufficientCredit,
    capture,
    expire,
    get_hold,
    grant_credit,
    place_hold,
    void,
)
from tenancy.accounts.ledger_check import check_ledger
from tenancy.invoicing.periods import PERIODS, Period, period_end_ns, period_start_ns
from tests.tenancy.conftest import create_tables, opened
from tests.tenancy.test_ledger import MEMORY_DISK
from tests.tenancy.world import PEPPER, SECOND, T0, counting_entropy, populate

DAY = 86_400 * SECOND
HOUR = 3_600 * SECOND
CREDIT = 10**6


@given(st.integers(0, 4 * 10**18))
def test_periods_are_the_calendars_of_utc(at_ns: int) -> None:
    at = datetime(1970, 1, 1, tzinfo=UTC) + timedelta(seconds=at_ns // SECOND)
    for period in PERIODS:
        start_ns, end_ns = period_start_ns(period, at_ns), period_end_ns(period, at_ns)
        assert start_ns <= at_ns
        if end_ns is None:
            assert (period, start_ns) == ("total", 0)
            continue
        assert at_ns < end_ns == period_start_ns(period, end_ns)  # half-open, without a gap
        assert period_start_ns(period, end_ns - 1) == start_ns
        start = datetime(1970, 1, 1, tzinfo=UTC) + timedelta(seconds=start_ns // SECOND)
        assert (start.year, start.month) == (at.year, at.month)
        assert (start.day, start.time().isoformat()) == (at.day if period == "day" else 1, "00:00:00")


@cache
def prepared() -> tuple[bytes, dict[str, str]]:
    """The file of a database with one tenant of two projects with a key each, and their ids by a short name."""

    async def run(url: str) -> dict[str, str]:
        await create_tables(url)
        async with opened(url) as database, database.transaction() as conn:
            return await two_projects(conn)

    with TemporaryDirectory(dir=MEMORY_DISK) as folder:
        path = Path(folder) / "bulkhead.db"
        ids = asyncio.run(run(f"sqlite+aiosqlite:///{path}"))
        return path.read_bytes(), ids


async def two_projects(conn: Any) -> dict[str, str]:
    entropy = counting_entropy()
    one = await populate(conn, entropy=entropy)
    other = await create_project(conn, one.tenant_id, "other", entropy=entropy, now_ns=T0)
    key = await mint_key(conn, other.project_id, "k", ["inference"], pepper=PEPPER, entropy=entropy, now_ns=T0)
    await grant_credit(conn, one.tenant_id, CREDIT, transfer_id="first", now_ns=T0)
    ids = {"tenant": one.tenant_id, "p0": one.project_id, "k0": one.key_id, "p1": other.project_id, "k1": key.key_id}
    return {**ids, "price": one.price_id}


SCOPES: dict[str, BudgetScope] = {"tenant": "tenant", "p0": "project", "p1": "project", "k1": "key"}


class ModelBudget:
    """What a budget means: a limit, the periods that it has seen, and what it has told."""

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.told: dict[int, int] = {}  # start of a period that it has seen -> highest threshold told


class BudgetMachine(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        self.runner = asyncio.Runner()
        self.folder = TemporaryDirectory(dir=MEMORY_DISK)
        template, self.ids = prepared()
        path = Path(self.folder.name) / "bulkhead.db"
        path.write_bytes(template)
        self.database = Database(f"sqlite+aiosqlite:///{path}")
        self.now_ns = T0
        self.credit = CREDIT
        self.budgets: dict[tuple[str, Period, bool], ModelBudget] = {}
        self.holds: list[tuple[int, int, int, str, int]] = []  # project, placed, amount, state, captured

    def run(self, function: Any, *args: Any, **kwargs: Any) -> Any:
        async def in_transaction() -> Any:
            async with self.database.transaction() as conn:
                return await function(conn, *args, **kwargs)

        return self.runner.run(in_transaction())

    def teardown(self) -> None:
        self.runner.run(self.database.dispose())
        self.runner.close()
        self.folder.cleanup()

    def figures(self, name: str, period: Period, at_ns: int) -> tuple[int, int]:
        """Used and held: the sums over the holds that were placed in the period."""
        used = held = 0
        for project, placed_ns, amount, state, captured in self.holds:
            same_period = period_start_ns(period, placed_ns) == period_start_ns(period, at_ns)
            if same_period and name in ("tenant", f"p{project}", f"k{project}"):
                used, held = used + captured, held + (amount if state == "pending" else 0)
        return used, held

    def expected_alerts(self, key: tuple[str, Period, bool], at_ns: int) -> Iterator[tuple[str, str, bool, int]]:
        budget, start_ns = self.budgets[key], period_start_ns(key[1], at_ns)
        used, _ = self.figures(key[0], key[1], at_ns)
        for threshold in THRESHOLDS_PERCENT:
            if used and used * 100 >= threshold * budget.limit and threshold > budget.told[start_ns]:
                budget.told[start_ns] = threshold
                yield (self.ids[key[0]], key[1], key[2], threshold)

    @initialize()
    def begin_with_a_day(self) -> None:
        """So that most examples have a budget whose period ends."""
        self.set_budget("tenant", "day", True, 100)

    @rule(hours=st.sampled_from([1, 9, 24, 24 * 17, -2]))
    def clock(self, hours: int) -> None:
        self.now_ns += hours * HOUR

    @rule(
        name=st.sampled_from(sorted(SCOPES)),
        period=st.sampled_from(PERIODS),
        hard=st.booleans(),
        limit=st.integers(0, 150),
    )
    def set_budget(self, name: str, period: Period, hard: bool, limit: int) -> None:
        key = (name, period, hard)
        known = self.budgets.get(key)
        budget, alerts = self.run(
            set_budget, SCOPES[name], self.ids[name], period, hard=hard, limit_nano_usd=limit, now_ns=self.now_ns
        )
        assert budget.limit_nano_usd == limit
        if known is not None and known.limit == limit:
            assert alerts == []
            return
        self.budgets[key] = ModelBudget(limit)
        self.budgets[key].told[period_start_ns(period, self.now_ns)] = 0
        assert told(alerts) == sorted(self.expected_alerts(key, self.now_ns))

    @rule(name=st.sampled_from(sorted(SCOPES)), period=st.sampled_from(PERIODS), hard=st.booleans())
    def remove_budget(self, name: str, period: Period, hard: bool) -> None:
        if self.budgets.pop((name, period, hard), None) is None:
            with pytest.raises(BudgetError, match="has no budget"):
                self.run(remove_budget, self.ids[name], period, hard=hard)
        else:
            self.run(remove_budget, self.ids[name], period, hard=hard)

    @rule(project=st.integers(0, 1), amount=st.integers(0, 60))
    def place(self, project: int, amount: int) -> None:
        mine = [key for key in self.budgets if key[0] in ("tenant", f"p{project}", f"k{project}")]
        left = [self.credit]
        for name, period, hard in mine:
            self.budgets[name, period, hard].told.setdefault(period_start_ns(period, self.now_ns), 0)
            if hard:
                limit = self.budgets[name, period, hard].limit
                left.append(limit - sum(self.figures(name, period, self.now_ns)))
        made = self.run(
            place_hold,
            hold_id=f"hold_{len(self.holds)}",
            tenant_id=self.ids["tenant"],
            request_id=f"req_{len(self.holds)}",
            price_id=self.ids["price"],
            amount_nano_usd=amount,
            expires_ns=self.now_ns + 600 * SECOND,
            now_ns=self.now_ns,
            project_id=self.ids[f"p{project}"],
            key_id=self.ids[f"k{project}"],
        )
        if amount > max(0, min(left)):
            assert made == InsufficientCredit(max(0, min(left)), amount)
            return
        assert isinstance(made, Hold)
        self.holds.append((project, self.now_ns, amount, "pending", 0))
        self.credit -= amount

    @rule(number=st.integers(0, 12), how=st.sampled_from([capture, void, expire]), part=st.integers(0, 100))
    def settle(self, number: int, how: Any, part: int) -> None:
        if number >= len(self.holds):
            return
        project, placed_ns, amount, state, _ = self.holds[number]
        captured = amount * part // 100 if how is capture else 0
        arguments = (captured,) if how is capture else ()
        alerts: list[BudgetAlert] = []
        with suppress(HoldSettledError):
            alerts += self.run(how, f"hold_{number}", *arguments, now_ns=self.now_ns).alerts
        if state != "pending":
            assert alerts == []  # a repeat tells nobody
            return
        self.holds[number] = (project, placed_ns, amount, how.__name__, captured)
        self.credit += amount - captured
        expected = [
            alert
            for key, budget in self.budgets.items()
            if key[0] in ("tenant", f"p{project}", f"k{project}") and period_start_ns(key[1], placed_ns) in budget.told
            for alert in self.expected_alerts(key, placed_ns)
        ]
        assert told(alerts) == sorted(expected)

    @invariant()
    def every_counter_is_the_sum_of_its_holds(self) -> None:
        self.run(self.compare)

    async def compare(self, conn: Any) -> None:
        names = {id_: name for name, id_ in self.ids.items()}
        uses = await budget_uses(conn, self.ids["tenant"], self.now_ns)
        found = {(names[use.budget.scope_id], use.budget.period, use.budget.hard): use for use in uses}
        assert found.keys() == self.budgets.keys()
        starts = {key: set(budget.told) for key, budget in self.budgets.items()}
        rows = await conn.execute(select(tables.budget, tables.budget_use).join(tables.budget_use))
        for row in rows:
            key = (names[row.scope_id], row.period, row.hard)
            starts[key].remove(row.period_start_ns)
            assert (row.used_nano_usd, row.held_nano_usd) == self.figures(key[0], key[1], row.period_start_ns)
            assert row.alerted_percent == self.budgets[key].told[row.period_start_ns]
        assert not any(starts.values())
        assert (await check_ledger(conn)).ok


def told(alerts: list[BudgetAlert]) -> list[tuple[str, str, bool, int]]:
    return sorted((a.budget.scope_id, a.budget.period, a.budget.hard, a.threshold_percent) for a in alerts)


TestBudgetMachine = BudgetMachine.TestCase
TestBudgetMachine.settings = settings(stateful_step_count=25)


def test_a_hold_over_midnight_counts_in_the_day_and_month_of_its_placing(database_url: str) -> None:
    """Placed a nanosecond before a month ends, captured after it: the new month starts empty and stays so."""

    async def run() -> None:
        async with opened(database_url) as database, database.transaction() as conn:
            ids = await two_projects(conn)
            for period in PERIODS:
                await set_budget(conn, "key", ids["k0"], period, hard=True, limit_nano_usd=100, now_ns=T0)
            end_ns = period_end_ns("month", T0)
            assert end_ns is not None
            assert isinstance(await hold(conn, ids, "old", 80, end_ns - 1), Hold)
            assert isinstance(await hold(conn, ids, "refused", 30, end_ns - 1), InsufficientCredit)
            assert isinstance(await hold(conn, ids, "new", 20, end_ns), Hold)
            assert len((await capture(conn, "old", 60, end_ns + SECOND)).alerts) == 3  # 50 % of each
            figures = {}
            for at_ns in (end_ns - 1, end_ns):
                for use in await budget_uses(conn, ids["tenant"], at_ns):
                    figures[use.budget.period, at_ns == end_ns] = (use.used_nano_usd, use.held_nano_usd)
            assert figures == {
                ("day", False): (60, 0),
                ("day", True): (0, 20),
                ("month", False): (60, 0),
                ("month", True): (0, 20),
                ("total", False): (60, 20),
                ("total", True): (60, 20),
            }

    asyncio.run(run())


def test_many_at_once_stay_within_a_budget_and_alert_once(database_url: str) -> None:
    """Forty holds of 10 against a budget for 25 of them, captured as they come: 25 placed, each alert once."""

    async def run() -> None:
        async with opened(database_url) as database:
            async with database.transaction() as conn:
                ids = await two_projects(conn)
                await set_budget(conn, "project", ids["p0"], "day", hard=True, limit_nano_usd=250, now_ns=T0)

            async def one(number: int) -> tuple[bool, list[int]]:
                async with database.transaction() as conn:
                    placed = await hold(conn, ids, f"hold_{number}", 10, T0)
                if not isinstance(placed, Hold):
                    assert placed.limiters[1].name == "project-day"
                    return False, []
                async with database.transaction() as conn:
                    settled = await capture(conn, f"hold_{number}", 10, T0)
                return True, [alert.threshold_percent for alert in settled.alerts]

            results = await asyncio.gather(*(one(number) for number in range(40)))
            assert sum(placed for placed, _ in results) == 25
            assert sorted(t for _, thresholds in results for t in thresholds) == [50, 80, 95, 100]
            async with database.read() as conn:
                (use,) = await budget_uses(conn, ids["tenant"], T0)
                assert (use.used_nano_usd, use.held_nano_usd, use.left_nano_usd) == (250, 0, 0)
                assert (await check_ledger(conn)).ok

    asyncio.run(run())


def test_budgets_change_while_requests_come_and_go(postgres_url: str) -> None:
    """Setting, removing, placing and settling at once: no deadlock, and the counters are the sums afterwards."""

    async def run() -> None:
        async with opened(postgres_url) as database:
            async with database.transaction() as conn:
                ids = await two_projects(conn)

            async def request(number: int) -> None:
                async with database.transaction() as conn:
                    placed = await hold(conn, ids, f"hold_{number}", 7, T0)
                if isinstance(placed, Hold) and number % 3:
                    async with database.transaction() as conn:
                        await (capture(conn, placed.hold_id, 5, T0) if number % 2 else void(conn, placed.hold_id, T0))

            async def change(number: int) -> None:
                async with database.transaction() as conn:
                    with suppress(BudgetError):
                        if number % 3 == 0:
                            await remove_budget(conn, ids["tenant"], "month", hard=True)
                    await set_budget(
                        conn, "tenant", ids["tenant"], "month", hard=True, limit_nano_usd=100 + number, now_ns=T0
                    )

            await asyncio.gather(*(request(n) if n % 4 else change(n) for n in range(48)))
            async with database.read() as conn:
                holds = [await get_hold(conn, f"hold_{n}") for n in range(48)]
                used = sum(one.captured_nano_usd or 0 for one in holds if one is not None)
                held = sum(one.amount_nano_usd for one in holds if one is not None and one.state == "pending")
                (use,) = await budget_uses(conn, ids["tenant"], T0)
                assert (use.used_nano_usd, use.held_nano_usd) == (used, held)
                assert used + held <= 144  # the highest limit that was ever set

    asyncio.run(run())


def test_refusals(database_url: str) -> None:
    async def run() -> None:
        async with opened(database_url) as database, database.transaction() as conn:
            ids = await two_projects(conn)
            with pytest.raises(UnknownIdError, match="proj_none"):
                await set_budget(conn, "project", "proj_none", "day", hard=True, limit_nano_usd=1, now_ns=T0)
            with pytest.raises(TypeError, match=r"not float: 1\.5"):
                await set_budget(
                    conn,
                    "tenant",
                    ids["tenant"],
                    "day",
                    hard=True,
                    limit_nano_usd=1.5,  # type: ignore[arg-type]
                    now_ns=T0,
                )
            with pytest.raises(BudgetError, match=r"'day:soft'.*bulkhead budget list"):
                await remove_budget(conn, ids["tenant"], "day", hard=False)

    asyncio.run(run())


async def hold(conn: Any, ids: dict[str, str], hold_id: str, amount: int, now_ns: int) -> Hold | InsufficientCredit:
    return await place_hold(
        conn,
        hold_id=hold_id,
        tenant_id=ids["tenant"],
        request_id=f"req_{hold_id}",
        price_id=ids["price"],
        amount_nano_usd=amount,
        expires_ns=now_ns + 60 * SECOND,
        now_ns=now_ns,
        project_id=ids["p0"],
        key_id=ids["k0"],
    )
