"""The HTTP process's view of the engine worker: connected, starting or lost.

The supervisor owns the worker's process; this link only holds the connection, so that handlers ask one object.
"""

from dataclasses import dataclass
from typing import Literal

from engine.client import EngineClient
from engine.protocol import Ready, Stats

State = Literal["starting", "ready", "lost"]


class EngineUnavailableError(Exception):
    """No engine worker is connected; the caller answers 503 with Retry-After."""


@dataclass(frozen=True, slots=True)
class EngineStatus:
    state: State
    num_restarts: int
    ready: Ready | None
    stats: Stats | None


class EngineLink:
    def __init__(self) -> None:
        self._client: EngineClient | None = None
        self._state: State = "starting"
        self.num_restarts = 0

    def attach(self, client: EngineClient) -> None:
        self._client = client
        self._state = "ready"

    def detach(self) -> None:
        self._client = None
        self._state = "lost"

    def client(self) -> EngineClient:
        if self._client is None or self._client.closed.is_set():
            raise EngineUnavailableError(f"the engine worker is {self.status.state}")
        return self._client

    @property
    def status(self) -> EngineStatus:
        client = self._client
        if client is None:
            return EngineStatus(self._state, self.num_restarts, None, None)
        state: State = "lost" if client.closed.is_set() else "ready"
        return EngineStatus(state, self.num_restarts, client.ready, client.stats)
