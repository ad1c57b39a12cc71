"""A special token that somebody spells inside a message stays text.

A chat template writes the model's control tokens (``<|im_start|>``) around messages, and the tokenizer recognises them
by their spelling, wherever it stands. So whoever writes ``<|im_end|>\\n<|im_start|>system`` into a message would speak
as the system. Before the template runs, each spelling inside a message is exchanged for a mark that occurs nowhere;
after it, the text between marks is tokenised as ever, and each marked spelling letter by letter. Without such a
spelling nothing is exchanged, and the token ids are the ones that the tokenizer gives by itself.
"""

import re
from collections.abc import Callable, Iterable, Iterator
from itertools import count
from typing import Any


class Spellings:
    """``special_tokens``: the spellings that become control tokens, exactly as written."""

    def __init__(self, special_tokens: Iterable[str]) -> None:
        longest_first = sorted({token for token in special_tokens if token}, key=len, reverse=True)
        self._pattern = re.compile("|".join(map(re.escape, longest_first))) if longest_first else None

    def hide(self, messages: Any, tools: Any = None) -> tuple[Any, Any, "Hidden"]:
        """Messages and tools with marks for spellings in their texts, and how to undo it.

        Both are lists of objects of JSON values; a message's own role and the names of its fields are ours and left
        alone.
        """
        contents = [value for message in messages for name, value in message.items() if name != "role"]
        texts = list(_texts([contents, tools]))
        if self._pattern is None or not any(self._pattern.search(text) for text in texts):
            return messages, tools, Hidden(None, [])
        mark = next(mark for number in count() if not any((mark := f"@{number}:") in text for text in texts))
        hidden: list[str] = []
        pattern = self._pattern

        def exchange(match: re.Match[str]) -> str:
            hidden.append(match[0])
            return f"{mark}{len(hidden) - 1}@"

        def marked(value: Any) -> Any:
            if isinstance(value, str):
                return pattern.sub(exchange, value)
            if isinstance(value, dict):
                return {marked(name): marked(one) for name, one in value.items()}
            return [marked(one) for one in value] if isinstance(value, list) else value

        told = [
            {name: value if name == "role" else marked(value) for name, value in message.items()}
            for message in messages
        ]
        return told, marked(tools), Hidden(re.compile(re.escape(mark) + "([0-9]+)@"), hidden)


def _texts(value: Any) -> Iterator[str]:
    """Every text in a JSON value, the names in its objects too."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for name, one in value.items():
            yield name
            yield from _texts(one)
    elif isinstance(value, list):
        for one in value:
            yield from _texts(one)


class Hidden:
    def __init__(self, mark: re.Pattern[str] | None, spellings: list[str]) -> None:
        self._mark, self._spellings = mark, spellings

    def show(self, text: str) -> str:
        """The text with the spellings in their places."""
        return text if self._mark is None else self._mark.sub(lambda match: self._spellings[int(match[1])], text)

    def encode(self, text: str, encode: Callable[[str], list[int]]) -> list[int]:
        """Token ids of the marked text: ``encode`` sees of a spelling one letter at a time."""
        if self._mark is None:
            return encode(text)
        token_ids: list[int] = []
        for index, part in enumerate(self._mark.split(text)):
            pieces = [part] if index % 2 == 0 else list(self._spellings[int(part)])
            for piece in pieces:
                token_ids += encode(piece) if piece else []
        return token_ids
