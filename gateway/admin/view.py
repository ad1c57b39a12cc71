"""The overview as text: every figure formatted once, under one name, for the HTML and for the live updates alike.

Names are ``<tenant id>.<figure>``, ``total.<figure>``, ``<fact>.<line>``. The template writes each into an element with
that ``data-field``; admin.js writes the same names again. Nothing is formatted in the browser.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

from gateway.admin.chart import BAR_WIDTH, HEIGHT, Chart, stacked_bars
from gateway.admin.overview import NUM_MINUTES, Money, Overview, TenantFigures
from gateway.admin.wording import count, in_column, utc

TOTAL = "total"


@dataclass(frozen=True, slots=True)
class LimitRow:
    key: str
    label: str
    is_limited: bool


@dataclass(frozen=True, slots=True)
class Row:
    tenant_id: str
    name: str
    status: str
    limits: tuple[LimitRow, ...]


@dataclass(frozen=True, slots=True)
class View:
    period: str
    currencies: tuple[str, ...]  # of the tenants, each once
    rows: tuple[Row, ...]
    fields: dict[str, str]  # what stands where
    states: dict[str, str]  # fact -> good, warn, bad
    meters: dict[str, int]  # <tenant id>.<limit> -> percent used, 0..100
    charts: dict[str, dict[str, str]]  # <tenant id> or total -> kind -> path data
    layout: str  # changes when the rows do; the page then reloads
    chart_width: int = NUM_MINUTES * BAR_WIDTH
    chart_height: int = HEIGHT


LIMITS = {"requests": "Requests/min", "tokens": "Tokens/min", "concurrency": "At once"}


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
    rows: list[Row] = []
    for tenant in overview.tenants:
        _add_figures(fields, charts, tenant.tenant_id, tenant, subject=tenant.name)
        limits = []
        for kind, label in LIMITS.items():
            use = tenant.limits[kind]
            key = f"{tenant.tenant_id}.limit_{kind}"
            fields[key] = use.text()
            if use.maximum is not None:
                meters[key] = use.percent()
            limits.append(LimitRow(key, label, use.maximum is not None))
        rows.append(Row(tenant.tenant_id, tenant.name, tenant.status, tuple(limits)))
    _add_figures(fields, charts, TOTAL, overview.total, subject="All tenants")
    return View(
        period=overview.period.name,
        currencies=tuple(overview.total.money),
        rows=tuple(rows),
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
        **{
            f"{key}.{name}": "\n".join(in_column(getattr(money, name), of) for of, money in figures.money.items())
            for name in Money.__slots__
        },
        f"{key}.blocks": count(figures.num_blocks),
        f"{key}.chart": chart.title,
    }


def _layout(rows: Sequence[Row]) -> str:
    """A digest of everything on the page that the live updates do not write."""
    return hashlib.sha256(repr(rows).encode("utf-8", "surrogatepass")).hexdigest()[:16]
