"""Keys and values in 8 bits under the whole engine, and what they cost the demo model in accuracy."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from engine.cache.kv_cache import KVCache
from engine.config import WorkerConfig
from engine.errors import ConfigError
from engine.model_runner import ModelRunner
from engine.models.llama import LlamaModel
from engine.models.load import load_model
from engine.text.tokenizer import Tokenizer
from kernels import reference
from kernels.backend import StepTables
from kernels.gpu.backend import TritonBackend
from kernels.torch_cpu import TorchBackend, TorchPlan, rope
from tests.engine.test_gpu_runner import SPLIT, Recording, play, work
from tests.strategies.tiny_model import write_tiny_model

PROSE = sorted((Path(__file__).parents[2] / "docs" / "decisions").glob("000*.md"))
NUM_TOKENS = 512


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tiny")
    write_tiny_model(
        folder, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1, head_dim=16, vocab_size=320
    )
    return folder


def test_logits_are_the_same_bits_alone_and_in_company_in_8_bits(tiny: Path) -> None:
    model = load_model(tiny, dtype="float32", backend=TritonBackend(SPLIT))
    assert isinstance(model, LlamaModel)
    submits = work([18, 3], 2)
    together = Recording(model, block_size=7, kv_cache_dtype="fp8_e4m3")
    assert together.cache.layer(0)[0].dtype == torch.uint8
    tokens = play(together, submits, 10)
    wide = Recording(model)
    play(wide, submits)
    for submit in submits:
        alone = Recording(model, kv_cache_dtype="fp8_e4m3")
        assert play(alone, [submit])[submit.sequence_id] == tokens[submit.sequence_id]
        for key, logits in alone.seen.items():
            assert np.array_equal(logits.view(np.int32), together.seen[key].view(np.int32)), key
    assert any((wide.seen[key] != logits).any() for key, logits in together.seen.items()), "8 bits were in use"


def test_kernels_without_8_bits_say_so_at_the_start(tiny: Path) -> None:
    with pytest.raises(ConfigError, match="BULKHEAD_KERNELS=triton"):
        ModelRunner.load(
            tiny,
            dtype="float32",
            block_size=4,
            max_num_seqs=1,
            num_blocks=4,
            backend=TorchBackend(),
            kv_cache_dtype="fp8_e4m3",
        )
    with pytest.raises(ConfigError, match="kv_cache_dtype"):
        WorkerConfig(model_dir=tiny, socket_path=tiny, journal_dir=tiny, kv_cache_dtype="int3")


class InBytes(TorchBackend):
    """Plain torch whose keys and values pass through e4m3 on their way into the cache."""

    def attend(
        self,
        qkv: Tensor,
        cos: Tensor | None,
        sin: Tensor | None,
        key_cache: Tensor,
        value_cache: Tensor,
        *,
        num_heads: int,
        plan: TorchPlan,
        **features: Any,
    ) -> Tensor:
        turning = num_heads + key_cache.shape[2]
        assert cos is not None
        assert sin is not None
        qkv = torch.cat((rope(qkv[:, :turning], cos, sin), qkv[:, turning:]), dim=1)
        kept = reference.from_e4m3(reference.to_e4m3(qkv[:, num_heads:])).to(qkv.dtype)
        qkv = torch.cat((qkv[:, :num_heads], kept), dim=1)
        return super().attend(qkv, None, None, key_cache, value_cache, num_heads=num_heads, plan=plan, **features)


def log_probabilities(model_dir: Path, backend: TorchBackend, token_ids: list[int]) -> Tensor:
    """float64 [T, V] of one prompt, in one chunk."""
    model = load_model(model_dir, dtype="float32", backend=backend)
    cache = KVCache(layers=model.cache_layers, num_blocks=1, block_size=NUM_TOKENS, dtype=torch.float32)
    at = torch.arange(len(token_ids))
    tables = StepTables(
        cu_seqlens=np.array([0, len(token_ids)], dtype=np.int32),
        kv_lens=np.array([len(token_ids)], dtype=np.int32),
        block_tables=np.zeros((1, 1), dtype=np.int32),
        slot_mapping=at.numpy(),
        row_tags=np.ones(1, dtype=np.int64),
        block_tags=np.ones(1, dtype=np.int64),
        block_size=NUM_TOKENS,
    )
    with torch.inference_mode():
        logits = model.forward(torch.tensor(token_ids), at, cache=cache, plan=backend.plan(tables), wanted=at)
    return logits.double().log_softmax(dim=-1)


def error_on(model_dir: Path) -> dict[str, float]:
    """English prose, float32 weights: what 8 bits of keys and values alone change."""
    prose = "".join(path.read_text() for path in PROSE)
    token_ids = Tokenizer.load(model_dir).encode(prose)[:NUM_TOKENS]
    assert len(token_ids) == NUM_TOKENS
    wide, narrow = (log_probabilities(model_dir, backend, token_ids) for backend in (TorchBackend(), InBytes()))
    following = torch.tensor(token_ids[1:])[:, None]
    return {
        "divergence": float((wide.exp() * (wide - narrow)).sum(dim=-1).mean()),
        "same_best": float((wide.argmax(dim=-1) == narrow.argmax(dim=-1)).double().mean()),
        "perplexity": float((-wide[:-1].gather(1, following).mean()).exp()),
        "perplexity_in_8_bits": float((-narrow[:-1].gather(1, following).mean()).exp()),
    }


@pytest.mark.deep
def test_the_demo_model_loses_what_docs_kernels_says(model_dir: Path) -> None:
    found = error_on(model_dir)
    assert found["divergence"] < 0.02
    assert found["same_best"] > 0.88
    assert abs(found["perplexity_in_8_bits"] / found["perplexity"] - 1) < 0.04
