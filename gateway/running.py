"""The exchanges that run in this process, by tenant, so that those of a suspended or deleted tenant can be ended.

The house looks twice a second whether a tenant with running exchanges is still active (gateway/host/housekeeping.py);
with the read and the abort of the sequences they have ended within a second, on every replica.

Also the requests that are open here, from before their admission until they are settled: their holds are nobody
else's to settle while this process lives (gateway/host/housekeeping.py).
"""

from typing import Protocol


class Dismissable(Protocol):
    def dismiss(self) -> None:
        """Stop the engine's work now and end the answer. May be called again."""


class Running:
    def __init__(self) -> None:
        self._by_tenant: dict[str, set[Dismissable]] = {}
        self.open_requests: set[str] = set()

    def add(self, tenant_id: str, exchange: Dismissable) -> None:
        self._by_tenant.setdefault(tenant_id, set()).add(exchange)

    def remove(self, tenant_id: str, exchange: Dismissable) -> None:
        left = self._by_tenant[tenant_id]
        left.discard(exchange)
        if not left:
            del self._by_tenant[tenant_id]

    def tenant_ids(self) -> list[str]:
        return list(self._by_tenant)

    def dismiss(self, tenant_id: str) -> int:
        """How many exchanges were told to end."""
        exchanges = list(self._by_tenant.get(tenant_id, ()))
        for exchange in exchanges:
            exchange.dismiss()
        return len(exchanges)
