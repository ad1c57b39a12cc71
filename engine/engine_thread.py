"""The thread that steps: takes all waiting commands, makes one step, writes the journal, then hands each connection its
frames of the step as one piece of bytes.
"""

import asyncio
import contextlib
import queue
import time
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass, field

from msgspec.structs import replace

from engine.core import EngineCore
from engine.endings import refusal
from engine.journal import Journal, record_of
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


Command = Received | Dropped | Drain | Wake


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
    _owners: dict[str, Connection] = field(default_factory=dict)
    _drain_until_s: float | None = None

    def run(self) -> int:
        """Until drained (0) or broken (1). Whatever happens, every sequence gets an ending if its client is there."""
        try:
            while self._turn():
                pass
        except BaseException as error:
            log(f"engine thread failed: {type(error).__name__}: {error}")
            self.exit_code = 1
            with contextlib.suppress(Exception):
                self._emit(self.core.abort_all("engine_failure"), [])
            if not isinstance(error, OSError):
                raise
        return self.exit_code

    def _turn(self) -> bool:
        """Commands, then one step. False: it is time to go."""
        outputs: list[TokenOutput] = []
        for command in self._take_commands():
            outputs += self._obey(command)
        self._emit(outputs, [])
        if self._drain_until_s is not None and time.monotonic() >= self._drain_until_s:
            self._emit(self.core.abort_all(), [])
        if self.core.has_work:
            result = self.core.step()
            if result.failure:
                log(f"step {self.core.step_number} failed:\n{result.failure}")
            self._emit(result.outputs, result.incidents + self._closing(result.incidents))
            if self.core.num_failures_in_a_row >= self.num_failures_max:
                log(f"{self.core.num_failures_in_a_row} steps in a row failed: giving up")
                self._emit(self.core.abort_all("engine_failure"), [])
                self.exit_code = 1
                return False
        elif self._drain_until_s is not None:
            return False
        return True

    @property
    def closed(self) -> bool:
        """Isolation broke in too many steps to go on: nothing is taken in until somebody restarts the worker."""
        return self.num_violating_steps >= self.violating_steps_max

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
        commands: list[Command] = []
        if not self.core.has_work and self._drain_until_s is None:
            commands.append(self.commands.get())
        while True:
            try:
                commands.append(self.commands.get_nowait())
            except queue.Empty:
                return commands

    def _obey(self, command: Command) -> list[TokenOutput]:
        match command:
            case Received(connection, Submit() as submit):
                self._submit(connection, submit)
            case Received(connection, Abort(sequence_id)):
                if self._owners.get(sequence_id) is connection:
                    output = self.core.abort(sequence_id)
                    return [output] if output is not None else []
            case Received(connection, Erase(domain)):
                outputs, num_blocks = self.core.erase_domain(domain)
                self.deliver({connection: encode_frame(Erased(domain, num_blocks))}, b"")
                return outputs
            case Received(_, Drain(timeout_ms)) | Drain(timeout_ms):
                until_s = time.monotonic() + timeout_ms / 1000
                self._drain_until_s = min(until_s, self._drain_until_s or until_s)
            case Dropped(connection):
                dropped = [name for name, owner in self._owners.items() if owner is connection]
                return [output for name in dropped if (output := self.core.abort(name)) is not None]
            case Wake():
                pass
        return []

    def _submit(self, connection: Connection, submit: Submit) -> None:
        if self._drain_until_s is not None:
            refused: TokenOutput | None = refusal(submit, "draining")
        elif self.closed:
            refused = refusal(submit, "closed")
        else:
            refused = self.core.add(submit)
        if refused is None:
            self._owners[submit.sequence_id] = connection
        else:  # to this connection only, and not to the journal: the id may be in use by another
            self.deliver({connection: encode_frame(refused)}, b"")

    def _emit(self, outputs: list[TokenOutput], incidents: list[Incident]) -> None:
        """Journal first, then the frames: what a client has seen is on record, and in the stats that it reads next."""
        strangers = [output.sequence_id for output in outputs if output.sequence_id not in self._owners]
        if strangers:
            outputs = [output for output in outputs if output.sequence_id in self._owners]
            away = self._turn_away(strangers, incidents)
            incidents = incidents + away + ([] if incidents else self._closing(away))
        self.stats = replace(self.core.stats(), closed=self.closed)
        self.journal.append([record_of(output) for output in outputs])
        frames: defaultdict[Connection, bytearray] = defaultdict(bytearray)
        for output in outputs:
            frames[self._owners[output.sequence_id]] += encode_frame(output)
            if output.finish_reason is not None:
                del self._owners[output.sequence_id]
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
