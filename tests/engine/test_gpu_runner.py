"""The GPU's kernels under the whole engine: interpreted here, on the GPU under `make gpu`. Isolation is bitwise."""

from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from torch import Tensor

from engine.batch import Batch
from engine.cache.device_words import DeviceWords
from engine.cache.kv_cache import KVCache
from engine.core import EngineCore
from engine.events import NullObserver, Observer, StepEvidence, Violation
from engine.model_runner import ModelRunner
from engine.models.llama import LlamaModel
from engine.models.load import load_model
from engine.protocol import SamplingParams, Submit
from engine.scheduling.break_off import GoOn
from gateway.audit_observer import AuditObserver
from kernels.gpu.backend import TritonBackend
from tests.engine.test_kernel_ownership import Saboteur
from tests.kernels.gpu.steps import DEVICE
from tests.strategies.tiny_model import write_tiny_model

BLOCK_SIZE = 4
SPLIT = 16  # short: rows of this test have two


class Recording(ModelRunner):
    """Remembers every logit by sequence and position, and how many rows each launch had."""

    def __init__(
        self,
        model: LlamaModel,
        block_size: int = BLOCK_SIZE,
        kv_cache_dtype: str = "auto",
        graph_sizes: tuple[int, ...] = (),
    ) -> None:
        super().__init__(
            model,
            block_size=block_size,
            max_num_seqs=4,
            num_blocks=64,
            kv_cache_dtype=kv_cache_dtype,
            graph_sizes=graph_sizes,
        )
        self.seen: dict[tuple[str, int], NDArray[np.float32]] = {}
        self.num_rows: list[int] = []

    def launch(self, batch: Batch, go_on: GoOn | None = None) -> Tensor:
        logits = super().launch(batch, go_on)
        assert self._arrays is not None
        self.num_rows.append(len(self._arrays.kv_lens))
        rows = logits.cpu().numpy()
        for row, index, position in zip(rows, batch.sampled_index, batch.sampled_positions.tolist(), strict=True):
            self.seen[batch.evidence.sequence_ids[index], position] = row.copy()
        return logits


def tiny_model(folder: Path, backend: TritonBackend, **changes: int) -> LlamaModel:
    """A random one on these kernels, its heads as small as they take them."""
    write_tiny_model(folder, num_attention_heads=2, num_key_value_heads=1, head_dim=16, **changes)
    loaded = load_model(folder, dtype="float32", backend=backend)
    assert isinstance(loaded, LlamaModel)
    return loaded


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> LlamaModel:
    folder = tmp_path_factory.mktemp("tiny")
    return tiny_model(folder, TritonBackend(SPLIT), num_hidden_layers=2, vocab_size=320)


def core_of(runner: ModelRunner, observer: Observer, max_batched_tokens: int = 64) -> EngineCore:
    config = runner.model.config
    return EngineCore(
        runner,
        decode=lambda ids: "x" * len(ids),
        eos_token_ids=frozenset(),
        context_max=config.context_max,
        vocab_size=config.vocab_size,
        max_batched_tokens=max_batched_tokens,
        max_num_seqs=4,
        max_waiting=4,
        observer=observer,
    )


def play(runner: Recording, submits: list[Submit], max_batched_tokens: int = 64) -> dict[str, list[int]]:
    core = core_of(runner, NullObserver(), max_batched_tokens)
    tokens: dict[str, list[int]] = {submit.sequence_id: [] for submit in submits}
    for submit in submits:
        assert core.add(submit) is None
    while core.has_work:
        result = core.step()
        assert result.failure == ""
        for output in result.outputs:
            tokens[output.sequence_id] += output.token_ids
    return tokens


def work(lengths: list[int], num_tokens: int) -> list[Submit]:
    sampling = SamplingParams(max_tokens=num_tokens, temperature=0.0, ignore_eos=True)
    return [
        Submit(
            f"s{index}", f"domain {index}", b"", [(7 * place + index) % 300 + 3 for place in range(length)], sampling
        )
        for index, length in enumerate(lengths)
    ]


def same_as_alone(model: LlamaModel, lengths: list[int], num_tokens: int, budget: int) -> None:
    submits = work(lengths, num_tokens)
    together = Recording(model, block_size=7)
    tokens = play(together, submits, budget)
    for submit in submits:
        alone = Recording(model)
        assert play(alone, [submit])[submit.sequence_id] == tokens[submit.sequence_id]
        for key, logits in alone.seen.items():
            assert np.array_equal(logits.view(np.int32), together.seen[key].view(np.int32)), key


def test_logits_are_the_same_bits_alone_and_in_company(model: LlamaModel) -> None:
    assert model.backend.device == DEVICE
    assert model.backend.exact
    same_as_alone(model, [18, 2], 2, 10)


@pytest.mark.deep
def test_and_in_more_company_for_longer(model: LlamaModel) -> None:
    assert model.is_exact(), "its products are tried at every start"
    same_as_alone(model, [70, 1, 31, 33], 6, 9)


def test_logits_are_those_of_the_cpu(model: LlamaModel, tmp_path: Path) -> None:
    from kernels.torch_cpu import TorchBackend

    ours = Recording(model)
    write_tiny_model(
        tmp_path, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1, head_dim=16, vocab_size=320
    )
    plain = load_model(tmp_path, dtype="float32", backend=TorchBackend())
    theirs = Recording(plain)  # type: ignore[arg-type]
    submits = work([9], 1)
    assert play(ours, submits) == play(theirs, submits)
    for key, logits in theirs.seen.items():
        np.testing.assert_allclose(ours.seen[key], logits, atol=2e-3, rtol=2e-3)


class StrayWrite(AuditObserver):
    """Reads the cache as it reads a GPU's. Before step 3 someone writes into a block of the first row."""

    def __init__(self, cache: KVCache) -> None:
        views = [DeviceWords(memory) for memory in cache._memory.values()]
        super().__init__(cache.num_blocks, cache.block_size, memory=views)
        self._cache, self.planted = cache, -1

    def before_launch(self, evidence: StepEvidence) -> list[Violation]:
        if evidence.step == 3 and self.planted < 0:
            self.planted = int(evidence.block_tables[0, 0])
            for index in range(2):
                for part in self._cache.layer(index):
                    part[self.planted] += 1.0
        return super().before_launch(evidence)


def test_the_auditor_sees_bytes_change_in_a_cache_that_only_the_device_can_read(model: LlamaModel) -> None:
    runner = ModelRunner(model, block_size=BLOCK_SIZE, max_num_seqs=4, num_blocks=32)
    observer = StrayWrite(runner.cache)
    core = core_of(runner, observer)
    for submit in work([5, 6], 4):
        assert core.add(submit) is None
    results = []
    while core.has_work:
        results.append(core.step())
    (incident,) = [incident for result in results for incident in result.incidents]
    assert (incident.kind, incident.step, incident.sequence_ids) == ("changed_bytes", 3, ["s0"])
    assert incident.block_id == observer.planted
    errors = {output.sequence_id: output.error for result in results for output in result.outputs}
    assert errors == {"s0": "isolation_violation", "s1": ""}
    assert observer.counters()["num_slots_read"] > 0


def test_a_wrong_table_ends_whoever_reads_through_it(model: LlamaModel) -> None:
    saboteur = Saboteur("read")
    core = core_of(ModelRunner(model, block_size=BLOCK_SIZE, max_num_seqs=4, num_blocks=32), saboteur)
    for index, name in enumerate(("victim", "intruder")):
        sampling = SamplingParams(max_tokens=4, temperature=0.0, ignore_eos=True)
        assert core.add(Submit(name, f"domain of {name}", b"", [index + 3, 50, 60, 70, 80], sampling)) is None
    results = []
    while core.has_work:
        results.append(core.step())
    (incident,) = [incident for result in results for incident in result.incidents]
    assert (incident.kind, incident.step, incident.sequence_ids) == ("kernel_ownership", 3, ["intruder"])
    assert incident.block_id == saboteur.planted
    lengths = {output.sequence_id: output for result in results for output in result.outputs}
    assert lengths["intruder"].error == "isolation_violation"
    assert lengths["victim"].error == ""
