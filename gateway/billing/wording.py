"""How a document's figures read: exact, the same in the PDF and in tables."""

from datetime import UTC, datetime
from decimal import Decimal
from typing import Any

from tenancy.invoicing.invoice_document import NANO
from tenancy.invoicing.periods import SECOND_NS

PICO = 10**12
TOKENS = {"input": "Input tokens", "cached_input": "Cached input tokens", "output": "Output tokens"}


def day(at_ns: str | int) -> str:
    return datetime.fromtimestamp(int(at_ns) // SECOND_NS, UTC).strftime("%-d %B %Y")


def instant(at_ns: str | int) -> str:
    return datetime.fromtimestamp(int(at_ns) // SECOND_NS, UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


def interval(document: dict[str, Any]) -> str:
    """Whole days read as days, the last one included; anything else as instants, the end excluded."""
    since, until = (datetime.fromtimestamp(int(document[name]) // SECOND_NS, UTC) for name in ("since_ns", "until_ns"))
    if (since.hour, since.minute, since.second, until.hour, until.minute, until.second) == (0,) * 6:
        last = datetime.fromtimestamp(int(document["until_ns"]) // SECOND_NS - 1, UTC)
        return f"{since:%-d %b %Y} – {last:%-d %b %Y}"
    return f"{since:%-d %b %Y %H:%M} – {until:%-d %b %Y %H:%M}"


def amount(document: dict[str, Any], minor: int) -> str:
    """Minor units with all their digits: 1,234.56, and a real minus sign."""
    digits = document["minor_digits"]
    text = f"{Decimal(abs(minor)).scaleb(-digits):,.{digits}f}"
    return f"−{text}" if minor < 0 else text


def exact_amount(document: dict[str, Any]) -> str:
    nano = int(document["exact_nano"])
    whole, rest = divmod(abs(nano), NANO)
    decimals = f"{rest:09d}".rstrip("0").ljust(2, "0")
    return f"{'−' if nano < 0 else ''}{whole:,}.{decimals}"


def plain(value: Decimal) -> str:
    """No exponent, no trailing zeros, two decimals at least."""
    whole, _, decimals = f"{value:f}".partition(".")
    return f"{int(whole):,}.{decimals.rstrip('0').ljust(2, '0')}"


def unit_decimal(line: dict[str, Any]) -> Decimal:
    """What one unit costs: a token, or a request."""
    return Decimal(int(line["unit_pico"]) * line["percent"]) / 100 / PICO


def unit_price(line: dict[str, Any]) -> str:
    if line["kind"] in TOKENS:
        return plain(unit_decimal(line) * 10**6) + " / 1M"
    return plain(unit_decimal(line)) if line["kind"] == "request" else ""


def quantity(line: dict[str, Any]) -> str:
    return f"{line['quantity']:,}" if line["kind"] in (*TOKENS, "request") else ""


def describe(line: dict[str, Any]) -> tuple[str, str, str]:
    """(section, description, detail) of a document's line."""
    kind, note = line["kind"], line["note"]
    tier = "" if line["tier"] in ("", "default") else f", {line['tier']} tier"
    section = f"{line['model']}{tier}"
    detail = []
    if line["percent"] != 100:
        detail.append(f"{line['percent']} % of the default tier's price")
    if line["step"]:
        detail.append(f"volume step {line['step'] + 1}")
    if kind in TOKENS:
        return section, TOKENS[kind], ", ".join(detail)
    if kind == "request":
        return section, "Requests", ", ".join(detail)
    if kind == "refund":
        return "Credits and adjustments", f"Refund: {section}", note
    titles = {
        "promotional": "Covered by promotional credit",
        "adjustment": "Adjustment",
        "rounding": "Rounding of single requests",
        "unexplained": "Requests without a usage row",
    }
    return "Credits and adjustments", titles[kind], note
