"""A step that was broken off on real kernels leaves nothing behind: the same bits afterwards, and the auditor, which
compares the cache's bytes, is silent."""

from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from engine.batch import Batch, build_batch
from engine.errors import BrokenOffError
from engine.events import Observer
from engine.model_runner import ModelRunner
from engine.models.llama import LlamaModel
from engine.models.load import load_model
from engine.protocol import SamplingParams
from engine.sampling.row import Row
from engine.sampling.sampler import Picks
from engine.scheduling.break_off import GoOn
from engine.scheduling.schedule import ScheduledRow
from engine.sequence import Sequence
from gateway.audit_observer import AuditObserver
from kernels.torch_cpu import TorchBackend
from tests.engine.test_bitwise import ALONE, Recording, Schedule, load, needs_native, play, submits
from tests.engine.test_kernel_ownership import finish, start
from tests.kernels.native import isas
from tests.strategies.tiny_model import write_tiny_model

NUM_TINY_LAYERS = 2


def audited(runner: Recording) -> Observer:
    """Every slot that is read is compared."""
    memory, digest = runner.cache.words(), runner.cache.digester()
    return AuditObserver(runner.num_blocks, runner.block_size, memory=memory, digest=digest, slots_per_step=10_000)


@needs_native
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_breaks_at_any_layer_change_no_bit(tiny_model_dir: Path, dtype: str) -> None:
    model = load(tiny_model_dir, dtype, isas()[0])
    assert model.is_exact()
    work = submits(320, [1, 3, 31, 32, 33, 64, 90], 9)
    alone: dict[tuple[str, int], NDArray[np.float32]] = {}
    tokens_alone: dict[str, list[int]] = {}
    for one in work:
        tokens, recorded, _ = play(model, [one], ALONE)
        alone |= recorded.seen
        tokens_alone |= tokens
    num_broken = 0
    for seed, (block_size, num_blocks, budget, rows) in enumerate([(16, 9, 17, 5), (7, 37, 33, 2), (1, 260, 64, 8)]):
        schedule = Schedule(block_size, num_blocks, budget, rows, 1 + seed % 2, seed, break_chance=0.3)
        aborted = frozenset({work[seed].sequence_id})
        tokens, recorded, _ = play(model, work, schedule, aborted, make_observer=audited)
        num_broken += recorded.num_broken_off
        for key, logits in recorded.seen.items():
            assert (logits.view(np.int32) == alone[key].view(np.int32)).all(), (key, schedule)
        for name, ids in tokens.items():
            assert ids == tokens_alone[name][: len(ids)]
            assert name in aborted or len(ids) == len(tokens_alone[name])
    assert num_broken > 20


@pytest.mark.parametrize("family", ["llama", "olmo2"])
def test_every_kind_of_model_can_be_stopped_between_its_layers(family: str, tmp_path: Path) -> None:
    """Our own decoder, and one of transformers'. Each launch that counts comes after some that were stopped."""
    write_tiny_model(tmp_path, family)
    model = load_model(tmp_path, dtype="float32", backend=TorchBackend())
    assert isinstance(model, LlamaModel) == (family == "llama")
    told: list[list[NDArray[np.float32]]] = []
    for breaks in (False, True):
        runner = ModelRunner(model, block_size=4, max_num_seqs=4, num_blocks=16)
        sequence = Sequence("s", "a", b"", list(range(3, 17)), SamplingParams(max_tokens=1), arrival=0)
        sequence.block_ids, sequence.row = [7, 2, 5, 11], 0
        runner.set_row(0, Row(sequence.sampling, sequence.token_ids, 14, (), None, "s"))
        logits = []
        for step, num_new in enumerate((5, 6, 3), 1):
            batch = build_batch(step, [ScheduledRow(sequence, num_new)], 4, runner.state_of)
            for layer in range(1, NUM_TINY_LAYERS) if breaks else ():
                with pytest.raises(BrokenOffError) as broken:
                    runner.execute(batch, lambda share, layer=layer: share * NUM_TINY_LAYERS < layer)
                assert broken.value.share == layer / NUM_TINY_LAYERS
                assert broken.value.arrays is not None
            logits.append(runner.logits(batch))
            sequence.num_computed_tokens += num_new
        told.append(logits)
    for plain, after_breaks in zip(*told, strict=True):
        assert (plain == after_breaks).all()


@needs_native
def test_what_a_kernel_has_refused_is_not_forgotten_by_breaking_off(tiny_model_dir: Path) -> None:
    core, _ = start(tiny_model_dir, "read", ["victim", "intruder"])
    execute = core._runner.execute
    asked: list[float] = []

    def stop_once(batch: Batch, go_on: GoOn | None = None) -> Picks:
        return execute(batch, lambda share: core.step_number != 3 or bool(asked) or bool(asked.append(share)))

    core._runner.execute = stop_once  # type: ignore[method-assign]
    _, results = finish(core)
    assert asked, "the launch of step 3 was to be broken off"
    assert not any(one.failure for one in results)
    kinds = [(incident.kind, incident.step, incident.sequence_ids) for one in results for incident in one.incidents]
    assert kinds == [("kernel_ownership", 3, ["intruder"])]
