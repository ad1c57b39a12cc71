"""The price book: immutable rows, each in force from its date until the next row of the same model begins.

    price_at(model, t) = the row with the largest effective_from_ns <= t          (half-open: [from, next from))

The price in force when a request starts is pinned to it and its id is stamped on the hold and the usage row, so a
later price never changes an earlier charge. A charge is summed exactly in pico-USD and rounded once.
"""

from dataclasses import dataclass
from typing import Final

from sqlalchemy import insert, select
from sqlalchemy.ext.asyncio import AsyncConnection

from tenancy import tables
from tenancy.ids import Entropy, new_id
from tenancy.meter import Usage
from tenancy.money import PICO_PER_NANO, pico_to_nano, require_amount, require_int

PRICE_MAX: Final = 10**12  # one USD a token (or 1000 USD a request): far above any price, far below overflow


class PriceMissingError(LookupError):
    """No price of the model is in force at that time: the request cannot be billed, so it is not served."""


class PriceConflictError(ValueError):
    """The new row would change a price that is, or was, already in force."""


@dataclass(frozen=True, slots=True)
class Price:
    """pico-USD per token, nano-USD per request, ns since the epoch."""

    price_id: str
    model: str
    input_pico_usd: int
    cached_input_pico_usd: int
    output_pico_usd: int
    request_nano_usd: int
    effective_from_ns: int

    def __post_init__(self) -> None:
        for name in ("input_pico_usd", "cached_input_pico_usd", "output_pico_usd", "request_nano_usd"):
            if require_amount(getattr(self, name), name) > PRICE_MAX:
                raise ValueError(f"{name} must be at most {PRICE_MAX}: {getattr(self, name)}")
        require_int(self.effective_from_ns, "effective_from_ns")


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
) -> Price:
    """Append a price. The same figures for the same model and date again return the row that is there.

    Raises PriceConflictError for other figures at a date that is taken, and for a date in the past once the model
    has a price: either would change what an earlier `price_at` answered.
    """
    made = Price(
        new_id("price", entropy),
        model,
        input_pico_usd,
        cached_input_pico_usd,
        output_pico_usd,
        request_nano_usd,
        effective_from_ns,
    )
    book = await list_prices(conn, model)
    for price in book:
        if price.effective_from_ns == effective_from_ns:
            if _figures(price) != _figures(made):
                raise PriceConflictError(
                    f"{model} already has another price from {effective_from_ns} ({price.price_id})"
                )
            return price
    if book and effective_from_ns < now_ns:
        raise PriceConflictError(f"a price of {model} cannot begin in the past: {effective_from_ns} is before {now_ns}")
    await conn.execute(
        insert(tables.price).values(
            id=made.price_id,
            model=model,
            input_pico_usd=input_pico_usd,
            cached_input_pico_usd=cached_input_pico_usd,
            output_pico_usd=output_pico_usd,
            request_nano_usd=request_nano_usd,
            effective_from_ns=effective_from_ns,
            created_ns=now_ns,
        )
    )
    return made


async def price_at(conn: AsyncConnection, model: str, at_ns: int) -> Price:
    """The price of `model` in force at `at_ns`. Raises PriceMissingError."""
    table = tables.price
    row = (
        await conn.execute(
            _PRICES.where(table.c.model == model, table.c.effective_from_ns <= at_ns)
            .order_by(table.c.effective_from_ns.desc())
            .limit(1)
        )
    ).first()
    if row is None:
        raise PriceMissingError(f"no price of {model!r} is in force at {at_ns}: add one")
    return Price(*row)


async def get_price(conn: AsyncConnection, price_id: str) -> Price:
    """A pinned price, by the id that a hold or usage row carries. Raises PriceMissingError."""
    row = (await conn.execute(_PRICES.where(tables.price.c.id == price_id))).first()
    if row is None:
        raise PriceMissingError(f"there is no price {price_id!r}")
    return Price(*row)


async def list_prices(conn: AsyncConnection, model: str | None = None) -> list[Price]:
    """The price book, or one model's part of it, by model and date."""
    table = tables.price
    query = _PRICES.order_by(table.c.model, table.c.effective_from_ns)
    return [Price(*row) for row in await conn.execute(query if model is None else query.where(table.c.model == model))]


def charge_nano_usd(price: Price, usage: Usage) -> int:
    """What a request costs, in nano-USD, rounded once."""
    num_uncached_tokens = usage.num_prompt_tokens - usage.num_cached_tokens
    return pico_to_nano(
        num_uncached_tokens * price.input_pico_usd
        + usage.num_cached_tokens * price.cached_input_pico_usd
        + usage.num_completion_tokens * price.output_pico_usd
        + price.request_nano_usd * PICO_PER_NANO
    )


def worst_case_nano_usd(price: Price, num_prompt_tokens: int, max_tokens: int) -> int:
    """What a request can cost at most, in nano-USD: never below the charge of any usage within its two bounds.

    That holds because every factor is at its largest and rounding keeps order.
    """
    require_amount(num_prompt_tokens, "num_prompt_tokens")
    require_amount(max_tokens, "max_tokens")
    return pico_to_nano(
        num_prompt_tokens * max(price.input_pico_usd, price.cached_input_pico_usd)
        + max_tokens * price.output_pico_usd
        + price.request_nano_usd * PICO_PER_NANO
    )


def affordable_tokens(price: Price, num_prompt_tokens: int, max_tokens: int, available_nano_usd: int) -> int:
    """The largest number of completion tokens, at most `max_tokens`, whose worst case the money covers; 0 for none.

    Found by halving, with the hold's own function, so that what is afforded here is never refused by rounding there.
    """
    low, high = 0, max_tokens  # [low, high]: low tokens are affordable or low is 0
    while low < high:
        middle = (low + high + 1) // 2
        if worst_case_nano_usd(price, num_prompt_tokens, middle) <= available_nano_usd:
            low = middle
        else:
            high = middle - 1
    return low


def _figures(price: Price) -> tuple[int, int, int, int]:
    return price.input_pico_usd, price.cached_input_pico_usd, price.output_pico_usd, price.request_nano_usd


_PRICES: Final = select(
    tables.price.c.id,
    tables.price.c.model,
    tables.price.c.input_pico_usd,
    tables.price.c.cached_input_pico_usd,
    tables.price.c.output_pico_usd,
    tables.price.c.request_nano_usd,
    tables.price.c.effective_from_ns,
)
