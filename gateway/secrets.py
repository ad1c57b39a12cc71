"""Server secrets: created once in the data folder, readable by the owner only.

Losing key_pepper invalidates every API key. Changing cache_salt_key empties every prefix cache, by design.
"""

import hashlib
import hmac
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

SECRET_BYTES = 32


@dataclass(frozen=True, slots=True)
class Secrets:
    key_pepper: bytes  # keys the HMAC under which API key secrets are stored
    cache_salt_key: bytes  # derives each tenant's cache salt
    session_key: bytes  # derives admin session tokens' storage names, and the token for /metrics


def load_secrets(folder: Path, entropy: Callable[[int], bytes]) -> Secrets:
    """Read the secrets in `folder`, creating those that do not exist yet (mode 0600)."""
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    return Secrets(
        key_pepper=_load_or_create(folder / "key_pepper", entropy),
        cache_salt_key=_load_or_create(folder / "cache_salt_key", entropy),
        session_key=_load_or_create(folder / "session_key", entropy),
    )


def cache_salt(secrets: Secrets, tenant_id: str) -> bytes:
    """The tenant's cache salt, 32 bytes: HMAC-SHA256 over the tenant id. There is no default salt."""
    return hmac.new(secrets.cache_salt_key, b"bulkhead/cache-salt/v1\0" + tenant_id.encode(), hashlib.sha256).digest()


def metrics_token(secrets: Secrets) -> str:
    """What a scraper of /metrics presents as its bearer token; derived, so that it needs no file of its own."""
    return hmac.new(secrets.session_key, b"bulkhead/metrics-token/v1", hashlib.sha256).hexdigest()


def _load_or_create(path: Path, entropy: Callable[[int], bytes]) -> bytes:
    try:
        secret = path.read_bytes()
    except FileNotFoundError:
        secret = entropy(SECRET_BYTES)
        handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        with os.fdopen(handle, "wb") as file:
            file.write(secret)
            file.flush()
            os.fsync(file.fileno())
    if len(secret) != SECRET_BYTES:
        raise ValueError(f"{path} holds {len(secret)} bytes instead of {SECRET_BYTES}: restore it from a backup")
    return secret
