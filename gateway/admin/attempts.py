"""How often one may guess: log-in attempts per (name, address) and per address, counted in Valkey.

Rules:
1. An attempt is counted before the password is looked at, so parallel guesses cannot slip past the bound.
2. One script counts in every window or in none. A refused attempt does not lengthen the wait.
3. A success forgives its own (name, address) only. Names alone are never locked: nobody can lock an operator out
   from somewhere else.
"""

import hashlib
import hmac
import ipaddress
from typing import Any

from redis.asyncio import Redis

WINDOW_MS = 15 * 60 * 1000
ATTEMPTS_MAX = 5  # for one name from one address
ADDRESS_ATTEMPTS_MAX = 60  # for all names from one address: each costs an argon2 hash

# KEYS: counters. ARGV: window_ms, then each counter's maximum. Returns 0, or milliseconds to wait.
_COUNT = """
local wait = 0
for i = 1, #KEYS do
  local count = tonumber(redis.call('GET', KEYS[i]) or '0')
  if count >= tonumber(ARGV[i + 1]) then
    wait = math.max(wait, redis.call('PTTL', KEYS[i]), 1)
  end
end
if wait > 0 then return wait end
for i = 1, #KEYS do
  if redis.call('INCR', KEYS[i]) == 1 then redis.call('PEXPIRE', KEYS[i], ARGV[1]) end
end
return 0
"""


class TooManyAttemptsError(Exception):
    """The bound is reached; try again in `retry_after_s` seconds."""

    def __init__(self, retry_after_s: int) -> None:
        super().__init__(f"too many log-in attempts; try again in {retry_after_s} s")
        self.retry_after_s = retry_after_s


class Attempts:
    def __init__(self, redis: Redis, session_key: bytes) -> None:
        self._redis = redis
        self._key = session_key

    async def count(self, name: str, address: str) -> None:
        """Count one attempt. Raises TooManyAttemptsError when it must not be made."""
        keys = [self._pair_key(name, address), self._name("address", network_of(address))]
        script: Any = self._redis.eval(_COUNT, len(keys), *keys, WINDOW_MS, ATTEMPTS_MAX, ADDRESS_ATTEMPTS_MAX)
        wait_ms = int(await script)
        if wait_ms > 0:
            raise TooManyAttemptsError(-(-wait_ms // 1000))

    async def forgive(self, name: str, address: str) -> None:
        await self._redis.delete(self._pair_key(name, address))

    def _pair_key(self, name: str, address: str) -> str:
        return self._name("pair", f"{network_of(address)}\0{name}")

    def _name(self, kind: str, text: str) -> str:
        digest = hmac.new(self._key, f"bulkhead/admin-attempts/v1\0{kind}\0{text}".encode(), hashlib.sha256)
        return f"bulkhead:{{admin-attempts}}:v1:{kind}:{digest.hexdigest()}"


def network_of(address: str) -> str:
    """The address that attempts are counted for: IPv4 as it is, IPv6 by its /64, which one person has whole."""
    try:
        parsed = ipaddress.ip_address(address)
    except ValueError:
        return address
    if isinstance(parsed, ipaddress.IPv6Address):
        if parsed.ipv4_mapped is not None:
            return str(parsed.ipv4_mapped)
        return str(ipaddress.ip_network((parsed, 64), strict=False))
    return str(parsed)
