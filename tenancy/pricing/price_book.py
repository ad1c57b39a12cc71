"""The price book: immutable rows, each in force from its date until the next row of the same model, tier and currency.

    draft -> scheduled -> active -> ended           a draft is no row yet: it can be discarded, and charges nobody
             [from, until)                          until = the next row's from: intervals cannot overlap
             scheduled -> withdrawn                 it was never in force; another may begin at the same instant

    price_at(model, tier, t) = of the tier's rows the one with the largest effective_from_ns <= t, or, where the tier
                               has none by then, the default tier's, at the percent that it states

The price in force when a request starts is pinned to it and its id is stamped on the hold and the usage row, so a
later price never changes an earlier charge. A row is never changed: that it was withdrawn is a row of its own, written
WITHDRAW_NS before it would be in force at the latest. That is longer than replicas' clocks are apart and than any
transaction, so no request has been admitted at it.
"""

import json
from dataclasses import asdict, dataclass, replace
from itertools import zip_longest
from typing import Any, Final, Literal

from sqlalchemy import ColumnElement, ScalarSelect, Select, case, exists, func, insert, select, update
from sqlalchemy.ext.asyncio import AsyncConnection

from tenancy import tables
from tenancy.ids import Entropy, new_id
from tenancy.invoicing.periods import SECOND_NS
from tenancy.money import require_int
from tenancy.pricing import price_tables
from tenancy.pricing.prices import DEFAULT_TIER, Price, PriceConflictError, PriceError, PriceMissingError, Step

PriceState = Literal["scheduled", "active", "ended", "withdrawn"]
DRAFTS_MAX: Final = 1_000
WITHDRAW_NS: Final = 300 * SECOND_NS


@dataclass(frozen=True, slots=True)
class PriceTerms:
    """All of a price but its id and date; the units are Price's."""

    model: str
    input_pico_usd: int
    cached_input_pico_usd: int
    output_pico_usd: int
    request_nano_usd: int = 0
    tier: str = DEFAULT_TIER
    currency: str = "USD"
    flex_percent: int = 100
    batch_percent: int = 100
    priority_percent: int = 100
    steps: tuple[Step, ...] = ()

    def __post_init__(self) -> None:
        self.price("draft", 0)  # checks every figure

    def price(self, price_id: str, effective_from_ns: int) -> Price:
        values = {name: getattr(self, name) for name in self.__slots__}
        return Price(price_id=price_id, effective_from_ns=effective_from_ns, **values)

    @classmethod
    def of(cls, price: Price) -> "PriceTerms":
        return cls(**{name: getattr(price, name) for name in cls.__slots__})

    def text(self) -> str:
        return json.dumps(asdict(self), sort_keys=True)

    @classmethod
    def read(cls, text: str) -> "PriceTerms":
        values = json.loads(text)
        values["steps"] = tuple(Step(**step) for step in values["steps"])
        return cls(**values)


@dataclass(frozen=True, slots=True)
class Draft:
    draft_id: str
    terms: PriceTerms
    created_ns: int


@dataclass(frozen=True, slots=True)
class BookEntry:
    price: Price
    state: PriceState
    until_ns: int | None  # the first instant at which it is not in force any more; None: no successor yet


async def add_price(
    conn: AsyncConnection,
    *,
    model: str,
    input_pico_usd: int,
    cached_input_pico_usd: int,
    output_pico_usd: int,
    request_nano_usd: int = 0,
    effective_from_ns: int,
    entropy: Entropy,
    now_ns: int,
    **more: Any,
) -> Price:
    """schedule() with the terms' fields one by one."""
    terms = PriceTerms(model, input_pico_usd, cached_input_pico_usd, output_pico_usd, request_nano_usd, **more)
    return await schedule(conn, terms, effective_from_ns=effective_from_ns, entropy=entropy, now_ns=now_ns)


async def schedule(
    conn: AsyncConnection, terms: PriceTerms, *, effective_from_ns: int, entropy: Entropy, now_ns: int
) -> Price:
    """Append a price. The same terms for the same date again return the row that is there.

    Raises PriceConflictError for other figures at a date that is taken, and for a date in the past once the model
    has a price: either would change what an earlier `price_at` answered.
    """
    made = terms.price(new_id("price", entropy), effective_from_ns)
    book = await list_prices(conn, terms.model)
    for price in book:
        if (price.tier, price.currency, price.effective_from_ns) == (made.tier, made.currency, effective_from_ns):
            if PriceTerms.of(price) != terms:
                raise PriceConflictError(
                    f"{terms.model} already has another price from {effective_from_ns} ({price.price_id})"
                )
            return price
    if book and effective_from_ns < now_ns:
        raise PriceConflictError(
            f"a price of {terms.model} cannot begin in the past: {effective_from_ns} is before {now_ns}"
        )
    values = {name: getattr(made, name) for name in _COLUMNS if name != "price_id"}
    values |= {"id": made.price_id, "created_ns": now_ns, "attempt": await _num_withdrawn(conn, made)}
    await conn.execute(insert(tables.price).values(values))
    if terms.steps:
        rows = [{"price_id": made.price_id, **asdict(step)} for step in terms.steps]
        await conn.execute(insert(price_tables.price_step), rows)
    return made


async def withdraw(conn: AsyncConnection, price_id: str, *, now_ns: int) -> tuple[Price, bool]:
    """Take a scheduled price back before it is in force; False for a repeat. What was in force before it goes on.

    Raises PriceMissingError, or PriceConflictError where it is, or is about to be, in force.
    """
    price = await get_price(conn, price_id)
    table = price_tables.price_withdrawal
    if await conn.scalar(select(table.c.price_id).where(table.c.price_id == price_id)) is not None:
        return price, False
    if price.effective_from_ns < require_int(now_ns, "now_ns") + WITHDRAW_NS:
        raise PriceConflictError(
            f"{price_id} is in force from {price.effective_from_ns}, it is {now_ns}: a price can be withdrawn until "
            f"{WITHDRAW_NS // SECOND_NS} seconds before; schedule another instead"
        )
    await conn.execute(insert(table).values(price_id=price_id, withdrawn_ns=now_ns))
    return price, True


async def price_at(
    conn: AsyncConnection, model: str, at_ns: int, tier: str = DEFAULT_TIER, *, tenant_id: str = ""
) -> Price:
    """What a request of `tier` that starts at `at_ns` costs: charge with the row and that tier.

    With a tenant only prices in the currency of its account count, without one only those in USD.
    Raises PriceMissingError.
    """
    table = tables.price
    row = (
        await conn.execute(
            _PRICES.where(
                table.c.model == model,
                table.c.tier.in_((tier, DEFAULT_TIER)),
                table.c.effective_from_ns <= at_ns,
                table.c.currency == (_currency_of(tenant_id) if tenant_id else "USD"),
                _STANDS,
            )
            .order_by(case((table.c.tier == tier, 0), else_=1), table.c.effective_from_ns.desc())
            .limit(1)
        )
    ).first()
    if row is None:
        raise PriceMissingError(f"no price of {model!r} is in force at {at_ns}: add one")
    return (await _with_steps(conn, [row]))[0]


async def get_price(conn: AsyncConnection, price_id: str) -> Price:
    """A pinned price, by the id that a hold or usage row carries. Raises PriceMissingError."""
    row = (await conn.execute(_PRICES.where(tables.price.c.id == price_id))).first()
    if row is None:
        raise PriceMissingError(f"there is no price {price_id!r}")
    return (await _with_steps(conn, [row]))[0]


async def list_prices(conn: AsyncConnection, model: str | None = None) -> list[Price]:
    """The price book, or one model's part of it, by model, tier, currency and date; without what was withdrawn."""
    return await _list(conn, model, _STANDS)


async def list_book(conn: AsyncConnection, now_ns: int, model: str | None = None) -> list[BookEntry]:
    """The same with each row's interval and what it is at `now_ns`; those that were withdrawn are the last."""
    prices = await list_prices(conn, model)
    entries = []
    for price, following in zip_longest(prices, prices[1:]):
        same = following is not None and _line(following) == _line(price)
        until_ns = following.effective_from_ns if same and following is not None else None
        state: PriceState = "active"
        if now_ns < price.effective_from_ns:
            state = "scheduled"
        elif until_ns is not None and until_ns <= now_ns:
            state = "ended"
        entries.append(BookEntry(price, state, until_ns))
    gone = await _list(conn, model, ~_STANDS)
    return [*entries, *(BookEntry(price, "withdrawn", price.effective_from_ns) for price in gone)]


async def add_draft(conn: AsyncConnection, terms: PriceTerms, *, entropy: Entropy, now_ns: int) -> Draft:
    """Raises PriceError where there are too many drafts."""
    if len(await list_drafts(conn)) >= DRAFTS_MAX:
        raise PriceError(f"there are {DRAFTS_MAX} drafts: schedule or discard some")
    draft = Draft(new_id("draft", entropy), terms, now_ns)
    await conn.execute(
        insert(_DRAFT).values(
            id=draft.draft_id, model=terms.model, tier=terms.tier, terms=terms.text(), created_ns=now_ns
        )
    )
    return draft


async def list_drafts(conn: AsyncConnection) -> list[Draft]:
    """Those that are neither scheduled nor discarded, oldest first."""
    rows = await conn.execute(_DRAFTS.where(_DRAFT.c.ended_ns.is_(None)).order_by(_DRAFT.c.created_ns, _DRAFT.c.id))
    return [Draft(row.id, PriceTerms.read(row.terms), row.created_ns) for row in rows]


async def schedule_draft(
    conn: AsyncConnection, draft_id: str, *, effective_from_ns: int, entropy: Entropy, now_ns: int
) -> Price:
    """Raises PriceError where it is no draft any more, PriceConflictError as schedule() does."""
    terms = await _end_draft(conn, draft_id, now_ns)
    price = await schedule(conn, terms, effective_from_ns=effective_from_ns, entropy=entropy, now_ns=now_ns)
    await conn.execute(update(_DRAFT).where(_DRAFT.c.id == draft_id).values(price_id=price.price_id))
    return price


async def discard_draft(conn: AsyncConnection, draft_id: str, *, now_ns: int) -> PriceTerms:
    """Raises PriceError where it is no draft any more."""
    return await _end_draft(conn, draft_id, now_ns)


async def _end_draft(conn: AsyncConnection, draft_id: str, now_ns: int) -> PriceTerms:
    # The conditional UPDATE decides between two that end it at once.
    open_draft = (_DRAFT.c.id == draft_id) & _DRAFT.c.ended_ns.is_(None)
    ended = await conn.execute(update(_DRAFT).where(open_draft).values(ended_ns=require_int(now_ns, "now_ns")))
    if ended.rowcount == 0:
        raise PriceError(f"there is no draft {draft_id!r}, or it was scheduled or discarded; see: bulkhead price list")
    text = await conn.scalar(select(_DRAFT.c.terms).where(_DRAFT.c.id == draft_id))
    return PriceTerms.read(text or "")


async def _list(conn: AsyncConnection, model: str | None, which: ColumnElement[bool]) -> list[Price]:
    table = tables.price
    order = (table.c.model, table.c.tier, table.c.currency, table.c.effective_from_ns, table.c.attempt)
    query = _PRICES.where(which).order_by(*order)
    rows = await conn.execute(query if model is None else query.where(table.c.model == model))
    return await _with_steps(conn, list(rows))


async def _num_withdrawn(conn: AsyncConnection, price: Price) -> int:
    """How many prices for the same instant were withdrawn. Of two that schedule at once the index refuses one."""
    table = tables.price
    same = tuple(table.c[name] == getattr(price, name) for name in ("model", "tier", "currency", "effective_from_ns"))
    return await conn.scalar(select(func.count()).select_from(table).where(*same, ~_STANDS)) or 0


async def _with_steps(conn: AsyncConnection, rows: list[Any]) -> list[Price]:
    """One more query, and only where a row says that it has steps."""
    table = price_tables.price_step
    stepped = [row.id for row in rows if row.has_steps]
    steps: dict[str, list[Step]] = {}
    if stepped:
        query = select(table).where(table.c.price_id.in_(stepped)).order_by(table.c.price_id, table.c.from_tokens)
        for price_id, *figures in await conn.execute(query):
            steps.setdefault(price_id, []).append(Step(*figures))
    return [replace(Price(*row[:-1]), steps=tuple(steps.get(row.id, ()))) for row in rows]


def _currency_of(tenant_id: str) -> ScalarSelect[str]:
    table = tables.account
    return select(table.c.currency).where(table.c.tenant_id == tenant_id, table.c.kind == "credit").scalar_subquery()


def _line(price: Price) -> tuple[str, str, str]:
    return price.model, price.tier, price.currency


_DRAFT: Final = price_tables.price_draft
_DRAFTS: Final = select(_DRAFT.c.id, _DRAFT.c.terms, _DRAFT.c.created_ns)
_COLUMNS: Final = tuple(name for name in Price.__slots__ if name != "steps")
_STANDS: Final = ~exists().where(price_tables.price_withdrawal.c.price_id == tables.price.c.id)
_PRICES: Final[Select[Any]] = select(
    *(tables.price.c[name.removeprefix("price_") if name == "price_id" else name] for name in _COLUMNS),
    select(price_tables.price_step.c.price_id)
    .where(price_tables.price_step.c.price_id == tables.price.c.id)
    .exists()
    .label("has_steps"),
)
