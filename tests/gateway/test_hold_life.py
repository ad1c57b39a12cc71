"""A token that leaves a gateway is billed within its hold, or it does not leave: whoever waits, stands still or dies.

Two gateways on one database in virtual time, with the real admission, reaper, recovery, settlement and journals. A
gateway may wait for its T1, stand still (its engine goes on), be cut off from the database, be killed and come back, in
any order and for as long as BULKHEAD_GATEWAY_RETURN_S allows. After each step what was delivered of a request that is
settled is charged. Bugs are planted to see that this notices them.
"""

import asyncio
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from types import SimpleNamespace
from typing import Any, cast

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sqlalchemy import select

from engine.journal import Journal, JournalRecord
from engine.protocol import SamplingParams
from gateway.api.admission import Admission, write_admission
from gateway.api.auth import Caller
from gateway.api.choices import NOTHING
from gateway.api.life import Life
from gateway.api.problems import CreditExhaustedError, DeadlineExceededError
from gateway.api.settlement import Outcome, write_settlement
from gateway.api.translation import Work
from gateway.database import Database
from gateway.host.folders import open_folders
from gateway.host.housekeeping import Housekeeping
from gateway.host.recovery import recover
from gateway.running import Running
from gateway.settings import Settings
from gateway.world import World
from tenancy import tables
from tenancy.access.keys import Principal
from tenancy.accounts.ledger import HoldSettledError
from tenancy.accounts.ledger_check import check_ledger
from tenancy.quotas.quota import Lease, QuotaSnapshot
from tenancy.usage.meter import Usage, UsageConflictError
from tests.gateway.test_money_machine import prepared
from tests.tenancy.test_ledger import MEMORY_DISK
from tests.tenancy.world import SECOND, T0, counting_entropy

TTL_S = 60
RETURN_S = 100
NAMES = ("gw_0", "gw_1")
NUM_PROMPT = 3
QUICK = settings.default.max_examples <= 40


@dataclass
class Stream:
    admission: Admission
    life: Life
    num_produced: int = 0
    ended: Outcome | None = None  # T2 is on its way


@dataclass
class Gateway:
    name: str
    folder: Path
    running: Running = field(default_factory=Running)
    streams: dict[str, Stream] = field(default_factory=dict)
    journal: Journal | None = None  # of its worker; None: both are dead
    num_epochs: int = 0
    still: bool = False
    cut_off: bool = False
    absent_since_ns: int | None = None

    @property
    def alive(self) -> bool:
        return self.journal is not None

    @property
    def present(self) -> bool:
        return self.alive and not self.still and not self.cut_off


class LifeMachine:
    """`plant`: a bug that an earlier version had, or might have had."""

    def __init__(self, plant: str = "") -> None:
        self.plant = plant
        self.runner = asyncio.Runner()
        self.folder = TemporaryDirectory(dir=MEMORY_DISK)
        template, self.tenants = prepared()
        path = Path(self.folder.name) / "life.db"
        path.write_bytes(template)
        self.database = Database(f"sqlite+aiosqlite:///{path}")
        self.now_ns = T0 + SECOND
        self.delivered: dict[str, int] = {}
        self.produced: dict[str, int] = {}
        self.num_requests = 0
        self.gateways = {name: Gateway(name, Path(self.folder.name) / name) for name in NAMES}
        for name in NAMES:
            self.start(name)

    def close(self) -> None:
        self.runner.run(self.database.dispose())
        self.runner.close()
        self.folder.cleanup()

    def services(self, gateway: Gateway) -> Any:
        self.num_requests += 1
        own = Settings(hold_ttl_s=TTL_S, gateway_return_s=1 if self.plant == "no return" else RETURN_S)
        return SimpleNamespace(
            world=self.world(),
            settings=own,
            gateway_id=gateway.name,
            database=self.database,
            running=Running() if self.plant == "reaped while open" else gateway.running,
        )

    def world(self) -> World:
        return World(lambda: self.now_ns, lambda: self.now_ns, counting_entropy(str(self.num_requests)), {})

    def transaction(self, operation: Any) -> Any:
        async def run() -> Any:
            async with self.database.transaction() as conn:
                return await operation(conn)

        return self.runner.run(run())

    # --- what happens -------------------------------------------------------------------------------------------------

    def admit(self, name: str, max_tokens: int, wait_s: int) -> None:
        """T1 begins now, and commits when it has waited for its tenant's accounts."""
        gateway = self.gateways[name]
        if not gateway.present:
            return
        tenant, services = self.tenants["acme"], self.services(gateway)
        request_id = f"req_{self.num_requests}"
        principal = Principal("org", tenant.tenant_id, "acme", tenant.project_id, tenant.key_id, frozenset())
        work = Work("m", [1] * NUM_PROMPT, SamplingParams(max_tokens=max_tokens), 1, "", True, False, "")
        lease = Lease(request_id, tenant.tenant_id, (), max_tokens, 1_000, QuotaSnapshot())
        caller = Caller(principal, ())
        gateway.running.open_requests.add(request_id)
        try:
            admission = self.transaction(
                lambda conn: write_admission(conn, services, caller, work, request_id, lease, f"hold_{request_id}")
            )
        except CreditExhaustedError:
            gateway.running.open_requests.discard(request_id)
            return
        self.delivered[request_id] = self.produced[request_id] = 0
        self.pass_time(wait_s)
        expires_ns = admission.expires_ns
        if self.plant == "from the answer's start":
            expires_ns = self.now_ns + TTL_S * SECOND
        gateway.streams[request_id] = Stream(admission, Life(self.world(), expires_ns, TTL_S))
        self.look(gateway)

    def produce(self, name: str, num_tokens: int) -> None:
        """The worker's step: first its journal, then the frames, which a gateway that stands still finds later."""
        gateway = self.gateways[name]
        if gateway.journal is None:
            return
        for request_id, stream in gateway.streams.items():
            if stream.ended is None:
                stream.num_produced = min(stream.admission.max_tokens, stream.num_produced + num_tokens)
                self.produced[request_id] = stream.num_produced
                gateway.journal.append([JournalRecord(request_id, NUM_PROMPT, stream.num_produced, None)])
        self.look(gateway)

    def look(self, gateway: Gateway) -> None:
        """What its loop does when it runs: frames first, then what is over, then settlements."""
        if gateway.still or not gateway.alive:
            return
        for request_id, stream in gateway.streams.items():
            if stream.ended is not None:
                continue
            try:
                if self.plant != "not asked again":
                    stream.life.require()
                if stream.num_produced > self.delivered[request_id]:
                    assert self.now_ns < stream.admission.expires_ns, "it leaves after its hold's end"
                    self.delivered[request_id] = stream.num_produced
                if not stream.life.left_s:
                    raise DeadlineExceededError
                if stream.num_produced == stream.admission.max_tokens:
                    self.end(request_id, stream, "length")
            except DeadlineExceededError:
                self.end(request_id, stream, "deadline")
        self.settle(gateway)

    def end(self, request_id: str, stream: Stream, reason: str) -> None:
        num_tokens = self.delivered[request_id]
        usage = Usage(NUM_PROMPT, 0, num_tokens) if num_tokens else NOTHING
        stream.ended = Outcome(usage, reason, self.now_ns, num_tokens)

    def settle(self, gateway: Gateway) -> None:
        if gateway.cut_off:
            return
        for request_id, stream in list(gateway.streams.items()):
            admission, outcome = stream.admission, stream.ended
            if outcome is None:
                continue
            entropy = counting_entropy(f"end{request_id}")

            async def operation(conn: Any, admission: Any = admission, outcome: Any = outcome) -> None:
                await write_settlement(conn, admission, outcome, entropy=entropy)  # noqa: B023 - at once

            with suppress(HoldSettledError, UsageConflictError):  # `nothing_left_unbilled` asks whether that is right
                self.transaction(operation)
            del gateway.streams[request_id]
            gateway.running.open_requests.discard(request_id)

    def pass_time(self, seconds: int) -> None:
        absent = [one.absent_since_ns for one in self.gateways.values() if one.absent_since_ns is not None]
        latest = min((since_ns + (RETURN_S - 1) * SECOND for since_ns in absent), default=self.now_ns + 10**15)
        self.now_ns = min(self.now_ns + seconds * SECOND, max(self.now_ns, latest))
        for gateway in self.gateways.values():
            self.look(gateway)

    def reap(self, name: str) -> None:
        gateway = self.gateways[name]
        if gateway.present:
            keeper = SimpleNamespace(_services=self.services(gateway), _folders=open_folders(gateway.folder))
            self.runner.run(Housekeeping.reap(cast(Any, keeper)))

    def stand_still(self, name: str) -> None:
        self.leave(self.gateways[name], still=True)

    def cut_off(self, name: str) -> None:
        self.leave(self.gateways[name], cut_off=True)

    def kill(self, name: str) -> None:
        """With its worker, as a kill -9 does."""
        gateway = self.gateways[name]
        if gateway.journal is not None:
            gateway.journal.close()
            gateway.journal = None
        self.leave(gateway, still=False, cut_off=False)
        gateway.streams.clear()
        gateway.running = Running()

    def leave(self, gateway: Gateway, **how: bool) -> None:
        for name, value in how.items():
            setattr(gateway, name, value)
        if gateway.absent_since_ns is None:
            gateway.absent_since_ns = self.now_ns

    def come_back(self, name: str) -> None:
        gateway = self.gateways[name]
        gateway.still = gateway.cut_off = False
        if not gateway.alive:
            self.start(name)
        gateway.absent_since_ns = None
        self.look(gateway)

    def wake_to_reap(self, name: str) -> None:
        """It stood still, and the first thing that it does is to look for overdue holds."""
        gateway = self.gateways[name]
        gateway.still = False
        before = set(gateway.streams)
        self.reap(name)
        if gateway.present:
            states, _ = self.transaction(self.books)
            assert {states[one] for one in before} <= {"pending"}, "settled behind the back of its own request"
            self.come_back(name)

    def start(self, name: str) -> None:
        gateway = self.gateways[name]
        gateway.num_epochs += 1
        folders, epoch = open_folders(gateway.folder), f"epoch-{gateway.num_epochs}"
        gateway.journal = Journal(folders.journal, epoch)
        if self.plant == "journal lost":
            for path in folders.journal.glob("*.journal"):
                path.write_bytes(b"")
        self.runner.run(recover(self.services(gateway), folders, epoch))

    # --- what always holds --------------------------------------------------------------------------------------------

    def nothing_left_unbilled(self) -> None:
        holds, billed = self.transaction(self.books)
        for request_id, num_delivered in self.delivered.items():
            state = holds[request_id]
            num_billed = billed.get(request_id, 0)
            if state != "pending":
                assert num_delivered <= num_billed <= self.produced[request_id], (request_id, state)

    async def books(self, conn: Any) -> tuple[dict[str, str], dict[str, int]]:
        hold, row = tables.hold, tables.usage_record
        holds = {one.request_id: one.state for one in await conn.execute(select(hold.c.request_id, hold.c.state))}
        billed = {
            one.request_id: one.num_completion_tokens
            for one in await conn.execute(select(row.c.request_id, row.c.num_completion_tokens))
        }
        assert (await check_ledger(conn)).ok
        return holds, billed

    def all_ends(self) -> None:
        for name in NAMES:
            self.come_back(name)
        self.pass_time(TTL_S + RETURN_S)
        for name in NAMES:
            self.reap(name)
        self.nothing_left_unbilled()
        holds, _ = self.transaction(self.books)
        assert "pending" not in holds.values()


def step(method: Any, *arguments: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    return st.tuples(st.just(method), st.tuples(*arguments))


names = st.sampled_from(NAMES)
seconds = st.sampled_from([1, 5, 20, 55, 61, 99])
STEPS = st.one_of(
    step(LifeMachine.admit, names, st.integers(1, 20), st.sampled_from([0, 0, 5, 30, 70])),
    step(LifeMachine.admit, names, st.integers(1, 20), st.just(0)),
    step(LifeMachine.produce, names, st.integers(1, 8)),
    step(LifeMachine.produce, names, st.integers(1, 8)),
    step(LifeMachine.pass_time, seconds),
    step(LifeMachine.reap, names),
    step(LifeMachine.stand_still, names),
    step(LifeMachine.cut_off, names),
    step(LifeMachine.kill, names),
    step(LifeMachine.come_back, names),
    step(LifeMachine.wake_to_reap, names),
)


def run(steps: list[Any], plant: str = "") -> None:
    machine = LifeMachine(plant)
    try:
        for method, arguments in steps:
            method(machine, *arguments)
            machine.nothing_left_unbilled()
        machine.all_ends()
    finally:
        machine.close()


@given(steps=st.lists(STEPS, min_size=10, max_size=40))
# The scenes below show every planted bug by themselves, so that the quick profile needs few histories.
@settings(max_examples=20 if QUICK else settings.default.max_examples, derandomize=QUICK)
def test_what_leaves_is_billed_within_its_hold(steps: list[Any]) -> None:
    run(steps)


A, B = NAMES
M = LifeMachine
# What has to happen for each planted bug to show.
SCENES: dict[str, list[Any]] = {
    "from the answer's start": [(M.admit, (A, 20, 55)), (M.pass_time, (20,)), (M.produce, (A, 3))],
    "not asked again": [
        (M.admit, (A, 20, 0)),
        (M.stand_still, (A,)),
        (M.produce, (A, 3)),
        (M.pass_time, (61,)),
        (M.come_back, (A,)),
    ],
    "reaped while open": [
        (M.admit, (A, 20, 0)),
        (M.produce, (A, 3)),
        (M.stand_still, (A,)),
        (M.produce, (A, 3)),
        (M.pass_time, (61,)),
        (M.wake_to_reap, (A,)),
    ],
    "no return": [
        (M.admit, (A, 20, 0)),
        (M.produce, (A, 3)),
        (M.kill, (A,)),
        (M.pass_time, (99,)),
        (M.reap, (B,)),
        (M.come_back, (A,)),
    ],
    "journal lost": [(M.admit, (A, 20, 0)), (M.produce, (A, 3)), (M.kill, (A,)), (M.come_back, (A,))],
}


@pytest.mark.parametrize("plant", SCENES)
def test_planted_bugs_are_seen(plant: str) -> None:
    run(SCENES[plant])
    with pytest.raises(AssertionError):
        run(SCENES[plant], plant)
