"""A tiny configuration of every causal language model that transformers knows, without a download: the class's own
defaults with every size made small, and every rule of attention switched on that it has."""

from collections.abc import Mapping
from dataclasses import fields
from typing import Any

VOCAB_SIZE = 96
WINDOW = 6  # shorter than the sequences that are compared

# Set wherever a config class declares the field.
SIZES: dict[str, Any] = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 32,
    "intermediate_size": 40,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 128,
    "n_embd": 32,
    "n_inner": 40,
    "n_layer": 4,
    "n_layers": 4,
    "n_head": 4,
    "n_heads": 4,
    "n_positions": 128,
    "d_model": 32,
    "ffn_dim": 40,
    "ffn_hidden_size": 40,
    "num_layers": 4,
    "num_heads": 4,
    "attention_heads": 4,
    "decoder_layers": 4,
    "decoder_attention_heads": 4,
    "decoder_ffn_dim": 40,
    "embedding_size": 32,
    "word_embed_proj_dim": 32,
    "sliding_window": WINDOW,
    "use_sliding_window": True,
    "max_window_layers": 2,
    "sliding_window_pattern": 2,
    "attention_chunk_size": 64,
    "attn_logit_softcapping": 2.0,
    "num_experts": 4,
    "num_local_experts": 4,
    "n_routed_experts": 4,
    "moe_num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_topk": 2,
    "moe_k": 2,
    "n_group": 1,
    "topk_group": 1,
    "first_k_dense_replace": 1,
    "moe_intermediate_size": 24,
    "shared_expert_intermediate_size": 24,
    "moe_shared_expert_intermediate_size": 24,
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8,
    "v_head_dim": 12,
    "rotary_dim": 8,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "is_decoder": True,
}
MLA = {"num_key_value_heads": 4}  # multi-head latent attention has a key head for each query head
HALF_SLIDING = {"layer_types": ["sliding_attention", "full_attention"] * 2}
PER_LAYER_INPUTS = {"hidden_size_per_layer_input": 8, "vocab_size_per_layer_input": VOCAB_SIZE, **HALF_SLIDING}
CONVOLUTIONS = {"layer_types": ["conv", "full_attention"] * 2}
ROPE = {"rope_type": "default", "rope_theta": 10_000.0}

# What single classes need beyond that.
FAMILY: dict[str, dict[str, Any]] = {
    **dict.fromkeys(
        ["axk1", "deepseek_v2", "deepseek_v3", "glm4_moe_lite", "minicpm3", "youtu", "dots3_note_text"], MLA
    ),
    **dict.fromkeys(["axk2", "deepseek_v32", "glm_moe_dsa", "hy_v4"], MLA),
    "cohere_compass_text": {
        "rope_parameters": {"full_attention": ROPE, "sliding_attention": ROPE},
        **HALF_SLIDING,
    },
    "dbrx": {
        "attn_config": {"kv_n_heads": 2, "clip_qkv": 8.0, "rope_theta": 10_000.0},
        "ffn_config": {"hidden_size": 32, "ffn_hidden_size": 40, "moe_num_experts": 4, "moe_top_k": 2},
        "max_seq_len": 128,
    },
    "dots1": {"n_shared_experts": 1},
    "gemma3n_text": {**PER_LAYER_INPUTS, "num_kv_shared_layers": 2, "laurel_rank": 8},
    "gemma4_text": {**PER_LAYER_INPUTS, "num_kv_shared_layers": 2, "global_head_dim": 16},
    "laguna": HALF_SLIDING,
    "lfm2": CONVOLUTIONS,
    "lfm2_moe": CONVOLUTIONS,
    "longcat_flash": {**MLA, "expert_ffn_hidden_size": 24, "zero_expert_num": 2},
    "mellum": HALF_SLIDING,
    "modernbert-decoder": {"local_attention": 2 * WINDOW},
    "roc_bert": {"pronunciation_vocab_size": 32, "shape_vocab_size": 32, "concat_input": False},
    "xmod": {"default_language": "en_XX"},
    "youtu": {**MLA, "pad_token_id": None},  # transformers zeroes its padding row when it loads weights
}


def model_types() -> list[str]:
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    return sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)


def tiny_config(model_type: str, changes: Mapping[str, Any] | None = None) -> Any:
    """transformers' config object."""
    from transformers import CONFIG_MAPPING

    kind = CONFIG_MAPPING[model_type]
    declared = {field.name for field in fields(kind)}
    values = {name: value for name, value in SIZES.items() if name in declared}
    return kind(**(values | FAMILY.get(model_type, {}) | dict(changes or {})))
