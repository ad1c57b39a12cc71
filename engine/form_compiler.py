"""Forms of answers are compiled beside the steps: a thread of its own makes the matcher of each sequence that asks for
a form, and the first mask with it, which is the dearest. The sequence enters the engine when both are there, so no
step ever waits for a grammar.

Nobody waits long for another's grammars, either: domains take turns, each has at most PER_DOMAIN_MAX here, and
engine/sampling/grammar.py limits what one may cost. A compilation cannot be stopped from outside. If one hangs all the
same, whoever waits longer than WAIT_MAX_S fails alone; sequences without a form go on.

A matcher takes about 700 bytes for each character of its grammar, so the characters of all sequences with a form, from
`begin` to `ended`, have limits, of each domain and of all together.

No matcher is kept for the next that asks for the same form: how fast it came would tell one tenant what another asks.

``tell`` is called in the compiler's thread, everything else by the engine thread.
"""

import threading
from collections import Counter, deque
from collections.abc import Callable
from dataclasses import dataclass

from engine.protocol import Submit
from engine.sampling.matcher import Matcher

PER_DOMAIN_MAX = 64
PENDING_MAX = 1_024
CHARS_PER_DOMAIN_MAX = 250_000
CHARS_MAX = 1_000_000
WAIT_MAX_S = 10.0


@dataclass(frozen=True, slots=True)
class Compiled:
    submit: Submit
    form: Matcher | None  # None: it does not compile


class FormCompiler:
    """``make`` is engine/sampling/matcher.py's, ``now`` a monotonic clock in seconds."""

    def __init__(
        self, make: Callable[[str], Matcher], tell: Callable[[Compiled], None], now: Callable[[], float]
    ) -> None:
        self._make = make
        self._tell = tell
        self._now = now
        self._pending: dict[str, tuple[Submit, float]] = {}  # by sequence id, in order of arrival; and when it came
        self._num_by_domain: dict[str, int] = {}
        self._held: dict[str, tuple[str, int]] = {}  # of who has a form or waits for one: domain, characters
        self._chars: Counter[str] = Counter()  # of those, by domain
        self._lines: dict[str, deque[Submit]] = {}  # not begun, by domain; whose turn is next comes first
        self._changed = threading.Condition()  # guards _lines and _closed
        self._closed = False
        self._thread = threading.Thread(target=self._run, name="forms", daemon=True)
        self._thread.start()

    @property
    def num_pending(self) -> int:
        return len(self._pending)

    def __contains__(self, sequence_id: str) -> bool:
        return sequence_id in self._pending

    def begin(self, submit: Submit) -> bool:
        """False: there are too many already."""
        num, num_chars = self._num_by_domain.get(submit.domain, 0), len(submit.sampling.grammar)
        if num >= PER_DOMAIN_MAX or len(self._pending) >= PENDING_MAX:
            return False
        if self._chars[submit.domain] + num_chars > CHARS_PER_DOMAIN_MAX or self._chars.total() + num_chars > CHARS_MAX:
            return False
        self._held[submit.sequence_id] = (submit.domain, num_chars)
        self._chars[submit.domain] += num_chars
        self._num_by_domain[submit.domain] = num + 1
        self._pending[submit.sequence_id] = (submit, self._now())
        with self._changed:
            self._lines.setdefault(submit.domain, deque()).append(submit)
            self._changed.notify()
        return True

    def forget(self, sequence_id: str) -> Submit | None:
        """Its form is wanted no more. None if it is not (or no longer) here."""
        submit, _ = self._pending.pop(sequence_id, (None, 0.0))
        if submit is None:
            return None
        self._num_by_domain[submit.domain] -= 1
        if not self._num_by_domain[submit.domain]:
            del self._num_by_domain[submit.domain]
        with self._changed:
            line = self._lines.get(submit.domain)
            if line is not None and submit in line:
                line.remove(submit)
                if not line:
                    del self._lines[submit.domain]
        return submit

    def ended(self, sequence_id: str) -> None:
        """A sequence is over, with a form or without."""
        domain, num_chars = self._held.pop(sequence_id, ("", 0))
        self._chars[domain] -= num_chars
        if not self._chars[domain]:
            del self._chars[domain]

    def claim(self, compiled: Compiled) -> bool:
        """Whether somebody still waits for just this."""
        name = compiled.submit.sequence_id
        if self._pending.get(name, (None, 0.0))[0] is not compiled.submit:
            return False
        self.forget(name)
        return True

    def overdue(self) -> list[Submit]:
        """Who has waited too long; they are forgotten."""
        latest_s = self._now() - WAIT_MAX_S
        names = [name for name, (_, since_s) in self._pending.items() if since_s < latest_s]
        return [submit for name in names if (submit := self.forget(name)) is not None]

    def forget_all(self, domain: str | None = None) -> list[Submit]:
        """Of one domain, or of all."""
        names = [name for name, (submit, _) in self._pending.items() if domain is None or submit.domain == domain]
        return [submit for name in names if (submit := self.forget(name)) is not None]

    def close(self) -> None:
        """The thread ends after what it is at."""
        with self._changed:
            self._closed = True
            self._changed.notify()

    def _run(self) -> None:
        while (submit := self._take()) is not None:
            form: Matcher | None = None
            try:
                form = self._make(submit.sampling.grammar)
                if form.allowed([]) is None:
                    form = None
            except BaseException:  # the library's panics are no Exceptions; whatever it was, this sequence fails alone
                form = None
            self._tell(Compiled(submit, form))

    def _take(self) -> Submit | None:
        with self._changed:
            self._changed.wait_for(lambda: self._lines or self._closed)
            if self._closed:
                return None
            domain = next(iter(self._lines))
            line = self._lines.pop(domain)
            submit = line.popleft()
            if line:
                self._lines[domain] = line  # behind all others
            return submit
