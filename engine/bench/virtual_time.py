"""The real scheduler and the real block pool on a clock that only steps move: a thousand requests in seconds, and the
same figures on every machine.

The model is not computed: a step takes as long as `StepCost` says, and each sequence ends where its trace says that
its answer ends. `calibrate` takes the three numbers from the real model on this machine, so the seconds mean something;
whatever compares policies compares them at one cost.
"""

import math
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np

from engine.batch import Batch
from engine.bench.closed_loop import JobFailedError
from engine.bench.timeline import Timeline
from engine.core import EngineCore
from engine.events import EngineEvent, NullObserver, SamplingState, StepEvidence, Violation
from engine.protocol import SamplingParams, Submit
from engine.sampling.row import Row
from engine.sampling.sampler import Picks

EOS_TOKEN_ID = 0
VOCAB_SIZE = 50_000
BLOCK_SIZE = 32
NUM_BLOCKS = 1_024  # 32,768 slots: room for 32 rows of a thousand tokens
MAX_NUM_SEQS = 32
MAX_BATCHED_TOKENS = 256
CONTEXT_MAX = 8_192
MAX_WAITING = 100_000  # the traces bound themselves


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

    def set_row(self, index: int, row: Row) -> None:
        return None

    def state_of(self, index: int) -> SamplingState:
        return SamplingState()

    def scrub(self, block_ids: list[int]) -> None:
        return None

    def execute(self, batch: Batch) -> Picks:
        evidence = batch.evidence
        self.now_s += self.cost.of(len(evidence.token_ids), int(evidence.kv_lens.sum()))
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
    submitted_s: float  # when the step ended in which it arrived: the engine looks at arrivals between steps
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

    def __init__(self, cost: StepCost, policy: str, num_blocks: int = NUM_BLOCKS, max_prompt_tokens: int = 0) -> None:
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
        )
        self.served: dict[str, Served] = {}
        self.tokens: Counter[str] = Counter()  # by domain: prompts when they are admitted, then each generated token

    def submit(self, arrival: Arrival) -> None:
        """Raises JobFailedError."""
        name = str(len(self.served))
        self.served[name] = Served(arrival, Timeline(arrival.at_s), self.runner.now_s)
        self.runner.ends[name] = len(arrival.prompt_token_ids) + arrival.num_output_tokens - 1
        sampling = SamplingParams(max_tokens=arrival.max_tokens, temperature=0.0)
        domain = arrival.domain
        refused = self.core.add(Submit(name, domain, domain.encode(), list(arrival.prompt_token_ids), sampling))
        if refused is not None:
            raise JobFailedError(f"request {name} was refused: {refused.error}")

    def step(self) -> None:
        for output in self.core.step().outputs:
            if output.error:
                raise JobFailedError(f"request {output.sequence_id} ended with {output.error}")
            served = self.served[output.sequence_id]
            self.tokens[served.arrival.domain] += len(output.token_ids)
            served.timeline.token_times_s += [self.runner.now_s] * len(output.token_ids)

    def _first_launch(self, name: str) -> None:
        served = self.served[name]
        served.first_launch_s = self.runner.now_s
        self.tokens[served.arrival.domain] += len(served.arrival.prompt_token_ids)

    def replay(self, arrivals: Sequence[Arrival]) -> list[Served]:
        """An open loop: requests arrive when their trace says, whatever the engine does. In order of arrival."""
        coming = sorted(arrivals, key=lambda arrival: arrival.at_s)
        index = 0
        while index < len(coming) or self.core.has_work:
            if not self.core.has_work:
                self.runner.now_s = max(self.runner.now_s, coming[index].at_s)
            while index < len(coming) and coming[index].at_s <= self.runner.now_s:
                self.submit(coming[index])
                index += 1
            self.step()
        return list(self.served.values())
