"""The loops behind a serving gateway: log, overdue holds, expired credit, suspended tenants, key uses, webhooks,
heartbeats."""

import asyncio

import structlog

from audit.transparency.entry import Entry
from audit.transparency.keyring import Keyring
from audit.transparency.log import publish, sequence
from audit.transparency.outbox import append
from engine.journal import read_journals
from gateway import __version__
from gateway.billing.reconcile import reconcile, reconciled_entry, reconciled_since
from gateway.budget_alerts import append_expired
from gateway.engine_times import EngineTimes
from gateway.host.background import Loop
from gateway.host.engine_host import EngineHost
from gateway.host.folders import Folders
from gateway.host.overdue import abandoned_holds, settle_abandoned
from gateway.sequences import effort_by_request, usage_by_request
from gateway.services import Services
from gateway.webhooks.delivery import Webhooks
from tenancy.access.keys import KeyRevokedError, revoked_among
from tenancy.accounts.credits import tenants_with_due_credit
from tenancy.accounts.ledger import expire_credit
from tenancy.closing import TenantInactiveError, deleted_tenants, inactive_among
from tenancy.idempotency import forget_expired
from tenancy.invoicing.invoices import SETTLE_NS
from tenancy.invoicing.periods import DAY_NS, SECOND_NS, period_start_ns

REAP_INTERVAL_S = 5.0
REAP_BATCH_MAX = 256  # holds settled in one round
SEQUENCE_PAUSE_S = 0.01  # between pieces of the log: at most 1.3 s in all; SQLite has one writer, which does not pause
WATCH_INTERVAL_S = 0.5  # sequences of a suspended tenant or a revoked key end within a second
KEY_USE_INTERVAL_S = 60.0
ENGINE_TIME_INTERVAL_S = 60.0
FORGET_INTERVAL_S = 60.0
STORE_INTERVAL_S = 0.25  # how soon a store of quotas that is back is noticed where nobody asks
WEBHOOK_INTERVAL_S = 1.0
BOOKS_INTERVAL_S = 300.0  # how often it is looked whether yesterday was compared
RIGHTS_INTERVAL_S = 60.0  # how soon a right that somebody granted is noticed
ERASE_INTERVAL_S = 2.0
ERASE_TIMEOUT_S = 30.0  # a step may be under way

log = structlog.get_logger(__name__)


class Housekeeping:
    def __init__(self, services: Services, folders: Folders, keyring: Keyring, engine: EngineHost) -> None:
        settings = services.settings
        self._services = services
        self._folders = folders
        self._keyring = keyring
        self._engine = engine
        self._erased: tuple[str, set[str]] = ("", set())  # of the worker of this epoch
        self._engine_times = EngineTimes()
        webhooks = Webhooks(services)
        self.loops = (
            Loop("sequencer", settings.checkpoint_interval_ms / 1_000, self.sequence),
            Loop("reaper", REAP_INTERVAL_S, self.reap),
            Loop("watch", WATCH_INTERVAL_S, self.watch),
            Loop("quotas", STORE_INTERVAL_S, services.allowance.watch),
            Loop("key uses", KEY_USE_INTERVAL_S, self.write_key_uses),
            Loop("engine time", ENGINE_TIME_INTERVAL_S, self.write_engine_time),
            Loop("credit", REAP_INTERVAL_S, self.expire_credit),
            Loop("erasure", ERASE_INTERVAL_S, self.erase_deleted),
            Loop("webhooks", WEBHOOK_INTERVAL_S, webhooks.round),
            Loop("old deliveries", FORGET_INTERVAL_S, webhooks.forget),
            Loop("answers", FORGET_INTERVAL_S, self.forget_answers),
            Loop("books", BOOKS_INTERVAL_S, self.reconcile),
            Loop("rights", RIGHTS_INTERVAL_S, services.standing.look),
            Loop("heartbeat", float(settings.heartbeat_interval_s), engine.heartbeat),
        )

    async def start(self) -> None:
        await self._note("gateway.started", {"version": __version__})
        for loop in self.loops:
            loop.start()

    async def stop(self) -> None:
        """End the loops, then give the log its last entries and checkpoint."""
        for loop in self.loops:
            await loop.stop()
        await Loop("slices", 0, self._services.allowance.close).run_once()
        await Loop("last outages", 0, self._services.allowance.watch).run_once()
        await Loop("last key uses", 0, self.write_key_uses).run_once()
        await Loop("last engine time", 0, self.write_engine_time).run_once()
        await Loop("last heartbeat", 0, self._engine.last_heartbeat).run_once()
        await Loop("farewell", 0, lambda: self._note("gateway.stopped", {"reason": "asked to stop"})).run_once()
        await self.loops[0].run_once()

    async def sequence(self) -> None:
        services = self._services
        async with services.database.transaction() as conn:
            await sequence(
                conn,
                signer=self._keyring,
                origin=services.settings.log_origin,
                now_ns=services.world.now_ns(),
                pause_s=0.0 if services.database.is_sqlite else SEQUENCE_PAUSE_S,
            )
        # Published even when nothing was sequenced here: a command may have done it.
        async with services.database.read() as conn:
            await publish(conn, self._folders.log, signer=self._keyring)

    async def reap(self) -> None:
        """Settle holds whose time is over. A hold outlives its request only when a gateway or its database died."""
        services = self._services
        async with services.database.read() as conn:
            holds = await abandoned_holds(conn, services, REAP_BATCH_MAX)
        if not holds:
            return
        records = await asyncio.to_thread(read_journals, self._folders.journal)
        journals, efforts = usage_by_request(records), effort_by_request(records)
        for hold in holds:
            counted, effort = journals.get(hold.request_id), efforts.get(hold.request_id)
            async with services.database.transaction() as conn:
                await settle_abandoned(conn, services, hold, counted, effort=effort)

    async def expire_credit(self) -> None:
        """Post what has expired of tenants that ask for nothing; for others their next request does it."""
        services, now_ns = self._services, self._services.world.now_ns()
        async with services.database.read() as conn:
            tenant_ids = await tenants_with_due_credit(conn, now_ns, REAP_BATCH_MAX)
        for tenant_id in tenant_ids:
            async with services.database.transaction() as conn:
                expired = await expire_credit(conn, tenant_id, now_ns)
                await append_expired(conn, expired, now_ns, entropy=services.world.entropy)

    async def forget_answers(self) -> None:
        """Delete idempotency keys that have expired, with their answers."""
        async with self._services.database.transaction() as conn:
            await forget_expired(conn, self._services.world.now_ns())

    async def reconcile(self) -> None:
        """Once a day, when the day before is settled: compare all books of it, and log what they say."""
        services, now_ns = self._services, self._services.world.now_ns()
        today_ns = period_start_ns("day", now_ns)
        settled_ns = (services.settings.hold_ttl_s + services.settings.gateway_return_s) * SECOND_NS + SETTLE_NS
        if now_ns < today_ns + settled_ns:
            return
        async with services.database.read() as conn:
            if await reconciled_since(conn, today_ns):
                return
            journals = usage_by_request(await asyncio.to_thread(read_journals, self._folders.journal))
            found = await reconcile(conn, journals, today_ns - DAY_NS, today_ns)
        if found.num_differences:
            log.error("books.differ", num_differences=found.num_differences, differences=found.differences[:10])
        async with services.database.transaction() as conn:
            entry = reconciled_entry(found, services.world.now_ns())
            await append(conn, entry, entropy=services.world.entropy)

    async def erase_deleted(self) -> None:
        """A deleted tenant's numbers go from the engine's memory, and the log says so. A worker that was started after
        the deletion has none."""
        services = self._services
        if services.engine.status.state != "ready":
            return
        client = services.engine.client()
        epoch = client.ready.epoch
        if self._erased[0] != epoch:
            self._erased = epoch, set()
        async with services.database.read() as conn:
            tenant_ids = await deleted_tenants(conn)
        for tenant_id in sorted(set(tenant_ids) - self._erased[1]):
            async with asyncio.timeout(ERASE_TIMEOUT_S):
                num_blocks = await client.erase(tenant_id)
            if num_blocks:
                await self._note("cache.erased", {"epoch": epoch, "num_blocks": num_blocks}, tenant_id)
            self._erased[1].add(tenant_id)

    async def watch(self) -> None:
        """End what runs for tenants that are no longer active and for keys that are revoked: looked at, not signalled,
        so none is missed."""
        running = self._services.running
        if owners := running.owners():
            async with self._services.database.read() as conn:
                inactive = await inactive_among(conn, {owner.tenant_id for owner in owners})
                revoked = await revoked_among(conn, {owner.key_id for owner in owners})
            for owner in owners:
                if owner.tenant_id in inactive:  # its keys may be revoked, too
                    running.dismiss(owner, TenantInactiveError())
                elif owner.key_id in revoked:
                    running.dismiss(owner, KeyRevokedError())

    async def write_key_uses(self) -> None:
        await self._services.key_uses.write(self._services.database)
        await self._services.token_uses.write(self._services.database)

    async def write_engine_time(self) -> None:
        await self._engine_times.write(self._services)

    async def _note(self, kind: str, body: dict[str, str | int | bool | list[str]], tenant_id: str = "") -> None:
        services = self._services
        async with services.database.transaction() as conn:
            await append(conn, Entry(kind, tenant_id, services.world.now_ns(), body), entropy=services.world.entropy)
