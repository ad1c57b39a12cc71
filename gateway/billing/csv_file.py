"""A document's lines as CSV for spreadsheets: one row a line, then tax and payments; the amounts add up to what is due.

Cells that a person wrote and that a spreadsheet would take for a formula get an apostrophe in front.
"""

import csv
import io
from decimal import Decimal
from typing import Any

from gateway.billing.wording import describe, instant, unit_decimal
from tenancy.invoicing.invoice_document import NANO

COLUMNS = (
    "document",
    "number",
    "issued",
    "due",
    "period_start",
    "period_end",
    "buyer",
    "buyer_tax_id",
    "tenant_id",
    "row",
    "type",
    "description",
    "detail",
    "model",
    "tier",
    "price_id",
    "quantity",
    "unit_price",
    "amount",
    "exact_amount",
    "currency",
)
FORMULA_STARTS = ("=", "+", "-", "@", "\t", "\r")


def render_csv(document: dict[str, Any]) -> bytes:
    """UTF-8, CRLF, a header; period_end is the first instant after the period."""

    digits = document["minor_digits"]
    head = {
        "document": document["kind"],
        "number": document["number"],
        "issued": instant(document["issued_ns"]) if document["number"] else "",
        "due": instant(document["due_ns"]) if document["number"] else "",
        "period_start": instant(document["since_ns"]),
        "period_end": instant(document["until_ns"]),
        "buyer": text_cell(document["buyer"]["name"]),
        "buyer_tax_id": text_cell(document["buyer"]["tax_id"]),
        "tenant_id": document["buyer"]["tenant_id"],
        "currency": document["currency"],
    }

    def money(minor: int) -> str:
        return f"{Decimal(minor).scaleb(-digits):f}"

    rows = []
    for line in document["lines"]:
        _, description, detail = describe(line)
        rows.append(
            {
                "type": line["kind"],
                "description": text_cell(description),
                "detail": text_cell(detail),
                "model": text_cell(line["model"]),
                "tier": line["tier"],
                "price_id": line["price_id"],
                "quantity": line["quantity"] or "",
                "unit_price": f"{unit_decimal(line):f}" if line["quantity"] and line["price_id"] else "",
                "amount": money(line["amount_minor"]),
                "exact_amount": f"{Decimal(int(line['exact_nano'])) / NANO:f}",
            }
        )
    rate = f"{Decimal(document['tax_rate_bp']) / 100} %"
    rows.append({"type": "tax", "description": "Tax", "detail": rate, "amount": money(document["tax_minor"])})
    for _ in document["payments"]:
        rows.append({"type": "prepaid", "description": "Prepaid credit", "amount": money(-document["paid_minor"])})
    out = io.StringIO()
    writer = csv.DictWriter(out, COLUMNS, restval="", lineterminator="\r\n")
    writer.writeheader()
    for number, row in enumerate(rows, start=1):
        writer.writerow({**head, "row": number, **row})
    return out.getvalue().encode()


def text_cell(text: str) -> str:
    return f"'{text}" if text.startswith(FORMULA_STARTS) else text
