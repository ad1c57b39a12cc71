"""bulkhead price: add, draft, schedule, withdraw, discard, list."""

from decimal import Decimal
from typing import Annotated, Any

import typer
from sqlalchemy.ext.asyncio import AsyncConnection

from gateway.commands.directory import NANO_PER_USD, AsJson, Listed, Reason, exact, print_list
from gateway.commands.keys import iso
from gateway.commands.periods import instant_of
from gateway.commands.session import CommandError, Session, in_snapshot, in_transaction, open_session
from gateway.price_clerk import PriceClerk
from gateway.records.money import price_records
from tenancy.money import format_nano
from tenancy.pricing.price_book import PriceTerms
from tenancy.pricing.prices import BATCH_PERCENT, DEFAULT_TIER, FLEX_PERCENT, PERCENT_MAX, PRIORITY_PERCENT, Step, Tier

PICO_PER_USD_PER_MILLION = 10**6  # 1 USD per million tokens is 10**6 pico-USD per token

price_app = typer.Typer(no_args_is_help=True, help="Prices.")

Model = Annotated[str, typer.Option(help="the model's id, as in /v1/models")]
Input = Annotated[str, typer.Option("--input", help="per million prompt tokens, a decimal number")]
Output = Annotated[str, typer.Option("--output", help="per million completion tokens")]
Cached = Annotated[str, typer.Option("--cached-input", help="per million cached prompt tokens; default: as input")]
Request = Annotated[str, typer.Option("--request", help="per request")]
TierOption = Annotated[Tier, typer.Option("--tier", help="the service tier that this is the own price of")]
Currency = Annotated[str, typer.Option("--currency", help="of all these figures: three letters")]
Steps = Annotated[
    list[str] | None,
    typer.Option("--step", help="TOKENS:INPUT:CACHED:OUTPUT from that token of an account's month on; repeatable"),
]
Percent = typer.Option(min=0, max=PERCENT_MAX, help="what this tier costs of the default tier's figures")
Flex = Annotated[int, Percent]
DraftId = Annotated[str, typer.Argument(help="the draft's id, from: bulkhead price list")]
From = Annotated[str, typer.Option("--from", help="a day (UTC) or ISO 8601 with an offset; default: now")]


@price_app.command("add")
def price_add(
    model: Model,
    input_: Input,
    output: Output,
    cached_input: Cached = "",
    request: Request = "0",
    tier: TierOption = DEFAULT_TIER,
    currency: Currency = "USD",
    flex_percent: Flex = FLEX_PERCENT,
    batch_percent: Flex = BATCH_PERCENT,
    priority_percent: Flex = PRIORITY_PERCENT,
    step: Steps = None,
    from_: From = "",
) -> None:
    """Add a price version that is in force from a date on."""
    session = open_session()
    percents = (flex_percent, batch_percent, priority_percent)
    terms = terms_of(model, input_, output, cached_input, request, tier, currency, percents, step or [])
    from_ns = start_of(session, from_)

    async def work(conn: AsyncConnection) -> str:
        return (await price_clerk(session, conn).schedule(terms, from_ns)).price_id

    typer.echo(f"price {in_transaction(session, work)} is in force from {iso(from_ns)} on")


@price_app.command("draft")
def price_draft(
    model: Model,
    input_: Input,
    output: Output,
    cached_input: Cached = "",
    request: Request = "0",
    tier: TierOption = DEFAULT_TIER,
    currency: Currency = "USD",
    flex_percent: Flex = FLEX_PERCENT,
    batch_percent: Flex = BATCH_PERCENT,
    priority_percent: Flex = PRIORITY_PERCENT,
    step: Steps = None,
) -> None:
    """Write a price down that charges nobody yet."""
    session = open_session()
    percents = (flex_percent, batch_percent, priority_percent)
    terms = terms_of(model, input_, output, cached_input, request, tier, currency, percents, step or [])

    async def work(conn: AsyncConnection) -> str:
        return (await price_clerk(session, conn).draft(terms)).draft_id

    typer.echo(in_transaction(session, work))


@price_app.command("schedule")
def price_schedule(draft: DraftId, from_: From = "") -> None:
    """Put a draft in force from a date on."""
    session = open_session()
    from_ns = start_of(session, from_)

    async def work(conn: AsyncConnection) -> str:
        return (await price_clerk(session, conn).schedule_draft(draft, from_ns)).price_id

    typer.echo(f"price {in_transaction(session, work)} is in force from {iso(from_ns)} on")


@price_app.command("withdraw")
def price_withdraw(
    price: Annotated[str, typer.Argument(help="the price's id, from: bulkhead price list")], reason: Reason = ""
) -> None:
    """Take a scheduled price back before it is in force."""
    session = open_session()

    async def work(conn: AsyncConnection) -> int:
        return (await price_clerk(session, conn).withdraw(price, reason)).effective_from_ns

    typer.echo(f"price {price}, scheduled for {iso(in_transaction(session, work))}, is withdrawn")


@price_app.command("discard")
def price_discard(draft: DraftId) -> None:
    """Throw a draft away."""
    session = open_session()

    async def work(conn: AsyncConnection) -> None:
        await price_clerk(session, conn).discard_draft(draft)

    in_transaction(session, work)
    typer.echo(f"draft {draft} is discarded")


@price_app.command("list")
def price_list(model: Annotated[str, typer.Option(help="only this model")] = "", as_json: AsJson = False) -> None:
    """List drafts and price versions with the interval in which each is in force."""
    session = open_session()

    async def work(conn: AsyncConnection) -> Listed:
        return [(_row(one), one) for one in await price_records(conn, session.world.now_ns(), model)]

    columns = ("model", "tier", "id", "state", "from", "until", "other tiers", "currency")
    figures = ("from token", "input/M", "cached/M", "output/M", "per request")
    print_list((*columns, *figures), in_snapshot(session, work), as_json, numbers_from=8)


def price_clerk(session: Session, conn: AsyncConnection) -> PriceClerk:
    return PriceClerk(conn, session.world.entropy, session.world.now_ns())


def start_of(session: Session, text: str) -> int:
    return instant_of(text, "--from") if text else session.world.now_ns()


def terms_of(
    model: str,
    input_: str,
    output: str,
    cached: str,
    request: str,
    tier: Tier,
    currency: str,
    percents: tuple[int, int, int],
    steps: list[str],
) -> PriceTerms:
    """Raises CommandError or PriceError. The percents are the default tier's; another tier's own price has none."""
    flex, batch, priority = percents if tier == DEFAULT_TIER else (100, 100, 100)
    return PriceTerms(
        model,
        per_million(input_, "--input"),
        per_million(cached or input_, "--cached-input"),
        per_million(output, "--output"),
        exact(request, NANO_PER_USD, "--request"),
        tier=tier,
        currency=currency,
        flex_percent=flex,
        batch_percent=batch,
        priority_percent=priority,
        steps=tuple(step_of(text) for text in steps),
    )


def step_of(text: str) -> Step:
    parts = text.split(":")
    if len(parts) != 4 or not parts[0].isdecimal():
        raise CommandError(f"--step {text!r} is not TOKENS:INPUT:CACHED:OUTPUT, such as 1000000:0.1:0.05:0.4")
    input_, cached, output = (per_million(part, "--step") for part in parts[1:])
    return Step(int(parts[0]), input_, cached, output)


def per_million(text: str, option: str) -> int:
    return exact(text, PICO_PER_USD_PER_MILLION, option)


def _row(one: dict[str, Any]) -> tuple[str, ...]:
    since, until = (
        "-" if one["state"] == "draft" else iso(at_ns) for at_ns in (one["effective_from_ns"], one["until_ns"])
    )
    names = ("input_pico_usd", "cached_input_pico_usd", "output_pico_usd")
    steps = [{"from_tokens": 0, **{name: one[name] for name in names}}, *one["steps"]]
    others = "-"
    if one["tier"] == DEFAULT_TIER:
        others = ", ".join(f"{tier} {one[f'{tier}_percent']} %" for tier in ("flex", "batch", "priority"))

    def column(field: str) -> str:
        return "\n".join(str(Decimal(step[field]) / PICO_PER_USD_PER_MILLION) for step in steps)

    return (
        one["model"],
        one["tier"],
        one["id"],
        one["state"],
        since,
        until,
        others,
        one["currency"],
        "\n".join(f"{step['from_tokens']:,}" for step in steps),
        *(column(name) for name in names),
        format_nano(one["request_nano_usd"], one["currency"]),
    )
