"""One row of `bulkhead bench engine`: a mode, a workload and a concurrency on the real model."""

import resource
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from engine.bench import closed_loop
from engine.bench.hf_static import StaticBatches
from engine.bench.timeline import Timeline, summary
from engine.bench.workloads import Job, draw
from engine.build import MakeObserver, build
from engine.config import WorkerConfig
from engine.events import Observer, Watched
from engine.models.load import DTYPES

MODES = ("continuous", "static", "hf_static")
NUM_WARM_UP_JOBS = 2
SEED = 1


@dataclass(frozen=True, slots=True)
class Setup:
    model_dir: Path
    mode: str
    workload: str
    concurrency: int
    num_requests: int
    num_threads: int
    dtype: str
    kernels: str
    num_logprobs: int = -1  # told with each token


def measure(setup: Setup, now: Callable[[], float], make_observer: MakeObserver) -> dict[str, Any]:
    """``make_observer`` as in engine/build.py; what it takes is part of the step and also counted by itself."""
    torch.set_num_threads(setup.num_threads)
    figures = _transformers(setup, now) if setup.mode == "hf_static" else _ours(setup, now, make_observer)
    return {
        "mode": setup.mode,
        "workload": setup.workload,
        "concurrency": setup.concurrency,
        "num_requests": setup.num_requests,
        "num_threads": setup.num_threads,
        "dtype": setup.dtype,
        **figures,
        "peak_rss_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
    }


def _ours(setup: Setup, now: Callable[[], float], make_observer: MakeObserver) -> dict[str, Any]:
    counter = closed_loop.StepCounter(now)
    config = WorkerConfig(
        model_dir=setup.model_dir,
        socket_path=Path(),
        journal_dir=Path(),
        max_num_seqs=setup.concurrency,
        num_threads=setup.num_threads,
        dtype=setup.dtype,
        kernels=setup.kernels,
    )

    def watch(watched: Watched) -> Observer:
        counter.observer = make_observer(watched)
        return counter

    core, ready = build(config, watch)
    static = setup.mode == "static"
    jobs = draw(setup.workload, setup.num_requests, vocab_size=ready.vocab_size, seed=SEED)
    closed_loop.run(core, _other(jobs), concurrency=1, static=static, now=now)
    counter.forget()
    started_s = now()
    clients, num_logprobs = setup.concurrency, setup.num_logprobs
    timelines = closed_loop.run(core, jobs, concurrency=clients, static=static, now=now, num_logprobs=num_logprobs)
    wall_s = now() - started_s
    figures = {
        "slot_utilisation": round(counter.num_rows / (counter.num_steps * setup.concurrency), 3),
        "num_steps": counter.num_steps,
        "step_mean_ms": round(wall_s / counter.num_steps * 1_000, 3),
        "observer_mean_ms": round(counter.observer_s / counter.num_steps * 1_000, 3),
        "observer_share": round(counter.observer_s / wall_s, 5),
        "num_batch_tokens": counter.num_tokens,
    }
    closed_loop.run_again(core)
    assert not core.scheduler.num_unfinished
    return (
        summary(timelines, wall_s)
        | figures
        | {
            "observer": counter.counters(),
            "kernels": ready.kernels,
            "isolation": ready.isolation,
        }
    )


def _transformers(setup: Setup, now: Callable[[], float]) -> dict[str, Any]:
    rival = StaticBatches(setup.model_dir, DTYPES[setup.dtype])
    jobs = draw(setup.workload, setup.num_requests, vocab_size=rival.vocab_size, seed=SEED)
    rival.run(_other(jobs), concurrency=1, now=now)
    started_s = now()
    timelines: Sequence[Timeline]
    timelines, used = rival.run(jobs, concurrency=setup.concurrency, now=now)
    return summary(timelines, now() - started_s) | {"slot_utilisation": round(used, 3), "kernels": "transformers"}


def _other(jobs: Sequence[Job]) -> list[Job]:
    """A few jobs of the same shapes and of other tokens, to warm up without a hit in the prefix cache."""
    return [Job(job.prompt_token_ids[::-1], job.num_output_tokens) for job in jobs[:NUM_WARM_UP_JOBS]]
