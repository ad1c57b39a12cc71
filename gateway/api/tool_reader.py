"""From an answer's text to its calls, as the text comes, whatever pieces it comes in.

    text            <tool_call> {"name": "f", "arguments": {...}} </tool_call>            ...
    |-- Text --|    |-------------- frame -----------------|--- --|-- frame ---|
                                                       Arguments

White space may stand between the signs of a frame. White space between a text and a call, or between calls, belongs to
the frame. Text is held back only while it may still turn out to be a frame; what does not is passed on as text, so
nothing is ever lost but frames and the white space around them:

- a frame that is not this one, or names a function that there is not, is text;
- arguments that break off are passed on as far as they go, as the answer was cut there;
- what follows a broken object is text.
"""

import re
from collections.abc import Collection, Iterator
from dataclasses import dataclass

from gateway.api.json_object import WHITE, JsonObject

BEGIN = "<tool_call>"
END = "</tool_call>"
NAME_CHARS_MAX = 64
NAME_CHARACTER = re.compile(r"[A-Za-z0-9_-]")
_WHITE_HERE, _NAME = " ", "n"  # marks in the frame, which has none of its own
_HEAD: tuple[str, ...] = (
    *(BEGIN, _WHITE_HERE, "{", _WHITE_HERE),
    *('"name"', _WHITE_HERE, ":", _WHITE_HERE, '"', _NAME, _WHITE_HERE, ",", _WHITE_HERE),
    *('"arguments"', _WHITE_HERE, ":", _WHITE_HERE),
)
_TAIL = (_WHITE_HERE, "}", _WHITE_HERE, END)


@dataclass(frozen=True, slots=True)
class Text:
    text: str


@dataclass(frozen=True, slots=True)
class CallBegins:
    index: int  # among the calls of this answer
    name: str


@dataclass(frozen=True, slots=True)
class Arguments:
    index: int
    text: str  # the next piece of a JSON object


Event = Text | CallBegins | Arguments


class _Frame:
    """Fixed parts with white space between them, and perhaps a name; `push` says whether a character may follow."""

    def __init__(self, parts: tuple[str, ...], names: Collection[str] = ()) -> None:
        self._parts, self._names = parts, names
        self._at, self._offset = 0, 0
        self.held = ""
        self.name = ""

    @property
    def complete(self) -> bool:
        """Of a head: what follows is not a part of it."""
        return self._at == len(self._parts)

    def push(self, character: str) -> bool:
        """False: it does not fit here; the frame is as it was."""
        if self._parts[self._at] == _WHITE_HERE and character not in WHITE:
            self._at += 1
            if self.complete:
                return False
        part = self._parts[self._at]
        if part == _WHITE_HERE:
            fits = True
        elif part == _NAME:
            fits = self._push_name(character)
        else:
            fits = character == part[self._offset]
            self._offset += fits
            if self._offset == len(part):
                self._at, self._offset = self._at + 1, 0
        if fits:
            self.held += character
        return fits

    def _push_name(self, character: str) -> bool:
        if character == '"':
            self._at += 1
            return self.name in self._names
        self.name += character
        return len(self.name) <= NAME_CHARS_MAX and NAME_CHARACTER.fullmatch(character) is not None


class ToolReader:
    """One an answer. ``names``: the functions that may be called."""

    def __init__(self, names: Collection[str]) -> None:
        self._names = names
        self._white = ""  # may be the frame's, or text
        self._head: _Frame | None = None
        self._arguments: JsonObject | None = None
        self._tail: _Frame | None = None
        self._after_call = False  # nothing but white space came since
        self.num_calls = 0
        self.broken = False  # arguments of some call are not a whole object

    @property
    def called(self) -> bool:
        """There are calls, and all of them are whole."""
        return self.num_calls > 0 and not self.broken and self._arguments is None

    def push(self, text: str) -> list[Event]:
        return list(_merged(event for character in text for event in self._push(character)))

    def finish(self) -> list[Event]:
        """What was held back, when the answer has ended. Call once."""
        if self._head is not None:
            held, self._head = self._white + self._head.held, None
        else:
            held = "" if self._after_call else self._white
        return [Text(held)] if held else []

    def _push(self, character: str) -> Iterator[Event]:
        if self._arguments is not None:
            yield from self._push_arguments(self._arguments, character)
        elif self._tail is not None:
            yield from self._push_tail(self._tail, character)
        elif self._head is not None:
            yield from self._push_head(self._head, character)
        else:
            yield from self._push_text(character)

    def _push_text(self, character: str) -> Iterator[Event]:
        if character in WHITE:
            self._white += character
        elif character == BEGIN[0]:
            self._head = _Frame(_HEAD, self._names)
            self._head.push(character)
        else:
            yield Text(self._white + character)
            self._white, self._after_call = "", False

    def _push_head(self, head: _Frame, character: str) -> Iterator[Event]:
        if head.push(character):
            return
        self._head = None
        if head.complete and character == "{":
            yield CallBegins(self.num_calls, head.name)
            self.num_calls += 1
            self._white, self._arguments = "", JsonObject()
        else:
            yield Text(self._white + head.held)
            self._white, self._after_call = "", False
        yield from self._push(character)

    def _push_arguments(self, arguments: JsonObject, character: str) -> Iterator[Event]:
        if arguments.push(character):
            yield Arguments(self.num_calls - 1, character)
            if arguments.complete:
                self._arguments, self._tail = None, _Frame(_TAIL)
            return
        self._arguments, self.broken, self._after_call = None, True, False
        yield from self._push(character)

    def _push_tail(self, tail: _Frame, character: str) -> Iterator[Event]:
        if tail.push(character):
            if tail.complete:
                self._tail, self._after_call = None, True
            return
        self._tail, self._after_call = None, False
        if tail.held:
            yield Text(tail.held)
        yield from self._push(character)


def _merged(events: Iterator[Event]) -> Iterator[Event]:
    """Neighbouring pieces of one thing as one."""
    last: Event | None = None
    for event in events:
        if isinstance(last, Text) and isinstance(event, Text):
            last = Text(last.text + event.text)
        elif isinstance(last, Arguments) and isinstance(event, Arguments):
            last = Arguments(last.index, last.text + event.text)
        else:
            if last is not None:
                yield last
            last = event
    if last is not None:
        yield last
