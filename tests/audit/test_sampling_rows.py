"""Rows that would sample as somebody else, and outputs that are not their sequence's, are stopped in their step."""

from collections.abc import Callable

import numpy as np
import pytest

from audit.runtime.isolation import IsolationAuditor
from audit.runtime.released_tokens import Output
from audit.runtime.sampling_rows import SampledRow, SamplingFacts

FACTS = {name: SamplingFacts(name.encode(), b"form", b"bias", (True, True, True, False)) for name in "ab"}
PROMPT = {"a": (3, 4), "b": (5, 6)}
SEEN = {name: np.isin(np.arange(9), tokens) for name, tokens in PROMPT.items()}


def begun() -> IsolationAuditor:
    auditor = IsolationAuditor(8, 4)
    for block, name in enumerate("ab"):
        auditor.on_event("begin", 1, -1, 0, f"d{name}", name, PROMPT[name], b"", FACTS[name])
        auditor.on_event("allocate", 1, block, 1, f"d{name}", name)
    return auditor


def row(name: str) -> SampledRow:
    at = "ab".index(name)
    counts = np.zeros(9, np.int64)
    return SampledRow(at, 2 * at + 1, 2, at, name, FACTS[name], 2, PROMPT[name], (), SEEN[name], counts, 2)


def rules(auditor: IsolationAuditor, sampled: list[SampledRow]) -> set[tuple[str, tuple[str, ...]]]:
    found = auditor.check_step(
        step=1,
        sequence_ids=["a", "b"],
        domains=["da", "db"],
        token_ids=np.array([3, 4, 5, 6]),
        cu_seqlens=np.array([0, 2, 4]),
        kv_lens=np.array([2, 2]),
        block_tables=np.array([[0], [1]]),
        slot_mapping=np.array([0, 1, 4, 5]),
        sampled=sampled,
    )
    return {(violation.kind, violation.sequence_ids) for violation in found}


FAULTS: list[tuple[str, Callable[[SampledRow, SampledRow], SampledRow]]] = [
    ("foreign_logits", lambda a, b: a._replace(token_index=b.token_index)),
    ("wrong_position", lambda a, b: a._replace(position=3)),
    ("shared_row", lambda a, b: a._replace(stable_row=b.stable_row)),
    ("foreign_sampling_state", lambda a, b: a._replace(sequence_id="b")),
    ("foreign_parameters", lambda a, b: a._replace(facts=a.facts._replace(parameters=b.facts.parameters))),
    ("foreign_adjustments", lambda a, b: a._replace(facts=a.facts._replace(bias=b"other"))),
    ("foreign_adjustments", lambda a, b: a._replace(facts=a.facts._replace(kind=(True, True, False, False)))),
    ("foreign_adjustments", lambda a, b: a._replace(facts=a.facts._replace(kind=(True, True, True, True)))),
    ("foreign_mask", lambda a, b: a._replace(facts=a.facts._replace(form=b""))),
    ("foreign_mask", lambda a, b: a._replace(form_token_ids=[7])),
    ("foreign_history", lambda a, b: a._replace(token_ids=b.token_ids)),
    ("foreign_history", lambda a, b: a._replace(num_prompt_tokens=1)),
    ("foreign_counts", lambda a, b: a._replace(seen=b.seen)),
    ("foreign_counts", lambda a, b: a._replace(counts=np.eye(9, dtype=np.int64)[3])),
    ("foreign_counts", lambda a, b: a._replace(num_counted=3)),
    ("foreign_counts", lambda a, b: a._replace(counts=None)),
]


@pytest.mark.parametrize(("rule", "fault"), FAULTS)
def test_a_row_that_would_sample_as_another_is_flagged(rule: str, fault: Callable[..., SampledRow]) -> None:
    assert rules(begun(), [row("a"), row("b")]) == set()
    found = rules(begun(), [fault(row("a"), row("b")), row("b")])
    assert (rule, ("a",)) in found
    assert {name for kind, (name,) in found if kind != "shared_row"} <= {"a"}


def test_a_row_samples_at_its_last_token_and_once() -> None:
    assert rules(begun(), [row("a")]) == {("sampling_out_of_turn", ("b",))}
    assert ("double_sampling", ("a",)) in rules(begun(), [row("a"), row("a"), row("b")])
    assert {kind for kind, _ in rules(begun(), [row("a")._replace(row=2)])} >= {"malformed_sampling"}


def test_a_token_that_nobody_sampled_is_not_computed() -> None:
    auditor = begun()
    assert rules(auditor, [row("a"), row("b")]) == set()
    auditor.on_sampled(1, [7, 8])
    found = auditor.check_step(
        step=2,
        sequence_ids=["a"],
        domains=["da"],
        token_ids=np.array([8]),
        cu_seqlens=np.array([0, 1]),
        kv_lens=np.array([3]),
        block_tables=np.array([[0]]),
        slot_mapping=np.array([2]),
        sampled=[],
    )
    assert {violation.kind for violation in found} == {"foreign_tokens", "sampling_out_of_turn"}


A, B = Output("a", (7,), 2, 0, 1, False), Output("b", (8,), 2, 0, 1, False)


@pytest.mark.parametrize(
    ("outputs", "expected"),
    [
        ([A, B], set()),
        ([A._replace(token_ids=(8,)), B._replace(token_ids=(7,))], {("foreign_output", "a"), ("foreign_output", "b")}),
        ([A], {("token_lost", "b")}),
        ([A, B, A], {("foreign_output", "a"), ("wrong_count", "a")}),
        ([A._replace(token_ids=(7, 7)), B], {("foreign_output", "a"), ("wrong_count", "a")}),
        ([A._replace(sequence_id="b"), B], {("token_lost", "a"), ("foreign_output", "b"), ("wrong_count", "b")}),
        ([A._replace(sequence_id="c"), B], {("token_lost", "a"), ("output_of_stranger", "c")}),
        ([A._replace(num_completion_tokens=2), B], {("wrong_count", "a")}),
        ([A._replace(num_prompt_tokens=1), B], {("wrong_count", "a")}),
        ([A._replace(num_cached_tokens=1), B], {("wrong_count", "a")}),
    ],
)
def test_outputs_are_what_was_sampled(outputs: list[Output], expected: set[tuple[str, str]]) -> None:
    auditor = begun()
    assert rules(auditor, [row("a"), row("b")]) == set()
    auditor.on_sampled(1, [7, 8])
    found = auditor.check_outputs(1, outputs)
    assert {(violation.kind, violation.sequence_ids[0]) for violation in found} == expected
    assert auditor.counters()["num_violations"] == len(found)


def test_a_row_whose_numbers_broke_has_nothing_to_send() -> None:
    auditor = begun()
    assert rules(auditor, [row("a"), row("b")]) == set()
    auditor.on_sampled(1, [-1, 8])
    failed = replace_output(A)
    assert auditor.check_outputs(1, [failed, B]) == []
    auditor.on_sampled(1, [8])
    assert {violation.kind for violation in auditor.check_outputs(1, [])} == {"malformed_sampling"}, "told twice"


def replace_output(output: Output) -> Output:
    return output._replace(token_ids=(), num_completion_tokens=0, failed=True)
