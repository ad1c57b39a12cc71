"""Who is served when: shares between domains, waits within one, and prompts that leave room for answers."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine import order
from engine.core import EngineCore
from engine.order import POLICIES
from engine.protocol import SamplingParams, Submit
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
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(order, "WAIT_MAX_TOKENS", wait_max)
        core, _ = integer_core(max_num_seqs=1, num_blocks=64)
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
