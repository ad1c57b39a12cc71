"""The way of a request below /admin, from the outside in.

    headers on every answer -> one table from exceptions to pages -> own origin (POST) -> session -> page

Everything needs a session except the paths in PUBLIC; a route added later is closed until it is named there.
"""

import logging
from collections.abc import Mapping
from http import HTTPStatus

from redis.exceptions import RedisError
from starlette.exceptions import HTTPException
from starlette.middleware.exceptions import ExceptionMiddleware
from starlette.requests import Request
from starlette.responses import JSONResponse, RedirectResponse, Response
from starlette.routing import BaseRoute, Mount, Route, Router
from starlette.staticfiles import StaticFiles
from starlette.types import ASGIApp, Receive, Scope, Send

from gateway.admin import chart, forms, login, overview, tenant_page
from gateway.admin.attempts import TooManyAttemptsError
from gateway.admin.login import LoginBusyError, LoginDesk, WrongPasswordError
from gateway.admin.render import SESSION_SCOPE, Pages
from gateway.admin.security import SecurityHeaders, is_same_origin
from gateway.admin.sessions import COOKIE, Session, SessionStore
from gateway.admin.view import overview_view
from gateway.database import DatabaseUnavailableError
from gateway.services import Services
from tenancy.ids import NAME_LENGTH_MAX
from tenancy.operators import PASSWORD_LENGTH_MAX
from tenancy.quota import QuotaUnavailableError

logger = logging.getLogger(__name__)

HOME = "/admin"
LOGIN = "/admin/login"
LIVE = "/admin/overview.json"
STATIC = "/admin/static/"
PUBLIC = (LOGIN, STATIC)  # the only paths without a session: one exact, one prefix
RETRY_AFTER_S = "5"


def admin_routes(services: Services) -> list[BaseRoute]:
    """Every route below /admin, as routes to put into the application's list."""
    sessions = SessionStore(
        services.redis, services.secrets.session_key, now_ns=services.world.now_ns, entropy=services.world.entropy
    )
    site = AdminSite(services, sessions)
    guarded = Guard(Router(site.routes(), redirect_slashes=False), sessions)
    app = SecurityHeaders(ExceptionMiddleware(guarded, handlers=site.error_handlers()), static_prefix=STATIC)
    return [Route(HOME, app, name="admin"), Route(HOME + "/{rest:path}", app, name="admin_rest")]


class Guard:
    """Pure ASGI: refuses foreign POSTs, lets only PUBLIC through without a session."""

    def __init__(self, app: ASGIApp, sessions: SessionStore) -> None:
        self.app = app
        self.sessions = sessions

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        request = Request(scope)
        path = request.url.path
        if request.method not in ("GET", "HEAD") and not is_same_origin(request.headers, scheme=request.url.scheme):
            raise HTTPException(403, "This form was not sent by one of our own pages.")
        if not is_public(path):
            # A poll of an open page is no sign of a person.
            session = await self.sessions.find(request.cookies.get(COOKIE, ""), touch=path != LIVE)
            if session is None:
                response = _no_session(path)
                await response(scope, receive, send)
                return
            scope[SESSION_SCOPE] = session
        await self.app(scope, receive, send)


def is_public(path: str) -> bool:
    return path == LOGIN or path.startswith(STATIC)


def _no_session(path: str) -> Response:
    if path.endswith(".json"):
        return _json_error(401, "Log in first.")
    return RedirectResponse(LOGIN, status_code=303)


class AdminSite:
    def __init__(self, services: Services, sessions: SessionStore) -> None:
        self.services = services
        self.sessions = sessions
        self.desk = LoginDesk(services, sessions)
        self.pages = Pages()

    def routes(self) -> list[BaseRoute]:
        return [
            Route(HOME, self.overview, methods=["GET"]),
            Route(LIVE, self.overview_json, methods=["GET"]),
            Route("/admin/tenants/{tenant_id}", self.tenant, methods=["GET"]),
            Route(LOGIN, self.login_form, methods=["GET"]),
            Route(LOGIN, self.log_in, methods=["POST"]),
            Route("/admin/logout", self.log_out, methods=["POST"]),
            Mount(STATIC.rstrip("/"), StaticFiles(packages=[("gateway", "static")])),
        ]

    # Pages

    async def overview(self, request: Request) -> Response:
        figures = await overview.gather(self.services, _period(request))
        return self.pages.page(
            request,
            "overview.html",
            view=overview_view(figures),
            periods={period.name: period.label for period in overview.PERIODS},
            labels=chart.LABELS,
        )

    async def overview_json(self, request: Request) -> Response:
        view = overview_view(await overview.gather(self.services, _period(request)))
        return JSONResponse(
            {
                "layout": view.layout,
                "fields": view.fields,
                "states": view.states,
                "meters": view.meters,
                "charts": view.charts,
            }
        )

    async def tenant(self, request: Request) -> Response:
        page = await tenant_page.gather(
            self.services, request.path_params["tenant_id"], before=request.query_params.get("before", "")
        )
        if page is None:
            raise HTTPException(404, "There is no such tenant.")
        return self.pages.page(request, "tenant.html", page=page, labels=chart.LABELS)

    # Log-in and log-out

    async def login_form(self, request: Request) -> Response:
        session = await self.sessions.find(request.cookies.get(COOKIE, ""), touch=True)
        if session is not None:
            return RedirectResponse(HOME, status_code=303)
        return self._login_page(request)

    async def log_in(self, request: Request) -> Response:
        form = await forms.read_form(request)
        name = form.get("name", "")
        try:
            session_id = await self.desk.log_in(
                name=name,
                password=form.get("password", ""),
                address=request.client.host if request.client else "",
                old_session_id=request.cookies.get(COOKIE, ""),
            )
        except WrongPasswordError:
            return self._login_page(request, 401, name=name, message="Name or password is wrong.")
        except TooManyAttemptsError as error:
            minutes = -(-error.retry_after_s // 60)
            message = f"Too many attempts. Try again in {minutes} minute{'' if minutes == 1 else 's'}."
            return self._login_page(request, 429, name=name, message=message, retry_after_s=error.retry_after_s)
        except LoginBusyError:
            message = "Many people are logging in right now. Try again in a few seconds."
            return self._login_page(
                request, 503, name=name, message=message, retry_after_s=login.BUSY_RETRY_AFTER_S
            )
        response = RedirectResponse(HOME, status_code=303)
        response.set_cookie(COOKIE, session_id, path="/", secure=True, httponly=True, samesite="strict")
        return response

    async def log_out(self, request: Request) -> Response:
        session: Session = request.scope[SESSION_SCOPE]
        form = await forms.read_form(request)
        if not session.accepts(form.get("csrf_token", "")):
            raise HTTPException(403, "This form belongs to another session. Go back, refresh the page and try again.")
        await self.sessions.destroy(request.cookies.get(COOKIE, ""))
        response = RedirectResponse(LOGIN, status_code=303)
        response.delete_cookie(COOKIE, path="/", secure=True, httponly=True, samesite="strict")
        return response

    def _login_page(
        self, request: Request, status_code: int = 200, *, name: str = "", message: str = "", retry_after_s: int = 0
    ) -> Response:
        return self.pages.page(
            request,
            "login.html",
            status_code=status_code,
            headers={"Retry-After": str(retry_after_s)} if retry_after_s else None,
            name=name[: NAME_LENGTH_MAX],
            message=message,
            name_chars_max=NAME_LENGTH_MAX,
            password_chars_max=PASSWORD_LENGTH_MAX,
        )

    # Errors: the one table

    def error_handlers(self) -> Mapping[object, object]:
        return {
            HTTPException: self._http_error,
            DatabaseUnavailableError: self._database_down,
            RedisError: self._valkey_down,
            QuotaUnavailableError: self._valkey_down,
            Exception: self._bug,
        }

    async def _http_error(self, request: Request, error: Exception) -> Response:
        assert isinstance(error, HTTPException)
        text = {404: "There is nothing at this address.", 405: "This page cannot be used that way."}
        phrase = HTTPStatus(error.status_code).phrase
        detail = text.get(error.status_code, "") if error.detail == phrase else error.detail
        return self._error(request, error.status_code, phrase, detail or phrase, headers=dict(error.headers or {}))

    async def _database_down(self, request: Request, error: Exception) -> Response:
        logger.warning("admin page: database unavailable: %s", error)
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
        logger.warning("admin page: Valkey unavailable: %s", error)
        return self._error(
            request,
            503,
            "Valkey cannot be reached",
            "Sessions and limits live there, so nobody can be let in until it is back.",
            hint="Check the Valkey server, then refresh this page.",
            short="Valkey cannot be reached.",
        )

    async def _bug(self, request: Request, error: Exception) -> Response:
        logger.error("admin page failed: %s %s", request.method, request.url.path, exc_info=error)
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
            return _json_error(status_code, short or explanation, headers)
        is_known = SESSION_SCOPE in request.scope
        return self.pages.page(
            request,
            "error.html",
            status_code=status_code,
            headers=headers,
            headline=headline,
            explanation=explanation,
            hint=hint,
            link=request.url.path if status_code >= 500 else (HOME if is_known else LOGIN),
            link_text="Refresh" if status_code >= 500 else ("To the overview" if is_known else "To the log-in"),
        )


def _period(request: Request) -> overview.Period:
    name = request.query_params.get("period", overview.PERIOD_DEFAULT)
    for period in overview.PERIODS:
        if period.name == name:
            return period
    raise HTTPException(400, "This period is not one of: " + ", ".join(period.name for period in overview.PERIODS))


def _json_error(status_code: int, message: str, headers: dict[str, str] | None = None) -> JSONResponse:
    return JSONResponse({"error": {"message": message}}, status_code=status_code, headers=headers)
