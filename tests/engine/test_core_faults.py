"""Refusals, broken numbers, failing launches and isolation violations: who pays, and that nobody else does."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine.cache.block_pool import BlockState
from engine.core import EngineCore
from engine.protocol import SamplingParams, Submit, TokenOutput
from tests.strategies.integer_model import Watcher, continuation, decode, integer_core, submit


def finish_all(core: EngineCore) -> dict[str, list[TokenOutput]]:
    received: dict[str, list[TokenOutput]] = {}
    for _ in range(1000):
        if not core.has_work:
            return received
        for output in core.step().outputs:
            received.setdefault(output.sequence_id, []).append(output)
    raise AssertionError("no progress")


def tokens(outputs: list[TokenOutput]) -> list[int]:
    return [token_id for output in outputs for token_id in output.token_ids]


@pytest.mark.parametrize("prompt", [[], [64], [-1], [3, 10**12]])
def test_a_prompt_that_is_no_prompt_is_refused(prompt: list[int]) -> None:
    core, _ = integer_core()
    refusal = core.add(submit("s", prompt, 1))
    assert refusal is not None
    assert (refusal.finish_reason, refusal.error, refusal.num_prompt_tokens) == ("error", "invalid_input", 0)
    assert not core.has_work


def test_an_id_in_use_is_refused_and_its_owner_untouched() -> None:
    core, _ = integer_core()
    assert core.add(submit("s", [1, 2], 3)) is None
    refusal = core.add(submit("s", [9], 3))
    assert refusal is not None
    assert refusal.error == "invalid_input"
    assert tokens(finish_all(core)["s"]) == continuation([1, 2], 3)


def test_too_many_waiting_is_busy() -> None:
    core, _ = integer_core(max_waiting=2)
    assert [core.add(submit(f"s{index}", [1], 1)) for index in range(2)] == [None, None]
    refusal = core.add(submit("s2", [1], 1))
    assert refusal is not None
    assert refusal.error == "busy"


def test_the_context_is_a_limit_too() -> None:
    core, _ = integer_core(num_blocks=5000)
    assert core.add(submit("fits", [1] * 500, 500)) is None
    refusal = core.add(submit("s", [1] * 500, 501))
    assert refusal is not None
    assert refusal.error == "too_long"


@given(fail_steps=st.sets(st.integers(1, 12)), num_sequences=st.integers(1, 6))
def test_a_failing_launch_costs_its_own_sequences_only(fail_steps: set[int], num_sequences: int) -> None:
    core, runner = integer_core(num_blocks=8, max_num_seqs=2)
    runner.fail_steps = fail_steps
    for index in range(num_sequences):
        core.add(submit(f"s{index}", [index + 1], 4, domain="ab"[index % 2]))
    received = finish_all(core)
    for index in range(num_sequences):
        outputs = received[f"s{index}"]
        assert tokens(outputs) == continuation([index + 1], 4)[: len(tokens(outputs))]
        assert (outputs[-1].finish_reason, outputs[-1].error) in [("length", ""), ("error", "engine_failure")]
    assert core.stats().num_blocks_free == 8
    assert any(outputs[-1].error for outputs in received.values()) == (min(fail_steps, default=99) <= core.step_number)


def test_failures_in_a_row_are_counted_until_a_step_works() -> None:
    core, runner = integer_core()
    runner.fail_steps = {1, 2, 4}
    counts = []
    for step in range(1, 5):
        core.add(submit(f"s{step}", [1], 1))
        core.step()
        counts.append(core.num_failures_in_a_row)
    assert counts == [1, 2, 0, 1]


def test_numbers_that_are_not_finite_end_their_row_only() -> None:
    core, runner = integer_core()
    core.add(submit("good", [1], 4))
    core.add(submit("bad", [2], 4))
    core.step()
    broken = next(s for s in core.scheduler.running if s.sequence_id == "bad")
    runner.broken_rows = {broken.row}
    received = finish_all(core)
    assert received["bad"][-1].error == "engine_failure"
    assert received["good"][-1].finish_reason == "length"


def start_two(watcher: Watcher) -> EngineCore:
    core, _ = integer_core(observer=watcher)
    core.add(submit("victim", [1, 2, 3], 6, domain="a"))
    core.add(submit("intruder", [4, 5, 6], 6, domain="b"))
    core.step()
    return core


def test_a_violation_ends_the_named_before_they_are_executed() -> None:
    watcher = Watcher(8, 4, 2)
    core = start_two(watcher)
    held = next(list(s.block_ids) for s in core.scheduler.running if s.sequence_id == "intruder")
    watcher.violations = [("foreign_read", ("intruder",), ("b", "a"), held[0], "row 1 reads a block of a")]
    result = core.step()
    (incident,) = result.incidents
    assert (incident.kind, incident.sequence_ids, incident.block_id) == ("foreign_read", ["intruder"], held[0])
    endings = {output.sequence_id: output for output in result.outputs}
    assert (endings["intruder"].finish_reason, endings["intruder"].error) == ("error", "isolation_violation")
    assert (endings["intruder"].text, endings["intruder"].token_ids) == ("", ())
    assert watcher.evidence[-1].sequence_ids == ("victim",), "what was left was shown again before its launch"
    assert all(core.pool.blocks[block].state is BlockState.QUARANTINED for block in held)
    assert finish_all(core)["victim"][-1].num_completion_tokens == 6
    for index in range(20):  # the quarantined blocks never come back
        core.add(submit(f"s{index}", [1], 2))
        core.step()
        used = {block for sequence in core.scheduler.running for block in sequence.block_ids}
        assert not used & set(held)


def test_a_violation_that_names_nobody_here_ends_the_whole_batch() -> None:
    watcher = Watcher(8, 4, 2)
    core = start_two(watcher)
    watcher.violations = [("unknown", (), (), 0, "")]
    result = core.step()
    assert {output.error for output in result.outputs} == {"isolation_violation"}
    assert not core.has_work


def test_an_observer_that_fails_stops_the_launch() -> None:
    class Broken(Watcher):
        def before_launch(self, evidence: object) -> list[object]:  # type: ignore[override]
            raise RuntimeError("the auditor is broken")

    core, runner = integer_core(observer=Broken(8, 4, 2))
    core.add(submit("s", [1, 2], 2))
    result = core.step()
    assert [output.error for output in result.outputs] == ["engine_failure"]
    assert not runner.slots.any(), "nothing ran unaudited"
    assert "the auditor is broken" in result.failure


def test_text_withheld_for_a_stop_string_stays_withheld_after_a_violation() -> None:
    watcher = Watcher(8, 4, 2)
    core, _ = integer_core(observer=watcher)
    expected = continuation([1], 3)
    core.add(submit("s", [1], 9, stop=(decode(expected),)))
    assert core.step().outputs[0].text == ""
    watcher.violations = [("x", ("s",), ("a",), 0, "")]
    assert core.step().outputs[0].text == ""


def test_a_stop_string_ends_the_sequence_and_is_not_shown() -> None:
    core, _ = integer_core()
    expected = continuation([1], 6)
    core.add(submit("s", [1], 9, stop=(decode(expected[3:5]),)))
    outputs = finish_all(core)["s"]
    assert "".join(output.text for output in outputs) == decode(expected[:3])
    assert (outputs[-1].finish_reason, outputs[-1].num_completion_tokens) == ("stop", 5)


def test_sampling_parameters_stay_with_their_row() -> None:
    core, runner = integer_core(max_num_seqs=3, num_blocks=64)
    for index in range(9):
        core.add(Submit(f"s{index}", "a", b"", [1], SamplingParams(max_tokens=index % 3 + 1, seed=index)))
    while core.has_work:
        core.step()
        for sequence in core.scheduler.running:
            assert runner.rows[sequence.row].sampling is sequence.sampling
            assert runner.rows[sequence.row].token_ids is sequence.token_ids
