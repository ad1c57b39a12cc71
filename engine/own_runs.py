"""Sequences that no client has asked for: the observer wants them to be run, and hears alone what they say.

A run that must be alone begins when the engine has nothing else to do and is broken off when a client's sequence comes:
that one waits for the step in flight and no longer. A run in company has the lowest tier, which takes what all others
leave. There is one run at a time. Runs alone take at most ``idle_percent`` of the time in which there is nothing to do:
after each, the engine rests for its share.

What a run has published in the prefix cache is forgotten with it. Its blocks are free without a name then, and are
taken first by whoever comes next; so runs cost tenants the cached blocks that the largest of them needed, once.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass

from engine.core import EngineCore
from engine.protocol import OWN, Submit, TokenOutput


def is_own(submit: Submit) -> bool:
    """Whether it bears a name that only the observer's own sequences may have."""
    return submit.sequence_id.startswith(OWN) or submit.domain.startswith(OWN)


@dataclass(slots=True)
class OwnRuns:
    """``clock`` in seconds."""

    core: EngineCore
    idle_percent: int
    clock: Callable[[], float] = time.monotonic
    _running: Submit | None = None
    _is_alone: bool = False
    _begun_s: float = 0.0
    _not_before_s: float = float("-inf")

    def start(self, *, idle: bool) -> None:
        """Begin the next run if the observer has one and it is time."""
        if self._running is not None or (idle and self.clock() < self._not_before_s):
            return
        while (submit := self.core.observer.next_run(idle=idle)) is not None:
            assert is_own(submit), f"the observer's own run is called {submit.sequence_id!r} in {submit.domain!r}"
            refused = self.core.add(submit)
            if refused is None:
                self._running, self._is_alone, self._begun_s = submit, idle, self.clock()
                return
            self.core.observer.before_release(self.core.step_number, [refused])

    def give_way(self, *, at_all: bool = False) -> None:
        """A client's sequence comes: nothing may run that has to be alone; or nothing ``at_all``."""
        if self._running is not None and (self._is_alone or at_all):
            self.core.abort(self._running.sequence_id)
            self._end()

    def erase(self, domain: str) -> int:
        """Whose domain it is has left: the observer forgets it, and what its own runs have left of it is zeroed. In how
        many blocks."""
        self.give_way()
        return sum(self.core.erase_domain(own)[1] for own in self.core.observer.forget_domain(domain))

    def wait_s(self) -> float | None:
        """How long an idle engine may wait before it asks again; None: until something happens."""
        rest_s = self._not_before_s - self.clock()
        return rest_s if rest_s > 0 else None

    def without(self, outputs: list[TokenOutput]) -> list[TokenOutput]:
        """The outputs that are for clients."""
        if self._running is None:
            return outputs
        mine = [output for output in outputs if output.sequence_id == self._running.sequence_id]
        if any(output.finish_reason is not None for output in mine):
            self._end()
        return [output for output in outputs if output not in mine] if mine else outputs

    def _end(self) -> None:
        assert self._running is not None
        self.core.pool.forget_domains([self._running.domain])
        if self._is_alone:
            now_s = self.clock()
            self._not_before_s = now_s + (now_s - self._begun_s) * (100 - self.idle_percent) / self.idle_percent
        self._running = None
