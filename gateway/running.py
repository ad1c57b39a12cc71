"""The exchanges that run in this process, by tenant and key, so that those of a suspended or deleted tenant, or of a
revoked key, can be ended.

The house looks twice a second whether a tenant with running exchanges is still active and none of their keys is revoked
(gateway/host/housekeeping.py); with the read and the abort of the sequences they have ended within a second, on every
replica.

Also the requests that are open here, from before their admission until they are settled: their holds are nobody
else's to settle while this process lives (gateway/host/housekeeping.py).
"""

from typing import NamedTuple, Protocol

from tenancy.access.keys import Principal


class Dismissable(Protocol):
    def dismiss(self, why: Exception) -> None:
        """Stop the engine's work now and end the answer with that. May be called again."""


class Owner(NamedTuple):
    tenant_id: str
    key_id: str


class Running:
    def __init__(self) -> None:
        self._by_owner: dict[Owner, set[Dismissable]] = {}
        self.open_requests: set[str] = set()

    def add(self, principal: Principal, exchange: Dismissable) -> None:
        self._by_owner.setdefault(_owner_of(principal), set()).add(exchange)

    def remove(self, principal: Principal, exchange: Dismissable) -> None:
        owner = _owner_of(principal)
        left = self._by_owner[owner]
        left.discard(exchange)
        if not left:
            del self._by_owner[owner]

    def owners(self) -> list[Owner]:
        return list(self._by_owner)

    def dismiss(self, owner: Owner, why: Exception) -> None:
        for exchange in list(self._by_owner.get(owner, ())):
            exchange.dismiss(why)


def _owner_of(principal: Principal) -> Owner:
    return Owner(principal.tenant_id, principal.key_id)
