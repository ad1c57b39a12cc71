"""The benchmark's own figures: counted against a table by hand, and against runs on the integer model, whose every step
takes one second of a clock that the test turns."""

import json
import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine.bench.closed_loop import JobFailedError, StepCounter, run
from engine.bench.timeline import Timeline, percentile, summary
from engine.bench.workloads import LOG_NORMAL_P99, OUTPUT_TOKENS, PROMPT_TOKENS, WORKLOADS, Job, draw
from engine.core import EngineCore
from tests.strategies.integer_model import VOCAB_SIZE, IntegerRunner, decode


def integer_bench(num_blocks: int = 400, max_num_seqs: int = 64) -> tuple[EngineCore, StepCounter]:
    counter = StepCounter(lambda: 0.0)
    core = EngineCore(
        IntegerRunner(num_blocks, 4),
        decode=decode,
        eos_token_ids=frozenset(),
        context_max=1_000,
        vocab_size=VOCAB_SIZE,
        max_batched_tokens=4_096,
        max_num_seqs=max_num_seqs,
        max_waiting=256,
        observer=counter,
    )
    return core, counter


def timed(jobs: list[Job], concurrency: int, *, static: bool) -> tuple[list[Timeline], StepCounter]:
    """The step number is the clock."""
    core, counter = integer_bench()
    return run(core, jobs, concurrency=concurrency, static=static, now=lambda: core.step_number), counter


JOBS = st.lists(
    st.builds(Job, st.lists(st.integers(1, VOCAB_SIZE - 1), min_size=1, max_size=8), st.integers(1, 9)), min_size=1
)


@given(JOBS, st.integers(1, 8))
def test_continuous_batching_never_lets_a_client_wait(jobs: list[Job], concurrency: int) -> None:
    timelines, counter = timed(jobs, concurrency, static=False)
    assert [len(timeline.token_times_s) for timeline in timelines] == [job.num_output_tokens for job in jobs]
    assert all(timeline.ttft_s == 1 for timeline in timelines), "a whole prompt fits into a step, so the next has it"
    assert all(gap == 1 for timeline in timelines for gap in timeline.gaps_s)
    assert counter.num_rows == sum(job.num_output_tokens for job in jobs)


@given(JOBS, st.integers(1, 8))
def test_static_batching_starts_nobody_before_the_whole_batch_has_ended(jobs: list[Job], concurrency: int) -> None:
    timelines, counter = timed(jobs, concurrency, static=True)
    batches = [timelines[first : first + concurrency] for first in range(0, len(jobs), concurrency)]
    for before, after in pairwise(batches):
        ended = max(timeline.token_times_s[-1] for timeline in before)
        assert {timeline.token_times_s[0] for timeline in after} == {ended + 1}
    lengths = [job.num_output_tokens for job in jobs]
    assert counter.num_steps == sum(max(lengths[i : i + concurrency]) for i in range(0, len(jobs), concurrency))


def test_a_job_arrives_when_its_client_is_free_whoever_takes_it() -> None:
    jobs = [Job([1], 1), Job([1], 5), Job([1], 1), Job([1], 1)]
    timelines, _ = timed(jobs, 2, static=True)
    assert [timeline.arrived_s for timeline in timelines] == [0, 0, 1, 5]
    assert [timeline.latency_s for timeline in timelines] == [1, 5, 5, 1]


def test_a_job_that_cannot_run_stops_the_benchmark() -> None:
    core, _ = integer_bench(num_blocks=2)
    with pytest.raises(JobFailedError, match="job 0 was refused: too_long"):
        run(core, [Job([1] * 20, 5)], concurrency=1, static=False, now=lambda: 0.0)


def test_the_figures_are_those_one_counts_by_hand() -> None:
    timelines = [Timeline(0.0, [1.0, 2.0, 4.0]), Timeline(1.0, [1.5]), Timeline(2.0, [5.0, 6.0])]
    assert summary(timelines, 8.0) == {
        "output_tokens_per_s": 0.75,
        "requests_per_s": 0.375,
        "ttft_p50_s": 1.0,
        "ttft_p95_s": 3.0,
        "itl_p50_s": 1.0,
        "itl_p95_s": 2.0,
        "latency_p50_s": 4.0,
        "latency_p95_s": 4.0,
    }
    assert percentile([], 95) == 0.0
    assert [percentile(range(1, 101), p) for p in (1, 50, 95, 100)] == [1, 50, 95, 100]


@pytest.mark.parametrize("workload", sorted(WORKLOADS))
def test_jobs_are_those_of_their_seed_and_within_their_bounds(workload: str) -> None:
    jobs = draw(workload, 2_000, vocab_size=100, seed=3)
    assert jobs[:50] == draw(workload, 50, vocab_size=100, seed=3)
    assert jobs != draw(workload, 2_000, vocab_size=100, seed=4)
    assert {min(PROMPT_TOKENS), max(PROMPT_TOKENS)} <= {len(job.prompt_token_ids) for job in jobs}
    lengths = np.array([job.num_output_tokens for job in jobs])
    if workload == "uniform":
        assert (lengths.min(), lengths.max()) == OUTPUT_TOKENS
    else:
        assert 44 <= np.median(lengths) <= 52
        assert 400 <= np.percentile(lengths, 99) <= LOG_NORMAL_P99


ROW_KEYS = {  # what readers of the JSON count on
    *("mode", "workload", "concurrency", "output_tokens_per_s", "requests_per_s", "ttft_p50_s", "ttft_p95_s"),
    *("itl_p50_s", "latency_p50_s", "latency_p95_s", "slot_utilisation", "peak_rss_bytes"),
}


@pytest.mark.parametrize("mode", ["continuous", "static", "hf_static"])
def test_a_row_runs_in_a_process_of_its_own(tiny_model_dir: Path, mode: str) -> None:
    command = [sys.executable, "-m", "engine.bench", "--model-dir", str(tiny_model_dir), "engine"]
    command += ["--mode", mode, "--workload", "uniform", "--concurrency", "4", "--requests", "6"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    row = json.loads(done.stdout)
    assert set(row) >= ROW_KEYS
    assert row["peak_rss_bytes"] > 50 * 1024 * 1024
    assert (row["mode"], row["concurrency"], row["num_requests"]) == (mode, 4, 6)
    assert 0 < row["slot_utilisation"] <= 1
    assert row["output_tokens_per_s"] > 0
    assert 0 < row["ttft_p50_s"] <= row["latency_p50_s"] <= row["latency_p95_s"]
