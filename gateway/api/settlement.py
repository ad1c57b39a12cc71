"""Every admitted request ends here, exactly once: capture or void, usage row, log row, quota given back.

    T2   one transaction {capture the charge | void the hold, usage row, `request.settled` in the outbox}

What is charged:
- an answer that ended (stop, length), or whose client left or stopped reading: every token that the engine produced;
- an answer that we broke (engine gone, engine error, deadline, shutdown): the tokens that had been sent to the client
  in a stream, as the engine's last report with text counted them. Nothing was sent: nothing is charged, so an answer
  that was not streamed costs nothing;
- no token produced: nothing.

When the database is away, T2 is tried again in the background for as long as the hold is left to this gateway
(host/overdue.py): its own reaper leaves a hold alone that is open here, others do so for a while after its expiry. From
then on expiry and journal decide. T2 is idempotent: a lost reply to a commit cannot charge twice.
"""

import asyncio
from collections.abc import Awaitable, Callable, Coroutine
from dataclasses import dataclass
from typing import Any

import structlog
from sqlalchemy.ext.asyncio import AsyncConnection

from audit.transparency.entry import Entry
from audit.transparency.outbox import append
from gateway.api.admission import Admission, Claim
from gateway.api.choices import NOTHING
from gateway.api.one_trip import do_and_tell
from gateway.api.problems import bug_report
from gateway.budget_alerts import append_settled
from gateway.database import Database, DatabaseUnavailableError
from gateway.services import Services
from tenancy.accounts.ledger import HoldSettledError, capture, get_hold, void
from tenancy.accounts.one_trip import settle_hold
from tenancy.pricing.prices import charge_nano_usd
from tenancy.pricing.volume import lock_hold, take_volume
from tenancy.quotas.quota import Lease, QuotaUnavailableError
from tenancy.usage.meter import Effort, Usage, UsageConflictError, UsageRecord, get_usage, record_usage

FIRST_RETRY_S = 0.1
RETRY_MAX_S = 5.0
RELEASE_TRIES = 3

log = structlog.get_logger("gateway.api.settlement")


@dataclass(frozen=True, slots=True)
class Outcome:
    """How a request ended. `usage` is what is charged: all zero when nothing is."""

    usage: Usage
    finish_reason: str  # stop, length, or what broke it: client_gone, client_slow, engine_gone, deadline, shutdown, ...
    finished_ns: int
    num_quota_tokens: int  # what really counts against tokens per minute
    effort: Effort | None = None  # what the engine measured, whatever of it is charged


class Settler:
    """Owns the settlements in flight, so that none is lost when its request's task is."""

    def __init__(self, services: Services) -> None:
        self._services = services
        self._tasks: set[asyncio.Task[bool]] = set()
        self._open = services.running.open_requests
        self._all_closed = asyncio.Event()
        self._all_closed.set()

    @property
    def num_open(self) -> int:
        """Requests that hold something and are not settled yet."""
        return len(self._open)

    def opened(self, request_id: str) -> None:
        """A request starts to take things: exactly one `settle` or `undo` must follow."""
        self._open.add(request_id)
        self._all_closed.clear()

    def settle(self, admission: Admission, outcome: Outcome) -> asyncio.Task[bool]:
        """Start T2 and the quota's release. Never raises; awaiting the task is optional. Its result is False when the
        hold was over: nothing of the request is billed any more."""
        return self._start(self._settle(admission, outcome), admission.request_id)

    def undo(self, claim: Claim, claiming: asyncio.Task[Admission]) -> asyncio.Task[bool]:
        """Give back what a failed or abandoned admission has taken, once its task has ended."""
        return self._start(self._undo(claim, claiming), claim.request_id)

    async def drain(self, timeout_s: float) -> int:
        """Wait for open requests to be settled; returns how many are left to hold expiry and recovery."""
        try:
            async with asyncio.timeout(timeout_s):
                await self._all_closed.wait()
        except TimeoutError:
            num_left = self.num_open
            log.error("settlements.left", num_left=num_left)
            for task in list(self._tasks):
                task.cancel()
            await asyncio.gather(*self._tasks, return_exceptions=True)
            return num_left
        return 0

    def _start(self, work: Coroutine[Any, Any, bool], request_id: str) -> asyncio.Task[bool]:
        task = asyncio.create_task(self._closing(work))
        self._tasks.add(task)
        task.add_done_callback(lambda task: self._closed(task, request_id))
        return task

    def _closed(self, task: asyncio.Task[bool], request_id: str) -> None:
        """A callback, because a task that is cancelled before it begins runs no `finally`."""
        self._tasks.discard(task)
        self._open.discard(request_id)
        if not self._open:
            self._all_closed.set()

    async def _closing(self, work: Coroutine[Any, Any, bool]) -> bool:
        try:
            return await work
        except Exception as error:  # a bug: when the hold is overdue, the reaper charges what the journal counts
            log.error("settlement.failed", **bug_report(error))
            return True

    async def _settle(self, admission: Admission, outcome: Outcome) -> bool:
        releasing = asyncio.create_task(self._release(admission.lease, outcome.num_quota_tokens))
        database, entropy = self._services.database, self._services.world.entropy

        async def attempt() -> None:
            if not database.is_sqlite and await _settle_in_one_trip(database, admission, outcome, entropy=entropy):
                return
            async with database.transaction(admission.principal.tenant_id) as conn:
                await write_settlement(conn, admission, outcome, entropy=entropy)

        try:
            return await self._insist(attempt, admission.request_id, admission.expires_ns)
        finally:
            await releasing

    async def _undo(self, claim: Claim, claiming: asyncio.Task[Admission]) -> bool:
        await asyncio.gather(claiming, return_exceptions=True)
        if claim.lease is not None:
            await self._release(claim.lease, 0)
        hold_id = claim.hold_id
        if hold_id is None:
            return True
        world = self._services.world

        async def attempt() -> None:
            async with self._services.database.transaction(claim.tenant_id) as conn:
                await write_void_if_held(conn, hold_id, now_ns=world.now_ns(), entropy=world.entropy)

        expires_ns = world.now_ns() + self._services.settings.hold_ttl_s * 1_000_000_000
        return await self._insist(attempt, claim.request_id, expires_ns)

    async def _insist(self, attempt: Callable[[], Awaitable[None]], request_id: str, expires_ns: int) -> bool:
        """Repeat `attempt` while the database is away, with growing pauses, until others may have expired the hold."""
        pause_s, until_ns = FIRST_RETRY_S, expires_ns + self._services.settings.gateway_return_s * 1_000_000_000
        while True:
            try:
                await attempt()
                return True
            except DatabaseUnavailableError as error:
                log.warning("settlement.waits", request_id=request_id, error=str(error), retry_s=pause_s)
            except (HoldSettledError, UsageConflictError) as error:
                log.warning(
                    "settlement.late", request_id=request_id, error=str(error)
                )  # expired and resolved by another gateway's reaper
                return False
            if self._services.world.now_ns() >= until_ns:
                log.error("settlement.abandoned", request_id=request_id)
                return False
            await asyncio.sleep(pause_s)
            pause_s = min(2 * pause_s, RETRY_MAX_S)

    async def _release(self, lease: Lease, num_tokens_used: int) -> None:
        """Give unused tokens and the place back. Without Valkey the lease's own expiry frees the place."""
        for _ in range(RELEASE_TRIES):
            try:
                await self._services.allowance.release(lease, num_tokens_used)
                return
            except QuotaUnavailableError as error:
                log.warning("release.failed", lease_id=lease.lease_id, error=str(error))
                await asyncio.sleep(FIRST_RETRY_S)


async def _settle_in_one_trip(
    database: Database, admission: Admission, outcome: Outcome, *, entropy: Callable[[int], bytes]
) -> bool:
    """T2 for the common case (one_trip.py). False: nothing has happened, and write_settlement decides."""
    if admission.price.steps:
        return False
    record = _record(admission, outcome, 0)
    statement = settle_hold(admission.hold_id, record, num_tokens=outcome.num_quota_tokens)
    return await do_and_tell(database, statement, _entry_of(record), entropy=entropy)


async def write_settlement(
    conn: AsyncConnection, admission: Admission, outcome: Outcome, *, entropy: Callable[[int], bytes]
) -> None:
    """T2's statements. Writes nothing when an earlier try has committed after all.

    Raises HoldSettledError or UsageConflictError when the hold's expiry has decided otherwise.
    """
    usage = outcome.usage
    before = 0 if usage == NOTHING else await _volume_before(conn, admission, usage)
    record = _record(admission, outcome, before)
    at_ns, num_tokens = record.finished_ns, outcome.num_quota_tokens
    # The hold first: whoever else settles it (host/overdue.py) takes the two in the same order.
    if usage == NOTHING:
        settled = await void(conn, admission.hold_id, at_ns, num_tokens=num_tokens)
    else:
        settled = await capture(conn, admission.hold_id, record.amount_nano_usd, at_ns, num_tokens=num_tokens)
    if not await record_usage(conn, record):
        return
    await append_settled(conn, settled, at_ns, entropy=entropy)
    await append(conn, _entry_of(record), entropy=entropy)


def _record(admission: Admission, outcome: Outcome, before: int) -> UsageRecord:
    """The request's usage row, with its charge."""
    usage, principal = outcome.usage, admission.principal
    charged = usage != NOTHING
    return UsageRecord(
        request_id=admission.request_id,
        tenant_id=principal.tenant_id,
        project_id=principal.project_id,
        key_id=principal.key_id,
        model=admission.model,
        usage=usage,
        price_id=admission.price.price_id,
        amount_nano_usd=charge_nano_usd(admission.price, usage, admission.tier, before) if charged else 0,
        started_ns=admission.started_ns,
        finished_ns=max(outcome.finished_ns, admission.started_ns),  # a wall clock may step back
        finish_reason=outcome.finish_reason,
        stream=admission.stream,
        tier=admission.tier,
        num_tokens_before=before,
        effort=outcome.effort,
    )


def _entry_of(record: UsageRecord) -> Entry:
    return settled_entry(
        record.request_id,
        record.tenant_id,
        record.usage,
        record.amount_nano_usd,
        record.finish_reason,
        "voided" if record.usage == NOTHING else "captured",
        record.finished_ns,
    )


async def _volume_before(conn: AsyncConnection, admission: Admission, usage: Usage) -> int:
    """Where the request begins on its price's steps: counted once, however often T2 is tried."""
    if not admission.price.steps:
        return 0
    await lock_hold(conn, admission.hold_id)
    earlier = await get_usage(conn, admission.request_id)
    if earlier is not None:
        return earlier.num_tokens_before
    num_tokens = usage.num_prompt_tokens + usage.num_completion_tokens
    return await take_volume(conn, admission.principal.tenant_id, admission.price, admission.started_ns, num_tokens)


async def write_void_if_held(
    conn: AsyncConnection, hold_id: str, *, now_ns: int, entropy: Callable[[int], bytes]
) -> None:
    """Void a hold that may never have been placed, because the reply to its T1 was lost."""
    hold = await get_hold(conn, hold_id)
    if hold is None or hold.state != "pending":
        return
    await append_settled(conn, await void(conn, hold_id, now_ns), now_ns, entropy=entropy)
    entry = settled_entry(hold.request_id, hold.tenant_id, NOTHING, 0, "not_started", "voided", now_ns)
    await append(conn, entry, entropy=entropy)


def settled_entry(
    request_id: str,
    tenant_id: str,
    usage: Usage,
    amount_nano_usd: int,
    finish_reason: str,
    outcome: str,
    at_ns: int,
) -> Entry:
    body: dict[str, str | int | bool | list[str]] = {
        "request_id": request_id,
        "num_prompt_tokens": usage.num_prompt_tokens,
        "num_cached_tokens": usage.num_cached_tokens,
        "num_completion_tokens": usage.num_completion_tokens,
        "amount_nano_usd": amount_nano_usd,
        "finish_reason": finish_reason,
        "outcome": outcome,
    }
    return Entry("request.settled", tenant_id, at_ns, body)
