"""An invoice or credit note as one document: everything that its PDF and CSV print, and nothing that can change later.

Money in it, from exact to payable:

    exact_nano       a line's part of the ledger, in nano-units: text, since it may pass 2**53
    amount_minor     the same in cents (or the currency's own smallest unit)

    net   = sum of exact_nano, rounded once to minor units, half to even (to_minor)
    lines = each rounded down, what is then missing to `net` given to those that lost most: the column adds up
    tax   = net times the rate in basis points, rounded once, half to even (tax_minor)
    total = net + tax;   due = total - what prepaid credit has covered

Canonical JSON: sorted names, no white space, UTF-8, no floats (for this RFC 8785 gives the same bytes). The same
figures give the same bytes.
"""

import hashlib
import json
from dataclasses import asdict, dataclass
from typing import Any, Final

from tenancy.invoicing.billed_lines import Line
from tenancy.invoicing.parties import Buyer, Issuer
from tenancy.money import require_int, round_half_even_div

VERSION: Final = 1
NANO: Final = 10**9
MINOR_DIGITS: Final = {"JPY": 0, "KRW": 0, "VND": 0, "BHD": 3, "KWD": 3, "OMR": 3, "TND": 3}  # ISO 4217; others 2
LINES_MAX: Final = 10_000


class TooManyLinesError(ValueError):
    """The document would have more lines than anybody reads: bill a shorter period."""


@dataclass(frozen=True, slots=True)
class Heading:
    """What a document says beside its lines. A draft has no number and no dates."""

    kind: str  # invoice or credit_note
    invoice_id: str
    number: str
    since_ns: int
    until_ns: int
    issued_ns: int
    due_ns: int
    currency: str
    corrects: str = ""  # of a credit note: its invoice's number


def minor_digits(currency: str) -> int:
    return MINOR_DIGITS.get(currency, 2)


def to_minor(exact_nano: int, currency: str) -> int:
    """Nano-units to the currency's smallest unit, half to even."""
    return round_half_even_div(exact_nano, NANO // 10 ** minor_digits(currency))


def tax_minor(net_minor: int, rate_bp: int) -> int:
    """Tax on a net amount, both in minor units, half to even."""
    return round_half_even_div(net_minor * require_int(rate_bp, "rate_bp"), 10_000)


def apportion(exact_nano: list[int], currency: str) -> list[int]:
    """Minor units for each amount, whose sum is to_minor of their sum; none is a whole unit away from its amount."""
    unit = NANO // 10 ** minor_digits(currency)
    minor = [amount // unit for amount in exact_nano]
    missing = to_minor(sum(exact_nano), currency) - sum(minor)
    by_loss = sorted(range(len(minor)), key=lambda at: (-(exact_nano[at] % unit), at))
    for at in by_loss[:missing]:
        minor[at] += 1
    return minor


def make_document(
    heading: Heading, issuer: Issuer, buyer: Buyer, lines: list[Line], prepaid_nano: int
) -> dict[str, Any]:
    """`prepaid_nano`: what paid credit has covered of the lines; it counts where the buyer's terms are prepaid.

    Raises TooManyLinesError.
    """
    if len(lines) > LINES_MAX:
        raise TooManyLinesError(f"{len(lines)} lines, at most {LINES_MAX}: bill a shorter period")
    currency = heading.currency
    exact = [line.exact_nano for line in lines]
    minor = apportion(exact, currency)
    net = sum(minor)
    tax = tax_minor(net, buyer.tax_rate_bp)
    payments = []
    if buyer.terms == "prepaid":
        payments.append({"kind": "prepaid", "exact_nano": str(prepaid_nano)})
    paid = to_minor(prepaid_nano, currency) if payments else 0
    return {
        "v": VERSION,
        "kind": heading.kind,
        "invoice_id": heading.invoice_id,
        "number": heading.number,
        "corrects": heading.corrects,
        "since_ns": str(heading.since_ns),
        "until_ns": str(heading.until_ns),
        "issued_ns": str(heading.issued_ns),
        "due_ns": str(heading.due_ns),
        "currency": currency,
        "minor_digits": minor_digits(currency),
        "issuer": asdict(issuer),
        "buyer": asdict(buyer),
        "lines": [_line(line, amount) for line, amount in zip(lines, minor, strict=True)],
        "exact_nano": str(sum(exact)),
        "net_minor": net,
        "tax_rate_bp": buyer.tax_rate_bp,
        "tax_minor": tax,
        "total_minor": net + tax,
        "payments": payments,
        "paid_minor": paid,
        "due_minor": net + tax - paid,
    }


def canonical(document: dict[str, Any]) -> str:
    return json.dumps(document, ensure_ascii=False, allow_nan=False, sort_keys=True, separators=(",", ":"))


def digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def lines_of(document: dict[str, Any]) -> list[Line]:
    """The lines as they were when the document was made."""
    read = []
    for values in document["lines"]:
        own = {name: value for name, value in values.items() if name != "amount_minor"}
        own["exact_nano"], own["unit_pico"] = int(own["exact_nano"]), int(own["unit_pico"])
        read.append(Line(**own))
    return read


def _line(line: Line, amount_minor: int) -> dict[str, Any]:
    texts = {"exact_nano": str(line.exact_nano), "unit_pico": str(line.unit_pico)}
    return asdict(line) | texts | {"amount_minor": amount_minor}
