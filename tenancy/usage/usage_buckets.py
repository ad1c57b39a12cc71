"""Usage of one tenant in buckets of time: sums of the meter's rows, grouped as asked, never another tenant's."""

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Final, Literal, get_args

from sqlalchemy import func, select
from sqlalchemy.ext.asyncio import AsyncConnection

from tenancy import tables

GroupBy = Literal["project_id", "api_key_id", "model"]
GROUPS: Final[tuple[GroupBy, ...]] = get_args(GroupBy)
_TABLE: Final = tables.usage_record
_COLUMNS: Final = {"project_id": _TABLE.c.project_id, "api_key_id": _TABLE.c.key_id, "model": _TABLE.c.model}


@dataclass(frozen=True, slots=True)
class Filter:
    """Empty lets all through."""

    project_ids: Collection[str] = ()
    key_ids: Collection[str] = ()
    models: Collection[str] = ()


@dataclass(frozen=True, slots=True)
class BucketSums:
    """Sums of one group in [start_ns, start_ns + width_ns); ``group`` has the values that were grouped by."""

    start_ns: int
    group: Mapping[str, str]
    num_requests: int
    num_prompt_tokens: int
    num_cached_tokens: int
    num_completion_tokens: int
    amount_nano_usd: int


async def usage_buckets(
    conn: AsyncConnection,
    tenant_id: str,
    *,
    since_ns: int,
    until_ns: int,
    width_ns: int,
    group_by: Collection[GroupBy] = (),
    only: Filter = Filter(),
) -> list[BucketSums]:
    """What finished in [since_ns, until_ns), oldest bucket first; ``since_ns`` is where the first one begins. Buckets
    without requests are absent."""
    number = ((_TABLE.c.finished_ns - since_ns) // width_ns).label("number")
    names = [name for name in GROUPS if name in group_by]
    groups = [_COLUMNS[name] for name in names]
    query = (
        select(
            number,
            *groups,
            func.count(),
            func.sum(_TABLE.c.num_prompt_tokens),
            func.sum(_TABLE.c.num_cached_tokens),
            func.sum(_TABLE.c.num_completion_tokens),
            func.sum(_TABLE.c.amount_nano_usd),
        )
        .where(_TABLE.c.tenant_id == tenant_id, _TABLE.c.finished_ns >= since_ns, _TABLE.c.finished_ns < until_ns)
        .group_by(number, *groups)
        .order_by(number, *groups)
    )
    for column, wanted in (
        (_TABLE.c.project_id, only.project_ids),
        (_TABLE.c.key_id, only.key_ids),
        (_TABLE.c.model, only.models),
    ):
        if wanted:
            query = query.where(column.in_(list(wanted)))
    found = []
    for row in await conn.execute(query):
        values = list(row)
        group: dict[str, str] = {name: str(value) for name, value in zip(names, values[1:], strict=False)}
        found.append(BucketSums(since_ns + int(values[0]) * width_ns, group, *map(int, values[1 + len(names) :])))
    return found
