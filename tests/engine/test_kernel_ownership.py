"""Block tables that go wrong behind the auditor's back: the kernels refuse, and whoever asked is punished as if the
auditor had seen it. The faults are planted after the auditor looked."""

from pathlib import Path

import pytest

from engine.cache.block_pool import BlockState
from engine.core import EngineCore
from engine.events import StepEvidence, Violation
from engine.model_runner import ModelRunner
from engine.models.load import load_model
from engine.protocol import SamplingParams, Submit
from engine.step_result import StepResult
from gateway.audit_observer import AuditObserver
from kernels.backend import OwnershipError
from kernels.cpu.backend import NativeBackend
from tests.kernels.native import isas
from tests.strategies.integer_model import integer_core, submit

needs_native = pytest.mark.skipif(not isas(), reason="no native kernels: install a C++ compiler and run make native")
NUM_TOKENS = 6
BLOCK_SIZE = 4
NUM_BLOCKS = 32


class Saboteur(AuditObserver):
    """At step 3, ``intruder`` is pointed at a block of ``victim``, when the auditor has seen the arrays."""

    def __init__(self, fault: str) -> None:
        super().__init__(NUM_BLOCKS, BLOCK_SIZE)
        self.fault = fault
        self.planted = -1

    def before_launch(self, evidence: StepEvidence) -> list[Violation]:
        violations = super().before_launch(evidence)
        if evidence.step != 3 or self.planted >= 0 or "intruder" not in evidence.sequence_ids:
            return violations
        intruder, victim = (evidence.sequence_ids.index(name) for name in ("intruder", "victim"))
        self.planted = int(evidence.block_tables[victim, 0])
        if self.fault == "read":
            evidence.block_tables[intruder, 0] = self.planted
        elif self.fault == "write":
            evidence.slot_mapping[evidence.cu_seqlens[intruder]] = self.planted * BLOCK_SIZE + 1
        elif self.fault == "nowhere":
            evidence.block_tables[intruder, 0] = self.planted = 10_000
        return violations


def start(tiny_model_dir: Path, fault: str, names: list[str]) -> tuple[EngineCore, Saboteur]:
    model = load_model(tiny_model_dir, dtype="bfloat16", backend=NativeBackend())
    saboteur = Saboteur(fault)
    core = EngineCore(
        ModelRunner(model, block_size=BLOCK_SIZE, max_num_seqs=4, num_blocks=NUM_BLOCKS),
        decode=lambda ids: "x" * len(ids),
        eos_token_ids=frozenset(),
        context_max=model.config.context_max,
        vocab_size=model.config.vocab_size,
        max_batched_tokens=64,
        max_num_seqs=4,
        max_waiting=4,
        observer=saboteur,
    )
    sampling = SamplingParams(max_tokens=NUM_TOKENS, temperature=0.0, ignore_eos=True)
    for index, name in enumerate(names):
        prompt = [index + 3, 50, 60, 70, 80, 90]
        assert core.add(Submit(name, f"domain of {name}", b"", prompt, sampling)) is None
    return core, saboteur


def finish(core: EngineCore) -> tuple[dict[str, list[int]], list[StepResult]]:
    tokens: dict[str, list[int]] = {}
    results = []
    while core.has_work:
        results.append(core.step())
        for output in results[-1].outputs:
            tokens.setdefault(output.sequence_id, []).extend(output.token_ids)
    return tokens, results


@needs_native
@pytest.mark.parametrize("fault", ["read", "write", "nowhere"])
def test_a_wrong_table_ends_whoever_reads_through_it(tiny_model_dir: Path, fault: str) -> None:
    names = ["victim", "intruder", "other"]
    expected, _ = finish(start(tiny_model_dir, "none", names)[0])
    core, saboteur = start(tiny_model_dir, fault, names)
    core.step()
    core.step()
    held = next(list(s.block_ids) for s in core.scheduler.running if s.sequence_id == "intruder")
    tokens, results = finish(core)
    (incident,) = [incident for result in results for incident in result.incidents]
    assert (incident.kind, incident.step, incident.sequence_ids) == ("kernel_ownership", 3, ["intruder"])
    assert (incident.domains, incident.block_id) == (["domain of intruder"], saboteur.planted)
    (ending,) = [output for output in results[0].outputs if output.sequence_id == "intruder"]
    assert (ending.error, ending.text, ending.token_ids) == ("isolation_violation", "", ())
    assert all(core.pool.blocks[block].state is BlockState.QUARANTINED for block in held)
    assert not any(result.failure for result in results)
    assert core.num_failures_in_a_row == 0
    for name in ("victim", "other"):
        assert tokens[name] == expected[name][2:], "the others lost nothing, not even the step"


def test_a_refusal_that_names_nobody_ends_everyone() -> None:
    core, runner = integer_core()
    for name in ("a", "b"):
        core.add(submit(name, [1, 2, 3], 5, domain=name))
    core.step()

    def refuse(batch: object, go_on: object) -> object:
        raise OwnershipError("a kernel refused")

    runner.execute = refuse  # type: ignore[method-assign,assignment]
    result = core.step()
    assert {output.error for output in result.outputs} == {"isolation_violation"}
    assert [sorted(incident.sequence_ids) for incident in result.incidents] == [["a", "b"]]
    assert not core.has_work
