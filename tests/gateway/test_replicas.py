"""Several gateways on one database: whose holds are whose, whose keys sign the log, who starts first."""

import asyncio
from pathlib import Path
from typing import Any, cast

import pytest

from audit.transparency.keyring import load_keyring
from audit.transparency.log import sequence
from engine.journal import Journal, JournalRecord
from gateway.host.folders import gateway_id, open_folders
from gateway.host.housekeeping import Housekeeping
from gateway.host.recovery import recover
from gateway.host.same_keys import ForeignKeysError, require_same_keys
from gateway.services import Services
from tenancy.accounts.ledger import get_hold, place_hold
from tenancy.pricing.price_book import price_at
from tests.fakes.hall import Hall
from tests.fakes.hall import world as real_world
from tests.gateway.conftest import Stage

NOW = 10**18
SECOND = 10**9


def as_gateway(hall: Hall, name: str, now_ns: int = NOW) -> Services:
    """The same database, another process."""
    one = hall.services
    real = real_world()
    world = type(real)(lambda: now_ns, real.monotonic_ns, real.entropy, {})
    return Services(
        one.settings, world, one.database, one.redis, one.quota, one.engine, one.tokenizer, one.secrets, gateway_id=name
    )


async def hold_of(hall: Hall, name: str | None, request_id: str) -> str:
    account = hall.accounts["acme"]
    async with hall.database.transaction() as conn:
        price = await price_at(conn, "integer", NOW)
        await place_hold(
            conn,
            hold_id=f"hold_{request_id}",
            tenant_id=account.tenant_id,
            request_id=request_id,
            price_id=price.price_id,
            amount_nano_usd=50,
            expires_ns=NOW + 100,
            now_ns=NOW,
            project_id=account.project_id,
            key_id=account.key_id,
            gateway_id=name,
        )
    return f"hold_{request_id}"


async def state(hall: Hall, hold_id: str) -> str:
    async with hall.database.read() as conn:
        hold = await get_hold(conn, hold_id)
    assert hold is not None
    return hold.state


def test_a_gateway_that_starts_leaves_the_others_holds_alone(
    stage: Stage, runner: asyncio.Runner, tmp_path: Path
) -> None:
    hall, _ = stage.make()
    folders = open_folders(tmp_path / "data")

    async def scenario() -> None:
        mine, old, others = [await hold_of(hall, name, f"req_{name}") for name in ("gw_1", None, "gw_2")]
        await recover(as_gateway(hall, "gw_1"), folders, "")
        assert [await state(hall, one) for one in (mine, old, others)] == ["voided", "voided", "pending"]

    runner.run(scenario())


def test_overdue_holds_are_their_own_gateways_first_and_anybodys_then(
    stage: Stage, runner: asyncio.Runner, tmp_path: Path
) -> None:
    hall, _ = stage.make()
    folders = open_folders(tmp_path / "data")

    async def reap(name: str, now_ns: int) -> None:
        services = as_gateway(hall, name, now_ns)
        await Housekeeping(services, folders, cast(Any, None), cast(Any, _Engine())).reap()

    async def scenario() -> None:
        mine, others = await hold_of(hall, "gw_1", "req_1"), await hold_of(hall, "gw_2", "req_2")
        await reap("gw_1", NOW + 99)
        assert (await state(hall, mine), await state(hall, others)) == ("pending", "pending")
        await reap("gw_1", NOW + 100)
        assert (await state(hall, mine), await state(hall, others)) == ("expired", "pending")
        returns_ns = hall.services.settings.gateway_return_s * SECOND
        await reap("gw_1", NOW + 99 + returns_ns)
        assert await state(hall, others) == "pending"
        await reap("gw_1", NOW + 100 + returns_ns)
        assert await state(hall, others) == "expired"

    runner.run(scenario())


class _Engine:
    async def heartbeat(self) -> None:
        raise AssertionError("not asked for")


def test_the_name_of_a_gateway_is_its_folders(tmp_path: Path) -> None:
    entropy = real_world().entropy
    one, two = open_folders(tmp_path / "one"), open_folders(tmp_path / "two")
    assert gateway_id(one, entropy) == gateway_id(open_folders(tmp_path / "one"), entropy)
    assert gateway_id(one, entropy) != gateway_id(two, entropy)


def test_secrets_may_lie_outside_of_the_data_folder(tmp_path: Path) -> None:
    folders = open_folders(tmp_path / "one", str(tmp_path / "shared"))
    assert folders.secrets == tmp_path / "shared"
    assert folders.log_keys == tmp_path / "shared" / "log"
    assert folders.journal == tmp_path / "one" / "journal"


def test_a_gateway_with_other_keys_does_not_continue_the_log(
    stage: Stage, runner: asyncio.Runner, tmp_path: Path
) -> None:
    hall, _ = stage.make()
    entropy = real_world().entropy
    ours, foreign = (load_keyring(tmp_path / name, origin="log.test", entropy=entropy) for name in ("a", "b"))

    async def scenario() -> None:
        async with hall.database.read() as conn:
            await require_same_keys(conn, foreign, tmp_path)  # nothing was signed yet
        assert (await hall.chat(max_tokens=1)).status == 200
        async with hall.database.transaction() as conn:
            assert await sequence(conn, signer=ours, origin="log.test", now_ns=NOW) is not None
        async with hall.database.read() as conn:
            await require_same_keys(conn, ours, tmp_path)
            with pytest.raises(ForeignKeysError, match="BULKHEAD_SECRETS_DIR"):
                await require_same_keys(conn, foreign, tmp_path)

    runner.run(scenario())


def test_recovery_charges_what_its_own_journal_counts(stage: Stage, runner: asyncio.Runner, tmp_path: Path) -> None:
    hall, worker = stage.make()
    folders = open_folders(tmp_path / "data")

    async def scenario() -> None:
        answer = await hall.chat(max_tokens=1)
        request_id = answer.headers["x-request-id"]
        journal = Journal(folders.journal, "old")
        journal.append([JournalRecord(request_id, 5, 1, None)])  # settled long ago: nothing happens to it again
        journal.close()
        before = await hall.usage_rows()
        await recover(as_gateway(hall, ""), folders, "")
        assert await hall.usage_rows() == before
        assert worker.counts

    runner.run(scenario())
