"""Operators' tokens: what an operator's programs present to the operators' routes. Like an API key, and never one.

They read `bko-...`: a public id and a secret of which an HMAC is stored (presented.py). A token is its operator's: it
is dead once it is revoked or has expired, or the operator is disabled, and it may be for reading only. As of a key,
nothing says what is wrong with a token, and every wrong one costs the same work.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Final, Literal

from sqlalchemy import bindparam, func, insert, select, update
from sqlalchemy.ext.asyncio import AsyncConnection

from tenancy import tables
from tenancy.access.presented import Presented
from tenancy.access.token_tables import operator_token as _TOKEN
from tenancy.ids import Entropy, new_id, require_name
from tenancy.money import require_int

TOKENS_MAX: Final = 100  # of one operator that are not revoked


class InvalidTokenError(Exception):
    """The presented token does not authenticate. Deliberately says nothing about why."""

    def __init__(self) -> None:
        super().__init__("Incorrect operator token provided.")


class OperatorTokenError(ValueError):
    """A token cannot be made or is not there; the message says which."""


@dataclass(frozen=True, slots=True)
class Bearer:
    """Whom a request of an operator's program acts for. Made only by `authenticate_token`."""

    operator_id: str
    operator_name: str
    token_id: str
    read_only: bool


@dataclass(frozen=True, slots=True)
class MintedToken:
    """A new token: `secret_text` exists here and nowhere else, and is left out of the repr."""

    token_id: str
    secret_text: str = field(repr=False)


@dataclass(frozen=True, slots=True)
class OperatorToken:
    """What may be shown of a token, ever after."""

    token_id: str
    operator: str  # its name
    public_id: str
    name: str
    read_only: bool
    created_ns: int
    expires_ns: int | None
    revoked_ns: int | None
    last_used_ns: int | None  # behind by up to a minute
    operator_disabled: bool

    def state(self, now_ns: int) -> Literal["active", "expired", "revoked", "disabled"]:
        if self.revoked_ns is not None:
            return "revoked"
        if self.operator_disabled:
            return "disabled"
        return "active" if self.expires_ns is None or now_ns < self.expires_ns else "expired"


class PresentedToken(Presented):
    __slots__ = ()
    PREFIX = "bko"
    CONTEXT = "bulkhead/operator-token/v1"


async def mint_token(
    conn: AsyncConnection,
    operator_name: str,
    name: str,
    *,
    read_only: bool,
    pepper: bytes,
    entropy: Entropy,
    now_ns: int,
    expires_ns: int | None = None,
) -> MintedToken:
    """Create a token; half-open, it works while created <= now < expires.

    Raises OperatorTokenError, InvalidNameError, or ValueError for an expiry that is not in the future.
    """
    operator = tables.operator
    if expires_ns is not None and require_int(expires_ns, "expires_ns") <= now_ns:
        raise ValueError(f"expires_ns must be later than now ({now_ns}): {expires_ns}")
    query = select(operator.c.id, operator.c.disabled_ns).where(operator.c.name == operator_name)
    row = (await conn.execute(query.with_for_update(key_share=True))).first()
    if row is None or row.disabled_ns is not None:
        raise OperatorTokenError(f"there is no active operator {operator_name!r}; see: bulkhead admin create --help")
    count = select(func.count()).where(_TOKEN.c.operator_id == row.id, _TOKEN.c.revoked_ns.is_(None))
    if int(await conn.scalar(count) or 0) >= TOKENS_MAX:
        raise OperatorTokenError(f"{operator_name} has {TOKENS_MAX} tokens already: revoke one first")
    token_id = new_id("opt", entropy)
    secret_text, made = PresentedToken.mint(entropy, pepper)
    await conn.execute(
        insert(_TOKEN).values(
            id=token_id,
            operator_id=row.id,
            public_id=made.public_id,
            secret_hmac=made.secret_hmac,
            name=require_name(name),
            read_only=read_only,
            created_ns=now_ns,
            expires_ns=expires_ns,
        )
    )
    return MintedToken(token_id, secret_text)


async def authenticate_token(conn: AsyncConnection, token: PresentedToken, *, now_ns: int) -> Bearer:
    """One read and one comparison. Raises InvalidTokenError for every reason there is."""
    row = (await conn.execute(_BY_PUBLIC_ID, {"public_id": token.public_id})).first()
    return bearer_of(token, row, now_ns)


def bearer_of(token: PresentedToken, row: Any, now_ns: int) -> Bearer:
    """`row`: of the token's public id, or None. Raises InvalidTokenError."""
    matches = token.matches(None if row is None else row.secret_hmac)
    if row is None or not matches or not _alive(row, now_ns):
        raise InvalidTokenError
    return Bearer(row.operator_id, row.operator_name, row.id, row.read_only)


async def require_token_alive(conn: AsyncConnection, token_id: str, now_ns: int) -> None:
    """Inside a writing transaction: revoking a token or disabling its operator waits for it, or is seen by it.

    Raises InvalidTokenError.
    """
    operator = tables.operator
    query = (
        select(_TOKEN.c.expires_ns, _TOKEN.c.revoked_ns, operator.c.disabled_ns)
        .join(operator, operator.c.id == _TOKEN.c.operator_id)
        .where(_TOKEN.c.id == token_id)
        .with_for_update(read=True)
    )
    row = (await conn.execute(query)).first()
    if row is None or not _alive(row, now_ns):
        raise InvalidTokenError


async def revoke_token(conn: AsyncConnection, token_id: str, *, now_ns: int) -> bool:
    """Revoke from the next authentication on. False where it already was. Raises OperatorTokenError."""
    revoked = await conn.execute(
        update(_TOKEN).where(_TOKEN.c.id == token_id, _TOKEN.c.revoked_ns.is_(None)).values(revoked_ns=now_ns)
    )
    if revoked.rowcount:
        return True
    await get_token(conn, token_id)
    return False


async def get_token(conn: AsyncConnection, token_id: str) -> OperatorToken:
    """Raises OperatorTokenError."""
    row = (await conn.execute(_SHOWN.where(_TOKEN.c.id == token_id))).first()
    if row is None:
        raise OperatorTokenError(f"there is no operator's token {token_id!r}; see: bulkhead admin token list")
    return OperatorToken(*row)


async def list_tokens(conn: AsyncConnection) -> list[OperatorToken]:
    """Every token, oldest first, revoked and expired ones included; never a secret."""
    return [OperatorToken(*row) for row in await conn.execute(_SHOWN.order_by(_TOKEN.c.created_ns, _TOKEN.c.id))]


async def note_token_uses(conn: AsyncConnection, uses: Mapping[str, int]) -> None:
    """Remember when tokens were last used (token id -> ns); an older time changes nothing."""
    for token_id, used_ns in sorted(uses.items()):
        older = _TOKEN.c.last_used_ns.is_(None) | (_TOKEN.c.last_used_ns < used_ns)
        await conn.execute(update(_TOKEN).where(_TOKEN.c.id == token_id, older).values(last_used_ns=used_ns))


def _alive(row: Any, now_ns: int) -> bool:
    is_ended = row.revoked_ns is not None or row.disabled_ns is not None
    return not is_ended and (row.expires_ns is None or now_ns < row.expires_ns)


_BY_PUBLIC_ID: Final = (
    select(
        _TOKEN.c.id,
        _TOKEN.c.secret_hmac,
        _TOKEN.c.read_only,
        _TOKEN.c.expires_ns,
        _TOKEN.c.revoked_ns,
        tables.operator.c.id.label("operator_id"),
        tables.operator.c.name.label("operator_name"),
        tables.operator.c.disabled_ns,
    )
    .join(tables.operator, tables.operator.c.id == _TOKEN.c.operator_id)
    .where(_TOKEN.c.public_id == bindparam("public_id"))
)
_SHOWN: Final = select(
    _TOKEN.c.id,
    tables.operator.c.name.label("operator"),
    _TOKEN.c.public_id,
    _TOKEN.c.name,
    _TOKEN.c.read_only,
    _TOKEN.c.created_ns,
    _TOKEN.c.expires_ns,
    _TOKEN.c.revoked_ns,
    _TOKEN.c.last_used_ns,
    tables.operator.c.disabled_ns.is_not(None).label("operator_disabled"),
).join(tables.operator, tables.operator.c.id == _TOKEN.c.operator_id)
