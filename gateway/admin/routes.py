"""The way of a request below /admin, from the outside in.

    headers on every answer -> one table from exceptions to pages -> own origin (POST) -> session -> page

Everything needs a session except the paths in PUBLIC; a route added later is closed until it is named there.
"""

from starlette.exceptions import HTTPException
from starlette.middleware.exceptions import ExceptionMiddleware
from starlette.requests import Request
from starlette.responses import JSONResponse, RedirectResponse, Response
from starlette.routing import BaseRoute, Mount, Route, Router
from starlette.staticfiles import StaticFiles
from starlette.types import ASGIApp, Receive, Scope, Send

from gateway.admin import chart, forms, login, overview, tenant_page
from gateway.admin.attempts import TooManyAttemptsError
from gateway.admin.errors import HOME, LOGIN, ErrorPages, json_error
from gateway.admin.login import LoginBusyError, LoginDesk, WrongPasswordError
from gateway.admin.queries import is_active_operator
from gateway.admin.render import SESSION_SCOPE, Pages
from gateway.admin.security import SecurityHeaders, is_same_origin
from gateway.admin.sessions import COOKIE, Session, SessionStore
from gateway.admin.view import overview_view
from gateway.database import Database
from gateway.services import Services
from tenancy.access.operators import PASSWORD_LENGTH_MAX
from tenancy.ids import NAME_LENGTH_MAX

LOGOUT = "/admin/logout"
LIVE = "/admin/overview.json"
STATIC = "/admin/static/"
PUBLIC = (LOGIN, STATIC)  # the only paths without a session: one exact, one prefix


def admin_routes(services: Services) -> list[BaseRoute]:
    """Every route below /admin, as routes to put into the application's list."""
    sessions = SessionStore(
        services.redis, services.secrets.session_key, now_ns=services.world.now_ns, entropy=services.world.entropy
    )
    site = AdminSite(services, sessions)
    guarded = Guard(Router(site.routes(), redirect_slashes=False), sessions, services.database)
    app = SecurityHeaders(
        ExceptionMiddleware(guarded, handlers=ErrorPages(site.pages).handlers()), static_prefix=STATIC
    )
    return [Route(HOME, app, name="admin"), Route(HOME + "/{rest:path}", app, name="admin_rest")]


class Guard:
    """Pure ASGI: refuses foreign POSTs, lets only PUBLIC through without a session of an active operator."""

    def __init__(self, app: ASGIApp, sessions: SessionStore, database: Database) -> None:
        self._app = app
        self._sessions = sessions
        self._database = database

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        request = Request(scope)
        if scope["method"] not in ("GET", "HEAD") and not is_same_origin(request.headers, scheme=scope["scheme"]):
            raise HTTPException(403, "This form was not sent by one of our own pages.")
        if not is_public(scope["path"]):
            session = await self._session(request, scope["path"])
            if session is None:
                await _no_session(scope["path"])(scope, receive, send)
                return
            scope[SESSION_SCOPE] = session
        await self._app(scope, receive, send)

    async def _session(self, request: Request, path: str) -> Session | None:
        session_id = request.cookies.get(COOKIE, "")
        # A poll of an open page is no sign of a person.
        session = await self._sessions.find(session_id, touch=path != LIVE)
        if session is None or path == LOGOUT:  # logging out works without the database, too
            return session
        async with self._database.read() as conn:
            if await is_active_operator(conn, session.operator_id):
                return session
        await self._sessions.destroy(session_id)
        return None


def is_public(path: str) -> bool:
    return path == LOGIN or path.startswith(STATIC)


def _no_session(path: str) -> Response:
    if path.endswith(".json"):
        return json_error(401, "Log in first.")
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
            Route(HOME + "/", self.home, methods=["GET"]),
            Route(LIVE, self.overview_json, methods=["GET"]),
            Route("/admin/tenants/{tenant_id}", self.tenant, methods=["GET"]),
            Route(LOGIN, self.login_form, methods=["GET"]),
            Route(LOGIN, self.log_in, methods=["POST"]),
            Route(LOGOUT, self.log_out, methods=["POST"]),
            Mount(STATIC.rstrip("/"), StaticFiles(packages=[("gateway.admin", "static")])),
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

    async def home(self, _request: Request) -> Response:
        return RedirectResponse(HOME, status_code=308)

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
            return self._login_page(request, 503, name=name, message=message, retry_after_s=login.BUSY_RETRY_AFTER_S)
        response = RedirectResponse(HOME, status_code=303)
        response.set_cookie(COOKIE, session_id, path="/", secure=True, httponly=True, samesite="strict")
        return response

    async def log_out(self, request: Request) -> Response:
        session: Session = request.scope[SESSION_SCOPE]
        form = await forms.read_form(request)
        if not session.accepts(form.get("csrf_token", "")):
            raise HTTPException(403, "This form belongs to another session. Go back, refresh the page and try again.")
        await self.desk.log_out(request.cookies.get(COOKIE, ""), session.operator_name)
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
            name=name[:NAME_LENGTH_MAX],
            message=message,
            name_chars_max=NAME_LENGTH_MAX,
            password_chars_max=PASSWORD_LENGTH_MAX,
        )


def _period(request: Request) -> overview.Period:
    name = request.query_params.get("period", overview.PERIOD_DEFAULT)
    for period in overview.PERIODS:
        if period.name == name:
            return period
    raise HTTPException(400, "This period is not one of: " + ", ".join(period.name for period in overview.PERIODS))
