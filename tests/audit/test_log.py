"""The way from business transaction to signed leaf: nothing lost, nothing twice, nothing half, on both databases."""

import asyncio
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import select

from audit.transparency import outbox, tables
from audit.transparency.checkpoint import Verifier, verify_checkpoint
from audit.transparency.commitment import commit
from audit.transparency.keyring import Keyring
from audit.transparency.log import LogForkError, request_erasure, sequence
from audit.transparency.merkle import leaf_hash, root_of
from tests.audit.conftest import ORIGIN
from tests.audit.test_merkle import naive_root
from tests.audit.world import START_NS, World, note, open_world
from tests.servers import PostgresServer

ROOT = Path(__file__).parents[2]


async def check_log(world: World, texts: list[str]) -> None:
    """The log holds exactly `texts` (in any order), densely numbered, under a root that is signed and true."""
    async with world.database.read() as conn:
        leaves = (await conn.execute(select(tables.log_leaf).order_by(tables.log_leaf.c.leaf_index))).all()
        openings = (await conn.execute(select(tables.log_opening).order_by(tables.log_opening.c.leaf_index))).all()
        heads = (await conn.execute(select(tables.checkpoint).order_by(tables.checkpoint.c.num_leaves))).all()
        state = (await conn.execute(select(tables.log_state))).all()
    assert [leaf.leaf_index for leaf in leaves] == list(range(len(texts)))
    assert sorted(o.body.decode() for o in openings) == sorted(f'{{"reason":"{text}"}}' for text in texts)
    for leaf, opening in zip(leaves, openings, strict=True):
        assert commit(opening.nonce, opening.body).encode() in leaf.leaf
    keys = [Verifier.parse(text) for text in world.keyring.log.vkeys()]
    for head in heads:
        assert (
            verify_checkpoint(head.note, keys).root
            == head.root
            == naive_root([x.leaf for x in leaves[: head.num_leaves]])
        )
    assert (heads[-1].num_leaves if heads else 0) == len(texts)
    assert len(state) <= 1


def test_entries_become_leaves_once_and_in_order(database_url: str, keyring: Keyring, tmp_path: Path) -> None:
    async def scenario() -> None:
        async with open_world(database_url, keyring, tmp_path / "log") as world:
            assert await world.sequence() is None
            await world.append(*(note(str(i)) for i in range(5)))
            first = await world.sequence(rows_max=3)
            assert first is not None
            assert (first.first_index, first.num_leaves) == (0, 3)
            await world.append(note("5"))
            second = await world.sequence()
            assert second is not None
            assert (second.first_index, second.checkpoint.size) == (3, 6)
            assert await world.sequence() is None
            await check_log(world, [str(i) for i in range(6)])
            leaves = await world.leaves()
            assert [leaf.outbox_id for leaf in leaves] == sorted(leaf.outbox_id for leaf in leaves)

    asyncio.run(scenario())


def test_an_entry_shares_the_fate_of_its_transaction(database_url: str, keyring: Keyring, tmp_path: Path) -> None:
    async def scenario() -> None:
        async with open_world(database_url, keyring, tmp_path / "log") as world:

            async def failing_payment() -> None:
                async with world.database.transaction() as conn:
                    await outbox.append(conn, note("never happened"), entropy=world.entropy)
                    raise RuntimeError("the payment failed")

            with pytest.raises(RuntimeError, match="the payment failed"):
                await failing_payment()
            await world.append(note("happened"))
            await world.sequence()
            await check_log(world, ["happened"])

    asyncio.run(scenario())


def test_a_row_that_commits_late_is_not_skipped(
    postgres_server: PostgresServer, keyring: Keyring, tmp_path: Path
) -> None:
    """PostgreSQL gives ids before commit: the lower id becomes visible after the higher one was sequenced."""

    url = postgres_server.new_database()

    async def scenario() -> None:
        async with open_world(url, keyring, tmp_path / "log") as world:
            async with world.database.transaction() as slow:
                await outbox.append(slow, note("slow"), entropy=world.entropy)
                await world.append(note("fast"))
                await world.sequence()
            await world.sequence()
            await check_log(world, ["fast", "slow"])
            first, second = await world.leaves()
            assert first.outbox_id > second.outbox_id

    asyncio.run(scenario())


def test_many_writers_and_sequencers_at_once(database_url: str, keyring: Keyring, tmp_path: Path) -> None:
    async def scenario() -> None:
        async with open_world(database_url, keyring, tmp_path / "log") as world:
            sizes: list[int] = []

            async def write(name: int) -> None:
                for i in range(6):
                    await world.append(note(f"{name}-{i}"))

            async def drain() -> None:
                for _ in range(8):
                    batch = await world.sequence(rows_max=3)
                    if batch is not None:
                        sizes.append(batch.checkpoint.size)

            await asyncio.gather(*(write(n) for n in range(3)), drain(), drain())
            while await world.sequence():
                pass
            await check_log(world, [f"{n}-{i}" for n in range(3) for i in range(6)])
            assert len(set(sizes)) == len(sizes)
            # What one writer wrote one after the other is in the log in that order.
            order = [leaf.outbox_id for leaf in await world.leaves()]
            assert sorted(order) == sorted(set(order))

    asyncio.run(scenario())


class Interrupted(Exception):
    pass


class FailingConnection:
    """Passes statements on until `num_statements` have run, then breaks like a connection that is lost."""

    def __init__(self, conn: Any, num_statements: int) -> None:
        self._conn = conn
        self.left = num_statements
        self.dialect = conn.dialect

    async def execute(self, *args: Any) -> Any:
        if self.left == 0:
            raise Interrupted
        self.left -= 1
        return await self._conn.execute(*args)


def test_a_break_at_any_statement_changes_nothing(database_url: str, keyring: Keyring, tmp_path: Path) -> None:
    async def scenario() -> None:
        async with open_world(database_url, keyring, tmp_path / "log") as world:
            await world.append(note("0"), note("1"))
            await world.sequence()
            await world.append(*(note(str(i)) for i in range(2, 6)))
            breaks = 0
            while True:
                try:
                    async with world.database.transaction() as conn:
                        failing: Any = FailingConnection(conn, breaks)
                        await sequence(failing, signer=keyring, origin=ORIGIN, now_ns=START_NS)
                        if failing.left == 0:
                            raise Interrupted  # after the last statement, before the commit
                    break
                except Interrupted:
                    breaks += 1
                    assert len(await world.leaves()) == 2
                    assert await world.num_waiting() == 4
            assert breaks >= 8
            await check_log(world, [str(i) for i in range(6)])

    asyncio.run(scenario())


KILLED = """
import asyncio, os, sys
from pathlib import Path
from audit.transparency.keyring import load_keyring
from audit.transparency.log import sequence
from gateway.database import Database

class Killing:
    def __init__(self, conn, left): self.conn, self.left, self.dialect = conn, left, conn.dialect
    async def execute(self, *args):
        if self.left == 0: os._exit(9)
        self.left -= 1
        return await self.conn.execute(*args)

async def main(url, keys, left):
    signer = load_keyring(Path(keys), origin="test.example/log", entropy=os.urandom)
    async with Database(url).transaction() as conn:
        await sequence(Killing(conn, left), signer=signer, origin="test.example/log", now_ns=1)

asyncio.run(main(sys.argv[1], sys.argv[2], int(sys.argv[3])))
"""


@pytest.mark.parametrize("num_statements", [4, 8])
def test_a_killed_process_leaves_nothing_half(
    database_url: str, keyring: Keyring, tmp_path: Path, num_statements: int
) -> None:
    async def prepare() -> None:
        async with open_world(database_url, keyring, tmp_path / "log") as world:
            await world.append(*(note(str(i)) for i in range(4)))

    async def check() -> None:
        async with open_world(database_url, keyring, tmp_path / "log") as world:
            assert len(await world.leaves()) == 0
            await world.sequence()
            await check_log(world, [str(i) for i in range(4)])

    asyncio.run(prepare())
    command = [sys.executable, "-c", KILLED, database_url, str(tmp_path / "keys"), str(num_statements)]
    killed = subprocess.run(command, cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT)}, timeout=60, check=False)
    assert killed.returncode == 9
    asyncio.run(check())


def test_the_database_itself_refuses_a_second_leaf(database_url: str, keyring: Keyring, tmp_path: Path) -> None:
    async def scenario() -> None:
        async with open_world(database_url, keyring, tmp_path / "log") as world:
            await world.append(note("0"))
            await world.sequence()
            (leaf,) = await world.leaves()
            again = {**leaf._mapping, "leaf_index": 1}
            with pytest.raises(Exception, match=r"(?i)unique"):
                async with world.database.transaction() as conn:
                    await conn.execute(tables.log_leaf.insert().values(again))

    asyncio.run(scenario())


def test_erasure_deletes_openings_with_its_receipt(database_url: str, keyring: Keyring, tmp_path: Path) -> None:
    async def scenario() -> None:
        async with open_world(database_url, keyring, tmp_path / "log") as world:
            await world.land(*(note(f"secret {i}") for i in range(300)))
            receipts = request_erasure([3, 299, 3], reason="asked for", tenant_id="", now_ns=START_NS)
            assert [r.body["leaf_indexes"] for r in receipts] == [["3", "299"]]
            await world.append(*receipts)
            async with world.database.read() as conn:  # nothing is erased before the receipt is in the log
                assert len((await conn.execute(select(tables.log_opening))).all()) == 300
            await world.land(*request_erasure([300], reason="a receipt stays", tenant_id="", now_ns=START_NS))
            async with world.database.read() as conn:
                left = set((await conn.execute(select(tables.log_opening.c.leaf_index))).scalars())
            assert left == set(range(302)) - {3, 299}
            assert root_of(leaf_hash(x.leaf) for x in await world.leaves())  # every leaf is still there
            content = b"".join(path.read_bytes() for path in world.folder.rglob("*") if path.is_file())
            assert b"secret 4" in content
            assert b'"secret 3"' not in content
            assert b'"secret 299"' not in content

    asyncio.run(scenario())


def test_a_restored_backup_cannot_sign_a_second_history(sqlite_url: str, keyring: Keyring, tmp_path: Path) -> None:
    database, backup = tmp_path / "audit.db", tmp_path / "backup.db"

    async def before() -> None:
        async with open_world(sqlite_url, keyring, tmp_path / "log") as world:
            await world.land(note("0"))

    async def after(text: str) -> None:
        async with open_world(sqlite_url, keyring, tmp_path / "log") as world:
            await world.land(note(text))

    asyncio.run(before())
    shutil.copy(database, backup)
    asyncio.run(after("1"))
    published = (tmp_path / "log" / "checkpoint").read_bytes()
    shutil.copy(backup, database)
    for path in tmp_path.glob("audit.db-*"):
        path.unlink()
    with pytest.raises(LogForkError, match="another root for that size"):
        asyncio.run(after("another 1"))
    assert (tmp_path / "log" / "checkpoint").read_bytes() == published
