"""The one table from exceptions to answers: status, OpenAI's error body, headers.

Everything that a client may learn about a failure is decided here. An exception that is not in the table is our bug:
the client gets 500 and the request id, the log gets the rest. Texts never hold a secret, and a wrong key has one text
whatever was wrong with it.

Retries: the openai client repeats 408, 409, 429 and 5xx twice unless told ``x-should-retry: false``. So a refusal that
waiting cannot cure says so, and one that waiting cures says how long.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from http import HTTPStatus
from traceback import extract_tb
from typing import Any

import msgspec
from starlette.exceptions import HTTPException

from engine.errors import EngineGoneError
from gateway.database import DatabaseUnavailableError
from gateway.engine_link import EngineUnavailableError
from tenancy.access.keys import InvalidApiKeyError, KeyRevokedError
from tenancy.access.operator_tokens import InvalidTokenError
from tenancy.accounts.ledger import Limiter
from tenancy.closing import TenantInactiveError
from tenancy.idempotency import TooManyKeysError
from tenancy.pricing.prices import PriceMissingError
from tenancy.quotas.quota import QuotaUnavailableError

Headers = tuple[tuple[str, str], ...]
FINAL: Headers = (("x-should-retry", "false"),)
CLOSE: Headers = (("connection", "close"),)  # the rest of the request has not been read


@dataclass(frozen=True, slots=True)
class Problem:
    """What one failed request is told."""

    status: int
    type: str
    message: str
    param: str | None = None
    code: str | None = None
    headers: Headers = ()

    def body(self) -> bytes:
        return msgspec.json.encode(self.error())

    def error(self) -> dict[str, dict[str, str | None]]:
        """OpenAI's error object; also the payload of an error event inside a stream."""
        fields = {"message": self.message, "type": self.type, "param": self.param, "code": self.code}
        return {"error": fields}

    def with_headers(self, headers: Headers) -> "Problem":
        return replace(self, headers=self.headers + headers)


class InvalidRequestError(Exception):
    """The request cannot be served as written. `param` names the field, None means the whole body."""

    def __init__(self, message: str, param: str | None = None, code: str = "invalid_value") -> None:
        super().__init__(message)
        self.message, self.param, self.code = message, param, code


class ModelNotFoundError(Exception):
    """`model` is not served here."""


class NotThereError(Exception):
    """Nothing of the caller's has this id. `kind` is what was asked for."""

    def __init__(self, kind: str, name: str) -> None:
        super().__init__(name)
        self.kind, self.name = kind, name


class TierNotAllowedError(Exception):
    """The key or its tenant may not use this service tier."""


class MissingScopeError(Exception):
    """The key is valid but may not do this."""


class ReadOnlyTokenError(Exception):
    """The operator's token is valid but may change nothing."""


class TooManyTriesError(Exception):
    """Too many wrong tokens came from this address."""

    def __init__(self, retry_after_ms: int) -> None:
        super().__init__(retry_after_ms)
        self.retry_after_ms = retry_after_ms


class RefusedError(Exception):
    """What an operator or a tenant asked for is not there (404) or not possible as things are (409)."""

    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status, self.message = status, message


class PressBusyError(Exception):
    """Too many files are being made at this moment."""


class BodyTooLargeError(Exception):
    """The body has more than `limit_bytes`."""

    def __init__(self, limit_bytes: int) -> None:
        super().__init__(limit_bytes)
        self.limit_bytes = limit_bytes


class HeadersTooLargeError(Exception):
    """Request line and headers have more than `limit_bytes`."""

    def __init__(self, limit_bytes: int) -> None:
        super().__init__(limit_bytes)
        self.limit_bytes = limit_bytes


class SlowBodyError(Exception):
    """The body did not arrive in time."""


class RateLimitedError(Exception):
    """A limit of the tenant refused. `kind` is "requests", "tokens" or "concurrency"; `headers` carry the state."""

    def __init__(self, kind: str, retry_after_ms: int, headers: Headers = (), period: str = "minute") -> None:
        super().__init__(kind)
        self.kind, self.retry_after_ms, self.headers, self.period = kind, retry_after_ms, headers, period


class NeverFitsError(Exception):
    """The request needs more tokens than its limit ever holds: no waiting helps."""

    def __init__(self, num_tokens: int, limit_tokens: int, headers: Headers = (), period: str = "minute") -> None:
        super().__init__(num_tokens)
        self.num_tokens, self.limit_tokens, self.headers, self.period = num_tokens, limit_tokens, headers, period


class CreditExhaustedError(Exception):
    """`limiter`, the tenant's credit or a hard budget, does not cover the prompt and one token."""

    def __init__(self, limiter: Limiter, needed_nano_usd: int) -> None:
        super().__init__(needed_nano_usd)
        self.limiter, self.needed_nano_usd = limiter, needed_nano_usd


class IdempotencyMismatchError(Exception):
    """The idempotency key was used before, for another request."""


class ClaimTakenError(Exception):
    """Another request took the same idempotency key at the same moment; it never reaches a client."""


class RequestRunningError(Exception):
    """The request that has the idempotency key has not ended in time."""


class AnswerLostError(Exception):
    """The request that has the idempotency key was billed and has no whole answer to give again."""


class EngineRefusedError(Exception):
    """The engine ended a sequence with an error `code` instead of an answer."""

    def __init__(self, code: str) -> None:
        super().__init__(code)
        self.code = code


class DeadlineExceededError(Exception):
    """The answer took longer than its hold may last."""


def retry_after(milliseconds: int) -> Headers:
    """Both spellings: whole seconds rounded up (RFC 9110) and the exact one that the openai client prefers."""
    milliseconds = max(1, milliseconds)
    return (("retry-after", str(-(-milliseconds // 1000))), ("retry-after-ms", str(milliseconds)))


def problem_of(error: BaseException) -> Problem | None:
    """The answer for `error`; None when it is not in the table, which means a bug of ours."""
    for kind, make in TABLE:
        if isinstance(error, kind):
            return make(error)
    return None


def internal_problem(request_id: str) -> Problem:
    return Problem(
        500,
        "server_error",
        f"Internal error. Quote request id {request_id} when you report it.",
        None,
        "internal_error",
    )


def bug_report(error: BaseException) -> dict[str, str]:
    """What the log may know of a bug: the exception's type and where it was raised.

    Not its message and not the frames' variables: both may hold prompts, keys or SQL parameters.
    """
    places = [f"{frame.filename}:{frame.lineno} in {frame.name}" for frame in extract_tb(error.__traceback__)]
    return {"error": type(error).__qualname__, "raised_at": " > ".join(places[-8:])}


def _invalid(status: int, message: str, code: str | None, param: str | None = None, headers: Headers = ()) -> Problem:
    return Problem(status, "invalid_request_error", message, param, code, headers)


# --- the rows ---------------------------------------------------------------------------------------------------------


def _invalid_key(_: Any) -> Problem:
    headers = (("www-authenticate", 'Bearer realm="bulkhead"'),)
    return Problem(401, "invalid_request_error", "Incorrect API key provided.", None, "invalid_api_key", headers)


def _invalid_token(_: Any) -> Problem:
    headers = (("www-authenticate", 'Bearer realm="bulkhead operators"'),)
    return _invalid(401, "Incorrect operator token provided.", "invalid_operator_token", None, headers)


def _refused(error: RefusedError) -> Problem:
    return _invalid(
        error.status, error.message[:1_024], "not_found" if error.status == 404 else "conflict", None, FINAL
    )


def _too_many_tries(error: TooManyTriesError) -> Problem:
    message = "Too many wrong tokens came from this address. Check the token, then try again later."
    return _invalid(429, message, "too_many_tries", None, retry_after(error.retry_after_ms))


def _rate_limited(error: RateLimitedError) -> Problem:
    # 0: waiting does not help, because the limit itself is 0
    headers = error.headers + (retry_after(error.retry_after_ms) if error.retry_after_ms else FINAL)
    if error.kind == "concurrency":
        message = "Too many requests of this tenant are running: wait until one has ended."
        return Problem(429, "concurrency", message, None, "concurrency_limit_exceeded", headers)
    message = f"Rate limit reached for {error.kind} per {error.period}. Try again in {error.retry_after_ms} ms."
    return Problem(429, error.kind, message, None, "rate_limit_exceeded", headers)


def _never_fits(error: NeverFitsError) -> Problem:
    message = (
        f"Prompt and max_tokens together ask for {error.num_tokens} tokens; a limit of this key holds "
        f"{error.limit_tokens} per {error.period} at most. Ask for fewer tokens."
    )
    return Problem(400, "invalid_request_error", message, "max_tokens", "request_never_fits", error.headers)


def _credit_exhausted(error: CreditExhaustedError) -> Problem:
    limiter, is_credit = error.limiter, error.limiter.name == "credit"
    available_nano_usd = max(0, limiter.available_nano_usd)
    message = (
        f"You exceeded your current {'credit' if is_credit else f'budget ({limiter.name})'}: this request needs at "
        f"least {error.needed_nano_usd} nano-units of the account's currency, {available_nano_usd} are available."
    )
    named: Headers = (("x-bulkhead-budget", f"{limiter.name}; max_tokens=0"),)
    if limiter.available_nano_usd + limiter.held_nano_usd >= error.needed_nano_usd:
        message += " More may come back when requests in flight have ended."
        code = "credit_on_hold" if is_credit else "budget_on_hold"
        return Problem(429, "insufficient_quota", message, None, code, named + retry_after(1_000))
    if limiter.ends_ns is not None:
        message += f" Its period ends at {datetime.fromtimestamp(limiter.ends_ns // 10**9, UTC):%Y-%m-%d %H:%M} UTC."
    return Problem(429, "insufficient_quota", message, None, "insufficient_quota", named + FINAL)


def _engine_refused(error: EngineRefusedError) -> Problem:
    match error.code:
        case "busy":
            return Problem(503, "server_error", "The engine's queue is full.", None, "engine_busy", retry_after(1_000))
        case "draining" | "abort":
            return Problem(503, "server_error", "The server is shutting down.", None, "draining", retry_after(2_000))
        case "closed":
            message = "The engine has stopped taking requests: its isolation audit found too many violations."
            return Problem(503, "server_error", message, None, "isolation_closed", retry_after(30_000))
        case "too_long":
            message = "The prompt is longer than the engine can hold."
            return Problem(400, "invalid_request_error", message, None, "context_length_exceeded")
        case "isolation_violation":
            message = "The isolation auditor stopped this request before any of it was sent."
            return Problem(500, "server_error", message, None, "isolation_violation")
        case _:
            return Problem(502, "server_error", "The engine failed while answering.", None, "engine_failure")


def _running(_: Any) -> Problem:
    message = "The request with this Idempotency-Key is still running."
    return _invalid(409, message, "idempotency_request_running", "Idempotency-Key", retry_after(1_000))


def _answer_lost(error: AnswerLostError) -> Problem:
    message = (
        f"The request with this Idempotency-Key ({error}) was billed for what it had produced, but its whole answer is "
        "not there: it was cut, too large to keep, or the gateway ended. Send another key to run it again."
    )
    return _invalid(409, message, "idempotency_answer_lost", "Idempotency-Key", FINAL)


def _http(error: HTTPException) -> Problem:
    headers = tuple((name.lower(), value) for name, value in (error.headers or {}).items())
    if error.status_code == 404:
        return _invalid(404, "There is no such route.", "unknown_url", None, headers)
    if error.status_code == 405:
        return _invalid(405, "This route does not take this method.", "method_not_allowed", None, headers)
    return _invalid(error.status_code, HTTPStatus(error.status_code).phrase, None, None, headers)


def _unavailable(what: str, code: str, retry_after_ms: int) -> Callable[[Any], Problem]:
    message = f"The {what} is not available. Try again shortly."
    return lambda _: Problem(503, "server_error", message, None, code, retry_after(retry_after_ms))


def _model_not_found(error: ModelNotFoundError) -> Problem:
    return _invalid(404, f"The model {str(error)!r} does not exist.", "model_not_found", "model")


def _no_price(_: Any) -> Problem:
    return Problem(503, "server_error", "The model has no price.", "model", "price_missing", FINAL)


def _too_large(what: str, status: int, code: str) -> Callable[[Any], Problem]:
    return lambda error: _invalid(status, f"The {what} than {error.limit_bytes} bytes.", code, None, CLOSE)


TABLE: tuple[tuple[type[BaseException], Callable[[Any], Problem]], ...] = (
    (InvalidApiKeyError, _invalid_key),
    (InvalidTokenError, _invalid_token),
    (ReadOnlyTokenError, lambda _: _invalid(403, "This token may only read.", "read_only_token")),
    (TooManyTriesError, _too_many_tries),
    (RefusedError, _refused),
    (PressBusyError, _unavailable("press for files", "press_busy", 2_000)),
    (
        TierNotAllowedError,
        lambda error: _invalid(
            403,
            f"This key may not use the service tier {error}: name another as service_tier.",
            "service_tier_not_allowed",
            "service_tier",
        ),
    ),
    (NotThereError, lambda error: _invalid(404, f"No such {error.kind}: {error.name[:256]!r}.", "not_found")),
    (MissingScopeError, lambda _: _invalid(403, "This key may not use this route.", "missing_scope")),
    (InvalidRequestError, lambda error: _invalid(400, error.message, error.code, error.param)),
    (ModelNotFoundError, _model_not_found),
    (SlowBodyError, lambda _: _invalid(408, "The body came too slowly.", "request_timeout", None, FINAL + CLOSE)),
    (BodyTooLargeError, _too_large("body is larger", 413, "body_too_large")),
    (HeadersTooLargeError, _too_large("headers are larger", 431, "headers_too_large")),
    (RateLimitedError, _rate_limited),
    (NeverFitsError, _never_fits),
    (CreditExhaustedError, _credit_exhausted),
    (KeyRevokedError, lambda _: _invalid(403, "This API key was revoked.", "key_revoked", None, FINAL)),
    (TenantInactiveError, lambda _: _invalid(403, "This account is not active.", "account_inactive", None, FINAL)),
    (
        IdempotencyMismatchError,
        lambda _: _invalid(
            422,
            "This Idempotency-Key was used for another request: send another key.",
            "idempotency_key_reused",
            "Idempotency-Key",
            FINAL,
        ),
    ),
    (ClaimTakenError, _running),
    (RequestRunningError, _running),
    (AnswerLostError, _answer_lost),
    (
        TooManyKeysError,
        lambda _: Problem(
            429,
            "requests",
            "Too many idempotency keys are kept for this account: send the request without one, or wait.",
            "Idempotency-Key",
            "idempotency_keys_exhausted",
            FINAL,
        ),
    ),
    (EngineRefusedError, _engine_refused),
    (EngineUnavailableError, _unavailable("engine", "engine_unavailable", 2_000)),
    (EngineGoneError, _unavailable("engine", "engine_gone", 1_000)),
    (DeadlineExceededError, lambda _: Problem(504, "server_error", "Took too long.", None, "deadline_exceeded", FINAL)),
    (DatabaseUnavailableError, _unavailable("ledger", "database_unavailable", 1_000)),
    (QuotaUnavailableError, _unavailable("rate limiter", "quota_unavailable", 1_000)),
    (PriceMissingError, _no_price),
    (HTTPException, _http),
)
