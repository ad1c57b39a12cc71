"""The policy `lease`: what one gateway has taken of each scope's limits beforehand, and spends while the store is gone.

While the store is there, slices are cut anew every few seconds (lua/cut_v3.lua) and lie untouched; the store holds
them apart, so others have that much less. When it is gone, a request must fit into the slices of all its scopes, or
takes nothing from any. A slice ends here before it ends there: its life is counted from before it was asked for.

A slice belongs to the epoch in which it was cut (quota_epochs.py). Whoever spends it writes its hold in SQL, where
another epoch refuses it: so a slice that a rebuilt store no longer knows of is worth nothing.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from tenancy.quotas.limits import ScopeLimits


@dataclass(slots=True)
class Slice:
    """What is left. A dimension without a limit has no bound here either."""

    limits: ScopeLimits
    epoch: str
    ends_ns: int  # monotonic
    num_requests: int
    num_tokens: int
    num_slots: int
    num_tokens_of_day: int

    def fits(self, num_tokens: int) -> bool:
        limits = self.limits
        return (
            (limits.requests_per_minute is None or self.num_requests >= 1)
            and (limits.tokens_per_minute is None or self.num_tokens >= num_tokens)
            and (limits.concurrency_max is None or self.num_slots >= 1)
            and (limits.tokens_per_day is None or self.num_tokens_of_day >= num_tokens)
        )

    def spend(self, num_tokens: int) -> None:
        self.num_requests -= 1
        self.num_tokens -= num_tokens
        self.num_slots -= 1
        self.num_tokens_of_day -= num_tokens


@dataclass(slots=True)
class Slices:
    """One gateway's slices, by scope id."""

    _by_scope: dict[str, Slice] = field(default_factory=dict)

    def put(self, one: Slice) -> None:
        self._by_scope[one.limits.scope_id] = one

    def drop(self, scope_ids: Iterable[str]) -> None:
        for scope_id in scope_ids:
            self._by_scope.pop(scope_id, None)

    def spend(self, scopes: Sequence[ScopeLimits], num_tokens: int, monotonic_ns: int) -> list[Slice] | None:
        """Take a request from every scope's slice, or None and nothing from any. All must be of one epoch.

        Limits that were changed since the slice was cut are not those that it was cut from: it is worth nothing.
        """
        found = [self._by_scope.get(one.scope_id) for one in scopes]
        slices = [one for one in found if one is not None]
        if len(slices) != len(scopes) or len({one.epoch for one in slices}) > 1:
            return None
        for limits, one in zip(scopes, slices, strict=True):
            if one.limits != limits or monotonic_ns >= one.ends_ns or not one.fits(num_tokens):
                return None
        for one in slices:
            one.spend(num_tokens)
        return slices

    @staticmethod
    def give_back(slices: Iterable[Slice]) -> None:
        """A request that was taken has ended: its place is free. Its tokens stay spent."""
        for one in slices:
            one.num_slots += 1
