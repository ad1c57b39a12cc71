"""The auditor and steps that were broken off: silent where they count for nothing, and not where they count."""

from collections.abc import Callable
from typing import Any

import pytest

from engine.core import EngineCore
from engine.protocol import SamplingParams, Submit
from tests.faults.stage import Run, prepare

GREEDY = SamplingParams(6, temperature=0.0, ignore_eos=True)


def flooded() -> Run:
    """One domain with far more than its share, its first answers half said. Prompts are read in pieces."""
    run = prepare(audited=True, replay_percent=0)
    for index in range(40):
        run.core.add(Submit(f"f{index}", "flood", b"", [index, *range(19)], GREEDY))
    for _ in range(12):
        step(run)
    assert not run.detectors
    return run


def step(run: Run, newcomer: Submit | None = None) -> None:
    result = run.core.step(lambda: [newcomer] if newcomer is not None else [])
    for incident in result.incidents:
        run.note(incident.kind, run.core.step_number)
    assert not result.failure


def visited(run: Run, num_steps: int = 12) -> list[str]:
    """Visitors break off a step; what the auditor found of it and after it."""
    for index in range(num_steps):
        visitor = Submit(f"v{index}", "visitor", b"", [index, 3], SamplingParams(1, temperature=0.0, ignore_eos=True))
        before = run.core.break_offs.num_broken_off
        step(run, visitor)
        if run.core.break_offs.num_broken_off > before:
            run.reach()
            run.core.add(visitor)
        step(run)
        step(run)
    assert run.reached_step > 0
    return run.detectors


def test_it_is_silent() -> None:
    assert visited(flooded()) == []


def plan_of(core: EngineCore, act: Callable[[Any], Any]) -> None:
    """Do something with what was broken off, as if it had run."""
    charge, schedule, plans = core.break_offs.charge, core.scheduler.schedule, list[Any]()

    def remembered() -> Any:
        plans.append(schedule())
        return plans[-1]

    def faulty(sequence: Any, num_tokens: int) -> None:
        charge(sequence, num_tokens)
        act(plans[-1])

    core.scheduler.schedule = remembered  # type: ignore[method-assign]
    core.break_offs.charge = faulty


def not_told(core: EngineCore) -> None:
    core._observer.broken_off = lambda step, broken: None  # type: ignore[method-assign]


def counted(core: EngineCore) -> None:
    def act(plan: Any) -> None:
        for row in plan.rows:
            core._advance(row.sequence, row.num_new_tokens)

    plan_of(core, act)


def half_counted(core: EngineCore) -> None:
    """A token of a prompt; no block is full with it, nothing is sealed."""

    def act(plan: Any) -> None:
        for row in [row for row in plan.rows if row.num_new_tokens > 1][:1]:
            row.sequence.num_computed_tokens += 1

    plan_of(core, act)


def sealed(core: EngineCore) -> None:
    def act(plan: Any) -> None:
        for row in plan.rows[:1]:
            core.pool.seal(row.sequence.block_ids[-1], sequence_id=row.sequence.sequence_id)

    plan_of(core, act)


def answered(core: EngineCore) -> None:
    """A token that no launch has given."""
    withhold = core._withhold

    def act(plan: Any) -> None:
        def saying(result: Any) -> None:
            core._withhold = withhold  # type: ignore[method-assign]
            result.outputs.append(core._take_token(plan.rows[0].sequence, 7, None))
            withhold(result)

        core._withhold = saying  # type: ignore[method-assign]

    plan_of(core, act)


@pytest.mark.parametrize("fault", [not_told, counted, half_counted, sealed, answered])
def test_it_sees_a_step_that_counts_though_it_was_broken_off(fault: Callable[[EngineCore], None]) -> None:
    run = flooded()
    fault(run.core)
    assert visited(run), "nothing was noticed"


def test_arrays_that_a_broken_launch_held_are_compared_all_the_same() -> None:
    run = flooded()
    execute = run.runner.execute

    def elsewhere(batch: Any, go_on: Any = None) -> Any:
        try:
            return execute(batch, go_on)
        except Exception as broken:
            held: Any = broken
            held.arrays.slot_mapping[0] += 1
            raise

    run.runner.execute = elsewhere  # type: ignore[method-assign]
    assert "unapproved_launch" in visited(run)
