"""What sampling needs of one sequence: its parameters and its own tokens.

A row is built when its sequence is admitted and never moves. All of it is a function of the parameters and of the
sequence's tokens, so after a preemption it is simply built again. The list of tokens is the sequence's own: it grows
under the row's eyes, and what the row has counted of it catches up when the row samples.
"""

from collections.abc import Iterable

import numpy as np
from numpy.typing import NDArray

from engine.events import SamplingState
from engine.protocol import SamplingParams
from engine.sampling.matcher import Matcher


class Row:
    """``end_token_ids``: tokens that end an answer of this model, whatever the request says."""

    def __init__(
        self,
        sampling: SamplingParams,
        token_ids: list[int],
        num_prompt_tokens: int,
        end_token_ids: Iterable[int] = (),
        matcher: Matcher | None = None,
        sequence_id: str = "",
    ) -> None:
        self.sequence_id = sequence_id
        self.sampling = sampling
        self.token_ids = token_ids
        self.num_prompt_tokens = num_prompt_tokens
        self.matcher = matcher
        self.has_form = bool(sampling.grammar)
        self.has_bias = bool(sampling.logit_bias)
        self.bias_ids = np.array([token_id for token_id, _ in sampling.logit_bias], dtype=np.int64)
        self.bias_values = np.array([bias for _, bias in sampling.logit_bias], dtype=np.float64)
        ends = set(sampling.stop_token_ids) | (set() if sampling.ignore_eos else set(end_token_ids))
        self.end_ids = np.array(sorted(ends), dtype=np.int64)
        self.has_penalties = (
            sampling.repetition_penalty != 1.0 or sampling.frequency_penalty != 0.0 or sampling.presence_penalty != 0.0
        )
        self.plain = not (
            self.has_form or self.has_bias or self.has_penalties or sampling.min_tokens
        )  # its logits stay as they are
        self._seen: NDArray[np.bool_] | None = None
        self._counts: NDArray[np.int64] | None = None
        self._num_counted = 0

    def state(self) -> SamplingState:
        """What the next sample of this row depends on, as it lies here."""
        matcher = self.matcher
        return SamplingState(
            sequence_id=self.sequence_id,
            sampling=self.sampling,
            num_prompt_tokens=self.num_prompt_tokens,
            token_ids=self.token_ids,
            bias_ids=self.bias_ids,
            bias_values=self.bias_values,
            has_form=self.has_form,
            has_bias=self.has_bias,
            has_penalties=self.has_penalties,
            plain=self.plain,
            form="" if matcher is None else matcher.grammar,
            form_token_ids=() if matcher is None else matcher.consumed,
            seen=self._seen,
            counts=self._counts,
            num_counted=self._num_counted,
        )

    @property
    def num_output_tokens(self) -> int:
        return len(self.token_ids) - self.num_prompt_tokens

    def allowed(self, vocab_size: int) -> NDArray[np.bool_] | None:
        """The tokens [V] that keep the answer in its form; None where that is not known, and then nothing may come."""
        mask = self.matcher.allowed(self.token_ids[self.num_prompt_tokens :]) if self.matcher is not None else None
        return mask if mask is not None and mask.shape == (vocab_size,) else None

    @property
    def form_complete(self) -> bool:
        """The answer has its whole form: nothing but an end can follow."""
        return self.matcher is not None and self.matcher.complete(self.token_ids[self.num_prompt_tokens :])

    def tokens_seen(self, vocab_size: int) -> tuple[NDArray[np.bool_], NDArray[np.int64]]:
        """Whether each token [V] is in prompt or answer, and how often it is in the answer."""
        if self._seen is None or self._counts is None:
            self._seen = np.zeros(vocab_size, dtype=np.bool_)
            self._counts = np.zeros(vocab_size, dtype=np.int64)
            self._seen[self.token_ids[: self.num_prompt_tokens]] = True
            self._num_counted = self.num_prompt_tokens
        new = self.token_ids[self._num_counted :]
        self._seen[new] = True
        np.add.at(self._counts, new, 1)
        self._num_counted += len(new)
        return self._seen, self._counts
