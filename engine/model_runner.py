"""Runs a step's arrays through the model and picks tokens. It knows rows, not sequences: everything per sequence that
sampling needs lies in one stable row from admission to the end.
"""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from engine.batch import Batch
from engine.cache.kv_cache import KVCache, block_bytes, row_tags
from engine.errors import BrokenOffError, ConfigError
from engine.events import HeadFacts, HeadWork, KernelArrays, SamplingState
from engine.models.facts import Model
from engine.models.load import load_model
from engine.protocol import TokenLogprob
from engine.sampling.numbers import Numbers, fetched, numbers_of
from engine.sampling.row import Row
from engine.sampling.sampler import WHOLE, Picks, asks_for, pick, scored
from engine.scheduling.break_off import GoOn
from kernels.backend import Backend, DeviceBackend, Graphs, StepTables


def cache_dtype(model: Model, kv_cache_dtype: str) -> torch.dtype:
    """Of keys and values: the weights', or uint8 for e4m3. Raises ConfigError where the kernels do not take it."""
    if kv_cache_dtype == "auto":
        return model.dtype
    if not model.backend.takes_fp8_cache:
        name = model.backend.name
        raise ConfigError(f"kv_cache_dtype {kv_cache_dtype} wants BULKHEAD_KERNELS=triton: {name} does not take it")
    return torch.uint8


def check_graphs(model: Model, sizes: Sequence[int]) -> None:
    """Raises ConfigError where the kernels cannot launch a batch as a graph."""
    if sizes and not isinstance(model.backend, DeviceBackend):
        raise ConfigError(f"cuda_graphs wants BULKHEAD_KERNELS=triton: {model.backend.name} has none")


class Runner(Protocol):
    """What EngineCore needs of a model; the tests ship an integer model behind the same face."""

    num_blocks: int
    block_size: int

    def set_row(self, index: int, row: Row) -> None:
        """A sequence moves into a stable row."""

    def state_of(self, index: int) -> SamplingState:
        """What lies in a stable row; an empty state where nothing does."""
        ...

    def execute(self, batch: Batch, go_on: GoOn | None = None) -> Picks:
        """Compute the batch; one token id per sampled row, sampler.NOT_FINITE where its numbers broke; the prompt's log
        probabilities of each row with scored places.

        ``go_on`` may be asked between two layers, on devices where a layer is done when it returns; where it says no,
        BrokenOffError is raised and no row's state has moved."""
        ...

    def scrub(self, block_ids: list[int]) -> None:
        """Zero the content of blocks."""


class ModelRunner:
    """``num_blocks`` 0 takes as many as fit into ``kv_cache_bytes``. ``kv_cache_dtype``: "auto" keeps keys and values
    as the weights are, "fp8_e4m3" in bytes, with kernels that take them. ``graph_sizes``: batches of decode tokens are
    filled up to the least of these sizes that holds them and launched as one graph, with kernels that do so
    (kernels/gpu/graphs.py); none: every kernel is launched by itself."""

    def __init__(
        self,
        model: Model,
        *,
        block_size: int,
        max_num_seqs: int,
        num_blocks: int = 0,
        kv_cache_bytes: int = 0,
        kv_cache_dtype: str = "auto",
        graph_sizes: Sequence[int] = (),
    ) -> None:
        dtype = cache_dtype(model, kv_cache_dtype)
        self._on_device = model.backend if isinstance(model.backend, DeviceBackend) else None
        per_block = block_bytes(model.cache_layers, block_size, dtype)
        self.model = model
        self.block_size = block_size
        self.num_blocks = num_blocks or kv_cache_bytes // per_block
        if self.num_blocks <= 0:
            raise ConfigError(f"kv_cache_bytes must hold at least one block of {per_block} bytes")
        self.cache = KVCache(
            layers=model.cache_layers,
            num_blocks=self.num_blocks,
            block_size=block_size,
            dtype=dtype,
            device=model.backend.device,
            kept_by=self._on_device,
        )
        self._rows: list[Row | None] = [None] * max_num_seqs
        self._arrays: KernelArrays | None = None  # of the last launch
        self._hidden: NDArray[Any] | None = None  # what its head was given
        self.graphs = self._captured(tuple(graph_sizes))

    @classmethod
    def load(
        cls,
        model_dir: Path,
        *,
        dtype: str,
        block_size: int,
        max_num_seqs: int,
        num_blocks: int = 0,
        kv_cache_bytes: int = 0,
        kv_cache_dtype: str = "auto",
        graph_sizes: Sequence[int] = (),
        backend: Backend | None = None,
        log: Callable[[str], None] = lambda line: None,
    ) -> "ModelRunner":
        """From a model folder. Raises ConfigError where it is missing, damaged or cannot be served.

        ``backend`` None takes the best kernels of this machine, on one thread.
        """
        model = load_model(model_dir, dtype=dtype, backend=backend, log=log)
        return cls(
            model,
            block_size=block_size,
            max_num_seqs=max_num_seqs,
            num_blocks=num_blocks,
            kv_cache_bytes=kv_cache_bytes,
            kv_cache_dtype=kv_cache_dtype,
            graph_sizes=graph_sizes,
        )

    @torch.inference_mode()
    def _captured(self, sizes: tuple[int, ...]) -> Graphs | None:
        check_graphs(self.model, sizes)
        tags = self.cache.device_tags
        if not sizes or self._on_device is None or tags is None:
            return None
        context_max = self.model.config.context_max
        return self._on_device.graphs(
            self._forward, sizes, device_tags=tags, block_size=self.block_size, context_max=context_max
        )

    def _forward(self, token_ids: Tensor, positions: Tensor, plan: Any, wanted: Tensor) -> Tensor:
        return self.model.forward(token_ids, positions, cache=self.cache, plan=plan, wanted=wanted)

    def set_row(self, index: int, row: Row) -> None:
        self._rows[index] = row

    def state_of(self, index: int) -> SamplingState:
        row = self._rows[index]
        return SamplingState() if row is None else row.state()

    def scrub(self, block_ids: list[int]) -> None:
        self.cache.scrub(block_ids)

    def execute(self, batch: Batch, go_on: GoOn | None = None) -> Picks:
        try:
            numbers = self._numbers(batch, go_on)
        except BrokenOffError as broken:
            broken.arrays = self._arrays
            raise
        num_sampled = len(batch.sampled_index)
        scores, arrays = self._scores(batch, numbers[num_sampled:]), self._arrays
        head = None if self._hidden is None else HeadWork(self._hidden, np.full(len(numbers), np.nan, dtype=np.float32))
        picks = Picks(np.empty(num_sampled, dtype=np.int64), {}, scores, arrays, head)
        positions = batch.sampled_positions.tolist()
        for index, number in enumerate(batch.sampled_rows.tolist()):
            row = self._rows[number]
            assert row is not None
            assert len(row.token_ids) == positions[index], "the row holds another sequence's tokens"
            picked = pick(numbers[index].values, row, positions[index], numbers[index].found)
            picks.token_ids[index] = picked.token_id
            if picked.logprob is not None:
                picks.logprobs[index] = picked.logprob
            if head is not None:
                head.logits[index] = picked.logit
        if head is not None:
            tokens = [token_id for part in batch.scored for token_id in part.next_token_ids]
            for place, token_id in enumerate(tokens, num_sampled):
                head.logits[place] = numbers[place].values[token_id]
        return picks

    def _numbers(self, batch: Batch, go_on: GoOn | None) -> list[Numbers]:
        """Of the rows that sample, then of the scored places."""
        top = self.model.backend.top
        if self._on_device is None:
            return numbers_of(self.logits(batch, go_on), top)
        logits, top_max = self.launch(batch, go_on), self._on_device.top_max
        asked = [self._asks_for(number, logits.shape[1], top_max) for number in batch.sampled_rows.tolist()]
        return fetched(logits, asked + [WHOLE] * len(batch.scored_tokens), top)

    def _asks_for(self, number: int, size: int, top_max: int) -> int:
        row = self._rows[number]
        assert row is not None
        asked = asks_for(row, size)
        return asked if asked <= top_max else WHOLE

    def _scores(self, batch: Batch, numbers: Sequence[Numbers]) -> dict[int, tuple[TokenLogprob, ...] | None]:
        """``numbers`` [P]. By batch row; None where a row's numbers broke."""
        scores: dict[int, tuple[TokenLogprob, ...] | None] = {}
        places = iter(numbers)
        for part in batch.scored:
            row = self._rows[part.row]
            assert row is not None
            num_top = row.sampling.prompt_logprobs
            told = []
            for token_id in part.next_token_ids:
                place = next(places)
                told.append(scored(place.values, token_id, num_top, place.found))
            whole = tuple(one for one in told if one is not None)
            scores[part.index] = whole if len(whole) == len(told) else None
        return scores

    def logits(self, batch: Batch, go_on: GoOn | None = None) -> NDArray[np.float32]:
        """float32 [S + P, V]: of the rows that sample, then of the scored places."""
        values: NDArray[np.float32] = self.launch(batch, go_on).cpu().numpy()
        return values

    @torch.inference_mode()
    def launch(self, batch: Batch, go_on: GoOn | None = None) -> Tensor:
        """The same on the device. Raises OwnershipError, BrokenOffError."""
        tables = self._tables(batch)
        wanted = np.concatenate((batch.sampled_tokens, batch.scored_tokens))
        device = self.model.backend.device
        self._hidden = None
        if self.graphs is not None and self.graphs.fits(tables):
            done = self.graphs.run(tables, batch.token_ids, batch.positions)
            self._arrays = arrays_of(batch, wanted, done.token_ids, done.positions, done.tables)
            return done.logits[torch.from_numpy(wanted).to(device)]
        self._arrays = arrays_of(batch, wanted, batch.token_ids, batch.positions, tables)
        return self.model.forward(
            torch.from_numpy(batch.token_ids).to(device),
            torch.from_numpy(batch.positions).to(device),
            cache=self.cache,
            plan=self.model.backend.plan(tables),
            wanted=torch.from_numpy(wanted).to(device),
            go_on=go_on if device.type == "cpu" else None,  # elsewhere a layer that returns is not yet computed
            show=self._show if self._on_device is None else None,
        )

    def _show(self, hidden: Tensor) -> None:
        self._hidden = (hidden.view(torch.uint16) if hidden.dtype == torch.bfloat16 else hidden).numpy()

    @property
    def head_facts(self) -> HeadFacts | None:
        """None where the head's work is not shown: logits that stay on a device are not at hand."""
        return None if self._on_device is not None else self.model.head_facts

    def _tables(self, batch: Batch) -> StepTables:
        """The step's blocks become its rows' here. Raises OwnershipError where one is somebody else's."""
        evidence = batch.evidence
        tags = row_tags(evidence.domains)
        self.cache.claim(evidence.slot_mapping, np.repeat(tags, np.diff(evidence.cu_seqlens)))
        return StepTables(
            cu_seqlens=evidence.cu_seqlens,
            kv_lens=evidence.kv_lens,
            block_tables=evidence.block_tables,
            slot_mapping=evidence.slot_mapping,
            row_tags=tags,
            block_tags=self.cache.block_tags,
            block_size=self.block_size,
            device_tags=self.cache.device_tags,
        )


def arrays_of(
    batch: Batch,
    wanted: NDArray[np.int64],
    token_ids: NDArray[np.int64],
    positions: NDArray[np.int64],
    tables: StepTables,
) -> KernelArrays:
    return KernelArrays(
        token_ids=token_ids,
        positions=positions,
        wanted=wanted,
        sampled_positions=batch.sampled_positions,
        sampled_rows=batch.sampled_rows,
        cu_seqlens=tables.cu_seqlens,
        kv_lens=tables.kv_lens,
        block_tables=tables.block_tables,
        slot_mapping=tables.slot_mapping,
    )
