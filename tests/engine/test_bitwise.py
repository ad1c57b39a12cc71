"""Non-interference: a sequence's logits are the same bits alone and in any company, under any schedule."""

import random
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from engine.batch import Batch
from engine.core import EngineCore
from engine.events import NullObserver, Observer
from engine.model_runner import ModelRunner
from engine.models.llama import LlamaModel
from engine.models.llama_config import ModelConfig
from engine.models.load import DTYPES
from engine.models.weights import load_weights
from engine.protocol import SamplingParams, Submit, TokenOutput
from engine.scheduling.break_off import GoOn
from engine.scheduling.tiers import TIERS
from engine.sequence import Sequence
from engine.text.tokenizer import read_json
from kernels.cpu.backend import NativeBackend
from tests.kernels.native import every_isa, isas
from tests.strategies.tiny_model import write_tiny_model

needs_native = pytest.mark.skipif(
    not isas(),
    reason="no native kernels: install a C++ compiler and run make native; without them isolation is relaxed",
)


@dataclass(frozen=True)
class Schedule:
    """How a run differs from another that must give the same bits."""

    block_size: int = 16
    num_blocks: int = 64
    max_batched_tokens: int = 4096
    max_num_seqs: int = 8
    num_threads: int = 1
    seed: int = 0
    break_chance: float = 0.0  # before each layer, that somebody comes for whom the step is to be broken off


ALONE = Schedule()
TIERS_IN_TURN = (TIERS["batch"], TIERS["flex"], TIERS["priority"], TIERS["default"])


class Recording(ModelRunner):
    """Remembers every logit by sequence and position."""

    def __init__(self, model: LlamaModel, schedule: Schedule) -> None:
        super().__init__(
            model,
            block_size=schedule.block_size,
            max_num_seqs=schedule.max_num_seqs,
            num_blocks=schedule.num_blocks,
        )
        self.num_cached_tokens = 0
        self.num_broken_off = 0
        self.seen: dict[tuple[str, int], NDArray[np.float32]] = {}

    def logits(self, batch: Batch, go_on: GoOn | None = None) -> NDArray[np.float32]:
        logits = super().logits(batch, go_on)
        for row, index, position in zip(logits, batch.sampled_index, batch.sampled_positions.tolist(), strict=False):
            self.seen[batch.evidence.sequence_ids[index], position] = row.copy()
        rows = [part.index for part in batch.scored for _ in part.next_token_ids]
        places = batch.positions[batch.scored_tokens].tolist()
        for row, index, place in zip(logits[len(batch.sampled_index) :], rows, places, strict=True):
            self.seen[batch.evidence.sequence_ids[index], place + 1] = row.copy()
        return logits


def play(
    model: LlamaModel,
    submits: list[Submit],
    schedule: Schedule,
    aborted: frozenset[str] = frozenset(),
    note: Callable[[TokenOutput], None] = lambda output: None,
    make_observer: Callable[[Recording], Observer] = lambda runner: NullObserver(),
) -> tuple[dict[str, list[int]], Recording, tuple[int, int]]:
    """Tokens by sequence, the recording and the number of preemptions without and with kept blocks. Arrivals, aborts,
    and breaks fall where the seed says."""
    chance = random.Random(schedule.seed)
    torch.set_num_threads(schedule.num_threads)
    assert isinstance(model.backend, NativeBackend)
    model.backend = NativeBackend(model.backend.isa, schedule.num_threads)
    runner = Recording(model, schedule)
    core = EngineCore(
        runner,
        decode=lambda ids: "",
        eos_token_ids=frozenset(),
        context_max=model.config.context_max,
        vocab_size=model.config.vocab_size,
        max_batched_tokens=schedule.max_batched_tokens,
        max_num_seqs=schedule.max_num_seqs,
        max_waiting=100,
        observer=make_observer(runner),
        break_off_percent=50 if schedule.break_chance else 0,
    )
    core.break_offs.owed_now = lambda one: Sequence.of(one, arrival=0, model_digest="")
    coming = list(submits)
    chance.shuffle(coming)
    tokens: dict[str, list[int]] = {submit.sequence_id: [] for submit in submits}
    while coming or core.has_work:
        for _ in range(chance.choice([0, 1, 1, 3]) if core.has_work else 1):
            if coming:
                assert core.add(coming.pop()) is None
        result = core.step(lambda: submits[:1] if chance.random() < schedule.break_chance else [])
        assert (result.failure, result.incidents) == ("", [])
        for output in result.outputs:
            note(output)
            tokens[output.sequence_id] += output.token_ids
            runner.num_cached_tokens = max(runner.num_cached_tokens, output.num_cached_tokens)
            if output.sequence_id in aborted and len(tokens[output.sequence_id]) > 3:
                core.abort(output.sequence_id)
    torch.set_num_threads(1)
    runner.num_broken_off = core.break_offs.num_broken_off
    num_kept = core.scheduler.num_preemptions_kept
    return tokens, runner, (core.scheduler.num_preemptions - num_kept, num_kept)


def load(folder: Path, dtype: str, isa: str) -> LlamaModel:
    config = ModelConfig.from_json(read_json(folder / "config.json"))
    return LlamaModel(config, load_weights(folder, DTYPES[dtype]), NativeBackend(isa))


def submits(vocab_size: int, lengths: list[int], num_tokens: int) -> list[Submit]:
    """Those of one domain begin alike, so that they find each other's blocks in the prefix cache."""
    chance = random.Random(7)
    heads = [[chance.randrange(3, vocab_size) for _ in range(36)] for _ in range(3)]
    return [
        Submit(
            f"s{index}",
            f"domain {index % 3}",
            b"",
            (heads[index % 3] + [chance.randrange(3, vocab_size) for _ in range(length)])[:length],
            SamplingParams(
                max_tokens=num_tokens + index % 5,
                temperature=0.8 * (index % 2),
                seed=index,
                ignore_eos=True,
                prompt_logprobs=0 if index % 3 == 1 else -1,
            ),
            priority=TIERS_IN_TURN[index % 4],
        )
        for index, length in enumerate(lengths)
    ]


def same_as_alone(
    model: LlamaModel,
    work: list[Submit],
    schedules: list[Schedule],
    note: Callable[[tuple[int, int], int], None] = lambda preempted, cached: None,
) -> None:
    alone: dict[tuple[str, int], NDArray[np.float32]] = {}
    alone_tokens: dict[str, list[int]] = {}
    for submit in work:
        tokens, recorded, _ = play(model, [submit], ALONE)
        alone |= recorded.seen
        alone_tokens |= tokens
    for schedule in schedules:
        aborted = frozenset(submit.sequence_id for submit in work[:: 2 + schedule.seed % 3])
        tokens, recorded, num_preemptions = play(model, work, schedule, aborted)
        note(num_preemptions, recorded.num_cached_tokens)
        for (name, position), logits in recorded.seen.items():
            same = logits.view(np.int32) == alone[name, position].view(np.int32)
            assert same.all(), f"{name} at {position} under {schedule}: {int((~same).sum())} logits differ"
        for name, ids in tokens.items():
            assert ids == alone_tokens[name][: len(ids)]
            assert name in aborted or len(ids) == len(alone_tokens[name])


@every_isa
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_random_schedules_change_no_bit(tiny_model_dir: Path, dtype: str, isa: str) -> None:
    model = load(tiny_model_dir, dtype, isa)
    assert model.is_exact()
    work = submits(320, [1, 3, 31, 32, 33, 64, 90], 9)
    chance = random.Random(7)
    schedules = [
        Schedule(
            block_size=size,
            num_blocks=chance.choice([-(-130 // size), -(-260 // size)]),
            max_batched_tokens=chance.choice([8, 17, 33, 256]),
            max_num_seqs=2 if index == 2 else chance.choice([2, 5, 8]),
            num_threads=1 + index % 2,
            seed=index,
        )
        for index, size in enumerate([1, 16, 7, 33])
    ]
    seen: list[tuple[tuple[int, int], int]] = []
    same_as_alone(model, work, schedules, lambda preempted, cached: seen.append((preempted, cached)))
    assert sum(released for (released, _), _ in seen) > 0, "the schedules must preempt for blocks"
    assert sum(kept for (_, kept), _ in seen) > 0, "and for rows"
    assert max(cached for _, cached in seen) > 0, "and find prefixes"


@needs_native
@pytest.mark.parametrize("name", ["qwen3", "mistral, window"])
def test_what_the_family_adds_changes_no_bit(name: str, tmp_path: Path) -> None:
    window = 24 if "window" in name else 0
    write_tiny_model(tmp_path, name.split(",")[0], **({"sliding_window": window} if window else {}))
    model = load(tmp_path, "bfloat16", isas()[0])
    assert model.is_exact()
    assert {layer.window for layer in model.config.layers} == {window}
    schedules = [
        Schedule(block_size=7, num_blocks=37, max_batched_tokens=17, max_num_seqs=5, num_threads=2, seed=1),
        Schedule(block_size=16, num_blocks=17, max_batched_tokens=33, seed=2),
    ]
    same_as_alone(model, submits(320, [3, 31, 33, 90], 9), schedules)


@needs_native
def test_the_demo_model_in_company(model_dir: Path) -> None:
    model = load(model_dir, "bfloat16", isas()[0])
    assert model.is_exact()
    schedule = Schedule(block_size=32, num_blocks=14, max_batched_tokens=60, max_num_seqs=6, seed=3)
    same_as_alone(model, submits(49152, [5, 33, 64, 100, 150], 6), [schedule])


def test_plain_torch_does_not_claim_it(tiny_model_dir: Path) -> None:
    from kernels.torch_cpu import TorchBackend

    config = ModelConfig.from_json(read_json(tiny_model_dir / "config.json"))
    assert not LlamaModel(config, load_weights(tiny_model_dir, torch.float32), TorchBackend()).is_exact()
