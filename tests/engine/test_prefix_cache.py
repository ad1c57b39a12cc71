"""The prefix cache on the integer model: a hit changes what is computed, never what is said, and only its own domain
can tell."""

from dataclasses import dataclass
from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from engine.core import EngineCore
from engine.protocol import TokenOutput
from gateway.audit_observer import AuditObserver
from tests.engine.test_core_properties import Load, loads
from tests.strategies.integer_model import Watcher, continuation, integer_core, submit

PROMPT = list(range(1, 10))  # nine tokens: four full blocks of two, and the last one


def run(core: EngineCore, name: str, prompt: list[int], max_tokens: int = 3, **options: Any) -> list[TokenOutput]:
    """One sequence to its end."""
    assert core.add(submit(name, prompt, max_tokens, **options)) is None
    outputs = []
    while core.has_work:
        outputs += core.step().outputs
    return outputs


def tokens(outputs: list[TokenOutput]) -> list[int]:
    return [token_id for output in outputs for token_id in output.token_ids]


def test_the_same_tenant_hits_and_everybody_else_misses() -> None:
    core, _ = integer_core(num_blocks=64)
    assert run(core, "first", PROMPT)[-1].num_cached_tokens == 0
    for name, options, num_cached in (
        ("same", {}, 8),
        ("another domain", {"domain": "b"}, 0),
        ("another salt", {"salt": b"other"}, 0),
        ("domain and salt shifted", {"domain": "as", "salt": b"alt"}, 0),
        ("same again", {}, 8),
        ("the other domain again", {"domain": "b"}, 8),
    ):
        outputs = run(core, name, PROMPT, **options)
        assert {output.num_cached_tokens for output in outputs} == {num_cached}, name
        assert {output.num_prompt_tokens for output in outputs} == {len(PROMPT)}
        assert tokens(outputs) == continuation(PROMPT, 3)


def test_only_what_is_the_same_from_the_beginning_is_shared() -> None:
    core, _ = integer_core(num_blocks=64)
    run(core, "first", PROMPT)
    assert run(core, "longer", [*PROMPT, 40, 41])[-1].num_cached_tokens == 8
    assert run(core, "other end", [*PROMPT[:5], 40, 41, 42])[-1].num_cached_tokens == 4
    assert run(core, "other beginning", [40, *PROMPT[1:]])[-1].num_cached_tokens == 0
    assert run(core, "shifted", PROMPT[2:])[-1].num_cached_tokens == 0


@given(num_tokens=st.integers(1, 12), block_size=st.integers(1, 4))
def test_at_least_the_last_token_is_always_computed(num_tokens: int, block_size: int) -> None:
    core, _ = integer_core(num_blocks=64, block_size=block_size)
    prompt = list(range(1, num_tokens + 1))
    run(core, "first", prompt)
    again = run(core, "again", prompt)[-1]
    assert again.num_cached_tokens == (num_tokens - 1) // block_size * block_size < num_tokens


def test_an_answer_is_found_by_the_next_question() -> None:
    core, _ = integer_core(num_blocks=64)
    answer = tokens(run(core, "first", PROMPT, 6))
    assert run(core, "second", [*PROMPT, *answer, 5])[-1].num_cached_tokens == 14  # the last token is never computed


def test_it_can_be_switched_off() -> None:
    core, _ = integer_core(num_blocks=64, prefix_cache=False)
    run(core, "first", PROMPT)
    assert run(core, "second", PROMPT)[-1].num_cached_tokens == 0
    assert core.pool.num_published == 0


def test_the_longest_unread_goes_first_and_the_end_before_the_beginning() -> None:
    core, _ = integer_core(num_blocks=8, max_num_seqs=1)
    run(core, "old", PROMPT[:5], 1)  # two full blocks, one begun
    run(core, "new", [50, 51, 52, 53, 54], 1)
    run(core, "touched", PROMPT[:5], 1)
    assert core.pool.num_published == 4
    run(core, "large", list(range(20, 31)), 1)  # six blocks: four were free, then the two longest unread
    assert run(core, "gone", [50, 51, 52, 53, 54], 1)[-1].num_cached_tokens == 0
    core, _ = integer_core(num_blocks=4, max_num_seqs=1)
    run(core, "old", PROMPT[:5], 1)
    run(core, "three blocks", list(range(20, 26)), 1, domain="b")
    assert run(core, "the beginning stayed", PROMPT[:5], 1)[-1].num_cached_tokens == 2


def test_a_preempted_sequence_finds_its_own_blocks_again() -> None:
    computed = {}
    for prefix_cache in (True, False):
        watcher = Watcher(8, 4, 2)
        core, _ = integer_core(num_blocks=7, max_num_seqs=2, observer=watcher, prefix_cache=prefix_cache)
        for name, prompt in (("old", [1, 2, 3]), ("young", [4, 5, 6, 7])):
            core.add(submit(name, prompt, 7))
        received: dict[str, list[TokenOutput]] = {"old": [], "young": []}
        while core.has_work:
            for output in core.step().outputs:
                received[output.sequence_id].append(output)
        assert core.stats().num_preemptions
        assert tokens(received["young"]) == continuation([4, 5, 6, 7], 7)
        assert received["young"][-1].num_cached_tokens == 0, "its own work is no hit that is billed as one"
        computed[prefix_cache] = sum(len(evidence.slot_mapping) for evidence in watcher.evidence)
    assert computed[True] < computed[False]


def test_what_a_failed_sequence_computed_is_not_found() -> None:
    core, runner = integer_core(num_blocks=64)
    runner.broken_rows = {0, 1, 2, 3}
    assert run(core, "broken", PROMPT)[-1].error == "engine_failure"
    runner.broken_rows = set()
    assert run(core, "after", PROMPT)[-1].num_cached_tokens == 0


def test_a_violation_empties_the_domains_cache_and_ends_all_that_share() -> None:
    watcher = Watcher(8, 4, 2)
    core, _ = integer_core(num_blocks=64, observer=watcher)
    run(core, "a0", PROMPT)
    run(core, "b0", PROMPT, domain="b")
    for name, domain in (("a1", "a"), ("a2", "a"), ("b1", "b")):
        core.add(submit(name, PROMPT, 6, domain=domain))
    core.step()
    watcher.violations = [("x", ("a1",), ("a",), 0, "")]
    result = core.step()
    failed = {output.sequence_id for output in result.outputs if output.error == "isolation_violation"}
    assert failed == {"a1", "a2"}, "a2 read the same blocks"
    while core.has_work:
        core.step()
    assert run(core, "a3", PROMPT)[-1].num_cached_tokens == 0
    assert run(core, "b2", PROMPT, domain="b")[-1].num_cached_tokens == 8


@dataclass(frozen=True)
class Seen:
    """All that the sequences of one domain, and who plans them, could notice."""

    outputs: list[tuple[int, TokenOutput]]  # step, output
    rows: list[tuple[int, str, int]]  # step, sequence, tokens computed


def watch(load: Load, domain: str, *, prefix_cache: bool = True, others_alike: bool = True) -> Seen:
    """Run a load with room for everybody and take down what `domain` sees. Where the others are not alike, no prompt
    of theirs ever begins like another."""
    watcher = Watcher(1000, 50, load.block_size)
    core, _ = integer_core(
        num_blocks=2000,
        block_size=load.block_size,
        max_batched_tokens=1000,
        max_num_seqs=50,
        observer=watcher,
        prefix_cache=prefix_cache,
    )
    outputs = []
    last = max(arrival.step for arrival in load.arrivals)
    step = 0
    while core.has_work or step <= last:
        for index, arrival in enumerate(load.arrivals):
            if arrival.step == step:
                salt = b"" if others_alike or arrival.domain == domain else str(index).encode()
                name = f"{arrival.domain}{index}"
                core.add(submit(name, arrival.prompt, arrival.max_tokens, domain=arrival.domain, salt=salt))
        outputs += [(step, output) for output in core.step().outputs if output.sequence_id[0] == domain]
        step += 1
    rows = [
        (evidence.step, name, int(evidence.cu_seqlens[index + 1] - evidence.cu_seqlens[index]))
        for evidence in watcher.evidence
        for index, name in enumerate(evidence.sequence_ids)
        if name[0] == domain
    ]
    return Seen(outputs, rows)


def alike(load: Load) -> Load:
    """The same load with prompts that are beginnings of one another, so that hits are many."""
    arrivals = []
    for arrival in load.arrivals:
        prompt = [7, 3, 5, 1] * 5
        arrivals.append(
            type(arrival)(prompt[: len(arrival.prompt)], arrival.max_tokens, arrival.domain, arrival.step, None)
        )
    return Load(arrivals, 2000, load.block_size, 1000, 50, load.scheduling)


@given(loads())
def test_hits_of_others_are_invisible(load: Load) -> None:
    """Where nothing is scarce: in tokens, in counters, in the order and the steps in which a domain's rows run."""
    load = alike(load)
    assert watch(load, "a") == watch(load, "a", others_alike=False)


@given(loads())
def test_a_hit_says_what_a_miss_would_have_said(load: Load) -> None:
    load = alike(load)
    hits, misses = watch(load, "a"), watch(load, "a", prefix_cache=False)

    def said(seen: Seen) -> list[tuple[str, tuple[int, ...], int, str | None]]:
        return [(o.sequence_id, o.token_ids, o.num_prompt_tokens, o.finish_reason) for _, o in seen.outputs]

    assert said(hits) == said(misses)
    cached = {output.sequence_id: output.num_cached_tokens for _, output in hits.outputs}
    num_computed = dict.fromkeys(cached, 0)
    for _, name, num_new in hits.rows:
        num_computed[name] += num_new
    for _, output in hits.outputs:
        if output.finish_reason:
            name = output.sequence_id
            num_tokens = output.num_prompt_tokens + output.num_completion_tokens - 1
            assert num_computed[name] == num_tokens - cached[name], "what is not cached is computed, once"


@given(
    load=loads().filter(lambda load: load.num_blocks >= 2),
    leaver=st.sampled_from(["a", "b", "c"]),
    at=st.integers(0, 12),
)
def test_who_leaves_leaves_nothing_behind(load: Load, leaver: str, at: int) -> None:
    """Erased at any moment: its sequences end, no block has its numbers, the auditor has no objection, and what others
    are told is what they would have been told anyway."""
    observer = AuditObserver(load.num_blocks, load.block_size)
    core, _ = integer_core(
        num_blocks=load.num_blocks,
        block_size=load.block_size,
        observer=observer,
        max_batched_tokens=load.max_batched_tokens,
        max_num_seqs=load.max_num_seqs,
    )
    said: dict[str, list[int]] = {}
    gone: set[str] = set()
    for number, arrival in enumerate(load.arrivals):
        core.add(submit(str(number), arrival.prompt, arrival.max_tokens, domain=arrival.domain))
    for step in range(400):
        if step == at:
            outputs, num_blocks = core.erase_domain(leaver)
            gone = {output.sequence_id for output in outputs}
            dirty = [block for block in core.pool.blocks if leaver in (block.content_domain, block.domain)]
            assert dirty == []
            assert core.pool.num_cached_by_domain.get(leaver, 0) == 0
            assert core.erase_domain(leaver) == ([], 0)
            assert num_blocks <= load.num_blocks
        if not core.has_work and step > at:
            break
        result = core.step()
        assert result.incidents == []
        for output in result.outputs:
            said.setdefault(output.sequence_id, []).extend(output.token_ids)
    assert observer.counters()["num_violations"] == 0
    for number, arrival in enumerate(load.arrivals):
        if str(number) in gone:
            assert arrival.domain == leaver
        elif str(number) in said:
            assert said[str(number)] == continuation(arrival.prompt, len(said[str(number)]))


def test_erasing_zeroes_the_cache_itself() -> None:
    core, _ = integer_core(num_blocks=64)
    run(core, "first", PROMPT)
    run(core, "other", PROMPT, domain="b")
    held = {block.block_id for block in core.pool.blocks if block.content_domain == "a"}
    zeroed: list[int] = []
    scrub = core.pool._scrub
    core.pool._scrub = lambda block_ids: (zeroed.extend(block_ids), scrub(block_ids))[1]  # type: ignore[func-returns-value]
    outputs, num_blocks = core.erase_domain("a")
    assert (outputs, num_blocks) == ([], len(held))
    assert set(zeroed) == held
    assert run(core, "again", PROMPT)[-1].num_cached_tokens == 0
    assert run(core, "other again", PROMPT, domain="b")[-1].num_cached_tokens == 8
