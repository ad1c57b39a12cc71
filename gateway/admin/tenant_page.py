"""One tenant's page: account, ledger check, budgets, requests, holds, keys. One database snapshot."""

from collections.abc import Mapping
from dataclasses import dataclass

from gateway.admin import queries
from gateway.admin.chart import Chart, stacked_bars
from gateway.admin.health import Fact
from gateway.admin.invoice_lines import InvoiceLine, invoice_lines
from gateway.admin.overview import empty_minutes, gather_minutes
from gateway.admin.wording import count, duration, in_column, milliseconds, plural, utc
from gateway.services import Services
from tenancy.accounts.budget_use import BudgetUse, budget_uses
from tenancy.accounts.corrections import refunded_nano_usd
from tenancy.accounts.credits import Credit, list_credits
from tenancy.accounts.posting import currency_of
from tenancy.money import format_nano
from tenancy.usage.meter import TenantUsage

REQUESTS_PER_PAGE = 50
KEYS_MAX = 200
CREDITS_MAX = 50
HOLDS_MAX = 100
INT64_MAX = 2**63 - 1


@dataclass(frozen=True, slots=True)
class MoneyFact:
    heading: str
    amount: str
    lines: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class RequestLine:
    finished: str
    model: str
    key: str
    prompt: str
    cached: str
    completion: str
    engine: str
    amount: str
    finish_reason: str
    request_id: str


@dataclass(frozen=True, slots=True)
class HoldLine:
    request_id: str
    amount: str
    expires: str


@dataclass(frozen=True, slots=True)
class BudgetLine:
    scope: str
    period: str
    kind: str
    used: str
    held: str
    limit: str
    word: str  # the highest alert of the period
    state: str


@dataclass(frozen=True, slots=True)
class CreditLine:
    kind: str
    left: str
    granted: str
    expires: str
    transfer_id: str


@dataclass(frozen=True, slots=True)
class KeyLine:
    public_id: str
    name: str
    scopes: str
    created: str
    word: str
    state: str


@dataclass(frozen=True, slots=True)
class TenantPage:
    tenant_id: str
    name: str
    status: str
    as_of: str
    currency: str
    money: tuple[MoneyFact, ...]
    check: Fact
    chart: Chart
    credits: tuple[CreditLine, ...]
    credits_note: str
    budgets: tuple[BudgetLine, ...]
    invoices: tuple[InvoiceLine, ...]
    requests: tuple[RequestLine, ...]
    older: str  # cursor of the next page; empty when there is none
    is_older: bool  # this is not the first page
    holds: tuple[HoldLine, ...]
    holds_note: str
    keys: tuple[KeyLine, ...]


async def gather(services: Services, tenant_id: str, *, before: str) -> TenantPage | None:
    """None when there is no such tenant. An unreadable cursor shows the first page.

    Raises DatabaseUnavailableError.
    """
    now_ns = services.world.now_ns()
    cursor = parse_cursor(before)
    async with services.database.read() as conn:
        tenant = await queries.one_tenant(conn, tenant_id)
        if tenant is None:
            return None
        balances = await queries.account_balances(conn, tenant_id)
        sums = await queries.entry_sums(conn, tenant_id)
        billed = await queries.usage_of(conn, tenant_id)
        refunded = await refunded_nano_usd(conn, tenant_id)
        minutes = (await gather_minutes(conn, now_ns, tenant_id)).get(tenant_id)
        requests = await queries.recent_usage(conn, tenant_id, cursor, REQUESTS_PER_PAGE + 1)
        num_held, held_nano_usd = await queries.pending_sum(conn, tenant_id)
        holds = await queries.tenant_holds(conn, tenant_id, HOLDS_MAX)
        keys = await queries.tenant_keys(conn, tenant_id, KEYS_MAX)
        uses = await budget_uses(conn, tenant_id, now_ns)
        credits = await list_credits(conn, tenant_id, now_ns)
        currency = await currency_of(conn, tenant_id)
        invoices = await invoice_lines(conn, tenant_id, now_ns)
    shown = requests[:REQUESTS_PER_PAGE]
    return TenantPage(
        tenant_id=tenant.tenant_id,
        name=tenant.name,
        status=tenant.status,
        as_of=utc(now_ns),
        currency=currency,
        money=_money(balances, billed, refunded, num_held, currency),
        check=check_account(balances, sums, billed.amount_nano_usd - refunded, held_nano_usd, currency),
        chart=stacked_bars(minutes or empty_minutes(now_ns), subject=tenant.name),
        credits=tuple(_credit_line(credit, now_ns, currency) for credit in credits[:CREDITS_MAX]),
        credits_note="In the order in which they are used"
        + (f"; the first {CREDITS_MAX} of {len(credits)}" if len(credits) > CREDITS_MAX else ""),
        budgets=tuple(_budget_line(use, currency) for use in uses),
        invoices=invoices,
        requests=tuple(_request_line(row, currency) for row in shown),
        older=format_cursor(shown[-1]) if len(requests) > len(shown) else "",
        is_older=cursor is not None,
        holds=tuple(_hold_line(row, now_ns, currency) for row in holds),
        holds_note=f"{plural(num_held, 'hold')}, {format_nano(held_nano_usd, currency)}"
        + (f"; the first {HOLDS_MAX} are shown" if num_held > len(holds) else ""),
        keys=tuple(_key_line(row, now_ns) for row in keys),
    )


def check_account(
    balances: Mapping[str, int], sums: Mapping[str, int], billed_nano_usd: int, held_nano_usd: int, currency: str
) -> Fact:
    """Three figures that are kept apart must agree: balances and entries, billed and revenue, held and holds."""
    differences = {
        "Balances minus ledger entries": sum(
            abs(balances.get(kind, 0) - sums.get(kind, 0)) for kind in balances.keys() | sums.keys()
        ),
        "Usage billed and not refunded minus ledger revenue": billed_nano_usd - balances.get("revenue", 0),
        "Pending holds minus ledger held": held_nano_usd - balances.get("held", 0),
        "Sum of all accounts": sum(balances.values()),
    }
    lines = {name: f"{name}: {format_nano(value, currency)}" for name, value in differences.items()}
    if any(differences.values()):
        return Fact("bad", "Does not agree", lines)
    return Fact("good", f"Agrees to the nano-{currency}", lines)


def parse_cursor(text: str) -> tuple[int, str] | None:
    """`<finished_ns>.<request_id>`."""
    at, _, request_id = text.partition(".")
    if not (at.isascii() and at.isdigit() and len(at) <= 19 and request_id and request_id.isprintable()):
        return None
    return (int(at), request_id) if int(at) <= INT64_MAX else None


def format_cursor(row: queries.UsageRow) -> str:
    return f"{row.finished_ns}.{row.request_id}"


def _money(
    balances: Mapping[str, int], billed: TenantUsage, refunded_nano_usd: int, num_held: int, currency: str
) -> tuple[MoneyFact, ...]:
    return (
        MoneyFact("Credit left", format_nano(balances.get("credit", 0), currency), ("Neither billed nor held",)),
        MoneyFact("Held", format_nano(balances.get("held", 0), currency), (plural(num_held, "pending hold"),)),
        MoneyFact(
            "Billed, all time",
            format_nano(billed.amount_nano_usd, currency),
            (
                plural(billed.num_requests, "request"),
                f"{count(billed.num_prompt_tokens)} prompt tokens, {count(billed.num_cached_tokens)} of them cached",
                f"{count(billed.num_completion_tokens)} completion tokens",
                *((f"{format_nano(refunded_nano_usd, currency)} of it refunded",) if refunded_nano_usd else ()),
            ),
        ),
    )


def _request_line(row: queries.UsageRow, currency: str) -> RequestLine:
    return RequestLine(
        finished=utc(row.finished_ns).removesuffix(" UTC"),
        model=row.model,
        key=row.key_public_id,
        prompt=count(row.num_prompt_tokens),
        cached=count(row.num_cached_tokens),
        completion=count(row.num_completion_tokens),
        engine=milliseconds(row.engine_ns),
        amount=in_column(row.amount_nano_usd, currency),
        finish_reason=row.finish_reason,
        request_id=row.request_id,
    )


def _hold_line(row: queries.HoldRow, now_ns: int, currency: str) -> HoldLine:
    left_ns = row.expires_ns - now_ns
    expires = f"in {duration(left_ns)}" if left_ns > 0 else f"{duration(-left_ns)} ago, waiting to be settled"
    return HoldLine(row.request_id, in_column(row.amount_nano_usd, currency), expires)


def _credit_line(credit: Credit, now_ns: int, currency: str) -> CreditLine:
    if credit.expires_ns is None:
        expires = "never"
    else:
        expires = utc(credit.expires_ns) if credit.expires_ns > now_ns else "expired"
    # What came back by refunds and adjustments was never granted.
    granted = in_column(credit.amount_nano_usd, currency) if credit.amount_nano_usd else "-"
    return CreditLine(credit.kind, in_column(credit.left_nano_usd, currency), granted, expires, credit.credit_id)


def _budget_line(use: BudgetUse, currency: str) -> BudgetLine:
    budget = use.budget
    word, state = (f"{use.alerted_percent} % reached", "warn") if use.alerted_percent else ("below 50 %", "good")
    return BudgetLine(
        scope=budget.scope_kind if budget.scope_kind == "tenant" else f"{budget.scope_kind} {budget.scope_id}",
        period=budget.period,
        kind="hard" if budget.hard else "soft",
        used=in_column(use.used_nano_usd, currency),
        held=in_column(use.held_nano_usd, currency),
        limit=in_column(budget.limit_nano_usd, currency),
        word=word,
        state="bad" if use.alerted_percent >= 100 else state,
    )


def _key_line(row: queries.KeyRow, now_ns: int) -> KeyLine:
    word, state = "active", "good"
    if row.revoked_ns is not None:
        word, state = f"revoked {utc(row.revoked_ns)}", "bad"
    elif row.expires_ns is not None and row.expires_ns <= now_ns:
        word, state = f"expired {utc(row.expires_ns)}", "warn"
    elif row.expires_ns is not None:
        word = f"active until {utc(row.expires_ns)}"
    return KeyLine(
        public_id=f"bk-{row.public_id}-…",
        name=f"{row.project_name} / {row.name}",
        scopes=row.scopes,
        created=utc(row.created_ns),
        word=word,
        state=state,
    )
