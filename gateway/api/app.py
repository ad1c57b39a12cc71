"""The HTTP application: a route table behind one outer layer. What is not listed here does not exist (404)."""

from collections.abc import Sequence

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import BaseRoute, Route

from gateway.api.chat import chat_route
from gateway.api.completions import completions_route
from gateway.api.conversation import writes_calls
from gateway.api.edge import Edge
from gateway.api.health import Readiness, healthz
from gateway.api.models import Models
from gateway.api.problems import problem_of
from gateway.api.scrape import Scrape
from gateway.api.settlement import Settler
from gateway.api.translation import Translator
from gateway.operators.routes import operator_routes
from gateway.organization.routes import organization_routes
from gateway.services import Services


def create_app(services: Services, *, extra_routes: Sequence[BaseRoute] = ()) -> Starlette:
    """`app.state.settler` must be drained at shutdown, after the last request and before the database is closed."""
    settler = Settler(services)
    tokenizer = services.tokenizer
    translator = Translator(tokenizer, services.settings, services.world.entropy, writes_calls(tokenizer))
    models = Models(services)

    app = Starlette(
        routes=[
            Route("/v1/chat/completions", chat_route(services, settler, translator), methods=["POST"]),
            Route("/v1/completions", completions_route(services, settler, translator), methods=["POST"]),
            Route("/v1/models", models.list, methods=["GET"]),
            Route("/v1/models/{model_id:path}", models.one, methods=["GET"]),
            Route("/healthz", healthz, methods=["GET"]),
            Route("/readyz", Readiness(services).answer, methods=["GET"]),
            Route("/metrics", Scrape(services).answer, methods=["GET"]),
            *organization_routes(services),
            *operator_routes(services),
            *extra_routes,
        ],
        exception_handlers={HTTPException: _http_problem},
        middleware=[Middleware(Edge, services.settings, services.world, services.metrics, stages=services.stages)],
    )
    app.router.redirect_slashes = False
    app.state.settler = settler
    return app


async def _http_problem(_: Request, error: Exception) -> Response:
    """Starlette's own 404 and 405 in OpenAI's words."""
    problem = problem_of(error)
    assert problem is not None
    return Response(problem.body(), problem.status, dict(problem.headers), "application/json")
