"""The launch parameters of attention: one table, read from the top, the first row that fits decides.

A row says for which GPUs, head sizes, ratios of query to key heads, block sizes and bytes of a number it holds. There
is no stopwatch at run time and no fallback: what no row fits is refused. How many rows or tokens a step has is not in
the key: prompt chunks and decode tokens get the same tile. ``block_m``, ``tile`` and ``num_warps`` are part of what a
bit is, so rows that differ in the block size alone may differ in ``num_stages`` alone (tests hold it).

Nothing here was timed, since no GPU was at hand: the rows are the largest tiles that compile without spills on all of
variants.CAPABILITIES. Whoever has a GPU adds rows above the general ones.
"""

from dataclasses import dataclass

from kernels.backend import KernelError
from kernels.gpu.launch import power_of_two


@dataclass(frozen=True, slots=True)
class AttentionShape:
    """``block_m`` query rows (a token's heads of one key head, token after token) meet ``tile`` keys at a time. The
    tile is part of what a bit is, as SPLIT is."""

    block_m: int = 64
    tile: int = 32
    num_warps: int = 4
    num_stages: int = 2


@dataclass(frozen=True, slots=True)
class Row:
    """0 fits everything. Head sizes count as the next power of two; ``query_bytes`` and ``cache_bytes`` of a number."""

    shape: AttentionShape
    capability: int = 0
    head_size_max: int = 0
    ratio_max: int = 0
    block_size: int = 0
    query_bytes: int = 0
    cache_bytes: int = 0

    def fits(
        self, capability: int, head_size: int, ratio: int, block_size: int, query_bytes: int, cache_bytes: int
    ) -> bool:
        exact = (
            (self.capability, capability),
            (self.block_size, block_size),
            (self.query_bytes, query_bytes),
            (self.cache_bytes, cache_bytes),
        )
        limits = ((self.head_size_max, power_of_two(head_size)), (self.ratio_max, ratio))
        return all(own in (0, asked) for own, asked in exact) and all(own == 0 or asked <= own for own, asked in limits)


TABLE = (
    # Two stages spill on sm_120.
    Row(AttentionShape(64, 16, 8, 1), capability=120, head_size_max=64, ratio_max=64, query_bytes=4),
    Row(AttentionShape(64, 32, 4, 1), capability=120, head_size_max=64, ratio_max=64, query_bytes=2),
    # Four warps spill where bytes become numbers first.
    Row(AttentionShape(64, 32, 8, 2), head_size_max=128, ratio_max=64, query_bytes=2, cache_bytes=1),
    Row(AttentionShape(64, 32, 4, 2), head_size_max=128, ratio_max=64, query_bytes=2),
    Row(AttentionShape(128, 32, 8, 2), head_size_max=128, ratio_max=128, query_bytes=2),
    # Registers are used up: half the tile.
    Row(AttentionShape(64, 16, 8, 2), ratio_max=64),
    Row(AttentionShape(128, 16, 8, 2), ratio_max=128),
)


def attention_shape(
    capability: int, head_size: int, ratio: int, block_size: int, query_bytes: int, cache_bytes: int
) -> AttentionShape:
    """``capability`` as in variants.CAPABILITIES, 0 interpreted; ``ratio`` query heads for each key head. Raises
    KernelError where no row fits."""
    for row in TABLE:
        if row.fits(capability, head_size, ratio, block_size, query_bytes, cache_bytes):
            return row.shape
    raise KernelError(f"attention has no launch parameters for {ratio} query heads to one key head")
