"""Whose the engine's time and blocks are, written into each sequence's account while it runs.

    step     its wall time is shared by the rows that were scheduled, by their tokens. The parts are cut at whole
             nanoseconds in the order of the rows, so together they are the step, to the nanosecond.
    own      steps without a row, and the parts of sequences that no client has asked for (engine/own_runs.py)
    block    counts from the event that gives it to the one that takes it, for one sequence at a time: of several that
             share it, for the one that has had it longest. So the accounts of a domain add up to the blocks that it
             has in use, and who reads a prompt first pays for it, as it does for computing it.

A step that is broken off for a newcomer is the newcomer's, as its tokens are (engine/scheduling/break_off.py): it finds
the time in its account when it enters. Where it does not enter before the next step, the time is the engine's own.

The rows' time is what the step takes from schedule to release, the observer's included. What happens between two steps
(commands, journal, frames) is nobody's. Blocks that are cached and unread are nobody's either.

Events that contradict each other are the observer's business: nothing here fails over them.
"""

from collections.abc import Callable, Iterable

from engine.effort import Account
from engine.events import EngineEvent
from engine.protocol import OWN
from engine.scheduling.schedule import ScheduledRow
from engine.sequence import Sequence


class Timekeeper:
    """``clock_ns``: nanoseconds that never go back."""

    def __init__(self, clock_ns: Callable[[], int]) -> None:
        self.step_ns = 0  # of all steps
        self.own_ns = 0  # of those, what is no client's
        self._clock_ns = clock_ns
        self._accounts: dict[str, Account] = {}
        self._holders: dict[int, list[Account]] = {}  # by block: who has it, longest first; it counts for the first
        self._begun_ns = 0
        self._cause = ""  # for whom the last step was broken off
        self._owed_ns = 0  # what that one owes

    def enter(self, sequence: Sequence) -> None:
        account = sequence.account
        self._accounts[sequence.sequence_id] = account
        account.is_own = sequence.sequence_id.startswith(OWN) or sequence.domain.startswith(OWN)
        if self._owed_ns and sequence.sequence_id == self._cause:
            account.effort.engine_ns, self._owed_ns = self._owed_ns, 0

    def begin_step(self) -> None:
        self.own_ns += self._owed_ns
        self._cause, self._owed_ns = "", 0
        self._begun_ns = self._clock_ns()

    def break_off(self, cause: Sequence | None) -> None:
        """The step under way ends before its time."""
        self._cause = cause.sequence_id if cause is not None else ""

    def end_step(self, rows: Iterable[ScheduledRow]) -> None:
        """``rows``: all that were scheduled, whatever has become of them."""
        now_ns = self._clock_ns()
        spent_ns = now_ns - self._begun_ns
        self.step_ns += spent_ns
        shared_ns = 0 if self._cause else spent_ns
        self._owed_ns = spent_ns - shared_ns
        num_tokens = sum(row.num_new_tokens for row in rows)
        num_before = before_ns = 0
        for row in rows:
            num_before += row.num_new_tokens
            until_ns = shared_ns * num_before // num_tokens
            account = row.sequence.account
            account.effort.engine_ns += until_ns - before_ns
            account.hold(0, now_ns)
            if account.is_own:
                self.own_ns += until_ns - before_ns
            before_ns = until_ns
        self.own_ns += shared_ns - before_ns  # nobody was there

    def hear(self, events: Iterable[EngineEvent]) -> None:
        """What has happened to blocks and sequences since it last heard."""
        now_ns = self._clock_ns()
        for event in events:
            if event.kind in ("allocate", "share"):
                self._give(event, now_ns)
            elif event.kind == "free":
                self._take(event, now_ns)
            elif event.kind == "end":
                self._accounts.pop(event.sequence_id, None)

    def _give(self, event: EngineEvent, now_ns: int) -> None:
        account = self._accounts.get(event.sequence_id)
        if account is not None:
            holders = self._holders.setdefault(event.block_id, [])
            holders.append(account)
            if len(holders) == 1:
                account.hold(1, now_ns)

    def _take(self, event: EngineEvent, now_ns: int) -> None:
        account, holders = self._accounts.get(event.sequence_id), self._holders.get(event.block_id, [])
        if account is None or account not in holders:
            return
        counted = holders[0] is account
        holders.remove(account)
        if counted:
            account.hold(-1, now_ns)
            if holders:
                holders[0].hold(1, now_ns)
        if not holders:
            del self._holders[event.block_id]
