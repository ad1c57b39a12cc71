"""Work that repeats while the server runs: sequencing the log, expiring holds, heartbeats, worker start and loss.

Each loop survives a failing round (the database may be away for a while) and counts it; nothing here serves a tenant.
"""

import asyncio
import contextlib
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field

import structlog

log = structlog.get_logger(__name__)


@dataclass(slots=True)
class Loop:
    """Run `round_` every `interval_s`, at once the first time; `run_once` also serves the last round at shutdown."""

    name: str
    interval_s: float
    round_: Callable[[], Awaitable[object]]
    num_failures: int = 0
    last_error: str = ""
    _task: asyncio.Task[None] | None = field(default=None, init=False)
    _stop: asyncio.Event = field(default_factory=asyncio.Event, init=False)

    def start(self) -> None:
        self._task = asyncio.create_task(self._forever(), name=self.name)

    async def stop(self) -> None:
        """Let a round that has begun finish (it may hold a transaction), then end."""
        self._stop.set()
        if self._task is not None:
            await self._task

    async def run_once(self) -> bool:
        """One round; True when it succeeded."""
        try:
            await self.round_()
        except Exception as error:  # logged and counted; the next round tries again
            self.num_failures += 1
            self.last_error = f"{type(error).__name__}: {error}"
            log.error("round failed", loop=self.name, error=self.last_error, num_failures=self.num_failures)
            return False
        self.last_error = ""
        return True

    async def _forever(self) -> None:
        while not self._stop.is_set():
            await self.run_once()
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._stop.wait(), self.interval_s)
