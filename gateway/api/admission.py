"""From an authenticated request to a right to run: a lease in Valkey, then one transaction.

    acquire   all limits of the caller or none; costs prompt + max_tokens, the most it can use
    T1        price pinned, worst case held in nano-USD, `request.admitted` in the outbox, idempotency key claimed

When the credit or a hard budget does not cover the worst case, max_tokens is lowered to what the smallest remainder
covers, and the answer names that one in `x-bulkhead-budget`; it is refused only when one token is not covered.

Nothing runs before both have succeeded. When T1 fails, what had been taken is given back, also when it is not known
whether T1 committed.
"""

from collections.abc import MutableMapping
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any

from sqlalchemy.ext.asyncio import AsyncConnection

from audit.transparency.entry import Entry
from audit.transparency.outbox import append
from gateway.api.auth import Caller
from gateway.api.one_trip import do_and_tell
from gateway.api.problems import ClaimTakenError, CreditExhaustedError, Headers, NeverFitsError, RateLimitedError
from gateway.api.translation import Work
from gateway.budget_alerts import append_expired
from gateway.services import Services
from gateway.stages import passed
from gateway.world import new_id
from tenancy.access.keys import InvalidApiKeyError, Principal, require_alive
from tenancy.accounts.ledger import Hold, InsufficientCredit, place_hold
from tenancy.accounts.one_trip import place_hold as place_in_one_trip
from tenancy.closing import TenantInactiveError, require_active
from tenancy.idempotency import IdempotencyKey, TooManyKeysError
from tenancy.idempotency import claim as take_key
from tenancy.pricing.price_book import price_at
from tenancy.pricing.prices import Price, PriceMissingError, affordable_tokens, worst_case_nano_usd
from tenancy.pricing.volume import volume_of
from tenancy.quotas.quota import Lease, QuotaSnapshot, QuotaUnavailableError, Refused
from tenancy.quotas.quota_epochs import mark_strayed

EPOCH_TRIES = 3  # how often a request is admitted again because its counters were made anew meanwhile

KIND_OF_LIMIT = {
    "requests_per_minute": "requests",
    "tokens_per_minute": "tokens",
    "concurrency_max": "concurrency",
    "tokens_per_day": "tokens",
}


@dataclass(frozen=True, slots=True)
class Admission:
    """What one request has been granted and still owes an ending."""

    request_id: str
    principal: Principal
    lease: Lease
    hold_id: str
    price: Price
    hold_nano_usd: int
    model: str
    num_prompt_tokens: int
    max_tokens: int  # what the hold pays for, all answers together: at most what was asked
    stream: bool
    started_ns: int
    expires_ns: int  # of the hold
    tier: str = "default"
    num_tokens_before: int = 0  # of the account's volume at admission: it can only have grown when this is settled
    lowered_by: str = ""  # the credit or budget that max_tokens was lowered to


@dataclass(slots=True)
class Claim:
    """What an admission has taken so far: kept apart from its task, so that a failure knows what to give back."""

    request_id: str
    lease: Lease | None = None
    hold_id: str | None = None  # set before T1: whether it committed may stay unknown
    tenant_id: str = ""
    key: IdempotencyKey | None = None  # the client's own name for the request, claimed in T1


class StaleLeaseError(Exception):
    """The lease was granted by counters that have been made anew since, and do not know of it."""


async def admit(
    services: Services, caller: Caller, work: Work, claim: Claim, state: MutableMapping[str, Any]
) -> Admission:
    """Lease, then T1. Leaves the x-ratelimit headers in `state` for whatever answer follows.

    Raises RateLimitedError, NeverFitsError, CreditExhaustedError, PriceMissingError, TenantInactiveError;
    ClaimTakenError or TooManyKeysError for its idempotency key;
    QuotaUnavailableError or DatabaseUnavailableError: without Valkey and database nothing is served. The caller then
    undoes `claim`.
    """
    claim.tenant_id = caller.principal.tenant_id
    for _ in range(EPOCH_TRIES):
        claim.lease = await _acquire(services, caller, work, claim.request_id)
        state["answer_headers"] = _lease_headers(claim.lease)
        passed(state, "quota")
        try:
            admission = await _hold(services, caller, work, claim)
        except StaleLeaseError:
            services.allowance.stale(claim.lease)
            claim.lease = None
            continue
        passed(state, "hold")
        if admission.lowered_by:
            lowered = f"{admission.lowered_by}; max_tokens={admission.max_tokens}"
            state["answer_headers"] += (("x-bulkhead-budget", lowered),)
        return admission
    raise QuotaUnavailableError("the counters were made anew again and again")


async def _hold(services: Services, caller: Caller, work: Work, claim: Claim) -> Admission:
    """T1. Leaves hold_id in `claim` unless it is known that nothing is held."""
    assert claim.lease is not None
    claim.hold_id = new_id("hold", services.world.entropy)
    try:
        if (quick := await _hold_in_one_trip(services, caller, work, claim)) is not None:
            return quick
        async with services.database.transaction(claim.tenant_id) as conn:
            admission = await write_admission(
                conn, services, caller, work, claim.request_id, claim.lease, claim.hold_id
            )
            if claim.key is not None:
                await _claim_key(conn, services, claim.key, admission)
    except (
        CreditExhaustedError,
        InvalidApiKeyError,
        PriceMissingError,
        TenantInactiveError,
        ClaimTakenError,
        TooManyKeysError,
        StaleLeaseError,
    ):
        claim.hold_id = None  # refused before anything was held
        raise
    services.remembered.keep_price(claim.tenant_id, work.model, work.tier, admission.price)
    return admission


async def _hold_in_one_trip(services: Services, caller: Caller, work: Work, claim: Claim) -> Admission | None:
    """T1 for the common case (one_trip.py). None: nothing has happened, and write_admission decides."""
    lease, price = claim.lease, services.remembered.price(claim.tenant_id, work.model, work.tier)
    assert lease is not None
    assert claim.hold_id is not None
    plain = claim.key is None and lease.mode == "store" and not lease.would_refuse
    if services.database.is_sqlite or not plain or price is None or price.steps:
        return None
    admission = _admission(services, caller, work, claim.request_id, lease, claim.hold_id, price, 0)
    principal = caller.principal
    statement = place_in_one_trip(
        hold_id=admission.hold_id,
        tenant_id=principal.tenant_id,
        project_id=principal.project_id,
        key_id=principal.key_id,
        request_id=admission.request_id,
        gateway_id=services.gateway_id,
        epoch=lease.epoch,
        price_id=price.price_id,
        model=work.model,
        tier=work.tier,
        amount_nano_usd=admission.hold_nano_usd,
        num_tokens=lease.num_tokens,
        now_ns=admission.started_ns,
        expires_ns=admission.expires_ns,
    )
    entry = admitted_entry(admission)
    done = await do_and_tell(services.database, statement, entry, entropy=services.world.entropy)
    return admission if done else None


async def _claim_key(conn: AsyncConnection, services: Services, key: IdempotencyKey, admission: Admission) -> None:
    """Raises ClaimTakenError or TooManyKeysError."""
    settings, now_ns = services.settings, admission.started_ns
    ttl_s = max(settings.idempotency_ttl_s, settings.hold_ttl_s)  # never free while the request may run
    expires_ns = now_ns + ttl_s * 1_000_000_000
    keys_max = settings.idempotency_keys_max
    if not await take_key(conn, key, admission.request_id, now_ns=now_ns, expires_ns=expires_ns, keys_max=keys_max):
        raise ClaimTakenError


async def show_limits(services: Services, caller: Caller, state: MutableMapping[str, Any]) -> None:
    """The x-ratelimit headers of an answer that takes nothing; left out while Valkey is away."""
    with suppress(QuotaUnavailableError):
        snapshot = await services.allowance.usage_now(caller.principal.tenant_id, caller.limits)
        state["answer_headers"] = rate_limit_headers(snapshot)


async def _acquire(services: Services, caller: Caller, work: Work, request_id: str) -> Lease:
    """A place under every limit of the caller, or none."""
    num_tokens = work.num_prompt_tokens + work.max_tokens
    result = await services.allowance.acquire(
        caller.principal, caller.limits, lease_id=request_id, num_tokens=num_tokens
    )
    if isinstance(result, Refused):
        raise _refusal(result, work)
    return result


async def write_admission(
    conn: AsyncConnection, services: Services, caller: Caller, work: Work, request_id: str, lease: Lease, hold_id: str
) -> Admission:
    """T1's statements.

    Raises CreditExhaustedError, PriceMissingError, TenantInactiveError or StaleLeaseError: roll back then.
    """
    started_ns = services.world.now_ns()
    tenant_id = caller.principal.tenant_id
    price = await price_at(conn, work.model, started_ns, work.tier, tenant_id=tenant_id)
    before = await volume_of(conn, tenant_id, price, started_ns)
    admission = _admission(services, caller, work, request_id, lease, hold_id, price, before, started_ns)
    held = await _place(conn, admission, services.gateway_id)
    expired = held.expired
    if isinstance(held, InsufficientCredit):
        admission = _lowered(admission, held)
        held = await _place(conn, admission, services.gateway_id)
        assert not isinstance(held, InsufficientCredit), "the refused hold had locked the tenant's accounts"
    await append_expired(conn, expired, started_ns, entropy=services.world.entropy)
    if await require_active(conn, tenant_id) != lease.epoch:  # after the hold: see tenancy/closing.py
        raise StaleLeaseError
    if lease.mode != "store":
        await mark_strayed(conn, caller.principal.organisation_id)
    if caller.remembered:
        await require_alive(conn, caller.principal.key_id, started_ns)
    await append(conn, admitted_entry(admission), entropy=services.world.entropy)
    for scope_id, limit_name in lease.would_refuse:
        services.metrics.would_refuse(admission.principal.tenant_name, limit_name)
        shadow: dict[str, str | int | bool | list[str]] = {
            "request_id": request_id,
            "scope_id": scope_id,
            "limit_name": limit_name,
        }
        entry = Entry("limit.would_refuse", tenant_id, started_ns, shadow)
        await append(conn, entry, entropy=services.world.entropy)
    return admission


def _admission(
    services: Services,
    caller: Caller,
    work: Work,
    request_id: str,
    lease: Lease,
    hold_id: str,
    price: Price,
    before: int,
    started_ns: int | None = None,
) -> Admission:
    """With all the tokens that were asked for."""
    if started_ns is None:
        started_ns = services.world.now_ns()
    return Admission(
        request_id=request_id,
        principal=caller.principal,
        lease=lease,
        hold_id=hold_id,
        price=price,
        hold_nano_usd=worst_case_nano_usd(price, work.num_prompt_tokens, work.max_tokens, work.tier, before),
        model=work.model,
        num_prompt_tokens=work.num_prompt_tokens,
        max_tokens=work.max_tokens,
        stream=work.stream,
        started_ns=started_ns,
        expires_ns=started_ns + services.settings.hold_ttl_s * 1_000_000_000,
        tier=work.tier,
        num_tokens_before=before,
    )


def admitted_entry(admission: Admission) -> Entry:
    body: dict[str, str | int | bool | list[str]] = {
        "request_id": admission.request_id,
        "key_id": admission.principal.key_id,
        "model": admission.model,
        "price_id": admission.price.price_id,
        "num_prompt_tokens": admission.num_prompt_tokens,
        "max_tokens": admission.max_tokens,
        "hold_nano_usd": admission.hold_nano_usd,
    }
    return Entry("request.admitted", admission.principal.tenant_id, admission.started_ns, body)


async def _place(conn: AsyncConnection, admission: Admission, gateway_id: str) -> Hold | InsufficientCredit:
    return await place_hold(
        conn,
        hold_id=admission.hold_id,
        tenant_id=admission.principal.tenant_id,
        request_id=admission.request_id,
        price_id=admission.price.price_id,
        amount_nano_usd=admission.hold_nano_usd,
        expires_ns=admission.expires_ns,
        now_ns=admission.started_ns,
        project_id=admission.principal.project_id,
        key_id=admission.principal.key_id,
        num_tokens=admission.lease.num_tokens,
        gateway_id=gateway_id,
        tier=admission.tier,
    )


def _lowered(admission: Admission, refused: InsufficientCredit) -> Admission:
    """The same request with as many tokens as the smallest remainder pays for.

    Raises CreditExhaustedError when that is not one: it names what no waiting cures, if there is such a limiter.
    """
    price, num_prompt_tokens = admission.price, admission.num_prompt_tokens
    on = (admission.tier, admission.num_tokens_before)
    tightest = min(refused.limiters, key=lambda limiter: limiter.available_nano_usd)
    max_tokens = affordable_tokens(price, num_prompt_tokens, admission.max_tokens, refused.available_nano_usd, *on)
    if max_tokens == 0:
        needed_nano_usd = worst_case_nano_usd(price, num_prompt_tokens, 1, *on)
        spent = [one for one in refused.limiters if one.available_nano_usd + one.held_nano_usd < needed_nano_usd]
        raise CreditExhaustedError(spent[0] if spent else tightest, needed_nano_usd)
    hold_nano_usd = worst_case_nano_usd(price, num_prompt_tokens, max_tokens, *on)
    return replace(admission, max_tokens=max_tokens, hold_nano_usd=hold_nano_usd, lowered_by=tightest.name)


def _refusal(refused: Refused, work: Work) -> Exception:
    headers = rate_limit_headers(refused.snapshot)
    period = "day" if refused.limit_name == "tokens_per_day" else "minute"
    if refused.code == "never_fits" and KIND_OF_LIMIT[refused.limit_name] == "tokens":
        num_tokens = work.num_prompt_tokens + work.max_tokens
        return NeverFitsError(num_tokens, refused.limit, headers, period)
    return RateLimitedError(KIND_OF_LIMIT[refused.limit_name], refused.retry_after_ms, headers, period)


def _lease_headers(lease: Lease) -> Headers:
    headers = rate_limit_headers(lease.snapshot)
    if lease.would_refuse:
        headers += (("x-bulkhead-would-refuse", ", ".join(sorted({name for _, name in lease.would_refuse}))),)
    if lease.mode != "store":
        headers += (("x-bulkhead-limits", lease.mode),)
    return headers


def rate_limit_headers(snapshot: QuotaSnapshot) -> Headers:
    """OpenAI's x-ratelimit headers of the tightest scope; a limit that is not set has no header."""
    headers: list[tuple[str, str]] = []
    rows = (
        ("requests", snapshot.limit_requests, snapshot.remaining_requests, snapshot.reset_requests_ms),
        ("tokens", snapshot.limit_tokens, snapshot.remaining_tokens, snapshot.reset_tokens_ms),
    )
    for name, limit, remaining, reset_ms in rows:
        if limit is None:
            continue
        headers.append((f"x-ratelimit-limit-{name}", str(limit)))
        headers.append((f"x-ratelimit-remaining-{name}", str(max(0, remaining or 0))))
        headers.append((f"x-ratelimit-reset-{name}", duration(reset_ms or 0)))
    return tuple(headers)


def duration(milliseconds: int) -> str:
    """OpenAI's spelling: 12ms, 1.5s, 6m0s."""
    if milliseconds < 1_000:
        return f"{max(0, milliseconds)}ms"
    minutes, rest_ms = divmod(milliseconds, 60_000)
    seconds = f"{rest_ms // 1000}.{rest_ms % 1000:03}".rstrip("0").rstrip(".") + "s"
    return f"{minutes}m{seconds}" if minutes else seconds
