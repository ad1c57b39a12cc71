"""The same API on PostgreSQL: many requests of two tenants at once, a worker that dies under them, books that agree."""

import asyncio
from pathlib import Path

from redis.asyncio import Redis

from tests.fakes.byte_model import write_byte_model
from tests.fakes.hall import open_hall, reconnect, world
from tests.fakes.integer_worker import IntegerModel, IntegerWorker, Script
from tests.servers import PostgresServer


def test_the_books_agree_on_postgresql(
    runner: asyncio.Runner, redis: Redis, postgres_server: PostgresServer, short_folder: Path, tmp_path: Path
) -> None:
    url = postgres_server.new_served_database()

    async def scenario() -> None:
        worker = IntegerWorker(short_folder / "postgres.sock", model=IntegerModel(eos_every=1_000_003))
        await worker.start()
        model = write_byte_model(tmp_path / "model")
        async with open_hall(tmp_path, redis, model, worker.path, world=world(), database_url=url) as hall:
            many = [hall.chat(max_tokens=5, tenant=t, stream=s) for t in ("acme", "globex") for s in (True, False)]
            answers = await asyncio.gather(*many, *(hall.chat(max_tokens=3) for _ in range(6)))
            assert {answer.status for answer in answers} == {200}
            worker.scripts += [Script(delay_s=0.02), Script(die_after=4, delay_s=0.01)]
            cut = await asyncio.gather(hall.chat(max_tokens=90, stream=True), hall.chat(max_tokens=90, stream=True))
            assert all(answer.events()[-1] == "[DONE]" for answer in cut)
            await reconnect(hall, worker.path)
            hall.database.faults[:] = ["after"]
            assert (await hall.chat(max_tokens=2)).status == 503
            await hall.check_books()
            hall.database.faults[:] = ["none", "before", "after"]
            assert (await hall.chat(max_tokens=2)).status == 200
            await hall.check_books()
            rows = await hall.usage_rows()
            for request_id, row in rows.items():
                counts = worker.counts[request_id]
                if row.finish_reason == "length":
                    assert row.num_completion_tokens == counts.num_completion_tokens
                assert row.num_completion_tokens <= counts.num_completion_tokens
        await worker.stop()

    runner.run(scenario())
