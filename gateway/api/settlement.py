"""Every admitted request ends here, exactly once: capture or void, usage row, log row, quota given back.

    T2   one transaction {capture the charge | void the hold, usage row, `request.settled` in the outbox}

What is charged:
- an answer that ended (stop, length), or whose client left or stopped reading: every token that the engine produced;
- an answer that we broke (engine gone, engine error, deadline, shutdown): the tokens that had been sent to the client
  in a stream, as the engine's last report with text counted them. Nothing was sent: nothing is charged, so an answer
  that was not streamed costs nothing;
- no token produced: nothing.

When the database is away, T2 is tried again in the background until the hold has expired; from then on the hold's
expiry and the worker's journal decide (recovery.py). T2 is idempotent: a lost reply to a commit cannot charge twice.
"""

import asyncio
from collections.abc import Awaitable, Callable, Coroutine
from dataclasses import dataclass
from typing import Any

import structlog
from sqlalchemy.ext.asyncio import AsyncConnection

from audit.entry import Entry
from audit.outbox import append
from gateway.api.admission import Admission, Claim
from gateway.api.choices import NOTHING
from gateway.api.problems import bug_report
from gateway.budget_alerts import append_settled
from gateway.database import DatabaseUnavailableError
from gateway.services import Services
from tenancy.ledger import HoldSettledError, capture, get_hold, void
from tenancy.meter import Usage, UsageConflictError, UsageRecord, record_usage
from tenancy.prices import charge_nano_usd
from tenancy.quota import Lease, QuotaUnavailableError

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


class Settler:
    """Owns the settlements in flight, so that none is lost when its request's task is."""

    def __init__(self, services: Services) -> None:
        self._services = services
        self._tasks: set[asyncio.Task[None]] = set()
        self._num_open = 0
        self._all_closed = asyncio.Event()
        self._all_closed.set()

    @property
    def num_open(self) -> int:
        """Requests that hold something and are not settled yet."""
        return self._num_open

    def opened(self) -> None:
        """A request starts to take things: exactly one `settle` or `undo` must follow."""
        self._num_open += 1
        self._all_closed.clear()

    def settle(self, admission: Admission, outcome: Outcome) -> asyncio.Task[None]:
        """Start T2 and the quota's release. Never raises; awaiting the task is optional."""
        return self._start(self._settle(admission, outcome))

    def undo(self, claim: Claim, claiming: asyncio.Task[Admission]) -> asyncio.Task[None]:
        """Give back what a failed or abandoned admission has taken, once its task has ended."""
        return self._start(self._undo(claim, claiming))

    async def drain(self, timeout_s: float) -> int:
        """Wait for open requests to be settled; returns how many are left to hold expiry and recovery."""
        try:
            async with asyncio.timeout(timeout_s):
                await self._all_closed.wait()
        except TimeoutError:
            num_left = self._num_open
            log.error("settlements.left", num_left=num_left)
            for task in list(self._tasks):
                task.cancel()
            await asyncio.gather(*self._tasks, return_exceptions=True)
            return num_left
        return 0

    def _start(self, work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        task = asyncio.create_task(self._closing(work))
        self._tasks.add(task)
        task.add_done_callback(self._closed)
        return task

    def _closed(self, task: asyncio.Task[None]) -> None:
        """A callback, because a task that is cancelled before it begins runs no `finally`."""
        self._tasks.discard(task)
        self._num_open -= 1
        if self._num_open == 0:
            self._all_closed.set()

    async def _closing(self, work: Coroutine[Any, Any, None]) -> None:
        try:
            await work
        except Exception as error:  # a bug: the hold's expiry decides
            log.error("settlement.failed", **bug_report(error))

    async def _settle(self, admission: Admission, outcome: Outcome) -> None:
        await self._release(admission.lease, outcome.num_quota_tokens)
        world = self._services.world

        async def attempt() -> None:
            async with self._services.database.transaction(admission.principal.tenant_id) as conn:
                await write_settlement(conn, admission, outcome, entropy=world.entropy)

        await self._insist(attempt, admission.request_id, admission.expires_ns)

    async def _undo(self, claim: Claim, claiming: asyncio.Task[Admission]) -> None:
        await asyncio.gather(claiming, return_exceptions=True)
        if claim.lease is not None:
            await self._release(claim.lease, 0)
        hold_id = claim.hold_id
        if hold_id is None:
            return
        world = self._services.world

        async def attempt() -> None:
            async with self._services.database.transaction(claim.tenant_id) as conn:
                await write_void_if_held(conn, hold_id, now_ns=world.now_ns(), entropy=world.entropy)

        expires_ns = world.now_ns() + self._services.settings.hold_ttl_s * 1_000_000_000
        await self._insist(attempt, claim.request_id, expires_ns)

    async def _insist(self, attempt: Callable[[], Awaitable[None]], request_id: str, expires_ns: int) -> None:
        """Repeat `attempt` while the database is away, with growing pauses, until the hold has expired."""
        pause_s = FIRST_RETRY_S
        while True:
            try:
                await attempt()
                return
            except DatabaseUnavailableError as error:
                log.warning("settlement.waits", request_id=request_id, error=str(error), retry_s=pause_s)
            except (HoldSettledError, UsageConflictError) as error:
                log.warning(
                    "settlement.late", request_id=request_id, error=str(error)
                )  # expired and resolved by the reaper
                return
            if self._services.world.now_ns() >= expires_ns:
                log.error("settlement.abandoned", request_id=request_id)
                return
            await asyncio.sleep(pause_s)
            pause_s = min(2 * pause_s, RETRY_MAX_S)

    async def _release(self, lease: Lease, num_tokens_used: int) -> None:
        """Give unused tokens and the place back. Without Valkey the lease's own expiry frees the place."""
        for _ in range(RELEASE_TRIES):
            try:
                await self._services.quota.release(lease, num_tokens_used)
                return
            except QuotaUnavailableError as error:
                log.warning("release.failed", lease_id=lease.lease_id, error=str(error))
                await asyncio.sleep(FIRST_RETRY_S)


async def write_settlement(
    conn: AsyncConnection, admission: Admission, outcome: Outcome, *, entropy: Callable[[int], bytes]
) -> None:
    """T2's statements. Writes nothing when an earlier try has committed after all.

    Raises HoldSettledError or UsageConflictError when the hold's expiry has decided otherwise.
    """
    usage = outcome.usage
    at_ns = max(outcome.finished_ns, admission.started_ns)  # a wall clock may step back
    amount_nano_usd = 0 if usage == NOTHING else charge_nano_usd(admission.price, usage)
    principal = admission.principal
    record = UsageRecord(
        request_id=admission.request_id,
        tenant_id=principal.tenant_id,
        project_id=principal.project_id,
        key_id=principal.key_id,
        model=admission.model,
        usage=usage,
        price_id=admission.price.price_id,
        amount_nano_usd=amount_nano_usd,
        started_ns=admission.started_ns,
        finished_ns=at_ns,
        finish_reason=outcome.finish_reason,
        stream=admission.stream,
    )
    if not await record_usage(conn, record):
        return
    if usage == NOTHING:
        settled = await void(conn, admission.hold_id, at_ns)
    else:
        settled = await capture(conn, admission.hold_id, amount_nano_usd, at_ns)
    await append_settled(conn, settled, at_ns, entropy=entropy)
    entry = settled_entry(
        admission.request_id,
        principal.tenant_id,
        usage,
        amount_nano_usd,
        outcome.finish_reason,
        "voided" if usage == NOTHING else "captured",
        at_ns,
    )
    await append(conn, entry, entropy=entropy)


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
