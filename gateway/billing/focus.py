"""What tenants were charged as a FOCUS 1.2 CSV (FinOps Open Cost and Usage Specification), straight from the ledger.

A row is a day (or the part of it that one invoice bills), a project, a price step and a kind of token. Costs are exact
decimals: the rows of a tenant and a day add up to what its revenue account gained, to the nano-unit.

    Usage        captures; ListCost = ContractedCost = unit price times quantity, BilledCost is what was charged
    Adjustment   what rounding each request once makes of their sum; corrections by hand (x_LedgerKind tells)
    Credit       refunds (Correction, where they give back of an earlier month), and what promotional credit covered

Own columns begin with x_. Columns of what is not sold here (commitments, capacity, zones, resources) are empty.
Quantities have a decimal point, since readers infer a column's type from its text.
"""

import csv
import io
import json
from collections.abc import AsyncIterator
from dataclasses import dataclass
from decimal import Decimal
from itertools import pairwise
from typing import Final

from sqlalchemy.ext.asyncio import AsyncConnection

from gateway.billing.csv_file import text_cell
from gateway.billing.wording import PICO, TOKENS, instant
from tenancy.access.directory import Tenant, list_projects
from tenancy.accounts.posting import currency_of
from tenancy.invoicing import billed_lines
from tenancy.invoicing.billed_lines import Line
from tenancy.invoicing.invoice_document import NANO
from tenancy.invoicing.invoices import Invoice, get_document, list_invoices
from tenancy.invoicing.parties import PartyError, get_buyer, get_issuer
from tenancy.invoicing.periods import DAY_NS, period_end_ns, period_start_ns

COLUMNS: Final = (
    "AvailabilityZone",
    "BilledCost",
    "BillingAccountId",
    "BillingAccountName",
    "BillingAccountType",
    "BillingCurrency",
    "BillingPeriodEnd",
    "BillingPeriodStart",
    "CapacityReservationId",
    "CapacityReservationStatus",
    "ChargeCategory",
    "ChargeClass",
    "ChargeDescription",
    "ChargeFrequency",
    "ChargePeriodEnd",
    "ChargePeriodStart",
    "CommitmentDiscountCategory",
    "CommitmentDiscountId",
    "CommitmentDiscountName",
    "CommitmentDiscountQuantity",
    "CommitmentDiscountStatus",
    "CommitmentDiscountType",
    "CommitmentDiscountUnit",
    "ConsumedQuantity",
    "ConsumedUnit",
    "ContractedCost",
    "ContractedUnitPrice",
    "EffectiveCost",
    "InvoiceId",
    "InvoiceIssuerName",
    "ListCost",
    "ListUnitPrice",
    "PricingCategory",
    "PricingCurrency",
    "PricingCurrencyContractedUnitPrice",
    "PricingCurrencyEffectiveCost",
    "PricingCurrencyListUnitPrice",
    "PricingQuantity",
    "PricingUnit",
    "ProviderName",
    "PublisherName",
    "RegionId",
    "RegionName",
    "ResourceId",
    "ResourceName",
    "ResourceType",
    "ServiceCategory",
    "ServiceName",
    "ServiceSubcategory",
    "SkuId",
    "SkuMeter",
    "SkuPriceDetails",
    "SkuPriceId",
    "SubAccountId",
    "SubAccountName",
    "SubAccountType",
    "Tags",
    "x_LedgerKind",
)
REVENUE_KINDS: Final = frozenset({*TOKENS, "request", "rounding", "unexplained", "refund"})  # x_LedgerKind
NO_ISSUER: Final = "Bulkhead"
Row = dict[str, str]


@dataclass(frozen=True, slots=True)
class _Account:
    """What all rows of one tenant share."""

    tenant: Tenant
    issuer: str
    currency: str
    projects: dict[str, str]  # id -> name


def write_focus(rows: list[Row]) -> bytes:
    """UTF-8, a header, empty for null."""
    out = io.StringIO()
    writer = csv.DictWriter(out, COLUMNS, restval="", lineterminator="\r\n")
    writer.writeheader()
    writer.writerows(rows)
    return out.getvalue().encode()


async def focus_rows(conn: AsyncConnection, tenants: list[Tenant], since_ns: int, until_ns: int) -> AsyncIterator[Row]:
    """Rows of [since_ns, until_ns), tenant by tenant and day by day; days without charges have none."""
    for tenant in tenants:
        account = await _account(conn, tenant)
        begin = max(since_ns, period_start_ns("day", tenant.created_ns))
        issued = [
            one
            for one in await list_invoices(conn, tenant.tenant_id, within=(begin, until_ns))
            if one.kind == "invoice" and one.state in ("issued", "paid")
        ]
        numbers = {one.invoice_id: (await get_document(conn, one.invoice_id)).figures["number"] for one in issued}
        for start, end in _windows(begin, until_ns, issued):
            number = next((numbers[o.invoice_id] for o in issued if o.since_ns <= start and end <= o.until_ns), "")
            for line, correction in await _lines(conn, tenant.tenant_id, start, end):
                yield _row(account, line, start, end, number, correction)


def _windows(since_ns: int, until_ns: int, invoices: list[Invoice]) -> list[tuple[int, int]]:
    """Days, cut where an invoice begins or ends: half-open, in order, without gaps."""
    days = range(period_start_ns("day", since_ns) + DAY_NS, until_ns, DAY_NS)
    bounds = {at for one in invoices for at in (one.since_ns, one.until_ns)}
    cuts = [since_ns, *sorted({*days, *(at for at in bounds if since_ns < at < until_ns)}), until_ns]
    return [(start, end) for start, end in pairwise(cuts) if start < end]


async def _lines(conn: AsyncConnection, tenant_id: str, start: int, end: int) -> list[tuple[Line, bool]]:
    """With each line whether it corrects an earlier billing period."""
    usage = await billed_lines.usage_lines(conn, tenant_id, start, end, by_project=True)
    other = await billed_lines.other_lines(conn, tenant_id, start, end)
    month_ns = period_start_ns("month", start)
    window = (start, end)
    same_month = await billed_lines.refund_lines(conn, tenant_id, (month_ns, end), window)
    earlier = await billed_lines.refund_lines(conn, tenant_id, (0, month_ns), window)
    kept = [line for line in other if line.kind != "refund"]
    return [*((line, False) for line in (*usage, *kept, *same_month)), *((line, True) for line in earlier)]


def _row(account: _Account, line: Line, start: int, end: int, number: str, correction: bool) -> Row:
    tenant, kind = account.tenant, line.kind
    cost = _decimal(Decimal(line.exact_nano) / NANO)
    month_ns = period_start_ns("month", start)
    row = {
        "BilledCost": cost,
        "EffectiveCost": cost,
        "ContractedCost": cost,
        "ListCost": cost,
        "BillingAccountId": tenant.tenant_id,
        "BillingAccountName": text_cell(tenant.name),
        "BillingAccountType": "Tenant",
        "BillingCurrency": account.currency,
        "BillingPeriodStart": instant(month_ns),
        "BillingPeriodEnd": instant(period_end_ns("month", start) or 0),
        "ChargePeriodStart": instant(start),
        "ChargePeriodEnd": instant(end),
        "ChargeClass": "Correction" if correction else "",
        "InvoiceId": number if kind != "refund" or not correction else "",
        "InvoiceIssuerName": account.issuer,
        "ProviderName": account.issuer,
        "PublisherName": account.issuer,
        "PricingCurrency": account.currency,
        "PricingCurrencyEffectiveCost": cost,
        "ServiceCategory": "AI and Machine Learning",
        "ServiceSubcategory": "Generative AI",
        "ServiceName": "Bulkhead inference",
        "Tags": "{}",
        "x_LedgerKind": kind,
    }
    if line.project_id:
        row["SubAccountId"] = line.project_id
        row["SubAccountName"] = text_cell(account.projects.get(line.project_id, line.project_id))
        row["SubAccountType"] = "Project"
    if kind not in (*TOKENS, "request"):
        row["ChargeCategory"] = "Credit" if kind in ("refund", "promotional") else "Adjustment"
        row["ChargeFrequency"] = "One-Time"
        row["ChargeDescription"] = text_cell(line.note or f"{kind} of the period")
        return row
    unit_price = Decimal(line.unit_pico * line.percent) / 100 / PICO
    listed = _decimal(unit_price * line.quantity)
    meter = TOKENS.get(kind, "Requests")
    unit = "Tokens" if kind in TOKENS else "Requests"
    details = {"x_Tier": line.tier, "x_Percent": line.percent, "x_VolumeStep": line.step + 1}
    row |= {
        "ChargeCategory": "Usage",
        "ChargeFrequency": "Usage-Based",
        "ChargeDescription": text_cell(f"{meter} of {line.model}, {line.tier} tier"),
        "ListCost": listed,
        "ContractedCost": listed,
        "ConsumedQuantity": f"{line.quantity}.0",
        "ConsumedUnit": unit,
        "PricingQuantity": f"{line.quantity}.0",
        "PricingUnit": unit,
        "PricingCategory": "Standard",
        "SkuId": f"{line.model}/{line.tier}/{kind}",
        "SkuMeter": meter,
        "SkuPriceId": f"{line.price_id}/{line.tier}/{kind}/{line.step}",
        "SkuPriceDetails": json.dumps(details, sort_keys=True),
    }
    for name in ("ListUnitPrice", "ContractedUnitPrice", "PricingCurrencyListUnitPrice"):
        row[name] = _decimal(unit_price)
    row["PricingCurrencyContractedUnitPrice"] = _decimal(unit_price)
    return row


async def _account(conn: AsyncConnection, tenant: Tenant) -> _Account:
    try:
        issuer = (await get_issuer(conn, (await get_buyer(conn, tenant.tenant_id)).issuer_id)).name
    except PartyError:
        issuer = NO_ISSUER
    projects = {one.project_id: one.name for one in await list_projects(conn, tenant.tenant_id)}
    return _Account(tenant, issuer, await currency_of(conn, tenant.tenant_id), projects)


def _decimal(value: Decimal) -> str:
    """Plain digits, never an exponent: 0.00000015."""
    text = f"{value:f}"
    return text.rstrip("0").rstrip(".") if "." in text else text
