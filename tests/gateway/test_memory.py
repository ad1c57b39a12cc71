"""The collector does not look through what the start has made, and still collects what comes after."""

import gc
import weakref

from gateway.host.memory import keep_what_started


class Node:
    def __init__(self) -> None:
        self.me = self  # a cycle: only the collector ends it


def test_what_started_is_not_looked_through() -> None:
    started = [Node() for _ in range(20_000)]
    try:
        assert keep_what_started() >= len(started)
        assert len(gc.get_objects()) < 10_000
        later = Node()
        seen = weakref.ref(later)
        del later
        gc.collect()
        assert seen() is None
    finally:
        gc.unfreeze()
