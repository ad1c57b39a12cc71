"""Whose the engine's time was: for margins, never for bills.

    shares    what the engine measured of each request (engine/timekeeper.py), counted in the period in which it ended
    own       of the engine's steps, what was no tenant's: the auditor's runs, steps without a row
    idle      when no step ran, as the engines' own counts say (engine_time.py)
    other     the rest of the steps: requests that had not ended by the period's end, less what those that had ended
              took before it began; and what is on no usage row, because a request broke or was lost

    sum of the tenants' shares + own + idle + other = the period, once for each engine, to the nanosecond

Rows from before the engine measured anything have an estimate: an instant at which such requests were between admission
and end is shared equally by them, so waiting counts as being served. How many there are is said with each share; their
time is in the shares, and not idle. Their blocks are computed as if an answer had grown evenly.

Prefill tokens were computed once each; what preemption made the engine compute again is counted apart. A decode step is
a token of an answer that was fed back: of a request that was not measured, every token of the answer. Token-seconds are
always estimates. Rows are of requests that have ended.
"""

from collections.abc import Iterable
from dataclasses import dataclass

from sqlalchemy import select
from sqlalchemy.ext.asyncio import AsyncConnection

from tenancy import tables
from tenancy.usage.engine_time import EngineTime

NOTHING = EngineTime()
REQUESTS_MAX = 2_000_000  # read into memory: some 500 MB
SECOND_NS = 10**9


class TooManyRequestsError(ValueError):
    """The period has more requests than are read at once: take a shorter one."""


@dataclass(frozen=True, slots=True)
class Span:
    """One request: when it was here, and its counts."""

    tenant_id: str
    started_ns: int
    finished_ns: int
    num_prompt_tokens: int
    num_cached_tokens: int
    num_completion_tokens: int
    amount_nano_usd: int
    engine_ns: int | None = None  # None, and then all below: not measured
    block_ns: int | None = None
    num_prefill_tokens: int | None = None
    num_recomputed_tokens: int | None = None
    num_decode_steps: int | None = None


@dataclass(slots=True)
class Share:
    """A tenant's part of a period. Counts and revenue are of requests that ended in it."""

    engine_ns: int = 0
    estimated_ns: int = 0  # part of engine_ns: of requests that were not measured
    num_requests: int = 0
    num_estimated: int = 0  # of those, not measured
    num_prefill_tokens: int = 0
    num_recomputed_tokens: int = 0
    num_decode_steps: int = 0
    cache_token_seconds: int = 0
    cache_block_ns: int = 0
    revenue_nano_usd: int = 0


@dataclass(frozen=True, slots=True)
class Attribution:
    since_ns: int
    until_ns: int
    shares: dict[str, Share]  # by tenant id
    own_ns: int
    idle_ns: int
    other_ns: int  # may be negative
    num_engines: int = 1


def attribute(
    spans: Iterable[Span], since_ns: int, until_ns: int, *, block_size: int, engines: EngineTime = NOTHING
) -> Attribution:
    """Share [since_ns, until_ns) between the spans, the house and idleness. Spans may begin before it and end after it.

    `block_size`: tokens in a block of the engine's cache, for what is estimated. `engines`: what they say of the
    period; where that is nothing, whatever is in no share is idle.
    """
    shares: dict[str, Share] = {}
    estimated: list[Span] = []
    measured_ns = 0
    for span in spans:
        share = shares.setdefault(span.tenant_id, Share())
        ended = since_ns <= span.finished_ns < until_ns
        if ended:
            _count(share, span, block_size)
        if span.engine_ns is None:
            estimated.append(span)
        elif ended:
            share.engine_ns += span.engine_ns
            measured_ns += span.engine_ns
    estimated_ns = _estimate(estimated, since_ns, until_ns, shares)
    time_ns = (until_ns - since_ns) * engines.num_engines
    busy_ns = estimated_ns + (engines.step_ns or measured_ns)
    own_ns, idle_ns = engines.own_ns, max(0, time_ns - busy_ns)
    other_ns = time_ns - measured_ns - estimated_ns - own_ns - idle_ns
    return Attribution(since_ns, until_ns, shares, own_ns, idle_ns, other_ns, engines.num_engines)


def _count(share: Share, span: Span, block_size: int) -> None:
    """One request that has ended in the period, but for its time."""
    share.num_requests += 1
    share.revenue_nano_usd += span.amount_nano_usd
    held = 2 * span.num_prompt_tokens + span.num_completion_tokens  # twice the tokens in the cache on average
    share.cache_token_seconds += held * (span.finished_ns - span.started_ns) // (2 * SECOND_NS)
    if span.engine_ns is None:
        share.num_estimated += 1
        share.num_prefill_tokens += span.num_prompt_tokens - span.num_cached_tokens
        share.num_decode_steps += span.num_completion_tokens
        share.cache_block_ns += block_ns(span, block_size)
    else:
        share.num_prefill_tokens += span.num_prefill_tokens or 0
        share.num_recomputed_tokens += span.num_recomputed_tokens or 0
        share.num_decode_steps += span.num_decode_steps or 0
        share.cache_block_ns += span.block_ns or 0


def _estimate(spans: Iterable[Span], since_ns: int, until_ns: int, shares: dict[str, Share]) -> int:
    """Share each instant equally between the spans that it is in; how many had any."""
    changes: list[tuple[int, str, int]] = []
    for span in spans:
        start, end = max(span.started_ns, since_ns), min(span.finished_ns, until_ns)
        if start < end:
            changes += [(start, span.tenant_id, 1), (end, span.tenant_id, -1)]
    changes.sort()
    present: dict[str, int] = {}
    at_ns, busy_ns, num_present = since_ns, 0, 0
    for change_ns, tenant_id, step in changes:
        length = change_ns - at_ns
        if num_present and length:
            busy_ns += length
            _share_out(length, present, num_present, shares)
        at_ns = change_ns
        num_present += step
        present[tenant_id] = present.get(tenant_id, 0) + step
        if not present[tenant_id]:
            del present[tenant_id]
    return busy_ns


def block_ns(span: Span, block_size: int) -> int:
    """Blocks that the request held times ns, rounded down; its answer grew by a token in equal parts of its time."""
    if block_size < 1:
        raise ValueError(f"a block has at least one token, not {block_size}")
    prompt, parts = span.num_prompt_tokens, max(1, span.num_completion_tokens)
    # In the n-th part, from 0, it holds prompt + n tokens.
    blocks = _blocks_up_to(prompt + parts - 1, block_size) - _blocks_up_to(prompt - 1, block_size)
    return blocks * (span.finished_ns - span.started_ns) // parts


def _blocks_up_to(num_tokens: int, block_size: int) -> int:
    """The sum of ceil(n / block_size) for n = 0 .. num_tokens."""
    full, rest = divmod(max(0, num_tokens), block_size)
    return block_size * full * (full + 1) // 2 + rest * (full + 1)


async def read_spans(conn: AsyncConnection, since_ns: int, until_ns: int) -> list[Span]:
    """Requests that were here in some part of the period. Raises TooManyRequestsError."""
    table = tables.usage_record
    query = (
        select(*(table.c[name] for name in Span.__slots__))
        .where(table.c.finished_ns >= since_ns, table.c.started_ns < until_ns)
        .limit(REQUESTS_MAX + 1)
    )
    spans = [Span(*row) for row in await conn.execute(query)]
    if len(spans) > REQUESTS_MAX:
        raise TooManyRequestsError(f"the period has more than {REQUESTS_MAX:,} requests: take a shorter one")
    return spans


def cost_nano_usd(engine_ns: int, nano_usd_per_hour: int) -> int:
    """What so much time of the engine cost, rounded down: an estimate, no bill."""
    return engine_ns * nano_usd_per_hour // (3_600 * SECOND_NS)


def _share_out(length: int, present: dict[str, int], num_present: int, shares: dict[str, Share]) -> None:
    """An equal part for each request; the nanoseconds that do not divide go to the first tenants by id."""
    left = length
    for tenant_id, count in present.items():
        part = length * count // num_present
        shares[tenant_id].engine_ns += part
        shares[tenant_id].estimated_ns += part
        left -= part
    for tenant_id in sorted(present)[:left]:
        shares[tenant_id].engine_ns += 1
        shares[tenant_id].estimated_ns += 1
