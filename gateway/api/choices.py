"""The answers of one request, from the engine: one sequence each, read as they come.

The others are submitted when the first has given its first token: by then its prompt is in the prefix cache, and they
find it there instead of reading it again at the same time.
"""

import asyncio
from collections import deque

from engine.client import EngineClient, Generation
from engine.protocol import Effort as Measured
from engine.protocol import Submit, TokenOutput
from gateway.sequences import effort_of, together
from tenancy.usage.meter import Effort, Usage

NOTHING = Usage(num_prompt_tokens=0, num_cached_tokens=0, num_completion_tokens=0)


class Choices:
    """``submits``: one an answer. None in place of one is an answer that no token was left for: it is empty and ends
    with `length`."""

    def __init__(self, client: EngineClient, submits: list[Submit | None]) -> None:
        self._client = client
        self._empty = deque(index for index, submit in enumerate(submits) if submit is None)
        self._waiting = [(index, submit) for index, submit in enumerate(submits) if submit is not None]
        self._generations: dict[int, Generation] = {}
        self._pulls: dict[int, asyncio.Task[TokenOutput]] = {}
        self._produced = [NOTHING] * len(submits)
        self._delivered = [NOTHING] * len(submits)
        self._efforts: list[Measured | None] = [Measured() for _ in submits]
        self._alone = len(submits) == 1
        self._aborted = False
        self.cut = False  # an abort came before all had begun

    @property
    def produced(self) -> Usage:
        """As last reported by the engine."""
        return together(self._produced)

    @property
    def delivered(self) -> Usage:
        """Of what has been sent to the client in a stream."""
        return together(self._delivered)

    @property
    def effort(self) -> Effort | None:
        """What all of it has taken of the engine, as last reported."""
        return effort_of(self._efforts)

    @property
    def started(self) -> bool:
        return bool(self._generations)

    @property
    def finished(self) -> bool:
        """Nothing more will come."""
        return not self._waiting and not self._empty and all(one.finished for one in self._generations.values())

    async def start(self) -> None:
        """Raises EngineGoneError."""
        await self._submit(1)

    async def next(self) -> tuple[int, TokenOutput]:
        """The next output of any of them, and which it is. May be cancelled; nothing is lost by it.

        Raises EngineGoneError.
        """
        if self._empty:
            return self._empty.popleft(), TokenOutput("", "", (), 0, 0, 0, "length")
        index, output = await self._pulled()
        self._produced[index] = Usage(
            num_prompt_tokens=output.num_prompt_tokens,
            num_cached_tokens=output.num_cached_tokens,
            num_completion_tokens=output.num_completion_tokens,
        )
        self._efforts[index] = output.effort
        if output.num_completion_tokens:
            await self._submit(len(self._waiting))
        return index, output

    async def _pulled(self) -> tuple[int, TokenOutput]:
        if self._alone:  # nothing to choose from, and as little is lost
            return 0, await anext(self._generations[0])
        for index, generation in self._generations.items():
            if index not in self._pulls and not generation.finished:
                self._pulls[index] = asyncio.create_task(generation.__anext__())
        await asyncio.wait(self._pulls.values(), return_when=asyncio.FIRST_COMPLETED)
        index = next(index for index, pull in self._pulls.items() if pull.done())  # the one that waited longest
        return index, self._pulls.pop(index).result()

    def mark_delivered(self, index: int) -> None:
        """All that was last produced of this answer has been sent."""
        self._delivered[index] = self._produced[index]

    def abort(self) -> None:
        """Stop what runs, forget what has not begun. What runs still ends with exact counts."""
        self._aborted = True
        self.cut = self.cut or bool(self._waiting or self._empty)
        self._waiting.clear()
        self._empty.clear()
        for generation in self._generations.values():
            if not generation.finished:
                self._client.abort(generation.sequence_id)

    async def close(self) -> None:
        for pull in self._pulls.values():
            pull.cancel()
        await asyncio.gather(*self._pulls.values(), return_exceptions=True)

    async def _submit(self, count: int) -> None:
        for _ in range(count):
            if not self._waiting:  # aborted meanwhile
                return
            index, submit = self._waiting.pop(0)
            self._generations[index] = await self._client.submit(submit)
            if self._aborted:
                self._client.abort(submit.sequence_id)
