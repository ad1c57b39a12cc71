"""A ledger with a past: settled requests in bulk, as captures leave them, so that a benchmark runs on a large one.

Written by the database itself, which no stream of rows from outside outruns: a million entries in about 15 s on 2
cores. On PostgreSQL the tables are filled side by side and foreign keys are not looked up meanwhile (a superuser's
right, which the benchmark's own server gives). Every transaction sums to zero, and the balances are those of the
entries.
"""

import asyncio
from collections.abc import Callable

from sqlalchemy import func, select

from gateway.database import Database
from tenancy import tables

ENTRIES_PER_REQUEST = 4  # hold: credit, held; capture: held, revenue
CHUNK_REQUESTS = 100_000
FIRST_ID = 10**9  # ids of one length are in the order in which they are written: indexes grow at their end
DAY_NS = 86_400 * 10**9

_SOURCE = """
    SELECT 'past' || ({first_id} + n) AS id, t.id AS tenant_id, k.id AS key_id, k.project_id AS project_id,
           p.id AS price_id, t.created_ns - {month} + CAST(n AS BIGINT) * 1000000 AS at_ns
    FROM {numbers}
    JOIN (SELECT id, created_ns, row_number() OVER (ORDER BY id) - 1 AS place FROM tenant) t
      ON t.place = n % (SELECT count(*) FROM tenant)
    JOIN project j ON j.tenant_id = t.id
    JOIN api_key k ON k.project_id = j.id
    JOIN (SELECT id FROM price LIMIT 1) p ON 1 = 1
"""
_STATEMENTS = (
    """INSERT INTO hold (id, tenant_id, request_id, price_id, amount_nano_usd, state, captured_nano_usd, created_ns,
                         expires_ns, settled_ns, project_id, key_id, num_tokens)
       SELECT id, tenant_id, id, price_id, 2, 'captured', 2, at_ns, at_ns + 1000, at_ns + 500,
              project_id, key_id, 2 FROM source""",
    """INSERT INTO usage_record (request_id, tenant_id, project_id, key_id, model, num_prompt_tokens,
                                 num_cached_tokens, num_completion_tokens, price_id, amount_nano_usd, started_ns,
                                 finished_ns, finish_reason, stream)
       SELECT id, tenant_id, project_id, key_id, 'scripted', 1, 0, 1, price_id, 2, at_ns, at_ns + 500,
              'length', {true} FROM source""",
    """INSERT INTO ledger_transaction (id, tenant_id, kind, hold_id, memo, created_ns)
       SELECT id || ':' || verb, tenant_id, kind, id, '', at_ns
       FROM source, (SELECT 'hold' AS verb, 'hold' AS kind UNION ALL SELECT 'settle', 'captured') steps""",
    """INSERT INTO ledger_entry (transaction_id, line, account_id, amount_nano_usd)
       SELECT id || ':' || verb, line, tenant_id || ':' || account || ':USD', amount
       FROM source, (SELECT 'hold' AS verb, 0 AS line, 'credit' AS account, -2 AS amount
                     UNION ALL SELECT 'hold', 1, 'held', 2 UNION ALL SELECT 'settle', 0, 'held', -2
                     UNION ALL SELECT 'settle', 1, 'revenue', 2) lines""",
)
_BALANCES = """
    UPDATE account SET balance_nano_usd = entries.total
    FROM (SELECT account_id, sum(amount_nano_usd) AS total FROM ledger_entry GROUP BY account_id) AS entries
    WHERE entries.account_id = account.id
"""


async def write_history(
    database: Database, ledger_rows: int, say: Callable[[str], None], *, written_rows: int = 0
) -> None:
    """At least `ledger_rows` ledger entries of requests that ended a month ago, of every tenant that there is.

    `written_rows`: how many an earlier call was asked for, on the same database.
    """
    first_request, num_requests = (-(-rows // ENTRIES_PER_REQUEST) for rows in (written_rows, ledger_rows))
    for first in range(first_request, num_requests, CHUNK_REQUESTS):
        last = min(first + CHUNK_REQUESTS, num_requests) - 1
        source = _SOURCE.format(first_id=FIRST_ID, month=30 * DAY_NS, numbers=_numbers(database, first, last))
        fills = [_fill(database, source, statement) for statement in _STATEMENTS]
        await asyncio.gather(*fills)  # on SQLite they wait for each other, in this order
        say(f"{(last + 1) * ENTRIES_PER_REQUEST:,} ledger rows")
    if num_requests > first_request:
        async with database.transaction() as conn:
            await conn.exec_driver_sql(_BALANCES)
            entry = tables.ledger_entry
            assert await conn.scalar(select(func.sum(entry.c.amount_nano_usd))) == 0
        if not database.is_sqlite:  # what the server would do of itself a little later, in the middle of a measurement
            async with database.glance() as conn:
                await conn.exec_driver_sql("VACUUM ANALYZE")
                await conn.exec_driver_sql("CHECKPOINT")


async def _fill(database: Database, source: str, statement: str) -> None:
    body = statement.format(true="1" if database.is_sqlite else "true")
    into, _, rest = body.partition("SELECT")
    async with database.transaction() as conn:
        if not database.is_sqlite:
            await conn.exec_driver_sql("SET LOCAL session_replication_role = replica")
        await conn.exec_driver_sql(f"{into} WITH source AS ({source}) SELECT{rest}")


def _numbers(database: Database, first: int, last: int) -> str:
    if database.is_sqlite:
        counter = f"counter(n) AS (SELECT {first} UNION ALL SELECT n + 1 FROM counter WHERE n < {last})"  # noqa: S608
        return f"(WITH RECURSIVE {counter} SELECT n FROM counter)"  # noqa: S608
    return f"generate_series({first}, {last}) AS numbers(n)"
