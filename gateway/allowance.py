"""What a request may take of its limits: from the store of quotas, and by its tenant's policy while that is gone.

    the store answers                        its counters decide, under the organisation's epoch
    it counts under another epoch, or none   the counters are made anew from SQL first, by one gateway; others wait
    it does not answer                       the tenant's policy (tenancy/quotas/failure_policy.py): closed, lease, open
    it is back                               an organisation for which this gateway admitted by itself is made anew, too

What a policy admits is marked in SQL with its hold, so that it is counted also when this process dies before.

Every lease names the epoch under which it was granted, also one that a policy granted, and the hold is placed only
under that epoch (admission.py). So nothing is ever counted by nobody: not what was admitted just before the store was
emptied, nor what another gateway admitted by itself.
"""

import asyncio
from collections import defaultdict
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field

import structlog
from redis.asyncio import Redis
from sqlalchemy.ext.asyncio import AsyncConnection

from audit.transparency.entry import Entry
from audit.transparency.outbox import append
from gateway.breaker import Breaker
from gateway.database import Database, DatabaseUnavailableError
from gateway.metrics import Metrics
from gateway.world import World, new_id
from tenancy.access.keys import Principal
from tenancy.quotas.limits import ScopeLimits
from tenancy.quotas.open_cap import OpenCap
from tenancy.quotas.quota import EpochMismatch, Lease, Quota, QuotaSnapshot, QuotaUnavailableError, Refused
from tenancy.quotas.quota_epochs import change_epoch, counters_of, current_epoch, lock_epoch, lock_tenants
from tenancy.quotas.slices import Slice, Slices

EPOCH_TRIES = 4  # how often a request follows an epoch that changes under it
SLICE_TTL_S = 120  # how long an outage may last before `lease` has nothing left
CUT_INTERVAL_NS = 10 * 10**9
SLICE_IDLE_NS = 300 * 10**9  # after this long without a request a tenant's slices are given back
CAPS_MAX = 10_000  # tenants with a count of their own; idle ones are forgotten first

log = structlog.get_logger(__name__)


@dataclass(slots=True)
class Outage:
    """One time that the store was gone, for the log."""

    began_ns: int
    reason: str
    logged: bool = False  # that it began
    num_admitted: dict[str, int] = field(default_factory=lambda: {"lease": 0, "open": 0})
    num_refused: int = 0


@dataclass(frozen=True, slots=True)
class Sliced:
    """A scope of which this gateway keeps a slice."""

    limits: ScopeLimits
    percent: int
    seen_ns: int


class Allowance:
    def __init__(
        self, quota: Quota, redis: Redis, database: Database, world: World, metrics: Metrics, lease_ttl_s: int
    ) -> None:
        self._quota = quota
        self._redis = redis
        self._database = database
        self._world = world
        self._metrics = metrics
        self._lease_ttl_ms = lease_ttl_s * 1_000
        self._gateway = new_id("slc", world.entropy)  # of this process: a slice does not outlive it
        self._breaker = Breaker(world, redis.ping, self._changed)
        self._epochs: dict[str, str] = {}
        self._rebuilding: defaultdict[str, asyncio.Lock] = defaultdict(asyncio.Lock)
        self._strayed: dict[
            str, str
        ] = {}  # organisations for which this process admitted by itself -> under which epoch
        self._met: set[str] = set()  # organisations whose counters this process has used
        self._slices = Slices()
        self._sliced: dict[str, dict[str, Sliced]] = {}  # organisation -> scope id
        self._next_cut_ns: dict[str, int] = {}  # organisation
        self._spent: dict[str, list[Slice]] = {}  # lease id -> the slices that it is counted in
        self._caps: dict[str, OpenCap] = {}
        self._outage: Outage | None = None
        self._ended: list[tuple[Outage, int]] = []  # outages that are over and not yet logged, and when
        metrics.watch_store(lambda: not self._breaker.is_open)

    async def acquire(
        self, principal: Principal, scopes: Sequence[ScopeLimits], *, lease_id: str, num_tokens: int
    ) -> Lease | Refused:
        """A place under every limit, or none. Raises QuotaUnavailableError, DatabaseUnavailableError."""
        try:
            found = await self._from_store(principal, scopes, lease_id, num_tokens)
        except QuotaUnavailableError:
            return await self._by_policy(principal, scopes, lease_id, num_tokens)
        if principal.policy.mode == "lease" and isinstance(found, Lease):
            self._note_sliced(principal, scopes)
        return found

    async def is_there(self) -> bool:
        """Whether the store answers, as the next request would find it. Raises what the client raises."""
        await self._redis.ping()
        return self._breaker.allows()

    async def renew(self, lease: Lease) -> bool:
        """False if it had expired. Raises QuotaUnavailableError."""
        return await self._breaker.call(lambda: self._quota.renew(lease))

    async def release(self, lease: Lease, num_tokens_used: int) -> bool:
        """End a lease, once. One that a policy granted frees its place here, and in the store if that knows of it.

        Raises QuotaUnavailableError; the lease then expires by itself.
        """
        if lease.mode == "lease" and (slices := self._spent.pop(lease.lease_id, None)) is not None:
            Slices.give_back(slices)
        if lease.mode == "open" and (cap := self._caps.get(lease.tenant_id)) is not None and cap.num_running:
            cap.give_back()
        return await self._breaker.call(lambda: self._quota.release(lease, num_tokens_used))

    async def usage_now(self, tenant_id: str, scopes: Sequence[ScopeLimits]) -> QuotaSnapshot:
        """What is left now, without taking any of it. Raises QuotaUnavailableError."""
        return await self._breaker.call(lambda: self._quota.usage_now(tenant_id, scopes))

    def stale(self, lease: Lease) -> None:
        """The lease's hold was refused: its epoch is over."""
        if slices := self._spent.pop(lease.lease_id, None):
            self._slices.drop(one.limits.scope_id for one in slices)
        if lease.mode == "open" and (cap := self._caps.get(lease.tenant_id)) is not None and cap.num_running:
            cap.give_back()
        self._epochs.pop(_organisation(lease.scopes), None)

    async def watch(self) -> None:
        """One round beside the requests: probe, tell the log of outages, keep slices fresh."""
        if self._breaker.allows():
            await self._cut_slices()
        with suppress(DatabaseUnavailableError):  # then the next round tells it
            await self._log_outages()

    async def close(self) -> None:
        """Give slices back; what the log does not know yet is told."""
        for organisation_id, seen in self._sliced.items():
            if self._breaker.allows() and organisation_id in self._epochs and organisation_id not in self._strayed:
                await self._cut(self._epochs[organisation_id], [one.limits for one in seen.values()], 0)
        self._sliced.clear()
        await self._breaker.close()

    # --- the store ----------------------------------------------------------------------------------------------------

    async def _from_store(
        self, principal: Principal, scopes: Sequence[ScopeLimits], lease_id: str, num_tokens: int
    ) -> Lease | Refused:
        organisation_id = principal.organisation_id
        for _ in range(EPOCH_TRIES):
            if not self._breaker.allows():
                raise QuotaUnavailableError("the store of quotas did not answer a moment ago")
            epoch = self._epochs.get(organisation_id, "")
            if not epoch or organisation_id in self._strayed:
                epoch = await self._epoch(principal, epoch)

            async def ask(epoch: str = epoch) -> Lease | Refused | EpochMismatch:
                return await self._quota.acquire(
                    scopes,
                    tenant_id=principal.tenant_id,
                    lease_id=lease_id,
                    num_tokens=num_tokens,
                    lease_ttl_ms=self._lease_ttl_ms,
                    epoch=epoch,
                )

            found = await self._breaker.call(ask)
            if not isinstance(found, EpochMismatch):
                return found
            await self._epoch(principal, epoch, mismatched=True)
        raise QuotaUnavailableError("the store of quotas is made anew again and again")

    async def _epoch(self, principal: Principal, known: str, *, mismatched: bool = False) -> str:
        """The epoch to count under. Before that the counters are made anew where there are none, where the store does
        not have those that SQL names, and where a policy has admitted something that they do not know."""
        organisation_id = principal.organisation_id
        async with self._rebuilding[organisation_id]:  # one at a time in this process; SQL's locks, over all
            cached = self._epochs.get(organisation_id, "")
            if cached and cached != known and organisation_id not in self._strayed:
                return cached  # another request has just done it
            async with self._database.read() as conn:
                current = await current_epoch(conn, organisation_id)
            epoch, reason = current.epoch, ""
            if not epoch:
                reason = "first"
            elif current.strayed or self._strayed.get(organisation_id) == epoch:
                reason = "outage"
            elif mismatched and epoch == known:
                reason = "emptied"
            elif principal.policy.mode == "lease" and organisation_id not in self._met:
                reason = "start"  # a process before this one may have left slices
            if reason:
                epoch = await self._rebuild(organisation_id, epoch, reason)
            # Under another epoch than the one in which this process strayed, it has been counted.
            if self._strayed.get(organisation_id) != epoch:
                self._strayed.pop(organisation_id, None)
            self._met.add(organisation_id)
            self._epochs[organisation_id] = epoch
            return epoch

    async def _rebuild(self, organisation_id: str, known: str, reason: str) -> str:
        world = self._world
        async with self._database.transaction() as conn:
            now_ns = world.now_ns()
            tenant_ids = await lock_tenants(conn, organisation_id)
            current = await lock_epoch(conn, organisation_id, now_ns=now_ns)
            if current != known:
                return current  # another gateway was quicker
            counters = await counters_of(conn, organisation_id, tenant_ids, now_ns=now_ns)
            epoch = world.entropy(16).hex()
            ttl_ms = self._lease_ttl_ms
            await self._breaker.call(lambda: self._quota.rebuild(counters, epoch=epoch, lease_ttl_ms=ttl_ms))
            await change_epoch(conn, organisation_id, epoch, now_ns=now_ns)
            body: dict[str, str | int | bool | list[str]] = {
                "organisation_id": organisation_id,
                "reason": reason,
                "num_scopes": len(counters.scopes),
                "num_open": len(counters.open_requests),
            }
            await append(conn, Entry("quota.rebuilt", "", now_ns, body), entropy=world.entropy)
        self._metrics.quota_rebuilt(reason)
        (log.info if reason in ("first", "start") else log.warning)("quota.rebuilt", **body)
        return epoch

    # --- policies -----------------------------------------------------------------------------------------------------

    async def _by_policy(
        self, principal: Principal, scopes: Sequence[ScopeLimits], lease_id: str, num_tokens: int
    ) -> Lease | Refused:
        """Raises QuotaUnavailableError where the policy has nothing to give."""
        mode, organisation_id = principal.policy.mode, principal.organisation_id
        granted = False
        epoch = ""
        if mode == "lease":
            slices = self._slices.spend(scopes, num_tokens, self._world.monotonic_ns())
            if granted := slices is not None:
                assert slices is not None
                self._spent[lease_id] = slices
                epoch = slices[0].epoch
        elif mode == "open":
            # A gateway that has not met the store yet asks SQL, where there may be no epoch: then that is the one.
            epoch = self._epochs.get(organisation_id) or await self._known_epoch(organisation_id)
            granted = self._cap(principal).take(num_tokens, self._world.monotonic_ns())
        self._metrics.admitted_without_store(principal.tenant_name, mode, granted=granted)
        if self._outage is not None:
            if granted:
                self._outage.num_admitted[mode] += 1
            else:
                self._outage.num_refused += 1
        if not granted:
            raise QuotaUnavailableError(f"the store of quotas is gone; policy {mode}")
        self._strayed[organisation_id] = epoch
        snapshot = QuotaSnapshot()
        return Lease(
            lease_id,
            principal.tenant_id,
            tuple(scopes),
            num_tokens,
            self._lease_ttl_ms,
            snapshot,
            epoch=epoch,
            mode="lease" if mode == "lease" else "open",
        )

    async def _known_epoch(self, organisation_id: str) -> str:
        async with self._database.read() as conn:
            return (await current_epoch(conn, organisation_id)).epoch

    def _cap(self, principal: Principal) -> OpenCap:
        cap = self._caps.get(principal.tenant_id)
        if cap is None or cap.policy != principal.policy:
            running = 0 if cap is None else cap.num_running
            if len(self._caps) >= CAPS_MAX:
                self._caps = {name: one for name, one in self._caps.items() if one.num_running}
            cap = self._caps[principal.tenant_id] = OpenCap(principal.policy, running)
        return cap

    def _note_sliced(self, principal: Principal, scopes: Sequence[ScopeLimits]) -> None:
        now_ns = self._world.monotonic_ns()
        seen = self._sliced.setdefault(principal.organisation_id, {})
        for one in scopes:
            if one.scope_id not in seen or seen[one.scope_id].limits != one:
                self._next_cut_ns.pop(principal.organisation_id, None)
            seen[one.scope_id] = Sliced(one, principal.policy.slice_percent, now_ns)

    async def _cut_slices(self) -> None:
        """Fresh slices for scopes that are in use; those of idle ones go back."""
        for organisation_id, seen in list(self._sliced.items()):
            now_ns, epoch = self._world.monotonic_ns(), self._epochs.get(organisation_id, "")
            if now_ns < self._next_cut_ns.get(organisation_id, 0) or not epoch or organisation_id in self._strayed:
                continue
            self._next_cut_ns[organisation_id] = now_ns + CUT_INTERVAL_NS
            by_percent: defaultdict[int, list[ScopeLimits]] = defaultdict(list)
            for one in seen.values():
                by_percent[one.percent if one.seen_ns > now_ns - SLICE_IDLE_NS else 0].append(one.limits)
            for percent, scopes in by_percent.items():
                await self._cut(epoch, scopes, percent)
            for idle in by_percent.get(0, ()):
                del seen[idle.scope_id]
            if not seen:
                del self._sliced[organisation_id]

    async def _cut(self, epoch: str, scopes: list[ScopeLimits], percent: int) -> None:
        """While it is under way the old slices may be spent: the store never gives less than it had given, so whether
        it has heard of this or not, they are reserved."""
        ttl_ms = SLICE_TTL_S * 1_000 if percent else 0
        ends_ns = self._world.monotonic_ns() + ttl_ms * 1_000_000  # before it was asked for: it ends here first
        if not percent:
            self._slices.drop(one.scope_id for one in scopes)
        try:
            found = await self._breaker.call(
                lambda: self._quota.cut(
                    scopes, epoch=epoch, gateway_id=self._gateway, ttl_ms=ttl_ms, percent=max(1, percent)
                )
            )
        except QuotaUnavailableError:
            return
        if isinstance(found, EpochMismatch):
            self._epochs.pop(_organisation(scopes), None)
        elif percent and _organisation(scopes) not in self._strayed:
            for one, amounts in zip(scopes, found, strict=True):
                self._slices.put(Slice(one, epoch, ends_ns, *amounts))

    # --- what is told of it -------------------------------------------------------------------------------------------

    def _changed(self, is_open: bool, reason: str) -> None:
        now_ns = self._world.now_ns()
        if is_open:
            self._metrics.store_lost()
            self._outage = Outage(now_ns, reason)
            log.error("store of quotas lost", reason=reason)
        elif self._outage is not None:
            log.warning("store of quotas is back", num_refused=self._outage.num_refused, **self._outage.num_admitted)
            self._ended.append((self._outage, now_ns))
            self._outage = None

    async def _log_outages(self) -> None:
        """Two entries an outage, whatever happened in it; they wait for the database."""
        told = [outage for outage in (*(one for one, _ in self._ended), self._outage) if outage is not None]
        if not any(not one.logged for one in told) and not self._ended:
            return
        async with self._database.transaction() as conn:
            for outage in told:
                if not outage.logged:
                    await self._note(conn, "quota.lost", outage.began_ns, {"reason": outage.reason[:200]})
            for outage, ended_ns in self._ended:
                body: dict[str, str | int | bool | list[str]] = {
                    "lost_ns": outage.began_ns,
                    "num_admitted_lease": outage.num_admitted["lease"],
                    "num_admitted_open": outage.num_admitted["open"],
                    "num_refused": outage.num_refused,
                }
                await self._note(conn, "quota.back", ended_ns, body)
            num_ended = len(self._ended)
        for outage in told:
            outage.logged = True
        del self._ended[:num_ended]

    async def _note(
        self, conn: AsyncConnection, kind: str, at_ns: int, body: dict[str, str | int | bool | list[str]]
    ) -> None:
        await append(conn, Entry(kind, "", at_ns, body), entropy=self._world.entropy)


def _organisation(scopes: Sequence[ScopeLimits]) -> str:
    return next(iter({one.organisation_id for one in scopes}), "")
