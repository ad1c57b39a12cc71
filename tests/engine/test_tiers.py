"""Service tiers: who comes first, who makes way and what that costs, and that nobody waits for ever."""

from hypothesis import given, settings
from hypothesis import strategies as st

from engine.core import EngineCore
from engine.protocol import TokenOutput
from engine.scheduling.order import SKIPPED_MAX, WAIT_MAX_TOKENS
from engine.scheduling.schedule import Schedule
from engine.scheduling.tiers import BATCH, RESCUED, TIERS
from engine.sequence import Sequence, Status
from tests.engine.test_core_properties import Load, loads
from tests.strategies.integer_model import Watcher, continuation, integer_core, submit


def finish(core: EngineCore) -> dict[str, list[TokenOutput]]:
    received: dict[str, list[TokenOutput]] = {}
    for _ in range(2000):
        if not core.has_work:
            return received
        for output in core.step().outputs:
            received.setdefault(output.sequence_id, []).append(output)
    raise AssertionError("no progress")


def tokens(outputs: list[TokenOutput]) -> list[int]:
    return [token_id for output in outputs for token_id in output.token_ids]


def find(core: EngineCore, name: str) -> Sequence:
    return core._sequences[name]


# ---------------------------------------------------------------- what every step must keep


def is_prompt(sequence: Sequence) -> bool:
    """More of it is to be computed than one token: a step that also generates may bound these."""
    return sequence.num_tokens - sequence.num_computed_tokens > 1


class Checked:
    """Looks at every step of a scheduler right after it was decided, with its own idea of what fits."""

    def __init__(self, core: EngineCore, load: Load) -> None:
        self.scheduler, self.pool, self.load = core.scheduler, core.pool, load
        self.num_left_out = 0
        decide = core.scheduler.schedule

        def schedule() -> Schedule:
            plan = decide()
            self.look(plan)
            return plan

        core.scheduler.schedule = schedule  # type: ignore[method-assign]

    def fits(self, sequence: Sequence) -> bool:
        size, missing = self.load.block_size, -(-sequence.num_tokens // self.load.block_size)
        if sequence.block_ids:
            return missing - len(sequence.block_ids) <= self.pool.num_free
        for index in range((sequence.num_tokens - 1) // size):
            block_id = self.pool.find(sequence.prefix(index, size))
            if block_id is None:
                break
            missing -= self.pool.blocks[block_id].num_references > 0
        return missing <= self.pool.num_free

    def look(self, plan: Schedule) -> None:
        given = {row.sequence: row.num_new_tokens for row in plan.rows}
        assert sum(given.values()) == self.load.max_batched_tokens - plan.budget <= self.load.max_batched_tokens
        self.batch_takes_what_others_leave(given, plan)
        self.higher_ranks_go_first(given, plan)
        self.nobody_is_left_out(plan)
        self.prompts_keep_their_bound(plan)
        for sequence in self.scheduler.preempted:
            assert sequence.row == -1
            assert sequence.num_computed_tokens <= len(sequence.block_ids) * self.load.block_size

    def batch_takes_what_others_leave(self, given: dict[Sequence, int], plan: Schedule) -> None:
        if any(sequence.rank == BATCH for sequence in given):
            for other in self.scheduler.running:
                if other.rank > BATCH and not (is_prompt(other) and plan.prompt_budget <= 0):
                    assert given.get(other) == other.num_tokens - other.num_computed_tokens

    def higher_ranks_go_first(self, given: dict[Sequence, int], plan: Schedule) -> None:
        for sequence in self.scheduler.running:
            if sequence not in given and not (is_prompt(sequence) and plan.prompt_budget <= 0):
                assert all(other.rank >= sequence.rank for other in given), "a lower rank got its tokens"
        if self.scheduler.running:
            lowest = min(sequence.rank for sequence in self.scheduler.running)
            full = len(self.scheduler.running) == self.load.max_num_seqs
            for rank in {s.rank for s in self.scheduler.waiting if s.rank > max(lowest, plan.closed_rank)}:
                # The head of a rank may lack blocks; but where all fit, none waits for the row of a lower rank.
                line = [s for s in self.scheduler.waiting if s.rank == rank]
                budget = plan.prompt_budget > 0 and (plan.budget > 0 or any(other.rank < rank for other in given))
                assert not (full and budget and all(self.fits(s) for s in line)), "a lower rank keeps a row"

    def prompts_keep_their_bound(self, plan: Schedule) -> None:
        """Tokens of prompts in a step that also generates; what is owed may be more. Batch work generates last."""
        prompts = [r for r in plan.rows if is_prompt(r.sequence)]
        generating = [r for r in plan.rows if r.sequence.rank > BATCH and r.sequence.num_completion_tokens]
        if self.load.max_prompt_tokens and any(
            r not in prompts and r.sequence not in plan.admitted for r in generating
        ):
            num_tokens = sum(r.num_new_tokens for r in prompts if not r.sequence.owed)
            one_each = sum(r.num_new_tokens == 1 for r in prompts)
            assert num_tokens <= self.load.max_prompt_tokens + one_each

    def nobody_is_left_out(self, plan: Schedule) -> None:
        if (
            plan.prompt_budget <= 0
            or not plan.budget
            or len(self.scheduler.running) == self.load.max_num_seqs
            or plan.preempted
        ):
            return
        behind = max((s.rank for s in self.scheduler.preempted), default=BATCH - 1)
        for sequence in self.scheduler.waiting:
            if sequence.rank <= behind or not self.fits(sequence):
                continue
            line = [s for s in self.scheduler.waiting if s.rank >= sequence.rank and s is not sequence]
            waited = [self.scheduler.outlook.waited(s) for s in line]
            outlook = self.scheduler.outlook
            bound = outlook.bound_tokens if self.load.scheduling == "bounded" else outlook.wait_max_tokens
            barred = any(s.num_skipped >= SKIPPED_MAX for s in line) or any(wait >= bound for wait in waited)
            ahead = self.load.scheduling == "fair" and any(
                self.scheduler.served.num_ahead(s.tier, sequence.domain, s.domain) > outlook.num_slots for s in line
            )
            assert barred or ahead, f"{sequence.sequence_id} fits and was left out"


@given(loads())
@settings(max_examples=80)
def test_every_step_keeps_the_order_of_ranks_and_wastes_no_room(load: Load) -> None:
    core, _ = load.core()
    Checked(core, load)
    for index, arrival in enumerate(sorted(load.arrivals, key=lambda arrival: arrival.step)):
        while core.step_number < arrival.step:
            core.step()
        core.add(submit(f"s{index}", arrival.prompt, arrival.max_tokens, domain=arrival.domain, tier=arrival.tier))
    finish(core)
    assert core.stats().num_blocks_free == load.num_blocks


# ---------------------------------------------------------------- rows, blocks and budget


def test_a_full_batch_makes_way_and_the_victim_loses_no_work() -> None:
    watcher = Watcher(8, 1, 2)
    core, _ = integer_core(max_num_seqs=1, num_blocks=64, observer=watcher, prefix_cache=False)
    core.add(submit("low", [1, 2, 3, 4, 5], 6, tier="flex"))
    core.step()
    core.step()
    before = (list(find(core, "low").block_ids), find(core, "low").num_computed_tokens)
    core.add(submit("high", [7, 8], 3, tier="priority"))
    core.step()
    low = find(core, "low")
    assert (low.status, low.row) == (Status.PREEMPTED, -1)
    assert (low.block_ids[: len(before[0])], low.num_computed_tokens) == before
    assert find(core, "high").status is Status.RUNNING
    received = finish(core)
    assert tokens(received["low"]) == continuation([1, 2, 3, 4, 5], 6)[2:], "two came before"
    assert core.scheduler.num_preemptions == core.scheduler.num_preemptions_kept == 1
    num_computed = sum(len(evidence.slot_mapping) for evidence in watcher.evidence)
    assert num_computed == (5 + 6 - 1) + (2 + 3 - 1), "nothing was computed twice"


def test_the_youngest_of_the_lowest_tier_makes_way() -> None:
    core, _ = integer_core(max_num_seqs=4, num_blocks=64)
    for name, tier in (("b0", "batch"), ("f", "flex"), ("b1", "batch"), ("d", "default")):
        core.add(submit(name, [1], 20, tier=tier))
    core.step()
    for name, tier, victims in (("x", "default", {"b1"}), ("y", "priority", {"b0", "b1"}), ("z", "flex", {"b0", "b1"})):
        core.add(submit(name, [2], 20, tier=tier))
        core.step()
        assert {sequence.sequence_id for sequence in core.scheduler.preempted} == victims
    assert find(core, "z").status is Status.WAITING, "its own tier does not make way"


def test_blocks_are_taken_from_lower_tiers_but_not_in_vain() -> None:
    core, _ = integer_core(num_blocks=8, block_size=2, max_num_seqs=4)
    core.add(submit("batch", [1] * 6, 8, tier="batch"))
    core.add(submit("default", [2] * 6, 6))
    core.step()
    core.step()
    core.add(submit("never in time", [3] * 15, 1, tier="flex"))
    core.step()
    assert core.scheduler.num_preemptions == 0, "the batch work's blocks would not have been enough"
    core.add(submit("soon", [3] * 6, 1, tier="flex"))
    core.abort("never in time")
    core.step()
    assert find(core, "batch").block_ids == []
    finish(core)


def test_kept_blocks_are_given_up_when_a_running_sequence_needs_them() -> None:
    core, _ = integer_core(num_blocks=8, block_size=2, max_num_seqs=1)
    core.add(submit("low", [1] * 7, 4, tier="batch"))
    core.step()
    core.add(submit("high", [2] * 3, 12))
    received = finish(core)
    assert core.scheduler.num_preemptions == 1
    assert tokens(received["high"]) == continuation([2] * 3, 12)
    assert tokens(received["low"]) == continuation([1] * 7, 4)[1:]


def test_two_that_keep_all_blocks_do_not_wait_for_each_other() -> None:
    core, _ = integer_core(num_blocks=5, block_size=2, max_num_seqs=2, prefix_cache=False)
    core.add(submit("one", [1] * 3, 6, tier="flex"))
    core.add(submit("two", [2] * 3, 6, tier="flex"))
    core.step()
    for name in ("x", "y"):
        core.add(submit(name, [3], 2, tier="priority", domain="b"))
    received = finish(core)
    assert tokens(received["one"])[-1] == continuation([1] * 3, 6)[-1]
    assert tokens(received["two"])[-1] == continuation([2] * 3, 6)[-1]


def test_a_long_batch_prompt_takes_only_what_is_left() -> None:
    watcher = Watcher(8, 4, 2)
    core, _ = integer_core(num_blocks=64, observer=watcher)
    core.add(submit("batch", [1] * 40, 2, tier="batch"))
    core.step()
    core.add(submit("flex", [2] * 11, 2, tier="flex"))
    for _ in range(3):
        core.step()
    num_new = [
        dict(zip(e.sequence_ids, (e.cu_seqlens[1:] - e.cu_seqlens[:-1]).tolist(), strict=True))
        for e in watcher.evidence
    ]
    assert num_new == [{"batch": 8}, {"flex": 8}, {"flex": 3, "batch": 5}, {"flex": 1, "batch": 7}]


def test_decodes_of_a_lower_tier_give_their_budget_back() -> None:
    core, _ = integer_core(max_batched_tokens=2, max_num_seqs=4, num_blocks=64)
    for name in ("f0", "f1"):
        core.add(submit(name, [1], 30, tier="flex"))
    core.step()
    core.step()
    core.add(submit("high", [2, 3, 4], 2, tier="priority"))
    core.step()
    assert find(core, "high").num_computed_tokens == 1, "a token of theirs"
    core.step()
    core.step()
    assert find(core, "high").num_completion_tokens == 1


def test_a_queue_of_lower_tiers_refuses_nobody() -> None:
    core, _ = integer_core(max_waiting=2)
    assert [core.add(submit(f"b{index}", [1], 1, tier="batch")) for index in range(2)] == [None, None]
    refused = core.add(submit("b2", [1], 1, tier="batch"))
    assert refused is not None
    assert refused.error == "busy"
    assert core.add(submit("d0", [1], 1)) is None
    assert core.add(submit("d1", [1], 1)) is None
    refused = core.add(submit("d2", [1], 1))
    assert refused is not None
    assert refused.error == "busy"


def test_a_tier_that_does_not_exist_is_refused() -> None:
    core, _ = integer_core()
    wrong = submit("s", [1], 1)
    for number in (RESCUED, min(TIERS.values()) - 1):
        refused = core.add(type(wrong)("s", "a", b"", [1], wrong.sampling, priority=number))
        assert refused is not None
        assert refused.error == "invalid_input"


def test_a_request_kept_back_saves_up_no_service() -> None:
    """A pending batch request of its domain must not keep the lift away from its later ones."""
    core, _ = integer_core(max_num_seqs=1, num_blocks=64)
    core.add(submit("running", [1], 60, domain="b"))
    core.step()
    core.add(submit("kept back", [1], 1, domain="a", tier="batch"))
    for index in range(40):
        core.add(submit(f"b{index}", [1], 60, domain="b"))
    for _ in range(300):
        core.step()
    served = core.scheduler.served
    core.add(submit("now", [1], 1, domain="a"))
    assert served.of(0, "a") >= served.of(0, "b") > 0


# ---------------------------------------------------------------- nobody waits for ever


@given(wait_max=st.integers(1, 80), num_waiting=st.integers(1, 4), num_domains=st.integers(1, 3))
def test_a_flood_of_priority_ends_nobodys_hope(wait_max: int, num_waiting: int, num_domains: int) -> None:
    core, _ = integer_core(max_num_seqs=2, num_blocks=64, wait_max_tokens=wait_max)
    came_at = core.scheduler.served.total
    ended_at: dict[str, int] = {}
    names = [f"{domain}{index}" for index in range(num_waiting) for domain in range(num_domains)]
    for step in range(4000):
        while len(core.scheduler.waiting) < 4 + len(names):
            core.add(submit(f"flood{step}.{len(core._sequences)}", [1] * 4, 4, domain="flood", tier="priority"))
            if step == 0 and len(core.scheduler.waiting) == 4:
                for name in names:
                    core.add(submit(name, [2, 3], 3, domain=name[0], tier="batch"))
        for output in core.step().outputs:
            if output.sequence_id in names and output.finish_reason:
                ended_at[output.sequence_id] = core.scheduler.served.total
        if len(ended_at) == len(names):
            break
    # A flood that is served in turn starves, too: it is one more domain. Then the rescued one runs to its end.
    turns = 1 + (num_waiting + 1) * (num_domains + 1)
    longest = max(ended_at.get(name, 10**9) for name in names) - came_at
    assert longest <= turns * (wait_max + 16) + 40


def test_whoever_was_rescued_is_not_preempted_again() -> None:
    core, _ = integer_core(max_num_seqs=1, num_blocks=64, wait_max_tokens=10)
    core.add(submit("first", [1], 12, tier="priority"))
    core.add(submit("batch", [2], 30, domain="b", tier="batch"))
    for _ in range(13):
        core.step()
    assert find(core, "batch").rank == RESCUED
    core.add(submit("second", [1], 3, tier="priority"))
    core.step()
    assert find(core, "batch").status is Status.RUNNING
    assert find(core, "second").status is Status.WAITING


def test_domains_are_rescued_in_turns() -> None:
    core, _ = integer_core(max_num_seqs=1, num_blocks=64, wait_max_tokens=30)
    for index in range(20):
        core.add(submit(f"p{index}", [1] * 5, 5, domain="p", tier="priority"))
    for index in range(6):
        core.add(submit(f"a{index}", [1] * 5, 5, domain="a", tier="batch"))
    core.add(submit("b0", [1] * 5, 5, domain="b", tier="batch"))
    rescued: list[str] = []
    while core.has_work:
        core.step()
        rescued += [
            s.sequence_id for s in core._sequences.values() if s.rank == RESCUED and s.sequence_id not in rescued
        ]
    assert [name[0] for name in rescued].index("b") <= 2, "six of another domain came before it"


@given(loads())
def test_tiers_change_the_order_and_no_token(load: Load) -> None:
    core, _ = integer_core(
        num_blocks=max(load.num_blocks, 12),
        block_size=load.block_size,
        max_batched_tokens=load.max_batched_tokens,
        max_num_seqs=load.max_num_seqs,
        scheduling=load.scheduling,
        wait_max_tokens=load.wait_max_tokens,
        max_prompt_tokens=load.max_prompt_tokens,
    )
    assert load.wait_max_tokens <= WAIT_MAX_TOKENS
    taken = {}
    for index, arrival in enumerate(load.arrivals):
        if core.add(submit(f"s{index}", arrival.prompt, arrival.max_tokens, tier=arrival.tier)) is None:
            taken[f"s{index}"] = arrival
    received = finish(core)
    for name, arrival in taken.items():
        assert tokens(received[name]) == continuation(arrival.prompt, arrival.max_tokens)
