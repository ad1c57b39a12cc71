"""A dataclass as what JSON can hold: the same fields, sets as sorted lists."""

from dataclasses import asdict
from typing import Any

Record = dict[str, Any]


def record(of: Any) -> Record:
    """``of``: a dataclass."""
    return {name: _plain(value) for name, value in asdict(of).items()}


def _plain(value: Any) -> Any:
    if isinstance(value, frozenset | set):
        return sorted(value)
    if isinstance(value, dict):
        return {name: _plain(inner) for name, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(inner) for inner in value]
    return value
