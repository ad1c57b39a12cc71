"""A whole model folder in a second: a random two-layer model and a byte-level tokenizer trained on three sentences."""

import json
from pathlib import Path
from typing import Any

import tokenizers
import torch
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, LlamaConfig, PreTrainedConfig, PreTrainedModel

SPECIAL_TOKENS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
EOS_TOKEN_ID = 2
TEXT = ["The cat sat on the mat.", "A façade of naïve café façades.", "Was ist das für 12 Bäume? 🌲🌲"]
CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def tiny_tokenizer() -> tokenizers.Tokenizer:
    """All 256 bytes, a few merges, three special tokens: every string and every byte sequence can be written."""
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=320,
        special_tokens=SPECIAL_TOKENS,
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(TEXT, trainer)
    return tokenizer


def tiny_config(model_type: str, **changes: Any) -> PreTrainedConfig:
    """For the families that read Llama's names."""
    values: dict[str, Any] = {
        "vocab_size": 320,
        "hidden_size": 48,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 6,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "max_position_embeddings": 4096,
        "tie_word_embeddings": False,
        "eos_token_id": EOS_TOKEN_ID,
        "bos_token_id": 1,
        "pad_token_id": None,
    }
    return CONFIG_MAPPING[model_type](**(values | changes))


def tiny_llama_config(**changes: Any) -> LlamaConfig:
    return tiny_config("llama", **changes)


def random_model(config: PreTrainedConfig, seed: int = 0) -> PreTrainedModel:
    """Weights wide enough that a wrong mask, position or head moves the logits far more than rounding does."""
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0.0, 0.3 if parameter.dim() > 1 else 1.0)
    return model


def write_tiny_model(folder: Path, model_type: str = "llama", **changes: Any) -> PreTrainedModel:
    """Write config, weights, tokenizer and chat template; returns the model that was written."""
    model = random_model(tiny_config(model_type, **changes))
    model.save_pretrained(folder)
    write_tiny_tokenizer(folder)
    return model


def write_tiny_tokenizer(folder: Path) -> None:
    tiny_tokenizer().save(str(folder / "tokenizer.json"))
    extra = {"bos_token": "<|im_start|>", "eos_token": "<|im_end|>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(extra))
    (folder / "chat_template.jinja").write_text(CHAT_TEMPLATE)
