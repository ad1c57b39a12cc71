"""The isolation auditor: silent on every valid trace, and loud in the step itself on every fault class."""

import threading
from collections.abc import Callable
from dataclasses import asdict, replace
from random import Random

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from audit.runtime import isolation, step_check
from audit.runtime.cache_bytes import CacheBytes
from audit.runtime.isolation import IsolationAuditor
from tests.audit.traces import Event, Happening, ModelEngine, Step, audit, check

SIZES = {"num_blocks": 24, "block_size": 4}
SEVEN = np.array([7])


def model_trace(seed: int, num_steps: int = 40, num_domains: int = 3) -> list[Happening]:
    return ModelEngine(Random(seed), num_domains=num_domains, **SIZES).run(num_steps)


@given(
    seed=st.integers(0, 2**32),
    num_blocks=st.integers(2, 40),
    block_size=st.sampled_from([1, 2, 4, 16]),
    num_domains=st.integers(1, 4),
)
def test_a_valid_trace_has_no_violation(seed: int, num_blocks: int, block_size: int, num_domains: int) -> None:
    engine = ModelEngine(Random(seed), num_blocks=num_blocks, block_size=block_size, num_domains=num_domains)
    trace = engine.run(60)
    auditor, found = audit(trace, num_blocks=num_blocks, block_size=block_size)
    assert not any(found)
    assert auditor.self_test()
    steps = [x for x in trace if isinstance(x, Step)]
    counters = auditor.counters()
    assert counters["num_steps"] == len(steps)
    assert counters["num_rows"] == sum(len(x.sequence_ids) for x in steps)
    assert counters["num_slots_checked"] == sum(len(x.slot_mapping) for x in steps)
    assert counters["num_violations"] == 0
    assert counters["num_self_tests_failed"] == 0
    assert counters["last_self_test_ok"] == 1


# ---------------------------------------------------------------- faults in a step's arrays


def row_of(step: Step, at: int) -> int:
    """The row that owns token `at`."""
    return int(np.searchsorted(step.cu_seqlens, at, side="right")) - 1


def foreign_block(step: Step, random: Random) -> set[str] | None:
    """A row reads a block of a row in another domain."""
    pairs = [
        (a, b) for a in range(len(step.domains)) for b in range(len(step.domains)) if step.domains[a] != step.domains[b]
    ]
    if not pairs:
        return None
    a, b = random.choice(pairs)
    step.block_tables[a, random.randrange(-(-int(step.kv_lens[a]) // 4))] = step.block_tables[b, 0]
    return {step.sequence_ids[a]}


def foreign_lineage(step: Step, random: Random) -> set[str] | None:
    """The same between two sequences of one domain."""
    pairs = [
        (a, b)
        for a in range(len(step.domains))
        for b in range(len(step.domains))
        if a != b and step.domains[a] == step.domains[b]
    ]
    if not pairs:
        return None
    a, b = random.choice(pairs)
    column = random.randrange(-(-int(step.kv_lens[a]) // 4))
    if step.block_tables[a, column] == step.block_tables[b, 0]:  # they share it
        return None
    step.block_tables[a, column] = step.block_tables[b, 0]
    return {step.sequence_ids[a]}


def double_writer(step: Step, random: Random) -> set[str] | None:
    """Two tokens go to one slot."""
    if len(step.slot_mapping) < 2:
        return None
    i, j = random.sample(range(len(step.slot_mapping)), 2)
    step.slot_mapping[i] = step.slot_mapping[j]
    return {step.sequence_ids[row_of(step, i)]}


def slot_beside(step: Step, random: Random) -> set[str] | None:
    """A token goes to the slot next to its own."""
    i = random.randrange(len(step.slot_mapping))
    step.slot_mapping[i] += 1
    return {step.sequence_ids[row_of(step, i)]}


def minus_one_slot(step: Step, random: Random) -> set[str] | None:
    i = random.randrange(len(step.slot_mapping))
    step.slot_mapping[i] = -1
    return {step.sequence_ids[row_of(step, i)]}


def slot_beyond_the_cache(step: Step, random: Random) -> set[str] | None:
    i = random.randrange(len(step.slot_mapping))
    step.slot_mapping[i] = SIZES["num_blocks"] * SIZES["block_size"]
    return {step.sequence_ids[row_of(step, i)]}


def one_too_long(step: Step, random: Random) -> set[str] | None:
    """kv_len one too high, and nothing else changed."""
    row = random.randrange(len(step.kv_lens))
    step.kv_lens[row] += 1
    return {step.sequence_ids[row]}


def one_too_short(step: Step, random: Random) -> set[str] | None:
    row = random.randrange(len(step.kv_lens))
    step.kv_lens[row] -= 1
    return {step.sequence_ids[row]}


def consistently_one_too_long(step: Step, random: Random) -> set[str] | None:
    """Length and slots agree with each other, but a position was skipped: only the history knows."""
    row = random.randrange(len(step.kv_lens))
    begin, end = step.cu_seqlens[row], step.cu_seqlens[row + 1]
    start = int(step.kv_lens[row] - (end - begin)) + 1
    if (start + end - begin - 1) // 4 >= step.block_tables.shape[1]:
        return None
    if (step.block_tables[row, : (start + end - begin - 1) // 4 + 1] < 0).any():
        return None
    step.kv_lens[row] += 1
    step.slot_mapping[begin:end] = [
        step.block_tables[row, p // 4] * 4 + p % 4 for p in range(start, start + end - begin)
    ]
    return {step.sequence_ids[row]}


def permuted_rows(step: Step, random: Random) -> set[str] | None:
    """Block tables of two rows change places."""
    if len(step.sequence_ids) < 2:
        return None
    a, b = random.sample(range(len(step.sequence_ids)), 2)
    step.block_tables[[a, b]] = step.block_tables[[b, a]]
    return {step.sequence_ids[a], step.sequence_ids[b]}


def permuted_names(step: Step, random: Random) -> set[str] | None:
    """Row-to-sequence map of two rows changes places."""
    if len(step.sequence_ids) < 2:
        return None
    a, b = random.sample(range(len(step.sequence_ids)), 2)
    for names in (step.sequence_ids, step.domains):
        names[a], names[b] = names[b], names[a]
    return {step.sequence_ids[a], step.sequence_ids[b]}


def shifted_boundary(step: Step, random: Random) -> set[str] | None:
    """cu_seqlens hands a token of one row to the next."""
    inner = range(1, len(step.cu_seqlens) - 1)
    if not inner:
        return None
    step.cu_seqlens[random.choice(inner)] += 1
    return set()


def free_block(step: Step, random: Random) -> set[str] | None:
    """A row reads a block that nobody owns."""
    row = random.randrange(len(step.kv_lens))
    step.block_tables[row, 0] = 23  # the trace below leaves it free
    return {step.sequence_ids[row]}


def block_out_of_range(step: Step, random: Random) -> set[str] | None:
    row = random.randrange(len(step.kv_lens))
    step.block_tables[row, 0] = random.choice([-1, 24, 2**30])
    return {step.sequence_ids[row]}


def wrong_domain(step: Step, random: Random) -> set[str] | None:
    """The row claims another domain than its blocks have."""
    row = random.randrange(len(step.kv_lens))
    step.domains[row] = "d9"
    return {step.sequence_ids[row]}


def twice_in_the_batch(step: Step, random: Random) -> set[str] | None:
    if len(step.sequence_ids) < 2:
        return None
    step.sequence_ids[0], step.domains[0] = step.sequence_ids[1], step.domains[1]
    return {step.sequence_ids[1]}


def foreign_tokens(step: Step, random: Random) -> set[str] | None:
    """A row computes a first token that is not its prompt's."""
    starts = {int(step.kv_lens[r] - (step.cu_seqlens[r + 1] - step.cu_seqlens[r])): r for r in range(len(step.kv_lens))}
    row = starts.get(0)
    if row is None:
        return None
    step.token_ids[step.cu_seqlens[row]] += 100
    return {step.sequence_ids[row]}


def tokens_missing(step: Step, random: Random) -> set[str] | None:
    object.__setattr__(step, "token_ids", step.token_ids[:-1])
    return set(step.sequence_ids)


def slots_missing(step: Step, random: Random) -> set[str] | None:
    object.__setattr__(step, "slot_mapping", step.slot_mapping[:-1])
    return set(step.sequence_ids)


def float_arrays(step: Step, random: Random) -> set[str] | None:
    object.__setattr__(step, "kv_lens", step.kv_lens.astype(np.float32))
    return set(step.sequence_ids)


ARRAY_FAULTS = [
    foreign_block,
    foreign_lineage,
    double_writer,
    slot_beside,
    minus_one_slot,
    slot_beyond_the_cache,
    one_too_long,
    one_too_short,
    consistently_one_too_long,
    permuted_rows,
    permuted_names,
    shifted_boundary,
    free_block,
    block_out_of_range,
    wrong_domain,
    twice_in_the_batch,
    foreign_tokens,
    tokens_missing,
    slots_missing,
    float_arrays,
]


@pytest.mark.parametrize("fault", ARRAY_FAULTS, ids=lambda f: f.__name__)
@given(seed=st.integers(0, 2**32), data=st.data())
@settings(max_examples=25)
def test_a_fault_in_the_arrays_is_caught_in_its_step(
    fault: Callable[[Step, Random], set[str] | None], seed: int, data: st.DataObject
) -> None:
    trace = model_trace(seed)
    trace = [x for x in trace if not touches(x, 23)] if fault is free_block else trace
    if fault is free_block:
        trace = valid_without(23, seed)
    at = data.draw(st.sampled_from([i for i, x in enumerate(trace) if isinstance(x, Step)]))
    step = trace[at]
    assert isinstance(step, Step)
    faulty = step.copy()
    named = fault(faulty, Random(seed))
    assume(named is not None)
    auditor, before = audit(trace[:at], **SIZES)
    assert not any(before)
    violations = check(auditor, faulty)
    assert violations
    flagged = {sequence for v in violations for sequence in v.sequence_ids}
    assert named is not None
    assert named <= flagged
    assert auditor.counters()["num_violations"] == len(violations)


def touches(happening: Happening, block: int) -> bool:
    return isinstance(happening, Event) and happening.block_id == block


def valid_without(block: int, seed: int) -> list[Happening]:
    """A valid trace in which `block`, the last one, is never allocated."""
    return ModelEngine(Random(seed), num_blocks=block, block_size=4, num_domains=3).run(40)


@pytest.mark.parametrize(
    ("fault", "rule"),
    [
        (foreign_block, "foreign_block"),
        (foreign_lineage, "foreign_lineage"),
        (free_block, "unallocated_block"),
        (block_out_of_range, "block_out_of_range"),
        (minus_one_slot, "slot_out_of_range"),
        (slot_beside, "slot_mismatch"),
        (double_writer, "double_writer"),
        (consistently_one_too_long, "history_mismatch"),
        (twice_in_the_batch, "duplicate_row"),
        (slots_missing, "malformed_step"),
    ],
)
def test_faults_have_their_names(fault: Callable[[Step, Random], set[str] | None], rule: str) -> None:
    for seed in range(50):
        trace = valid_without(23, seed)
        at = max(i for i, x in enumerate(trace) if isinstance(x, Step))
        step = trace[at]
        assert isinstance(step, Step)
        faulty = step.copy()
        if fault(faulty, Random(seed)) is None:
            continue
        auditor, _ = audit(trace[:at], **SIZES)
        assert rule in {v.kind for v in check(auditor, faulty)}
        return
    pytest.fail("no trace had room for the fault")


# ---------------------------------------------------------------- faults in the events


def without(trace: list[Happening], at: int) -> list[Happening]:
    return trace[:at] + trace[at + 1 :]


EVENT_FAULTS: dict[str, tuple[str, Callable[[list[Happening], int], list[Happening]], set[str]]] = {
    "double allocate": ("allocate", lambda t, i: [*t[: i + 1], bumped(t[i]), *t[i + 1 :]], {"double_allocate"}),
    "stale generation": ("allocate", lambda t, i: [*t[:i], aged(t[i]), *t[i + 1 :]], {"stale_generation"}),
    "freed twice": ("free", lambda t, i: [*t[: i + 1], t[i], *t[i + 1 :]], {"free_of_free_block", "foreign_free"}),
    "never freed": (
        "free",
        without,
        {"end_with_blocks", "double_allocate", "foreign_prefix", "double_share", "foreign_lineage"},
    ),
    "never scrubbed": ("scrub", without, {"unscrubbed_reuse"}),
    "freed by another": ("free", lambda t, i: [*t[:i], renamed(t[i]), *t[i + 1 :]], {"foreign_free"}),
    "sealed twice": ("seal", lambda t, i: [*t[: i + 1], t[i], *t[i + 1 :]], {"seal_of_sealed_block"}),
    "sealed early": (
        "allocate",
        lambda t, i: [*t[: i + 1], sealed(t[i]), *t[i + 1 :]],
        {"write_to_closed_block", "seal_of_sealed_block"},
    ),
    "freed early": (
        "allocate",
        lambda t, i: [*t[: i + 1], freed(t[i]), *t[i + 1 :]],
        {"unallocated_block", "free_of_free_block"},
    ),
    "allocate unheard": ("allocate", without, {"unallocated_block", "free_of_free_block", "seal_of_free_block"}),
    "scrubbed in use": ("allocate", lambda t, i: [*t[: i + 1], scrubbed(t[i]), *t[i + 1 :]], {"scrub_of_live_block"}),
    "nonsense": ("allocate", lambda t, i: [*t[:i], nonsense(t[i]), *t[i:]], {"unknown_event"}),
    "beyond the pool": ("allocate", lambda t, i: [*t[:i], outside(t[i]), *t[i:]], {"block_out_of_range"}),
}


def event(happening: Happening) -> Event:
    assert isinstance(happening, Event)
    return happening


def bumped(x: Happening) -> Event:
    return replace(event(x), generation=event(x).generation + 1, domain="d9", sequence_id="s_other")


def aged(x: Happening) -> Event:
    return replace(event(x), generation=event(x).generation - 5)


def renamed(x: Happening) -> Event:
    return replace(event(x), sequence_id="s_other")


def sealed(x: Happening) -> Event:
    return replace(event(x), kind="seal")


def freed(x: Happening) -> Event:
    return replace(event(x), kind="free")


def scrubbed(x: Happening) -> Event:
    return replace(event(x), kind="scrub", domain="", sequence_id="")


def nonsense(x: Happening) -> Event:
    return replace(event(x), kind="lend")


def outside(x: Happening) -> Event:
    return replace(event(x), block_id=24)


def candidates(trace: list[Happening], name: str) -> list[int]:
    """Places where the fault matters: something has to come after it that it can harm."""
    kind = EVENT_FAULTS[name][0]
    last_step = max((i for i, x in enumerate(trace) if isinstance(x, Step)), default=-1)
    places = []
    for i, x in enumerate(trace[:last_step]):
        if not isinstance(x, Event) or x.kind != kind:
            continue
        later = [y for y in trace[i + 1 : last_step] if isinstance(y, Event) and y.block_id == x.block_id]
        used = any(isinstance(y, Step) and (y.block_tables == x.block_id).any() for y in trace[i + 1 :])
        before = [y for y in trace[:i] if isinstance(y, Event) and y.block_id == x.block_id]
        if name == "never freed" and not any(y.kind == "allocate" for y in later):
            continue
        if name == "stale generation" and not before:
            continue
        if name == "never scrubbed":
            owners = [y.domain for y in before if y.kind == "allocate"]
            following = next((y for y in later if y.kind == "allocate"), None)
            rescrubbed = bool(later) and later[0].kind == "scrub"
            if following is None or not owners or owners[-1] == following.domain or rescrubbed:
                continue
            if any(y.kind == "scrub" for y in before[max(j for j, y in enumerate(before) if y.kind == "allocate") :]):
                continue
        if name in ("sealed early", "freed early", "allocate unheard") and not used:
            continue
        places.append(i)
    return places


@pytest.mark.parametrize("name", EVENT_FAULTS)
@given(seed=st.integers(0, 2**32), data=st.data())
@settings(max_examples=25)
def test_an_illegal_event_is_caught_before_the_next_step_runs(name: str, seed: int, data: st.DataObject) -> None:
    trace = model_trace(seed, num_steps=60)
    places = candidates(trace, name)
    assume(places)
    _, fault, rules = EVENT_FAULTS[name]
    at = data.draw(st.sampled_from(places))
    _, found = audit(fault(trace, at), **SIZES)
    kinds = {v.kind for violations in found for v in violations}
    assert kinds & rules, f"{kinds} instead of {rules}"
    num_steps_before = sum(isinstance(x, Step) for x in trace[:at])
    assert not any(found[:num_steps_before])
    assert {v.kind for violations in found for v in violations if violations is next(x for x in found if x)} & rules


# ---------------------------------------------------------------- conduct


def two_tenants() -> tuple[IsolationAuditor, Step]:
    """Row a owns block 0 and writes slot 0, row b owns block 1 and writes slot 4."""
    auditor = IsolationAuditor(**SIZES)
    for name in ("a", "b", "c"):
        auditor.on_event("begin", 1, -1, 0, f"d{name}", name, (7, 7))
    auditor.on_event("allocate", 1, 0, 1, "da", "a")
    auditor.on_event("allocate", 1, 1, 1, "db", "b")
    tokens = np.array([7, 7])
    lengths = np.array([0, 1, 2]), np.array([1, 1])
    return auditor, Step(1, ["a", "b"], ["da", "db"], tokens, *lengths, np.array([[0], [1]]), np.array([0, 4]))


def test_rows_without_a_violation_may_run_and_the_step_may_be_asked_again() -> None:
    auditor, step = two_tenants()
    faulty = step.copy()
    faulty.block_tables[0, 0] = 1
    assert {v.sequence_ids[0] for v in check(auditor, faulty)} == {"a"}
    alone = Step(1, ["b"], ["db"], SEVEN, np.array([0, 1]), np.array([1]), np.array([[1]]), np.array([4]))
    assert check(auditor, alone) == []
    onward = Step(2, ["b"], ["db"], SEVEN, np.array([0, 1]), np.array([2]), np.array([[1]]), np.array([5]))
    assert check(auditor, onward) == []


def test_rows_beside_a_violation_are_remembered_when_they_ran_without_being_asked_again() -> None:
    auditor, step = two_tenants()
    faulty = step.copy()
    faulty.slot_mapping[0] = -1
    assert check(auditor, faulty)
    onward = Step(2, ["b"], ["db"], SEVEN, np.array([0, 1]), np.array([2]), np.array([[1]]), np.array([5]))
    assert check(auditor, onward) == []


def test_a_write_cannot_be_done_twice_nor_steps_go_back() -> None:
    auditor, step = two_tenants()
    assert check(auditor, step) == []
    again = replace(step.copy(), step=2)
    assert {v.kind for v in check(auditor, again)} == {"history_mismatch"}
    assert "step_order" in {v.kind for v in check(auditor, replace(again, step=1))}


def test_a_foreign_write_names_the_owner_too() -> None:
    auditor, step = two_tenants()
    step.slot_mapping[0] = 5
    found = {v.kind: v for v in check(auditor, step)}
    assert found["foreign_write"].sequence_ids == ("a", "b")
    assert found["foreign_write"].domains == ("da", "db")
    assert found["foreign_write"].block_id == 1


def test_a_block_in_quarantine_is_put_away_quietly_but_never_used_again() -> None:
    auditor, step = two_tenants()
    auditor.on_event("allocate", 1, 0, 2, "db", "b")
    assert "double_allocate" in {v.kind for v in check(auditor, step)}
    auditor.on_event("free", 1, 0, 2, "db", "b")
    auditor.on_event("free", 1, 0, 1, "da", "a")
    alone = Step(2, ["b"], ["db"], SEVEN, np.array([0, 1]), np.array([1]), np.array([[1]]), np.array([4]))
    assert check(auditor, alone) == []
    auditor.on_event("allocate", 3, 0, 3, "dc", "c")
    taken = Step(3, ["c"], ["dc"], SEVEN, np.array([0, 1]), np.array([1]), np.array([[0]]), np.array([0]))
    assert {"quarantined_block"} <= {v.kind for v in check(auditor, taken)}


def test_an_empty_step_is_fine_and_the_auditor_changes_no_array() -> None:
    auditor, step = two_tenants()
    none = np.zeros(0, np.int64)
    empty = Step(1, [], [], none, np.zeros(1, np.int32), none, np.zeros((0, 3), np.int32), none)
    assert check(auditor, empty) == []
    for array in (step.cu_seqlens, step.kv_lens, step.block_tables, step.slot_mapping):
        array.setflags(write=False)
    assert check(auditor, step) == []


@pytest.mark.parametrize("part", ["rows", "blocks"])
def test_the_self_test_notices_a_blind_check(monkeypatch: pytest.MonkeyPatch, part: str) -> None:
    auditor, step = two_tenants()
    assert check(auditor, step) == []
    assert auditor.self_test()
    assert check(auditor, replace(step.copy(), step=2, kv_lens=np.array([2, 2]), slot_mapping=np.array([1, 5]))) == []

    def blind(*_: object) -> None:
        return None

    monkeypatch.setattr(step_check._Flags, "blocks", blind)
    if part == "rows":
        monkeypatch.setattr(isolation, "check", blind)  # breaks instead of answering
    assert not auditor.self_test()
    counters = auditor.counters()
    assert (counters["num_self_tests"], counters["num_self_tests_failed"], counters["last_self_test_ok"]) == (2, 1, 0)
    assert counters["num_violations"] == 0


@pytest.mark.parametrize(
    ("where", "name", "blind"),
    [
        ("released_tokens", "say", lambda *_, **__: True),
        ("self_test", "array_problems", lambda *_: []),
        ("self_test", "output_problems", lambda *_, **__: []),
    ],
)
def test_the_self_test_notices_an_auditor_that_is_blind_to_content(
    monkeypatch: pytest.MonkeyPatch, where: str, name: str, blind: object
) -> None:
    auditor, _ = two_tenants()
    assert auditor.self_test()
    monkeypatch.setattr(f"audit.runtime.{where}.{name}", blind)
    assert not auditor.self_test()


def test_the_self_test_notices_bytes_that_are_not_compared(monkeypatch: pytest.MonkeyPatch) -> None:
    auditor, _ = two_tenants()
    monkeypatch.setattr(CacheBytes, "changed", lambda _, slots, generations: np.zeros(len(slots), np.bool_))
    assert not auditor.self_test()


def test_the_self_test_notices_a_check_that_cries_at_everything(monkeypatch: pytest.MonkeyPatch) -> None:
    auditor, _ = two_tenants()
    true_check = isolation.check

    def nervous(ledger: object, step: object) -> object:
        verdict = true_check(ledger, step)  # type: ignore[arg-type]
        return replace(verdict, violations=[step_check.Violation("foreign_block", (), (), -1, ""), *verdict.violations])

    monkeypatch.setattr(isolation, "check", nervous)
    assert not auditor.self_test()


def test_self_tests_may_run_beside_the_steps() -> None:
    auditor, done, failed = IsolationAuditor(**SIZES), threading.Event(), []

    def keep_testing() -> None:
        while not done.wait(0.0005):  # locks are not fair: without a pause the steps would hardly get a turn
            failed.append(not auditor.self_test())

    beside = threading.Thread(target=keep_testing)
    beside.start()
    try:
        for happening in model_trace(5, num_steps=300):
            if isinstance(happening, Step):
                assert check(auditor, happening) == []
            else:
                fields = asdict(happening)
                auditor.on_event(**fields)
    finally:
        done.set()
        beside.join()
    assert failed
    assert not any(failed)


def test_impossible_pools_are_refused() -> None:
    for num_blocks, block_size in ((1, 4), (4, 0)):
        with pytest.raises(ValueError, match="2 blocks"):
            IsolationAuditor(num_blocks, block_size)
