"""The auditor on the real engine: no false alarm under any load, and faults stopped before they answer."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engine import core as engine_core
from engine.batch import Batch
from engine.block_pool import BlockState
from engine.core import EngineCore
from gateway.worker import AuditObserver
from tests.engine.test_core_properties import Load, loads
from tests.strategies.integer_model import continuation, integer_core, submit

NUM_STEPS_MAX = 2_000


def audited_core(num_blocks: int, block_size: int, **limits: Any) -> tuple[EngineCore, AuditObserver]:
    observer = AuditObserver(num_blocks, block_size)
    core, _ = integer_core(num_blocks=num_blocks, block_size=block_size, observer=observer, **limits)
    return core, observer


def run(core: EngineCore, load: Load) -> tuple[dict[str, list[int]], dict[str, str], list[str]]:
    """Run the load to its end: tokens and error of each sequence, and the kinds of all incidents."""
    arrivals = {f"s{index}": arrival for index, arrival in enumerate(load.arrivals)}
    tokens: dict[str, list[int]] = {name: [] for name in arrivals}
    errors: dict[str, str] = {}
    incidents: list[str] = []
    last_step = max(max(arrival.step, arrival.abort_step or 0) for arrival in load.arrivals)
    for step in range(NUM_STEPS_MAX):
        if not core.has_work and step > last_step:
            break
        for name, arrival in arrivals.items():
            if arrival.step == step:
                core.add(submit(name, arrival.prompt, arrival.max_tokens, domain=arrival.domain))
            if arrival.abort_step == step:
                core.abort(name)
        result = core.step()
        incidents += [incident.kind for incident in result.incidents]
        for output in result.outputs:
            tokens[output.sequence_id] += output.token_ids
            errors[output.sequence_id] = output.error
    return tokens, errors, incidents


@given(loads().filter(lambda load: load.num_blocks >= 2))
def test_the_clean_engine_raises_no_alarm(load: Load) -> None:
    core, observer = audited_core(
        load.num_blocks,
        load.block_size,
        max_batched_tokens=load.max_batched_tokens,
        max_num_seqs=load.max_num_seqs,
        domain_order=load.domain_order,
    )
    _, errors, incidents = run(core, load)
    counters = observer.counters()
    assert incidents == []
    assert not any(errors.values())
    assert counters["num_violations"] == counters["num_self_tests_failed"] == 0
    assert counters["last_self_test_ok"] == 1


def foreign_table(batch: Batch) -> Batch | None:
    """The first row reads the second row's first block."""
    evidence = batch.evidence
    if len(evidence.domains) < 2 or evidence.domains[0] == evidence.domains[1]:
        return None
    tables = evidence.block_tables.copy()
    tables[0, 0] = tables[1, 0]
    return replace(batch, evidence=replace(evidence, block_tables=tables))


def wrong_slot(batch: Batch) -> Batch | None:
    """The first token is written where the last one goes."""
    slots = batch.evidence.slot_mapping.copy()
    if len(slots) < 2:
        return None
    slots[0] = slots[-1]
    return replace(batch, evidence=replace(batch.evidence, slot_mapping=slots))


def too_long(batch: Batch) -> Batch | None:
    """The first row's length counts a token that was never written."""
    lengths = batch.evidence.kv_lens.copy()
    lengths[0] += 1
    return replace(batch, evidence=replace(batch.evidence, kv_lens=lengths))


@pytest.mark.parametrize("fault", [foreign_table, wrong_slot, too_long])
@given(load=loads().filter(lambda load: load.num_blocks >= 2), at=st.integers(1, 20))
@settings(max_examples=25)
def test_a_wrong_batch_is_stopped_before_a_token_leaves(fault: Any, load: Load, at: int) -> None:
    build, done = engine_core.build_batch, []

    def faulty(step: int, *arguments: Any) -> Batch:
        batch = build(step, *arguments)
        wrong = fault(batch) if step >= at and not done else None
        if wrong is None:
            return batch
        done.append(wrong.evidence.sequence_ids[0])
        return wrong

    core, observer = audited_core(load.num_blocks, load.block_size, max_num_seqs=load.max_num_seqs)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(engine_core, "build_batch", faulty)
        tokens, errors, incidents = run(core, load)
    for name, got in tokens.items():
        arrival = load.arrivals[int(name[1:])]
        assert got == continuation(arrival.prompt, arrival.max_tokens)[: len(got)]
    assert bool(incidents) == bool(done)
    assert observer.counters()["num_violations"] == len(incidents)
    if done:
        assert errors[done[0]] == "isolation_violation"


def test_a_pool_that_hands_out_a_block_twice_is_stopped() -> None:
    core, observer = audited_core(2, 2)
    core.add(submit("b", [1, 2], 3, domain="b"))
    core.step()
    for block in core.pool.blocks:  # a lost reference: the pool takes the blocks of `b` for free
        if block.domain == "b":
            block.state, block.num_references = BlockState.FREE, 0
            core.pool._free[block.block_id] = None
    core.add(submit("c", [5, 6], 1, domain="c"))
    incidents, outputs = [], []
    for _ in range(2):
        result = core.step()
        incidents += result.incidents
        outputs += result.outputs
    assert incidents[0].kind == "scrub_of_live_block"
    assert any(incident.sequence_ids and "b" in incident.sequence_ids for incident in incidents)
    assert {output.sequence_id for output in outputs if output.error == "isolation_violation"} == {"b", "c"}
    assert observer.counters()["num_violations"] == len(incidents)


def test_arrays_of_the_engine_are_left_as_they_are() -> None:
    core, _ = audited_core(8, 2)
    core.add(submit("a", [1, 2, 3], 3, domain="a"))
    seen: list[np.ndarray] = []
    build = engine_core.build_batch

    def frozen(*arguments: Any) -> Batch:
        batch = build(*arguments)
        for array in (batch.evidence.block_tables, batch.evidence.slot_mapping, batch.evidence.kv_lens):
            array.setflags(write=False)
            seen.append(array)
        return batch

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(engine_core, "build_batch", frozen)
        outputs = [output for _ in range(4) for output in core.step().outputs]
    assert [t for output in outputs for t in output.token_ids] == continuation([1, 2, 3], 3)
    assert seen
