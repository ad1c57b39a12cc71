"""How much of the prefix cache each domain is sure of, and how much it may fill. Counted in cached blocks: published
ones that nobody reads, which is all that eviction can take.

Floor: a part of the pool is reserved for floors, in equal parts for all domains that hold any block. While a domain has
no more cached blocks than its floor, nobody else's allocation evicts one of them. Equal, because a floor is a promise
to everybody and not a measure of use; small, because what is kept for one cannot be had by the others. A sequence that
was accepted must be able to run to its end alone, whatever the others have cached, so the reservation leaves room for
the model's whole context: on a pool that is not larger than that there is no floor.

Ceiling: beyond it a domain's own longest unread blocks lose their names when another one is put by. By default it is
the whole pool: a lone tenant has all of the cache, and with others around the oldest goes first whoever's it is.

What a domain's evictions tell: that others were busy. A floor makes that channel narrower, since below it nothing that
others do is seen; it does not close it.
"""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class CacheShares:
    floor_percent: int = 0  # of the usable blocks, reserved for all floors together
    ceiling_percent: int = 100  # of the usable blocks, for each domain
    num_blocks_kept_free: int = 0  # what the largest sequence needs: never reserved

    def __post_init__(self) -> None:
        if not 0 <= self.floor_percent <= 50:
            raise ValueError(f"floor_percent must be between 0 and 50, not {self.floor_percent}")
        if not 1 <= self.ceiling_percent <= 100:
            raise ValueError(f"ceiling_percent must be between 1 and 100, not {self.ceiling_percent}")

    def num_reserved(self, num_usable: int) -> int:
        return max(0, min(num_usable * self.floor_percent // 100, num_usable - self.num_blocks_kept_free))

    def floor(self, num_usable: int, num_domains: int) -> int:
        return self.num_reserved(num_usable) // max(1, num_domains)

    def ceiling(self, num_usable: int) -> int:
        return num_usable * self.ceiling_percent // 100
