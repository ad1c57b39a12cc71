"""Query strings as OpenAI's client writes them: ``name[]=a&name[]=b`` for lists, ``name[part]=1`` for objects."""

from collections.abc import Collection

from starlette.datastructures import QueryParams

from gateway.api.problems import InvalidRequestError

LIST_ITEMS_MAX = 100
TEXT_CHARS_MAX = 256
SECONDS_MAX = 2**33  # in the year 2242


class Query:
    """What was asked for, each name once. Raises InvalidRequestError for what is malformed or not understood."""

    def __init__(self, params: QueryParams) -> None:
        self._left = list(params.multi_items())

    def text(self, name: str, choices: Collection[str] = ()) -> str:
        """ "" where it is not there."""
        values = self._take(name)
        if len(values) > 1:
            raise InvalidRequestError(f"{name} is given {len(values)} times", name)
        value = values[0] if values else ""
        if len(value) > TEXT_CHARS_MAX or (value and choices and value not in choices):
            raise InvalidRequestError(f"{name} must be one of {', '.join(choices)}" if choices else "too long", name)
        return value

    def number(self, name: str, default: int, least: int, most: int) -> int:
        value = self.text(name)
        if not value:
            return default
        if not (value.isascii() and value.isdigit() and least <= int(value) <= most):
            raise InvalidRequestError(f"{name} must be a whole number from {least} to {most}", name)
        return int(value)

    def texts(self, name: str, choices: Collection[str] = ()) -> tuple[str, ...]:
        """Of a list; empty where it is not there."""
        values = self._take(name) + self._take(f"{name}[]")
        if len(values) > LIST_ITEMS_MAX or any(len(value) > TEXT_CHARS_MAX for value in values):
            raise InvalidRequestError(f"{name} has too many or too long items", name)
        if choices and (unknown := sorted(set(values) - set(choices))):
            raise InvalidRequestError(f"{name} may hold {', '.join(choices)}, not {unknown[0]!r}", name)
        return tuple(values)

    def end(self) -> None:
        """Nothing else may be there: a filter that is not understood must not be taken for one that was applied."""
        if self._left:
            name = self._left[0][0]
            raise InvalidRequestError(f"{name[:TEXT_CHARS_MAX]} is not supported here", name[:TEXT_CHARS_MAX])

    def _take(self, name: str) -> list[str]:
        values = [value for key, value in self._left if key == name]
        self._left = [(key, value) for key, value in self._left if key != name]
        return values
