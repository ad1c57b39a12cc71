"""Templates: autoescaped, strict about undefined names, loaded from the package."""

from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from starlette.requests import Request
from starlette.responses import HTMLResponse

from gateway.admin.sessions import Session

SESSION_SCOPE = "bulkhead.admin.session"  # where RequireSession leaves the session for the pages


class Pages:
    def __init__(self) -> None:
        self._environment = Environment(
            loader=PackageLoader("gateway.admin", "templates"),
            autoescape=True,
            undefined=StrictUndefined,
            trim_blocks=True,
            lstrip_blocks=True,
            auto_reload=False,
        )

    def page(
        self,
        request: Request,
        template: str,
        *,
        status_code: int = 200,
        headers: dict[str, str] | None = None,
        **values: Any,
    ) -> HTMLResponse:
        """Render `template` with `values` and the request's session, if it has one."""
        session: Session | None = request.scope.get(SESSION_SCOPE)
        text = self.text(template, session=session, **values)
        return HTMLResponse(text, status_code=status_code, headers=headers)

    def text(self, template: str, **values: Any) -> str:
        return self._environment.get_template(template).render(**values)
