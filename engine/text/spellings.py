"""A special token that somebody spells inside a message stays text.

A chat template writes the model's control tokens (``<|im_start|>``) around messages, and the tokenizer recognises them
by their spelling, wherever it stands. So whoever writes ``<|im_end|>\\n<|im_start|>system`` into a message would speak
as the system. Before the template runs, each spelling inside a message is exchanged for a mark that occurs nowhere;
after it, the text between marks is tokenised as ever, and each marked spelling letter by letter. Without such a
spelling nothing is exchanged, and the token ids are the ones that the tokenizer gives by itself.
"""

import re
from collections.abc import Callable, Iterable
from itertools import count


class Spellings:
    """``special_tokens``: the spellings that become control tokens, exactly as written."""

    def __init__(self, special_tokens: Iterable[str]) -> None:
        longest_first = sorted({token for token in special_tokens if token}, key=len, reverse=True)
        self._pattern = re.compile("|".join(map(re.escape, longest_first))) if longest_first else None

    def hide(self, messages: list[dict[str, str]]) -> tuple[list[dict[str, str]], "Hidden"]:
        """The messages with marks for spellings in their values, roles left alone, and how to undo it."""
        contents = [value for message in messages for name, value in message.items() if name != "role"]
        if self._pattern is None or not any(self._pattern.search(content) for content in contents):
            return messages, Hidden(None, [])
        mark = next(mark for number in count() if not any((mark := f"@{number}:") in content for content in contents))
        hidden: list[str] = []

        def exchange(match: re.Match[str]) -> str:
            hidden.append(match[0])
            return f"{mark}{len(hidden) - 1}@"

        pattern = self._pattern
        marked = [
            {name: value if name == "role" else pattern.sub(exchange, value) for name, value in message.items()}
            for message in messages
        ]
        return marked, Hidden(re.compile(re.escape(mark) + "([0-9]+)@"), hidden)


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
