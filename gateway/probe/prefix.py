"""Does one tenant's prompt make another's faster? Three arms in each round, in random order, all asked by B:

- own: B has just sent the prefix itself (the positive control: a cache must show),
- other: only A has,
- fresh: nobody has, and A sent something else, so that the server does the same work before.
"""

import random
from collections.abc import Iterator
from typing import Any

from audit.probes.probe_verdict import Arms
from gateway.probe.client import Client, Reply
from gateway.probe.words import Entropy, fresh_text

ARMS = ("own", "other", "fresh")


def rounds_of_arms(
    a: Client, b: Client, entropy: Entropy, *, num_rounds: int, num_words: int, **fields: Any
) -> Iterator[Arms]:
    """``fields`` go with every request of both tenants: names that must not join them."""
    order = random.Random(int.from_bytes(entropy(8)))  # noqa: S311 (an order, not a secret)
    _warm_up(a, b, entropy, num_words, fields)
    for _ in range(num_rounds):
        replies: dict[str, Reply] = {}
        for arm in order.sample(ARMS, len(ARMS)):
            prefix, unrelated = fresh_text(num_words, entropy), fresh_text(num_words, entropy)
            first = b if arm == "own" else a
            first.said(_question(unrelated if arm == "fresh" else prefix, entropy), max_tokens=1, stream=True, **fields)
            replies[arm] = b.said(_question(prefix, entropy), max_tokens=1, stream=True, **fields)
        own, other, fresh = (replies[arm] for arm in ARMS)
        yield Arms(
            own.ttft_ms, other.ttft_ms, fresh.ttft_ms, own.cached_tokens, other.cached_tokens, fresh.cached_tokens
        )


def _warm_up(a: Client, b: Client, entropy: Entropy, num_words: int, fields: dict[str, Any]) -> None:
    for client in (a, b):
        client.said(_question(fresh_text(num_words, entropy), entropy), max_tokens=1, stream=True, **fields)


def _question(prefix: str, entropy: Entropy) -> str:
    """The same beginning, another end: only a prefix can be found."""
    return f"{prefix}\n\nWhich of these words is like {fresh_text(3, entropy)}?"
