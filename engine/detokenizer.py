"""Text out of a growing list of tokens: never half a character, never a part of a stop string.

Tokens do not decode one by one: a character may span tokens, and some tokenizers drop the first space of whatever
they decode. So text is decoded from a window that starts at a settled border, one settled piece further back than
needed:

    token ids:  [ ... settled ... | window: last settled piece | new tokens ]
    decode(window) = characters sent already (`_num_sent`) + new text + at most 3 U+FFFD held back

An unfinished character shows as up to three U+FFFD at the end (one per byte with byte-fallback tokenizers); these
wait for the next token or for `finish`. Text that could still become a stop string waits too.

Not known here: a byte-fallback tokenizer that turns an earlier good character bad when invalid bytes follow; what was
sent stays.
"""

from collections.abc import Callable, Sequence

REPLACEMENT = "\ufffd"
UNFINISHED_CHARS_MAX = 3  # a UTF-8 character has four bytes at most
WINDOW_TOKENS_MAX = 32  # a model that emits nothing but broken bytes must not make the window grow for ever


class IncrementalDetokenizer:
    """One per sequence. ``push`` gives the text that is safe to send; ``finish`` gives what was held back."""

    def __init__(self, decode: Callable[[Sequence[int]], str], stop: Sequence[str] = ()) -> None:
        self._decode = decode
        self._stop = tuple(stop)
        self._window: list[int] = []
        self._num_settled = 0  # leading tokens of the window whose text has been taken whole
        self._num_sent = 0  # characters of decode(window) that have been taken
        self._held = ""
        self.stopped = False  # a stop string was met: text before it has been emitted, nothing follows

    def push(self, token_id: int) -> str:
        """Take one token; return the new text, "" while a character or a possible stop string is unfinished."""
        assert not self.stopped, "no token may follow a stop string"
        self._window.append(token_id)
        text = self._decode(self._window)
        num_whole = len(text) - _num_unfinished(text)
        new_text = text[self._num_sent : num_whole]
        self._num_sent = max(self._num_sent, num_whole)
        if num_whole == len(text):
            self._settle(self._num_settled)
        elif len(self._window) > WINDOW_TOKENS_MAX:
            self._settle_broken(text)
        return self._release(new_text, flush=False)

    def finish(self) -> str:
        """The rest, when the sequence ended for another reason than a stop string. Call once."""
        if self.stopped:
            return ""
        return self._release(self._decode(self._window)[self._num_sent :], flush=True)

    def _settle(self, num_tokens: int) -> None:
        """Drop the window's first tokens; all that stays has been sent."""
        del self._window[:num_tokens]
        self._num_settled = len(self._window)
        self._num_sent = len(self._decode(self._window))

    def _settle_broken(self, text: str) -> None:
        """Cut a window of broken bytes where both sides decode alone to what they decode to together: since the right
        side has text, no later byte can change the left."""
        for cut in range(len(self._window) - 1, 0, -1):
            left, right = self._decode(self._window[:cut]), self._decode(self._window[cut:])
            if right and left + right == text and len(left) <= self._num_sent:
                del self._window[:cut]
                self._num_settled = 0
                self._num_sent -= len(left)
                return

    def _release(self, text: str, *, flush: bool) -> str:
        self._held += text
        found = [at for stop in self._stop if (at := self._held.find(stop)) >= 0]
        if found:
            self.stopped = True
            text, self._held = self._held[: min(found)], ""
            return text
        num_held = 0 if flush else held_length(self._held, self._stop)
        cut = len(self._held) - num_held
        text, self._held = self._held[:cut], self._held[cut:]
        return text


def _num_unfinished(text: str) -> int:
    tail = text[-UNFINISHED_CHARS_MAX:]
    return len(tail) - len(tail.rstrip(REPLACEMENT))


def held_length(text: str, stop: Sequence[str]) -> int:
    """Length of the longest end of ``text`` that is a proper beginning of a stop string."""
    longest = max((len(string) for string in stop), default=1) - 1
    for length in range(min(longest, len(text)), 0, -1):
        tail = text[-length:]
        if any(len(string) > length and string.startswith(tail) for string in stop):
            return length
    return 0
