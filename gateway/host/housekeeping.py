"""The loops behind a serving gateway: sequence and publish the log, expire overdue holds, write heartbeats."""

from audit.entry import Entry
from audit.keyring import Keyring
from audit.log import publish, sequence
from audit.outbox import append
from gateway import __version__
from gateway.host.background import Loop
from gateway.host.engine_host import EngineHost
from gateway.host.folders import Folders
from gateway.services import Services
from tenancy.ledger import expire_due

REAP_INTERVAL_S = 5.0
REAP_BATCH_MAX = 256  # holds expired in one transaction, so that a backlog does not keep writers waiting


class Housekeeping:
    def __init__(self, services: Services, folders: Folders, keyring: Keyring, engine: EngineHost) -> None:
        settings = services.settings
        self._services = services
        self._folders = folders
        self._keyring = keyring
        self.loops = (
            Loop("sequencer", settings.checkpoint_interval_ms / 1_000, self.sequence),
            Loop("reaper", REAP_INTERVAL_S, self.reap),
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
        await Loop("farewell", 0, lambda: self._note("gateway.stopped", {"reason": "asked to stop"})).run_once()
        await self.loops[0].run_once()

    async def sequence(self) -> None:
        services = self._services
        async with services.database.transaction() as conn:
            await sequence(
                conn, signer=self._keyring, origin=services.settings.log_origin, now_ns=services.world.now_ns()
            )
        # Published even when nothing was sequenced here: a command may have done it.
        async with services.database.read() as conn:
            await publish(conn, self._folders.log, signer=self._keyring)

    async def reap(self) -> None:
        """Void holds whose time is over. A hold outlives its request only when a gateway died."""
        services = self._services
        async with services.database.transaction() as conn:
            now_ns = services.world.now_ns()
            for hold in await expire_due(conn, now_ns, REAP_BATCH_MAX):
                body: dict[str, str | int | bool | list[str]] = {
                    "request_id": hold.request_id,
                    "num_prompt_tokens": 0,
                    "num_cached_tokens": 0,
                    "num_completion_tokens": 0,
                    "amount_nano_usd": 0,
                    "finish_reason": "lost",
                    "outcome": "expired",
                }
                await append(
                    conn, Entry("request.settled", hold.tenant_id, now_ns, body), entropy=services.world.entropy
                )

    async def _note(self, kind: str, body: dict[str, str | int | bool | list[str]]) -> None:
        services = self._services
        async with services.database.transaction() as conn:
            await append(conn, Entry(kind, "", services.world.now_ns(), body), entropy=services.world.entropy)
