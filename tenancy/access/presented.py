"""What a client proves itself with: a public id to find the row, and a 256-bit secret that only its holder has.

    <prefix>-<public id: 16 hex>-<secret: 43 base64url characters>

The database holds HMAC-SHA256(pepper, public id and secret text), so neither a stolen table nor a stolen pepper is
enough. The HMAC covers the text, not the decoded bytes: base64 has several texts for the same bytes, and each has one.
Every kind has a prefix and an HMAC of its own: what is stored of one can never answer for another. A malformed text
costs the same work as a wrong one: stand-ins take the place of its parts.
"""

import hashlib
import hmac
import re
from base64 import urlsafe_b64encode
from dataclasses import dataclass, field
from typing import ClassVar, Final, Self

from tenancy.ids import Entropy

SECRET_BYTES: Final = 32
# No row has this public id, no secret has this HMAC.
_NO_PUBLIC_ID: Final = "-" * 16
_NO_SECRET: Final = "-" * 43
_NO_HMAC: Final = bytes(32)


@dataclass(frozen=True, slots=True)
class Presented:
    """A text as a client sent it, without its secret: where its row is, and what must stand there."""

    PREFIX: ClassVar[str]
    CONTEXT: ClassVar[str]
    PATTERN: ClassVar[re.Pattern[str]]

    public_id: str
    secret_hmac: bytes = field(repr=False)

    def __init_subclass__(cls) -> None:
        cls.PATTERN = re.compile(rf"{cls.PREFIX}-([0-9a-f]{{16}})-([A-Za-z0-9_-]{{43}})")

    @classmethod
    def of(cls, text: str, pepper: bytes) -> Self:
        match = cls.PATTERN.fullmatch(text)
        public_id, secret = match.groups() if match else (_NO_PUBLIC_ID, _NO_SECRET)
        return cls(public_id, secret_hmac(cls.CONTEXT, pepper, public_id, secret))

    @classmethod
    def mint(cls, entropy: Entropy, pepper: bytes) -> tuple[str, Self]:
        """A new text, which exists here and nowhere else, and what is stored of it."""
        public_id = entropy(8).hex()
        secret = urlsafe_b64encode(entropy(SECRET_BYTES)).rstrip(b"=").decode()
        made = cls(public_id, secret_hmac(cls.CONTEXT, pepper, public_id, secret))
        return f"{cls.PREFIX}-{public_id}-{secret}", made

    @property
    def is_one(self) -> bool:
        """Whether the text had the form of its kind."""
        return self.public_id != _NO_PUBLIC_ID

    def matches(self, stored: bytes | None) -> bool:
        """Whether the row holds this secret; in constant time. ``stored``: None where there is no row."""
        return hmac.compare_digest(_NO_HMAC if stored is None else stored, self.secret_hmac)


def secret_hmac(context: str, pepper: bytes, public_id: str, secret: str) -> bytes:
    message = f"{context}\0{public_id}\0{secret}".encode()
    return hmac.new(pepper, message, hashlib.sha256).digest()
