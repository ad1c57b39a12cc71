"""What the engine asks of a model, whichever code computes it."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor

from engine.events import HeadFacts
from kernels.backend import Backend

if TYPE_CHECKING:
    from engine.cache.kv_cache import KVCache


@dataclass(frozen=True, slots=True)
class CacheLayer:
    """What one layer keeps of a token: a key and a value of [num_kv_heads, head_size]."""

    num_kv_heads: int
    head_size: int


class Facts(Protocol):
    """What admission needs to know."""

    @property
    def context_max(self) -> int:
        """Positions that the model was made for, in tokens."""

    @property
    def vocab_size(self) -> int: ...


class Model(Protocol):
    backend: Backend
    dtype: torch.dtype

    @property
    def config(self) -> Facts: ...

    @property
    def cache_layers(self) -> tuple[CacheLayer, ...]: ...

    @property
    def head_facts(self) -> HeadFacts | None:
        """None where ``forward`` does not tell what its head is given."""
        ...

    def forward(
        self,
        token_ids: Tensor,
        positions: Tensor,
        *,
        cache: "KVCache",
        plan: Any,
        wanted: Tensor,
        go_on: Callable[[float], bool] | None = None,
        show: Callable[[Tensor], None] | None = None,
    ) -> Tensor:
        """token_ids, positions int64 [T], the backend's plan, wanted int64 [S] -> logits float32 [S, V].

        Fills the cache. Raises OwnershipError where a kernel met a block that is not its row's. Before each layer but
        the first, ``go_on`` is told the share of the layers that are computed; BrokenOffError where it says no.
        ``show`` is given what the head multiplies, [S, K]: it must leave it as it is.
        """
        ...

    def is_exact(self) -> bool:
        """Whether a sequence's bits are the same alone and in any company. False: isolation is relaxed."""
        ...


Log = Callable[[str], None]
