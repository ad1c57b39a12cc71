"""The benchmarks of scheduling: virtual time against loads whose figures are known, the fit against known costs."""

import itertools
import time

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine.bench import fairness, policies, scheduler_time, traces
from engine.bench.calibrate import MeasuredStep, fit
from engine.bench.virtual_time import CONTEXT_MAX, Arrival, StepCost, VirtualEngine
from engine.scheduling.order import POLICIES

COST = StepCost(fixed_s=0.02, token_s=0.001, key_s=2e-6)


def test_a_request_alone_takes_what_its_steps_cost() -> None:
    engine = VirtualEngine(COST, "fair")
    (served,) = engine.replay([Arrival(5.0, "a", [1] * 300, 3, max_tokens=50)])
    prompt_s = COST.of(256, 256) + COST.of(44, 300)
    assert served.wait_s == 0.0
    assert served.timeline.token_times_s == pytest.approx(
        [5.0 + prompt_s, 5.0 + prompt_s + COST.of(1, 301), 5.0 + prompt_s + COST.of(1, 301) + COST.of(1, 302)]
    )
    assert engine.tokens == {"a": 303}


@given(
    st.lists(st.tuples(st.floats(0, 10), st.sampled_from("ab"), st.integers(1, 400), st.integers(1, 20)), max_size=40)
)
def test_every_request_of_a_trace_is_answered_in_full(requests: list[tuple[float, str, int, int]]) -> None:
    arrivals = [Arrival(at_s, name, [1] * num, num_output, 20) for at_s, name, num, num_output in requests]
    for one in VirtualEngine(COST, "fair").replay(arrivals):
        assert len(one.timeline.token_times_s) == one.arrival.num_output_tokens
        assert one.timeline.arrived_s == one.arrival.at_s <= one.first_launch_s < one.timeline.token_times_s[0]
        assert one.timeline.token_times_s == sorted(one.timeline.token_times_s)


@given(st.tuples(st.floats(0, 1), st.floats(1e-6, 1), st.floats(0, 1e-3)))
def test_the_fit_finds_the_cost_that_made_the_times(numbers: tuple[float, float, float]) -> None:
    cost = StepCost(*numbers)
    shapes = [(t, k) for t in (1, 8, 32, 256) for k in (t, 40 * t, 400 * t)]
    found = fit([MeasuredStep(t, k, cost.of(t, k)) for t, k in shapes])
    for t, k in shapes:
        assert found.of(t, k) == pytest.approx(cost.of(t, k), rel=1e-6)


def test_the_fit_has_no_number_below_zero() -> None:
    found = fit([MeasuredStep(1, 1, 1.0), MeasuredStep(100, 100, 0.9), MeasuredStep(100, 9_000, 1.1)])
    assert min(found.fixed_s, found.token_s, found.key_s) >= 0


@pytest.mark.parametrize("trace", sorted(traces.TRACES))
def test_a_trace_is_that_of_its_seed_and_offers_its_load(trace: str) -> None:
    arrivals = traces.draw(trace, 400, load=0.5, cost=COST, seed=2)
    assert arrivals[:20] != traces.draw(trace, 400, load=0.5, cost=COST, seed=3)[:20]
    assert arrivals == traces.draw(trace, 400, load=0.5, cost=COST, seed=2)
    assert all(len(one.prompt_token_ids) + one.max_tokens <= CONTEXT_MAX for one in arrivals)
    assert all(1 <= one.num_output_tokens <= one.max_tokens for one in arrivals)
    assert len({tuple(one.prompt_token_ids[:4]) for one in arrivals}) == 400, "no prompt finds another in the cache"
    half, full = ([a.at_s for a in traces.draw(trace, 400, load=x, cost=COST, seed=2)][-1] for x in (0.5, 1.0))
    assert half == pytest.approx(2 * full)


def test_every_policy_has_a_row_and_does_the_same_work() -> None:
    found = policies.rows(sorted(POLICIES), ["mixed"], num_requests=60, load=1.5, cost=COST, seed=1)
    assert [row["policy"] for row in found] == sorted(POLICIES)
    for row in found:
        assert set(row) >= {"policy", "trace", "latency_mean_s", "latency_p99_s", "wait_max_s"}
        assert 0 < row["ttft_p50_s"] <= row["ttft_p99_s"] <= row["latency_p99_s"]
        assert 0 <= row["wait_max_s"] <= row["latency_p99_s"] * 60
    assert len({row["latency_mean_s"] for row in found}) > 1, "under this load, order must matter"


def test_fair_keeps_its_bound_under_a_flood_and_fcfs_does_not() -> None:
    rows = fairness.rows(["fair", "fcfs"], [3], num_steps=700, cost=COST, seed=1)
    fair, fcfs = rows
    assert set(fair) >= {
        *("policy", "domains", "gap_tokens_max", "bound_tokens", "jain", "quiet_ttft_p99_ratio", "throughput_ratio"),
    }
    assert fair["gap_tokens_max"] <= fair["bound_tokens"]
    assert fair["jain"] > 0.999
    assert fcfs["gap_tokens_max"] > fcfs["bound_tokens"], "else the bound above says nothing"
    assert fcfs["jain"] < 0.8
    assert fcfs["throughput_ratio"] == fcfs["equal_lengths_throughput_ratio"] == 1.0
    assert fair["throughput_ratio"] < 0.98 < fair["equal_lengths_throughput_ratio"], "it is the lengths, not the order"
    assert fair["quiet_ttft_p99_ratio"] < fcfs["quiet_ttft_p99_ratio"]


def test_breaking_off_steps_spares_the_quiet_domain_their_rest() -> None:
    plain, breaking = fairness.rows(["fair"], [4], num_steps=600, cost=COST, seed=1, break_off_percent=3)
    assert (plain["break_off_percent"], breaking["break_off_percent"]) == (0, 3)
    assert plain["steps_broken_off"] == plain["tokens_lost_ratio"] == 0
    assert plain["quiet_rest_ratio"] > 2
    assert breaking["quiet_ttft_p99_ratio"] <= 1.2
    assert breaking["steps_broken_off"] == 14, "one for each visit"
    assert 0 < breaking["tokens_lost_ratio"] <= 0.03
    assert breaking["throughput_ratio"] >= 0.97 * plain["throughput_ratio"]
    assert breaking["gap_tokens_max"] <= breaking["bound_tokens"]


def test_who_arrives_during_a_step_that_is_not_broken_off_waits_for_its_end() -> None:
    engine = VirtualEngine(COST, "fair")
    first, second = engine.replay([Arrival(0.0, "a", [1] * 100, 1, 1), Arrival(0.01, "b", [2] * 50, 1, 1)])
    step_s = COST.of(100, 100)
    assert first.timeline.token_times_s == pytest.approx([step_s])
    assert (second.rest_s, second.queue_s) == pytest.approx((step_s - 0.01, 0.0))
    assert second.timeline.token_times_s == pytest.approx([step_s + COST.of(50, 50)])


def test_gap_and_index_are_those_one_counts_by_hand() -> None:
    history = np.array([[0, 0, 0], [5, 0, 1], [5, 7, 2], [9, 8, 2]])
    assert fairness.widest_gap(history) == 7  # b gains 7 on a from step 1 to 2; a gains 5 on b before
    assert fairness.jain(np.array([4, 4, 4])) == 1.0
    assert fairness.jain(np.array([9, 0, 0])) == pytest.approx(1 / 3)


def test_the_time_of_scheduling_is_that_of_its_clock() -> None:
    """A clock that moves by a millisecond when it is read: once in a decision, three times in a step."""
    reads = itertools.count()
    rows = scheduler_time.rows(["fair"], num_steps=20, seed=1, now=lambda: next(reads) / 1_000, num_waiting=40)
    (row,) = rows
    assert (row["schedule_p50_ms"], row["schedule_p95_ms"]) == pytest.approx((1.0, 1.0))
    assert (row["step_p50_ms"], row["step_p95_ms"]) == pytest.approx((3.0, 3.0))
    assert (row["policy"], row["num_steps"], row["num_waiting"]) == ("fair", 20, 40)


@pytest.mark.parametrize("policy", ["fair", "fcfs"])
def test_a_decision_takes_half_a_millisecond_at_most(policy: str) -> None:
    """With 32 rows taken and 200 waiting, in this thread's own time: a busy machine does not count."""
    (row,) = scheduler_time.rows([policy], num_steps=200, seed=1, now=time.thread_time)
    assert row["num_running_mean"] > 28
    assert row["num_waiting"] == 200
    assert row["schedule_p50_ms"] < 0.5
