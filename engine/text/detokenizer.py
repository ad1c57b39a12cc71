"""Text out of a growing list of tokens: never half a character, never a part of a stop string.

Tokens do not decode one by one: a character may span tokens, and some tokenizers drop the first space of whatever
they decode. So text is decoded from a window that starts at a settled border, one settled piece further back than
needed:

    token ids:  [ ... settled ... | window: last settled piece | new tokens ]
    decode(window) = characters sent already (`_num_sent`) + new text + at most 3 U+FFFD held back

An unfinished character shows as up to three U+FFFD at the end (one per byte with byte-fallback tokenizers); these
wait for the next token or for `finish`. Text that could still become a stop string waits too.

A token is out once all of its text is; what a stop string cut away is never out, but a token of which a part stays is.

Not known here: a byte-fallback tokenizer that turns an earlier good character bad when invalid bytes follow; what was
sent stays.
"""

from collections import deque
from collections.abc import Callable, Sequence

REPLACEMENT = "\ufffd"
UNFINISHED_CHARS_MAX = 3  # a UTF-8 character has four bytes at most
WINDOW_TOKENS_MAX = 32  # a model that emits nothing but broken bytes must not make the window grow for ever


class IncrementalDetokenizer:
    """One per sequence. ``push`` gives the text that is safe to send; ``finish`` gives what was held back.

    Stop strings count only in the text after the first ``min_tokens`` tokens. With ``include_stop`` the stop string is
    the end of the text; else the text ends before it.
    """

    def __init__(
        self,
        decode: Callable[[Sequence[int]], str],
        stop: Sequence[str] = (),
        *,
        min_tokens: int = 0,
        include_stop: bool = False,
    ) -> None:
        self._decode = decode
        self._stop = tuple(stop)
        self._min_tokens = min_tokens
        self._include_stop = include_stop
        self._num_tokens = 0
        self._num_chars_out = 0
        self._spans: deque[tuple[int, int]] = deque()  # of each token that is not out: where its text begins and ends
        self._num_unfinished = 0  # characters at the end of the text that were held back at the last push
        self.begin = 0  # characters before the text of the last token
        self.num_chars = 0  # whole characters of all tokens so far, sent or not
        self.num_tokens_out = 0  # leading tokens whose text has been given out
        self._window: list[int] = []
        self._num_settled = 0  # leading tokens of the window whose text has been taken whole
        self._num_sent = 0  # characters of decode(window) that have been taken
        self._held = ""
        self.stopped = False  # a stop string was met: text before it has been emitted, nothing follows

    def push(self, token_id: int) -> str:
        """Take one token; return the new text, "" while a character or a possible stop string is unfinished."""
        assert not self.stopped, "no token may follow a stop string"
        self._window.append(token_id)
        self._num_tokens += 1
        text = self._decode(self._window)
        num_whole = len(text) - _num_unfinished(text)
        new_text = text[self._num_sent : num_whole]
        self.begin, self.num_chars = self.num_chars, self.num_chars + len(new_text)
        if new_text[: self._num_unfinished] == REPLACEMENT * self._num_unfinished:
            self.begin += self._num_unfinished  # what was held back was no beginning of a character: it is text before
        self._num_unfinished = len(text) - num_whole
        self._spans.append((self.begin, self.num_chars + (num_whole < len(text))))
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
        text = self._release(self._decode(self._window)[self._num_sent :], flush=True)
        if not self.stopped:
            self._let_out(len(self._spans))
        return text

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
        if self._num_tokens <= self._min_tokens:
            return self._sent(text)
        self._held += text
        found = [(at, at + len(stop)) for stop in self._stop if (at := self._held.find(stop)) >= 0]
        if found:
            self.stopped = True
            text, self._held = self._held[: min(found)[self._include_stop]], ""
            self._num_chars_out += len(text)
            self._let_out(sum(begin < self._num_chars_out for begin, _ in self._spans))
            return text
        num_held = 0 if flush else held_length(self._held, self._stop)
        cut = len(self._held) - num_held
        text, self._held = self._held[:cut], self._held[cut:]
        return self._sent(text)

    def _sent(self, text: str) -> str:
        self._num_chars_out += len(text)
        while self._spans and self._spans[0][1] <= self._num_chars_out:
            self._let_out(1)
        return text

    def _let_out(self, num_tokens: int) -> None:
        for _ in range(num_tokens):
            self._spans.popleft()
        self.num_tokens_out += num_tokens


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
