"""T1 and T2 in one statement each, with their log entry: PostgreSQL's way for nearly every request.

    WITH done AS (the hold is placed, or settled),
         told AS (its entry goes to the outbox, if that was done)
    SELECT done

One statement is one transaction: tenancy's part of it (tenancy/accounts/one_trip.py) and audit's
(audit/transparency/outbox.py) become true together or not at all. Where the case is not the common one nothing has
happened, and the general way is taken, statement by statement.
"""

from collections.abc import Callable
from functools import cache

from audit.transparency.entry import Entry
from audit.transparency.outbox import append_where, values_of
from gateway.database import Database
from tenancy.accounts.one_trip import Statement


async def do_and_tell(
    database: Database, statement: Statement, entry: Entry, *, entropy: Callable[[int], bytes]
) -> bool:
    """Whether it was done, and is logged. Raises DatabaseUnavailableError: then it may have been."""
    text = _text(statement.text, len(statement.arguments))
    return bool(await database.one_trip(text, (*statement.arguments, *values_of(entry, entropy=entropy))))


@cache  # one for each of the statements that there are
def _text(expression: str, num_arguments: int) -> str:
    told = append_where("done WHERE yes", num_arguments + 1)
    return f"WITH done AS MATERIALIZED (SELECT {expression} AS yes), told AS ({told}) SELECT yes FROM done"  # noqa: S608
