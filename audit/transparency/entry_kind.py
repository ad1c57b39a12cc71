"""What a kind of log entry is: a name, a version and typed fields."""

from dataclasses import dataclass
from typing import Literal

FieldType = Literal["str", "int", "bool", "list[str]"]
SAFE_INT_MAX = 2**53 - 1  # the largest number that every JSON reader keeps exactly


@dataclass(frozen=True, slots=True)
class Field:
    name: str
    type: FieldType
    minimum: int = 0  # for int
    choices: tuple[str, ...] = ()  # for str; empty: any text


@dataclass(frozen=True, slots=True)
class Kind:
    name: str
    version: int
    description: str
    fields: tuple[Field, ...]


def texts(*names: str) -> tuple[Field, ...]:
    return tuple(Field(name, "str") for name in names)


def counts(*names: str, minimum: int = 0) -> tuple[Field, ...]:
    return tuple(Field(name, "int", minimum) for name in names)
