"""The answer of one sequence as it leaves: text, and the log probabilities of the tokens that this text came from.

A token's log probability waits for its text: half a character, or what may yet become a stop text, is not out, and what
a stop text cut away never comes.
"""

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from msgspec.structs import replace

from engine.protocol import SamplingParams, TokenLogprob
from engine.text.detokenizer import IncrementalDetokenizer


@dataclass(frozen=True, slots=True)
class Piece:
    text: str = ""
    logprobs: tuple[TokenLogprob, ...] = ()


class Answer:
    """One per sequence. ``push`` takes a token that has text; tokens that only end the answer stay outside."""

    def __init__(self, decode: Callable[[Sequence[int]], str], sampling: SamplingParams) -> None:
        self._detokenizer = IncrementalDetokenizer(
            decode, sampling.stop, min_tokens=sampling.min_tokens, include_stop=sampling.include_stop
        )
        self._waiting: deque[TokenLogprob] = deque()
        self._num_taken = 0

    @property
    def stopped(self) -> bool:
        """A stop text was met: nothing follows."""
        return self._detokenizer.stopped

    def push(self, token_id: int, logprob: TokenLogprob | None) -> Piece:
        text = self._detokenizer.push(token_id)
        if logprob is not None:
            self._waiting.append(replace(logprob, offset=self._detokenizer.begin))
        return self._piece(text)

    def finish(self) -> Piece:
        """What waited, when the answer ended for another reason than a stop text. Call once."""
        return self._piece(self._detokenizer.finish())

    def _piece(self, text: str) -> Piece:
        num_new = self._detokenizer.num_tokens_out - self._num_taken
        self._num_taken += num_new
        if not self._waiting:
            return Piece(text)
        return Piece(text, tuple(self._waiting.popleft() for _ in range(num_new)))
