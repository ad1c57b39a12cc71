"""Canaries: their marker leaves with nobody else's text, however it is cut; and they say what they say alone."""

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from audit.runtime.canary import MARKER_BYTES, MARKERS_MAX, Canaries
from audit.runtime.released_tokens import Output
from engine.core import EngineCore
from engine.own_runs import OwnRuns as EngineOwnRuns
from engine.protocol import SamplingParams, Submit, TokenOutput
from gateway.audit_observer import AuditObserver
from gateway.own_runs import CANARY_DOMAIN, OwnRuns, OwnRunSettings, canary_prompt
from tests.faults.stage import BLOCK_SIZE, NUM_BLOCKS, VOCAB_SIZE, ParityMatcher, PlainRunner


def said(name: str, text: str, ending: str = "") -> Output:
    return Output(name, (), 1, 0, 0, False, text, finish_reason=ending)


@given(st.lists(st.integers(0, 40), max_size=5), st.text(max_size=9), st.text(max_size=9), st.booleans())
def test_a_marker_is_found_however_the_text_is_cut(cuts: list[int], before: str, after: str, whole: bool) -> None:
    canaries = Canaries(1.0, seed=3)
    name, marker = canaries.begin(0.0)
    text = before + (marker if whole else marker[:-1] + "-" + marker[-1]) + after
    found, at = [], 0
    for cut in [*sorted(cuts), len(text)]:
        found += canaries.search([said("s", text[at:cut]), said("other", "nothing")])
        at = max(at, cut)
    assert [(who, rule) for who, rule, _ in found] == [("s", "canary_leak")] * whole
    assert canaries.num_leaks == whole
    assert all(marker not in detail and name in detail for _, _, detail in found)


@pytest.mark.parametrize("at", range(1, 2 * MARKER_BYTES))
def test_a_marker_is_found_with_all_but_one_of_its_letters_on_one_side(at: int) -> None:
    canaries = Canaries(1.0)
    _, marker = canaries.begin(0.0)
    halves = [said("s", "x" + marker[:at]), said("s", marker[at:] + "x")]
    assert [len(canaries.search([half])) for half in halves] == [0, 1]


def test_its_own_words_are_its_own_and_it_is_counted_once() -> None:
    canaries = Canaries(1.0)
    name, marker = canaries.begin(0.0)
    assert canaries.search([said(name, marker), said(name, f"{marker} {marker}", "length")]) == []
    assert (canaries.num_recited, canaries.num_leaks) == (1, 0)
    assert canaries.search([said("audit/replay/1", marker, "length")]) == [], "its replay says it again"


def test_markers_live_on_for_a_while_and_differ() -> None:
    canaries = Canaries(1.0)
    markers = [canaries.begin(float(index))[1] for index in range(MARKERS_MAX + 1)]
    assert len(set(markers)) == MARKERS_MAX + 1
    found = [bool(canaries.search([said(f"s{index}", marker, "stop")])) for index, marker in enumerate(markers)]
    assert found == [False, *[True] * MARKERS_MAX]
    assert markers[0] != Canaries(1.0, seed=1).begin(0.0)[1]


def test_nothing_is_kept_of_those_who_have_ended() -> None:
    canaries = Canaries(1.0)
    canaries.begin(0.0)
    canaries.search([said("s", "x" * 40), said("t", "y")])
    canaries.search([said("s", "", "stop")])
    canaries.forget("t")
    assert canaries._tails == {}


@pytest.mark.parametrize(("interval_s", "due"), [(0, [False] * 5), (2, [False, False, True, False, True])])
def test_they_come_at_their_interval_and_not_at_the_start(interval_s: int, due: list[bool]) -> None:
    canaries, seen = Canaries(interval_s), []
    for now_s in (10.0, 11.0, 12.0, 13.0, 14.0):
        seen.append(canaries.due(now_s))
        if seen[-1]:
            canaries.begin(now_s)
    assert seen == due


# ---------------------------------------------------------------- the real engine


def text_of(token_ids: list[int]) -> str:
    return "".join(chr(0x100 + token_id) for token_id in token_ids)


class Stage:
    """A tenant and a canary side by side. No text is compared with tokens here: the marker has to be found alone."""

    def __init__(self) -> None:
        self.now_s = 0.0
        settings = OwnRunSettings(replay_percent=1, canary_interval_s=2)
        self.own = OwnRuns(settings, encode=self.encode, clock=lambda: self.now_s)
        self.core = EngineCore(
            PlainRunner(),
            decode=text_of,
            eos_token_ids=frozenset(),
            context_max=96,
            vocab_size=VOCAB_SIZE,
            max_batched_tokens=16,
            max_num_seqs=5,
            max_waiting=100,
            observer=AuditObserver(NUM_BLOCKS, BLOCK_SIZE, own=self.own),
            matchers=ParityMatcher,
        )
        self.runs = EngineOwnRuns(self.core, idle_percent=100)
        self.marker = ""
        self.outputs: list[TokenOutput] = []
        self.incidents: list[tuple[str, list[str], list[str]]] = []

    def encode(self, text: str) -> list[int]:
        self.marker = text.split()[4].strip(".")
        assert text == canary_prompt(self.marker)
        return [ord(letter) % VOCAB_SIZE for letter in text[-24:]]

    def run(self) -> None:
        self.core.add(Submit("s", "tenant", b"", [1, 2, 3], SamplingParams(20, temperature=0.0, ignore_eos=True)))
        while True:
            self.now_s += 1.0
            self.runs.start(idle=not self.core.has_work)
            if not self.core.has_work:
                return
            result = self.core.step()
            self.incidents += [(one.kind, one.sequence_ids, one.domains) for one in result.incidents]
            self.outputs += self.runs.without(result.outputs)


def test_a_canary_runs_in_company_and_again_alone() -> None:
    stage = Stage()
    stage.run()
    counters = stage.own.counters()
    assert stage.incidents == []
    assert {output.sequence_id for output in stage.outputs} == {"s"}
    assert counters["num_canaries"] == counters["num_canaries_compared"] >= 1
    assert counters["num_replays_differing"] == counters["num_canary_leaks"] == 0
    assert (stage.core.pool.num_by_domain, stage.core.pool.num_free) == ({}, NUM_BLOCKS)


def test_a_canarys_marker_in_anothers_text_does_not_leave() -> None:
    stage = Stage()
    output_of = stage.core._output

    def leaky(*arguments: object) -> TokenOutput:
        output = output_of(*arguments)  # type: ignore[arg-type]
        text = stage.marker if output.sequence_id == "s" and output.num_completion_tokens == 9 else output.text
        return msgspec.structs.replace(output, text=text)

    stage.core._output = leaky  # type: ignore[method-assign]
    stage.run()
    assert stage.incidents == [("canary_leak", ["s"], ["tenant"])]
    assert stage.outputs[-1].error == "isolation_violation"
    assert stage.marker not in "".join(output.text for output in stage.outputs)
    assert len(stage.outputs) == 9


def test_canaries_live_in_a_domain_that_no_tenant_has() -> None:
    assert CANARY_DOMAIN.startswith("audit/")
