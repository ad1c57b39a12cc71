"""A real database whose next transactions fail on request: before they begin, or after they have committed."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any, Literal

from sqlalchemy.ext.asyncio import AsyncConnection

from gateway.database import Database, DatabaseUnavailableError

Fault = Literal["none", "before", "after"]


class FlakyDatabase(Database):
    def __init__(self, url: str) -> None:
        super().__init__(url)
        self.faults: list[Fault] = []  # taken from the front, one a transaction
        self.down = False  # every transaction and every read fails

    @asynccontextmanager
    async def transaction(self, tenant_id: str = "") -> AsyncIterator[AsyncConnection]:
        fault = self.faults.pop(0) if self.faults else "none"
        if self.down or fault == "before":
            raise DatabaseUnavailableError("injected: not reachable")
        async with super().transaction(tenant_id) as conn:
            yield conn
        if fault == "after":
            raise DatabaseUnavailableError("injected: the reply to the commit was lost")

    @asynccontextmanager
    async def read(self, tenant_id: str = "") -> AsyncIterator[AsyncConnection]:
        if self.down:
            raise DatabaseUnavailableError("injected: not reachable")
        async with super().read(tenant_id) as conn:
            yield conn

    async def one_trip(self, text: str, arguments: tuple[object, ...]) -> Any:
        fault = self.faults.pop(0) if self.faults else "none"
        if self.down or fault == "before":
            raise DatabaseUnavailableError("injected: not reachable")
        value = await super().one_trip(text, arguments)
        if fault == "after":
            raise DatabaseUnavailableError("injected: the reply to the commit was lost")
        return value

    @asynccontextmanager
    async def glance(self) -> AsyncIterator[AsyncConnection]:
        if self.down:
            raise DatabaseUnavailableError("injected: not reachable")
        async with super().glance() as conn:
            yield conn
