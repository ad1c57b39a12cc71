"""The engine worker as the gateway sees it: its process, its connection, and the facts about it that are logged.

A worker is used only after its start is in the outbox: unlogged means unserved.
"""

import asyncio
import contextlib
import os
import sys
from collections.abc import Callable, Mapping

import msgspec
import structlog

from audit.transparency.entry import Entry
from audit.transparency.outbox import append
from engine.client import EngineClient
from engine.protocol import Incident
from gateway.database import Database, DatabaseUnavailableError
from gateway.engine_link import EngineLink
from gateway.host.folders import Folders
from gateway.host.supervisor import Child
from gateway.settings import Settings
from gateway.world import World

NEW_COUNTS_S = 1.5
START_TIMEOUT_S = 180.0  # a cold disk and two busy cores; a warm start takes a few seconds

SAMPLED = (  # audit/reports/figures.py
    "slots_per_step",
    "num_slots_read",
    "replay_percent",
    "num_sequences",
    "num_replays",
    "num_replays_differing",
    "num_canaries",
)

Body = dict[str, str | int | bool | list[str]]
EngineCommand = Callable[[Settings, Folders], list[str]]  # the command line that listens on folders.engine_socket

log = structlog.get_logger(__name__)


class EngineHost:
    def __init__(
        self,
        settings: Settings,
        world: World,
        folders: Folders,
        database: Database,
        link: EngineLink,
        command: EngineCommand,
    ) -> None:
        self._world = world
        self._folders = folders
        self._database = database
        self._link = link
        self._client: EngineClient | None = None
        self._writing: set[asyncio.Task[None]] = set()  # incident entries on their way; kept so that none is lost
        folders.journal.mkdir(mode=0o700, parents=True, exist_ok=True)
        self.child = Child(
            "engine worker",
            command(settings, folders),
            on_start=self._on_start,
            on_exit=self._on_exit,
            env=worker_environment(world.environ),
        )

    async def stop(self, grace_s: float) -> None:
        await asyncio.gather(*self._writing, return_exceptions=True)
        if self._client is not None:
            await self._client.close()
        await self.child.stop(grace_s)

    async def heartbeat(self) -> None:
        """One audit.heartbeat entry with what the auditor in the worker has counted so far. Nothing while it is down:
        the gap in the log is the statement."""
        client = self._client
        if client is not None and not client.closed.is_set():
            await self._log(*self._counted(client))

    async def last_heartbeat(self) -> None:
        """A heartbeat with counts that are newer than this call: the worker tells them every second."""
        client = self._client
        known = client.stats if client is not None else None
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(NEW_COUNTS_S):
                # The client has no event for it, and this runs once.
                while client is not None and client.stats is known and not client.closed.is_set():  # noqa: ASYNC110
                    await asyncio.sleep(0.05)
        await self.heartbeat()

    def _counted(self, client: EngineClient) -> list[Entry]:
        """What the auditor in this client's worker had counted when it was last heard of; at most a second ago."""
        if client.stats is None:
            return []
        counters = client.stats.audit
        body: Body = {
            "epoch": client.ready.epoch,
            "num_steps": counters["num_steps"],
            "num_slots_checked": counters["num_slots_checked"],
            "num_violations": counters["num_violations"],
            "num_self_tests": counters["num_self_tests"],
            "last_self_test_ok": counters["num_self_tests"] > 0 and counters["num_self_tests_failed"] == 0,
            **{name: counters[name] for name in SAMPLED},
        }
        return [Entry("audit.heartbeat", "", self._world.now_ns(), body)]

    async def _on_start(self, child: Child) -> None:
        client = await EngineClient.connect(
            self._folders.engine_socket, on_incident=self._on_incident, timeout_s=START_TIMEOUT_S
        )
        ready = client.ready
        body: Body = {
            "epoch": ready.epoch,
            "model_id": ready.model_id,
            "model_digest": ready.model_digest,
            "isolation": ready.isolation,
            "kernels": ready.kernels,
        }
        await self._log(Entry("worker.started", "", self._world.now_ns(), body))
        self._client = client
        self._link.num_restarts = child.num_restarts
        self._link.attach(client)

    async def _on_exit(self, code: int) -> None:
        self._link.detach()
        epoch = self._client.ready.epoch if self._client is not None else ""
        if self._client is not None:
            await self._client.close()
        try:
            # Without its last counts, a report would show requests that nobody seems to have audited.
            counted = self._counted(self._client) if self._client is not None else []
            body: Body = {"epoch": epoch, "reason": f"exit code {code}"}
            await self._log(*counted, Entry("worker.lost", "", self._world.now_ns(), body))
        except DatabaseUnavailableError as error:
            # The worker's end shows in the log all the same: its heartbeats stop.
            log.error("worker.lost was not logged", error=str(error))

    def _on_incident(self, incident: Incident) -> None:
        """Called by the reader of the connection, which must not wait: the entry is written by a task of its own."""
        log.error("isolation violation", rule=incident.kind, step=incident.step, sequences=incident.sequence_ids)
        body: Body = {
            "epoch": self._client.ready.epoch if self._client is not None else "",
            "rule": incident.kind,
            "detail": incident.detail,
            "step": incident.step,
            "block_id": incident.block_id,
            "sequence_ids": incident.sequence_ids,
            "domains": incident.domains,
        }
        entry = Entry("isolation.violation", "", self._world.now_ns(), body)
        task = asyncio.create_task(self._log(entry))
        self._writing.add(task)
        task.add_done_callback(self._writing.discard)

    async def _log(self, *entries: Entry) -> None:
        async with self._database.transaction() as conn:
            for entry in entries:
                await append(conn, entry, entropy=self._world.entropy)


def served_engine(settings: Settings, folders: Folders) -> list[str]:
    """The EngineCommand of `serve`."""
    return worker_command(worker_config(settings, folders))


def worker_config(settings: Settings, folders: Folders) -> dict[str, str | int]:
    """The fields of engine.config.WorkerConfig that settings decide."""
    config: dict[str, str | int] = {
        "model_dir": str(settings.effective_model_dir.absolute()),
        "socket_path": str(folders.engine_socket),
        "journal_dir": str(folders.journal),
        "max_batched_tokens": settings.max_batched_tokens,
        "max_num_seqs": settings.max_num_seqs,
        "block_size": settings.block_size,
        "kv_cache_bytes": settings.kv_cache_bytes,
        "scheduling": settings.scheduling,
        "wait_max_tokens": settings.wait_max_tokens,
        "max_prompt_tokens": settings.max_prompt_tokens,
        "break_off_percent": settings.break_off_percent,
        "kernels": settings.kernels,
        "kv_cache_dtype": settings.kv_cache_dtype,
        "cuda_graphs": settings.cuda_graphs,
        "prefix_cache": settings.prefix_cache,
        "cache_floor_percent": settings.cache_floor_percent,
        "cache_ceiling_percent": settings.cache_ceiling_percent,
        "audit_slots_per_step": settings.audit_slots_per_step,
        "audit_blocks_per_step": settings.audit_blocks_per_step,
        "audit_replay_percent": settings.audit_replay_percent,
        "audit_replay_bytes_max": settings.audit_replay_bytes_max,
        "audit_canary_interval_s": settings.audit_canary_interval_s,
        "idle_percent": settings.audit_idle_percent,
        "violating_steps_max": settings.violating_steps_max,
    }
    return config | {"num_threads": settings.num_threads or max(1, (os.cpu_count() or 2) - 1)}


def worker_command(config: dict[str, str | int]) -> list[str]:
    """The command line of a worker. Not imported from worker.py: that module loads numpy, this process stays small."""
    return [sys.executable, "-m", "gateway.worker", "--config", msgspec.json.encode(config).decode()]


def worker_environment(environ: Mapping[str, str]) -> dict[str, str]:
    """The parent's environment without secrets and with huge pages for tensors (see docs/operations.md)."""
    kept = {name: value for name, value in environ.items() if not name.startswith("BULKHEAD_")}
    return kept | {"THP_MEM_ALLOC_ENABLE": "1", "TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1"}
