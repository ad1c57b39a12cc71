"""The policy `open`: one gateway's own count of one tenant while the store is gone. Integers, no clock of its own.

Requests and tokens are debts that drain at the cap's rate, as in lua/common_v3.lua: what is admitted within t minutes
comes to at most cap * (1 + t). Tokens are counted as reserved: what a request did not use is not given back.
"""

from dataclasses import dataclass
from typing import Final

from tenancy.quotas.failure_policy import FailurePolicy

MINUTE_NS: Final = 60 * 10**9


@dataclass(slots=True)
class OpenCap:
    policy: FailurePolicy
    num_running: int = 0
    _request_debt: int = 0  # requests, times the nanoseconds of a minute
    _token_debt: int = 0
    _drained_ns: int = 0

    def take(self, num_tokens: int, monotonic_ns: int) -> bool:
        """Whether one request of `num_tokens` may run now; it is counted then."""
        policy = self.policy
        elapsed_ns = max(0, monotonic_ns - self._drained_ns)
        self._request_debt = max(0, self._request_debt - elapsed_ns * policy.requests_per_minute)
        self._token_debt = max(0, self._token_debt - elapsed_ns * policy.tokens_per_minute)
        self._drained_ns = max(self._drained_ns, monotonic_ns)
        requests, tokens = self._request_debt + MINUTE_NS, self._token_debt + num_tokens * MINUTE_NS
        fits = (
            requests <= policy.requests_per_minute * MINUTE_NS
            and tokens <= policy.tokens_per_minute * MINUTE_NS
            and self.num_running < policy.concurrency_max
        )
        if fits:
            self._request_debt, self._token_debt = requests, tokens
            self.num_running += 1
        return fits

    def give_back(self) -> None:
        """A request that was counted has ended."""
        assert self.num_running > 0, "more requests ended than were admitted"
        self.num_running -= 1
