"""How a hold ends that its request did not settle: at start for every open hold, later for those past their expiry.

    the worker's journal counts tokens     they are charged, the rest returns: "recovered"
    it does not, and the hold is overdue    all of it returns: "expired"
    it does not, and the hold is younger    all of it returns: "voided" (only at start, when nobody works on it)

There is no other outcome, whichever of the two comes first.

Whose it is to settle (`abandoned_holds`):

    open in this process      nobody else's, overdue or not: its settlement is on its way (api/settlement.py)
    this gateway's            ours: it is the only one on its data folder, with the only journal that counts it
    another gateway's         ours when that one has not come back BULKHEAD_GATEWAY_RETURN_S after the hold's end
"""

import json
from dataclasses import replace

from sqlalchemy import select
from sqlalchemy.ext.asyncio import AsyncConnection

from audit.transparency.entry import Entry
from audit.transparency.outbox import append
from audit.transparency.tables import log_leaf, log_opening, outbox
from gateway.budget_alerts import append_settled
from gateway.services import Services
from tenancy.access.keys import get_key
from tenancy.accounts.ledger import Hold, capture, claim_pending, due_holds, expire, void
from tenancy.invoicing.periods import SECOND_NS
from tenancy.pricing.price_book import get_price
from tenancy.pricing.prices import charge_nano_usd
from tenancy.pricing.volume import take_volume
from tenancy.usage.meter import Effort, Usage, UsageRecord, record_usage

FINISH_REASON = "gateway_lost"


async def abandoned_holds(conn: AsyncConnection, services: Services, limit: int) -> list[Hold]:
    """Overdue holds that are ours to settle now."""
    now_ns = services.world.now_ns()
    others_ns = now_ns - services.settings.gateway_return_s * SECOND_NS
    due = await due_holds(conn, now_ns, limit, gateway_id=services.gateway_id, others_ns=others_ns)
    return [hold for hold in due if hold.request_id not in services.running.open_requests]


async def settle_abandoned(
    conn: AsyncConnection,
    services: Services,
    hold: Hold,
    counted: Usage | None,
    *,
    effort: Effort | None = None,
    wait: bool = False,
) -> int:
    """Settle one hold, with its usage row and log entry, unless another was quicker; the nano-USD charged here.

    ``counted``, ``effort``: what the journals say of its request. ``wait``: also where another is at it, until it is
    known whether that one has settled it; else such a hold is left for the next round.
    """
    if not await claim_pending(conn, hold.hold_id, wait=wait):
        return 0
    now_ns = services.world.now_ns()
    usage, amount, outcome = Usage(0, 0, 0), 0, "voided"
    whose = None
    if counted is not None and counted.num_completion_tokens > 0:
        whose = await _whose(conn, hold)
    if counted is not None and whose is not None:
        usage, outcome = counted, "recovered"
        price = await get_price(conn, hold.price_id)
        num_tokens = usage.num_prompt_tokens + usage.num_completion_tokens
        before = await take_volume(conn, hold.tenant_id, price, hold.created_ns, num_tokens)
        amount = charge_nano_usd(price, usage, hold.tier, before)
        settled = await capture(conn, hold.hold_id, amount, now_ns, num_tokens=num_tokens)
        record = _usage_record(hold, whose, price.model, usage, amount, before, now_ns)
        await record_usage(conn, replace(record, effort=effort))
    elif hold.expires_ns <= now_ns:
        outcome = "expired"
        settled = await expire(conn, hold.hold_id, now_ns)
    else:
        settled = await void(conn, hold.hold_id, now_ns)
    await append_settled(conn, settled, now_ns, entropy=services.world.entropy)
    body: dict[str, str | int | bool | list[str]] = {
        "request_id": hold.request_id,
        "finish_reason": FINISH_REASON,
        "num_prompt_tokens": usage.num_prompt_tokens,
        "num_cached_tokens": usage.num_cached_tokens,
        "num_completion_tokens": usage.num_completion_tokens,
        "amount_nano_usd": amount,
        "outcome": outcome,
    }
    await append(conn, Entry("request.settled", hold.tenant_id, now_ns, body), entropy=services.world.entropy)
    return amount


async def _whose(conn: AsyncConnection, hold: Hold) -> tuple[str, str] | None:
    """Project and key. A hold of before there were budgets does not name them; its request.admitted entry, written in
    its own transaction at the same instant, does."""
    if hold.project_id is not None and hold.key_id is not None:
        return hold.project_id, hold.key_id
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
                return (await get_key(conn, fields["key_id"])).project_id, fields["key_id"]
    return None


def _usage_record(
    hold: Hold, whose: tuple[str, str], model: str, usage: Usage, amount: int, before: int, now_ns: int
) -> UsageRecord:
    project_id, key_id = whose
    return UsageRecord(
        request_id=hold.request_id,
        tenant_id=hold.tenant_id,
        project_id=project_id,
        key_id=key_id,
        model=model,
        usage=usage,
        price_id=hold.price_id,
        amount_nano_usd=amount,
        started_ns=hold.created_ns,
        finished_ns=max(now_ns, hold.created_ns),  # a wall clock may step back
        finish_reason=FINISH_REASON,
        stream=True,
        tier=hold.tier,
        num_tokens_before=before,
    )
