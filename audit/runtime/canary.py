"""Canaries: the auditor's own sequences, run in company, whose prompts hold a secret marker that nobody else knows.

A marker is 64 random bits in hexadecimal. It must not appear in any other sequence's text: it would have come out of
the canary's blocks, rows or text. The text that leaves is searched for the markers that still live, exactly, across
the borders of outputs; a marker lives on after its canary, since what is left over leaks later. The output in which a
marker becomes whole does not leave; what came before it has.

This finds what is recited, and only that: a model that read a foreign block and says something else is not seen here.
A canary that does not recite its own marker shows that this model would hardly recite it for others
(``num_recited``).
"""

import hashlib
from collections.abc import Iterable

from audit.runtime.released_tokens import Finding, Output
from audit.runtime.replay import OWN

MARKERS_MAX = 8  # that are looked for at a time
MARKER_BYTES = 8


class Canaries:
    """``interval_s`` 0: none. ``seed``, 0 to 2^127, decides the markers: it is a secret."""

    def __init__(self, interval_s: float = 0.0, seed: int = 0) -> None:
        self.num_canaries = 0
        self.num_recited = 0
        self.num_leaks = 0
        self._interval_s = interval_s
        self._key = seed.to_bytes(16, "little")
        self._last_s: float | None = None
        self._owners: dict[str, str] = {}  # marker -> its canary
        self._silent: set[str] = set()  # canaries that have not said their own marker
        self._tails: dict[str, str] = {}  # sequence -> the end of its text, shorter than a marker

    def due(self, now_s: float) -> bool:
        """Whether it is time for the next one; the first comes an interval after the first question."""
        if not self._interval_s:
            return False
        self._last_s = now_s if self._last_s is None else self._last_s
        return now_s - self._last_s >= self._interval_s

    def begin(self, now_s: float) -> tuple[str, str]:
        """A new canary's name and marker."""
        self._last_s = now_s
        self.num_canaries += 1
        name = f"{OWN}canary/{self.num_canaries}"
        marker = hashlib.blake2b(name.encode(), key=self._key, digest_size=MARKER_BYTES).hexdigest()
        self._owners[marker] = name
        self._silent = {name}
        if len(self._owners) > MARKERS_MAX:
            del self._owners[next(iter(self._owners))]
        return name, marker

    def search(self, outputs: Iterable[Output]) -> list[Finding]:
        """Whose outputs hold a marker that is not theirs. To be called with everything that is to leave."""
        found: list[Finding] = []
        if not self._owners:
            return found
        for output in outputs:
            text = self._tails.pop(output.sequence_id, "") + output.text
            for marker, owner in self._owners.items():
                if marker not in text:
                    continue
                if output.sequence_id == owner:
                    self.num_recited += owner in self._silent
                    self._silent.discard(owner)
                elif not output.sequence_id.startswith(OWN):
                    self.num_leaks += 1
                    found.append((output.sequence_id, "canary_leak", f"its text holds the marker of {owner}"))
            if not output.finish_reason:
                self._tails[output.sequence_id] = text[1 - 2 * MARKER_BYTES :]
        return found

    def forget(self, sequence_id: str) -> None:
        """It has ended and its last output was not searched."""
        self._tails.pop(sequence_id, None)
