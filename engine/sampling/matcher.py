"""Which tokens keep an answer in its form: llguidance's matcher behind a face that fails closed.

A matcher's state is a function of its grammar and of its sequence's own answer. Anything that goes wrong in it, a limit
reached or a token that did not fit, leaves no mask; without a mask no token is sampled.
"""

from collections.abc import Iterable
from pathlib import Path
from typing import Protocol

import numpy as np
from llguidance import LLMatcher, LLTokenizer
from numpy.typing import NDArray

from engine.errors import GrammarError
from engine.sampling.grammar import limits


class Matcher(Protocol):
    grammar: str
    consumed: list[int]  # the answer as far as it was read

    def allowed(self, output_token_ids: list[int]) -> NDArray[np.bool_] | None:
        """The tokens [V] that may follow; None where that is not known."""
        ...

    def complete(self, output_token_ids: list[int]) -> bool:
        """Nothing but an end can follow."""
        ...


class GrammarMatcher:
    """``output_token_ids`` is the whole answer so far, and only ever grows between calls. Raises GrammarError where the
    grammar does not compile."""

    def __init__(self, tokenizer: LLTokenizer, grammar: str) -> None:
        self._matcher = LLMatcher(tokenizer, grammar, log_level=0, limits=limits())
        if self._matcher.is_error():
            raise GrammarError(" ".join(self._matcher.get_error().split())[:300])
        self._vocab_size = tokenizer.vocab_size
        self.grammar = grammar
        self.consumed: list[int] = []

    def allowed(self, output_token_ids: list[int]) -> NDArray[np.bool_] | None:
        self._catch_up(output_token_ids)
        if self._matcher.is_error():
            return None
        bits = np.frombuffer(self._matcher.compute_bitmask(), dtype=np.uint8)
        if self._matcher.is_error():
            return None
        return np.unpackbits(bits, bitorder="little")[: self._vocab_size].view(np.bool_)

    def complete(self, output_token_ids: list[int]) -> bool:
        self._catch_up(output_token_ids)
        return self._matcher.is_stopped() and not self._matcher.is_error()

    def _catch_up(self, output_token_ids: list[int]) -> None:
        for token_id in output_token_ids[len(self.consumed) :]:
            self._matcher.consume_token(token_id)
            self.consumed.append(token_id)


class Matchers:
    """Makes matchers for the vocabulary of the model in a folder; from several threads, too."""

    def __init__(self, model_dir: Path, vocab_size: int, end_token_ids: Iterable[int]) -> None:
        text = (model_dir / "tokenizer.json").read_text(encoding="utf-8")
        self._tokenizer = LLTokenizer(text, n_vocab=vocab_size, eos_token=sorted(end_token_ids) or None)

    def __call__(self, grammar: str) -> Matcher:
        return GrammarMatcher(self._tokenizer, grammar)
