"""Quotas: requests and tokens per minute (GCRA), tokens per day and concurrency (leases), decided by one script.

In Redis or Valkey, all scopes of a request (organisation, tenant, project, key) are checked and taken in one step: all
or nothing, a refusal takes nothing. The arithmetic is in lua/common_v3.lua, the clock is the server's. A request
reserves its prompt and max_tokens; what it did not use is given back when its lease is released, once. A lease that
nobody renews expires and frees its slot by itself; its tokens stay counted, because what it used is not known here.

A limit in shadow refuses nothing: the lease names it where it would have.

An idle scope admits one full minute's allowance at once, then the allowance per minute: within any t minutes, requests
that used u tokens in total were admitted only if u <= limit * (1 + t), also when unused tokens are given back late.

Counters are those of an epoch (quota_epochs.py): a store that has another one, or none, has lost what was counted, and
admits nothing (EpochMismatch) before `rebuild` has told it.

Not known here: money, tenants, HTTP. The caller's client must not retry by itself and must have timeouts; every error
of it is a QuotaUnavailableError, and the caller then refuses (fails closed).
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from importlib.resources import files
from typing import Any, Final, Literal, cast

from redis.asyncio import Redis
from redis.exceptions import NoScriptError, RedisError

from tenancy.money import require_int
from tenancy.quotas.calls import Calls
from tenancy.quotas.limits import LIMIT_NAMES, PER_DAY_MAX, LimitName, ScopeLimits
from tenancy.quotas.quota_epochs import Counters

RefusalCode = Literal["rate_limit_exceeded", "concurrency_exceeded", "never_fits"]

UNIT: Final = 60_000_000  # as in lua/common_v3.lua
FIGURES: Final = 5  # of each scope in an answer
LEASE_TTL_MS_MAX: Final = 24 * 3_600_000
BUSY_RETRY_AFTER_MS: Final = 1_000  # nobody knows when a stream will end: a short wait


class QuotaUnavailableError(Exception):
    """Redis cannot answer; nobody knows what is left. The caller answers 503 and serves nothing unmetered."""


@dataclass(frozen=True, slots=True)
class QuotaSnapshot:
    """What is left in the tightest scope, for the x-ratelimit headers. None where no scope has such a limit.

    reset_*_ms is when the whole allowance is there again.
    """

    limit_requests: int | None = None
    remaining_requests: int | None = None
    reset_requests_ms: int | None = None
    limit_tokens: int | None = None
    remaining_tokens: int | None = None
    reset_tokens_ms: int | None = None
    concurrency_max: int | None = None
    limit_tokens_per_day: int | None = None
    remaining_tokens_per_day: int | None = None
    num_leases: int = 0  # live leases in the scope that is nearest its concurrency_max, else in the widest scope


@dataclass(frozen=True, slots=True)
class Lease:
    """A granted slot. `num_tokens` are reserved until it is released."""

    lease_id: str
    tenant_id: str
    scopes: tuple[ScopeLimits, ...]
    num_tokens: int
    lease_ttl_ms: int
    snapshot: QuotaSnapshot
    would_refuse: tuple[tuple[str, LimitName], ...] = ()  # (scope id, limit): limits in shadow, were they not
    epoch: str = ""  # under which it was granted; its hold must be placed under the same
    mode: Literal["store", "lease", "open"] = "store"  # who granted it: the store, or a policy while that was gone


@dataclass(frozen=True, slots=True)
class Refused:
    """Nothing was taken. retry_after_ms is 0 where waiting does not help (never_fits)."""

    code: RefusalCode
    limit_name: LimitName
    scope_id: str
    limit: int
    retry_after_ms: int
    snapshot: QuotaSnapshot


@dataclass(frozen=True, slots=True)
class EpochMismatch:
    """Nothing was taken: the store does not count under the caller's epoch."""


class Quota:
    """`redis` may decode responses or not; `prefix` keeps several installations in one server apart."""

    def __init__(self, redis: Redis, *, prefix: str = "bulkhead") -> None:
        self._redis = redis
        self._calls = Calls(redis)
        self._prefix = prefix
        self._admit = _Script("admit_v3")
        self._release = _Script("release_v3")
        self._renew = _Script("renew_v3")
        self._usage = _Script("usage_v3")
        self._cut = _Script("cut_v3")
        self._rebuild = _Script("rebuild_v3")

    async def acquire(
        self,
        scopes: Sequence[ScopeLimits],
        *,
        tenant_id: str,
        lease_id: str,
        num_tokens: int,
        lease_ttl_ms: int,
        epoch: str = "",
    ) -> Lease | Refused | EpochMismatch:
        """Take one request, `num_tokens` tokens and one slot from every scope, or nothing from any.

        `epoch` is the organisation's; the empty one is not looked at. The same live lease_id again is granted again
        and counted once. Raises QuotaUnavailableError, TypeError, ValueError for bad arguments.
        """
        if require_int(num_tokens, "num_tokens") < 0:
            raise ValueError(f"num_tokens must not be negative: {num_tokens}")
        if not 1 <= require_int(lease_ttl_ms, "lease_ttl_ms") <= LEASE_TTL_MS_MAX:
            raise ValueError(f"lease_ttl_ms must be between 1 and {LEASE_TTL_MS_MAX}: {lease_ttl_ms}")
        arguments: list[str | int] = [epoch, lease_id, min(num_tokens, PER_DAY_MAX + 1), lease_ttl_ms]
        for scope in scopes:
            arguments += map(_or_unlimited, (getattr(scope, name) for name in LIMIT_NAMES))
            arguments.append(sum(2**bit for bit, name in enumerate(LIMIT_NAMES) if name in scope.shadow))
        root = self._root(tenant_id, scopes)
        keys = [f"{root}:epoch", f"{root}:lease:{lease_id}", *self._scope_keys(tenant_id, scopes)]
        answer = await self._admit.run(self._calls, self._redis, keys, arguments)
        if len(answer) == 1:
            return EpochMismatch()
        verdict, at_scope, at_limit, retry_us, *left = cast("list[int]", answer)
        snapshot = _snapshot(scopes, left)
        if verdict == 0:
            would_refuse = tuple(
                (scope.scope_id, name)
                for scope, mask in zip(scopes, left[4::FIGURES], strict=True)
                for bit, name in enumerate(LIMIT_NAMES)
                if mask >> bit & 1
            )
            return Lease(lease_id, tenant_id, tuple(scopes), num_tokens, lease_ttl_ms, snapshot, would_refuse, epoch)
        scope, limit_name = scopes[at_scope - 1], LIMIT_NAMES[at_limit - 1]
        code, retry_after_ms = _refusal(limit_name, retry_us)
        return Refused(code, limit_name, scope.scope_id, getattr(scope, limit_name), retry_after_ms, snapshot)

    async def renew(self, lease: Lease) -> bool:
        """Keep a lease for another lease_ttl_ms. False if it had already expired. Raises QuotaUnavailableError."""
        arguments: list[str | int] = [lease.lease_id, lease.lease_ttl_ms]
        return bool(await self._renew.run(self._calls, self._redis, self._keys(lease), arguments))

    async def release(self, lease: Lease, num_tokens_used: int) -> bool:
        """End a lease and give back num_tokens - num_tokens_used, once. False, and nothing given back, if it was gone.

        Raises QuotaUnavailableError; the lease then expires by itself.
        """
        if require_int(num_tokens_used, "num_tokens_used") < 0:
            raise ValueError(f"num_tokens_used must not be negative: {num_tokens_used}")
        arguments: list[str | int] = [lease.lease_id, num_tokens_used]
        for scope in lease.scopes:
            arguments += _counted(scope)
        return bool(await self._release.run(self._calls, self._redis, self._keys(lease), arguments))

    async def usage_now(self, tenant_id: str, scopes: Sequence[ScopeLimits]) -> QuotaSnapshot:
        """What is left now, without taking any of it. Raises QuotaUnavailableError."""
        arguments: list[str | int] = []
        for scope in scopes:
            arguments += _counted(scope)
        left = await self._usage.run(self._calls, self._redis, self._scope_keys(tenant_id, scopes), arguments)
        return _snapshot(scopes, cast("list[int]", left))

    async def cut(
        self, scopes: Sequence[ScopeLimits], *, epoch: str, gateway_id: str, ttl_ms: int, percent: int
    ) -> list[tuple[int, int, int, int]] | EpochMismatch:
        """Take a slice of every scope for a gateway, in place of the untouched one that it had; ttl_ms 0 gives it back.

        For each scope: requests, tokens, slots, tokens of a day; 0 also where there is no limit. Needs one
        organisation's scopes, at least one. Raises QuotaUnavailableError.
        """
        arguments: list[str | int] = [epoch, gateway_id, ttl_ms, percent]
        for scope in scopes:
            arguments += map(_or_unlimited, (getattr(scope, name) for name in LIMIT_NAMES))
        root = self._root("", scopes)
        answer = await self._cut.run(
            self._calls, self._redis, [f"{root}:epoch", *self._scope_keys("", scopes)], arguments
        )
        if len(answer) != 4 * len(scopes):
            return EpochMismatch()
        return list(zip(*(answer[number::4] for number in range(4)), strict=True))

    async def rebuild(self, counters: Counters, *, epoch: str, lease_ttl_ms: int) -> None:
        """Forget what is counted of an organisation and count `counters` under `epoch`.

        Raises QuotaUnavailableError.
        """
        root = f"{self._prefix}:quota1:{{{counters.organisation_id}}}"
        arguments: list[str | int] = [epoch, lease_ttl_ms, counters.day, f"{root}:", f"{root}:lease:"]
        arguments.append(len(counters.scopes))
        for scope_id, one in counters.scopes.items():
            arguments += [scope_id, one.num_requests, one.num_tokens, one.num_tokens_of_day, one.num_tokens_open]
        for request in counters.open_requests:
            arguments += [request.request_id, request.num_tokens, int(request.in_minute), int(request.in_day)]
            arguments += [len(request.scope_ids), *request.scope_ids]
        keys = [f"{root}:epoch", f"{root}:{counters.organisation_id}:leases"]
        await self._rebuild.run(self._calls, self._redis, keys, arguments)

    def _keys(self, lease: Lease) -> list[str]:
        lease_key = self._lease_key(lease.tenant_id, lease.scopes, lease.lease_id)
        return [lease_key, *self._scope_keys(lease.tenant_id, lease.scopes)]

    def _scope_keys(self, tenant_id: str, scopes: Sequence[ScopeLimits]) -> list[str]:
        root = self._root(tenant_id, scopes)
        return [f"{root}:{scope.scope_id}:{part}" for scope in scopes for part in ("state", "leases")]

    def _lease_key(self, tenant_id: str, scopes: Sequence[ScopeLimits], lease_id: str) -> str:
        return f"{self._root(tenant_id, scopes)}:lease:{lease_id}"

    def _root(self, tenant_id: str, scopes: Sequence[ScopeLimits]) -> str:
        """One hash tag for all keys of a call, so that a cluster keeps them in one slot: the organisation's.

        Its own counters are shared by its tenants, so the tenant cannot be the tag.
        """
        organisations = {scope.organisation_id for scope in scopes}
        if len(organisations) > 1:
            raise ValueError(f"scopes of several organisations in one call: {sorted(organisations)}")
        tag = next(iter(organisations), "") or tenant_id
        return f"{self._prefix}:quota1:{{{tag}}}"


class _Script:
    """A script by its name: run by digest, loaded when the server does not have it (restarted or flushed)."""

    def __init__(self, name: str) -> None:
        folder = files("tenancy.quotas") / "lua"
        common, body = ((folder / f"{part}.lua").read_text("utf-8") for part in ("common_v3", name))
        self._text = f"-- bulkhead {name}\n{common}\n{body}"
        self._digest = hashlib.sha1(self._text.encode(), usedforsecurity=False).hexdigest()

    async def run(self, calls: Calls, redis: Redis, keys: Sequence[str], arguments: Sequence[str | int]) -> Any:
        try:
            try:
                return await calls.evalsha(self._digest, keys, arguments)
            except NoScriptError:
                await redis.script_load(self._text)
                return await calls.evalsha(self._digest, keys, arguments)
        except (RedisError, OSError, TimeoutError) as error:
            raise QuotaUnavailableError(f"{type(error).__name__}: {error}") from error


def _without_shadow(scope: ScopeLimits) -> ScopeLimits:
    """What clients see: a limit that does not refuse is none."""
    if not scope.shadow:
        return scope
    unlimited: dict[str, Any] = dict.fromkeys(scope.shadow)
    return replace(scope, **unlimited)


def _counted(scope: ScopeLimits) -> list[int]:
    """The limits whose counts a script brings up to date."""
    return [_or_unlimited(one) for one in (scope.requests_per_minute, scope.tokens_per_minute, scope.tokens_per_day)]


def _or_unlimited(limit: int | None) -> int:
    return -1 if limit is None else limit


def _refusal(limit_name: LimitName, retry_us: int) -> tuple[RefusalCode, int]:
    if retry_us < 0:
        return "never_fits", 0
    if limit_name == "concurrency_max":
        return "concurrency_exceeded", BUSY_RETRY_AFTER_MS
    return "rate_limit_exceeded", -(-retry_us // 1_000)


def _snapshot(scopes: Sequence[ScopeLimits], left: Sequence[int]) -> QuotaSnapshot:
    enforced = [_without_shadow(scope) for scope in scopes]
    debts = list(zip(enforced, left[0::FIGURES], left[1::FIGURES], left[2::FIGURES], strict=True))
    requests = [_remaining(s.requests_per_minute, debt) for s, debt, _, _ in debts if s.requests_per_minute is not None]
    tokens = [_remaining(s.tokens_per_minute, debt) for s, _, debt, _ in debts if s.tokens_per_minute is not None]
    of_day = zip(enforced, left[3::FIGURES], strict=True)
    days = [(max(0, s.tokens_per_day - used), s.tokens_per_day) for s, used in of_day if s.tokens_per_day is not None]
    remaining_tokens_per_day, limit_tokens_per_day = min(days, default=(None, None))
    slots = [
        (s.concurrency_max - active, s.concurrency_max, active)
        for s, _, _, active in debts
        if s.concurrency_max is not None
    ]
    remaining_requests, limit_requests, reset_requests_ms = min(requests, default=(None, None, None))
    remaining_tokens, limit_tokens, reset_tokens_ms = min(tokens, default=(None, None, None))
    widest = max((active for *_, active in debts), default=0)
    _, concurrency_max, num_leases = min(slots, default=(None, None, widest))
    return QuotaSnapshot(
        limit_requests,
        remaining_requests,
        reset_requests_ms,
        limit_tokens,
        remaining_tokens,
        reset_tokens_ms,
        concurrency_max,
        limit_tokens_per_day,
        remaining_tokens_per_day,
        num_leases,
    )


def _remaining(limit: int, debt: int) -> tuple[int, int, int]:
    """(remaining, limit, ms until nothing is owed); a limit of 0 never gets anything back."""
    remaining = max(0, (limit * UNIT - debt) // UNIT)
    return remaining, limit, -(-debt // (limit * 1_000)) if limit else 0
