"""One JSON object, a character at a time: does the text so far begin one, and where does it end?

RFC 8259, strictly. Nothing is kept but the open brackets, so that arguments can be passed on as they come, and it is
known of each character that it belongs to them.
"""

from typing import Final

DEPTH_MAX: Final = 128
WHITE: Final = frozenset(" \t\n\r")
DIGITS: Final = frozenset("0123456789")
HEX: Final = frozenset("0123456789abcdefABCDEF")
LITERALS: Final = {"t": "rue", "f": "alse", "n": "ull"}
_OPENING: Final = {"}": "{", "]": "["}

# Inside a number: state -> the characters that may follow, and where they lead.
_NUMBER: Final[dict[str, tuple[tuple[frozenset[str], str], ...]]] = {
    "-": ((frozenset("0"), "zero"), (DIGITS, "int")),
    "zero": ((frozenset("."), "."), (frozenset("eE"), "e")),
    "int": ((DIGITS, "int"), (frozenset("."), "."), (frozenset("eE"), "e")),
    ".": ((DIGITS, "fraction"),),
    "fraction": ((DIGITS, "fraction"), (frozenset("eE"), "e")),
    "e": ((frozenset("+-"), "sign"), (DIGITS, "exponent")),
    "sign": ((DIGITS, "exponent"),),
    "exponent": ((DIGITS, "exponent"),),
}
_WHOLE: Final = frozenset({"zero", "int", "fraction", "exponent"})  # a number may end here


class JsonObject:
    """`push` says of each character whether it may follow; after a False nothing more may be pushed."""

    def __init__(self) -> None:
        self._open: list[str] = []  # the brackets
        self._state = "begin"
        self._rest = ""  # of a literal
        self._num_hex = 0
        self._is_name = False  # the string is a name, not a value

    @property
    def complete(self) -> bool:
        return self._state == "end"

    def push(self, character: str) -> bool:
        state = self._state
        if state == "string":
            return self._string(character)
        if state in _NUMBER:
            return self._number(character)
        if state == "literal":
            return self._literal(character)
        if state == "escape":
            return self._escape(character)
        if state == "hex":
            self._num_hex -= 1
            self._state = "hex" if self._num_hex else "string"
            return character in HEX
        if character in WHITE:
            return state not in ("begin", "end")
        return self._structure(character)

    def _structure(self, character: str) -> bool:
        state = self._state
        if state == "begin":
            return character == "{" and self._opened(character)
        if character == '"' and state in ("name", "name or end"):
            self._state, self._is_name = "string", True
        elif character in _OPENING and self._may_close(character):
            self._closed()
        elif character == ":" and state == "colon":
            self._state = "value"
        elif character == "," and state == "comma or end":
            self._state = "name" if self._open[-1] == "{" else "value"
        elif state in ("value", "value or end"):
            return self._value(character)
        else:
            return False
        return True

    def _value(self, character: str) -> bool:
        if character in "{[":
            return self._opened(character)
        if character == '"':
            self._state, self._is_name = "string", False
        elif character in LITERALS:
            self._state, self._rest = "literal", LITERALS[character]
        elif character == "-" or character in DIGITS:
            self._state = {"-": "-", "0": "zero"}.get(character, "int")
        else:
            return False
        return True

    def _opened(self, bracket: str) -> bool:
        self._open.append(bracket)
        self._state = "name or end" if bracket == "{" else "value or end"
        return len(self._open) <= DEPTH_MAX

    def _may_close(self, bracket: str) -> bool:
        here = "name or end" if bracket == "}" else "value or end"
        return self._state in (here, "comma or end") and self._open[-1] == _OPENING[bracket]

    def _closed(self) -> None:
        self._open.pop()
        self._state = "comma or end" if self._open else "end"

    def _string(self, character: str) -> bool:
        if character == '"':
            self._state = "colon" if self._is_name else "comma or end"
        elif character == "\\":
            self._state = "escape"
        return character >= " "

    def _escape(self, character: str) -> bool:
        self._state = "string"
        if character == "u":
            self._state, self._num_hex = "hex", 4
        return character in '"\\/bfnrtu'

    def _literal(self, character: str) -> bool:
        fits = character == self._rest[0]
        self._rest = self._rest[1:]
        if not self._rest:
            self._state = "comma or end"
        return fits

    def _number(self, character: str) -> bool:
        for characters, then in _NUMBER[self._state]:
            if character in characters:
                self._state = then
                return True
        if self._state not in _WHOLE:
            return False
        self._state = "comma or end"
        return self.push(character)
