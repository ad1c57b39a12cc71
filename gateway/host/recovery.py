"""After a crash: settle what an earlier process left open, before anything new is served.

A pending hold whose sequence is in the worker's journal was served at least in part: what the journal counts is
charged, the rest returns. A pending hold without a journal line produced nothing and is voided. There is no third
outcome. This server is the only one on its data folder (folders.only_server), so nobody is still working on them.
"""

import json
from dataclasses import dataclass

import structlog
from sqlalchemy import select
from sqlalchemy.ext.asyncio import AsyncConnection

from audit.entry import Entry
from audit.outbox import append
from audit.tables import log_leaf, log_opening, outbox
from engine.journal import JournalRecord, prune, read_journals
from gateway.host.folders import Folders
from gateway.services import Services
from tenancy.keys import list_keys
from tenancy.ledger import Hold, capture, pending_holds, void
from tenancy.meter import Usage, UsageRecord, record_usage
from tenancy.prices import charge_nano_usd, get_price

FINISH_REASON = "gateway_lost"

log = structlog.get_logger(__name__)


@dataclass(frozen=True, slots=True)
class Recovered:
    num_captured: int
    num_voided: int
    amount_nano_usd: int


async def recover(services: Services, folders: Folders, epoch: str) -> Recovered:
    """Settle every pending hold from the journals, then delete the journals of workers before `epoch`.

    One transaction per hold, so that a crash in here only leaves work for the next start.
    """
    journals = read_journals(folders.journal)
    async with services.database.read() as conn:
        holds = await pending_holds(conn)
    num_captured = num_voided = amount = 0
    for hold in holds:
        record = journals.get(hold.request_id)
        async with services.database.transaction() as conn:
            charged = await _settle(conn, services, hold, record)
        amount += charged
        num_captured += charged > 0
        num_voided += charged == 0
    if holds:
        log.warning("recovered", num_captured=num_captured, num_voided=num_voided, amount_nano_usd=amount)
    prune(folders.journal, keep={epoch})
    return Recovered(num_captured, num_voided, amount)


async def _settle(conn: AsyncConnection, services: Services, hold: Hold, record: JournalRecord | None) -> int:
    """Capture what the journal counts, or void; the amount in nano-USD."""
    now_ns = services.world.now_ns()
    usage = Usage(0, 0, 0)
    admitted = await _admitted(conn, hold)
    if record is not None and record.num_completion_tokens > 0 and admitted is not None:
        usage = Usage(record.num_prompt_tokens, record.num_cached_tokens, record.num_completion_tokens)
    price = await get_price(conn, hold.price_id)
    amount = charge_nano_usd(price, usage) if usage.num_completion_tokens else 0
    if admitted is not None and usage.num_completion_tokens:
        await capture(conn, hold.hold_id, amount, now_ns)
        await record_usage(conn, await _usage_record(conn, hold, admitted, usage, amount, now_ns))
    else:
        await void(conn, hold.hold_id, now_ns)
    body: dict[str, str | int | bool | list[str]] = {
        "request_id": hold.request_id,
        "finish_reason": FINISH_REASON,
        "num_prompt_tokens": usage.num_prompt_tokens,
        "num_cached_tokens": usage.num_cached_tokens,
        "num_completion_tokens": usage.num_completion_tokens,
        "amount_nano_usd": amount,
        "outcome": "recovered" if usage.num_completion_tokens else "voided",
    }
    await append(conn, Entry("request.settled", hold.tenant_id, now_ns, body), entropy=services.world.entropy)
    return amount


async def _admitted(conn: AsyncConnection, hold: Hold) -> dict[str, str] | None:
    """The body of the hold's request.admitted entry, written in the hold's own transaction at the same instant."""
    waiting = select(outbox.c.body).where(outbox.c.kind == "request.admitted", outbox.c.at_ns == hold.created_ns)
    sequenced = (
        select(log_opening.c.body)
        .join(log_leaf, log_leaf.c.leaf_index == log_opening.c.leaf_index)
        .where(log_leaf.c.kind == "request.admitted", log_leaf.c.at_ns == hold.created_ns)
    )
    for query in (waiting, sequenced):
        for body in (await conn.execute(query)).scalars():
            fields: dict[str, str] = json.loads(body)
            if fields["request_id"] == hold.request_id:
                return fields
    return None


async def _usage_record(
    conn: AsyncConnection, hold: Hold, admitted: dict[str, str], usage: Usage, amount: int, now_ns: int
) -> UsageRecord:
    keys = {key.key_id: key for key in await list_keys(conn, hold.tenant_id)}
    return UsageRecord(
        request_id=hold.request_id,
        tenant_id=hold.tenant_id,
        project_id=keys[admitted["key_id"]].project_id,
        key_id=admitted["key_id"],
        model=admitted["model"],
        usage=usage,
        price_id=hold.price_id,
        amount_nano_usd=amount,
        started_ns=hold.created_ns,
        finished_ns=now_ns,
        finish_reason=FINISH_REASON,
        stream=True,
    )
