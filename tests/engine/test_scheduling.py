"""Who is served when: shares between domains, waits within one, and prompts that leave room for answers."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine.core import EngineCore
from engine.protocol import SamplingParams, Submit
from engine.scheduling import order
from engine.scheduling.order import POLICIES
from engine.scheduling.output_lengths import DOMAINS_MAX, OutputLengths
from gateway.settings import SCHEDULING
from tests.strategies.integer_model import Watcher, integer_core, submit

NUM_SLOTS = 64  # 32 blocks of two


def flood(core: EngineCore, shapes: dict[str, tuple[int, int, int]], num_steps: int) -> list[dict[str, int]]:
    """Keep every domain backlogged with sequences of its own (prompt, output, weight); what each has been served after
    each step, in tokens divided by weight."""
    served = dict.fromkeys(shapes, 0)
    history = []
    num_made = 0
    for _ in range(num_steps):
        for domain, (num_prompt, num_output, weight) in shapes.items():
            while sum(sequence.domain == domain for sequence in core.scheduler.waiting) < 8:
                num_made += 1
                prompt = [num_made % 60 + 1] * num_prompt
                sampling = SamplingParams(max_tokens=num_output, temperature=0.0)
                core.add(Submit(f"{domain}{core.step_number}.{num_made}", domain, b"", prompt, sampling, weight=weight))
        before = {name: seq.num_charged_tokens for name, seq in core._sequences.items()}
        alive = dict(core._sequences)
        core.step()
        for name, sequence in alive.items():
            if sequence.domain not in shapes:
                continue
            served[sequence.domain] += sequence.num_charged_tokens - before[name]
        history.append({domain: served[domain] // shapes[domain][2] for domain in shapes})
    return history


def widest(history: list[dict[str, int]]) -> int:
    return max(max(served.values()) - min(served.values()) for served in history)


SHAPES = st.tuples(st.integers(1, 20), st.integers(1, 12), st.sampled_from([1, 1, 2, 3]))


@given(st.dictionaries(st.sampled_from("abcd"), SHAPES, min_size=2))
def test_backlogged_domains_are_served_alike(shapes: dict[str, tuple[int, int, int]]) -> None:
    core, _ = integer_core(num_blocks=NUM_SLOTS // 2)
    assert widest(flood(core, shapes, 120)) <= 2 * NUM_SLOTS


def test_a_weight_of_three_is_served_three_times_as_much() -> None:
    core, _ = integer_core(num_blocks=NUM_SLOTS // 2)
    served = flood(core, {"three": (6, 6, 3), "one": (6, 6, 1)}, 600)[-1]
    assert served["one"] > 10 * NUM_SLOTS
    assert 2.7 <= 3 * served["three"] / served["one"] <= 3.3


def test_the_bound_is_not_kept_by_other_policies() -> None:
    shapes = {"large": (20, 12, 1), "small": (1, 1, 1)}
    for scheduling in ("fcfs", "round_robin"):
        core, _ = integer_core(num_blocks=NUM_SLOTS // 2, scheduling=scheduling)
        assert widest(flood(core, shapes, 300)) > 2 * NUM_SLOTS, "else the property above says nothing"


def test_nobody_saves_up_service_by_staying_away() -> None:
    core, _ = integer_core(num_blocks=NUM_SLOTS // 2)
    flood(core, {"a": (8, 8, 1), "b": (8, 8, 1)}, 100)
    for sequence in list(core.scheduler.waiting):
        core.abort(sequence.sequence_id)
    history = flood(core, {"a": (8, 8, 1), "late": (8, 8, 1)}, 60)
    assert history[-1]["late"] <= history[-1]["a"] + 2 * NUM_SLOTS


def admissions(core: EngineCore) -> list[str]:
    seen: list[str] = []
    for _ in range(1000):
        if not core.has_work:
            break
        core.step()
        running = [sequence.sequence_id for sequence in core.scheduler.running]
        seen += [name for name in running if name not in seen]
    return seen


def test_short_prompts_go_first_and_long_ones_after_them() -> None:
    core, _ = integer_core(max_num_seqs=1, num_blocks=64)
    core.add(submit("running", [1], 4))
    core.step()
    core.add(submit("long", [2] * 20, 2))
    core.add(submit("short", [3], 2))
    assert admissions(core) == ["running", "short", "long"]


@given(wait_max=st.integers(0, 60))
def test_nobody_of_its_domain_overtakes_whoever_waited_too_long(wait_max: int) -> None:
    core, _ = integer_core(max_num_seqs=1, num_blocks=64)
    core.scheduler.outlook.wait_max_tokens = wait_max  # of the policy alone: nobody is rescued
    core.add(submit("first", [1], 2))
    core.step()
    core.add(submit("long", [2] * 20, 1))
    came_at = core.scheduler.served.total
    for index in range(150):
        core.add(submit(f"s{index}", [3], 2))
        core.step()
        if all(sequence.sequence_id != "long" for sequence in core.scheduler.waiting):
            break
        assert core.scheduler.served.total - came_at <= wait_max + 4, "one short one may be under way"
    else:
        raise AssertionError("it waits for ever")


def test_a_long_prompt_leaves_the_decodes_their_tokens() -> None:
    watcher = Watcher(8, 4, 2)
    core, _ = integer_core(num_blocks=64, observer=watcher)
    core.add(submit("long", list(range(1, 41)), 2, domain="b"))
    core.add(submit("talking", [5], 9, domain="a"))  # younger, and admitted before
    for _ in range(4):
        core.step()
    for evidence in watcher.evidence:
        num_new = (evidence.cu_seqlens[1:] - evidence.cu_seqlens[:-1]).tolist()
        assert dict(zip(evidence.sequence_ids, num_new, strict=True)) == {"talking": 1, "long": 7}


@given(st.sampled_from(sorted(POLICIES)), st.lists(st.tuples(st.sampled_from("abc"), st.integers(1, 9)), max_size=12))
def test_the_same_arrivals_are_always_served_in_the_same_order(
    scheduling: str, arrivals: list[tuple[str, int]]
) -> None:
    def run() -> list[str]:
        core, _ = integer_core(max_num_seqs=2, scheduling=scheduling)
        for index, (domain, num_prompt) in enumerate(arrivals):
            core.add(submit(f"s{index}", [index + 1] * num_prompt, 2, domain=domain))
        return [output.sequence_id for _ in range(200) if core.has_work for output in core.step().outputs]

    first = run()
    assert first == run()
    assert set(first) == {f"s{index}" for index in range(len(arrivals))}


def test_the_setting_knows_the_engines_policies() -> None:
    assert set(SCHEDULING) == set(POLICIES)


# ---------------------------------------------------------------- shortest answers first


def ends(core: EngineCore) -> list[str]:
    """Names in the order in which they come to their end."""
    return [
        output.sequence_id
        for _ in range(2000)
        if core.has_work
        for output in core.step().outputs
        if output.finish_reason
    ]


def learned(core: EngineCore, lengths: dict[str, int]) -> None:
    """Every domain finishes one answer of that length."""
    for domain, num_tokens in lengths.items():
        core.add(submit(f"lesson {domain}", [1], num_tokens, domain=domain))
        ends(core)


@pytest.mark.parametrize("scheduling", ["sjf", "bounded"])
def test_who_tends_to_answer_briefly_goes_first(scheduling: str) -> None:
    core, _ = integer_core(max_num_seqs=1, num_blocks=64, scheduling=scheduling)
    learned(core, {"talks": 40, "brief": 3})
    core.add(submit("running", [1], 2))
    core.step()
    core.add(submit("t", [1], 50, domain="talks"))
    core.add(submit("unknown", [1], 45, domain="new"))
    core.add(submit("b", [1], 50, domain="brief"))
    core.add(submit("hint", [1], 2, domain="talks"))
    assert ends(core) == ["running", "hint", "b", "t", "unknown"]


def test_bounded_lets_nobody_pass_whoever_waited_too_long() -> None:
    ended = {}
    for scheduling in ("sjf", "bounded"):
        core, _ = integer_core(max_num_seqs=1, num_blocks=64, scheduling=scheduling)
        core.scheduler.outlook.wait_max_tokens = 20  # the bound is no larger; nobody is rescued that early
        core.add(submit("running", [1], 2))
        core.step()
        core.add(submit("long", [1], 90, domain="b"))
        for index in range(12):
            core.add(submit(f"s{index}", [1], 4))
        ended[scheduling] = ends(core)
    assert ended["sjf"].index("long") == 13
    assert 3 < ended["bounded"].index("long") < 7


@given(
    st.lists(st.tuples(st.sampled_from("bc"), st.integers(1, 500)), max_size=30),
    st.lists(st.integers(1, 500), max_size=10),
    st.integers(1, 500),
)
def test_what_others_generate_moves_no_prediction(others: list[tuple[str, int]], own: list[int], hint: int) -> None:
    alone, among = OutputLengths(), OutputLengths()
    for num_tokens in own:
        alone.learn("a", num_tokens)
    for domain, num_tokens in others:
        among.learn(domain, num_tokens)
    for num_tokens in own:
        among.learn("a", num_tokens)
    for domain, num_tokens in others:
        among.learn(domain, num_tokens)
    assert among.predict("a", hint) == alone.predict("a", hint) <= hint


def test_the_table_of_lengths_is_bounded_and_nobody_is_pushed_out() -> None:
    lengths = OutputLengths()
    for index in range(DOMAINS_MAX + 5):
        lengths.learn(str(index), 7)
    assert lengths.predict("0", 100) == 7
    assert lengths.predict(str(DOMAINS_MAX + 1), 100) == 100


def test_only_answers_that_came_to_their_end_are_learned() -> None:
    core, _ = integer_core(num_blocks=64, scheduling="sjf")
    core.add(submit("left", [1], 50))
    core.step()
    core.abort("left")
    assert core.scheduler.outlook.lengths.predict("a", 99) == 99
    learned(core, {"a": 5})
    assert core.scheduler.outlook.lengths.predict("a", 99) == 5


# ---------------------------------------------------------------- who finds no room


def test_a_small_one_passes_a_large_one_that_finds_no_room_but_not_for_ever() -> None:
    core, _ = integer_core(num_blocks=16, block_size=2, max_num_seqs=4, max_batched_tokens=40, scheduling="fcfs")
    core.add(submit("running", [1] * 5, 24))  # keeps some blocks for a long time
    core.step()
    core.add(submit("large", [2] * 28, 2))
    passed: set[str] = set()
    for index in range(60):
        core.add(submit(f"s{index}", [3], 2))
        core.step()
        running = {sequence.sequence_id for sequence in core.scheduler.running}
        if "large" in running:
            break
        passed |= running - {"running"}
    assert len(passed) == core._sequences["large"].num_skipped == order.SKIPPED_MAX, "then nobody passes any more"


def test_gaps_that_large_requests_leave_do_not_become_another_domains_share() -> None:
    """Here large requests find no room all the time, and small ones pass them."""
    core, _ = integer_core(num_blocks=NUM_SLOTS // 2)
    history = flood(core, {"large": (40, 12, 1), "small": (1, 5, 1)}, 600)
    assert widest(history) <= 4 * NUM_SLOTS


def test_under_fair_nobody_passes_who_is_further_ahead_than_the_pool_is_large() -> None:
    core, _ = integer_core()
    for name, domain in (("head", "behind"), ("same", "behind"), ("other", "ahead")):
        core.add(submit(name, [1], 1, domain=domain))
    head, same, other = core.scheduler.waiting
    outlook = core.scheduler.outlook
    assert outlook.num_slots == 32
    outlook.served.charge(0, "ahead", 32, 1)
    assert order.may_pass(other, head, order.fair, outlook)
    outlook.served.charge(0, "ahead", 1, 1)
    assert not order.may_pass(other, head, order.fair, outlook)
    assert order.may_pass(same, head, order.fair, outlook)
    assert order.may_pass(other, head, order.fcfs, outlook), "fcfs keeps no counters between domains"
