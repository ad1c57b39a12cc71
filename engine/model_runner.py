"""Runs a step's arrays through the model and picks tokens. It knows rows, not sequences: everything per sequence that
sampling needs lies in one stable row from admission to the end.
"""

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray

from engine.batch import Batch
from engine.cache.kv_cache import KVCache, block_bytes, row_tags
from engine.errors import ConfigError
from engine.events import KernelArrays, SamplingState
from engine.models.facts import Model
from engine.models.load import load_model
from engine.protocol import TokenLogprob
from engine.sampling.row import Row
from engine.sampling.sampler import NOT_FINITE, Leaders, Picks, pick, scored
from kernels.backend import Backend, StepTables
from kernels.padding import pad, padded_size


def cache_dtype(model: Model, kv_cache_dtype: str) -> torch.dtype:
    """Of keys and values: the weights', or uint8 for e4m3. Raises ConfigError where the kernels do not take it."""
    if kv_cache_dtype == "auto":
        return model.dtype
    if not model.backend.takes_fp8_cache:
        name = model.backend.name
        raise ConfigError(f"kv_cache_dtype {kv_cache_dtype} wants BULKHEAD_KERNELS=triton: {name} does not take it")
    return torch.uint8


class Runner(Protocol):
    """What EngineCore needs of a model; the tests ship an integer model behind the same face."""

    num_blocks: int
    block_size: int

    def set_row(self, index: int, row: Row) -> None:
        """A sequence moves into a stable row."""

    def state_of(self, index: int) -> SamplingState:
        """What lies in a stable row; an empty state where nothing does."""
        ...

    def execute(self, batch: Batch) -> Picks:
        """Compute the batch; one token id per sampled row, sampler.NOT_FINITE where its numbers broke; the prompt's log
        probabilities of each row with scored places."""
        ...

    def scrub(self, block_ids: list[int]) -> None:
        """Zero the content of blocks."""


class ModelRunner:
    """``num_blocks`` 0 takes as many as fit into ``kv_cache_bytes``. ``kv_cache_dtype``: "auto" keeps keys and values
    as the weights are, "fp8_e4m3" in bytes, with kernels that take them. ``pad_to``: sizes to which batches of decode
    tokens are filled up, with kernels that know such rows (kernels/padding.py); none: no batch is."""

    def __init__(
        self,
        model: Model,
        *,
        block_size: int,
        max_num_seqs: int,
        num_blocks: int = 0,
        kv_cache_bytes: int = 0,
        kv_cache_dtype: str = "auto",
        pad_to: Sequence[int] = (),
    ) -> None:
        dtype = cache_dtype(model, kv_cache_dtype)
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
        )
        self._pad_to = tuple(pad_to)
        self._rows: list[Row | None] = [None] * max_num_seqs
        self._arrays: KernelArrays | None = None  # of the last launch

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
        )

    def set_row(self, index: int, row: Row) -> None:
        self._rows[index] = row

    def state_of(self, index: int) -> SamplingState:
        row = self._rows[index]
        return SamplingState() if row is None else row.state()

    def scrub(self, block_ids: list[int]) -> None:
        self.cache.scrub(block_ids)

    def execute(self, batch: Batch) -> Picks:
        logits = self.logits(batch)
        found = self._leaders(logits)
        num_sampled = len(batch.sampled_index)
        scores, arrays = self._scores(batch, logits[num_sampled:], found[num_sampled:]), self._arrays
        picks = Picks(np.empty(num_sampled, dtype=np.int64), {}, scores, arrays)
        positions = batch.sampled_positions.tolist()
        for index, number in enumerate(batch.sampled_rows.tolist()):
            row = self._rows[number]
            assert row is not None
            assert len(row.token_ids) == positions[index], "the row holds another sequence's tokens"
            picked = pick(logits[index], row, positions[index], found[index])
            picks.token_ids[index] = picked.token_id
            if picked.logprob is not None:
                picks.logprobs[index] = picked.logprob
        return picks

    def _leaders(self, logits: NDArray[np.float32]) -> list[Leaders]:
        """The best of each row, found for all rows at once; who wants more of a row looks again."""
        rows, top = torch.from_numpy(logits), self.model.backend.top
        if not len(rows):
            return []
        best, finite = (found.numpy() for found in top(rows, 1))

        def ranked(index: int, count: int) -> NDArray[np.int64]:
            if count <= 0:
                return np.empty(0, dtype=np.int64)
            ids: NDArray[np.int64] = top(rows[index : index + 1], min(count, rows.shape[1]))[0][0].numpy()
            return ids

        first = np.where(finite, best[:, 0], NOT_FINITE).tolist()
        return [Leaders(one, partial(ranked, index)) for index, one in enumerate(first)]

    def _scores(
        self, batch: Batch, logits: NDArray[np.float32], found: list[Leaders]
    ) -> dict[int, tuple[TokenLogprob, ...] | None]:
        """``logits`` [P, V]. By batch row; None where a row's numbers broke."""
        scores: dict[int, tuple[TokenLogprob, ...] | None] = {}
        places = iter(zip(logits, found, strict=True))
        for part in batch.scored:
            row = self._rows[part.row]
            assert row is not None
            num_top = row.sampling.prompt_logprobs
            told = []
            for token_id in part.next_token_ids:
                place, best = next(places)
                told.append(scored(place, token_id, num_top, best))
            whole = tuple(one for one in told if one is not None)
            scores[part.index] = whole if len(whole) == len(told) else None
        return scores

    @torch.inference_mode()
    def logits(self, batch: Batch) -> NDArray[np.float32]:
        """float32 [S + P, V]: of the rows that sample, then of the scored places."""
        evidence = batch.evidence
        tags = row_tags(evidence.domains)
        self.cache.claim(evidence.slot_mapping, np.repeat(tags, np.diff(evidence.cu_seqlens)))
        tables = StepTables(
            cu_seqlens=evidence.cu_seqlens,
            kv_lens=evidence.kv_lens,
            block_tables=evidence.block_tables,
            slot_mapping=evidence.slot_mapping,
            row_tags=tags,
            block_tags=self.cache.block_tags,
            block_size=self.block_size,
        )
        token_ids, positions = batch.token_ids, batch.positions
        if self._pad_to:
            tables = pad(tables, padded_size(tables, self._pad_to))
            missing = len(tables.slot_mapping) - len(token_ids)
            token_ids, positions = np.pad(token_ids, (0, missing)), np.pad(positions, (0, missing))
        wanted = np.concatenate((batch.sampled_tokens, batch.scored_tokens))
        self._arrays = KernelArrays(
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
        device = self.model.backend.device
        logits = self.model.forward(
            torch.from_numpy(token_ids).to(device),
            torch.from_numpy(positions).to(device),
            cache=self.cache,
            plan=self.model.backend.plan(tables),
            wanted=torch.from_numpy(wanted).to(device),
        )
        values: NDArray[np.float32] = logits.cpu().numpy()
        return values
