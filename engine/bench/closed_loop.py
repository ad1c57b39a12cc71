"""A fixed number of clients, each with one job at a time: when one ends, its client's next job arrives at once.

`continuous`: what has arrived is handed to the engine at once, and a row that ends makes room for the next.
`static`:     what has arrived waits until the whole last batch has ended, as in engines that batch whole requests.

Both run on the same EngineCore, so the difference is the batching and nothing else.
"""

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from engine.bench.timeline import Timeline
from engine.bench.workloads import Job
from engine.core import EngineCore
from engine.errors import BrokenOffError
from engine.events import EngineEvent, NullObserver, Observer, StepEvidence, Violation
from engine.own_runs import OwnRuns
from engine.protocol import SamplingParams, Submit, TokenOutput
from engine.sampling.sampler import Picks


@dataclass(slots=True)
class StepCounter:
    """An observer that counts rows and tokens, and the seconds that the observer behind it takes."""

    now: Callable[[], float]
    observer: Observer = field(default_factory=NullObserver)
    num_steps: int = 0
    num_rows: int = 0
    num_tokens: int = 0
    observer_s: float = 0.0

    def on_events(self, events: list[EngineEvent]) -> None:
        started_s = self.now()
        self.observer.on_events(events)
        self.observer_s += self.now() - started_s

    def before_launch(self, evidence: StepEvidence) -> list[Violation]:
        self.num_steps += 1
        self.num_rows += len(evidence.sequence_ids)
        self.num_tokens += len(evidence.token_ids)
        started_s = self.now()
        violations = self.observer.before_launch(evidence)
        self.observer_s += self.now() - started_s
        return violations

    def after_launch(self, step: int, picks: Picks) -> None:
        started_s = self.now()
        self.observer.after_launch(step, picks)
        self.observer_s += self.now() - started_s

    def broken_off(self, step: int, broken: BrokenOffError) -> None:
        self.observer.broken_off(step, broken)

    def before_release(self, step: int, outputs: Sequence[TokenOutput]) -> list[Violation]:
        started_s = self.now()
        violations = self.observer.before_release(step, outputs)
        self.observer_s += self.now() - started_s
        return violations

    def next_run(self, *, idle: bool) -> Submit | None:
        return self.observer.next_run(idle=idle)

    def forget_domain(self, domain: str) -> Sequence[str]:
        return self.observer.forget_domain(domain)

    def counters(self) -> dict[str, int]:
        return self.observer.counters()

    def forget(self) -> None:
        """Start counting again."""
        self.num_steps = self.num_rows = self.num_tokens = 0
        self.observer_s = 0.0


class JobFailedError(Exception):
    """The engine refused a job or broke: there is nothing to measure."""


def run(
    core: EngineCore,
    jobs: Sequence[Job],
    *,
    concurrency: int,
    static: bool,
    now: Callable[[], float],
    num_logprobs: int = -1,
) -> list[Timeline]:
    """Every job from arrival to end; ``num_logprobs`` of each token are told, -1 none. Raises JobFailedError."""
    coming = deque(enumerate(jobs))
    arrived: deque[int] = deque()
    timelines: list[Timeline] = []
    num_in_flight = 0

    def arrive() -> None:
        if coming:
            index, _ = coming.popleft()
            timelines.append(Timeline(now()))
            arrived.append(index)

    for _ in range(concurrency):
        arrive()
    while arrived or num_in_flight:
        if not static or num_in_flight == 0:
            while arrived:
                _submit(core, arrived[0], jobs[arrived.popleft()], num_logprobs)
                num_in_flight += 1
        result = core.step()
        at_s = now()
        for output in result.outputs:
            if output.error:
                raise JobFailedError(f"job {output.sequence_id} ended with {output.error}\n{result.failure}")
            timelines[int(output.sequence_id)].token_times_s += [at_s] * len(output.token_ids)
            if output.finish_reason is not None:
                num_in_flight -= 1
                arrive()
    return timelines


def run_again(core: EngineCore) -> None:
    """Idle time: everything that the observer wants to be run for itself."""
    runs = OwnRuns(core, idle_percent=100)
    runs.start(idle=True)
    while core.has_work:
        runs.without(core.step().outputs)
        runs.start(idle=True)


def _submit(core: EngineCore, index: int, job: Job, num_logprobs: int) -> None:
    refused = core.add(
        Submit(
            sequence_id=str(index),
            domain="bench",
            cache_salt=b"bench",
            prompt_token_ids=job.prompt_token_ids,
            sampling=SamplingParams(job.num_output_tokens, temperature=0.0, ignore_eos=True, logprobs=num_logprobs),
        )
    )
    if refused is not None:
        raise JobFailedError(f"job {index} was refused: {refused.error}")
