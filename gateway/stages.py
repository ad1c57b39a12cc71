"""Where a request's time goes: the moments of its way, noted as it passes them. For benchmarks; a server notes nothing.

    authenticate   the key looked up, or remembered
    read           the body read, parsed, put through the chat template and tokenized
    quota          every limit of the caller, one script
    hold           T1: price, credit, budgets, hold, log entry, committed
    engine         the sequence submitted, its last token back
    settle         T2: capture, usage row, log entry, committed; the lease released beside it
    answer         written

What is before the first and after the last, TLS and HTTP and the way between the processes, is not seen from here.
"""

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Final

import msgspec

STAGES: Final = ("authenticate", "read", "quota", "hold", "engine", "settle", "answer")


class Passage(msgspec.Struct, array_like=True):
    """One request: when it began, by the monotonic clock, and how long each stage took."""

    began_ns: int
    stages_ns: dict[str, int]


class Stopwatch:
    __slots__ = ("_last_ns", "_monotonic_ns", "passage")

    def __init__(self, monotonic_ns: Callable[[], int]) -> None:
        self._monotonic_ns = monotonic_ns
        self._last_ns = monotonic_ns()
        self.passage = Passage(self._last_ns, {})

    def passed(self, stage: str) -> None:
        now_ns = self._monotonic_ns()
        stages_ns = self.passage.stages_ns
        stages_ns[stage] = stages_ns.get(stage, 0) + now_ns - self._last_ns
        self._last_ns = now_ns


class Stages:
    """Keeps every passage in a file, a line each, for another process to read."""

    def __init__(self, path: Path, monotonic_ns: Callable[[], int]) -> None:
        self._file = path.open("ab", buffering=0)
        self._monotonic_ns = monotonic_ns

    def begin(self, state: dict[str, Any]) -> None:
        state["stopwatch"] = Stopwatch(self._monotonic_ns)

    def keep(self, state: dict[str, Any]) -> None:
        self._file.write(msgspec.json.encode(state["stopwatch"].passage) + b"\n")

    def close(self) -> None:
        self._file.close()


def passed(state: Mapping[str, Any], stage: str) -> None:
    """The request whose state this is has just ended `stage`."""
    stopwatch = state.get("stopwatch")
    if stopwatch is not None:
        stopwatch.passed(stage)


def read_passages(path: Path) -> Iterator[Passage]:
    """Those that are in the file by now; of requests that went the whole way."""
    decoder = msgspec.json.Decoder(Passage)
    for line in path.read_bytes().split(b"\n")[:-1]:
        passage = decoder.decode(line)
        if len(passage.stages_ns) == len(STAGES):
            yield passage
