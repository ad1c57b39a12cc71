"""The model code against transformers, on random models: chunked, paged and packed, the logits are the same."""

from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import CONFIG_MAPPING

from engine.batch import build_batch
from engine.errors import ConfigError
from engine.model_runner import ModelRunner
from engine.models.llama import LlamaModel
from engine.models.llama_config import ARCHITECTURES, HONOURED, NO_EFFECT, ModelConfig, NotOurs
from engine.protocol import SamplingParams
from engine.scheduling.schedule import ScheduledRow
from engine.sequence import Sequence
from kernels.choice import choose
from tests.strategies.tiny_model import write_tiny_model

LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
YARN = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 64}
HALF_SLIDING = {"layer_types": ["sliding_attention", "full_attention"], "sliding_window": 6}
GRANITE = {
    "attention_multiplier": 0.2,
    "embedding_multiplier": 3.0,
    "residual_multiplier": 0.7,
    "logits_scaling": 5.0,
}
FAMILY: dict[str, dict[str, Any]] = {
    "grouped heads": {},
    "one key head": {"num_key_value_heads": 1},
    "a key head for each": {"num_key_value_heads": 6},
    "tied, biases": {"tie_word_embeddings": True, "attention_bias": True, "mlp_bias": True},
    "odd head size": {"head_dim": 14},
    "linear rope": {"rope_parameters": {"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0}},
    "llama3 rope": {"rope_parameters": LLAMA3},
    "yarn rope": {"rope_parameters": YARN},
    "large theta, epsilon": {"rope_parameters": {"rope_type": "default", "rope_theta": 5e5}, "rms_norm_eps": 1e-2},
    "mistral, window": {"model_type": "mistral", "sliding_window": 6},
    "mistral, no window": {"model_type": "mistral", "sliding_window": None},
    "ministral": {"model_type": "ministral", **HALF_SLIDING},
    "qwen2": {"model_type": "qwen2"},
    "qwen2, window": {"model_type": "qwen2", "use_sliding_window": True, "max_window_layers": 1, "sliding_window": 6},
    "qwen3": {"model_type": "qwen3", "attention_bias": True},
    "qwen3, window": {"model_type": "qwen3", "use_sliding_window": True, **HALF_SLIDING},
    "smollm3": {"model_type": "smollm3", "no_rope_layers": [1, 0]},
    "smollm3, window": {"model_type": "smollm3", "use_sliding_window": True, **HALF_SLIDING},
    "seed_oss": {"model_type": "seed_oss", "attention_bias": True, "attention_out_bias": False},
    "granite": {"model_type": "granite", **GRANITE},
}


@pytest.mark.parametrize("model_type", ARCHITECTURES.values())
def test_every_field_of_a_config_class_is_honoured_or_known_to_have_no_effect(model_type: str) -> None:
    declared = {field.name for field in fields(CONFIG_MAPPING[model_type])}
    assert not declared - HONOURED - NO_EFFECT


@pytest.mark.parametrize("kernels", ["auto", "torch"])
@pytest.mark.parametrize("name", FAMILY)
def test_packed_chunks_give_the_logits_of_transformers(name: str, kernels: str, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    theirs = write_tiny_model(folder, **FAMILY[name])
    backend = choose(kernels, 1, lambda line: None)
    runner = ModelRunner.load(folder, dtype="float32", block_size=4, max_num_seqs=4, num_blocks=40, backend=backend)
    assert isinstance(runner.model, LlamaModel)
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
        batch = build_batch(step, rows, 4, runner.state_of)
        logits = runner.logits(batch)
        for row in rows:
            row.sequence.num_computed_tokens += row.num_new_tokens
        for index, ours in zip(batch.sampled_index, logits, strict=True):
            with torch.inference_mode():
                expected = theirs(torch.tensor([rows[index].sequence.token_ids])).logits[0, -1]
            torch.testing.assert_close(torch.from_numpy(ours), expected, atol=2e-4, rtol=2e-4)
            compared += 1
    assert compared == len(lengths)


GOOD = {
    "architectures": ["LlamaForCausalLM"],
    "hidden_size": 8,
    "intermediate_size": 8,
    "num_hidden_layers": 1,
    "num_attention_heads": 1,
    "vocab_size": 8,
    "max_position_embeddings": 8,
    "rms_norm_eps": 1e-5,
}


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"architectures": ["GPT2LMHeadModel"]}, NotOurs, "GPT2LMHeadModel"),
        ({"hidden_act": "gelu"}, NotOurs, "gelu"),
        ({"rope_scaling": {"rope_type": "dynamic", "factor": 2.0}}, NotOurs, "dynamic"),
        ({"partial_rotary_factor": 0.5}, NotOurs, "partial_rotary_factor"),
        ({"quantization_config": {"bits": 4}}, ConfigError, "quantised"),
        ({"hidden_size": None}, ConfigError, "hidden_size"),
        ({"sliding_window": 8}, ConfigError, "sliding_window, which LlamaForCausalLM does not know"),
        ({"attn_logit_softcapping": 30.0}, ConfigError, "attn_logit_softcapping"),
        ({"architectures": ["Qwen3ForCausalLM"], "layer_types": ["chunked_attention"]}, NotOurs, "chunked_attention"),
        ({"architectures": ["Qwen3ForCausalLM"], "layer_types": ["sliding_attention"]}, ConfigError, "no sliding_wi"),
    ],
)
def test_what_the_model_code_cannot_honour_is_refused(
    changes: dict[str, Any], error: type[ConfigError], message: str
) -> None:
    ModelConfig.from_json(GOOD)
    with pytest.raises(ConfigError, match=message) as caught:
        ModelConfig.from_json(GOOD | changes)
    assert type(caught.value) is error


def test_what_a_config_leaves_out_is_what_its_class_says() -> None:
    mistral = ModelConfig.from_json(GOOD | {"architectures": ["MistralForCausalLM"], "num_key_value_heads": 1})
    assert mistral.layers[0].window == 4096
    assert not ModelConfig.from_json(GOOD | {"architectures": ["Qwen2ForCausalLM"]}).layers[0].window


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
