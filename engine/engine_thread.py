"""The thread that steps: takes all waiting commands, makes one step, writes the journal, then hands each connection its
frames of the step as one piece of bytes. A sequence that asks for a form waits for its matcher before it comes to the
core (engine/form_compiler.py); until then it is owned, aborted and told of its ending here.
"""

import asyncio
import contextlib
import queue
import time
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial

from msgspec.structs import replace

from engine.core import EngineCore
from engine.endings import aborted, refusal
from engine.form_compiler import Compiled, FormCompiler
from engine.journal import Journal, record_of
from engine.own_runs import OwnRuns, is_own
from engine.protocol import (
    Abort,
    Drain,
    Erase,
    Erased,
    Incident,
    Stats,
    Submit,
    TokenOutput,
    ToWorker,
    encode_frame,
)
from engine.worker_log import log

STRANGER = "output_of_stranger"  # the incident's kind
LOOK_S = 0.25  # how often an idle thread looks at the clock while a form compiles
SEND_BUFFER_BYTES_MAX = 64 * 1024 * 1024  # a client that leaves this much unread is gone


@dataclass(slots=True, eq=False)
class Connection:
    """A client, as the event loop sees it."""

    writer: asyncio.StreamWriter

    def send(self, data: bytes) -> None:
        transport = self.writer.transport
        if transport.is_closing():
            return
        if transport.get_write_buffer_size() > SEND_BUFFER_BYTES_MAX:
            transport.abort()
            return
        self.writer.write(data)


@dataclass(frozen=True, slots=True)
class Received:
    connection: Connection
    message: ToWorker


@dataclass(frozen=True, slots=True)
class Dropped:
    connection: Connection


@dataclass(frozen=True, slots=True)
class Wake:
    """Nothing but a reason to look at the clock again."""


Command = Received | Dropped | Drain | Wake | Compiled


@dataclass(slots=True)
class EngineThread:
    """Owns the core: everything that touches it happens in `run`."""

    core: EngineCore
    journal: Journal
    num_failures_max: int
    deliver: Callable[[dict[Connection, bytes], bytes], None]  # (frames by connection, frames for everybody)
    commands: "queue.SimpleQueue[Command]" = field(default_factory=queue.SimpleQueue)
    stats: Stats | None = None
    exit_code: int = 0
    violating_steps_max: int = 3
    num_violating_steps: int = 0
    idle_percent: int = 25  # of idle time for the observer's own runs
    _owners: dict[str, Connection] = field(default_factory=dict)
    _taken: list[Command] = field(default_factory=list)  # from the queue, not obeyed yet
    _drain_until_s: float | None = None
    _own: OwnRuns = field(init=False)
    _forms: FormCompiler | None = None  # None: no form is served

    def __post_init__(self) -> None:
        self._own = OwnRuns(self.core, self.idle_percent)
        if self.core.matchers is not None:
            self._forms = FormCompiler(self.core.matchers, self.commands.put, time.monotonic)

    def run(self) -> int:
        """Until drained (0) or broken (1). Whatever happens, every sequence gets an ending if its client is there."""
        try:
            while self._turn():
                pass
        except BaseException as error:
            log(f"engine thread failed: {type(error).__name__}: {error}")
            self.exit_code = 1
            with contextlib.suppress(Exception):
                self._emit(self._abort_all("engine_failure"), [])
            if not isinstance(error, OSError):
                raise
        finally:
            if self._forms is not None:
                self._forms.close()
        return self.exit_code

    def _turn(self) -> bool:
        """Commands, then one step. False: it is time to go."""
        outputs: list[TokenOutput] = []
        for command in self._take_commands():
            outputs += self._obey(command)
        if self._forms is not None:
            outputs += [refusal(submit, "busy") for submit in self._forms.overdue()]
        self._emit_ended(outputs)
        if self._drain_until_s is not None and time.monotonic() >= self._drain_until_s:
            self._emit_ended(self._abort_all())
        if self.core.has_work:
            if self._is_open:
                self._own.start(idle=False)
            result = self.core.step(self._newcomers if self._is_open else None)
            if result.failure:
                log(f"step {self.core.step_number} failed:\n{result.failure}")
            self._emit(result.outputs, result.incidents + self._closing(result.incidents))
            if self.core.num_failures_in_a_row >= self.num_failures_max:
                log(f"{self.core.num_failures_in_a_row} steps in a row failed: giving up")
                self._emit(self._abort_all("engine_failure"), [])
                self.exit_code = 1
                return False
        elif self._drain_until_s is not None and not self._num_compiling:
            return False
        return True

    @property
    def _num_compiling(self) -> int:
        return self._forms.num_pending if self._forms is not None else 0

    def _abort_all(self, error: str = "") -> list[TokenOutput]:
        compiling = self._forms.forget_all() if self._forms is not None else []
        ending = partial(refusal, error=error) if error else aborted
        return self.core.abort_all(error) + [ending(submit) for submit in compiling]

    def _abort(self, sequence_id: str) -> list[TokenOutput]:
        submit = self._forms.forget(sequence_id) if self._forms is not None else None
        output = aborted(submit) if submit is not None else self.core.abort(sequence_id)
        return [output] if output is not None else []

    @property
    def closed(self) -> bool:
        """Isolation broke in too many steps to go on: nothing is taken in until somebody restarts the worker."""
        return self.num_violating_steps >= self.violating_steps_max

    @property
    def _is_open(self) -> bool:
        return self._drain_until_s is None and not self.closed

    def _emit_ended(self, outputs: list[TokenOutput]) -> None:
        """What ended between two steps, and what its check has found."""
        between = self.core.take_between()
        self._emit(outputs + between.outputs, between.incidents + self._closing(between.incidents))

    def _closing(self, incidents: list[Incident]) -> list[Incident]:
        """Count a step with violations; the incident that says so when the worker closes with it."""
        was_closed = self.closed
        self.num_violating_steps += bool(incidents)
        if was_closed or not self.closed:
            return []
        detail = f"isolation broke in {self.num_violating_steps} steps: nothing is taken in until a restart"
        log(detail)
        return [Incident("admission_closed", self.core.step_number, [], [], -1, detail)]

    def _take_commands(self) -> list[Command]:
        """All that wait. With nothing to do: when the first comes, or when it is time for a run of the observer's."""
        self._take_waiting()
        busy = self._taken or self.core.has_work or (self._drain_until_s is not None and not self._num_compiling)
        if not busy:
            if self._is_open:
                self._own.start(idle=True)
            if not self.core.has_work:
                wait_s = self._own.wait_s()
                if self._num_compiling:
                    wait_s = LOOK_S if wait_s is None else min(wait_s, LOOK_S)
                with contextlib.suppress(queue.Empty):
                    self._taken.append(self.commands.get(timeout=wait_s))
        commands, self._taken = self._taken, []
        return commands

    def _take_waiting(self) -> list[Command]:
        """Into the line, in the order in which they came; returns the new ones."""
        num_known = len(self._taken)
        with contextlib.suppress(queue.Empty):
            while True:
                self._taken.append(self.commands.get_nowait())
        return self._taken[num_known:]

    def _newcomers(self) -> list[Submit]:
        """Called while a step is under way: who is going to enter the core with commands that are obeyed after it, in
        their order."""
        commands = self._take_waiting()
        messages = [one.message if isinstance(one, Received) else one for one in commands]
        if any(isinstance(message, Drain) for message in messages):
            return []
        gone = {message.sequence_id for message in messages if isinstance(message, Abort)}
        entering = [submit for command in commands if (submit := self._entering(command)) is not None]
        return [submit for submit in entering if submit.sequence_id not in gone]

    def _entering(self, command: Command) -> Submit | None:
        match command:
            case Received(_, Submit() as submit):
                compiles = submit.sampling.grammar and self._forms is not None
                return None if compiles or submit.sequence_id in self._owners or is_own(submit) else submit
            case Compiled(submit, form) if form is not None and self._forms is not None:
                return submit if submit.sequence_id in self._forms else None
        return None

    def _obey(self, command: Command) -> list[TokenOutput]:
        match command:
            case Received(connection, Submit() as submit):
                self._submit(connection, submit)
            case Received(connection, Abort(sequence_id)):
                if self._owners.get(sequence_id) is connection:
                    return self._abort(sequence_id)
            case Compiled() as compiled:
                return self._enter(compiled)
            case Received(connection, Erase(domain)):
                compiling = self._forms.forget_all(domain) if self._forms is not None else []
                outputs, num_blocks = self.core.erase_domain(domain)
                num_blocks += self._own.erase(domain)
                self.deliver({connection: encode_frame(Erased(domain, num_blocks))}, b"")
                return outputs + [aborted(submit) for submit in compiling]
            case Received(_, Drain(timeout_ms)) | Drain(timeout_ms):
                self._own.give_way(at_all=True)
                until_s = time.monotonic() + timeout_ms / 1000
                self._drain_until_s = min(until_s, self._drain_until_s or until_s)
            case Dropped(connection):
                dropped = [name for name, owner in self._owners.items() if owner is connection]
                return [output for name in dropped for output in self._abort(name)]
            case Wake():
                pass
        return []

    def _submit(self, connection: Connection, submit: Submit) -> None:
        if self._drain_until_s is not None:
            refused: TokenOutput | None = refusal(submit, "draining")
        elif self.closed:
            refused = refusal(submit, "closed")
        elif submit.sequence_id in self._owners or is_own(submit):
            refused = refusal(submit, "invalid_input")
        elif submit.sampling.grammar and self._forms is not None:
            refused = self.core.refuse(submit)
            if refused is None and not self._forms.begin(submit):
                refused = refusal(submit, "busy")
        else:
            self._own.give_way()
            refused = self.core.add(submit)
        if refused is None:
            self._owners[submit.sequence_id] = connection
        else:  # to this connection only, and not to the journal: the id may be in use by another
            self.deliver({connection: encode_frame(refused)}, b"")

    def _enter(self, compiled: Compiled) -> list[TokenOutput]:
        """A sequence whose form is ready comes to the core, or ends with the reason why not."""
        if self._forms is None or not self._forms.claim(compiled):
            return []  # it was aborted meanwhile
        if self.closed or compiled.form is None:
            return [refusal(compiled.submit, "closed" if self.closed else "invalid_input")]
        self._own.give_way()
        refused = self.core.add(compiled.submit, compiled.form)
        return [refused] if refused is not None else []

    def _emit(self, outputs: list[TokenOutput], incidents: list[Incident]) -> None:
        """Journal first, then the frames: what a client has seen is on record, and in the stats that it reads next."""
        outputs = self._own.without(outputs)
        strangers = [output.sequence_id for output in outputs if output.sequence_id not in self._owners]
        if strangers:
            outputs = [output for output in outputs if output.sequence_id in self._owners]
            away = self._turn_away(strangers, incidents)
            incidents = incidents + away + ([] if incidents else self._closing(away))
        stats = self.core.stats()
        self.stats = replace(stats, closed=self.closed, num_waiting=stats.num_waiting + self._num_compiling)
        self.journal.append([record_of(output) for output in outputs])
        frames: defaultdict[Connection, bytearray] = defaultdict(bytearray)
        for output in outputs:
            frames[self._owners[output.sequence_id]] += encode_frame(output)
            if output.finish_reason is not None:
                del self._owners[output.sequence_id]
                if self._forms is not None:
                    self._forms.ended(output.sequence_id)
        if frames or incidents:
            to_all = b"".join(encode_frame(incident) for incident in incidents)
            self.deliver({connection: bytes(data) for connection, data in frames.items()}, to_all)

    def _turn_away(self, strangers: list[str], known: list[Incident]) -> list[Incident]:
        """Outputs that no client here has asked for are our bug: nobody gets them, no journal has them, and should the
        engine still work on one, it stops. Everybody else goes on. Returns the incidents that are not ``known``."""
        told = {name for incident in known for name in incident.sequence_ids}
        incidents = []
        for name in dict.fromkeys(strangers):
            log(f"step {self.core.step_number}: an output of {name!r}, which nobody has asked for, was dropped")
            self.core.abort(name)
            if name not in told:
                incidents.append(Incident(STRANGER, self.core.step_number, [name], [], -1, "nobody has asked for it"))
        return incidents
