"""Forms compile beside the steps: nobody else waits, and what goes wrong with one ends its sequence alone."""

import threading
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from msgspec.structs import replace
from numpy.typing import NDArray

from engine import form_compiler
from engine.engine_thread import Connection, Dropped, EngineThread, Received
from engine.errors import GrammarError
from engine.form_compiler import PER_DOMAIN_MAX, WAIT_MAX_S, Compiled, FormCompiler
from engine.journal import Journal
from engine.protocol import Abort, Drain, Erase, FrameReader, Submit, TokenOutput, decode_from_worker
from engine.sampling.matcher import Matcher
from tests.strategies.integer_model import VOCAB_SIZE, integer_core, submit

PATIENCE_S = 20.0  # of a test, where it waits for a thread


class Anything:
    """A form that every answer has."""

    def __init__(self, grammar: str) -> None:
        self.grammar = grammar
        self.consumed: list[int] = []

    def allowed(self, output_token_ids: list[int]) -> NDArray[np.bool_] | None:
        return np.ones(VOCAB_SIZE, dtype=np.bool_)

    def complete(self, output_token_ids: list[int]) -> bool:
        return False


class Panic(BaseException):
    """As the library's own: no Exception."""


class Forms:
    """Makes forms when the test says so, and by the name of the grammar."""

    def __init__(self) -> None:
        self.gate = threading.Event()
        self.begun = threading.Event()
        self.made: list[str] = []

    def __call__(self, grammar: str) -> Matcher:
        self.begun.set()
        if grammar.startswith("slow"):
            assert self.gate.wait(PATIENCE_S)
        self.made.append(grammar)
        if grammar == "wrong":
            raise GrammarError("it does not compile")
        if grammar == "panic":
            raise Panic
        return Anything(grammar)


def formed(name: str, grammar: str, domain: str = "a", max_tokens: int = 3) -> Submit:
    own = submit(name, [1, 2], max_tokens, domain=domain)
    return replace(own, sampling=replace(own.sampling, grammar=grammar, ignore_eos=True))


class House:
    """An engine thread that the test turns by hand."""

    def __init__(self, folder: Path) -> None:
        self.forms = Forms()
        self.core, _ = integer_core(num_blocks=64)
        self.core.matchers = self.forms
        self.outputs: list[TokenOutput] = []
        self.thread = EngineThread(self.core, Journal(folder, "epoch"), 3, self.deliver)
        self.client = Connection(writer=None)  # type: ignore[arg-type]  # the engine thread only compares connections

    def deliver(self, frames: dict[Connection, bytes], to_all: bytes) -> None:
        for data in frames.values():
            messages = [decode_from_worker(body) for body in FrameReader().feed(data)]
            self.outputs += [message for message in messages if isinstance(message, TokenOutput)]

    def send(self, *messages: Submit | Abort) -> None:
        for message in messages:
            self.thread.commands.put(Received(self.client, message))

    def turn_until(self, done: Callable[[], bool]) -> None:
        for _ in range(1_000):
            if done():
                return
            self.thread._turn()
        raise AssertionError("it never came")

    def endings(self) -> dict[str, str]:
        """How each sequence ended; twice is an error."""
        ended = [output for output in self.outputs if output.finish_reason is not None]
        assert max(Counter(output.sequence_id for output in ended).values(), default=0) <= 1
        return {output.sequence_id: output.error or str(output.finish_reason) for output in ended}


@pytest.fixture
def house(tmp_path: Path) -> Iterator[House]:
    house = House(tmp_path)
    yield house
    house.forms.gate.set()
    assert house.thread._forms is not None
    house.thread._forms.close()


def test_a_slow_form_delays_nobody(house: House) -> None:
    house.send(formed("formed", "slow"), submit("free", [3, 4], 6, domain="b"))
    house.turn_until(lambda: "free" in house.endings())
    assert house.endings() == {"free": "length"}
    assert house.core.step_number == 6
    assert house.thread.stats is not None
    assert house.thread.stats.num_waiting == 1, "who waits for a form waits"
    house.forms.gate.set()
    house.turn_until(lambda: "formed" in house.endings())
    assert house.endings()["formed"] == "length"
    assert sum(len(output.token_ids) for output in house.outputs if output.sequence_id == "formed") == 3
    assert house.forms.made == ["slow"]


@pytest.mark.parametrize("how", ["abort", "drop"])
def test_a_sequence_ends_while_its_form_compiles(house: House, how: str) -> None:
    house.send(formed("s", "slow 1"))
    house.thread._turn()
    assert house.forms.begun.wait(PATIENCE_S)
    house.thread.commands.put(
        Received(house.client, Abort("s")) if how == "abort" else Dropped(house.client),
    )
    house.turn_until(lambda: "s" in house.endings())
    assert house.endings() == {"s": "abort"}
    assert not house.core.has_work
    house.outputs.clear()
    house.send(formed("s", "slow 2"))  # the same name: not the form that was made for the first
    house.thread._turn()
    house.forms.gate.set()
    house.turn_until(lambda: "s" in house.core._sequences)
    assert house.core._forms["s"].grammar == "slow 2"
    house.turn_until(lambda: "s" in house.endings())
    assert house.endings() == {"s": "length"}
    assert house.core._forms == {}


@pytest.mark.parametrize("grammar", ["wrong", "panic"])
def test_what_does_not_compile_ends_its_sequence_alone(house: House, grammar: str) -> None:
    house.send(formed("bad", grammar), formed("good", "fine"), submit("free", [3, 4], 3))
    house.turn_until(lambda: len(house.endings()) == 3)
    assert house.endings() == {"bad": "invalid_input", "good": "length", "free": "length"}
    assert house.thread.exit_code == 0
    assert house.core.add(formed("direct", "wrong")) is not None


def test_a_name_in_use_is_refused_while_its_form_compiles(house: House) -> None:
    house.send(formed("s", "slow"), formed("s", "other"), submit("s", [1], 1))
    house.thread._turn()
    assert [(one.sequence_id, one.error) for one in house.outputs] == [("s", "invalid_input")] * 2
    house.outputs.clear()
    house.forms.gate.set()
    house.turn_until(lambda: "s" in house.endings())
    assert house.endings() == {"s": "length"}


def test_what_the_core_would_refuse_is_not_compiled(house: House) -> None:
    house.send(formed("long", "fine", max_tokens=5_000), replace(formed("empty", "fine"), prompt_token_ids=[]))
    house.thread._turn()
    assert house.endings() == {"long": "too_long", "empty": "invalid_input"}
    assert house.forms.made == []


def test_draining_waits_for_forms_and_its_deadline_ends_them(house: House, tmp_path: Path) -> None:
    house.send(formed("s", "slow"))
    house.thread.commands.put(Drain(60_000))
    threading.Timer(0.3, house.forms.gate.set).start()
    assert house.thread.run() == 0
    assert house.endings() == {"s": "length"}
    late = House(tmp_path / "late")
    late.send(formed("s", "slow"))
    late.thread.commands.put(Drain(1))
    assert late.thread.run() == 0
    assert late.endings() == {"s": "abort"}
    late.forms.gate.set()


def test_a_domain_that_is_erased_has_nothing_left_that_compiles(house: House) -> None:
    house.send(
        formed("theirs", "slow", "leaving"), formed("also", "slow", "leaving"), formed("mine", "slow", "staying")
    )
    house.thread.commands.put(Received(house.client, Erase("leaving")))
    house.turn_until(lambda: len(house.endings()) == 2)
    house.forms.gate.set()
    house.turn_until(lambda: "mine" in house.endings())
    assert house.endings() == {"theirs": "abort", "also": "abort", "mine": "length"}


def test_long_grammars_have_room_until_their_sequences_end(house: House, monkeypatch: pytest.MonkeyPatch) -> None:
    """Counted while they compile and while they run: of one domain, and of all."""
    monkeypatch.setattr(form_compiler, "CHARS_PER_DOMAIN_MAX", 10)
    monkeypatch.setattr(form_compiler, "CHARS_MAX", 15)
    house.send(formed("a1", "slow--", "a"), formed("a2", "slow--", "a"), formed("a3", "slow", "a"))
    house.send(formed("b1", "slow--", "b"), formed("b2", "slow-", "b"))
    house.thread._turn()
    assert house.endings() == {"a2": "busy", "b1": "busy"}
    house.forms.gate.set()
    house.turn_until(lambda: len(house.core._sequences) == 3)
    house.send(formed("a4", "slow", "a"))
    house.thread._turn()
    assert house.endings()["a4"] == "busy", "they run, and hold what they hold"
    house.turn_until(lambda: len(house.endings()) == 6)
    house.send(formed("a5", "slow------", "a"))
    house.turn_until(lambda: "a5" in house.endings())
    assert house.endings()["a5"] == "length"
    assert house.thread._forms is not None
    assert not house.thread._forms._chars


def test_a_broken_engine_tells_those_whose_forms_compile(house: House) -> None:
    def broken(newcomers: object) -> None:
        raise AssertionError("a broken invariant")

    house.core.step = broken  # type: ignore[assignment,method-assign]
    house.send(formed("formed", "slow"), submit("free", [1], 3))
    with pytest.raises(AssertionError, match="a broken invariant"):
        house.thread.run()
    assert house.endings() == {"formed": "engine_failure", "free": "engine_failure"}


def test_a_preempted_sequence_keeps_its_form() -> None:
    """Compiled once, however often it leaves its row."""
    forms = Forms()
    core, _ = integer_core(num_blocks=7, block_size=2)
    core.matchers = forms
    for name in ("x", "y", "z"):
        assert core.add(formed(name, f"form of {name}", max_tokens=8)) is None
    while core.has_work:
        assert not core.step().failure
    assert core.scheduler.num_preemptions > 0
    assert forms.made == [f"form of {name}" for name in ("x", "y", "z")]


class Clock:
    def __init__(self) -> None:
        self.now_s = 0.0

    def __call__(self) -> float:
        return self.now_s


@pytest.fixture
def desk() -> Iterator[tuple[FormCompiler, Forms, list[Compiled], Clock]]:
    forms, told, clock = Forms(), list[Compiled](), Clock()
    compiler = FormCompiler(forms, told.append, clock)
    yield compiler, forms, told, clock
    forms.gate.set()
    compiler.close()
    compiler._thread.join(PATIENCE_S)
    assert not compiler._thread.is_alive()


Desk = tuple[FormCompiler, Forms, list[Compiled], Clock]


def test_domains_take_turns(desk: Desk) -> None:
    compiler, forms, told, _ = desk
    assert compiler.begin(formed("first", "slow", "flood"))
    assert forms.begun.wait(PATIENCE_S)
    for number in range(PER_DOMAIN_MAX - 1):
        assert compiler.begin(formed(f"f{number}", f"f{number}", "flood"))
    assert not compiler.begin(formed("more", "more", "flood")), "a flood has its limit"
    assert compiler.begin(formed("q0", "q0", "quiet"))
    assert compiler.begin(formed("q1", "q1", "quiet"))
    forms.gate.set()
    while len(forms.made) < PER_DOMAIN_MAX + 2:
        compiler._thread.join(0.01)
    assert forms.made[:5] == ["slow", "f0", "q0", "f1", "q1"]
    while len(told) < PER_DOMAIN_MAX + 2:
        compiler._thread.join(0.01)
    assert all(compiler.claim(compiled) for compiled in told)
    assert not any(compiler.claim(compiled) for compiled in told), "once"
    assert compiler.num_pending == 0
    assert compiler.begin(formed("again", "again", "flood"))


def test_who_waits_too_long_fails_alone(desk: Desk) -> None:
    compiler, forms, told, clock = desk
    hanging, behind = formed("hanging", "slow"), formed("behind", "fine")
    assert compiler.begin(hanging)
    assert forms.begun.wait(PATIENCE_S)
    clock.now_s = WAIT_MAX_S
    assert compiler.begin(behind)
    assert compiler.overdue() == []
    clock.now_s = WAIT_MAX_S + 0.1
    assert compiler.overdue() == [hanging]
    assert compiler.num_pending == 1
    clock.now_s = 2 * WAIT_MAX_S + 0.1
    assert compiler.overdue() == [behind]
    forms.gate.set()
    while not told:
        compiler._thread.join(0.01)
    assert not compiler.claim(told[0])
    assert forms.made == ["slow"], "nobody wants the other's any more"


def test_all_domains_together_have_a_limit(desk: Desk, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(form_compiler, "PENDING_MAX", 3)
    compiler, _, _, _ = desk
    assert [compiler.begin(formed(f"s{n}", "slow", f"d{n}")) for n in range(4)] == [True, True, True, False]
    assert {submit.sequence_id for submit in compiler.forget_all()} == {"s0", "s1", "s2"}
    assert compiler.begin(formed("later", "slow", "d9"))
