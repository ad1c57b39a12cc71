"""A Valkey that is stopped, hung and emptied, under each policy; then what slices are worth, with two gateways."""

import asyncio
import os
import shutil
import signal
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from redis.asyncio import Redis

from gateway.clerk import Clerk
from gateway.host.valkey import connect_redis, valkey_child
from tenancy.quotas.failure_policy import FailurePolicy, FailurePolicyError, get_policy
from tenancy.quotas.limits import ScopeLimits
from tenancy.quotas.open_cap import OpenCap
from tests.fakes.byte_model import write_byte_model
from tests.fakes.hall import Hall, open_hall, world
from tests.fakes.integer_worker import IntegerWorker
from tests.gateway.test_quota_machine import TENANT_SLOTS, TENANT_TOKENS, QuotaMachine

OPEN = FailurePolicy("open", requests_per_minute=3, tokens_per_minute=10_000, concurrency_max=5)


class Store:
    """A Valkey of one's own."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.socket = folder / "valkey", folder / "valkey.sock"
        self.child: Any = None

    async def start(self) -> None:
        self.child = valkey_child(self.folder, self.socket, {})
        await self.child.start()

    async def stop(self) -> None:
        await self.child.stop(2.0)

    async def lose_everything(self) -> None:
        await self.stop()
        shutil.rmtree(self.folder)
        await self.start()


@asynccontextmanager
async def house(folder: Path, short: Path) -> AsyncIterator[tuple[Hall, Store]]:
    store = Store(short)
    await store.start()
    worker = IntegerWorker(short / "worker.sock")
    await worker.start()
    redis: Redis = connect_redis(f"unix://{store.socket}")
    try:
        model = write_byte_model(folder / "model")
        async with open_hall(folder, redis, model, worker.path, world=world()) as hall:
            yield hall, store
    finally:
        await redis.aclose()
        await worker.stop()
        await store.stop()
        shutil.rmtree(store.folder)


async def decide(hall: Hall, policy: FailurePolicy, **limits: Any) -> None:
    account = hall.accounts["acme"]
    async with hall.database.transaction() as conn:
        clerk = Clerk(conn, os.urandom, time.time_ns())
        await clerk.set_limits("tenant", account.tenant_id, 100, None, 50, **limits)
        await clerk.set_policy(account.tenant_id, policy)


async def is_back(hall: Hall) -> None:
    """What housekeeping's loop does."""
    async with asyncio.timeout(5):
        while hall.services.allowance._breaker.is_open:
            await hall.services.allowance.watch()
            await asyncio.sleep(0.05)
    await hall.services.allowance.watch()


def figure(hall: Hall, name: str) -> float:
    lines = [line for line in hall.services.metrics.render().decode().splitlines() if line.startswith(name)]
    return sum(float(line.rsplit(" ", 1)[1]) for line in lines)


def test_closed_serves_nothing_and_makes_nobody_wait(
    runner: asyncio.Runner, tmp_path: Path, short_folder: Path
) -> None:
    async def scenario() -> None:
        async with house(tmp_path, short_folder) as (hall, store):
            assert (await hall.chat(max_tokens=2)).status == 200
            await store.stop()
            began = time.monotonic()
            for _ in range(20):
                answer = await hall.chat(max_tokens=2)
                assert (answer.status, answer.json()["error"]["code"]) == (503, "quota_unavailable")
                assert answer.headers["retry-after"] == "1"
            assert time.monotonic() - began < 2
            await store.start()
            await is_back(hall)
            assert (await hall.chat(max_tokens=2)).status == 200
            assert len(await hall.outbox("quota.lost")) == len(await hall.outbox("quota.back")) == 1
            assert (await hall.outbox("quota.back"))[0]["num_refused"] == 20
            assert figure(hall, "bulkhead_quota_outages_total") == 1
            assert figure(hall, "bulkhead_quota_by_policy_total") == 20
            await hall.check_books()

    runner.run(scenario())


def test_a_store_that_hangs_is_waited_for_once(runner: asyncio.Runner, tmp_path: Path, short_folder: Path) -> None:
    async def scenario() -> None:
        async with house(tmp_path, short_folder) as (hall, store):
            assert (await hall.chat(max_tokens=2)).status == 200
            os.kill(store.child.pid, signal.SIGSTOP)
            try:
                assert (await hall.chat(max_tokens=2)).status == 503
                began = time.monotonic()
                answers = [await hall.chat(max_tokens=2) for _ in range(10)]
                assert {answer.status for answer in answers} == {503}
                assert time.monotonic() - began < 1, "each of them waited"
            finally:
                os.kill(store.child.pid, signal.SIGCONT)
            await is_back(hall)
            assert (await hall.chat(max_tokens=2)).status == 200

    runner.run(scenario())


def test_open_serves_up_to_its_cap_and_holds_money_all_the_same(
    runner: asyncio.Runner, tmp_path: Path, short_folder: Path
) -> None:
    async def scenario() -> None:
        async with house(tmp_path, short_folder) as (hall, store):
            await decide(hall, OPEN, tokens_per_day=10_000)
            await store.stop()
            credit = (await hall.credit()).credit_nano_usd
            answers = [await hall.chat(max_tokens=4) for _ in range(5)]
            assert [answer.status for answer in answers] == [200, 200, 200, 503, 503]
            assert [answer.headers.get("x-bulkhead-limits") for answer in answers[:3]] == ["open"] * 3
            charged = sum(row.amount_nano_usd for row in (await hall.usage_rows()).values())
            assert (await hall.credit()).credit_nano_usd == credit - charged < credit
            assert (await hall.chat(tenant="globex")).status == 503, "the policy is acme's alone"
            await store.lose_everything()
            await is_back(hall)
            answer = await hall.chat(max_tokens=4)
            assert "x-bulkhead-limits" not in answer.headers
            await hall.check_books()
            rows = (await hall.usage_rows()).values()
            used = sum(row.num_prompt_tokens + row.num_completion_tokens for row in rows)
            account = hall.accounts["acme"]
            organisation_id = (await hall.outbox("quota.rebuilt"))[0]["organisation_id"]
            limits = ScopeLimits(account.tenant_id, organisation_id=organisation_id, tokens_per_day=10_000)
            left = await hall.services.allowance.usage_now(account.tenant_id, [limits])
            assert left.remaining_tokens_per_day == 10_000 - used, "what was served without the store is counted in it"
            back = (await hall.outbox("quota.back"))[0]
            assert (back["num_admitted_open"], back["num_admitted_lease"], back["num_refused"]) == (3, 0, 3)

    runner.run(scenario())


def test_lease_spends_the_slice_that_was_cut_before(runner: asyncio.Runner, tmp_path: Path, short_folder: Path) -> None:
    async def scenario() -> None:
        async with house(tmp_path, short_folder) as (hall, store):
            await decide(hall, FailurePolicy("lease", 5))
            assert (await hall.chat(max_tokens=2)).status == 200
            await hall.services.allowance.watch()
            await store.stop()
            answers = [await hall.chat(max_tokens=2) for _ in range(8)]
            assert [answer.status for answer in answers] == [200] * 5 + [503] * 3
            assert answers[0].headers["x-bulkhead-limits"] == "lease"
            await store.start()
            await is_back(hall)
            answer = await hall.chat(max_tokens=2)
            # Seven were admitted, and a slice of five is not cut yet again.
            assert answer.headers["x-ratelimit-remaining-requests"] == "93"
            assert (await hall.outbox("quota.rebuilt"))[-1]["reason"] == "outage"
            await hall.check_books()
            assert await hall.leases() == 0

    runner.run(scenario())


# --- slices, with two gateways and the ledger as the judge ----------------------------------------------------------


@pytest.fixture
def machine(valkey_socket: Path) -> Any:
    one = QuotaMachine(valkey_socket)
    yield one
    one.close()


def test_a_slice_is_nobody_elses(machine: QuotaMachine) -> None:
    """One gateway is cut off, the other takes all that there is: together no more than the limit, and nearly that."""
    run, (one, two) = machine.runner.run, machine.gateways
    run(machine.serve(two, "acme", 1))
    run(machine.serve(one, "acme", 1))
    run(machine.watch(one))
    run(machine.cut(one))
    for _ in range(10):
        run(machine.serve(two, "acme", 8))
        run(machine.end(two, 0, 8))
    before = len(run(machine.holds()))
    run(machine.serve(one, "acme", 6))
    run(machine.serve(one, "acme", 6))
    assert len(run(machine.holds())) == before + 1, "a slice of one slot and fifteen tokens"
    run(machine.end(one, 1, 6))
    run(machine.serve(one, "acme", 6))
    run(machine.check())
    assert sum(row.num_tokens for row in run(machine.holds())) >= TENANT_TOKENS - 9
    run(machine.settle_up())


def test_a_slot_of_a_slice_is_nobody_elses(machine: QuotaMachine) -> None:
    run, (one, two) = machine.runner.run, machine.gateways
    run(machine.serve(two, "acme", 1))
    run(machine.serve(one, "acme", 1))
    run(machine.watch(one))
    run(machine.cut(one))
    for _ in range(TENANT_SLOTS + 1):
        run(machine.serve(two, "acme", 1))
    assert len(two.running) == TENANT_SLOTS - 2
    run(machine.serve(one, "acme", 1))
    assert len(one.running) == 2
    run(machine.check())


@pytest.mark.parametrize("dies", [False, True])
def test_what_a_slice_paid_for_is_counted_when_the_store_is_back(machine: QuotaMachine, dies: bool) -> None:
    run, (one, two) = machine.runner.run, machine.gateways
    run(machine.serve(one, "acme", 1))
    run(machine.watch(one))
    run(machine.cut(one))
    run(machine.serve(one, "acme", 12))
    if dies:
        run(machine.die(one))
    run(machine.mend(one))
    run(machine.watch(one))
    for gateway in (one, two, one, two):
        run(machine.serve(gateway, "acme", 14))
        run(machine.end(gateway, 0, 14))
        run(machine.check())
    run(machine.settle_up())


def test_a_policy_that_died_with_its_gateway_is_counted(machine: QuotaMachine) -> None:
    """The mark in SQL, which the next process finds."""
    run, (one, two) = machine.runner.run, machine.gateways
    acme = machine.tenants["acme"]
    policy = FailurePolicy("open", requests_per_minute=9, tokens_per_minute=1_000, concurrency_max=9)
    principal = replace(acme.caller.principal, policy=policy)
    machine.tenants["acme"] = replace(acme, caller=replace(acme.caller, principal=principal))
    run(machine.serve(two, "acme", 1))
    run(machine.serve(one, "acme", 1))
    run(machine.cut(one))
    run(machine.serve(one, "acme", 24))
    assert len(one.running) == 2
    run(machine.end(one, 1, 24))
    one.again()
    run(machine.serve(one, "acme", 1))
    for _ in range(4):
        run(machine.serve(two, "acme", 24))
        run(machine.end(two, 1, 24))
    run(machine.check())


def test_a_slice_of_an_older_epoch_is_worth_nothing(machine: QuotaMachine) -> None:
    run, (one, two) = machine.runner.run, machine.gateways
    run(machine.serve(one, "acme", 1))
    run(machine.watch(one))
    run(machine.cut(one))
    run(machine.empty())  # the store forgets that a part of the limit is one's
    for _ in range(6):
        run(machine.serve(two, "acme", 8))
        run(machine.end(two, 0, 8))
    run(machine.serve(one, "acme", 12))
    run(machine.check())


# --- parts ----------------------------------------------------------------------------------------------------------


def test_a_cap_drains_and_never_overflows() -> None:
    cap = OpenCap(FailurePolicy("open", requests_per_minute=60, tokens_per_minute=600, concurrency_max=10**5))
    second = 10**9
    admitted = [second_ for second_ in range(120) for _ in range(5) if cap.take(7, second_ * second)]
    assert sum(1 for when in admitted if when == 0) == 5
    assert len(admitted) * 7 <= 600 * 3
    assert len(admitted) >= 600 * 2 // 7
    crowded = OpenCap(FailurePolicy("open", requests_per_minute=9, tokens_per_minute=9, concurrency_max=1))
    assert crowded.take(1, 0)
    assert not crowded.take(1, 0)
    crowded.give_back()
    assert crowded.take(1, 0)


@pytest.mark.parametrize(
    ("values", "words"),
    [
        (("open",), "open needs a cap"),
        (("lease", 26), "1 to 25 percent"),
        (("lease", 10, 5), "a cap of the policy open"),
        (("shut",), "no policy"),
    ],
)
def test_a_policy_that_cannot_be_carried_out_is_refused(values: Any, words: str) -> None:
    with pytest.raises(FailurePolicyError, match=words):
        FailurePolicy(*values)


def test_a_policy_is_kept_and_logged(runner: asyncio.Runner, tmp_path: Path, short_folder: Path) -> None:
    async def scenario() -> None:
        async with house(tmp_path, short_folder) as (hall, _):
            tenant_id = hall.accounts["acme"].tenant_id
            for policy in (OPEN, FailurePolicy("lease", 3), FailurePolicy()):
                await decide(hall, policy)
                async with hall.database.read() as conn:
                    assert await get_policy(conn, tenant_id) == policy
            modes = [body["mode"] for body in await hall.outbox("policy.changed")]
            assert modes == ["open", "lease", "closed"]

    runner.run(scenario())
