"""Which models the engine's own decoder computes, and their numbers, read from config.json.

transformers' config classes fill in what a config.json leaves out, for they are what its writers relied on: a Mistral
without `sliding_window` has one of 4096 tokens. Every field of such a class is either honoured here or has no say in
inference (``NO_EFFECT``); a test holds the two lists against the classes, so that a new field cannot slip by.
"""

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

from engine.errors import ConfigError
from engine.models.config_process import Values, read_apart
from engine.models.facts import CacheLayer
from engine.models.rope import ROPE_TYPES, Rope, rope_of

ARCHITECTURES = {
    "LlamaForCausalLM": "llama",
    "MistralForCausalLM": "mistral",
    "MinistralForCausalLM": "ministral",
    "Qwen2ForCausalLM": "qwen2",
    "Qwen3ForCausalLM": "qwen3",
    "SmolLM3ForCausalLM": "smollm3",
    "SeedOssForCausalLM": "seed_oss",
    "GraniteForCausalLM": "granite",
}
HONOURED = frozenset(
    [
        "vocab_size",
        "hidden_size",
        "intermediate_size",
        "num_hidden_layers",
        "num_attention_heads",
        "num_key_value_heads",
        "head_dim",
        "hidden_act",
        "max_position_embeddings",
        "rms_norm_eps",
        "tie_word_embeddings",
        "rope_parameters",
        "attention_bias",
        "attention_out_bias",
        "mlp_bias",
        "sliding_window",
        "layer_types",
        "no_rope_layers",
        "embedding_multiplier",
        "residual_multiplier",
        "attention_multiplier",
        "logits_scaling",
        "architectures",
        "quantization_config",
    ]
)
# Training, generation and bookkeeping; the three last are folded into layer_types and no_rope_layers by their class.
NO_EFFECT = frozenset(
    [
        "initializer_range",
        "use_cache",
        "pad_token_id",
        "bos_token_id",
        "eos_token_id",
        "attention_dropout",
        "residual_dropout",
        "pretraining_tp",
        "transformers_version",
        "output_hidden_states",
        "output_attentions",
        "return_dict",
        "dtype",
        "chunk_size_feed_forward",
        "is_encoder_decoder",
        "id2label",
        "label2id",
        "problem_type",
        "use_sliding_window",
        "max_window_layers",
        "no_rope_layer_interval",
    ]
)
NEVER_DROPPED = ("sliding_window", "attn_logit_softcapping", "final_logit_softcapping", "attention_chunk_size")

READ = HONOURED | set(NEVER_DROPPED)


class NotOurs(ConfigError):
    """The engine's own decoder cannot honour this config; transformers' code may."""


@dataclass(frozen=True, slots=True)
class LayerConfig:
    window: int  # tokens; 0: sees everything before it
    rotates: bool  # False: no positions in this layer


@dataclass(frozen=True, slots=True)
class ModelConfig:
    hidden_size: int
    intermediate_size: int
    layers: tuple[LayerConfig, ...]
    num_heads: int
    num_kv_heads: int
    head_size: int
    vocab_size: int
    context_max: int
    rms_norm_epsilon: float
    rope: Rope
    tie_word_embeddings: bool
    qkv_bias: bool
    output_bias: bool
    mlp_bias: bool
    qk_norm: bool  # an RMS norm over each query and key head, before rope
    attention_scale: float
    embedding_scale: float
    residual_scale: float
    logits_scale: float

    @property
    def num_layers(self) -> int:
        return len(self.layers)

    @property
    def cache_layers(self) -> tuple[CacheLayer, ...]:
        return (CacheLayer(self.num_kv_heads, self.head_size),) * self.num_layers

    @property
    def needs(self) -> frozenset[str]:
        """What its attention wants beyond scores and a mask: of window, soft_cap, sinks and rotated."""
        needed = {"window": any(layer.window for layer in self.layers)}
        needed["rotated"] = not all(layer.rotates for layer in self.layers)
        return frozenset(name for name, is_needed in needed.items() if is_needed)

    @classmethod
    def from_json(cls, config: Mapping[str, Any]) -> "ModelConfig":
        """From a config.json. Raises NotOurs, or ConfigError on what nobody here can serve."""
        architectures = config.get("architectures") or []
        known = [name for name in architectures if name in ARCHITECTURES]
        if not known:
            raise NotOurs(f"the engine's own decoder does not know {architectures}")
        if config.get("quantization_config"):
            raise ConfigError("cannot serve quantised weights: convert them to bfloat16 first")
        values = read_config(ARCHITECTURES[known[0]], config)
        try:
            return cls._from_values(known[0], values)
        except (AttributeError, TypeError, ValueError, ZeroDivisionError) as error:
            raise ConfigError(f"config.json is not usable: {error}") from error

    @classmethod
    def _from_values(cls, architecture: str, values: Any) -> "ModelConfig":
        if values.hidden_act != "silu":
            raise NotOurs(f"the engine's own decoder knows hidden_act 'silu', not {values.hidden_act!r}")
        rope = dict(values.rope_parameters or {})
        if rope.get("rope_type", "default") not in ROPE_TYPES or rope.get("partial_rotary_factor", 1.0) != 1.0:
            raise NotOurs(f"the engine's own decoder knows whole-head rope of {', '.join(ROPE_TYPES)}, not {rope}")
        for name in NEVER_DROPPED:
            if getattr(values, name, None) and name not in _declared(values):
                raise ConfigError(f"config.json has {name}, which {architecture} does not know: remove one of the two")
        num_heads = int(values.num_attention_heads)
        head_size = int(getattr(values, "head_dim", None) or values.hidden_size // num_heads)
        attention_bias = bool(getattr(values, "attention_bias", False))
        return cls(
            hidden_size=int(values.hidden_size),
            intermediate_size=int(values.intermediate_size),
            layers=_layers(values),
            num_heads=num_heads,
            num_kv_heads=int(values.num_key_value_heads or num_heads),
            head_size=head_size,
            vocab_size=int(values.vocab_size),
            context_max=int(values.max_position_embeddings),
            rms_norm_epsilon=float(values.rms_norm_eps),
            rope=rope_of(values, head_size),
            tie_word_embeddings=bool(values.tie_word_embeddings),
            qkv_bias=attention_bias or architecture == "Qwen2ForCausalLM",
            output_bias=bool(getattr(values, "attention_out_bias", attention_bias)),
            mlp_bias=bool(getattr(values, "mlp_bias", False)),
            qk_norm=architecture == "Qwen3ForCausalLM",
            attention_scale=float(getattr(values, "attention_multiplier", head_size**-0.5)),
            embedding_scale=float(getattr(values, "embedding_multiplier", 1.0)),
            residual_scale=float(getattr(values, "residual_multiplier", 1.0)),
            logits_scale=1.0 / float(getattr(values, "logits_scaling", 1.0)),
        )


def read_config(model_type: str, config: Mapping[str, Any]) -> Any:
    """What transformers' class makes of a config.json, defaults filled in. Raises ConfigError where it refuses."""
    rest = {name: value for name, value in config.items() if name not in ("model_type", "auto_map")}
    values = read_apart(model_type, rest, READ)
    if values is not None:
        return values
    from transformers import CONFIG_MAPPING

    try:
        return CONFIG_MAPPING[model_type](**rest)
    except Exception as error:  # its validators raise many types
        raise ConfigError(f"config.json is not usable: {' '.join(str(error).split())}") from error


def _layers(values: Any) -> tuple[LayerConfig, ...]:
    num_layers = int(values.num_hidden_layers)
    window = int(getattr(values, "sliding_window", None) or 0)
    types = getattr(values, "layer_types", None) if "layer_types" in _declared(values) else None
    types = types or ["sliding_attention" if window else "full_attention"] * num_layers
    rotates = getattr(values, "no_rope_layers", None) or [1] * num_layers  # transformers' name; 1 means: has rope
    unknown = set(types) - {"sliding_attention", "full_attention"}
    if unknown or len(types) != num_layers or len(rotates) != num_layers:
        raise NotOurs(f"the engine's own decoder cannot read layer_types {types} for {num_layers} layers")
    if "sliding_attention" in types and window < 1:
        raise ConfigError("config.json has layers of sliding_attention and no sliding_window")
    pairs = zip(types, rotates, strict=True)
    return tuple(LayerConfig(window if kind == "sliding_attention" else 0, bool(rope)) for kind, rope in pairs)


def _declared(values: Any) -> frozenset[str]:
    return values.declared if isinstance(values, Values) else frozenset(field.name for field in fields(type(values)))
