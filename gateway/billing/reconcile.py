"""Do the books agree? Engine, usage, ledger, invoices and export of a period, each against the next, from its own rows.

    engine  = usage     what the workers' journals count of a request is what its usage row says. A stream that we broke
                        is charged for what was delivered: fewer completion tokens are right there. A journal lives as
                        long as its worker's epoch is remembered: requests without one are counted as unwitnessed
    usage   = ledger    each usage row has one capture (or, of nothing, a void) of the same amount, which is its counts
                        at its price, tier and volume, computed again; each capture has a usage row
    ledger  = invoice   each issued document of the period says what the ledger gives now; its hash is that of its text
                        what is open of a post-paid tenant's documents is its receivable, now and not of a period
    ledger  = export    the FOCUS file of the period, written and read back, adds up to what the revenue account gained,
                        tenant by tenant

Every difference is one line that names the request, document or tenant; none is the goal. Read-only.
"""

import csv
import io
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from decimal import Decimal

from sqlalchemy import func, select
from sqlalchemy.ext.asyncio import AsyncConnection

from audit.transparency.entry import Entry, Value
from audit.transparency.tables import log_leaf, outbox
from gateway.billing.focus import REVENUE_KINDS, focus_rows, write_focus
from tenancy import tables
from tenancy.access.directory import list_tenants
from tenancy.invoicing.invoice_document import NANO, digest, lines_of
from tenancy.invoicing.invoice_tables import invoice, invoice_document, invoice_payment
from tenancy.invoicing.invoices import get_document, lines_now, list_invoices
from tenancy.pricing.price_book import get_price
from tenancy.pricing.prices import Price, charge_nano_usd
from tenancy.usage.meter import Usage, UsageRecord, usage_record_of

DIFFERENCES_MAX = 1_000
LOGGED_MAX = 100  # of them in a log entry
# Charged with everything that was produced; whatever else ended a request is our doing, charged as far as delivered.
IN_FULL = frozenset({"stop", "length", "tool_calls", "client_gone", "client_slow", "gateway_lost"})
NOTHING = Usage(0, 0, 0)


@dataclass(slots=True)
class Reconciliation:
    since_ns: int
    until_ns: int
    num_requests: int = 0
    num_unwitnessed: int = 0  # of them: no journal remembers
    num_documents: int = 0
    differences: list[str] = field(default_factory=list)  # the first DIFFERENCES_MAX
    num_differences: int = 0

    def differs(self, pair: str, what: str) -> None:
        self.num_differences += 1
        if len(self.differences) < DIFFERENCES_MAX:
            self.differences.append(f"{pair}: {what}"[:1_000])


async def reconcile(
    conn: AsyncConnection, journals: Mapping[str, Usage], since_ns: int, until_ns: int
) -> Reconciliation:
    """Of [since_ns, until_ns). `journals`: by request, what the engine counted."""
    found = Reconciliation(since_ns, until_ns)
    await _usage_and_ledger(conn, found, journals)
    await _engine_without_usage(conn, found, journals)
    await _documents(conn, found)
    await _receivables(conn, found)
    await _export(conn, found)
    return found


async def _usage_and_ledger(conn: AsyncConnection, found: Reconciliation, journals: Mapping[str, Usage]) -> None:
    usage, hold, entry, account = tables.usage_record, tables.hold, tables.ledger_entry, tables.account
    revenue = (
        select(entry.c.transaction_id, func.sum(entry.c.amount_nano_usd).label("nano"))
        .join(account, account.c.id == entry.c.account_id)
        .where(account.c.kind == "revenue", entry.c.transaction_id == hold.c.id + ":settle")
        .group_by(entry.c.transaction_id)
        .correlate(hold)
    )
    billed = select(revenue.subquery().c.nano).scalar_subquery()
    query = (
        select(usage, hold.c.state.label("hold_state"), hold.c.captured_nano_usd, billed.label("billed"))
        .outerjoin(hold, hold.c.request_id == usage.c.request_id)
        .where(usage.c.finished_ns >= found.since_ns, usage.c.finished_ns < found.until_ns)
        .order_by(usage.c.finished_ns, usage.c.request_id)
    )
    prices: dict[str, Price] = {}
    async with conn.stream(query.execution_options(yield_per=1_000)) as rows:
        async for row in rows.mappings():
            found.num_requests += 1
            record = usage_record_of(row)
            _against_engine(found, record, journals)
            request_id, amount = record.request_id, record.amount_nano_usd
            state, captured, nano = row["hold_state"], row["captured_nano_usd"], row["billed"]
            right = "voided" if record.usage == NOTHING else "captured"
            if state is None:
                found.differs("usage and ledger", f"{request_id} has usage and no hold")
            elif state != right or (captured, nano or 0) != (amount, amount):
                found.differs(
                    "usage and ledger",
                    f"{request_id} used {amount}, its hold is {state} with {captured}, billed {nano}",
                )
            if record.price_id not in prices:
                prices[record.price_id] = await get_price(conn, record.price_id)
            price = prices[record.price_id]
            due = 0
            if record.usage != NOTHING:
                due = charge_nano_usd(price, record.usage, record.tier, record.num_tokens_before)
            if due != amount:
                found.differs("usage and prices", f"{request_id} was charged {amount}, its tokens cost {due}")
    captures = (
        select(hold.c.request_id)
        .outerjoin(usage, usage.c.request_id == hold.c.request_id)
        .where(
            hold.c.state == "captured",
            hold.c.settled_ns >= found.since_ns,
            hold.c.settled_ns < found.until_ns,
            usage.c.request_id.is_(None),
        )
        .order_by(hold.c.request_id)
    )
    for request_id in (await conn.scalars(captures)).all():
        found.differs("usage and ledger", f"{request_id} was captured and has no usage row")


def _against_engine(found: Reconciliation, record: UsageRecord, journals: Mapping[str, Usage]) -> None:
    counted = journals.get(record.request_id)
    if counted is None:
        found.num_unwitnessed += 1
        return
    usage = record.usage
    partly = record.finish_reason not in IN_FULL and usage.num_completion_tokens <= counted.num_completion_tokens
    if usage != counted and not partly:
        found.differs(
            "engine and usage",
            f"{record.request_id} ({record.finish_reason}): the engine counted {_counts(counted)}, "
            f"the usage row {_counts(usage)}",
        )


async def _engine_without_usage(conn: AsyncConnection, found: Reconciliation, journals: Mapping[str, Usage]) -> None:
    """Requests of the period, by their hold, that the engine counted and that are settled without a usage row."""
    hold, usage = tables.hold, tables.usage_record
    query = (
        select(hold.c.request_id, hold.c.state)
        .outerjoin(usage, usage.c.request_id == hold.c.request_id)
        .where(hold.c.settled_ns >= found.since_ns, hold.c.settled_ns < found.until_ns, usage.c.request_id.is_(None))
        .order_by(hold.c.request_id)
    )
    for request_id, state in (await conn.execute(query)).all():
        counted = journals.get(request_id, NOTHING)
        if counted.num_completion_tokens and state != "captured":
            found.differs(
                "engine and usage", f"{request_id} is {state} without usage; the engine counted {_counts(counted)}"
            )


async def _documents(conn: AsyncConnection, found: Reconciliation) -> None:
    for one in await list_invoices(conn, within=(found.since_ns, found.until_ns)):
        if one.state not in ("issued", "paid"):
            continue
        found.num_documents += 1
        document = await get_document(conn, one.invoice_id)
        figures = document.figures
        if digest(document.text) != document.sha256:
            found.differs("ledger and invoice", f"{figures['number']} is not the document that was issued")
        said, now = lines_of(figures), await lines_now(conn, one)
        if said != now:
            nano = tuple(sum(line.exact_nano for line in lines) for lines in (said, now))
            found.differs(
                "ledger and invoice",
                f"{figures['number']} says {nano[0]} nano-units, the ledger {nano[1]}, line by line",
            )


async def _receivables(conn: AsyncConnection, found: Reconciliation) -> None:
    """Of documents that were issued to a tenant with a credit line, by the transaction that says so, less payments."""
    account, transaction = tables.account, tables.ledger_transaction
    paid = (
        select(func.coalesce(func.sum(invoice_payment.c.amount_minor), 0))
        .where(invoice_payment.c.invoice_id == invoice.c.id)
        .correlate(invoice)
        .scalar_subquery()
    )
    query = (
        select(invoice.c.tenant_id, invoice.c.state, invoice_document.c.document, paid)
        .join(invoice_document, invoice_document.c.invoice_id == invoice.c.id)
        .join(transaction, transaction.c.id == invoice.c.id + ":issued")
        .where(invoice.c.state.in_(("issued", "paid")))
    )
    due: dict[str, int] = {}
    async with conn.stream(query) as rows:
        async for tenant_id, state, text, paid_minor in rows:
            figures = json.loads(text)
            open_minor = figures["due_minor"] - int(paid_minor)
            if state == "paid" and open_minor:
                found.differs("ledger and invoice", f"{figures['number']} is paid, {open_minor} minor units are open")
            nano = open_minor * NANO // 10 ** figures["minor_digits"]
            due[tenant_id] = due.get(tenant_id, 0) + nano
    receivable = select(account.c.tenant_id, account.c.balance_nano_usd).where(account.c.kind == "receivable")
    for tenant_id, balance_nano in (await conn.execute(receivable.order_by(account.c.tenant_id))).all():
        said = due.get(tenant_id, 0)
        if said != -balance_nano:
            what = f"{tenant_id} owes {said} nano-units by its documents, its receivable is {-balance_nano}"
            found.differs("ledger and invoice", what)


async def _export(conn: AsyncConnection, found: Reconciliation) -> None:
    tenants = await list_tenants(conn)
    rows = [row async for row in focus_rows(conn, tenants, found.since_ns, found.until_ns)]
    exported: dict[str, Decimal] = {}
    for row in csv.DictReader(io.StringIO(write_focus(rows).decode())):
        if row["x_LedgerKind"] in REVENUE_KINDS:
            exported[row["BillingAccountId"]] = exported.get(row["BillingAccountId"], Decimal()) + Decimal(
                row["BilledCost"]
            )
    gained = await _revenue(conn, found.since_ns, found.until_ns)
    for tenant_id in sorted(exported.keys() | gained.keys()):
        said, right = int(exported.get(tenant_id, Decimal()) * NANO), gained.get(tenant_id, 0)
        if said != right:
            found.differs("ledger and export", f"{tenant_id}: the export says {said}, the revenue account {right}")


async def _revenue(conn: AsyncConnection, since_ns: int, until_ns: int) -> dict[str, int]:
    """By tenant, from the entries alone."""
    transaction, entry, account = tables.ledger_transaction, tables.ledger_entry, tables.account
    query = (
        select(account.c.tenant_id, func.sum(entry.c.amount_nano_usd))
        .join(account, account.c.id == entry.c.account_id)
        .join(transaction, transaction.c.id == entry.c.transaction_id)
        .where(account.c.kind == "revenue", transaction.c.created_ns >= since_ns, transaction.c.created_ns < until_ns)
        .group_by(account.c.tenant_id)
    )
    return {tenant_id: int(nano) for tenant_id, nano in await conn.execute(query)}


def _counts(usage: Usage) -> str:
    return f"{usage.num_prompt_tokens} + {usage.num_completion_tokens} tokens, {usage.num_cached_tokens} cached"


def reconciled_entry(found: Reconciliation, now_ns: int) -> Entry:
    body: dict[str, Value] = {
        "since_ns": found.since_ns,
        "until_ns": found.until_ns,
        "num_requests": found.num_requests,
        "num_unwitnessed": found.num_unwitnessed,
        "num_differences": found.num_differences,
        "differences": found.differences[:LOGGED_MAX],
    }
    return Entry("books.reconciled", "", now_ns, body)


async def reconciled_since(conn: AsyncConnection, at_ns: int) -> bool:
    """Whether the log, or what waits for it, has a comparison from this instant on."""
    for table in (outbox, log_leaf):
        query = select(table.c.kind).where(table.c.kind == "books.reconciled", table.c.at_ns >= at_ns).limit(1)
        if await conn.scalar(query) is not None:
            return True
    return False
