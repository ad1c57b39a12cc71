"""What one request found out and the next ones need again. Nothing here is believed for what it decides:

    callers   by key, for less than a second, and only for requests that are admitted in the end: T1 looks again
              whether key and tenant are active. So a revoked key is refused at once where it would cost anything. What
              may be old is a key's limits and rules. Whoever asks often is looked up again after an answer, before it
              is forgotten, so that no request waits for it
    prices    until a T1 finds that another one is in force: it is told which price was thought to be

Bounded; forgotten wholly when full.
"""

import hmac
from typing import TYPE_CHECKING

from gateway.world import World
from tenancy.access.keys import PresentedKey
from tenancy.pricing.prices import Price

if TYPE_CHECKING:
    from gateway.api.auth import Caller

CALLER_NS = 750_000_000
AGEING_NS = CALLER_NS // 2
ENTRIES_MAX = 10_000


class Remembered:
    def __init__(self) -> None:
        self._callers: dict[str, tuple[PresentedKey, Caller, int]] = {}
        self._looked_up: set[str] = set()  # public ids: somebody is at it
        self._prices: dict[tuple[str, str, str], Price] = {}

    def caller(self, world: World, key: PresentedKey, peer: str | None) -> "Caller | None":
        """Also None for another secret of a known key, and from a network that it may not come from."""
        found = self._callers.get(key.public_id)
        if found is None or world.monotonic_ns() >= found[2]:
            return None
        known, caller, _ = found
        matches = hmac.compare_digest(known.secret_hmac, key.secret_hmac)
        return caller if matches and caller.principal.rules.allows_peer(peer) else None

    def keep_caller(self, key: PresentedKey, caller: "Caller", asked_ns: int) -> None:
        """`asked_ns`: the monotonic clock before the database was asked."""
        if len(self._callers) >= ENTRIES_MAX:
            self._callers.clear()
        self._callers[key.public_id] = (key, caller, asked_ns + CALLER_NS)
        self._looked_up.discard(key.public_id)

    def take_ageing(self, world: World, key: PresentedKey) -> bool:
        """Whether to look the caller up again: then nobody else is told to before `given_up` or `keep_caller`."""
        found = self._callers.get(key.public_id)
        left_ns = 0 if found is None else found[2] - world.monotonic_ns()
        if not 0 < left_ns <= AGEING_NS or key.public_id in self._looked_up:
            return False
        self._looked_up.add(key.public_id)
        return True

    def given_up(self, key: PresentedKey) -> None:
        """It could not be looked up, or is not valid any more: the next request asks."""
        self._looked_up.discard(key.public_id)
        self._callers.pop(key.public_id, None)

    def price(self, tenant_id: str, model: str, tier: str) -> Price | None:
        return self._prices.get((tenant_id, model, tier))

    def keep_price(self, tenant_id: str, model: str, tier: str, price: Price) -> None:
        if len(self._prices) >= ENTRIES_MAX:
            self._prices.clear()
        self._prices[tenant_id, model, tier] = price
