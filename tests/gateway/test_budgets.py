"""A hard budget over HTTP: spent to the last token, then refused by name, and each alert once in the log."""

import asyncio
from pathlib import Path

import pytest
from redis.asyncio import Redis

from tenancy.accounts.budgets import set_budget
from tests.fakes.byte_model import write_byte_model
from tests.fakes.hall import USD, open_hall, world
from tests.fakes.integer_worker import IntegerModel, IntegerWorker

LIMIT = 100 * USD + USD // 2


@pytest.mark.parametrize("kind", ["sqlite", "postgresql"])
def test_many_at_once_spend_a_budget_and_no_more(
    kind: str,
    request: pytest.FixtureRequest,
    runner: asyncio.Runner,
    redis: Redis,
    short_folder: Path,
    tmp_path: Path,
) -> None:
    url = request.getfixturevalue("postgres_server").new_served_database() if kind == "postgresql" else ""

    async def scenario() -> None:
        worker = IntegerWorker(short_folder / f"budget-{kind}.sock", model=IntegerModel(eos_every=1_000_003))
        await worker.start()
        model = write_byte_model(tmp_path / "model")
        how = {"output_pico_usd": 10**12}  # one USD a token
        async with open_hall(tmp_path, redis, model, worker.path, world=world(), database_url=url, **how) as hall:
            acme, now_ns = hall.accounts["acme"], hall.services.world.now_ns()
            async with hall.database.transaction() as conn:
                scope = ("project", acme.project_id, "total")
                await set_budget(conn, *scope, hard=True, limit_nano_usd=LIMIT, now_ns=now_ns)
                await set_budget(conn, "tenant", acme.tenant_id, "month", hard=False, limit_nano_usd=1, now_ns=now_ns)
            answers = []
            for _ in range(6):  # until nothing is left: what one gives back, the next may use
                answers += await asyncio.gather(*(hall.chat(max_tokens=30, stream=n % 2 == 0) for n in range(10)))
                await hall.check_books()
            assert {answer.status for answer in answers} == {200, 429}
            named = {answer.headers.get("x-bulkhead-budget", "").partition(";")[0] for answer in answers}
            assert named <= {"", "project-total"}
            assert any(answer.status == 200 and "x-bulkhead-budget" in answer.headers for answer in answers)
            last = answers[-1]
            assert last.headers["x-should-retry"] == "false"
            assert last.headers["x-bulkhead-budget"] == "project-total; max_tokens=0"
            assert last.json()["error"]["code"] == "insufficient_quota"
            assert "budget (project-total)" in last.json()["error"]["message"]
            rows = await hall.usage_rows()
            num_tokens = sum(row.num_completion_tokens for row in rows.values())
            assert num_tokens == 100  # each token that the budget pays for, and none beyond
            assert num_tokens == sum(worker.counts[row].num_completion_tokens for row in rows)
            spent = (await hall.credit()).captured_nano_usd
            assert 0 <= LIMIT - spent < USD
            alerts = [(one["period"], one["threshold_percent"]) for one in await hall.outbox("budget.alert")]
            soft = [("month", threshold) for threshold in (50, 80, 95, 100)]
            assert sorted(alerts) == sorted([*soft, ("total", 50), ("total", 80), ("total", 95)])
            assert (await hall.chat(tenant="globex", max_tokens=5)).status == 200  # nobody else's budget
        await worker.stop()

    runner.run(scenario())
