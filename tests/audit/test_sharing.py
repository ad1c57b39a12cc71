"""Shared blocks, as the auditor alone sees them: what may be published, who may share it, and that nobody writes it."""

import numpy as np
import pytest

from audit.runtime.isolation import IsolationAuditor
from tests.audit.traces import Step, check

PROMPT = (1, 2, 3, 4, 5)  # blocks of two: two full ones, and the last token


def announced() -> IsolationAuditor:
    auditor = IsolationAuditor(num_blocks=8, block_size=2)
    for name, domain, tokens, salt in (
        ("a", "d", PROMPT, b""),
        ("same", "d", PROMPT, b""),
        ("other domain", "e", PROMPT, b""),
        ("other salt", "d", PROMPT, b"salt"),
        ("other beginning", "d", (9, 2, 3, 4, 5), b""),
        ("other end", "d", (1, 2, 9, 4, 5), b""),
        ("short", "d", (1,), b""),
    ):
        auditor.on_event("begin", 0, -1, 0, domain, name, tokens, salt)
    return auditor


def step(number: int, name: str, blocks: list[int], start: int, tokens: list[int], domain: str = "d") -> Step:
    slots = [blocks[p // 2] * 2 + p % 2 for p in range(start, start + len(tokens))]
    lengths = np.array([0, len(tokens)]), np.array([start + len(tokens)])
    return Step(number, [name], [domain], np.array(tokens), *lengths, np.array([blocks]), np.array(slots))


def published() -> IsolationAuditor:
    """`a` has computed its prompt in blocks 0, 1, 2; the first two are published."""
    auditor = announced()
    for block in (0, 1, 2):
        auditor.on_event("allocate", 1, block, 1, "d", "a")
    assert check(auditor, step(1, "a", [0, 1, 2], 0, list(PROMPT))) == []
    for block in (0, 1):
        auditor.on_event("seal", 1, block, 1, "d", "a")
        auditor.on_event("publish", 1, block, 1, "d", "a")
    return auditor


def rules(auditor: IsolationAuditor, number: int = 9) -> set[str]:
    """What the events so far have broken."""
    none = np.zeros(0, np.int64)
    empty = Step(number, [], [], none, np.zeros(1, np.int64), none, np.zeros((0, 1), np.int64), none)
    return {violation.kind for violation in check(auditor, empty)}


@pytest.mark.parametrize("freed", [False, True])
def test_the_same_tokens_in_the_same_domain_may_be_shared(freed: bool) -> None:
    auditor = published()
    if freed:
        for block in (2, 1, 0):
            auditor.on_event("free", 1, block, 1, "d", "a")
        auditor.on_event("end", 1, -1, 0, "d", "a")
    for block in (0, 1):
        auditor.on_event("share", 2, block, 1, "d", "same")
    auditor.on_event("allocate", 2, 3, 1, "d", "same")
    assert check(auditor, step(2, "same", [0, 1, 3], 4, [5])) == []
    assert auditor.self_test()


@pytest.mark.parametrize(
    ("name", "domain", "block", "rule"),
    [
        ("other domain", "e", 0, "foreign_share"),
        ("other domain", "d", 0, "wrong_domain"),
        ("other salt", "d", 0, "foreign_prefix"),
        ("other beginning", "d", 0, "foreign_prefix"),
        ("same", "d", 1, "foreign_prefix"),  # the second block as the first
        ("same", "d", 2, "share_of_unpublished_block"),
        ("same", "d", 3, "share_of_free_block"),
        ("short", "d", 0, "foreign_prefix"),  # tokens that the sequence does not have yet
        ("a", "d", 0, "double_share"),
        ("nobody", "d", 0, "unknown_sequence"),
    ],
)
def test_anything_else_is_a_violation(name: str, domain: str, block: int, rule: str) -> None:
    auditor = published()
    auditor.on_event("share", 2, block, 1, domain, name)
    assert rules(auditor) == {rule}


def test_the_same_block_after_another_beginning_is_another_prefix() -> None:
    auditor = published()
    auditor.on_event("allocate", 2, 3, 1, "d", "other beginning")
    auditor.on_event("share", 2, 1, 1, "d", "other beginning")
    assert rules(auditor) == {"foreign_prefix"}


def test_a_prefix_is_shared_as_far_as_it_is_the_same() -> None:
    auditor = published()
    auditor.on_event("share", 2, 0, 1, "d", "other end")
    assert rules(auditor, 2) == set()
    auditor.on_event("share", 3, 1, 1, "d", "other end")
    assert rules(auditor) == {"foreign_prefix"}


@pytest.mark.parametrize(("generation", "evicted", "rule"), [(0, False, "stale"), (1, True, "share_of_unpublished")])
def test_an_old_name_leads_nowhere(generation: int, evicted: bool, rule: str) -> None:
    auditor = published()
    if evicted:
        auditor.on_event("evict", 2, 0, 1, "d", "")
    auditor.on_event("share", 2, 0, generation, "d", "same")
    assert any(name.startswith(rule) for name in rules(auditor))


def test_a_block_is_published_only_when_it_was_written_in_full() -> None:
    auditor = announced()
    auditor.on_event("allocate", 1, 0, 1, "d", "a")
    assert check(auditor, step(1, "a", [0], 0, [1])) == []
    auditor.on_event("seal", 1, 0, 1, "d", "a")
    auditor.on_event("publish", 1, 0, 1, "d", "a")
    assert rules(auditor) == {"publish_of_unsealed_block"}


@pytest.mark.parametrize(("kind", "rule"), [("allocate", "allocate_of_published"), ("scrub", "scrub_of_live")])
def test_a_published_block_is_not_taken_before_its_name_is(kind: str, rule: str) -> None:
    auditor = published()
    auditor.on_event("free", 1, 0, 1, "d", "a")
    who = ("", "") if kind == "scrub" else ("d", "same")
    auditor.on_event(kind, 2, 0, 1 + (kind == "allocate"), *who)
    assert any(name.startswith(rule) for name in rules(auditor))


def test_nobody_writes_a_shared_block() -> None:
    auditor = published()
    auditor.on_event("share", 2, 0, 1, "d", "same")
    assert "write_to_closed_block" in {v.kind for v in check(auditor, step(2, "same", [0], 1, [2]))}


def test_a_shared_block_is_read_only_in_its_place_and_only_while_it_is_held() -> None:
    auditor = published()
    for block in (0, 1):
        auditor.on_event("share", 2, block, 1, "d", "same")
    auditor.on_event("allocate", 2, 3, 1, "d", "same")
    swapped = check(auditor, step(2, "same", [1, 0, 3], 4, [5]))
    assert {violation.kind for violation in swapped} == {"foreign_lineage"}
    auditor.on_event("free", 3, 1, 1, "d", "same")
    assert {v.kind for v in check(auditor, step(3, "same", [0, 1, 3], 4, [5]))} >= {"foreign_lineage"}


def test_a_sequence_that_ends_holds_nothing() -> None:
    auditor = published()
    auditor.on_event("end", 2, -1, 0, "d", "a")
    auditor.on_event("end", 2, -1, 0, "d", "a")
    auditor.on_event("begin", 2, -1, 0, "d", "same")
    assert rules(auditor) == {"end_with_blocks", "unknown_sequence", "double_begin"}
