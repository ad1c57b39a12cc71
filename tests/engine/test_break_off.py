"""Steps that are broken off between two layers: for whom, how often, at whose cost, and that they never were."""

from collections.abc import Iterator
from dataclasses import dataclass, field

import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine.cache.block_pool import BlockState
from engine.core import EngineCore
from engine.errors import BrokenOffError
from engine.events import EngineEvent
from engine.protocol import Submit
from engine.scheduling.break_off import NEWCOMERS_MAX, SAVED_STEPS_MAX
from engine.scheduling.first_tokens import FAR_OVER
from engine.scheduling.tiers import RESCUED
from engine.step_result import StepResult
from tests.strategies.integer_model import NUM_LAYERS, Watcher, continuation, integer_core, submit

ROWS, BUDGET = 4, 12


class Noting(Watcher):
    """An observer that knows which launches were broken off."""

    def __init__(self, block_size: int = 2) -> None:
        super().__init__(BUDGET, ROWS, block_size)
        self.broken: list[int] = []
        self.sealing: list[int] = []  # steps in which a block was sealed or published

    def on_events(self, events: list[EngineEvent]) -> None:
        self.sealing += [event.step for event in events if event.kind in ("seal", "publish")]
        super().on_events(events)

    def broken_off(self, step: int, broken: BrokenOffError) -> None:
        self.broken.append(step)


@dataclass
class House:
    """A flood of one domain, and newcomers of others at chosen layers."""

    percent: int = 50
    num_flood: int = 12
    flood_tier: str = "default"
    max_waiting: int = 100
    prefix_cache: bool = False
    scheduling: str = "fair"
    high: int = 0  # sequences of the highest tier beside the flood
    num_served: int = 0  # to the visitor's domain, before it comes
    coming: list[Submit] = field(default_factory=list)  # are seen during the next step, and not added
    prompts: dict[str, list[int]] = field(default_factory=dict)
    tokens: dict[str, list[int]] = field(default_factory=dict)
    is_alone: bool = False  # the last step was for owed first tokens

    def __post_init__(self) -> None:
        self.watcher = Noting()
        self.core, self.runner = integer_core(
            num_blocks=4_000,
            max_batched_tokens=BUDGET,
            max_num_seqs=ROWS,
            max_waiting=self.max_waiting,
            break_off_percent=self.percent,
            prefix_cache=self.prefix_cache,
            scheduling=self.scheduling,
            observer=self.watcher,
        )
        for _ in range(self.num_flood):
            self.add(self.new("flood", num_prompt=9, max_tokens=40, tier=self.flood_tier))
        for _ in range(self.high):
            self.add(self.new("high", max_tokens=60, tier="priority"))
        self.core.scheduler.served.charge(0, "visitor", self.num_served, 1)

    def new(
        self, domain: str, num_prompt: int = 2, max_tokens: int = 3, tier: str = "default", name: str = ""
    ) -> Submit:
        name = name or f"{domain}-{len(self.prompts)}"
        self.prompts[name] = [len(self.prompts) % 60 + 1, *range(2, num_prompt + 1)]
        self.tokens[name] = []
        return submit(name, self.prompts[name], max_tokens, domain=domain, tier=tier)

    def add(self, one: Submit) -> None:
        assert self.core.add(one) is None

    def step(self, *coming: Submit, layer: int = 2) -> StepResult:
        """Newcomers are there from this layer on, and enter when the step is over."""
        layers: Iterator[int] = iter(range(1, NUM_LAYERS + 1))

        def newcomers() -> list[Submit]:
            if next(layers) != layer:
                return []
            return [*coming, *self.coming]

        before, evidence = self.num_broken, len(self.watcher.evidence)
        result = self.core.step(newcomers)
        assert result.failure == ""
        assert not result.outputs or self.num_broken == before, "a step that never was has outputs"
        for output in result.outputs:
            self.tokens[output.sequence_id] += output.token_ids
        self.coming = []
        rows = [self.core._sequences.get(name) for name in self.watcher.evidence[evidence].sequence_ids]
        self.is_alone = self.core.scheduler._num_alone > 0
        assert not self.is_alone or all(one is None or one.owed for one in rows)
        for one in coming:
            self.add(one)
        return result

    def warm(self, num_steps: int = 30) -> None:
        for _ in range(num_steps):
            self.step()

    def finish(self) -> None:
        for _ in range(4_000):
            if not self.core.has_work:
                break
            self.step()
        assert not self.core.has_work
        for name, ids in self.tokens.items():
            assert ids == continuation(self.prompts[name], len(ids))

    def num_computed(self, domain: str) -> int:
        """Tokens of launches that counted."""
        launches = (one for one in self.watcher.evidence if one.step not in self.watcher.broken)
        sizes = (
            size
            for one in launches
            for of, size in zip(one.domains, (one.cu_seqlens[1:] - one.cu_seqlens[:-1]).tolist(), strict=True)
            if of == domain
        )
        return sum(sizes)

    @property
    def num_broken(self) -> int:
        return self.core.break_offs.num_broken_off


def state(core: EngineCore) -> tuple[object, ...]:
    """What a step that ran moves: how far each sequence has come, what is sealed and published, what was counted."""
    sequences = {s.sequence_id: (list(s.token_ids), s.num_computed_tokens) for s in core._sequences.values()}
    sealed = [block.block_id for block in core.pool.blocks if block.state is BlockState.SEALED]
    return sequences, sealed, core.pool.num_published, core._num_completion_tokens, core._num_prompt_tokens


def test_a_newcomer_has_its_first_token_with_the_step_after_the_one_it_broke_off() -> None:
    house = House()
    house.warm()
    before = state(house.core)
    visitor = house.new("visitor")
    house.coming = [visitor]
    assert house.step(layer=3).outputs == []
    assert state(house.core) == before, "nothing has happened"
    assert house.watcher.broken == [house.core.step_number]
    house.add(visitor)
    assert [output.sequence_id for output in house.step().outputs] == [visitor.sequence_id]
    house.finish()


@pytest.mark.parametrize("layer", range(1, NUM_LAYERS + 1))
def test_nothing_is_sealed_or_published_by_a_step_that_was_broken_off(layer: int) -> None:
    """Its blocks may be full of numbers of which half the layers are missing; later requests begin alike."""
    house = House(prefix_cache=True)
    house.warm()
    for _ in range(60):
        house.step(house.new("visitor", max_tokens=1), layer=layer)
        house.step()
        house.add(house.new("flood", num_prompt=9))
    assert house.num_broken > 9
    assert house.watcher.sealing
    assert not set(house.watcher.broken) & set(house.watcher.sealing)
    house.finish()


TIMES = st.lists(st.lists(st.tuples(st.sampled_from("pqrs"), st.integers(1, 8)), max_size=2), min_size=20, max_size=60)


@given(TIMES, st.sampled_from([0, 3, 10, 50]), st.integers(1, NUM_LAYERS))
def test_what_is_thrown_away_is_a_small_part_and_there_is_always_progress(
    times: list[list[tuple[str, int]]], percent: int, layer: int
) -> None:
    house = House(percent)
    done = [True]  # whether each step that was not for owed first tokens alone ran to its end
    for arrivals in times:
        before, lost = house.num_broken, house.core.break_offs.num_tokens_lost
        house.step(*(house.new(domain, num) for domain, num in arrivals), layer=layer)
        broken = house.num_broken > before
        if broken or not house.is_alone:
            done.append(not broken)
        assert done[-1] or done[-2], "two in a row"
        assert (house.core.break_offs.num_tokens_lost > lost) == broken
        computed = house.core.stats().num_batch_tokens
        assert 100 * house.core.break_offs.num_tokens_lost <= percent * computed
    house.finish()


def test_little_is_saved_up() -> None:
    """However long nobody came before."""
    house = House(percent=10, num_flood=90)
    house.warm(600)
    first, lost = house.core.stats().num_batch_tokens, house.core.break_offs.num_tokens_lost
    for _ in range(90):
        house.step(house.new(f"domain{len(house.prompts)}", max_tokens=1), layer=NUM_LAYERS)
        house.step()
    lost = house.core.break_offs.num_tokens_lost - lost
    assert lost > SAVED_STEPS_MAX * BUDGET, "or nothing was tried"
    assert 10 * lost <= house.core.stats().num_batch_tokens - first + 10 * SAVED_STEPS_MAX * BUDGET


def test_no_two_steps_in_a_row_are_broken_off() -> None:
    house = House()
    house.warm()
    broken = []
    for name in ("first", "", "second", "", "third"):
        before = house.num_broken
        house.step(*([house.new(name)] if name else []))
        broken.append(house.num_broken > before)
    assert broken == [True, False, False, False, True], "the second waits for the end of the step"


def test_no_more_is_thrown_away_for_a_domain_than_each_other_is_served() -> None:
    """One domain comes again as soon as it has been served, late in a step. Nine others have always more waiting than
    their share; by the test's own books, each gets what is thrown away, but for what is in work."""
    house = House(percent=50, num_flood=0)
    names = [f"flood{index}" for index in range(9)]
    num_refused = 0
    for step in range(500):
        waiting = [sequence.domain for sequence in house.core.scheduler.waiting]
        for name in names:
            for _ in range(3 - waiting.count(name)):
                house.add(house.new(name, num_prompt=9, max_tokens=9))
        here = any(sequence.domain == "visitor" for sequence in house.core._sequences.values())
        before, lost = house.num_broken, house.core.break_offs.num_tokens_lost
        house.step(*([] if here or step < 50 else [house.new("visitor", 3, 1)]), layer=NUM_LAYERS)
        num_refused += not here and step >= 50 and house.num_broken == before
        if house.num_broken > before:
            assert lost <= min(house.num_computed(name) for name in names) + 4 * BUDGET
    assert house.num_broken > 10
    assert num_refused > 10


def test_ordinary_service_does_not_suffer_from_losses() -> None:
    """The first token comes with the next step, as ever."""
    house = House(num_flood=40)
    house.warm()
    house.core.scheduler.served.lose(0, "visitor", 10_000, 1, ["flood"])
    visitor = house.new("visitor", max_tokens=1)
    house.step(visitor)
    assert house.num_broken == 0
    assert [output.sequence_id for output in house.step().outputs] == [visitor.sequence_id]


def test_domains_without_end_leave_half_of_the_steps_to_everybody() -> None:
    house = House(percent=50, num_flood=40)
    house.warm()
    num_full = 0
    for step in range(120):
        before = house.num_broken
        house.step(*([] if step % 3 else [house.new(f"domain{step}", 1, 1)]))
        num_full += house.num_broken == before and not house.is_alone
    assert house.num_broken > 10
    assert num_full >= house.num_broken


def test_a_loss_is_charged_whatever_becomes_of_the_newcomer() -> None:
    house = House()
    house.warm()
    visitor = house.new("visitor")
    house.coming = [visitor]
    house.step(layer=NUM_LAYERS)
    lost = house.core.break_offs.num_tokens_lost
    assert lost == ROWS, "four rows, one token each"
    house.add(visitor)
    assert house.core.abort(visitor.sequence_id) is not None
    served = house.core.scheduler.served
    assert (served.with_losses(0, "visitor", ["flood"]) - served.lifted(0, "visitor", ["flood"])) >> 20 == lost


NOT_OWED = {
    "a batch request": (House(), {"tier": "batch"}),
    "a lower tier than others'": (House(flood_tier="priority"), {}),
    "a prompt longer than a step": (House(), {"num_prompt": BUDGET + 1}),
    "who asks for too much": (House(), {"max_tokens": 5_000}),
    "a token that does not exist": (House(), {"num_prompt": 70}),
    "the flood itself": (House(), {"domain": "flood"}),
    "a name that is in use": (House(), {"name": "flood-0"}),
    "where nobody is far over a share": (House(num_flood=2 * FAR_OVER), {}),
    "where somebody of a higher tier is here": (House(high=1), {}),
    "who was served more than the flood": (House(num_served=10_000), {}),
    "where it is switched off": (House(percent=0), {}),
    "where order is not fair": (House(scheduling="fcfs"), {}),
    "where too many wait": (House(max_waiting=12), {}),
}


@pytest.mark.parametrize("why", NOT_OWED)
def test_nothing_is_broken_off_for(why: str) -> None:
    house, arguments = NOT_OWED[why]
    house.warm(5)
    visitor = house.new(**{"domain": "visitor"} | arguments)
    for _ in range(12 - len(house.core.scheduler.waiting) if house.max_waiting == 12 else 0):
        house.add(house.new("flood"))
    house.coming = [visitor]
    house.step()
    assert house.num_broken == 0


def test_the_same_newcomer_without_those_reasons_breaks_it_off() -> None:
    house = House()
    house.warm(5)
    house.step(house.new("visitor"))
    assert house.num_broken == 1


@pytest.mark.parametrize("num_prompt", [BUDGET, BUDGET + 6])
def test_a_step_with_an_owed_first_token_runs_to_its_end(num_prompt: int) -> None:
    """Whether it comes with this step, which is for it alone then, or with the next."""
    house = House()
    house.warm()
    first = house.new("first", num_prompt=num_prompt)
    house.add(first)
    house.step(house.new("second"))
    assert house.is_alone == (num_prompt <= BUDGET)
    assert house.core._sequences[first.sequence_id].num_computed_tokens > 0
    assert house.num_broken == 0


def test_only_so_many_newcomers_are_looked_at() -> None:
    house = House()
    house.warm()
    crowd = [house.new("flood") for _ in range(NEWCOMERS_MAX)]
    house.step(*crowd, house.new("visitor"))
    assert house.num_broken == 0
    house.step(*crowd[1:0], house.new("visitor"))
    assert house.num_broken == 0, "the other visitor waits, and comes first"


def test_a_rescued_prompt_waits_for_an_owed_first_token_as_its_tier_does() -> None:
    """The flood's own sequence, rescued for its long wait, is being read when the visitor comes."""
    house = House(num_flood=ROWS)
    house.add(house.new("flood", num_prompt=40, max_tokens=2, name="long"))
    house.warm(10)
    long = house.core._sequences["long"]
    long.rank = RESCUED
    house.step()
    assert 0 < long.num_computed_tokens < 40
    computed = long.num_computed_tokens
    for _ in range(8):
        house.add(house.new("flood"))
    visitor = house.new("visitor")
    house.step(visitor)
    assert house.num_broken == 1
    assert [output.sequence_id for output in house.step().outputs] == [visitor.sequence_id]
    assert long.num_computed_tokens == computed
    house.step()
    assert long.num_computed_tokens > computed
    house.finish()


def test_a_run_of_the_observers_alone_is_not_broken_off_it_gives_way() -> None:
    house = House(num_flood=0)
    house.add(house.new("audit/replay/a", max_tokens=60, tier="batch", name="audit/replay/1"))
    house.warm()
    house.step(house.new("visitor"))
    assert house.num_broken == 0
    house.finish()


def test_what_runs_beside_the_flood_at_the_lowest_tier_loses_nothing() -> None:
    house = House(num_flood=ROWS - 1)
    house.add(house.new("audit/canary", max_tokens=60, tier="batch", name="audit/canary-1"))
    house.warm(3)
    for _ in range(8):
        house.add(house.new("flood"))
    house.warm(3)
    canary = house.core._sequences["audit/canary-1"]
    before = list(canary.token_ids), canary.num_computed_tokens
    house.coming = [house.new("visitor")]
    house.step()
    assert house.num_broken == 1
    assert (list(canary.token_ids), canary.num_computed_tokens) == before
    house.finish()
    assert len(house.tokens["audit/canary-1"]) == 60
