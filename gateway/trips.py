"""Connections to PostgreSQL for single statements, each a transaction of its own.

The driver's own connections, made as SQLAlchemy makes them, without what it does around a statement: that costs more
than a short one does. They are used last in, first out, at most CONNECTIONS_MAX at once. One that has failed for
another reason than its statement is closed; one that the server has closed is not used again.
"""

import asyncio
from typing import Any

from sqlalchemy.ext.asyncio import create_async_engine
from sqlalchemy.pool import NullPool

CONNECTIONS_MAX = 10
WAIT_S = 5.0  # for one of them to be free, and for a new one to be made


class Trips:
    def __init__(self, url: str) -> None:
        self._engine = create_async_engine(url, poolclass=NullPool)  # only to connect
        self._places = asyncio.Semaphore(CONNECTIONS_MAX)
        self._free: list[Any] = []  # SQLAlchemy's wrappers, each with its driver's connection

    async def value(self, text: str, arguments: tuple[object, ...]) -> Any:
        """The value that the statement gives. Raises the driver's errors, OSError or TimeoutError."""
        if self._places.locked():
            async with asyncio.timeout(WAIT_S):
                await self._places.acquire()
        else:
            await self._places.acquire()  # at once
        try:
            wrapped = self._at_hand()
            if wrapped is None:
                async with asyncio.timeout(WAIT_S):
                    wrapped = await self._new()
            driver = wrapped.driver_connection
            try:
                value = await driver.fetchval(text, *arguments)
            except BaseException as error:
                if getattr(error, "sqlstate", None) is None or driver.is_closed():
                    driver.terminate()
                else:
                    self._free.append(wrapped)
                raise
            self._free.append(wrapped)
            return value
        finally:
            self._places.release()

    async def close(self) -> None:
        for wrapped in self._free:
            wrapped.driver_connection.terminate()
        self._free.clear()
        await self._engine.dispose()

    def _at_hand(self) -> Any:
        while self._free:
            wrapped = self._free.pop()
            if not wrapped.driver_connection.is_closed():
                return wrapped
        return None

    async def _new(self) -> Any:
        proxy = await self._engine.raw_connection()
        wrapped = proxy.dbapi_connection
        proxy.detach()  # nobody else's: not given back when the proxy goes
        return wrapped
