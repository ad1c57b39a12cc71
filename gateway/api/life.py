"""How long a request may go on: until its hold is nearly over, whenever it was that its answer began.

A hold's life begins when its T1 begins. T1 may have waited for the tenant's accounts, and this process may have stood
still since: so what is left is read from the hold's own end, by both clocks, and asked again before each token leaves.
What is left after it (a tenth) is for settling. Thus a token that leaves is billed within its hold, or it does not.
"""

from gateway.api.problems import DeadlineExceededError
from gateway.world import World

MARGIN_PERCENT = 10  # of the hold's life, kept for settling before it expires


class Life:
    def __init__(self, world: World, expires_ns: int, hold_ttl_s: int) -> None:
        usable_ns = hold_ttl_s * 10**7 * (100 - MARGIN_PERCENT)
        margin_ns = hold_ttl_s * 10**9 - usable_ns
        self._world = world
        self._ends_ns = expires_ns - margin_ns  # by the wall clock, as other gateways see it
        # A wall clock that is set back must not prolong it.
        left_ns = min(usable_ns, self._ends_ns - world.now_ns())
        self._ends_monotonic_ns = world.monotonic_ns() + left_ns

    @property
    def left_s(self) -> float:
        """0 when it is over."""
        world = self._world
        left_ns = min(self._ends_ns - world.now_ns(), self._ends_monotonic_ns - world.monotonic_ns())
        return max(0, left_ns) / 1e9

    def require(self) -> None:
        """Before anything of an answer leaves. Raises DeadlineExceededError."""
        if not self.left_s:
            raise DeadlineExceededError
