"""A circuit breaker: after one failure callers are refused at once, until a probe has been answered.

    closed --a call fails or takes too long--> open --a probe is answered--> closed

Probes are sent beside the callers, one at a time and PROBE_INTERVAL_S apart, when somebody asks (`allows`): nobody
waits for a store that is gone, and no task outlives its probe.
"""

import asyncio
from collections.abc import Awaitable, Callable
from typing import TypeVar

from gateway.world import World
from tenancy.quotas.quota import QuotaUnavailableError

CALL_TIMEOUT_S = 1.0  # of one call; a script takes well under a millisecond
PROBE_TIMEOUT_S = 0.5
PROBE_INTERVAL_NS = 250_000_000

Result = TypeVar("Result")


class Breaker:
    """`on_change(is_open, reason)` is called at each turn, from the event loop."""

    def __init__(
        self, world: World, probe: Callable[[], Awaitable[object]], on_change: Callable[[bool, str], None]
    ) -> None:
        self._world = world
        self._probe = probe
        self._on_change = on_change
        self._probing: asyncio.Task[None] | None = None
        self._next_probe_ns = 0
        self.is_open = False

    def allows(self) -> bool:
        """Whether a call may be made now; where not, a probe is under way or soon will be."""
        if self.is_open and self._probing is None and self._world.monotonic_ns() >= self._next_probe_ns:
            self._probing = asyncio.create_task(self._try(), name="store-probe")
        return not self.is_open

    async def call(self, work: Callable[[], Awaitable[Result]]) -> Result:
        """Raises QuotaUnavailableError: at once while open, else when `work` does or takes too long."""
        if not self.allows():
            raise QuotaUnavailableError("the store of quotas did not answer a moment ago")
        try:
            async with asyncio.timeout(CALL_TIMEOUT_S):
                return await work()
        except QuotaUnavailableError as error:
            self._open(str(error))
            raise
        except TimeoutError as error:
            self._open("no answer in time")
            raise QuotaUnavailableError("the store of quotas did not answer in time") from error

    async def close(self) -> None:
        """End a probe that is under way."""
        if self._probing is not None:
            self._probing.cancel()
            await asyncio.gather(self._probing, return_exceptions=True)

    def _open(self, reason: str) -> None:
        self._next_probe_ns = self._world.monotonic_ns() + PROBE_INTERVAL_NS
        if not self.is_open:
            self.is_open = True
            self._on_change(True, reason)

    async def _try(self) -> None:
        try:
            async with asyncio.timeout(PROBE_TIMEOUT_S):
                await self._probe()
        except Exception:  # whatever it is, the store cannot be used yet
            self._next_probe_ns = self._world.monotonic_ns() + PROBE_INTERVAL_NS
        else:
            self.is_open = False
            self._on_change(False, "")
        finally:
            self._probing = None
