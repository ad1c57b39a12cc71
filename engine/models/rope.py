"""Rotary positions: the angles come from transformers, which knows every published way to stretch them.

Two ways depend on the longest sequence of a batch (`dynamic`, `longrope`): one tenant's length would move another's
numbers. Up to the length that the model was trained for they do not; engine/models/transformers_model.py serves them
up to there, and the engine's own decoder not at all.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from engine.errors import ConfigError

ROPE_TYPES = ("default", "linear", "llama3", "yarn")


@dataclass(frozen=True, slots=True)
class Rope:
    """``frequencies`` [head_size / 2] in radians per position, float32 numbers; ``factor`` is on both tables."""

    frequencies: tuple[float, ...]
    factor: float


def rope_of(config: Any, head_size: int) -> Rope:
    """The angles of transformers' config object. Raises ConfigError."""
    rope = config.rope_parameters or {}
    kind = rope.get("rope_type", "default")
    try:
        if kind == "default":
            exponents = torch.arange(0, head_size, 2, dtype=torch.int64).float() / head_size
            return _rope(1.0 / (float(rope.get("rope_theta", 10_000.0)) ** exponents), 1.0)
        from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

        return _rope(*ROPE_INIT_FUNCTIONS[kind](config, torch.device("cpu")))
    except (KeyError, TypeError, ValueError, ZeroDivisionError) as error:
        raise ConfigError(f"config.json lacks a usable {error} for rope type {kind!r}") from error


def rope_tables(rope: Rope, context_max: int) -> tuple[Tensor, Tensor]:
    """cos and sin float32 [context_max, head_size / 2]."""
    frequencies = torch.tensor(rope.frequencies, dtype=torch.float32)
    angles = torch.arange(context_max).float()[:, None] * frequencies[None, :]
    return angles.cos() * rope.factor, angles.sin() * rope.factor


def _rope(frequencies: Tensor, factor: float) -> Rope:
    return Rope(tuple(frequencies.float().tolist()), float(factor))
