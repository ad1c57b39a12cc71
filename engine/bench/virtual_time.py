"""The real scheduler and the real block pool on a clock that only steps move: a thousand requests in seconds, and the
same figures on every machine.

The model is not computed: a step takes as long as `StepCost` says, and each sequence ends where its trace says that
its answer ends. `calibrate` takes the three numbers from the real model on this machine, so the seconds mean something;
whatever compares policies compares them at one cost.
"""

import math
from collections import Counter, deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np

from engine.batch import Batch
from engine.bench.closed_loop import JobFailedError
from engine.bench.timeline import Timeline
from engine.core import EngineCore
from engine.errors import BrokenOffError
from engine.events import EngineEvent, NullObserver, SamplingState, StepEvidence, Violation
from engine.protocol import SamplingParams, Submit
from engine.sampling.row import Row
from engine.sampling.sampler import Picks
from engine.scheduling.break_off import GoOn

EOS_TOKEN_ID = 0
VOCAB_SIZE = 50_000
BLOCK_SIZE = 32
NUM_BLOCKS = 1_024  # 32,768 slots: room for 32 rows of a thousand tokens
MAX_NUM_SEQS = 32
MAX_BATCHED_TOKENS = 256
CONTEXT_MAX = 8_192
MAX_WAITING = 100_000  # the traces bound themselves
NUM_LAYERS = 30  # as the demo model: between two a step can be broken off


@dataclass(frozen=True, slots=True)
class StepCost:
    """Seconds of a step of T tokens whose rows read K keys: fixed_s + T * token_s + K * key_s."""

    fixed_s: float
    token_s: float
    key_s: float

    def of(self, num_tokens: int, num_keys: int) -> float:
        return self.fixed_s + num_tokens * self.token_s + num_keys * self.key_s


@dataclass(frozen=True, slots=True)
class Arrival:
    """A request of a trace. ``max_tokens`` is what its client asks for; its answer ends after ``num_output_tokens``."""

    at_s: float
    domain: str
    prompt_token_ids: Sequence[int]
    num_output_tokens: int
    max_tokens: int


@dataclass(slots=True)
class VirtualRunner:
    """Stands where ModelRunner stands."""

    cost: StepCost
    num_blocks: int = NUM_BLOCKS
    block_size: int = BLOCK_SIZE
    now_s: float = 0.0
    ends: dict[str, int] = field(default_factory=dict)  # sequence id -> position of its last token
    at_launch: Callable[[float], None] = lambda step_s: None  # told how long the step takes, if it is not broken off

    def set_row(self, index: int, row: Row) -> None:
        return None

    def state_of(self, index: int) -> SamplingState:
        return SamplingState()

    def scrub(self, block_ids: list[int]) -> None:
        return None

    def execute(self, batch: Batch, go_on: GoOn | None = None) -> Picks:
        evidence, began_s = batch.evidence, self.now_s
        step_s = self.cost.of(len(evidence.token_ids), int(evidence.kv_lens.sum()))
        self.at_launch(step_s)
        for layer in range(1, NUM_LAYERS + 1):
            self.now_s = began_s + step_s * layer / NUM_LAYERS
            if go_on is not None and not go_on(layer / NUM_LAYERS):
                raise BrokenOffError(layer / NUM_LAYERS)
        sequence_ids = [evidence.sequence_ids[index] for index in batch.sampled_index]
        ended = [
            position >= self.ends[name]
            for name, position in zip(sequence_ids, batch.sampled_positions.tolist(), strict=True)
        ]
        return Picks(np.where(ended, EOS_TOKEN_ID, 1).astype(np.int64), {})


@dataclass(slots=True)
class FirstLaunches(NullObserver):
    """An observer that tells when a sequence runs for the first time."""

    tell: Callable[[str], None]
    _seen: set[str] = field(default_factory=set)

    def on_events(self, events: list[EngineEvent]) -> None:
        return None

    def before_launch(self, evidence: StepEvidence) -> list[Violation]:
        for name in evidence.sequence_ids:
            if name not in self._seen:
                self._seen.add(name)
                self.tell(name)
        return []


@dataclass(slots=True)
class Served:
    """One request, as far as it has come."""

    arrival: Arrival
    timeline: Timeline
    submitted_s: float = math.inf  # when the step ended in which it arrived: between steps it enters the engine
    first_launch_s: float = math.inf

    @property
    def wait_s(self) -> float:
        return self.first_launch_s - self.timeline.arrived_s

    @property
    def rest_s(self) -> float:
        """Of the step that was under way when it came."""
        return self.submitted_s - self.timeline.arrived_s

    @property
    def queue_s(self) -> float:
        return self.first_launch_s - self.submitted_s

    @property
    def read_s(self) -> float:
        """From its first step to its first token."""
        return self.timeline.token_times_s[0] - self.first_launch_s


class VirtualEngine:
    """An EngineCore in virtual time; ``policy`` is a name of engine/scheduling/order.py."""

    def __init__(
        self,
        cost: StepCost,
        policy: str,
        num_blocks: int = NUM_BLOCKS,
        max_prompt_tokens: int = 0,
        break_off_percent: int = 0,
    ) -> None:
        self.runner = VirtualRunner(cost, num_blocks=num_blocks)
        self.core = EngineCore(
            self.runner,
            decode=lambda token_ids: "",
            eos_token_ids=frozenset({EOS_TOKEN_ID}),
            context_max=CONTEXT_MAX,
            vocab_size=VOCAB_SIZE,
            max_batched_tokens=MAX_BATCHED_TOKENS,
            max_num_seqs=MAX_NUM_SEQS,
            max_waiting=MAX_WAITING,
            observer=FirstLaunches(self._first_launch),
            scheduling=policy,
            max_prompt_tokens=max_prompt_tokens,
            break_off_percent=break_off_percent,
        )
        self.coming: deque[Arrival] = deque()  # in order of arrival, perhaps during the next step
        self.served: dict[str, Served] = {}
        self.tokens: Counter[str] = Counter()  # by domain: prompts when they are admitted, then each generated token
        self._seen: list[Submit] = []  # have come while a step was under way

    def submit(self, arrival: Arrival) -> None:
        """Raises JobFailedError."""
        self._enter(self._meet(arrival))

    def _meet(self, arrival: Arrival) -> Submit:
        name = str(len(self.served))
        self.served[name] = Served(arrival, Timeline(arrival.at_s))
        self.runner.ends[name] = len(arrival.prompt_token_ids) + arrival.num_output_tokens - 1
        sampling = SamplingParams(max_tokens=arrival.max_tokens, temperature=0.0)
        return Submit(name, arrival.domain, arrival.domain.encode(), list(arrival.prompt_token_ids), sampling)

    def _enter(self, submit: Submit) -> None:
        self.served[submit.sequence_id].submitted_s = self.runner.now_s
        refused = self.core.add(submit)
        if refused is not None:
            raise JobFailedError(f"request {submit.sequence_id} was refused: {refused.error}")

    def step(self) -> None:
        """One step; who comes during it enters the engine when it is over."""
        outputs = self.core.step(self._newcomers).outputs
        self._newcomers()
        for submit in self._seen:
            self._enter(submit)
        self._seen.clear()
        for output in outputs:
            if output.error:
                raise JobFailedError(f"request {output.sequence_id} ended with {output.error}")
            served = self.served[output.sequence_id]
            self.tokens[served.arrival.domain] += len(output.token_ids)
            served.timeline.token_times_s += [self.runner.now_s] * len(output.token_ids)

    def _newcomers(self) -> list[Submit]:
        num_seen = len(self._seen)
        while self.coming and self.coming[0].at_s <= self.runner.now_s:
            self._seen.append(self._meet(self.coming.popleft()))
        return self._seen[num_seen:]

    def _first_launch(self, name: str) -> None:
        served = self.served[name]
        served.first_launch_s = self.runner.now_s
        self.tokens[served.arrival.domain] += len(served.arrival.prompt_token_ids)

    def replay(self, arrivals: Sequence[Arrival]) -> list[Served]:
        """An open loop: requests arrive when their trace says, whatever the engine does. In order of arrival."""
        self.coming.extend(sorted(arrivals, key=lambda arrival: arrival.at_s))
        while self.coming or self.core.has_work:
            if not self.core.has_work:
                self.runner.now_s = max(self.runner.now_s, self.coming[0].at_s)
                self.submit(self.coming.popleft())
            self.step()
        return list(self.served.values())
