"""Wrong tokens are counted, in Valkey, over WINDOW_MS:

1. of one public id from one address, PAIR_MAX: after them that token is not looked at any more from there, whoever
   sends it. Only somebody who knows the public id, which is no secret but nowhere public, can bring that about;
2. from one address, ADDRESS_MAX: after them a wrong token from there is told to wait (429 instead of 401). A right one
   is served: many operators may come through one proxy, and no stranger behind it may lock them out.

Addresses are counted as for log-ins (admin/attempts.py). Without Valkey nothing is counted and tokens are served: a
secret has 256 bits, the bounds are against noise, and while Valkey is gone an operator must be able to act.
"""

import hashlib
import hmac
from typing import Any

import structlog
from redis.asyncio import Redis
from redis.exceptions import RedisError

from gateway.admin.attempts import network_of
from gateway.api.problems import TooManyTriesError

WINDOW_MS = 15 * 60 * 1000
PAIR_MAX = 10
ADDRESS_MAX = 60

# KEYS: counters. Adds ARGV[2] to each (0: only looks) and returns each count and the milliseconds it has left.
_COUNT = """
local found = {}
for i = 1, #KEYS do
  local count = tonumber(redis.call('GET', KEYS[i]) or '0')
  if ARGV[2] == '1' then
    count = redis.call('INCR', KEYS[i])
    if count == 1 then redis.call('PEXPIRE', KEYS[i], ARGV[1]) end
  end
  found[#found + 1] = count
  found[#found + 1] = redis.call('PTTL', KEYS[i])
end
return found
"""

log = structlog.get_logger("gateway.operators.tries")


class Tries:
    def __init__(self, redis: Redis, session_key: bytes) -> None:
        self._redis = redis
        self._key = session_key

    async def check(self, public_id: str, address: str) -> None:
        """Before a token is looked at. Raises TooManyTriesError."""
        found = await self._count([self._name("pair", f"{network_of(address)}\0{public_id}")], adding=False)
        if found and found[0] >= PAIR_MAX:
            raise TooManyTriesError(found[1])

    async def note(self, public_id: str, address: str) -> None:
        """A token was wrong. Raises TooManyTriesError for one too many from this address."""
        names = [self._name("address", network_of(address))]
        if public_id:
            names.append(self._name("pair", f"{network_of(address)}\0{public_id}"))
        found = await self._count(names, adding=True)
        if found and found[0] > ADDRESS_MAX:
            raise TooManyTriesError(found[1])

    async def _count(self, names: list[str], *, adding: bool) -> list[int]:
        try:
            script: Any = self._redis.eval(_COUNT, len(names), *names, WINDOW_MS, int(adding))
            return [int(one) for one in await script]
        except (RedisError, OSError, TimeoutError) as error:
            log.warning("operator.tries_not_counted", error=type(error).__name__)
            return []

    def _name(self, kind: str, text: str) -> str:
        digest = hmac.new(self._key, f"bulkhead/operator-tries/v1\0{kind}\0{text}".encode(), hashlib.sha256)
        return f"bulkhead:{{operator-tries}}:v1:{kind}:{digest.hexdigest()}"
