"""The whole engine on kept launches: the same bits as launched one by one, rows that end between two replays, and
refusals that are found after one. Without a GPU a replay is tests/kernels/gpu/replay.py's."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.batch import Batch
from engine.build import build, unobserved
from engine.config import WorkerConfig
from engine.core import EngineCore
from engine.events import NullObserver
from engine.model_runner import ModelRunner
from engine.models.llama import LlamaModel
from engine.protocol import SamplingParams, Submit
from engine.scheduling.break_off import GoOn
from gateway.audit_observer import AuditObserver
from gateway.host.engine_host import worker_config
from gateway.host.folders import Folders
from gateway.settings import load_settings
from kernels.gpu.backend import TritonBackend
from kernels.gpu.capture import Capture
from kernels.gpu.launch import is_interpreted
from tests.engine.test_gpu_runner import SPLIT, Recording, core_of, tiny_model
from tests.engine.test_kernel_ownership import NUM_BLOCKS, Saboteur
from tests.kernels.gpu.replay import Replayed
from tests.kernels.native import bits
from tests.strategies.tiny_model import write_tiny_model

SIZES = (1, 2, 4)


class Replaying(TritonBackend):
    def capture(self) -> Capture:
        return Replayed() if is_interpreted() else super().capture()


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> LlamaModel:
    """One layer, one tile of vocabulary, and a context of three splits: what a graph adds is not in their number."""
    folder: Path = tmp_path_factory.mktemp("tiny")
    return tiny_model(folder, Replaying(SPLIT), num_hidden_layers=1, vocab_size=64, max_position_embeddings=3 * SPLIT)


class Counting(Recording):
    """How many launches were a graph's."""

    def __init__(self, model: LlamaModel, graph_sizes: tuple[int, ...] = ()) -> None:
        super().__init__(model, graph_sizes=graph_sizes)
        self.num_replays = 0

    def launch(self, batch: Batch, go_on: GoOn | None = None) -> torch.Tensor:
        self.num_replays += self.graphs is not None and self.graphs.fits(self._tables(batch))
        return super().launch(batch, go_on)


def submits() -> list[Submit]:
    """Of several lengths, ending one after the other: batches of 4, 3, 2 and 1 rows. The first crosses a split."""
    return [
        made(0, 14, 6),
        made(1, 2, 3, temperature=1.0, top_k=4, seed=7),
        made(2, 5, 4, logprobs=2),
        made(3, 1, 2),
    ]


def made(index: int, length: int, num_tokens: int, **how: Any) -> Submit:
    prompt = [(7 * place + index) % 60 + 3 for place in range(length)]
    sampling = SamplingParams(**{"max_tokens": num_tokens, "temperature": 0.0, "ignore_eos": True, **how})
    return Submit(f"s{index}", f"domain {index}", b"", prompt, sampling)


def played(runner: Recording, work: list[Submit], aborted: str = "", abort_after: int = 3) -> dict[str, list[int]]:
    """Tokens by sequence, under the auditor. ``aborted`` ends, from outside, between two steps. Every block begins full
    of NaN: what nobody wrote must reach nobody."""
    for keys, values in runner.cache._layers:
        keys.fill_(float("nan"))
        values.fill_(float("nan"))
    core = core_of(runner, AuditObserver(runner.num_blocks, runner.block_size))  # which sees launches, not the NaN
    tokens: dict[str, list[int]] = {}
    for submit in work:
        assert core.add(submit) is None
    for step in range(1, 60):
        if not core.has_work:
            break
        result = core.step()
        assert (result.failure, result.incidents) == ("", [])
        for output in result.outputs:
            tokens.setdefault(output.sequence_id, []).extend(output.token_ids)
        if step == abort_after and aborted:
            core.abort(aborted)
    assert not core.has_work
    return tokens


def same(
    plain: Recording, graphs: Counting, work: list[Submit] | None = None, aborted: str = "", abort_after: int = 3
) -> None:
    work = submits() if work is None else work
    assert played(plain, work, aborted, abort_after) == played(graphs, work, aborted, abort_after)
    assert plain.seen.keys() == graphs.seen.keys()
    for key, logits in plain.seen.items():
        assert logits.tobytes() == graphs.seen[key].tobytes(), key
        assert np.isfinite(logits).all()
    for ours, theirs in zip(graphs.cache.layer(0), plain.cache.layer(0), strict=True):
        assert torch.equal(bits(ours.cpu()), bits(theirs.cpu())), "the same cache"
    assert graphs.cache.device_tags is not None
    assert graphs.cache.device_tags.tolist() == graphs.cache.block_tags.tolist(), "one book on the device and the host"


def test_graphs_change_no_bit(model: LlamaModel) -> None:
    graphs = Counting(model, SIZES)
    same(Recording(model), graphs)
    assert {4, 2, 1} <= {*graphs.num_rows}, "every size was launched, the larger before the smaller"
    assert graphs.num_replays >= 4


def test_nor_where_a_sequence_is_aborted_between_two_replays(model: LlamaModel) -> None:
    graphs = Counting(model, (4,))
    same(Recording(model), graphs, aborted="s0")
    assert graphs.num_replays >= 2


@pytest.mark.deep
@settings(max_examples=15, deadline=None)
@given(
    lengths=st.lists(st.sampled_from([1, 3, 4, 15, 16, 17, 30]), min_size=1, max_size=4),
    num_tokens=st.lists(st.integers(1, 8), min_size=4, max_size=4),
    aborted=st.sampled_from(["", "s0", "s1"]),
    abort_after=st.integers(1, 6),
    graph_sizes=st.sampled_from([(1,), (2, 3), (1, 2, 4)]),
)
def test_whatever_comes_and_goes(
    model: LlamaModel,
    lengths: list[int],
    num_tokens: list[int],
    aborted: str,
    abort_after: int,
    graph_sizes: tuple[int, ...],
) -> None:
    work = [made(index, *one) for index, one in enumerate(zip(lengths, num_tokens, strict=False))]
    same(Recording(model), Counting(model, graph_sizes), work, aborted, abort_after)


def test_a_wrong_table_is_found_after_the_replay_and_ends_whoever_reads_through_it(model: LlamaModel) -> None:
    def ran(fault: str) -> tuple[dict[str, list[int]], list[tuple[str, int, list[str], int]], int]:
        saboteur = Saboteur(fault)
        runner = ModelRunner(model, block_size=4, max_num_seqs=4, num_blocks=NUM_BLOCKS, graph_sizes=(4,))
        core = core_of(runner, saboteur)
        for index, name in enumerate(("victim", "intruder", "other")):
            sampling = SamplingParams(max_tokens=4, temperature=0.0, ignore_eos=True)
            assert core.add(Submit(name, f"domain of {name}", b"", [index + 3, 50, 60, 10, 20], sampling)) is None
        tokens: dict[str, list[int]] = {}
        incidents = []
        while core.has_work:
            result = core.step()
            assert result.failure == ""
            incidents += [(one.kind, one.step, one.sequence_ids, one.block_id) for one in result.incidents]
            for output in result.outputs:
                tokens.setdefault(output.sequence_id, []).extend(output.token_ids)
        return tokens, incidents, saboteur.planted

    expected, none, _ = ran("none")
    assert none == []
    tokens, incidents, planted = ran("read")
    assert incidents == [("kernel_ownership", 3, ["intruder"], planted)]
    assert len(tokens["intruder"]) == 2, "nothing of the step that was refused"
    for name in ("victim", "other"):
        assert tokens[name] == expected[name], "the others lost nothing, not even the step"


def test_blocks_change_hands_scrubbed_on_the_device(model: LlamaModel) -> None:
    """Few blocks, many domains: every block is scrubbed by the kernel and taken again, in both books alike."""
    runner = ModelRunner(model, block_size=4, max_num_seqs=2, num_blocks=5, graph_sizes=(2,))
    core: EngineCore = core_of(runner, NullObserver())
    for index in range(3):
        sampling = SamplingParams(max_tokens=2, temperature=0.0, ignore_eos=True)
        assert core.add(Submit(f"s{index}", f"domain {index}", b"", [index + 3] * 6, sampling)) is None
        while core.has_work:
            result = core.step()
            assert (result.failure, result.incidents) == ("", [])
        assert runner.cache.device_tags is not None
        assert runner.cache.device_tags.tolist() == runner.cache.block_tags.tolist()
    assert core.pool.num_scrubbed > 0
    for index in range(3):
        core.pool.erase(f"domain {index}")
    assert not runner.cache.block_tags.any()
    assert not runner.cache.device_tags.any()
    assert all(runner.cache.is_zero(block) for block in range(5))


def test_the_setting_reaches_the_runner(tmp_path: Path) -> None:
    shape = {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 16, "hidden_size": 16}
    write_tiny_model(tmp_path, num_hidden_layers=1, intermediate_size=16, max_position_embeddings=32, **shape)
    settings = load_settings(
        {"BULKHEAD_CUDA_GRAPHS": "2,1", "BULKHEAD_KERNELS": "triton", "BULKHEAD_MAX_NUM_SEQS": "2"}
    )
    fields = worker_config(settings, Folders(tmp_path, tmp_path))
    of_the_engine = {name: value for name, value in fields.items() if not name.startswith("audit_")}
    changed = {"model_dir": tmp_path, "socket_path": tmp_path, "journal_dir": tmp_path, "num_blocks": 4}
    core, _ = build(WorkerConfig(**{**of_the_engine, **changed}), unobserved)  # type: ignore[arg-type]
    runner = core._runner
    assert isinstance(runner, ModelRunner)
    assert runner.graphs is not None
    assert runner.graphs.sizes == (1, 2)
