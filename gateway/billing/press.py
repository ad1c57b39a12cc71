"""Makes files of invoices in a thread, one at a time: a page takes a core for a moment, and requests need it, too."""

import asyncio

from gateway.api.problems import PressBusyError
from gateway.records.invoices import FileKind, InvoiceFile

WAITERS_MAX = 8  # more are told to come back
MEDIA_TYPES = {"pdf": "application/pdf", "csv": "text/csv; charset=utf-8", "json": "application/json"}


class Press:
    def __init__(self) -> None:
        self._place = asyncio.Semaphore(1)
        self._num_waiting = 0

    async def make(self, file: InvoiceFile, kind: FileKind) -> bytes:
        """Raises PressBusyError."""
        if self._num_waiting >= WAITERS_MAX:
            raise PressBusyError
        self._num_waiting += 1
        try:
            async with self._place:
                return await asyncio.to_thread(file.render, kind)
        finally:
            self._num_waiting -= 1
