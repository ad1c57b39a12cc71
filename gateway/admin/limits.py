"""How much of each tenant's own limits is used at this moment, from Valkey, without taking any of it."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from gateway.admin.wording import count
from tenancy.quotas.limits import ScopeLimits
from tenancy.quotas.quota import Quota


@dataclass(frozen=True, slots=True)
class LimitUse:
    used: int | None  # None: nobody counts it, as nothing limits it
    maximum: int | None  # None: no limit

    def text(self) -> str:
        if self.used is None:
            return "no limit"
        return (
            f"{count(self.used)}, no limit" if self.maximum is None else f"{count(self.used)} of {count(self.maximum)}"
        )

    def percent(self) -> int:
        """0 to 100; a limit of 0 is always full."""
        if self.maximum is None or self.used is None:
            return 0
        return min(100, self.used * 100 // self.maximum) if self.maximum else 100


async def limits_in_use(quota: Quota, tenants: Sequence[ScopeLimits]) -> dict[str, Mapping[str, LimitUse]]:
    """By tenant id: "requests", "tokens" (per minute) and "concurrency". Raises QuotaUnavailableError."""
    found: dict[str, Mapping[str, LimitUse]] = {}
    for limits in tenants:
        now = await quota.usage_now(limits.scope_id, [limits])
        found[limits.scope_id] = {
            "requests": _spent(limits.requests_per_minute, now.remaining_requests),
            "tokens": _spent(limits.tokens_per_minute, now.remaining_tokens),
            "concurrency": LimitUse(now.num_leases, limits.concurrency_max),
        }
    return found


def _spent(maximum: int | None, remaining: int | None) -> LimitUse:
    if maximum is None or remaining is None:
        return LimitUse(None, maximum)
    return LimitUse(maximum - remaining, maximum)
