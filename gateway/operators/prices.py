"""The price book: prices that are scheduled, and drafts that charge nobody."""

from typing import Annotated, Any

from msgspec import Meta, Struct

from gateway.operators.desk import Ask, Id, Nothing, Ns, Why
from gateway.operators.refusals import there
from gateway.organization.desk import listed
from gateway.records.money import price_record, price_records
from gateway.records.plain import Record
from tenancy.pricing.price_book import PriceTerms
from tenancy.pricing.prices import (
    BATCH_PERCENT,
    DEFAULT_TIER,
    FLEX_PERCENT,
    PERCENT_MAX,
    PRICE_MAX,
    PRIORITY_PERCENT,
    STEPS_MAX,
    Price,
    Step,
    Tier,
)

Figure = Annotated[int, Meta(ge=0, le=PRICE_MAX)]
Percent = Annotated[int, Meta(ge=0, le=PERCENT_MAX)]


class NewStep(Struct, frozen=True, forbid_unknown_fields=True):
    from_tokens: Annotated[int, Meta(ge=1, le=2**62)]
    input_pico_usd: Figure
    cached_input_pico_usd: Figure
    output_pico_usd: Figure


class NewDraft(Struct, frozen=True, forbid_unknown_fields=True):
    """pico-units of the currency for each token, nano-units for each request."""

    model: Id
    input_pico_usd: Figure
    output_pico_usd: Figure
    cached_input_pico_usd: Figure | None = None  # left out: as input
    request_nano_usd: Figure = 0
    tier: Tier = DEFAULT_TIER
    currency: Annotated[str, Meta(max_length=3)] = "USD"
    flex_percent: Percent | None = None  # left out: as the command has them; other tiers' own prices have none
    batch_percent: Percent | None = None
    priority_percent: Percent | None = None
    steps: Annotated[tuple[NewStep, ...], Meta(max_length=STEPS_MAX)] = ()

    def terms(self) -> PriceTerms:
        """Raises PriceError."""
        percents = (FLEX_PERCENT, BATCH_PERCENT, PRIORITY_PERCENT) if self.tier == DEFAULT_TIER else (100, 100, 100)
        asked = (self.flex_percent, self.batch_percent, self.priority_percent)
        flex, batch, priority = (usual if one is None else one for one, usual in zip(asked, percents, strict=True))
        cached = self.input_pico_usd if self.cached_input_pico_usd is None else self.cached_input_pico_usd
        return PriceTerms(
            self.model,
            self.input_pico_usd,
            cached,
            self.output_pico_usd,
            self.request_nano_usd,
            tier=self.tier,
            currency=self.currency,
            flex_percent=flex,
            batch_percent=batch,
            priority_percent=priority,
            steps=tuple(
                Step(one.from_tokens, one.input_pico_usd, one.cached_input_pico_usd, one.output_pico_usd)
                for one in self.steps
            ),
        )


class NewPrice(NewDraft, frozen=True, forbid_unknown_fields=True):
    effective_from_ns: Ns | None = None  # left out: now


class Start(Struct, frozen=True, forbid_unknown_fields=True):
    effective_from_ns: Ns | None = None  # left out: now


async def prices(ask: Ask) -> Any:
    found = await price_records(ask.conn, ask.now_ns, ask.query.text("model"))
    page, more = ask.page(found, lambda one: one["id"])
    return listed(page, [one["id"] for one in page], more)


async def schedule(ask: Ask, wanted: NewPrice) -> Any:
    """The same terms from the same date again are the price that is there."""
    return await _shown(ask, await ask.price_clerk.schedule(wanted.terms(), _start(ask, wanted.effective_from_ns)))


async def draft(ask: Ask, wanted: NewDraft) -> Any:
    made = await ask.price_clerk.draft(wanted.terms())
    return price_record(made.terms, made.draft_id, "draft", None, None)


async def schedule_draft(ask: Ask, start: Start) -> Any:
    from_ns = _start(ask, start.effective_from_ns)
    with there():
        price = await ask.price_clerk.schedule_draft(ask.path["draft_id"], from_ns)
    return await _shown(ask, price)


async def discard_draft(ask: Ask, _: Nothing) -> Any:
    with there():
        await ask.price_clerk.discard_draft(ask.path["draft_id"])
    return {"id": ask.path["draft_id"], "discarded": True}


async def withdraw(ask: Ask, why: Why) -> Any:
    """A repeat changes nothing."""
    return await _shown(ask, await ask.price_clerk.withdraw(ask.path["price_id"], why.reason))


def _start(ask: Ask, from_ns: int | None) -> int:
    return ask.now_ns if from_ns is None else from_ns


async def _shown(ask: Ask, price: Price) -> Record:
    found = await price_records(ask.conn, ask.now_ns, price.model)
    return next(one for one in found if one["id"] == price.price_id)


READING = (("GET", "/prices", prices),)
WRITING: tuple[tuple[str, str, type[Struct], Any], ...] = (
    ("POST", "/prices", NewPrice, schedule),
    ("POST", "/prices/{price_id}/withdraw", Why, withdraw),
    ("POST", "/price_drafts", NewDraft, draft),
    ("POST", "/price_drafts/{draft_id}/schedule", Start, schedule_draft),
    ("POST", "/price_drafts/{draft_id}/discard", Nothing, discard_draft),
)
