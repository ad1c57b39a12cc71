"""What a step of the real model costs on this machine: seconds measured at a few shapes, fitted by three numbers."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from engine.bench.closed_loop import run
from engine.bench.virtual_time import MAX_BATCHED_TOKENS, MAX_NUM_SEQS, StepCost
from engine.bench.workloads import Job
from engine.build import build
from engine.config import WorkerConfig
from engine.events import EngineEvent, NullObserver, StepEvidence, Violation

ROWS = (1, 8, 32)  # sequences that decode together
PROMPT_TOKENS = (16, 200)  # what they have behind them
NUM_OUTPUT_TOKENS = 4


@dataclass(frozen=True, slots=True)
class MeasuredStep:
    num_tokens: int
    num_keys: int
    seconds: float


@dataclass(slots=True)
class StepTimes(NullObserver):
    """An observer with a stopwatch: a step lasts from its launch to the next call of the engine."""

    now: Callable[[], float]
    steps: list[MeasuredStep] = field(default_factory=list)
    _launched: tuple[int, int, float] | None = None

    def on_events(self, events: list[EngineEvent]) -> None:
        self.stop()

    def before_launch(self, evidence: StepEvidence) -> list[Violation]:
        self.stop()
        self._launched = len(evidence.token_ids), int(evidence.kv_lens.sum()), self.now()
        return []

    def stop(self) -> None:
        if self._launched is not None:
            num_tokens, num_keys, started_s = self._launched
            self.steps.append(MeasuredStep(num_tokens, num_keys, self.now() - started_s))
            self._launched = None


def calibrate(model_dir: Path, *, num_threads: int, now: Callable[[], float]) -> StepCost:
    """Prompts and answers of the real model at every shape, the first of them twice to warm up."""
    times = StepTimes(now)
    config = WorkerConfig(
        model_dir=model_dir,
        socket_path=Path(),
        journal_dir=Path(),
        max_num_seqs=MAX_NUM_SEQS,
        max_batched_tokens=MAX_BATCHED_TOKENS,
        num_threads=num_threads,
    )
    core, ready = build(config, lambda _: times)
    random = np.random.default_rng(0)
    shapes = [(rows, num_prompt) for rows in ROWS for num_prompt in PROMPT_TOKENS]
    for rows, num_prompt in shapes[:1] + shapes:
        jobs = [Job(random.integers(0, ready.vocab_size, num_prompt).tolist(), NUM_OUTPUT_TOKENS) for _ in range(rows)]
        run(core, jobs, concurrency=rows, static=True, now=now)
        times.stop()
        if len(times.steps) <= NUM_OUTPUT_TOKENS:
            times.steps.clear()  # those were to warm up
    return fit(times.steps)


def fit(steps: Sequence[MeasuredStep]) -> StepCost:
    """Least squares of relative errors; a number that would be negative is 0 and the others are fitted again."""
    shapes = np.array([(1.0, step.num_tokens, step.num_keys) for step in steps])
    seconds = np.array([step.seconds for step in steps])
    used = np.ones(3, dtype=bool)
    while True:
        numbers = np.zeros(3)
        numbers[used] = np.linalg.lstsq(shapes[:, used] / seconds[:, None], np.ones(len(steps)), rcond=None)[0]
        if (numbers >= 0).all():
            return StepCost(*numbers.tolist())
        used &= numbers > 0
