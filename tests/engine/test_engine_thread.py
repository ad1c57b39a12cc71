"""The engine thread when things break: nobody is left waiting, and the process says so with its exit code."""

import os
from pathlib import Path

import pytest
from msgspec.structs import replace

from engine.engine_thread import Command, Connection, EngineThread, Received
from engine.form_compiler import Compiled, FormCompiler
from engine.journal import Journal, read_journals
from engine.protocol import (
    Abort,
    Drain,
    FrameReader,
    FromWorker,
    Incident,
    SamplingParams,
    TokenOutput,
    decode_from_worker,
)
from engine.scheduling.break_off import Newcomers
from engine.step_result import StepResult
from tests.faults.stage import ParityMatcher
from tests.strategies.integer_model import IntegerRunner, Watcher, continuation, decode, integer_core, submit

FORMED = SamplingParams(2, temperature=0.0, grammar="even")


class Harness:
    """An engine thread on the integer model, with everything it delivers on record. Runs in the test's own thread."""

    def __init__(self, folder: Path) -> None:
        self.watcher = Watcher(8, 4, 2)
        self.core, runner = integer_core(observer=self.watcher, num_blocks=64)
        self.runner: IntegerRunner = runner
        self.journal = Journal(folder, "epoch")
        self.delivered: list[tuple[Connection | None, FromWorker]] = []
        self.journal_sizes: list[int] = []
        self.thread = EngineThread(self.core, self.journal, 3, self.deliver)

    def deliver(self, frames: dict[Connection, bytes], to_all: bytes) -> None:
        self.journal_sizes.append(os.stat(self.journal.path).st_size)
        for connection, data in [(None, to_all), *frames.items()]:
            self.delivered += [(connection, decode_from_worker(body)) for body in FrameReader().feed(data)]

    def endings(self) -> dict[str, str]:
        outputs = [message for _, message in self.delivered if isinstance(message, TokenOutput)]
        return {output.sequence_id: output.error for output in outputs if output.finish_reason is not None}


@pytest.fixture
def harness(tmp_path: Path) -> Harness:
    return Harness(tmp_path)


def connection() -> Connection:
    return Connection(writer=None)  # type: ignore[arg-type]  # the engine thread only compares connections


def test_repeated_failures_end_the_worker_with_an_error(harness: Harness, capsys: pytest.CaptureFixture[str]) -> None:
    harness.runner.fail_steps = set(range(1, 100))
    mine = connection()
    for index in range(20):
        harness.thread.commands.put(Received(mine, submit(f"s{index}", [1, 2], 5)))
    assert harness.thread.run() == 1
    assert harness.endings() == {f"s{index}": "engine_failure" for index in range(20)}
    assert harness.core.step_number == 3
    assert harness.core.pool.num_free == 64
    assert "3 steps in a row failed" in capsys.readouterr().err


def test_a_journal_that_cannot_be_written_stops_everything_before_it_is_sent(harness: Harness) -> None:
    harness.thread.commands.put(Received(connection(), submit("s", [1, 2], 5)))
    os.close(harness.journal._fd)
    harness.journal._fd = os.open("/dev/full", os.O_WRONLY)
    assert harness.thread.run() == 1
    assert harness.delivered == [], "unlogged means unserved"


def test_our_own_bug_ends_every_sequence_and_the_thread(harness: Harness) -> None:
    def broken() -> None:
        raise AssertionError("a broken invariant")

    harness.core.scheduler.schedule = broken  # type: ignore[assignment,method-assign]
    harness.thread.commands.put(Received(connection(), submit("s", [1, 2], 5)))
    with pytest.raises(AssertionError, match="a broken invariant"):
        harness.thread.run()
    assert harness.thread.exit_code == 1
    assert harness.endings() == {"s": "engine_failure"}


def test_incidents_go_to_everybody_and_outputs_to_their_owner(harness: Harness) -> None:
    harness.watcher.violations = [("foreign_read", ("bad",), ("a",), 0, "detail")]
    harness.runner.fail_steps = set(range(5, 99))  # to end the run
    mine, other = connection(), connection()
    harness.thread.commands.put(Received(mine, submit("bad", [1, 2], 3)))
    harness.thread.commands.put(Received(other, submit("good", [1, 2], 3)))
    for index in range(9):
        harness.thread.commands.put(Received(other, submit(f"more{index}", [1, 2], 9)))
    assert harness.thread.run() == 1
    incidents = [(owner, message) for owner, message in harness.delivered if isinstance(message, Incident)]
    assert [(owner, message.kind) for owner, message in incidents] == [(None, "foreign_read")]
    owners = {message.sequence_id: owner for owner, message in harness.delivered if isinstance(message, TokenOutput)}
    assert owners["bad"] is mine
    assert owners["good"] is other
    assert (harness.endings()["bad"], harness.endings()["good"]) == ("isolation_violation", "")


def test_violations_in_too_many_steps_close_the_door(harness: Harness) -> None:
    steps = harness.core.step

    def violating(newcomers: Newcomers | None = None) -> StepResult:
        number = harness.core.step_number
        if number < 3 and number != 1:  # steps 1 and 3
            harness.watcher.violations = [("foreign_block", (f"bad{number}",), ("a",), 0, "detail")]
        if number == 5:
            harness.thread.commands.put(Received(mine, submit("late", [1, 2], 2)))
            harness.thread.commands.put(Drain(60_000))
        return steps(newcomers)

    mine = connection()
    harness.core.step = violating  # type: ignore[method-assign]
    harness.thread.violating_steps_max = 2
    for name in ("bad0", "bad2", "good"):
        harness.thread.commands.put(Received(mine, submit(name, [1, 2], 9)))
    assert harness.thread.run() == 0
    endings = harness.endings()
    assert endings == {"bad0": "isolation_violation", "bad2": "isolation_violation", "late": "closed", "good": ""}
    kinds = [message.kind for _, message in harness.delivered if isinstance(message, Incident)]
    assert kinds == ["foreign_block", "foreign_block", "admission_closed"]
    assert harness.thread.stats is not None
    assert harness.thread.stats.closed


@pytest.mark.parametrize("in_core", [False, True])
def test_an_output_that_nobody_asked_for_is_dropped_and_everybody_else_goes_on(harness: Harness, in_core: bool) -> None:
    """In the core without an owner, or of a name that was never heard of: nobody gets it, everybody hears of it."""
    step, mine, end = harness.core.step, connection(), 6
    harness.runner.fail_steps = set(range(end, 99))  # to end the run
    if in_core:
        harness.core.add(submit("stranger", [7, 7], 9))

    def crossed(newcomers: Newcomers | None = None) -> StepResult:
        result = step(newcomers)
        if harness.core.step_number == 3 and not in_core:
            result.outputs.append(replace(result.outputs[0], sequence_id="stranger"))
        return result

    harness.core.step = crossed  # type: ignore[method-assign]
    for index in range(2):
        harness.thread.commands.put(Received(mine, submit(f"s{index}", [index + 1], 3)))
    for index in range(9):
        harness.thread.commands.put(Received(mine, submit(f"more{index}", [1, 2], 9)))
    assert harness.thread.run() == 1
    more = {f"more{index}": "engine_failure" for index in range(9)}
    assert harness.endings() == {"s0": "", "s1": ""} | more
    texts = dict.fromkeys(("s0", "s1"), "")
    for _, message in harness.delivered:
        if isinstance(message, TokenOutput) and message.sequence_id in texts:
            texts[message.sequence_id] += message.text
    assert texts == {f"s{index}": decode(continuation([index + 1], 3)) for index in range(2)}
    incidents = [(owner, message) for owner, message in harness.delivered if isinstance(message, Incident)]
    assert [(owner, one.kind, one.sequence_ids) for owner, one in incidents] == [
        (None, "output_of_stranger", ["stranger"])
    ]
    assert "stranger" not in read_journals(harness.journal.path.parent)
    assert harness.core.pool.num_free == 64


def test_the_journal_is_written_before_the_frames(harness: Harness) -> None:
    harness.runner.fail_steps = {4, 5, 6}
    for index in range(9):
        harness.thread.commands.put(Received(connection(), submit(f"s{index}", [1, 2], 9)))
    harness.thread.run()
    assert all(size > 0 for size in harness.journal_sizes)
    assert harness.journal_sizes == sorted(set(harness.journal_sizes))
    last = {m.sequence_id: m.num_completion_tokens for _, m in harness.delivered if isinstance(m, TokenOutput)}
    records = read_journals(harness.journal.path.parent)
    assert {name: record.num_completion_tokens for name, record in records.items()} == last


def test_who_comes_during_a_step_is_looked_at_and_obeyed_after_it_in_order(harness: Harness) -> None:
    """What cannot enter the core with the next commands is no reason to break off a step."""
    seen: list[list[str]] = []
    steps, mine = harness.core.step, connection()
    harness.core.matchers = ParityMatcher
    forms = harness.thread._forms = FormCompiler(ParityMatcher, harness.thread.commands.put, lambda: 0.0)
    compiled = Compiled(replace(submit("compiled", [1], 2), sampling=FORMED), ParityMatcher("even"))
    forms._pending[compiled.submit.sequence_id] = (compiled.submit, 0.0)
    forms._num_by_domain["a"] = 1
    forgotten = Compiled(replace(submit("forgotten", [1], 2), sampling=FORMED), ParityMatcher("even"))
    coming: list[Command] = [
        Received(mine, submit("new", [1, 2], 2)),
        Received(mine, replace(submit("formed", [1], 2), sampling=FORMED)),
        Received(mine, submit("first", [1, 2], 2)),
        Received(mine, submit("audit/replay", [1, 2], 2)),
        Received(mine, submit("gone", [1, 2], 2)),
        Received(mine, Abort("gone")),
        compiled,
        forgotten,
        Compiled(replace(submit("broken", [1], 2), sampling=FORMED), None),
    ]

    def looking(newcomers: Newcomers | None = None) -> StepResult:
        if newcomers is None:  # it drains
            seen.append([])
        elif not seen:
            seen.append([one.sequence_id for one in newcomers()])
            for command in coming:
                harness.thread.commands.put(command)
            seen.append([one.sequence_id for one in newcomers()])
            harness.thread.commands.put(Received(mine, Drain(60_000)))
            harness.thread.commands.put(Received(mine, submit("late", [1, 2], 2)))
            seen.append([one.sequence_id for one in newcomers()])
            assert set(harness.core._sequences) == {"first"}
        return steps(newcomers)

    harness.core.step = looking  # type: ignore[method-assign]
    harness.thread.commands.put(Received(mine, submit("first", [1, 2], 2)))
    harness.thread._owners["compiled"] = mine
    assert harness.thread.run() == 0
    assert seen[:3] == [[], ["new", "compiled"], []]
    assert not any(seen[3:])
    endings = harness.endings()
    assert (endings["new"], endings["gone"], endings["late"], endings["compiled"]) == ("", "", "draining", "")
