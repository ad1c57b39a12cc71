"""Paged attention for transformers' models: the function that they call in place of their own.

transformers hands each attention call to a function chosen by name and builds no mask for a name that has registered
none (masking_utils): which token sees which is then decided here alone, from the step's block tables. Calls are told
apart by their order within a forward pass, which is the same in every pass: the n-th call owns the n-th layer of the
cache. Passes without a cache (`Pages.probe`) learn each call's shapes and rules beforehand; what a call asks and we
cannot honour is refused there, by name, and so is a call that later differs from its first.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from engine.cache.kv_cache import KVCache
from engine.errors import BrokenOffError, ConfigError
from engine.models.facts import CacheLayer
from kernels.backend import Backend

NAME = "bulkhead_paged"
ATTRIBUTE = "bulkhead_pages"  # where a model's modules find its Pages

# Arguments without a say in what a token sees: bookkeeping, or what this file reads by itself.
NO_SAY = frozenset(
    [
        "dropout",
        "is_causal",
        "scaling",
        "sliding_window",
        "softcap",
        "s_aux",
        "position_ids",
        "cache_position",
        "use_cache",
        "output_attentions",
        "output_hidden_states",
        "output_router_logits",
        "return_dict",
        "deterministic",
        "position_embeddings",
        "past_key_values",
        "logits_to_keep",
        "layer_idx",
        "training",
    ]
)


class Unfit(ConfigError):
    """The model asks of attention what paged attention does not do."""


@dataclass(frozen=True, slots=True)
class Call:
    """What one attention call of a forward pass does."""

    num_heads: int
    num_kv_heads: int
    key_size: int
    value_size: int
    scale: float
    window: int
    soft_cap: float
    has_sinks: bool

    @property
    def cache_layer(self) -> CacheLayer:
        """Keys and values share one size, an even one: the shorter is padded with zeros."""
        size = max(self.key_size, self.value_size)
        return CacheLayer(self.num_kv_heads, size + size % 2)

    @property
    def needs(self) -> frozenset[str]:
        """What its attention wants beyond scores and a mask: of window, soft_cap, sinks and rotated."""
        needed = {"window": self.window > 0, "soft_cap": self.soft_cap > 0, "sinks": self.has_sinks, "rotated": True}
        return frozenset(name for name, is_needed in needed.items() if is_needed)


@dataclass(slots=True)
class Step:
    cache: KVCache
    plan: Any
    backend: Backend
    go_on: Callable[[float], bool] | None = None


@dataclass(slots=True)
class Pages:
    """One model's calls, and the step that it is in. A call's ``window`` may be filled in from outside."""

    calls: list[Call] = field(default_factory=list)
    _probed: list[tuple[Call, Tensor]] | None = None
    _step: Step | None = None
    _next: int = 0

    def attach(self, model: nn.Module) -> None:
        for module in model.modules():
            setattr(module, ATTRIBUTE, self)

    @contextmanager
    def probe(self) -> Iterator[list[tuple[Call, Tensor]]]:
        """Collect the calls of the forward pass inside, and what each token brings to them [T, elements]; attention
        gives zeros there."""
        self._probed = []
        try:
            yield self._probed
        finally:
            self._probed = None

    @contextmanager
    def step(
        self, cache: KVCache, plan: Any, backend: Backend, go_on: Callable[[float], bool] | None = None
    ) -> Iterator[None]:
        """Let the forward pass inside attend to its own blocks. ``go_on``: see engine/models/facts.py."""
        self._step, self._next = Step(cache, plan, backend, go_on), 0
        try:
            yield
        finally:
            self._step = None
        if self._next != len(self.calls):
            raise RuntimeError(f"{self._next} attention calls in a pass that has {len(self.calls)}")

    def attend(self, module: nn.Module, query: Tensor, key: Tensor, value: Tensor, rules: dict[str, Any]) -> Tensor:
        """query [1, Hq, T, D], key [1, Hkv, T, D], value [1, Hkv, T, Dv] -> [1, T, Hq, Dv]."""
        call, sinks = read_call(module, query, key, value, rules)
        num_tokens = query.shape[2]
        if self._probed is not None:
            brought = [part[0].transpose(0, 1).flatten(1).float() for part in (query, key, value)]
            self._probed.append((call, torch.cat(brought, dim=1)))
            return value.new_zeros((1, num_tokens, call.num_heads, call.value_size))
        assert self._step is not None, "attention outside of a step"
        expected = self.calls[self._next] if self._next < len(self.calls) else None
        if expected is None or replace(call, window=call.window or expected.window) != expected:
            raise RuntimeError(f"attention call {self._next} is not what it was at the start: {call}")
        share = self._next / len(self.calls)
        if share and self._step.go_on is not None and not self._step.go_on(share):
            self._step.backend.check(self._step.plan)  # what the kernels refused so far is not forgotten
            raise BrokenOffError(share)
        key_cache, value_cache = self._step.cache.layer(self._next)
        self._next += 1
        values_from = call.num_heads + call.num_kv_heads
        size = key_cache.shape[-1]
        fits = call.key_size == call.value_size == size
        make = torch.empty if fits else torch.zeros
        qkv = make((num_tokens, values_from + call.num_kv_heads, size), dtype=key_cache.dtype)
        qkv[:, : call.num_heads, : call.key_size] = query[0].transpose(0, 1)
        qkv[:, call.num_heads : values_from, : call.key_size] = key[0].transpose(0, 1)
        qkv[:, values_from:, : call.value_size] = value[0].transpose(0, 1)
        attended = self._step.backend.attend(
            qkv,
            None,
            None,
            key_cache,
            value_cache,
            num_heads=call.num_heads,
            plan=self._step.plan,
            scale=call.scale,
            window=expected.window,
            soft_cap=call.soft_cap,
            sinks=sinks,
        )
        return attended[None, ..., : call.value_size].to(value.dtype)


def read_call(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, rules: dict[str, Any]
) -> tuple[Call, Tensor | None]:
    """A call's shapes and rules, and its sinks float32 [Hq]. Raises Unfit on a rule that would be dropped."""
    for name, given in rules.items():
        if name not in NO_SAY and given is not None:
            raise Unfit(f"its attention wants {name}")
    if not rules.get("is_causal", getattr(module, "is_causal", True)):
        raise Unfit("its attention looks ahead")
    if not (query.shape[0] == key.shape[0] == 1 and query.shape[2] == key.shape[2] == value.shape[2]):
        raise Unfit("its attention reads keys other than those of this step's tokens")
    if query.shape[1] % key.shape[1] or key.shape[1] != value.shape[1] or query.shape[3] != key.shape[3]:
        raise Unfit("its heads do not divide into groups")
    sinks = rules.get("s_aux")
    scale = rules.get("scaling")
    call = Call(
        num_heads=query.shape[1],
        num_kv_heads=key.shape[1],
        key_size=key.shape[3],
        value_size=value.shape[3],
        scale=float(query.shape[3] ** -0.5 if scale is None else scale),
        window=int(rules.get("sliding_window") or 0),
        soft_cap=float(rules.get("softcap") or 0.0),
        has_sinks=sinks is not None,
    )
    if sinks is None:
        return call, None
    if sinks.numel() != call.num_heads:
        raise Unfit("its sinks are not one for each head")
    return call, sinks.detach().float().flatten().contiguous()


def paged_attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **rules: Any
) -> tuple[Tensor, None]:
    """transformers' attention function (modeling_utils.AttentionInterface)."""
    if attention_mask is not None:
        raise Unfit("its attention brings a mask of its own")
    pages: Pages = getattr(module, ATTRIBUTE)
    return pages.attend(module, query, key, value, rules), None


def register() -> None:
    """Make the function known to transformers under NAME. It may be called again."""
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    ALL_ATTENTION_FUNCTIONS.register(NAME, paged_attention)
