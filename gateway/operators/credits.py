"""What tenants have: credits, credit lines, corrections and budgets.

Whatever moves money takes an id from its caller: the same request again changes nothing.
"""

from typing import Annotated, Any, Literal, get_args

from msgspec import Meta, Struct

from gateway.api.problems import NotThereError
from gateway.operators.desk import NANO_MAX, Ask, Id, Nano, Nothing, Ns, Text
from gateway.operators.refusals import there
from gateway.organization.desk import listed
from gateway.records.money import budget_records, credit_records, line_record
from gateway.records.plain import Record
from gateway.records.tenants import tenant_records
from tenancy.access.directory import list_tenants, owner_of
from tenancy.accounts.budget_use import BudgetScope
from tenancy.accounts.corrections import captured_hold, refundable_nano_usd
from tenancy.accounts.credit_line import get_line
from tenancy.accounts.credits import CreditKind
from tenancy.accounts.ledger import has_transaction
from tenancy.accounts.posting import currency_of
from tenancy.invoicing.periods import Period

SomeNano = Annotated[int, Meta(ge=1, le=NANO_MAX)]
AnyNano = Annotated[int, Meta(ge=-NANO_MAX, le=NANO_MAX)]
Hardness = Literal["hard", "soft"]


class NewCredit(Struct, frozen=True, forbid_unknown_fields=True):
    transfer_id: Id
    amount_nano_usd: SomeNano
    memo: Text = "credit"
    kind: CreditKind = "paid"
    expires_ns: Ns | None = None


class NewLine(Struct, frozen=True, forbid_unknown_fields=True):
    limit_nano_usd: Nano  # 0: pre-paid again
    reason: Text = ""


class NewRefund(Struct, frozen=True, forbid_unknown_fields=True):
    transfer_id: Id
    amount_nano_usd: SomeNano
    reason: Text


class NewAdjustment(Struct, frozen=True, forbid_unknown_fields=True):
    """Below zero it takes credit away."""

    transfer_id: Id
    amount_nano_usd: AnyNano
    reason: Text
    corrects_id: Id | None = None


class NewBudget(Struct, frozen=True, forbid_unknown_fields=True):
    scope_kind: BudgetScope
    scope_id: Id
    period: Period
    limit_nano_usd: Nano
    hard: bool = True


async def credits(ask: Ask) -> Any:
    found = await credit_records(ask.conn, (await ask.tenant()).tenant_id, ask.now_ns)
    page, more = ask.page(found, lambda one: one["credit_id"])
    return listed(page, [one["credit_id"] for one in page], more)


async def grant(ask: Ask, wanted: NewCredit) -> Any:
    one = await ask.tenant()
    if not await has_transaction(ask.conn, wanted.transfer_id):  # a repeat may come after the end
        ask.future_ns(wanted.expires_ns, "expires_ns")
    await ask.clerk.grant_credit(
        one.tenant_id,
        wanted.amount_nano_usd,
        transfer_id=wanted.transfer_id,
        memo=wanted.memo,
        kind=wanted.kind,
        expires_ns=wanted.expires_ns,
    )
    return await _money(ask, one.tenant_id, wanted.transfer_id)


async def line(ask: Ask) -> Any:
    ask.query.end()
    tenant_id = (await ask.tenant()).tenant_id
    return line_record(tenant_id, await get_line(ask.conn, tenant_id), await currency_of(ask.conn, tenant_id))


async def set_line(ask: Ask, wanted: NewLine) -> Any:
    """A limit that is set already changes nothing."""
    await ask.clerk.set_credit_limit((await ask.tenant()).tenant_id, wanted.limit_nano_usd, wanted.reason)
    return await line(ask)


async def charged_request(ask: Ask) -> Any:
    """What a request cost, and what of that can still be refunded."""
    ask.query.end()
    with there():
        hold = await captured_hold(ask.conn, ask.path["request_id"])
    return {
        "request_id": hold.request_id,
        "tenant_id": hold.tenant_id,
        "currency": await currency_of(ask.conn, hold.tenant_id),
        "captured_nano_usd": hold.captured_nano_usd,
        "refundable_nano_usd": await refundable_nano_usd(ask.conn, hold),
    }


async def refund(ask: Ask, wanted: NewRefund) -> Any:
    with there():
        await captured_hold(ask.conn, ask.path["request_id"])
    tenant_id = await ask.clerk.refund(
        ask.path["request_id"], wanted.amount_nano_usd, transfer_id=wanted.transfer_id, reason=wanted.reason
    )
    return await _money(ask, tenant_id, wanted.transfer_id)


async def adjust(ask: Ask, wanted: NewAdjustment) -> Any:
    one = await ask.tenant()
    await ask.clerk.adjust_credit(
        one.tenant_id,
        wanted.amount_nano_usd,
        transfer_id=wanted.transfer_id,
        corrects_id=wanted.corrects_id or "",
        reason=wanted.reason,
    )
    return await _money(ask, one.tenant_id, wanted.transfer_id)


async def budgets(ask: Ask) -> Any:
    """By tenant; of one tenant with its id as ``tenant_id``."""
    only = ask.id_of("tenant_id")
    tenants = [await ask.tenant(only)] if only else await list_tenants(ask.conn)
    found = [use for one in tenants for use in await budget_records(ask.conn, one.tenant_id, ask.now_ns)]
    page, more = ask.page(found, _budget_id)
    return listed(page, [_budget_id(one) for one in page], more)


async def set_budget(ask: Ask, wanted: NewBudget) -> Any:
    await owner_of(ask.conn, wanted.scope_kind, wanted.scope_id)
    tenant_id = await ask.clerk.set_budget(
        wanted.scope_kind, wanted.scope_id, wanted.period, hard=wanted.hard, limit_nano_usd=wanted.limit_nano_usd
    )
    found = await budget_records(ask.conn, tenant_id, ask.now_ns)
    asked = (wanted.scope_id, wanted.period, wanted.hard)
    return next(one for one in found if tuple(one["budget"][name] for name in ("scope_id", "period", "hard")) == asked)


async def remove_budget(ask: Ask, _: Nothing) -> Any:
    """Of a scope, one period's hard or soft budget."""
    for period in get_args(Period):
        for hardness in get_args(Hardness):
            if (period, hardness) == (ask.path["period"], ask.path["hardness"]):
                with there():
                    await ask.clerk.remove_budget(ask.path["scope_id"], period, hard=hardness == "hard")
                return {"scope_id": ask.path["scope_id"], "period": period, "hard": hardness == "hard", "removed": True}
    raise NotThereError("budget", f"{ask.path['period']} {ask.path['hardness']}")


async def _money(ask: Ask, tenant_id: str, transfer_id: str) -> Record:
    """The tenant as it is after a transfer."""
    (found,) = await tenant_records(ask.conn, [await ask.tenant(tenant_id)])
    return {"transfer_id": transfer_id} | found


def _budget_id(use: Record) -> str:
    return str(use["budget"]["budget_id"])


READING = (
    ("GET", "/tenants/{tenant_id}/credits", credits),
    ("GET", "/tenants/{tenant_id}/credit_line", line),
    ("GET", "/requests/{request_id}", charged_request),
    ("GET", "/budgets", budgets),
)
WRITING: tuple[tuple[str, str, type[Struct], Any], ...] = (
    ("POST", "/tenants/{tenant_id}/credits", NewCredit, grant),
    ("PUT", "/tenants/{tenant_id}/credit_line", NewLine, set_line),
    ("POST", "/tenants/{tenant_id}/adjustments", NewAdjustment, adjust),
    ("POST", "/requests/{request_id}/refunds", NewRefund, refund),
    ("PUT", "/budgets", NewBudget, set_budget),
    ("DELETE", "/budgets/{scope_id}/{period}/{hardness}", Nothing, remove_budget),
)
