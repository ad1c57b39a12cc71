"""When each key, or operator's token, was last used: noted in memory while serving, written once a minute in a
transaction of its own."""

from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field

from sqlalchemy.ext.asyncio import AsyncConnection

from gateway.database import Database
from tenancy.access.keys import note_uses


@dataclass(slots=True)
class KeyUses:
    write_uses: Callable[[AsyncConnection, Mapping[str, int]], Awaitable[None]] = note_uses
    _waiting: dict[str, int] = field(default_factory=dict)  # id -> ns; only ids that exist get here

    def note(self, key_id: str, now_ns: int) -> None:
        self._waiting[key_id] = now_ns

    async def write(self, database: Database) -> None:
        """Write what was noted since the last time; what could not be written waits for the next one."""
        if not self._waiting:
            return
        uses, self._waiting = self._waiting, {}
        try:
            async with database.transaction() as conn:
                await self.write_uses(conn, uses)
        except BaseException:
            self._waiting = uses | self._waiting
            raise
