"""Operators: the people who log in to the admin pages. Passwords are stored as argon2id.

Hashing takes tens of milliseconds and 19 MiB on purpose; `hash_password` and `verify_password` are synchronous, and
the async functions here run them in a thread. A log-in with an unknown name verifies against a stand-in hash, so it
takes as long as one with a wrong password.
"""

import asyncio
from dataclasses import dataclass
from typing import Final

from argon2 import PasswordHasher, Type
from argon2.exceptions import InvalidHashError, VerificationError
from sqlalchemy import insert, select, update
from sqlalchemy.ext.asyncio import AsyncConnection

from tenancy import tables
from tenancy.ids import NAME_LENGTH_MAX, Entropy, new_id, require_name

PASSWORD_LENGTH_MIN: Final = 12
PASSWORD_LENGTH_MAX: Final = 1_024  # bounds the work of hashing what a stranger sends
SALT_BYTES: Final = 16

# OWASP's argon2id setting with the least memory that still slows a GPU: several log-ins at once must fit the process.
_HASHER: Final = PasswordHasher(time_cost=2, memory_cost=19_456, parallelism=1, hash_len=32, type=Type.ID)

# The hash of 32 random bytes that were thrown away, under the setting above: what an unknown name is verified against.
STAND_IN_HASH: Final = (
    "$argon2id$v=19$m=19456,t=2,p=1$qfmqtbpnH/cnKXbBJ03MDg$0u2amRrnER5l8CfGz5GHGr0JhRaOGn+/P+6TyrZeZRE"
)


class WeakPasswordError(ValueError):
    """The password is too short or too long. The message does not show it."""


class DuplicateOperatorError(ValueError):
    """There is an operator of this name."""


class UnknownOperatorError(LookupError):
    """There is no operator of this name."""


@dataclass(frozen=True, slots=True)
class Operator:
    operator_id: str
    name: str
    created_ns: int


def hash_password(password: str, *, entropy: Entropy) -> str:
    """An argon2id hash in PHC text form. Raises WeakPasswordError. Slow: call it in a thread."""
    if not PASSWORD_LENGTH_MIN <= len(password) <= PASSWORD_LENGTH_MAX:
        raise WeakPasswordError(f"a password has {PASSWORD_LENGTH_MIN} to {PASSWORD_LENGTH_MAX} characters")
    return _HASHER.hash(password.encode("utf-8", "surrogatepass"), salt=entropy(SALT_BYTES))


def verify_password(password_hash: str, password: str) -> bool:
    """Whether the password is the one that was hashed. Slow: call it in a thread."""
    try:
        return _HASHER.verify(password_hash, password[:PASSWORD_LENGTH_MAX].encode("utf-8", "surrogatepass"))
    except (VerificationError, InvalidHashError):
        return False


async def create_operator(
    conn: AsyncConnection, name: str, password: str, now_ns: int, *, entropy: Entropy
) -> Operator:
    """Raises WeakPasswordError, InvalidNameError or DuplicateOperatorError."""
    if await conn.scalar(select(_TABLE.c.id).where(_TABLE.c.name == require_name(name))):
        raise DuplicateOperatorError(f"there is an operator named {name!r}")
    password_hash = await asyncio.to_thread(hash_password, password, entropy=entropy)
    made = Operator(new_id("opr", entropy), name, now_ns)
    await conn.execute(
        insert(_TABLE).values(
            id=made.operator_id, name=name, password_hash=password_hash, created_ns=now_ns, disabled_ns=None
        )
    )
    return made


async def verify_operator(conn: AsyncConnection, name: str, password: str) -> Operator | None:
    """The operator, or None for an unknown name, a wrong password or a disabled account: all take the same time."""
    asked = name if len(name) <= NAME_LENGTH_MAX and name.isprintable() else ""  # no operator has an empty name
    row = (
        await conn.execute(
            select(_TABLE.c.id, _TABLE.c.name, _TABLE.c.created_ns, _TABLE.c.password_hash, _TABLE.c.disabled_ns).where(
                _TABLE.c.name == asked
            )
        )
    ).first()
    stored = STAND_IN_HASH if row is None else row.password_hash
    matches = await asyncio.to_thread(verify_password, stored, password)
    if row is None or not matches or row.disabled_ns is not None or len(password) > PASSWORD_LENGTH_MAX:
        return None
    return Operator(row.id, row.name, row.created_ns)


async def disable_operator(conn: AsyncConnection, name: str, *, now_ns: int) -> bool:
    """Ends the operator's sessions and tokens, for good. False where it was disabled. Raises UnknownOperatorError."""
    active = (_TABLE.c.name == name) & _TABLE.c.disabled_ns.is_(None)
    if (await conn.execute(update(_TABLE).where(active).values(disabled_ns=now_ns))).rowcount:
        return True
    if not await conn.scalar(select(_TABLE.c.id).where(_TABLE.c.name == name)):
        raise UnknownOperatorError(f"there is no operator {name!r}")
    return False


_TABLE: Final = tables.operator
