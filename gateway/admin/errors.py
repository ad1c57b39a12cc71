"""The one table from exceptions to what the operator sees: a page, or JSON where JSON was asked for."""

from http import HTTPStatus
from typing import Any

import structlog
from redis.exceptions import RedisError
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response

from gateway.admin.render import SESSION_SCOPE, Pages
from gateway.database import DatabaseUnavailableError
from tenancy.quotas.quota import QuotaUnavailableError

HOME = "/admin"
LOGIN = "/admin/login"
RETRY_AFTER_S = "5"  # with every 503
PHRASES = {404: "There is nothing at this address.", 405: "This page cannot be used that way."}

log = structlog.get_logger("gateway.admin")


class ErrorPages:
    def __init__(self, pages: Pages) -> None:
        self._pages = pages

    def handlers(self) -> dict[Any, Any]:
        """For Starlette's ExceptionMiddleware, which picks the nearest class."""
        return {
            HTTPException: self._http_error,
            DatabaseUnavailableError: self._database_down,
            RedisError: self._valkey_down,
            QuotaUnavailableError: self._valkey_down,
            Exception: self._bug,
        }

    async def _http_error(self, request: Request, error: Exception) -> Response:
        assert isinstance(error, HTTPException)
        phrase = HTTPStatus(error.status_code).phrase
        detail = PHRASES.get(error.status_code, "") if error.detail == phrase else error.detail
        return self._error(request, error.status_code, phrase, detail or phrase, headers=dict(error.headers or {}))

    async def _database_down(self, request: Request, error: Exception) -> Response:
        log.warning("admin.database_unavailable", reason=str(error))
        return self._error(
            request,
            503,
            "The database cannot be reached",
            "No figures are shown, because none can be read. Requests of tenants are refused too: nothing is served "
            "that cannot be billed and logged.",
            hint="Check the database server, or the free space of the data folder, then refresh this page.",
            short="The database cannot be reached.",
        )

    async def _valkey_down(self, request: Request, error: Exception) -> Response:
        log.warning("admin.valkey_unavailable", reason=str(error))
        return self._error(
            request,
            503,
            "Valkey cannot be reached",
            "Sessions and limits live there, so nobody can be let in until it is back.",
            hint="Check the Valkey server, then refresh this page.",
            short="Valkey cannot be reached.",
        )

    async def _bug(self, request: Request, error: Exception) -> Response:
        if isinstance(error, ClientDisconnect):
            raise error  # nobody is left to answer; the application's outermost layer counts it
        log.error("admin.failed", method=request.method, path=request.url.path, exc_info=error)
        return self._error(
            request,
            500,
            "This page failed",
            "This is a fault of ours; nothing was changed. The server's log has the details.",
            short="The server failed to answer.",
        )

    def _error(
        self,
        request: Request,
        status_code: int,
        headline: str,
        explanation: str,
        *,
        hint: str = "",
        short: str = "",
        headers: dict[str, str] | None = None,
    ) -> Response:
        headers = headers or {}
        if status_code == 503:
            headers["Retry-After"] = RETRY_AFTER_S
        if request.url.path.endswith(".json"):
            return json_error(status_code, short or explanation, headers)
        link, link_text = (HOME, "To the overview") if SESSION_SCOPE in request.scope else (LOGIN, "To the log-in")
        if status_code >= 500 and request.method == "GET":
            link, link_text = request.url.path, "Refresh"
        return self._pages.page(
            request,
            "error.html",
            status_code=status_code,
            headers=headers,
            headline=headline,
            explanation=explanation,
            hint=hint,
            link=link,
            link_text=link_text,
        )


def json_error(status_code: int, message: str, headers: dict[str, str] | None = None) -> JSONResponse:
    return JSONResponse({"error": {"message": message}}, status_code=status_code, headers=headers)
