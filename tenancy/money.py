"""Money is an integer with its unit in the name.

Prices are pico-USD per token (10^-12 USD), ledgers hold nano-USD (10^-9 USD): one token of a cheap model costs less
than a nano-USD, so a charge is summed exactly in pico-USD and rounded once, half to even, by `pico_to_nano`.
Floats, bools and Decimals are refused where a value is made, not where it is added up.
"""

PICO_PER_NANO = 1_000
NANO_PER_USD = 1_000_000_000
BIGINT_MAX = 2**63 - 1  # what both databases store exactly; 9.2 billion USD in nano-USD


class MoneyRangeError(ValueError):
    """An amount is outside what the ledger accepts; the message shows it."""


def require_int(value: object, name: str) -> int:
    """Return `value` if it is an int and not a bool. Raises TypeError that shows the offending value."""
    if type(value) is not int:
        raise TypeError(f"{name} must be an int, not {type(value).__name__}: {value!r}")
    return value


def require_amount(value: object, name: str, *, minimum: int = 0) -> int:
    """Return `value` if it is an int in [minimum, BIGINT_MAX]. Raises TypeError or MoneyRangeError."""
    amount = require_int(value, name)
    if not minimum <= amount <= BIGINT_MAX:
        raise MoneyRangeError(f"{name} must be between {minimum} and {BIGINT_MAX}: {amount}")
    return amount


def round_half_even_div(numerator: int, denominator: int) -> int:
    """numerator / denominator to the nearest integer, ties to the even one. Exact for integers of any size.

    Raises TypeError for anything but ints and ValueError for a denominator below 1.
    """
    numerator, denominator = require_int(numerator, "numerator"), require_int(denominator, "denominator")
    if denominator < 1:
        raise ValueError(f"denominator must be at least 1: {denominator}")
    quotient, remainder = divmod(numerator, denominator)
    twice = 2 * remainder
    if twice > denominator or (twice == denominator and quotient % 2 == 1):
        quotient += 1
    return quotient


def pico_to_nano(pico_usd: int, percent: int = 100) -> int:
    """The one place where a charge is rounded: `percent` of it, from pico-USD to nano-USD, half to even."""
    return round_half_even_div(
        require_int(pico_usd, "pico_usd") * require_amount(percent, "percent"), 100 * PICO_PER_NANO
    )


def format_nano_usd(nano_usd: int) -> str:
    """An exact decimal text such as ``$1.25`` or ``-$0.000000042``: at least two decimals, no digit lost."""
    sign = "-" if require_int(nano_usd, "nano_usd") < 0 else ""
    whole, fraction = divmod(abs(nano_usd), NANO_PER_USD)
    digits = f"{fraction:09d}".rstrip("0").ljust(2, "0")
    return f"{sign}${whole:,}.{digits}"


def format_nano(nano: int, currency: str) -> str:
    """The same for an account in any currency: ``$1.25``, ``EUR 1.25``."""
    text = format_nano_usd(nano)
    return text if currency == "USD" else text.replace("$", f"{currency} ")
