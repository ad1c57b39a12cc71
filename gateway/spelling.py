"""What each token of a vocabulary stands for in text, for the auditor: tried before it is trusted.

The auditor compares text with the bytes of the tokens that it came from. That is exact for vocabularies whose text is
their tokens' bytes put together, special tokens left out, as byte-level ones are. Where a trial shows another rule,
text is not compared, and the auditor's counts say so.
"""

from collections.abc import Callable
from random import Random

from audit.runtime.released_text import say
from engine.text.tokenizer import Tokenizer

NUM_TRIALS = 400
TRIAL_TOKENS = 8


def spelling(tokenizer: Tokenizer) -> Callable[[int], bytes] | None:
    """Token id -> its bytes in an answer; None where text is made in another way."""
    known: dict[int, bytes] = {}

    def spell(token_id: int) -> bytes:
        if token_id not in known:
            known[token_id] = tokenizer.token_bytes(token_id) if tokenizer.decode([token_id]) else b""
        return known[token_id]

    random = Random(0)  # noqa: S311 - which tokens are tried, the same at each start
    for trial in range(NUM_TRIALS):
        first = trial * TRIAL_TOKENS % max(1, tokenizer.vocab_size - TRIAL_TOKENS)
        drawn = random.choices(range(tokenizer.vocab_size), k=TRIAL_TOKENS)
        token_ids = drawn if trial % 2 else [*range(first, first + TRIAL_TOKENS // 2), *drawn[TRIAL_TOKENS // 2 :]]
        unsaid = bytearray(b"".join(map(spell, token_ids)))
        if not say(unsaid, tokenizer.decode(token_ids), first=True) or unsaid:
            return None
    return spell
