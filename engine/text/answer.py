"""The answer of one sequence as it leaves: text, and the log probabilities of the tokens that this text came from.

A token's log probability waits for its text: half a character, or what may yet become a stop text, is not out, and what
a stop text cut away never comes.
"""

from collections import deque
from collections.abc import Callable
from collections.abc import Sequence as Line
from dataclasses import dataclass

from msgspec.structs import replace

from engine.protocol import SamplingParams, TokenLogprob, TokenOutput
from engine.sequence import Sequence
from engine.text.detokenizer import IncrementalDetokenizer


@dataclass(frozen=True, slots=True)
class Piece:
    text: str = ""
    logprobs: tuple[TokenLogprob, ...] = ()


class Answer:
    """One per sequence. ``push`` takes a token that has text; tokens that only end the answer stay outside."""

    def __init__(self, decode: Callable[[Line[int]], str], sampling: SamplingParams) -> None:
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


def output_of(sequence: Sequence, piece: Piece, token_ids: tuple[int, ...]) -> TokenOutput:
    """What a sequence sends now: new tokens and what they say, with the counts as they stand."""
    return TokenOutput(
        sequence_id=sequence.sequence_id,
        text=piece.text,
        token_ids=token_ids,
        num_prompt_tokens=sequence.num_prompt_tokens_served,
        num_cached_tokens=sequence.num_cached_tokens,
        num_completion_tokens=sequence.num_completion_tokens,
        finish_reason=sequence.finish_reason,
        error=sequence.error,
        logprobs=piece.logprobs,
        nonce=sequence.nonce,
        effort=sequence.account.effort,
    )
