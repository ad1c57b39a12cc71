"""The Llama family in plain torch, driven by config.json: grouped heads, rotary embedding, RMS norm, SwiGLU, optional
biases.

    x = embed(tokens)
    each layer:  x = x + o(attention(rope(q), rope(k), v))   of rms_norm(x)
                 x = x + down(silu(gate) * up)                of rms_norm(x)
    logits = head(rms_norm(x))                                for the wanted tokens only

Products are in the weights' dtype; the sum x is float32 throughout, and so is the head: a bfloat16 logit near 25 has
steps of 0.125, which is wider than many a gap between the two best tokens. The queries, keys and values of a layer
are one matrix, and so are gate and up: fewer, larger products. What is not understood in a config is refused, never
ignored.

With exact kernels and products in slabs of fixed size, a sequence's logits are the same bits alone and in any company;
`exact` says whether that holds here.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from engine.errors import ConfigError
from engine.kv_cache import KVCache
from kernels.backend import Backend
from kernels.slabs import SlabLinear

ARCHITECTURES = ("LlamaForCausalLM",)


@dataclass(frozen=True, slots=True)
class ModelConfig:
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_size: int
    vocab_size: int
    context_max: int
    rms_norm_epsilon: float
    rope: Mapping[str, Any]  # rope_type, rope_theta and the type's own numbers
    tie_word_embeddings: bool
    attention_bias: bool
    mlp_bias: bool

    @classmethod
    def from_json(cls, config: Mapping[str, Any]) -> "ModelConfig":
        """From a transformers config.json. Raises ConfigError on what this model code cannot honour."""
        architectures = config.get("architectures") or []
        if not any(name in ARCHITECTURES for name in architectures):
            raise ConfigError(f"cannot serve {architectures}: the engine knows {', '.join(ARCHITECTURES)}")
        if config.get("hidden_act", "silu") != "silu":
            raise ConfigError(f"cannot serve hidden_act {config['hidden_act']!r}: only 'silu'")
        if config.get("quantization_config"):
            raise ConfigError("cannot serve quantised weights: convert them to bfloat16 first")
        try:
            num_heads = int(config["num_attention_heads"])
            rope = dict(config.get("rope_parameters") or config.get("rope_scaling") or {})
            rope.setdefault("rope_theta", config.get("rope_theta", 10_000.0))
            rope.setdefault("rope_type", rope.pop("type", "default"))
            return cls(
                hidden_size=int(config["hidden_size"]),
                intermediate_size=int(config["intermediate_size"]),
                num_layers=int(config["num_hidden_layers"]),
                num_heads=num_heads,
                num_kv_heads=int(config.get("num_key_value_heads") or num_heads),
                head_size=int(config.get("head_dim") or config["hidden_size"] // num_heads),
                vocab_size=int(config["vocab_size"]),
                context_max=int(config["max_position_embeddings"]),
                rms_norm_epsilon=float(config["rms_norm_eps"]),
                rope=rope,
                tie_word_embeddings=bool(config.get("tie_word_embeddings", False)),
                attention_bias=bool(config.get("attention_bias", False)),
                mlp_bias=bool(config.get("mlp_bias", False)),
            )
        except (KeyError, TypeError, ValueError) as error:
            raise ConfigError(f"config.json lacks a usable {error}") from error


def inverse_frequencies(config: ModelConfig) -> Tensor:
    """float32 [D/2] in radians per position. Knows rope types default, linear and llama3; raises ConfigError
    otherwise."""
    rope, size = config.rope, config.head_size
    exponents = torch.arange(0, size, 2, dtype=torch.int64).float() / size
    frequencies = 1.0 / (float(rope["rope_theta"]) ** exponents)
    match rope["rope_type"]:
        case "default":
            return frequencies
        case "linear":
            return frequencies / float(rope["factor"])
        case "llama3":
            low, high = float(rope["low_freq_factor"]), float(rope["high_freq_factor"])
            turns = float(rope["original_max_position_embeddings"]) * frequencies / (2 * math.pi)
            smooth = ((turns - low) / (high - low)).clamp(0.0, 1.0)
            return (1 - smooth) * frequencies / float(rope["factor"]) + smooth * frequencies
        case other:
            raise ConfigError(f"cannot serve rope type {other!r}: the engine knows default, linear and llama3")


Linear = Callable[[Tensor], Tensor]


@dataclass(frozen=True, slots=True)
class Layer:
    input_norm: Tensor
    qkv: Linear
    output: Linear
    mlp_norm: Tensor
    gate_up: Linear
    down: Linear

    @property
    def linears(self) -> tuple[Linear, ...]:
        return (self.qkv, self.output, self.gate_up, self.down)


class LlamaModel:
    """Takes ``weights`` by their transformers names; raises ConfigError where one is missing or has a wrong shape."""

    def __init__(self, config: ModelConfig, weights: dict[str, Tensor], backend: Backend) -> None:
        self.config = config
        self.backend = backend
        linear = SlabLinear if backend.exact else _plain_linear
        take = _Taker(weights)
        hidden, size = config.hidden_size, config.head_size
        q_size, kv_size = config.num_heads * size, config.num_kv_heads * size
        self.embedding = take("model.embed_tokens.weight", config.vocab_size, hidden)
        self.norm = take("model.norm.weight", hidden)
        head = self.embedding if config.tie_word_embeddings else take("lm_head.weight", config.vocab_size, hidden)
        self.head = linear(head.float())
        self.dtype = self.embedding.dtype
        self.layers = []
        for index in range(config.num_layers):
            attention, mlp = f"model.layers.{index}.self_attn.", f"model.layers.{index}.mlp."
            q_k_v = ((f"{attention}q_proj", q_size), (f"{attention}k_proj", kv_size), (f"{attention}v_proj", kv_size))
            halves = ((f"{mlp}gate_proj", config.intermediate_size), (f"{mlp}up_proj", config.intermediate_size))
            self.layers.append(
                Layer(
                    input_norm=take(f"model.layers.{index}.input_layernorm.weight", hidden),
                    qkv=linear(
                        torch.cat([take(f"{name}.weight", rows, hidden) for name, rows in q_k_v]),
                        take.biases(config.attention_bias, *q_k_v),
                    ),
                    output=linear(
                        take(f"{attention}o_proj.weight", hidden, q_size),
                        take.biases(config.attention_bias, (f"{attention}o_proj", hidden)),
                    ),
                    mlp_norm=take(f"model.layers.{index}.post_attention_layernorm.weight", hidden),
                    gate_up=linear(
                        torch.cat([take(f"{name}.weight", rows, hidden) for name, rows in halves]),
                        take.biases(config.mlp_bias, *halves),
                    ),
                    down=linear(
                        take(f"{mlp}down_proj.weight", hidden, config.intermediate_size),
                        take.biases(config.mlp_bias, (f"{mlp}down_proj", hidden)),
                    ),
                )
            )
        take.refuse_rest()
        angles = torch.arange(config.context_max).float()[:, None] * inverse_frequencies(config)[None, :]
        self.cos, self.sin = angles.cos(), angles.sin()

    def forward(
        self,
        token_ids: Tensor,
        positions: Tensor,
        *,
        cache: KVCache,
        plan: Any,
        wanted: Tensor,
    ) -> Tensor:
        """token_ids, positions int64 [T], the backend's plan, wanted int64 [S] -> logits float32 [S, V].

        Fills the cache. Raises OwnershipError where a kernel met a block that is not its row's.
        """
        config = self.config
        epsilon, scale = config.rms_norm_epsilon, config.head_size**-0.5
        ops = self.backend
        cos, sin = self.cos[positions], self.sin[positions]
        residual: Tensor | None = None
        x = F.embedding(token_ids, self.embedding)
        for index, layer in enumerate(self.layers):
            key_cache, value_cache = cache.layer(index)
            x, residual = ops.rms_norm(x, layer.input_norm, epsilon, residual)
            qkv = layer.qkv(x).view(len(token_ids), -1, config.head_size)
            attended = ops.attend(
                qkv, cos, sin, key_cache, value_cache, num_heads=config.num_heads, plan=plan, scale=scale
            )
            x, residual = ops.rms_norm(layer.output(attended.flatten(1)), layer.mlp_norm, epsilon, residual)
            x = layer.down(ops.silu_and_mul(layer.gate_up(x)))
        ops.check(plan)
        assert residual is not None
        x, _ = ops.rms_norm(x[wanted], self.norm, epsilon, residual[wanted])
        return self.head(x.float())

    def is_exact(self) -> bool:
        """Whether a row's bits depend on nothing but the row. The products are tried: their library does not promise
        it; one layer's stand for the others', which have the same shapes."""
        tried = (*self.layers[0].linears, self.head)
        return self.backend.exact and all(isinstance(linear, SlabLinear) and linear.is_exact() for linear in tried)


def _plain_linear(weight: Tensor, bias: Tensor | None = None) -> Linear:
    return lambda x: F.linear(x, weight, bias)


class _Taker:
    """Takes weights by name and checks shapes; what is left over at the end is an error, not a surprise."""

    def __init__(self, weights: dict[str, Tensor]) -> None:
        self._weights = dict(weights)

    def __call__(self, name: str, *shape: int) -> Tensor:
        tensor = self._weights.pop(name, None)
        if tensor is None:
            raise ConfigError(f"the weights lack {name}")
        if tuple(tensor.shape) != shape:
            raise ConfigError(f"the weight {name} has shape {tuple(tensor.shape)}, config.json wants {shape}")
        return tensor

    def biases(self, present: bool, *names: tuple[str, int]) -> Tensor | None:
        return torch.cat([self(f"{name}.bias", rows) for name, rows in names]) if present else None

    def refuse_rest(self) -> None:
        rest = sorted(set(self._weights) - {"lm_head.weight"})  # stored twice by some writers when tied
        if rest:
            raise ConfigError(f"the weights hold what this model code does not use: {', '.join(rest[:3])}")
