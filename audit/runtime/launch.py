"""What a launch was given, by the arrays that the kernels held, and what it gave besides tokens.

The auditor approves arrays before a launch. After it, whatever the kernels held is compared with a copy of what was
approved: arrays that changed in between, or others that were launched in their place, show before anything leaves.
"""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

PADDING_SLOT = -(2**62)  # where a token that only fills up a batch is written: nowhere
Finding = tuple[int, str]  # row, which array; row -1: no row can be named


class Logprob(NamedTuple):
    """A token's log probability and the likeliest tokens', as a launch gave them or as they leave."""

    token_id: int
    logprob: float
    top: tuple[tuple[int, float], ...] = ()
    rank: int = 0


class KernelArrays(NamedTuple):
    """T tokens in R rows, S of which sample; W places whose logits are wanted: of the rows that sample, then of the
    scored tokens."""

    token_ids: Any  # [T]
    positions: Any  # [T]
    wanted: Any  # [W]
    sampled_positions: Any  # [S]
    sampled_rows: Any  # [S] stable row of each
    cu_seqlens: Any  # [R+1]
    kv_lens: Any  # [R]
    block_tables: Any  # [R, B]
    slot_mapping: Any  # [T]

    def copy(self) -> "KernelArrays":
        return KernelArrays(*(np.array(array) for array in self))


class Head(NamedTuple):
    """What the head was given and, of each of the W places, the logit of the token that was drawn or scored there, as
    whoever drew or scored it had read it."""

    hidden: Any  # [W, K] float32, or uint16 which is bfloat16
    logits: Any  # float32 [W]


class Launch(NamedTuple):
    """``logprobs``: by the place among the rows that sample; ``scores``: of prompt tokens, by row, None where the
    numbers broke. ``arrays``, ``head`` None: nobody told."""

    arrays: KernelArrays | None = None
    logprobs: Mapping[int, Logprob] = {}
    scores: Mapping[int, Sequence[Logprob] | None] = {}
    head: Head | None = None


def array_problems(approved: KernelArrays, launched: KernelArrays) -> list[Finding]:
    """Every row for which the kernels held other numbers than approved. Rows that fill up a batch may follow."""
    found: list[Finding] = []
    launched, has_strange_rows = _without_padding(approved, launched)
    if has_strange_rows:
        found.append((-1, "rows behind the last"))
    for name, before, after in zip(KernelArrays._fields, approved, launched, strict=True):
        now = np.asarray(after)
        if before.shape != now.shape:
            found.append((-1, name))
        elif not np.array_equal(before, now):
            at = np.unique(np.nonzero(before != now)[0])
            if name == "cu_seqlens":
                rows = np.unique(np.concatenate((at, at - 1)))
            elif name in ("kv_lens", "block_tables"):
                rows = at
            else:
                tokens = at if name in ("token_ids", "positions", "slot_mapping") else approved.wanted[at]
                rows = np.unique(np.searchsorted(approved.cu_seqlens, tokens, side="right") - 1)
            num_rows = len(approved.kv_lens)
            found += ((int(row), name) for row in rows if 0 <= row < num_rows)
    return found


def _without_padding(approved: KernelArrays, launched: KernelArrays) -> tuple[KernelArrays, bool]:
    """What was launched for the rows that were approved, and whether the rows behind them are anything else than
    padding: one token each that is written nowhere, no key, no block."""
    num_rows, num_tokens = len(approved.kv_lens), len(approved.slot_mapping)
    num_added = len(launched.kv_lens) - num_rows
    if num_added <= 0:
        return launched, False
    arrays = KernelArrays(*(np.asarray(array) for array in launched))
    is_padding = (
        len(arrays.slot_mapping) == len(arrays.token_ids) == num_tokens + num_added
        and (arrays.slot_mapping[num_tokens:] == PADDING_SLOT).all()
        and (arrays.kv_lens[num_rows:] == 0).all()
        and (arrays.block_tables[num_rows:] == -1).all()
        and (np.diff(arrays.cu_seqlens[num_rows:]) == 1).all()
    )
    own = {name: getattr(arrays, name)[:num_tokens] for name in ("token_ids", "positions", "slot_mapping")}
    own |= {name: getattr(arrays, name)[:num_rows] for name in ("kv_lens", "block_tables")}
    return arrays._replace(**own, cu_seqlens=arrays.cu_seqlens[: num_rows + 1]), not is_padding
