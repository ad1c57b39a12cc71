"""Model folders: shards that fit together, and GGUF files that come out as the model they were made from."""

import json
from pathlib import Path
from typing import Any

import gguf
import pytest
import torch
from safetensors.torch import load_file, save_file

from engine.errors import ConfigError
from engine.model_runner import ModelRunner
from engine.models.convert import ConvertError, convert
from engine.models.load import check_vocabulary, load_model
from engine.models.transformers_model import check_config
from engine.models.weights import INDEX, load_weights
from engine.text.tokenizer import Tokenizer
from tests.strategies.tiny_model import tiny_tokenizer, write_tiny_model

pytestmark = pytest.mark.filterwarnings("default")  # transformers' own


@pytest.fixture
def sharded(tmp_path: Path) -> Path:
    model = write_tiny_model(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    model.save_pretrained(tmp_path, max_shard_size="20KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 2
    return tmp_path


def test_shards_are_one_model(sharded: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    whole = tmp_path_factory.mktemp("whole")
    write_tiny_model(whole)
    expected, found = (load_weights(folder, torch.float32) for folder in (whole, sharded))
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    load_model(sharded, dtype="float32")


def test_a_shard_that_was_not_copied_is_named(sharded: Path) -> None:
    missing = sorted(sharded.glob("*.safetensors"))[1]
    missing.unlink()
    with pytest.raises(ConfigError, match=rf"names {missing.name}.*copy the whole model"):
        load_weights(sharded, torch.float32)


def test_a_shard_without_its_tensor_is_named(sharded: Path) -> None:
    path = max(sharded.glob("*.safetensors"), key=lambda path: len(load_file(path)))
    weights = load_file(path)
    name = sorted(weights)[0]
    save_file({key: value for key, value in weights.items() if key != name}, path)
    with pytest.raises(ConfigError, match=rf"{path.name} holds {name}, which it does not"):
        load_weights(sharded, torch.float32)


def test_a_file_of_another_model_is_named(sharded: Path) -> None:
    save_file({"stray": torch.ones(1)}, sharded / "other.safetensors")
    with pytest.raises(ConfigError, match=r"other\.safetensors holds stray"):
        load_weights(sharded, torch.float32)
    (sharded / INDEX).unlink()
    save_file(load_file(sorted(sharded.glob("model*"))[0]), sharded / "other.safetensors")
    with pytest.raises(ConfigError, match="both hold"):
        load_weights(sharded, torch.float32)


@pytest.mark.parametrize(
    ("name", "message"),
    [("pytorch_model.bin", "can run code and is never opened"), ("m.gguf", "bulkhead model convert"), ("x", "point")],
)
def test_a_folder_without_safetensors_says_what_to_do(name: str, message: str, tmp_path: Path) -> None:
    write_tiny_model(tmp_path)
    (tmp_path / "model.safetensors").rename(tmp_path / name)
    with pytest.raises(ConfigError, match=message):
        load_model(tmp_path, dtype="float32")


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"model_type": "new", "auto_map": {"AutoModel": "code.New"}}, "brings code of its own, which is never run"),
        ({"model_type": "t5", "architectures": ["T5ForConditionalGeneration"]}, "served as nothing"),
        ({"model_type": "gemma2", "architectures": ["Gemma2ForSequenceClassification"]}, "as Gemma2ForCausalLM only"),
        ({"model_type": "gemma2", "architectures": ["Gemma2ForCausalLM"], "quantization_config": {"a": 1}}, "quantis"),
        ({"model_type": "falcon", "architectures": ["FalconForCausalLM"], "alibi": True}, "alibi"),
        ({"model_type": "mamba", "architectures": ["MambaForCausalLM"]}, "cannot serve MambaForCausalLM: "),
    ],
)
def test_what_cannot_be_served_is_refused_by_name(config: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        check_config(config)


def test_a_tokenizer_of_another_model_is_refused() -> None:
    check_vocabulary(320, 320)
    with pytest.raises(ConfigError, match="321 tokens and the model 320"):
        check_vocabulary(321, 320)


GGUF_NAMES = {
    "model.embed_tokens.weight": "token_embd.weight",
    "model.norm.weight": "output_norm.weight",
    "lm_head.weight": "output.weight",
    "input_layernorm.weight": "attn_norm.weight",
    "post_attention_layernorm.weight": "ffn_norm.weight",
    "self_attn.o_proj.weight": "attn_output.weight",
    **{f"self_attn.{x}_proj.{kind}": f"attn_{x}.{kind}" for x in "qkv" for kind in ("weight", "bias")},
    **{f"self_attn.{x}_norm.weight": f"attn_{x}_norm.weight" for x in "qk"},
    **{f"mlp.{x}_proj.weight": f"ffn_{x}.weight" for x in ("gate", "up", "down")},
}


def write_gguf(path: Path, model: Any, arch: str, pre: str = "smollm", window: int = 0) -> None:
    """As llama.cpp's converter writes it: rows of q and k permuted for "llama" (LlamaModel.permute)."""
    config = model.config
    writer = gguf.GGUFWriter(path, arch)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(config.head_dim)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(10_000.0)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre)
    if window:
        writer.add_sliding_window(window)
    body = json.loads(tiny_tokenizer().to_str())["model"]
    vocab = sorted(body["vocab"], key=body["vocab"].get)
    writer.add_token_list(vocab)
    writer.add_token_types([3 if token.startswith("<|") else 1 for token in vocab])
    writer.add_token_merges([" ".join(pair) for pair in body["merges"]])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    for name, weight in model.state_dict().items():
        if name.startswith("model.layers."):
            _, _, layer, rest = name.split(".", 3)
            target = f"blk.{layer}.{GGUF_NAMES[rest]}"
        else:
            target = GGUF_NAMES[name]
        array = weight.float().numpy()
        if arch == "llama" and ("q_proj" in name or "k_proj" in name):
            heads = config.num_attention_heads if "q_proj" in name else config.num_key_value_heads
            array = array.reshape(heads, 2, config.head_dim // 2, -1).swapaxes(1, 2).reshape(array.shape)
        writer.add_tensor(target, array.copy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.mark.parametrize("model_type", ["llama", "mistral", "qwen2", "qwen3"])
def test_a_gguf_file_becomes_the_model_it_was_made_from(model_type: str, tmp_path: Path) -> None:
    window = {"mistral": 6}.get(model_type, 0)
    changes = {"sliding_window": window} if window else {}
    size = {"head_dim": 8} | ({"hidden_size": 48} if model_type == "qwen2" else {})
    model = write_tiny_model(tmp_path / "original", model_type, **changes, **size)
    arch = "llama" if model_type == "mistral" else model_type
    write_gguf(tmp_path / "m.gguf", model, arch, "qwen2" if "qwen" in model_type else "smollm", window)
    convert(tmp_path / "m.gguf", tmp_path / "converted")
    expected = load_weights(tmp_path / "original", torch.bfloat16)
    found = load_weights(tmp_path / "converted", torch.bfloat16)
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    runner = ModelRunner.load(tmp_path / "converted", dtype="bfloat16", block_size=4, max_num_seqs=1, num_blocks=1)
    original = load_model(tmp_path / "original", dtype="bfloat16").config
    for name in ("layers", "num_heads", "num_kv_heads", "head_size", "qk_norm", "qkv_bias", "rms_norm_epsilon"):
        assert getattr(runner.model.config, name) == pytest.approx(getattr(original, name)), name
    text = "The cat sat: naïve café 🌲"
    assert (tokenizer := Tokenizer.load(tmp_path / "converted")).decode(tokenizer.encode(text)) == text


def test_an_unchecked_tokenizer_wants_the_models_own(tmp_path: Path) -> None:
    model = write_tiny_model(tmp_path / "original")
    write_gguf(tmp_path / "m.gguf", model, "llama", pre="llama-bpe")
    with pytest.raises(ConvertError, match=r"gpt2/llama-bpe.*--tokenizer"):
        convert(tmp_path / "m.gguf", tmp_path / "converted")
    assert not (tmp_path / "converted").exists()
    convert(tmp_path / "m.gguf", tmp_path / "converted", tmp_path / "original")
    assert Tokenizer.load(tmp_path / "converted").encode("cat") == Tokenizer.load(tmp_path / "original").encode("cat")


def test_a_foreign_architecture_or_window_is_refused(tmp_path: Path) -> None:
    model = write_tiny_model(tmp_path / "original")
    write_gguf(tmp_path / "a.gguf", model, "falcon")
    with pytest.raises(ConvertError, match="holds 'falcon'"):
        convert(tmp_path / "a.gguf", tmp_path / "out")
    write_gguf(tmp_path / "b.gguf", model, "qwen2", window=4)
    with pytest.raises(ConvertError, match="sliding window"):
        convert(tmp_path / "b.gguf", tmp_path / "out")
