"""Whose the engine's time was, as far as usage rows tell: for margins, never for bills.

    busy   instants at which at least one request was between its admission and its end; each such instant is shared
           equally by the requests that were
    idle   the rest of the period, which is nobody's: shown apart, not smeared over tenants

    sum of the tenants' shares + idle = the period, to the nanosecond

An engine does not report yet how long its steps took nor which sequences were in them, so a request that waits counts
as one that is served, and a long prompt's step as a short one's. Beside the share stand the counts that drive cost:
prefill tokens (prompt less what the cache had), decode steps (one for each token of an answer), and token-seconds and
block-seconds in the cache, as if an answer grew evenly: a block is held whole from its first token on, and one that
several requests share counts for each of them. Rows are of requests that have ended; those still in flight count when
they end.
"""

from collections.abc import Iterable
from dataclasses import dataclass

from sqlalchemy import select
from sqlalchemy.ext.asyncio import AsyncConnection

from tenancy import tables

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


@dataclass(slots=True)
class Share:
    """A tenant's part of a period. Counts and revenue are of requests that ended in it."""

    engine_ns: int = 0
    num_requests: int = 0
    num_prefill_tokens: int = 0
    num_decode_steps: int = 0
    cache_token_seconds: int = 0
    cache_block_ns: int = 0
    revenue_nano_usd: int = 0


@dataclass(frozen=True, slots=True)
class Attribution:
    since_ns: int
    until_ns: int
    shares: dict[str, Share]  # by tenant id
    idle_ns: int


def attribute(spans: Iterable[Span], since_ns: int, until_ns: int, *, block_size: int) -> Attribution:
    """Share [since_ns, until_ns) between the spans and idleness. Spans may begin before it and end after it.

    `block_size`: tokens in a block of the engine's cache.
    """
    shares: dict[str, Share] = {}
    changes: list[tuple[int, str, int]] = []
    for span in spans:
        share = shares.setdefault(span.tenant_id, Share())
        if since_ns <= span.finished_ns < until_ns:
            share.num_requests += 1
            share.num_prefill_tokens += span.num_prompt_tokens - span.num_cached_tokens
            share.num_decode_steps += span.num_completion_tokens
            held = 2 * span.num_prompt_tokens + span.num_completion_tokens  # twice the tokens in the cache on average
            share.cache_token_seconds += held * (span.finished_ns - span.started_ns) // (2 * SECOND_NS)
            share.cache_block_ns += block_ns(span, block_size)
            share.revenue_nano_usd += span.amount_nano_usd
        start, end = max(span.started_ns, since_ns), min(span.finished_ns, until_ns)
        if start < end:
            changes += [(start, span.tenant_id, 1), (end, span.tenant_id, -1)]
    changes.sort()
    present: dict[str, int] = {}
    at_ns, idle_ns, num_present = since_ns, 0, 0
    for change_ns, tenant_id, step in changes:
        length = change_ns - at_ns
        if num_present == 0:
            idle_ns += length
        elif length:
            _share_out(length, present, num_present, shares)
        at_ns = change_ns
        num_present += step
        present[tenant_id] = present.get(tenant_id, 0) + step
        if not present[tenant_id]:
            del present[tenant_id]
    return Attribution(since_ns, until_ns, shares, idle_ns + until_ns - at_ns)


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
        left -= part
    for tenant_id in sorted(present)[:left]:
        shares[tenant_id].engine_ns += 1
