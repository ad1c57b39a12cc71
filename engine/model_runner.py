"""Runs a step's arrays through the model and picks tokens. It knows rows, not sequences: everything per sequence that
sampling needs lies in one stable row from admission to the end.
"""

from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray

from engine import sampler
from engine.batch import Batch
from engine.errors import ConfigError
from engine.kv_cache import KVCache, block_bytes, row_tags
from engine.model import LlamaModel, ModelConfig
from engine.protocol import SamplingParams
from engine.tokenizer import read_json
from engine.weights import load_weights
from kernels.backend import Backend, StepTables, choose

DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}


class Runner(Protocol):
    """What EngineCore needs of a model; the tests ship an integer model behind the same face."""

    num_blocks: int
    block_size: int

    def set_row(self, row: int, sampling: SamplingParams) -> None:
        """A sequence moves into a stable row."""

    def execute(self, batch: Batch) -> NDArray[np.int64]:
        """Compute the batch; one token id per sampled row, sampler.NOT_FINITE where its numbers broke."""
        ...

    def scrub(self, block_ids: list[int]) -> None:
        """Zero the content of blocks."""


class ModelRunner:
    """``num_blocks`` 0 takes as many as fit into ``kv_cache_bytes``."""

    def __init__(
        self,
        model: LlamaModel,
        *,
        block_size: int,
        max_num_seqs: int,
        num_blocks: int = 0,
        kv_cache_bytes: int = 0,
    ) -> None:
        config = model.config
        per_block = block_bytes(config.num_layers, block_size, config.num_kv_heads, config.head_size, model.dtype)
        self.model = model
        self.block_size = block_size
        self.num_blocks = num_blocks or kv_cache_bytes // per_block
        if self.num_blocks <= 0:
            raise ConfigError(f"kv_cache_bytes must hold at least one block of {per_block} bytes")
        self.cache = KVCache(
            num_layers=config.num_layers,
            num_blocks=self.num_blocks,
            block_size=block_size,
            num_kv_heads=config.num_kv_heads,
            head_size=config.head_size,
            dtype=model.dtype,
        )
        self._rows: list[SamplingParams | None] = [None] * max_num_seqs

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
        backend: Backend | None = None,
    ) -> "ModelRunner":
        """From a model folder. Raises ConfigError where it is missing, damaged or not of the Llama family.

        ``backend`` None takes the best kernels of this machine, on one thread.
        """
        if not model_dir.is_dir():
            raise ConfigError(f"there is no model folder at {model_dir}")
        config = ModelConfig.from_json(read_json(model_dir / "config.json"))
        backend = backend or choose("auto", 1, lambda line: None)
        model = LlamaModel(config, load_weights(model_dir, DTYPES[dtype]), backend)
        return cls(
            model,
            block_size=block_size,
            max_num_seqs=max_num_seqs,
            num_blocks=num_blocks,
            kv_cache_bytes=kv_cache_bytes,
        )

    def set_row(self, row: int, sampling: SamplingParams) -> None:
        self._rows[row] = sampling

    def scrub(self, block_ids: list[int]) -> None:
        self.cache.scrub(block_ids)

    def execute(self, batch: Batch) -> NDArray[np.int64]:
        logits = self.logits(batch)
        tokens = np.empty(len(logits), dtype=np.int64)
        for index, row in enumerate(batch.sampled_rows.tolist()):
            sampling = self._rows[row]
            assert sampling is not None
            tokens[index] = sampler.sample(
                logits[index],
                temperature=sampling.temperature,
                top_p=sampling.top_p,
                seed=sampling.seed,
                position=int(batch.sampled_positions[index]),
            )
        return tokens

    @torch.inference_mode()
    def logits(self, batch: Batch) -> NDArray[np.float32]:
        """float32 [S, V] of the rows that sample."""
        evidence = batch.evidence
        tags = row_tags(evidence.domains)
        self.cache.claim(evidence.slot_mapping, np.repeat(tags, np.diff(evidence.cu_seqlens)))
        plan = self.model.backend.plan(
            StepTables(
                cu_seqlens=evidence.cu_seqlens,
                kv_lens=evidence.kv_lens,
                block_tables=evidence.block_tables,
                slot_mapping=evidence.slot_mapping,
                row_tags=tags,
                block_tags=self.cache.block_tags,
                block_size=self.block_size,
            )
        )
        logits = self.model.forward(
            torch.from_numpy(batch.token_ids),
            torch.from_numpy(batch.positions),
            cache=self.cache,
            plan=plan,
            wanted=torch.from_numpy(batch.sampled_tokens),
        )
        values: NDArray[np.float32] = logits.numpy()
        return values
