"""What a request costs: a price, the service tier it ran in, and how far its account was on the price's steps.

    a tier's own row          its figures as they are
    the default tier's row    its figures times the percent that the row states for the tier (batch: half)

Graduated steps: a price may have further figures from the n-th token of the account's calendar month on. Each token
costs what the step costs on which it stands, so a boundary may fall inside one request:

    tokens of the month    0 ........ from_1 ........ from_2 ........         half-open: [from, next from)
    one request                    [cached | rest of the prompt | completion]
                                   ^ num_tokens_before

All sums are exact in pico-USD; a charge is rounded once. A price in another currency has the same units of that one.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final, Literal, get_args

from tenancy.money import PICO_PER_NANO, pico_to_nano, require_amount, require_int
from tenancy.usage.meter import Usage

PRICE_MAX: Final = 10**12  # one USD a token (or 1000 USD a request): far above any price, far below overflow
PERCENT_MAX: Final = 1_000
STEPS_MAX: Final = 20
Tier = Literal["default", "flex", "batch", "priority"]
TIERS: Final[tuple[Tier, ...]] = get_args(Tier)
DEFAULT_TIER: Final = "default"
FLEX_PERCENT: Final = 100  # what a new price states where nobody says otherwise
BATCH_PERCENT: Final = 50
PRIORITY_PERCENT: Final = 200


class PriceMissingError(LookupError):
    """No price of the model is in force at that time: the request cannot be billed, so it is not served."""


class PriceConflictError(ValueError):
    """The new row would change a price that is, or was, already in force."""


class PriceError(ValueError):
    """The figures of a price contradict each other, or there is no such draft; the message says which."""


@dataclass(frozen=True, slots=True)
class Step:
    """pico-USD per token, from the token `from_tokens` (counted from 0) of the account's month on."""

    from_tokens: int
    input_pico_usd: int
    cached_input_pico_usd: int
    output_pico_usd: int

    def __post_init__(self) -> None:
        require_amount(self.from_tokens, "from_tokens")
        for name in ("input_pico_usd", "cached_input_pico_usd", "output_pico_usd"):
            if require_amount(getattr(self, name), name) > PRICE_MAX:
                raise ValueError(f"{name} must be at most {PRICE_MAX}: {getattr(self, name)}")


@dataclass(frozen=True, slots=True)
class Price:
    """pico-USD per token, nano-USD per request, ns since the epoch. The percents are a default row's only."""

    price_id: str
    model: str
    input_pico_usd: int
    cached_input_pico_usd: int
    output_pico_usd: int
    request_nano_usd: int
    effective_from_ns: int
    tier: str = DEFAULT_TIER
    currency: str = "USD"
    flex_percent: int = 100
    batch_percent: int = 100
    priority_percent: int = 100
    steps: tuple[Step, ...] = ()  # above the first, which is the row itself

    def __post_init__(self) -> None:
        for name in ("input_pico_usd", "cached_input_pico_usd", "output_pico_usd", "request_nano_usd"):
            if require_amount(getattr(self, name), name) > PRICE_MAX:
                raise ValueError(f"{name} must be at most {PRICE_MAX}: {getattr(self, name)}")
        require_int(self.effective_from_ns, "effective_from_ns")
        if self.tier not in TIERS:
            raise PriceError(f"a tier is one of {', '.join(TIERS)}, not {self.tier!r}")
        if len(self.currency) != 3 or not self.currency.isascii() or not self.currency.isupper():
            raise PriceError(f"a currency is three capital letters (ISO 4217): {self.currency!r}")
        percents = (self.flex_percent, self.batch_percent, self.priority_percent)
        for percent in percents:
            if not 0 <= require_int(percent, "a percent") <= PERCENT_MAX:
                raise PriceError(f"a percent is 0 to {PERCENT_MAX}: {percent}")
        if self.tier != DEFAULT_TIER and percents != (100, 100, 100):
            raise PriceError("only the default tier's price states percents: a tier's own price is its figures")
        starts = [0, *(step.from_tokens for step in self.steps)]
        if starts != sorted(set(starts)) or len(self.steps) > STEPS_MAX:
            raise PriceError(f"steps begin above 0 tokens, each later than the one before, at most {STEPS_MAX}")

    @property
    def all_steps(self) -> tuple[Step, ...]:
        return (Step(0, self.input_pico_usd, self.cached_input_pico_usd, self.output_pico_usd), *self.steps)

    def percent(self, tier: str) -> int:
        """What a request of `tier` costs of this row's figures."""
        if tier == self.tier:
            return 100
        if self.tier != DEFAULT_TIER or tier not in TIERS:
            raise PriceError(f"the price {self.price_id} of tier {self.tier} says nothing of {tier!r}")
        return {"flex": self.flex_percent, "batch": self.batch_percent, "priority": self.priority_percent}[tier]


@dataclass(frozen=True, slots=True)
class Part:
    """Tokens of one kind that stand on one step, and what each costs in pico-USD before the tier's percent."""

    kind: str  # input, cached_input or output
    step: int  # its number, counted from 0
    num_tokens: int
    token_pico_usd: int


def parts_of(price: Price, usage: Usage, num_tokens_before: int = 0) -> Iterator[Part]:
    """The tokens of a request by kind and step, in the order in which they stand: cached, other prompt, completion."""
    require_amount(num_tokens_before, "num_tokens_before")
    steps = price.all_steps
    ends = [*(step.from_tokens for step in price.steps), None]
    at = num_tokens_before
    for kind, num_tokens in (
        ("cached_input", usage.num_cached_tokens),
        ("input", usage.num_prompt_tokens - usage.num_cached_tokens),
        ("output", usage.num_completion_tokens),
    ):
        until = at + num_tokens
        for number, (step, end) in enumerate(zip(steps, ends, strict=True)):
            # [at, until) cut with [step.from_tokens, end)
            inside = (until if end is None else min(until, end)) - max(at, step.from_tokens)
            if inside > 0:
                yield Part(kind, number, inside, getattr(step, f"{kind}_pico_usd"))
        at = until


def charge_nano_usd(price: Price, usage: Usage, tier: str = DEFAULT_TIER, num_tokens_before: int = 0) -> int:
    """What a request costs, in nano-USD, rounded once."""
    pico_usd = sum(part.num_tokens * part.token_pico_usd for part in parts_of(price, usage, num_tokens_before))
    return pico_to_nano(pico_usd + price.request_nano_usd * PICO_PER_NANO, price.percent(tier))


def worst_case_nano_usd(
    price: Price, num_prompt_tokens: int, max_tokens: int, tier: str = DEFAULT_TIER, num_tokens_before: int = 0
) -> int:
    """What a request can cost at most, in nano-USD: never below the charge of any usage within its two bounds that
    begins at `num_tokens_before` of its month or later (others of its account may be settled first).

    That holds because every factor is at its largest, each token on the dearest step that it can stand on, and
    rounding keeps order.
    """
    require_amount(num_prompt_tokens, "num_prompt_tokens")
    require_amount(max_tokens, "max_tokens")
    require_amount(num_tokens_before, "num_tokens_before")
    begun = sum(step.from_tokens <= num_tokens_before for step in price.steps)
    reachable = price.all_steps[begun:]
    return pico_to_nano(
        num_prompt_tokens * max(max(step.input_pico_usd, step.cached_input_pico_usd) for step in reachable)
        + max_tokens * max(step.output_pico_usd for step in reachable)
        + price.request_nano_usd * PICO_PER_NANO,
        price.percent(tier),
    )


def affordable_tokens(
    price: Price,
    num_prompt_tokens: int,
    max_tokens: int,
    available_nano_usd: int,
    tier: str = DEFAULT_TIER,
    num_tokens_before: int = 0,
) -> int:
    """The largest number of completion tokens, at most `max_tokens`, whose worst case the money covers; 0 for none.

    Found by halving, with the hold's own function, so that what is afforded here is never refused by rounding there.
    """
    low, high = 0, max_tokens  # [low, high]: low tokens are affordable or low is 0
    while low < high:
        middle = (low + high + 1) // 2
        if worst_case_nano_usd(price, num_prompt_tokens, middle, tier, num_tokens_before) <= available_nano_usd:
            low = middle
        else:
            high = middle - 1
    return low
