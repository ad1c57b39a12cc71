"""Names of prefixes: what a KV block's content depends on, as one SHA-256 chain.

    root      = H(domain, cache_salt, model digest)
    key of a block = H(key of the block before it (the root for the first), token ids of the block)

Keys and values of a token depend on every token before it, hence the chain. Every part carries a type and a length,
so no two different lists of parts have the same encoding, whatever their contents are: a salt cannot pass for a piece
of a domain, nor a domain's end for a salt's beginning. The domain and the salt are in every key through the root.
"""

import hashlib
import struct
from collections.abc import Iterable, Sequence
from enum import Enum


class Part(Enum):
    """One byte each. A new kind of part (an adapter, a picture) gets a byte of its own; none is ever used again."""

    DOMAIN = b"D"
    CACHE_SALT = b"S"
    MODEL_DIGEST = b"M"
    PARENT = b"P"
    TOKENS = b"T"


def encode(parts: Iterable[tuple[Part, bytes]]) -> bytes:
    """Type, length in 8 bytes, content; for each part in order. Injective."""
    return b"".join(part.value + len(content).to_bytes(8, "big") + content for part, content in parts)


def root_key(*, domain: str, cache_salt: bytes, model_digest: str) -> bytes:
    """What no two sequences share unless domain, salt and model are all the same."""
    parts = [
        (Part.DOMAIN, domain.encode()),
        (Part.CACHE_SALT, cache_salt),
        (Part.MODEL_DIGEST, model_digest.encode()),
    ]
    return hashlib.sha256(encode(parts)).digest()


def block_key(parent: bytes, token_ids: Sequence[int]) -> bytes:
    """The name of a block that holds ``token_ids`` and follows the block named ``parent``."""
    packed = struct.pack(f">{len(token_ids)}q", *token_ids)
    return hashlib.sha256(encode([(Part.PARENT, parent), (Part.TOKENS, packed)])).digest()
