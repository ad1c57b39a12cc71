"""What the observer wants to be run: it waits for idle time, makes way at once, and nobody else hears of it."""

from collections.abc import Sequence
from pathlib import Path

import pytest
from msgspec.structs import replace

from audit.runtime import replay
from engine import own_runs
from engine.engine_thread import Connection, EngineThread, Received, Wake
from engine.events import Violation
from engine.journal import Journal, read_journals
from engine.own_runs import OwnRuns
from engine.protocol import Abort, Drain, FrameReader, FromWorker, Incident, Submit, TokenOutput, decode_from_worker
from tests.strategies.integer_model import Watcher, continuation, integer_core, submit


class Wishes(Watcher):
    """An observer that wants these runs, and notes what it hears."""

    def __init__(self) -> None:
        super().__init__(8, 4, 2)
        self.alone: list[Submit] = []
        self.in_company: list[Submit] = []
        self.heard: list[TokenOutput] = []
        self.finds_differences = False

    def next_run(self, *, idle: bool) -> Submit | None:
        line = self.alone if idle else self.in_company
        return line.pop(0) if line else None

    def before_release(self, step: int, outputs: Sequence[TokenOutput]) -> list[Violation]:
        self.heard += outputs
        ended = [one for one in outputs if one.finish_reason and one.sequence_id.startswith("audit/")]
        return [("replay_differs", ("gone",), ("tenant",), -1, "detail")] if ended and self.finds_differences else []

    def tokens(self, name: str) -> list[int]:
        return [token for one in self.heard if one.sequence_id == name for token in one.token_ids]


def own(name: str, num_tokens: int = 4, prompt: list[int] | None = None) -> Submit:
    return submit(f"audit/{name}", prompt or [1, 2, 3, 4, 5], num_tokens, domain="audit/a", tier="batch")


class House:
    """An engine thread whose turns the test takes."""

    def __init__(self, folder: Path) -> None:
        self.wishes = Wishes()
        self.core, _ = integer_core(observer=self.wishes, num_blocks=64)
        self.delivered: list[FromWorker] = []
        self.journal = Journal(folder, "epoch")
        self.thread = EngineThread(self.core, self.journal, 3, self.deliver, idle_percent=100)
        self.client = Connection(writer=None)  # type: ignore[arg-type]

    def deliver(self, frames: dict[Connection, bytes], to_all: bytes) -> None:
        for data in (to_all, *frames.values()):
            self.delivered += [decode_from_worker(body) for body in FrameReader().feed(data)]

    def turn(self, *messages: Submit | Abort | Drain) -> None:
        for message in messages:
            self.thread.commands.put(Received(self.client, message))
        if not self.core.has_work and not self.wishes.alone:
            self.thread.commands.put(Wake())  # or it would wait
        self.thread._turn()

    def finish(self) -> None:
        while self.core.has_work or self.wishes.alone:
            self.turn()


@pytest.fixture
def house(tmp_path: Path) -> House:
    return House(tmp_path)


def test_the_two_rooms_agree_on_the_names() -> None:
    assert own_runs.OWN == replay.OWN


def test_idle_time_is_for_the_observers_runs_and_nobody_else_hears_of_them(house: House) -> None:
    house.wishes.alone = [own("1"), own("2")]
    house.finish()
    for name in ("audit/1", "audit/2"):
        assert house.wishes.tokens(name) == continuation([1, 2, 3, 4, 5], 4)
    cached = [one.num_cached_tokens for one in house.wishes.heard]
    assert cached == [0] * len(cached), "the first one's blocks were forgotten with it"
    assert house.delivered == []
    assert read_journals(house.journal.path.parent) == {}
    assert (house.core.pool.num_free, house.core.pool.num_published) == (64, 0)


def test_a_client_waits_for_the_step_in_flight_and_no_longer(house: House) -> None:
    house.wishes.alone = [own("long", 60)]
    for _ in range(5):
        house.turn()
    assert house.core.scheduler.running
    house.turn(submit("s", [7, 8], 3))
    assert {one.sequence_id for one in house.core.scheduler.running} == {"s"}
    assert house.wishes.heard[-2].finish_reason == "abort"
    assert house.wishes.tokens("s") == continuation([7, 8], 1), "it was in the first step after it came"
    house.finish()
    assert {one.sequence_id for one in house.delivered if isinstance(one, TokenOutput)} == {"s"}


def test_nothing_runs_alone_while_a_client_is_served(house: House) -> None:
    house.turn(submit("s", [7, 8], 6))
    house.wishes.alone = [own("1")]
    while any(one.sequence_id == "s" for one in house.core.scheduler.running):
        assert len(house.core.scheduler.running) == 1
        house.turn()
    house.finish()
    assert house.wishes.tokens("audit/1") == continuation([1, 2, 3, 4, 5], 4)


def test_a_run_in_company_takes_what_others_leave(house: House) -> None:
    house.wishes.in_company = [own("canary", 6)]
    house.turn(submit("s", [7, 8], 3), submit("t", [7, 9], 30))
    house.finish()
    assert house.wishes.tokens("audit/canary") == continuation([1, 2, 3, 4, 5], 6)
    assert {one.sequence_id for one in house.delivered if isinstance(one, TokenOutput)} == {"s", "t"}
    assert not any(name.startswith("audit/") for name in read_journals(house.journal.path.parent))


def test_a_client_cannot_take_such_a_name(house: House) -> None:
    for taken in (replace(submit("s", [1], 2), sequence_id="audit/replay/1"), submit("s", [1], 2, domain="audit/a")):
        house.turn(taken)
        last = house.delivered[-1]
        assert isinstance(last, TokenOutput)
        assert last.error == "invalid_input"
    assert not house.core.has_work


def test_the_observer_hears_that_a_run_was_refused(house: House) -> None:
    house.wishes.alone = [own("huge", 10_000), own("1")]
    house.finish()
    assert [(one.sequence_id, one.error) for one in house.wishes.heard[:1]] == [("audit/huge", "too_long")]
    assert house.wishes.tokens("audit/1") == continuation([1, 2, 3, 4, 5], 4)


@pytest.mark.parametrize("closed", [False, True])
def test_draining_and_closed_workers_run_nothing_of_their_own(house: House, closed: bool) -> None:
    house.wishes.alone = [own("1", 60), own("2", 60)]
    house.turn()
    if closed:
        house.thread.num_violating_steps = house.thread.violating_steps_max
        house.thread._own.give_way()
    else:
        house.thread.commands.put(Drain(60_000))
        assert house.thread.run() == 0
    house.thread.commands.put(Wake())
    house.thread._turn()
    assert not house.core.has_work
    assert house.wishes.alone == [own("2", 60)]


def test_differences_in_too_many_runs_close_the_door(house: House) -> None:
    house.thread.violating_steps_max = 2
    house.wishes.finds_differences = True
    house.wishes.alone = [own(str(number)) for number in range(4)]
    while house.core.has_work or not house.thread.closed:
        house.turn()
    house.thread.commands.put(Wake())
    house.thread._turn()
    assert [one.sequence_id for one in house.wishes.alone] == ["audit/2", "audit/3"], "nothing is run any more"
    kinds = [(one.kind, one.domains) for one in house.delivered if isinstance(one, Incident)]
    assert kinds == [("replay_differs", ["tenant"]), ("replay_differs", ["tenant"]), ("admission_closed", [])]
    house.turn(submit("s", [7, 8], 3))
    last = house.delivered[-1]
    assert isinstance(last, TokenOutput)
    assert last.error == "closed"


def test_runs_take_their_share_of_idle_time() -> None:
    now = [100.0]
    wishes = Wishes()
    core, _ = integer_core(observer=wishes, num_blocks=64)
    runs = OwnRuns(core, idle_percent=20, clock=lambda: now[0])
    wishes.alone = [own("1"), own("2")]
    runs.start(idle=True)
    while core.has_work:
        now[0] += 1.0
        assert runs.without(core.step().outputs) == []
    num_s = now[0] - 100.0
    assert runs.wait_s() == pytest.approx(4 * num_s)
    now[0] += 4 * num_s - 0.5
    runs.start(idle=True)
    assert not core.has_work
    now[0] += 0.5
    assert runs.wait_s() is None
    runs.start(idle=True)
    assert core.has_work
