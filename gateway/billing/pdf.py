"""An invoice as a PDF for people: a function of its document alone, so it can be made again, byte for byte.

Typst gets only fonts that it carries and the document's own time of issue, so two machines give the same file.
"""

import json
from decimal import Decimal
from pathlib import Path
from typing import Any

from gateway.billing.wording import amount, day, describe, exact_amount, interval, quantity, unit_price
from tenancy.invoicing.periods import SECOND_NS

TEMPLATE = Path(__file__).parent / "templates" / "invoice.typ"
TITLES = {"invoice": "Invoice", "credit_note": "Credit note"}


def render_pdf(document: dict[str, Any], digest: str) -> bytes:
    """`digest`: sha256 of the stored document, printed at the foot; empty for a draft."""
    import typst  # commands that print nothing start without it

    at_ns = int(document["issued_ns"]) or int(document["until_ns"])
    pdf = typst.compile(
        str(TEMPLATE),
        root=str(TEMPLATE.parent),
        format="pdf",
        ignore_system_fonts=True,
        sys_inputs={"data": json.dumps(page_data(document, digest))},
        timestamp=at_ns // SECOND_NS,
    )
    return bytes(pdf)


def page_data(document: dict[str, Any], digest: str) -> dict[str, Any]:
    """What the template prints: text only, formatted here."""
    draft = document["number"] == ""
    credit_note = document["kind"] == "credit_note"
    due = document["due_minor"]
    facts = [["Refunds of (UTC)" if credit_note else "Period (UTC)", interval(document)]]
    if not draft:
        facts.append(["Issued", day(document["issued_ns"])])
        if not credit_note:
            facts.append(["Due", day(document["due_ns"])])
    if credit_note:
        facts.append(["Corrects", document["corrects"]])
    currency = document["currency"]
    headline = f"Amount due{'' if draft else ' by ' + day(document['due_ns'])}"
    if credit_note:
        headline = "Credited to you"
    elif due == 0:
        headline = "Nothing to pay: covered by credit"
    shown = -document["total_minor"] if credit_note else due
    return {
        "title": TITLES[document["kind"]],
        "number": document["number"] or "(draft)",
        "draft": draft,
        "digest": digest,
        "issuer": document["issuer"],
        "buyer": document["buyer"],
        "facts": facts,
        "headline": headline,
        "due": f"{currency} {amount(document, shown)}",
        "columns": ["Description", "Quantity", "Unit price", f"Amount ({currency})"],
        "sections": _sections(document),
        "totals": _totals(document),
        "to_pay": due > 0,
        "notes": _notes(document),
    }


def _sections(document: dict[str, Any]) -> list[dict[str, Any]]:
    sections: dict[str, list[list[str]]] = {}
    for line in document["lines"]:
        if line["kind"] == "rounding" and line["amount_minor"] == 0:
            continue
        title, text, detail = describe(line)
        row = [text, detail, quantity(line), unit_price(line), amount(document, line["amount_minor"])]
        sections.setdefault(title, []).append(row)
    return [{"title": title, "rows": rows} for title, rows in sections.items()]


def _totals(document: dict[str, Any]) -> list[list[str]]:
    rate = str(Decimal(document["tax_rate_bp"]) / 100)
    totals = [
        ["Net amount", amount(document, document["net_minor"]), ""],
        [f"Tax ({rate} %)", amount(document, document["tax_minor"]), ""],
        ["Total", amount(document, document["total_minor"]), "sum"],
    ]
    if document["payments"]:
        paid = document["paid_minor"]
        label = "Covered by prepaid credit" if document["kind"] == "invoice" else "Given back to prepaid credit"
        totals.append([label, amount(document, -paid), ""])
        label = "Amount due" if document["kind"] == "invoice" else "Remaining credit"
        totals.append([label, amount(document, document["due_minor"]), "sum"])
    return totals


def _notes(document: dict[str, Any]) -> list[str]:
    exact = f"{document['currency']} {exact_amount(document)}"
    notes = [
        f"Exact net amount: {exact}, rounded once, half to even. The lines are rounded so that they add up to it.",
    ]
    if document["kind"] == "credit_note":
        notes.append("It gives back what was refunded of requests that the corrected invoice billed.")
    return notes
