"""A small world for tests: a database with the log's tables, and short words for what one does with it."""

from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from sqlalchemy import func, select

from audit.transparency import log, outbox, tables
from audit.transparency.entry import Entry
from audit.transparency.keyring import Keyring
from gateway.database import Database
from tests.audit.conftest import ORIGIN, seeded

SECOND_NS = 10**9
START_NS = 1_795_458_000 * SECOND_NS


class World:
    def __init__(self, database: Database, keyring: Keyring, folder: Path) -> None:
        self.database = database
        self.keyring = keyring
        self.folder = folder  # the published log
        self.entropy = seeded(7)

    async def append(self, *entries: Entry) -> None:
        async with self.database.transaction() as conn:
            for entry in entries:
                await outbox.append(conn, entry, entropy=self.entropy)

    async def sequence(self, rows_max: int = log.BATCH_ROWS_MAX) -> log.SequencedBatch | None:
        async with self.database.transaction() as conn:
            return await log.sequence(conn, signer=self.keyring, origin=ORIGIN, now_ns=START_NS, rows_max=rows_max)

    async def publish(self, *, rebuild: bool = False) -> int:
        async with self.database.read() as conn:
            return await log.publish(conn, self.folder, signer=self.keyring, rebuild=rebuild)

    async def land(self, *entries: Entry) -> int:
        """Append, sequence all and publish."""
        await self.append(*entries)
        while await self.sequence():
            pass
        return await self.publish()

    async def leaves(self) -> Sequence[Any]:
        async with self.database.read() as conn:
            return (await conn.execute(select(tables.log_leaf).order_by(tables.log_leaf.c.leaf_index))).all()

    async def num_waiting(self) -> int:
        async with self.database.read() as conn:
            return int((await conn.execute(select(func.count()).select_from(tables.outbox))).scalar_one())


@asynccontextmanager
async def open_world(url: str, keyring: Keyring, folder: Path) -> AsyncIterator[World]:
    database = Database(url)
    try:
        async with database.transaction() as conn:
            await conn.run_sync(tables.metadata.create_all)
        yield World(database, keyring, folder)
    finally:
        await database.dispose()


def note(text: str, at_ns: int = START_NS, tenant_id: str = "") -> Entry:
    """Some entry whose content is `text`."""
    return Entry("gateway.stopped", tenant_id, at_ns, {"reason": text})


def admitted(request_id: str, at_ns: int = START_NS, tenant_id: str = "ten_a", hold: int = 1_000) -> Entry:
    body = {
        "request_id": request_id,
        "key_id": "key_1",
        "model": "demo",
        "price_id": "price_1",
        "num_prompt_tokens": 10,
        "max_tokens": 20,
        "hold_nano_usd": hold,
    }
    return Entry("request.admitted", tenant_id, at_ns, body)


def settled(
    request_id: str,
    at_ns: int = START_NS,
    tenant_id: str = "ten_a",
    amount: int = 500,
    outcome: str = "captured",
    num_cached_tokens: int = 0,
) -> Entry:
    body = {
        "request_id": request_id,
        "finish_reason": "stop",
        "num_prompt_tokens": 10,
        "num_cached_tokens": num_cached_tokens,
        "num_completion_tokens": 7,
        "amount_nano_usd": amount,
        "outcome": outcome,
    }
    return Entry("request.settled", tenant_id, at_ns, body)


def worker_started(epoch: str, at_ns: int = START_NS, isolation: str = "relaxed") -> Entry:
    body = {"epoch": epoch, "model_id": "demo", "model_digest": "sha256:00", "isolation": isolation, "kernels": "torch"}
    return Entry("worker.started", "", at_ns, body)


def heartbeat(
    epoch: str,
    num_steps: int,
    at_ns: int = START_NS,
    *,
    num_violations: int = 0,
    ok: bool = True,
    replay_percent: int = 5,
    num_replays_differing: int = 0,
) -> Entry:
    body = {
        "epoch": epoch,
        "num_steps": num_steps,
        "num_slots_checked": 3 * num_steps,
        "num_violations": num_violations,
        "num_self_tests": num_steps // 10,
        "last_self_test_ok": ok,
        "slots_per_step": 256,
        "num_slots_read": 2 * num_steps,
        "replay_percent": replay_percent,
        "num_sequences": num_steps // 2,
        "num_replays": num_steps // 5,
        "num_replays_differing": num_replays_differing,
        "num_canaries": num_steps // 100,
    }
    return Entry("audit.heartbeat", "", at_ns, body)


def violation(epoch: str, at_ns: int = START_NS, tenant_id: str = "ten_a") -> Entry:
    body = {
        "epoch": epoch,
        "rule": "foreign_block",
        "detail": "row 3: reads a block of another domain",
        "step": 17,
        "block_id": 4,
        "sequence_ids": ["seq_1"],
        "domains": ["d1", "d2"],
    }
    return Entry("isolation.violation", tenant_id, at_ns, body)
