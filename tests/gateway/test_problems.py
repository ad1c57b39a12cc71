"""Every row of the table gives OpenAI's error body; what is not in the table is not explained to anyone."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from starlette.exceptions import HTTPException

from engine.errors import EngineGoneError
from gateway.api import problems
from gateway.api.admission import duration
from gateway.api.problems import problem_of, retry_after
from gateway.database import DatabaseUnavailableError
from gateway.engine_link import EngineUnavailableError
from tenancy.access.keys import InvalidApiKeyError, KeyRevokedError
from tenancy.access.operator_tokens import InvalidTokenError
from tenancy.accounts.ledger import Limiter
from tenancy.closing import TenantInactiveError
from tenancy.idempotency import TooManyKeysError
from tenancy.pricing.prices import PriceMissingError
from tenancy.quotas.quota import QuotaUnavailableError


def out_of(limiter: str, held_nano_usd: int) -> problems.CreditExhaustedError:
    return problems.CreditExhaustedError(Limiter(limiter, 1, held_nano_usd, ends_ns=10**18), 2)


# error -> status, type, code, and whether a client should try again: never, later (Retry-After), or as it likes
ROWS: list[tuple[Callable[[], Exception], int, str, str | None, str]] = [
    (InvalidApiKeyError, 401, "invalid_request_error", "invalid_api_key", "open"),
    (InvalidTokenError, 401, "invalid_request_error", "invalid_operator_token", "open"),
    (problems.ReadOnlyTokenError, 403, "invalid_request_error", "read_only_token", "open"),
    (lambda: problems.TooManyTriesError(5), 429, "invalid_request_error", "too_many_tries", "later"),
    (lambda: problems.RefusedError(404, "m"), 404, "invalid_request_error", "not_found", "never"),
    (lambda: problems.RefusedError(409, "m"), 409, "invalid_request_error", "conflict", "never"),
    (problems.PressBusyError, 503, "server_error", "press_busy", "later"),
    (lambda: problems.MissingScopeError("x"), 403, "invalid_request_error", "missing_scope", "open"),
    (lambda: problems.TierNotAllowedError("t"), 403, "invalid_request_error", "service_tier_not_allowed", "open"),
    (lambda: problems.InvalidRequestError("m", "f"), 400, "invalid_request_error", "invalid_value", "open"),
    (lambda: problems.ModelNotFoundError("m"), 404, "invalid_request_error", "model_not_found", "open"),
    (problems.SlowBodyError, 408, "invalid_request_error", "request_timeout", "never"),
    (lambda: problems.BodyTooLargeError(1), 413, "invalid_request_error", "body_too_large", "open"),
    (lambda: problems.HeadersTooLargeError(1), 431, "invalid_request_error", "headers_too_large", "open"),
    (lambda: problems.RateLimitedError("requests", 5), 429, "requests", "rate_limit_exceeded", "later"),
    (lambda: problems.RateLimitedError("tokens", 5), 429, "tokens", "rate_limit_exceeded", "later"),
    (lambda: problems.RateLimitedError("requests", 0), 429, "requests", "rate_limit_exceeded", "never"),
    (lambda: problems.RateLimitedError("concurrency", 5), 429, "concurrency", "concurrency_limit_exceeded", "later"),
    (lambda: problems.NeverFitsError(9, 5), 400, "invalid_request_error", "request_never_fits", "open"),
    (
        lambda: problems.CreditExhaustedError(Limiter("credit", 1, 0), 2),
        429,
        "insufficient_quota",
        "insufficient_quota",
        "never",
    ),
    (
        lambda: problems.CreditExhaustedError(Limiter("credit", 1, 1), 2),
        429,
        "insufficient_quota",
        "credit_on_hold",
        "later",
    ),
    (lambda: out_of("credit", 0), 429, "insufficient_quota", "insufficient_quota", "never"),
    (lambda: out_of("credit", 1), 429, "insufficient_quota", "credit_on_hold", "later"),
    (lambda: out_of("project-day", 0), 429, "insufficient_quota", "insufficient_quota", "never"),
    (lambda: out_of("project-day", 1), 429, "insufficient_quota", "budget_on_hold", "later"),
    (lambda: problems.NotThereError("project", "prj_x"), 404, "invalid_request_error", "not_found", "open"),
    (KeyRevokedError, 403, "invalid_request_error", "key_revoked", "never"),
    (TenantInactiveError, 403, "invalid_request_error", "account_inactive", "never"),
    (problems.IdempotencyMismatchError, 422, "invalid_request_error", "idempotency_key_reused", "never"),
    (problems.ClaimTakenError, 409, "invalid_request_error", "idempotency_request_running", "later"),
    (problems.RequestRunningError, 409, "invalid_request_error", "idempotency_request_running", "later"),
    (lambda: problems.AnswerLostError("r"), 409, "invalid_request_error", "idempotency_answer_lost", "never"),
    (TooManyKeysError, 429, "requests", "idempotency_keys_exhausted", "never"),
    (lambda: problems.EngineRefusedError("busy"), 503, "server_error", "engine_busy", "later"),
    (lambda: problems.EngineRefusedError("draining"), 503, "server_error", "draining", "later"),
    (lambda: problems.EngineRefusedError("abort"), 503, "server_error", "draining", "later"),
    (lambda: problems.EngineRefusedError("closed"), 503, "server_error", "isolation_closed", "later"),
    (lambda: problems.EngineRefusedError("too_long"), 400, "invalid_request_error", "context_length_exceeded", "open"),
    (lambda: problems.EngineRefusedError("isolation_violation"), 500, "server_error", "isolation_violation", "open"),
    (lambda: problems.EngineRefusedError("engine_failure"), 502, "server_error", "engine_failure", "open"),
    (lambda: problems.EngineRefusedError("next_years_code"), 502, "server_error", "engine_failure", "open"),
    (lambda: EngineUnavailableError("secret"), 503, "server_error", "engine_unavailable", "later"),
    (lambda: EngineGoneError(1, 2), 503, "server_error", "engine_gone", "later"),
    (problems.DeadlineExceededError, 504, "server_error", "deadline_exceeded", "never"),
    (lambda: DatabaseUnavailableError("secret"), 503, "server_error", "database_unavailable", "later"),
    (lambda: QuotaUnavailableError("secret"), 503, "server_error", "quota_unavailable", "later"),
    (lambda: PriceMissingError("secret"), 503, "server_error", "price_missing", "never"),
    (lambda: HTTPException(404), 404, "invalid_request_error", "unknown_url", "open"),
    (lambda: HTTPException(405), 405, "invalid_request_error", "method_not_allowed", "open"),
    (lambda: HTTPException(418), 418, "invalid_request_error", None, "open"),
]


@pytest.mark.parametrize(("make", "status", "kind", "code", "retry"), ROWS)
def test_the_table(make: Callable[[], Exception], status: int, kind: str, code: str | None, retry: str) -> None:
    problem = problem_of(make())
    assert problem is not None
    assert (problem.status, problem.type, problem.code) == (status, kind, code)
    error = json.loads(problem.body())["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert error["message"]
    assert "secret" not in error["message"]
    headers = dict(problem.headers)
    assert headers.get("x-should-retry") == ("false" if retry == "never" else None)
    assert ("retry-after" in headers) == (retry == "later")
    assert all(name == name.lower() for name in headers)


def test_every_row_is_tested() -> None:
    tested = {type(row[0]()) for row in ROWS}
    assert {kind for kind, _ in problems.TABLE} == tested


def test_every_code_is_documented() -> None:
    page = (Path(__file__).parents[2] / "docs" / "api.md").read_text()
    assert [code for *_, code, _ in ROWS if code and f"`{code}`" not in page] == []


def test_the_rest_is_a_bug_of_ours() -> None:
    assert problem_of(RuntimeError("a secret")) is None
    opaque = problems.internal_problem("req_1")
    assert (opaque.status, opaque.code) == (500, "internal_error")
    assert "req_1" in opaque.message


def test_a_bug_report_has_neither_message_nor_variables() -> None:
    def fails(prompt: str) -> None:
        raise ValueError(prompt)

    try:
        fails("the prompt")
    except ValueError as error:
        report = problems.bug_report(error)
    assert report["error"] == "ValueError"
    assert "in fails" in report["raised_at"]
    assert "the prompt" not in str(report)


@given(st.integers(1, 10**9))
def test_retry_after_is_never_too_early(milliseconds: int) -> None:
    headers = dict(retry_after(milliseconds))
    assert int(headers["retry-after-ms"]) == milliseconds
    assert milliseconds <= 1_000 * int(headers["retry-after"]) < milliseconds + 1_000


@pytest.mark.parametrize(
    ("milliseconds", "text"),
    [(0, "0ms"), (12, "12ms"), (1_000, "1s"), (1_500, "1.5s"), (60_000, "1m0s"), (61_005, "1m1.005s"), (-5, "0ms")],
)
def test_durations_in_openais_spelling(milliseconds: int, text: str) -> None:
    assert duration(milliseconds) == text
