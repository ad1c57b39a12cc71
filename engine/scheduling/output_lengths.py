"""How long an answer will be: learned from each domain's own finished sequences.

An exponentially weighted mean for each domain. A prediction reads its own domain's mean and the request's own
max_tokens, nothing else: what one domain generates never moves how another's requests are ordered among themselves. The
table is bounded; a domain that comes when it is full is not learned and goes by max_tokens alone, so nobody can push
another's history out.
"""

DOMAINS_MAX = 4_096
_WEIGHT = 1 / 8  # of the newest answer


class OutputLengths:
    def __init__(self) -> None:
        self._means: dict[str, float] = {}

    def learn(self, domain: str, num_tokens: int) -> None:
        """An answer of the domain came to its own end after so many tokens."""
        mean = self._means.get(domain)
        if mean is not None:
            self._means[domain] = mean + (num_tokens - mean) * _WEIGHT
        elif len(self._means) < DOMAINS_MAX:
            self._means[domain] = float(num_tokens)

    def predict(self, domain: str, max_tokens: int) -> float:
        """Output tokens of one more request of the domain. ``max_tokens`` is the client's hint and the upper bound."""
        return min(self._means.get(domain, float(max_tokens)), float(max_tokens))
