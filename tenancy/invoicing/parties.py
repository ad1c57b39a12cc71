"""Who sells and who is billed: texts for documents, copied into each one when it is issued.

The buyer's terms say what its paid credit is: `prepaid`, paid for when it was granted, so that what it covers is shown
as paid; or `on_account`, a limit, so that what was used of it is due. Promotional credit is a discount either way.
"""

from dataclasses import dataclass
from typing import Final, Literal, get_args

from sqlalchemy import insert, select, update
from sqlalchemy.dialects import postgresql, sqlite
from sqlalchemy.ext.asyncio import AsyncConnection

from tenancy.ids import Entropy, new_id
from tenancy.invoicing.invoice_tables import buyer as _BUYER
from tenancy.invoicing.invoice_tables import issuer as _ISSUER
from tenancy.money import require_int

Terms = Literal["prepaid", "on_account"]
TERMS: Final[tuple[Terms, ...]] = get_args(Terms)
NAME_MAX: Final = 200
TAX_ID_MAX: Final = 64
TEXT_MAX: Final = 1_000
PREFIX_MAX: Final = 16
PAYMENT_DAYS_MAX: Final = 365
TAX_RATE_BP_MAX: Final = 10_000


class PartyError(ValueError):
    """A seller's or buyer's entry is wrong or missing; the message says which."""


@dataclass(frozen=True, slots=True)
class Issuer:
    issuer_id: str
    name: str
    address: str  # lines
    tax_id: str  # empty: none
    payment_details: str  # lines: how to pay
    number_prefix: str  # numbers read PREFIX-000001
    payment_days: int

    def __post_init__(self) -> None:
        _text(self.name, "a name", NAME_MAX, least=1)
        _text(self.address, "an address", TEXT_MAX)
        _text(self.tax_id, "a tax id", TAX_ID_MAX)
        _text(self.payment_details, "payment details", TEXT_MAX)
        _text(self.number_prefix, "a prefix", PREFIX_MAX, least=1)
        if not self.number_prefix.isascii() or not self.number_prefix.replace("-", "").isalnum():
            raise PartyError(f"a prefix is letters, digits and hyphens: {self.number_prefix!r}")
        if not 0 <= require_int(self.payment_days, "payment_days") <= PAYMENT_DAYS_MAX:
            raise PartyError(f"payment is due after 0 to {PAYMENT_DAYS_MAX} days, not {self.payment_days}")


@dataclass(frozen=True, slots=True)
class Buyer:
    tenant_id: str
    issuer_id: str
    name: str
    address: str
    tax_id: str
    tax_rate_bp: int  # basis points: 1900 is 19 %
    terms: Terms

    def __post_init__(self) -> None:
        _text(self.name, "a name", NAME_MAX, least=1)
        _text(self.address, "an address", TEXT_MAX)
        _text(self.tax_id, "a tax id", TAX_ID_MAX)
        if not 0 <= require_int(self.tax_rate_bp, "tax_rate_bp") <= TAX_RATE_BP_MAX:
            raise PartyError(f"a tax rate is 0 to {TAX_RATE_BP_MAX} basis points, not {self.tax_rate_bp}")
        if self.terms not in TERMS:
            raise PartyError(f"terms are {' or '.join(TERMS)}, not {self.terms!r}")


async def set_issuer(
    conn: AsyncConnection,
    *,
    name: str,
    address: str,
    tax_id: str,
    payment_details: str,
    number_prefix: str,
    payment_days: int,
    entropy: Entropy,
    now_ns: int,
) -> Issuer:
    """A new issuer, or the one of that prefix with new texts; its numbers go on. Raises PartyError."""
    known = await find_issuer(conn, number_prefix)
    issuer_id = new_id("iss", entropy) if known is None else known.issuer_id
    made = Issuer(issuer_id, name, address, tax_id, payment_details, number_prefix, payment_days)
    values = {
        "name": name,
        "address": address,
        "tax_id": tax_id,
        "payment_details": payment_details,
        "payment_days": payment_days,
        "updated_ns": now_ns,
    }
    if known is None:
        first = insert(_ISSUER).values(id=issuer_id, number_prefix=number_prefix, next_number=1, **values)
        await conn.execute(first)
    else:
        await conn.execute(update(_ISSUER).where(_ISSUER.c.id == issuer_id).values(values))
    return made


async def find_issuer(conn: AsyncConnection, number_prefix: str) -> Issuer | None:
    row = (await conn.execute(_ISSUERS.where(_ISSUER.c.number_prefix == number_prefix))).first()
    return None if row is None else Issuer(*row)


async def get_issuer(conn: AsyncConnection, issuer_id: str) -> Issuer:
    row = (await conn.execute(_ISSUERS.where(_ISSUER.c.id == issuer_id))).first()
    if row is None:
        raise PartyError(f"there is no issuer {issuer_id!r}")
    return Issuer(*row)


async def take_number(conn: AsyncConnection, issuer_id: str) -> int:
    """The issuer's next number. It counts only if this transaction commits, and until then others wait: no gaps."""
    taken: int | None = await conn.scalar(
        update(_ISSUER)
        .where(_ISSUER.c.id == issuer_id)
        .values(next_number=_ISSUER.c.next_number + 1)
        .returning(_ISSUER.c.next_number)
    )
    assert taken is not None, f"no issuer {issuer_id}"
    return taken - 1


async def set_buyer(conn: AsyncConnection, buyer: Buyer, *, now_ns: int) -> None:
    """Set or replace how a tenant is billed."""
    dialect = postgresql if conn.dialect.name == "postgresql" else sqlite
    values = {name: getattr(buyer, name) for name in Buyer.__slots__} | {"updated_ns": now_ns}
    statement = dialect.insert(_BUYER).values(values)
    await conn.execute(statement.on_conflict_do_update(index_elements=["tenant_id"], set_=values))


async def get_buyer(conn: AsyncConnection, tenant_id: str, *, lock: bool = False) -> Buyer:
    """`lock`: nobody else drafts or issues for this tenant before this transaction ends. Raises PartyError."""
    query = _BUYERS.where(_BUYER.c.tenant_id == tenant_id)
    row = (await conn.execute(query.with_for_update() if lock else query)).first()
    if row is None:
        raise PartyError("it is not known how the tenant is billed; see: bulkhead invoice buyer --help")
    return Buyer(*row)


def _text(value: str, what: str, longest: int, *, least: int = 0) -> None:
    if not least <= len(value) <= longest or not value.replace("\n", "").isprintable():
        raise PartyError(f"{what} has {least} to {longest} printable characters: {value[:100]!r}")


_ISSUERS: Final = select(
    _ISSUER.c.id,
    _ISSUER.c.name,
    _ISSUER.c.address,
    _ISSUER.c.tax_id,
    _ISSUER.c.payment_details,
    _ISSUER.c.number_prefix,
    _ISSUER.c.payment_days,
)
_BUYERS: Final = select(*(_BUYER.c[name] for name in Buyer.__slots__))
