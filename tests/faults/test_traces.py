"""The real engine under anything that can happen: nobody gets what is not his, nothing is lost, the auditor is silent;
and what one tenant sees does not depend on what the others say (self-composition)."""

from collections.abc import Callable

import pytest
from hypothesis import HealthCheck, example, given, seed, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule, run_state_machine_as_test

from engine.protocol import SamplingParams, Submit
from tests.faults.catalogue import FAULTS
from tests.faults.hidden_states import VOCAB_SIZE
from tests.faults.launch_plants import between_steps
from tests.faults.stage import Run, decode, prepare
from tests.strategies.engine_traces import (
    DOMAINS,
    Act,
    Asked,
    World,
    floods,
    perform,
    requests,
    traces,
    visits,
    with_other_content,
)
from tests.strategies.integer_model import NUM_LAYERS

QUICK = settings(max_examples=25, deadline=None, suppress_health_check=list(HealthCheck))
NUM_PARTS = 10
DEEP = settings(max_examples=1_000, deadline=None, suppress_health_check=list(HealthCheck))


class EngineMachine(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        self.world = World()

    @rule(asked=requests())
    def admit_or_fork(self, asked: Asked) -> None:
        self.world.ask(asked)

    @rule(domain=st.sampled_from(DOMAINS), number=st.integers(4, 8))
    def flood(self, domain: str, number: int) -> None:
        sampling = SamplingParams(6, temperature=0.0, ignore_eos=True)
        self.world.ask(Asked(domain, b"", (*range(9),), sampling, "batch", number))

    @rule(asked=visits(), layer=st.integers(0, NUM_LAYERS))
    def come_during_a_step(self, asked: Asked, layer: int) -> None:
        self.world.come(asked, layer)

    @rule(asked=floods())
    def ask_for_more_than_a_share(self, asked: Asked) -> None:
        self.world.ask(asked)

    @rule(number=st.integers(1, 4))
    def steps(self, number: int) -> None:
        self.world.act(Act("step", number))

    @precondition(lambda self: self.world.alive)
    @rule(number=st.integers(0, 30))
    def abort(self, number: int) -> None:
        self.world.act(Act("abort", number))

    @rule(domain=st.sampled_from(DOMAINS))
    def evict(self, domain: str) -> None:
        self.world.act(Act("evict", domain=domain))

    @rule(domain=st.sampled_from(DOMAINS))
    def tenant_leaves(self, domain: str) -> None:
        self.world.act(Act("leave", domain=domain))

    @rule()
    def restart(self) -> None:
        self.world.restart()

    @invariant()
    def everything_is_in_its_place(self) -> None:
        self.world.check()

    def teardown(self) -> None:
        self.world.finish()


def test_whatever_happens_everything_is_in_its_place() -> None:
    run_state_machine_as_test(EngineMachine, settings=settings(QUICK, max_examples=15, stateful_step_count=25))


def same_for_the_victim(trace: list[Act], plant: Callable[[Run], None] = lambda run: None) -> bool:
    """Whether domain `a` sees the same tokens, numbers, counts, reasons, chunks and steps whatever the others say."""
    worlds = [World(), World()]
    for world, acts in zip(worlds, (trace, with_other_content(trace, "a")), strict=True):
        plant(world.run)
        perform(acts, world)
    return worlds[0].transcript == worlds[1].transcript


@QUICK
@given(traces())
def test_what_a_tenant_sees_does_not_depend_on_what_others_say(trace: list[Act]) -> None:
    assert same_for_the_victim(trace)


@pytest.mark.deep
@pytest.mark.timeout(2_400)  # some minutes on one core
@pytest.mark.parametrize("part", range(NUM_PARTS))
def test_ten_thousand_traces(part: int) -> None:
    """In parts, each with examples of its own, so that each ends in minutes and several can run side by side."""
    machine = seed(part)(type(f"Part{part}", (EngineMachine,), {}))
    run_state_machine_as_test(machine, settings=settings(DEEP, max_examples=200, stateful_step_count=30))

    @seed(part)
    @DEEP
    @given(traces())
    def same(trace: list[Act]) -> None:
        assert same_for_the_victim(trace)

    same()


@QUICK
@given(
    st.lists(st.lists(st.integers(0, VOCAB_SIZE - 1), min_size=1, max_size=3).map(decode), min_size=1, max_size=3),
    st.integers(0, 8),
    st.booleans(),
    st.integers(0, 40),
)
@example(["\ufffd"], 0, False, 0)
def test_stop_texts_raise_no_alarm(stop: list[str], min_tokens: int, include: bool, seed: int) -> None:
    """Where an answer is cut, what is left of its tokens is never said: at the last token too."""
    run = prepare(audited=True)
    for index in range(6):
        bias = tuple((token_id, 6.0) for token_id in range(64 - 8 * index, 64, 3))
        sampling = SamplingParams(
            4 + index,
            seed=seed + index,
            stop=tuple(stop),
            include_stop=include,
            min_tokens=min(min_tokens, 4),
            logit_bias=bias,
            logprobs=index - 1,
        )
        run.core.add(Submit(f"s{index}", "abc"[index % 3], b"", [seed, index], sampling))
    while run.core.has_work:
        result = run.core.step()
        assert not result.incidents, result.incidents


def load_of_two() -> list[Act]:
    """Two tenants side by side for some steps."""
    sampling = SamplingParams(8, temperature=1.0, seed=3, logprobs=1, ignore_eos=True)
    asked = [Asked(domain, b"", (1, 2, 3, 4, 5, 6, 7), sampling) for domain in "ab"]
    return [*(Act("ask", asked=one) for one in asked), Act("step", 5)]


def odd_ones_first(run: Run) -> bool:
    """A budget that depends on what another tenant's prompt begins with."""
    others = [one for one in run.core.scheduler.waiting if one.domain != "a" and one.token_ids[0] % 2]
    run.core.scheduler._max_batched_tokens = 3 if others else 16
    return False


def test_a_schedule_that_depends_on_others_content_is_noticed() -> None:
    def plant(run: Run) -> None:
        between_steps(odd_ones_first)(run)
        run.core.step_number = 10  # the plant acts from some step on

    assert same_for_the_victim(load_of_two())
    assert not same_for_the_victim(load_of_two(), plant)


def test_what_shows_late_at_run_time_the_truth_and_the_other_content_show_at_once() -> None:
    """K12, which the auditor finds only when an answer is run again."""
    plant = next(fault.plant for fault in FAULTS if fault.fault_id == "K12")
    with pytest.raises(AssertionError):
        same_for_the_victim(load_of_two(), plant)
