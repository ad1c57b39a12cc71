"""The overview as text: every figure formatted once, under one name, for the HTML and for the live updates alike.

Names are ``<tenant id>.<figure>``, ``total.<figure>``, ``<fact>.<line>``. The template writes each into an element with
that ``data-field``; admin.js writes the same names again. Nothing is formatted in the browser.
"""

import hashlib
from dataclasses import dataclass

from gateway.admin.chart import BAR_WIDTH, HEIGHT, Chart, stacked_bars
from gateway.admin.overview import NUM_MINUTES, Overview, TenantFigures
from gateway.admin.wording import count, utc
from tenancy.ledger import CURRENCY
from tenancy.money import format_nano_usd

TOTAL = "total"


@dataclass(frozen=True, slots=True)
class LimitRow:
    key: str
    label: str


@dataclass(frozen=True, slots=True)
class Row:
    tenant_id: str
    name: str
    status: str
    limits: tuple[LimitRow, ...]


@dataclass(frozen=True, slots=True)
class View:
    period: str
    currency: str
    rows: tuple[Row, ...]
    fields: dict[str, str]  # what stands where
    states: dict[str, str]  # fact -> good, warn, bad
    meters: dict[str, int]  # <tenant id>.<limit> -> percent used, 0..100
    charts: dict[str, dict[str, str]]  # <tenant id> or total -> kind -> path data
    layout: str  # changes when the rows do; the page then reloads
    chart_width: int = NUM_MINUTES * BAR_WIDTH
    chart_height: int = HEIGHT


LIMITS = (LimitRow("requests", "Requests/min"), LimitRow("tokens", "Tokens/min"), LimitRow("concurrency", "At once"))


def overview_view(overview: Overview) -> View:
    fields = {"as_of": utc(overview.at_ns), "period": overview.period.describe(overview.since_ns)}
    states: dict[str, str] = {}
    meters: dict[str, int] = {}
    charts: dict[str, dict[str, str]] = {}
    for key, fact in overview.facts.items():
        states[key] = fact.state
        fields[f"{key}.word"] = fact.word
        for line, text in fact.lines.items():
            fields[f"{key}.{line}"] = text
    for tenant in overview.tenants:
        _add_figures(fields, charts, tenant.tenant_id, tenant, subject=tenant.name)
        for limit in LIMITS:
            use = tenant.limits[limit.key]
            name = f"{tenant.tenant_id}.limit_{limit.key}"
            fields[name] = use.text()
            meters[name] = use.percent()
    _add_figures(fields, charts, TOTAL, overview.total, subject="All tenants")
    rows = tuple(
        Row(t.tenant_id, t.name, t.status, tuple(LimitRow(f"limit_{limit.key}", limit.label) for limit in LIMITS))
        for t in overview.tenants
    )
    return View(
        period=overview.period.name,
        currency=CURRENCY,
        rows=rows,
        fields=fields,
        states=states,
        meters=meters,
        charts=charts,
        layout=_layout(rows),
    )


def _add_figures(
    fields: dict[str, str], charts: dict[str, dict[str, str]], key: str, figures: TenantFigures, *, subject: str
) -> None:
    chart: Chart = stacked_bars(figures.minutes, subject=subject)
    charts[key] = dict(chart.paths)
    fields |= {
        f"{key}.requests": count(figures.num_requests),
        f"{key}.prompt": count(figures.num_prompt_tokens),
        f"{key}.cached": count(figures.num_cached_tokens),
        f"{key}.completion": count(figures.num_completion_tokens),
        f"{key}.billed": format_nano_usd(figures.billed_nano_usd),
        f"{key}.held": format_nano_usd(figures.held_nano_usd),
        f"{key}.credit": format_nano_usd(figures.credit_nano_usd),
        f"{key}.blocks": count(figures.num_blocks),
        f"{key}.chart": chart.title,
    }


def _layout(rows: tuple[Row, ...]) -> str:
    text = "\0".join(f"{row.tenant_id}\0{row.name}\0{row.status}" for row in rows)
    return hashlib.sha256(text.encode()).hexdigest()[:16]
