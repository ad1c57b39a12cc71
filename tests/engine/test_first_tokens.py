"""First tokens that are owed: who is within its share does not wait for a flood, and what that may cost the others."""

from collections import Counter
from dataclasses import dataclass
from itertools import groupby

import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine.core import EngineCore
from engine.scheduling.first_tokens import ALONE_MAX, FAR_OVER
from engine.scheduling.schedule import Schedule
from engine.sequence import Sequence, Status
from tests.strategies.integer_model import continuation, integer_core, submit

ROWS = 4
BUDGET = 12


@dataclass(frozen=True)
class Visit:
    """One request of a domain that is not always there."""

    step: int
    domain: str
    num_prompt: int
    max_tokens: int


VISITS = st.lists(
    st.builds(Visit, st.integers(3, 40), st.sampled_from("qrs"), st.integers(1, BUDGET), st.integers(1, 8)), max_size=8
)
FLOODS = st.dictionaries(
    st.sampled_from(["flood", "torrent"]), st.tuples(st.integers(1, 30), st.integers(1, 12)), min_size=1
)


class Observed:
    """An engine under a flood, with its own idea of shares, and a look at every step's plan."""

    def __init__(self, flood: dict[str, tuple[int, int]], max_num_seqs: int = ROWS, scheduling: str = "fair") -> None:
        self.core, _ = integer_core(
            num_blocks=4_000,
            max_batched_tokens=BUDGET,
            max_num_seqs=max_num_seqs,
            scheduling=scheduling,
            prefix_cache=False,
        )
        self.flood = flood
        self.rows = max_num_seqs
        self.num_made = 0
        self.prompts: dict[str, list[int]] = {}
        self.tokens: dict[str, list[int]] = {}
        self.plans: list[Schedule] = []
        decide = self.core.scheduler.schedule

        def schedule() -> Schedule:
            self.before = self.asked(), Counter({d: self.core.scheduler.served.of(0, d) for d in self.asked()})
            self.floods_running = {s.domain for s in self.core.scheduler.running if s.domain in flood}
            plan = decide()
            self.plans.append(plan)
            self.owed = [row for row in plan.rows if row.is_owed]
            if plan.alone:
                assert self.owed == plan.rows, "a step for first tokens has others in it"
                assert not all(row.num_missing for row in plan.rows), "and none of them comes"
            return plan

        self.core.scheduler.schedule = schedule  # type: ignore[method-assign]

    def asked(self) -> Counter[str]:
        return Counter(sequence.domain for sequence in self.core._sequences.values())

    def within(self, domain: str, times: int = 1) -> bool:
        asked = self.before[0]
        return asked[domain] <= times * max(1, self.rows // len(asked))

    def add(self, name: str, domain: str, num_prompt: int, max_tokens: int) -> None:
        self.prompts[name] = [len(self.prompts) % 60 + 1] * num_prompt
        assert self.core.add(submit(name, self.prompts[name], max_tokens, domain=domain)) is None

    def step(self) -> Schedule:
        for domain, (num_prompt, max_tokens) in self.flood.items():
            while sum(sequence.domain == domain for sequence in self.core.scheduler.waiting) < 3 * self.rows:
                self.add(f"{domain}{len(self.prompts)}", domain, num_prompt, max_tokens)
        for output in self.core.step().outputs:
            self.tokens.setdefault(output.sequence_id, []).extend(output.token_ids)
        return self.plans[-1]


@given(FLOODS, VISITS, st.integers(1, 6))
def test_a_domain_within_its_share_has_its_first_token_with_the_next_step(
    flood: dict[str, tuple[int, int]], visits: list[Visit], max_num_seqs: int
) -> None:
    engine = Observed(flood, max_num_seqs)
    for step in range(45):
        came = {f"v{i}": visit for i, visit in enumerate(visits) if visit.step == step}
        for name, visit in came.items():
            engine.add(name, visit.domain, visit.num_prompt, visit.max_tokens)
        num_waiting = Counter(s.domain for s in engine.core.scheduler.waiting if s.domain not in flood)
        engine.step()
        asked, served = engine.before
        most = max((served[domain] for domain in engine.floods_running), default=0)
        if len(came) == 1 and num_waiting.total() == 1 and len(engine.owed) <= 1:  # nobody else waits or is being read
            ((name, visit),) = came.items()
            own = served[visit.domain] + (asked[visit.domain] - 1 << 20)  # with what its answers are charged first
            if engine.floods_running and engine.within(visit.domain) and own <= most:
                assert len(engine.tokens[name]) == 1, "it waited for a flood"
    for name, token_ids in engine.tokens.items():
        assert token_ids == continuation(engine.prompts[name], len(token_ids))


@given(FLOODS, VISITS, st.integers(1, 6))
def test_what_is_owed_is_taken_from_the_most_served_far_over_its_share_and_costs_no_work(
    flood: dict[str, tuple[int, int]], visits: list[Visit], max_num_seqs: int
) -> None:
    engine = Observed(flood, max_num_seqs)
    num_alone = 0
    seen: set[str] = set()
    for step in range(45):
        for index, visit in enumerate(visits):
            if visit.step == step:
                engine.add(f"v{index}", visit.domain, visit.num_prompt, visit.max_tokens)
        computed = {s.sequence_id: s.num_computed_tokens for s in engine.core.scheduler.running}
        plan = engine.step()
        _, served = engine.before
        for victim in plan.preempted:
            assert not engine.within(victim.domain, times=2), "it asks for little more than its share"
            assert victim.num_computed_tokens == computed[victim.sequence_id], "it lost work"
            assert victim.row == -1
        for entered in plan.admitted:
            if entered.owed and entered.sequence_id not in seen:  # else it made way since, and is back
                seen.add(entered.sequence_id)
                assert engine.within(entered.domain)
                over = [domain for domain in served if not engine.within(domain, times=2)]
                generated = max_num_seqs << 20  # what this step's answers are charged before anybody enters
                assert served[entered.domain] <= max(served[d] for d in over) + generated
        if plan.preempted:
            assert len([s for s in plan.admitted if s.owed]) >= len(plan.preempted)
        num_alone = num_alone + 1 if plan.alone else 0
        assert num_alone <= ALONE_MAX
    assert engine.core.scheduler.num_preemptions == engine.core.scheduler.num_preemptions_kept


@given(FLOODS, st.integers(1, 6))
def test_two_that_ask_for_too_much_never_take_rows_from_each_other(
    flood: dict[str, tuple[int, int]], max_num_seqs: int
) -> None:
    engine = Observed(flood, max_num_seqs)
    for _ in range(80):
        engine.step()
    assert engine.core.scheduler.num_preemptions == 0
    assert not any(plan.alone for plan in engine.plans)


@given(st.sampled_from(["fcfs", "round_robin", "sjf", "bounded"]), VISITS)
def test_other_policies_owe_nothing(scheduling: str, visits: list[Visit]) -> None:
    engine = Observed({"flood": (6, 6)}, scheduling=scheduling)
    for step in range(45):
        for index, visit in enumerate(visits):
            if visit.step == step:
                engine.add(f"v{index}", visit.domain, visit.num_prompt, visit.max_tokens)
        assert not engine.step().alone
    assert engine.core.scheduler.num_preemptions == 0


def test_a_visitor_takes_a_row_and_its_victim_goes_on_where_it_was() -> None:
    core, _ = integer_core(num_blocks=64, max_num_seqs=2, max_batched_tokens=BUDGET, prefix_cache=False)
    for index in range(6):
        core.add(submit(f"f{index}", [index + 1] * 3, 9, domain="flood"))
    core.step()
    core.step()
    core.add(submit("v", [9, 9], 2, domain="visitor"))
    assert [output.sequence_id for output in core.step().outputs] == ["v"], "alone: what it is owed delays it least"
    (victim,) = core.scheduler.preempted
    assert (victim.sequence_id, victim.status, victim.num_computed_tokens) == ("f1", Status.PREEMPTED, 4)
    assert [output.sequence_id for output in core.step().outputs] == ["f0", "v"]
    assert [output.sequence_id for output in core.step().outputs] == ["f0", "f1"]
    while core.has_work:
        core.step()


@pytest.mark.parametrize(("num_asked", "enters"), [(FAR_OVER * 2, False), (FAR_OVER * 2 + 1, True)])
def test_only_who_asks_for_far_more_than_its_share_makes_way(num_asked: int, enters: bool) -> None:
    """Four rows, two domains: a share is two."""
    core, _ = integer_core(num_blocks=64, max_num_seqs=ROWS, max_batched_tokens=BUDGET, prefix_cache=False)
    for index in range(num_asked):
        core.add(submit(f"f{index}", [index + 1] * 2, 9, domain="busy"))
    core.step()
    core.step()
    core.add(submit("v", [9], 2, domain="visitor"))
    core.step()
    assert (find(core, "v").status is Status.RUNNING) == enters


def test_visitors_without_end_leave_every_third_step_to_everybody() -> None:
    engine = Observed({"flood": (2, 9)})
    alone = []
    for step in range(60):
        engine.add(f"v{step}", f"domain{step}", 1, 1)
        alone.append(engine.step().alone)
    runs = [len(list(group)) for is_alone, group in groupby(alone) if is_alone]
    assert max(runs) == ALONE_MAX


def test_a_visitor_of_a_lower_tier_holds_up_nobody_above_it() -> None:
    core, _ = integer_core(num_blocks=64, max_num_seqs=3, max_batched_tokens=BUDGET, prefix_cache=False)
    core.add(submit("high", [1], 9, domain="other", tier="priority"))
    for index in range(6):
        core.add(submit(f"f{index}", [index + 1] * 3, 9, domain="flood"))
    core.step()
    core.add(submit("v", [9, 9], 2, domain="visitor"))
    assert [output.sequence_id for output in core.step().outputs] == ["high", "v"]


def test_batch_work_is_owed_nothing() -> None:
    core, _ = integer_core(num_blocks=64, max_num_seqs=2, max_batched_tokens=BUDGET, prefix_cache=False)
    for index in range(6):
        core.add(submit(f"f{index}", [index + 1] * 3, 9, domain="flood", tier="batch"))
    core.step()
    core.add(submit("v", [9, 9], 2, domain="visitor", tier="batch"))
    core.step()
    assert find(core, "v").status is Status.WAITING


def find(core: EngineCore, name: str) -> Sequence:
    return core._sequences[name]
