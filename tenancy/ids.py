"""Ids are opaque strings: a prefix that says what they name, and 128 random bits in hex."""

from collections.abc import Callable

Entropy = Callable[[int], bytes]  # num_bytes -> that many cryptographically strong random bytes

NAME_LENGTH_MAX = 100  # what the name columns hold


class InvalidNameError(ValueError):
    """A name is empty, too long, padded with spaces, or holds characters that do not print."""


def new_id(prefix: str, entropy: Entropy) -> str:
    """A random id such as ``ten_3f9c...``."""
    return f"{prefix}_{entropy(16).hex()}"


def require_name(name: str) -> str:
    """Return `name` if a person can read it back from a list. Raises InvalidNameError that shows it."""
    if not 1 <= len(name) <= NAME_LENGTH_MAX or name != name.strip() or not name.isprintable():
        raise InvalidNameError(f"a name is 1 to {NAME_LENGTH_MAX} printable characters, not padded: {name[:200]!r}")
    return name
