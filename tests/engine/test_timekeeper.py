"""Whose the engine's time and blocks are: every nanosecond is somebody's, whatever happens to sequences."""

from collections.abc import Collection, Iterable

import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from engine.events import EngineEvent
from engine.scheduling.schedule import ScheduledRow
from engine.timekeeper import Timekeeper
from tests.engine.test_core_properties import Load, loads
from tests.strategies.engine_traces import Act, World, perform, traces
from tests.strategies.integer_model import submit
from tests.strategies.naive_accounts import NaiveAccounts


def serve(load: Load, keeper: type[Timekeeper] = Timekeeper, fail_steps: Collection[int] = ()) -> NaiveAccounts:
    """Few blocks and rows, so that sequences are preempted and their tokens computed again; aborts at any time."""
    core, runner = load.core()
    runner.fail_steps = set(fail_steps)
    accounts = NaiveAccounts(core, keeper)
    last_step = max(max(arrival.step, arrival.abort_step or 0) for arrival in load.arrivals)
    step = 0
    while core.has_work or step <= last_step:
        for index, arrival in enumerate(load.arrivals):
            if arrival.step == step:
                core.add(
                    submit(f"s{index}", arrival.prompt, arrival.max_tokens, domain=arrival.domain, tier=arrival.tier)
                )
            if arrival.abort_step == step:
                core.abort(f"s{index}")
        core.step()
        step += 1
    return accounts


@given(loads(), st.sets(st.integers(1, 30), max_size=2))
def test_steps_and_blocks_are_shared_to_the_nanosecond(load: Load, fail_steps: set[int]) -> None:
    serve(load, fail_steps=fail_steps).check()


@settings(suppress_health_check=[HealthCheck.too_slow], max_examples=25)
@given(traces())
def test_forks_breaks_aborts_and_own_runs_are_counted(trace: list[Act]) -> None:
    world = World()
    accounts = NaiveAccounts(world.run.core)
    perform(trace, world)
    accounts.check()


@pytest.mark.deep
@settings(suppress_health_check=[HealthCheck.too_slow], max_examples=500, deadline=None)
@given(traces())
def test_they_are_in_many_more_traces(trace: list[Act]) -> None:
    world = World()
    accounts = NaiveAccounts(world.run.core)
    perform(trace, world)
    accounts.check()


class RemainderToNobody(Timekeeper):
    def end_step(self, rows: Iterable[ScheduledRow]) -> None:
        rows = list(rows)
        before = {id(row): row.sequence.account.effort.engine_ns for row in rows}
        super().end_step(rows)
        spent_ns = self._clock_ns() - self._begun_ns
        num_tokens = sum(row.num_new_tokens for row in rows)
        for row in rows:
            row.sequence.account.effort.engine_ns = before[id(row)] + spent_ns * row.num_new_tokens // num_tokens


class ForgetsWhoWasPreempted(Timekeeper):
    """Who gets blocks begins anew."""

    def hear(self, events: Iterable[EngineEvent]) -> None:
        for event in events:
            account = self._accounts.get(event.sequence_id)
            if event.kind == "allocate" and account is not None and not account.num_blocks:
                account.effort.engine_ns = 0
            super().hear([event])


class CountsSharedBlocksForEach(Timekeeper):
    def _give(self, event: EngineEvent, now_ns: int) -> None:
        self._accounts[event.sequence_id].hold(1, now_ns)

    def _take(self, event: EngineEvent, now_ns: int) -> None:
        self._accounts[event.sequence_id].hold(-1, now_ns)


class LosesBlocksWithTheirFirstHolder(Timekeeper):
    """Who reads on what another has brought does not pay for it when that one has left."""

    def _take(self, event: EngineEvent, now_ns: int) -> None:
        if self._holders.pop(event.block_id, None) is not None:
            self._accounts[event.sequence_id].hold(-1, now_ns)


class ForgetsTheFinished(Timekeeper):
    """The last step of a sequence is not on its account."""

    def end_step(self, rows: Iterable[ScheduledRow]) -> None:
        super().end_step([row for row in rows if not row.sequence.finished])


PLANTS = (
    RemainderToNobody,
    ForgetsWhoWasPreempted,
    CountsSharedBlocksForEach,
    LosesBlocksWithTheirFirstHolder,
    ForgetsTheFinished,
)


@pytest.mark.parametrize("plant", PLANTS)
def test_planted_bugs_are_seen(plant: type[Timekeeper]) -> None:
    @settings(phases=[Phase.generate], max_examples=300, report_multiple_bugs=False)
    @given(loads())
    def look(load: Load) -> None:
        serve(load, plant).check()

    with pytest.raises(AssertionError):
        look()
