"""Keys and tenants that end while they are used, and holds that nobody settled, over the whole hall."""

import asyncio
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

from msgspec.structs import replace

from engine.journal import Journal, JournalRecord
from engine.protocol import Effort
from engine.scheduling.tiers import TIERS
from gateway.clerk import Clerk
from gateway.host.folders import open_folders
from gateway.host.housekeeping import Housekeeping
from gateway.host.recovery import recover
from tenancy.access.key_rules import read_rules
from tenancy.access.keys import get_key
from tenancy.accounts.ledger import get_hold
from tests.fakes.asgi import Answer
from tests.fakes.hall import Account, Hall, chat_body, reconnect
from tests.fakes.integer_worker import IntegerModel, Script
from tests.gateway.conftest import Stage


def house(hall: Hall, folder: Path) -> Housekeeping:
    engine = SimpleNamespace(heartbeat=None)
    return Housekeeping(hall.services, open_folders(folder / "data"), cast(Any, None), cast(Any, engine))


async def key_with(hall: Hall, **how: Any) -> str:
    services, account = hall.services, hall.accounts["acme"]
    async with hall.database.transaction() as conn:
        clerk = Clerk(conn, services.world.entropy, services.world.now_ns())
        made = await clerk.create_key(account.tenant_id, account.project_id, "k", services.secrets.key_pepper, **how)
    hall.accounts["other"] = Account(account.tenant_id, account.project_id, made.key_id, made.secret_text)
    return made.key_id


def test_rules_of_a_key_hold_on_every_route(stage: Stage, runner: asyncio.Runner, tmp_path: Path) -> None:
    hall, worker = stage.make()

    async def asked(method: str, path: str, body: Any = None) -> tuple[int, str | None]:
        answer = await hall.call(method, path, body, tenant="other")
        parsed = answer.json()
        return answer.status, parsed["error"]["code"] if "error" in parsed else None

    async def scenario() -> None:
        chat = chat_body("integer", max_tokens=2)
        await key_with(hall, rules=read_rules(networks=["192.0.2.0/24"]))
        unknown = await hall.call("GET", "/v1/models", headers={"authorization": "Bearer x"}, tenant=None)
        outside = await hall.call("GET", "/v1/models", tenant="other")
        assert (outside.status, outside.body) == (unknown.status, unknown.body)
        forwarded = {"x-forwarded-for": "192.0.2.1", "x-real-ip": "192.0.2.1", "forwarded": "for=192.0.2.1"}
        assert (await hall.call("GET", "/v1/models", tenant="other", headers=forwarded)).status == 401
        await key_with(hall, rules=read_rules(networks=["127.0.0.0/8"]))
        assert await asked("GET", "/v1/models") == (200, None)
        await key_with(hall, rules=read_rules(models=["another"]))
        assert await asked("POST", "/v1/chat/completions", chat) == (404, "model_not_found")
        assert await asked("GET", "/v1/models/integer") == (404, "model_not_found")
        assert (await hall.call("GET", "/v1/models", tenant="other")).json()["data"] == []
        for scope in ("usage", "audit", "admin"):
            await key_with(hall, scopes=frozenset({scope}))
            assert await asked("POST", "/v1/chat/completions", chat) == (403, "missing_scope")
            assert await asked("POST", "/v1/completions", {"model": "integer", "prompt": "x"}) == (403, "missing_scope")
            assert await asked("GET", "/v1/models") == (403, "missing_scope")
        assert worker.submits == []
        await key_with(hall, rules=read_rules(tiers=["flex", "batch", "priority"]))
        completion = {"model": "integer", "prompt": "x", "max_tokens": 1}
        for path, body in (("/v1/chat/completions", chat), ("/v1/completions", completion)):
            for asked_tier, given in ((None, "flex"), ("auto", "flex"), ("flex", "flex"), ("batch", "batch")):
                answer = await hall.call("POST", path, body | {"service_tier": asked_tier}, tenant="other")
                assert (answer.status, answer.json()["service_tier"]) == (200, given)
                assert worker.submits.pop().priority == TIERS[given]
            for refused in ("default", "priority"):  # this tenant has no priority: a key's rules only narrow
                answer = await hall.call("POST", path, body | {"service_tier": refused}, tenant="other")
                assert (answer.status, answer.json()["error"]["code"]) == (403, "service_tier_not_allowed")
                assert (answer.json()["error"]["param"], refused in answer.json()["error"]["message"]) == (
                    "service_tier",
                    True,
                )
        assert worker.submits == []
        key_id = await key_with(hall)
        await hall.call("POST", "/v1/chat/completions", chat, tenant="other")

        async def last_used() -> int | None:
            async with hall.database.read() as conn:
                return (await get_key(conn, key_id)).last_used_ns

        assert await last_used() is None
        await house(hall, tmp_path).write_key_uses()
        assert await last_used() is not None

    runner.run(scenario())


def test_suspension_ends_what_runs_and_resuming_serves_again(
    stage: Stage, runner: asyncio.Runner, tmp_path: Path
) -> None:
    hall, worker = stage.make()
    worker.model = IntegerModel(eos_every=1_000_003)
    acme = hall.accounts["acme"]

    async def set_status(status: Any) -> None:
        async with hall.database.transaction() as conn:
            clerk = Clerk(conn, hall.services.world.entropy, hall.services.world.now_ns())
            await clerk.set_tenant_status(acme.tenant_id, status, "test")

    async def scenario() -> None:
        keeper = house(hall, tmp_path)
        worker.scripts += [Script(delay_s=0.02)] * 3
        started = asyncio.Event()

        def on_sent(answer: Answer) -> None:
            if len(answer.body) > 600:
                started.set()

        stream = asyncio.create_task(hall.chat(max_tokens=200, stream=True, on_sent=on_sent))
        whole = asyncio.create_task(hall.chat(max_tokens=200))
        other = asyncio.create_task(hall.chat(max_tokens=20, tenant="globex", stream=True))
        await started.wait()
        await set_status("suspended")
        assert (await hall.chat(max_tokens=1)).status == 401
        keeper.loops[2].start()
        async with asyncio.timeout(3):  # the server looks twice a second; a busy machine gets a little longer
            cut, refused = await asyncio.gather(stream, whole)
        await keeper.loops[2].stop()
        assert cut.events()[-2]["error"]["code"] == "account_inactive"
        assert (refused.status, refused.json()["error"]["code"]) == (403, "account_inactive")
        assert (await other).events()[-2]["choices"][0]["finish_reason"] == "length"
        await hall.check_books()
        rows = {row.request_id: row for row in (await hall.usage_rows()).values()}
        row = rows[cut.headers["x-request-id"]]
        assert row.finish_reason == "tenant_inactive"
        assert 0 < row.num_completion_tokens < 200
        assert rows[refused.headers["x-request-id"]].amount_nano_usd == 0
        await set_status("active")
        assert (await hall.chat(max_tokens=1)).status == 200
        async with hall.database.transaction() as conn:
            clerk = Clerk(conn, hall.services.world.entropy, hall.services.world.now_ns())
            await clerk.delete_tenant(acme.tenant_id, "contract ended")
        assert (await hall.chat(max_tokens=1)).status == 401
        [receipt] = await hall.outbox("tenant.deleted")
        assert (receipt["num_keys_revoked"], receipt["reason"]) == (1, "contract ended")

    runner.run(scenario())


def test_revoking_a_key_ends_what_it_has_running_and_nothing_else(
    stage: Stage, runner: asyncio.Runner, tmp_path: Path
) -> None:
    hall, worker = stage.make()
    worker.model = IntegerModel(eos_every=1_000_003)

    async def scenario() -> None:
        keeper = house(hall, tmp_path)
        worker.scripts += [Script(delay_s=0.02)] * 3
        key_id = await key_with(hall)
        started = asyncio.Event()

        def on_sent(answer: Answer) -> None:
            if len(answer.body) > 600:
                started.set()

        stream = asyncio.create_task(hall.chat(max_tokens=200, stream=True, tenant="other", on_sent=on_sent))
        whole = asyncio.create_task(hall.chat(max_tokens=200, tenant="other"))
        same_tenant = asyncio.create_task(hall.chat(max_tokens=20, stream=True))
        await started.wait()
        async with hall.database.transaction() as conn:
            clerk = Clerk(conn, hall.services.world.entropy, hall.services.world.now_ns())
            assert await clerk.revoke_key(hall.accounts["other"].tenant_id, key_id, "it leaked")
        keeper.loops[2].start()
        async with asyncio.timeout(3):  # as above
            cut, refused = await asyncio.gather(stream, whole)
        await keeper.loops[2].stop()
        assert cut.events()[-2]["error"]["code"] == "key_revoked"
        assert (refused.status, refused.json()["error"]["code"]) == (403, "key_revoked")
        assert (await hall.chat(max_tokens=1, tenant="other")).status == 401
        assert (await same_tenant).events()[-2]["choices"][0]["finish_reason"] == "length"
        await hall.check_books()
        rows = {row.request_id: row for row in (await hall.usage_rows()).values()}
        row = rows[cut.headers["x-request-id"]]
        assert row.finish_reason == "key_revoked"
        assert 0 < row.num_completion_tokens < 200
        assert rows[refused.headers["x-request-id"]].amount_nano_usd == 0

    runner.run(scenario())


def test_reaper_and_recovery_settle_a_hold_alike(stage: Stage, runner: asyncio.Runner, tmp_path: Path) -> None:
    """Counted by the journal: charged. Not counted: returned. Whoever comes first, and once."""

    async def outcome(settle: str, counted: bool) -> tuple[Any, ...]:
        hall, _ = stage_make(hold_ttl_s=1)
        folders = open_folders(tmp_path / f"{settle}-{counted}" / "data")
        # The gateway dies: nobody settles.
        hall.settler._settle = lambda *_: asyncio.sleep(0, True)  # type: ignore[method-assign]
        answer = await hall.chat(max_tokens=5, seed=1, n=2)
        request_id = answer.headers["x-request-id"]
        if counted:
            journal = Journal(folders.journal, "epoch-1")
            num_prompt = answer.json()["usage"]["prompt_tokens"]
            journal.append([JournalRecord(request_id, num_prompt, 1, None, 0, Effort(3, 4, 0, 0, 0))])
            journal.append([JournalRecord(request_id, num_prompt, 1, None, 0, Effort(50, 60, num_prompt, 0, 0))])
            second = JournalRecord(request_id + ".1", num_prompt, 2, "stop", num_prompt - 1, Effort(9, 8, 1, 3, 1))
            journal.append([second])
            journal.close()
        await asyncio.sleep(1.1)
        keeper = Housekeeping(hall.services, folders, cast(Any, None), cast(Any, SimpleNamespace(heartbeat=None)))
        if settle == "reap":
            await asyncio.gather(keeper.reap(), keeper.reap())
        else:
            await recover(hall.services, folders, "epoch-1")
        await keeper.reap()
        [settled] = await hall.outbox("request.settled")
        rows = await hall.usage_rows()
        async with hall.database.read() as conn:
            hold = await get_hold(conn, (await hall_hold(conn)))
        assert hold is not None
        balance = await hall.credit()
        assert balance.held_nano_usd == 0
        assert settled["request_id"] == request_id
        assert int(settled["amount_nano_usd"]) == hold.captured_nano_usd == balance.captured_nano_usd
        if counted:  # the prompt once, as it was first read
            assert (settled["num_prompt_tokens"], settled["num_cached_tokens"]) == (num_prompt, 0)
            [row] = rows.values()  # and what both took, as each was last counted
            took = (
                row.engine_ns,
                row.block_ns,
                row.num_prefill_tokens,
                row.num_recomputed_tokens,
                row.num_decode_steps,
            )
            assert took == (59, 68, num_prompt + 1, 3, 1)
        return settled["outcome"], settled["num_completion_tokens"], hold.state, hold.captured_nano_usd, len(rows)

    async def hall_hold(conn: Any) -> str:
        from sqlalchemy import select

        from tenancy.tables import hold

        return cast(str, await conn.scalar(select(hold.c.id)))

    made: list[Any] = []

    def stage_make(**settings: Any) -> Any:
        return made.pop()

    for counted, expected in ((True, ("recovered", 3, "captured", 1)), (False, ("expired", 0, "expired", 0))):
        ends = []
        for settle in ("reap", "recover"):
            made.append(stage.make(hold_ttl_s=1))
            ends.append(runner.run(outcome(settle, counted)))
        assert ends[0] == ends[1]
        assert (*ends[0][:3], ends[0][4]) == expected


def test_what_a_deleted_tenant_left_in_the_engine_is_erased_once(
    stage: Stage, runner: asyncio.Runner, tmp_path: Path
) -> None:
    hall, worker = stage.make()

    async def scenario() -> None:
        keeper = house(hall, tmp_path)
        account = hall.accounts["globex"]
        await keeper.erase_deleted()
        assert worker.erased == []
        async with hall.database.transaction() as conn:
            clerk = Clerk(conn, hall.services.world.entropy, hall.services.world.now_ns())
            await clerk.delete_tenant(account.tenant_id, "test")
        for _ in range(3):
            await keeper.erase_deleted()
        assert worker.erased == [account.tenant_id]
        (entry,) = await hall.outbox("cache.erased")
        assert entry["num_blocks"] == worker.num_erased
        worker.drop()  # a new worker has nothing of it; being told again, it says so
        await asyncio.sleep(0.05)
        await keeper.erase_deleted()
        worker.num_erased = 0
        await reconnect(hall, worker.path)
        hall.services.engine.client().ready = replace(hall.services.engine.client().ready, epoch="another")
        await keeper.erase_deleted()
        assert worker.erased == [account.tenant_id] * 2
        assert len(await hall.outbox("cache.erased")) == 1

    runner.run(scenario())
