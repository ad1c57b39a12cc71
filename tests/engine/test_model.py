"""The model code against transformers, on random models: chunked, paged and packed, the logits are the same."""

from pathlib import Path
from typing import Any

import pytest
import torch

from engine.batch import build_batch
from engine.errors import ConfigError
from engine.model import ModelConfig
from engine.model_runner import ModelRunner
from engine.protocol import SamplingParams
from engine.scheduler import ScheduledRow
from engine.sequence import Sequence
from kernels.backend import choose
from tests.strategies.tiny_model import write_tiny_model

LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
FAMILY: dict[str, dict[str, Any]] = {
    "grouped heads": {},
    "one key head": {"num_key_value_heads": 1},
    "a key head for each": {"num_key_value_heads": 6},
    "tied, biases": {"tie_word_embeddings": True, "attention_bias": True, "mlp_bias": True},
    "odd head size": {"head_dim": 14},
    "linear rope": {"rope_parameters": {"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0}},
    "llama3 rope": {"rope_parameters": LLAMA3},
    "large theta, epsilon": {"rope_parameters": {"rope_type": "default", "rope_theta": 5e5}, "rms_norm_eps": 1e-2},
}


@pytest.mark.parametrize("kernels", ["auto", "torch"])
@pytest.mark.parametrize("name", FAMILY)
def test_packed_chunks_give_the_logits_of_transformers(name: str, kernels: str, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    theirs = write_tiny_model(folder, **FAMILY[name])
    backend = choose(kernels, 1, lambda line: None)
    runner = ModelRunner.load(folder, dtype="float32", block_size=4, max_num_seqs=4, num_blocks=40, backend=backend)
    generator = torch.Generator().manual_seed(5)
    lengths, chunk_sizes = (3, 21, 40), (1, 5, 7)
    sequences = []
    for index, length in enumerate(lengths):
        token_ids = torch.randint(3, 320, (length,), generator=generator).tolist()
        sequence = Sequence(f"s{index}", "a", b"", token_ids, SamplingParams(max_tokens=1), arrival=index)
        sequence.block_ids = list(range(39 - index, 39 - index - 3 * -(-length // 4), -3))  # scattered, backwards
        sequence.row = index
        sequences.append(sequence)
    compared = 0
    for step in range(1, 60):
        rows = []
        for sequence, chunk_size in zip(sequences, chunk_sizes, strict=True):
            num_new = min(chunk_size, sequence.num_tokens - sequence.num_computed_tokens)
            if num_new:
                rows.append(ScheduledRow(sequence, num_new))
        if not rows:
            break
        batch = build_batch(step, rows, block_size=4)
        logits = runner.logits(batch)
        for row in rows:
            row.sequence.num_computed_tokens += row.num_new_tokens
        for index, ours in zip(batch.sampled_index, logits, strict=True):
            with torch.inference_mode():
                expected = theirs(torch.tensor([rows[index].sequence.token_ids])).logits[0, -1]
            torch.testing.assert_close(torch.from_numpy(ours), expected, atol=2e-4, rtol=2e-4)
            compared += 1
    assert compared == len(lengths)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"architectures": ["GPT2LMHeadModel"]}, "GPT2LMHeadModel"),
        ({"hidden_act": "gelu"}, "gelu"),
        ({"quantization_config": {"bits": 4}}, "quantised"),
        ({"hidden_size": None}, "config.json lacks"),
    ],
)
def test_what_the_model_code_cannot_honour_is_refused(changes: dict[str, Any], message: str) -> None:
    good = {
        "architectures": ["LlamaForCausalLM"],
        "hidden_size": 8,
        "intermediate_size": 8,
        "num_hidden_layers": 1,
        "num_attention_heads": 1,
        "vocab_size": 8,
        "max_position_embeddings": 8,
        "rms_norm_eps": 1e-5,
    }
    ModelConfig.from_json(good)
    with pytest.raises(ConfigError, match=message):
        ModelConfig.from_json(good | changes)


def test_a_missing_or_surplus_weight_is_named(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    write_tiny_model(tmp_path)
    path = tmp_path / "model.safetensors"
    weights = load_file(path)
    name = "model.layers.1.mlp.down_proj.weight"
    save_file({key: value for key, value in weights.items() if key != name}, path)
    with pytest.raises(ConfigError, match=r"lack model\.layers\.1\.mlp\.down_proj"):
        ModelRunner.load(tmp_path, dtype="float32", block_size=4, max_num_seqs=1, num_blocks=1)
    save_file(weights | {"model.layers.0.self_attn.q_norm.weight": torch.ones(8)}, path)
    with pytest.raises(ConfigError, match=r"does not use: .*q_norm"):
        ModelRunner.load(tmp_path, dtype="float32", block_size=4, max_num_seqs=1, num_blocks=1)
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(ConfigError, match="cannot be read"):
        ModelRunner.load(tmp_path, dtype="float32", block_size=4, max_num_seqs=1, num_blocks=1)


def test_scrubbing_zeroes_every_layer_of_a_block_and_no_other(tiny_model_dir: Path) -> None:
    runner = ModelRunner.load(tiny_model_dir, dtype="bfloat16", block_size=4, max_num_seqs=1, num_blocks=3)
    for index in range(2):
        for tensor in runner.cache.layer(index):
            tensor.fill_(1.0)
    runner.scrub([1])
    assert [runner.cache.is_zero(block) for block in range(3)] == [False, True, False]
