"""The auditor on the real engine: no false alarm under any load, and faults stopped before they answer."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engine import core as engine_core
from engine.batch import Batch
from engine.cache.block_pool import Block, BlockPool, BlockState
from engine.cache.prefix_index import Prefix
from engine.core import EngineCore
from gateway.audit_observer import AuditObserver
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
                core.add(submit(name, arrival.prompt, arrival.max_tokens, domain=arrival.domain, tier=arrival.tier))
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
        scheduling=load.scheduling,
        wait_max_tokens=load.wait_max_tokens,
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


# ---------------------------------------------------------------- a prefix cache that is wrong

ALIKE = list(range(1, 10))  # four full blocks of two, and one token


def another_domain(pool: BlockPool, prefix: Prefix, find: Any) -> int | None:
    """A hit on whatever has these tokens, whoever wrote it."""
    alike = [block for block, other in pool._published._prefix_of.items() if other.token_ids == prefix.token_ids]
    return alike[0] if alike else None


def stale_hash(pool: BlockPool, prefix: Prefix, find: Any) -> int | None:
    """The key of a block now leads to another block of the same domain, which holds something else."""
    found = find(pool, prefix)
    others = [block for block, other in pool._published._prefix_of.items() if other.domain == prefix.domain]
    return None if found is None else next((block for block in others if block != found), None)


def unsealed(pool: BlockPool, prefix: Prefix, find: Any) -> int | None:
    """A hit on a block that another sequence is still writing."""
    writing = [b.block_id for b in pool.blocks if b.state is BlockState.WRITING and b.domain == prefix.domain]
    return writing[0] if writing else None


@pytest.mark.parametrize(
    ("fault", "domain", "rule"),
    [
        (another_domain, "b", "foreign_share"),
        (stale_hash, "a", "foreign_prefix"),
        (unsealed, "a", "share_of_unpublished_block"),
    ],
)
def test_a_wrong_hit_is_stopped_though_the_engine_says_it_is_fine(fault: Any, domain: str, rule: str) -> None:
    core, observer = audited_core(32, 2)
    find, share = BlockPool.find, BlockPool._share

    def credulous(pool: BlockPool, block: Block, domain: str, sequence_id: str) -> None:
        """`_share` without its own checks: the auditor is alone."""
        if block.block_id in pool._free:
            pool._free.remove(block.block_id)
        block.state = BlockState.SEALED
        pool._refer(block, domain)
        pool._emit("share", block, domain=domain, sequence_id=sequence_id)

    core.add(submit("first", ALIKE, 4, domain="a"))
    for _ in range(3):
        core.step()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(BlockPool, "find", lambda pool, prefix: fault(pool, prefix, find))
        patch.setattr(BlockPool, "_share", credulous)
        core.add(submit("second", ALIKE, 4, domain=domain))
        result = core.step()
    assert share is BlockPool._share
    assert rule in {incident.kind for incident in result.incidents}
    (ending,) = [output for output in result.outputs if output.sequence_id == "second"]
    assert (ending.error, ending.text, ending.token_ids) == ("isolation_violation", "", ())
    assert observer.counters()["num_violations"] == len(result.incidents)


def test_a_block_that_keeps_its_name_when_it_is_taken_is_stopped() -> None:
    core, _ = audited_core(5, 2)
    core.add(submit("first", ALIKE, 1))
    while core.has_work:
        core.step()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(BlockPool, "forget", lambda pool, block_ids: None)
        core.add(submit("second", [40, 41, 42, 43, 44], 1))
        result = core.step()
    assert {incident.kind for incident in result.incidents} >= {"allocate_of_published_block"}
    assert {output.error for output in result.outputs} == {"isolation_violation"}


def test_a_write_into_a_shared_block_is_stopped() -> None:
    core, _ = audited_core(32, 2)
    core.add(submit("first", ALIKE, 9))
    for _ in range(3):
        core.step()
    build = engine_core.build_batch

    def astray(step: int, *arguments: Any) -> Batch:
        batch = build(step, *arguments)
        if "second" not in batch.evidence.sequence_ids:
            return batch
        row = batch.evidence.sequence_ids.index("second")
        slots = batch.evidence.slot_mapping.copy()
        slots[batch.evidence.cu_seqlens[row]] = batch.evidence.block_tables[row, 0] * 2
        return replace(batch, evidence=replace(batch.evidence, slot_mapping=slots))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(engine_core, "build_batch", astray)
        core.add(submit("second", ALIKE, 2))
        result = core.step()
    assert "write_to_closed_block" in {incident.kind for incident in result.incidents}
    errors = {output.sequence_id: output.error for output in result.outputs}
    assert errors == {"first": "isolation_violation", "second": "isolation_violation"}, "both read that block"


def test_a_pool_that_hands_out_a_block_twice_is_stopped() -> None:
    core, observer = audited_core(2, 2)
    core.add(submit("b", [1, 2], 3, domain="b"))
    core.step()
    for block in core.pool.blocks:  # a lost reference: the pool takes the blocks of `b` for free
        if block.domain == "b":
            block.state, block.num_references = BlockState.FREE, 0
            core.pool._free.push_last(block.block_id)
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
