"""The Llama family in plain torch: grouped heads, rotary embedding, RMS norm, SwiGLU, and what its members add (biases,
windows, norms of queries and keys, layers without positions, Granite's four scales): see engine/models/llama_config.py.

    x = embed(tokens)
    each layer:  x = x + o(attention(rope(q), rope(k), v))   of rms_norm(x)
                 x = x + down(silu(gate) * up)                of rms_norm(x)
    logits = head(rms_norm(x))                                for the wanted tokens only

Products are in the weights' dtype; the sum x is float32 throughout, and so is the head: a bfloat16 logit near 25 has
steps of 0.125, which is wider than many a gap between the two best tokens. The queries, keys and values of a layer
are one matrix, and so are gate and up: fewer, larger products.

With exact kernels and exact products, a sequence's logits are the same bits alone and in any company;
`is_exact` says whether that holds here.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from engine.cache.kv_cache import KVCache
from engine.errors import BrokenOffError, ConfigError
from engine.events import HeadFacts
from engine.models.facts import CacheLayer
from engine.models.llama_config import LayerConfig, ModelConfig
from engine.models.rope import rope_tables
from kernels.backend import Backend
from kernels.products import NormedProduct, Product

EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"


@dataclass(frozen=True, slots=True)
class Layer:
    config: LayerConfig
    qk_norms: tuple[Tensor, Tensor] | None  # [D] each
    qkv: NormedProduct
    output: Product
    gate_up: NormedProduct  # with the activation
    down: Product

    @property
    def products(self) -> tuple[NormedProduct | Product, ...]:
        return (self.qkv, self.output, self.gate_up, self.down)


class LlamaModel:
    """Takes ``weights`` by their transformers names; raises ConfigError where one is missing or has a wrong shape."""

    def __init__(self, config: ModelConfig, weights: dict[str, Tensor], backend: Backend) -> None:
        self.config = config
        self.backend = backend
        linear, epsilon = backend.linear, config.rms_norm_epsilon
        take = _Taker(weights, backend.device)
        hidden, size = config.hidden_size, config.head_size
        q_size, kv_size = config.num_heads * size, config.num_kv_heads * size
        embedding = take(EMBEDDING, config.vocab_size, hidden)
        self.norm = take.own("model.norm.weight", hidden)
        self.dtype = embedding.dtype
        self.head = backend.head(embedding if config.tie_word_embeddings else take(HEAD, config.vocab_size, hidden))
        # Tied: the head's packed matrix holds the embeddings, too, and there is no second copy.
        self._embed = self.head.rows if config.tie_word_embeddings else partial(F.embedding, weight=embedding.clone())
        self.layers = []
        for index in range(config.num_layers):
            attention, mlp = f"model.layers.{index}.self_attn.", f"model.layers.{index}.mlp."
            q_k_v = ((f"{attention}q_proj", q_size), (f"{attention}k_proj", kv_size), (f"{attention}v_proj", kv_size))
            halves = ((f"{mlp}gate_proj", config.intermediate_size), (f"{mlp}up_proj", config.intermediate_size))
            self.layers.append(
                Layer(
                    config=config.layers[index],
                    qk_norms=(
                        (take.own(f"{attention}q_norm.weight", size), take.own(f"{attention}k_norm.weight", size))
                        if config.qk_norm
                        else None
                    ),
                    qkv=backend.normed(
                        take.own(f"model.layers.{index}.input_layernorm.weight", hidden),
                        epsilon,
                        linear(
                            torch.cat([take(f"{name}.weight", rows, hidden) for name, rows in q_k_v]),
                            take.biases(config.qkv_bias, *q_k_v),
                        ),
                    ),
                    output=linear(
                        take(f"{attention}o_proj.weight", hidden, q_size),
                        take.biases(config.output_bias, (f"{attention}o_proj", hidden)),
                    ),
                    gate_up=backend.normed(
                        take.own(f"model.layers.{index}.post_attention_layernorm.weight", hidden),
                        epsilon,
                        backend.gate_up(
                            torch.cat([take(f"{name}.weight", rows, hidden) for name, rows in halves]),
                            take.biases(config.mlp_bias, *halves),
                        ),
                    ),
                    down=linear(
                        take(f"{mlp}down_proj.weight", hidden, config.intermediate_size),
                        take.biases(config.mlp_bias, (f"{mlp}down_proj", hidden)),
                    ),
                )
            )
        take.refuse_rest()
        cos, sin = rope_tables(config.rope, config.context_max)
        self.cos, self.sin = cos.to(backend.device), sin.to(backend.device)

    @property
    def cache_layers(self) -> tuple[CacheLayer, ...]:
        return self.config.cache_layers

    @property
    def head_facts(self) -> HeadFacts:
        tensor = EMBEDDING if self.config.tie_word_embeddings else HEAD
        return HeadFacts(tensor, self.config.logits_scale, self.dtype == torch.bfloat16)

    def forward(
        self,
        token_ids: Tensor,
        positions: Tensor,
        *,
        cache: KVCache,
        plan: Any,
        wanted: Tensor,
        go_on: Callable[[float], bool] | None = None,
        show: Callable[[Tensor], None] | None = None,
    ) -> Tensor:
        """See engine/models/facts.py."""
        config, ops = self.config, self.backend
        cos, sin = self.cos[positions], self.sin[positions]
        residual: Tensor | None = None
        x = _scaled(self._embed(token_ids), config.embedding_scale)
        for index, layer in enumerate(self.layers):
            if index and go_on is not None and not go_on(index / len(self.layers)):
                ops.check(plan)  # what the kernels refused so far is not forgotten
                raise BrokenOffError(index / len(self.layers))
            key_cache, value_cache = cache.layer(index)
            qkv, residual = layer.qkv(x, residual)
            qkv = qkv.view(len(token_ids), -1, config.head_size)
            if layer.qk_norms is not None:
                self._norm_heads(qkv, *layer.qk_norms)
            attended = ops.attend(
                qkv,
                cos if layer.config.rotates else None,
                sin if layer.config.rotates else None,
                key_cache,
                value_cache,
                num_heads=config.num_heads,
                plan=plan,
                scale=config.attention_scale,
                window=layer.config.window,
            )
            x = _scaled(layer.output(attended.flatten(1)), config.residual_scale)
            x, residual = layer.gate_up(x, residual)
            x = _scaled(layer.down(x), config.residual_scale)
        ops.check(plan)
        if go_on is not None and not go_on(1.0):  # the head and the sampler are still to come
            raise BrokenOffError(1.0)
        assert residual is not None
        x, _ = ops.rms_norm(x[wanted], self.norm, config.rms_norm_epsilon, residual[wanted])
        if show is not None:
            show(x)
        return _scaled(self.head(x), config.logits_scale)

    def _norm_heads(self, qkv: Tensor, query_norm: Tensor, key_norm: Tensor) -> None:
        """RMS norm of each query and key head in place; qkv [T, Hq + 2 * Hkv, D]."""
        config = self.config
        first, last = config.num_heads, config.num_heads + config.num_kv_heads
        for heads, norm in ((qkv[:, :first], query_norm), (qkv[:, first:last], key_norm)):
            rows = heads.reshape(-1, config.head_size)
            heads.copy_(self.backend.rms_norm(rows, norm, config.rms_norm_epsilon)[0].view(heads.shape))

    def is_exact(self) -> bool:
        """Whether a row's bits depend on nothing but the row. The products are tried as well; one
        layer's stand for the others', which have the same shapes."""
        tried = (*self.layers[0].products, self.head)
        return self.backend.exact and all(product.is_exact() for product in tried)


def _scaled(x: Tensor, scale: float) -> Tensor:
    return x if scale == 1.0 else x * scale


class _Taker:
    """Takes weights by name and checks shapes; what is left over at the end is an error, not a surprise."""

    def __init__(self, weights: dict[str, Tensor], device: torch.device) -> None:
        self._weights, self._device = dict(weights), device

    def __call__(self, name: str, *shape: int) -> Tensor:
        tensor = self._weights.pop(name, None)
        if tensor is None:
            raise ConfigError(f"the weights lack {name}")
        if tuple(tensor.shape) != shape:
            raise ConfigError(f"the weight {name} has shape {tuple(tensor.shape)}, config.json wants {shape}")
        return tensor.to(self._device)

    def own(self, name: str, *shape: int) -> Tensor:
        """A copy: whatever looks into a file keeps all of the file in memory, beside the packed matrices."""
        return self(name, *shape).clone()

    def biases(self, present: bool, *names: tuple[str, int]) -> Tensor | None:
        return torch.cat([self(f"{name}.bias", rows) for name, rows in names]) if present else None

    def refuse_rest(self) -> None:
        stored_twice = {HEAD}  # by some writers when tied
        computed = {name for name in self._weights if name.endswith("rotary_emb.inv_freq")}  # by writers before 2023
        rest = sorted(set(self._weights) - stored_twice - computed)
        if rest:
            raise ConfigError(f"the weights hold what this model code does not use: {', '.join(rest[:3])}")
